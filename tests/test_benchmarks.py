"""What is timed is what should be, and only after it was found right; and what is said of it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkern
from benchmarks import _cases, _grid, _models, _ops, _session
from benchmarks._cases import Case, cases, implementations, results, timed, unfit
from benchmarks._contest import (
    Absent,
    Bench,
    Contender,
    Contest,
    DeviceLost,
    Log,
    OursFailed,
    Ready,
    Row,
    Unfit,
)  # fmt: skip
from benchmarks._measure import Ceilings, Stats, Timer, parity, repeats
from benchmarks._report import read
from benchmarks._session import Session
from benchmarks.peers import ops as peers
from tests.error_budget import as_tuple, in_float64
from vitkern import kernels
from vitkern.kernels import REGISTRY, layer_norm
from vitkern.kernels._op import Op

LAYER_NORM, LAYER_NORM_BACKWARD = REGISTRY["layer_norm"], REGISTRY["layer_norm_backward"]
BACKWARDS = [op for op in REGISTRY.values() if op.backward_of is not None]


def case_of(op: Op, number: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, "tiny", list(op.samples("tiny"))[number], dtype)


@pytest.mark.parametrize("size", ["tiny", "vit"])
@pytest.mark.parametrize("op", BACKWARDS, ids=lambda op: op.name)
def test_a_backward_case_finds_its_forward_pass(op: Op, size: str) -> None:
    found = []
    for case in cases([op], [size], [torch.float16]):  # every sample is for this one
        forward = case.forward
        assert forward.op.name == op.backward_of
        assert forward.forward is forward
        for name, arg in case.sample.args.items():
            assert arg is None or arg == forward.sample.args.get(name, arg), (case, name)
        for name, option in case.sample.options.items():
            assert option == forward.sample.options.get(name, option), (case, name)
        found.append(forward.sample.label)
    assert found == [sample.label for sample in REGISTRY[op.backward_of].samples(size)]


def test_samples_that_do_not_correspond_are_refused() -> None:
    samples = list(LAYER_NORM_BACKWARD.samples("tiny"))
    fewer = replace(LAYER_NORM_BACKWARD, samples=lambda size: samples[1:])
    with pytest.raises(ValueError, match="longer"):
        _ = replace(case_of(LAYER_NORM_BACKWARD, -1), op=fewer).forward
    turned = replace(LAYER_NORM_BACKWARD, samples=lambda size: samples[::-1])
    with pytest.raises(ValueError, match=r"layer_norm_backward .* of layer_norm there is"):
        _ = replace(case_of(LAYER_NORM_BACKWARD), op=turned).forward


@pytest.mark.parametrize("op", BACKWARDS, ids=lambda op: op.name)
def test_the_graph_is_built_once_and_walked_again_and_again(op: Op) -> None:
    case = case_of(op)
    arguments = case.arguments("cpu")
    passes: list[int] = []

    def counted(**given: Any) -> Any:
        passes.append(1)
        return implementations(case)["reference"](**given)

    call = timed(case, counted, arguments)
    first, second = call(), call()
    assert len(passes) == 1
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = results(case, implementations(case)["reference"], in_float64(arguments))
    portable = results(case, implementations(case)[op.portable_name], arguments)
    assert parity(first, portable, exact)["ok"]


def test_only_the_gradients_that_the_sample_needs_are_computed() -> None:
    wanted = {}
    for size, device in (("tiny", "cpu"), ("vit", "meta")):
        case = next(cases([REGISTRY["patch_embed_backward"]], [size]))
        arguments = case.arguments(device)
        wanted[size] = {
            k for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad
        }
    assert wanted["tiny"] == {"images", "weight", "bias", "pos_embed", "prefix"}
    assert wanted["vit"] == wanted["tiny"] - {"images"}
    rope = next(s for s in REGISTRY["attention"].samples("tiny") if s.args["sin"] is not None)
    made = _cases.require_grads(rope.make("cpu", torch.float32))
    assert made["qkv"].requires_grad
    assert not made["sin"].requires_grad


def test_a_forward_case_times_the_implementation_itself() -> None:
    case = case_of(LAYER_NORM)
    arguments = case.arguments("cpu")
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in arguments.values())
    call = timed(case, implementations(case)["torch"], arguments)
    assert torch.equal(call(), LAYER_NORM.portable(**arguments))


def test_unfit_tells_what_cannot_run_from_what_fails() -> None:
    case = case_of(LAYER_NORM, dtype=torch.float64)
    arguments = case.arguments("cpu")
    assert "layer_norm: impl='triton' can't run here" in unfit(case, "triton", arguments)
    assert unfit(case, "torch", arguments) is None
    assert unfit(case, "torch", {**arguments, "weight": None}) is None


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Callable[[], None]:
        """A call that takes these, in turn and over again."""
        left = itertools.cycle(seconds)

        def call() -> None:
            self.now += next(left)

        return call


CPU = torch.device("cpu")
CEILINGS = Ceilings({"float32": 1e12}, 1e11, "-", "-")


def test_statistics() -> None:
    assert Stats.of([3.0]) == Stats(3.0, 3.0, 3.0, 1)
    assert Stats.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Stats(3.0, 2.0, 4.0, 5)
    assert f"{Stats.of([1.0, 2.0, 3.0]):.1f}" == "2.0 [1.5, 2.5]"
    assert repeats(1.0, 0.1, 5, 200) == 5
    assert repeats(1e-9, 1.0, 5, 200) == 200
    assert repeats(0.1, 2.0, 5, 200) == 20


def test_the_timer_times_each_call_after_a_warm_up() -> None:
    clock = Clock()
    # The first two calls are slow, as compilers and caches make them.
    call = clock.takes(9.0, 9.0, *[2.0] * 3, *[1.0, 2.0, 3.0, 4.0, 5.0] * 2)
    assert Timer(CPU, clock)(call, seconds=20.0) == Stats(3.0, 2.0, 4.0, 10)


def test_in_turns_every_round_has_every_call_once_in_changing_order() -> None:
    clock, made = Clock(), []

    def named(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            made.append(name)
            clock.now += seconds * (1 + 0.01 * len(made))  # drift

        return call

    calls = {name: named(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    found = Timer(CPU, clock).in_turns(calls, seconds=40.0)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 18, "b": 18, "c": 18}
    rounds = [tuple(made[i : i + 3]) for i in range(9, len(made), 3)]  # behind the warm-up
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 3
    ratios = [b / a for a, b in zip(found["a"], found["b"], strict=True)]
    assert abs(Stats.of(ratios).median - 2) < 0.05  # though the last call takes 1.6 times the first


def test_the_bound_is_the_longer_of_computing_and_moving() -> None:
    assert CEILINGS.seconds(10**12, 10**10, torch.float32) == 1.0
    assert CEILINGS.seconds(10**12, 10**12, torch.float32) == 10.0


def right() -> Row:
    return {"ok": True, "error": 0.0, "budget": 1.0, "eager_error": 0.0}


def raising(problem: Exception) -> Callable[[], Any]:
    def call() -> Any:
        raise problem

    return call


def contest_of(**contenders: Contender) -> Contest:
    return Contest(
        "op", "a group", {"op": "a"}, contenders, lambda: "ours", 10**12, 10**10,
        lambda ceilings: ceilings.seconds(10**12, 10**10, torch.float32), images=4,
    )  # fmt: skip


@pytest.fixture
def held() -> Callable[..., dict[str, Row]]:
    """Rows by contender, on a made-up clock."""

    def hold(clock: Clock, contest: Contest, together: int | None = None) -> dict[str, Row]:
        bench = Bench(Timer(CPU, clock), CEILINGS, seconds=100.0, together=together)
        found = list(bench.hold(contest, contest.contenders))
        assert all(len(f.seconds) == f.row["seconds"]["n"] for f in found if "seconds" in f.row)
        return {f.row["impl"]: f.row for f in found}

    return hold


@pytest.mark.parametrize("together", [1, None])
def test_a_slow_kernel_shows_as_a_loss(held: Any, together: int | None) -> None:
    clock = Clock()
    contest = contest_of(
        ours=Contender(lambda: Ready(clock.takes(4.0), right), own=True),
        eager=Contender(lambda: Ready(clock.takes(2.0), right), baseline=True),
        peer=Contender(lambda: Ready(clock.takes(8.0), right, "adapted"), "peer 1.0"),
    )
    rows = held(clock, contest, together)
    assert list(rows) == ["ours", "eager", "peer"]
    ours, eager, peer = rows.values()
    assert (ours["ours"], ours["own"], eager["baseline"], peer["ours"]) == (True, True, True, False)
    assert ours["a_a"]["median"] == 1.0
    assert "against_ours" not in ours
    assert eager["against_ours"]["median"] == 0.5
    assert peer["against_ours"]["median"] == 2.0
    assert (peer["package"], peer["note"]) == ("peer 1.0", "adapted")
    assert [row["roofline"] for row in rows.values()] == [0.25, 0.5, 0.125]
    assert [row["images_per_s"] for row in rows.values()] == [1.0, 2.0, 0.5]
    assert (ours["flops"], ours["bytes"]) == (10**12, 10**10)


def test_what_is_wrong_has_no_time(held: Any) -> None:
    clock = Clock()
    wrong = {"ok": False, "error": 2.0, "budget": 1.0, "eager_error": 0.5}

    def call() -> None:
        raise AssertionError("it was timed")

    rows = held(
        clock,
        contest_of(
            ours=Contender(lambda: Ready(clock.takes(1.0), right)),
            wrong=Contender(lambda: Ready(call, lambda: wrong)),
            broken=Contender(lambda: Ready(call, raising(RuntimeError("no")))),
            unbuilt=Contender(raising(ValueError("neither"))),
            absent=Contender(raising(Absent("it is not installed"))),
            unfit=Contender(lambda: Ready(call, raising(Unfit("not this")))),
            large=Contender(raising(torch.OutOfMemoryError("too large"))),
        ),
    )
    assert rows["wrong"]["parity"] == wrong
    assert rows["broken"]["parity"] == {"ok": False, "why": "RuntimeError: no"}
    assert rows["unbuilt"]["parity"] == {"ok": False, "why": "ValueError: neither"}
    for name in ("wrong", "broken", "unbuilt"):
        assert not rows[name].keys() & {"seconds", "against_ours", "roofline", "images_per_s"}
    left_out = {n: row["why"] for n, row in rows.items() if row["kind"] == "left out"}
    assert left_out == {
        "absent": "it is not installed",
        "unfit": "not this",
        "large": "not enough memory",
    }
    assert rows["ours"]["seconds"]["median"] == 1.0


def test_where_ours_is_wrong_nobody_has_a_ratio(held: Any) -> None:
    clock = Clock()
    rows = held(
        clock,
        contest_of(
            ours=Contender(lambda: Ready(clock.takes(1.0), lambda: {"ok": False, "why": "nan"})),
            eager=Contender(lambda: Ready(clock.takes(2.0), right)),
        ),
    )
    assert "seconds" not in rows["ours"]
    assert rows["eager"]["seconds"]["median"] == 2.0
    assert "against_ours" not in rows["eager"]


def test_ours_takes_part_though_it_was_not_asked_for(held: Any) -> None:
    clock = Clock()
    contest = contest_of(
        ours=Contender(lambda: Ready(clock.takes(1.0), right)),
        peer=Contender(lambda: Ready(clock.takes(3.0), right)),
    )
    found = list(Bench(Timer(CPU, clock), CEILINGS, 10.0).hold(contest, ["peer"]))
    assert [f.row["impl"] for f in found] == ["ours", "peer"]
    assert found[1].row["against_ours"]["median"] == 3.0


def test_results_come_one_by_one_and_time_can_run_out_between_them() -> None:
    clock = Clock()
    seconds = {"ours": 1.0, "eager": 2.0, "peer": 3.0}
    ready = {name: Ready(clock.takes(each), right) for name, each in seconds.items()}
    contest = contest_of(**{name: Contender(partial(ready.get, name)) for name in seconds})
    bench = Bench(Timer(CPU, clock), CEILINGS, seconds=10.0, together=1)
    late: list[bool] = []
    results = bench.hold(contest, seconds, lambda: bool(late))
    assert next(results).row["impl"] == "ours"
    assert clock.now < 60  # nobody else was timed yet
    assert next(results).row["against_ours"]["median"] == 2.0
    late.append(True)
    (last,) = results
    assert last.row == {
        "kind": "left out",
        "group": "a group",
        "impl": "peer",
        "why": "out of time",
    }


@pytest.mark.parametrize("together", [1, None])
@pytest.mark.parametrize("bad", ["ours", "b"])
def test_what_raises_while_it_is_timed_is_found(held: Any, together: int | None, bad: str) -> None:
    clock = Clock()
    seconds = {"ours": 1.0, "a": 2.0, "b": 3.0, "c": 4.0}
    calls = {name: clock.takes(each) for name, each in seconds.items()}
    calls[bad] = raising(RuntimeError("only when timed"))
    ready = {name: Ready(call, right) for name, call in calls.items()}
    rows = held(
        clock, contest_of(**{n: Contender(partial(ready.get, n)) for n in seconds}), together
    )
    assert rows.keys() == seconds.keys()
    for name, row in rows.items():
        if name == bad:
            assert row["parity"] == {"ok": False, "why": "RuntimeError: only when timed"}
            assert "seconds" not in row
        else:
            assert row["seconds"]["median"] == seconds[name]
            assert ("against_ours" in row) == (bad != "ours" and name != "ours")


def test_too_large_beside_ours_is_timed_alone(held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    in_turns = Timer.in_turns

    def scarce(self: Timer, calls: Any, *args: Any, **options: Any) -> Any:
        if {"ours", "peer"} <= set(calls):
            raise torch.OutOfMemoryError("both")
        return in_turns(self, calls, *args, **options)

    monkeypatch.setattr(Timer, "in_turns", scarce)
    rows = held(
        clock,
        contest_of(
            ours=Contender(lambda: Ready(clock.takes(1.0), right)),
            peer=Contender(lambda: Ready(clock.takes(2.0), right)),
        ),
        1,
    )
    assert rows["ours"]["seconds"]["median"] == 1.0
    assert rows["peer"]["seconds"]["median"] == 2.0
    assert "against_ours" not in rows["peer"]


def test_where_auto_raises_that_is_a_result(held: Any) -> None:
    clock = Clock()
    contest = replace(
        contest_of(peer=Contender(lambda: Ready(clock.takes(1.0), right))),
        ours=raising(OursFailed("ValueError: no")),
    )
    rows = held(clock, contest)
    assert rows["auto"]["ours"]
    assert rows["auto"]["own"]
    assert "ValueError: no" in rows["auto"]["parity"]["why"]
    assert rows["peer"]["seconds"]["median"] == 1.0
    assert "against_ours" not in rows["peer"]


def test_a_torn_line_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"kind": "a"}\n{"kind": "b", "torn')
    Log(path).add({"kind": "c"})
    assert [row["kind"] for row in read(path).rows] == ["a", "c"]


def test_without_a_reference_all_are_left_out() -> None:
    clock = Clock()
    contest = replace(
        contest_of(peer=Contender(lambda: Ready(clock.takes(1.0), right))),
        ours=raising(torch.OutOfMemoryError("too large")),
    )
    (found,) = Bench(Timer(CPU, clock), CEILINGS, 1.0).hold(contest, ["peer"])
    assert found.row["kind"] == "left out"
    assert found.row["why"] == "no reference: OutOfMemoryError: too large"


def test_results_are_on_disk_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    log = Log(path)
    log.add({"kind": "a"})
    assert path.read_text() == '{"kind": "a"}\n'
    again = Log(path)  # another step of the same run
    again.add({"kind": "b"})
    log.add({"kind": "c"})
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


# Ops


def made_up(x: Tensor, weight: Tensor, bias: Tensor | None, *, impl: str, **options: Any) -> Tensor:
    """A public function: "absent" can't run, "broken" raises, "wrong" has wrong gradients."""
    if impl == "absent":
        raise ValueError("made_up: impl='absent' can't run here: it is not installed")
    if impl == "broken":
        raise ValueError("made_up: something else")
    given = {"wrong": "torch", "triton": "torch"}.get(impl, impl)
    out = layer_norm(x, weight, bias, impl=given, **options)
    return out + 0.01 * (x - x.detach()) if impl == "wrong" else out


@pytest.fixture
def made_up_ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, Op]:
    """An op with two samples and all sorts of implementations, and its backward."""

    def few(op: Op) -> Any:
        return lambda size: list(op.samples(size))[:2]

    def scaled(*args: Any, **options: Any) -> Any:
        return tuple(1.01 * t for t in as_tuple(LAYER_NORM_BACKWARD.portable(*args, **options)))

    def broken(**_: Any) -> Tensor:
        raise RuntimeError("broken")

    implementations = {"absent": broken, "broken": broken, "wrong": LAYER_NORM.portable}
    forward = replace(
        LAYER_NORM,
        name="made_up",
        samples=few(LAYER_NORM),
        peers=implementations,
        call=LAYER_NORM.portable,
    )
    backward = replace(
        LAYER_NORM_BACKWARD,
        name="made_up_backward",
        backward_of="made_up",
        samples=few(LAYER_NORM_BACKWARD),
        call=LAYER_NORM_BACKWARD.portable,
    )
    bad_kernel = replace(backward, name="bad_backward", call=scaled)
    ops = {op.name: op for op in (forward, backward, bad_kernel)}
    for module in (_cases, _grid):
        monkeypatch.setattr(module, "REGISTRY", ops)
    monkeypatch.setattr(kernels, "made_up", made_up, raising=False)
    return ops


def outcomes(op: Op) -> dict[str, str]:
    """What became of each contender: "timed", "wrong", or why it is left out."""
    bench = Bench(Timer(CPU), CEILINGS, seconds=0.001)
    contest = _ops.contest(case_of(op), CPU, backend="eager")
    found = {}
    for row in (f.row for f in bench.hold(contest, contest.contenders)):
        right = row["kind"] == "time" and row["parity"]["ok"]
        found[row["impl"]] = "timed" if right else row.get("why", "wrong")
        assert ("seconds" in row) == right
        if row.get("ours"):
            found["ours"] = row["impl"]
    return found


def test_of_an_op_only_what_is_right_is_timed(made_up_ops: dict[str, Op]) -> None:
    absent = "made_up: impl='absent' can't run here: it is not installed"
    right = {"torch": "timed", "compile(torch)": "timed", "reference": "timed", "ours": "torch"}
    assert outcomes(made_up_ops["made_up"]) == {
        **right,
        "triton": "timed",
        "wrong": "timed",  # in its gradients only
        "broken": "wrong",
        "absent": absent,
    }
    assert outcomes(made_up_ops["made_up_backward"]) == {
        **right,
        "triton": "timed",
        "wrong": "wrong",
        "broken": "wrong",
        "absent": absent,
    }
    # Autograd's way through it is right, and its kernel by itself isn't.
    assert outcomes(made_up_ops["bad_backward"])["triton"] == "wrong"


def test_a_peer_is_called_as_the_public_function_is(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def peer(**arguments: Any) -> Tensor:
        given.append(arguments)
        return layer_norm(**arguments, impl="reference")

    made = peers.Peer(peer, (peers.XFORMERS,))
    monkeypatch.setitem(peers.OPS, "layer_norm", {"a peer": made})
    for op in (LAYER_NORM, LAYER_NORM_BACKWARD):
        contest = _ops.contest(case_of(op), CPU)
        ready = contest.contenders["a peer"].start()
        assert ready.check()["ok"]
        assert given[-1].keys() == {"x", "weight", "bias", "eps", "rms", "out_dtype"}


def test_the_grid_lists_who_can_run(made_up_ops: dict[str, Op]) -> None:
    listed = {case.op.name: _grid.op_contenders("small", case, CPU)
              for case in _grid.op_cases("small", CPU)}  # fmt: skip
    assert listed.keys() == made_up_ops.keys()
    assert "torch" in listed["made_up"]
    assert not {"triton", "compile(torch)"} & set(listed["made_up"])
    assert "compile(torch)" in _grid.op_contenders("full", case_of(made_up_ops["made_up"]), CPU)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_full_grid_begins_with_the_small_one_and_repeats_nothing(device: str) -> None:
    there = torch.device(device)
    small, full = (_grid.settings(grid, there) for grid in ("small", "full"))
    assert full[: len(small)] == small
    assert len({str(setting) for setting in full}) == len(full)
    compiled = _grid.settings("compiled", there)
    assert set(map(str, compiled)) <= set(map(str, full))
    for setting in (small[0], compiled[0]):
        who = _grid.model_contenders("compiled", setting, there)
        assert who[0] == "vitkern"
        assert "vitkern compile" in who
        few = _grid.model_contenders("small", small[0], there)
        assert set(few) < set(who)
        assert not [name for name in few if "compile" in name]
    words = {setting.name.split("_")[1] for setting in full}
    assert words == {"tiny", "small", "base", "large", "huge"}
    assert {setting.step for setting in full} == {"forward", "train"}


# Models


@pytest.mark.parametrize("step", ["forward", "train"])
def test_models_are_checked_in_the_very_call_that_is_timed(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = _models.Setting("toy", 4, step)
    contest = _models.contest(setting, CPU)
    ready = contest.contenders["vitkern"].start()
    assert ready.check()["ok"]
    # A model that is wrong in its last image only.
    forward = vitkern.ViT.forward

    def wrong(self: Any, images: Tensor) -> Tensor:
        return forward(self, images) * torch.tensor([1, 1, 1, 1.01])[:, None]

    monkeypatch.setattr(vitkern.ViT, "forward", wrong)
    bench = Bench(Timer(CPU), CEILINGS, seconds=0.001)
    rows = {f.row["impl"]: f.row for f in bench.hold(contest, ["vitkern", "eager"])}
    assert not rows["vitkern"]["parity"]["ok"]
    assert "seconds" not in rows["vitkern"]
    assert "seconds" in rows["eager"]
    assert "against_ours" not in rows["eager"]


def test_wrong_gradients_alone_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = vitkern.ViT.forward

    def wrong(self: Any, images: Tensor) -> Tensor:
        logits = forward(self, images)
        return logits + 0.01 * (logits - logits.detach())

    monkeypatch.setattr(vitkern.ViT, "forward", wrong)
    found = {}
    for step in ("forward", "train"):
        contest = _models.contest(_models.Setting("toy", 2, step), CPU)
        found[step] = contest.contenders["vitkern"].start().check()["ok"]
    assert found == {"forward": True, "train": False}


def test_a_gradient_that_is_missing_or_small_and_wrong_is_found() -> None:
    args = ("toy", None, 2)
    exact = _models.reference(*args, _models.FLOAT64, CPU, True).grads
    eager = _models.reference(*args, _models.FLOAT32, CPU, True).grads
    assert _models.gradient_parity(eager, eager, exact)["ok"]
    smallest = min(exact, key=lambda name: float(exact[name].norm()))
    for wrong in (torch.zeros_like, torch.neg, lambda g: g * torch.nan):
        made = {**eager, smallest: wrong(eager[smallest])}
        assert not _models.gradient_parity(made, eager, exact)["ok"]
    del made[smallest]
    assert smallest in _models.gradient_parity(made, eager, exact)["why"]


def test_cases_are_dealt_op_by_op() -> None:
    ops = [LAYER_NORM, LAYER_NORM_BACKWARD]
    found = _cases.dealt(cases(ops, ["tiny"], [torch.float32]))
    assert sorted(map(str, found)) == sorted(map(str, cases(ops, ["tiny"], [torch.float32])))
    assert [case.op.name for case in found[:4]] == [op.name for op in ops] * 2


def test_a_model_counts_its_work_and_needs_a_gpu_for_graphs() -> None:
    forward, train = (
        _models.contest(_models.Setting("vit_base_patch16_224", 2, step), CPU)
        for step in ("forward", "train")
    )
    assert abs(forward.flops / (2 * 35.1e9) - 1) < 0.02
    assert abs(train.flops / (6 * 35.1e9) - 1) < 0.03
    assert forward.images == 2
    if not torch.cuda.is_available():
        toy = _models.contest(_models.Setting("toy", 2, "forward", graph=True), CPU)
        for name in _models.GRAPHS:
            with pytest.raises(Unfit, match="need a GPU"):
                toy.contenders[name].start()


# A run


class Benchmark:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.group = ""
        self.extra_info: dict[str, Any] = {}
        self.times: list[float] = []

    def pedantic(self, call: Callable[[], Any], rounds: int) -> None:
        for _ in range(rounds):
            before = _session.replayed()
            call()
            self.times.append(_session.replayed() - before)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Session, Clock]]:
    """A run of two groups, ten minutes long, on a made-up clock."""
    clock = Clock()
    told: list[str] = []
    groups = {"one": ["ours", "peer"], "two": ["ours", "peer"]}
    run = Session(tmp_path / "r.jsonl", "toy", groups, 10.0, 100.0, told.append, clock)
    run.timer = Timer(CPU, clock)
    run._bench = Bench(run.timer, CEILINGS, 100.0)
    run.told = told  # type: ignore[attr-defined]
    yield run, clock
    run.log.close()


def test_a_group_is_measured_once_and_replayed(session: tuple[Session, Clock]) -> None:
    run, clock = session
    made = []

    def contest() -> Contest:
        made.append(1)
        return contest_of(
            ours=Contender(lambda: Ready(clock.takes(1.0, 2.0, 3.0), right), own=True),
            peer=Contender(lambda: Ready(clock.takes(6.0), right)),
        )

    seen = {}
    for name in ("ours", "peer"):
        benchmark = Benchmark()
        run.test("one", contest, name, benchmark)
        row = benchmark.extra_info["row"]
        assert benchmark.group == "one"
        assert Stats.of(benchmark.times).median == pytest.approx(row["seconds"]["median"])
        assert len(benchmark.times) == row["seconds"]["n"]
        seen[name] = row
    assert made == [1]
    (line,) = run.told  # type: ignore[attr-defined]
    assert line.startswith("[==========          ] 1/2, ")
    assert line.endswith("| one: ours 2e+03 ms, peer x 3.00")
    kept = [json.loads(text) for text in run.log.path.read_text().splitlines()]
    assert [row for row in kept if row["kind"] == "time"] == list(seen.values())


def test_a_lost_gpu_ends_the_run(
    session: tuple[Session, Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock = session
    contest = contest_of(
        ours=Contender(lambda: Ready(clock.takes(1.0), right), own=True),
        peer=Contender(lambda: Ready(raising(RuntimeError("illegal access")), right)),
    )
    free = raising(DeviceLost("RuntimeError: illegal access"))
    monkeypatch.setattr(run.bench, "_free", free)
    with pytest.raises(pytest.exit.Exception, match="illegal access"):
        run.test("one", lambda: contest, "ours", Benchmark())


def test_a_group_that_broke_off_is_not_measured_again(session: tuple[Session, Clock]) -> None:
    run, _ = session
    with pytest.raises(ValueError, match="no contest"):
        run.test("one", raising(ValueError("no contest")), "ours", Benchmark())
    with pytest.raises(pytest.skip.Exception, match="its group broke off"):
        run.test("one", raising(ValueError("no contest")), "peer", Benchmark())


def test_time_is_up_before_a_group_and_not_within(session: tuple[Session, Clock]) -> None:
    run, clock = session

    def contest() -> Contest:
        return contest_of(
            ours=Contender(lambda: Ready(clock.takes(100.0), right), own=True),
            peer=Contender(lambda: Ready(clock.takes(100.0), right)),
        )

    for name in ("ours", "peer"):
        run.test("one", contest, name, Benchmark())
    assert clock.now > run.limit
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        run.test("two", contest, "ours", Benchmark())
    assert run.log.rows[-1]["why"] == "out of time"


def test_a_wrong_kernel_of_ours_fails_and_anothers_is_skipped(
    session: tuple[Session, Clock],
) -> None:
    run, _ = session
    wrong = Ready(lambda: None, lambda: {"ok": False, "why": "output 0 is not finite"})
    contest = contest_of(
        ours=Contender(lambda: wrong, own=True), peer=Contender(lambda: wrong)
    )  # fmt: skip
    with pytest.raises(pytest.fail.Exception, match="is not timed, for it is not right"):
        run.test("one", lambda: contest, "ours", Benchmark())
    with pytest.raises(pytest.skip.Exception, match="output 0 is not finite"):
        run.test("one", lambda: contest, "peer", Benchmark())
    assert run.told[0].endswith("one: ours WRONG, peer WRONG")  # type: ignore[attr-defined]


def pytest_benchmarks(folder: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--grid=toy"]
    command += ["-p", "no:cacheprovider", "--seconds=0.02", f"--results={folder / 'r.jsonl'}"]
    return [*command, *options]


ROOT = Path(__file__).parent.parent
INHERITED = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")  # which would be told to another pytest
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in INHERITED}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it compiles what it compares")
def test_a_whole_run_on_a_cpu(tmp_path: Path) -> None:
    command = pytest_benchmarks(tmp_path, f"--benchmark-json={tmp_path / 'b.json'}")
    done = subprocess.run(
        [*command, "-k", "vitkern or eager or timm or torch"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    times = [row for row in rows if row["kind"] == "time"]
    models = {(r["group"], r["impl"]) for r in times if r["level"] == "model"}
    for step in ("forward", "train"):
        group = f"toy b2 {step} float32"
        assert {(group, "vitkern"), (group, "eager")} <= models
    assert all(row["parity"]["ok"] for row in times)
    assert [row["kind"] for row in rows[:1]] == ["about"]
    train = [r for r in times if r["group"] == "toy b2 train float32"]
    assert all(row["peak_bytes"] > 0 for row in train)
    kept = json.loads((tmp_path / "b.json").read_text())
    by_test = {b["extra_info"]["row"]["impl"]: b for b in kept["benchmarks"] if b["group"] == group}
    for name, benchmark in by_test.items():
        row = next(r for r in train if r["impl"] == name)
        assert benchmark["stats"]["median"] == pytest.approx(row["seconds"]["median"])
    assert [row["kind"] for row in kept["vitkern"]].count("about") == 1
    assert (tmp_path / "report.md").exists()
    assert (tmp_path / "report.md").read_text().count("toy b2 train float32") > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it compiles what it compares")
def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    command = pytest_benchmarks(tmp_path, "benchmarks/test_models.py", "-k", "vitkern or eager")
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for _ in range(600):
        if path.exists() and '"time"' in path.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 2), said.decode()  # 0: it was through before
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert any(row["kind"] == "time" for row in rows)
    assert "b2 forward" in (tmp_path / "report.md").read_text()
