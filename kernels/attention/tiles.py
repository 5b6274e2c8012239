"""Tiles of queries, keys and values as the kernels of attention hold them.

A tile of a head is two chunks of columns, so that no dimension is padded to the next power of two:
80 = 64 + 16, 72 = 64 + 8 (as 16, the least depth of a product), 64 = 64 + nothing. With a rotary
embedding the chunks of queries and keys are instead the first and the second elements of the
pairs that are rotated, wherever those lie in memory. Then the rotation is elementwise between two
tiles, forward and backward, and the products never notice: they sum over all columns anyway.

Softmax of 16-bit inputs is in base 2: exp2(x log2(e)) = e^x, one instruction on a GPU, with log2(e)
a part of the scale. In float32 (NATURAL) that product would round each logit once more, at its full
size; there the exponent is taken of the difference. Every sum is in float32.
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from .._triton import jit, tl


@jit
def _columns(
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Columns of a chunk, and which of them exist."""
    index = tl.arange(0, SECOND if CHUNK else FIRST)
    if ROPE == "interleaved":  # pairs (0, 1), (2, 3), ...
        return 2 * index + CHUNK, index < HEAD_DIM // 2
    elif ROPE == "halves":  # pairs (0, d/2), (1, d/2 + 1), ...
        return index + CHUNK * (HEAD_DIM // 2), index < HEAD_DIM // 2
    else:
        return index + CHUNK * FIRST, index + CHUNK * FIRST < HEAD_DIM


@jit
def _both_columns(
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROPE: tl.constexpr
):
    """Of both chunks: columns, and which exist; the first chunk's twice if there is no second."""
    columns, has1 = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 0)
    others = columns
    has2 = has1
    if SECOND:
        others, has2 = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 1)
    return columns, has1, others, has2


@jit
def _load(base, rows, stride, length, columns, exists, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """A chunk [rows, columns]; zero beyond `length` rows (if MASKED) and where no column exists."""
    place = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    if MASKED and PADDED:
        return tl.load(place, mask=(rows < length)[:, None] & exists[None, :], other=0.0)
    elif MASKED:
        return tl.load(place, mask=(rows < length)[:, None], other=0.0)
    elif PADDED:
        return tl.load(place, mask=exists[None, :], other=0.0)
    else:
        return tl.load(place)


@jit
def load_tile(
    base,
    rows,
    stride,
    length,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Both chunks of a tile of token rows; rows beyond `length` (if MASKED) are zero.

    Without a second chunk the first is returned twice, and the second is then never read.
    """
    PADDED1: tl.constexpr = HEAD_DIM < FIRST or (ROPE != "" and HEAD_DIM != 2 * FIRST)
    PADDED2: tl.constexpr = HEAD_DIM != FIRST + SECOND
    columns, exists = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 0)
    x1 = _load(base, rows, stride, length, columns, exists, PADDED1, MASKED)
    x2 = x1
    if SECOND:
        columns, exists = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 1)
        x2 = _load(base, rows, stride, length, columns, exists, PADDED2, MASKED)
    return x1, x2


@jit
def zero_tile(ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Accumulators of both chunks."""
    x1 = tl.zeros([ROWS, FIRST], dtype=tl.float32)
    x2 = x1
    if SECOND:
        x2 = tl.zeros([ROWS, SECOND], dtype=tl.float32)
    return x1, x2


@jit
def _angles(sin, cos, rows, length, skipped, exists, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """(sin, cos) [rows, WIDTH] of token rows; the first `skipped` tokens are not rotated."""
    place = (rows - skipped).to(tl.int64)[:, None] * HALF + tl.arange(0, WIDTH)[None, :]
    mask = ((rows >= skipped) & (rows < length))[:, None] & exists[None, :]
    return (
        tl.load(sin + place, mask=mask, other=0.0).to(tl.float32),
        tl.load(cos + place, mask=mask, other=1.0).to(tl.float32),
    )


@jit
def _statistics(x1, x2, has1, has2, eps, D: tl.constexpr, SECOND: tl.constexpr, RMS: tl.constexpr):
    """(centred chunks, 1 / spread) of rows; the mean's own rounding is taken off again."""
    if not RMS:
        for _ in tl.static_range(2):
            total = tl.sum(x1, axis=1)
            if SECOND:
                total += tl.sum(x2, axis=1)
            mean = (total / D)[:, None]
            x1 = tl.where(has1[None, :], x1 - mean, 0.0)
            if SECOND:
                x2 = tl.where(has2[None, :], x2 - mean, 0.0)
    square = tl.sum(x1 * x1, axis=1)
    if SECOND:
        square += tl.sum(x2 * x2, axis=1)
    return x1, x2, 1.0 / tl.sqrt(square / D + eps)


@jit
def _scaled(x, weight, bias, columns, exists):
    """x * weight + bias, as far as these are given."""
    x *= tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        x += tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    return x


@jit
def load_head(
    base,
    rows,
    stride,
    length,
    weight,  # [d] or None
    bias,  # [d] or None
    sin,  # [L, d / 2] or None
    cos,
    skipped,
    eps,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    RMS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Both chunks of a tile of queries or keys, normalised and rotated in registers.

    Otherwise as load_tile.
    """
    x1, x2 = load_tile(base, rows, stride, length, HEAD_DIM, FIRST, SECOND, ROPE, MASKED)
    dtype = x1.dtype
    columns, has1, others, has2 = _both_columns(HEAD_DIM, FIRST, SECOND, ROPE)
    if weight is not None:
        x1 = x1.to(tl.float32)
        x2 = x2.to(tl.float32)
        x1, x2, rstd = _statistics(x1, x2, has1, has2, eps, HEAD_DIM, SECOND, RMS)
        x1 = _scaled(x1 * rstd[:, None], weight, bias, columns, has1)
        if SECOND:
            x2 = _scaled(x2 * rstd[:, None], weight, bias, others, has2)
        if bias is not None and MASKED:
            x1 = tl.where((rows < length)[:, None], x1, 0.0)
            x2 = tl.where((rows < length)[:, None], x2, 0.0)
    if sin is not None:
        s, c = _angles(sin, cos, rows, length, skipped, has1, HEAD_DIM // 2, FIRST)
        x1 = x1.to(tl.float32)
        x2 = x2.to(tl.float32)
        x1, x2 = x1 * c - x2 * s, x2 * c + x1 * s
    return x1.to(dtype), x2.to(dtype)


@jit
def head_gradient(
    d1,  # gradient of a loaded tile, float32
    d2,
    base,  # of the tile's values in memory
    rows,
    stride,
    length,
    weight,
    sin,
    cos,
    skipped,
    eps,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    RMS: tl.constexpr,
):
    """Back through load_head: the gradient of the values in memory, and what sums over rows to
    d_weight and to d_bias; of each both chunks.
    """
    columns, has1, others, has2 = _both_columns(HEAD_DIM, FIRST, SECOND, ROPE)
    if sin is not None:  # the inverse rotation
        s, c = _angles(sin, cos, rows, length, skipped, has1, HEAD_DIM // 2, FIRST)
        d1, d2 = d1 * c + d2 * s, d2 * c - d1 * s
    w1 = d1
    w2 = d2
    b1 = d1
    b2 = d2
    if weight is not None:
        valid = (rows < length)[:, None]
        b1 = tl.where(valid & has1[None, :], d1, 0.0)
        if SECOND:
            b2 = tl.where(valid & has2[None, :], d2, 0.0)
        x1, x2 = load_tile(base, rows, stride, length, HEAD_DIM, FIRST, SECOND, ROPE, True)
        x1 = x1.to(tl.float32)
        x2 = x2.to(tl.float32)
        x1, x2, rstd = _statistics(x1, x2, has1, has2, eps, HEAD_DIM, SECOND, RMS)
        x1 *= rstd[:, None]  # normalised values
        g1 = _scaled(b1, weight, None, columns, has1)
        w1 = b1 * x1
        along = tl.sum(g1 * x1, axis=1)
        mean = tl.sum(g1, axis=1)
        g2 = g1
        if SECOND:
            x2 *= rstd[:, None]
            g2 = _scaled(b2, weight, None, others, has2)
            w2 = b2 * x2
            along += tl.sum(g2 * x2, axis=1)
            mean += tl.sum(g2, axis=1)
        along = (along / HEAD_DIM)[:, None]
        mean = (mean / HEAD_DIM)[:, None]
        if RMS:
            mean = tl.zeros_like(mean)
        d1 = (g1 - mean - x1 * along) * rstd[:, None]
        if SECOND:
            d2 = (g2 - mean - x2 * along) * rstd[:, None]
    return d1, d2, w1, w2, b1, b2


@jit
def store_tile(
    base,
    rows,
    stride,
    length,
    x1,
    x2,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Store both chunks of a tile of token rows."""
    columns, exists = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 0)
    row = base + (rows.to(tl.int64) * stride)[:, None]
    valid = (rows < length)[:, None]
    dtype = base.dtype.element_ty
    tl.store(row + columns[None, :], x1.to(dtype), mask=valid & exists[None, :])
    if SECOND:
        columns, exists = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 1)
        tl.store(row + columns[None, :], x2.to(dtype), mask=valid & exists[None, :])


@jit
def store_sums(
    partial,  # this program's [d_weight, d_bias] rows, [2, d] float32
    w1,  # [FIRST]
    w2,
    b1,
    b2,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROPE: tl.constexpr,
):
    """A program's share of the norm's weight and bias gradients."""
    columns, exists = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 0)
    tl.store(partial + columns, w1, mask=exists)
    tl.store(partial + HEAD_DIM + columns, b1, mask=exists)
    if SECOND:
        columns, exists = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 1)
        tl.store(partial + columns, w2, mask=exists)
        tl.store(partial + HEAD_DIM + columns, b2, mask=exists)


@jit
def product(a1, b1, a2, b2, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both chunks."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if SECOND:
        product = tl.dot(a2, tl.trans(b2), acc=product, input_precision=PRECISION)
    return product


@jit
def power(x, NATURAL: tl.constexpr):
    """The exponential, of a difference of logits."""
    if NATURAL:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@jit
def locate(blocks, H):
    """(block, image, head) of this program.

    Blocks of one head, then heads of one image, run side by side: what they share is in the cache.
    """
    pid = tl.program_id(0)
    return pid % blocks, pid // blocks // H, pid // blocks % H


@jit
def extent(cu_seqlens, b, length):
    """(tokens of image b, its first row among all tokens)."""
    if cu_seqlens is None:
        return length, b.to(tl.int64) * length
    else:
        first = tl.load(cu_seqlens + b).to(tl.int64)
        last = tl.load(cu_seqlens + b + 1).to(tl.int64)
        return (last - first).to(tl.int32), first


@jit
def head_offset(cu_seqlens, b, h, row, stride_b, stride_n, stride_h, HEAD_ALIGN: tl.constexpr):
    """Elements before head h of image b, whose first row is `row`."""
    head = tl.multiple_of(h.to(tl.int64) * stride_h, HEAD_ALIGN)
    if cu_seqlens is None:
        return b.to(tl.int64) * stride_b + head
    else:
        return row * stride_n + head


@jit
def load_stats(largest, sums, rows, length, NATURAL: tl.constexpr):
    """Each query's largest logit, as `power` takes it, and its sum of exponentials."""
    valid = rows < length
    m = tl.load(largest + rows, mask=valid, other=0.0)
    if NATURAL:
        m = m * 0.6931471805599453
    return m, tl.load(sums + rows, mask=valid, other=1.0)
