"""The backward kernels of every fused linear layer.

For a layer z = a W^T + b, in at most three launches:

    input_grad_kernel    d_a = dz W                  dz may still have to be made of the gradient of
                                                     what followed z; or d_a may go on through the
                                                     activation that made a
    weight_grad_kernel   dW = dz^T a, db = sum dz    over a split of the tokens, as partial sums
    finish_kernel        adds the splits up; gradients of LayerScale and of the norm; and, behind a
                         norm, the gradient of its input and of the residual stream around it

The gradients of LayerScale and of the norm's weight and bias follow from dW and db by sums over
weights, not over tokens, so neither the branch nor the normalised input is needed again:

    branch = gamma * (a W^T + b)        d_gamma_n = sum_k dW'_nk W_nk + db'_n b_n,   dW = gamma dW'
    a = x_hat * g + h                   d_g_k = sum_n dW'_nk W_nk,   d_h_k = sum_n db_n W_nk,
                                        dW = dW' * g + db h^T              with dW' = dz^T x_hat

No atomics: every partial sum has a place of its own, and they are added in a fixed order.
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from .._product import product
from .._triton import jit, tl
from .activation import derive
from .forward import place_tile, take_columns


@jit
def input_grad_kernel(
    dy,  # [M, N] (N / 2 columns if it is that of a gated pair), rows dy_m apart
    weight,  # [N, K]
    drop_scale,  # [M / tokens] or None: dy is that of the stream behind the branch
    layer_scale,  # [N] or None
    z,  # [M, N]: dy is the gradient of act(z), or None: it is that of z
    dz,  # [M, N]: the gradient of z, before layer_scale, or None where dy is just that
    pre,  # [M, K] or [M, 2 K]: the layer's input was act(pre), or None
    hidden,  # [M, K]: that input, made again, or None
    dx,  # [M, K]; with pre its gradient, of the same shape
    M,
    N,
    K,
    tokens,
    dy_m,
    EVEN_N: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    tile_m, tile_k = place_tile(tl.program_id(0), M, tl.cdiv(K, BLOCK_K), BLOCK_M, GROUP)
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_mask, k_mask = m < M, k < K
    dtype = weight.dtype.element_ty
    if drop_scale is not None:
        kept = tl.load(drop_scale + m // tokens, mask=m_mask, other=0.0).to(tl.float32)

    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask, w_mask = m_mask[:, None], k_mask[None, :]
        if not EVEN_N:
            mask = mask & (n < N)[None, :]
            w_mask = w_mask & (n < N)[:, None]
        column = n
        if z is not None and GATED:
            column = n % (N // 2)
        g = tl.load(dy + (m * dy_m)[:, None] + column[None, :], mask=mask, other=0.0)
        place = (m * N)[:, None] + n[None, :]
        if drop_scale is not None:
            g = g.to(tl.float32) * kept[:, None]
        if z is not None:
            if GATED:
                pair = (m * N)[:, None] + column[None, :]
                gate = tl.load(z + pair, mask=mask, other=0.0).to(tl.float32)
                value = tl.load(z + N // 2 + pair, mask=mask, other=0.0).to(tl.float32)
                y, slope = derive(gate, ACT)
                g = g.to(tl.float32) * tl.where((n < N // 2)[None, :], value * slope, y)
            else:
                slope = derive(tl.load(z + place, mask=mask, other=0.0).to(tl.float32), ACT)[1]
                g = g.to(tl.float32) * slope
        if dz is not None and tile_k == 0:
            tl.store(dz + place, g.to(dz.dtype.element_ty), mask=mask)
        if layer_scale is not None:
            gain = tl.load(layer_scale + n, mask=n < N, other=0.0).to(tl.float32)
            g = g.to(tl.float32) * gain[None, :]
        w = tl.load(weight + n.to(tl.int64)[:, None] * K + k[None, :], mask=w_mask, other=0.0)
        acc = product(g.to(dtype), w, acc, PRECISION)

    WIDTH: tl.constexpr = BLOCK_K // PARTS
    for part in tl.static_range(PARTS):
        _finish_tile(
            take_columns(acc, part, PARTS), tile_k * PARTS + part, m, m_mask, K, pre, hidden, dx,
            ACT, GATED, WIDTH,
        )  # fmt: skip


@jit
def _finish_tile(
    acc,  # [BLOCK_M, WIDTH]
    tile_k,
    m,
    m_mask,
    K,
    pre,
    hidden,
    dx,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    k = tile_k * WIDTH + tl.arange(0, WIDTH)
    mask = m_mask[:, None] & (k < K)[None, :]
    own = (m * K)[:, None] + k[None, :]
    if pre is None:
        tl.store(dx + own, acc.to(dx.dtype.element_ty), mask=mask)
    elif GATED:
        place = own + (m * K)[:, None]
        gate = tl.load(pre + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(pre + K + place, mask=mask, other=0.0).to(tl.float32)
        y, slope = derive(gate, ACT)
        tl.store(dx + place, (acc * value * slope).to(dx.dtype.element_ty), mask=mask)
        tl.store(dx + K + place, (acc * y).to(dx.dtype.element_ty), mask=mask)
        if hidden is not None:
            tl.store(hidden + own, (y * value).to(hidden.dtype.element_ty), mask=mask)
    else:
        y, slope = derive(tl.load(pre + own, mask=mask, other=0.0).to(tl.float32), ACT)
        tl.store(dx + own, (acc * slope).to(dx.dtype.element_ty), mask=mask)
        if hidden is not None:
            tl.store(hidden + own, y.to(hidden.dtype.element_ty), mask=mask)


@jit
def weight_grad_kernel(
    dz,  # [M, N], rows dz_m apart
    a,  # [M, K], rows a_m apart
    partial,  # [SPLITS, N, K] float32
    bias_partial,  # [SPLITS, N] float32, or None
    M,
    N,
    K,
    dz_m,
    a_m,
    STEPS,  # tiles of tokens that a split takes
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    split, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    tile_k = tile % tiles_k
    n = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n_mask, k_mask = n < N, k < K
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    lost = tl.zeros([BLOCK_N], dtype=tl.float32)
    for step in range(STEPS):
        m = ((split * STEPS + step) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_mask = (m < M)[:, None]
        g = tl.load(dz + (m * dz_m)[:, None] + n[None, :], mask=m_mask & n_mask[None, :], other=0.0)
        x = tl.load(a + (m * a_m)[:, None] + k[None, :], mask=m_mask & k_mask[None, :], other=0.0)
        acc = product(tl.trans(g), x, acc, PRECISION)
        if bias_partial is not None and tile_k == 0:
            # Kahan's sum: a plain one over hundreds of steps errs more than twice PyTorch's.
            term = tl.sum(g.to(tl.float32), axis=0) - lost
            raised = total + term
            lost = (raised - total) - term
            total = raised
    row = (split * N + n).to(tl.int64)
    mask = n_mask[:, None] & k_mask[None, :]
    tl.store(partial + row[:, None] * K + k[None, :], acc, mask=mask)
    if bias_partial is not None and tile_k == 0:
        tl.store(bias_partial + row, total, mask=n_mask)


@jit
def finish_kernel(
    partial,  # [SPLITS, N, K] float32
    bias_partial,  # [SPLITS, N] float32, or None
    weight,  # [N, K]; read for the gradient of layer_scale only
    bias,  # [N] or None; likewise
    layer_scale,  # [N] or None
    d_weight,  # [N, K]
    d_bias,  # [N] or None
    d_layer_scale,  # [N] or None
    N,
    K,
    SPLITS,
    BLOCK_K: tl.constexpr,
):
    """One row of the weight: the sum of its splits, times layer_scale; and the gradient of that."""
    n = tl.program_id(0)
    gain = 1.0
    if layer_scale is not None:
        gain = tl.load(layer_scale + n).to(tl.float32)
    along = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = k < K
        place = n.to(tl.int64) * K + k
        total = tl.zeros([BLOCK_K], dtype=tl.float32)
        for split in range(SPLITS):
            row = partial + tl.cast(split, tl.int64) * N * K
            total += tl.load(row + place, mask=mask, other=0.0)
        if d_layer_scale is not None:
            along += total * tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_weight + place, (total * gain).to(d_weight.dtype.element_ty), mask=mask)
    of_gain = tl.sum(along, axis=0)
    if bias_partial is not None:
        total_bias = tl.full([], 0.0, dtype=tl.float32)
        for split in range(SPLITS):
            total_bias += tl.load(bias_partial + split * N + n)
        if d_layer_scale is not None and bias is not None:
            of_gain += total_bias * tl.load(bias + n).to(tl.float32)
        if d_bias is not None:
            tl.store(d_bias + n, (total_bias * gain).to(d_bias.dtype.element_ty))
    if d_layer_scale is not None:
        tl.store(d_layer_scale + n, of_gain.to(d_layer_scale.dtype.element_ty))


@jit
def norm_finish_kernel(
    d_a,  # [M, K]: gradient of the norm's output
    d_stream,  # [M, K], rows stream_m apart, or None: the stream's from later layers
    x_hat,  # [M, K]
    spread,  # [M] float32: 1 / spread
    norm_weight,  # [K] or None
    norm_bias,  # [K] or None
    dx,  # [M, K], or None where it is not wanted
    partial,  # [SPLITS, N, K] float32, or None where no parameter wants a gradient
    bias_partial,  # [SPLITS, N] float32
    weight,  # [N, K]
    d_weight,  # [N, K]
    d_bias,  # [N]
    d_norm,  # [2, K]: of the norm's weight and bias, or None without them
    M,
    N,
    K,
    stream_m,
    SPLITS,
    columns,  # programs that finish columns of the weight; the others take rows of tokens
    RMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What is left behind a norm, in one launch: two kinds of programs, both bound by memory.

    Columns of the weight come first in the grid, since each takes longest.
    """
    if tl.program_id(0) < columns:
        if partial is not None:
            _finish_columns(
                partial, bias_partial, weight, norm_weight, norm_bias, d_weight, d_bias, d_norm,
                N, K, SPLITS, BLOCK_R, BLOCK_C,
            )  # fmt: skip
    elif dx is not None:
        m = ((tl.program_id(0) - columns) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        m_mask = m < M
        mask = m_mask[:, None] & (k < K)[None, :]
        place = (m * K)[:, None] + k[None, :]
        g = tl.load(d_a + place, mask=mask, other=0.0).to(tl.float32)
        if norm_weight is not None:
            g *= tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        normed = tl.load(x_hat + place, mask=mask, other=0.0).to(tl.float32)
        d = g - normed * (tl.sum(g * normed, axis=1) / K)[:, None]
        if not RMS:
            d -= (tl.sum(g, axis=1) / K)[:, None]
        d *= tl.load(spread + m, mask=m_mask, other=0.0)[:, None]
        if d_stream is not None:
            row = d_stream + (m * stream_m)[:, None]
            d += tl.load(row + k[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=mask)


@jit
def _split(partial, split, SPLITS, size, place, mask):
    """What lies at `place` in one of the splits; zeros behind the last."""
    at = tl.cast(split, tl.int64)
    return tl.load(partial + at * size + place, mask=mask & (at < SPLITS), other=0.0)


@jit
def _finish_columns(
    partial,
    bias_partial,
    weight,
    norm_weight,
    norm_bias,
    d_weight,
    d_bias,
    d_norm,
    N,
    K,
    SPLITS,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    k = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k_mask = k < K
    gain = tl.zeros([BLOCK_C], dtype=tl.float32) + 1.0
    if norm_weight is not None:
        gain = tl.load(norm_weight + k, mask=k_mask, other=0.0).to(tl.float32)
    shift = tl.zeros([BLOCK_C], dtype=tl.float32)
    if norm_bias is not None:
        shift = tl.load(norm_bias + k, mask=k_mask, other=0.0).to(tl.float32)
    of_gain = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    of_shift = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(0, N, BLOCK_R):
        n = start + tl.arange(0, BLOCK_R)
        n_mask = n < N
        mask = n_mask[:, None] & k_mask[None, :]
        place = n.to(tl.int64)[:, None] * K + k[None, :]
        if d_norm is not None:  # before the sums: its way from memory is a long one, too
            w = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
        total_bias = tl.zeros([BLOCK_R], dtype=tl.float32)
        # These programs are few and wait for memory: four splits at a time are on their way.
        for split in range(0, SPLITS, 4):
            first = _split(partial, split, SPLITS, N * K, place, mask)
            second = _split(partial, split + 1, SPLITS, N * K, place, mask)
            third = _split(partial, split + 2, SPLITS, N * K, place, mask)
            fourth = _split(partial, split + 3, SPLITS, N * K, place, mask)
            of_bias = _split(bias_partial, split, SPLITS, N, n, n_mask)
            of_bias += _split(bias_partial, split + 1, SPLITS, N, n, n_mask)
            of_bias += _split(bias_partial, split + 2, SPLITS, N, n, n_mask)
            of_bias += _split(bias_partial, split + 3, SPLITS, N, n, n_mask)
            total += (first + second) + (third + fourth)
            total_bias += of_bias
        if d_norm is not None:
            of_gain += total * w
            of_shift += total_bias[:, None] * w
        whole = total * gain[None, :] + total_bias[:, None] * shift[None, :]
        tl.store(d_weight + place, whole.to(d_weight.dtype.element_ty), mask=mask)
        if d_bias is not None and tl.program_id(0) == 0:
            tl.store(d_bias + n, total_bias.to(d_bias.dtype.element_ty), mask=n_mask)
    if d_norm is not None:
        tl.store(d_norm + k, tl.sum(of_gain, axis=0).to(d_norm.dtype.element_ty), mask=k_mask)
        row = d_norm + K + k
        tl.store(row, tl.sum(of_shift, axis=0).to(d_norm.dtype.element_ty), mask=k_mask)
