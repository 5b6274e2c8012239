"""Products by tensor descriptors and programs that stay: results, edges, choices, compiled code."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _offline
from tests.error_budget import assert_within_budget
from tests.test_gates import row
from vitkern.kernels._gemm import launch as gemm
from vitkern.kernels._gemm import persistent
from vitkern.kernels._gemm.backward import input_grad_kernel
from vitkern.kernels._gemm.forward import forward_kernel
from vitkern.kernels._gemm.portable import chunk_statistics
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._triton import TRITON_MISSING, triton

GROUP = 2  # groups of row tiles, the last of them incomplete, at few tokens

needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))


@pytest.fixture(params=persistent.CANDIDATES, ids=lambda c: f"{c.tile.block_m}x{c.tile.block_n}")
def two_multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the tiles, and so few multiprocessors that a program has several to go through."""
    monkeypatch.setattr(persistent, "CANDIDATES", (request.param,))
    monkeypatch.setattr(persistent, "sm_count", lambda device: 2)


@pytest.fixture
def device(kernel_device: str) -> str:
    if kernel_device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for Hopper")
    return kernel_device


class Maker:
    """Draws tensors that lie in the middle of memory full of NaN, which no sum survives."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.dtype = torch.float16 if device == "cpu" else torch.bfloat16
        self.generator = torch.Generator().manual_seed(0)
        self.around: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *shape: int, scale: float = 1.0, gap: int = 0) -> Tensor:
        """Rows are `gap` values apart from each other."""
        t = self.empty(*shape, gap=gap)
        return t.copy_(torch.randn(shape, generator=self.generator) * scale)

    def empty(self, *shape: int, dtype: torch.dtype | None = None, gap: int = 0) -> Tensor:
        *outer, columns = shape
        rows = torch.Size(outer).numel()
        whole = torch.full(
            [rows * (columns + gap) + 32], torch.nan, device=self.device, dtype=dtype or self.dtype
        )
        inner = whole[16 : 16 + rows * (columns + gap)].view(*outer, columns + gap)[..., :columns]
        outside = torch.ones_like(whole, dtype=torch.bool)
        outside[16:-16].view(*outer, columns + gap)[..., :columns] = False
        self.around.append((whole, outside))
        return inner

    def check_around(self) -> None:
        """Nothing was written beside a tensor."""
        assert all(whole[outside].isnan().all() for whole, outside in self.around)


def values(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.to(dtype) for t in tensors)


# M, N, K: beyond a tile in each direction, and no multiple of one.
SHAPES = [(150, 264, 72), (130, 136, 64), (1, 24, 8)]


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("two_multiprocessors")
def test_forward_into_an_activation(shape: tuple[int, int, int], device: str) -> None:
    m, n, k = shape
    make = Maker(device)
    x, weight, bias = make(m, k, gap=8), make(n, k, scale=k**-0.5), make(n)
    pre, out = make.empty(m, n), make.empty(m, n)
    persistent.forward(x, weight, bias, pre, None, None, None, out, None, 1, "gelu", GROUP)
    eager = F.linear(x, weight, bias)
    exact = F.linear(*values(torch.float64, x, weight, bias)).cpu()
    assert_within_budget(("z", "y"), (pre, out), (eager, F.gelu(eager)), (exact, F.gelu(exact)))
    make.check_around()


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("two_multiprocessors")
def test_forward_into_a_stream(shape: tuple[int, int, int], device: str) -> None:
    m, n, k = shape
    make = Maker(device)
    x, weight, bias = make(m, k), make(n, k, scale=k**-0.5), make(n)
    residual, layer_scale = make(m, n, gap=8).float(), make(n)
    drop_scale = torch.tensor([0.0, 1.25], device=device) if m % 2 == 0 else None
    out = make.empty(m, n, dtype=torch.float32)
    stats = make.empty(2, -(-n // 64), m, dtype=torch.float32)
    persistent.forward(
        x, weight, bias, None, residual, layer_scale, drop_scale, out, stats, m // 2, "", GROUP
    )  # fmt: skip

    def stream(*arguments: Any) -> Tensor:
        x, weight, bias, residual, layer_scale, drop_scale = arguments
        branch = F.linear(x, weight, bias) * layer_scale
        if drop_scale is not None:
            branch = branch * drop_scale.repeat_interleave(m // 2)[:, None]
        return residual + branch

    given = (x, weight, bias, residual, layer_scale, drop_scale)
    exact = stream(*values(torch.float64, *given)).cpu()
    assert_within_budget(("stream",), (out,), (stream(*given),), (exact,))
    eager, exact = chunk_statistics(out, 64), chunk_statistics(out.double().cpu(), 64)
    assert_within_budget(("statistics",), (stats,), (eager,), (exact,))
    make.check_around()


@needs_triton
@pytest.mark.parametrize("activation", ["", "gelu", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("two_multiprocessors")
def test_input_gradient(shape: tuple[int, int, int], activation: str, device: str) -> None:
    """Columns of dy are summed over: here they are the last of `shape`."""
    m, k, n = shape
    gated = activation == "silu"
    make = Maker(device)
    dy, weight = make(m, n, gap=8), make(n, k, scale=n**-0.5)
    pre = make(m, k * (1 + gated)) if activation else None
    hidden = make.empty(m, k) if activation else None
    dx = make.empty(m, k * (1 + gated))
    persistent.input_grad(dy, weight, pre, hidden, dx, activation, gated, GROUP)

    def expected(dtype: torch.dtype) -> tuple[Tensor, ...]:
        d, w, z = values(dtype, dy, weight, pre)
        d = d @ w
        if not activation:
            return (d.cpu(),)
        z.requires_grad_()
        if gated:
            gate, value = z.chunk(2, dim=-1)
            y = F.silu(gate) * value
        else:
            y = F.gelu(z)
        return torch.autograd.grad(y, z, d)[0].cpu(), y.detach().cpu()

    eager, exact = expected(make.dtype), expected(torch.float64)
    names, actual = ("dx", "hidden"), (dx, hidden)
    assert_within_budget(names[: len(exact)], actual[: len(exact)], eager, exact)
    make.check_around()


@needs_triton
def test_no_tokens(device: str) -> None:
    make = Maker(device)
    weight, nothing = make(24, 16), torch.empty(0, 16, device=device, dtype=make.dtype)
    seen: list[Launch] = []
    with intercept(seen.append, (9, 0)):
        persistent.forward(
            nothing, weight, None, None, None, None, None, nothing.new_empty(0, 24), None, 1, "",
            GROUP,
        )  # fmt: skip
        dy = nothing.new_empty(0, 24)
        persistent.input_grad(dy, weight, None, None, nothing, "", False, GROUP)
    assert seen == []


@pytest.mark.parametrize(
    ("rows", "columns", "tile", "programs"),
    [
        (256 * 197, 768, (128, 256), 132),  # 1,182 tiles are 9 rounds but for 6
        (64 * 197, 768, (128, 256), 132),  # 3 rounds; 594 tiles of half the size would be 5
        (64 * 197, 384, (128, 128), 132),  # 297 tiles, 3 rounds; 198 wide ones, a quarter empty: 2
        (197, 768, (64, 64), 48),  # fewer tiles than multiprocessors
        (197, 3072, (64, 64), 192),
        (0, 768, (128, 256), 0),
    ],
)
def test_the_tile_that_takes_the_least_time(
    rows: int, columns: int, tile: tuple[int, int], programs: int
) -> None:
    config, count = persistent.choose(rows, columns, 132)
    assert ((config.block_m, config.block_n), count) == (tile, programs)


def matrix(rows: int, columns: int, stride: int, offset: int = 0, **options: Any) -> Tensor:
    whole = torch.empty(rows * stride + columns + offset, **{"dtype": torch.float16, **options})
    return whole[offset:].as_strided((rows, columns), (stride, 1))


@pytest.mark.parametrize(
    ("tokens", "weight", "capability"),
    [
        (matrix(5, 24, 24), matrix(8, 24, 24), (8, 0)),
        (matrix(5, 24, 24), matrix(8, 24, 24), (10, 0)),
        (matrix(5, 24, 24, dtype=torch.float32), matrix(8, 24, 24), (9, 0)),
        (
            matrix(5, 24, 24, dtype=torch.float32),
            matrix(8, 24, 24, dtype=torch.float32),
            (9, 0),
        ),
        (matrix(5, 24, 28), matrix(8, 24, 24), (9, 0)),  # 56 bytes a row
        (matrix(5, 20, 20), matrix(8, 20, 20), (9, 0)),
        (matrix(5, 24, 24, offset=4), matrix(8, 24, 24), (9, 0)),
        (matrix(5, 24, 24), matrix(8, 24, 24, offset=4), (9, 0)),
        (matrix(5, 24, 0), matrix(8, 24, 24), (9, 0)),  # one row again and again
        (matrix(5, 0, 8), matrix(8, 0, 8), (9, 0)),
    ],
)
def test_what_descriptors_can_not_be_made_of(
    tokens: Tensor, weight: Tensor, capability: tuple[int, int]
) -> None:
    with intercept(lambda launch: None, capability):
        assert not persistent.suits(tokens, weight)


def test_what_descriptors_can_be_made_of() -> None:
    with intercept(lambda launch: None, (9, 0)):
        assert persistent.suits(matrix(5, 24, 32, offset=8), matrix(8, 24, 24))
        assert persistent.suits(
            matrix(5, 20, 24, dtype=torch.bfloat16), matrix(20, 24, 24, dtype=torch.bfloat16)
        )


HOPPER = [persistent.persistent_forward_kernel, persistent.persistent_input_grad_kernel]


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [((9, 0), HOPPER), ((8, 0), [forward_kernel, input_grad_kernel])],
)
def test_which_cards_take_them(capability: tuple[int, int], kernels: list[Any]) -> None:
    x, weight, dy = matrix(5, 24, 24), matrix(8, 24, 24), matrix(5, 8, 8)
    seen: list[Launch] = []
    with intercept(seen.append, capability):
        gemm.forward(x, weight, None, torch.empty_like(dy))
        gemm.input_grad(dy, weight, torch.empty_like(x))
    assert [launch.kernel for launch in seen] == kernels


class AsksForScratch:
    """Stands in for a compiled kernel: does what Triton's launcher does about scratch memory."""

    def __init__(self) -> None:
        self.allocator: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run

    def run(self, *args: Any, **options: Any) -> None:
        from triton.runtime import _allocation

        self.allocator = _allocation._allocator.get()


@needs_triton
@pytest.mark.parametrize("scratch", [True, False])
def test_scratch_memory_is_there_in_every_thread(scratch: bool) -> None:
    from triton.runtime import _allocation

    def users(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError

    results: list[tuple[Any, Any]] = []

    def in_a_thread(own: Any) -> None:
        if own:
            triton.set_allocator(own)
        before = _allocation._allocator.get()
        kernel = AsksForScratch()
        Launch(kernel, (1,), (), {}, 4, 2, scratch).run()
        results.append((before, kernel.allocator))
        assert _allocation._allocator.get() is before

    for own in (None, users):
        thread = threading.Thread(target=in_a_thread, args=(own,))
        thread.start()
        thread.join()
    assert len(results) == 2
    for before, seen in results:
        assert (seen is not before) == scratch
        assert (getattr(seen, "__name__", "") == "_scratch") == scratch


@pytest.mark.gpu
def test_scratch_memory_on_a_gpu(device: str) -> None:
    """Autograd calls launchers from a thread of its own; so does this."""
    make = Maker(device)
    x, weight, out = make(300, 64), make(72, 64, scale=0.125), make.empty(300, 72)
    arguments = (x, weight, None, None, None, None, None, out, None, 1, "", GROUP)
    thread = threading.Thread(target=persistent.forward, args=arguments)
    thread.start()
    thread.join()
    exact = F.linear(x.double(), weight.double()).cpu()
    assert_within_budget(("out",), (out,), (F.linear(x, weight),), (exact,))


def test_the_judge_wants_tma_of_descriptors() -> None:
    assert _offline.judge(row(tma_loads=6)) == []
    assert _offline.judge(row(tma_loads=0)) == ["loads by tensor descriptors without UTMALDG"]


# Compiled in a process of its own: in this one kernels are interpreted.
COMPILE = """
import json
from types import SimpleNamespace
import torch
from benchmarks import _offline
from benchmarks._cases import Case
from vitkern.kernels._gemm import persistent
from vitkern.kernels._launch import intercept
from vitkern.kernels._op import Sample


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


seen = []
with intercept(seen.append, (9, 0)):
    for candidate in persistent.CANDIDATES:
        persistent.CANDIDATES = (candidate,)
        m, n, k = 12_608, 768, 3_072
        out, stats = (empty(*shape, dtype=torch.float32) for shape in ((m, n), (2, n // 64, m)))
        drop_scale = empty(64)
        persistent.forward(
            empty(m, k), empty(n, k), empty(n), None, out, empty(n), drop_scale, out, stats, 197,
            "", 8,
        )
        pre = empty(m, 2 * k)
        persistent.input_grad(
            empty(m, n), empty(n, k), pre, empty(m, k), pre, "silu", True, 8
        )
case = Case(SimpleNamespace(name="made up"), "vit", Sample("-", {}), torch.bfloat16)
jobs = [_offline.make_job(case, launch, 90) for launch in seen]
print(json.dumps([_offline.compile_job(job) for job in jobs]))
"""


@needs_triton
@pytest.mark.slow
def test_compiled_for_hopper(tmp_path: Path) -> None:
    """The epilogues that take the most registers, behind every tile."""
    script = tmp_path / "compile_for_hopper.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 2 * len(persistent.CANDIDATES)
    for compiled in rows:
        assert _offline.judge(compiled) == []
        assert compiled["tma_loads"] > 0
        assert compiled["tensor_core"]["HGMMA"] > 0
        resident = {c.tile.num_warps: c.resident for c in persistent.CANDIDATES}
        assert compiled["blocks_per_sm"] >= resident[compiled["num_warps"]]
