"""The Triton kernels of attention and attention_pool.

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
def _load_head(
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

    Without a second chunk the first is returned twice, and the second is then never read. Rows
    beyond `length` are zero.
    """
    PADDED1: tl.constexpr = HEAD_DIM < FIRST or (ROPE != "" and HEAD_DIM != 2 * FIRST)
    PADDED2: tl.constexpr = HEAD_DIM != FIRST + SECOND
    columns, has1 = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 0)
    x1 = _load(base, rows, stride, length, columns, has1, PADDED1, MASKED)
    dtype = x1.dtype
    x2 = x1
    has2 = has1
    others = columns
    if SECOND:
        others, has2 = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 1)
        x2 = _load(base, rows, stride, length, others, has2, PADDED2, MASKED)
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
def _head_gradient(
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
    """Back through _load_head: the gradient of the values in memory, and what sums over rows to
    d_weight and to d_bias; of each both chunks.
    """
    PADDED1: tl.constexpr = HEAD_DIM < FIRST or (ROPE != "" and HEAD_DIM != 2 * FIRST)
    PADDED2: tl.constexpr = HEAD_DIM != FIRST + SECOND
    columns, has1 = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 0)
    has2 = has1
    others = columns
    if SECOND:
        others, has2 = _columns(HEAD_DIM, FIRST, SECOND, ROPE, 1)
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
        x1 = _load(base, rows, stride, length, columns, has1, PADDED1, True).to(tl.float32)
        x2 = x1
        if SECOND:
            b2 = tl.where(valid & has2[None, :], d2, 0.0)
            x2 = _load(base, rows, stride, length, others, has2, PADDED2, True).to(tl.float32)
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
def _store_head(
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
def _store_sums(
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
def _product(a1, b1, a2, b2, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both chunks."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if SECOND:
        product = tl.dot(a2, tl.trans(b2), acc=product, input_precision=PRECISION)
    return product


@jit
def _power(x, NATURAL: tl.constexpr):
    """The exponential, of a difference of logits."""
    if NATURAL:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@jit
def _sequence(cu_seqlens, b, length, stride_b, stride_n):
    """(offset of image b's first token, its length, its row among all tokens)."""
    if cu_seqlens is None:
        return b.to(tl.int64) * stride_b, length, b.to(tl.int64) * length
    else:
        first = tl.load(cu_seqlens + b).to(tl.int64)
        last = tl.load(cu_seqlens + b + 1).to(tl.int64)
        return first * stride_n, (last - first).to(tl.int32), first


@jit
def _attend(
    m,  # largest logit so far [BLOCK_M], in base 2
    l,  # sum of exp2(logit - m)
    o1,  # sum of exp2(logit - m) v, both chunks
    o2,
    q1,
    q2,
    k,  # this head's keys and values
    v,
    keys,  # the rows to take
    key_mask,  # this image's [Nk] bytes, or None
    k_n,
    length,
    k_weight,
    k_bias,
    sin,
    cos,
    skipped,
    scale,
    eps,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    RMS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """One step of the online softmax."""
    k1, k2 = _load_head(
        k, keys, k_n, length, k_weight, k_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, MASKED,
    )  # fmt: skip
    s = _product(q1, k1, q2, k2, SECOND, PRECISION) * scale
    if MASKED:
        s = tl.where((keys < length)[None, :], s, float("-inf"))
    if key_mask is not None:
        kept = tl.load(key_mask + keys, mask=keys < length, other=0)
        s = tl.where((kept != 0)[None, :], s, float("-inf"))
    new = tl.maximum(m, tl.max(s, axis=1))
    base = new
    if key_mask is not None:  # no key so far: any finite number will do
        base = tl.where(new == float("-inf"), 0.0, new)
    p = _power(s - base[:, None], NATURAL)
    shrink = _power(m - base, NATURAL)
    l = l * shrink + tl.sum(p, axis=1)
    PADDED1: tl.constexpr = HEAD_DIM < V_FIRST
    PADDED2: tl.constexpr = HEAD_DIM != V_FIRST + V_SECOND
    columns, exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 0)
    v1 = _load(v, keys, k_n, length, columns, exists, PADDED1, MASKED)
    p = p.to(v1.dtype)
    o1 = tl.dot(p, v1, acc=o1 * shrink[:, None], input_precision=PRECISION)
    if V_SECOND:
        columns, exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 1)
        v2 = _load(v, keys, k_n, length, columns, exists, PADDED2, MASKED)
        o2 = tl.dot(p, v2, acc=o2 * shrink[:, None], input_precision=PRECISION)
    return new, l, o1, o2


@jit
def forward_kernel(
    q,  # [B, Nq, H, d] by strides
    k,  # [B, Nk, H, d] by strides
    v,  # [B, Nk, H, d] by strides
    out,  # [B, Nq, H, d] contiguous
    stats,  # [2, H, B * Nq] float32: largest logit, in base 2, and sum; or None
    q_weight,  # [d] or None, as the three that follow
    q_bias,
    k_weight,
    k_bias,
    sin,  # [L, d / 2] or None
    cos,  # [L, d / 2] or None
    key_mask,  # [B, Nk] bytes, or None
    cu_seqlens,  # [B + 1] int32, or None; then B is 1 in the shapes above
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    H,
    Nq,
    Nk,
    total,  # rows of stats: all tokens
    blocks,  # of queries, a head
    skipped,  # prefix tokens without rotation
    scale,  # times log2(e), unless NATURAL
    eps,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    HEAD_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):
    # Blocks of one head, then heads of one image, run side by side: their keys are in the cache.
    pid = tl.program_id(0)
    block = pid % blocks
    b = pid // blocks // H
    h = pid // blocks % H
    q_first, q_length, q_row = _sequence(cu_seqlens, b, Nq, q_b, q_n)
    k_first, k_length, _ = _sequence(cu_seqlens, b, Nk, k_b, k_n)
    if cu_seqlens is not None:
        sin = None if sin is None else sin + q_row * (HEAD_DIM // 2)
        cos = None if cos is None else cos + q_row * (HEAD_DIM // 2)
        if block * BLOCK_M >= q_length:
            return
    q += q_first + tl.multiple_of(h.to(tl.int64) * q_h, HEAD_ALIGN)
    k_head = tl.multiple_of(h.to(tl.int64) * k_h, HEAD_ALIGN)
    k += k_first + k_head
    v += k_first + k_head
    if key_mask is not None:
        key_mask += b.to(tl.int64) * Nk
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = _load_head(
        q, rows, q_n, q_length, q_weight, q_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
    )  # fmt: skip
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    o1 = tl.zeros([BLOCK_M, V_FIRST], dtype=tl.float32)
    o2 = o1
    if V_SECOND:
        o2 = tl.zeros([BLOCK_M, V_SECOND], dtype=tl.float32)
    whole = k_length // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        m, l, o1, o2 = _attend(
            m, l, o1, o2, q1, q2, k, v, start + tl.arange(0, BLOCK_N), key_mask, k_n,
            k_length, k_weight, k_bias, sin, cos, skipped, scale, eps,
            HEAD_DIM, FIRST, SECOND, V_FIRST, V_SECOND, ROPE, RMS, False, PRECISION, NATURAL,
        )  # fmt: skip
    if TAIL:
        m, l, o1, o2 = _attend(
            m, l, o1, o2, q1, q2, k, v, whole + tl.arange(0, TAIL), key_mask, k_n,
            k_length, k_weight, k_bias, sin, cos, skipped, scale, eps,
            HEAD_DIM, FIRST, SECOND, V_FIRST, V_SECOND, ROPE, RMS, True, PRECISION, NATURAL,
        )  # fmt: skip
    if key_mask is not None:  # a query without keys: zero
        l = tl.where(l == 0.0, 1.0, l)
        m = tl.where(m == float("-inf"), 0.0, m)
    o1 = o1 / l[:, None]
    if V_SECOND:
        o2 = o2 / l[:, None]
    out += q_row * H * HEAD_DIM + tl.multiple_of(h * HEAD_DIM, HEAD_ALIGN)
    _store_head(out, rows, H * HEAD_DIM, q_length, o1, o2, HEAD_DIM, V_FIRST, V_SECOND, "")
    if stats is not None:
        stats += h.to(tl.int64) * total + q_row
        if NATURAL:  # to base 2, and the sum to what backward will make of that
            natural = m
            m = m * 1.4426950408889634
            l = l * tl.exp(natural - m * 0.6931471805599453)
        tl.store(stats + rows, m, mask=rows < q_length)
        tl.store(stats + tl.cast(H, tl.int64) * total + rows, l, mask=rows < q_length)


@jit
def backward_kernel(
    q,  # [B, Nq, H, d] by strides
    k,  # [B, Nk, H, d] by strides
    v,  # [B, Nk, H, d] by strides
    dout,  # [B, Nq, H, d] by strides
    dq,  # [B, Nq, H, d] by strides, as dk and dv [B, Nk, H, d]
    dk,
    dv,
    partial,  # [B * H, 4, d] float32: d_weight and d_bias of q, of k; None without norms
    q_weight,  # [d] or None, as the three that follow
    q_bias,
    k_weight,
    k_bias,
    sin,  # [L, d / 2] or None
    cos,  # [L, d / 2] or None
    key_mask,  # [B, Nk] bytes, or None
    cu_seqlens,  # [B + 1] int32, or None
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    dout_b,
    dout_n,
    dout_h,
    dq_b,
    dq_n,
    dq_h,
    dk_b,
    dk_n,
    dk_h,
    H,
    Nq,
    Nk,
    skipped,
    scale,  # times log2(e), unless NATURAL
    eps,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """All gradients of one head in one pass, from q, k, v and dout alone.

    All keys are at hand for a block of queries, so its softmax and rowsum(p * dp) are complete:
    nothing comes from a pass before, and a block's dq is complete, too. Logits stand transposed,
    [keys, queries]: the two products that add to dk and dv then take p and ds from registers.
    """
    pid = tl.program_id(0)
    b = pid // H
    h = pid % H
    q_first, q_length, q_row = _sequence(cu_seqlens, b, Nq, q_b, q_n)
    k_first, k_length, _ = _sequence(cu_seqlens, b, Nk, k_b, k_n)
    dout_first, _, _ = _sequence(cu_seqlens, b, Nq, dout_b, dout_n)
    dq_first, _, _ = _sequence(cu_seqlens, b, Nq, dq_b, dq_n)
    dk_first, _, _ = _sequence(cu_seqlens, b, Nk, dk_b, dk_n)
    if cu_seqlens is not None:
        sin = None if sin is None else sin + q_row * (HEAD_DIM // 2)
        cos = None if cos is None else cos + q_row * (HEAD_DIM // 2)
    h64 = h.to(tl.int64)
    q += q_first + tl.multiple_of(h64 * q_h, HEAD_ALIGN)
    k += k_first + tl.multiple_of(h64 * k_h, HEAD_ALIGN)
    v += k_first + tl.multiple_of(h64 * k_h, HEAD_ALIGN)
    dout += dout_first + tl.multiple_of(h64 * dout_h, HEAD_ALIGN)
    dq += dq_first + tl.multiple_of(h64 * dq_h, HEAD_ALIGN)
    dk += dk_first + tl.multiple_of(h64 * dk_h, HEAD_ALIGN)
    dv += dk_first + tl.multiple_of(h64 * dk_h, HEAD_ALIGN)

    PADDED1: tl.constexpr = HEAD_DIM < V_FIRST
    PADDED2: tl.constexpr = HEAD_DIM != V_FIRST + V_SECOND
    keys = tl.arange(0, BLOCK_N)
    k1, k2 = _load_head(
        k, keys, k_n, k_length, k_weight, k_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
    )  # fmt: skip
    v_columns, v_exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 0)
    v1 = _load(v, keys, k_n, k_length, v_columns, v_exists, PADDED1, True)
    v2 = v1
    w_columns = v_columns
    w_exists = v_exists
    if V_SECOND:
        w_columns, w_exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 1)
        v2 = _load(v, keys, k_n, k_length, w_columns, w_exists, PADDED2, True)
    kept = keys < k_length
    if key_mask is not None:
        key_mask += b.to(tl.int64) * Nk
        kept = kept & (tl.load(key_mask + keys, mask=kept, other=0) != 0)

    dk1 = tl.zeros([BLOCK_N, FIRST], dtype=tl.float32)
    dk2 = dk1
    if SECOND:
        dk2 = tl.zeros([BLOCK_N, SECOND], dtype=tl.float32)
    dv1 = tl.zeros([BLOCK_N, V_FIRST], dtype=tl.float32)
    dv2 = dv1
    if V_SECOND:
        dv2 = tl.zeros([BLOCK_N, V_SECOND], dtype=tl.float32)
    sum_w1 = tl.zeros([FIRST], dtype=tl.float32)
    sum_b1 = tl.zeros([FIRST], dtype=tl.float32)
    sum_w2 = sum_w1
    sum_b2 = sum_b1
    if SECOND:
        sum_w2 = tl.zeros([SECOND], dtype=tl.float32)
        sum_b2 = tl.zeros([SECOND], dtype=tl.float32)
    factor = scale if NATURAL else scale * 0.6931471805599453  # without log2(e)

    for start in range(0, q_length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q1, q2 = _load_head(
            q, rows, q_n, q_length, q_weight, q_bias, sin, cos, skipped, eps,
            HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
        )  # fmt: skip
        do1 = _load(dout, rows, dout_n, q_length, v_columns, v_exists, PADDED1, True)
        do2 = do1
        if V_SECOND:
            do2 = _load(dout, rows, dout_n, q_length, w_columns, w_exists, PADDED2, True)
        s = _product(k1, q1, k2, q2, SECOND, PRECISION) * scale
        s = tl.where(kept[:, None], s, float("-inf"))
        m = tl.max(s, axis=0)
        if key_mask is not None:  # a query without keys: any finite number will do
            m = tl.where(m == float("-inf"), 0.0, m)
        p = _power(s - m[None, :], NATURAL)
        l = tl.sum(p, axis=0)
        if key_mask is not None:
            l = tl.where(l == 0.0, 1.0, l)
        p = p * (1.0 / l)[None, :]
        dp = _product(v1, do1, v2, do2, V_SECOND, PRECISION)
        delta = tl.sum(p * dp, axis=0)
        ds = (p * (dp - delta[None, :])).to(q1.dtype)
        p = p.to(q1.dtype)
        dv1 = tl.dot(p, do1, acc=dv1, input_precision=PRECISION)
        if V_SECOND:
            dv2 = tl.dot(p, do2, acc=dv2, input_precision=PRECISION)
        dk1 = tl.dot(ds, q1, acc=dk1, input_precision=PRECISION)
        if SECOND:
            dk2 = tl.dot(ds, q2, acc=dk2, input_precision=PRECISION)
        ds = tl.trans(ds)
        dq1 = tl.dot(ds, k1, input_precision=PRECISION) * factor
        dq2 = dq1
        if SECOND:
            dq2 = tl.dot(ds, k2, input_precision=PRECISION) * factor
        dq1, dq2, w1, w2, b1, b2 = _head_gradient(
            dq1, dq2, q, rows, q_n, q_length, q_weight, sin, cos, skipped, eps,
            HEAD_DIM, FIRST, SECOND, ROPE, RMS,
        )  # fmt: skip
        _store_head(dq, rows, dq_n, q_length, dq1, dq2, HEAD_DIM, FIRST, SECOND, ROPE)
        if partial is not None:
            sum_w1 += tl.sum(w1, axis=0)
            sum_b1 += tl.sum(b1, axis=0)
            if SECOND:
                sum_w2 += tl.sum(w2, axis=0)
                sum_b2 += tl.sum(b2, axis=0)

    # First, as the way back through norm and rotation needs registers.
    _store_head(dv, keys, dk_n, k_length, dv1, dv2, HEAD_DIM, V_FIRST, V_SECOND, "")
    dk1, dk2, w1, w2, b1, b2 = _head_gradient(
        dk1 * factor, dk2 * factor, k, keys, k_n, k_length, k_weight, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS,
    )  # fmt: skip
    _store_head(dk, keys, dk_n, k_length, dk1, dk2, HEAD_DIM, FIRST, SECOND, ROPE)
    if partial is not None:
        partial += pid.to(tl.int64) * 4 * HEAD_DIM
        _store_sums(partial, sum_w1, sum_w2, sum_b1, sum_b2, HEAD_DIM, FIRST, SECOND, ROPE)
        _store_sums(
            partial + 2 * HEAD_DIM, tl.sum(w1, axis=0), tl.sum(w2, axis=0), tl.sum(b1, axis=0),
            tl.sum(b2, axis=0), HEAD_DIM, FIRST, SECOND, ROPE,
        )  # fmt: skip


@jit
def _query_step(
    dq1,
    dq2,
    q1,
    q2,
    do1,
    do2,
    row_max,
    row_sum,
    delta,
    k,
    v,
    keys,
    key_mask,
    k_n,
    length,
    k_weight,
    k_bias,
    sin,
    cos,
    skipped,
    scale,
    eps,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    RMS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """What one block of keys adds to dq."""
    k1, k2 = _load_head(
        k, keys, k_n, length, k_weight, k_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, MASKED,
    )  # fmt: skip
    s = _product(q1, k1, q2, k2, SECOND, PRECISION) * scale
    p = _power(s - row_max[:, None], NATURAL)
    p = p * (1.0 / row_sum)[:, None]
    if MASKED:
        p = tl.where((keys < length)[None, :], p, 0.0)
    if key_mask is not None:
        kept = tl.load(key_mask + keys, mask=keys < length, other=0)
        p = tl.where((kept != 0)[None, :], p, 0.0)
    PADDED1: tl.constexpr = HEAD_DIM < V_FIRST
    PADDED2: tl.constexpr = HEAD_DIM != V_FIRST + V_SECOND
    columns, exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 0)
    v1 = _load(v, keys, k_n, length, columns, exists, PADDED1, MASKED)
    v2 = v1
    if V_SECOND:
        columns, exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 1)
        v2 = _load(v, keys, k_n, length, columns, exists, PADDED2, MASKED)
    dp = _product(do1, v1, do2, v2, V_SECOND, PRECISION)
    ds = (p * (dp - delta[:, None])).to(k1.dtype)
    dq1 = tl.dot(ds, k1, acc=dq1, input_precision=PRECISION)
    if SECOND:
        dq2 = tl.dot(ds, k2, acc=dq2, input_precision=PRECISION)
    return dq1, dq2


@jit
def backward_query_kernel(
    q,  # as in backward_kernel
    k,
    v,
    dout,
    out,  # [B, Nq, H, d] contiguous
    stats,  # [2, H, B * Nq] float32: largest logit, in base 2, and sum
    dq,
    delta,  # [H, B * Nq] float32: rowsum(dout * out), for backward_key_kernel
    partial,  # [programs, 2, d] float32: d_weight and d_bias of q; None without norms
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    sin,
    cos,
    key_mask,
    cu_seqlens,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    dout_b,
    dout_n,
    dout_h,
    dq_b,
    dq_n,
    dq_h,
    H,
    Nq,
    Nk,
    total,
    blocks,
    skipped,
    scale,  # times log2(e), unless NATURAL
    eps,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    HEAD_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """dq of one block of queries, over all keys; and delta on the way, as out is read here."""
    pid = tl.program_id(0)
    block = pid % blocks
    b = pid // blocks // H
    h = pid // blocks % H
    q_first, q_length, q_row = _sequence(cu_seqlens, b, Nq, q_b, q_n)
    k_first, k_length, _ = _sequence(cu_seqlens, b, Nk, k_b, k_n)
    dout_first, _, _ = _sequence(cu_seqlens, b, Nq, dout_b, dout_n)
    dq_first, _, _ = _sequence(cu_seqlens, b, Nq, dq_b, dq_n)
    if cu_seqlens is not None:
        sin = None if sin is None else sin + q_row * (HEAD_DIM // 2)
        cos = None if cos is None else cos + q_row * (HEAD_DIM // 2)
        if block * BLOCK_M >= q_length:
            return
    h64 = h.to(tl.int64)
    q += q_first + tl.multiple_of(h64 * q_h, HEAD_ALIGN)
    k += k_first + tl.multiple_of(h64 * k_h, HEAD_ALIGN)
    v += k_first + tl.multiple_of(h64 * k_h, HEAD_ALIGN)
    dout += dout_first + tl.multiple_of(h64 * dout_h, HEAD_ALIGN)
    dq += dq_first + tl.multiple_of(h64 * dq_h, HEAD_ALIGN)
    out += q_row * H * HEAD_DIM + tl.multiple_of(h * HEAD_DIM, HEAD_ALIGN)
    stats += h64 * total + q_row
    sums = stats + tl.cast(H, tl.int64) * total
    delta += h64 * total + q_row
    if key_mask is not None:
        key_mask += b.to(tl.int64) * Nk

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = _load_head(
        q, rows, q_n, q_length, q_weight, q_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
    )  # fmt: skip
    PADDED1: tl.constexpr = HEAD_DIM < V_FIRST
    PADDED2: tl.constexpr = HEAD_DIM != V_FIRST + V_SECOND
    columns, exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 0)
    do1 = _load(dout, rows, dout_n, q_length, columns, exists, PADDED1, True)
    o = _load(out, rows, H * HEAD_DIM, q_length, columns, exists, PADDED1, True)
    row_delta = tl.sum(do1.to(tl.float32) * o.to(tl.float32), axis=1)
    do2 = do1
    if V_SECOND:
        columns, exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 1)
        do2 = _load(dout, rows, dout_n, q_length, columns, exists, PADDED2, True)
        o = _load(out, rows, H * HEAD_DIM, q_length, columns, exists, PADDED2, True)
        row_delta += tl.sum(do2.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta + rows, row_delta, mask=rows < q_length)
    row_max = tl.load(stats + rows, mask=rows < q_length, other=0.0)
    if NATURAL:
        row_max = row_max * 0.6931471805599453
    row_sum = tl.load(sums + rows, mask=rows < q_length, other=1.0)

    dq1 = tl.zeros([BLOCK_M, FIRST], dtype=tl.float32)
    dq2 = dq1
    if SECOND:
        dq2 = tl.zeros([BLOCK_M, SECOND], dtype=tl.float32)
    whole = k_length // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq1, dq2 = _query_step(
            dq1, dq2, q1, q2, do1, do2, row_max, row_sum, row_delta, k, v,
            start + tl.arange(0, BLOCK_N), key_mask, k_n, k_length, k_weight, k_bias, sin, cos,
            skipped, scale, eps,
            HEAD_DIM, FIRST, SECOND, V_FIRST, V_SECOND, ROPE, RMS, False, PRECISION, NATURAL,
        )  # fmt: skip
    if TAIL:
        dq1, dq2 = _query_step(
            dq1, dq2, q1, q2, do1, do2, row_max, row_sum, row_delta, k, v,
            whole + tl.arange(0, TAIL), key_mask, k_n, k_length, k_weight, k_bias, sin, cos,
            skipped, scale, eps,
            HEAD_DIM, FIRST, SECOND, V_FIRST, V_SECOND, ROPE, RMS, True, PRECISION, NATURAL,
        )  # fmt: skip
    factor = scale if NATURAL else scale * 0.6931471805599453  # without log2(e)
    dq1, dq2, w1, w2, b1, b2 = _head_gradient(
        dq1 * factor, dq2 * factor, q, rows, q_n, q_length, q_weight, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS,
    )  # fmt: skip
    _store_head(dq, rows, dq_n, q_length, dq1, dq2, HEAD_DIM, FIRST, SECOND, ROPE)
    if partial is not None:
        _store_sums(
            partial + pid.to(tl.int64) * 2 * HEAD_DIM, tl.sum(w1, axis=0), tl.sum(w2, axis=0),
            tl.sum(b1, axis=0), tl.sum(b2, axis=0), HEAD_DIM, FIRST, SECOND, ROPE,
        )  # fmt: skip


@jit
def backward_key_kernel(
    q,  # as in backward_kernel
    k,
    v,
    dout,
    stats,  # [2, H, B * Nq] float32: largest logit, in base 2, and sum
    delta,  # [H, B * Nq] float32
    dk,
    dv,
    partial,  # [programs, 2, d] float32: d_weight and d_bias of k; None without norms
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    sin,
    cos,
    key_mask,
    cu_seqlens,
    q_b,
    q_n,
    q_h,
    k_b,
    k_n,
    k_h,
    dout_b,
    dout_n,
    dout_h,
    dk_b,
    dk_n,
    dk_h,
    H,
    Nq,
    Nk,
    total,
    blocks,  # of keys, a head
    skipped,
    scale,  # times log2(e), unless NATURAL
    eps,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V_FIRST: tl.constexpr,
    V_SECOND: tl.constexpr,
    ROPE: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """dk and dv of one block of keys, over all queries; logits transposed as in backward_kernel.

    Queries beyond the last have q = dout = delta = 0, and a largest logit of 0: p = 1 meets zeros.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    b = pid // blocks // H
    h = pid // blocks % H
    q_first, q_length, q_row = _sequence(cu_seqlens, b, Nq, q_b, q_n)
    k_first, k_length, _ = _sequence(cu_seqlens, b, Nk, k_b, k_n)
    dout_first, _, _ = _sequence(cu_seqlens, b, Nq, dout_b, dout_n)
    dk_first, _, _ = _sequence(cu_seqlens, b, Nk, dk_b, dk_n)
    if cu_seqlens is not None:
        sin = None if sin is None else sin + q_row * (HEAD_DIM // 2)
        cos = None if cos is None else cos + q_row * (HEAD_DIM // 2)
        if block * BLOCK_N >= k_length:
            return
    h64 = h.to(tl.int64)
    q += q_first + tl.multiple_of(h64 * q_h, HEAD_ALIGN)
    k += k_first + tl.multiple_of(h64 * k_h, HEAD_ALIGN)
    v += k_first + tl.multiple_of(h64 * k_h, HEAD_ALIGN)
    dout += dout_first + tl.multiple_of(h64 * dout_h, HEAD_ALIGN)
    dk += dk_first + tl.multiple_of(h64 * dk_h, HEAD_ALIGN)
    dv += dk_first + tl.multiple_of(h64 * dk_h, HEAD_ALIGN)
    stats += h64 * total + q_row
    sums = stats + tl.cast(H, tl.int64) * total
    delta += h64 * total + q_row

    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k1, k2 = _load_head(
        k, keys, k_n, k_length, k_weight, k_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
    )  # fmt: skip
    PADDED1: tl.constexpr = HEAD_DIM < V_FIRST
    PADDED2: tl.constexpr = HEAD_DIM != V_FIRST + V_SECOND
    v_columns, v_exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 0)
    v1 = _load(v, keys, k_n, k_length, v_columns, v_exists, PADDED1, True)
    v2 = v1
    w_columns = v_columns
    w_exists = v_exists
    if V_SECOND:
        w_columns, w_exists = _columns(HEAD_DIM, V_FIRST, V_SECOND, "", 1)
        v2 = _load(v, keys, k_n, k_length, w_columns, w_exists, PADDED2, True)
    kept = keys < k_length
    if key_mask is not None:
        key_mask += b.to(tl.int64) * Nk
        kept = kept & (tl.load(key_mask + keys, mask=kept, other=0) != 0)

    dk1 = tl.zeros([BLOCK_N, FIRST], dtype=tl.float32)
    dk2 = dk1
    if SECOND:
        dk2 = tl.zeros([BLOCK_N, SECOND], dtype=tl.float32)
    dv1 = tl.zeros([BLOCK_N, V_FIRST], dtype=tl.float32)
    dv2 = dv1
    if V_SECOND:
        dv2 = tl.zeros([BLOCK_N, V_SECOND], dtype=tl.float32)
    for start in range(0, q_length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q1, q2 = _load_head(
            q, rows, q_n, q_length, q_weight, q_bias, sin, cos, skipped, eps,
            HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
        )  # fmt: skip
        row_max = tl.load(stats + rows, mask=rows < q_length, other=0.0)
        if NATURAL:
            row_max = row_max * 0.6931471805599453
        row_sum = tl.load(sums + rows, mask=rows < q_length, other=1.0)
        s = _product(k1, q1, k2, q2, SECOND, PRECISION) * scale
        p = _power(s - row_max[None, :], NATURAL)
        p = p * (1.0 / row_sum)[None, :]
        if key_mask is not None:
            p = tl.where(kept[:, None], p, 0.0)
        do1 = _load(dout, rows, dout_n, q_length, v_columns, v_exists, PADDED1, True)
        do2 = do1
        if V_SECOND:
            do2 = _load(dout, rows, dout_n, q_length, w_columns, w_exists, PADDED2, True)
        p_low = p.to(q1.dtype)
        dv1 = tl.dot(p_low, do1, acc=dv1, input_precision=PRECISION)
        if V_SECOND:
            dv2 = tl.dot(p_low, do2, acc=dv2, input_precision=PRECISION)
        dp = _product(v1, do1, v2, do2, V_SECOND, PRECISION)
        row_delta = tl.load(delta + rows, mask=rows < q_length, other=0.0)
        ds = (p * (dp - row_delta[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, acc=dk1, input_precision=PRECISION)
        if SECOND:
            dk2 = tl.dot(ds, q2, acc=dk2, input_precision=PRECISION)

    factor = scale if NATURAL else scale * 0.6931471805599453  # without log2(e)
    # First, as the way back through norm and rotation needs registers.
    _store_head(dv, keys, dk_n, k_length, dv1, dv2, HEAD_DIM, V_FIRST, V_SECOND, "")
    dk1, dk2, w1, w2, b1, b2 = _head_gradient(
        dk1 * factor, dk2 * factor, k, keys, k_n, k_length, k_weight, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS,
    )  # fmt: skip
    _store_head(dk, keys, dk_n, k_length, dk1, dk2, HEAD_DIM, FIRST, SECOND, ROPE)
    if partial is not None:
        _store_sums(
            partial + pid.to(tl.int64) * 2 * HEAD_DIM, tl.sum(w1, axis=0), tl.sum(w2, axis=0),
            tl.sum(b1, axis=0), tl.sum(b2, axis=0), HEAD_DIM, FIRST, SECOND, ROPE,
        )  # fmt: skip
