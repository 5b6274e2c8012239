"""The forward kernel of every fused linear layer, and the statistics that its norm may need.

    a = x, or norm(x) by the statistics of its rows;  z = a W^T + b
    out = z | act(z) | act(gate) * value | residual + z * layer_scale * drop_scale

The norm stands in the prologue, on the tile in registers, not folded into the weight: with a
float32 stream the fold would have to round x at the size of its mean (docs/design.md has numbers).
Its statistics come as one (mean, sum of squared differences) a row and chunk of columns, so that
the kernel which wrote the rows could leave them behind; merging them loses nothing (Chan et al.,
1979).
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from .._product import product
from .._triton import jit, tl
from .activation import activate


@jit
def place_tile(tile, M, tiles_n, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a tile, walking down GROUP row tiles before moving right.

    Tiles that are made at one time then read few rows and few weights, which L2 holds.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return first + within % height, within // height


@jit
def merge_statistics(
    stats,  # [2, K / CHUNK, M] float32: mean, sum of squared differences of each chunk of columns
    m,  # [BLOCK_M] int64
    m_mask,
    M,
    K,
    eps,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RMS: tl.constexpr,
):
    """(mean, 1 / spread) of rows; the mean is 0 for RMSNorm."""
    chunks = tl.cdiv(K, CHUNK)
    c = tl.arange(0, BLOCK_C)
    mask = (c < chunks)[:, None] & m_mask[None, :]
    rows = c.to(tl.int64)[:, None]
    mean = tl.load(stats + rows * M + m[None, :], mask=mask, other=0.0)
    squares = tl.load(stats + (rows + chunks) * M + m[None, :], mask=mask, other=0.0)
    count = tl.where(c < chunks, tl.minimum(K - c * CHUNK, CHUNK), 0).to(tl.float32)[:, None]
    if RMS:
        centre = tl.zeros([m.shape[0]], dtype=tl.float32)
    else:
        # The mean of differences from the first chunk's: rows far from zero keep their digits.
        first = tl.sum(tl.where((c == 0)[:, None], mean, 0.0), axis=0)
        centre = first + tl.sum((mean - first[None, :]) * count, axis=0) / K
    off = mean - centre[None, :]
    variance = tl.sum(squares + count * off * off, axis=0) / K
    return centre, 1.0 / tl.sqrt(variance + eps)


@jit
def forward_kernel(
    x,  # [M, K], rows x_m apart
    weight,  # [N, K]; gated: [2 N, K], gates first
    bias,  # [N] or [2 N], or None
    stats,  # [2, K / CHUNK, M] float32 of x, or None: no norm, or x is normalised already
    norm_weight,  # [K] or None
    norm_bias,  # [K] or None
    x_hat,  # [M, K]: the rows normalised, or None
    spread,  # [M] float32: 1 / spread of the rows, or None
    pre,  # [M, N] or [M, 2 N]: z, or None
    residual,  # [M, N], rows residual_m apart, or None
    layer_scale,  # [N] or None
    drop_scale,  # [M / tokens] or None
    out,  # [M, N]
    out_stats,  # [2, N / 64, M] float32: statistics of the rows of out, or None
    M,
    N,
    K,
    tokens,
    x_m,
    residual_m,
    eps,
    EVEN_K: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    RMS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_m, tile_n = place_tile(tl.program_id(0), M, tl.cdiv(N, BLOCK_N), BLOCK_M, GROUP)
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    dtype = weight.dtype.element_ty
    if stats is not None:
        mean, rstd = merge_statistics(stats, m, m_mask, M, K, eps, CHUNK, BLOCK_C, RMS)
        if spread is not None and tile_n == 0:
            tl.store(spread + m, rstd, mask=m_mask)

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    value = acc  # of the gate's partner; unused, so free, elsewhere
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_mask, w_mask = m_mask[:, None], n_mask[None, :]
        if not EVEN_K:
            x_mask = x_mask & (k < K)[None, :]
            w_mask = w_mask & (k < K)[:, None]
        a = tl.load(x + (m * x_m)[:, None] + k[None, :], mask=x_mask, other=0.0)
        if stats is not None:
            normed = (a.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if x_hat is not None and tile_n == 0:
                place = (m * K)[:, None] + k[None, :]
                tl.store(x_hat + place, normed.to(x_hat.dtype.element_ty), mask=x_mask)
            a = normed
        if norm_weight is not None:
            k_mask = k < K
            gain = tl.load(norm_weight + k, mask=k_mask, other=0.0).to(tl.float32)
            a = a.to(tl.float32) * gain[None, :]
            if norm_bias is not None:
                a += tl.load(norm_bias + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
        a = a.to(dtype)
        if stats is not None and not EVEN_K:
            a = tl.where(x_mask, a, 0.0)  # the mean was taken off what is not there, too
        place = n[None, :].to(tl.int64) * K + k[:, None]
        w = tl.load(weight + place, mask=w_mask, other=0.0)
        acc = product(a, w, acc, PRECISION)
        if GATED:
            w = tl.load(weight + tl.cast(N, tl.int64) * K + place, mask=w_mask, other=0.0)
            value = product(a, w, value, PRECISION)

    WIDTH: tl.constexpr = BLOCK_N // PARTS
    for part in tl.static_range(PARTS):
        _finish_tile(
            take_columns(acc, part, PARTS), take_columns(value, part, PARTS), tile_n * PARTS + part,
            m, m_mask, M, N, bias, pre, residual, layer_scale, drop_scale, out, out_stats,
            tokens, residual_m, ACT, GATED, BLOCK_M, WIDTH,
        )  # fmt: skip


@jit
def take_columns(tile, part: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS (1, 2 or 4) slices of the columns of a tile [M, N], in registers.

    An epilogue that works on a slice at a time needs registers for one slice's intermediates only.
    """
    if PARTS == 1:
        return tile
    elif PARTS == 2:
        return _take_half(tile, part)
    else:  # not by calling itself: Triton 3.4 would follow that without end
        return _take_half(_take_half(tile, part // 2), part % 2)


@jit
def _take_half(tile, half: tl.constexpr):
    rows: tl.constexpr = tile.shape[0]
    width: tl.constexpr = tile.shape[1] // 2
    first, second = tl.split(tl.permute(tl.reshape(tile, [rows, 2, width]), [0, 2, 1]))
    if half == 0:
        return first
    else:
        return second


@jit
def _finish_tile(
    acc,  # [BLOCK_M, WIDTH]
    value,  # likewise, of the gate's partner
    tile_n,
    m,
    m_mask,
    M,
    N,
    bias,
    pre,
    residual,
    layer_scale,
    drop_scale,
    out,
    out_stats,
    tokens,
    residual_m,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tile_n * WIDTH + tl.arange(0, WIDTH)
    n_mask = n < N
    mask = m_mask[:, None] & n_mask[None, :]
    columns = N
    if GATED:
        columns = 2 * N
    place = (m * columns)[:, None] + n[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    if pre is not None:
        tl.store(pre + place, acc.to(pre.dtype.element_ty), mask=mask)
    y = activate(acc, ACT)
    if GATED:
        if bias is not None:
            value += tl.load(bias + N + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if pre is not None:
            tl.store(pre + N + place, value.to(pre.dtype.element_ty), mask=mask)
        y *= value
    if residual is not None:
        if layer_scale is not None:
            y *= tl.load(layer_scale + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        if drop_scale is not None:
            kept = tl.load(drop_scale + m // tokens, mask=m_mask, other=0.0).to(tl.float32)
            y *= kept[:, None]
        row = residual + (m * residual_m)[:, None]
        y += tl.load(row + n[None, :], mask=mask, other=0.0).to(tl.float32)
    rounded = y.to(out.dtype.element_ty)
    tl.store(out + (m * N)[:, None] + n[None, :], rounded, mask=mask)
    if out_stats is not None:
        store_statistics(out_stats, rounded, mask, m, m_mask, tile_n, M, N, BLOCK_M, WIDTH)


@jit
def store_statistics(
    stats,  # [2, N / 64, M] float32
    tile,  # [BLOCK_M, BLOCK_N], as stored
    mask,
    m,
    m_mask,
    tile_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mean and sum of squared differences of each row's chunks of 64 columns."""
    PIECES: tl.constexpr = BLOCK_N // 64
    chunks = tl.cdiv(N, 64)
    chunk = tile_n * PIECES + tl.arange(0, PIECES)
    count = tl.minimum(N - chunk * 64, 64)
    size = tl.maximum(count, 1).to(tl.float32)[None, :]
    value = tl.where(mask, tile.to(tl.float32), 0.0)
    pieces = tl.reshape(value, [BLOCK_M, PIECES, 64])
    mean = tl.sum(pieces, axis=2) / size
    exists = tl.arange(0, 64)[None, None, :] < count[None, :, None]
    off = tl.where(exists, pieces - mean[:, :, None], 0.0)
    squares = tl.sum(off * off, axis=2)
    rows = chunk.to(tl.int64)[None, :]
    there = m_mask[:, None] & (chunk < chunks)[None, :]
    tl.store(stats + rows * M + m[:, None], mean, mask=there)
    tl.store(stats + (rows + chunks) * M + m[:, None], squares, mask=there)


@jit
def statistics_kernel(
    x,  # [M, K], rows x_m apart
    stats,  # [2, 1, M] float32: mean, sum of squared differences
    M,
    K,
    x_m,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    m_mask = m < M
    mask = m_mask[:, None] & (k < K)[None, :]
    value = tl.load(x + (m * x_m)[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / K
    off = tl.where(mask, value - mean[:, None], 0.0)
    tl.store(stats + m, mean, mask=m_mask)
    tl.store(stats + M + m, tl.sum(off * off, axis=1), mask=m_mask)
