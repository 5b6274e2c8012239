"""Attention of one or few queries over many keys: pooling by learned queries (MAP heads).

    out = softmax(q k^T * scale) v         per image and head

Forward:  q [B, Q, H, d], kv [B, N, 2, H, d] as the kv projection writes it -> out [B, Q, H*d].
Backward: as in attention, to dq and to dkv in the layout of kv.
Bytes: q + kv + out forward; q, kv, dout, dq and dkv backward. FLOPs: 4 B H Q N d, and 10.

The kernels are those of self-attention: they take queries and keys by separate strides and lengths.
Source: Zhai et al., "Scaling Vision Transformers", 2022 (MAP head); Lee et al., "Set
Transformer", 2019.
"""

from collections.abc import Iterable
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
    total_bytes,
    wants_grad,
)
from .launch import (
    MAY_SPILL,
    backward,
    forward,
    make_case,
    may_spill,
    rows_dense,
    single_pass,
    width_problem,
)
from .reference import Options, packed, probabilities, saved, sdpa


def reference(q: Tensor, kv: Tensor, scale: float, need_stats: bool) -> tuple[Tensor, Tensor]:
    """The definition, accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(q, kv)
    k, v = kv.to(acc).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d]
    p, stats = probabilities(q.to(acc).transpose(1, 2), k, None, scale)
    return packed(p @ v, None).to(kv.dtype), saved(stats, None, need_stats)


def portable(
    q: Tensor, kv: Tensor, scale: float, need_stats: bool = False
) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention."""
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    q, acc = q.transpose(1, 2), accumulate_dtype(q)
    out = packed(sdpa(q, k, v, None, scale), None)
    if not need_stats:
        return out, kv.new_empty(0, dtype=acc)
    return out, saved(probabilities(q.to(acc), k.to(acc), None, scale)[1], None, True)


def launch_forward(q: Tensor, kv: Tensor, scale: float, need_stats: bool) -> tuple[Tensor, Tensor]:
    """One launch of the forward kernel."""
    k, v = rows_dense(kv).unbind(2)
    return forward(rows_dense(q), k, v, Options(), scale, need_stats)


def fake(q: Tensor, kv: Tensor, scale: float, need_stats: bool) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    batch, queries, heads, head_dim = q.shape
    stats = (2, heads, batch * queries) if need_stats else (0,)
    out = kv.new_empty(batch, queries, heads * head_dim)
    return out, kv.new_empty(stats, dtype=accumulate_dtype(kv))


def samples(size: str) -> Iterable[Sample]:
    """Odd shapes; or the pooling head of a SigLIP-B/16 and of a so400m, batch 64."""
    if size == "tiny":
        shapes = [(2, 1, 5, 2, 8), (1, 3, 17, 1, 24), (1, 2, 21, 1, 40)]
    else:
        shapes = [(64, 1, 196, 12, 64), (64, 1, 729, 16, 72)]
    for batch, queries, tokens, heads, head_dim in shapes:
        for need_stats in (False, True) if size == "tiny" else (False,):
            label = (
                f"B={batch} Q={queries} N={tokens} H={heads} d={head_dim}{' stats' * need_stats}"
            )
            args: dict[str, Arg | None] = {
                "q": Arg((batch, queries, heads, head_dim)),
                "kv": Arg((batch, tokens, 2, heads, head_dim)),
            }
            low = (torch.bfloat16, torch.float16) if head_dim > 64 else None
            options = {"scale": head_dim**-0.5, "need_stats": need_stats}
            yield Sample(label, args, options, dtypes=low)


def to_public(arguments: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments as those of `attention_pool`."""
    return {name: arguments[name] for name in ("q", "kv", "scale")}


def flops(q: Tensor, kv: Tensor, **_: Any) -> int:
    """Two products of Q x N x d a head."""
    return 4 * q.numel() * kv.shape[1]


def bytes_moved(q: Tensor, kv: Tensor, need_stats: bool, **_: Any) -> int:
    """q and kv in, one row a query out."""
    return total_bytes(q, kv, q) + (8 * q.numel() // q.shape[-1] if need_stats else 0)


ATTENTION_POOL = define(
    "attention_pool",
    reference=reference,
    portable=portable,
    portable_name="sdpa",
    launcher=launch_forward,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
    to_public=to_public,
)


def backward_reference(
    dout: Tensor, q: Tensor, kv: Tensor, out: Tensor | None, stats: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(dq, dkv); `out` and `stats` of the forward pass only spare a kernel work."""
    acc = accumulate_dtype(dout, q, kv)
    k, v = kv.to(acc).permute(2, 0, 3, 1, 4).unbind(0)
    queries = q.to(acc).transpose(1, 2)
    dout = dout.to(acc).unflatten(-1, q.shape[2:]).transpose(1, 2)
    p = probabilities(queries, k, None, scale)[0]
    dp = dout @ v.transpose(-2, -1)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    dk, dv = ds.transpose(-2, -1) @ queries, p.transpose(-2, -1) @ dout
    dkv = torch.stack([dk, dv]).permute(1, 3, 0, 2, 4)
    return (
        (ds @ k).transpose(1, 2).to(q.dtype).contiguous(),
        dkv.to(kv.dtype).contiguous(),
    )


def backward_portable(
    dout: Tensor, q: Tensor, kv: Tensor, out: Tensor | None, stats: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention forward and, by autograd, backward."""
    q, kv = q.detach().requires_grad_(), kv.detach().requires_grad_()
    with torch.enable_grad():
        result, _ = portable(q, kv, scale)
    dq, dkv = torch.autograd.grad(result, (q, kv), dout)
    return dq.flatten().view(q.shape), dkv.flatten().view(kv.shape)  # strides as of a new tensor


def backward_launch(
    dout: Tensor, q: Tensor, kv: Tensor, out: Tensor | None, stats: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One launch without `out` and `stats`, two with them."""
    dq, dkv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, kv))
    k, v = rows_dense(kv).unbind(2)
    dk, dv = dkv.unbind(2)
    backward(dout, rows_dense(q), k, v, out, stats, dq, dk, dv, Options(), scale)
    return dq, dkv


def backward_fake(
    dout: Tensor, q: Tensor, kv: Tensor, out: Tensor | None, stats: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def backward_samples(size: str) -> Iterable[Sample]:
    """The forward's samples with a gradient; with what was saved where it would be."""
    for sample in samples(size):
        q, kv = sample.args["q"], sample.args["kv"]
        assert q is not None
        assert kv is not None
        batch, queries, heads, head_dim = q.shape
        saving = sample.options["need_stats"]
        yield Sample(
            sample.label,
            {"dout": Arg((batch, queries, heads * head_dim)), "q": q, "kv": kv}
            | {"out": None, "stats": None},
            {"scale": sample.options["scale"]},
            derive=saved_by_forward if saving else saved_if_needed if size == "vit" else None,
            dtypes=sample.dtypes,
        )


def needs_stats(kv: Tensor) -> bool:
    """Whether backward, for these keys on this device, takes two launches."""
    return not single_pass(kv.shape[1], make_case(kv, Options()))


def saved_by_forward(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the forward pass with these arguments keeps for two launches backward."""
    out, stats = ATTENTION_POOL.call(arguments["q"], arguments["kv"], arguments["scale"], True)
    return {"out": out, "stats": stats}


def saved_if_needed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same, where backward would take two launches."""
    return saved_by_forward(arguments) if needs_stats(arguments["kv"]) else {}


def backward_flops(q: Tensor, kv: Tensor, **_: Any) -> int:
    """Five products of Q x N x d a head."""
    return 10 * q.numel() * kv.shape[1]


def backward_bytes_moved(
    dout: Tensor, q: Tensor, kv: Tensor, out: Tensor | None, stats: Tensor | None, **_: Any
) -> int:
    """Gradient, q, kv and what was saved in; the gradients of q and kv out."""
    return total_bytes(dout, q, kv, out, stats, q, kv)


ATTENTION_POOL_BACKWARD = define(
    "attention_pool_backward",
    reference=backward_reference,
    portable=backward_portable,
    portable_name="sdpa",
    launcher=backward_launch,
    fake=backward_fake,
    samples=backward_samples,
    flops=backward_flops,
    bytes_moved=backward_bytes_moved,
    backward_of="attention_pool",
)


class _AttentionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, scale):  # type: ignore[no-untyped-def]
        need_stats = needs_stats(kv)
        out, stats = ATTENTION_POOL.call(q, kv, scale, need_stats)
        ctx.save_for_backward(q, kv, *((out, stats) if need_stats else (None, None)))
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, kv, out, stats = ctx.saved_tensors
        dq, dkv = ATTENTION_POOL_BACKWARD.call(dout, q, kv, out, stats, ctx.scale)
        return (
            *(d if n else None for d, n in zip((dq, dkv), ctx.needs_input_grad, strict=False)),
            None,
        )


def attention_pool(
    q: Tensor, kv: Tensor, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Attention of one or a few learned queries over all tokens.

    Args:
        q: queries [B, Q, H, d].
        kv: packed keys and values [B, N, 2, H, d].
        scale: factor on the logits; d ** -0.5 if None.
        impl: "auto", "triton", "sdpa" or "reference".

    Returns:
        [B, Q, H*d], contiguous, in the dtype of `kv`.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, tensors on several devices, an `impl` that can't run.
    """
    check_floating("attention_pool", q=q, kv=kv)
    check_shape("attention_pool", "kv", kv, "B", "N", 2, "H", "d")
    check_shape("attention_pool", "q", q, kv.shape[0], "Q", kv.shape[3], kv.shape[4])
    if kv.shape[1] == 0:
        raise ValueError("attention_pool: kv must hold at least one token")
    head_dim = kv.shape[4]
    scale = head_dim**-0.5 if scale is None else scale
    unfit = width_problem(head_dim)
    if q.dtype != kv.dtype:
        unfit = "q and kv differ in dtype"
    avoid = MAY_SPILL if kv.is_cuda and may_spill(make_case(kv, Options())) else None
    chosen = choose(ATTENTION_POOL, impl, q, kv, unfit={"triton": unfit}, avoid=avoid)
    if chosen == "triton":
        if wants_grad(q, kv):
            return _AttentionPool.apply(q, kv, scale)
        return ATTENTION_POOL.call(q, kv, scale, False)[0]
    run = ATTENTION_POOL.portable if chosen == "sdpa" else ATTENTION_POOL.reference
    return run(q, kv, scale, False)[0]
