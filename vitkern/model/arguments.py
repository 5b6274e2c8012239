"""How an argument is read: checked, and made plain. Used by `config.py` alone.

Every function takes what a user gave and returns a number, a string, a boolean or a tuple of them,
or raises an error that names the argument, what was given and what is expected.
"""

import difflib
import functools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from vitkern.kernels import REGISTRY

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
BLOCKS = {
    "pre_norm": "pre_norm",
    "res_post_norm": "res_post_norm",
    "parallel_things": "parallel_things",
    "parallel_scaling": "parallel_scaling",
    "diff_parallel_scaling": "diff_parallel_scaling",
    "timm.Block": "pre_norm",
    "timm.ResPostBlock": "res_post_norm",
    "timm.ParallelThingsBlock": "parallel_things",
    "timm.ParallelScalingBlock": "parallel_scaling",
    "timm.DiffParallelScalingBlock": "diff_parallel_scaling",
    "timm.RelPosBlock": "pre_norm",  # with rel_pos
    "timm.ResPostRelPosBlock": "res_post_norm",
}
BLOCK_OPTIONS = {
    "parallel_things": {"num_parallel": 2},
    "parallel_scaling": {"fuse_out_proj": False},
    "diff_parallel_scaling": {"dual_lambda": False},
}
ATTENTIONS = {
    "": "attn",
    "attn": "attn",
    "diff": "diff",
    "timm.Attention": "attn",
    "timm.DiffAttention": "diff",
}
ATTENTION_OPTIONS = {"diff": {"dual_lambda": False}}
# What may stand before the patch projection, and how an error describes it.
BACKBONES = {
    "resnetv2": "('resnetv2', blocks of each stage)",
    "conv_stem": "('conv_stem', strides of three layers)",
    "timm": "('timm', (name of a model, number of a stage))",
}


def similar(name: str, known: Iterable[str]) -> str:
    """End of an error about an unknown name: longer ones, close ones, or all if they are few."""
    known = list(known)
    close = [k for k in known if name and k.startswith(name)][:3]
    close = close or difflib.get_close_matches(name, known, n=3)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    if len(known) > 100:
        return f"; expected one of {len(known)} names such as {', '.join(known[:3])}"
    return f"; expected one of {', '.join(known)}"


def integer(name: str, value: Any, least: int) -> int:
    """An integer, `least` or more."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def pair(name: str, value: Any) -> tuple[int, int]:
    """(height, width) of positive integers; one number is both."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be one integer or (height, width), got {value!r}")
        return (integer(name, value[0], 1), integer(name, value[1], 1))
    return (integer(name, value, 1),) * 2


def number(name: str, value: Any) -> float:
    """A finite number as a float."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def rate(name: str, value: Any) -> float:
    """A probability below 1."""
    rate = number(name, value)
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return rate


def flag(name: str, value: Any) -> bool:
    """True or False; 1 and 0 will do."""
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def one_of(name: str, value: Any, known: Iterable[str | None]) -> None:
    """An error unless `value` is among `known`."""
    if value not in tuple(known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def per_channel(name: str, value: Any, channels: int) -> float | tuple[float, ...]:
    """A number, or one for every channel."""
    if isinstance(value, (tuple, list)):
        if len(value) != channels:
            raise ValueError(
                f"{name} must be a number or in_chans={channels} of them, got {value!r}"
            )
        return tuple(number(name, v) for v in value)
    return number(name, value)


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


def refuse(name: str, value: Any, expected: str) -> ValueError:
    """The error for an option that isn't built here."""
    return ValueError(f"{name}={value!r} is not supported; expected {expected}")


def norm(name: str, layer: Any) -> tuple[str, float]:
    """(kind, eps) of a norm: a class or partial, a kind, or a pair."""
    expected = "'layernorm', 'rmsnorm', (name, eps), or torch's or timm's class with eps at most"
    if isinstance(layer, (tuple, list)) and len(layer) == 2 and layer[0] in NORMS:
        return (NORMS[layer[0]][0], number(f"{name} eps", layer[1]))
    kind, options = _unwrap(layer or "layernorm")
    if kind is not None and "." not in kind:
        kind = kind.replace("_", "")
    for flag in ("affine", "elementwise_affine", "bias"):  # True is what every norm here does
        if options.get(flag) is True:
            del options[flag]
    eps = options.pop("eps", NORMS[kind][1] if kind in NORMS else None)
    if kind not in NORMS or options or eps is None:
        raise refuse(name, layer, expected)
    return (NORMS[kind][0], number(f"{name} eps", eps))


def activation(layer: Any) -> str:
    """Name of an activation: from a class, a partial or a name."""
    kind, options = _unwrap(layer or "gelu")
    if kind == "torch.GELU" and options.get("approximate") in ("none", "tanh"):
        kind = "gelu_tanh" if options.pop("approximate") == "tanh" else "gelu"
    if kind not in ACTIVATIONS or options:
        expected = "'gelu', 'gelu_tanh', 'quick_gelu', 'relu', 'silu', or torch's or timm's class"
        raise refuse("act_layer", layer, expected + " without options")
    return ACTIVATIONS[kind]


def mlp(layer: Any) -> str:
    """Layout of an MLP: from a class, a partial or a name."""
    kind, options = _unwrap(layer or "mlp")
    options.pop("act_layer", None)  # act_layer of the model overrides it, in timm too
    fits = {"gate_last": False} if kind == "timm.GluMlp" else {}
    if kind not in MLPS or options != fits:
        expected = "'mlp', 'swiglu', 'swiglu_packed', or timm's Mlp, SwiGLU or SwiGLUPacked"
        raise refuse("mlp_layer", layer, expected)
    return MLPS[kind]


def implementations(impl: Any) -> str | tuple[tuple[str, str], ...]:
    """One name for all ops, or (op, name) pairs in order."""
    if isinstance(impl, str):
        asked = dict.fromkeys(OPS, impl)
    elif isinstance(impl, (Mapping, tuple, list)):
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


def choice(name: str, layer: Any, known: Mapping[str, str], options: Mapping[str, Any]) -> Any:
    """A kind of layer: its name, or (name, ((option, value), ...)) where an option isn't default.

    known: names and classes -> our name. options: our name -> its options with their defaults.
    """
    given: Mapping[str, Any] = {}
    if isinstance(layer, (tuple, list)) and len(layer) == 2:
        kind, given = layer[0], dict(layer[1])
    else:
        kind, given = _unwrap(layer)
    if kind is not None and kind not in known and kind.lower() in known:
        kind = kind.lower()
    allowed = options.get(known.get(kind or "", ""), {})
    if kind not in known or any(key not in allowed for key in given):
        names = ", ".join(repr(n) for n in dict.fromkeys(known.values()))
        raise refuse(name, layer, f"one of {names}, or timm's class")
    for key, value in given.items():
        if type(value) is not type(allowed[key]) or (not isinstance(value, bool) and value < 1):
            raise ValueError(f"{name} option {key} must be like {allowed[key]!r}, got {value!r}")
    changed = tuple(sorted((k, v) for k, v in given.items() if v != allowed[k]))
    return (known[kind], changed) if changed else known[kind]


def backbone(layer: Any) -> tuple[str, tuple[Any, ...]] | None:
    """What stands before the patch projection: None, or (kind, arguments) as in `hybrid.py`."""
    expected = "None, timm.PatchEmbed, or one of " + ", ".join(BACKBONES.values())
    if layer is None or layer == "patch" or _unwrap(layer) == ("timm.PatchEmbed", {}):
        return None
    if not isinstance(layer, (tuple, list)) or len(layer) != 2 or layer[0] not in BACKBONES:
        raise refuse("embed_layer", layer, expected)
    kind, values = layer[0], layer[1]
    if not isinstance(values, (tuple, list)):
        raise refuse("embed_layer", layer, expected)
    if kind == "timm":
        fits = len(values) == 2 and isinstance(values[0], str) and _whole(values[1:])
    else:
        fits = _whole(values) and (kind == "resnetv2" or len(values) == 3)
    if not fits:
        raise refuse("embed_layer", layer, expected)
    return (kind, tuple(values))


def _whole(values: Iterable[Any]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)
