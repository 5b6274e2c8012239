"""The definition of attention and of its gradients, and the same by PyTorch's own attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _norm
from .._op import accumulate_dtype


def padded_index(cu_seqlens: Tensor, total: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Between packed [total] and padded [B, longest] tokens, without waiting for a GPU.

    Returns (packed index of each padded place [B, longest], which of them exist,
    padded index of each packed token [total]).
    """
    first, last = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    place = torch.arange(longest, device=cu_seqlens.device)
    packed = first[:, None] + place
    exists = packed < last[:, None]
    token = torch.arange(total, device=cu_seqlens.device)
    image = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
    return packed.clamp(max=max(total - 1, 0)), exists, image * longest + token - first[image]


class QKNorm(NamedTuple):
    """Norm of queries and keys over the head dimension: weights and biases [d]."""

    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    eps: float = 1e-6
    rms: bool = False


class Rope(NamedTuple):
    """Rotary position embedding: angles [L, d / 2] of the last L tokens, the only ones to turn.

    interleaved: pairs are neighbours (0, 1), (2, 3), ... as in EVA; otherwise halves, (0, d / 2),
        (1, d / 2 + 1), ... as in DINOv3.
    """

    sin: Tensor
    cos: Tensor
    interleaved: bool = False


class Options(NamedTuple):
    """All that may be asked of attention beyond q, k, v and a scale, as the op takes it."""

    q_weight: Tensor | None = None  # [d], as the three that follow
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    sin: Tensor | None = None  # [L, d / 2]: angles of the last L tokens
    cos: Tensor | None = None
    key_mask: Tensor | None = None  # bool [B, N]
    cu_seqlens: Tensor | None = None  # int32 [B + 1]
    eps: float = 0.0
    rms: bool = False
    interleaved: bool = False
    max_seqlen: int = 0


def tensors_of(options: Options) -> tuple[Tensor | None, ...]:
    """The tensors of these options, in order: all but the last four fields."""
    o = options  # field by field: PyTorch 2.8's compiler can't trace a slice of a NamedTuple
    norms = (o.q_weight, o.q_bias, o.k_weight, o.k_bias)
    return (*norms, o.sin, o.cos, o.key_mask, o.cu_seqlens)


class Heads(NamedTuple):
    """Queries, keys and values [B, H, N, d] as the product takes them, and who may be attended."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None  # bool [B, 1, 1, N]
    place: Tensor | None  # index of each packed token among the padded ones


def pad(qkv: Tensor, options: Options) -> tuple[Tensor, Options, Tensor | None]:
    """Sequences of varying length as a batch with a key mask; others as they are."""
    cu_seqlens, sin, cos = options.cu_seqlens, options.sin, options.cos
    if cu_seqlens is None:
        return qkv, options, None
    place, exists, index = padded_index(cu_seqlens, qkv.shape[0], options.max_seqlen)
    if sin is not None and cos is not None:
        sin, cos = sin[place][:, None], cos[place][:, None]  # [B, 1, N, d / 2]
    return qkv[place], options._replace(key_mask=exists, sin=sin, cos=cos, cu_seqlens=None), index


def rotate(x: Tensor, sin: Tensor, cos: Tensor, options: Options) -> Tensor:
    """x [..., N, d] with the pairs of its last L tokens turned by their angles [..., L, d / 2]."""
    skipped = x.shape[-2] - sin.shape[-2]
    prefix, x = x[..., :skipped, :], x[..., skipped:, :]
    axis = -1 if options.interleaved else -2
    pairs = x.unflatten(-1, (-1, 2) if options.interleaved else (2, -1))
    first, second = pairs.unbind(axis)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], axis)
    return torch.cat([prefix, turned.flatten(-2)], -2)


def prepare(
    q: Tensor, k: Tensor, options: Options, acc: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Norm and rotate queries and keys [..., N, d]; in `acc`, which is then their dtype, or by
    ATen's norm in their own dtype where that is None.
    """
    q_weight, q_bias, k_weight, k_bias, sin, cos, *_ = options
    eps, rms, dtype = options.eps, options.rms, q.dtype
    if q_weight is not None and k_weight is not None:
        if acc is None:
            q = _norm.aten_norm(q, q_weight, q_bias, eps, rms).to(dtype)
            k = _norm.aten_norm(k, k_weight, k_bias, eps, rms).to(dtype)
        else:
            q = _norm.normalise(q, eps, rms)[0] * q_weight.to(acc)
            k = _norm.normalise(k, eps, rms)[0] * k_weight.to(acc)
            q = q if q_bias is None else q + q_bias.to(acc)
            k = k if k_bias is None else k + k_bias.to(acc)
    if sin is not None and cos is not None:
        turn = acc or torch.promote_types(sin.dtype, dtype)
        q, k = (rotate(x.to(turn), sin.to(turn), cos.to(turn), options).to(dtype) for x in (q, k))
    return q, k


def heads(qkv: Tensor, options: Options, acc: torch.dtype | None) -> Heads:
    """Pad, norm and rotate; in `acc`, or by ATen's norm in the input's dtype where that is None."""
    qkv, options, index = pad(qkv if acc is None else qkv.to(acc), options)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = prepare(q, k, options, acc)
    mask = options.key_mask
    return Heads(q, k, v, None if mask is None else mask[:, None, None, :], index)


def packed(out: Tensor, index: Tensor | None) -> Tensor:
    """[B, H, N, d] -> [B, N, H*d], or the packed tokens [total, H*d]; contiguous."""
    out = out.transpose(1, 2).flatten(2)
    return out.contiguous() if index is None else out.flatten(0, 1)[index]


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of the logits [B, H, Nq, Nk]; and, [2, B, H, Nq], each query's largest logit times
    log2(e) and its sum of exponentials. A query without keys has probabilities 0, and 0 and 1.
    """
    logits = q @ k.transpose(-2, -1) * scale
    if logits.numel() == 0:
        return logits, logits.new_zeros(2, *logits.shape[:-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    largest = logits.amax(-1, keepdim=True)
    largest = largest.where(largest != float("-inf"), 0)
    p = (logits - largest).exp()
    total = p.sum(-1, keepdim=True)
    total = total.where(total != 0, 1)
    return p / total, torch.stack([largest / 0.6931471805599453, total])[..., 0]


def saved(stats: Tensor, index: Tensor | None, need_stats: bool) -> Tensor:
    """[2, B, H, N] -> [2, H, tokens] float32 (float64 for float64), or empty."""
    dtype = torch.promote_types(stats.dtype, torch.float32)
    if not need_stats:
        return stats.new_empty(0, dtype=dtype)
    stats = stats.transpose(1, 2).flatten(2)
    return (stats if index is None else stats[..., index]).to(dtype).contiguous()


def reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    rms: bool,
    interleaved: bool,
    max_seqlen: int,
    scale: float,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(qkv, q_weight, k_weight)
    options = Options(
        q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens,
        eps, rms, interleaved, max_seqlen,
    )  # fmt: skip
    q, k, v, mask, index = heads(qkv, options, acc)
    p, stats = probabilities(q, k, mask, scale)
    return packed(p @ v, index).to(qkv.dtype), saved(stats, index, need_stats)


def portable(
    qkv: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    sin: Tensor | None,
    cos: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    eps: float,
    rms: bool,
    interleaved: bool,
    max_seqlen: int,
    scale: float,
    need_stats: bool = False,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention on views, which picks a flash, cuDNN or plain kernel by itself."""
    options = Options(
        q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens,
        eps, rms, interleaved, max_seqlen,
    )  # fmt: skip
    out, acc = attend(qkv, options, scale, dropout_p), accumulate_dtype(qkv)
    if not need_stats:
        return out, qkv.new_empty(0, dtype=acc)
    q, k, _, mask, index = heads(qkv, options, None)
    return out, saved(probabilities(q.to(acc), k.to(acc), mask, scale)[1], index, True)


def attend(qkv: Tensor, options: Options, scale: float, dropout_p: float) -> Tensor:
    """`portable` without the statistics."""
    q, k, v, mask, index = heads(qkv, options, None)
    return packed(sdpa(q, k, v, mask, scale, dropout_p), index)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """scaled_dot_product_attention, and zero for a query without keys: its backends disagree."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0)


def sdpa_backend(qkv: Tensor, options: Options, scale: float, dropout_p: float) -> str:
    """Name of the kernel that PyTorch's own dispatcher takes for this call."""
    from torch.nn.attention import SDPBackend

    q, k, v, mask, _ = heads(qkv, options, None)
    number = torch._fused_sdp_choice(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return SDPBackend(number).name.lower().removesuffix("_attention")


def backward_reference(
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
    eps: float,
    rms: bool,
    interleaved: bool,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(dqkv, [dq_weight; dq_bias; dk_weight; dk_bias] as [4, d], or [0, d] without norms).

    `out` and `stats` of the forward pass only spare a kernel work; the definition needs neither.
    """
    acc = accumulate_dtype(dout, qkv, q_weight)
    options = Options(
        q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens,
        eps, rms, interleaved, max_seqlen,
    )  # fmt: skip
    q, k, v, mask, index = heads(qkv, options, acc)
    dout = dout.to(acc).unflatten(-1, qkv.shape[-2:])
    if cu_seqlens is not None:
        place, exists, _ = padded_index(cu_seqlens, qkv.shape[0], max_seqlen)
        dout = dout[place] * exists[..., None, None]
    qkv, options, _ = pad(qkv, options)
    dout = dout.transpose(1, 2)
    p = probabilities(q, k, mask, scale)[0]
    dp = dout @ v.transpose(-2, -1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ds @ k, ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ dout
    if options.sin is not None and options.cos is not None:  # the inverse rotation
        angles = -options.sin.to(acc), options.cos.to(acc), options
        dq, dk = rotate(dq, *angles), rotate(dk, *angles)
    params = qkv.new_empty((0, qkv.shape[-1]))
    if q_weight is not None and k_weight is not None:
        raw_q, raw_k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        sums = []
        for d, raw, weight in ((dq, raw_q, q_weight), (dk, raw_k, k_weight)):
            sums += [_norm.reference_backward(d, raw, weight, eps, rms)[1], d]
        params = torch.stack([x.sum((0, 1, 2)) for x in sums]).to(q_weight.dtype)
        dq = _norm.reference_backward(dq, raw_q, q_weight, eps, rms)[0]
        dk = _norm.reference_backward(dk, raw_k, k_weight, eps, rms)[0]
    dqkv = torch.stack([dq, dk, dv]).permute(1, 3, 0, 2, 4)  # [B, N, 3, H, d]
    if index is not None:
        dqkv = dqkv.flatten(0, 1)[index]
    return dqkv.to(qkv.dtype).contiguous(), params


def backward_portable(
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
    eps: float,
    rms: bool,
    interleaved: bool,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention forward and, by autograd, backward.

    A compiler can't trace a backward pass inside another: it gets the formulas.
    """
    if torch.compiler.is_compiling():
        return backward_reference(
            dout, qkv, out, stats, q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask,
            cu_seqlens, eps, rms, interleaved, max_seqlen, scale,
        )  # fmt: skip
    if q_weight is not None:  # a bias that isn't there has the gradient of a zero
        q_bias = torch.zeros_like(q_weight) if q_bias is None else q_bias
        k_bias = torch.zeros_like(q_weight) if k_bias is None else k_bias
    given = (qkv, q_weight, q_bias, k_weight, k_bias)
    leaves = [None if t is None else t.detach().requires_grad_() for t in given]
    wanted = [t for t in leaves if t is not None]
    options = Options(
        leaves[1], leaves[2], leaves[3], leaves[4], sin, cos, key_mask, cu_seqlens,
        eps, rms, interleaved, max_seqlen,
    )  # fmt: skip
    with torch.enable_grad():
        q, k, v, mask, place = heads(wanted[0], options, None)
        result = packed(sdpa(q, k, v, mask, scale), place)
    dqkv, *params = torch.autograd.grad(result, wanted, dout)
    if q_weight is None:
        return dqkv.contiguous(), qkv.new_empty((0, qkv.shape[-1]))
    return dqkv.contiguous(), torch.stack([g.to(q_weight.dtype) for g in params])
