"""``make gpu``: its steps, what ends one, what is told of it, and all of it rehearsed on a CPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import _gpu
from benchmarks._contest import Row
from tests.test_benchmarks import CPU, Clock


def step_of(code: str, **options: Any) -> _gpu.Step:
    return _gpu.Step("a step", 1.0, lambda _: ["-c", code], **options)


def test_a_step_is_held_to_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "PATIENCE", 1)
    with (tmp_path / "steps.log").open("w") as output:
        ok = _gpu.run(step_of("print('hello')"), 60, output, tmp_path)
        bad = _gpu.run(step_of("raise SystemExit(3)"), 60, output, tmp_path)
        nothing = _gpu.run(step_of("raise SystemExit(5)", good=(0, 5)), 60, output, tmp_path)
        begun = time.monotonic()
        stubborn = (
            "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
        )
        late = _gpu.run(step_of(stubborn), 2, output, tmp_path)
        assert time.monotonic() - begun < 20
        missing = _gpu.run(step_of("", needs=("json", "no_such_thing")), 60, output, tmp_path)
        none_left = _gpu.run(step_of(""), -1, output, tmp_path)
        code = f"import os; assert os.environ['A'] + os.environ['VITKERN_TUNED'] == 'b{tmp_path}'"
        told = _gpu.run(step_of(code, variables={"A": "b"}), 60, output, tmp_path)
    assert (ok["ok"], bad["ok"], nothing["ok"], told["ok"]) == (True, False, True, True)
    assert bad["why"].startswith("exit code 3")
    assert late == {"ok": None, "why": "unfinished after 2 s; see steps.log"}
    assert missing["why"] == "left out: no_such_thing missing"
    assert none_left["why"] == "left out: no time remains"
    assert "hello" in (tmp_path / "steps.log").read_text()


def test_the_gpu_command_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = json.dumps({"kind": "absent", "impl": "x", "why": "y"})
    writes = f"open({str(tmp_path / 'results.jsonl')!r}, 'a').write({row!r} + chr(10))"
    monkeypatch.setattr("benchmarks._proxies.proxies", list)
    monkeypatch.setattr(
        _gpu, "steps", lambda *_: [step_of("raise SystemExit(1)"), step_of(writes)]
    )  # fmt: skip
    assert _gpu.main(1.0, tmp_path, CPU) == 1
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["kind"], r.get("ok")) for r in rows] == [
        ("about", None),
        ("step", False),
        ("absent", None),
        ("step", True),
    ]
    assert "FAILED: exit code 1" in capsys.readouterr().out
    assert "a step" in (tmp_path / "report.md").read_text()


def test_the_gpu_commands_steps_begin_with_what_is_right() -> None:
    every = _gpu.steps(Path("out"), "cuda")
    names = [step.what for step in every]
    assert names.index("tests") < names.index("kernels") < names.index("models")
    assert names.index("training") < names.index("tune") < names.index("models")
    for step in every:
        assert all(isinstance(word, str) for word in step.argv(60.0))
    chosen = _gpu.choose(every, ["models", "tests"])
    assert [step.what for step in chosen] == ["tests", "models"]
    with pytest.raises(ValueError, match="--steps: unknown step 'model'; expected some of native"):
        _gpu.choose(every, ["model"])


def test_a_step_gets_its_share_of_what_the_others_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, given = Clock(), []
    takes = {"a": 10.0, "b": 300.0, "c": 1.0}

    def run(step: _gpu.Step, seconds: float, output: Any, tables: Path) -> Row:
        given.append((step.what, seconds))
        clock.now += takes[step.what]
        return {"ok": True, "why": ""}

    shares = {"a": 25, "b": 50, "c": 25}
    made = [_gpu.Step(name, share, lambda _: []) for name, share in shares.items()]
    monkeypatch.setattr(_gpu, "steps", lambda *_: made)
    monkeypatch.setattr(_gpu, "run", run)
    monkeypatch.setattr("benchmarks._proxies.proxies", list)
    assert _gpu.main(10.0, tmp_path, CPU, clock=clock) == 0
    assert given == [("a", 150.0), ("b", 590 * 2 / 3), ("c", 290.0)]


def test_failures_before_a_cut_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = [("a", "passed"), ("b", "failed"), ("b", "failed"), ("c", "skipped"), ("d", "failed")]
    lines = [json.dumps({"test": test, "outcome": outcome}) for test, outcome in ended]
    (tmp_path / "tests.jsonl").write_text(lines[1])  # of another run

    def run(step: _gpu.Step, seconds: float, output: Any, tables: Path) -> Row:
        if step.what == "tests":
            assert not (tmp_path / "tests.jsonl").exists()
            (tmp_path / "tests.jsonl").write_text("\n".join([*lines, '{"test": "e", "ou']))
        words = {"level": "model", "group": "g", "impl": "vitkern", "ours": True, "own": True}
        row = {"kind": "time", **words, "parity": {"ok": False, "why": "nan"}}
        with (tmp_path / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        return {"ok": None, "why": "unfinished"}

    made = [_gpu.Step(name, 1, lambda _: []) for name in ("tests", "ops", "models", "tune")]
    monkeypatch.setattr(_gpu, "steps", lambda *_: made)
    monkeypatch.setattr(_gpu, "run", run)
    monkeypatch.setattr("benchmarks._proxies.proxies", list)
    assert _gpu.main(1.0, tmp_path, CPU) == 1
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["what"]: (r["ok"], r["why"]) for r in rows if r["kind"] == "step"} == {
        "tests": (False, "2 of 4 tests failed; unfinished"),
        "ops": (None, "unfinished"),
        "models": (False, "1 of ours are wrong; unfinished"),
        "tune": (None, "unfinished"),
    }
    (counted,) = [r["tests"] for r in rows if "tests" in r]
    assert counted == {"passed": 1, "failed": 2, "skipped": 1}


def test_each_tests_outcome_is_on_disk_at_once(tmp_path: Path) -> None:
    """Where the run is killed, too."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "conftest.py").write_text((_gpu.ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_few.py").write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "def test_wrong(): assert 'this' == 'that'\n"
        "def test_last(): os._exit(3)\n"
    )
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    subprocess.run([*argv, f"--outcomes={tmp_path / 'tests.jsonl'}"], cwd=folder, check=False)
    assert _gpu.tested(tmp_path) == {"passed": 1, "skipped": 1, "failed": 1}
    last = json.loads((tmp_path / "tests.jsonl").read_text().splitlines()[-1])
    assert last["test"].endswith("test_wrong")
    assert "this" in last["why"]


@pytest.mark.parametrize("passed", [0, 1])
def test_on_a_gpu_all_skipped_is_not_right(
    passed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(step: _gpu.Step, seconds: float, output: Any, tables: Path) -> Row:
        outcome = "passed" if passed else "skipped"
        (tmp_path / "tests.jsonl").write_text(json.dumps({"test": "a", "outcome": outcome}))
        return {"ok": True, "why": "exit code 0"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_gpu, "environment", lambda device: {})
    monkeypatch.setattr(_gpu, "steps", lambda *_: [_gpu.Step("tests", 1, lambda _: [])])
    monkeypatch.setattr(_gpu, "run", run)
    monkeypatch.setattr(_gpu, "_report", SimpleNamespace(main_report=lambda *_, **__: 0))
    monkeypatch.setattr("benchmarks._proxies.add", lambda log: None)
    _gpu.main(1.0, tmp_path, torch.device("cuda"))
    (row,) = [r for r in map(json.loads, (tmp_path / "results.jsonl").open()) if "tests" in r]
    assert row["ok"] is (True if passed else None)
    assert ("no test ran" in row["why"]) is not passed


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal on a CPU")
def test_the_gpu_command_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    assert _gpu.main(10.0, tmp_path, CPU) == 0, (tmp_path / "steps.log").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {row["what"]: row["why"] for row in rows if row["kind"] == "step"}
    assert len(found) == len(_gpu.steps(tmp_path, "cpu"))
    assert not [why for why in found.values() if "cut off" in why], found
    assert {row["level"] for row in rows if row["kind"] == "time"} == {"op", "model"}
    assert json.loads((tmp_path / "tuned" / "cpu.json").read_text())["entries"]
    assert "toy b2 train" in (tmp_path / "report.md").read_text()
