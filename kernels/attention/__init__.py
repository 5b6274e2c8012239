"""Self-attention over the packed qkv tensor, exactly as the qkv projection writes it.

    q, k, v = qkv.unbind(-3);  q, k = norm(q), norm(k);  q, k = rotate(q), rotate(k)    if asked
    out = softmax(q k^T * scale) v         per image and head, over the keys that take part

Forward:  qkv [B, N, 3, H, d], or [total, 3, H, d] with images from cu_seqlens[b] to [b + 1]
    -> out [B, N, H*d] or [total, H*d], as the output projection reads it.
Backward: with P = softmax(...), delta = rowsum(P * dP) = rowsum(dout * out):
    dv = P^T dout,  dP = dout v^T,  dS = P * (dP - delta),  dq = dS k * scale,  dk = dS^T q * scale,
    written as dqkv in the layout of qkv; then back through rotation and norm, in registers.
Saved for backward: qkv. If a head's keys are too many for the single pass (`launch.single_pass`)
    also out, which the projection keeps anyway, and two float32 a query and head: the largest
    logit and the sum of exponentials. (One number, the logarithm of both, would round away what is
    left of exp(logit - largest) where logits are large.)
Bytes: qkv + out forward; qkv + dout + dqkv backward, and out where it is saved.
FLOPs: 4 B H N^2 d forward, 10 B H N^2 d backward; in two launches it takes 14.

Sources: Vaswani et al., "Attention Is All You Need", 2017; online softmax and recomputation: Dao et
al., "FlashAttention", 2022; QK-norm: Henry et al., 2020; rotary embedding: Su et al., "RoFormer",
2021, over two axes as in Fang et al., "EVA-02", 2023 and Simeoni et al., "DINOv3", 2025.

This folder in the order of an op file: reference.py; the kernels in tiles.py, forward.py and
backward.py; launch.py; flash.py (the packages of that name); and here samples, costs, define(),
autograd and the public function. pool.py is the second form, one or few queries against many keys,
on the same kernels; rope.py makes the angles.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._op import (
    Arg,
    Sample,
    accumulate_dtype,
    check_floating,
    check_shape,
    choose,
    define,
    dtype_name,
    total_bytes,
    wants_grad,
)
from . import flash
from .launch import MAX_HEAD_DIM, backward, forward, make_case, rows_dense, single_pass
from .pool import attention_pool
from .reference import (
    Options,
    QKNorm,
    Rope,
    attend,
    backward_portable,
    backward_reference,
    portable,
    reference,
    sdpa_backend,
)
from .rope import axial_rope

__all__ = ["QKNorm", "Rope", "attention", "attention_pool", "axial_rope"]


def launch_forward(
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
    """One launch of the forward kernel on views of qkv."""
    options = Options(
        q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens,
        eps, rms, interleaved, max_seqlen,
    )  # fmt: skip
    q, k, v = rows_dense(qkv).unbind(-3)
    return forward(q, k, v, options, scale, need_stats)


def fake(
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
    """Shapes, dtypes and strides of the outputs."""
    *tokens, _, heads, head_dim = qkv.shape
    stats = (2, heads, math.prod(tokens)) if need_stats else (0,)
    return (
        qkv.new_empty((*tokens, heads * head_dim)),
        qkv.new_empty(stats, dtype=accumulate_dtype(qkv)),
    )


def samples(size: str) -> Iterable[Sample]:
    """Every option at odd lengths and head sizes; or the attention of real ViTs.

    The latter are the lengths of ViTs at heads of 64, and each other head size at one length.
    """
    if size == "vit":
        for batch, tokens in ((64, 50), (64, 201), (64, 257), (16, 577), (16, 730), (4, 1370)):
            yield _sample(batch, tokens, 12, 64, low=True)
        yield _sample(64, 197, 12, 64)
        yield _sample(64, 197, 12, 64, norm="ln", low=True)
        yield _sample(64, 201, 12, 64, rope="halves", prefix=5, low=True)
        for tokens, heads, head_dim in (
            (197, 6, 32), (197, 8, 48), (729, 16, 72), (257, 16, 80), (257, 16, 88), (257, 12, 96),
            (257, 16, 104), (257, 16, 128),
        ):  # fmt: skip
            yield _sample(64, tokens, heads, head_dim, low=True)
        return
    yield _sample(2, 5, 2, 8)
    yield _sample(1, 17, 3, 24, need_stats=True)
    yield _sample(2, 1, 1, 16)
    yield _sample(0, 3, 2, 8)
    yield _sample(1, 21, 1, 40, need_stats=True)  # two chunks of columns
    yield _sample(2, 19, 2, 16, norm="ln")
    yield _sample(1, 19, 2, 40, norm="rms", rope="halves", prefix=2, need_stats=True, low=True)
    yield _sample(2, 18, 2, 16, norm="ln", rope="interleaved", prefix=1, low=True)
    yield _sample(3, 18, 1, 16, mask=True)
    yield _sample(2, 33, 1, 16, mask=True, need_stats=True)
    yield _sample((5, 5, 22, 23), 0, 2, 16)
    yield _sample((5, 5, 22, 23), 0, 1, 16, norm="rms", rope="interleaved", need_stats=True)


def _sample(
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
        # Those of rotated float16 are one rounding of q and k: luck, on so few values.
        "need_stats": need_stats and not rope,
    }
    return Sample(label, args, options, dtypes=(torch.bfloat16, torch.float16) if low else None)


def to_public(arguments: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments as those of `attention`."""
    norms = [arguments[name] for name in ("q_weight", "q_bias", "k_weight", "k_bias", "eps", "rms")]
    sin, cos, interleaved = (arguments[name] for name in ("sin", "cos", "interleaved"))
    kept = ("qkv", "scale", "key_mask", "cu_seqlens")
    return {
        **{name: arguments[name] for name in kept},
        "qk_norm": None if norms[0] is None else QKNorm(*norms),
        "rope": None if sin is None else Rope(sin, cos, interleaved),
        "max_seqlen": arguments["max_seqlen"] or None,
    }


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


def by_flash(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op by a FlashAttention package, in the form of `portable`."""

    def run(
        qkv: Tensor, *, scale: float, need_stats: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if need_stats:
            raise ValueError("attention: the FlashAttention packages hand out no statistics")
        return flash.run(name, qkv, Options(**options), scale), qkv.new_empty(0)

    return run


ATTENTION = define(
    "attention",
    reference=reference,
    portable=portable,
    portable_name="sdpa",
    launcher=launch_forward,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
    to_public=to_public,
    peers={name: by_flash(name) for name in ("flash", *flash.NAMES)},
)


def backward_launch(
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
    """One launch without `out` and `stats`, two with them; the norms' gradients take small sums."""
    options = Options(
        q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens,
        eps, rms, interleaved, max_seqlen,
    )  # fmt: skip
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q, k, v = rows_dense(qkv).unbind(-3)
    dq, dk, dv = dqkv.unbind(-3)
    params = backward(dout, q, k, v, out, stats, dq, dk, dv, options, scale)
    return dqkv, params


def backward_fake(
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
    """Shapes, dtypes and strides of the outputs."""
    head_dim = qkv.shape[-1]
    params = qkv.new_empty((0, head_dim)) if q_weight is None else q_weight.new_empty((4, head_dim))
    return qkv.new_empty(qkv.shape), params


def needs_stats(qkv: Tensor, options: Options) -> bool:
    """Whether backward, of this call on this device, takes two launches."""
    keys = qkv.shape[1] if options.cu_seqlens is None else options.max_seqlen
    return not single_pass(keys, make_case(qkv, options))


def backward_samples(size: str) -> Iterable[Sample]:
    """The forward's samples with a gradient; with what was saved where it would be."""
    for sample in samples(size):
        args, options = dict(sample.args), dict(sample.options)
        qkv = args.pop("qkv")
        assert qkv is not None
        *tokens, _, heads, head_dim = qkv.shape
        options.pop("need_stats")
        tiny_stats = sample.label.endswith("stats")
        yield Sample(
            sample.label,
            {"dout": Arg((*tokens, heads * head_dim)), "qkv": qkv, "out": None, "stats": None}
            | args,
            options,
            derive=saved_by_forward if tiny_stats else saved_if_needed if size == "vit" else None,
            dtypes=sample.dtypes,
        )


def saved_by_forward(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the forward pass with these arguments keeps for two launches backward."""
    inputs = {k: v for k, v in arguments.items() if k not in ("dout", "out", "stats")}
    out, stats = ATTENTION.call(**inputs, need_stats=True)
    return {"out": out, "stats": stats}


def saved_if_needed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, where backward would take two launches."""
    options = Options(**{name: arguments[name] for name in Options._fields})
    return saved_by_forward(arguments) if needs_stats(arguments["qkv"], options) else {}


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


ATTENTION_BACKWARD = define(
    "attention_backward",
    reference=backward_reference,
    portable=backward_portable,
    portable_name="sdpa",
    launcher=backward_launch,
    fake=backward_fake,
    samples=backward_samples,
    flops=backward_flops,
    bytes_moved=backward_bytes_moved,
    backward_of="attention",
)

# From so many tokens on the products of a head outweigh its bytes, and what counts is how well a
# kernel overlaps them with the exponentials: there libraries written for one card are ahead of us.
LONG = 1024


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, qkv, q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens,
        eps, rms, interleaved, max_seqlen, scale,
    ):  # fmt: skip
        tensors = (q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens)
        options = (eps, rms, interleaved, max_seqlen, scale)
        need_stats = needs_stats(qkv, Options(*tensors, eps, rms, interleaved, max_seqlen))
        out, stats = ATTENTION.call(qkv, *tensors, *options, need_stats)
        ctx.save_for_backward(qkv, *((out, stats) if need_stats else (None, None)), *tensors)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        qkv, out, stats, *tensors = ctx.saved_tensors
        dqkv, params = ATTENTION_BACKWARD.call(dout, qkv, out, stats, *tensors, *ctx.options)
        norms = [
            params[n].to(tensors[n].dtype) if ctx.needs_input_grad[1 + n] else None
            for n in range(4)
        ]
        return (dqkv if ctx.needs_input_grad[0] else None, *norms, *(None,) * 9)


def sequence_length(cu_seqlens: Tensor, total: int, max_seqlen: int | None) -> int:
    """The longest sequence; where it costs no waiting for a GPU, after a look at the values.

    Raises:
        TypeError, ValueError: what is wrong with `cu_seqlens`.
    """
    name = "attention: cu_seqlens"
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {dtype_name(cu_seqlens.dtype)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name} must be [B + 1] with B >= 1, got {list(cu_seqlens.shape)}")
    if max_seqlen is not None and (
        cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling()
    ):
        return max_seqlen
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{name} must start at 0, got {ends[0]}")
    if ends[-1] != total:
        raise ValueError(f"{name} must end at the {total} tokens of qkv, got {ends[-1]}")
    lengths = [last - first for first, last in pairwise(ends)]
    if min(lengths) < 0:
        where = next(n for n, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"{name} must not decrease, got {ends[where]} before {ends[where + 1]} at {where + 1}"
        )
    if max_seqlen is not None and max_seqlen < max(lengths):
        raise ValueError(
            f"attention: max_seqlen must be at least the longest sequence, {max(lengths)}, "
            f"got {max_seqlen}"
        )
    return max_seqlen or max(lengths)


def attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    qk_norm: QKNorm | None = None,
    rope: Rope | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Multi-head self-attention over packed queries, keys and values.

    Args:
        qkv: [B, N, 3, H, d], any strides; or [total, 3, H, d], images of varying length one after
            the other, with `cu_seqlens`. d is at most 256.
        scale: factor on the logits; d ** -0.5 if None.
        qk_norm: norm of queries and keys, or None.
        rope: rotary position embedding, after the norm, or None; with `cu_seqlens` one row of
            angles a token, [total, d / 2]. `axial_rope` makes them.
        key_mask: bool [B, N], True where a token may be attended to, or None. A query without any
            keys gives zeros.
        cu_seqlens: int32 [B + 1], where each image begins, and the total.
        max_seqlen: the longest image, or more. If None it is read from `cu_seqlens`, and the values
            are checked; with CUDA tensors that waits for the GPU, which a CUDA graph doesn't allow.
            If given with CUDA tensors, nothing is checked: results are undefined where it is wrong.
        dropout_p: probability of dropping an attention weight; pass 0 outside training.
        impl: "auto"; "triton" (ours); "flash" (the newest FlashAttention package that is installed
            and takes the call), or one by name: "flash2", "flash3", "flash4"; "sdpa" (PyTorch's
            own); "reference". Gradients of "triton" are the same bits every time, those of a
            package where ``torch.use_deterministic_algorithms`` asks for that.

    Returns:
        [B, N, H*d] or [total, H*d], contiguous, in the dtype of `qkv`.

    Raises:
        TypeError: an argument that is not floating point; a mask or lengths of another dtype.
        ValueError: a shape other than above, lengths that don't add up, tensors on several devices,
            an `impl` that can't run.
    """
    name = "attention"
    leading = ("B", "N") if cu_seqlens is None else ("total",)
    check_shape(name, "qkv", qkv, *leading, 3, "H", "d")
    total, head_dim = qkv.shape[0], qkv.shape[-1]
    q_weight: Tensor | None = None
    q_bias = k_weight = k_bias = sin = cos = q_weight
    eps, rms, interleaved, longest = 0.0, False, False, 0
    if qk_norm is not None:
        q_weight, q_bias, k_weight, k_bias, eps, rms = qk_norm
        for what, vector in (
            ("q_weight", q_weight), ("q_bias", q_bias), ("k_weight", k_weight), ("k_bias", k_bias)
        ):  # fmt: skip
            check_shape(name, f"qk_norm.{what}", vector, head_dim)
    if rope is not None:
        sin, cos, interleaved = rope
        tokens = qkv.shape[-4]
        rows = tokens if cu_seqlens is not None else "L"
        if head_dim % 2:
            raise ValueError(f"attention: rope needs an even head dimension, got {head_dim}")
        check_shape(name, "rope.sin", sin, rows, head_dim // 2)
        check_shape(name, "rope.cos", cos, *sin.shape)
        if sin.shape[0] > tokens:
            raise ValueError(
                f"attention: rope must have an angle for at most the {tokens} tokens of qkv, "
                f"got {sin.shape[0]}"
            )
    check_floating(
        name, qkv=qkv, q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias,
        sin=sin, cos=cos,
    )  # fmt: skip
    if head_dim > 256:
        raise ValueError(f"attention: d in qkv must be at most 256, got {head_dim}")
    for what, extra in (("key_mask", key_mask), ("cu_seqlens", cu_seqlens)):
        if extra is not None and extra.device != qkv.device:
            raise ValueError(f"attention: {what} is on {extra.device} and qkv on {qkv.device}")
    if key_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("attention: key_mask and cu_seqlens exclude each other")
        if key_mask.dtype != torch.bool:
            raise TypeError(f"attention: key_mask must be bool, got {dtype_name(key_mask.dtype)}")
        check_shape(name, "key_mask", key_mask, *qkv.shape[:2])
    if cu_seqlens is None and max_seqlen is not None:
        raise ValueError("attention: max_seqlen needs cu_seqlens")
    if cu_seqlens is not None:
        longest = sequence_length(cu_seqlens, total, max_seqlen)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attention: dropout_p must be in [0, 1), got {dropout_p}")
    scale = head_dim**-0.5 if scale is None else scale
    extras = (q_weight, q_bias, k_weight, k_bias, sin, cos, key_mask, cu_seqlens)
    options, tensors = Options(*extras, eps, rms, interleaved, longest), (qkv, *extras)
    unfit = {"triton": kernel_unfit(head_dim, sin, cos, dropout_p)}
    if dropout_p:
        unfit["reference"] = "it has no dropout"
    if impl in ATTENTION.peers:  # what asking costs only such a call pays
        unfit[impl] = flash.problem(impl, qkv, options, dropout_p)

    def detail(chosen: str) -> str | None:
        if chosen in ATTENTION.peers:
            return flash.describe(chosen, qkv, options, dropout_p)
        if chosen != "sdpa":
            return None
        return f"backend {sdpa_backend(qkv, options, scale, dropout_p)}"

    avoid = predicted_slower(qkv, options) if qkv.is_cuda and impl == "auto" else None
    chosen = choose(ATTENTION, impl, *tensors, unfit=unfit, avoid=avoid, detail=detail)
    if chosen == "triton":
        if wants_grad(*tensors):
            return _Attention.apply(qkv, *options, scale)
        return ATTENTION.call(qkv, *options, scale, False)[0]
    if chosen in ATTENTION.peers:
        return flash.run(chosen, qkv, options, scale, dropout_p)
    if chosen == "sdpa":
        return attend(qkv, options, scale, dropout_p)
    return reference(qkv, *options, scale, False)[0]


def kernel_unfit(
    head_dim: int, sin: Tensor | None, cos: Tensor | None, dropout_p: float
) -> str | None:
    """Why our kernel can't take a call of these options; None where it can."""
    if dropout_p:
        return "it has no dropout"
    if head_dim > MAX_HEAD_DIM:
        return f"no kernel for heads of {head_dim}, above {MAX_HEAD_DIM}"
    if wants_grad(sin, cos):
        return "it has no gradient for the angles of rope"
    return None


def predicted_slower(qkv: Tensor, options: Options) -> str | None:
    """Why auto leaves our kernel alone, though it could run. Not measured yet."""
    case = make_case(qkv, options)
    if case.dtype == torch.float32 and (case.width > 64 or not case.plain):
        return "float32, wide heads or options: our kernels may spill registers"
    if case.plain and qkv.shape[1] > LONG:
        return (
            f"more than {LONG:,} tokens: PyTorch's kernels are predicted to do the products faster"
        )
    return None
