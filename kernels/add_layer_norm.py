"""Residual addition and norm in one pass: the middle and the seam of every pre-norm block.

    stream = residual + branch * layer_scale * drop_scale      (rounded to the residual's dtype)
    normed = LayerNorm(stream) * weight + bias                 (or RMSNorm)

Forward:  residual, branch [B, N, D], layer_scale, weight, bias [D], drop_scale [B]
          -> stream [B, N, D] in the residual's dtype, normed [B, N, D] in `out_dtype`.
    The residual stream may be float32 (as under eager autocast) or the compute dtype.
Backward: dx = d_stream + norm_backward(d_normed)   (see layer_norm)
    d_residual = dx,  d_branch = dx * layer_scale * drop_scale
    d_layer_scale = sum over rows of dx * drop_scale * branch; with dweight and dbias in two stages.
Saved for backward: stream (which lives on as the residual anyway) and, for the LayerScale gradient
only, branch.
Bytes: residual + branch + stream + normed forward. Eager makes 3 to 5 passes more.

Source: the fused "dropout + add + LayerNorm" of flash-attention, extended by LayerScale (Touvron et
al., "Going deeper with Image Transformers", 2021) and stochastic depth (Huang et al., 2016).
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
from ._residual import add_branch, check_residual


def reference(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The definition, accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(residual, branch, layer_scale, drop_scale, weight, bias)
    stream = add_branch(residual.to(acc), branch.to(acc), layer_scale, drop_scale)
    stream = stream.to(residual.dtype).contiguous()
    normed = _norm.affine(_norm.normalise(stream.to(acc), eps, rms)[0], weight, bias)
    return stream, normed.to(out_dtype).contiguous()


def portable(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """ATen: products, sum, fused norm."""
    stream = add_branch(residual, branch, layer_scale, drop_scale).contiguous()
    normed = _norm.aten_norm(stream, weight, bias, eps, rms)
    return stream, normed.to(out_dtype)


def launch(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One launch of the forward kernel."""
    stream, normed = _norm.forward(
        residual, branch, layer_scale, drop_scale, weight, bias, eps, rms, out_dtype
    )
    assert stream is not None
    return stream, normed


def fake(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    shape = residual.shape
    return residual.new_empty(shape), residual.new_empty(shape, dtype=out_dtype)


def samples(size: str) -> Iterable[Sample]:
    """Odd shapes with every combination of scales; or the blocks of ViT-S/B/L/H, batch 128."""
    if size == "tiny":
        shapes = [(2, 5, 96), (3, 17, 33), (1, 1, 8), (1, 2, 3000), (0, 5, 16)]
    else:
        shapes = [(128, 197, 384), (128, 197, 768), (128, 197, 1024), (128, 257, 1280)]
    for number, shape in enumerate(shapes):
        batch, _, width = shape
        for scaled, dropped, rms, affine, stream in (
            (False, False, False, True, None),
            (True, True, False, True, torch.float32),
            (True, False, True, True, None),
            (False, False, False, False, None),
            (True, False, True, False, None),
        ):
            if size == "vit" and (rms or not (affine or number == 1)):
                continue
            if size == "tiny" and number > 1 and not dropped:
                continue
            args = {
                "residual": Arg(shape, dtype=stream, offset=0.5),
                "branch": Arg(shape),
                "layer_scale": Arg((width,), offset=1.0, scale=0.1) if scaled else None,
                "drop_scale": Arg((batch,), offset=1.0) if dropped else None,
                "weight": Arg((width,), offset=1.0) if affine else None,
                "bias": Arg((width,)) if affine and not rms else None,
            }
            label = "x".join(map(str, shape))
            label = f"{'rms' if rms else 'ln'} {label}{' scale' * scaled}{' drop' * dropped}"
            label += "" if stream is None else " fp32 stream"
            label += " no affine" * (not affine)
            yield Sample(label, args, {"eps": 1e-6, "rms": rms, "out_dtype": same})


def flops(residual: Tensor, **_: Any) -> int:
    """The norm's 8 an element, and up to 3 for the branch."""
    return 11 * residual.numel()


def bytes_moved(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    **_: Any,
) -> int:
    """residual and branch in, stream and normed out."""
    vectors = total_bytes(layer_scale, drop_scale, weight, bias)
    return total_bytes(residual, branch, residual) + residual.numel() * out_dtype.itemsize + vectors


ADD_LAYER_NORM = define(
    "add_layer_norm",
    reference=reference,
    portable=portable,
    launcher=launch,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
)


def backward_reference(
    d_normed: Tensor,
    d_stream: Tensor | None,
    stream: Tensor,
    branch: Tensor | None,
    branch_dtype: torch.dtype | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    eps: float,
    rms: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_residual, d_branch, [dweight; dbias; d_layer_scale] as [3, D]).

    `branch_dtype` None says that d_branch would equal d_residual: it is then empty. `branch` is
    given where the LayerScale gradient is wanted; without `need_params` the last result is [0, D].
    """
    dx, scaled = _norm.reference_backward(d_normed, stream, weight, eps, rms)
    acc, width = dx.dtype, stream.shape[-1]
    if d_stream is not None:
        dx = dx + d_stream.to(acc)
    dropped = dx if drop_scale is None else dx * drop_scale.to(acc)[:, None, None]
    d_branch = dropped if layer_scale is None else dropped * layer_scale.to(acc)
    params = dx.new_zeros(3 if need_params else 0, width)
    if need_params:
        params[0] = scaled.reshape(-1, width).sum(0)
        params[1] = d_normed.to(acc).reshape(-1, width).sum(0)
        if branch is not None:
            params[2] = (dropped * branch.to(acc)).reshape(-1, width).sum(0)
    # A copy: an op's results may not share memory.
    own = stream.new_empty(0) if branch_dtype is None else d_branch.to(branch_dtype).clone()
    return (
        dx.to(stream.dtype).contiguous(),
        own.contiguous(),
        params.to(_norm.params_dtype(stream, weight, layer_scale)),
    )


def backward_launch(
    d_normed: Tensor,
    d_stream: Tensor | None,
    stream: Tensor,
    branch: Tensor | None,
    branch_dtype: torch.dtype | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    eps: float,
    rms: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward kernel, then the sum of its partial parameter gradients."""
    d_residual, d_branch, params = _norm.backward(
        d_normed,
        d_stream,
        stream,
        branch if need_params else None,
        branch_dtype,
        layer_scale,
        drop_scale,
        weight,
        eps,
        rms,
        3 if need_params else 0,
    )
    return d_residual, stream.new_empty(0) if d_branch is None else d_branch, params


def backward_fake(
    d_normed: Tensor,
    d_stream: Tensor | None,
    stream: Tensor,
    branch: Tensor | None,
    branch_dtype: torch.dtype | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    eps: float,
    rms: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    shape = stream.shape
    return (
        stream.new_empty(shape),
        stream.new_empty(0)
        if branch_dtype is None
        else stream.new_empty(shape, dtype=branch_dtype),
        stream.new_empty(
            3 if need_params else 0,
            shape[-1],
            dtype=_norm.params_dtype(stream, weight, layer_scale),
        ),
    )


def backward_samples(size: str) -> Iterable[Sample]:
    """The forward's samples with both gradients."""
    for sample in samples(size):
        args = dict(sample.args)
        stream, scale, drop = args["residual"], args["layer_scale"], args["drop_scale"]
        assert stream is not None
        of_its_own = scale is not None or drop is not None or stream.dtype is not None
        yield Sample(
            sample.label,
            {
                "d_normed": Arg(stream.shape),
                "d_stream": Arg(stream.shape, dtype=stream.dtype),
                "stream": stream,
                "branch": args["branch"] if scale is not None else None,
            }
            | {"layer_scale": scale, "drop_scale": drop, "weight": args["weight"]},
            {
                "branch_dtype": same if of_its_own else None,
                "eps": 1e-6,
                "rms": sample.options["rms"],
                "need_params": args["weight"] is not None or scale is not None,
            },
        )


def backward_flops(stream: Tensor, **_: Any) -> int:
    """The norm's 14 an element, and up to 5 for the branch."""
    return 19 * stream.numel()


def backward_bytes_moved(
    d_normed: Tensor,
    d_stream: Tensor | None,
    stream: Tensor,
    branch: Tensor | None,
    branch_dtype: torch.dtype | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    need_params: bool,
    **_: Any,
) -> int:
    """Both gradients, the stream and perhaps the branch in; one or two gradients out."""
    out = 0 if branch_dtype is None else stream.numel() * branch_dtype.itemsize
    width = stream.shape[-1]
    params = 3 * width * _norm.params_dtype(stream, weight, layer_scale).itemsize * need_params
    vectors = total_bytes(layer_scale, drop_scale, weight)
    return total_bytes(d_normed, d_stream, stream, branch, stream) + out + params + vectors


ADD_LAYER_NORM_BACKWARD = define(
    "add_layer_norm_backward",
    reference=backward_reference,
    launcher=backward_launch,
    fake=backward_fake,
    samples=backward_samples,
    flops=backward_flops,
    bytes_moved=backward_bytes_moved,
    backward_of="add_layer_norm",
)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, residual, branch, layer_scale, drop_scale, weight, bias, eps, rms, out_dtype
    ):
        stream, normed = ADD_LAYER_NORM.call(
            residual, branch, layer_scale, drop_scale, weight, bias, eps, rms, out_dtype
        )
        kept = branch if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(stream, kept, layer_scale, drop_scale, weight)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.rms, ctx.branch_dtype = eps, rms, branch.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return stream, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_stream, d_normed):  # type: ignore[no-untyped-def]
        stream, branch, layer_scale, drop_scale, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if d_normed is None:  # only the stream was used: the norm passes nothing back
            d_normed = stream.new_zeros(()).expand(stream.shape)
        # Without a scale the branch's gradient is the residual's, written once.
        of_its_own = (
            layer_scale is not None or drop_scale is not None or ctx.branch_dtype != stream.dtype
        )
        d_residual, d_branch, params = ADD_LAYER_NORM_BACKWARD.call(
            d_normed,
            d_stream,
            stream,
            branch,
            ctx.branch_dtype if of_its_own and needs[1] else None,
            layer_scale,
            drop_scale,
            weight,
            ctx.eps,
            ctx.rms,
            needs[2] or needs[4] or needs[5],
        )
        return (
            d_residual,
            (d_branch if of_its_own else d_residual) if needs[1] else None,
            params[2].to(layer_scale.dtype) if needs[2] else None,
            None,
            params[0] if needs[4] else None,
            params[1].to(ctx.bias_dtype) if needs[5] else None,
            None,
            None,
            None,
        )


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the result.

    Args:
        residual: the stream [B, N, D], any strides.
        branch: what attention or MLP returned [B, N, D], any strides; its dtype may differ.
        weight: norm scale [D]; None for a norm without affine part.
        bias: norm shift [D], or None; only with a weight.
        eps: added to the variance.
        layer_scale: LayerScale gamma [D], or None.
        drop_scale: DropPath factor a sample [B] (0 or 1 / keep probability), or None; no gradient.
        rms: RMSNorm in place of LayerNorm.
        out_dtype: dtype of the normalised tokens; the residual's if None.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (stream [B, N, D] in the residual's dtype, normalised tokens [B, N, D] in `out_dtype`).

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, a bias without a weight, tensors on several devices,
            an `impl` that can't run.
    """
    check_residual("add_layer_norm", residual, branch, layer_scale, drop_scale)
    check_floating("add_layer_norm", residual=residual, weight=weight, bias=bias)
    check_shape("add_layer_norm", "weight", weight, residual.shape[-1])
    check_shape("add_layer_norm", "bias", bias, residual.shape[-1])
    _norm.check_affine("add_layer_norm", weight, bias)
    out_dtype = out_dtype or residual.dtype
    tensors = (residual, branch, layer_scale, drop_scale, weight, bias)
    chosen = choose(
        ADD_LAYER_NORM,
        impl,
        *tensors,
        unfit={"triton": _norm.width_problem(residual.shape[-1])},
        avoid=lone_norm(),
    )
    if chosen == "triton":
        if wants_grad(*tensors):
            return _AddLayerNorm.apply(*tensors, eps, rms, out_dtype)
        return ADD_LAYER_NORM.call(*tensors, eps, rms, out_dtype)
    run = ADD_LAYER_NORM.portable if chosen == "torch" else ADD_LAYER_NORM.reference
    return run(*tensors, eps, rms, out_dtype)
