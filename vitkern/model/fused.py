"""The two halves of a transformer block, each one autograd node on the kernels of a few ops.

    attention half: x + ls(dp(proj(attention(qkv(norm(x))))))
    MLP half:       x + ls(dp(fc2(act(fc1(norm(x))))))

What a node keeps, in 16-bit products, as bytes a token and unit of width D, with an MLP of 4 D:

    save          attention half          MLP half       made again in backward
    "balanced"    x_hat 2, qkv 6, out 2   x_hat 2, z 8   activations
    "minimal"     x_hat 2, qkv 6          x_hat 2        attention, fc1, activations

and some float32 a token. x_hat, the normalised input, serves the norm's gradient and the product's,
so the stream itself, perhaps float32, is not kept; z serves the activation's gradient and fc2's.

Statistics of the stream's rows, which a norm needs, are left behind by the product that wrote them.
Backward, the gradient of the stream joins that of the norm in the kernel which makes the latter.

Where a kernel is not taken (a CPU, float32, a table's measurement) the ops are called one by one,
and PyTorch's autograd keeps what it likes, unless `save` was asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitkern.kernels._op import KERNELS, Op, cast, note, remembered, wants_grad
from vitkern.kernels.attention import ATTENTION, ATTENTION_BACKWARD, needs_stats
from vitkern.kernels.attention import run as run_attention
from vitkern.kernels.attention import select as select_attention
from vitkern.kernels.attention.reference import Options
from vitkern.kernels.linear_residual import LINEAR_RESIDUAL, LINEAR_RESIDUAL_BACKWARD
from vitkern.kernels.linear_residual import run as run_linear_residual
from vitkern.kernels.linear_residual import select as select_linear_residual
from vitkern.kernels.norm_linear import NORM_LINEAR, NORM_LINEAR_BACKWARD
from vitkern.kernels.norm_linear import run as run_norm_linear
from vitkern.kernels.norm_linear import select as select_norm_linear


class Stream(NamedTuple):
    """The residual stream [B, N, D] and, perhaps, the statistics of its rows [2, C, B * N]."""

    x: Tensor
    stats: Tensor | None = None


class Norm(NamedTuple):
    """A norm as the ops take it."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool


class Linear(NamedTuple):
    """A linear layer as the ops take it."""

    weight: Tensor
    bias: Tensor | None


class Joint(NamedTuple):
    """How a branch joins the stream: LayerScale [D] and DropPath factors [B], or None."""

    layer_scale: Tensor | None
    drop_scale: Tensor | None


class How(NamedTuple):
    """What doesn't change from call to call.

    dtype: of the products. save: what backward finds, or "" for what is fastest. need_stats:
    whether a norm will read the statistics of the result. impl: what was asked for, by op.
    """

    dtype: torch.dtype
    save: str
    need_stats: bool
    impl: dict[str, str]


class _Plan(NamedTuple):
    """How a half runs: its implementations, and its options, which an autograd node keeps.

    fused: whether as one. grad: whether a gradient is wanted. out_stats: whether attention's
    backward needs statistics of its forward. attention: "" where that is chosen once qkv is there.
    """

    fused: bool
    grad: bool
    norm_linear: str
    linear_residual: str
    dtype: torch.dtype
    eps: float
    rms: bool
    minimal: bool
    need_stats: bool
    attention: str = ""
    out_stats: bool = False
    scale: float = 0.0
    qk_eps: float = 0.0
    qk_rms: bool = False
    heads: int = 0
    head_dim: int = 0
    activation: str = ""
    gated: bool = False


_NO_NORMS: tuple[Tensor | None, ...] = (None,) * 4


def _by(op: Op, name: str) -> Callable[..., Any]:
    """The implementation `name` of an op or of its backward, without autograd."""
    if name in KERNELS:
        return op.kernel(name)
    return op.portable if name == op.portable_name else op.reference


def attention_half(
    stream: Stream,
    norm: Norm,
    qkv: Linear,
    heads: int,
    qk_norm: Norm | None,
    k_norm: Norm | None,
    proj: Linear,
    joint: Joint,
    how: How,
) -> Stream:
    """The stream after attention. `qk_norm` is that of the queries, `k_norm` that of the keys."""
    x, stats = stream
    norms, qk_eps, qk_rms = _NO_NORMS, 0.0, False
    if qk_norm is not None and k_norm is not None:
        norms = (qk_norm.weight, qk_norm.bias, k_norm.weight, k_norm.bias)
        qk_eps, qk_rms = qk_norm.eps, qk_norm.rms
    impl = how.impl
    parts = (norm.weight, norm.bias, *qkv, *norms, *proj, *joint)
    plan = remembered(
        _plan_attention, (x, *parts),
        impl["norm_linear"], impl["attention"], impl["linear_residual"],
        how.dtype, norm.eps, norm.rms, how.save, how.need_stats, heads, qk_eps, qk_rms,
    )  # fmt: skip
    if plan.fused and plan.grad:
        return Stream(*_AttentionHalf.apply(x, stats, *parts, plan))
    if plan.fused:
        linears = cast(how.dtype, *qkv, *proj)
        norm_params = (norm.weight, norm.bias)
        y, *_, stats = _attention_forward(x, stats, norm_params, linears, norms, joint, plan, False)
        return Stream(y, stats)
    packed = run_norm_linear(
        plan.norm_linear, x, norm.weight, norm.bias, *qkv, norm.eps, norm.rms, "", False, how.dtype
    ).view(*x.shape[:2], 3, heads, plan.head_dim)
    options = _options(norms, plan)
    middle = plan.attention or select_attention(impl["attention"], packed, options, plan.scale)
    if how.save and plan.grad:
        note("attention half", "op by op", f"save={how.save!r} has no {middle} attention")
    out = run_attention(middle, packed, options, plan.scale)
    return Stream(run_linear_residual(plan.linear_residual, out, *proj, x, *joint, how.dtype))


def _plan_attention(
    tensors: tuple[Any, ...],
    first: str,
    middle: str,
    last: str,
    dtype: torch.dtype,
    eps: float,
    rms: bool,
    save: str,
    need_stats: bool,
    heads: int,
    qk_eps: float,
    qk_rms: bool,
) -> _Plan:
    """The plan for x and the parts; `first`, `middle` and `last` are what was asked for."""
    x, norm_weight, norm_bias, weight, bias, *norms, proj_weight, proj_bias, gain, factor = tensors
    first = select_norm_linear(first, x, norm_weight, norm_bias, weight, bias, dtype, "", False)
    last = select_linear_residual(last, proj_weight, proj_bias, x, gain, factor, dtype)
    head_dim, grad = weight.shape[0] // (3 * heads), wants_grad(*tensors)
    plan = _Plan(
        False, grad, first, last, dtype, eps, rms, save == "minimal",
        need_stats and last != "gluon",  # which leaves none behind
        scale=head_dim**-0.5, qk_eps=qk_eps, qk_rms=qk_rms, heads=heads, head_dim=head_dim,
    )  # fmt: skip
    if not (first in KERNELS and last in KERNELS) and not (save and grad):
        return plan
    # A stand-in: qkv does not exist yet, and its shape decides.
    like = x.new_empty(1, dtype=dtype).expand(*x.shape[:2], 3, heads, head_dim)
    options = _options(norms, plan)
    backward = wants_grad(x, norm_weight, norm_bias, weight, bias, *norms)
    middle = select_attention(middle, like, options, plan.scale, 0.0, backward)
    fused = middle == "triton" or (bool(save) and middle in ("sdpa", "reference"))
    out_stats = grad and middle == "triton" and needs_stats(like, options)
    return plan._replace(fused=fused, attention=middle, out_stats=out_stats)


def mlp_half(
    stream: Stream,
    norm: Norm,
    fc1: Linear,
    activation: str,
    gated: bool,
    fc2: Linear,
    joint: Joint,
    how: How,
) -> Stream:
    """The stream after the MLP."""
    x, stats = stream
    impl = how.impl
    parts = (norm.weight, norm.bias, *fc1, *fc2, *joint)
    plan = remembered(
        _plan_mlp, (x, *parts), impl["norm_linear"], impl["linear_residual"],
        how.dtype, norm.eps, norm.rms, how.save, how.need_stats, activation, gated,
    )  # fmt: skip
    if plan.fused and plan.grad:
        return Stream(*_MlpHalf.apply(x, stats, *parts, plan))
    if plan.fused:
        linears, norm_params = cast(how.dtype, *fc1, *fc2), (norm.weight, norm.bias)
        y, *_, stats = _mlp_forward(x, stats, norm_params, linears, joint, plan, False)
        return Stream(y, stats)
    hidden = run_norm_linear(
        plan.norm_linear, x, norm.weight, norm.bias, *fc1, norm.eps, norm.rms, activation, gated,
        how.dtype,
    )  # fmt: skip
    return Stream(run_linear_residual(plan.linear_residual, hidden, *fc2, x, *joint, how.dtype))


def _plan_mlp(
    tensors: tuple[Any, ...],
    first: str,
    last: str,
    dtype: torch.dtype,
    eps: float,
    rms: bool,
    save: str,
    need_stats: bool,
    activation: str,
    gated: bool,
) -> _Plan:
    """The plan for x and the parts; `first` and `last` are what was asked for."""
    x, norm_weight, norm_bias, weight, bias, fc2_weight, fc2_bias, gain, factor = tensors
    first = select_norm_linear(
        first, x, norm_weight, norm_bias, weight, bias, dtype, activation, gated
    )
    last = select_linear_residual(last, fc2_weight, fc2_bias, x, gain, factor, dtype)
    grad = wants_grad(*tensors)
    return _Plan(
        (first in KERNELS and last in KERNELS) or bool(save and grad),
        grad, first, last, dtype, eps, rms, save == "minimal", need_stats and last != "gluon",
        activation=activation, gated=gated,
    )  # fmt: skip


def _options(weights: Sequence[Tensor | None], plan: _Plan) -> Options:
    q_weight, q_bias, k_weight, k_bias = weights
    return Options(q_weight, q_bias, k_weight, k_bias, eps=plan.qk_eps, rms=plan.qk_rms)


def _attend(
    qkv: Tensor, weights: Sequence[Tensor | None], plan: _Plan, saving: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, statistics that its backward needs, or None)."""
    need = saving and plan.out_stats
    out, stats = _by(ATTENTION, plan.attention)(qkv, *_options(weights, plan), plan.scale, need)
    return out, stats if need else None


def _attention_forward(
    x: Tensor,
    stats: Tensor | None,
    norm: Sequence[Tensor | None],
    linears: Sequence[Any],
    qk_norms: Sequence[Tensor | None],
    joint: Sequence[Tensor | None],
    plan: _Plan,
    saving: bool,
) -> tuple[Any, ...]:
    """(y, x_hat, spread, qkv, out, its statistics, statistics of y).

    linears: weight and bias of qkv and of proj, in the dtype of the products.
    """
    qkv_weight, qkv_bias, proj_weight, proj_bias = linears
    flat, _, x_hat, spread = _by(NORM_LINEAR, plan.norm_linear)(
        x, *norm, qkv_weight, qkv_bias, stats, plan.eps, plan.rms, False, "", False, saving
    )
    qkv = flat.view(*x.shape[:2], 3, plan.heads, plan.head_dim)
    out, out_stats = _attend(qkv, qk_norms, plan, saving)
    y, y_stats = _by(LINEAR_RESIDUAL, plan.linear_residual)(
        out, proj_weight, proj_bias, x, *joint, plan.need_stats
    )
    return y, x_hat, spread, qkv, out, out_stats, y_stats if plan.need_stats else None


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, stats, norm_weight, norm_bias, qkv_weight, qkv_bias, q_weight, q_bias, k_weight,
        k_bias, proj_weight, proj_bias, layer_scale, drop_scale, plan,
    ):  # fmt: skip
        linears = cast(plan.dtype, qkv_weight, qkv_bias, proj_weight, proj_bias)
        norms = (q_weight, q_bias, k_weight, k_bias)
        y, x_hat, spread, qkv, out, out_stats, y_stats = _attention_forward(
            x,
            stats,
            (norm_weight, norm_bias),
            linears,
            norms,
            (layer_scale, drop_scale),
            plan,
            True,
        )
        qkv16, _, proj16, bias16 = linears
        if plan.minimal:
            out = out_stats = None
        ctx.save_for_backward(
            x_hat, spread, qkv, out, out_stats, norm_weight, norm_bias, qkv16, *norms, proj16,
            None if layer_scale is None else bias16, layer_scale, drop_scale,
        )  # fmt: skip
        ctx.plan, ctx.set_up = plan, (x.dtype, qkv_weight.dtype, proj_weight.dtype)
        ctx.set_materialize_grads(False)
        if y_stats is not None:
            ctx.mark_non_differentiable(y_stats)
        return y, y_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):  # type: ignore[no-untyped-def]
        (
            x_hat, spread, qkv, out, out_stats, norm_weight, norm_bias, qkv_weight,
            q_weight, q_bias, k_weight, k_bias, proj_weight, proj_bias, layer_scale, drop_scale,
        ) = ctx.saved_tensors  # fmt: skip
        plan, (x_dtype, qkv_dtype, proj_dtype) = ctx.plan, ctx.set_up
        needs, norms = ctx.needs_input_grad, (q_weight, q_bias, k_weight, k_bias)
        if dy is None:
            return (None,) * 15
        if out is None:
            out, out_stats = _attend(qkv, norms, plan, True)
        inner = needs[0] or any(needs[2:10])
        d_out, d_proj, d_proj_bias, d_scale = _by(LINEAR_RESIDUAL_BACKWARD, plan.linear_residual)(
            dy, out, None, proj_weight, proj_bias, layer_scale, drop_scale, "", False, proj_dtype,
            inner, any(needs[10:13]),
        )  # fmt: skip
        dx = d_norm = d_qkv = d_qkv_bias = None
        d_norms = [None] * 4
        if inner:
            options = _options(norms, plan)
            kept = (out, out_stats) if out_stats is not None else (None, None)
            dqkv, params = _by(ATTENTION_BACKWARD, plan.attention)(
                d_out, qkv, *kept, *options, plan.scale
            )
            d_norms = [params[i].to(norms[i].dtype) if needs[6 + i] else None for i in range(4)]
            dx, d_norm, d_qkv, d_qkv_bias = _by(NORM_LINEAR_BACKWARD, plan.norm_linear)(
                dqkv.flatten(2), None, x_hat, spread, norm_weight, norm_bias, qkv_weight, dy,
                "", False, plan.rms, x_dtype, qkv_dtype, needs[0], any(needs[2:6]),
            )  # fmt: skip
        return (
            dx if needs[0] else None,
            None,
            d_norm[0] if needs[2] else None,
            d_norm[1].to(norm_bias.dtype) if needs[3] else None,
            d_qkv if needs[4] else None,
            d_qkv_bias if needs[5] else None,
            *d_norms,
            d_proj if needs[10] else None,
            d_proj_bias if needs[11] else None,
            d_scale if needs[12] else None,
            None,
            None,
        )


def _mlp_forward(
    x: Tensor,
    stats: Tensor | None,
    norm: Sequence[Tensor | None],
    linears: Sequence[Any],
    joint: Sequence[Tensor | None],
    plan: _Plan,
    saving: bool,
) -> tuple[Any, ...]:
    """(y, x_hat, spread, z, statistics of y); `linears` are those of fc1 and fc2, as above."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = linears
    hidden, z, x_hat, spread = _by(NORM_LINEAR, plan.norm_linear)(
        x, *norm, fc1_weight, fc1_bias, stats,
        plan.eps, plan.rms, False, plan.activation, plan.gated, saving,
    )  # fmt: skip
    y, y_stats = _by(LINEAR_RESIDUAL, plan.linear_residual)(
        hidden, fc2_weight, fc2_bias, x, *joint, plan.need_stats
    )
    return y, x_hat, spread, z, y_stats if plan.need_stats else None


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x, stats, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        layer_scale, drop_scale, plan,
    ):  # fmt: skip
        linears = cast(plan.dtype, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        y, x_hat, spread, z, y_stats = _mlp_forward(
            x, stats, (norm_weight, norm_bias), linears, (layer_scale, drop_scale), plan, True
        )
        fc1, bias1, fc2, bias2 = linears
        ctx.save_for_backward(
            x_hat, spread, None if plan.minimal else z, norm_weight, norm_bias, fc1,
            bias1 if plan.minimal else None, fc2, None if layer_scale is None else bias2,
            layer_scale, drop_scale,
        )  # fmt: skip
        ctx.plan, ctx.set_up = plan, (x.dtype, fc1_weight.dtype, fc2_weight.dtype)
        ctx.set_materialize_grads(False)
        if y_stats is not None:
            ctx.mark_non_differentiable(y_stats)
        return y, y_stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):  # type: ignore[no-untyped-def]
        (
            x_hat, spread, z, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
            layer_scale, drop_scale,
        ) = ctx.saved_tensors  # fmt: skip
        plan, (x_dtype, fc1_dtype, fc2_dtype) = ctx.plan, ctx.set_up
        needs = ctx.needs_input_grad
        if dy is None:
            return (None,) * 11
        if z is None:  # fc1 again, from rows that are normalised already
            z, *_ = _by(NORM_LINEAR, plan.norm_linear)(
                x_hat, norm_weight, norm_bias, fc1_weight, fc1_bias, None,
                plan.eps, plan.rms, True, "", False, False,
            )  # fmt: skip
        inner = needs[0] or any(needs[2:6])
        dz, d_fc2, d_fc2_bias, d_scale = _by(LINEAR_RESIDUAL_BACKWARD, plan.linear_residual)(
            dy, None, z, fc2_weight, fc2_bias, layer_scale, drop_scale, plan.activation,
            plan.gated, fc2_dtype, inner, any(needs[6:9]),
        )  # fmt: skip
        dx = d_norm = d_fc1 = d_fc1_bias = None
        if inner:
            dx, d_norm, d_fc1, d_fc1_bias = _by(NORM_LINEAR_BACKWARD, plan.norm_linear)(
                dz, None, x_hat, spread, norm_weight, norm_bias, fc1_weight, dy,
                "", False, plan.rms, x_dtype, fc1_dtype, needs[0], any(needs[2:6]),
            )  # fmt: skip
        return (
            dx if needs[0] else None,
            None,
            d_norm[0] if needs[2] else None,
            d_norm[1].to(norm_bias.dtype) if needs[3] else None,
            d_fc1 if needs[4] else None,
            d_fc1_bias if needs[5] else None,
            d_fc2 if needs[6] else None,
            d_fc2_bias if needs[7] else None,
            d_scale if needs[8] else None,
            None,
            None,
        )
