"""Linear layers on a CPU by oneDNN's fused product, where no gradient is wanted.

    y = act(x W^T + b)   or   y = residual + x W^T + b

``F.linear`` in float32 is MKL's product, then one pass over the result for each step after it.
oneDNN takes the step while it stores a tile, makes its code for the instructions that the processor
has, whoever built it, and reads weights faster that were packed for it. Its operators are the ones
that Inductor calls in a frozen model, ``mkldnn::_linear_pointwise`` and
``mkldnn::_reorder_linear_weight``. They have no derivative, so all that is recorded or traced is
left to the caller. Measured on Zen 4 only, whole models at batch 1 on one thread: 1.1 times timm's
speed for ViT-Ti/16 and S/16, 1.4 for B/16. For other processors with AVX-512 that is a prediction.

oneDNN adds up a whole row in one accumulator, and MKL a few hundred values at a time: at a depth of
3,072 that is twice MKL's error. So deep products are cut at `DEEPEST`, each part added to the last.

A packed weight is a second copy, at most one a parameter, and lives no longer than its parameter.
It is also dropped when the parameter is used where a gradient is wanted, or by `clear`. Before each
use it is compared with the parameter:

    what changed the parameter                                    what tells
    in-place ops, load_state_dict, optimizers                     the version counter
    ``.data = other``, vector_to_parameters, resized storage      address, shape, strides, dtype
    writes that are not counted: ``.data.mul_()``, NumPy's view,  a sample of `SAMPLES` values
        optimizers with ``fused=True``

So what can go unseen is an uncounted write to a few rows or values only; `clear` is for those who
do that. Weights that are no parameters, such as one that was just cast, are not packed.
"""

import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

# activation: oneDNN's name and algorithm, and ATen's call in place for a product of several parts.
# ReLU is left out, as oneDNN's returns 0 for NaN.
FUSED: dict[str | None, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    None: ("none", "", lambda y: y),
    "gelu": ("gelu", "none", torch.ops.aten.gelu_.default),
    "gelu_tanh": ("gelu", "tanh", lambda y: torch.ops.aten.gelu_.default(y, approximate="tanh")),
    "silu": ("swish", "", torch.ops.aten.silu_.default),
}

# Error against float64, as a multiple of F.linear's, on normal values: 1.45 at a depth of 768, 2.0
# at 1,536, 2.1 at 3,072.
DEEPEST = 768

# Multiplications from which it pays: a call costs about 20 us more than F.linear's (Zen 4), but an
# activation in a call of its own costs nearly as much.
LEAST_PRODUCT = 1 << 23
LEAST_ACTIVATED = 1 << 21

# Read on every call, and seldom in the cache: a value for each row took back what packing gains.
SAMPLES = 128


def _missing() -> str | None:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":  # on the same processor with AVX2 alone, MKL was as fast
        return f"it pays with AVX-512 only, and PyTorch uses {capability}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch lacks mkldnn::_linear_pointwise"
    return None


MISSING = _missing()
DTYPES: set[torch.dtype] = set()
if MISSING is None:
    _linear = torch.ops.mkldnn._linear_pointwise.default
    _linear_add = torch.ops.mkldnn._linear_pointwise.binary
    DTYPES.add(torch.float32)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        DTYPES.add(torch.bfloat16)


def problem() -> str | None:
    """Why `linear` can't run here, whatever its arguments; None if it can."""
    if MISSING is None and not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn.enabled is False"
    return MISSING


class Packed(NamedTuple):
    """A packed weight, and what its parameter was at that time."""

    owner: weakref.ref[Tensor]
    version: int
    address: int
    dtype: torch.dtype
    shape: torch.Size
    step: int
    sample: Tensor
    parts: tuple[Tensor, ...]

    def current(self, weight: Tensor) -> bool:
        """Whether `weight` is that parameter and hasn't changed since."""
        return (
            self.owner() is weight
            and self.version == weight._version
            and self.address == weight.data_ptr()
            and self.dtype is weight.dtype
            and self.shape == weight.shape
            and weight.is_contiguous()
            and torch.equal(self.sample, weight.as_strided(self.sample.shape, (self.step,)))
        )


_packed: dict[int, Packed] = {}  # by the parameter's id, as tensors compare by value


def clear() -> None:
    """Drop all packed weights; they are made again when needed."""
    _packed.clear()


def packed_bytes() -> int:
    """Memory that packed weights take."""
    return sum(torch.ops.mkldnn._nbytes(p) for entry in _packed.values() for p in entry.parts)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor | None:
    """``act(F.linear(x, weight, bias))``, or ``residual + F.linear(x, weight, bias)``.

    Args: with shapes and devices as the public ops have checked them.
        x: [..., D], any strides; float32, or bfloat16 where the processor has it.
        weight: [F, D]. bias: [F], or None.
        activation: a key of `FUSED`; anything else returns None.
        residual: [..., F], not together with an activation.

    Returns:
        [..., F], contiguous; None where it can't run or wouldn't pay, and the caller has to do it.
    """
    # Every line takes time, more than it looks since a product empties the caches before it.
    if torch.compiler.is_compiling() or not x.is_cpu or activation not in FUSED:
        return None
    given = [t for t in (x, weight, bias, residual) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        if _packed:
            _packed.pop(id(weight), None)
        return None
    dtype, least = x.dtype, LEAST_PRODUCT if activation is None else LEAST_ACTIVATED
    if dtype not in DTYPES or x.numel() * weight.shape[0] < least:
        return None
    for t in given:
        if type(t) not in (Tensor, Parameter) or t.dtype is not dtype:
            return None
    if not (x.layout is weight.layout is torch.strided) or _watched():
        return None
    if not torch._C._get_mkldnn_enabled():
        return None
    parts = packed(weight)
    if parts is None:
        return None
    name, algorithm, in_place = FUSED[activation]
    if len(parts) == 1:
        if residual is not None:
            return _linear_add(x, residual, parts[0], bias, "add")
        return _linear(x, parts[0], bias, name, [], algorithm)
    y = residual
    for columns, part in zip(x.split(_width(x.shape[-1]), -1), parts, strict=True):
        if y is None:
            y = _linear(columns, part, bias, "none", [], "")
        else:
            y = _linear_add(columns, y, part, bias, "add")
        bias = None
    assert y is not None
    return in_place(y)


def _width(depth: int) -> int:
    """Columns of one part where `depth` is cut into as few and as equal parts as may be."""
    return -(-depth // -(-depth // DEEPEST))


def _watched() -> bool:
    """Whether something follows or replaces operators: a tracer, fake tensors, functorch, or
    forward-mode derivatives. All of them know F.linear, and none knows packed weights.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def packed(weight: Tensor) -> tuple[Tensor, ...] | None:
    """`weight` [F, D] in parts of some columns, packed; itself where changes could not be seen.

    None where that can't be used: oneDNN has no fast code for any layout, and parts would be copied
    every time.
    """
    key = id(weight)
    entry = _packed.get(key)
    if entry is not None and entry.current(weight):
        return entry.parts
    if not weight.is_contiguous():
        return None
    if type(weight) is not Parameter or weight.is_inference():  # the latter count no changes
        return (weight,) if weight.shape[1] <= DEEPEST else None

    def forget(owner: weakref.ref[Tensor]) -> None:
        entry = _packed.get(key)
        if entry is not None and entry.owner is owner:
            del _packed[key]

    step = weight.numel() // SAMPLES + 1
    while math.gcd(step, weight.shape[1]) > 1:  # else samples would come back to the same columns
        step += 1
    values = weight.detach()
    parts = values.split(_width(weight.shape[1]), 1)
    _packed[key] = Packed(
        weakref.ref(weight, forget),
        weight._version,
        weight.data_ptr(),
        weight.dtype,
        weight.shape,
        step,
        values.as_strided((-(-weight.numel() // step),), (step,)).clone(),
        tuple(torch.ops.mkldnn._reorder_linear_weight(part.contiguous()) for part in parts),
    )
    return _packed[key].parts
