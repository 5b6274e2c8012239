"""Vision towers of CLIP: OpenAI's and OpenCLIP's own, and OpenCLIP's with one of timm's inside.

A state dict is a whole CLIP ("visual." before the tower's names) or the tower alone. Its projection
[D, E] into the space of texts is our head, with a bias of zeros.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vitkern.checkpoint._rules import (
    TRANSPOSED,
    CheckpointError,
    Fields,
    Format,
    State,
    View,
    by_channel,
    layers,
    only,
    reshaped,
    rule,
)
from vitkern.checkpoint.timm import Timm
from vitkern.model.config import ViTConfig
from vitkern.model.presets import OPENAI, PRESETS

_TEXT = {
    r"(text|text_decoder|transformer|token_embedding|positional_embedding)(\.|$)": "the text model",
    r"(text_projection|ln_final|attn_mask|cls_emb)(\.|$)": "the text model",
    r"logit_(scale|bias)$": "temperature or bias of the contrastive loss",
}
_OPENAIS = (
    "input_resolution",
    "context_length",
    "vocab_size",
)  # beside the weights in its archives
_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # OpenCLIP's H, g, G, e; others have 64
_POOLS = {"tok": "token", "avg": "avg", "none": ""}
_BLOCK = "visual.transformer.resblocks.{i}."


def _model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenCLIP's description of a model: in a folder of the hub, or a file of its own."""
    found: Mapping[str, Any] = config.get("model_cfg", config)
    return found if "vision_cfg" in found else {}


def _images(config: Mapping[str, Any]) -> Fields:
    """Normalisation of images, from a folder of the hub."""
    images = config.get("preprocess_cfg") or {}
    return {key: tuple(images[key]) for key in ("mean", "std") if key in images}


class Clip(Format):
    """OpenAI's files and OpenCLIP's have the same names, but not the same activation.

    It is QuickGELU where open_clip_config.json or the model's name says so, and in OpenAI's
    archives; elsewhere OpenCLIP's default, GELU. OpenAI's weights saved by another library need
    ``load(path, act_layer="quick_gelu")``.
    """

    name = "clip"
    title = "CLIP's vision tower"
    rules = (
        rule("cls_token", "visual.class_embedding", view=reshaped((1, 1, -1), (-1,))),
        rule(
            "pos_embed",
            "visual.positional_embedding",
            view=View(
                lambda theirs, fields: theirs[0].unsqueeze(0),
                lambda ours, count, config: [ours.squeeze(0)],
            ),
        ),
        rule("blocks.{i}.attn.qkv.weight", _BLOCK + "attn.in_proj_weight"),
        rule("blocks.{i}.attn.qkv.bias", _BLOCK + "attn.in_proj_bias"),
        rule("blocks.{i}.ls1.gamma", _BLOCK + "ls_1.gamma"),
        rule("blocks.{i}.ls2.gamma", _BLOCK + "ls_2.gamma"),
        *layers(
            {
                "patch_embed.proj": "visual.conv1",
                "norm_pre": "visual.ln_pre",
                "blocks.{i}.norm1": _BLOCK + "ln_1",
                "blocks.{i}.attn.proj": _BLOCK + "attn.out_proj",
                "blocks.{i}.norm2": _BLOCK + "ln_2",
                "blocks.{i}.mlp.fc1": _BLOCK + "mlp.c_fc",
                "blocks.{i}.mlp.fc2": _BLOCK + "mlp.c_proj",
                "norm": "visual.ln_post",
                "fc_norm": "visual.ln_post_pooled",  # `prepared` tells these two apart
            }
        ),
        rule("head.weight", "visual.proj", view=TRANSPOSED),
    )
    fields: ClassVar[Fields] = {"pos_resample": "timm", **OPENAI}
    dropped: ClassVar[dict[str, str]] = {
        **_TEXT,
        rf"({'|'.join(_OPENAIS)})$": "a number that the shapes tell, too",
    }

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the names of the class token and of the first layer, or CLIP's ResNet by its own."""
        prefix = _prefix(state)
        return prefix + "conv1.weight" in state and (
            prefix + "class_embedding" in state or "visual.attnpool.c_proj.weight" in state
        )

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """With "visual.", also for a tower alone; its last norm by what it normalises."""
        if not _prefix(state):
            state = {"visual." + key: value for key, value in state.items()}
        if _pooled_first(state, config):
            state = {key.replace(".ln_post.", ".ln_post_pooled."): v for key, v in state.items()}
        return state

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """ResNets, poolers of CoCa, OpenCLIP's experimental blocks."""
        state = self.prepared(dict(state), config)
        known = {
            r"visual\.(layer1|attnpool)\.": "a ResNet",
            r"visual\.attn_pool": "attentional pooling (CoCa)",
            r".*\.attn\.(logit_scale|head_scale|ln_q|ln_k|ln_inner)": "OpenCLIP's custom attention",
            r".*\.resblocks\.\d+\.(ln_attn|mlp\.ln)\.": "OpenCLIP's custom blocks",
        }
        for pattern, what in known.items():
            if any(re.match(pattern, key) for key in state if key.startswith("visual.")):
                return f"its tower has {what}" if what != "a ResNet" else "its tower is a ResNet"
        if _POOLS.get(_model(config).get("vision_cfg", {}).get("pool_type", "tok")) is None:
            return "its pool is none of " + ", ".join(map(repr, _POOLS))
        return None

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Heads, pool, eps and activation, from OpenCLIP's config; else as far as names tell."""
        model, width = _model(config), state["visual.class_embedding"].shape[0]
        vision = model.get("vision_cfg", {})
        pooled_first = any(".ln_post_pooled." in key for key in state)
        pool = "avg" if pooled_first and not model else _POOLS[vision.get("pool_type", "tok")]
        found: Fields = {
            "norm_layer": ("layernorm", (vision.get("norm_kwargs") or {}).get("eps", 1e-5)),
            "global_pool": pool,
            **_images(config),
        }
        head_width = vision.get("head_width", 64 if model else _HEAD_WIDTHS.get(width, 64))
        if width % head_width == 0:
            found["num_heads"] = width // head_width
        if isinstance(vision.get("image_size"), (list, tuple)):
            found["img_size"] = tuple(vision["image_size"])
        named = "quickgelu" in str(config.get("architecture", "")).lower()
        if model.get("quick_gelu") or named or any(key in state for key in _OPENAIS):
            found["act_layer"] = "quick_gelu"
        elif model:
            tanh = (vision.get("act_kwargs") or {}).get("approximate") == "tanh"
            found["act_layer"] = "gelu_tanh" if tanh else "gelu"
        return found

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """OpenCLIP's activation."""
        return {"act_layer": "gelu"}

    def finished(self, state: State, fields: Fields) -> State:
        """With the biases that a ViT has: of the head, and of the patches without a norm there."""
        for layer in ("head", *(() if "norm_pre.weight" in state else ("patch_embed.proj",))):
            weight = state.get(f"{layer}.weight")
            if weight is not None:
                state.setdefault(f"{layer}.bias", weight.new_zeros(weight.shape[0]))
        return state

    def unfit(self, config: ViTConfig) -> str | None:
        """A class token with a position, and a projection behind the pool."""
        if config.global_pool not in _POOLS.values():
            pools = ", ".join(map(repr, _POOLS.values()))
            return f"no global_pool={config.global_pool!r} (expected one of {pools})"
        if config.norm_layer[0] != "layernorm":
            return f"no norm_layer={config.norm_layer!r} (expected 'layernorm')"
        if config.act_layer not in ("gelu", "gelu_tanh", "quick_gelu"):
            return f"no act_layer={config.act_layer!r} (expected a GELU)"
        if not config.num_classes:
            return "no num_classes=0"
        return only(
            config, ("global_pool", "fc_norm", "norm_layer", "act_layer", "pre_norm", "init_values")
        )

    def written(self, state: State, config: ViTConfig) -> State:
        """As part of a CLIP, "visual." before every name."""
        state = dict(state)
        for name in ("head.bias", "patch_embed.proj.bias"):
            bias = state.pop(name, None)
            if bias is not None and bool(bias.any()):
                raise CheckpointError(f"{self.title} has no place for {name}, which isn't zero")
        found = super().written(state, config)
        return {
            key.replace(".ln_post_pooled.", ".ln_post."): value.contiguous()
            for key, value in found.items()
        }

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """As open_clip_config.json; of the text model it can't say anything."""
        vision: dict[str, Any] = {
            "image_size": list(config.img_size),
            "patch_size": list(config.patch_size),
            "width": config.embed_dim,
            "layers": config.depth,
            "head_width": config.head_dim,
            "mlp_ratio": config.mlp_ratio,
            "ls_init_value": config.init_values or None,
            "no_ln_pre": not config.pre_norm,
            "pool_type": next(k for k, pool in _POOLS.items() if pool == config.global_pool),
            "final_ln_after_pool": config.norm_after_pool,
            "norm_kwargs": {"eps": config.norm_layer[1]},
        }
        if config.act_layer == "gelu_tanh":
            vision["act_kwargs"] = {"approximate": "tanh"}
        return {
            "model_cfg": {
                "embed_dim": config.num_classes,
                "quick_gelu": config.act_layer == "quick_gelu",
                "vision_cfg": vision,
            },
            "preprocess_cfg": by_channel(config),
        }


def _prefix(state: Mapping[str, Tensor]) -> str:
    return "visual." if any(key.startswith("visual.") for key in state) else ""


def _pooled_first(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether the last norm stands behind the pool, as in CLIPA, which has no `ln_pre`."""
    vision = _model(config).get("vision_cfg")
    if vision is None:
        return "visual.ln_pre.weight" not in state
    return bool(vision.get("final_ln_after_pool"))


class ClipTrunk(Timm):
    """OpenCLIP's CLIP around a network of timm's, SigLIP, say: "visual.trunk." and timm's names."""

    name = "clip-trunk"
    title = "OpenCLIP's tower of timm's"
    dropped: ClassVar[dict[str, str]] = {**Timm.dropped, **_TEXT}

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the prefix; EVA's own CLIPs, which are refused, by the blocks behind it."""
        return any(key.startswith(("visual.trunk.", "visual.blocks.")) for key in state)

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """As timm has it; a linear layer behind the trunk is the head."""
        found = State()
        for path, value in state.items():
            key = path.removeprefix("visual.trunk.")
            found[key.replace("visual.head.proj.", "head.")] = value
        if "head.weight" in found:
            weight = found["head.weight"]
            found.setdefault("head.bias", weight.new_zeros(weight.shape[0]))
        return super().prepared(found, config)

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Networks of timm's that are no ViT; other heads than a linear layer."""
        if any(key.startswith("visual.blocks.") for key in state):
            return "its tower is of EVA-CLIP's own code, whose blocks are others"
        state = self.prepared(dict(state), config)
        name = _model(config).get("vision_cfg", {}).get("timm_model_name", "a network of timm's")
        if not super().recognises(state, config):
            return f"its trunk is no Vision Transformer but {name}"
        heads = [key for key in state if key.startswith("visual.head.")]
        if heads:
            return f"its head is no linear layer: {heads[0]}"
        return super().problem(state, config)

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What shapes can't tell of timm's model of that name; the pool is OpenCLIP's choice."""
        vision = _model(config).get("vision_cfg", {})
        named = PRESETS.get(vision.get("timm_model_name", ""), {})
        kept = ("num_heads", "norm_layer", "act_layer", "global_pool", "mean", "std")
        found: Fields = {key: named[key] for key in kept if key in named}
        if named:
            found.setdefault("act_layer", "gelu")
        if vision.get("timm_pool"):
            found["global_pool"] = vision["timm_pool"]
        return {**found, **_images(config)}

    def unfit(self, config: ViTConfig) -> str | None:
        """One way only: the file without the text model is timm's."""
        return "vitkern doesn't write these; timm's format has the tower alone"
