"""The Triton kernels of patch_embed: one forward, one for each gradient."""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from .._product import product
from .._triton import jit, tl


@jit
def _gather(
    images,
    mean,
    std,
    flipped,  # [BLOCK_M] whether the row's sample is flipped, or None
    base,  # [BLOCK_M] offset of the row's image
    top,  # [BLOCK_M] first image row of the patch
    left,  # [BLOCK_M] first image column of the patch
    valid,  # [BLOCK_M]
    k,  # [BLOCK_K]
    H,
    W,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Normalised patch values [BLOCK_M, BLOCK_K] as DTYPE."""
    if CHANNELS_LAST:  # k = (p, q, c): neighbours in k are neighbours in memory
        c, p, q = k % C, k // (Q * C), (k // C) % Q
    else:  # k = (c, p, q)
        c, p, q = k // (P * Q), (k // Q) % P, k % Q
    mask = valid[:, None]
    if not EVEN_K:
        mask = mask & (k < C * P * Q)[None, :]
    if PADDED:
        mask = mask & (top[:, None] + p[None, :] < H) & (left[:, None] + q[None, :] < W)
    if flipped is not None:
        column = left[:, None] + q[None, :]
        column = tl.where(flipped[:, None], W - 1 - column, column).to(tl.int64)
        row = base + top.to(tl.int64) * stride_h
        within = c.to(tl.int64) * stride_c + p.to(tl.int64) * stride_h
        offsets = row[:, None] + within[None, :] + column * stride_w
    else:
        row = base + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
        if CHANNELS_LAST:
            # The launcher has checked stride_c == 1 and stride_w == C: one run of Q * C values.
            within = p.to(tl.int64) * stride_h + k % (Q * C)
        else:
            within = c.to(tl.int64) * stride_c + p.to(tl.int64) * stride_h
            within += q.to(tl.int64) * stride_w
        offsets = row[:, None] + within[None, :]
    x = tl.load(images + offsets, mask=mask, other=0)
    if mean is not None:
        in_range = c < C
        shift = tl.load(mean + c, mask=in_range, other=0.0).to(tl.float32)
        gain = 1.0 / tl.load(std + c, mask=in_range, other=1.0).to(tl.float32)
        x = x.to(tl.float32)
        if BYTES:
            # x / 255 - shift as (x - 255 shift) / 255, with what rounding 255 shift loses taken off
            # too: it would be the same for every pixel, and add up in a weight's gradient.
            scaled = 256.0 * shift - shift
            x = (x - scaled[None, :]) - ((256.0 * shift - scaled) - shift)[None, :]
            gain = gain / 255.0
        else:
            x = x - shift[None, :]
        x = tl.where(mask, x * gain[None, :], 0.0)
    return x.to(DTYPE)


@jit
def forward_kernel(
    images,  # [B, C, H, W] by strides
    weight,  # [D, KP] in the compute dtype, zero beyond K
    bias,  # [D] or None
    pos,  # [N or T + N, D] or None
    prefix,  # [T, D] or None
    mean,  # [C] or None
    std,  # [C] or None
    flip,  # [B] uint8 or None
    out,  # [B, T + N, D] contiguous
    B,
    H,
    W,
    GRID_W,
    N,
    T,
    D,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    KP: tl.constexpr,
    POS_PREFIX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDED: tl.constexpr,
    BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Column tiles of one row tile are neighbours, so the gathered images come from L2 after the
    # first of them.
    tiles_n = tl.cdiv(D, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    d = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_mask = d < D
    tiles_patch = tl.cdiv(B * N, BLOCK_M)

    if tile_m < tiles_patch:
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = m < B * N
        b, n = m // N, m % N
        base = b.to(tl.int64) * stride_b
        top, left = (n // GRID_W) * P, (n % GRID_W) * Q
        flipped = None
        if flip is not None:
            flipped = tl.load(flip + b, mask=valid, other=0) != 0
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, KP, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = _gather(
                images,
                mean,
                std,
                flipped,
                base,
                top,
                left,
                valid,
                k,
                H,
                W,
                stride_c,
                stride_h,
                stride_w,
                C,
                P,
                Q,
                CHANNELS_LAST,
                PADDED,
                (C * P * Q) % BLOCK_K == 0,
                BYTES,
                weight.dtype.element_ty,
            )
            w_mask = d_mask[None, :]
            if KP % BLOCK_K != 0:
                w_mask = w_mask & (k < KP)[:, None]
            w = tl.load(weight + d[None, :].to(tl.int64) * KP + k[:, None], mask=w_mask, other=0.0)
            acc = product(x, w, acc, PRECISION)
        if bias is not None:
            acc += tl.load(bias + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        mask = valid[:, None] & d_mask[None, :]
        if pos is not None:
            row = n + T if POS_PREFIX else n
            places = row[:, None] * D + d[None, :]
            acc += tl.load(pos + places, mask=mask, other=0.0).to(tl.float32)
        token = b.to(tl.int64) * (T + N) + T + n
        tl.store(out + token[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    elif prefix is not None:
        # The last row tiles write the class and register tokens.
        r = (tile_m - tiles_patch) * BLOCK_M + tl.arange(0, BLOCK_M)
        b, t = r // T, r % T
        mask = (r < B * T)[:, None] & d_mask[None, :]
        places = t[:, None] * D + d[None, :]
        y = tl.load(prefix + places, mask=mask, other=0.0).to(tl.float32)
        if POS_PREFIX:
            y += tl.load(pos + places, mask=mask, other=0.0).to(tl.float32)
        token = b.to(tl.int64) * (T + N) + t
        tl.store(out + token[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)


@jit
def weight_grad_kernel(
    grad,  # [B, T + N, D] by strides
    images,  # [B, C, H, W] by strides
    mean,  # [C] or None
    std,  # [C] or None
    flip,  # [B] uint8 or None
    partial,  # [SPLITS, D, C, P, Q] float32
    B,
    H,
    W,
    GRID_W,
    N,
    T,
    D,
    STEPS,  # tiles of tokens that a split takes
    grad_b,
    grad_n,
    grad_d,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDED: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C * P * Q
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_d = tl.cdiv(D, BLOCK_N)
    split = tl.program_id(0) // (tiles_d * tiles_k)
    tile = tl.program_id(0) % (tiles_d * tiles_k)
    d = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    d_mask = d < D
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for step in range(STEPS):
        m = split * (STEPS * BLOCK_M) + step * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = m < B * N
        b, n = m // N, m % N
        base = b.to(tl.int64) * stride_b
        top, left = (n // GRID_W) * P, (n % GRID_W) * Q
        flipped = None
        if flip is not None:
            flipped = tl.load(flip + b, mask=valid, other=0) != 0
        x = _gather(
            images,
            mean,
            std,
            flipped,
            base,
            top,
            left,
            valid,
            k,
            H,
            W,
            stride_c,
            stride_h,
            stride_w,
            C,
            P,
            Q,
            CHANNELS_LAST,
            PADDED,
            K % BLOCK_K == 0,
            BYTES,
            DTYPE,
        )
        token = b.to(tl.int64) * grad_b + (n + T).to(tl.int64) * grad_n
        places = token[:, None] + d[None, :].to(tl.int64) * grad_d
        dy = tl.load(grad + places, mask=valid[:, None] & d_mask[None, :], other=0.0).to(DTYPE)
        acc = product(tl.trans(dy), x, acc, PRECISION)
    if CHANNELS_LAST:  # back to the parameter's order (c, p, q)
        place = (k % C) * (P * Q) + k // C
    else:
        place = k
    rows = (split.to(tl.int64) * D + d)[:, None] * K
    tl.store(partial + rows + place[None, :], acc, mask=d_mask[:, None] & (k < K)[None, :])


@jit
def image_grad_kernel(
    grad,  # [B, T + N, D] by strides
    weight,  # [D, KP] in the compute dtype, zero beyond K
    std,  # [C] or None
    flip,  # [B] uint8 or None
    d_images,  # [B, C, H, W] by strides
    B,
    H,
    W,
    GRID_W,
    N,
    T,
    D,
    grad_b,
    grad_n,
    grad_d,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    KP: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    K: tl.constexpr = C * P * Q
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    m = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = m < B * N
    b, n = m // N, m % N
    token = b.to(tl.int64) * grad_b + (n + T).to(tl.int64) * grad_n
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_mask = d < D
        places = token[:, None] + d[None, :].to(tl.int64) * grad_d
        dy = tl.load(grad + places, mask=valid[:, None] & d_mask[None, :], other=0.0)
        rows = d[:, None].to(tl.int64) * KP + k[None, :]
        w = tl.load(weight + rows, mask=d_mask[:, None] & (k < KP)[None, :], other=0.0)
        acc = product(dy.to(w.dtype), w, acc, PRECISION)
    c, p, q = k // (P * Q), (k // Q) % P, k % Q
    if std is not None:
        acc *= (1.0 / tl.load(std + c, mask=c < C, other=1.0).to(tl.float32))[None, :]
    row = ((n // GRID_W) * P)[:, None] + p[None, :]
    column = ((n % GRID_W) * Q)[:, None] + q[None, :]
    mask = valid[:, None] & (k < K)[None, :]
    if PADDED:
        mask = mask & (row < H) & (column < W)
    if flip is not None:
        flipped = tl.load(flip + b, mask=valid, other=0) != 0
        column = tl.where(flipped[:, None], W - 1 - column, column)
    pixel = (b.to(tl.int64) * stride_b)[:, None] + (c.to(tl.int64) * stride_c)[None, :]
    pixel += row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    tl.store(d_images + pixel, acc.to(d_images.dtype.element_ty), mask=mask)


@jit
def token_grad_kernel(
    grad,  # [B, L, D] by strides
    partial,  # [SPLITS, L, D] float32
    B,
    L,
    D,
    batch_per_split,
    grad_b,
    grad_n,
    grad_d,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(L * D, BLOCK)
    split = tl.program_id(0) // tiles
    e = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = e < L * D
    first = split * batch_per_split
    place = (e // D).to(tl.int64) * grad_n + (e % D).to(tl.int64) * grad_d
    place += first.to(tl.int64) * grad_b
    total = tl.zeros([BLOCK], dtype=tl.float32)
    b = first + tl.zeros_like(e)
    for _ in range(batch_per_split):
        total += tl.load(grad + place, mask=mask & (b < B), other=0.0).to(tl.float32)
        place += grad_b
        b += 1
    tl.store(partial + split.to(tl.int64) * L * D + e, total, mask=mask)
