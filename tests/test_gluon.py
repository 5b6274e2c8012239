"""Gluon's product for Hopper: its protocol in a model, its code as compiled, its results on a GPU.

Nothing interprets Gluon, but a kernel's body is Python. Here it runs as such, each partition in a
thread, on a model of what it stands on: barriers with phases and bytes, copies that land late and
in any order, products and stores that read shared memory as late as they may. A stage or buffer
handed on too soon shows as NaN in the result, a wait for what never comes as a timeout.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _offline
from vitkern.kernels import REGISTRY
from vitkern.kernels import _gemm_gluon as gluon_gemm
from vitkern.kernels._configs import override
from vitkern.kernels._gemm.activation import ACTIVATIONS
from vitkern.kernels._gemm.portable import chunk_statistics
from vitkern.kernels._gemm_gluon import Config, config, forward, problem
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._triton import INTERPRET, gluon

from .error_budget import assert_within_budget, in_float64

HOPPER = (9, 0)
needs_gluon = pytest.mark.skipif(gluon().missing is not None, reason=str(gluon().missing))


class Barrier:
    """An mbarrier: a phase ends when all have arrived, and all bytes that were announced."""

    def init(self, count: int) -> None:
        self.count = self.arrivals = count
        self.phase = self.bytes = 0
        self.changed = threading.Condition()

    def update(self, arrivals: int, expected: int) -> None:
        with self.changed:
            self.arrivals -= arrivals
            self.bytes += expected
            assert self.arrivals >= 0, "one arrival too many"
            if self.arrivals == self.bytes == 0:
                self.phase, self.arrivals = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != parity, timeout=20), "deadlock"


class Buffer:
    """A tile in shared memory; `unfenced`: written by threads, and TMA has not been told yet."""

    def __init__(self, values: Tensor, machine: "Machine") -> None:
        self.values, self.machine = values, machine
        self.unfenced = False

    def permute(self, order: tuple[int, ...]) -> "Buffer":
        return Buffer(self.values.permute(order), self.machine)

    def store(self, value: Tensor) -> None:
        assert (value.dtype, value.shape) == (self.values.dtype, self.values.shape)
        self.values.copy_(value)
        self.unfenced = True
        self.machine.own.written.append(self)


class Tile(torch.Tensor):
    """A tile in registers."""

    def split(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.unbind(-1)


class Pointer:
    """The address of a tensor's first element, or many addresses from there on."""

    def __init__(self, base: Tensor, at: Any = 0) -> None:
        self.base, self.at = base, at

    def __add__(self, offset: Tensor) -> "Pointer":
        return Pointer(self.base, self.at + offset)


class Machine:
    """Stands in for `gl` and `hopper` while the partitions of one program run."""

    float32, int64 = torch.float32, torch.int64
    static_range = range
    minimum = min
    SliceLayout = NVMMADistributedLayout = MBarrierLayout = staticmethod(lambda *_: None)

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs = program, programs
        self.random = random.Random(seed)
        self.copies: list[Any] = []
        self.copied = threading.Condition()
        self.own = threading.local()  # products and stores that a partition has under way
        self.failures: list[BaseException] = []
        self.mbarrier = self.tma = self

    # gl
    def program_id(self, axis: int) -> int:
        return self.program

    def num_programs(self, axis: int) -> int:
        return self.programs

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def arange(self, start: int, end: int, layout: None) -> Tensor:
        return torch.arange(start, end, dtype=torch.int32)

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: None) -> Tensor:
        return torch.zeros(shape, dtype=dtype).as_subclass(Tile)

    def convert_layout(self, value: Tensor, layout: None, assert_trivial: bool) -> Tensor:
        return value

    def load(self, pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        at, mask = torch.broadcast_tensors(pointer.at.long(), mask)
        assert ((at[mask] >= 0) & (at[mask] < pointer.base.numel())).all(), "outside the tensor"
        flat = pointer.base.reshape(-1)
        found = torch.full(at.shape, other, dtype=flat.dtype)
        found[mask] = flat[at[mask]]
        return found

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:
            return SimpleNamespace(index=[Barrier() for _ in range(shape[0])].__getitem__)
        tiles = [Buffer(v, self) for v in torch.full(shape, torch.nan, dtype=dtype)]
        return SimpleNamespace(index=tiles.__getitem__)

    def warp_specialize(
        self, partitions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]
    ) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1

        def run(partition: Any, args: tuple[Any, ...]) -> None:
            self.own.stores, self.own.written = [], []
            try:
                partition(*args)
                assert not self.own.stores, "ends before TMA has read its buffers"
            except BaseException as failure:
                self.failures.append(failure)

        threads = [threading.Thread(target=run, args=it, daemon=True) for it in partitions]
        engine = threading.Thread(target=self.copy, daemon=True)
        for thread in (*threads, engine):
            thread.start()
        for thread in threads:
            thread.join()
        with self.copied:
            assert not self.copies or self.failures, "ends while copies are under way"
            self.copies.append(None)
            self.copied.notify()
        engine.join()
        if self.failures:
            raise self.failures[0]

    # mbarrier
    def init(self, barrier: Barrier, count: int) -> None:
        barrier.init(count)

    def wait(self, barrier: Barrier, parity: int) -> None:
        assert parity in (0, 1)
        barrier.wait(parity)

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.update(1, size)

    def arrive(self, barrier: Barrier, pred: bool = True) -> None:
        if pred:
            barrier.update(1, 0)

    # tma
    def async_copy_global_to_shared(
        self, desc: Any, at: list[int], barrier: Barrier, buffer: Buffer
    ) -> None:
        buffer.values.fill_(torch.nan)
        with self.copied:
            self.copies.append((desc, at, barrier, buffer))
            self.copied.notify()

    def copy(self) -> None:
        """The copy engine: takes any copy that was asked for; all bytes count, zeros too."""
        while True:
            with self.copied:
                self.copied.wait_for(lambda: self.copies)
                chosen = self.copies.pop(self.random.randrange(len(self.copies)))
            if chosen is None:
                return
            desc, (row, col), barrier, buffer = chosen
            rows, cols = desc.box
            assert buffer.values.shape == (rows, cols)
            found = desc.base[row : row + rows, col : col + cols]
            padding = (0, cols - found.shape[1], 0, rows - found.shape[0])
            buffer.values.copy_(F.pad(found, padding))
            barrier.update(0, -found.element_size() * rows * cols)

    def async_copy_shared_to_global(self, desc: Any, at: list[int], buffer: Buffer) -> None:
        assert not buffer.unfenced, "no fence between the writes and TMA"

        def store() -> None:
            (row, col), (rows, cols) = at, desc.box
            place = desc.base[row : row + rows, col : col + cols]
            assert place.isnan().all(), "stored twice"
            place.copy_(buffer.values[: place.shape[0], : place.shape[1]])

        self.own.stores.append(store)

    def store_wait(self, pending: int) -> None:
        while len(self.own.stores) > pending:
            self.own.stores.pop(0)()

    # hopper
    def fence_async_shared(self) -> None:
        for buffer in self.own.written:
            buffer.unfenced = False
        self.own.written.clear()

    def warpgroup_mma(self, a: Buffer, b: Buffer, acc: Any, is_async: bool) -> Any:
        value, products = acc if isinstance(acc, tuple) else (acc, [])
        return value, [*products, (a.values, b.values)]

    def warpgroup_mma_wait(self, pending: int, deps: tuple[Any]) -> Any:
        value, products = deps[0]
        while len(products) > pending:
            a, b = products.pop(0)
            value += a.float() @ b.float()
        return (value, products) if pending else value


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs a launch on the model, with the kernel's functions as plain Python."""
    for name in ("_locate", "_produce", "_split", "_vector", "_matrix", "_store", "_consume"):
        monkeypatch.setattr(gluon_gemm, name, getattr(gluon_gemm, name).fn)
    monkeypatch.setattr(
        gluon_gemm, "activate", lambda z, name: ACTIVATIONS[name].definition(z) if name else z
    )

    def argument(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Pointer(value)
        if isinstance(value, gluon().TensorDescriptor):
            assert value.strides[1] == 1
            return SimpleNamespace(
                base=value.base, box=value.block_shape, dtype=value.base.dtype, layout=None
            )
        return value

    def run(launch: Launch, seed: int) -> None:
        (programs,) = launch.grid
        for program in range(programs):
            machine = Machine(program, programs, seed + program)
            with monkeypatch.context() as patch:
                patch.setattr(gluon_gemm, "gl", machine)
                patch.setattr(gluon_gemm, "hopper", machine)
                launch.kernel.fn(*map(argument, launch.args), **launch.constexprs)

    return run


def make(m: int, n: int, k: int, dtype: torch.dtype, epilogue: str, **place: Any) -> dict[str, Any]:
    """Arguments of `forward`; rows 7 to a sample."""
    generator = torch.Generator().manual_seed(m + n + k)

    def normal(*shape: int, of: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(of).to(**place)

    arguments: dict[str, Any] = {
        "a": normal(m, k, of=dtype),
        "w": normal(n, k, of=dtype, scale=k**-0.5),
        "bias": normal(n),
        "out_dtype": dtype,
        "need_pre": False,
    }
    if epilogue.startswith("residual"):
        stream = torch.float32 if epilogue.endswith("float32") else dtype
        arguments |= {
            "residual": normal(m, n, of=stream),
            "layer_scale": normal(n),
            "drop_scale": normal(-(-m // 7)).ge(0) * 1.25,
            "tokens": 7,
            "out_dtype": stream,
        }
    elif epilogue == "no bias":
        arguments["bias"] = None
    elif epilogue != "plain":
        activation, _, pre = epilogue.partition(" ")
        arguments |= {"activation": activation, "need_pre": bool(pre)}
    return arguments


def eager(
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    need_pre: bool,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    tokens: int = 1,
    activation: str = "",
) -> tuple[Tensor, ...]:
    """The same in ATen calls."""
    z = y = F.linear(a, w, None if bias is None else bias.to(a.dtype))
    if activation:
        y = ACTIVATIONS[activation].fused(z)
    if layer_scale is not None:
        y = y * layer_scale.to(y.dtype)
    if drop_scale is not None:
        y = y * drop_scale.to(y.dtype).repeat_interleave(tokens)[: len(y), None]
    if residual is not None:
        y = residual + y
    return (y.to(out_dtype), z) if need_pre else (y.to(out_dtype),)


EPILOGUES = [
    "plain", "no bias", "residual float32", "residual",
    "gelu", "gelu pre", "gelu_tanh", "quick_gelu pre", "relu", "silu pre",
]  # fmt: skip
NAMES = ("out", "pre")


def check(arguments: dict[str, Any], actual: tuple[Tensor | None, ...]) -> None:
    """`actual` is at most twice as far from the result in float64 as eager is."""
    there = tuple(t for t in actual if t is not None)
    assert_within_budget(
        NAMES[: len(there)], there, eager(**arguments), eager(**in_float64(arguments))
    )


# Tiles of 16 x 32 and of 8 x 32 for each group, parts of 16, and products of depth 16.
SMALL = [
    Config(2, 8, 32, 16, 2),
    Config(2, 8, 32, 16, 3),
    Config(1, 16, 32, 16, 2),
    Config(1, 16, 32, 16, 5),
]


@needs_gluon
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("small", SMALL, ids=lambda c: f"{c.sharers} sharing, {c.stages} stages")
@pytest.mark.parametrize("shape", [(1, 8, 8), (50, 104, 40), (100, 72, 88), (64, 64, 64)], ids=str)
def test_the_protocol(
    shape: tuple[int, int, int],
    small: Config,
    epilogue: str,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gluon_gemm, "config", lambda *_, **__: small)
    monkeypatch.setattr(gluon_gemm, "DEPTH", 16)
    monkeypatch.setattr(gluon_gemm, "GROUP", 2)
    monkeypatch.setattr(gluon_gemm, "sm_count", lambda _: 3)
    arguments = make(*shape, torch.bfloat16, epilogue)
    launches: list[Launch] = []
    with intercept(launches.append, HOPPER):
        results = forward(**arguments)
    for result in results:
        if result is not None:
            result.fill_(torch.nan)
    (launch,) = launches
    model(launch, seed=sum(shape))
    check(arguments, results)


# (M, N, K, dtype, epilogue): both ways to share the work with every kind of epilogue.
COMPILED = {
    "qkv of B": (50432, 2304, 768, torch.bfloat16, "plain"),
    "qkv of B, one image": (197, 2304, 768, torch.bfloat16, "plain"),
    "fc1 of B": (50432, 3072, 768, torch.bfloat16, "gelu"),
    "fc1 of B, training": (50432, 3072, 768, torch.bfloat16, "gelu pre"),
    "fc1 of S, training": (50432, 1536, 384, torch.bfloat16, "gelu pre"),
    "fc1 of G, training": (16384, 8192, 1664, torch.bfloat16, "gelu pre"),
    "fc1 of G": (16384, 8192, 1664, torch.float16, "gelu_tanh"),
    "proj of S": (50432, 384, 384, torch.bfloat16, "residual float32"),
    "proj of S, 16 bit": (50432, 384, 384, torch.bfloat16, "residual"),
    "fc2 of B": (50432, 768, 3072, torch.bfloat16, "residual float32"),
    "fc2 of B, 16 bit": (50432, 768, 3072, torch.float16, "residual"),
}


def compile_for_hopper(label: str, chosen: Config | None = None) -> dict[str, Any]:
    """What Triton makes of the launch for one row of COMPILED, with this config in its place."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    m, n, k, dtype, epilogue = COMPILED[label]
    launches: list[Launch] = []
    tuned = {} if chosen is None else {"gluon": chosen}
    with intercept(launches.append, HOPPER), override(tuned):
        forward(**make(m, n, k, dtype, epilogue, device="meta"))
    case: Any = SimpleNamespace(
        op=SimpleNamespace(name="gluon"), size="vit", sample=SimpleNamespace(label=label),
        dtype=dtype,
    )  # fmt: skip
    job = _offline.make_job(case, launches[0], 90)
    options = {"num_warps": job.launch.num_warps, "enable_fp_fusion": True, "debug": False}
    compiled = triton.compile(
        GluonASTSource(job.launch.kernel, job.signature, job.constexprs, job.attrs),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        counts = _offline._disassembly(cubin.name)
    return {
        "sharers": job.launch.constexprs["SHARERS"],
        "shared": compiled.metadata.shared,
        "counts": counts,
        "ptx": compiled.asm["ptx"],
    }


# With alternatives that no row above has by itself.
ALTERNATIVES = {
    "qkv of B, narrow parts": ("qkv of B", (2, 32, 2, False)),
    "qkv of B, narrow parts in turns": ("qkv of B", (1, 32, 2, False)),
    "fc1 of B, training, in turns": ("fc1 of B, training", (1, 32, 2, True)),
    "fc2 of B in turns": ("fc2 of B", (1, 32, 4, False)),
    "proj of S, shared": ("proj of S", (2, 32, 4, False)),
}


def compile_all() -> None:
    """For a process without the interpreter: a line of JSON a row, among ptxas's own lines."""
    for label in COMPILED:
        print(json.dumps({"label": label, **compile_for_hopper(label)}), flush=True)
    for label, (row, chosen) in ALTERNATIVES.items():
        made = compile_for_hopper(row, gluon_gemm.shared(*chosen))
        print(json.dumps({"label": label, **made}), flush=True)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # What comes out of Triton's cache has no messages of ptxas with it.
    environment |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_gluon import compile_all; compile_all()"],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows: dict[str, dict[str, Any]] = {}
    log: list[str] = []
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            rows[row["label"]] = {**row, "log": "\n".join(log)}
            log.clear()
        else:
            log.append(line)
    return rows


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("label", [*COMPILED, *ALTERNATIVES])
def test_the_code_for_hopper(label: str, compiled: dict[str, dict[str, Any]]) -> None:
    row = compiled[label]
    # Products, copies both ways, and registers passed on, which only specialised warps do.
    assert {"HGMMA", "UTMALDG", "UTMASTG", "USETMAXREG"} <= row["counts"].keys()
    assert not {"LDL", "STL"} & row["counts"].keys(), "spills"
    assert row["shared"] <= _offline.MULTIPROCESSORS[90].shared_limit
    assert "Used 168 registers" in row["log"]
    # "Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert "C7510" not in row["log"]


@needs_gluon
@pytest.mark.slow
def test_both_ways_to_share_are_compiled(compiled: dict[str, dict[str, Any]]) -> None:
    for epilogue in ("plain", "gelu pre", "residual float32", "residual"):
        rows = [compiled[label] for label, case in COMPILED.items() if case[4] == epilogue]
        assert {row["sharers"] for row in rows} == {1, 2}, epilogue


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("label", COMPILED)
def test_the_warps_of_a_group_meet_between_wait_and_arrival(
    label: str, compiled: dict[str, dict[str, Any]]
) -> None:
    """One thread arrives for a group. Were another warp still to look at the phase that it waits
    for, that phase's parity could come round again before it does, and it would wait for ever.
    """
    met, arrivals = True, 0
    for line in compiled[label]["ptx"].splitlines():
        if "mbarrier.try_wait" in line:
            met = False
        elif re.search(r"\bbar\.sync|\bbarrier\.sync", line):
            met = True
        elif "mbarrier.arrive" in line and "expect_tx" not in line:
            assert met, line
            arrivals += 1
    assert arrivals == 2 * (3 if compiled[label]["sharers"] == 1 else 2)


@needs_gluon
@pytest.mark.slow
@pytest.mark.parametrize("label", COMPILED)
def test_stores_are_fenced_in_the_code(label: str, compiled: dict[str, dict[str, Any]]) -> None:
    """Written by all threads, then each one's fence, then all meet, then one gives it to TMA."""
    state, stores = "", 0
    for line in compiled[label]["ptx"].splitlines():
        if re.search(r"\bstmatrix|\bst\.shared", line):
            state = "written"
        elif "fence.proxy.async" in line and state == "written":
            state = "fenced"
        elif "bar.sync" in line and state == "fenced":
            state = "met"
        elif "cp.async.bulk.tensor" in line and ".global.shared::cta" in line:
            assert state == "met", line
            state, stores = "", stores + 1
    assert stores == compiled[label]["counts"]["UTMASTG"]


@pytest.mark.parametrize("width", [128, 192, 100])
def test_statistics_are_those_of_chunks(width: int) -> None:
    stream = torch.randn(2, 9, width) * 3 + 5
    device = "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"
    if device == "cpu" and not INTERPRET and width % 64 == 0:
        pytest.skip("no kernel on a CPU")
    made = gluon_gemm.statistics(stream.to(device)).cpu()
    expected = chunk_statistics(stream.double(), 64)
    assert (made.shape, made.stride(), made.dtype) == (
        expected.shape, expected.stride(), torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5)


def test_alternatives_fit() -> None:
    for out_bytes, need_pre, residual in itertools.product((2, 4), (False, True), (False, True)):
        found = gluon_gemm.candidates(out_bytes, need_pre, residual)
        assert {c.sharers for c in found} == {1, 2}
        for c in found:
            assert c.rows * c.cols == 128 * 128
            assert c.stages >= 3
            assert c.part * out_bytes <= 128
        for k in (128, 4096):  # what stands as the default is one of them
            assert config(
                50432, 768, k, activation="", out_bytes=out_bytes, need_pre=need_pre,
                residual=residual, processors=132,
            ) in found  # fmt: skip


def test_configs_fit() -> None:
    for m in (1, 197, 50432):
        for n, k in ((384, 384), (1536, 384), (768, 768), (3072, 768), (768, 3072), (8192, 1664)):
            for activation, out_bytes, need_pre, residual in itertools.product(
                ("", "relu", "gelu"), (2, 4), (False, True), (False, True)
            ):
                c = config(
                    m, n, k, activation=activation, out_bytes=out_bytes, need_pre=need_pre,
                    residual=residual, processors=132,
                )  # fmt: skip
                assert c.rows * c.cols == 128 * 128, "128 registers a thread"
                # A stage is freed a step after it was read: with one alone all would wait.
                assert c.stages >= 3
                assert c.part * out_bytes <= 128


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@needs_gluon
@pytest.mark.parametrize(
    ("a", "w", "extra", "expected"),
    [
        (meta(5, 16), meta(24, 16), {}, None),
        (meta(0, 16), meta(24, 16), {}, None),
        (meta(1, 32)[:, :16], meta(24, 16), {}, None),
        (meta(5, 32)[:, 8:24], meta(24, 16), {"out_dtype": torch.float32}, None),
        (meta(5, 16), meta(24, 16, dtype=torch.float16), {}, "both float16 or both bfloat16"),
        (meta(5, 16, dtype=torch.float32), meta(24, 16, dtype=torch.float32), {}, "both float16"),
        (meta(5, 16), meta(24, 16), {"out_dtype": torch.float16}, "stores torch.bfloat16 or"),
        (meta(5, 12), meta(24, 12), {}, "multiples of 8"),
        (meta(5, 16), meta(20, 16), {}, "multiples of 8"),
        (meta(5, 0), meta(24, 0), {}, "K > 0"),
        (meta(5, 20)[:, :16], meta(24, 16), {}, "rows of a on 16 bytes"),
        (meta(5, 32)[:, 4:20], meta(24, 16), {}, "rows of a on 16 bytes"),
        (meta(16, 5).T, meta(24, 16), {}, "rows of a on 16 bytes"),
        (meta(1, 16).expand(5, 16), meta(24, 16), {}, "rows of a on 16 bytes"),
        (meta(5, 16), meta(16, 24).T, {}, "rows of w on 16 bytes"),
        (meta(5, 16), meta(24, 16), {"residual": meta(24, 5).T}, "contiguous residual"),
    ],
)
def test_what_it_cannot_run(
    a: Tensor, w: Tensor, extra: dict[str, Any], expected: str | None
) -> None:
    with intercept(lambda _: None, HOPPER):
        reason = problem(a, w, **{"out_dtype": torch.bfloat16, **extra})
    assert reason is None if expected is None else expected in reason


@needs_gluon
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_cards(capability: tuple[int, int]) -> None:
    with intercept(lambda _: None, capability):
        reason = problem(meta(5, 16), meta(24, 16), out_dtype=torch.bfloat16)
    assert reason == "made for compute capability 9.0, this is {}.{}".format(*capability)


@needs_gluon
def test_not_on_a_cpu() -> None:
    a = torch.zeros(8, 8, dtype=torch.bfloat16)
    assert "CUDA tensors" in problem(a, a, out_dtype=a.dtype)


@needs_gluon
@pytest.mark.parametrize("shape", [(0, 16, 8), (5, 0, 8)], ids=str)
def test_nothing_to_compute_launches_nothing(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    launches: list[Launch] = []
    with intercept(launches.append, HOPPER):
        out, pre = forward(meta(m, k), meta(n, k), None, out_dtype=torch.float32, need_pre=True)
    assert not launches
    assert out.shape == pre.shape == (m, n)
    assert (out.dtype, pre.dtype) == (torch.float32, torch.bfloat16)


@needs_gluon
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear_act", "linear_residual"])
def test_every_sample_of_its_ops_has_the_shapes_declared(name: str, dtype: torch.dtype) -> None:
    """Up to the launch: what it takes, and what it hands back."""
    op, taken = REGISTRY[name], 0
    for sample in op.samples("tiny"):
        arguments = sample.make("meta", dtype)
        try:
            with intercept(lambda _: None, HOPPER):
                results = op.kernel_peers["gluon"](**arguments)
        except ValueError as reason:
            if "can't run here" not in str(reason):
                raise
            continue
        taken += 1
        for result, fake in zip(results, op.fake(**arguments), strict=True):
            assert (result.shape, result.dtype, result.stride()) == (
                fake.shape, fake.dtype, fake.stride(),
            ), sample.label  # fmt: skip
    assert taken >= 3


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("import sys; sys.modules['triton'] = None", "triton can't be imported"),
        ("import triton; triton.__version__ = '3.5.1'", "needs triton 3.6 or newer"),
        ("import sys; sys.modules['triton.experimental.gluon'] = None", "gluon can't be imported"),
    ],
)
def test_imports_without_gluon(before: str, expected: str) -> None:
    code = f"""
{before}
import torch
from vitkern.kernels._gemm_gluon import problem
a = torch.zeros(8, 8, dtype=torch.bfloat16)
print(problem(a, a, out_dtype=a.dtype))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert expected in done.stdout, done.stderr


# What the model can't show: layouts, the compiler's barriers, and the hardware's own.
GPU_SHAPES = [
    (1, 8, 8),  # one tile, far less than one step
    (130, 136, 72),  # edges of tiles and of steps, inside a program's only tile
    (197, 768, 768),
    (3 * 197, 3072, 768),
    (20_011, 776, 200),  # several tiles a program, an odd number of them, more for some
    (9_001, 520, 1_400),
]
# Each is compiled twice, which takes seconds.
GPU_EPILOGUES = [
    (torch.float16, "plain"),
    *((torch.bfloat16, name) for name in EPILOGUES if name not in ("no bias", "gelu_tanh", "relu")),
]


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@needs_gluon
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("sharers", [1, 2])
@pytest.mark.parametrize(("dtype", "epilogue"), GPU_EPILOGUES, ids=str)
def test_against_float64_on_a_gpu(
    shape: tuple[int, int, int],
    epilogue: str,
    dtype: torch.dtype,
    sharers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(*_: int, **rest: Any) -> Config:
        """What `config` says of a product that is shared in this way."""
        return config(10**6, 10**4, 128 if sharers == 1 else 4096, **rest)

    monkeypatch.setattr(gluon_gemm, "config", chosen)
    arguments = make(*shape, dtype, epilogue, device="cuda")
    assert problem(
        arguments["a"], arguments["w"],
        residual=arguments.get("residual"), out_dtype=arguments["out_dtype"],
    ) is None  # fmt: skip
    results = forward(**arguments)
    check(arguments, results)
    for _ in range(20):  # a race would not come out the same every time
        for again, first in zip(forward(**arguments), results, strict=True):
            assert first is None or torch.equal(again, first)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@needs_gluon
def test_views_and_graphs_on_a_gpu() -> None:
    arguments = make(300, 264, 136, torch.bfloat16, "gelu pre", device="cuda")
    wide = torch.randn(300, 400, dtype=torch.bfloat16, device="cuda")
    arguments["a"] = wide[:, 8:144]
    check(arguments, forward(**arguments))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = forward(**arguments)
    wide.normal_()
    graph.replay()
    torch.cuda.synchronize()
    check(arguments, captured)
