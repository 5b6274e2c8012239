"""The launchers of the fused linear layers."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _tuned
from .._launch import (
    capability,
    cdiv,
    dot_precision,
    launch,
    next_power_of_2,
    precision_of,
    sm_count,
    split,
)
from . import persistent
from .backward import finish_kernel, input_grad_kernel, norm_finish_kernel, weight_grad_kernel
from .configs import (
    CHUNK,
    FINISH,
    FORWARD,
    INPUT_GRAD,
    NORM_FINISH,
    STATISTICS,
    WEIGHT_GRAD,
    finish_candidates,
    finish_config,
    norm_finish_candidates,
    norm_finish_config,
    product_candidates,
    product_config,
    row_candidates,
    row_config,
    weight_grad_candidates,
    weight_grad_config,
    work,
)
from .forward import forward_kernel, statistics_kernel

__all__ = ["CHUNK"]  # of the configs' module, for the ops


def bucket(x: Tensor, weight: Tensor, *, wide: bool = False, **options: bool) -> str:
    """Products that are measured together: of the rows of `x` with a weight [N, K].

    wide: the stream keeps its float32 beside a product in 16 bits, which is another call to time.
    """
    features, width = weight.shape
    return _tuned.bucket(
        m=x.shape.numel() // x.shape[-1], n=features, k=width, **options, wide=wide
    )


def predicted_slower(dtype: torch.dtype) -> str | None:
    """Why auto leaves our products alone, though they could run. Not measured yet."""
    if dtype == torch.float32:
        return "float32: PyTorch's products are predicted to be faster"
    return None


def as_matrix(t: Tensor) -> Tensor:
    """`t` as [tokens, columns] with neighbouring columns, copied only if it must be."""
    matrix = t.reshape(-1, t.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def dense(t: Tensor | None) -> Tensor | None:
    """A tensor as kernels read it; parameters, and what a kernel saved, are dense already."""
    return None if t is None else t.contiguous()


def row_statistics(x: Tensor) -> Tensor:
    """[2, 1, M] float32: mean and sum of squared differences of each row of `x` [M, K]."""
    rows, width = x.shape
    stats = torch.empty(2, 1, rows, dtype=torch.float32, device=x.device)
    config = STATISTICS.pick(
        row_config(width),
        x.device,
        x.dtype,
        lambda: row_candidates(width),
        lambda: {
            "m": rows,
            "k": width,
        },
    )
    launch(
        statistics_kernel,
        (cdiv(rows, config.rows),),
        x,
        stats,
        rows,
        width,
        x.stride(0),
        ROWS=config.rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )
    return stats


@dataclass(frozen=True)
class Norm:
    """The norm before a product; stats are those of the rows, None if they are normalised."""

    weight: Tensor | None
    bias: Tensor | None
    stats: Tensor | None
    eps: float
    rms: bool


NO_NORM = Norm(None, None, None, 0.0, False)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    norm: Norm = NO_NORM,
    x_hat: Tensor | None = None,
    spread: Tensor | None = None,
    activation: str = "",
    gated: bool = False,
    pre: Tensor | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    out_stats: Tensor | None = None,
) -> None:
    """Fill `out` and the other results that are given; see `forward_kernel`."""
    a = as_matrix(x)
    rows, width = a.shape
    features = out.shape[-1]
    stream = None if residual is None else as_matrix(residual)
    tokens = 1 if drop_scale is None else rows // max(1, drop_scale.shape[0])
    chunks = 1 if norm.stats is None else norm.stats.shape[1]
    normed = norm.stats is not None or norm.weight is not None
    weight = weight.contiguous()
    tma = not (normed or gated) and persistent.suits(a, weight)
    prologue = "norm" if normed else ""
    this = work(weight, a, stream, prologue=prologue, pair=gated, tma=tma)
    config = FORWARD.pick(
        product_config(rows, features, this),
        weight.device,
        weight.dtype,
        lambda: product_candidates(this),
        lambda: {
            "m": rows,
            "n": features,
            "k": width,
            "act": activation,
            "gated": gated,
            "prologue": prologue,
            "cast": a.dtype != weight.dtype,
            "saved": x_hat is not None,
            "pre": pre is not None,
            "residual": stream is not None,
            "wide": stream is not None and stream.dtype == torch.float32,
            "stats": out_stats is not None,
            "tma": tma,
            "unaligned": not this.aligned,
            "precision": precision_of(weight.dtype),
        },
    )
    if config.resident:
        programs = min(persistent.tiles_of(config, rows, features), config.resident * this.sms)
        persistent.forward(
            a, weight, dense(bias), pre, stream, dense(layer_scale), dense(drop_scale), out,
            out_stats, max(1, tokens), activation, config.group, (config, programs),
        )  # fmt: skip
        return
    launch(
        forward_kernel,
        (cdiv(rows, config.block_m) * cdiv(features, config.block_n),),
        a,
        weight,
        dense(bias),
        dense(norm.stats),
        dense(norm.weight),
        dense(norm.bias),
        x_hat,
        spread,
        pre,
        stream,
        dense(layer_scale),
        dense(drop_scale),
        out,
        out_stats,
        rows,
        features,
        width,
        max(1, tokens),
        a.stride(0),
        0 if stream is None else stream.stride(0),
        norm.eps,
        EVEN_K=width % config.block_k == 0,
        ACT=activation,
        GATED=gated,
        RMS=norm.rms,
        CHUNK=CHUNK if chunks > 1 else next_power_of_2(width),
        BLOCK_C=next_power_of_2(chunks),
        PRECISION=dot_precision(weight.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        PARTS=config.parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def input_grad(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    *,
    z: Tensor | None = None,
    activation: str = "",
    gated: bool = False,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    pre: Tensor | None = None,
    need_operands: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Fill `dx`; (gradient of z before layer_scale, the layer's input made again from `pre`).

    Those two are what the weight's gradient is made of; `z` or `pre` is that of `activation`.
    """
    g = as_matrix(dy)
    rows, (features, width) = g.shape[0], weight.shape
    as_it_is = z is None and drop_scale is None and g.dtype == weight.dtype
    dz = hidden = None
    if need_operands and not as_it_is:
        dz = weight.new_empty(rows, features)
    if need_operands and pre is not None:
        hidden = weight.new_empty(rows, width)
    if dx is None:  # the operands alone are wanted: the kernel writes them all the same
        dx = weight.new_empty(rows, width)
    tokens = 1 if drop_scale is None else rows // max(1, drop_scale.shape[0])
    prologue = "slope" if z is not None else "scale" if layer_scale is not None else ""
    prologue = prologue if as_it_is else prologue or "scale"
    weight = weight.contiguous()
    tma = not prologue and persistent.suits(g, weight)
    this = work(weight, g, prologue=prologue, tma=tma)
    config = product_config(rows, width, this)
    slow = gated and not (tma or this.aligned) and weight.dtype != torch.float32
    if slow:
        config = replace(config, block_m=32)  # an epilogue of five tensors, address by address
    config = INPUT_GRAD.pick(
        config,
        weight.device,
        weight.dtype,
        lambda: [] if slow else product_candidates(this),
        lambda: {
            "m": rows,
            "n": features,
            "k": width,
            "act": activation,
            "gated": gated,
            "prologue": prologue,
            "cast": g.dtype != weight.dtype,
            "pre": pre is not None,
            "tma": tma,
            "unaligned": not this.aligned,
            "precision": precision_of(weight.dtype),
        },
    )
    if config.resident:
        programs = min(persistent.tiles_of(config, rows, width), config.resident * this.sms)
        persistent.input_grad(
            g, weight, dense(pre), hidden, dx, activation, gated, config.group, (config, programs)
        )
        return g, hidden
    launch(
        input_grad_kernel,
        (cdiv(rows, config.block_m) * cdiv(width, config.block_n),),
        g,
        weight,
        dense(drop_scale),
        dense(layer_scale),
        dense(z),
        dz,
        dense(pre),
        hidden,
        dx,
        rows,
        features,
        width,
        max(1, tokens),
        g.stride(0),
        EVEN_N=features % config.block_k == 0,
        ACT=activation,
        GATED=gated,
        PRECISION=dot_precision(weight.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_k,
        BLOCK_K=config.block_n,
        GROUP=config.group,
        PARTS=config.parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return g if dz is None else dz, hidden


@dataclass(frozen=True)
class Partial:
    """Sums over the tokens of each split: weight [SPLITS, N, K], bias [SPLITS, N], float32."""

    weight: Tensor
    bias: Tensor

    @property
    def splits(self) -> int:
        """How many parts the tokens were split into."""
        return self.weight.shape[0]


def weight_grad(dz: Tensor, a: Tensor) -> Partial:
    """Partial sums of dz^T a and of dz, for dz [M, N] and a [M, K] of one dtype."""
    dz, a = as_matrix(dz), as_matrix(a)
    rows, features, width = dz.shape[0], dz.shape[1], a.shape[1]
    target = capability(a.device)
    config = WEIGHT_GRAD.pick(
        weight_grad_config(features, width, a.dtype, target),
        a.device,
        a.dtype,
        lambda: weight_grad_candidates(features, width, a.dtype, target),
        lambda: {
            "m": rows,
            "n": features,
            "k": width,
            "precision": precision_of(a.dtype),
        },
    )
    tiles = cdiv(features, config.block_n) * cdiv(width, config.block_k)
    splits, steps = split(rows, tiles, config, sm_count(a.device), a.dtype)
    partial = Partial(
        torch.empty(splits, features, width, dtype=torch.float32, device=a.device),
        torch.empty(splits, features, dtype=torch.float32, device=a.device),
    )
    launch(
        weight_grad_kernel,
        (splits * tiles,),
        dz,
        a,
        partial.weight,
        partial.bias,
        rows,
        features,
        width,
        dz.stride(0),
        a.stride(0),
        steps,
        PRECISION=dot_precision(a.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partial


def finish(
    partial: Partial,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dW, db, gradient of layer_scale or None), the first two in `dtype`."""
    features, width = weight.shape
    d_weight = torch.empty(features, width, dtype=dtype, device=weight.device)
    d_bias = torch.empty(features, dtype=dtype, device=weight.device)
    d_layer_scale = None if layer_scale is None else torch.empty_like(layer_scale)
    config = FINISH.pick(
        finish_config(width),
        weight.device,
        weight.dtype,
        lambda: finish_candidates(width),
        lambda: {
            "m": partial.splits,
            "n": features,
            "k": width,
            "scale": layer_scale is not None,
        },
    )
    launch(
        finish_kernel,
        (features,),
        partial.weight,
        partial.bias,
        weight.contiguous(),
        dense(bias),
        dense(layer_scale),
        d_weight,
        d_bias,
        d_layer_scale,
        features,
        width,
        partial.splits,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )
    return d_weight, d_bias, d_layer_scale


def norm_finish(
    partial: Partial | None,
    weight: Tensor,
    norm: Norm,
    x_hat: Tensor,
    spread: Tensor,
    d_a: Tensor | None,
    d_stream: Tensor | None,
    dx: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill `dx`; (dW, db, gradients of the norm's weight and bias [2, K]), empty without `partial`.

    The gradient of the norm is [0, K] where it has no weight.
    """
    features, width = weight.shape
    rows = x_hat.numel() // width
    config = NORM_FINISH.pick(
        norm_finish_config(width),
        weight.device,
        weight.dtype,
        lambda: norm_finish_candidates(width, partial is not None),
        lambda: {
            "m": rows,
            "n": features,
            "k": width,
            "params": partial is not None,
            "dx": dx is not None,
            "stream": d_stream is not None,
        },
    )
    columns = 0 if partial is None else cdiv(width, config.block_c)
    shapes = ((features, width), (features,)) if partial is not None else ((0,), (0,))
    d_weight, d_bias = (torch.empty(s, dtype=dtype, device=weight.device) for s in shapes)
    d_norm = weight.new_empty(0, width) if norm.weight is None else norm.weight.new_empty(2, width)
    if partial is None:
        d_norm = d_norm[:0]
    stream = None if d_stream is None or dx is None else as_matrix(d_stream)
    launch(
        norm_finish_kernel,
        (columns + (0 if dx is None else cdiv(rows, config.rows)),),
        d_a,
        stream,
        x_hat.contiguous(),
        spread.contiguous(),
        dense(norm.weight),
        dense(norm.bias),
        dx,
        None if partial is None else partial.weight,
        None if partial is None else partial.bias,
        weight.contiguous(),
        d_weight,
        d_bias,
        d_norm if d_norm.shape[0] else None,
        rows,
        features,
        width,
        0 if stream is None else stream.stride(0),
        0 if partial is None else partial.splits,
        columns,
        RMS=norm.rms,
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
        ROWS=config.rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )
    return d_weight, d_bias, d_norm
