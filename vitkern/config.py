"""ViTConfig: every argument of a ViT, checked and made plain; PRESETS: models by timm's names.

A config holds numbers, strings, booleans and tuples only, whatever it was given (classes, say), so
it can be compared, hashed, pickled and printed. It is checked once, here: the model trusts it.
"""

import difflib
import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from vitkern.kernels import REGISTRY

POOLS = ("token", "avg", "avgmax", "max", "map", "")
SAVES = ("balanced", "minimal")
WEIGHT_INITS = ("", "skip", "reset", "jax", "jax_nlhb", "moco")
OPS = tuple(op.name for op in REGISTRY.values() if op.backward_of is None)

# What a class is called here, by its home and name: timm need not be installed to be understood.
NORMS: dict[str, tuple[str, float | None]] = {
    "layernorm": ("layernorm", 1e-6),
    "rmsnorm": ("rmsnorm", 1e-6),
    "timm.LayerNorm": ("layernorm", 1e-6),
    "timm.RmsNorm": ("rmsnorm", 1e-6),
    "vitkern.LayerNorm": ("layernorm", 1e-6),
    "vitkern.RmsNorm": ("rmsnorm", 1e-6),
    "torch.LayerNorm": ("layernorm", 1e-5),
    "torch.RMSNorm": ("rmsnorm", None),  # its default eps depends on the dtype: it must be given
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "torch.GELU": "gelu",
    "torch.ReLU": "relu",
    "torch.SiLU": "silu",
    "timm.GELU": "gelu",
    "timm.GELUTanh": "gelu_tanh",
    "timm.QuickGELU": "quick_gelu",
    "vitkern.QuickGELU": "quick_gelu",
}
MLPS = {
    "mlp": "mlp",
    "swiglu": "swiglu",
    "swiglu_packed": "swiglu_packed",
    "timm.Mlp": "mlp",
    "timm.SwiGLU": "swiglu",
    "timm.GluMlp": "swiglu_packed",  # with gate_last=False, which is timm's SwiGLUPacked
}


@dataclass(frozen=True)
class ViTConfig:
    """Arguments of a Vision Transformer: timm's names, order and defaults, then vitkern's own.

    Args:
        img_size: image height and width in pixels, or one number for both.
        patch_size: patch height and width in pixels, or one number for both.
        in_chans: image channels.
        num_classes: width of the classifier; 0 for none.
        global_pool: "token", "avg", "avgmax", "max", "map" (attention pooling) or "" (all tokens).
        embed_dim: width D of a token, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over `embed_dim`.
        qkv_bias: bias in the query, key and value projection.
        qk_norm: normalise queries and keys over the head dimension.
        scale_attn_norm, scale_mlp_norm: not supported, False.
        proj_bias: bias in the attention's output projection and in the MLP.
        init_values: start of LayerScale; None or 0 for no LayerScale.
        class_token: prepend a class token.
        pos_embed: "learn" or "none".
        no_embed_class: positions for patches only, none for class and register tokens.
        reg_tokens: number of register tokens.
        pre_norm: normalise before the blocks; the patch projection then has no bias.
        final_norm: normalise after the blocks.
        fc_norm: put that norm after pooling; None does so for average and max pooling.
        pool_include_prefix: pool class and register tokens too.
        dynamic_img_size: take images of any size, with resampled positions.
        dynamic_img_pad: pad such images at the bottom and right to whole patches.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after
            the positions, after projections and the MLP's layers, and on attention weights.
        patch_drop_rate: not supported, 0.
        drop_path_rate: stochastic depth of the last block; earlier ones follow linearly from 0.
        weight_init: "", "skip", "reset", "jax", "jax_nlhb" or "moco".
        fix_init: scale the residual projections' start by depth.
        embed_layer, embed_norm_layer, block_fn, attn_layer: timm's defaults only, or None.
        norm_layer: "layernorm" (eps 1e-6), "rmsnorm", a (name, eps) pair, or torch's or timm's
            class, plain or in a partial with `eps`.
        act_layer: "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", or torch's or timm's class.
        mlp_layer: "mlp", "swiglu", "swiglu_packed", or timm's class. As in timm, the gate of a
            SwiGLU is `act_layer`, so GELU where none is given.
        mean, std: normalisation of uint8 images, (pixel / 255 - mean) / std; each a number, or one
            for every channel.
        residual_dtype: dtype of the residual stream; None for what eager PyTorch would give it.
        drop_path_mode: "scale" multiplies the branches of dropped samples by zero; "subset" leaves
            those samples out of the computation (see `layers.DropPath` for the statistics).
        save: what a block keeps for its backward pass: "balanced" (recompute activations only),
            "minimal" (recompute fc1 and attention too), or None: "balanced" where fused kernels
            run, what PyTorch's autograd keeps elsewhere.
        impl: implementation of every op ("auto", "triton", "reference"), or a mapping from op name
            to implementation.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    img_size: Any = 224
    patch_size: Any = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False
    proj_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    pos_embed: str = "learn"
    no_embed_class: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    pool_include_prefix: bool = False
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    patch_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = ""
    fix_init: bool = False
    embed_layer: Any = None
    embed_norm_layer: Any = None
    norm_layer: Any = None
    act_layer: Any = None
    block_fn: Any = None
    mlp_layer: Any = None
    attn_layer: Any = None
    mean: Any = 0.5
    std: Any = 0.5
    residual_dtype: torch.dtype | None = None
    drop_path_mode: str = "scale"
    save: str | None = None
    impl: Any = "auto"

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # the dataclass is frozen
        for name in ("img_size", "patch_size"):
            put(name, _pair(name, getattr(self, name)))
        for name in ("in_chans", "embed_dim", "depth", "num_heads"):
            put(name, _integer(name, getattr(self, name), 1))
        for name in ("num_classes", "reg_tokens"):
            put(name, _integer(name, getattr(self, name), 0))
        for field in fields(self):
            if field.type is bool:
                put(field.name, _flag(field.name, getattr(self, field.name)))
            elif field.name.endswith("drop_rate") or field.name == "drop_path_rate":
                put(field.name, _rate(field.name, getattr(self, field.name)))
        if self.fc_norm is not None:
            put("fc_norm", _flag("fc_norm", self.fc_norm))
        if self.init_values is not None:
            put("init_values", _number("init_values", self.init_values))
        put("mlp_ratio", _number("mlp_ratio", self.mlp_ratio))
        put("pos_embed", self.pos_embed or "none")
        _one_of("pos_embed", self.pos_embed, ("learn", "none"))
        _one_of("global_pool", self.global_pool, POOLS)
        _one_of("weight_init", self.weight_init, WEIGHT_INITS)
        _one_of("drop_path_mode", self.drop_path_mode, ("scale", "subset"))
        if self.save is not None:
            _one_of("save", self.save, SAVES)
        for name, default in (
            ("embed_layer", "timm.PatchEmbed"),
            ("block_fn", "timm.Block"),
            ("attn_layer", "timm.Attention"),
        ):
            _only_default(name, getattr(self, name), default)
            put(name, None)
        put("norm_layer", _norm(self.norm_layer))
        put("act_layer", _activation(self.act_layer))
        put("mlp_layer", _mlp(self.mlp_layer))
        for name in ("mean", "std"):
            put(name, _per_channel(name, getattr(self, name), self.in_chans))
        put("impl", _impl(self.impl))
        self._check()

    def _check(self) -> None:
        """What one argument alone can't tell."""
        for name in ("scale_attn_norm", "scale_mlp_norm", "patch_drop_rate", "embed_norm_layer"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported, got {getattr(self, name)!r}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got embed_dim={self.embed_dim} "
                f"and num_heads={self.num_heads}"
            )
        if self.hidden_dim < 1:
            raise ValueError(
                f"mlp_ratio must give at least one hidden unit, got {self.mlp_ratio} "
                f"with embed_dim={self.embed_dim}"
            )
        if self.mlp_layer == "swiglu_packed" and self.hidden_dim % 2:
            raise ValueError(
                f"mlp_ratio must give an even hidden width for swiglu_packed, got {self.mlp_ratio} "
                f"* embed_dim={self.embed_dim} -> {self.hidden_dim}"
            )
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' needs class_token=True; expected another pool")
        if min(self.grid_size) < 1:
            raise ValueError(
                f"img_size {self.img_size} is smaller than patch_size {self.patch_size}"
            )
        whole = all(s % p == 0 for s, p in zip(self.img_size, self.patch_size, strict=True))
        if self.dynamic_img_pad and not self.dynamic_img_size and not whole:
            raise ValueError(
                f"img_size must be a multiple of patch_size with dynamic_img_pad alone, got "
                f"{self.img_size} and {self.patch_size}; or set dynamic_img_size=True"
            )
        if any(s <= 0 for s in (self.std if isinstance(self.std, tuple) else (self.std,))):
            raise ValueError(f"std must be positive, got {self.std}")
        stream = self.residual_dtype
        if stream is None:
            return
        if not isinstance(stream, torch.dtype):
            raise TypeError(f"residual_dtype must be a torch.dtype or None, got {stream!r}")
        if not stream.is_floating_point:
            raise ValueError(f"residual_dtype must be floating point, got {stream}")
        if not self.final_norm or (self.global_pool == "map" and self.fc_norm):
            # The norm behind the blocks is what casts back to the dtype of the layers after it.
            raise ValueError("residual_dtype needs a norm between the blocks and the pool or head")

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "ViTConfig":
        """The preset of timm's model `name`, with any argument replaced.

        Raises:
            ValueError: unknown name (the text offers close ones, or all), or a pretrained tag.
            TypeError: unknown argument.
        """
        if overrides.pop("pretrained", False):
            raise ValueError(f"pretrained=True: {_NO_DOWNLOAD}")
        if name not in PRESETS:
            base, _, tag = name.partition(".")
            if tag and base in PRESETS:
                raise ValueError(f"model {name!r} asks for weights ({tag!r}): {_NO_DOWNLOAD}")
            raise ValueError(f"unknown model {name!r}{_similar(base, PRESETS)}")
        check_arguments(overrides)
        return cls(**{**PRESETS[name], **overrides})

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches in a column and in a row of an image of `img_size`."""
        return (self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1])

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP's first layer."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens before the patches."""
        return int(self.class_token) + self.reg_tokens

    @property
    def num_pos_prefix(self) -> int:
        """Those of them that have a position."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def norm_after_pool(self) -> bool:
        """Whether the final norm is `fc_norm`, behind the pool, and not `norm`, before it."""
        if self.fc_norm is not None:
            return self.fc_norm
        return self.global_pool in ("avg", "avgmax", "max")

    @property
    def implementations(self) -> dict[str, str]:
        """Op name -> implementation, for every op of the model."""
        if isinstance(self.impl, str):
            return dict.fromkeys(OPS, self.impl)
        return {**dict.fromkeys(OPS, "auto"), **dict(self.impl)}


def check_arguments(arguments: Iterable[str]) -> None:
    """Every name is a field of ViTConfig; otherwise a TypeError that offers close ones, or all."""
    known = [f.name for f in fields(ViTConfig)]
    for name in arguments:
        if name not in known:
            raise TypeError(f"unknown argument {name!r}{_similar(name, known)}")


def _similar(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; expected one of {', '.join(known)}"


def _integer(name: str, value: Any, least: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _pair(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be one integer or (height, width), got {value!r}")
        return (_integer(name, value[0], 1), _integer(name, value[1], 1))
    return (_integer(name, value, 1),) * 2


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _rate(name: str, value: Any) -> float:
    rate = _number(name, value)
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return rate


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def _one_of(name: str, value: Any, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _per_channel(name: str, value: Any, channels: int) -> float | tuple[float, ...]:
    if isinstance(value, (tuple, list)):
        if len(value) != channels:
            raise ValueError(
                f"{name} must be a number or in_chans={channels} of them, got {value!r}"
            )
        return tuple(_number(name, v) for v in value)
    return _number(name, value)


def _unwrap(layer: Any) -> tuple[str | None, dict[str, Any]]:
    """("timm.RmsNorm", keywords of the partial) for a class, (text, {}) for a string; else None."""
    keywords: dict[str, Any] = {}
    if isinstance(layer, functools.partial) and not layer.args:
        layer, keywords = layer.func, dict(layer.keywords)
    if isinstance(layer, str):
        return layer.lower(), keywords
    if isinstance(layer, type):
        return f"{layer.__module__.partition('.')[0]}.{layer.__name__}", keywords
    return None, keywords


def _refuse(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name}={value!r} is not supported; expected {expected}")


def _norm(layer: Any) -> tuple[str, float]:
    expected = "'layernorm', 'rmsnorm', (name, eps), or torch's or timm's class with eps at most"
    if isinstance(layer, (tuple, list)) and len(layer) == 2 and layer[0] in NORMS:
        return (NORMS[layer[0]][0], _number("norm_layer eps", layer[1]))
    kind, options = _unwrap(layer or "layernorm")
    if kind is not None and "." not in kind:
        kind = kind.replace("_", "")
    for flag in ("affine", "elementwise_affine", "bias"):  # True is what every norm here does
        if options.get(flag) is True:
            del options[flag]
    eps = options.pop("eps", NORMS[kind][1] if kind in NORMS else None)
    if kind not in NORMS or options or eps is None:
        raise _refuse("norm_layer", layer, expected)
    return (NORMS[kind][0], _number("norm_layer eps", eps))


def _activation(layer: Any) -> str:
    kind, options = _unwrap(layer or "gelu")
    if kind == "torch.GELU" and options.get("approximate") in ("none", "tanh"):
        kind = "gelu_tanh" if options.pop("approximate") == "tanh" else "gelu"
    if kind not in ACTIVATIONS or options:
        expected = "'gelu', 'gelu_tanh', 'quick_gelu', 'relu', 'silu', or torch's or timm's class"
        raise _refuse("act_layer", layer, expected + " without options")
    return ACTIVATIONS[kind]


def _mlp(layer: Any) -> str:
    kind, options = _unwrap(layer or "mlp")
    options.pop("act_layer", None)  # act_layer of the model overrides it, in timm too
    fits = {"gate_last": False} if kind == "timm.GluMlp" else {}
    if kind not in MLPS or options != fits:
        expected = "'mlp', 'swiglu', 'swiglu_packed', or timm's Mlp, SwiGLU or SwiGLUPacked"
        raise _refuse("mlp_layer", layer, expected)
    return MLPS[kind]


def _only_default(name: str, layer: Any, default: str) -> None:
    standard = ("", "attn") if name == "attn_layer" else ()
    if not (layer is None or layer in standard or _unwrap(layer) == (default, {})):
        raise _refuse(name, layer, f"None or {default}")


def _impl(impl: Any) -> str | tuple[tuple[str, str], ...]:
    if isinstance(impl, str):
        asked = dict.fromkeys(OPS, impl)
    elif isinstance(impl, (Mapping, tuple)):
        asked = dict(impl)
    else:
        raise TypeError(f"impl must be a string or a mapping from op to string, got {impl!r}")
    for op, name in asked.items():
        if op not in OPS:
            raise ValueError(f"impl names the op {op!r}; expected one of {', '.join(OPS)}")
        known = ("auto", *REGISTRY[op].implementations)
        if name not in known:
            raise ValueError(f"impl={name!r} for {op}; expected one of {', '.join(known)}")
    return impl if isinstance(impl, str) else tuple(sorted(asked.items()))


_NO_DOWNLOAD = (
    "vitkern downloads nothing. Create the model by its name and load the weights with "
    "model.load_state_dict(...), which takes timm's state dicts as they are"
)

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
}
_VARIANTS = """
tiny_patch16_224 tiny_patch16_384
small_patch8_224 small_patch16_224 small_patch16_384 small_patch32_224 small_patch32_384
base_patch8_224 base_patch16_224 base_patch16_384 base_patch32_224 base_patch32_384
large_patch14_224 large_patch16_224 large_patch16_384 large_patch32_224 large_patch32_384
huge_patch14_224 giant_patch14_224 gigantic_patch14_224
"""
# timm's default weights of these were trained without a classifier that it kept.
_HEADLESS = ("small_patch8_224", "large_patch32_224", "huge_patch14_224")


def _preset(variant: str) -> dict[str, Any]:
    size, patch, image = variant.split("_")
    headless = {"num_classes": 0} if variant in _HEADLESS else {}
    patch_size = int(patch.removeprefix("patch"))
    return {"img_size": int(image), "patch_size": patch_size, **_SIZES[size], **headless}


PRESETS: dict[str, dict[str, Any]] = {f"vit_{v}": _preset(v) for v in _VARIANTS.split()}
