"""The first half of an MLP: a linear layer and its activation.

    y = act(x W^T + b)                                 W [F, D], b [F]
    y = act(g) * v  with  [g; v] = x W^T + b           gated (SwiGLU, GEGLU): W [2F, D], b [2F]

Activations: erf GELU ("gelu", the ViT default), tanh GELU ("gelu_tanh"), QuickGELU
(z * sigmoid(1.702 z)), ReLU and SiLU.
Forward:  x [..., D] -> y [..., F].
Bytes: x, W and y, where a fused kernel writes nothing else; FLOPs: 2 rows D F. Until that kernel
exists the op is made of ATen's product and activation.
Sources: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants", 2020.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import (
    Arg,
    Sample,
    accumulate_dtype,
    autocast_dtype,
    check_floating,
    check_shape,
    choose,
    define,
    total_bytes,
)


def _gelu(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def _gelu_tanh(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def _silu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(z)


Activation = Callable[[Tensor], Tensor]

# name: (definition, the same by ATen's fused call, and by that call in place)
ACTIVATIONS: dict[str, tuple[Activation, Activation, Activation]] = {
    "gelu": (_gelu, F.gelu, torch.ops.aten.gelu_.default),
    "gelu_tanh": (
        _gelu_tanh,
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z: torch.ops.aten.gelu_.default(z, approximate="tanh"),
    ),
    "quick_gelu": (_quick_gelu, _quick_gelu, _quick_gelu),
    "relu": (torch.relu, torch.relu, torch.relu_),
    "silu": (_silu, F.silu, lambda z: F.silu(z, inplace=True)),
}


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool
) -> Tensor:
    """The definition, accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(x, weight, bias)
    z = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    act = ACTIVATIONS[activation][0]
    if gated:
        gate, value = z.chunk(2, dim=-1)
        return (act(gate) * value).to(x.dtype).contiguous()
    return act(z).to(x.dtype).contiguous()


def portable(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool
) -> Tensor:
    """ATen's product and activation."""
    z = F.linear(x, weight, bias)
    # The product is ours alone. Where no gradient needs it, writing over it saves touching as much
    # fresh memory, which on a CPU costs as much as the GELU; a compiler does that by itself.
    overwrite = not (z.requires_grad or torch.compiler.is_compiling())
    act = ACTIVATIONS[activation][2 if overwrite else 1]
    if gated:
        gate, value = z.chunk(2, dim=-1)
        return act(gate) * value
    return act(z)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool) -> Tensor:
    """Shape, dtype and strides of the output."""
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    return x.new_empty(*x.shape[:-1], features)


def samples(size: str) -> Iterable[Sample]:
    """Every activation at odd shapes; or fc1 of ViT-B and L, batch 64."""
    if size == "tiny":
        for activation in ACTIVATIONS:
            for gated in (False, True):
                yield _sample((2, 5, 24), 18, activation, gated, bias=not gated)
    else:
        for width in (768, 1024):
            yield _sample((64, 197, width), 4 * width, "gelu", False, bias=True)


def _sample(
    shape: tuple[int, ...], features: int, activation: str, gated: bool, bias: bool
) -> Sample:
    rows = 2 * features if gated else features
    args = {
        "x": Arg(shape),
        "weight": Arg((rows, shape[-1]), scale=shape[-1] ** -0.5),
        "bias": Arg((rows,)) if bias else None,
    }
    label = f"{activation}{' gated' * gated} {'x'.join(map(str, shape))} -> {features}"
    return Sample(label, args, {"activation": activation, "gated": gated})


def flops(x: Tensor, weight: Tensor, **_: Any) -> int:
    """The product; the activation is below 1 %."""
    return 2 * x.numel() * weight.shape[0]


def bytes_moved(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, **_: Any) -> int:
    """x and the weights in, y out."""
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    rows = x.numel() // max(1, x.shape[-1])
    return total_bytes(x, weight, bias) + rows * features * x.element_size()


LINEAR_ACT = define(
    "linear_act",
    reference=reference,
    portable=portable,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    gated: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Linear layer and activation, or a gated pair of them.

    Under autocast all arguments are cast to its dtype, as by ``F.linear``.

    Args:
        x: tokens [..., D].
        weight: [F, D]; [2F, D] = [gate; value] if gated.
        bias: [F] or [2F], or None.
        activation: "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu".
        gated: multiply the activated gate by the value.
        impl: "auto", "torch" or "reference".

    Returns:
        [..., F] in the dtype of the product.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, an unknown activation or `impl`, several devices.
    """
    check_floating("linear_act", x=x, weight=weight, bias=bias)
    check_shape("linear_act", "weight", weight, "2F" if gated else "F", x.shape[-1])
    check_shape("linear_act", "bias", bias, weight.shape[0])
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"linear_act: unknown activation {activation!r}; "
            f"expected one of {', '.join(ACTIVATIONS)}"
        )
    if gated and weight.shape[0] % 2:
        raise ValueError(f"linear_act: weight must be [2F, D] if gated, got {list(weight.shape)}")
    dtype = autocast_dtype(x.device)
    if dtype is not None and torch.float64 not in (x.dtype, weight.dtype):
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    run = portable if choose(LINEAR_ACT, impl, x, weight, bias) == "torch" else reference
    return run(x, weight, bias, activation, gated)
