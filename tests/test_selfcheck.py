"""The self-check: kernels that are wrong are found before they are used, at little cost.

The GPU is a made-up one: its kernels run in Triton's interpreter, or are plain functions.
"""

import contextlib
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vitkern
from vitkern.__main__ import main
from vitkern.kernels import REGISTRY, _op, _tuned, _verified, layer_norm
from vitkern.kernels._error_budget import as_tuple
from vitkern.kernels._launch import intercept
from vitkern.kernels._op import choose, record_choices
from vitkern.kernels._triton import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="a made-up GPU beside a real one")

LAYER_NORM, LAYER_NORM_BACKWARD = REGISTRY["layer_norm"], REGISTRY["layer_norm_backward"]
X, WEIGHT = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would begin."""
    for module, name in (
        (_verified, "_verdicts"),
        (_verified, "settled"),
        (_tuned, "_tables"),
    ):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(_verified, "_warned", set())
    _verified.kept_at_start.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CPU tensors pass for tensors on a GPU; the folder of the cache."""
    monkeypatch.setattr(_tuned, "card", lambda device: "made-up-gpu")
    monkeypatch.setattr(_op, "_on_gpu", lambda tensors: True)
    monkeypatch.setenv("VITKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VITKERN_SELFCHECK", raising=False)
    monkeypatch.delenv("VITKERN_TUNED", raising=False)
    forget(monkeypatch)
    return tmp_path / "cache"


@dataclass
class Kernel:
    """Stands in for a kernel: PyTorch's result times a factor; counts its calls."""

    run: Callable[..., Any]
    factor: float = 1.0
    calls: list[Any] = field(default_factory=list)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append(torch.is_autocast_enabled("cpu"))
        results = tuple(self.factor * t for t in as_tuple(self.run(*args, **options)))
        return results if len(results) > 1 else results[0]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel, Kernel]:
    """Ops "norm" and "norm_backward" with kernels to be set wrong."""
    forward, backward = Kernel(LAYER_NORM.portable), Kernel(LAYER_NORM_BACKWARD.portable)
    op = replace(LAYER_NORM, name="norm", call=forward)
    monkeypatch.setitem(REGISTRY, "norm", op)
    op = replace(LAYER_NORM_BACKWARD, name="norm_backward", backward_of="norm", call=backward)
    monkeypatch.setitem(REGISTRY, "norm_backward", op)
    return forward, backward


def chosen(impl: str = "auto", x: Tensor = X) -> str:
    return choose(REGISTRY["norm"], impl, x, WEIGHT)


def on_disk(cache: Path) -> dict[str, Any]:
    return json.loads((cache / "verified.json").read_text())["verified"]


def test_a_right_kernel_is_checked_once_for_all_processes(
    gpu: Path, made_up: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [chosen(), chosen()] == ["triton", "triton"]
    assert len(made_up[0].calls) == _verified.SMALLEST
    assert not made_up[1].calls
    ((name, verdict),) = on_disk(gpu).items()
    assert name.startswith("made-up-gpu norm triton torch.float32 vitkern-")
    assert verdict["ok"]
    assert 0 < verdict["error"] <= verdict["budget"]
    forget(monkeypatch)
    assert chosen() == "triton"
    assert len(made_up[0].calls) == _verified.SMALLEST
    monkeypatch.setattr(_verified, "digest", lambda source: "of another source")
    forget(monkeypatch)
    assert chosen() == "triton"
    assert len(made_up[0].calls) == 2 * _verified.SMALLEST


def test_an_interpreted_kernel_is_checked(gpu: Path) -> None:
    with record_choices() as choices:
        y = layer_norm(X.half(), WEIGHT.half())
    assert choices[0].implementation == "triton"
    assert "layer_norm triton torch.float16" in next(iter(on_disk(gpu)))
    assert y.dtype == torch.float16


def test_auto_leaves_a_wrong_kernel_with_one_warning(
    gpu: Path, made_up: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up[0].factor = 1.01
    pattern = r"norm: the triton kernel failed its check in torch.float32: error 1.0e-02, budget "
    with pytest.warns(RuntimeWarning, match=pattern) as seen:
        assert [chosen(), chosen()] == ["torch", "torch"]
    assert len(seen) == 1
    assert "auto leaves it alone" in str(seen[0].message)
    with record_choices() as choices:
        chosen()
    assert "failed its check" in choices[0].why
    assert chosen(x=X.double()) == "torch"  # no kernel, no check
    calls = len(made_up[0].calls)
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match=pattern):
        assert chosen() == "torch"
    assert len(made_up[0].calls) == calls


def test_a_wrong_kernel_that_was_asked_for_runs_with_one_warning(
    gpu: Path, made_up: tuple[Kernel, Kernel]
) -> None:
    made_up[0].factor = 1.01
    with pytest.warns(RuntimeWarning, match="it runs, as impl='triton' was asked for") as seen:
        assert [chosen("triton"), chosen("triton")] == ["triton", "triton"]
    assert len(seen) == 1


def test_a_wrong_backward_counts_where_gradients_are_wanted(
    gpu: Path, made_up: tuple[Kernel, Kernel]
) -> None:
    made_up[1].factor = 1.01
    assert chosen() == "triton"
    with pytest.warns(RuntimeWarning, match="norm_backward: the triton kernel failed"):
        assert chosen(x=X.clone().requires_grad_()) == "torch"
    assert chosen() == "triton"


def test_a_kernel_that_raises_is_wrong_in_this_process_only(
    gpu: Path, made_up: tuple[Kernel, Kernel]
) -> None:
    def broken(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("no C compiler")

    made_up[0].run = broken
    with pytest.warns(RuntimeWarning, match="RuntimeError: no C compiler"):
        assert chosen() == "torch"
    assert not gpu.exists()


def test_what_is_no_fault_of_the_kernel_is_no_verdict(
    gpu: Path, made_up: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(made_up[0], "run", full)
    assert chosen() == "triton"
    assert not gpu.exists()


def test_wrong_values_of_any_kind_are_found(gpu: Path, made_up: tuple[Kernel, Kernel]) -> None:
    device = torch.device("cpu")
    samples = _verified.smallest(REGISTRY["norm"], torch.float16)
    for run, pattern in (
        (lambda **a: LAYER_NORM.portable(**a) * torch.nan, "not finite"),
        (lambda **a: LAYER_NORM.portable(**a).double(), "output 0 is torch.float64"),
        (lambda **a: LAYER_NORM.portable(**a)[..., :1], r"output 0 is torch.float16 \["),
    ):
        made_up[0].run = run
        verdict = _verified.check(REGISTRY["norm"], "triton", torch.float16, device, samples)
        assert not verdict.ok
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(str(verdict))


@contextlib.contextmanager
def nothing_changes() -> Iterator[None]:
    """Of PyTorch's global settings."""

    utilities: Any = torch.utils.deterministic

    def settings() -> tuple[Any, ...]:
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.get_deterministic_debug_mode(),
            utilities.fill_uninitialized_memory,
        )

    before = settings()
    yield
    assert settings() == before


def thorough(dtype: torch.dtype = torch.float32, **options: Any) -> _verified.Verdict:
    op = REGISTRY["norm"]
    using = _verified.smallest(op, dtype)
    options = {"repeats": 100, "poison": True, **options}
    return _verified.check(op, "triton", dtype, torch.device("cpu"), using, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fill", [False, True])
def test_an_element_that_nobody_wrote_is_found(
    made_up: tuple[Kernel, Kernel],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    fill: bool,
) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)

    def forgetful(**arguments: Any) -> Tensor:
        y = LAYER_NORM.portable(**arguments)
        out = torch.empty_like(y)
        # The last element holds what is right, as it may when memory was used for the same before.
        if not torch.are_deterministic_algorithms_enabled():
            out.view(-1)[-1] = y.view(-1)[-1]
        out.view(-1)[:-1] = y.view(-1)[:-1]
        return out

    with nothing_changes():
        right = thorough(dtype)
        made_up[0].run = forgetful
        assert thorough(dtype, poison=False).ok
        wrong = thorough(dtype)
    assert right.ok
    assert (right.repeats, right.poisoned) == (100, True)
    assert (wrong.ok, wrong.why) == (False, "output 0 is not finite")
    assert wrong.sample in [sample.label for sample in LAYER_NORM.samples("tiny")]


def test_a_call_that_differs_once_is_found(
    made_up: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_verified, "SMALLEST", 1)
    before, calls = made_up[0].run, count(1)

    def unsteady(**arguments: Any) -> Tensor:
        y = before(**arguments)
        if next(calls) == 37:  # by a bit, which is within any budget
            y = y.clone()
            y.view(torch.int32).view(-1)[3] ^= 1
        return y

    made_up[0].run = unsteady
    assert thorough(repeats=36).ok
    calls = count(1)
    verdict = thorough()
    assert not verdict.ok
    pattern = "output 0: call 37 of 100 with equal arguments differs in 1 of "
    assert verdict.why.startswith(pattern)


@pytest.mark.parametrize(
    ("precision", "setting"), [("ieee", "highest"), ("tf32", "high"), ("", "medium")]
)
def test_both_sides_run_in_the_precision_asked_for(
    monkeypatch: pytest.MonkeyPatch, precision: str, setting: str
) -> None:
    seen = []

    def watched(**arguments: Any) -> Tensor:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return LAYER_NORM.reference(**arguments)

    op = replace(LAYER_NORM, name="norm", call=watched, portable=watched)
    monkeypatch.setitem(REGISTRY, "norm", op)
    torch.set_float32_matmul_precision("medium")
    try:
        with nothing_changes():
            assert thorough(repeats=2, precision=precision).ok
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {(setting, precision != "ieee")}
    assert len(seen) == 3 * _verified.SMALLEST


def test_settings_come_back_whatever_is_raised(made_up: tuple[Kernel, Kernel]) -> None:
    def broken(**arguments: Any) -> Tensor:
        raise RuntimeError("lost")

    made_up[0].run = broken
    with nothing_changes():
        verdict = thorough(precision="tf32")
        assert (verdict.why, verdict.raised) == ("RuntimeError: lost", True)
        with pytest.raises(KeyError), _verified.poisoned(), _verified.float32_products("tf32"):
            raise KeyError


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float64])
def test_all_memory_is_poisoned(dtype: torch.dtype) -> None:
    x = torch.ones(3, 4)
    with _verified.poisoned():
        made = [
            torch.empty(2, 3, dtype=dtype),
            torch.empty_like(x.t(), dtype=dtype),
            x.new_empty(5, dtype=dtype),
            torch.empty_strided((2, 2), (1, 2), dtype=dtype),
        ]
    for t in made:
        largest = 1 if dtype == torch.bool else None
        found = t.isnan() if dtype.is_floating_point else t == (largest or torch.iinfo(dtype).max)
        assert found.all()


def test_a_verdict_of_an_older_file_is_read() -> None:
    old = {"ok": True, "samples": 3, "error": 1e-7, "budget": 2e-7, "why": "", "raised": False}
    assert _verified.Verdict(**old).ratio == 0.5
    wrong, near = _verified.Verdict(False, 1, why="x"), _verified.Verdict(True, 1, 0.9, 1.0)
    assert _verified.worst([near, wrong, _verified.Verdict(True, 1)]) is wrong
    assert _verified.worst([_verified.Verdict(True, 1), near]) is near


def test_a_kernel_that_fits_no_sample_has_no_row(made_up: tuple[Kernel, Kernel]) -> None:
    def unfit(**arguments: Any) -> Tensor:
        raise ValueError("norm: impl='triton' can't run here: no 16-bit product")

    made_up[0].run = unfit
    assert not vitkern.selfcheck(["norm"], [torch.float32], "cpu").rows


def test_the_smallest_samples_are_not_empty() -> None:
    for op in REGISTRY.values():
        few = _verified.smallest(op, torch.float32)
        assert 0 < len(few) <= _verified.SMALLEST
        for sample in few:
            tensors = sample.make("meta", torch.float32).values()
            assert all(t.numel() for t in tensors if isinstance(t, Tensor) and t.dim()), op.name


def test_a_check_leaves_no_trace(gpu: Path, made_up: tuple[Kernel, Kernel]) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    before, after = made_up[0].run, torch.nn.functional.dropout

    def random(*args: Any, **options: Any) -> Tensor:
        after(torch.ones(5))
        return before(*args, **options)

    made_up[0].run = random
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert chosen() == "triton"
        assert torch.is_autocast_enabled("cpu")
    assert made_up[0].calls == [False] * _verified.SMALLEST
    assert torch.equal(torch.rand(4), expected)


def test_it_can_be_turned_off(
    gpu: Path, made_up: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITKERN_SELFCHECK", "0")
    made_up[0].factor = 1.01
    assert chosen() == "triton"
    assert not made_up[0].calls


def test_cpu_tensors_ask_for_no_card(
    made_up: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tuned, "card", None)
    assert chosen() == "torch"
    assert chosen("triton") == "triton"
    assert not made_up[0].calls


def test_a_check_does_not_check_what_it_calls(gpu: Path, made_up: tuple[Kernel, Kernel]) -> None:
    before = made_up[0].run

    def recursive(*args: Any, **options: Any) -> Tensor:
        assert chosen() == "triton"
        return before(*args, **options)

    made_up[0].run = recursive
    assert chosen() == "triton"
    assert len(made_up[0].calls) == _verified.SMALLEST


def test_threads_share_a_check(gpu: Path, made_up: tuple[Kernel, Kernel]) -> None:
    before = made_up[0].run

    def slow(*args: Any, **options: Any) -> Tensor:
        time.sleep(0.05)
        return before(*args, **options)

    made_up[0].run, made_up[0].factor = slow, 1.01
    with ThreadPoolExecutor(4) as pool, pytest.warns(RuntimeWarning, match="failed its check"):
        found = [future.result() for future in [pool.submit(chosen) for _ in range(4)]]
    assert found == ["torch"] * 4
    assert len(made_up[0].calls) == 1  # the first sample is wrong


def test_no_check_where_none_can_run(
    gpu: Path, made_up: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a captured graph, under fake tensors, for a tool: assumed right, but checked later."""
    made_up[0].factor = 1.01
    with monkeypatch.context() as patch:
        patch.setattr(_verified, "capturing", lambda device: True)
        assert chosen() == "triton"
    with intercept(lambda launch: None):
        assert chosen() == "triton"
    with FakeTensorMode() as mode:
        assert chosen(x=mode.from_tensor(X)) == "triton"
        assert chosen() == "triton"
    assert not made_up[0].calls
    with pytest.warns(RuntimeWarning, match="failed its check"):
        assert chosen() == "torch"
    with monkeypatch.context() as patch:
        patch.setattr(_verified, "capturing", lambda device: True)
        assert chosen() == "torch"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_knows_verdicts_and_makes_none(
    gpu: Path, made_up: tuple[Kernel, Kernel], dynamic: bool
) -> None:
    def call(x: Tensor) -> Tensor:
        return x + 1 if choose(REGISTRY["norm"], "auto", x, WEIGHT) == "triton" else x - 1

    def compiled(x: Tensor) -> Tensor:
        torch.compiler.reset()
        return torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)(x)

    made_up[0].factor = 1.01
    assert torch.equal(compiled(X), X + 1)
    assert not made_up[0].calls
    with pytest.warns(RuntimeWarning, match="failed its check"):
        chosen()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(compiled(X), X - 1)


@pytest.mark.parametrize("contents", ["", "[]", "{}", '{"schema": 1, "verified": {"x": 1}}'])
def test_a_cache_of_no_use_is_written_anew(
    gpu: Path, made_up: tuple[Kernel, Kernel], contents: str
) -> None:
    gpu.mkdir()
    (gpu / "verified.json").write_text(contents)
    assert chosen() == "triton"
    assert any(name.startswith("made-up-gpu norm") for name in on_disk(gpu))


def test_a_cache_that_cannot_be_written_is_done_without(
    gpu: Path, made_up: tuple[Kernel, Kernel]
) -> None:
    gpu.write_text("a file where the folder should be")
    assert [chosen(), chosen()] == ["triton", "triton"]
    assert len(made_up[0].calls) == _verified.SMALLEST


def test_verdicts_shipped_with_a_table_count(
    gpu: Path, made_up: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = _verified.key(REGISTRY["norm"], "triton", torch.float32, "made-up-gpu")
    verdict = {"ok": False, "samples": 1, "error": 1.0, "budget": 0.1}
    table = {"schema": _tuned.SCHEMA, "entries": [], "verified": {name: verdict}}
    (tmp_path / "made-up-gpu.json").write_text(json.dumps(table))
    monkeypatch.setenv("VITKERN_TUNED", str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"error 1.0e\+00, budget 1.0e-01"):
        assert chosen() == "torch"
    assert not made_up[0].calls


def test_processes_may_write_at_once(gpu: Path) -> None:
    code = """
import sys
from vitkern.kernels import _verified
for n in range(40):
    _verified.keep(f"{sys.argv[1]} {n}", _verified.Verdict(True, 1, 0.5, 1.0))
    assert _verified.kept()
"""
    runs = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(on_disk(gpu)) >= 40  # of two that write at once, one may lose a verdict
    assert [path.name for path in gpu.iterdir()] == ["verified.json"]


def test_report(gpu: Path, made_up: tuple[Kernel, Kernel], capsys: Any) -> None:
    report = vitkern.selfcheck(["norm", "norm_backward"], [torch.float32], "cpu")
    assert report.ok
    every = len(list(LAYER_NORM.samples("tiny")))
    assert [row.verdict.samples for row in report.rows] == [every, every]
    assert len(made_up[0].calls) == every
    assert chosen() == "triton"
    assert len(made_up[0].calls) == every  # what the report found holds
    made_up[0].factor = 1.01
    assert main(["selfcheck", "--op", "norm", "norm_backward", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    head = ["op", "kernel", "dtype", "samples", "calls", "error/budget", "verdict"]
    assert lines[0].split() == head
    assert ["right" in line for line in lines[1:-1]] == [False, False, True, True]
    assert "WRONG: error 1.0e-02, budget" in lines[1]
    assert lines[-1] == "4 checked on made-up-gpu, 2 wrong"
    with pytest.warns(RuntimeWarning, match="failed its check"):
        assert chosen() == "torch"


def test_report_without_a_gpu_runs_the_interpreter() -> None:
    report = vitkern.selfcheck(["layer_norm"], [torch.float16])
    assert report.ok
    assert "interpreter" in str(report)


def test_report_errors(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(ValueError, match=r"ops must be of .*layer_norm, .* got 'nothing'"):
        vitkern.selfcheck(["nothing"])
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        vitkern.selfcheck(["layer_norm"], repeats=0)
    with pytest.raises(ValueError, match=r"dtypes must be of float32, .* got float64"):
        vitkern.selfcheck(dtypes=[torch.float64])
    assert main(["selfcheck", "--op", "nothing"]) == 2
    assert "got 'nothing'" in capsys.readouterr().err
    monkeypatch.setattr(vitkern.selfcheck.__globals__["torch"].cuda, "is_available", lambda: False)
    monkeypatch.setitem(vitkern.selfcheck.__globals__, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="no kernel runs on cpu here: expected a CUDA GPU"):
        vitkern.selfcheck()
    monkeypatch.setitem(vitkern.selfcheck.__globals__, "TRITON_MISSING", "triton is missing")
    with pytest.raises(RuntimeError, match="selfcheck: triton is missing"):
        vitkern.selfcheck()
