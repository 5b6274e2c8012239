"""torchvision.models.VisionTransformer."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vitkern.checkpoint._rules import Fields, Format, State, layers, only, rule
from vitkern.model.config import ViTConfig
from vitkern.model.presets import IMAGENET

_BLOCK = "encoder.layers.encoder_layer_{i}."


class Torchvision(Format):
    """Files of before 2022 name the MLP's layers linear_1 and linear_2; both are read."""

    name = "torchvision"
    title = "torchvision's VisionTransformer"
    rules = (
        rule("cls_token", "class_token"),
        rule("pos_embed", "encoder.pos_embedding"),
        rule("blocks.{i}.attn.qkv.weight", _BLOCK + "self_attention.in_proj_weight"),
        rule("blocks.{i}.attn.qkv.bias", _BLOCK + "self_attention.in_proj_bias"),
        *layers(
            {
                "patch_embed.proj": "conv_proj",
                "blocks.{i}.norm1": _BLOCK + "ln_1",
                "blocks.{i}.attn.proj": _BLOCK + "self_attention.out_proj",
                "blocks.{i}.norm2": _BLOCK + "ln_2",
                "blocks.{i}.mlp.fc1": _BLOCK + "mlp.0",
                "blocks.{i}.mlp.fc2": _BLOCK + "mlp.3",
                "norm": "encoder.ln",
                "pre_logits.fc": "heads.pre_logits",
                "head": "heads.head",
            }
        ),
    )
    fields: ClassVar[Fields] = {
        "norm_layer": ("layernorm", 1e-6),
        "act_layer": "gelu",
        "global_pool": "token",
        "pos_resample": "torchvision",
    }

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the names of its first layer and of its blocks."""
        first = "encoder.layers.encoder_layer_0.ln_1.weight"
        return first in state and any(key.startswith("conv_proj.") for key in state)

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Under the names of today."""
        names = {"linear_1": "0", "linear_2": "3"}
        old = re.compile(r"\.mlp\.(linear_[12])\.")
        return {
            old.sub(lambda m: f".mlp.{names[m[1]]}.", key): value for key, value in state.items()
        }

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Stems of several convolutions are another network."""
        return None if "conv_proj.weight" in state else "its stem is several convolutions"

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """How torchvision's own weights saw RGB images."""
        return dict(IMAGENET) if state["conv_proj.weight"].shape[1] == 3 else {}

    def unfit(self, config: ViTConfig) -> str | None:
        """One token, learned positions, one norm behind the blocks."""
        for name in ("img_size", "patch_size"):
            rows, columns = getattr(config, name)
            if rows != columns:
                return f"no {name}={(rows, columns)}: squares only"
        if not config.num_classes:
            return "no num_classes=0"
        return only(config, ("norm_layer", "representation_size"))
