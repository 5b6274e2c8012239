""".npz files of google-research/vision_transformer and of big_vision.

Names are paths in JAX's tree of parameters. They differ in a prefix ("", "opt/target/", "params/";
"params/img/" beside a text model), in how the parts of a block are counted, and in where positions
stand: with the class token's in the first repository, without in the second. big_vision may keep
all blocks in one, with a leading axis. All are read, in big_vision's names without a prefix;
`written` chooses the names whose code has the network.

Of the activation the files say nothing. JAX's code runs tanh GELU, always; timm, and everyone who
took the weights from there, runs the classifiers among them with erf GELU, which moves logits by
some 1e-3. This follows timm: "gelu" for these, "gelu_tanh" for towers beside a text model (SigLIP,
PaliGemma) and for attention pooling. `load(path, act_layer="gelu_tanh")` is JAX's own function.
"""

import re
from collections.abc import Iterator, Mapping
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkern.checkpoint._rules import (
    SAME,
    TRANSPOSED,
    Fields,
    Format,
    Rule,
    State,
    View,
    only,
    reshaped,
    rule,
)
from vitkern.model.config import ViTConfig

# Theirs on the right: [D, H, d] for query, key and value, [H, d, D] for the output projection.
_QKV = View(
    lambda theirs, fields: torch.cat([kernel.flatten(1).t() for kernel in theirs]),
    lambda ours, count, config: [
        part.t().unflatten(1, (config.num_heads, config.head_dim)) for part in ours.chunk(count)
    ],
)
_QKV_BIAS = View(
    lambda theirs, fields: torch.cat([bias.flatten() for bias in theirs]),
    lambda ours, count, config: [
        part.unflatten(0, (config.num_heads, config.head_dim)) for part in ours.chunk(count)
    ],
)
_OUT = View(
    lambda theirs, fields: theirs[0].flatten(0, 1).t(),
    lambda ours, count, config: [ours.t().unflatten(0, (config.num_heads, config.head_dim))],
)
_CONV = View(  # [H, W, in, out]
    lambda theirs, fields: theirs[0].permute(3, 2, 0, 1),
    lambda ours, count, config: [ours.permute(2, 3, 1, 0)],
)
_VECTOR = reshaped((-1,), (-1,))  # GroupNorm's scale is [1, 1, 1, C] in the older files


def _layer(ours: str, theirs: str, view: View = TRANSPOSED) -> tuple[Rule, Rule]:
    """Weight and bias of a dense layer or a convolution."""
    return (
        rule(f"{ours}.weight", f"{theirs}/kernel", view=view),
        rule(f"{ours}.bias", f"{theirs}/bias"),
    )


def _norm(ours: str, theirs: str, view: View = SAME) -> tuple[Rule, Rule]:
    return (
        rule(f"{ours}.weight", f"{theirs}/scale", view=view),
        rule(f"{ours}.bias", f"{theirs}/bias", view=view),
    )


def _attention(ours: str, theirs: str, *parts: str) -> tuple[Rule, Rule]:
    """Projections that stand one below the other in ours."""
    return (
        rule(f"{ours}.weight", *(f"{theirs}/{part}/kernel" for part in parts), view=_QKV),
        rule(f"{ours}.bias", *(f"{theirs}/{part}/bias" for part in parts), view=_QKV_BIAS),
    )


def _resnet() -> Iterator[Rule]:
    """Stem and stages before the patches; `prepared` counts units from 0, ours and theirs."""
    for ours, theirs in (("stem.", "root"), ("", "stem_alone")):
        yield rule(f"patch_embed.backbone.{ours}conv.weight", f"conv_{theirs}/kernel", view=_CONV)
        yield from _norm(f"patch_embed.backbone.{ours}norm", f"gn_{theirs}", _VECTOR)
    parts = [(f"conv{n}", f"conv{n}", f"norm{n}", f"gn{n}") for n in (1, 2, 3)]
    parts.append(("downsample.conv", "conv_proj", "downsample.norm", "gn_proj"))
    for stage in range(4):
        ours, theirs = f"patch_embed.backbone.stages.{stage}.blocks.{{i}}", f"block{stage + 1}"
        for conv, their_conv, norm, their_norm in parts:
            name = f"{theirs}/unit{{i}}"
            yield rule(f"{ours}.{conv}.weight", f"{name}/{their_conv}/kernel", view=_CONV)
            yield from _norm(f"{ours}.{norm}", f"{name}/{their_norm}", _VECTOR)


_PREFIXES = ("params/img/", "img/", "opt/target/", "params/", "")
_BLOCK = "Transformer/encoderblock_{i}/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_0"
_POOL = "MAPHead_0/"
_POOL_QUERY = _POOL + "MultiHeadDotProductAttention_0/query/kernel"
_QUERY = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
_CLASSIC_POSITIONS = "Transformer/posembed_input/pos_embedding"
_INLINE = ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")  # a MAPHead
# Parts of a block as big_vision counts them, by kind, and as flax once did, one after the other.
_COUNTED = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}


class Google(Format):
    """Written in the first repository's names with a class token that has a position, else in
    big_vision's. A network without positions in its file has the fixed ones of MoCo v3, sines and
    cosines; they are computed for `img_size` (224 unless said), and are parameters here.
    """

    name = "google"
    title = "Google's .npz"
    rules = (
        rule("cls_token", "cls"),
        rule("pos_embed", "pos_embedding"),
        rule("pos_embed", _CLASSIC_POSITIONS),
        *_resnet(),
        *_layer("patch_embed.proj", "embedding", _CONV),
        *_norm("blocks.{i}.norm1", _BLOCK + "LayerNorm_0"),
        *_attention("blocks.{i}.attn.qkv", _ATTENTION, "query", "key", "value"),
        *_layer("blocks.{i}.attn.proj", _ATTENTION + "/out", _OUT),
        *_norm("blocks.{i}.norm2", _BLOCK + "LayerNorm_1"),
        *_layer("blocks.{i}.mlp.fc1", _BLOCK + "MlpBlock_0/Dense_0"),
        *_layer("blocks.{i}.mlp.fc2", _BLOCK + "MlpBlock_0/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        rule("attn_pool.latent", _POOL + "probe"),
        *_attention("attn_pool.q", _POOL + "MultiHeadDotProductAttention_0", "query"),
        *_attention("attn_pool.kv", _POOL + "MultiHeadDotProductAttention_0", "key", "value"),
        *_layer("attn_pool.proj", _POOL + "MultiHeadDotProductAttention_0/out", _OUT),
        *_norm("attn_pool.norm", _POOL + "LayerNorm_0"),
        *_layer("attn_pool.mlp.fc1", _POOL + "MlpBlock_0/Dense_0"),
        *_layer("attn_pool.mlp.fc2", _POOL + "MlpBlock_0/Dense_1"),
        *_layer("pre_logits.fc", "pre_logits"),
        *_layer("head", "head"),
    )
    fields: ClassVar[Fields] = {
        "norm_layer": ("layernorm", 1e-6),
        "pos_resample": "google",
        "mean": 0.5,  # images are scaled to [-1, 1]
        "std": 0.5,
    }
    dropped: ClassVar[dict[str, str]] = {
        r"(params/)?(txt|llm)/": "the text model",
        r"(params/)?[tb]$": "temperature or bias of the contrastive loss",
        r"opt/": "state of the optimizer",
        r"(extra|chrono)/|step$": "state of the training",
    }

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By JAX's path to the patch projection, beside a Transformer."""
        prefix = _prefix(state)
        return prefix is not None and any(
            key.startswith(prefix + "Transformer/encoderblock") for key in state
        )

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Without prefix, block by block, in big_vision's names."""
        prefix, found = _prefix(state) or "", State()
        stages = any(key.startswith(prefix + "block1/") for key in state)
        for path, value in state.items():
            key = path.removeprefix(prefix)
            if key.startswith(_INLINE):
                key = _POOL + key
            elif key == "Transformer/pos_embedding":
                key = _CLASSIC_POSITIONS
            if key.startswith("Transformer/encoderblock"):
                for ours, counted in _COUNTED.items():
                    key = key.replace(f"/{counted}/", f"/{ours}/")
            if key.startswith("Transformer/encoderblock/"):
                for i, layer in enumerate(value):
                    found[key.replace("encoderblock/", f"encoderblock_{i}/")] = layer
            elif key.startswith(("conv_root/", "gn_root/")) and not stages:
                found[key.replace("_root/", "_stem_alone/")] = value
            else:
                found[_units(key, -1)] = value
        return found

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """NaFlex, video, and pooling by another number of heads."""
        state = self.prepared(dict(state), config)
        kernel, positions = state["embedding/kernel"], state.get("pos_embedding")
        if kernel.dim() == 2 or (positions is not None and positions.shape[0] != 1):
            return "a NaFlex model, whose positions are resized for every image"
        if kernel.dim() != 4:
            return f"its patch projection is {list(kernel.shape)}, expected [P, P, C, D]"
        query, pool = state.get(_QUERY), state.get(_POOL_QUERY)
        if query is None or query.dim() != 3:
            return f"{_QUERY} [D, H, d] is missing"
        if pool is not None and pool.shape != query.shape:
            return f"its pooling has heads {list(pool.shape)}, its blocks {list(query.shape)}"
        return None

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Heads, by shape; the pool, by what else is there. JAX normalises first, then pools."""
        dim, heads, width = state[_QUERY].shape
        pool = "map" if _POOL_QUERY in state else "token" if "cls" in state else "avg"
        if pool == "avg" and _text(state) == "llm":
            pool = ""  # PaliGemma reads every token
        found: Fields = {"num_heads": heads, "global_pool": pool}
        if heads * width != dim:
            found["dim_head"] = width
        if pool == "token" and "pos_embedding" in state:  # a square leaves none for the class token
            count = state["pos_embedding"].shape[1]
            found["no_embed_class"] = isqrt(count) ** 2 == count
        return found

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """The activation, see above."""
        tanh = _text(state) is not None or _POOL_QUERY in state
        return {"act_layer": "gelu_tanh" if tanh else "gelu"}

    def finished(self, state: State, fields: Fields) -> State:
        """With positions, where the network has the fixed ones."""
        weight = state.get("patch_embed.proj.weight")
        if weight is not None and "pos_embed" not in state:
            size = fields.get("target_img_size", 224)
            grid = ViTConfig(img_size=size, patch_size=tuple(weight.shape[2:])).grid_size
            state["pos_embed"] = sincos_positions(grid, weight.shape[0]).to(weight)
        return state

    def unfit(self, config: ViTConfig) -> str | None:
        """Square grids; norm before the pool; a class token is what is pooled, if there is one."""
        rows, columns = config.grid_size
        if rows != columns:
            return f"no img_size={config.img_size}: square grids of patches only"
        if config.norm_after_pool:
            return (
                f"no fc_norm=True or None with global_pool={config.global_pool!r}: norm, then pool"
            )
        pools = ("token", "") if config.class_token else ("avg", "map", "")
        if config.global_pool not in pools:
            return (
                f"no global_pool={config.global_pool!r} with class_token={config.class_token} "
                f"(expected one of {', '.join(map(repr, pools))})"
            )
        if config.act_layer not in ("gelu", "gelu_tanh"):
            return f"no act_layer={config.act_layer!r} (expected 'gelu' or 'gelu_tanh')"
        if config.embed_layer is not None and config.embed_layer[0] != "resnetv2":
            return f"no embed_layer={config.embed_layer!r} (expected None or 'resnetv2')"
        free = ("in_chans", "class_token", "no_embed_class", "global_pool", "fc_norm", "act_layer")
        return only(config, (*free, "embed_layer", "representation_size", "dim_head"))

    def written(self, state: State, config: ViTConfig) -> State:
        """The first repository's names for what its code has, else big_vision's; no prefix."""
        found = super().written(state, config)
        classic = config.class_token and not config.no_embed_class
        theirs = State()
        for path, value in found.items():
            key = _units(path, 1).replace("_stem_alone/", "_root/")
            if classic and key == "pos_embedding":
                key = _CLASSIC_POSITIONS
            elif classic and key.startswith("Transformer/encoderblock"):
                for ours, counted in _COUNTED.items():
                    key = key.replace(f"/{ours}/", f"/{counted}/")
            theirs[key] = value.contiguous()
        return theirs


def _prefix(state: Mapping[str, Tensor]) -> str | None:
    """What stands before the tower's names; None if it isn't there."""
    return next((p for p in _PREFIXES if p + "embedding/kernel" in state), None)


def _text(state: Mapping[str, Tensor]) -> str | None:
    """The text model beside the tower, "txt" or "llm"; None if there is none."""
    found = (re.match(r"(?:params/)?(txt|llm)/", key) for key in state)
    return next((match[1] for match in found if match), None)


def _units(key: str, by: int) -> str:
    """A residual unit's path with its number, which counts from 1 in theirs, changed `by`."""
    return re.sub(r"^(block\d/unit)(\d+)/", lambda m: f"{m[1]}{int(m[2]) + by}/", key)


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions [1, N, dim]: sine and cosine of x, then of y, at dim / 4 frequencies.

    Source: `posemb_sincos_2d` of big_vision, which has them from MoCo v3 (Chen et al., 2021).
    """
    rates = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4 - 1)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    x, y = (axis.flatten()[:, None] * 10_000.0**-rates for axis in (x, y))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)[None]
