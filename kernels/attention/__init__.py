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
backward.py; launch.py; flash.py (the packages of that name); costs.py, which has the samples, too;
and here define(), autograd and the public function. pool.py is the second form, one or few queries
against many keys, on the same kernels; rope.py makes the angles.
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
    recorded,
    wants_grad,
)
from . import flash
from .costs import backward_bytes_moved, backward_flops, bytes_moved, flops, samples
from .launch import (
    backward,
    forward,
    make_case,
    rows_dense,
    single_pass,
    width_problem,
)
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
    tensors_of,
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
        # Of the tiny ones with RMSNorm, too. Their own statistics are left out of the forward
        # samples: the rounding of one rotated float16 pair, which is luck on so few values.
        saving = options.pop("need_stats") or options["rms"]
        yield Sample(
            sample.label + " two launches" * saving,
            {"dout": Arg((*tokens, heads * head_dim)), "qkv": qkv, "out": None, "stats": None}
            | args,
            options,
            derive=saved_by_forward if saving else saved_if_needed if size == "vit" else None,
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


_by_flash = recorded(
    "attention",
    flash.run,
    lambda name, qkv, options, scale, dropout_p=0.0: (qkv, *options, scale, False),
)
_by_sdpa = recorded(
    "attention", attend, lambda qkv, options, scale, dropout_p: (qkv, *options, scale, False)
)


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
    options = Options(*extras, eps, rms, interleaved, longest)
    chosen = select(impl, qkv, options, scale, dropout_p)
    return run(chosen, qkv, options, scale, dropout_p)


def select(
    impl: str,
    qkv: Tensor,
    options: Options,
    scale: float,
    dropout_p: float = 0.0,
    grad: bool | None = None,
) -> str:
    """Name of the implementation for this call; of `qkv` shape, dtype and device count.

    grad: whether a gradient is wanted, where `qkv` is a stand-in that can't tell.
    """
    unfit = {"triton": kernel_unfit(qkv.shape[-1], options.sin, options.cos, dropout_p)}
    if dropout_p:
        unfit["reference"] = "it has no dropout"
    if impl in ATTENTION.peers:  # what asking costs only such a call pays
        unfit[impl] = flash.problem(impl, qkv, options, dropout_p)
    avoid = predicted_slower(qkv, options) if qkv.is_cuda and impl == "auto" else None
    return choose(
        ATTENTION,
        impl,
        qkv,
        *tensors_of(options),
        unfit=unfit,
        avoid=avoid,
        detail=lambda name: describe(name, qkv, options, scale, dropout_p),
        peer_unfit=lambda name: flash.problem(name, qkv, options, dropout_p),
        grad=grad,
    )


def describe(
    name: str, qkv: Tensor, options: Options, scale: float, dropout_p: float
) -> str | None:
    """What more there is to say of an implementation: the package, or PyTorch's backend."""
    if name in ATTENTION.peers:
        return flash.describe(name, qkv, options, dropout_p)
    if name != "sdpa":
        return None
    return f"backend {sdpa_backend(qkv, options, scale, dropout_p)}"


def run(name: str, qkv: Tensor, options: Options, scale: float, dropout_p: float = 0.0) -> Tensor:
    """`attention` by the implementation `name`, with its gradient, of arguments known to fit."""
    if name == "triton":
        if wants_grad(qkv, *tensors_of(options)):
            return _Attention.apply(qkv, *options, scale)
        return ATTENTION.call(qkv, *options, scale, False)[0]
    if name in ATTENTION.peers:
        return _by_flash(name, qkv, options, scale, dropout_p)
    if name == "sdpa":
        return _by_sdpa(qkv, options, scale, dropout_p)
    return ATTENTION.reference(qkv, *options, scale, False)[0]


def kernel_unfit(
    head_dim: int, sin: Tensor | None, cos: Tensor | None, dropout_p: float
) -> str | None:
    """Why our kernel can't take a call of these options; None where it can."""
    if dropout_p:
        return "it has no dropout"
    if wants_grad(sin, cos):
        return "it has no gradient for the angles of rope"
    return width_problem(head_dim)


def predicted_slower(qkv: Tensor, options: Options) -> str | None:
    """Why auto leaves our kernel alone, though it could run. Not measured yet."""
    if qkv.dtype == torch.float32:
        return "float32: PyTorch's, three TF32 products for one, is predicted to be faster"
    if make_case(qkv, options).plain and qkv.shape[1] > LONG:
        return (
            f"more than {LONG:,} tokens: PyTorch's kernels are predicted to do the products faster"
        )
    return None
