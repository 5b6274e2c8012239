"""The profiler: exact figures of a made-up GPU trace, a real run on the CPU, verdicts, errors.

The made-up traces are in the format of Kineto, PyTorch's tracer, as it writes them on a GPU.
"""

import gzip
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import vitkern
from vitkern import __main__ as cli
from vitkern.kernels import REGISTRY, _op
from vitkern.kernels._op import Op, Sample
from vitkern.kernels.layer_norm import LAYER_NORM
from vitkern.profile import ceilings, command, counting, report, session
from vitkern.profile.analysis import analyse, short_kernel
from vitkern.profile.figures import Analysis, Ceilings
from vitkern.profile.trace import Span, load, parse, phases, windows
from vitkern.profile.verdicts import judge

MAIN, ENGINE = 11, 12
PICTURES = 3 if find_spec("matplotlib") else 0
CEILINGS = Ceilings({"bfloat16": 8e14, "float32": 4e14}, 3e12, "given")
# Of layer_norm on [128, 197, 768] in bfloat16 with float32 parameters, as the dispatcher is traced.
NORM = {
    "Input Dims": [[128, 197, 768], [768], [768], [], [], []],
    "Input type": ["c10::BFloat16", "float", "float", "Scalar", "Scalar", "Scalar"],
    "Input Strides": [[151296, 768, 1], [1], [1], [], [], []],
    "Concrete Inputs": ["", "", "", "9.9999999999999995e-07", "False", "15"],
}
MM = {
    "Input Dims": [[4096, 1024], [1024, 2048]],
    "Input type": ["c10::BFloat16", "c10::BFloat16"],
    "Input Strides": [[1024, 1], [2048, 1]],
    "Concrete Inputs": ["", ""],
}


class Maker:
    """Events of a trace; times are microseconds since its begin."""

    def __init__(self, base: float = 4_774_079_656_000.0) -> None:
        self.base, self.number = base, 0
        self.events: list[dict[str, Any]] = []

    def host(self, name, start, end, tid=MAIN, cat="cpu_op", **args) -> None:
        self.number += 1
        args.setdefault("External id", self.number)
        self._add(name, cat, start, end, 100, tid, args)

    def mark(self, name, time) -> None:
        self.host(name, time, time + 0.5, cat="user_annotation")

    def kernel(
        self, name, launched, start, end, *, tid=MAIN, cat="kernel", call="cudaLaunchKernel",
        launches=1, **args,
    ) -> None:  # fmt: skip
        self.number += 1
        kind = "cuda_driver" if call.startswith("cu") and call[2].isupper() else "cuda_runtime"
        if launched is not None:
            found = {"correlation": self.number}
            self._add(call, kind, launched, launched + 2, 100, tid, found)
        for i in range(launches):
            span = (end - start) / launches
            about = {"device": 0, "stream": 7, "correlation": self.number, **args}
            self._add(name, cat, start + i * span, start + (i + 1) * span, 0, 7, about)

    def memory(self, time, allocated) -> None:
        args = {"Device Type": 1, "Device Id": 0, "Total Allocated": allocated, "Bytes": 1}
        event = {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "s": "t"}
        self.events.append({**event, "pid": 100, "tid": MAIN, "ts": self.base + time, "args": args})

    def _add(self, name, cat, start, end, pid, tid, args) -> None:
        event = {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "args": args}
        self.events.append({**event, "ts": self.base + start, "dur": end - start})

    def contents(self, **extra: Any) -> dict[str, Any]:
        card = {"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 80 << 30}
        noise = {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}
        result = {"schemaVersion": 1, "deviceProperties": [card]}
        return {**result, "traceEvents": [noise, *self.events], "vitkern": extra}


def training(steps: int = 3) -> Maker:
    """Steps of 1,000 us each; a kernel in each phase but data, and two gaps."""
    made = Maker()
    made.mark("vitkern begin", -0.5)
    for t in range(0, 1000 * steps, 1000):
        loader = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"
        made.host(loader, t, t + 100, cat="user_annotation")
        made.memory(t + 1, 1000)
        made.host("vitkern::layer_norm", t + 110, t + 130, **NORM)
        made.kernel("forward_kernel", t + 115, t + 120, t + 320, call="cuLaunchKernelEx")
        made.memory(t + 135, 5000)
        made.host("aten::matmul", t + 138, t + 161, **MM)
        made.host("aten::mm", t + 140, t + 160, **MM)
        made.kernel("void cutlass::Kernel2<tile<128> >(params)", t + 150, t + 320, t + 520)
        node = "autograd::engine::evaluate_function: MmBackward0"
        made.host(node, t + 200, t + 260, ENGINE, **{"Sequence number": 5})
        made.host("MmBackward0", t + 205, t + 255, ENGINE, **{"Sequence number": 5})
        made.host("aten::mm", t + 220, t + 240, ENGINE, **MM)
        made.memory(t + 222, 9000)
        made.kernel(
            "void cutlass::Kernel2<tile<64> >(params)", t + 230, t + 520, t + 720, tid=ENGINE
        )
        made.memory(t + 250, 2000)
        made.host("Optimizer.step#AdamW.step", t + 300, t + 400, cat="user_annotation")
        made.host("aten::_fused_adamw_", t + 310, t + 390)
        made.kernel("multi_tensor_apply_kernel", t + 350, t + 890, t + 990)
        made.mark(f"vitkern step {t // 1000}", t + 999.5)
    return made


def analysed(made: Maker, warmup: int = 1, **extra: Any) -> Analysis:
    a = analyse(parse(made.contents(**extra)), warmup, CEILINGS)
    a.verdicts = judge(a)
    return a


def titles(a: Analysis) -> dict[str, Any]:
    return {v.title: v for v in a.verdicts}


def test_time_by_op_is_that_of_its_kernels() -> None:
    a = analysed(training())
    assert (a.steps, a.warmup_steps) == (2, 1)
    assert a.seconds == pytest.approx(1e-3)
    rows = {r.op: r for r in a.rows}
    assert {op: round(1e6 * r.seconds, 3) for op, r in rows.items()} == {
        "layer_norm": 200.0,
        "aten::mm": 400.0,
        "optimizer AdamW.step": 100.0,
    }
    assert [(r.calls, r.launches) for r in a.rows] == [(2, 2), (1, 1), (1, 1)]
    assert rows["aten::mm"].share == pytest.approx(0.4)
    assert rows["layer_norm"].implementation == "kernel"
    assert rows["optimizer AdamW.step"].implementation == "fused"
    assert a.launches == 4


def test_flops_bytes_and_roofline_come_from_what_the_op_declares() -> None:
    rows = {r.op: r for r in analysed(training()).rows}
    arguments = {
        "x": torch.empty(128, 197, 768, dtype=torch.bfloat16, device="meta"),
        "weight": torch.empty(768, device="meta"),
        "bias": torch.empty(768, device="meta"),
        "out_dtype": torch.bfloat16,
    }
    norm = rows["layer_norm"]
    assert norm.flops == LAYER_NORM.flops(**arguments)
    assert norm.bytes == LAYER_NORM.bytes_moved(**arguments)
    assert norm.bytes_per_s == pytest.approx(norm.bytes / 200e-6)
    assert norm.bound == "memory"
    assert norm.roofline == pytest.approx(norm.bytes / 3e12 / 200e-6)
    product = rows["aten::mm"]
    assert product.flops == 2 * 2 * 4096 * 1024 * 2048
    assert product.bytes == 2 * 2 * (4096 * 1024 + 1024 * 2048 + 4096 * 2048)
    assert product.bound == "compute"
    assert product.roofline == pytest.approx(product.flops / 8e14 / 400e-6)


def test_phases_add_up_to_the_step_and_idle_time_is_told_apart() -> None:
    a = analysed(training())
    found = {p.name: (round(1e6 * p.seconds, 3), round(1e6 * p.busy, 3)) for p in a.phases}
    assert found == {
        "data": (130, 0),
        "forward": (400, 400),
        "backward": (200, 200),
        "optimizer": (270, 100),
    }
    assert sum(p.share for p in a.phases) == pytest.approx(1)
    assert a.idle.share == pytest.approx(0.3)
    assert a.idle.longest == pytest.approx(170e-6)
    assert a.idle.longest_before == "optimizer AdamW.step"
    # 170 us before a kernel that had been launched; 130 us, of which the loader took 100.
    assert a.idle.causes == pytest.approx({"device": 170e-6, "data": 130e-6})
    assert a.idle.before == pytest.approx({"optimizer AdamW.step": 170e-6, "layer_norm": 130e-6})
    assert a.loader_wait == pytest.approx(100e-6)


def test_utilisation_counts_the_forward_pass_three_times() -> None:
    a = analysed(training(), images=[32, 32, 64])
    forward = 2 * 4096 * 1024 * 2048 + LAYER_NORM.flops(x=torch.empty(128, 197, 768, device="meta"))
    assert a.trains
    assert a.model_flops == 3 * forward
    assert a.utilisation["measured"] == pytest.approx(3 * forward / 1e-3 / 8e14)
    assert a.utilisation["datasheet"] == pytest.approx(3 * forward / 1e-3 / 989.4e12, rel=1e-2)
    assert a.images == 48
    assert a.images_per_s == pytest.approx(48e3)


def test_memory_at_its_peak_and_saved_for_backward() -> None:
    memory = analysed(training()).memory
    assert (memory.peak, memory.peak_phase, memory.saved) == (9000, "backward", 4000)
    assert memory.total == 80 << 30


def test_a_step_ends_with_its_last_kernel_not_with_the_host() -> None:
    """Python runs ahead: kernels of a step may run in the time of the next one's launches."""
    made = Maker()
    made.mark("vitkern begin", -0.5)
    for i in range(4):
        made.host("aten::mm", 100 * i + 10, 100 * i + 20, **MM)
        made.kernel("gemm", 100 * i + 12, 1000 * (i + 1), 1000 * (i + 2))
        made.mark(f"vitkern step {i}", 100 * i + 99)
    a = analysed(made)
    assert a.step_seconds == pytest.approx([1e-3] * 3)
    assert a.idle.share == 0
    assert not a.trains
    assert {p.name for p in a.phases} == {"forward"}


def test_kernels_of_a_graph_are_rows_of_their_own() -> None:
    made = Maker()
    made.kernel("void norm<float, 4>(float*, int)", 10, 20, 120, call="cudaGraphLaunch", launches=4)
    a = analysed(made, 0)
    assert [(r.op, r.launches) for r in a.rows] == [("norm", 4)]
    assert a.graph_launches == 1


def test_without_cuda_calls_the_number_of_the_op_tells_who_launched() -> None:
    made = Maker()
    made.host("aten::mm", 10, 20, **{"External id": 77}, **MM)
    made.kernel("gemm", None, 30, 130, **{"External id": 77})
    assert [r.op for r in analysed(made, 0).rows] == ["aten::mm"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::vectorized<4, std::array<char*, 2ul> >(int)", "at::native::vectorized"),
        ("_linear_forward", "_linear_forward"),
        ("Memcpy HtoD (Pageable -> Device)", "Memcpy HtoD"),
        ("(anonymous namespace)::fill<float>(float*)", "(anonymous namespace)::fill"),
    ],
)
def test_short_names_of_kernels(name: str, short: str) -> None:
    assert short_kernel(name) == short


def test_steps_are_found_without_marks() -> None:
    made = training()
    made.events = [e for e in made.events if not e["name"].startswith("vitkern ")]
    trace = parse(made.contents())
    assert [w.end for w in windows(trace)] == [400, 1400, 2400]  # by optimizer steps
    made.events = [e for e in made.events if not e["name"].startswith("Optimizer")]
    assert len(windows(parse(made.contents()))) == 1
    for i in range(2):
        made.host(f"ProfilerStep#{i}", 1000 * i, 1000 * i + 999, cat="user_annotation")
    assert [w.start for w in windows(parse(made.contents()))] == [0, 1000]


def test_ranges_that_a_user_named_are_phases() -> None:
    made = training(1)
    made.host("data", 100, 135, cat="user_annotation")
    trace = parse(made.contents())
    pieces = phases(trace, windows(trace)[0])
    assert [(p.name, p.start, p.end) for p in pieces if p.name in ("data", "forward")] == [
        ("data", 0.5, 135.5),
        ("forward", 138.5, 161.5),
    ]
    assert [p.start for p in pieces[1:]] == [p.end for p in pieces[:-1]]


# Verdicts


def test_a_good_run_gets_no_complaint() -> None:
    """Kernels one after the other, at the speed of the roofline."""
    made = Maker()
    seconds = 2 * 4096 * 1024 * 2048 / 8e14 * 1e6
    for i in range(100):
        made.host("aten::mm", i, i + 0.5, **MM)
        made.kernel("gemm", i + 0.1, 20 + i * seconds, 20 + (i + 1) * seconds)
    a = analysed(made, 0)
    assert all(v.good for v in a.verdicts)
    assert "Most of the time goes where it should" in titles(a)


def test_a_late_loader_is_named_with_what_it_cost() -> None:
    a = analysed(training())
    verdict = titles(a)["Data arrives too late"]
    assert "0.13 ms of a step of 1.00 ms" in verdict.evidence
    assert verdict.gain == pytest.approx(0.13)


def test_a_gpu_that_waits_for_python() -> None:
    made = Maker()
    made.mark("vitkern begin", -0.5)
    for i in range(20):
        made.host("aten::mm", 100 * i, 100 * i + 50, **MM)
        made.kernel("gemm", 100 * i + 20, 100 * i + 25, 100 * i + 45)
    made.host("cudaStreamSynchronize", 1960, 1970, cat="cuda_runtime")
    made.mark("vitkern step 0", 1990)
    verdict = titles(analysed(made, 0))["The GPU waits for Python"]
    assert verdict.gain == pytest.approx(19 * 80 / (1945 + 0.5), rel=0.02)
    assert "Python waited for the GPU 1 times a step" in verdict.evidence
    assert "vitkern.capture" in verdict.advice


def test_an_op_that_fell_back_is_named_with_the_reason() -> None:
    made = Maker()
    made.host("vitkern::layer_norm", 0, 100, **NORM)
    made.host("aten::native_layer_norm", 10, 90)
    made.kernel("vectorized_layer_norm", 20, 30, 230)
    why = {"op": "layer_norm", "implementation": "torch", "why": "no kernel for float64"}
    a = analysed(made, 0, choices=[{**why, "calls": 1}])
    assert [(r.op, r.implementation) for r in a.rows] == [("layer_norm", "ATen")]
    verdict = titles(a)["Ops without vitkern's kernels"]
    assert "layer_norm (0.20 ms): no kernel for float64" in verdict.evidence


def test_an_optimizer_that_is_not_fused() -> None:
    made = training()
    for event in made.events:
        event["name"] = event["name"].replace("_fused_adamw_", "_foreach_add_")
    assert "The optimizer is not fused" in titles(analysed(made))
    assert "The optimizer is not fused" not in titles(analysed(training()))


def test_float32_products_where_bfloat16_is_faster() -> None:
    made = training()
    for event in made.events:
        if event["name"] == "aten::mm":
            event["args"]["Input type"] = ["float", "float"]
    verdict = titles(analysed(made))["Products run in float32"]
    assert verdict.gain == pytest.approx(0.4 * (1 - 4e14 / 8e14))
    assert "TF32" in verdict.advice
    allowed = analysed(made, settings={"float32_matmul_precision": "high"})
    assert "TF32" not in titles(allowed)["Products run in float32"].advice


# The page


def test_the_page_escapes_what_it_prints() -> None:
    made = Maker()
    made.host("<b>op</b>", 30, 40)
    choice = {"op": "<u>", "implementation": "torch", "why": "<script>alert(1)", "calls": 1}
    page = report.html(analysed(made, 0, settings={"torch": "<i>"}, choices=[choice]))
    assert not any(text in page for text in ("<script>", "<b>op</b>", "<u>", '<i>"'))
    assert "&lt;b&gt;op" in page
    assert "&lt;script&gt;alert" in page
    assert "torch &lt;i&gt;" in page


def test_the_page_of_a_gpu_says_what_matters() -> None:
    page = report.html(analysed(training(), untraced_seconds=9e-4))
    for text in ("30%", "GPU idle", "Data arrives too late", "layer_norm"):
        assert text in page
    assert "0.90 ms (+11%)" in page
    assert page.count("data:image/png;base64,") == PICTURES


def test_it_works_without_matplotlib_and_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("matplotlib", "rich"):
        monkeypatch.setitem(sys.modules, package, None)
    a = analysed(training())
    page = report.html(a)
    assert report.NO_PICTURES in page
    assert "forward 40%" in page
    report.show(a, Path("x"))
    said = capsys.readouterr().out
    assert "layer_norm" in said
    assert "Data arrives too late" in said


# A real run


MODEL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 10,
}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second; where nobody looks at them, they are left out."""
    monkeypatch.setattr(report, "_pictures", lambda _: "")


def train(p: Any, steps: int, mark: bool = True) -> None:
    """Steps of a tiny ViT."""
    torch.manual_seed(0)
    model = vitkern.ViT(**MODEL)
    optimizer = torch.optim.AdamW(model.parameters())
    data = torch.utils.data.TensorDataset(
        torch.randn(4 * steps, 3, 32, 32), torch.arange(4 * steps) % 10
    )
    for images, labels in torch.utils.data.DataLoader(data, batch_size=4):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if mark:
            p.step(len(images))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A profile of a training loop on the CPU."""
    out = tmp_path_factory.mktemp("profile")
    with vitkern.profile(out, warmup=1, steps=2, show=False) as p:
        train(p, 5)
    return p.analysis, out


def test_a_step_on_the_cpu_is_explained(run: tuple[Any, Path]) -> None:
    a, _ = run
    assert not a.on_gpu
    assert (a.steps, a.warmup_steps, a.images) == (2, 1, 4)
    assert sum(p.seconds for p in a.phases) == pytest.approx(a.seconds, rel=1e-6)
    assert [p.name for p in a.phases] == ["data", "forward", "backward", "optimizer", "other"]
    assert all(p.seconds > 0 for p in a.phases)
    assert a.phase("other").share < 0.3
    assert sum(r.seconds for r in a.rows) == pytest.approx(a.seconds, rel=0.05)
    assert a.overhead is not None


def test_ops_are_named_though_they_ran_on_aten(run: tuple[Any, Path]) -> None:
    rows = {r.op: r for r in run[0].rows}
    calls = {op: rows[op].calls for op in ("patch_embed", "norm_linear", "linear_residual")}
    # The last block's queries are those of the class token alone, a product of their own.
    assert calls == {"patch_embed": 1, "norm_linear": 5, "linear_residual": 4}
    for op in ("patch_embed", "norm_linear", "linear_residual", "attention"):
        assert rows[op].phase == "forward"
        assert rows[op].flops > 0
        assert rows[op].roofline is not None
        assert rows[f"{op} (backward)"].phase == "backward"
    ran = {c["op"]: c for c in run[0].choices}
    assert ran["norm_linear"]["implementation"] == "torch"
    assert "CUDA" in ran["norm_linear"]["why"] or "interpreter" in ran["norm_linear"]["why"]


def test_flops_of_a_forward_pass_are_those_of_the_model(run: tuple[Any, Path]) -> None:
    """Against torch's own counter on the plain model, which knows products and attention alone."""
    model = vitkern.EagerViT(vitkern.ViTConfig(**MODEL))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    plain = counter.get_total_flops()
    # The class token's own attention and the last MLP need less than the plain model computes.
    assert 0.5 * plain < run[0].model_flops / 3 < plain


def test_memory_of_a_real_step(run: tuple[Any, Path]) -> None:
    memory = run[0].memory
    assert memory.device == "CPU"
    assert 0 < memory.saved < memory.peak < 100 << 20


def test_what_is_written(run: tuple[Any, Path]) -> None:
    a, out = run
    assert {p.name for p in out.iterdir()} == {"report.html", "report.json", "trace.json"}
    page = (out / "report.html").read_text()
    for text in ("What holds this run back", "Where the time goes", "By op", "How it was measured"):
        assert text in page
    assert page.count("data:image/png;base64,") == PICTURES
    assert "http" not in page  # one page, self-contained
    figures = json.loads((out / "report.json").read_text())
    assert figures["seconds"] == a.seconds
    assert figures["rows"][0]["op"] == a.rows[0].op
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    track = [e["name"] for e in events if e.get("cat") == "vitkern" and e["tid"] == "phases"]
    assert track.count("backward") == 3


@pytest.mark.usefixtures("no_pictures")
def test_a_saved_trace_gives_the_same_report(
    run: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = run
    assert cli.main(["profile", "--trace", str(out / "trace.json"), "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures == json.loads((out / "report.json").read_text())
    said = capsys.readouterr().out
    assert "norm_linear (backward)" in said
    assert "Phases: data" in said


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("mark", "steps"), [(True, 2), (False, 2)])
def test_recording_ends_by_itself(tmp_path: Path, mark: bool, steps: int) -> None:
    """By marks, or by optimizer steps where there are none; the rest runs without a profiler."""
    with vitkern.profile(tmp_path, warmup=1, steps=steps, ceilings=False, show=False) as p:
        train(p, 6, mark)
        assert not torch.autograd.profiler._is_profiler_enabled
    assert (p.analysis.steps, p.analysis.warmup_steps) == (steps, 1)
    assert p.analysis.untraced_seconds is not None
    assert p.analysis.images == 4  # told, or read from the patch embedding
    assert p.analysis.phase("optimizer").seconds > 0


@pytest.mark.usefixtures("no_pictures")
def test_a_block_without_steps_is_one(tmp_path: Path) -> None:
    model = vitkern.ViT(**MODEL)
    with vitkern.profile(tmp_path, ceilings=False, show=False) as p, torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert (p.analysis.steps, p.analysis.warmup_steps) == (1, 0)
    assert not p.analysis.trains
    assert p.analysis.overhead is None
    assert "unknown: no step ran without it" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_an_error_in_the_block_goes_on_and_nothing_stays_behind(tmp_path: Path) -> None:
    hooks = dict(optimizers._global_optimizer_post_hooks)
    with (  # noqa: PT012  # the block is what is tested
        pytest.raises(KeyError, match="mine"),
        vitkern.profile(tmp_path, warmup=0, ceilings=False, show=False) as p,
    ):
        train(p, 1)
        raise KeyError("mine")
    assert p.analysis.steps == 1
    assert (tmp_path / "report.html").exists()
    assert not torch.autograd.profiler._is_profiler_enabled
    assert _op._recorded is None
    assert optimizers._global_optimizer_post_hooks == hooks


@pytest.mark.usefixtures("no_pictures")
def test_an_error_before_anything_ran_is_the_one_that_is_raised(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()  # so that the report fails, too
    with (
        pytest.warns(RuntimeWarning, match="no report"),
        pytest.raises(KeyError, match="mine"),
        vitkern.profile(tmp_path, ceilings=False, show=False),
    ):
        raise KeyError("mine")
    assert not torch.autograd.profiler._is_profiler_enabled


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="warmup must be 0 or more, got -1"):
        vitkern.profile(tmp_path, warmup=-1)
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        vitkern.profile(tmp_path, steps=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="nvtx=True needs a CUDA GPU"):
            vitkern.profile(tmp_path, nvtx=True)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        pytest.raises(RuntimeError, match="another profiler is active"),
        vitkern.profile(tmp_path),
    ):
        pass


def test_nvtx_ranges_are_balanced_also_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the GPU's part played by a list."""
    said: list[str] = []

    @contextmanager
    def emit(**_: Any) -> Iterator[None]:
        said.append("on")
        yield
        said.append("off")

    monkeypatch.setattr(session, "emit_nvtx", emit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", said.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("pop"))
    with (  # noqa: PT012
        pytest.raises(KeyError),
        vitkern.profile(tmp_path / "none", nvtx=True) as p,
    ):
        p.step()
        raise KeyError
    assert said == ["on", "step 0", "pop", "step 1", "pop", "off"]
    assert p.analysis is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["not json", "[1", '{"traceEvents": 3}', '{"traceEvents": []}'])
def test_a_file_that_is_no_trace(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert cli.main(["profile", "--trace", str(path), "--out", str(tmp_path)]) == 2
    assert "error: profile: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"can't read the trace .*missing\.json"):
        load(tmp_path / "missing.json")


def test_a_typo_lists_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "vit_tny"]) == 2
    said = capsys.readouterr().err
    assert "unknown model 'vit_tny'" in said
    assert "vit_tiny_patch16_224" in said
    with pytest.raises(SystemExit):
        cli.main(["profile", "--precision", "half"])
    said = capsys.readouterr().err
    assert all(name in said for name in ("float32", "autocast", "bf16"))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", [["--forward"], ["--train", "--precision", "autocast"]])
def test_the_command(
    kind: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(vitkern.PRESETS, "toy", MODEL)
    arguments = ["profile", "toy", "--batch", "2", "--steps", "1", "--warmup", "0"]
    arguments += ["--image-size", "16", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main([*arguments, *kind]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["trains"] == ("--train" in kind)
    assert figures["images"] == 2
    assert figures["main_dtype"] == ("bfloat16" if "--train" in kind else "float32")
    assert str(tmp_path / "report.html") in capsys.readouterr().out


# What the ops do for it


def samples() -> list[Any]:
    return [
        pytest.param(op, sample, id=f"{op.name}-{sample.label}")
        for op in REGISTRY.values()
        for sample in list(op.samples("tiny"))[:3]
    ]


@pytest.mark.parametrize(("op", "sample"), samples())
def test_torchs_counter_counts_our_ops(op: Op, sample: Sample) -> None:
    arguments = sample.make("meta", torch.float32)
    with FlopCounterMode(display=False) as counter:
        op.call(**arguments)
    assert counter.get_total_flops() == op.flops(**arguments)


@pytest.mark.parametrize(("op", "sample"), samples())
def test_a_trace_tells_flops_and_bytes_of_our_ops(op: Op, sample: Sample, tmp_path: Path) -> None:
    """By the portable implementation, called as a function, whose strings are recorded as well."""
    arguments = sample.make("cpu", torch.float32)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        op.portable(**arguments)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    spans = [
        s for s in parse(load(tmp_path / "trace.json")).host if s.name == f"vitkern::{op.name}"
    ]
    expected = op.flops(**arguments), op.bytes_moved(**arguments)
    cost = counting.cost(spans[0])
    assert cost is not None
    assert (cost.flops, cost.bytes) == expected


def test_a_profile_compiles_nothing_again() -> None:
    model = vitkern.ViT(**MODEL)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    images = torch.randn(2, 3, 32, 32)
    try:
        compiled(images)
        with (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
            _op.record_choices(),
        ):
            compiled(images)
        assert len(graphs) == 1
    finally:
        torch.compiler.reset()


def test_an_unknown_operator_has_no_cost() -> None:
    args = {"Input Dims": [[2, 3]], "Input type": ["float"], "Concrete Inputs": [""]}
    assert counting.cost(Span("aten::no_such", "cpu_op", 0, 1, (0, 0), args)) is None
    lists = {"Input Dims": [[[2, 3], [2, 3]], []], "Input type": ["TensorList", "Scalar"]}
    lists["Concrete Inputs"] = ["", "0"]
    assert counting.cost(Span("aten::cat", "cpu_op", 0, 1, (0, 0), lists)) is None


# What ran, and where


def test_a_cpu_run_on_a_machine_with_a_gpu_is_one_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kineto names the machine's cards in any trace."""
    asked: list[torch.device] = []

    def measure(device: torch.device, _: Any) -> Ceilings:
        asked.append(device)
        return CEILINGS

    monkeypatch.setattr(ceilings, "measure", measure)
    monkeypatch.setattr(report, "_pictures", lambda _: "")
    made = Maker()
    made.host("aten::mm", 10, 20, **MM)
    made.events.append({**made.events[0], "name": "cudaGetDeviceCount", "cat": "cuda_runtime"})
    made.memory(11, 1000)
    a = report.write(made.contents(device="AMD EPYC, 2 threads"), tmp_path, measure=True)
    assert (a.device, a.on_gpu) == ("AMD EPYC, 2 threads", False)
    assert "datasheet" not in a.utilisation
    assert titles(a)["This was a CPU"]
    made.kernel("gemm", 12, 30, 130, device=1)
    a = report.write(made.contents(), tmp_path, measure=True)
    assert a.on_gpu
    assert asked == [torch.device("cpu"), torch.device("cuda", 1)]


@pytest.mark.usefixtures("no_pictures")
def test_launches_without_kernels_are_no_cpu_run(tmp_path: Path) -> None:
    made = training()
    made.events = [e for e in made.events if e["cat"] != "kernel"]
    a = report.write(made.contents(), tmp_path, measure=True)
    assert list(titles(a)) == ["No kernels in the trace"]
    assert "12 launches were recorded" in a.verdicts[0].evidence
    assert all(row.roofline is None for row in a.rows)


@pytest.mark.parametrize(("kind", "rated"), [("c10::Half", True), ("double", False)])
def test_the_roofline_of_dtypes_that_are_not_measured(kind: str, rated: bool) -> None:
    """float16 is as fast as bfloat16; of float64 nothing is known, also not that memory bounds."""
    made = training()
    for event in made.events:
        if event["name"] == "aten::mm":
            event["args"] = {**event["args"], "Input type": [kind, kind]}
    a = analysed(made)
    product = next(row for row in a.rows if row.op == "aten::mm")
    assert (product.bound, product.roofline is not None) == ("compute" if rated else "", rated)
    assert ("measured" in a.utilisation) == rated
    if rated:
        assert product.roofline == pytest.approx(product.flops / 8e14 / 400e-6)


def test_measuring_leaves_random_numbers_alone_and_autocast_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: set[torch.dtype] = set()

    class See(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten.mm.default:
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(ceilings, "SECONDS", 1e-3)
    before = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), See():
        ceilings.measure(torch.device("cpu"), [torch.float32], n=16, size=1024)
    assert seen == {torch.float32}
    assert torch.equal(torch.get_rng_state(), before)


# What must not stop a training run


@pytest.mark.usefixtures("no_pictures")
def test_hooks_stay_as_they_are_while_pytorch_calls_them(tmp_path: Path) -> None:
    """It raises "OrderedDict mutated during iteration" otherwise."""
    handles = [optimizers.register_optimizer_step_post_hook(lambda *_: None)]
    try:
        with vitkern.profile(tmp_path, warmup=1, steps=1, ceilings=False, show=False) as p:
            handles.append(optimizers.register_optimizer_step_post_hook(lambda *_: None))
            train(p, 5, mark=False)
    finally:
        for handle in handles:
            handle.remove()
    assert (p.analysis.steps, p.error) == (1, None)
    assert p.analysis.untraced_seconds is not None


@pytest.mark.usefixtures("no_pictures")
def test_a_report_that_fails_is_a_warning_and_can_be_had_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> list[Any]:
        raise LookupError("no such rule")

    with monkeypatch.context() as patch:
        patch.setattr(report, "judge", fail)
        with (
            pytest.warns(RuntimeWarning, match=r"no such rule.* --trace .*trace\.json"),
            vitkern.profile(tmp_path, warmup=0, steps=1, ceilings=False, show=False) as p,
        ):
            train(p, 3)
    assert isinstance(p.error, LookupError)
    assert p.analysis is None
    path = tmp_path / "trace.json"
    assert cli.main(["profile", "--trace", str(path), "--out", str(tmp_path / "again")]) == 0
    figures = json.loads((tmp_path / "again" / "report.json").read_text())
    assert figures["images_from"] == "step(images=...)"
    assert figures["untraced_seconds"] is not None


def test_a_trace_that_cannot_be_written_is_a_warning_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fail)
    with (
        pytest.warns(RuntimeWarning, match="no report: OSError.*the disk is full"),
        vitkern.profile(tmp_path, warmup=0, steps=1, show=False) as p,
    ):
        train(p, 3)  # its steps after the first one find it
    assert not torch.autograd.profiler._is_profiler_enabled
    assert isinstance(p.error, OSError)
    assert _op._recorded is None


@pytest.mark.usefixtures("no_pictures")
def test_the_command_raises_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vitkern.PRESETS, "toy", MODEL)
    monkeypatch.setattr(report, "judge", lambda _: 1 / 0)
    arguments = ["profile", "toy", "--batch", "1", "--steps", "1", "--warmup", "0"]
    with (
        pytest.warns(RuntimeWarning, match="the trace is kept"),
        pytest.raises(ZeroDivisionError),
    ):
        cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path)])


def test_an_error_at_the_end_of_nvtx_hides_none_of_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def emit(**_: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("closing")

    monkeypatch.setattr(session, "emit_nvtx", emit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda _: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    with pytest.raises(KeyError, match="mine"), vitkern.profile(tmp_path, nvtx=True):
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="closing"), vitkern.profile(tmp_path, nvtx=True):
        pass


# Several processes, several GPUs


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_has_a_folder_and_the_first_one_speaks(
    rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=rank, world_size=2, store=fake.FakeStore())
    try:
        with vitkern.profile(tmp_path, ceilings=False) as p:
            torch.ones(2).add(1)
    finally:
        dist.destroy_process_group()
    assert [path.name for path in tmp_path.iterdir()] == [f"rank{rank}"]
    assert (tmp_path / f"rank{rank}" / "report.html").exists()
    assert p.analysis is not None
    assert bool(capsys.readouterr().out) == (rank == 0)


@pytest.mark.usefixtures("no_pictures")
def test_recording_begins_when_the_gpus_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[tuple[int, bool]] = []
    gpus = iter([[0, 1]])
    monkeypatch.setattr(session, "_gpus", lambda: next(gpus, []))
    monkeypatch.setattr(
        torch.cuda,
        "synchronize",
        lambda gpu: waited.append((gpu, torch.autograd.profiler._is_profiler_enabled)),
    )
    with vitkern.profile(tmp_path, ceilings=False, show=False):
        torch.ones(2).add(1)
    assert waited == [(0, False), (1, False)]


def test_only_gpus_with_tensors_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: 512 * (i == 2))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert session._gpus() == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert session._gpus() == [2]


def test_the_clock_times_some_steps_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows, an evaluation say, is no step."""
    times = iter([10.0, 11.0, 13.0, 99.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = session._Clock(2)
    clock.tick()  # not begun
    assert clock.seconds is None
    clock.start()
    for _ in range(3):
        clock.tick()
    assert clock.seconds == 1.5


# The command's own loop, and files from elsewhere


@pytest.mark.usefixtures("no_pictures")
def test_the_command_prepares_before_it_records_and_collates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compiles or checks itself does so in the first steps."""
    calls: list[str] = []
    autocast = command._autocast

    class Noted(session.profile):
        def __enter__(self) -> session.profile:
            calls.append("profile")
            return super().__enter__()

    def step(options: Any) -> Any:
        calls.append("step")
        return autocast(options)

    def collate(*_: Any, **__: Any) -> None:
        raise AssertionError("a batch was collated")

    monkeypatch.setitem(vitkern.PRESETS, "toy", MODEL)
    monkeypatch.setattr(command, "profile", Noted)
    monkeypatch.setattr(command, "_autocast", step)
    monkeypatch.setattr(torch.utils.data._utils.collate, "default_collate", collate)
    arguments = ["profile", "toy", "--batch", "2", "--steps", "1", "--warmup", "1"]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    recorded = ["profile"] + ["step"] * (2 + command.UNTRACED)
    assert calls == ["step"] * command.PREPARE + recorded
    figures = json.loads((tmp_path / "report.json").read_text())
    assert (figures["steps"], figures["warmup_steps"], figures["images"]) == (1, 1, 2)


PACKED = gzip.compress(json.dumps({"traceEvents": [{"name": str(i)} for i in range(999)]}).encode())


@pytest.mark.parametrize(
    "data",
    [PACKED[:-20], PACKED[:40] + b"\xff" * 40, b"no gzip", gzip.compress(b"[1"), b""],
    ids=["cut off", "broken", "not packed", "no JSON", "empty"],
)
def test_a_packed_file_that_is_broken_is_named(
    data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json.gz"
    path.write_bytes(data)
    assert cli.main(["profile", "--trace", str(path), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: profile: ")
    assert str(path) in said


@pytest.mark.usefixtures("no_pictures")
def test_events_that_say_too_little_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = training().contents(warmup=1)
    good = contents["traceEvents"][5]
    broken: list[Any] = [3, None, "text", {}, {"ph": "X", "cat": ["cpu_op"]}, {"name": "[memory]"}]
    broken += [{k: v for k, v in good.items() if k != key} for key in ("name", "ts")]
    broken += [{**good, "ts": "soon"}, {**good, "args": 3}, {**good, "dur": None}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**contents, "traceEvents": [*broken, *contents["traceEvents"]]}))
    assert cli.main(["profile", "--trace", str(path), "--out", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures["seconds"] == pytest.approx(1e-3)
    path.write_text(json.dumps(broken))
    capsys.readouterr()
    assert cli.main(["profile", "--trace", str(path), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "holds no ops and no kernels" in said
    assert str(path) in said
