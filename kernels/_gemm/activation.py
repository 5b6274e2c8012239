"""Activations by name: the definition, ATen's fused calls, and the same on a tile in registers.

"gelu" is the exact, erf form that ViTs are trained with; "gelu_tanh" its approximation;
"quick_gelu" z * sigmoid(1.702 z), as in OpenAI's CLIP; then "relu" and "silu". "" is none.

Gated: the rows of a weight are [gate; value], and the layer returns act(gate) * value.
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import jit, tl

Function = Callable[[Tensor], Tensor]


class Activation(NamedTuple):
    """definition: in elementary steps; fused: ATen's one call; in_place: that, over its input.

    backward: the gradient of z for that of act(z) and z itself.
    """

    definition: Function
    fused: Function
    in_place: Function
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def _gelu_tanh(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def _quick_gelu_backward(dy: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * z)
    return dy * s * (1 + 1.702 * z * (1 - s))


def _silu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(z)


aten = torch.ops.aten
ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(_gelu, F.gelu, aten.gelu_.default, aten.gelu_backward.default),
    "gelu_tanh": Activation(
        _gelu_tanh,
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z: aten.gelu_.default(z, approximate="tanh"),
        lambda dy, z: aten.gelu_backward.default(dy, z, approximate="tanh"),
    ),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu, _quick_gelu, _quick_gelu_backward),
    "relu": Activation(
        torch.relu, torch.relu, torch.relu_, lambda dy, z: aten.threshold_backward.default(dy, z, 0)
    ),
    "silu": Activation(
        _silu, F.silu, lambda z: F.silu(z, inplace=True), aten.silu_backward.default
    ),
}


def check_activation(op: str, activation: str, gated: bool, rows: int) -> None:
    """`activation` is known, and a gated weight has an even number of `rows`.

    Raises:
        ValueError: otherwise; the text says what is expected.
    """
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{op}: unknown activation {activation!r}; expected one of {known}")
    if gated and rows % 2:
        raise ValueError(f"{op}: weight must be [2F, D] if gated, got {rows} rows")


def definition(z: Tensor, activation: str, gated: bool) -> Tensor:
    """act(z), or act(gate) * value of z = [gate, value], in elementary steps."""
    return _apply(z, ACTIVATIONS[activation].definition if activation else None, gated)


def fused(z: Tensor, activation: str, gated: bool) -> Tensor:
    """The same by ATen's fused calls."""
    return _apply(z, ACTIVATIONS[activation].fused if activation else None, gated)


def overwriting(z: Tensor, activation: str, gated: bool) -> Tensor:
    """The same, over `z` itself, which must belong to nobody else."""
    return _apply(z, ACTIVATIONS[activation].in_place if activation else None, gated)


def _apply(z: Tensor, act: Function | None, gated: bool) -> Tensor:
    if act is None:
        return z
    if not gated:
        return act(z)
    gate, value = z.chunk(2, dim=-1)
    return act(gate) * value


@jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@jit
def _above(a):
    """How often a standard normal value exceeds a >= 0: erfc(a / sqrt(2)) / 2.

    Its logarithm is so smooth that a polynomial of degree 8 has it: 10 instructions with the power
    of two, where erf takes 29. GELU comes out twice as near to float64 as PyTorch's in float32 (of
    normal values 2.9e-8 against 6.2e-8; derivatives 4.6e-8 against 1.0e-7). The coefficients make
    the largest error, times a + 1/2, least; the first is negative, so that all ends at 0.
    """
    q = -2.1600499e-06 * a + 3.1401076e-05
    q = q * a - 1.4880736e-04
    q = q * a - 2.2595169e-04
    q = q * a + 7.1782721e-03
    q = q * a - 5.2575167e-02
    q = q * a - 4.5918179e-01
    q = q * a - 1.1511086e00
    q = q * a - 9.9999994e-01
    return tl.exp2(q)


@jit
def activate(z, ACT: tl.constexpr):
    """act(z) of a float32 tile."""
    if ACT == "gelu":
        a = tl.abs(z)
        return tl.maximum(z, 0.0) - a * _above(a)
    elif ACT == "gelu_tanh":  # 1 + tanh(u) is 2 sigmoid(2 u)
        return z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == "quick_gelu":
        return z * _sigmoid(1.702 * z)
    elif ACT == "relu":
        return tl.maximum(z, 0.0)
    elif ACT == "silu":
        return z * _sigmoid(z)
    else:
        return z


@jit
def derive(z, ACT: tl.constexpr):
    """(act(z), act'(z)) of a float32 tile; they share the costly part."""
    # 1 - sigmoid(u) is written sigmoid(-u): the difference would lose its digits at large u.
    if ACT == "gelu":
        a = tl.abs(z)
        above = _above(a)
        below = tl.where(z < 0.0, above, 1.0 - above)
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
        return tl.maximum(z, 0.0) - a * above, below + z * density
    elif ACT == "gelu_tanh":
        u = 1.5957691216057308 * (z + 0.044715 * z * z * z)
        s = _sigmoid(u)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        return z * s, s * (1.0 + z * _sigmoid(-u) * inner)
    elif ACT == "quick_gelu":
        s = _sigmoid(1.702 * z)
        return z * s, s * (1.0 + 1.702 * z * _sigmoid(-1.702 * z))
    elif ACT == "relu":
        return tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0)
    elif ACT == "silu":
        s = _sigmoid(z)
        return z * s, s * (1.0 + z * _sigmoid(-z))
    else:
        return z, tl.zeros_like(z) + 1.0
