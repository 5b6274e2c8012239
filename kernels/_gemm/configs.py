"""Launch configs of the fused linear layers with their reasons.

All defaults are predictions: from registers and shared memory as compiled, not from timing. Beside
each stand the alternatives that the tuner tries on a card (see ``_configs.py``).
"""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from .._configs import tunable, variants
from .._launch import (
    SplitConfig,
    TileConfig,
    capability,
    cdiv,
    fit,
    next_power_of_2,
    sm_count,
)
from . import persistent

# Columns whose statistics stand together; every tile is a multiple as wide.
CHUNK = 64

# Row tiles that are walked down before the next column tile: 8 x 128 rows of 768 values are 1.5 MB.
GROUP = 8


@dataclass(frozen=True)
class ProductConfig(TileConfig):
    """Tile of a product, and how programs go through its tiles.

    group: row tiles that are walked down before the next column tile. resident: programs that stay
    on each multiprocessor and take tile after tile, by TMA (``persistent.py``); 0 for a program a
    tile.
    """

    group: int = GROUP
    resident: int = 0


@dataclass(frozen=True)
class Work:
    """What the choice of a tile depends on."""

    dtype: torch.dtype
    target: tuple[int, int]
    sms: int
    aligned: bool  # every row starts on a multiple of 16 values, so that loads are wide
    # The tile of tokens is worked on in registers before the product: "norm" and "scale" are cheap,
    # "slope" is the derivative of an activation.
    prologue: str = ""
    pair: bool = False  # two products share the tile
    tma: bool = False  # both operands can come by TMA, and be multiplied as they come


def work(
    weight: Tensor,
    *others: Tensor | None,
    prologue: str = "",
    pair: bool = False,
    tma: bool = False,
) -> Work:
    """The work on a product with `weight`, of rows of `others`."""
    sizes = [*weight.shape, *(t.stride(0) for t in others if t is not None)]
    aligned = all(size % 16 == 0 for size in sizes)
    device = weight.device
    return Work(weight.dtype, capability(device), sm_count(device), aligned, prologue, pair, tma)


def product_config(rows: int, columns: int, work: Work) -> ProductConfig:
    """Tiles of a product [rows, depth] x [depth, columns] with its prologue and epilogue.

    An epilogue takes slices of 64 columns: all at once it would spill beside a tile of 128 x 128.
    """
    if work.tma:
        found = persistent.best(rows, columns, work.sms)
        return ProductConfig(**asdict(found.tile), resident=found.resident)
    if work.dtype == torch.float32:  # FMA units or TF32; the operands are twice as wide
        if work.aligned:  # with 8 warps a slope in TF32 spills four registers
            return ProductConfig(64, 64, 16, 4 if work.prologue == "slope" else 8, 2)
        return ProductConfig(32, 64, 16, 4 if work.prologue == "norm" else 8, 2)
    if not work.aligned:  # an address for each value takes registers
        return ProductConfig(64, 64, 32, 8, 2)
    # Few tokens: more, smaller programs.
    if cdiv(rows, 128) * cdiv(columns, 128) < 2 * work.sms:
        if work.prologue == "slope":  # with three stages a register of 96 spills on sm_80
            return ProductConfig(64, 64, 32, 4, 4)
        return ProductConfig(64, 64, 64, 4, 3)
    if work.pair:  # two accumulators
        return ProductConfig(128, 64, 32, 8, 3)
    if work.target < (9, 0):
        return ProductConfig(128, 128, 32, 8, 3, parts=2)
    # A warp group takes 64 rows. 256 columns read the tokens half as often; an activation's slope
    # in the prologue leaves no registers for them.
    if columns % 256 or work.prologue == "slope":
        return ProductConfig(128, 128, 64, 8, 3, parts=2)
    return ProductConfig(128, 256, 64, 8, 3, parts=4)


def product_candidates(work: Work) -> list[ProductConfig]:
    """Alternatives for a product; slices of an epilogue stay 64 columns, a chunk of statistics.

    All compile for sm_90 without spilling, behind each prologue and epilogue of a ViT; so does none
    of 256 rows by 128 columns, whose epilogue spills 384 bytes (Triton 3.8).
    """
    if work.dtype == torch.float32:
        tiles = [(64, 64, 16, 4, 2), (64, 64, 16, 8, 3), (64, 64, 32, 8, 2), (32, 64, 32, 4, 2)]
        return [ProductConfig(*tile) for tile in [*tiles, (32, 64, 16, 8, 2)]]
    if not (work.aligned or work.tma):
        return [ProductConfig(*tile) for tile in [(64, 64, 32, 4, 2), (32, 64, 32, 4, 2)]]
    small = [ProductConfig(*tile) for tile in [(64, 64, 64, 4, 3), (64, 64, 32, 4, 4)]]
    tall = ProductConfig(128, 64, 32, 8, 3)
    if work.pair:
        pairs = [*small, *variants(tall, {}, {"num_stages": 4}, {"block_k": 64}, {"group": 4})]
        return [c for c in pairs if c.block_k == 32 or work.target >= (9, 0)]  # else they spill
    square = ProductConfig(128, 128, 64, 8, 3, parts=2)
    flat = ProductConfig(64, 128, 64, 4, 3, parts=2)
    ordinary = [
        *small,
        *variants(tall, {}, {"block_k": 64}),
        *variants(flat, {}, {"block_k": 32, "num_stages": 4}),
        *variants(square, {"block_k": 32}, {"block_k": 32, "num_stages": 4}),
    ]
    if work.target < (9, 0):
        # Operands wait in registers there; behind a slope, steps of 64 spill (Triton 3.8).
        deep = 32 if work.prologue == "slope" else 64
        ordinary += variants(square, {"block_k": 32, "group": 4})
        return [config for config in ordinary if config.block_k <= deep]
    wide = ProductConfig(128, 256, 64, 8, 3, parts=4)
    ordinary += [square, replace(square, num_stages=4)]
    if work.prologue != "slope":
        ordinary += variants(
            wide, {}, {"block_k": 32, "num_stages": 4}, {"group": 4}, {"group": 16}
        )
    if not work.tma:
        return ordinary
    return [
        *variants(wide, {"num_stages": 4, "resident": 1}, {"num_stages": 3, "resident": 1}),
        *variants(wide, *({"num_stages": 4, "resident": 1, "group": n} for n in (4, 16))),
        *variants(square, *({"num_stages": n, "resident": 1} for n in (4, 6))),
        *variants(square, {"num_stages": 3, "resident": 2}),
        *variants(flat, {"num_stages": 4, "resident": 2}, {"num_stages": 3, "resident": 3}),
        *variants(small[0], {"num_stages": 4, "resident": 2}, {"num_stages": 4, "resident": 3}),
        *([wide, square, small[0]] if work.aligned else []),
    ]


def weight_grad_config(
    features: int, width: int, dtype: torch.dtype, target: tuple[int, int]
) -> SplitConfig:
    """Tiles of [features, tokens] x [tokens, width]; block_m is the step over tokens.

    Both operands come from L2 for every tile: 128 x 256 of them read three quarters of what 128 x
    128 do. Either leaves room for one program on a multiprocessor.
    """
    if dtype == torch.float32:
        return SplitConfig(32, fit(64, features), fit(64, width), 8, 2)
    if target >= (9, 0):
        if width % 256 == 0 and features >= 128:
            return SplitConfig(64, 128, 256, 8, 3)
        if features % 256 == 0 and width >= 128:
            return SplitConfig(64, 256, 128, 8, 3)
    return SplitConfig(64, fit(128, features), fit(128, width), 8, 3)


def weight_grad_candidates(
    features: int, width: int, dtype: torch.dtype, target: tuple[int, int]
) -> list[SplitConfig]:
    """Alternatives, which cover what the default does: no tile is beyond the matrix."""
    default = weight_grad_config(features, width, dtype, target)
    if dtype == torch.float32:
        return variants(default, {"programs": 1}, {"programs": 4}, {"num_warps": 4})
    square = SplitConfig(64, fit(128, features), fit(128, width), 8, 3)
    found = [
        *variants(default, *({"programs": n} for n in (1, 2, 4))),
        *variants(square, {}, *({"programs": n} for n in (1, 2, 3, 4))),
        *variants(square, {"num_stages": 4}, {"block_m": 32, "num_stages": 4}),
        *variants(square, {"block_m": 128, "num_stages": 2}),
    ]
    if square.block_k == 128:
        found += variants(square, {"block_k": 64, "num_warps": 4})
        if width % 256 == 0:
            found += variants(square, {"block_k": 256}, {"block_k": 256, "block_m": 32})
    if square.block_n == 128:
        found += variants(square, {"block_n": 64, "num_warps": 4})
        if features % 256 == 0:
            found += variants(square, {"block_n": 256}, {"block_n": 256, "block_m": 32})
    return found


@dataclass(frozen=True)
class RowConfig:
    """rows: tokens a program holds at once."""

    rows: int
    block_k: int
    num_warps: int


def row_config(width: int) -> RowConfig:
    """2048 elements a program, 8 a thread: three tensors are read and one is written."""
    block_k = next_power_of_2(width)
    return RowConfig(max(1, 2048 // block_k), block_k, max(8, min(32, block_k // 256)))


def row_candidates(width: int) -> list[RowConfig]:
    """From 1024 to 4096 elements a program; a thread holds 4 to 16 of them."""
    block_k = next_power_of_2(width)
    return [
        RowConfig(rows, block_k, warps)
        for rows in sorted({max(1, elements // block_k) for elements in (1024, 2048, 4096)})
        for warps in (4, 8, 16)
        if 4 <= rows * block_k // (32 * warps) <= 16
    ]


@dataclass(frozen=True)
class NormFinishConfig(RowConfig):
    """block_r, block_c: rows and columns of the weight in a step of a program that finishes it."""

    block_r: int = 64
    block_c: int = 32


def norm_finish_config(width: int) -> NormFinishConfig:
    """Rows as above. A thread holds 8 values of the weight; 16 columns would spill a register."""
    rows = row_config(width)
    return NormFinishConfig(rows.rows, rows.block_k, rows.num_warps)


def norm_finish_candidates(width: int, params: bool) -> list[NormFinishConfig]:
    """Other rows; and where there is a weight to finish, other shapes of its steps.

    With 16 values of the weight a thread 4 warps would spill two registers, as 8 do with 256 rows
    at once (Triton 3.8). Few tokens wait for the columns: of 768, in steps of 32, only 24 programs
    take a part.
    """
    found = [
        NormFinishConfig(c.rows, c.block_k, c.num_warps, min(64, 8 * c.num_warps))
        for c in row_candidates(width)
    ]
    if not params:
        return found
    steps = ((32, 32), (128, 32), (32, 64), (128, 16))
    default = norm_finish_config(width)
    return found + variants(default, *({"block_r": r, "block_c": c} for r, c in steps))


@dataclass(frozen=True)
class FinishConfig:
    """block_k: columns of a row of the weight that a program holds at once."""

    block_k: int
    num_warps: int


def finish_config(width: int) -> FinishConfig:
    """8 values a thread; a program has one row of the weight, and there are enough of those."""
    return FinishConfig(min(1024, next_power_of_2(width)), 4)


def finish_candidates(width: int) -> list[FinishConfig]:
    """2 to 16 values a thread: as many loads of each split are on their way at once."""
    return [
        FinishConfig(block, warps)
        for block in (256, 512, 1024, 2048)
        for warps in (2, 4, 8)
        if block <= next_power_of_2(width) and 2 <= block // (32 * warps) <= 16
    ]


FORWARD = tunable("linear.forward", ProductConfig)
INPUT_GRAD = tunable("linear.input_grad", ProductConfig)
WEIGHT_GRAD = tunable("linear.weight_grad", SplitConfig)
STATISTICS = tunable("linear.statistics", RowConfig)
NORM_FINISH = tunable("linear.norm_finish", NormFinishConfig)
FINISH = tunable("linear.finish", FinishConfig)
