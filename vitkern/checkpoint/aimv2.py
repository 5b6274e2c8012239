"""AIMv2 as Apple saves it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vitkern.checkpoint._rules import Fields, Format, State, layers, only, rule
from vitkern.model.config import ViTConfig
from vitkern.model.presets import OPENAI

_RMS = ("rmsnorm", 1e-5)
_BLOCK = "trunk.blocks.{i}."


class Aimv2(Format):
    """RMSNorm, also behind the patches, a gated MLP, heads of 128, no class token, no biases."""

    name = "aimv2"
    title = "Apple's AIMv2"
    rules = (
        rule("pos_embed", "preprocessor.pos_embed"),
        *layers(
            {
                "patch_embed.proj": "preprocessor.patchifier.proj",
                "patch_embed.norm": "preprocessor.patchifier.norm",
                "blocks.{i}.norm1": _BLOCK + "norm_1",
                "blocks.{i}.attn.qkv": _BLOCK + "attn.qkv",
                "blocks.{i}.attn.proj": _BLOCK + "attn.proj",
                "blocks.{i}.norm2": _BLOCK + "norm_2",
                "blocks.{i}.mlp.fc1_g": _BLOCK + "mlp.fc1",
                "blocks.{i}.mlp.fc1_x": _BLOCK + "mlp.fc3",
                "blocks.{i}.mlp.fc2": _BLOCK + "mlp.fc2",
                "norm": "trunk.post_trunk_norm",
            }
        ),
    )
    fields: ClassVar[Fields] = {
        "norm_layer": _RMS,
        "embed_norm_layer": _RMS,
        "act_layer": "silu",
        "global_pool": "avg",
        "fc_norm": False,
        **OPENAI,
    }
    dropped: ClassVar[dict[str, str]] = {r"head\.": "attention pooling for the caption's decoder"}

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the name of its patches."""
        return "preprocessor.patchifier.proj.weight" in state

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Heads of 128."""
        return {"num_heads": max(state["preprocessor.patchifier.proj.weight"].shape[0] // 128, 1)}

    def unfit(self, config: ViTConfig) -> str | None:
        """One architecture in several sizes."""
        fixed = {
            **{key: value for key, value in self.fields.items() if key not in OPENAI},
            "class_token": False,
            "qkv_bias": False,
            "proj_bias": False,
            "mlp_layer": "swiglu",
            "num_classes": 0,
        }
        if config.num_classes:
            return f"no num_classes={config.num_classes} (expected 0)"
        return only(config, ("in_chans",), fixed)
