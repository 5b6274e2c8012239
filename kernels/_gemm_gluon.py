"""A linear layer with its epilogue for Hopper (sm_90), in Gluon: every copy and wait is explicit.

    z[m, n] = sum_k a[m, k] w[n, k] + bias[n]           a [M, K], w [N, K]: 16 bit, sum in float32
    y = act(z)                                          z is stored too where it is wanted
    out = y   or   residual + y * layer_scale[n] * drop_scale[m // tokens]   [M, N], 16 or 32 bit

Why beside the Triton kernel: Triton 3.6 to 3.9 leaves ``warp_specialize`` without effect on sm_90,
so its program computes or stores, never both. Here one warp fetches tiles of a and w by TMA into a
ring of stages, and two groups of four warps multiply them (wgmma), a group at a time in its
epilogue while the other has the tensor cores. The grid is persistent: a program goes through its
share of the tiles, and the ring is filled for the next tile while the last one is stored.

Barriers: stage s has `full[s]` (one arrival, and the bytes of its copies) and `empty[s]` (one
arrival for each group that reads it). The n-th use of a stage is the n-th phase of both. A wait
knows a phase by its parity only, so nobody may wait for one before the last but one is over: the
producer sees all phases, as groups that share tiles do; groups that take turns pass `turn` on after
their last wait. A wait for the phase before the first returns at once. Producer and groups derive
the same sequence of tiles and steps from sizes alone, so nobody waits for a stage that nobody fills
or frees. A program without a tile does nothing at all.
TMA reads zeros beyond the edges of a and w, which add nothing, and counts their bytes like others;
it leaves out what lies beyond the edges of what it stores. So no size needs a mask here but those
that are read by address: residual and vectors.

It has never run on a GPU. What is tested: that it compiles without spilling and fits in shared
memory; its protocol and arithmetic, on a model of the hardware in Python. Speed is a prediction.

Sources: the Gluon tutorials of Triton (persistence, warp specialisation); CUTLASS's cooperative and
ping-pong kernels for sm_90, https://docs.nvidia.com/cutlass.
"""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._configs import tunable
from ._gemm.activation import activate
from ._gemm.launch import CHUNK, as_matrix, dense, row_statistics
from ._gemm.portable import chunk_statistics
from ._launch import capability, cdiv, intercepted, launch, sm_count
from ._triton import INTERPRET, gluon, tl

_GLUON = gluon()
gl, hopper = _GLUON.language, _GLUON.hopper
jit = _GLUON.jit


@jit
def _locate(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row, column) of a tile: down GROUP rows of tiles, then on to the next column.

    What runs at a time then needs few rows of a and of w, which L2 serves.
    """
    band = GROUP * tiles_n
    first = tile // band * GROUP
    rows = gl.minimum(tiles_m - first, GROUP)
    inner = tile % band
    return first + inner % rows, inner // rows


@jit
def _produce(
    a_desc,
    w_desc,
    a_ring,
    w_ring,
    full,
    empty,
    tiles_m,
    tiles_n,
    k_steps,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    SHARERS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One warp: fetches what the groups multiply, as far ahead as there are free stages."""
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = _locate(tile, tiles_m, tiles_n, GROUP)
        for k in range(k_steps):
            stage = step % STAGES
            ready = full.index(stage)
            hopper.mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            hopper.mbarrier.expect(ready, 2 * DEPTH * (SHARERS * ROWS + COLS))
            for half in gl.static_range(SHARERS):
                hopper.tma.async_copy_global_to_shared(
                    a_desc,
                    [(tile_m * SHARERS + half) * ROWS, k * DEPTH],
                    ready,
                    a_ring.index(stage * SHARERS + half),
                )
            hopper.tma.async_copy_global_to_shared(
                w_desc, [tile_n * COLS, k * DEPTH], ready, w_ring.index(stage)
            )
            step += 1


@jit
def _split(x, PARTS: tl.constexpr):
    """The columns of x in PARTS pieces from left to right: other names for the same registers."""
    LEVELS: tl.constexpr = PARTS.bit_length() - 1
    pieces = (x,)
    for _ in gl.static_range(LEVELS):
        halves = ()
        for i in gl.static_range(len(pieces)):
            x = pieces[i]
            halves += x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
        pieces = halves  # type: ignore[assignment]
    return pieces


@jit
def _vector(pointer, at, size):
    return gl.load(pointer + at, mask=at < size, other=0.0).to(gl.float32)


@jit
def _matrix(pointer, rows, cols, M, N):
    at = pointer + rows.to(gl.int64)[:, None] * N + cols[None, :]
    return gl.load(at, mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0)


@jit
def _store(desc, buffer, value, row, col, PENDING: tl.constexpr):
    """Leave `value` to TMA, once that has read what it was given before from this buffer."""
    hopper.tma.store_wait(PENDING)
    buffer.store(value.to(desc.dtype))
    hopper.fence_async_shared()
    hopper.tma.async_copy_shared_to_global(desc, [row, col], buffer)


@jit
def _consume(
    pre_desc,
    out_desc,
    pre_buffers,
    out_buffers,
    a_ring,
    w_ring,
    full,
    empty,
    turn,
    bias,
    residual,
    layer_scale,
    drop_scale,
    tokens,
    M,
    N,
    tiles_m,
    tiles_n,
    k_steps,
    WHICH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    SHARERS: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Group WHICH: multiplies every tile's half WHICH, or every second tile from tile WHICH on."""
    ACC: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    LAYOUT: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    PARTS: tl.constexpr = COLS // PART
    HALF: tl.constexpr = WHICH if SHARERS == 2 else 0
    FIRST: tl.constexpr = WHICH if SHARERS == 1 else 0
    TURNS: tl.constexpr = 2 // SHARERS
    # Two buffers for each thing that is stored: its last store may still be under way, the one
    # before may not.
    PENDING: tl.constexpr = 1 if pre_desc is None else 3

    programs = gl.num_programs(0)
    step = FIRST * k_steps
    mine = 0  # tiles so far
    for tile in range(gl.program_id(0) + FIRST * programs, tiles_m * tiles_n, TURNS * programs):
        tile_m, tile_n = _locate(tile, tiles_m, tiles_n, GROUP)
        row = (tile_m * SHARERS + HALF) * ROWS
        rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        part = gl.arange(0, PART, layout=gl.SliceLayout(0, LAYOUT))
        if drop_scale is not None:
            kept = gl.load(drop_scale + rows // tokens, mask=rows < M, other=0.0).to(gl.float32)
        if residual is not None:  # a part ahead of its use: its way from memory is a long one
            ahead = _matrix(residual, rows, tile_n * COLS + part, M, N)

        acc = gl.zeros([ROWS, COLS], gl.float32, ACC)
        if SHARERS == 1:
            hopper.mbarrier.wait(turn.index(WHICH), (mine + 1 + WHICH) & 1)
        for k in range(k_steps):
            stage = step % STAGES
            hopper.mbarrier.wait(full.index(stage), step // STAGES & 1)
            acc = hopper.warpgroup_mma(
                a_ring.index(stage * SHARERS + HALF),
                w_ring.index(stage).permute((1, 0)),
                acc,
                is_async=True,
            )
            # All products but these are done, so the stage before can be filled again.
            acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
            hopper.mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        if SHARERS == 1:
            hopper.mbarrier.arrive(turn.index(1 - WHICH))
            mine += 1
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
        hopper.mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += (TURNS - 1) * k_steps  # which the other group takes

        pieces = _split(acc, PARTS)
        for i in gl.static_range(PARTS):
            z = gl.convert_layout(pieces[i], LAYOUT, assert_trivial=True)
            col = tile_n * COLS + i * PART
            cols = col + part
            if bias is not None:
                z += _vector(bias, cols, N)[None, :]
            if pre_desc is not None:
                _store(pre_desc, pre_buffers.index(2 * WHICH + i % 2), z, row, col, PENDING)
            y = activate(z, ACTIVATION)
            if layer_scale is not None:
                y *= _vector(layer_scale, cols, N)[None, :]
            if drop_scale is not None:
                y *= kept[:, None]
            if residual is not None:
                y += ahead.to(gl.float32)
                if i + 1 < PARTS:
                    ahead = _matrix(residual, rows, cols + PART, M, N)
            _store(out_desc, out_buffers.index(2 * WHICH + i % 2), y, row, col, PENDING)
    hopper.tma.store_wait(0)  # the buffers must outlive what TMA reads of them


# Sizes of a batch: one compilation serves them all.
@jit(do_not_specialize=["tokens", "M", "n_eighths", "k_steps"])
def gemm_kernel(
    out,  # [M, N], stored through out_desc: the launch gate looks for the device of a tensor
    a_desc,  # [M, K] in blocks [ROWS, DEPTH]
    w_desc,  # [N, K] in blocks [COLS, DEPTH]
    pre_desc,  # [M, N] in blocks [ROWS, PART], or None
    out_desc,  # [M, N] in blocks [ROWS, PART]
    bias,  # [N] or None
    residual,  # [M, N] or None
    layer_scale,  # [N] or None
    drop_scale,  # [ceil(M / tokens)] or None
    tokens,
    M,
    n_eighths,  # N / 8: as the compiler then knows, rows of `residual` start at multiples of 8
    k_steps,  # ceil(K / DEPTH), at least 1
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    SHARERS: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    N = n_eighths * 8
    tiles_m = gl.cdiv(M, SHARERS * ROWS)
    tiles_n = gl.cdiv(N, COLS)
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES * SHARERS, ROWS, DEPTH], a_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, COLS, DEPTH], w_desc.layout)
    out_buffers = gl.allocate_shared_memory(out_desc.dtype, [4, ROWS, PART], out_desc.layout)
    pre_buffers = out_buffers
    if pre_desc is not None:
        pre_buffers = gl.allocate_shared_memory(pre_desc.dtype, [4, ROWS, PART], pre_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        hopper.mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)
        hopper.mbarrier.init(empty.index(i), count=SHARERS)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    pre_desc, out_desc, pre_buffers, out_buffers, a_ring, w_ring, full, empty,
                    turn, bias, residual, layer_scale, drop_scale, tokens, M, N, tiles_m, tiles_n,
                    k_steps, 0, ROWS, COLS, PART, STAGES, SHARERS, GROUP, ACTIVATION,
                ),
            ),
            (
                _consume,
                (
                    pre_desc, out_desc, pre_buffers, out_buffers, a_ring, w_ring, full, empty,
                    turn, bias, residual, layer_scale, drop_scale, tokens, M, N, tiles_m, tiles_n,
                    k_steps, 1, ROWS, COLS, PART, STAGES, SHARERS, GROUP, ACTIVATION,
                ),
            ),
            (
                _produce,
                (
                    a_desc, w_desc, a_ring, w_ring, full, empty, tiles_m, tiles_n, k_steps,
                    ROWS, COLS, DEPTH, STAGES, SHARERS, GROUP,
                ),
            ),
        ],
        [4, 1],
        # 65,536 registers are 168 for each of 384 threads; what the producer (with the three warps
        # that fill up its group) gives away makes 240 for both groups: 128 are the accumulator.
        [240, 24],
    )  # fmt: skip


DEPTH = 64  # 128 bytes of a row: the widest swizzle, and four products of depth 16
GROUP = 8  # rows of tiles that are walked down: 8 x 128 rows of 768 are 1.5 MB
SHARED_LIMIT = 232_448 - 1024  # bytes a block may have, less barriers and what groups are passed


@dataclass(frozen=True)
class Config:
    """How the two groups share the work; all of it predicted, not measured.

    sharers: 2 where the groups hold the upper and lower half of one tile, 1 where they take turns.
    rows, cols: of a group's accumulator; 128 registers a thread in any case.
    part: columns that the epilogue holds besides, at most 128 bytes: what TMA swizzles.
    stages: as many as shared memory has room for.
    """

    sharers: int
    rows: int
    cols: int
    part: int
    stages: int


def config(
    m: int,
    n: int,
    k: int,
    *,
    activation: str,
    out_bytes: int,
    need_pre: bool,
    residual: bool,
    processors: int,
) -> Config:
    """The config for a product [m, k] x [k, n].

    A step of depth 64 takes 1,024 clocks for 128 x 256 outputs. It fetches 48 bytes a clock where
    the groups share a tile and 64 where they take turns, and L2 is thought to serve 39 to each
    multiprocessor. Taking turns hides the epilogue behind the other group's products. Counted in
    instructions, that of 128 x 256 outputs takes 1,600 clocks, 3,400 with a residual, 4,600 with
    GELU and 5,700 with a sigmoid, which is worth the bytes up to a depth k of 250, 500, 700 and
    900. Few tiles are taken in turns too: they are half as large, and so occupy more
    multiprocessors.
    """
    part = parts(out_bytes, need_pre, residual)[0]
    short = k <= {"": 500 if residual else 250, "relu": 250, "gelu": 700}.get(activation, 900)
    few = cdiv(m, 128) * cdiv(n, 256) < processors
    return shared(1 if short or few else 2, part, out_bytes, need_pre)


def parts(out_bytes: int, need_pre: bool, residual: bool) -> tuple[int, ...]:
    """Columns that the epilogue may hold, the best as predicted first.

    64 next to a part of the residual that is on its way spilled 29 loads.
    """
    return (64, 32) if out_bytes == 2 and not (need_pre or residual) else (32,)


def shared(sharers: int, part: int, out_bytes: int, need_pre: bool) -> Config:
    """The config of so many sharers, and as many stages as there is room for."""
    rows, cols = {1: (128, 128), 2: (64, 256)}[sharers]
    buffers = 4 * rows * part * (out_bytes + 2 * need_pre)
    stage = 2 * DEPTH * (sharers * rows + cols)
    return Config(sharers, rows, cols, part, (SHARED_LIMIT - buffers) // stage)


def candidates(out_bytes: int, need_pre: bool, residual: bool) -> list[Config]:
    """Tiles shared and tiles in turns, with each part."""
    return [
        shared(sharers, part, out_bytes, need_pre)
        for sharers in (1, 2)
        for part in parts(out_bytes, need_pre, residual)
    ]


GLUON = tunable("gluon", Config)


def problem(
    a: Tensor, w: Tensor, *, residual: Tensor | None = None, out_dtype: torch.dtype
) -> str | None:
    """Why `forward` can't run on these tensors; None where it can."""
    if a.dtype != w.dtype:
        return f"needs a and w both float16 or both bfloat16, got {a.dtype} and {w.dtype}"
    reason = product_problem(w, a.dtype, out_dtype)
    if reason:
        return reason
    for name, t in (("a", a), ("w", w)):
        # Of one row the stride is nobody's business; _descriptor makes one up.
        strided = t.shape[0] > 1 and (t.stride(0) % 8 or t.stride(0) < t.shape[1])
        if t.stride(1) != 1 or strided or t.storage_offset() % 8:
            return f"TMA needs rows of {name} on 16 bytes, strides are {t.stride()}"
    if residual is not None and not residual.is_contiguous():
        return f"needs a contiguous residual, strides are {residual.stride()}"
    return None


def product_problem(w: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> str | None:
    """Why there is no product of dense rows with `w` [N, K], both cast to `dtype`."""
    if _GLUON.missing is not None:
        return _GLUON.missing
    if not intercepted():
        if w.device.type != "cuda":
            return f"Gluon kernels need CUDA tensors, these are on {w.device.type}"
        if INTERPRET:
            return "nothing interprets Gluon (TRITON_INTERPRET=1 is set)"
    if capability(w.device) != (9, 0):
        return "made for compute capability 9.0, this is {}.{}".format(*capability(w.device))
    if dtype not in (torch.float16, torch.bfloat16):
        return f"needs a and w both float16 or both bfloat16, got {dtype}"
    if out_dtype not in (dtype, torch.float32):
        return f"stores {dtype} or float32, not {out_dtype}"
    if w.shape[1] == 0 or w.shape[0] % 8 or w.shape[1] % 8:
        return f"TMA needs N and K to be multiples of 8 and K > 0, w is {list(w.shape)}"
    return None


@cache
def _swizzled(row_bytes: int, element_bits: int) -> Any:
    """Layout in shared memory of rows of 64 or 128 bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=row_bytes, element_bitwidth=element_bits, rank=2)


def _descriptor(t: Tensor, rows: int, cols: int) -> Any:
    """How TMA sees the matrix `t`: in blocks [rows, cols]."""
    size = t.element_size()
    layout = _swizzled(cols * size, 8 * size)
    row_stride = t.stride(0) if t.shape[0] > 1 else t.shape[1]
    return _GLUON.TensorDescriptor(t, list(t.shape), [row_stride, 1], [rows, cols], layout)


def forward(
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    tokens: int = 1,
    activation: str | None = None,
    out_dtype: torch.dtype,
    need_pre: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; `problem` must have said None.

    Args:
        a: [M, K] float16 or bfloat16.
        w: [N, K] of the same dtype.
        bias: [N] or None.
        residual: [M, N] or None.
        layer_scale: [N] or None.
        drop_scale: [M / tokens], one factor for every `tokens` rows, or None.
        activation: a name from ``_gemm.activation``, or None.
        out_dtype: that of `a`, or float32.
        need_pre: store z, too.

    Returns:
        (out [M, N] of `out_dtype`, z [M, N] in the dtype of `a` or None).
    """
    (m, k), n = a.shape, w.shape[0]
    out = torch.empty(m, n, dtype=out_dtype, device=a.device)
    pre = torch.empty(m, n, dtype=a.dtype, device=a.device) if need_pre else None
    if out.numel() == 0:
        return out, pre
    act = activation or ""
    processors = sm_count(a.device)
    out_bytes, summed = out.element_size(), residual is not None
    chosen = GLUON.pick(
        config(
            m,
            n,
            k,
            activation=act,
            out_bytes=out_bytes,
            need_pre=need_pre,
            residual=summed,
            processors=processors,
        ),
        a.device,
        a.dtype,
        lambda: candidates(out_bytes, need_pre, summed),
        lambda: {
            "m": m,
            "n": n,
            "k": k,
            "act": act,
            "pre": need_pre,
            "residual": summed,
            "wide": out_dtype == torch.float32,
        },
    )
    rows, cols, part = chosen.rows, chosen.cols, chosen.part
    launch(
        gemm_kernel,
        (min(processors, cdiv(m, chosen.sharers * rows) * cdiv(n, cols)),),
        out,
        _descriptor(a, rows, DEPTH),
        _descriptor(w, cols, DEPTH),
        None if pre is None else _descriptor(pre, rows, part),
        _descriptor(out, rows, part),
        *(None if t is None else t.contiguous() for t in (bias, residual, layer_scale, drop_scale)),
        tokens,
        m,
        n // 8,
        cdiv(k, DEPTH),
        ROWS=rows,
        COLS=cols,
        DEPTH=DEPTH,
        PART=part,
        STAGES=chosen.stages,
        SHARERS=chosen.sharers,
        GROUP=GROUP,
        ACTIVATION=act,
        num_warps=4,  # of one group; the other one and the producer come on top
        num_stages=1,
    )
    return out, pre


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool, need_pre: bool
) -> tuple[Tensor, Tensor]:
    """As ``linear_act.reference``; a ValueError says why it can't run."""
    a, w = _rows(x), weight.contiguous()
    reason = linear_act_problem(w, w.dtype, gated) or problem(a, w, out_dtype=w.dtype)
    if reason:
        raise ValueError(f"linear_act: impl='gluon' can't run here: {reason}")
    y, z = forward(a, w, dense(bias), activation=activation, out_dtype=w.dtype, need_pre=need_pre)
    shape = (*x.shape[:-1], w.shape[0])  # without tokens, -1 could be anything
    return y.view(shape), weight.new_empty(0) if z is None else z.view(shape)


def linear_act_problem(weight: Tensor, dtype: torch.dtype, gated: bool) -> str | None:
    """Why `linear_act` can't run with a weight cast to `dtype`; None where it can."""
    return "no gated pair in one pass" if gated else product_problem(weight, dtype, dtype)


def _rows(t: Tensor) -> Tensor:
    """`t` as a matrix whose rows TMA can find."""
    matrix = as_matrix(t)
    return matrix.contiguous() if matrix.stride(0) % 8 or matrix.storage_offset() % 8 else matrix


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """As ``linear_residual.reference``; a ValueError says why it can't run.

    The statistics take a pass over the stream: who wants them takes another kernel.
    """
    a, w, stream = _rows(x), weight.contiguous(), as_matrix(residual).contiguous()
    reason = problem(a, w, residual=stream, out_dtype=stream.dtype)
    if reason:
        raise ValueError(f"linear_residual: impl='gluon' can't run here: {reason}")
    y, _ = forward(
        a,
        w,
        dense(bias),
        residual=stream,
        layer_scale=dense(layer_scale),
        drop_scale=dense(drop_scale),
        tokens=max(1, residual.shape[1]),
        out_dtype=stream.dtype,
        need_pre=False,
    )
    y = y.view(residual.shape)
    return y, statistics(y) if need_stats else y.new_empty(0, dtype=torch.float32)


def statistics(y: Tensor) -> Tensor:
    """[2, C, M] float32: mean and sum of squared differences of each chunk of a row [..., D]."""
    width = y.shape[-1]
    if width % CHUNK or y.numel() == 0:
        return chunk_statistics(y.float(), CHUNK)
    chunks = row_statistics(y.view(-1, CHUNK)).view(2, -1, width // CHUNK)
    return chunks.transpose(1, 2).contiguous()
