"""Self-attention over the packed qkv tensor, exactly as the qkv projection writes it.

    q, k, v = qkv.unbind(2);  q, k = norm(q), norm(k) where asked for
    out = softmax(q k^T * scale) v         per image and head

Forward:  qkv [B, N, 3, H, d] -> out [B, N, H*d], as the output projection reads it.
Backward: with P = softmax(...), delta = rowsum(dout * out):
    dv = P^T dout,  dS = P * (dout v^T - delta),  dq = dS k * scale,  dk = dS^T q * scale.
Bytes: qkv + out (4 D a token) forward; qkv, dout, out and dqkv backward.
FLOPs: 4 B H N^2 d forward.

The portable implementation is PyTorch's scaled_dot_product_attention on views, copying nothing.
Source: Vaswani et al., "Attention Is All You Need", 2017; QK-norm: Henry et al., 2020.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from . import _norm
from ._op import (
    Arg,
    Sample,
    accumulate_dtype,
    check_floating,
    check_shape,
    choose,
    define,
    total_bytes,
)


class QKNorm(NamedTuple):
    """Norm of queries and keys over the head dimension: weights and biases [d]."""

    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    eps: float = 1e-6
    rms: bool = False


def reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    rms: bool,
    scale: float,
) -> Tensor:
    """The definition, accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(qkv, q_weight, k_weight)
    q, k, v = qkv.to(acc).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d]
    if q_weight is not None and k_weight is not None:
        q = _norm.normalise(q, eps, rms)[0] * q_weight.to(acc)
        k = _norm.normalise(k, eps, rms)[0] * k_weight.to(acc)
        q = q if q_bias is None else q + q_bias.to(acc)
        k = k if k_bias is None else k + k_bias.to(acc)
    out = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2).to(qkv.dtype).contiguous()


def portable(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    rms: bool,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """PyTorch's own attention, which picks a flash, cuDNN or plain kernel by itself."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if q_weight is not None and k_weight is not None:
        q = _norm.aten_norm(q, q_weight, q_bias, eps, rms).to(v.dtype)
        k = _norm.aten_norm(k, k_weight, k_bias, eps, rms).to(v.dtype)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).flatten(2).contiguous()


def fake(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    eps: float,
    rms: bool,
    scale: float,
) -> Tensor:
    """Shape, dtype and strides of the output."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(batch, tokens, heads * head_dim)


def samples(size: str) -> Iterable[Sample]:
    """Off-tile lengths and head sizes; or the attention of ViT-Ti/S/B/L/H, batch 64."""
    if size == "tiny":
        shapes: tuple[tuple[int, int, int, int], ...] = (
            (2, 5, 2, 8),
            (1, 17, 3, 24),
            (2, 1, 1, 16),
            (0, 3, 2, 8),
        )
    else:
        shapes = ((64, 197, 6, 64), (64, 197, 12, 64), (64, 577, 12, 64), (64, 257, 16, 80))
    for batch, tokens, heads, head_dim in shapes:
        for normed in (False, True):
            if normed and size == "vit" and head_dim != 64:
                continue
            vector = Arg((head_dim,), offset=1.0) if normed else None
            args = {
                "qkv": Arg((batch, tokens, 3, heads, head_dim)),
                "q_weight": vector,
                "q_bias": vector,
                "k_weight": vector,
                "k_bias": vector,
            }
            label = f"B={batch} N={tokens} H={heads} d={head_dim}{' qk-norm' * normed}"
            yield Sample(label, args, {"eps": 1e-6, "rms": False, "scale": head_dim**-0.5})


def flops(qkv: Tensor, **_: Any) -> int:
    """Two products of N x N x d a head."""
    batch, tokens, _three, heads, head_dim = qkv.shape
    return 4 * batch * heads * tokens * tokens * head_dim


def bytes_moved(qkv: Tensor, **_: Any) -> int:
    """qkv in, a third of its size out."""
    return total_bytes(qkv) * 4 // 3


ATTENTION = define(
    "attention",
    reference=reference,
    portable=portable,
    portable_name="sdpa",
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
)


def attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    qk_norm: QKNorm | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Multi-head self-attention over packed queries, keys and values.

    Args:
        qkv: [B, N, 3, H, d], any strides.
        scale: factor on the logits; d ** -0.5 if None.
        qk_norm: norm of queries and keys, or None.
        dropout_p: probability of dropping an attention weight; pass 0 outside training.
        impl: "auto", "sdpa" (PyTorch's own) or "reference" (no dropout).

    Returns:
        [B, N, H*d], contiguous, in the dtype of `qkv`.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, tensors on several devices, an `impl` that can't run.
    """
    check_floating("attention", qkv=qkv)
    check_shape("attention", "qkv", qkv, "B", "N", 3, "H", "d")
    q_weight: Tensor | None = None
    q_bias = k_weight = k_bias = q_weight
    eps, rms = 0.0, False
    if qk_norm is not None:
        q_weight, q_bias, k_weight, k_bias, eps, rms = qk_norm
        vectors = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
        check_floating("attention", qkv=qkv, **vectors)
        for name, vector in vectors.items():
            check_shape("attention", f"qk_norm.{name}", vector, qkv.shape[4])
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attention: dropout_p must be in [0, 1), got {dropout_p}")
    scale = qkv.shape[4] ** -0.5 if scale is None else scale
    unfit = {"reference": "it has no dropout"} if dropout_p else None
    chosen = choose(ATTENTION, impl, qkv, q_weight, q_bias, k_weight, k_bias, unfit=unfit)
    arguments = (qkv, q_weight, q_bias, k_weight, k_bias, eps, rms, scale)
    return portable(*arguments, dropout_p) if chosen == "sdpa" else reference(*arguments)


def pool_reference(q: Tensor, kv: Tensor, scale: float) -> Tensor:
    """The definition, accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(q, kv)
    k, v = kv.to(acc).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d]
    out = (q.to(acc).transpose(1, 2) @ k.transpose(-2, -1) * scale).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2).to(kv.dtype).contiguous()


def pool_portable(q: Tensor, kv: Tensor, scale: float) -> Tensor:
    """PyTorch's own attention."""
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale)
    return out.transpose(1, 2).flatten(2).contiguous()


def pool_fake(q: Tensor, kv: Tensor, scale: float) -> Tensor:
    """Shape, dtype and strides of the output."""
    batch, queries, heads, head_dim = q.shape
    return kv.new_empty(batch, queries, heads * head_dim)


def pool_samples(size: str) -> Iterable[Sample]:
    """Odd shapes; or the pooling head of a SigLIP-B/16, batch 64."""
    shapes = ((2, 1, 5, 2, 8), (1, 3, 17, 1, 24)) if size == "tiny" else ((64, 1, 196, 12, 64),)
    for batch, queries, tokens, heads, head_dim in shapes:
        yield Sample(
            f"B={batch} Q={queries} N={tokens} H={heads} d={head_dim}",
            {
                "q": Arg((batch, queries, heads, head_dim)),
                "kv": Arg((batch, tokens, 2, heads, head_dim)),
            },
            {"scale": head_dim**-0.5},
        )


def pool_flops(q: Tensor, kv: Tensor, **_: Any) -> int:
    """Two products of Q x N x d a head."""
    return 4 * q.numel() * kv.shape[1]


def pool_bytes_moved(q: Tensor, kv: Tensor, **_: Any) -> int:
    """q and kv in, one row a query out."""
    return total_bytes(q, kv, q)


ATTENTION_POOL = define(
    "attention_pool",
    reference=pool_reference,
    portable=pool_portable,
    portable_name="sdpa",
    fake=pool_fake,
    samples=pool_samples,
    flops=pool_flops,
    bytes_moved=pool_bytes_moved,
)


def attention_pool(
    q: Tensor, kv: Tensor, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Attention of one or a few learned queries over all tokens.

    Args:
        q: queries [B, Q, H, d].
        kv: packed keys and values [B, N, 2, H, d].
        scale: factor on the logits; d ** -0.5 if None.
        impl: "auto", "sdpa" or "reference".

    Returns:
        [B, Q, H*d], contiguous, in the dtype of `kv`.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, tensors on several devices, an `impl` that can't run.
    """
    check_floating("attention_pool", q=q, kv=kv)
    check_shape("attention_pool", "kv", kv, "B", "N", 2, "H", "d")
    check_shape("attention_pool", "q", q, kv.shape[0], "Q", kv.shape[3], kv.shape[4])
    scale = kv.shape[4] ** -0.5 if scale is None else scale
    run = pool_portable if choose(ATTENTION_POOL, impl, q, kv) == "sdpa" else pool_reference
    return run(q, kv, scale)
