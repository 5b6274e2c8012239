"""FLOPs and bytes of a call that a trace recorded, from the shapes and types of its arguments.

Of vitkern's ops by their own declarations: what a perfect kernel needs. Of ATen's the FLOPs are
those of ``torch.utils.flop_counter``, which knows matrix products, convolutions and attention; the
bytes are those of all tensors given and returned, each once. None where a trace says too little,
as it does of lists of tensors.
"""

import ast
import inspect
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from vitkern.kernels import REGISTRY
from vitkern.kernels._op import Op, dtype_name
from vitkern.kernels._verified import KERNELS
from vitkern.profile.trace import Span

PREFIX = "vitkern::"

TYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "c10::Half": torch.float16,
    "c10::BFloat16": torch.bfloat16,
    "unsigned char": torch.uint8,
    "signed char": torch.int8,
    "short": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
    "long int": torch.int64,
    "bool": torch.bool,
}

# c10::ScalarType, as which a trace shows a dtype.
NUMBERS = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    11: torch.bool,
    15: torch.bfloat16,
}

# Their first argument is written only.
FILLS = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_"})
NO_KERNEL = (
    "_fused_sdp_choice", "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "as_strided",
    "detach", "empty", "lift_fresh", "new_empty", "resize_", "set_",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one call needs; the dtype is the narrowest among its floating-point tensors."""

    flops: int
    bytes: int
    dtype: str


def our_op(name: str) -> tuple[Op, str] | None:
    """The op "vitkern::NAME" or "vitkern::NAME_PEER" stands for, and the peer, "" for none."""
    if not name.startswith(PREFIX):
        return None
    name = name.removeprefix(PREFIX)
    if name in REGISTRY:
        return REGISTRY[name], ""
    base, _, peer = name.rpartition("_")
    return (REGISTRY[base], peer) if base in REGISTRY and peer in KERNELS else None


def cost(span: Span) -> Cost | None:
    """Of the call that `span` is."""
    args = span.args
    if "Input Dims" not in args:
        return None
    return _cost(span.name, _recorded(args))


def _recorded(args: dict[str, Any]) -> str:
    """What a trace says of a call's arguments, as something that can be looked up."""
    keys = ("Input Dims", "Input type", "Input Strides", "Concrete Inputs")
    words = {key: value for key, value in args.items() if key.startswith("argument ")}
    return repr((*(args.get(key) for key in keys), words))


@cache
def _cost(name: str, recorded: str) -> Cost | None:
    dims, types, strides, values, words = ast.literal_eval(recorded)
    known = our_op(name)
    try:
        given = [
            _argument(d, t, s, v)
            for d, t, s, v in zip(
                dims, types, strides or [None] * len(dims), values or [""] * len(dims), strict=True
            )
        ]
        for key, word in words.items():
            given[int(key.removeprefix("argument "))] = ast.literal_eval(word)
        return _of_ours(known[0], given) if known else _of_aten(name, given)
    except Exception:  # of any op, on any arguments: what it raises is of no interest here
        return None


def _argument(dims: Any, kind: str, strides: Any, value: str) -> Any:
    """A tensor without memory, or the value."""
    if kind in TYPES:
        if strides and len(strides) == len(dims):
            return torch.empty_strided(dims, strides, dtype=TYPES[kind], device="meta")
        return torch.empty(dims, dtype=TYPES[kind], device="meta")
    if not value:
        if kind not in ("", "Scalar"):
            raise ValueError(f"a trace doesn't tell {kind}")  # lists of tensors, say
        return None
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def _of_ours(op: Op, given: list[Any]) -> Cost:
    names = list(inspect.signature(op.reference).parameters)
    arguments = dict(zip(names, given, strict=False))
    for name, value in arguments.items():
        if name.endswith("dtype") and isinstance(value, int):
            arguments[name] = NUMBERS[value]
    if arguments.get("activation", "") is None:
        # The dispatcher's record has no strings. Up to three times as wide it is q, k and v, or
        # one of them; an MLP's first layer is wider.
        weight = arguments["weight"]
        narrow = weight.shape[0] <= 3 * weight.shape[1] and not arguments["gated"]
        arguments["activation"] = "" if narrow else "gelu"
    return Cost(op.flops(**arguments), op.bytes_moved(**arguments), _narrowest(given))


def _of_aten(name: str, given: list[Any]) -> Cost | None:
    packet = operator(name)
    short = name.partition("::")[2]
    if packet is None:
        return None
    if short.startswith(NO_KERNEL):
        return Cost(0, 0, "")
    overload = _overload(packet, given)
    arguments = overload._schema.arguments
    returned = overload._schema.returns
    if returned and all(r.alias_info is not None and not r.alias_info.is_write for r in returned):
        return Cost(0, 0, "")  # a view
    args, kwargs = [], {}
    for argument, value in zip(arguments, given, strict=False):
        if "ScalarType" in str(argument.real_type) and isinstance(value, int):
            value = NUMBERS[value]
        elif value is None and str(argument.type) == "str":
            value = argument.default_value  # a trace has no strings
        elif str(argument.real_type) in ("Optional[Layout]", "Optional[Device]"):
            continue
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    out = overload(*args, **kwargs)
    flops = 0
    formula = flop_registry.get(packet) or flop_registry.get(operator(name.replace("_for_cpu", "")))
    if formula is not None:
        flops = int(formula(*args, **kwargs, out_val=out))
    read = given[1:] if short in FILLS else given
    written = out if isinstance(out, (tuple, list)) else [out]
    return Cost(flops, _bytes(read) + _bytes(written), _narrowest(given))


def operator(name: str) -> Any:
    """``torch.ops.<namespace>.<name>`` of a name in a trace, or None."""
    namespace, _, short = name.partition("::")
    if not short or not short.isidentifier():
        return None
    return getattr(getattr(torch.ops, namespace), short, None)


@cache
def is_composite(name: str) -> bool:
    """Whether an operator is only a name for others, which do the work."""
    packet = operator(name)
    kinds = []
    for overload in packet.overloads() if packet is not None else ():
        full = name if overload == "default" else f"{name}.{overload}"
        if "out" in overload or "Dimname" in overload:
            continue
        with suppress(RuntimeError):  # some are TorchScript's alone
            kinds.append(
                torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd")
            )
    return bool(kinds) and all(kinds)


@cache
def is_operator(name: str) -> bool:
    """Whether this is an operator of PyTorch that does its work itself."""
    return operator(name) is not None and not is_composite(name)


def _overload(packet: Any, given: list[Any]) -> Any:
    """The one of an operator's schemas that these arguments fit.

    Raises:
        LookupError: none.
    """
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        if len(arguments) == len(given) and all(
            _fits(str(argument.type), value)
            for argument, value in zip(arguments, given, strict=True)
        ):
            return overload
    raise LookupError(str(packet))


def _fits(kind: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return kind in ("Tensor", "Optional[Tensor]")
    if value is None:
        return kind.startswith("Optional") or kind == "str"
    return "Tensor" not in kind


def _bytes(values: Any) -> int:
    """Of all tensors; an expanded one is read once."""
    return sum(
        v.element_size()
        * torch.Size(
            [n for n, stride in zip(v.shape, v.stride(), strict=True) if stride or n == 0]
        ).numel()
        for v in values
        if isinstance(v, Tensor)
    )


def _narrowest(values: list[Any]) -> str:
    kinds = [v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return dtype_name(min(kinds, key=lambda dtype: dtype.itemsize)) if kinds else ""
