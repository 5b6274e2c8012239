"""Launch configs of attention with their reasons, and the launchers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._launch import capability, cdiv, dot_precision, launch, next_power_of_2, sm_count
from .._reduce import column_sum
from .backward import backward_kernel, backward_key_kernel, backward_query_kernel
from .forward import forward_kernel
from .reference import Options

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class BlockConfig:
    """Queries and keys of one step; warps; software-pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def split(width: int) -> tuple[int, int]:
    """Powers of two (16 at least) that cover `width` columns with the fewest to spare.

    80 = 64 + 16, 72 = 64 + 16 (8 to spare), 88 = 64 + 32; 64, and what would need as many as one
    power of two does (104 = 64 + 64), stay in one piece.
    """
    whole = max(16, next_power_of_2(width))
    first = whole // 2
    second = max(16, next_power_of_2(width - first))
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def chunks(head_dim: int, rotated: bool, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Columns of the two chunks of queries and keys, then of those of values."""
    own = split(head_dim)
    if dtype == torch.float32 and own == (128, 0):
        own = (64, 64)  # products without tensor cores hold their operands in registers
    half = max(16, next_power_of_2(cdiv(head_dim, 2)))
    return (*((half, half) if rotated else own), *own)


def tail(length: int, block: int) -> int:
    """Size of the last, partial block: 197 keys in blocks of 64 are 3 blocks and one of 16."""
    rest = length % block
    return max(16, next_power_of_2(rest)) if rest else 0


@dataclass(frozen=True)
class Case:
    """What the choice of a config depends on."""

    width: int  # columns of queries and keys, as padded
    dtype: torch.dtype
    hopper: bool  # tensor cores that read shared memory; before, operands take registers
    plain: bool  # no norm, rotation, mask or varying length, all of which take registers, too


MAY_SPILL = "float32, and wide heads or options: our kernels may spill registers"


def may_spill(case: Case) -> bool:
    """Whether some kernel needs more registers than there are, whatever its blocks."""
    return case.dtype == torch.float32 and (case.width > 64 or not case.plain)


def width_problem(head_dim: int) -> str | None:
    """Why the kernels can't take heads of this size; None where they can."""
    if head_dim > MAX_HEAD_DIM:
        return f"no kernel for heads of {head_dim}, above {MAX_HEAD_DIM}"
    return None


def forward_config(case: Case, queries: int, programs: int, sms: int) -> BlockConfig:
    """Blocks of the forward kernel for this many queries and heads (`programs`)."""
    if case.dtype == torch.float32:  # small, here and below: operands of FMAs wait in registers
        if not case.plain:
            return BlockConfig(16, 32, 4, 2)
        # Heads of up to 16, with 8 warps, spill two registers.
        return BlockConfig(32, 32, 8 if case.width > 16 else 4, 2)
    # 128 queries read keys and values half as often as 64 do; but not if more of them are padding,
    # nor if that leaves multiprocessors idle.
    tall = cdiv(queries, 128) * 2 == cdiv(queries, 64) and programs * cdiv(queries, 128) >= sms
    if case.hopper:
        return BlockConfig(128, 64, 8, 2) if tall or not case.plain else BlockConfig(64, 64, 4, 3)
    if not case.plain:
        return BlockConfig(64, 32, 4, 2) if case.width <= 64 else BlockConfig(32, 32, 8, 2)
    return BlockConfig(64, 64, 4, 3) if case.width <= 96 else BlockConfig(64, 16, 8, 2)


def single_pass(keys: int, case: Case) -> bool:
    """Whether the gradients of a head with so many keys are computed in one launch.

    The accumulators of dk and dv for all keys stay in registers: 256 keys of 64 columns are half of
    a multiprocessor's. More, or what an older card needs for operands, would spill.
    """
    if case.width > 64:
        return False
    if case.dtype == torch.float32 or not case.plain:
        return keys <= 64
    return keys <= (256 if case.hopper else 128)


def backward_config(keys: int, case: Case) -> BlockConfig:
    """Blocks of the single-pass backward kernel; block_n covers all keys."""
    block_n = max(16, next_power_of_2(keys))
    if case.dtype == torch.float32 or not case.plain:
        return BlockConfig(16, block_n, 4 if block_n < 64 and not case.plain else 8, 1)
    num_warps = 4 if block_n <= 64 else 8
    # With one block on a multiprocessor, the next queries must be on their way: two stages.
    if case.hopper and block_n == 128:
        return BlockConfig(64, block_n, num_warps, 2)
    return BlockConfig(32, block_n, num_warps, 2)


def query_config(case: Case) -> BlockConfig:
    """Blocks of the kernel for dq."""
    if case.dtype == torch.float32:
        return BlockConfig(16, 16, 8, 2)
    if case.hopper and (case.plain or case.width <= 64):
        return BlockConfig(64, 64, 4, 2)
    if case.hopper:
        return BlockConfig(64, 32, 8, 2)
    if not case.plain:
        return BlockConfig(64, 16, 4, 2) if case.width <= 64 else BlockConfig(16, 32, 8, 1)
    return BlockConfig(64, 32, 4, 2) if case.width <= 96 else BlockConfig(128, 32, 8, 2)


def key_config(case: Case) -> BlockConfig:
    """Blocks of the kernel for dk and dv."""
    if case.dtype == torch.float32:
        return BlockConfig(16, 16, 8, 2)
    if case.hopper:
        if case.plain:
            return BlockConfig(64 if case.width <= 96 else 32, 64, 4, 2)
        return BlockConfig(32, 64, 4 if case.width <= 64 else 8, 2)
    if not case.plain:
        return BlockConfig(16, 64, 4, 2) if case.width <= 64 else BlockConfig(16, 32, 8, 2)
    if case.width <= 32:
        return BlockConfig(32, 64, 4, 2)
    if case.width <= 96:  # beyond 64 two chunks of operands: none may be on their way as well
        return BlockConfig(16, 64, 4, 2 if case.width <= 64 else 1)
    return BlockConfig(32, 64, 8, 2)


def make_case(qkv: Tensor, options: Options) -> Case:
    """The case of a call on `qkv`, or on any of its parts."""
    rotated = options.sin is not None
    extras = (options.q_weight, options.sin, options.key_mask, options.cu_seqlens)
    plain = all(t is None for t in extras)
    first, second, *_ = chunks(qkv.shape[-1], rotated, qkv.dtype)
    return Case(first + second, qkv.dtype, capability(qkv.device) >= (9, 0), plain)


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
        self.constexprs = {
            "HEAD_DIM": self.head_dim,
            "FIRST": first,
            "SECOND": second,
            "V_FIRST": v_first,
            "V_SECOND": v_second,
            "ROPE": rope,
            "RMS": options.rms,
            "PRECISION": dot_precision(q.dtype),
            "NATURAL": natural,
        }

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
    config = forward_config(call.case, call.queries, call.programs, sm_count(q.device))
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
        config = backward_config(call.keys, call.case)
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
    config = query_config(call.case)
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
    config = key_config(call.case)
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
