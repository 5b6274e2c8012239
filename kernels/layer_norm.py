"""LayerNorm and RMSNorm over the last dimension.

    LayerNorm:  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    RMSNorm:    y = x / sqrt(mean(x^2) + eps) * weight  (+ bias)

Forward:  x [..., D], weight [D], bias [D] -> y [..., D]; float32, float16 or bfloat16 in any mix,
statistics in float32. Without weight and bias, y is x_hat: a norm that was folded into the linear
layer behind it.
Backward: with x_hat the normalised row and g = dy * weight,
    dx = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)   (no mean(g) for RMSNorm)
    dweight = sum over rows of dy * x_hat,  dbias = sum over rows of dy, in two stages, no atomics.
Saved for backward: x and weight (the statistics are recomputed from the row that is read anyway).
Bytes: x + y forward; x + dy + dx backward; parameters and partial sums are below 1 %.
FLOPs: about 8 an element forward, 14 backward: memory-bound everywhere.

Sources: Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019. The kernels are shared with `add_layer_norm` and stand in ``_norm.py``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _norm
from ._op import (
    Arg,
    Sample,
    accumulate_dtype,
    check_floating,
    check_shape,
    choose,
    define,
    lone_norm,
    same,
    total_bytes,
    wants_grad,
)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The definition, accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(x, weight, bias)
    y = _norm.affine(_norm.normalise(x.to(acc), eps, rms)[0], weight, bias)
    return y.to(out_dtype).contiguous()


def portable(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """ATen's fused norms."""
    return _norm.aten_norm(x, weight, bias, eps, rms).to(out_dtype).contiguous()


def launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """One launch of the forward kernel, without the parts that a residual branch needs."""
    return _norm.forward(x, None, None, None, weight, bias, eps, rms, out_dtype)[1]


def fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Shape, dtype and strides of the output."""
    return x.new_empty(x.shape, dtype=out_dtype)


def samples(size: str) -> Iterable[Sample]:
    """Odd widths and ranks; or the norms of ViT-Ti/S/B/L/H at 224 px, batch 128."""
    if size == "tiny":
        shapes: tuple[tuple[int, ...], ...] = (
            (2, 5, 96),
            (1, 1, 8),
            (3, 17, 33),
            (7, 72),
            (2, 3000),
            (3, 8192),
            (0, 5, 16),
        )
    else:
        shapes = tuple(
            (128, n, d) for n, d in ((197, 192), (197, 384), (197, 768), (197, 1024), (257, 1280))
        )
    kinds = [(shape, rms, True) for rms in (False, True) for shape in shapes]
    for shape, rms, affine in (*kinds, (shapes[2], False, False), (shapes[2], True, False)):
        args = {
            "x": Arg(shape, offset=0.5),
            "weight": Arg(shape[-1:], offset=1.0) if affine else None,
            "bias": Arg(shape[-1:]) if affine and not rms else None,
        }
        label = f"{'rms' if rms else 'ln'} {'x'.join(map(str, shape))}{' no affine' * (not affine)}"
        yield Sample(label, args, {"eps": 1e-6, "rms": rms, "out_dtype": same})


def flops(x: Tensor, **_: Any) -> int:
    """Two sums, a difference, a product, and the affine part."""
    return 8 * x.numel()


def bytes_moved(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype, **_: Any
) -> int:
    """x once in, y once out."""
    return total_bytes(x, weight, bias) + x.numel() * out_dtype.itemsize


LAYER_NORM = define(
    "layer_norm",
    reference=reference,
    portable=portable,
    launcher=launch,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
)


def backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, rms: bool, need_params: bool
) -> tuple[Tensor, Tensor]:
    """(dx, [dweight; dbias] as [2, D], or [0, D] where unwanted)."""
    dx, scaled = _norm.reference_backward(dy, x, weight, eps, rms)
    width = x.shape[-1]
    if need_params:
        rows = dy.to(scaled.dtype).reshape(-1, width)
        params = torch.stack([scaled.reshape(rows.shape).sum(0), rows.sum(0)])
    else:
        params = scaled.new_empty(0, width)
    return dx.to(x.dtype).contiguous(), params.to(_norm.params_dtype(x, weight, None))


def backward_launch(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, rms: bool, need_params: bool
) -> tuple[Tensor, Tensor]:
    """The backward kernel, then the sum of its partial parameter gradients."""
    sums = 2 if need_params else 0
    dx, _, params = _norm.backward(dy, None, x, None, None, None, None, weight, eps, rms, sums)
    return dx, params


def backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, rms: bool, need_params: bool
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    rows = 2 if need_params else 0
    dtype = _norm.params_dtype(x, weight, None)
    return x.new_empty(x.shape), x.new_empty(rows, x.shape[-1], dtype=dtype)


def backward_samples(size: str) -> Iterable[Sample]:
    """The forward's samples with a gradient."""
    for sample in samples(size):
        x, weight = sample.args["x"], sample.args["weight"]
        assert x is not None
        options = {"eps": 1e-6, "rms": sample.options["rms"], "need_params": weight is not None}
        yield Sample(sample.label, {"dy": Arg(x.shape), "x": x, "weight": weight}, options)


def backward_flops(x: Tensor, **_: Any) -> int:
    """The statistics again, two more row sums, two column sums."""
    return 14 * x.numel()


def backward_bytes_moved(
    dy: Tensor, x: Tensor, weight: Tensor | None, need_params: bool, **_: Any
) -> int:
    """dy and x in, dx out."""
    return total_bytes(dy, x, x, weight) + (2 * total_bytes(weight) if need_params else 0)


LAYER_NORM_BACKWARD = define(
    "layer_norm_backward",
    reference=backward_reference,
    launcher=backward_launch,
    fake=backward_fake,
    samples=backward_samples,
    flops=backward_flops,
    bytes_moved=backward_bytes_moved,
    backward_of="layer_norm",
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, rms, out_dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.rms = eps, rms
        ctx.bias_dtype = None if bias is None else bias.dtype
        return LAYER_NORM.call(x, weight, bias, eps, rms, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx, params = LAYER_NORM_BACKWARD.call(
            dy, x, weight, ctx.eps, ctx.rms, need_weight or need_bias
        )
        d_weight = params[0] if need_weight else None
        d_bias = params[1].to(ctx.bias_dtype) if need_bias else None
        return dx, d_weight, d_bias, None, None, None


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm (RMSNorm with ``rms=True``) over the last dimension of `x`.

    Args:
        x: tokens [..., D], any strides, float32, float16 or bfloat16 (float64 runs portably).
        weight: scale [D]; None for a norm without affine part.
        bias: shift [D], or None; only with a weight.
        eps: added to the variance; timm's ViTs use 1e-6.
        rms: divide by the root mean square without subtracting the mean.
        out_dtype: dtype of the result; the dtype of `x` if None. Autocast changes nothing here:
            where eager autocast returns float32, ask for it, or for the dtype of the next product.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        Normalised tokens [..., D], contiguous.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, a bias without a weight, tensors on several devices,
            an `impl` that can't run.
    """
    check_floating("layer_norm", x=x, weight=weight, bias=bias)
    if x.dim() == 0:
        raise ValueError("layer_norm: x must be [..., D], got a scalar")
    check_shape("layer_norm", "weight", weight, x.shape[-1])
    check_shape("layer_norm", "bias", bias, x.shape[-1])
    _norm.check_affine("layer_norm", weight, bias)
    out_dtype = out_dtype or x.dtype
    chosen = choose(
        LAYER_NORM,
        impl,
        x,
        weight,
        bias,
        unfit={"triton": _norm.width_problem(x.shape[-1])},
        avoid=lone_norm(),
    )
    if chosen == "triton":
        if wants_grad(x, weight, bias):
            return _LayerNorm.apply(x, weight, bias, eps, rms, out_dtype)
        return LAYER_NORM.call(x, weight, bias, eps, rms, out_dtype)
    run = LAYER_NORM.portable if chosen == "torch" else LAYER_NORM.reference
    return run(x, weight, bias, eps, rms, out_dtype)
