"""The tuner, rehearsed on a CPU: what it writes is what `choose` looks up."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import _cases, _measure, tune
from benchmarks.__main__ import main
from vitkern import kernels
from vitkern.kernels import REGISTRY, _op, _tuned, _verified
from vitkern.kernels._op import Op, choose

LAYER_NORM, LAYER_NORM_BACKWARD = REGISTRY["layer_norm"], REGISTRY["layer_norm_backward"]
CPU = torch.device("cpu")
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
