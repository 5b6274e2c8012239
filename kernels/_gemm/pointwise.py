"""The steps around a product that PyTorch's own library computes: each one pass over memory.

    norm_kernel      x -> x_hat, x_hat * g + h, 1 / spread
    act_kernel       z -> act(z), act(gate) * value
    slope_kernel     gradient of act(z), z -> gradient of z, act(z); sums of the former over tokens
    scale_kernel     gradient of the stream -> that of the layer before and behind LayerScale; sums
    residual_kernel  residual, branch -> stream, statistics of its rows

Sums over tokens are two-stage: a program writes float32 sums of its rows, ``_reduce.py`` adds them.
All configs are predictions: from registers as compiled, not from timing.
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._configs import tunable
from .._launch import cdiv, launch, next_power_of_2, sm_count
from .._norm import RowConfig, _statistics, as_rows, forward_candidates, forward_config
from .._reduce import column_sum
from .._triton import jit, tl
from .activation import activate, derive
from .forward import store_statistics
from .launch import Norm, as_matrix, dense


@jit
def norm_kernel(
    x,  # [B, N, D] by strides
    weight,  # [D] or None
    bias,  # [D] or None
    x_hat,  # [B * N, D]: the rows normalised, or None
    out,  # [B * N, D]: x_hat * weight + bias, or None
    spread,  # [B * N] float32: 1 / spread, or None
    M,  # B * N
    N,
    x_b,
    x_n,
    x_d,
    eps,
    D: tl.constexpr,
    NORMALISED: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    row_mask, col_mask = rows < M, cols < D
    mask = row_mask[:, None] & col_mask[None, :]
    b, n = (rows // N).to(tl.int64), (rows % N).to(tl.int64)
    own = rows.to(tl.int64)[:, None] * D + cols[None, :]
    place = (b * x_b + n * x_n)[:, None] + cols.to(tl.int64)[None, :] * x_d
    y = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if not NORMALISED:
        centred, rstd = _statistics(y, mask, D, eps, RMS)
        y = centred * rstd[:, None]
        if spread is not None:
            tl.store(spread + rows, rstd, mask=row_mask)
    if x_hat is not None:
        tl.store(x_hat + own, y.to(x_hat.dtype.element_ty), mask=mask)
    if out is not None:
        if weight is not None:
            y *= tl.load(weight + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            y += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(out + own, y.to(out.dtype.element_ty), mask=mask)


@jit
def _place(M, N, step, groups, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows [ROWS] int64, columns [BLOCK_N]) of a program's tile number `step`.

    Programs stand column by column of tiles; those of one column, `groups` many, take turns.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = step * groups + tl.program_id(0) // tiles_n
    m = (row * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return m, tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)


@jit
def act_kernel(
    z,  # [M, N]; gated [M, 2 N]
    out,  # [M, N]; may be z
    M,
    N,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m, n = _place(M, N, 0, 0, ROWS, BLOCK_N)
    mask = (m < M)[:, None] & (n < N)[None, :]
    own = (m * N)[:, None] + n[None, :]
    place = own
    if GATED:
        place += (m * N)[:, None]
    y = activate(tl.load(z + place, mask=mask, other=0.0).to(tl.float32), ACT)
    if GATED:
        y *= tl.load(z + N + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + own, y.to(out.dtype.element_ty), mask=mask)


@jit
def slope_kernel(
    dy,  # [M, N], rows dy_m apart: gradient of act(z)
    z,  # [M, N]; gated [M, 2 N]
    dz,  # like z
    hidden,  # [M, N]: act(z), made again, or None
    partial,  # [groups, columns of z] float32: sums of dz, or None
    M,
    N,
    dy_m,
    groups,
    STEPS,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = N
    if GATED:
        columns = 2 * N
    total = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    total_value = total  # of the gate's partner; unused, so free, elsewhere
    for step in range(STEPS):
        m, n = _place(M, N, step, groups, ROWS, BLOCK_N)
        mask = (m < M)[:, None] & (n < N)[None, :]
        place = (m * columns)[:, None] + n[None, :]
        g = tl.load(dy + (m * dy_m)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        y, slope = derive(tl.load(z + place, mask=mask, other=0.0).to(tl.float32), ACT)
        if GATED:
            value = tl.load(z + N + place, mask=mask, other=0.0).to(tl.float32)
            of_value = (g * y).to(dz.dtype.element_ty)
            tl.store(dz + N + place, of_value, mask=mask)
            total_value += of_value.to(tl.float32)
            g *= value
            y *= value
        rounded = (g * slope).to(dz.dtype.element_ty)
        tl.store(dz + place, rounded, mask=mask)
        total += rounded.to(tl.float32)
        if hidden is not None:
            own = (m * N)[:, None] + n[None, :]
            tl.store(hidden + own, y.to(hidden.dtype.element_ty), mask=mask)
    if partial is not None:
        tiles_n = tl.cdiv(N, BLOCK_N)
        n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row = partial + (tl.program_id(0) // tiles_n).to(tl.int64) * columns + n
        tl.store(row, tl.sum(total, axis=0), mask=n < N)
        if GATED:
            tl.store(row + N, tl.sum(total_value, axis=0), mask=n < N)


@jit
def scale_kernel(
    dy,  # [M, N], rows dy_m apart
    drop_scale,  # [M / tokens] or None
    layer_scale,  # [N] or None
    g,  # [M, N]: dy * drop_scale, or None
    scaled,  # [M, N]: that * layer_scale, or None
    partial,  # [groups, N] float32: sums of g, or None
    M,
    N,
    tokens,
    dy_m,
    groups,
    STEPS,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    total = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for step in range(STEPS):
        m, n = _place(M, N, step, groups, ROWS, BLOCK_N)
        mask = (m < M)[:, None] & (n < N)[None, :]
        own = (m * N)[:, None] + n[None, :]
        d = tl.load(dy + (m * dy_m)[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if drop_scale is not None:
            d *= tl.load(drop_scale + m // tokens, mask=m < M, other=0.0).to(tl.float32)[:, None]
        rounded = d
        if g is not None:
            stored = d.to(g.dtype.element_ty)
            tl.store(g + own, stored, mask=mask)
            rounded = stored.to(tl.float32)
        total += rounded
        if scaled is not None:
            gain = tl.load(layer_scale + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(scaled + own, (d * gain[None, :]).to(scaled.dtype.element_ty), mask=mask)
    if partial is not None:
        tiles_n = tl.cdiv(N, BLOCK_N)
        n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row = partial + (tl.program_id(0) // tiles_n).to(tl.int64) * N
        tl.store(row + n, tl.sum(total, axis=0), mask=n < N)


@jit
def residual_kernel(
    residual,  # [M, N], rows residual_m apart
    branch,  # [M, N], rows branch_m apart
    layer_scale,  # [N] or None
    drop_scale,  # [M / tokens] or None
    out,  # [M, N]
    out_stats,  # [2, N / 64, M] float32: statistics of the rows of out, or None
    M,
    N,
    tokens,
    residual_m,
    branch_m,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    m, n = _place(M, N, 0, 0, ROWS, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    mask = m_mask[:, None] & n_mask[None, :]
    place = (m * branch_m)[:, None] + n[None, :]
    y = tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
    if layer_scale is not None:
        y *= tl.load(layer_scale + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    if drop_scale is not None:
        y *= tl.load(drop_scale + m // tokens, mask=m_mask, other=0.0).to(tl.float32)[:, None]
    place = (m * residual_m)[:, None] + n[None, :]
    y += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(out.dtype.element_ty)
    tl.store(out + (m * N)[:, None] + n[None, :], rounded, mask=mask)
    if out_stats is not None:
        tile_n = tl.program_id(0) % tl.cdiv(N, BLOCK_N)
        store_statistics(out_stats, rounded, mask, m, m_mask, tile_n, M, N, ROWS, BLOCK_N)


@dataclass(frozen=True)
class TileConfig:
    """Rows and columns of a tile; programs: of those that sum over rows, on a multiprocessor."""

    rows: int
    columns: int
    num_warps: int = 4
    programs: int = 4


def tile_config(width: int) -> TileConfig:
    """2048 elements, 16 a thread: of 16-bit values two wide loads a tensor.

    The widths of ViTs are multiples of 128 at least, so that no lane of a column of tiles is idle;
    64 columns are one chunk of statistics.
    """
    columns = 256 if width % 256 == 0 else max(64, min(128, next_power_of_2(width)))
    return TileConfig(2048 // columns, columns)


def tile_candidates(width: int, sums: bool) -> list[TileConfig]:
    """8 or 16 elements a thread; and where rows are summed, other numbers of programs."""
    columns = tile_config(width).columns
    wide = [512] if width % 512 == 0 else []
    return [
        TileConfig(elements // across, across, warps, programs)
        for across in [columns, *wide]
        for elements, warps in ((1024, 4), (2048, 4), (4096, 8), (2048, 8))
        for programs in ((2, 4, 8) if sums and across == columns else (4,))
    ]


NORM = tunable("pointwise.norm", RowConfig)
ACT = tunable("pointwise.act", TileConfig)
SLOPE = tunable("pointwise.slope", TileConfig)
SCALE = tunable("pointwise.scale", TileConfig)
ADD = tunable("pointwise.add", TileConfig)


class Turns(NamedTuple):
    """groups: programs that share a column of tiles; steps: tiles that each takes."""

    groups: int
    steps: int


def turns(rows: int, width: int, config: TileConfig, sums: bool, device: torch.device) -> Turns:
    """One tile a program; for sums over the rows, by default four programs a multiprocessor.

    So many run at once, whatever registers the kernel takes; more would come in a second, partial
    wave. Their loads in flight, 16 KB and more, cover the latency of memory.
    """
    tiles = cdiv(rows, config.rows)
    wave = config.programs * sm_count(device)
    wanted = cdiv(wave, cdiv(width, config.columns)) if sums else tiles
    groups = min(tiles, wanted)
    return Turns(groups, cdiv(tiles, max(1, groups)))


def normalise(
    x: Tensor, norm: Norm, normalised: bool, saved: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(norm(x), x_hat or None, 1 / spread or None): [M, D] in `dtype`, the last [M] float32.

    The first two are one where the norm has no weight. `normalised` rows only get their weight; the
    last two are None for them, and unless `saved`.
    """
    rows = as_rows(x)
    batch, tokens, width = rows.shape
    saving = saved and not normalised
    affine = norm.weight is not None
    if normalised and not affine:
        return as_matrix(x).to(dtype), None, None
    config = NORM.pick(
        forward_config(width),
        x.device,
        x.dtype,
        lambda: forward_candidates(width),
        lambda: {
            "m": batch * tokens,
            "k": width,
            "saved": saving,
            "affine": affine,
            "normalised": normalised,
        },
    )
    x_hat = x.new_empty(batch * tokens, width, dtype=dtype) if saving else None
    out = x.new_empty(batch * tokens, width, dtype=dtype) if affine or not saving else None
    spread = x.new_empty(batch * tokens, dtype=torch.float32) if saving else None
    launch(
        norm_kernel,
        (cdiv(batch * tokens, config.rows),),
        rows,
        dense(norm.weight),
        dense(norm.bias),
        x_hat,
        out,
        spread,
        batch * tokens,
        tokens,
        *rows.stride(),
        norm.eps,
        D=width,
        NORMALISED=normalised,
        RMS=norm.rms,
        ROWS=config.rows,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    result = x_hat if out is None else out
    assert result is not None
    return result, x_hat, spread


def act(z: Tensor, activation: str, gated: bool, keep: bool) -> Tensor:
    """act(z) or act(gate) * value of z [M, F]; over z itself where nobody else needs it."""
    rows, features = z.shape
    width = features // 2 if gated else features
    out = z.new_empty(rows, width) if keep or gated else z
    config = ACT.pick(
        tile_config(width),
        z.device,
        z.dtype,
        lambda: tile_candidates(width, False),
        lambda: {
            "m": rows,
            "n": width,
            "act": activation,
            "gated": gated,
        },
    )
    launch(
        act_kernel,
        (cdiv(rows, config.rows) * cdiv(width, config.columns),),
        z,
        out,
        rows,
        width,
        ACT=activation,
        GATED=gated,
        ROWS=config.rows,
        BLOCK_N=config.columns,
        num_warps=config.num_warps,
    )
    return out


def slope(
    dy: Tensor, z: Tensor, activation: str, gated: bool, hidden: bool = False, sums: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gradient of z, act(z) if `hidden`, partial sums of the first if `sums`) of z [..., F].

    All are matrices, the first two in the dtype of z.
    """
    g, pre = as_matrix(dy), as_matrix(z)
    rows, width = g.shape
    dz = torch.empty_like(pre, memory_format=torch.contiguous_format)
    again = z.new_empty(rows, width) if hidden else None
    config = SLOPE.pick(
        tile_config(width),
        z.device,
        z.dtype,
        lambda: tile_candidates(width, sums),
        lambda: {
            "m": rows,
            "n": width,
            "act": activation,
            "gated": gated,
            "hidden": hidden,
            "sums": sums,
        },
    )
    groups, steps = turns(rows, width, config, sums, z.device)
    partial = z.new_empty(groups, pre.shape[1], dtype=torch.float32) if sums else None
    launch(
        slope_kernel,
        (groups * cdiv(width, config.columns),),
        g,
        pre.contiguous(),
        dz,
        again,
        partial,
        rows,
        width,
        g.stride(0),
        groups,
        steps,
        ACT=activation,
        GATED=gated,
        ROWS=config.rows,
        BLOCK_N=config.columns,
        num_warps=config.num_warps,
    )
    return dz, again, partial


def scale(
    dy: Tensor,
    dtype: torch.dtype,
    drop_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    need_x: bool = True,
    need_params: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dy * drop_scale, that * layer_scale, partial sums of the first) in `dtype`, as matrices.

    The first and the sums are those of the parameters, the second is that of the layer's input;
    what is not needed is not made, and what would be `dy` itself, or the other, is that.
    """
    d = as_matrix(dy)
    rows, width = d.shape
    as_it_is = drop_scale is None and d.dtype == dtype
    apart = layer_scale is not None
    g = scaled = partial = None
    if not as_it_is and (need_params or not apart):
        g = d.new_empty(rows, width, dtype=dtype)
    if apart and need_x:
        scaled = d.new_empty(rows, width, dtype=dtype)
    config = SCALE.pick(
        tile_config(width),
        d.device,
        d.dtype,
        lambda: tile_candidates(width, need_params),
        lambda: {
            "m": rows,
            "n": width,
            "own": g is not None,
            "scaled": scaled is not None,
            "sums": need_params,
        },
    )
    groups, steps = turns(rows, width, config, need_params, d.device)
    if need_params:
        partial = d.new_empty(groups, width, dtype=torch.float32)
    if g is not None or scaled is not None or need_params:
        launch(
            scale_kernel,
            (groups * cdiv(width, config.columns),),
            d,
            dense(drop_scale),
            dense(layer_scale),
            g,
            scaled,
            partial,
            rows,
            width,
            tokens_each(rows, drop_scale),
            d.stride(0),
            groups,
            steps,
            ROWS=config.rows,
            BLOCK_N=config.columns,
            num_warps=config.num_warps,
        )
    g = d if g is None else g
    return g, g if scaled is None else scaled, partial


def total(partial: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum over tokens, of partial sums that were asked for."""
    assert partial is not None
    return column_sum(partial, dtype)


def tokens_each(rows: int, drop_scale: Tensor | None) -> int:
    """How many rows share a factor of `drop_scale`."""
    return 1 if drop_scale is None else max(1, rows // max(1, drop_scale.shape[0]))


def add(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    out: Tensor,
    out_stats: Tensor | None = None,
) -> None:
    """Fill `out` with residual + branch * layer_scale * drop_scale, and the statistics of it."""
    stream, added = as_matrix(residual), as_matrix(branch)
    rows, width = stream.shape
    config = ADD.pick(
        tile_config(width),
        added.device,
        added.dtype,
        lambda: tile_candidates(width, False),
        lambda: {
            "m": rows,
            "n": width,
            "stats": out_stats is not None,
            "wide": stream.dtype == torch.float32,
        },
    )
    launch(
        residual_kernel,
        (cdiv(rows, config.rows) * cdiv(width, config.columns),),
        stream,
        added,
        dense(layer_scale),
        dense(drop_scale),
        out,
        out_stats,
        rows,
        width,
        tokens_each(rows, drop_scale),
        stream.stride(0),
        added.stride(0),
        ROWS=config.rows,
        BLOCK_N=config.columns,
        num_warps=config.num_warps,
    )
