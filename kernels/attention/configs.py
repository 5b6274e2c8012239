"""Launch configs of attention with their reasons.

The defaults are predictions, from registers and shared memory as compiled; beside each stand the
alternatives that the tuner tries on a card (see ``_configs.py``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tuned
from .._configs import tunable, variants
from .._launch import capability, cdiv, next_power_of_2
from .._op import sizes_are_known
from .reference import Options

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
    device: torch.device


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


@dataclass(frozen=True)
class PassConfig:
    """Whether one launch computes all gradients of a head."""

    single: bool


PASSES = tunable("attention.passes", PassConfig)


def single_pass(keys: int, case: Case) -> bool:
    """Whether the gradients of a head with so many keys are computed in one launch.

    That is so where it can be, unless two were measured to be faster: 5 products on blocks of keys
    as long as a power of two, against 7 without the padding. A compiler's graph has the default
    where the number of keys stays open.
    """
    if not fits_single_pass(keys, case):
        return False
    if torch.compiler.is_compiling() and not sizes_are_known((keys,)):
        return True
    return _fastest_in_one(keys, case.width, case.plain, case.device, case.dtype)


def _fastest_in_one(
    keys: int, width: int, plain: bool, device: torch.device, dtype: torch.dtype
) -> bool:
    config = PASSES.pick(
        PassConfig(True),
        device,
        dtype,
        lambda: [PassConfig(False)],
        lambda: {"k": keys, "d": width, "plain": plain},
    )
    return config.single


_tuned.constant_in_graphs(_fastest_in_one)


def fits_single_pass(keys: int, case: Case) -> bool:
    """Whether one launch can compute the gradients of a head with so many keys.

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


def forward_candidates(case: Case) -> list[BlockConfig]:
    """Alternatives for the forward kernel."""
    if case.dtype == torch.float32:
        return [BlockConfig(16, 32, 4, 2), BlockConfig(32, 32, 8, 2), BlockConfig(32, 16, 4, 2)]
    small = BlockConfig(64, 64, 4, 2)
    found = variants(
        small,
        *({"num_stages": n} for n in (2, 3, 4)),
        {"block_n": 32, "num_stages": 3},
        *([{"block_n": 128}] if case.hopper or case.width <= 64 else []),
        {"num_warps": 8},
    )
    if case.hopper and case.width <= 96:
        tall = BlockConfig(128, 64, 8, 2)
        found += variants(
            tall,
            *({"num_stages": n} for n in (2, 3, 4)),
            {"block_n": 32, "num_stages": 3},
            {"block_n": 128},
            {"num_warps": 4},
        )
    elif case.hopper:
        found += variants(BlockConfig(128, 64, 8, 2), {}, {"num_stages": 3}, {"block_n": 32})
    return found


def backward_candidates(keys: int, case: Case) -> list[BlockConfig]:
    """Alternatives for the single-pass backward kernel; block_n covers all keys.

    Of 256 keys of 64 columns 8 warps hold the accumulators in half of their registers; 4 would
    spill, and so do 8 with a step of 64 queries (Triton 3.6 and 3.8, sm_90). 16 warps, with half of
    the registers each, do at a step of 32 in two stages only.
    """
    default = backward_config(keys, case)
    if case.dtype == torch.float32 or not case.plain:
        return variants(default, {"num_stages": 2}, {"num_warps": 4})
    return [
        BlockConfig(block_m, default.block_n, warps, stages)
        for block_m in (16, 32, 64)
        for warps in (4, 8)
        for stages in (1, 2, 3)
        if default.block_n * max(case.width, 2 * block_m) <= 2048 * warps
    ] + ([BlockConfig(32, 256, 16, 2)] if default.block_n == 256 else [])


def query_candidates(case: Case) -> list[BlockConfig]:
    """Alternatives for the kernel for dq.

    On sm_80 steps of 64 keys spill, and so do wide heads with 4 warps.
    """
    if case.dtype == torch.float32 or not case.plain:
        return variants(query_config(case), {"num_stages": 1}, {"num_stages": 3})
    return [
        BlockConfig(block_m, block_n, warps, stages)
        for block_m, warps in ((64, 4), (128, 8))
        for block_n in ((32, 64) if case.hopper else (32,))
        for stages in (2, 3)
        if case.hopper or warps == 8 or case.width <= 96
    ]


def key_candidates(case: Case) -> list[BlockConfig]:
    """Alternatives for the kernel for dk and dv.

    Heads above 64 spill at a step of 64 queries; on sm_80 any do at one of 32 with 4 warps.
    """
    if case.dtype == torch.float32 or not case.plain:
        return variants(key_config(case), {"num_stages": 1}, {"num_stages": 3})
    return [
        BlockConfig(block_m, block_n, warps, stages)
        for block_n, warps in ((64, 4), (128, 8))
        for block_m in (16, 32, 64)
        for stages in (2, 3)
        if block_m <= (4 * warps if not case.hopper else 64 if case.width <= 64 else 32)
    ]


FORWARD = tunable("attention.forward", BlockConfig)
BACKWARD = tunable("attention.backward", BlockConfig)
QUERY = tunable("attention.query", BlockConfig)
KEY = tunable("attention.key", BlockConfig)


def make_case(qkv: Tensor, options: Options) -> Case:
    """The case of a call on `qkv`, or on any of its parts."""
    rotated = options.sin is not None
    extras = (options.q_weight, options.sin, options.key_mask, options.cu_seqlens)
    plain = all(t is None for t in extras)
    first, second, *_ = chunks(qkv.shape[-1], rotated, qkv.dtype)
    hopper = capability(qkv.device) >= (9, 0)
    return Case(first + second, qkv.dtype, hopper, plain, qkv.device)
