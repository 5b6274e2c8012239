"""Hugging Face's vision towers of image-text models: CLIP, SigLIP and AIMv2.

    CLIP     class token, norm before the blocks; of the norm behind them, the class token alone.
             `visual_projection` is the head; it has no bias, so ours must be zero to be written
    SigLIP   patches alone, pooled by attention
    AIMv2    patches alone, RMSNorm, gated MLP

A classifier on top (CLIPForImageClassification, SiglipForImageClassification) reads the mean of the
patches: in CLIP without that last norm, in SigLIP without the pool. What the text tower has is
dropped.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkern.checkpoint._rules import (
    BATCHED,
    CheckpointError,
    Fields,
    Format,
    Rule,
    State,
    layers,
    only,
    reshaped,
    rule,
)
from vitkern.checkpoint.huggingface import (
    ACTIVATIONS,
    HALF,
    prefix_of,
    problem_of,
    read_config,
    read_images,
    without,
    written_config,
    written_images,
)
from vitkern.model.config import ViTConfig
from vitkern.model.presets import OPENAI

_BLOCK = "encoder.layers.{i}."
_TEXT = "it belongs to the text tower, or to its comparison with images"


def _blocks(attention: str) -> dict[str, str | tuple[str, ...]]:
    """Attention of a block; its name differs."""
    names = tuple(f"{_BLOCK}{attention}.{name}_proj" for name in "qkv")
    return {
        "blocks.{i}.attn.qkv": names,
        "blocks.{i}.attn.proj": f"{_BLOCK}{attention}.out_proj",
    }


_SHARED: tuple[Rule, ...] = (
    rule("pos_embed", "embeddings.position_embedding.weight", view=BATCHED),
    *layers(
        {
            "patch_embed.proj": "embeddings.patch_embedding",
            "blocks.{i}.norm1": _BLOCK + "layer_norm1",
            **_blocks("self_attn"),
            "blocks.{i}.norm2": _BLOCK + "layer_norm2",
            "blocks.{i}.mlp.fc1": _BLOCK + "mlp.fc1",
            "blocks.{i}.mlp.fc2": _BLOCK + "mlp.fc2",
            "norm": "post_layernorm",
        }
    ),
)


class _Tower(Format):
    """What the three share. patches, norm: names of the patch projection and of a block's norm."""

    patches: ClassVar[str] = "embeddings.patch_embedding.weight"
    norm: ClassVar[str] = "encoder.layers.0.layer_norm1.weight"
    # A tower alone has no prefix in transformers 5, and has it in 4.
    prefixes: ClassVar[tuple[str, ...]] = ("vision_model.", "")
    eps: ClassVar[float] = 1e-6
    act: ClassVar[str] = "gelu"
    images: ClassVar[Fields] = OPENAI
    dropped: ClassVar[dict[str, str]] = {
        r"text_model\..*": _TEXT,
        r"text_projection\..*": _TEXT,
        r"logit_(scale|bias)": _TEXT,
        r"embeddings\.position_ids": "they are 0, 1, 2, ...",
    }

    def own(self, state: Mapping[str, Tensor], prefix: str) -> bool:
        """What this tower has and the others have not."""
        raise NotImplementedError

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the names of its patch projection and of its first norm, and by what is its own."""
        prefix = prefix_of(state, self.patches, self.prefixes)
        return prefix is not None and prefix + self.norm in state and self.own(state, prefix)

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Without the prefix."""
        return without(state, prefix_of(state, self.patches, self.prefixes) or "")

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Another activation, or a config.json of another model."""
        return problem_of(_vision(config), self.prepared(state, config).get(self.patches))

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What config.json says of the vision tower."""
        return {
            **read_config(_vision(config), eps=self.eps, act=self.act),
            **read_images(config, self.images, state[self.patches]),
        }

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Those of this model's configuration class."""
        act = ACTIVATIONS[self.act]
        return {} if config else {"norm_layer": ("layernorm", self.eps), "act_layer": act}

    def images_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """For `AutoImageProcessor.from_pretrained`."""
        return written_images(config)


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part about the vision tower. It may be empty of all but its kind, being all defaults."""
    part = config.get("vision_config", config)
    return part or config


class HuggingFaceClip(_Tower):
    """CLIPModel, CLIPVisionModel(WithProjection), CLIPForImageClassification."""

    name = "huggingface-clip"
    title = "Hugging Face's CLIP vision tower"
    eps = 1e-5
    act = "quick_gelu"
    rules = (
        rule("cls_token", "embeddings.class_embedding", view=reshaped((1, 1, -1), (-1,))),
        *layers({"norm_pre": "pre_layrnorm"}),  # their spelling
        *_SHARED,
        *layers({"head": "classifier"}),
    )
    fields: ClassVar[Fields] = {"pre_norm": True, "pos_resample": "huggingface"}
    dropped: ClassVar[dict[str, str]] = {
        **_Tower.dropped,
        r"unread\..*": "a classifier on the mean of the patches reads them without this norm",
    }

    def own(self, state: Mapping[str, Tensor], prefix: str) -> bool:
        """The norm before the blocks."""
        return f"{prefix}pre_layrnorm.weight" in state

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Without the prefix; the projection as a classifier whose bias is zero."""
        state = super().prepared(state, config)
        if "classifier.weight" in state:
            for kind in ("weight", "bias"):
                if f"post_layernorm.{kind}" in state:
                    state[f"unread.post_layernorm.{kind}"] = state.pop(f"post_layernorm.{kind}")
        elif "visual_projection.weight" in state:
            weight = state.pop("visual_projection.weight")
            state["classifier.weight"] = weight
            state["classifier.bias"] = weight.new_zeros(weight.shape[0])
        return state

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What config.json says; how a classifier pools."""
        found = super().described(state, config)
        if "unread.post_layernorm.weight" in state:
            return {**found, "global_pool": "avg", "final_norm": False, "fc_norm": False}
        return {**found, "global_pool": "token"}

    def unfit(self, config: ViTConfig) -> str | None:
        """A tower with a norm before the blocks, and one token."""
        reason = _square(config)
        if reason or config.norm_layer[0] != "layernorm":
            return reason or f"no norm_layer={config.norm_layer!r}"
        fixed: Fields = {"pre_norm": True}
        if config.fc_norm is False:
            fixed["fc_norm"] = False
        return only(config, ("norm_layer", "act_layer", "in_chans"), fixed)

    def written(self, state: State, config: ViTConfig) -> State:
        """As CLIPVisionModelWithProjection, or CLIPVisionModel without classes."""
        state = dict(state)
        bias = state.pop("head.bias", None)
        if bias is not None and bias.any():
            raise CheckpointError(f"{self.title} has no place for head.bias, unless it is zero")
        found = super().written(state, config)
        projection = found.pop("classifier.weight", None)
        named = _prefixed(found)
        return named if projection is None else {**named, "visual_projection.weight": projection}

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """For `from_pretrained` of the class named under "architectures"."""
        projected = "WithProjection" if config.num_classes else ""
        shared = written_config(config)
        for name in ("id2label", "label2id"):
            shared.pop(name, None)
        return {
            "architectures": [f"CLIPVisionModel{projected}"],
            "model_type": "clip_vision_model",
            **shared,
            **({"projection_dim": config.num_classes} if config.num_classes else {}),
        }


class HuggingFaceSiglip(_Tower):
    """SiglipModel, SiglipVisionModel, SiglipForImageClassification."""

    name = "huggingface-siglip"
    title = "Hugging Face's SigLIP vision tower"
    act = "gelu_pytorch_tanh"
    images = HALF
    rules = (
        *_SHARED,
        rule("attn_pool.latent", "head.probe"),
        *layers(
            {
                # As `prepared` divides their in_proj.
                "attn_pool.q": "head.attention.q",
                "attn_pool.kv": "head.attention.kv",
                "attn_pool.proj": "head.attention.out_proj",
                "attn_pool.norm": "head.layernorm",
                "attn_pool.mlp.fc1": "head.mlp.fc1",
                "attn_pool.mlp.fc2": "head.mlp.fc2",
                "head": "classifier",
            }
        ),
    )
    fields: ClassVar[Fields] = {
        "class_token": False,
        "fc_norm": False,
        "pos_resample": "huggingface",
    }
    dropped: ClassVar[dict[str, str]] = {
        **_Tower.dropped,
        r"unread\..*": "a classifier on the mean of the patches leaves the pool out",
    }

    def own(self, state: Mapping[str, Tensor], prefix: str) -> bool:
        """No class token, and no rotary positions."""
        return (
            f"{prefix}post_layernorm.weight" in state
            and f"{prefix}embeddings.class_embedding" not in state
        )

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Without the prefix; the pool's query, and its key and value, apart."""
        state = super().prepared(state, config)
        if "classifier.weight" in state:
            pool = [key for key in state if key.startswith("head.")]
            state.update({f"unread.{key}": state.pop(key) for key in pool})
        for kind in ("weight", "bias"):
            packed = state.pop(f"head.attention.in_proj_{kind}", None)
            if packed is not None:
                width = packed.shape[0] // 3
                state[f"head.attention.q.{kind}"] = packed[:width]
                state[f"head.attention.kv.{kind}"] = packed[width:]
        return state

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """SigLIP 2 for images of any size takes patches, not images."""
        weight = self.prepared(state, config).get(self.patches)
        if weight is not None and weight.dim() == 2:
            return "it is a NaFlex SigLIP 2, whose images come as patches from the processor"
        return super().problem(state, config)

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What config.json says; the pool, which is all tokens where there is none."""
        pool = "map" if "head.probe" in state else "avg" if "classifier.weight" in state else ""
        return {**super().described(state, config), "global_pool": pool}

    def unfit(self, config: ViTConfig) -> str | None:
        """Patches alone, pooled by attention, without a head."""
        reason = _square(config)
        if reason or config.norm_layer[0] != "layernorm":
            return reason or f"no norm_layer={config.norm_layer!r}"
        if config.num_classes:
            return "no head behind the pool: set num_classes=0"
        fixed: Fields = {"class_token": False, "global_pool": "map", "num_classes": 0}
        if config.fc_norm is False:
            fixed["fc_norm"] = False
        return only(config, ("norm_layer", "act_layer", "in_chans"), fixed)

    def written(self, state: State, config: ViTConfig) -> State:
        """As SiglipVisionModel."""
        found = super().written(state, config)
        for kind in ("weight", "bias"):
            parts = [found.pop(f"head.attention.{name}.{kind}") for name in ("q", "kv")]
            found[f"head.attention.in_proj_{kind}"] = torch.cat(parts)
        return _prefixed(found)

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """For `SiglipVisionModel.from_pretrained`."""
        return {
            "architectures": ["SiglipVisionModel"],
            "model_type": "siglip_vision_model",
            **written_config(config),
            "vision_use_head": True,
        }


class HuggingFaceAimv2(_Tower):
    """Aimv2VisionModel, Aimv2Model. Its pool, attention without a query's layer, is dropped."""

    name = "huggingface-aimv2"
    title = "Hugging Face's AIMv2 vision tower"
    patches = "embeddings.patch_embed.weight"
    norm = "encoder.layers.0.rms_norm1.weight"
    eps = 1e-5
    act = "silu"
    rules = (
        rule("pos_embed", "embeddings.position_embedding.weight", view=BATCHED),
        *layers(
            {
                "patch_embed.proj": "embeddings.patch_embed",
                "patch_embed.norm": "embeddings.rms_norm",
                "blocks.{i}.norm1": _BLOCK + "rms_norm1",
                **_blocks("attention"),
                "blocks.{i}.norm2": _BLOCK + "rms_norm2",
                "blocks.{i}.mlp.fc1_g": _BLOCK + "ffn.gate_proj",
                "blocks.{i}.mlp.fc1_x": _BLOCK + "ffn.up_proj",
                "blocks.{i}.mlp.fc2": _BLOCK + "ffn.down_proj",
                "norm": "rms_norm",
            }
        ),
    )
    fields: ClassVar[Fields] = {
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
        "mlp_layer": "swiglu",
    }
    dropped: ClassVar[dict[str, str]] = {
        **_Tower.dropped,
        r"head\..*": "its pool is attention without a layer for the query, which isn't built here",
        r"visual_projection\..*": "it reads that pool",
    }

    def own(self, state: Mapping[str, Tensor], prefix: str) -> bool:
        """The norm behind the patch projection."""
        return f"{prefix}embeddings.rms_norm.weight" in state

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Positions of the native model are computed for each image."""
        if "embeddings.position_embedding.weight" not in self.prepared(state, config):
            return "it is a native AIMv2, whose positions are computed for each image"
        return super().problem(state, config)

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What config.json says; its norms are of another kind."""
        mine, found = _vision(config), super().described(state, config)
        if mine:
            norm = ("rmsnorm", mine.get("rms_norm_eps", self.eps))
            found.update(norm_layer=norm, embed_norm_layer=norm)
        return found

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Those of Aimv2VisionConfig."""
        norm = ("rmsnorm", self.eps)
        mine = {"norm_layer": norm, "embed_norm_layer": norm, "act_layer": self.act}
        return {} if config else mine

    def unfit(self, config: ViTConfig) -> str | None:
        """Read only."""
        return "files of this kind, which are read, not written"


def _prefixed(state: State) -> State:
    """As transformers 4 has a tower's names; version 5 has none in front, but finds these, too."""
    return {"vision_model." + key: value for key, value in state.items()}


def _square(config: ViTConfig) -> str | None:
    for name in ("img_size", "patch_size"):
        rows, columns = getattr(config, name)
        if rows != columns:
            return f"no {name}={(rows, columns)}: squares only"
    return None
