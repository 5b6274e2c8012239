"""What `layer_norm` and `add_layer_norm` share: the norm itself in PyTorch, and the row kernels.

A row is one token. Its D values stay in registers from the first load to the last store, so each
tensor is read or written once. Statistics are two-pass in float32 with a correction for the
rounding of the mean itself, which keeps rows with |mean| >> spread accurate. Backward recomputes
them from the row, which it must load anyway: nothing is saved but the input.
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._configs import tunable
from ._launch import capability, cdiv, launch, next_power_of_2, sm_count
from ._op import accumulate_dtype
from ._reduce import column_sum
from ._triton import jit, tl

MAX_WIDTH = 8192  # one row in the registers of one program


def normalise(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """The definition: (x_hat, 1 / spread) of the rows of `x`, in the dtype of `x`."""
    centred = x if rms else x - x.mean(-1, keepdim=True)
    rstd = 1 / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred * rstd, rstd


def reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """(dx, rows whose sum is dweight), both in the accumulation dtype; the sum of dy is dbias."""
    acc = accumulate_dtype(dy, x, weight)
    x_hat, rstd = normalise(x.to(acc), eps, rms)
    g = dy.to(acc) if weight is None else dy.to(acc) * weight.to(acc)
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if not rms:
        dx = dx - g.mean(-1, keepdim=True)
    return dx * rstd, dy.to(acc) * x_hat


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x_hat * weight + bias in the dtype of `x_hat`; what is None is left out."""
    y = x_hat if weight is None else x_hat * weight.to(x_hat.dtype)
    return y if bias is None else y + bias.to(x_hat.dtype)


def aten_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> Tensor:
    """ATen's fused norms. They take one dtype, so mixed arguments are computed in float32."""
    if any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        acc = accumulate_dtype(x, weight, bias)
        weight, bias = (None if t is None else t.to(acc) for t in (weight, bias))
        x = x.to(acc)
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


@jit
def _statistics(value, mask, D: tl.constexpr, eps, RMS: tl.constexpr):
    """(centred value, 1 / spread) of each row of `value` [ROWS, BLOCK_D], zero where masked."""
    centred = value
    if not RMS:
        centred = tl.where(mask, value - (tl.sum(value, axis=1) / D)[:, None], 0.0)
        # The mean was rounded at its own size; what it missed is the mean of the differences.
        centred = tl.where(mask, centred - (tl.sum(centred, axis=1) / D)[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    return centred, 1.0 / tl.sqrt(variance + eps)


@jit
def _norm_forward_kernel(
    residual,  # [B, N, D] by strides
    branch,  # [B, N, D] by strides, or None
    layer_scale,  # [D] or None
    drop_scale,  # [B] or None
    weight,  # [D] or None
    bias,  # [D] or None
    stream,  # [B, N, D] contiguous: residual + branch; None without branch
    normed,  # [B, N, D] contiguous
    M,  # B * N
    N,
    residual_b,
    residual_n,
    residual_d,
    branch_b,
    branch_n,
    branch_d,
    eps,
    D: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    row_mask, col_mask = rows < M, cols < D
    mask = row_mask[:, None] & col_mask[None, :]
    b, n = (rows // N).to(tl.int64), (rows % N).to(tl.int64)
    out = rows.to(tl.int64)[:, None] * D + cols[None, :]

    place = (b * residual_b + n * residual_n)[:, None] + cols.to(tl.int64)[None, :] * residual_d
    value = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        place = (b * branch_b + n * branch_n)[:, None] + cols.to(tl.int64)[None, :] * branch_d
        added = tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
        if layer_scale is not None:
            added *= tl.load(layer_scale + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if drop_scale is not None:
            added *= tl.load(drop_scale + b, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        # Normalise the stream as stored: that is what backward and the next layer read.
        rounded = (value + added).to(stream.dtype.element_ty)
        tl.store(stream + out, rounded, mask=mask)
        value = rounded.to(tl.float32)

    centred, rstd = _statistics(value, mask, D, eps, RMS)
    y = centred * rstd[:, None]
    if weight is not None:
        y *= tl.load(weight + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + out, y.to(normed.dtype.element_ty), mask=mask)


@jit
def _norm_backward_kernel(
    d_normed,  # [B, N, D] by strides
    d_stream,  # [B, N, D] by strides, or None: gradient of the stream from later layers
    stream,  # [B, N, D] by strides: the row that was normalised
    branch,  # [B, N, D] by strides, or None; read for the LayerScale gradient only
    layer_scale,  # [D] or None
    drop_scale,  # [B] or None
    weight,  # [D] or None
    d_residual,  # [B, N, D] contiguous
    d_branch,  # [B, N, D] contiguous, or None where it equals d_residual
    partial,  # [programs, SUMS, D] float32: weight, bias and LayerScale gradients; None if unwanted
    M,  # B * N
    N,
    d_normed_b,
    d_normed_n,
    d_normed_d,
    d_stream_b,
    d_stream_n,
    d_stream_d,
    stream_b,
    stream_n,
    stream_d,
    branch_b,
    branch_n,
    branch_d,
    eps,
    STEPS,  # row tiles that a program takes; beyond M all is masked
    D: tl.constexpr,
    SUMS: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)
    col_mask = cols < D
    cols64 = cols.to(tl.int64)[None, :]
    if weight is not None:
        gamma = tl.load(weight + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    # Kept two-dimensional and summed once at the end: no exchange between warps inside the loop.
    sum_weight = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    sum_scale = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)

    for step in range(STEPS):
        rows = (step * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        row_mask = rows < M
        mask = row_mask[:, None] & col_mask[None, :]
        b, n = (rows // N).to(tl.int64), (rows % N).to(tl.int64)
        out = rows.to(tl.int64)[:, None] * D + cols64

        place = (b * stream_b + n * stream_n)[:, None] + cols64 * stream_d
        value = tl.load(stream + place, mask=mask, other=0.0).to(tl.float32)
        place = (b * d_normed_b + n * d_normed_n)[:, None] + cols64 * d_normed_d
        dy = tl.load(d_normed + place, mask=mask, other=0.0).to(tl.float32)

        centred, rstd = _statistics(value, mask, D, eps, RMS)
        x_hat = centred * rstd[:, None]
        scaled = dy
        if weight is not None:
            scaled = dy * gamma
        along = tl.sum(scaled * x_hat, axis=1) / D
        dx = scaled - x_hat * along[:, None]
        if not RMS:
            dx -= (tl.sum(scaled, axis=1) / D)[:, None]
        dx *= rstd[:, None]
        if d_stream is not None:
            place = (b * d_stream_b + n * d_stream_n)[:, None] + cols64 * d_stream_d
            dx += tl.load(d_stream + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_residual + out, dx.to(d_residual.dtype.element_ty), mask=mask)

        if partial is not None:
            sum_weight += dy * x_hat
            sum_bias += dy
        dropped = dx
        if drop_scale is not None:
            dropped *= tl.load(drop_scale + b, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        if branch is not None:
            place = (b * branch_b + n * branch_n)[:, None] + cols64 * branch_d
            sum_scale += dropped * tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
        if d_branch is not None:
            if layer_scale is not None:
                gain = tl.load(layer_scale + cols, mask=col_mask, other=0.0).to(tl.float32)
                dropped *= gain[None, :]
            tl.store(d_branch + out, dropped.to(d_branch.dtype.element_ty), mask=mask)

    if partial is not None:
        row = partial + tl.program_id(0).to(tl.int64) * (SUMS * D) + cols
        tl.store(row, tl.sum(sum_weight, axis=0), mask=col_mask)
        tl.store(row + D, tl.sum(sum_bias, axis=0), mask=col_mask)
        if SUMS == 3:
            tl.store(row + 2 * D, tl.sum(sum_scale, axis=0), mask=col_mask)


@dataclass(frozen=True)
class RowConfig:
    """rows: tokens a program holds at once."""

    rows: int
    block_d: int
    num_warps: int


def forward_config(width: int) -> RowConfig:
    """4096 elements a program: 16 a thread, enough 16-byte loads in flight to cover latency."""
    block_d = next_power_of_2(width)
    return RowConfig(max(1, 4096 // block_d), block_d, num_warps=max(8, block_d // 512))


def forward_candidates(width: int) -> list[RowConfig]:
    """From 1024 to 8192 elements a program; a thread holds 8 to 32 of them."""
    block_d = next_power_of_2(width)
    return [
        RowConfig(rows, block_d, warps)
        for rows in sorted({max(1, n // block_d) for n in (1024, 2048, 4096, 8192)})
        for warps in (4, 8, 16)
        if 8 <= rows * block_d // (32 * warps) <= 32
    ]


@dataclass(frozen=True)
class SumConfig(RowConfig):
    """programs: on each multiprocessor; every one takes tile after tile, and sums over its rows.

    Four have about 48 KB of loads in flight, which covers the latency of memory; their partial sums
    are small enough to be read back from L2.
    """

    programs: int = 4


def backward_config(width: int, target: tuple[int, int]) -> SumConfig:
    """2048 elements a program, 8 a thread; in wide rows 4 on Ampere.

    With up to four tensors read and three sums kept, 16 a thread spill where rows of an odd width
    need an address for each element. In rows of 2048, 8 a thread spill one register on sm_80
    (Triton 3.9), and 4 a thread, at 16 warps, two on sm_90 (Triton 3.6).
    """
    block_d = next_power_of_2(width)
    elements = 8 if target >= (9, 0) else 4
    # 32 warps leave a thread 64 registers: on sm_90 too few for the 8 it would have of 8192.
    num_warps = max(8, min(16 if target >= (9, 0) else 32, block_d // (32 * elements)))
    return SumConfig(max(1, 2048 // block_d), block_d, num_warps)


def backward_candidates(width: int) -> list[SumConfig]:
    """From 1024 to 4096 elements a program, 4 or 8 a thread; programs on a multiprocessor.

    In rows of 2048, 4 a thread spill two registers on sm_90 (Triton 3.6), as said above.
    """
    block_d = next_power_of_2(width)
    return [
        SumConfig(rows, block_d, warps, programs)
        for rows in sorted({max(1, n // block_d) for n in (1024, 2048, 4096)})
        for warps in (4, 8, 16)
        if (8 if block_d >= 2048 else 4) <= rows * block_d // (32 * warps) <= 8
        for programs in (2, 4, 8)
    ]


FORWARD = tunable("norm.forward", RowConfig)
BACKWARD = tunable("norm.backward", SumConfig)


def forward(
    residual: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """Launch the forward kernel: (new stream or None, normalised tokens), both contiguous."""
    x = as_rows(residual)
    added = None if branch is None else as_rows(branch)
    layer_scale, drop_scale, weight, bias = map(dense, (layer_scale, drop_scale, weight, bias))
    batch, tokens, width = x.shape
    normed = torch.empty(residual.shape, dtype=out_dtype, device=residual.device)
    stream = None if branch is None else torch.empty_like(normed, dtype=residual.dtype)
    config = FORWARD.pick(
        forward_config(width),
        x.device,
        x.dtype,
        lambda: forward_candidates(width),
        lambda: {
            "m": batch * tokens,
            "d": width,
            "branch": added is not None,
            "rms": rms,
            "scaled": layer_scale is not None,
            "dropped": drop_scale is not None,
            "strided": x.stride(2) != 1,
        },
    )
    launch(
        _norm_forward_kernel,
        (cdiv(batch * tokens, config.rows),),
        x,
        added,
        layer_scale,
        drop_scale,
        weight,
        bias,
        stream,
        normed,
        batch * tokens,
        tokens,
        *x.stride(),
        *strides(added),
        eps,
        D=width,
        RMS=rms,
        ROWS=config.rows,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    return stream, normed


def backward(
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
    sums: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the backward kernel and the sum of its partial rows.

    Returns (d_residual, d_branch or None, [sums, D] parameter gradients; [0, D] with sums=0).
    `branch_dtype` asks for a d_branch of its own.
    """
    dy, x = as_rows(d_normed), as_rows(stream)
    later = None if d_stream is None else as_rows(d_stream)
    added = None if branch is None else as_rows(branch)
    layer_scale, drop_scale, weight = map(dense, (layer_scale, drop_scale, weight))
    batch, tokens, width = x.shape
    d_residual = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
    d_branch = None if branch_dtype is None else torch.empty_like(d_residual, dtype=branch_dtype)
    config = BACKWARD.pick(
        backward_config(width, capability(stream.device)),
        x.device,
        x.dtype,
        lambda: backward_candidates(width),
        lambda: {
            "m": batch * tokens,
            "d": width,
            "later": later is not None,
            "branch": added is not None,
            "d_branch": d_branch is not None,
            "dropped": drop_scale is not None,
            "sums": sums,
            "rms": rms,
            "strided": x.stride(2) != 1,
        },
    )
    tiles = cdiv(batch * tokens, config.rows)
    programs = min(tiles, config.programs * sm_count(stream.device))
    partial = torch.empty(programs, sums, width, dtype=torch.float32, device=stream.device)
    launch(
        _norm_backward_kernel,
        (programs,),
        dy,
        later,
        x,
        added,
        layer_scale,
        drop_scale,
        weight,
        d_residual,
        d_branch,
        partial if sums else None,
        batch * tokens,
        tokens,
        *dy.stride(),
        *strides(later),
        *x.stride(),
        *strides(added),
        eps,
        cdiv(tiles, max(1, programs)),
        D=width,
        SUMS=sums,
        RMS=rms,
        ROWS=config.rows,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    return d_residual, d_branch, column_sum(partial, params_dtype(stream, weight, layer_scale))


def params_dtype(stream: Tensor, weight: Tensor | None, layer_scale: Tensor | None) -> torch.dtype:
    """Of the parameter gradients: the weight's; without one, that of the only other parameter."""
    return next(t.dtype for t in (weight, layer_scale, stream) if t is not None)


def check_affine(op: str, weight: Tensor | None, bias: Tensor | None) -> None:
    """A shift comes with a scale: no norm of PyTorch's has it alone."""
    if weight is None and bias is not None:
        raise ValueError(f"{op}: bias must be None where weight is None")


def as_rows(t: Tensor) -> Tensor:
    """`t` as [B, N, D] with its strides; other ranks become [1, M, D], copied only if they must."""
    return t if t.dim() == 3 else t.reshape(1, -1, t.shape[-1])


def dense(t: Tensor | None) -> Tensor | None:
    """A vector as kernels read it; parameters are dense already."""
    return None if t is None else t.contiguous()


def strides(t: Tensor | None) -> tuple[int, int, int]:
    """Strides of an optional [B, N, D] tensor; zeros where there is none."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


def width_problem(width: int) -> str | None:
    """Why the kernels can't take rows of this width; None where they can."""
    if 0 < width <= MAX_WIDTH:
        return None
    return f"rows of {width} values; the kernels hold 1 to {MAX_WIDTH} in registers"
