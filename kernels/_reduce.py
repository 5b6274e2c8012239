"""Second stage of every deterministic reduction: add up the rows of partial sums.

A kernel that reduces over tokens lets each program write its own row of float32 partial sums; this
kernel adds the rows in a fixed order. No atomics, so equal inputs give equal bits.
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass

import torch
from torch import Tensor

from ._configs import tunable
from ._launch import cdiv, launch, next_power_of_2
from ._triton import jit, tl


@jit
def _column_sum_kernel(
    partial,  # [R, C] float32
    out,  # [C]
    R,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < R)[:, None] & (cols < C)[None, :]
        offsets = rows.to(tl.int64)[:, None] * C + cols[None, :]
        total += tl.load(partial + offsets, mask=mask, other=0.0)
    tl.store(out + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=cols < C)


@dataclass(frozen=True)
class SumConfig:
    """Rows and columns of one step."""

    block_r: int
    block_c: int
    num_warps: int = 4


def sum_config(rows: int) -> SumConfig:
    """1024 elements a step.

    Many rows of few columns (norm weights): tall tiles, so that enough loads are in flight; few
    rows of many columns (the patch projection): wide ones.
    """
    block_r = min(32, next_power_of_2(rows))
    return SumConfig(block_r, 1024 // block_r)


def sum_candidates(rows: int) -> list[SumConfig]:
    """Taller and wider tiles, 4 to 16 elements a thread."""
    tallest = next_power_of_2(rows)
    return [
        SumConfig(block_r, elements // block_r, warps)
        for block_r in (8, 16, 32, 64, 128)
        if block_r <= tallest
        for elements, warps in ((1024, 4), (2048, 8))
    ]


COLUMN_SUM = tunable("column_sum", SumConfig)


def column_sum(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of `partial` [R, ...] (float32, contiguous) over its first axis, as `dtype`."""
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    rows, columns = partial.shape[0], out.numel()
    if rows == 0:
        return out.zero_()
    config = COLUMN_SUM.pick(
        sum_config(rows),
        partial.device,
        dtype,
        lambda: sum_candidates(rows),
        lambda: {
            "m": rows,
            "n": columns,
        },
    )
    launch(
        _column_sum_kernel,
        (cdiv(columns, config.block_c),),
        partial,
        out,
        rows,
        columns,
        BLOCK_R=config.block_r,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
    )
    return out
