"""A norm, the linear layer behind it and, in an MLP, the activation: the first half of each branch.

    x_hat = (x - mean(x)) / sqrt(var(x) + eps)        (RMSNorm: x / sqrt(mean(x^2) + eps))
    z = (x_hat * g + h) W^T + b,   y = z, act(z), or act(gate) * value with z = [gate, value]

Forward:  x [..., D], norm weight g and bias h [D], W [F, D], b [F] -> y [..., F], gated
    [..., F / 2], in the dtype of W; x may be wider, as the residual stream is under autocast.
Backward: with dz the gradient of z,
    d_a = dz W,  dx = norm_backward(d_a) + d_stream,  dW' = dz^T x_hat,  db = sum dz,
    dW = dW' * g + db h^T,  dg_k = sum_n dW'_nk W_nk,  dh_k = sum_n db_n W_nk:
    the sums over tokens are those of one product, and the norm's own gradients come from it.
Saved for backward: x_hat in the dtype of W, 1 / spread of each row; z where there is an activation.
Bytes: x + W + y + x_hat (+ z) forward. A norm and a product apart read x_hat once more, and eager
    under autocast writes the norm in float32 and casts it.
FLOPs: 2 rows D F forward, twice that backward.

The statistics may come with the call (`stats`), left behind by the kernel that wrote x; else a
small kernel makes them. Sources: Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root
Mean Square Layer Normalization", 2019; merging statistics: Chan, Golub and LeVeque, 1979.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _norm
from ._gemm import cublas
from ._gemm import launch as gemm
from ._gemm.activation import check_activation, definition
from ._gemm.portable import (
    chunk_statistics,
    linear_act,
    norm_input_grad,
    through_activation,
    weight_grad,
)
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
    recorded,
    same,
    total_bytes,
    wants_grad,
)


def reference(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    eps: float,
    rms: bool,
    normalised: bool,
    activation: str,
    gated: bool,
    need_saved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: (y, z, x_hat, 1 / spread), accumulated in float32 (float64 for float64).

    The last three are empty unless `need_saved`; z also without an activation, the last two also if
    x is `normalised` already. `stats` only spares a kernel work.
    """
    acc = accumulate_dtype(x, norm_weight, weight, bias)
    rows, spread = (x.to(acc), None) if normalised else _norm.normalise(x.to(acc), eps, rms)
    a = rows if norm_weight is None else rows * norm_weight.to(acc)
    a = a if norm_bias is None else a + norm_bias.to(acc)
    z = F.linear(a, weight.to(acc), None if bias is None else bias.to(acc))
    y = definition(z, activation, gated).to(weight.dtype).contiguous()
    return y, *_saved(z, rows, spread, weight, activation, need_saved)


def portable(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    eps: float,
    rms: bool,
    normalised: bool,
    activation: str,
    gated: bool,
    need_saved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ATen's norm, product and activation."""
    rows: Tensor | None = None
    spread: Tensor | None = None
    if normalised or need_saved:
        acc = accumulate_dtype(x, norm_weight, weight, bias)
        rows, spread = (x.to(acc), None) if normalised else _norm.normalise(x.to(acc), eps, rms)
        a = rows if norm_weight is None else rows * norm_weight.to(acc)
        a = a if norm_bias is None else a + norm_bias.to(acc)
        y, z = linear_act(a.to(weight.dtype), weight, bias, activation, gated, need_saved)
    else:
        y = z = by_aten(x, norm_weight, norm_bias, weight, bias, eps, rms, activation, gated)
    return y, *_saved(z, rows, spread, weight, activation, need_saved)


def by_aten(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    activation: str,
    gated: bool,
) -> Tensor:
    """`portable` without anything saved."""
    a = _norm.aten_norm(x, norm_weight, norm_bias, eps, rms)
    if a.dtype is not weight.dtype:
        a = a.to(weight.dtype)
    return linear_act(a, weight, bias, activation, gated, keep=False)[0]


def _saved(
    z: Tensor,
    rows: Tensor | None,
    spread: Tensor | None,
    weight: Tensor,
    activation: str,
    need_saved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward pass needs, of its own memory; empty where it doesn't."""
    acc = accumulate_dtype(weight)
    pre, x_hat, kept = (weight.new_empty(0, dtype=t) for t in (weight.dtype, weight.dtype, acc))
    if need_saved and activation:
        pre = z.to(weight.dtype).contiguous()
    if need_saved and rows is not None and spread is not None:
        x_hat, kept = rows.to(weight.dtype).contiguous(), spread.to(acc).reshape(-1).contiguous()
    return pre, x_hat, kept


def launch(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    eps: float,
    rms: bool,
    normalised: bool,
    activation: str,
    gated: bool,
    need_saved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch; before it a small one for the statistics, if they didn't come."""
    y, pre, x_hat, spread = results = fake(
        x, norm_weight, norm_bias, weight, bias, stats, eps, rms, normalised, activation, gated,
        need_saved,
    )  # fmt: skip
    rows = gemm.as_matrix(x)
    if normalised:
        stats = None
    elif stats is None:
        stats = gemm.row_statistics(rows)
    saving = need_saved and not normalised
    gemm.forward(
        rows,
        weight,
        bias,
        y,
        norm=gemm.Norm(norm_weight, norm_bias, stats, eps, rms),
        x_hat=x_hat if saving else None,
        spread=spread if saving else None,
        activation=activation,
        gated=gated,
        pre=pre if need_saved and activation else None,
    )
    return results


def fake(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    eps: float,
    rms: bool,
    normalised: bool,
    activation: str,
    gated: bool,
    need_saved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    leading, features = x.shape[:-1], weight.shape[0]
    saving = need_saved and not normalised
    return (
        weight.new_empty(*leading, features // 2 if gated else features),
        weight.new_empty((*leading, features) if need_saved and activation else 0),
        weight.new_empty(x.shape if saving else 0),
        weight.new_empty(x.numel() // x.shape[-1] if saving else 0, dtype=accumulate_dtype(weight)),
    )


def samples(size: str) -> Iterable[Sample]:
    """Odd shapes with every option; or qkv and fc1 of ViT-S, B, L and H, batch 64."""
    if size == "tiny":
        for shape, features, norm, activation, gated, saved, statistics in (
            ((2, 9, 72), 50, "ln", "gelu", False, True, False),
            ((3, 17, 72), 40, "ln", "", False, True, True),
            ((1, 9, 33), 70, "rms", "silu", True, True, False),
            ((2, 9, 72), 40, "rms", "gelu_tanh", False, False, False),
            ((2, 9, 24), 40, "affine", "quick_gelu", False, True, False),
            ((7, 40), 80, "plain", "relu", False, True, False),
            ((0, 5, 24), 16, "ln", "gelu", False, True, False),
        ):
            yield _sample(shape, features, norm, activation, gated, saved, statistics)
        return
    for tokens, width in ((197, 384), (197, 768), (197, 1024), (257, 1280)):
        for features, activation in ((3 * width, ""), (4 * width, "gelu")):
            yield _sample((64, tokens, width), features, "ln", activation, False, True, True)
    yield _sample((64, 197, 768), 3072, "ln", "gelu", False, False, False)
    yield _sample((1, 197, 768), 3072, "ln", "gelu", False, False, True)
    yield _sample((64, 197, 1024), 4096, "rms", "silu", True, True, True)
    # The stream under autocast. Normalised in registers, it leaves fewer of them to the rest.
    for features, activation in ((2304, ""), (3072, "gelu")):
        for saved in (True, False):
            yield _sample((64, 197, 768), features, "ln", activation, False, saved, True, True)
    yield _sample((64, 197, 768), 2048, "ln", "silu", True, True, True, True)


def _sample(
    shape: tuple[int, ...],
    features: int,
    norm: str,
    activation: str,
    gated: bool,
    saved: bool,
    statistics: bool,
    wide: bool = False,
) -> Sample:
    width = shape[-1]
    rows = 2 * features if gated else features
    affine = norm != "plain"
    args = {
        "x": Arg(shape, dtype=torch.float32 if wide else None, offset=0.5),
        "norm_weight": Arg((width,), offset=1.0, scale=0.3) if affine else None,
        "norm_bias": Arg((width,)) if norm in ("ln", "affine") else None,
        "weight": Arg((rows, width), scale=width**-0.5),
        # Always one (tests/test_block.py has blocks without): where a test repeats one row of
        # everything, it alone keeps the result from being a single number.
        "bias": Arg((rows,)),
        "stats": None,
    }
    label = f"{norm} {'x'.join(map(str, shape))} -> {activation} {features}{' gated' * gated}"
    label += " fp32 stream" * wide + " saved" * saved + " given statistics" * statistics
    options = {
        "eps": 1e-6, "rms": norm == "rms", "normalised": norm == "affine",
        "activation": activation, "gated": gated, "need_saved": saved,
    }  # fmt: skip
    # float32 is left to PyTorch by auto: one width of real models is enough of it.
    dtypes = HALF if wide or width in (384, 1024, 1280) else None
    derive = _with_statistics if statistics else None
    return Sample(label, args, options, derive=derive, dtypes=dtypes)


def _with_statistics(arguments: dict[str, Any]) -> dict[str, Any]:
    """The statistics as the kernel that wrote x would leave them."""
    return {"stats": chunk_statistics(arguments["x"].float(), gemm.CHUNK)}


def flops(x: Tensor, weight: Tensor, **_: Any) -> int:
    """The product; norm and activation are below 1 %."""
    return 2 * x.numel() * weight.shape[0]


def bytes_moved(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    **options: Any,
) -> int:
    """x and the parameters in; y and what is saved out."""
    outputs = fake(x, norm_weight, norm_bias, weight, bias, stats, **options)
    return total_bytes(x, norm_weight, norm_bias, weight, bias, stats, *outputs)


def to_public(arguments: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments as those of `norm_linear`."""
    hidden = ("stats", "normalised", "need_saved")
    return {k: v for k, v in arguments.items() if k not in hidden}


NORM_LINEAR = define(
    "norm_linear",
    reference=reference,
    portable=portable,
    launcher=launch,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
    to_public=to_public,
    peers={"cublas": cublas.norm_linear},
)


def _backward(
    exact: bool,
    dy: Tensor,
    z: Tensor | None,
    x_hat: Tensor,
    spread: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    d_stream: Tensor | None,
    activation: str,
    gated: bool,
    rms: bool,
    x_dtype: torch.dtype,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(dy, x_hat, norm_weight, weight)
    product = acc if exact else weight.dtype
    dz = dy.to(acc)
    if z is not None:
        dz = through_activation(dz, z, activation, gated, exact=exact)[1]
    width = weight.shape[1]
    dx = weight.new_empty(0, dtype=x_dtype)
    if need_x:
        d_a = (dz.to(product) @ weight.to(product)).to(acc)
        d_x = norm_input_grad(d_a, x_hat, spread, norm_weight, rms)
        d_x = d_x if d_stream is None else d_x + d_stream.to(acc)
        dx = d_x.to(x_dtype).contiguous()
    d_norm = (weight if norm_weight is None else norm_weight).new_empty(0, width)
    if not need_params:
        d_weight, d_bias = (
            weight.new_empty(0, dtype=param_dtype),
            weight.new_empty(0, dtype=param_dtype),
        )
        return dx, d_norm, d_weight, d_bias
    d_weight, d_bias = weight_grad(dz, x_hat, product)
    if norm_weight is not None:
        w = weight.to(acc)
        d_norm = torch.stack([(d_weight * w).sum(0), d_bias @ w]).to(norm_weight.dtype)
        d_weight = d_weight * norm_weight.to(acc)
        if norm_bias is not None:
            d_weight = d_weight + d_bias[:, None] * norm_bias.to(acc)
    return dx, d_norm, d_weight.to(param_dtype), d_bias.to(param_dtype)


def backward_reference(
    dy: Tensor,
    z: Tensor | None,
    x_hat: Tensor,
    spread: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    d_stream: Tensor | None,
    activation: str,
    gated: bool,
    rms: bool,
    x_dtype: torch.dtype,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [..., D], [dg; dh] as [2, D], dW [F, D], db [F]).

    `dy` is the gradient of act(z) where `z` is given, else of z itself. `d_stream` is the gradient
    that the residual stream brings to x. The last three are empty unless `need_params`; the second
    has no rows without a norm weight.
    """
    return _backward(
        True,
        dy, z, x_hat, spread, norm_weight, norm_bias, weight, d_stream, activation, gated, rms,
        x_dtype, param_dtype, need_x, need_params,
    )  # fmt: skip


def backward_portable(
    dy: Tensor,
    z: Tensor | None,
    x_hat: Tensor,
    spread: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    d_stream: Tensor | None,
    activation: str,
    gated: bool,
    rms: bool,
    x_dtype: torch.dtype,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ATen's products in the dtype of the weight, all else in float32."""
    return _backward(
        False,
        dy, z, x_hat, spread, norm_weight, norm_bias, weight, d_stream, activation, gated, rms,
        x_dtype, param_dtype, need_x, need_params,
    )  # fmt: skip


def backward_launch(
    dy: Tensor,
    z: Tensor | None,
    x_hat: Tensor,
    spread: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    d_stream: Tensor | None,
    activation: str,
    gated: bool,
    rms: bool,
    x_dtype: torch.dtype,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three launches: both products, and one that finishes what is left."""
    dz = gemm.as_matrix(dy)
    d_a = partial = None
    if need_x or z is not None or dz.dtype != weight.dtype:
        d_a = weight.new_empty(x_hat.shape)
        dz, _ = gemm.input_grad(
            dy, weight, d_a, z=z, activation=activation, gated=gated, need_operands=need_params
        )
    if need_params:
        partial = gemm.weight_grad(dz, x_hat)
    dx = weight.new_empty(x_hat.shape if need_x else 0, dtype=x_dtype)
    norm = gemm.Norm(norm_weight, norm_bias, None, 0.0, rms)
    d_weight, d_bias, d_norm = gemm.norm_finish(
        partial, weight, norm, x_hat, spread, d_a, d_stream, dx if need_x else None, param_dtype
    )
    return dx, d_norm, d_weight, d_bias


def backward_fake(
    dy: Tensor,
    z: Tensor | None,
    x_hat: Tensor,
    spread: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    d_stream: Tensor | None,
    activation: str,
    gated: bool,
    rms: bool,
    x_dtype: torch.dtype,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    width = weight.shape[1]
    like = weight if norm_weight is None else norm_weight
    return (
        weight.new_empty(x_hat.shape if need_x else 0, dtype=x_dtype),
        like.new_empty(0 if norm_weight is None or not need_params else 2, width),
        weight.new_empty(weight.shape if need_params else 0, dtype=param_dtype),
        weight.new_empty(weight.shape[0] if need_params else 0, dtype=param_dtype),
    )


def backward_samples(size: str) -> Iterable[Sample]:
    """The forward's samples with a gradient; with the stream's where the statistics came along."""
    for sample in samples(size):
        args, options = sample.args, sample.options
        x, weight = args["x"], args["weight"]
        assert x is not None
        assert weight is not None
        rows, (features, _) = x.shape[:-1], weight.shape
        stream = sample.derive is not None
        whole = (*rows, features // 2 if options["gated"] else features)
        yield Sample(
            sample.label,
            {
                "dy": Arg(whole),
                "z": Arg((*rows, features)) if options["activation"] else None,
                "x_hat": Arg(x.shape),
                "spread": Arg((math.prod(rows),), dtype=torch.float32, offset=1.0, scale=0.2),
                "norm_weight": args["norm_weight"],
                "norm_bias": args["norm_bias"],
                "weight": weight,
                "d_stream": Arg(x.shape, dtype=torch.float32) if stream else None,
            },
            {
                "activation": options["activation"], "gated": options["gated"],
                "rms": options["rms"], "x_dtype": torch.float32 if stream else same,
                "param_dtype": same, "need_x": True, "need_params": True,
            },
            dtypes=sample.dtypes,
        )  # fmt: skip


def backward_flops(dy: Tensor, weight: Tensor, x_hat: Tensor, **_: Any) -> int:
    """Two products."""
    return 4 * x_hat.numel() * weight.shape[0]


def backward_bytes_moved(
    dy: Tensor,
    z: Tensor | None,
    x_hat: Tensor,
    spread: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    d_stream: Tensor | None,
    **options: Any,
) -> int:
    """Gradients and what was saved in; gradients out."""
    given = (dy, z, x_hat, spread, norm_weight, norm_bias, weight, d_stream)
    return total_bytes(*given, *backward_fake(*given, **options))


NORM_LINEAR_BACKWARD = define(
    "norm_linear_backward",
    reference=backward_reference,
    portable=backward_portable,
    launcher=backward_launch,
    fake=backward_fake,
    samples=backward_samples,
    flops=backward_flops,
    bytes_moved=backward_bytes_moved,
    backward_of="norm_linear",
    peers={"cublas": cublas.norm_linear_backward},
)


_by_aten = recorded(
    "norm_linear",
    by_aten,
    lambda x, norm_weight, norm_bias, weight, bias, eps, rms, activation, gated: (
        x, norm_weight, norm_bias, weight, bias, None, eps, rms, False, activation, gated, False
    ),
)  # fmt: skip


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, norm_weight, norm_bias, weight, bias, eps, rms, activation, gated, dtype, impl
    ):
        product = weight.to(dtype)
        y, z, x_hat, spread = NORM_LINEAR.kernel(impl)(
            x, norm_weight, norm_bias, product, None if bias is None else bias.to(dtype), None,
            eps, rms, False, activation, gated, True,
        )  # fmt: skip
        ctx.save_for_backward(
            z if activation else None, x_hat, spread, norm_weight, norm_bias, product
        )
        ctx.options = activation, gated, rms
        ctx.dtypes, ctx.impl = (x.dtype, weight.dtype), impl
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        z, x_hat, spread, norm_weight, norm_bias, weight = ctx.saved_tensors
        need_x, need_g, need_h, need_w, need_b, *_ = ctx.needs_input_grad
        need_params = need_g or need_h or need_w or need_b
        dx, d_norm, d_weight, d_bias = NORM_LINEAR_BACKWARD.kernel(ctx.impl)(
            dy, z, x_hat, spread, norm_weight, norm_bias, weight, None,
            *ctx.options, *ctx.dtypes, need_x, need_params,
        )  # fmt: skip
        return (
            dx if need_x else None,
            d_norm[0] if need_g else None,
            d_norm[1].to(norm_bias.dtype) if need_h else None,
            d_weight if need_w else None,
            d_bias if need_b else None,
            *(None,) * 6,
        )


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    activation: str = "",
    gated: bool = False,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm or RMSNorm, the linear layer behind it, and an activation if asked for.

    Under autocast the product runs in its dtype, with the norm's result rounded to that once.

    Args:
        x: tokens [..., D], any strides; its dtype may be wider than that of the product.
        weight: [F, D]; [2F, D] = [gate; value] if gated.
        bias: [F] or [2F], or None.
        norm_weight: scale of the norm [D], or None for a norm without one.
        norm_bias: shift of the norm [D], or None.
        eps: added to the variance.
        rms: RMSNorm in place of LayerNorm.
        activation: "" for none, or "gelu", "gelu_tanh", "quick_gelu", "relu", "silu".
        gated: multiply the activated gate by the value.
        impl: "auto", "triton", "cublas", "torch" or "reference".

    Returns:
        [..., F] in the dtype of the product, contiguous.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, a norm_bias without a norm_weight, an unknown
            activation, tensors on several devices, an `impl` that can't run.
    """
    name = "norm_linear"
    check_floating(
        name, x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias
    )
    if x.dim() == 0:
        raise ValueError("norm_linear: x must be [..., D], got a scalar")
    width = x.shape[-1]
    check_shape(name, "weight", weight, "2F" if gated else "F", width)
    check_shape(name, "bias", bias, weight.shape[0])
    check_shape(name, "norm_weight", norm_weight, width)
    check_shape(name, "norm_bias", norm_bias, width)
    if norm_bias is not None and norm_weight is None:
        raise ValueError("norm_linear: norm_bias needs a norm_weight")
    if gated and not activation:
        raise ValueError("norm_linear: gated needs an activation")
    if activation:
        check_activation(name, activation, gated, weight.shape[0])
    dtype = product_dtype(x, weight)
    tensors = (x, norm_weight, norm_bias, weight, bias)
    chosen = select(impl, *tensors, dtype, activation, gated)
    return run(chosen, *tensors, eps, rms, activation, gated, dtype)


def select(
    impl: str,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
    gated: bool,
) -> str:
    """Name of the implementation that takes this call, whose product runs in `dtype`."""
    return choose(
        NORM_LINEAR,
        impl,
        x,
        norm_weight,
        norm_bias,
        weight,
        bias,
        unfit=dict.fromkeys(("triton", "cublas"), _norm.width_problem(x.shape[-1])),
        avoid=gemm.predicted_slower(dtype),
        bucket=lambda: gemm.bucket(
            x, weight, act=bool(activation), gated=gated, wide=x.dtype != dtype
        ),
        dtype=dtype,
    )


def run(
    name: str,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    activation: str,
    gated: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`norm_linear` by the implementation `name`, with its gradient, of arguments known to fit."""
    if name in KERNELS and wants_grad(x, norm_weight, norm_bias, weight, bias):
        return _NormLinear.apply(
            x, norm_weight, norm_bias, weight, bias, eps, rms, activation, gated, dtype, name
        )
    weight, bias = cast(dtype, weight, bias)  # type: ignore[assignment]
    if name == "torch":
        return _by_aten(x, norm_weight, norm_bias, weight, bias, eps, rms, activation, gated)
    return NORM_LINEAR.implementations[name](
        x, norm_weight, norm_bias, weight, bias, None, eps, rms, False, activation, gated, False
    )[0]
