"""The Triton kernel of attention and attention_pool."""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from .._triton import jit, tl
from .tiles import (
    extent,
    head_offset,
    load_head,
    load_tile,
    locate,
    power,
    product,
    store_tile,
    zero_tile,
)


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
    k1, k2 = load_head(
        k, keys, k_n, length, k_weight, k_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, MASKED,
    )  # fmt: skip
    s = product(q1, k1, q2, k2, SECOND, PRECISION) * scale
    if MASKED:
        s = tl.where((keys < length)[None, :], s, float("-inf"))
    if key_mask is not None:
        kept = tl.load(key_mask + keys, mask=keys < length, other=0)
        s = tl.where((kept != 0)[None, :], s, float("-inf"))
    new = tl.maximum(m, tl.max(s, axis=1))
    base = new
    if key_mask is not None:  # no key so far: any finite number will do
        base = tl.where(new == float("-inf"), 0.0, new)
    p = power(s - base[:, None], NATURAL)
    shrink = power(m - base, NATURAL)
    l = l * shrink + tl.sum(p, axis=1)
    v1, v2 = load_tile(v, keys, k_n, length, HEAD_DIM, V_FIRST, V_SECOND, "", MASKED)
    p = p.to(v1.dtype)
    o1 = tl.dot(p, v1, acc=o1 * shrink[:, None], input_precision=PRECISION)
    if V_SECOND:
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
    block, b, h = locate(blocks, H)
    q_length, q_row = extent(cu_seqlens, b, Nq)
    k_length, k_row = extent(cu_seqlens, b, Nk)
    if cu_seqlens is not None:
        sin = None if sin is None else sin + q_row * (HEAD_DIM // 2)
        cos = None if cos is None else cos + q_row * (HEAD_DIM // 2)
        if block * BLOCK_M >= q_length:
            return
    q += head_offset(cu_seqlens, b, h, q_row, q_b, q_n, q_h, HEAD_ALIGN)
    k_start = head_offset(cu_seqlens, b, h, k_row, k_b, k_n, k_h, HEAD_ALIGN)
    k += k_start
    v += k_start
    if key_mask is not None:
        key_mask += b.to(tl.int64) * Nk
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = load_head(
        q, rows, q_n, q_length, q_weight, q_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
    )  # fmt: skip
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    o1, o2 = zero_tile(BLOCK_M, V_FIRST, V_SECOND)
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
    store_tile(out, rows, H * HEAD_DIM, q_length, o1, o2, HEAD_DIM, V_FIRST, V_SECOND, "")
    if stats is not None:
        stats += h.to(tl.int64) * total + q_row
        if NATURAL:  # to base 2, and the sum to what backward will make of that
            natural = m
            m = m * 1.4426950408889634
            l = l * tl.exp(natural - m * 0.6931471805599453)
        tl.store(stats + rows, m, mask=rows < q_length)
        tl.store(stats + tl.cast(H, tl.int64) * total + rows, l, mask=rows < q_length)
