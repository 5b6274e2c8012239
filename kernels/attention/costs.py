"""Samples of attention, and the FLOPs and bytes of a perfect kernel, forward and backward."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._op import Arg, Sample, total_bytes


def samples(size: str) -> Iterable[Sample]:
    """Every option at odd lengths and head sizes; or the attention of real ViTs.

    The latter are the lengths of ViTs at heads of 64, and each other head size at one length.
    """
    if size == "vit":
        for batch, tokens in ((64, 50), (64, 201), (64, 257), (16, 577), (16, 730), (4, 1370)):
            yield sample(batch, tokens, 12, 64, low=True)
        yield sample(64, 197, 12, 64)
        yield sample(64, 197, 12, 64, norm="ln", low=True)
        yield sample(64, 201, 12, 64, rope="halves", prefix=5, low=True)
        for tokens, heads, head_dim in (
            (197, 6, 32), (197, 8, 48), (729, 16, 72), (257, 16, 80), (257, 16, 88), (257, 12, 96),
            (257, 16, 104), (257, 16, 128),
        ):  # fmt: skip
            yield sample(64, tokens, heads, head_dim, low=True)
        return
    yield sample(2, 5, 2, 8)
    yield sample(1, 17, 3, 24, need_stats=True)
    yield sample(2, 1, 1, 16)
    yield sample(0, 3, 2, 8)
    yield sample(1, 21, 1, 40, need_stats=True)  # two chunks of columns
    yield sample(2, 19, 2, 16, norm="ln")
    yield sample(1, 19, 2, 40, norm="rms", rope="halves", prefix=2, low=True)
    yield sample(2, 18, 2, 16, norm="ln", rope="interleaved", prefix=1, low=True)
    yield sample(3, 18, 1, 16, mask=True)
    yield sample(2, 33, 1, 16, mask=True, need_stats=True)
    yield sample((5, 5, 22, 23), 0, 2, 16)
    yield sample((5, 5, 22, 23), 0, 1, 16, norm="rms", rope="interleaved")


def sample(
    batch: int | tuple[int, ...],
    tokens: int,
    heads: int,
    head_dim: int,
    norm: str = "",
    rope: str = "",
    prefix: int = 0,
    mask: bool = False,
    need_stats: bool = False,
    low: bool = False,
) -> Sample:
    """One call; a tuple for `batch` are the ends of sequences of varying length.

    low: in 16 bits only, as models of this kind run; float32 has a sample of its own.
    """
    if isinstance(batch, tuple):
        shape: tuple[int, ...] = (batch[-1],)
        cu_seqlens: Arg | None = Arg((len(batch) + 1,), torch.int32, values=(0, *batch))
        longest = max(b - a for a, b in pairwise((0, *batch)))
        label = f"ends={batch}"
    else:
        shape, cu_seqlens, longest, label = (batch, tokens), None, 0, f"B={batch} N={tokens}"
    vector = Arg((head_dim,), offset=1.0) if norm else None
    angles = None
    if rope:  # of the size that sines and cosines have
        angles = Arg((shape[-1] - prefix, head_dim // 2), torch.float32, scale=0.7)
    label += f" H={heads} d={head_dim}"
    label += f" {norm}-qk-norm" * bool(norm) + f" rope {rope}" * bool(rope)
    label += " key mask" * mask + " stats" * need_stats
    args = {
        "qkv": Arg((*shape, 3, heads, head_dim)),
        "q_weight": vector,
        "q_bias": vector if norm == "ln" else None,
        "k_weight": vector,
        "k_bias": vector if norm == "ln" else None,
        "sin": angles,
        "cos": angles,
        "key_mask": Arg(shape, torch.bool) if mask else None,
        "cu_seqlens": cu_seqlens,
    }
    options = {
        "eps": 1e-6,
        "rms": norm == "rms",
        "interleaved": rope == "interleaved",
        "scale": head_dim**-0.5,
        "max_seqlen": longest,
        "need_stats": need_stats,
    }
    return Sample(label, args, options, dtypes=(torch.bfloat16, torch.float16) if low else None)


def pairs(qkv: Tensor, cu_seqlens: Tensor | None) -> int:
    """Pairs of a query and a key; sequences of varying length count as equally long."""
    if cu_seqlens is None:
        return qkv.shape[0] * qkv.shape[1] ** 2
    return qkv.shape[0] ** 2 // max(1, cu_seqlens.numel() - 1)


def flops(qkv: Tensor, cu_seqlens: Tensor | None, **_: Any) -> int:
    """Two products of N x N x d a head."""
    return 4 * pairs(qkv, cu_seqlens) * qkv.shape[-2] * qkv.shape[-1]


def bytes_moved(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    need_stats: bool,
    **_: Any,
) -> int:
    """qkv and the small arguments in, a third of its size out, and perhaps two float32 a row."""
    small = total_bytes(q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens)
    rows = 8 * qkv.numel() // (3 * qkv.shape[-1]) if need_stats else 0
    return total_bytes(qkv) * 4 // 3 + small + rows


def backward_flops(qkv: Tensor, cu_seqlens: Tensor | None, **_: Any) -> int:
    """Five products of N x N x d a head."""
    return 10 * pairs(qkv, cu_seqlens) * qkv.shape[-2] * qkv.shape[-1]


def backward_bytes_moved(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    stats: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    **_: Any,
) -> int:
    """Gradient, qkv and what was saved in; the gradient of qkv and of the norms out."""
    norms = total_bytes(q_weight, q_bias, k_weight, k_bias)
    params = 0 if q_weight is None else 4 * total_bytes(q_weight)
    saved = total_bytes(out, stats, sin, cos, key_mask, cu_seqlens)
    return total_bytes(dout, qkv, qkv) + saved + norms + params
