"""The Triton kernels of the gradients of attention and attention_pool."""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from .._triton import jit, tl
from .tiles import (
    extent,
    head_gradient,
    head_offset,
    load_head,
    load_stats,
    load_tile,
    locate,
    power,
    product,
    store_sums,
    store_tile,
    zero_tile,
)


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
    _, b, h = locate(1, H)
    q_length, q_row = extent(cu_seqlens, b, Nq)
    k_length, k_row = extent(cu_seqlens, b, Nk)
    if cu_seqlens is not None:
        sin = None if sin is None else sin + q_row * (HEAD_DIM // 2)
        cos = None if cos is None else cos + q_row * (HEAD_DIM // 2)
    q += head_offset(cu_seqlens, b, h, q_row, q_b, q_n, q_h, HEAD_ALIGN)
    k_start = head_offset(cu_seqlens, b, h, k_row, k_b, k_n, k_h, HEAD_ALIGN)
    k += k_start
    v += k_start
    dout += head_offset(cu_seqlens, b, h, q_row, dout_b, dout_n, dout_h, HEAD_ALIGN)
    dq += head_offset(cu_seqlens, b, h, q_row, dq_b, dq_n, dq_h, HEAD_ALIGN)
    dk_start = head_offset(cu_seqlens, b, h, k_row, dk_b, dk_n, dk_h, HEAD_ALIGN)
    dk += dk_start
    dv += dk_start

    keys = tl.arange(0, BLOCK_N)
    k1, k2 = load_head(
        k, keys, k_n, k_length, k_weight, k_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
    )  # fmt: skip
    v1, v2 = load_tile(v, keys, k_n, k_length, HEAD_DIM, V_FIRST, V_SECOND, "", True)
    kept = keys < k_length
    if key_mask is not None:
        key_mask += b.to(tl.int64) * Nk
        kept = kept & (tl.load(key_mask + keys, mask=kept, other=0) != 0)

    dk1, dk2 = zero_tile(BLOCK_N, FIRST, SECOND)
    dv1, dv2 = zero_tile(BLOCK_N, V_FIRST, V_SECOND)
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
        q1, q2 = load_head(
            q, rows, q_n, q_length, q_weight, q_bias, sin, cos, skipped, eps,
            HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
        )  # fmt: skip
        do1, do2 = load_tile(dout, rows, dout_n, q_length, HEAD_DIM, V_FIRST, V_SECOND, "", True)
        s = product(k1, q1, k2, q2, SECOND, PRECISION) * scale
        s = tl.where(kept[:, None], s, float("-inf"))
        m = tl.max(s, axis=0)
        if key_mask is not None:  # a query without keys: any finite number will do
            m = tl.where(m == float("-inf"), 0.0, m)
        p = power(s - m[None, :], NATURAL)
        l = tl.sum(p, axis=0)
        if key_mask is not None:
            l = tl.where(l == 0.0, 1.0, l)
        p = p * (1.0 / l)[None, :]
        dp = product(v1, do1, v2, do2, V_SECOND, PRECISION)
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
        dq1, dq2, w1, w2, b1, b2 = head_gradient(
            dq1, dq2, q, rows, q_n, q_length, q_weight, sin, cos, skipped, eps,
            HEAD_DIM, FIRST, SECOND, ROPE, RMS,
        )  # fmt: skip
        store_tile(dq, rows, dq_n, q_length, dq1, dq2, HEAD_DIM, FIRST, SECOND, ROPE)
        if partial is not None:
            sum_w1 += tl.sum(w1, axis=0)
            sum_b1 += tl.sum(b1, axis=0)
            if SECOND:
                sum_w2 += tl.sum(w2, axis=0)
                sum_b2 += tl.sum(b2, axis=0)

    # First, as the way back through norm and rotation needs registers.
    store_tile(dv, keys, dk_n, k_length, dv1, dv2, HEAD_DIM, V_FIRST, V_SECOND, "")
    dk1, dk2, w1, w2, b1, b2 = head_gradient(
        dk1 * factor, dk2 * factor, k, keys, k_n, k_length, k_weight, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS,
    )  # fmt: skip
    store_tile(dk, keys, dk_n, k_length, dk1, dk2, HEAD_DIM, FIRST, SECOND, ROPE)
    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * 4 * HEAD_DIM
        store_sums(partial, sum_w1, sum_w2, sum_b1, sum_b2, HEAD_DIM, FIRST, SECOND, ROPE)
        store_sums(
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
    k1, k2 = load_head(
        k, keys, k_n, length, k_weight, k_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, MASKED,
    )  # fmt: skip
    s = product(q1, k1, q2, k2, SECOND, PRECISION) * scale
    p = power(s - row_max[:, None], NATURAL)
    p = p * (1.0 / row_sum)[:, None]
    if MASKED:
        p = tl.where((keys < length)[None, :], p, 0.0)
    if key_mask is not None:
        kept = tl.load(key_mask + keys, mask=keys < length, other=0)
        p = tl.where((kept != 0)[None, :], p, 0.0)
    v1, v2 = load_tile(v, keys, k_n, length, HEAD_DIM, V_FIRST, V_SECOND, "", MASKED)
    dp = product(do1, v1, do2, v2, V_SECOND, PRECISION)
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
    dout += head_offset(cu_seqlens, b, h, q_row, dout_b, dout_n, dout_h, HEAD_ALIGN)
    dq += head_offset(cu_seqlens, b, h, q_row, dq_b, dq_n, dq_h, HEAD_ALIGN)
    out += q_row * H * HEAD_DIM + tl.multiple_of(h * HEAD_DIM, HEAD_ALIGN)
    query = h.to(tl.int64) * total + q_row
    sums = stats + tl.cast(H, tl.int64) * total + query
    stats += query
    delta += query
    if key_mask is not None:
        key_mask += b.to(tl.int64) * Nk

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = load_head(
        q, rows, q_n, q_length, q_weight, q_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
    )  # fmt: skip
    do1, do2 = load_tile(dout, rows, dout_n, q_length, HEAD_DIM, V_FIRST, V_SECOND, "", True)
    o1, o2 = load_tile(out, rows, H * HEAD_DIM, q_length, HEAD_DIM, V_FIRST, V_SECOND, "", True)
    row_delta = tl.sum(do1.to(tl.float32) * o1.to(tl.float32), axis=1)
    if V_SECOND:
        row_delta += tl.sum(do2.to(tl.float32) * o2.to(tl.float32), axis=1)
    tl.store(delta + rows, row_delta, mask=rows < q_length)
    row_max, row_sum = load_stats(stats, sums, rows, q_length, NATURAL)

    dq1, dq2 = zero_tile(BLOCK_M, FIRST, SECOND)
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
    dq1, dq2, w1, w2, b1, b2 = head_gradient(
        dq1 * factor, dq2 * factor, q, rows, q_n, q_length, q_weight, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS,
    )  # fmt: skip
    store_tile(dq, rows, dq_n, q_length, dq1, dq2, HEAD_DIM, FIRST, SECOND, ROPE)
    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * 2 * HEAD_DIM
        store_sums(
            partial, tl.sum(w1, axis=0), tl.sum(w2, axis=0), tl.sum(b1, axis=0),
            tl.sum(b2, axis=0), HEAD_DIM, FIRST, SECOND, ROPE,
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
    block, b, h = locate(blocks, H)
    q_length, q_row = extent(cu_seqlens, b, Nq)
    k_length, k_row = extent(cu_seqlens, b, Nk)
    if cu_seqlens is not None:
        sin = None if sin is None else sin + q_row * (HEAD_DIM // 2)
        cos = None if cos is None else cos + q_row * (HEAD_DIM // 2)
        if block * BLOCK_N >= k_length:
            return
    q += head_offset(cu_seqlens, b, h, q_row, q_b, q_n, q_h, HEAD_ALIGN)
    k_start = head_offset(cu_seqlens, b, h, k_row, k_b, k_n, k_h, HEAD_ALIGN)
    k += k_start
    v += k_start
    dout += head_offset(cu_seqlens, b, h, q_row, dout_b, dout_n, dout_h, HEAD_ALIGN)
    dk_start = head_offset(cu_seqlens, b, h, k_row, dk_b, dk_n, dk_h, HEAD_ALIGN)
    dk += dk_start
    dv += dk_start
    query = h.to(tl.int64) * total + q_row
    sums = stats + tl.cast(H, tl.int64) * total + query
    stats += query
    delta += query

    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k1, k2 = load_head(
        k, keys, k_n, k_length, k_weight, k_bias, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
    )  # fmt: skip
    v1, v2 = load_tile(v, keys, k_n, k_length, HEAD_DIM, V_FIRST, V_SECOND, "", True)
    kept = keys < k_length
    if key_mask is not None:
        key_mask += b.to(tl.int64) * Nk
        kept = kept & (tl.load(key_mask + keys, mask=kept, other=0) != 0)

    dk1, dk2 = zero_tile(BLOCK_N, FIRST, SECOND)
    dv1, dv2 = zero_tile(BLOCK_N, V_FIRST, V_SECOND)
    for start in range(0, q_length, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q1, q2 = load_head(
            q, rows, q_n, q_length, q_weight, q_bias, sin, cos, skipped, eps,
            HEAD_DIM, FIRST, SECOND, ROPE, RMS, True,
        )  # fmt: skip
        row_max, row_sum = load_stats(stats, sums, rows, q_length, NATURAL)
        s = product(k1, q1, k2, q2, SECOND, PRECISION) * scale
        p = power(s - row_max[None, :], NATURAL)
        p = p * (1.0 / row_sum)[None, :]
        if key_mask is not None:
            p = tl.where(kept[:, None], p, 0.0)
        do1, do2 = load_tile(dout, rows, dout_n, q_length, HEAD_DIM, V_FIRST, V_SECOND, "", True)
        p_low = p.to(q1.dtype)
        dv1 = tl.dot(p_low, do1, acc=dv1, input_precision=PRECISION)
        if V_SECOND:
            dv2 = tl.dot(p_low, do2, acc=dv2, input_precision=PRECISION)
        dp = product(v1, do1, v2, do2, V_SECOND, PRECISION)
        row_delta = tl.load(delta + rows, mask=rows < q_length, other=0.0)
        ds = (p * (dp - row_delta[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, acc=dk1, input_precision=PRECISION)
        if SECOND:
            dk2 = tl.dot(ds, q2, acc=dk2, input_precision=PRECISION)

    factor = scale if NATURAL else scale * 0.6931471805599453  # without log2(e)
    # First, as the way back through norm and rotation needs registers.
    store_tile(dv, keys, dk_n, k_length, dv1, dv2, HEAD_DIM, V_FIRST, V_SECOND, "")
    dk1, dk2, w1, w2, b1, b2 = head_gradient(
        dk1 * factor, dk2 * factor, k, keys, k_n, k_length, k_weight, sin, cos, skipped, eps,
        HEAD_DIM, FIRST, SECOND, ROPE, RMS,
    )  # fmt: skip
    store_tile(dk, keys, dk_n, k_length, dk1, dk2, HEAD_DIM, FIRST, SECOND, ROPE)
    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * 2 * HEAD_DIM
        store_sums(
            partial, tl.sum(w1, axis=0), tl.sum(w2, axis=0), tl.sum(b1, axis=0),
            tl.sum(b2, axis=0), HEAD_DIM, FIRST, SECOND, ROPE,
        )  # fmt: skip
