"""The launchers of attention."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._configs import Tunable
from .._launch import cdiv, launch, next_power_of_2, sm_count
from .._reduce import column_sum
from .backward import backward_kernel, backward_key_kernel, backward_query_kernel
from .configs import (
    BACKWARD,
    FORWARD,
    KEY,
    MAY_SPILL,
    QUERY,
    BlockConfig,
    backward_candidates,
    backward_config,
    chunks,
    forward_candidates,
    forward_config,
    key_candidates,
    key_config,
    make_case,
    may_spill,
    query_candidates,
    query_config,
    single_pass,
    split,
    tail,
    width_problem,
)
from .forward import forward_kernel
from .reference import Options

LOG2E = 1.4426950408889634

# Of the configs' module, for the ops.
__all__ = ["MAY_SPILL", "chunks", "make_case", "may_spill", "single_pass", "split", "tail"]
__all__ += ["width_problem"]


def dense(t: Tensor | None) -> Tensor | None:
    """A small argument as the kernels read it."""
    return None if t is None else t.contiguous()


def rows_dense(t: Tensor) -> Tensor:
    """`t` itself where its last dimension is dense, which is all that the kernels ask for."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Elements between images, tokens and heads of each [B, N, H, d] or [total, H, d]."""
    return tuple(n for t in tensors for n in (0, *t.stride())[-4:-1])


def alignment(*tensors: Tensor) -> int:
    """Elements, 16 at most, on a multiple of which every head starts within its token.

    Triton asks itself only whether a stride is a multiple of 16; for d = 72 or 88 eight of them,
    the 16 bytes of one load, must do.
    """
    return math.gcd(16, tensors[0].shape[-1], *(t.stride(-2) for t in tensors))


class _Call:
    """What all launches of one call have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options, scale: float) -> None:
        self.q, self.k, self.v = q, k, v
        self.heads, self.head_dim = q.shape[-2:]
        self.case = make_case(q, options)
        natural = q.dtype == torch.float32
        self.scale, self.eps, self.skipped = scale if natural else scale * LOG2E, options.eps, 0
        self.varlen = options.cu_seqlens is not None
        # Of the norms' gradients, where there are norms.
        self.dtype = None if options.q_weight is None else options.q_weight.dtype
        if options.cu_seqlens is not None:
            self.batch, self.total = options.cu_seqlens.numel() - 1, q.shape[0]
            self.queries = self.keys = options.max_seqlen
        else:
            self.batch, self.queries, self.keys = q.shape[0], q.shape[1], k.shape[1]
            self.total = self.batch * self.queries
            if options.sin is not None:
                self.skipped = self.queries - options.sin.shape[0]
        self.programs = self.batch * self.heads
        mask = options.key_mask
        self.extras = (
            *map(dense, options[:6]),  # weights and biases of the norms, sin, cos
            None if mask is None else mask.contiguous().view(torch.uint8),
            dense(options.cu_seqlens),
        )
        rope = "" if options.sin is None else "interleaved" if options.interleaved else "halves"
        first, second, v_first, v_second = chunks(self.head_dim, bool(rope), q.dtype)
        self.constexprs: dict[str, Any] = {
            "HEAD_DIM": self.head_dim,
            "FIRST": first,
            "SECOND": second,
            "V_FIRST": v_first,
            "V_SECOND": v_second,
            "ROPE": rope,
            "RMS": options.rms,
            # Whatever PyTorch's flag: its own attention in float32 doesn't obey it, but makes three
            # TF32 products for each, where one alone would err thousands of times as much. Triton's
            # "tf32x3" errs more than IEEE, and in these blocks spills up to 432 bytes a thread.
            "PRECISION": "ieee" if natural else "tf32",
            "NATURAL": natural,
        }

    def pick(
        self,
        which: Tunable[BlockConfig],
        default: BlockConfig,
        candidates: Callable[[], list[BlockConfig]],
    ) -> BlockConfig:
        """The config for one of the launches."""
        varlen = self.varlen  # where the longest of many lengths says little of them
        return which.pick(
            default,
            self.q.device,
            self.q.dtype,
            candidates,
            lambda: {
                "b": self.programs,
                "q": next_power_of_2(self.queries) if varlen else self.queries,
                "k": next_power_of_2(self.keys) if varlen else self.keys,
                "d": self.head_dim,
                "rope": self.constexprs["ROPE"],
                "norm": self.dtype is not None,
                "rms": self.constexprs["RMS"],
                "mask": self.extras[6] is not None,
                "varlen": varlen,
            },
        )

    def tail(self, block: int) -> int:
        """Keys of the last step; where lengths vary nobody knows, so it may be a whole block."""
        return block if self.varlen else tail(self.keys, block)

    def partial(self, programs: int, rows: int) -> Tensor | None:
        """Room for each program's share of the norms' gradients."""
        if self.dtype is None:
            return None
        make = torch.zeros if self.varlen else torch.empty  # a program may find nothing to do
        return make((programs, rows, self.head_dim), dtype=torch.float32, device=self.q.device)

    def params(self, *partials: Tensor | None) -> Tensor:
        """The norms' gradients [4, d] from the shares of all programs; [0, d] without norms."""
        if self.dtype is None:
            return self.q.new_empty((0, self.head_dim))
        return torch.cat([column_sum(p, self.dtype) for p in partials if p is not None])


def forward(
    q: Tensor, k: Tensor, v: Tensor, options: Options, scale: float, need_stats: bool
) -> tuple[Tensor, Tensor]:
    """(out [B, Nq, H*d] or [total, H*d], stats [2, H, tokens] or empty), in one launch."""
    call = _Call(q, k, v, options, scale)
    out = q.new_empty((*q.shape[:-2], call.heads * call.head_dim))
    stats = torch.empty(
        (2, call.heads, call.total) if need_stats else 0, dtype=torch.float32, device=q.device
    )
    config = call.pick(
        FORWARD,
        forward_config(call.case, call.queries, call.programs, sm_count(q.device)),
        lambda: forward_candidates(call.case),
    )
    blocks = cdiv(call.queries, config.block_m)
    launch(
        forward_kernel,
        (call.programs * blocks,),
        q,
        k,
        v,
        out,
        stats if need_stats else None,
        *call.extras,
        *strides(q, k),
        call.heads,
        call.queries,
        call.keys,
        call.total,
        blocks,
        call.skipped,
        call.scale,
        call.eps,
        **call.constexprs,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL=call.tail(config.block_n),
        HEAD_ALIGN=alignment(q, k),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, stats


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    stats: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    options: Options,
    scale: float,
) -> Tensor:
    """Fill dq, dk and dv; the norms' gradients [4, d], or [0, d] without norms.

    Without `out` and `stats` of the forward pass in one launch, with them in two.
    """
    call = _Call(q, k, v, options, scale)
    dout = rows_dense(dout).unflatten(-1, (call.heads, call.head_dim))
    sizes = (call.heads, call.queries, call.keys)
    if out is None or stats is None:
        config = call.pick(
            BACKWARD,
            backward_config(call.keys, call.case),
            lambda: backward_candidates(call.keys, call.case),
        )
        partial = call.partial(call.programs, 4)
        launch(
            backward_kernel,
            (call.programs,),
            q,
            k,
            v,
            dout,
            dq,
            dk,
            dv,
            partial,
            *call.extras,
            *strides(q, k, dout, dq, dk),
            *sizes,
            call.skipped,
            call.scale,
            call.eps,
            **call.constexprs,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            HEAD_ALIGN=alignment(q, k, dout, dq, dk),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        return call.params(partial)
    delta = torch.empty_like(stats[0])
    config = call.pick(QUERY, query_config(call.case), lambda: query_candidates(call.case))
    blocks = cdiv(call.queries, config.block_m)
    q_partial = call.partial(call.programs * blocks, 2)
    launch(
        backward_query_kernel,
        (call.programs * blocks,),
        q,
        k,
        v,
        dout,
        out,
        stats,
        dq,
        delta,
        q_partial,
        *call.extras,
        *strides(q, k, dout, dq),
        *sizes,
        call.total,
        blocks,
        call.skipped,
        call.scale,
        call.eps,
        **call.constexprs,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL=call.tail(config.block_n),
        HEAD_ALIGN=alignment(q, k, dout, dq),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    config = call.pick(KEY, key_config(call.case), lambda: key_candidates(call.case))
    blocks = cdiv(call.keys, config.block_n)
    k_partial = call.partial(call.programs * blocks, 2)
    launch(
        backward_key_kernel,
        (call.programs * blocks,),
        q,
        k,
        v,
        dout,
        stats,
        delta,
        dk,
        dv,
        k_partial,
        *call.extras,
        *strides(q, k, dout, dk),
        *sizes,
        call.total,
        blocks,
        call.skipped,
        call.scale,
        call.eps,
        **call.constexprs,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HEAD_ALIGN=alignment(q, k, dout, dk),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return call.params(q_partial, k_partial)
