"""A linear layer and its activation, where no norm stands before it.

    z = x W^T + b,   y = act(z), or act(gate) * value with z = [gate, value]     (SwiGLU, GEGLU)

Forward:  x [..., D], W [F, D], b [F] -> y [..., F] (gated [..., F / 2]).
Backward: dz = dy * act'(z),  dx = dz W,  dW = dz^T x,  db = sum dz.
Saved for backward: x and z; y is not, since the layer behind can make it again from z.
Bytes: x + W + y (+ z, where a gradient is wanted) forward. A product and an activation apart read z
    once more. FLOPs: 2 rows D F forward, twice that backward.
Sources: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants", 2020.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _gemm_gluon
from ._gemm import cublas
from ._gemm import launch as gemm
from ._gemm.activation import ACTIVATIONS, check_activation, definition
from ._gemm.portable import linear_act as by_aten
from ._gemm.portable import through_activation, weight_grad
from ._op import (
    HALF,
    KERNELS,
    Arg,
    Sample,
    accumulate_dtype,
    cast,
    check_floating,
    check_shape,
    choose,
    define,
    product_dtype,
    same,
    total_bytes,
    wants_grad,
)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    need_pre: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: (y, z or empty), accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(x, weight, bias)
    z = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    y = definition(z, activation, gated).to(weight.dtype).contiguous()
    return y, z.to(weight.dtype).contiguous() if need_pre else weight.new_empty(0)


def portable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    need_pre: bool,
) -> tuple[Tensor, Tensor]:
    """ATen's product and activation."""
    y, z = by_aten(x, weight, bias, activation, gated, need_pre)
    return y, z if need_pre else weight.new_empty(0)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    need_pre: bool,
) -> tuple[Tensor, Tensor]:
    """One launch."""
    y, pre = results = fake(x, weight, bias, activation, gated, need_pre)
    saved = pre if need_pre else None
    gemm.forward(x, weight, bias, y, activation=activation, gated=gated, pre=saved)
    return results


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    need_pre: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    leading, features = x.shape[:-1], weight.shape[0]
    return (
        weight.new_empty(*leading, features // 2 if gated else features),
        weight.new_empty((*leading, features) if need_pre else 0),
    )


def samples(size: str) -> Iterable[Sample]:
    """Every activation at odd shapes; or fc1 of ViT-B and L, batch 64."""
    if size == "tiny":
        for activation in ACTIVATIONS:
            for gated in (False, True):
                yield _sample((2, 5, 24), 40, activation, gated, bias=True, pre=gated)
        yield _sample((0, 5, 24), 16, "gelu", False, bias=True, pre=True)
    else:
        for width in (768, 1024):
            for pre in (False, True):
                yield _sample((64, 197, width), 4 * width, "gelu", False, bias=True, pre=pre)


def _sample(
    shape: tuple[int, ...], features: int, activation: str, gated: bool, bias: bool, pre: bool
) -> Sample:
    rows = 2 * features if gated else features
    args = {
        "x": Arg(shape),
        "weight": Arg((rows, shape[-1]), scale=shape[-1] ** -0.5),
        "bias": Arg((rows,)) if bias else None,
    }
    label = f"{activation}{' gated' * gated} {'x'.join(map(str, shape))} -> {features}"
    options = {"activation": activation, "gated": gated, "need_pre": pre}
    # float32 is left to PyTorch by auto: one activation is enough of it.
    dtypes = None if activation == "gelu" else HALF
    return Sample(label + " saved" * pre, args, options, dtypes=dtypes)


def flops(x: Tensor, weight: Tensor, **_: Any) -> int:
    """The product; the activation is below 1 %."""
    return 2 * x.numel() * weight.shape[0]


def bytes_moved(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> int:
    """x and the parameters in; y and perhaps z out."""
    return total_bytes(x, weight, bias, *fake(x, weight, bias, **options))


def to_public(arguments: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments as those of `linear_act`."""
    return {k: v for k, v in arguments.items() if k != "need_pre"}


LINEAR_ACT = define(
    "linear_act",
    reference=reference,
    portable=portable,
    launcher=launch,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
    to_public=to_public,
    peers={"cublas": cublas.linear_act, "gluon": _gemm_gluon.linear_act},
)


def _backward(
    exact: bool,
    dy: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(dy, x, weight)
    product = acc if exact else weight.dtype
    _, dz = through_activation(dy.to(acc), z, activation, gated, exact=exact)
    dx = weight.new_empty(0, dtype=x.dtype)
    if need_x:
        dx = (dz.to(product) @ weight.to(product)).to(x.dtype).contiguous()
    if not need_params:
        return dx, weight.new_empty(0, dtype=param_dtype), weight.new_empty(0, dtype=param_dtype)
    d_weight, d_bias = weight_grad(dz, x, product)
    return dx, d_weight.to(param_dtype), d_bias.to(param_dtype)


def backward_reference(
    dy: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [..., D], dW [F, D], db [F]); the last two are empty unless `need_params`."""
    options = (activation, gated, param_dtype, need_x, need_params)
    return _backward(True, dy, z, x, weight, *options)


def backward_portable(
    dy: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """ATen's products in the dtype of the weight, all else in float32."""
    options = (activation, gated, param_dtype, need_x, need_params)
    return _backward(False, dy, z, x, weight, *options)


def backward_launch(
    dy: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both products, and the sum of the second one's splits."""
    dx, d_weight, d_bias = backward_fake(
        dy, z, x, weight, activation, gated, param_dtype, need_x, need_params
    )
    own = dx if need_x else None
    options: dict[str, Any] = {"z": z, "activation": activation, "gated": gated}
    dz, _ = gemm.input_grad(dy, weight, own, **options, need_operands=need_params)
    if need_params:
        partial = gemm.weight_grad(dz, x)
        d_weight, d_bias, _ = gemm.finish(partial, weight, None, None, param_dtype)
    return dx, d_weight, d_bias


def backward_fake(
    dy: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_params else 0, dtype=param_dtype),
        weight.new_empty(weight.shape[0] if need_params else 0, dtype=param_dtype),
    )


def backward_samples(size: str) -> Iterable[Sample]:
    """The forward's samples with a gradient."""
    for sample in samples(size):
        x, weight = sample.args["x"], sample.args["weight"]
        assert x is not None
        assert weight is not None
        rows, features, gated = x.shape[:-1], weight.shape[0], sample.options["gated"]
        args: dict[str, Arg | None] = {
            "dy": Arg((*rows, features // 2 if gated else features)),
            "z": Arg((*rows, features)),
            "x": x,
            "weight": weight,
        }
        options = {"activation": sample.options["activation"], "gated": gated}
        options |= {"param_dtype": same, "need_x": True, "need_params": True}
        yield Sample(sample.label, args, options, dtypes=sample.dtypes)


def backward_flops(x: Tensor, weight: Tensor, **_: Any) -> int:
    """Two products."""
    return 4 * x.numel() * weight.shape[0]


def backward_bytes_moved(dy: Tensor, z: Tensor, x: Tensor, weight: Tensor, **options: Any) -> int:
    """The gradient and what was saved in; gradients out."""
    given = (dy, z, x, weight)
    return total_bytes(*given, *backward_fake(*given, **options))


LINEAR_ACT_BACKWARD = define(
    "linear_act_backward",
    reference=backward_reference,
    portable=backward_portable,
    launcher=backward_launch,
    fake=backward_fake,
    samples=backward_samples,
    flops=backward_flops,
    bytes_moved=backward_bytes_moved,
    backward_of="linear_act",
    peers={"cublas": cublas.linear_act_backward},
)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, weight, bias, activation, gated, dtype, impl
    ):
        rows, product, shift = cast(dtype, x, weight, bias)
        y, z = LINEAR_ACT.kernel(impl)(rows, product, shift, activation, gated, True)
        ctx.save_for_backward(z, rows, product)
        ctx.options = activation, gated, weight.dtype
        ctx.x_dtype, ctx.impl = x.dtype, impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dx, d_weight, d_bias = LINEAR_ACT_BACKWARD.kernel(ctx.impl)(
            dy, *ctx.saved_tensors, *ctx.options, need_x, need_weight or need_bias
        )
        return (
            dx.to(ctx.x_dtype) if need_x else None,
            d_weight if need_weight else None,
            d_bias if need_bias else None,
            *(None,) * 4,
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
        x: tokens [..., D], in the dtype of the weight or under autocast.
        weight: [F, D]; [2F, D] = [gate; value] if gated.
        bias: [F] or [2F], or None.
        activation: "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu".
        gated: multiply the activated gate by the value.
        impl: "auto", "triton", "cublas", "torch" or "reference".

    Returns:
        [..., F] in the dtype of the product.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, an unknown activation or `impl`, several devices.
    """
    check_floating("linear_act", x=x, weight=weight, bias=bias)
    check_shape("linear_act", "weight", weight, "2F" if gated else "F", x.shape[-1])
    check_shape("linear_act", "bias", bias, weight.shape[0])
    check_activation("linear_act", activation, gated, weight.shape[0])
    dtype = product_dtype(x, weight)
    tensors = (x, weight, bias)
    chosen = choose(
        LINEAR_ACT,
        impl,
        *tensors,
        avoid=gemm.predicted_slower(dtype),
        bucket=lambda: gemm.bucket(x, weight, gated=gated),
        dtype=dtype,
        peer_unfit=lambda name: (
            _gemm_gluon.linear_act_problem(weight, dtype, gated) if name == "gluon" else None
        ),
    )
    if chosen in KERNELS and wants_grad(*tensors):
        return _LinearAct.apply(*tensors, activation, gated, dtype, chosen)
    run = LINEAR_ACT.implementations[chosen]
    return run(*cast(dtype, *tensors), activation, gated, False)[0]
