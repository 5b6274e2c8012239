"""Hugging Face's DINOv2, with and without registers.

With registers the class token alone has a position, position 0: the two are added up, as their sum
is all that the network ever sees. Writing puts the sum in the class token, and zeros at position 0.

A Dinov2ForImageClassification reads the class token beside the mean of the patches, [2 D] wide: no
head of a ViT does. Its trunk is read, the classifier is dropped.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkern.checkpoint._rules import Fields, Format, State, layers, only, rule
from vitkern.checkpoint.huggingface import (
    PATCHES,
    prefix_of,
    problem_of,
    read_config,
    read_images,
    without,
    written_config,
    written_images,
)
from vitkern.model.config import ViTConfig
from vitkern.model.presets import IMAGENET

_BLOCK = "encoder.layer.{i}."


class HuggingFaceDinov2(Format):
    """Dinov2Model, its backbone, and those with registers; a file's spelling or a module's."""

    name = "huggingface-dinov2"
    title = "Hugging Face's DINOv2"
    rules = (
        rule("cls_token", "embeddings.cls_token"),
        rule("reg_token", "embeddings.register_tokens"),
        rule("pos_embed", "embeddings.position_embeddings"),
        rule("blocks.{i}.ls1.gamma", _BLOCK + "layer_scale1.lambda1"),
        rule("blocks.{i}.ls2.gamma", _BLOCK + "layer_scale2.lambda1"),
        *layers(
            {
                "patch_embed.proj": "embeddings.patch_embeddings.projection",
                "blocks.{i}.norm1": _BLOCK + "norm1",
                "blocks.{i}.attn.qkv": (
                    _BLOCK + "attention.attention.query",
                    _BLOCK + "attention.attention.key",
                    _BLOCK + "attention.attention.value",
                ),
                "blocks.{i}.attn.proj": _BLOCK + "attention.output.dense",
                "blocks.{i}.norm2": _BLOCK + "norm2",
                "blocks.{i}.mlp.fc1": _BLOCK + "mlp.fc1",
                "blocks.{i}.mlp.fc2": _BLOCK + "mlp.fc2",
                "norm": "layernorm",
            }
        ),
        # A gated MLP, [gate; value] in one.
        *layers(
            {
                "blocks.{i}.mlp.fc1": _BLOCK + "mlp.weights_in",
                "blocks.{i}.mlp.fc2": _BLOCK + "mlp.weights_out",
            }
        ),
        # Models of transformers 5 have these names in memory.
        *layers(
            {
                "blocks.{i}.attn.qkv": (
                    _BLOCK + "attention.q_proj",
                    _BLOCK + "attention.k_proj",
                    _BLOCK + "attention.v_proj",
                ),
                "blocks.{i}.attn.proj": _BLOCK + "attention.o_proj",
                "blocks.{i}.mlp.fc1": (_BLOCK + "mlp.gate_proj", _BLOCK + "mlp.up_proj"),
                "blocks.{i}.mlp.fc2": _BLOCK + "mlp.down_proj",
            }
        ),
    )
    fields: ClassVar[Fields] = {"global_pool": "token"}
    dropped: ClassVar[dict[str, str]] = {
        r"embeddings\.mask_token": "it stands in for masked patches, in pre-training only",
        r"classifier\..*": "it reads the class token beside the mean of the patches, 2 D wide",
    }
    prefixes = ("dinov2.", "dinov2_with_registers.", "")

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the names of the patch projection and of LayerScale."""
        prefix = prefix_of(state, PATCHES, self.prefixes)
        return prefix is not None and f"{prefix}encoder.layer.0.layer_scale1.lambda1" in state

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Without the prefix."""
        return without(state, prefix_of(state, PATCHES, self.prefixes) or "")

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Another activation, or a config.json of another model."""
        return problem_of(config, self.prepared(state, config).get(PATCHES))

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What config.json says; how positions are resized, which depends on the registers."""
        registers = "embeddings.register_tokens" in state
        found = {
            **read_config(config, eps=1e-6, act="gelu"),
            **read_images(config, IMAGENET, state[PATCHES]),
            "pos_resample": "timm" if registers else "huggingface",  # antialiased, or not
            "no_embed_class": registers,
        }
        if _gated(state):  # whatever config.json says
            found["act_layer"] = "silu"
        return found

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Those of Dinov2Config."""
        return {} if config else {"norm_layer": ("layernorm", 1e-6), "act_layer": "gelu"}

    def finished(self, state: State, fields: Fields) -> State:
        """With registers: position 0 within the class token."""
        if "reg_token" not in state:
            return state
        positions = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
        if not state["reg_token"].shape[1]:
            del state["reg_token"]
        return state

    def unfit(self, config: ViTConfig) -> str | None:
        """A trunk with LayerScale, and positions for the patches or for the class token, too."""
        fixed: Fields = {"num_classes": 0, "init_values": config.init_values}
        free = ("norm_layer", "act_layer", "qkv_bias", "in_chans", "reg_tokens")
        if not config.init_values:
            return "no blocks without LayerScale (init_values)"
        if config.num_classes:
            return "no head on the class token alone: set num_classes=0"
        if config.norm_layer[0] != "layernorm":
            return f"no norm_layer={config.norm_layer!r}"
        if config.reg_tokens and not config.no_embed_class:
            return "no positions of registers: no_embed_class=True is expected"
        if config.no_embed_class:  # the class token alone, as one with position 0
            fixed["no_embed_class"] = True
        if config.fc_norm is False:
            fixed["fc_norm"] = False
        if config.mlp_layer == "swiglu_packed":
            if config.act_layer != "silu":
                return f"no act_layer={config.act_layer!r} in a gated MLP, 'silu' alone"
            fixed["mlp_layer"] = "swiglu_packed"
        if _ratio(config) is None:
            return f"no mlp_ratio={config.mlp_ratio}: whole numbers alone"
        return only(config, free, fixed)

    def written(self, state: State, config: ViTConfig) -> State:
        """In the spelling of files, without a prefix; the mask token is zeros, as it starts."""
        state = dict(state)
        if config.no_embed_class:
            positions = state["pos_embed"]
            state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
        found = super().written(state, config)
        found["embeddings.mask_token"] = torch.zeros_like(found["embeddings.cls_token"][0])
        if config.mlp_layer != "swiglu_packed":
            return found
        return {
            key.replace(".mlp.fc1.", ".mlp.weights_in.").replace(
                ".mlp.fc2.", ".mlp.weights_out."
            ): value
            for key, value in found.items()
        }

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """For `Dinov2Model.from_pretrained`, or Dinov2WithRegistersModel's."""
        registers = config.reg_tokens > 0
        shared = written_config(config)
        shared.pop("intermediate_size")  # mlp_ratio tells it
        return {
            "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
            "model_type": "dinov2_with_registers" if registers else "dinov2",
            **shared,
            "mlp_ratio": _ratio(config),
            "use_swiglu_ffn": config.mlp_layer == "swiglu_packed",
            "qkv_bias": config.qkv_bias,
            "layerscale_value": config.init_values,
            **({"num_register_tokens": config.reg_tokens} if registers else {}),
        }

    def images_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """For `AutoImageProcessor.from_pretrained`."""
        return written_images(config)


def _gated(state: Mapping[str, Tensor]) -> bool:
    first = ("weights_in.weight", "gate_proj.weight")
    return any(f"encoder.layer.0.mlp.{name}" in state for name in first)


def _ratio(config: ViTConfig) -> int | None:
    """Their mlp_ratio, a whole number; None if none gives this width.

    Of a gated MLP they keep two thirds of what the ratio gives, up to a multiple of 8. Source:
    `Dinov2SwiGLUFFN` of transformers.
    """
    for ratio in range(1, 2 * math.ceil(config.mlp_ratio) + 1):
        width = config.embed_dim * ratio
        if config.mlp_layer == "swiglu_packed":
            width = 2 * ((int(width * 2 / 3) + 7) // 8 * 8)
        if width == config.hidden_dim:
            return ratio
    return None
