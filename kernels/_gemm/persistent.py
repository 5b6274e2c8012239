"""The products of a fused linear layer for Hopper: tiles come by TMA, and programs stay.

A tensor descriptor lets one thread ask for a whole tile, so no registers hold addresses and no
instructions make masks; and one program a multiprocessor goes through its share of the tiles, so
that a tile's first loads are in flight while the one before it is finished. The copies go straight
to shared memory: the tokens must be multiplied as they are. Beyond the edges a descriptor reads
zeros, which add nothing to a product, so no size needs to be a multiple of anything but 16 bytes.

Never run on a GPU: that it is faster than one program a tile is a prediction.
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass

import torch
from torch import Tensor

from .._launch import TileConfig, capability, cdiv, launch, sm_count
from .._triton import jit, tl
from .backward import _finish_tile as finish_input_grad
from .forward import _finish_tile as finish_forward
from .forward import place_tile, take_columns


@jit
def persistent_forward_kernel(
    x,  # [M, K], rows x_m apart
    weight,  # [N, K]
    bias,  # [N] or None
    pre,  # [M, N]: z, or None
    residual,  # [M, N], rows residual_m apart, or None
    layer_scale,  # [N] or None
    drop_scale,  # [M / tokens] or None
    out,  # [M, N]
    out_stats,  # [2, N / 64, M] float32: statistics of the rows of out, or None
    M,
    N,
    K,
    tokens,
    x_m,
    residual_m,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    tl.assume(K > 0)  # else the loop over tiles would be there twice
    a_tiles = tl.make_tensor_descriptor(x, [M, K], [x_m, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = place_tile(tile, M, tiles_n, BLOCK_M, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            a = a_tiles.load([tile_m * BLOCK_M, k])
            w = w_tiles.load([tile_n * BLOCK_N, k])
            acc = tl.dot(a, w.T, acc)
        m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        for part in tl.static_range(PARTS):
            columns = take_columns(acc, part, PARTS)
            finish_forward(
                columns, columns, tile_n * PARTS + part, m, m < M, M, N, bias, pre, residual,
                layer_scale, drop_scale, out, out_stats, tokens, residual_m, ACT, False, BLOCK_M,
                WIDTH,
            )  # fmt: skip


@jit
def persistent_input_grad_kernel(
    dy,  # [M, N]: the gradient of z, rows dy_m apart
    weight,  # [N, K]
    pre,  # [M, K] or [M, 2 K]: the layer's input was act(pre), or None
    hidden,  # [M, K]: that input, made again, or None
    dx,  # [M, K]; with pre its gradient, of the same shape
    M,
    N,
    K,
    dy_m,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    tl.assume(N > 0)
    g_tiles = tl.make_tensor_descriptor(dy, [M, N], [dy_m, 1], [BLOCK_M, BLOCK_N])
    w_tiles = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_k
    WIDTH: tl.constexpr = BLOCK_K // PARTS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_k = place_tile(tile, M, tiles_k, BLOCK_M, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
        for n in range(0, N, BLOCK_N):
            g = g_tiles.load([tile_m * BLOCK_M, n])
            w = w_tiles.load([n, tile_k * BLOCK_K])
            acc = tl.dot(g, w, acc)
        m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        for part in tl.static_range(PARTS):
            finish_input_grad(
                take_columns(acc, part, PARTS), tile_k * PARTS + part, m, m < M, K, pre, hidden,
                dx, ACT, GATED, WIDTH,
            )  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A tile; programs of it that share a multiprocessor; and how long those take, in relation."""

    tile: TileConfig
    resident: int
    cost: float


# 128 x 256 is the widest tile that leaves registers to finish it in slices of 64 columns; four
# stages of it and a slice are 224 KiB of the 227 that there are. A tile of half the size reads
# shared memory more often, so that it costs more than half; a small one spreads few tokens out.
CANDIDATES = (
    Candidate(TileConfig(128, 256, 64, 8, 4, parts=4), 1, 1.0),
    Candidate(TileConfig(128, 128, 64, 8, 4, parts=2), 1, 0.6),
    Candidate(TileConfig(64, 64, 64, 4, 4), 2, 0.5),
)


def best(rows: int, columns: int, sms: int) -> Candidate:
    """What goes through a product [rows, columns] in the least time, as predicted.

    That is a matter of rounds: 133 tiles on 132 multiprocessors take as long as 264.
    """

    def time(candidate: Candidate) -> float:
        tiles = tiles_of(candidate.tile, rows, columns)
        return candidate.cost * cdiv(tiles, candidate.resident * sms)

    return min(CANDIDATES, key=time)


def tiles_of(tile: TileConfig, rows: int, columns: int) -> int:
    """How many tiles a product [rows, columns] has."""
    return cdiv(rows, tile.block_m) * cdiv(columns, tile.block_n)


def choose(rows: int, columns: int, sms: int) -> tuple[TileConfig, int]:
    """The best tile, and how many programs go through them all."""
    chosen = best(rows, columns, sms)
    return chosen.tile, min(tiles_of(chosen.tile, rows, columns), chosen.resident * sms)


def suits(tokens: Tensor, weight: Tensor) -> bool:
    """Whether Hopper's tensor cores can multiply tiles of both matrices just as TMA brings them.

    Each must lie on 16 bytes, with rows that begin there, too, and don't overlap.
    """
    return (
        capability(weight.device) == (9, 0)
        and tokens.dtype == weight.dtype
        and weight.dtype in (torch.float16, torch.bfloat16)
        and all(
            t.shape[1] > 0
            and t.stride(0) >= t.shape[1]
            and t.stride(0) * t.element_size() % 16 == 0
            and t.data_ptr() % 16 == 0
            for t in (tokens, weight)
        )
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    out: Tensor,
    out_stats: Tensor | None,
    tokens: int,
    activation: str,
    group: int,
    chosen: tuple[TileConfig, int] | None = None,
) -> None:
    """Fill `out`, and `pre` and `out_stats` where given; see `persistent_forward_kernel`.

    chosen: tile and programs; those of `choose` if None.
    """
    (rows, width), features = x.shape, weight.shape[0]
    config, programs = chosen or choose(rows, features, sm_count(weight.device))
    launch(
        persistent_forward_kernel,
        (programs,),
        x,
        weight,
        bias,
        pre,
        residual,
        layer_scale,
        drop_scale,
        out,
        out_stats,
        rows,
        features,
        width,
        tokens,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        ACT=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=group,
        PARTS=config.parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        scratch=True,
    )


def input_grad(
    dy: Tensor,
    weight: Tensor,
    pre: Tensor | None,
    hidden: Tensor | None,
    dx: Tensor,
    activation: str,
    gated: bool,
    group: int,
    chosen: tuple[TileConfig, int] | None = None,
) -> None:
    """Fill `dx`, and `hidden` where given; see `persistent_input_grad_kernel`.

    chosen: tile and programs; those of `choose` if None.
    """
    rows, (features, width) = dy.shape[0], weight.shape
    config, programs = chosen or choose(rows, width, sm_count(weight.device))
    launch(
        persistent_input_grad_kernel,
        (programs,),
        dy,
        weight,
        pre,
        hidden,
        dx,
        rows,
        features,
        width,
        dy.stride(0),
        ACT=activation,
        GATED=gated,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_k,
        BLOCK_K=config.block_n,
        GROUP=group,
        PARTS=config.parts,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        scratch=True,
    )
