"""A replay does what the launcher would have done, on the tensors of this call."""

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.error_budget import as_tuple
from tests.test_ops import KERNEL_SAMPLES, name
from vitkern.kernels import _configs, _launch, _replay, _tuned
from vitkern.kernels._op import Op, Sample
from vitkern.kernels._replay import record, replayed

LAUNCHERS = [(op, impl, sample) for op, sample in KERNEL_SAMPLES for impl in op.launchers]


def positional(launcher: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(inspect.signature(launcher).bind(**arguments).args)


@pytest.mark.parametrize(("op", "impl", "sample"), LAUNCHERS, ids=name)
def test_every_op_replays(op: Op, impl: str, sample: Sample, kernel_device: str) -> None:
    launcher = op.launchers[impl]
    first, second = (
        positional(launcher, sample.make(kernel_device, torch.float32, seed)) for seed in (0, 1)
    )
    with torch.no_grad():
        recorded, replay = record(launcher, first)
        assert replay is not launcher, "it was not recorded"
        for args, results in (
            (first, recorded),
            (second, replay(*second)),
            (first, replay(*first)),
        ):
            expected = as_tuple(launcher(*args))
            for made, wanted in zip(as_tuple(results), expected, strict=True):
                assert (made.shape, made.stride(), made.dtype) == (
                    wanted.shape, wanted.stride(), wanted.dtype,
                )  # fmt: skip
                assert torch.equal(made, wanted)


def test_only_what_looks_alike_is_replayed(kernel_device: str) -> None:
    calls = 0

    def launcher(x: Tensor, options: list[float], flag: bool) -> Tensor:
        nonlocal calls
        calls += 1
        return x * (2.0 if flag else options[0])

    call = replayed(launcher)
    x = torch.arange(64.0, device=kernel_device)
    looks: dict[str, tuple[Any, ...]] = {
        "as it is": (x, [3.0], True),
        "another value": (x, [4.0], True),
        "another option": (x, [3.0], False),
        "another shape": (x[:32], [3.0], True),
        "other strides": (x[::2], [3.0], True),
        "another dtype": (x.half(), [3.0], True),
        "another alignment": (x[1:33], [3.0], True),
    }
    for args in looks.values():
        before = calls
        for _ in range(4):  # seen, recorded, replayed, replayed
            assert torch.equal(call(*args), launcher(*args))
        assert calls - before == 4 + 2  # four of them were for the comparison
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if precision == "highest" else "highest")
        before = calls
        call(x, [3.0], True)
        assert calls == before + 1
    finally:
        torch.set_float32_matmul_precision(precision)


def test_looks_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_replay, "LIMIT", 8)
    call = replayed(lambda x: x + 1)
    for size in range(1, 40):
        assert torch.equal(call(torch.zeros(size)), torch.ones(size))
    (known,) = [cell.cell_contents for cell in call.__closure__ if type(cell.cell_contents) is dict]
    assert len(known) <= 8


@pytest.mark.parametrize("tool", ["intercept", "record", "override", "using", "hook"])
def test_tools_see_every_launch(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def launcher(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x + 1

    call, x = replayed(launcher), torch.zeros(4)
    for _ in range(3):
        call(x)
    assert calls == 2
    if tool == "hook":
        runtime = pytest.importorskip("triton").knobs.runtime

        class Chain:
            calls = (print,)

        monkeypatch.setattr(runtime, "launch_enter_hook", Chain())
        call(x)
    else:
        within: Any = {
            "intercept": lambda: _launch.intercept(lambda launch: None),
            "record": _configs.record,
            "override": lambda: _configs.override({}),
            "using": lambda: _tuned.using(torch.device("cpu"), _tuned.Table()),
        }[tool]
        with within():
            call(x)
    assert calls == 3


def reads_a_value(x: Tensor) -> Tensor:
    return x * float(x.sum())


def takes_one_from_elsewhere(x: Tensor) -> Tensor:
    return x + ELSEWHERE


def hands_it_back(x: Tensor) -> Tensor:
    return ELSEWHERE


ELSEWHERE = torch.ones(4)


@pytest.mark.parametrize("launcher", [reads_a_value, takes_one_from_elsewhere, hands_it_back])
def test_what_can_not_be_replayed_runs_as_ever(launcher: Any) -> None:
    call = replayed(launcher)
    for value in range(1, 6):
        x = torch.full((4,), float(value))
        assert torch.equal(call(x), launcher(x))
    assert record(launcher, (x,))[1] is launcher


def test_one_tensor_in_two_places_is_not_taken_for_two() -> None:
    def launcher(x: Tensor, y: Tensor) -> Tensor:
        return x - 2 * y

    call, one, other = replayed(launcher), torch.ones(4), torch.full((4,), 3.0)
    for _ in range(3):
        call(one, one)
    assert torch.equal(call(one, other), launcher(one, other))


def test_aten_within_a_launcher_is_replayed() -> None:
    """Views of views, changes in place, lists of tensors, several results."""

    def launcher(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.view(2, 8).t()
        room = torch.zeros(8, 2)
        room[2:].copy_(rows[2:])
        low, high = torch.cat([room, y.view(8, 2)]).chunk(2)
        return (low @ high.t()).contiguous(), torch.aminmax(high)[1].reshape(1)

    def arguments(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(16, generator=generator), torch.randn(16, generator=generator)

    with torch.no_grad():
        _, replay = record(launcher, arguments(0))
        assert replay is not launcher
        for seed in (1, 2):
            for made, wanted in zip(
                replay(*arguments(seed)), launcher(*arguments(seed)), strict=True
            ):
                assert torch.equal(made, wanted)


@dataclass
class Compiled:
    """Stands in for what Triton has compiled: it notes what it is launched with."""

    log: list[tuple[Any, ...]]
    function: int = 11
    packed_metadata: str = "meta"

    def run(self, *args: Any) -> None:
        self.log.append(args)


def kernel_signature(a, b, none, out, rows, scale, BLOCK, FLAG=True):
    """Of a kernel."""


class Kernel:
    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.compiled, self.signature = Compiled(log), inspect.signature(kernel_signature)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.compiled


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if CPU tensors were on the card that is current, and its stream the number 7."""
    monkeypatch.setattr(_replay, "INTERPRET", False)
    monkeypatch.setattr(_launch, "INTERPRET", False)
    monkeypatch.setattr(_launch, "_get_device", lambda: None)
    monkeypatch.setattr(_launch, "current_stream", lambda index: 7)


@pytest.mark.parametrize("scratch", [False, True])
def test_compiled_kernels_get_the_addresses_of_this_call(scratch: bool, on_a_card: None) -> None:
    log: list[tuple[Any, ...]] = []
    kernel = Kernel(log)

    def launcher(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        rows = x.view(-1, 4)
        made = torch.empty(2, 8)
        _launch.launch(
            kernel, (3, 2), rows[1:], y, None, made[1], rows.shape[0], scale,
            BLOCK=print, num_warps=8, scratch=scratch,
        )  # fmt: skip
        return made, y.new_empty(0)

    with torch.no_grad():
        _, replay = record(launcher, (torch.zeros(2, 2, 4), torch.zeros(3), 0.25))
        assert replay is not launcher
        assert not log  # the recorded call went through Triton
        x, y = torch.zeros(2, 2, 4), torch.zeros(3)
        made, _ = replay(x, y, 0.25)
    card = (3, 2, 1, 7, 11, "meta", None, None, None)
    tensors = (x.data_ptr() + 16, y.data_ptr(), None, made.data_ptr() + 32)
    assert log == [(*card, *tensors, 4, 0.25, print, True)]


def test_a_kernel_that_takes_more_than_tensors_and_numbers_is_not_recorded(on_a_card: None) -> None:
    kernel = Kernel([])

    def launcher(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        _launch.launch(kernel, (1,), x, x, object(), out, 1, 1.0, BLOCK=16)
        return out

    assert record(launcher, (torch.zeros(4),))[1] is launcher
