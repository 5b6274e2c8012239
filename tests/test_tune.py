"""The tuner, rehearsed on a CPU: what it writes is what `choose` looks up."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkern
from benchmarks import _cases, _measure, _offline, tune
from benchmarks.__main__ import main
from benchmarks._workers import Died, Raised, Worker
from benchmarks.tune import ahead, configs, places
from vitkern import kernels
from vitkern.kernels import REGISTRY, _op, _tuned, _verified
from vitkern.kernels._configs import record
from vitkern.kernels._launch import intercept
from vitkern.kernels._norm import forward_candidates, forward_config
from vitkern.kernels._op import Op, choose
from vitkern.kernels._triton import INTERPRET, gluon

LAYER_NORM, LAYER_NORM_BACKWARD = REGISTRY["layer_norm"], REGISTRY["layer_norm_backward"]
CPU = torch.device("cpu")
HALF = torch.float16
TIMES = {"torch": 3e-5, "peer": 2e-5, "wrong": 1e-5}


def made_up(x: Tensor, weight: Tensor, bias: Tensor | None, *, impl: str, **options: Any) -> Tensor:
    """A public function; "triton" can't run here."""
    unfit = {"triton": "there is no GPU"}
    name = choose(REGISTRY["made_up"], impl, x, weight, bias, unfit=unfit)
    return REGISTRY["made_up"].implementations[name](x, weight, bias, **options)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    """An op of two samples in one bucket, with a wrong and a right peer; and its backward."""

    def wrong(*args: Any, **options: Any) -> Tensor:
        return 1.01 * LAYER_NORM.portable(*args, **options)

    def peer(*args: Any, **options: Any) -> Tensor:
        return LAYER_NORM.reference(*args, **options)

    def two(op: Op) -> Callable[[str], Any]:
        first = next(iter(op.samples("tiny")))
        return lambda size: [replace(first, label=label) for label in ("one", "two")]

    peers = {"peer": peer, "wrong": wrong}
    forward = replace(LAYER_NORM, name="made_up", peers=peers, samples=two(LAYER_NORM))
    backward = replace(
        LAYER_NORM_BACKWARD,
        name="made_up_backward",
        backward_of="made_up",
        samples=two(LAYER_NORM_BACKWARD),
    )
    for op in (forward, backward):
        monkeypatch.setitem(REGISTRY, op.name, op)
    monkeypatch.setattr(kernels, "made_up", made_up, raising=False)
    # Other processes, which know nothing of these ops.
    monkeypatch.setattr(tune.configs, "tune", lambda *_: None)
    monkeypatch.delenv("VITKERN_TUNED", raising=False)
    return [forward, backward]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_what_is_right_and_fastest_is_written(ops: list[Op], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "cpu.json"
    command = ["tune", "--device", "cpu", "--out", str(path), "--op", *(op.name for op in ops)]
    assert main(command) == 1
    assert "FAILED" in capsys.readouterr().out
    table = read(path)
    assert (table["schema"], table["gpu"], table["verified"]) == (_tuned.SCHEMA, "cpu", {})
    forward, backward = table["entries"]
    bucket = "m16x96 96 96"
    assert (forward["op"], forward["bucket"]) == ("made_up", bucket)
    assert (backward["op"], backward["bucket"]) == ("made_up", f"{bucket} grad")
    for entry, name in ((forward, "made_up"), (backward, "made_up_backward")):
        assert list(entry["cases"]) == [f"{name} [one] float32", f"{name} [two] float32"]
        for case in entry["cases"].values():
            assert set(case["seconds"]) == {"torch", "peer"}  # what is wrong gets no time
            assert min(case["seconds"].values()) > 0
        assert entry["implementation"] == _tuned.fastest(_tuned.totals(entry["cases"]))
    assert table["runs"][0]["torch"] == _measure.environment(CPU)["packages"]["torch"]


def test_the_table_is_what_choose_reads(
    ops: list[Op], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {run: name for name, run in ops[0].implementations.items()}
    monkeypatch.setattr(tune, "seconds_of", lambda case, run, *_: TIMES[names[run]])
    tune.main(1.0, ops[:1], tmp_path / "cpu.json", CPU, again=False)
    monkeypatch.setattr(_tuned, "card", lambda device: "cpu")
    monkeypatch.setattr(_tuned, "_tables", {})
    monkeypatch.setattr(_op, "_on_gpu", lambda tensors: True)
    monkeypatch.setenv("VITKERN_TUNED", str(tmp_path))
    arguments = next(iter(ops[0].samples("tiny"))).make("cpu", torch.float32)
    tensors = [v for v in arguments.values() if isinstance(v, Tensor)]
    with _op.record_choices() as choices:
        choose(ops[0], "auto", *tensors, unfit={"peer": None})
    assert (choices[0].implementation, choices[0].why) == (
        "peer",
        "measured on this card: peer 40 us, torch 60 us",
    )


def test_a_run_goes_on_where_the_last_one_stopped(
    ops: list[Op], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, measured = tmp_path / "cpu.json", []

    def counted(case: _cases.Case, *args: Any) -> str:
        measured.append(str(case))
        return tune_case(case, *args)

    def run(**changed: Any) -> list[str]:
        measured.clear()
        options = {"minutes": 1.0, "ops": ops, "out": path, "device": CPU, "again": False}
        tune.main(**{**options, **changed})
        return list(measured)

    tune_case = tune.tune_case
    monkeypatch.setattr(tune, "tune_case", counted)
    first = run(ops=ops[:1])
    assert first == ["made_up [one] float32", "made_up [two] float32"]
    before = read(path)
    assert run() == ["made_up_backward [one] float32", "made_up_backward [two] float32"]
    assert read(path)["entries"][: len(before["entries"])] == before["entries"]
    assert run() == []
    assert run(ops=ops[:1], again=True) == first
    assert run(minutes=1e-9, again=True) == []
    assert "out of time: 4 cases are left" in capsys.readouterr().out
    about = _measure.environment(CPU)
    monkeypatch.setattr(tune, "environment", lambda device: {**about, "commit": "another"})
    assert run(ops=ops[:1]) == first
    entry = next(e for e in read(path)["entries"] if not e["bucket"].endswith("grad"))
    runs = {case["run"] for case in entry["cases"].values()}
    assert [read(path)["runs"][n]["commit"] for n in runs] == ["another"]


def test_one_case_does_not_end_the_run(
    ops: list[Op], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: _cases.Case, *args: Any) -> float:
        if "one" in str(case):
            raise RuntimeError("broken")
        return 1e-5

    monkeypatch.setattr(tune, "seconds_of", broken)
    assert tune.main(1.0, ops, tmp_path / "cpu.json", CPU, again=False) == 1
    cases = [case for entry in read(tmp_path / "cpu.json")["entries"] for case in entry["cases"]]
    assert cases == ["made_up [two] float32", "made_up_backward [two] float32"]


def test_a_backward_case_counts_both_passes(ops: list[Op]) -> None:
    case = _cases.Case(ops[1], "tiny", next(iter(ops[1].samples("tiny"))), torch.float32)
    arguments, grads = case.arguments("cpu"), []

    class Timer:
        device = CPU

        def __call__(self, call: Callable[[], Any]) -> Any:
            grads.append((torch.is_grad_enabled(), isinstance(call(), tuple)))
            return _measure.Stats(len(grads), 0, 0, 1)

    run = _cases.implementations(case)["torch"]
    assert tune.seconds_of(case, run, arguments, Timer()) == 1 + 2
    assert grads == [(False, True), (True, False)]  # gradients, then a result with a graph


def test_verdicts_are_shipped_in_the_table(
    ops: list[Op], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_tuned, "card", lambda device: "made-up-gpu")
    monkeypatch.setattr(_verified, "_verdicts", {})
    monkeypatch.setitem(REGISTRY, "made_up", replace(ops[0], call=LAYER_NORM.portable))
    draft = tune.Draft(tmp_path / "cpu.json", CPU)
    draft.verify(REGISTRY["made_up"], "triton", torch.float32, CPU)
    draft.save()
    ((name, verdict),) = read(tmp_path / "cpu.json")["verified"].items()
    assert name.startswith("made-up-gpu made_up triton torch.float32")
    assert _verified.Verdict(**verdict).ok


def test_errors(ops: list[Op], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert main(["tune", "--device", "cpu", "--minutes", "0"]) == 2
    assert "--minutes: must be above 0" in capsys.readouterr().err
    assert main(["tune", "--op", "nothing"]) == 2
    assert "unknown op 'nothing'" in capsys.readouterr().err
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema": 1, "gpu": "H100", "runs": [], "entries": []}))
    command = ["tune", "--device", "cpu", "--out", str(path)]
    with pytest.warns(UserWarning, match="a.json is ignored"):
        assert main(command) == 2
    assert "a.json holds no table of schema 1" in capsys.readouterr().err
    path.write_text(json.dumps({**read(path), "verified": {}}))
    assert main(command) == 2
    assert "a.json is of H100, and this is cpu" in capsys.readouterr().err


def test_a_process_that_dies_or_hangs_costs_one_answer() -> None:
    with Worker({"VITKERN_TEST": "here"}) as worker:
        assert worker.ask(os.getenv, "VITKERN_TEST", timeout=60) == "here"
        first = worker.ask(os.getpid, timeout=60)
        with pytest.raises(Raised, match="ValueError: invalid literal"):
            worker.ask(int, "x", timeout=60)
        assert worker.ask(os.getpid, timeout=60) == first
        with pytest.raises(Died, match="exit code 7"):
            worker.ask(os._exit, 7, timeout=60)
        assert worker.ask(os.getpid, timeout=60) != first
        with pytest.raises(Died, match="no answer within 0 s"):
            worker.ask(time.sleep, 600, timeout=0.1)
        assert worker.ask(os.getpid, timeout=60) != first


CARD = ((9, 0), 132)
TRAIN = [(256, True)]
SMALL = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "num_classes": 5, "depth": 2}


@pytest.fixture(scope="module")
def of_steps() -> list[places.Place]:
    return [p for s in places.STAGES for p in places.of_steps(REGISTRY.values(), s, *CARD)]


def of_large(label: str) -> bool:
    return label.startswith("large ")


def test_the_places_of_steps_are_launched_in_order() -> None:
    found = places.of_steps(REGISTRY.values(), TRAIN, *CARD)
    longest = {large: max(p.worth for p in found if of_large(p.label) == large) for large in (0, 1)}
    kinds = [
        (
            place.worth < places.TRIFLE * longest[of_large(place.label)],
            place.impl != "triton",
            of_large(place.label),
            -place.worth,
        )
        for place in found
    ]
    assert kinds == sorted(kinds)
    assert len({kind[:3] for kind in kinds}) == 8
    assert len({str(place) for place in found}) == len(found)
    for place in found:
        asked = places.looked_at(place, *CARD, {})
        without = [question.key[0] for question, launches in asked if not launches]
        passes = place.op in ("attention_backward", "attention_pool_backward")
        assert without == (["attention.passes"] if passes else []), place


@pytest.mark.skipif(not INTERPRET, reason="the ops have no kernels on a CPU")
@pytest.mark.parametrize("name", places.MODELS)
@pytest.mark.parametrize("pool", places.POOLS)
@pytest.mark.parametrize("grad", [True, False], ids=["train", "forward"])
def test_whatever_a_model_asks_is_tuned(
    of_steps: list[places.Place], name: str, pool: str, grad: bool
) -> None:
    """Of a model of more blocks, with other images, by its own launches."""

    def kind(key: _tuned.Key) -> tuple[str, str]:
        return key[0], _tuned.without_size(key[1])[0]

    tuned = {kind(q.key) for place in of_steps for q, _ in places.looked_at(place, *CARD, {})}
    ours = ("patch_embed", "norm_linear", "attention", "attention_pool", "linear_residual")
    impl = dict.fromkeys((*ours, "layer_norm"), "triton")
    with torch.device("meta"):
        model = vitkern.create_model(name, depth=6, global_pool=pool, impl=impl)
    model.to_empty(device="cpu")
    with intercept(lambda launch: None, *CARD), record() as asked:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            logits = model(torch.zeros(2, 3, 224, 224))
        if grad:
            logits.sum().backward()
    assert len({kind(question.key) for question in asked}) >= (10 if grad else 5)
    assert {kind(question.key) for question in asked} - tuned == set()


@pytest.mark.parametrize(
    ("name", "label", "kernel"),
    [
        ("norm_linear", "ln 64x197x768 ->  2304 saved given statistics", "linear.forward"),
        ("linear_residual_backward", "64x197x768 -> 768 statistics", "linear.input_grad"),
        ("patch_embed", "128x3x224x224 /16x16 D=768", "patch_embed.forward"),
        ("patch_embed_backward", "128x3x224x224 /16x16 D=768", "patch_embed.weight_grad"),
    ],
)
def test_operands_that_are_cast_have_a_bucket_of_their_own(
    of_steps: list[places.Place], name: str, label: str, kernel: str
) -> None:
    """float32 in place of 16 bits takes twice the bytes, and shared memory."""
    cast = next(place for place in of_steps if (place.op, place.impl) == (name, "triton"))
    plain = replace(cast, label=label, sample=None)
    buckets = [
        next(q.key[1].split() for q, _ in places.looked_at(p, *CARD, {}) if q.key[0] == kernel)
        for p in (plain, cast)
    ]
    assert "cast" in set(buckets[1]) - set(buckets[0])


def small_calls(train: bool = True) -> list[places.Call]:
    step = places.Step(places.MODELS[0], 2, train)
    with intercept(lambda launch: None, (8, 0), 108):
        return step.calls(torch.float16, **SMALL)


@pytest.mark.skipif(not INTERPRET, reason="the ops have no kernels on a CPU")
def test_a_call_of_a_step_is_held_against_float64() -> None:
    calls = dict.fromkeys(small_calls())
    assert {call.op for call in calls} >= {"norm_linear_backward", "attention_pool_backward"}
    for call in calls:
        sample = call.sample(str(call))
        place = places.Place(call.op, "triton", "vit", sample.label, "float16", sample=sample)
        bench = configs.Bench(place, CPU, _measure.Timer(CPU))
        verdict = _measure.parity(bench.call({})(), bench.eager, bench.exact)
        assert verdict["ok"], (place, verdict)


def test_an_argument_lies_as_the_model_had_it() -> None:
    rows = torch.empty(4, 5, 8)[:, :1]
    spread = torch.empty(4, 1, 1).expand(4, 3, 8)
    for given in (rows, spread):
        arg = places.laid(given)
        for device in ("cpu", "meta"):
            made = arg.make(torch.device(device), torch.float16, torch.Generator())
            assert (made.shape, made.stride()) == (given.shape, given.stride())
            assert made.dtype == torch.float32
    same = [
        replace(places.laid(rows), offset=3.0).make(CPU, HALF, torch.Generator()) for _ in range(2)
    ]
    assert torch.equal(*same)
    assert 2 < float(same[0].mean()) < 4


def test_implementations_of_steps_come_first() -> None:
    found = tune.ordered(REGISTRY.values(), "vit", [torch.bfloat16], [TRAIN], CARD)
    first = [case for case in found if isinstance(case, places.StepCase)]
    assert found[: len(first)] == first
    assert len(found[len(first) :]) == len(
        list(_cases.cases(REGISTRY.values(), ["vit"], [torch.bfloat16]))
    )
    assert {case.op.name for case in first} >= {"norm_linear_backward", "attention_pool_backward"}
    order = [(of_large(case.sample.label), -places.seconds(case)) for case in first]
    assert order == sorted(order)
    assert len({str(case) for case in found}) == len(found)


@pytest.mark.parametrize("train", [True, False])
def test_whatever_a_model_chooses_is_measured(
    train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the very names that the model's calls have in a table."""
    calls = places.Step.calls
    monkeypatch.setattr(places.Step, "calls", lambda self: calls(self, **SMALL))
    monkeypatch.setattr(places, "MODELS", places.MODELS[:1])
    monkeypatch.setattr(places, "POOLS", ("token",))
    monkeypatch.setattr(tune, "seconds_of", lambda *_: 1.0)
    fast = {"torch", "sdpa"}  # nobody needs the others, interpreted, here
    monkeypatch.setattr(
        tune,
        "implementations",
        lambda case: {k: f for k, f in _cases.implementations(case).items() if k in fast},
    )
    draft, failed = tune.Draft(tmp_path / "cpu.json", CPU), list[Any]()
    for case in places.step_cases(REGISTRY.values(), [(2, train)], (8, 0), 108):
        tune.tune_case(case, draft, _measure.Timer(CPU), lambda *why: failed.append(why))
    assert failed == []
    model = vitkern.create_model(places.MODELS[0], **SMALL)
    autocast = torch.autocast("cpu", torch.bfloat16)
    with _op.record_choices() as choices, autocast, torch.set_grad_enabled(train):
        model(torch.zeros(2, 3, 32, 32))
    asked = {(c.op, c.bucket, _op.dtype_name(c.dtype)) for c in choices if c.op in REGISTRY}
    measured = {(e["op"], e["bucket"], e["dtype"]) for e in draft.entries}
    assert len(asked) >= 6
    assert asked == measured


@pytest.mark.skipif(not INTERPRET, reason="the ops have no kernels on a CPU")
@pytest.mark.parametrize("statistics", [True, False])
def test_who_leaves_no_statistics_pays_for_them(
    statistics: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, bool] = {}
    names = {run: name for name, run in REGISTRY["linear_residual"].implementations.items()}

    def seconds_of(case: Any, run: Any, arguments: dict[str, Any], timer: Any) -> float:
        asked[names[run]] = arguments["need_stats"]
        return 2.0

    class Card:  # a CPU that passes for one
        device = type("Device", (), {"type": "cuda"})

        def __call__(self, run: Callable[[], Any]) -> _measure.Stats:
            return _measure.Stats(1.0 if run().shape == (2, 1, 10) else 0.0, 0, 0, 1)

    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    pay = tune.statistics_seconds
    monkeypatch.setattr(tune, "statistics_seconds", lambda given, _: pay(given, Card()))
    samples = REGISTRY["linear_residual"].samples("tiny")
    sample = next(s for s in samples if s.args["residual"].shape == (2, 5, 16))
    sample = replace(sample, options={"need_stats": statistics})
    case = _cases.Case(REGISTRY["linear_residual"], "tiny", sample, torch.float32)
    draft = tune.Draft(tmp_path / "cpu.json", CPU)
    tune.tune_case(case, draft, _measure.Timer(CPU), lambda *_: None)
    (entry,) = draft.entries
    (measured,) = entry["cases"].values()
    assert measured["seconds"] == {"triton": 2.0, "cublas": 2.0, "torch": 2.0 + statistics}
    assert asked == {"triton": statistics, "cublas": statistics, "torch": False}


@pytest.mark.parametrize("name", ["norm_linear", "linear_residual"])
def test_a_float32_stream_has_entries_of_its_own(name: str) -> None:
    found = set()
    for stream in (torch.float32, torch.bfloat16):
        x, weight = torch.zeros(1, 2, 8, dtype=stream), torch.zeros(8, 8, dtype=torch.bfloat16)
        with _op.record_choices() as choices:
            if name == "norm_linear":
                kernels.norm_linear(x, weight)
            else:
                kernels.linear_residual(x.bfloat16(), weight, None, x)
        found.add((choices[0].bucket, choices[0].dtype))
    assert found == {("m2 n8 k8 wide", torch.bfloat16), ("m2 n8 k8", torch.bfloat16)}


PLACE = places.Place("layer_norm", "triton", "tiny", "ln 2x5x96", "float32")
DEFAULT = forward_config(96)
OTHERS = [config for config in forward_candidates(96) if config != DEFAULT]
BEST, SECOND, WRONG, DEADLY, SPILLING, *_ = OTHERS


class Scripted:
    """Stands in for the process that has the GPU; `times` are by config, 1 where none is given."""

    def __init__(self, times: dict[Any, float]) -> None:
        self.times, self.closed = times, 0
        self.asked: list[Any] = []

    def seconds(self, given: configs.Configs) -> float:
        (config,) = given.values()
        self.asked.append(config)
        return self.times.get(config, 1.0)

    def ask(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        if function is configs.compare:
            _, _, default, best = arguments
            return {
                "default": self.seconds(default),
                "again": self.times.get("again", 1.0),
                "config": self.times.get("config", self.seconds(best)),
            }
        _, _, given, *_ = arguments
        seconds = self.seconds(given)
        if self.asked[-1] == DEADLY:
            raise Died("the process ended with exit code -6")
        if self.asked[-1] == DEFAULT and arguments[-1] < self.times.get("excess", 0):
            return {"ok": False, "why": "error 2, budget 1", "excess": self.times["excess"]}
        if self.asked[-1] == WRONG:
            return {"ok": False, "why": "error 1, budget 0", "lost": True}
        return {"ok": True, "seconds": seconds}

    def close(self) -> None:
        self.closed += 1


class Compiled:
    """Stands in for the compilers."""

    def submit(self, *arguments: Any) -> "Future[list[str]]":
        future: Future[list[str]] = Future()
        future.set_result(["spills 8 bytes"] if arguments[-1] == SPILLING else [])
        return future


def tuner(path: Path, worker: Any, end: float, add: Any, fail: Any) -> configs.Tuner:
    compiler: Any = Compiled()
    draft, until = tune.Draft(path, CPU), time.monotonic() + end
    return configs.Tuner(draft, "cpu", until, worker, compiler, add, fail, (8, 0), 108)


def tuned(
    path: Path, times: dict[Any, float], end: float = 60, again: bool = False
) -> tuple[Scripted, list[dict[str, Any]], list[str]]:
    """(what was asked, the rows, what failed) of one place, in a table at `path`."""
    worker = Scripted(times)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    made = tuner(path, worker, end, rows.append, lambda what, _: failed.append(what))
    made.chosen |= {} if again else configs.known(made.draft)
    made.work([PLACE])
    return worker, rows, failed


def test_the_fastest_right_config_is_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpu.json"
    times = {BEST: 0.8, SECOND: 0.9, WRONG: 0.1, DEADLY: 0.1, SPILLING: 0.1}
    worker, (row,), failed = tuned(path, times)
    assert SPILLING not in worker.asked
    assert failed == ["norm.forward m16 d96"] * 2
    assert worker.closed == 1  # the GPU was lost to it, and it was still there
    assert len(row["candidates"]) == len(OTHERS) + 1
    (entry,) = read(path)["configs"]
    assert entry["config"] == asdict(BEST) == row["config"]
    assert (entry["kernel"], entry["bucket"], entry["dtype"]) == (
        "norm.forward", "m16 d96", "float32",
    )  # fmt: skip
    monkeypatch.delenv("VITKERN_TUNED", raising=False)
    contents = tune.Draft(path, CPU).launch_configs()
    with _tuned.using(CPU, contents):
        arguments = PLACE.case().meta()
        seen: list[Any] = []
        with intercept(seen.append):
            monkeypatch.setitem(_tuned._tables, torch.device("meta"), contents)
            PLACE.launcher()(**arguments)
    assert (seen[0].constexprs["ROWS"], seen[0].num_warps) == (BEST.rows, BEST.num_warps)


@pytest.mark.parametrize(
    "times",
    [
        {BEST: 0.99},  # too little
        {BEST: 0.9, "again": 0.88},  # no more than the default differs from itself
        {BEST: 0.9, "config": 1.1},  # not where both are timed in turns
        {},
    ],
)
def test_the_default_stays_where_nothing_is_clearly_faster(
    tmp_path: Path, times: dict[Any, float]
) -> None:
    path = tmp_path / "cpu.json"
    tuned(path, times)
    (entry,) = read(path)["configs"]
    assert entry["config"] == entry["default"] == asdict(DEFAULT)


def test_a_default_beyond_its_budget_is_told_and_tuned(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    _, (row,), failed = tuned(path, {BEST: 0.5, "excess": 2.0})
    assert row["candidates"][0] == {
        "config": asdict(DEFAULT), "ok": False, "why": "error 2, budget 1", "excess": 2.0,
    }  # fmt: skip
    assert len(failed) == 3
    assert row["config"] == asdict(BEST)


def test_configs_are_tuned_once(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    assert tuned(path, {BEST: 0.5}, end=-1)[1] == []
    assert read(path)["configs"] == [] if path.exists() else True
    assert tuned(path, {BEST: 0.5})[1]
    assert tuned(path, {SECOND: 0.5})[1] == []
    tuned(path, {SECOND: 0.5}, again=True)
    assert [entry["config"] for entry in read(path)["configs"]] == [asdict(SECOND)]


def test_a_broken_gpu_ends_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: Any, **__: Any) -> Any:
        raise Died("gone")

    monkeypatch.setattr(Scripted, "ask", dead)
    everywhere = list(places.of_samples([LAYER_NORM], "tiny", [torch.float32]))
    made = tuner(tmp_path / "cpu.json", Scripted({}), 60, lambda _: None, lambda *_: None)
    left = made.work(everywhere)
    assert made.lost == configs.LOST
    assert left > 0


def cache_misses() -> dict[str, int]:
    """Files that a launch adds to those of who compiled ahead, by kernel: another process's."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Card:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Card())
    folder, found = Path(os.environ["TRITON_CACHE_DIR"]), {}
    for label in (
        "ln 128x197x768",
        "gelu 64x197x768 -> 3072 saved",
        "64x197x768 -> 768 statistics",
    ):
        op = {"ln": "layer_norm", "gelu": "linear_act"}.get(label.split()[0], "linear_residual")
        impl = "gluon" if op == "linear_residual" and gluon().missing is None else "triton"
        place = places.Place(op, impl, "vit", label, "bfloat16")
        for question, launches in places.looked_at(place, (9, 0), 132, {}):
            assert ahead.compiled(place, (9, 0), 132, question.key, question.default) == []
            before = set(folder.iterdir())
            for launch in launches:
                launch.kernel.warmup(
                    *launch.args, grid=launch.grid, **launch.constexprs, **_offline._options(launch)
                )
                found[launch.kernel.fn.__name__] = len(set(folder.iterdir()) - before)
    return found


def test_what_is_compiled_ahead_is_what_a_launch_finds(tmp_path: Path) -> None:
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    with Worker(variables) as worker:
        found = worker.ask(cache_misses, timeout=120)
    gemm = {} if gluon().missing else {"gemm_kernel": 0, "statistics_kernel": 0}
    assert found == {"_norm_forward_kernel": 0, "persistent_forward_kernel": 0, **gemm}


def test_the_whole_stage_in_processes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but for the interpreter; of one kernel, and two alternatives."""

    def one(*_: Any) -> Iterator[places.Place]:
        yield PLACE

    monkeypatch.setattr(configs, "of_samples", one)
    monkeypatch.setattr("vitkern.kernels._norm.forward_candidates", lambda _: OTHERS[:2])
    rows: list[dict[str, Any]] = []
    draft, end = tune.Draft(tmp_path / "cpu.json", CPU), time.monotonic() + 60
    configs.tune(draft, [LAYER_NORM], CPU, end, False, rows.append, print, processes=1)
    (row,) = rows
    assert [c["ok"] for c in row["candidates"]] == [True] * 3
    assert len(read(tmp_path / "cpu.json")["configs"]) == 1


def test_two_launches_instead_of_one_bring_kernels_of_their_own(tmp_path: Path) -> None:
    place = places.Place(
        "attention_backward", "triton", "vit", "B=64 N=197 H=12 d=64", "bfloat16", 4
    )
    asked: list[str] = []

    class Two(Scripted):
        def ask(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
            """Two launches take half of the time; no kernel is faster by another config."""
            _, _, *given = arguments
            single = [
                config.single for key, config in given[0].items() if key[0] == "attention.passes"
            ]
            asked.extend(key[0] for key in given[0])
            if function is configs.compare:
                return {"default": 1.0, "again": 1.0, "config": 0.5}
            return {"ok": True, "seconds": 1.0 if single == [True] else 0.5}

    rows: list[dict[str, Any]] = []
    made = tuner(tmp_path / "cpu.json", Two({}), 60, rows.append, lambda *_: None)
    made.target, made.processors = (9, 0), 132
    assert made.work([place]) == 0
    assert [row["kernel"] for row in rows] == [
        "attention.passes", "attention.query", "attention.key", "attention.backward",
    ]  # fmt: skip
    assert {"attention.query", "attention.key"} <= set(asked)
    passes, *_ = read(tmp_path / "cpu.json")["configs"]
    assert passes["config"] == {"single": False}


def test_arguments_follow_what_was_asked_as_they_were_made() -> None:
    sample = "B=2 Q=1 N=5 H=2 d=8"
    place = places.Place("attention_pool_backward", "triton", "tiny", sample, "float32")
    case = place.case()
    saved = REGISTRY["attention_pool_backward"]
    made = replace(case.sample, derive=next(
        s.derive for s in saved.samples("vit") if s.derive is not None
    ))  # fmt: skip
    bench = configs.Bench(place, CPU, _measure.Timer(CPU))
    bench.case = replace(case, sample=made)
    with record() as asked:
        made.make("cpu", torch.float32)
    (question,) = asked
    bench.early = {question.key: question.default}
    (other,) = question.candidates()
    assert bench.arguments({})["stats"] is None
    assert bench.arguments({question.key: other})["stats"] is not None
    for config in (question.default, other):
        verdict = _measure.parity(bench.call({question.key: config})(), bench.eager, bench.exact)
        assert verdict["ok"]
