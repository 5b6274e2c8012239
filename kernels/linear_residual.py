"""The linear layer that ends a branch of the block, and the branch joining the residual stream.

    stream = residual + (x W^T + b) * layer_scale * drop_scale      (in the residual's dtype)

Forward:  x [B, N, K], W [D, K], b [D], residual [B, N, D], layer_scale [D], drop_scale [B]
          -> stream [B, N, D]; and, for the norm that follows, statistics of its rows.
    The branch itself is never written.
Backward: with d the gradient of the stream and g = d * drop_scale,
    d_residual = d,  dx = (g * layer_scale) W,  dW' = g^T x,  db' = sum g,
    dW = layer_scale dW',  db = layer_scale db',
    d_layer_scale_n = sum_k dW'_nk W_nk + db'_n b_n: no branch is needed.
    Where x is act(pre), as behind fc1, the gradient goes through the activation in the same pass,
    which makes x again from pre for the product with g.
Saved for backward: x, or only pre.
Bytes: x + W + residual + stream forward; eager writes the branch and reads it once for each of
    LayerScale, DropPath and sum. FLOPs: 2 B N K D forward, twice that backward.

Sources: LayerScale: Touvron et al., 2021; stochastic depth: Huang et al., 2016. That the gradient
of a scale follows from that of the weight it could be folded into is elementary.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _gemm_gluon, _onednn
from ._gemm import cublas
from ._gemm import launch as gemm
from ._gemm.activation import definition, fused
from ._gemm.portable import chunk_statistics, linear, through_activation, weight_grad
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
from ._residual import add_branch, check_residual


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: (stream, statistics), accumulated in float32 (float64 for float64).

    Statistics [2, C, B * N]: mean, and sum of squared differences from it, of each row's chunks of
    64 columns; empty unless `need_stats`.
    """
    acc = accumulate_dtype(x, weight, bias, residual, layer_scale, drop_scale)
    branch = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    stream = add_branch(residual.to(acc), branch, layer_scale, drop_scale)
    stream = stream.to(residual.dtype).contiguous()
    return stream, _statistics(stream, need_stats)


def portable(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """ATen's product, products and sum."""
    stream = by_aten(x, weight, bias, residual, layer_scale, drop_scale)
    return stream, _statistics(stream, need_stats)


def by_aten(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
) -> Tensor:
    """`portable` without statistics."""
    if x.is_cpu and layer_scale is None and drop_scale is None:
        stream = _onednn.linear(x, weight, bias, residual=residual)
        if stream is not None:
            return stream
    branch = linear(x, weight, bias)
    stream = add_branch(residual, branch, layer_scale, drop_scale, ours=True)
    # contiguous() may return its argument: a second name for what an autograd node returns, whose
    # gradient PyTorch 2.11's compiler loses.
    return stream if stream.is_contiguous() else stream.contiguous()


def _statistics(stream: Tensor, need_stats: bool) -> Tensor:
    acc = accumulate_dtype(stream)
    if not need_stats:
        return stream.new_empty(0, dtype=acc)
    return chunk_statistics(stream.detach().to(acc), gemm.CHUNK)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """One launch."""
    stream, stats = results = fake(x, weight, bias, residual, layer_scale, drop_scale, need_stats)
    gemm.forward(
        x,
        weight,
        bias,
        stream,
        residual=residual,
        layer_scale=layer_scale,
        drop_scale=drop_scale,
        out_stats=stats if need_stats else None,
    )
    return results


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    batch, tokens, width = residual.shape
    shape = (2, -(-width // gemm.CHUNK), batch * tokens) if need_stats else (0,)
    acc = accumulate_dtype(residual)
    return residual.new_empty(residual.shape), residual.new_empty(shape, dtype=acc)


def samples(size: str) -> Iterable[Sample]:
    """Odd shapes with every option; or proj and fc2 of ViT-S, B, L and H, batch 64."""
    if size == "tiny":
        for shape, width, scaled, dropped, wide, bias, stats in (
            ((2, 5, 24), 18, False, False, False, True, False),
            ((2, 9, 40), 72, True, True, True, True, True),
            ((2, 9, 33), 130, True, False, False, False, True),
            ((2, 5, 24), 16, False, True, True, True, False),
            ((0, 5, 24), 16, True, True, False, True, False),
            ((2, 9, 40), 24, False, False, False, True, False),
        ):
            yield _sample(shape, width, scaled, dropped, wide, bias, stats)
        return
    for tokens, width in ((197, 384), (197, 768), (197, 1024), (257, 1280)):
        for depth in (width, 4 * width):
            yield _sample((64, tokens, depth), width, False, False, False, True, True)
    yield _sample((64, 197, 3072), 768, True, True, True, True, True)
    yield _sample((1, 197, 3072), 768, False, False, False, True, True)


def _sample(
    shape: tuple[int, ...],
    width: int,
    scaled: bool,
    dropped: bool,
    wide: bool,
    bias: bool,
    stats: bool,
) -> Sample:
    batch, tokens, depth = shape
    args = {
        "x": Arg(shape),
        "weight": Arg((width, depth), scale=depth**-0.5),
        "bias": Arg((width,)) if bias else None,
        "residual": Arg((batch, tokens, width), dtype=torch.float32 if wide else None, offset=0.5),
        "layer_scale": Arg((width,), offset=1.0, scale=0.1) if scaled else None,
        "drop_scale": Arg((batch,), offset=1.0) if dropped else None,
    }
    label = f"{'x'.join(map(str, shape))} -> {width}{' scale' * scaled}{' drop' * dropped}"
    label += " fp32 stream" * wide + " statistics" * stats
    # float32 is left to PyTorch by auto: one width of real models is enough of it.
    dtypes = HALF if width in (384, 1024, 1280) else None
    return Sample(label, args, {"need_stats": stats}, dtypes=dtypes)


def flops(x: Tensor, weight: Tensor, **_: Any) -> int:
    """The product; what follows it is below 1 %."""
    return 2 * x.numel() * weight.shape[0]


def bytes_moved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    need_stats: bool,
) -> int:
    """x, the parameters and the stream in; the stream and its statistics out."""
    given = (x, weight, bias, residual, layer_scale, drop_scale)
    return total_bytes(*given, *fake(*given, need_stats))


def to_public(arguments: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments as those of `linear_residual`."""
    return {k: v for k, v in arguments.items() if k != "need_stats"}


LINEAR_RESIDUAL = define(
    "linear_residual",
    reference=reference,
    portable=portable,
    launcher=launch,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
    to_public=to_public,
    peers={"cublas": cublas.linear_residual, "gluon": _gemm_gluon.linear_residual},
)


def _backward(
    exact: bool,
    d_stream: Tensor,
    x: Tensor | None,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(d_stream, x, pre, weight, layer_scale)
    product = acc if exact else weight.dtype
    g = d_stream.to(acc)
    if drop_scale is not None:
        g = g * drop_scale.to(acc)[:, None, None]
    scaled = g if layer_scale is None else g * layer_scale.to(acc)
    dx = weight.new_empty(0)
    if need_x:
        dx = (scaled.to(product) @ weight.to(product)).to(acc)
    if pre is not None:
        if need_x:
            x, dx = through_activation(dx, pre, activation, gated, exact=exact)
        else:
            act = definition if exact else fused
            x = act(pre.to(acc), activation, gated)
    dx = dx.to(weight.dtype).contiguous()
    like = weight if layer_scale is None else layer_scale
    if not need_params:
        d_weight, d_bias = (weight.new_empty(0, dtype=param_dtype) for _ in range(2))
        return dx, d_weight, d_bias, like.new_empty(0)
    assert x is not None
    d_weight, d_bias = weight_grad(g, x, product)
    if layer_scale is None:
        return dx, d_weight.to(param_dtype), d_bias.to(param_dtype), like.new_empty(0)
    d_scale = (d_weight * weight.to(acc)).sum(1)
    if bias is not None:
        d_scale = d_scale + d_bias * bias.to(acc)
    gain = layer_scale.to(acc)
    d_weight, d_bias = d_weight * gain[:, None], d_bias * gain
    return dx, d_weight.to(param_dtype), d_bias.to(param_dtype), d_scale.to(layer_scale.dtype)


def backward_reference(
    d_stream: Tensor,
    x: Tensor | None,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx [..., K] in the dtype of W, dW [D, K], db [D], d_layer_scale [D]).

    Given `pre` in place of `x`, the first is the gradient of pre, in its shape. The last three are
    empty unless `need_params`, the last also without a `layer_scale`.
    """
    options = (activation, gated, param_dtype, need_x, need_params)
    return _backward(True, d_stream, x, pre, weight, bias, layer_scale, drop_scale, *options)


def backward_portable(
    d_stream: Tensor,
    x: Tensor | None,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ATen's products in the dtype of the weight, all else in float32."""
    options = (activation, gated, param_dtype, need_x, need_params)
    return _backward(False, d_stream, x, pre, weight, bias, layer_scale, drop_scale, *options)


def backward_launch(
    d_stream: Tensor,
    x: Tensor | None,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both products, and the sum of the second one's splits."""
    dx, d_weight, d_bias, d_scale = backward_fake(
        d_stream, x, pre, weight, bias, layer_scale, drop_scale, activation, gated, param_dtype,
        need_x, need_params,
    )  # fmt: skip
    own = dx if need_x else None
    if own is None and pre is not None:
        own = torch.empty_like(pre)  # the pass that makes x again writes its gradient, too
    g, hidden = gemm.input_grad(
        d_stream,
        weight,
        own,
        activation=activation,
        gated=gated,
        layer_scale=layer_scale,
        drop_scale=drop_scale,
        pre=pre,
        need_operands=need_params,
    )
    if need_params:
        a = x if hidden is None else hidden
        assert a is not None
        partial = gemm.weight_grad(g, a)
        d_weight, d_bias, of_scale = gemm.finish(partial, weight, bias, layer_scale, param_dtype)
        d_scale = d_scale if of_scale is None else of_scale
    return dx, d_weight, d_bias, d_scale


def backward_fake(
    d_stream: Tensor,
    x: Tensor | None,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    given = x if pre is None else pre
    assert given is not None
    width = weight.shape[0]
    like, rows = (weight, 0) if layer_scale is None else (layer_scale, width)
    return (
        weight.new_empty(given.shape if need_x else 0),
        weight.new_empty(weight.shape if need_params else 0, dtype=param_dtype),
        weight.new_empty(width if need_params else 0, dtype=param_dtype),
        like.new_empty(rows if need_params else 0),
    )


def backward_samples(size: str) -> Iterable[Sample]:
    """The forward's samples with a gradient; x as it is, or what it was before an activation."""
    for number, sample in enumerate(samples(size)):
        args = dict(sample.args)
        x, residual = args["x"], args["residual"]
        assert x is not None
        assert residual is not None
        deep = size == "vit" and x.shape[2] == 4 * residual.shape[2]  # fc2, behind fc1's activation
        activation = ("", "gelu", "silu", "relu", "")[number % 5] if size == "tiny" else ""
        activation = "gelu" if deep else activation
        gated = activation == "silu"
        pre = Arg((*x.shape[:2], x.shape[2] * (2 if gated else 1)))
        yield Sample(
            sample.label + (f" behind {activation}{' gated' * gated}" if activation else ""),
            {
                "d_stream": Arg(residual.shape, dtype=residual.dtype),
                "x": None if activation else x,
                "pre": pre if activation else None,
                "weight": args["weight"],
                "bias": args["bias"] if args["layer_scale"] is not None else None,
                "layer_scale": args["layer_scale"],
                "drop_scale": args["drop_scale"],
            },
            {
                "activation": activation, "gated": gated, "param_dtype": same,
                "need_x": True, "need_params": True,
            },
            dtypes=sample.dtypes,
        )  # fmt: skip


def backward_flops(d_stream: Tensor, weight: Tensor, **_: Any) -> int:
    """Two products."""
    return 4 * d_stream.numel() * weight.shape[1]


def backward_bytes_moved(
    d_stream: Tensor,
    x: Tensor | None,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    **options: Any,
) -> int:
    """The gradient and what was saved in; gradients out."""
    given = (d_stream, x, pre, weight, bias, layer_scale, drop_scale)
    return total_bytes(*given, *backward_fake(*given, **options))


LINEAR_RESIDUAL_BACKWARD = define(
    "linear_residual_backward",
    reference=backward_reference,
    portable=backward_portable,
    launcher=backward_launch,
    fake=backward_fake,
    samples=backward_samples,
    flops=backward_flops,
    bytes_moved=backward_bytes_moved,
    backward_of="linear_residual",
    peers={"cublas": cublas.linear_residual_backward},
)


_by_aten = recorded("linear_residual", by_aten, lambda *given: (*given, False))


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, weight, bias, residual, layer_scale, drop_scale, dtype, impl
    ):
        rows, product, shift = cast(dtype, x, weight, bias)
        stream, _ = LINEAR_RESIDUAL.kernel(impl)(
            rows, product, shift, residual, layer_scale, drop_scale, False
        )
        # The bias takes part in the gradient of layer_scale only.
        ctx.save_for_backward(
            rows, product, None if layer_scale is None else shift, layer_scale, drop_scale
        )
        ctx.dtypes, ctx.impl = (x.dtype, weight.dtype), impl
        return stream

    @staticmethod
    @once_differentiable
    def backward(ctx, d_stream):  # type: ignore[no-untyped-def]
        x, *tensors = ctx.saved_tensors
        x_dtype, param_dtype = ctx.dtypes
        need_x, need_weight, need_bias, need_residual, need_scale, *_ = ctx.needs_input_grad
        need_params = need_weight or need_bias or need_scale
        dx, d_weight, d_bias, d_scale = LINEAR_RESIDUAL_BACKWARD.kernel(ctx.impl)(
            d_stream, x, None, *tensors, "", False, param_dtype, need_x, need_params
        )
        return (
            dx.to(x_dtype) if need_x else None,
            d_weight if need_weight else None,
            d_bias if need_bias else None,
            d_stream if need_residual else None,
            d_scale if need_scale else None,
            *(None,) * 3,
        )


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer, and the addition of its result to the residual stream.

    Under autocast the product runs in its dtype; the stream keeps its own.

    Args:
        x: what the branch has so far [B, N, K], any strides.
        weight: [D, K].
        bias: [D], or None.
        residual: the stream [B, N, D], any strides; its dtype may be wider.
        layer_scale: LayerScale gamma [D], or None.
        drop_scale: DropPath factor a sample [B] (0 or 1 / keep probability), or None; no gradient.
        impl: "auto", "triton", "cublas", "torch" or "reference".

    Returns:
        The new stream [B, N, D] in the residual's dtype, contiguous.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, tensors on several devices, an `impl` that can't run.
    """
    name = "linear_residual"
    check_floating(name, x=x, weight=weight, bias=bias, residual=residual)
    check_shape(name, "residual", residual, "B", "N", "D")
    batch, tokens, width = residual.shape
    check_shape(name, "x", x, batch, tokens, "K")
    check_shape(name, "weight", weight, width, x.shape[2])
    check_shape(name, "bias", bias, width)
    check_residual(name, residual, residual, layer_scale, drop_scale)
    dtype = product_dtype(x, weight)
    others = (weight, bias, residual, layer_scale, drop_scale)
    return run(select(impl, *others, dtype), x, *others, dtype)


def select(
    impl: str,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    dtype: torch.dtype,
) -> str:
    """Name of the implementation that takes this call, whose x need not exist yet."""
    return choose(
        LINEAR_RESIDUAL,
        impl,
        residual,
        weight,
        bias,
        layer_scale,
        drop_scale,
        avoid=gemm.predicted_slower(dtype),
        bucket=lambda: gemm.bucket(residual, weight, wide=residual.dtype != dtype),
        dtype=dtype,
        peer_unfit=lambda name: (
            _gemm_gluon.product_problem(weight, dtype, residual.dtype) if name == "gluon" else None
        ),
    )


def run(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`linear_residual` by the implementation `name`, with its gradient, of fitting arguments."""
    tensors = (x, weight, bias, residual, layer_scale, drop_scale)
    if name in KERNELS and wants_grad(*tensors):
        return _LinearResidual.apply(*tensors, dtype, name)
    rows, product, shift = cast(dtype, x, weight, bias)
    call: Any = (rows, product, shift, residual, layer_scale, drop_scale)
    if name == "torch":
        return _by_aten(*call)
    stream: Tensor = LINEAR_RESIDUAL.implementations[name](*call, False)[0]
    return stream
