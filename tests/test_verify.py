"""Kernels checked in worker processes, and the page that is made of what was found.

Faults are planted in the workers, which are new processes: each case names the function that lives
in them.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._verify import kernels, page
from benchmarks._verify.kernels import serve
from vitkern.kernels import REGISTRY, _tuned, _verified
from vitkern.kernels._op import Op

CPU = torch.device("cpu")
LAYER_NORM = REGISTRY["layer_norm"]
FED = "VITKERN_TEST_FED"  # a file that is there once memory has run out
OPS = ["layer_norm", "layer_norm_backward", "add_layer_norm"]
Row = dict[str, Any]


def serve_faulty(pipe: Any, device: torch.device, repeats: int) -> None:
    """A worker with one fault in each dtype of three ops but the last, where nothing is wrong."""
    calls, lost = count(1), list[bool]()

    def unwritten(y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        out[1:] = y[1:]
        return out

    def unsteady(y: Tensor) -> Tensor:
        return torch.nextafter(y, y + 1) if next(calls) == 37 else y

    def dies(y: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGSEGV)
        return y

    def hangs(y: Tensor) -> Tensor:
        time.sleep(1000)
        return y

    def loses_the_gpu(y: Tensor) -> Tensor:  # for good, in this process
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def starves_at_first(y: Tensor) -> Tensor:
        if not fed.exists():
            fed.touch()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return y

    fed = Path(os.environ[FED])
    kernels.healthy = lambda device: not lost
    faults = {
        ("layer_norm", torch.float16): unwritten,
        ("layer_norm", torch.float32): unsteady,
        ("layer_norm_backward", torch.float16): dies,
        ("layer_norm_backward", torch.float32): hangs,
        ("add_layer_norm", torch.float16): loses_the_gpu,
        ("add_layer_norm", torch.float32): starves_at_first,
    }

    def planted(op: Op) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            y = op.portable(**arguments)
            dtype = next(t.dtype for t in arguments.values() if isinstance(t, Tensor))
            fault = faults.get((op.name, dtype))
            return fault(y) if fault else y

        return call

    for name in OPS:
        REGISTRY[name] = replace(REGISTRY[name], call=planted(REGISTRY[name]))
    serve(pipe, device, repeats)


def rows(path: Path, kind: str = "verified") -> list[Row]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in found if row["kind"] == kind]


def check(folder: Path, **options: Any) -> int:
    results, table = folder / "results.jsonl", folder / "tuned.json"
    return kernels.main(results, table, CPU, **options)


def test_interpreted_kernels_end_to_end(tmp_path: Path, capsys: Any) -> None:
    options: Row = {"ops": ["layer_norm"], "repeats": 2, "processes": 1}
    before = os.environ.get("TRITON_INTERPRET")
    assert check(tmp_path, **options) == 0
    assert os.environ.get("TRITON_INTERPRET") == before
    found = rows(tmp_path / "results.jsonl")
    samples = len(list(LAYER_NORM.samples("tiny")))
    assert [(row["dtype"], row["precision"], row["ok"]) for row in found] == [
        ("float32", "ieee", True),
        ("float16", "", True),
    ]
    for row in found:
        assert (row["samples"], row["repeats"], row["poisoned"]) == (samples, 2, True)
        assert 0 < row["error"] <= row["budget"]
    assert rows(tmp_path / "results.jsonl", "about")
    table = _tuned.read(tmp_path / "tuned.json")
    assert table is not None
    key = _verified.key(LAYER_NORM, "triton", torch.float16, "cpu")
    assert _verified.Verdict(**table.verified[key]).ok
    assert "2 of 2 checked on cpu, 0 wrong" in capsys.readouterr().out

    # What is settled isn't done again; with more repeats than there were, it is.
    assert check(tmp_path, **options) == 0
    assert "2 settled before" in capsys.readouterr().out
    assert len(rows(tmp_path / "results.jsonl")) == 2
    assert not kernels.settled(tmp_path / "results.jsonl", 3)


@pytest.mark.slow
def test_a_fault_costs_one_item(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FED, str(tmp_path / "fed"))
    options: Row = {"ops": OPS, "repeats": 40, "processes": 3, "patience": 3.0}
    assert check(tmp_path, serve=serve_faulty, **options) == 1
    found = {(row["op"], row["dtype"]): row for row in rows(tmp_path / "results.jsonl")}
    assert len(found) == 6
    (starved,) = [r for r in rows(tmp_path / "results.jsonl") if r not in found.values()]
    assert (starved["op"], starved["dtype"]) == ("add_layer_norm", "float32")
    assert (starved["ok"], starved["why"]) == (None, kernels.NO_MEMORY)
    wrong = {name: row["why"] for name, row in found.items() if not row["ok"]}
    unsteady = wrong.pop(("layer_norm", "float32"))
    assert "call 37 of 40 with equal arguments differs in " in unsteady
    assert wrong == {
        ("layer_norm", "float16"): "output 0 is not finite",
        ("layer_norm_backward", "float16"): "its process died, exit code -11",
        ("layer_norm_backward", "float32"): "it hung: no word for 3 s",
        ("add_layer_norm", "float16"): "RuntimeError: CUDA error: an illegal memory access was "
        "encountered",
    }
    for (op, dtype), row in found.items():
        labels = [sample.label for sample in REGISTRY[op].samples("tiny")]
        assert row["sample"] in labels, (op, dtype)
    out = capsys.readouterr().out
    assert "6 of 6 checked on cpu, 5 wrong" in out
    first = next(iter(LAYER_NORM.samples("tiny"))).label
    assert f"layer_norm triton float16 tiny: WRONG: output 0 is not finite [{first}]" in out

    # Verdicts are what came to an end; the rest is tried again.
    table = json.loads((tmp_path / "tuned.json").read_text())["verified"]
    assert sorted(verdict["ok"] for verdict in table.values()) == [False, False, True]
    settled = kernels.settled(tmp_path / "results.jsonl", 40)
    assert {key for key, *_ in settled} == set(table)


def test_time_runs_out(tmp_path: Path, capsys: Any) -> None:
    now = iter(range(0, 10**9, 30))
    clock: Row = {"minutes": 2, "clock": lambda: float(next(now))}
    assert check(tmp_path, ops=["layer_norm", "layer_norm_backward"], processes=1, **clock) == 2
    assert not rows(tmp_path / "results.jsonl")
    assert "out of time: 4 kernels are left for the next run" in capsys.readouterr().out
    # The table was made, and holds nothing that isn't known.
    assert json.loads((tmp_path / "tuned.json").read_text())["verified"] == {}


def serve_starved(pipe: Any, device: torch.device, repeats: int) -> None:
    """A worker that never gets memory."""
    kernels.examine = lambda *_: {**kernels.failed(kernels.NO_MEMORY, "M=3"), "ok": None}
    serve(pipe, device, repeats)


def test_what_never_got_memory_is_not_right(tmp_path: Path, capsys: Any) -> None:
    assert check(tmp_path, ops=["layer_norm"], processes=1, serve=serve_starved) == 2
    assert "0 of 2 checked on cpu, 0 wrong" in capsys.readouterr().out


def test_a_verdict_on_one_precision_is_none_on_both() -> None:
    gpu = torch.device("cuda")
    verdict = {**vars(_verified.Verdict(True, 3, 0.5, 1.0)), "dtype": "float32"}
    tf32 = {**vars(_verified.Verdict(True, 3, 0.9, 1.0)), "dtype": "float32"}
    wrong = {**vars(_verified.Verdict(False, 3, 1.9, 1.0)), "dtype": "float32"}
    ieee: Row = {**verdict, "precision": "ieee"}
    found = {("k", "ieee", "tiny"): ieee, ("k", "ieee", "vit"): ieee}
    assert kernels.verdicts(found, gpu) == {}
    found["k", "tf32", "tiny"] = {**tf32, "precision": "tf32"}
    assert kernels.verdicts(found, gpu)["k"].ratio == 0.9
    found = {("k", "ieee", "vit"): {**wrong, "precision": "ieee"}}
    assert not kernels.verdicts(found, gpu)["k"].ok
    half: Row = {**verdict, "dtype": "float16", "precision": ""}
    assert kernels.verdicts({("h", "", "tiny"): half}, gpu)["h"].ok
    assert kernels.verdicts({("h", "", "tiny"): {**half, "ok": None}}, gpu) == {}


def test_all_that_a_gpu_has_to_show() -> None:
    every = kernels.items(None, torch.device("cuda"))
    assert len(set(every)) == len(every)
    assert {item.impl for item in every} == _verified.KERNELS
    assert {item.op for item in every} == {n for n, op in REGISTRY.items() if op.launcher}
    assert {(item.dtype, item.precision) for item in every} == {
        (torch.bfloat16, ""),
        (torch.float16, ""),
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
    }
    both = kernels.items(None, torch.device("cuda"), ["tiny", "vit"])
    assert both[: len(every)] == every
    assert {item.op for item in both[len(every) :]} == {item.op for item in every}


def test_errors(tmp_path: Path, capsys: Any) -> None:
    results = tmp_path / "results.jsonl"
    if not torch.cuda.is_available():
        assert kernels.main(results, None, torch.device("cuda")) == 2
        assert "no CUDA GPU here" in capsys.readouterr().err
    for name in ("repeats", "minutes", "processes"):
        options: Row = {name: 0}
        with pytest.raises(ValueError, match=f"--{name}: must be above 0, got 0"):
            kernels.main(results, None, CPU, **options)
    with pytest.raises(ValueError, match="--sizes: expected some of tiny, vit, got 'large'"):
        kernels.main(results, None, CPU, sizes=["tiny", "large"])
    with pytest.raises(ValueError, match="unknown op 'nothing'"):
        kernels.main(results, None, CPU, ops=["nothing"])
    with pytest.raises(ValueError, match="at least one op that has a kernel"):
        kernels.main(results, None, CPU, ops=["residual_add"])
    table = tmp_path / "tuned.json"
    table.write_text(json.dumps({"schema": 1, "gpu": "H100", "entries": [], "verified": {}}))
    with pytest.raises(ValueError, match="is of H100, and this is cpu"):
        check(tmp_path, ops=["layer_norm"])
    assert not rows(results) if results.exists() else True


def about(date: str = "2026-12-01T10:00:00+00:00", device: str = "cuda") -> Row:
    """As a run on a card begins."""
    smi = "name, driver_version, power.limit [W]\nNVIDIA H100 80GB HBM3, 580.65.06, 700.00 W"
    environment = {
        "date": date,
        "commit": "0123456789abcdef",
        "uncommitted": False,
        "packages": {"torch": "2.11.0", "triton": "3.6.0"},
        "cuda": "13.0",
        "cpu": "A CPU, 2 threads",
        "nvidia_smi": smi,
    }
    if device == "cuda":
        environment["card"] = {"name": "NVIDIA H100 80GB HBM3"}
    return {"kind": "about", "device": device, "environment": environment}


def verified(
    op: str, dtype: torch.dtype, precision: str = "", impl: str = "triton", **v: Any
) -> Row:
    verdict = _verified.Verdict(True, 16, 0.61, 1.0, sample="M=3", repeats=100, poisoned=True)
    item = kernels.Item(op, impl, dtype, precision)
    key = item.key("nvidia-h100").replace(" triton-", " triton-0.")  # that of the machine there
    return {"kind": "verified", **item.words, **vars(verdict), "key": key, "seconds": 1.0, **v}


def sanitized(tool: str, op: str, **values: Any) -> Row:
    row: Row = {
        "kind": "sanitizer",
        "tool": tool,
        "op": op,
        "impl": "triton",
        "kernel": "k.forward",
    }
    row |= {"config": "M=16 warps=4", "sample": "M=3", "dtype": "float16", "what": []}
    source = _verified.key(LAYER_NORM, "triton", torch.float16, "card").split()[-1]
    return {**row, "source": f"{source} triton-3.6", "ok": True, "errors": 0, **values}


def cells(text: str, *first: str) -> list[str]:
    """The cells behind the first ones of the only such line of a table."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    (found,) = [line[len(first) :] for line in lines if line[: len(first)] == list(first)]
    return found


def test_a_page_of_nothing() -> None:
    rehearsal = [about(device="cpu"), verified("layer_norm", torch.float16)]
    text = page.page(rehearsal)
    assert text == page.page([])
    assert "Nothing has been verified on a GPU yet" in text
    assert f"{len(kernels.items(None, torch.device('cuda')))} checks wait for a card" in text
    assert "make gpu" in text


def test_a_page_of_kernels() -> None:
    wrong = {"ok": False, "error": 3.0}
    found = [
        about("2026-11-30T10:00:00+00:00"),
        verified("layer_norm", torch.float16, **wrong),
        about(),
        verified("layer_norm", torch.float16),
        verified("layer_norm", torch.float32, "ieee", **wrong),
        verified("layer_norm", torch.float32, "tf32", samples=0, ok=False, why="died", raised=True),
        verified("linear_act", torch.float32, "ieee", "gluon", ok=None, samples=0),
        verified("linear_act", torch.bfloat16, "", "gluon", poisoned=False),
    ]
    text = page.page(found)
    assert "Nothing has been verified" not in text
    assert "## NVIDIA H100 80GB HBM3" in text
    run = ["0123456789ab", "580.65.06", "13.0", "2.11.0", "3.6.0"]
    assert cells(text, "2026-12-01") == cells(text, "2026-11-30") == run
    assert cells(text, "layer_norm", "triton") == [
        "not run",
        "0.61",
        "**WRONG**",
        "**WRONG**",
        "0 to 16",
        "100",
        "yes",
    ]
    assert cells(text, "linear_act", "gluon")[:4] == ["0.61", "not run", "none fits", "not run"]
    assert cells(text, "linear_act", "gluon")[-1] == "no"
    assert cells(text, "attention", "triton") == ["not run"] * 4 + [""] * 3
    every = len(kernels.items(None, torch.device("cuda")))
    assert f"Small samples: 5 of {every} checks done, 2 wrong." in text
    assert "Samples of the sizes of real models: 0 of " in text
    assert "- layer_norm triton float32 ieee, M=3: error 3.0e+00, budget 1.0e+00" in text
    assert "- layer_norm triton float32 tf32, M=3: died" in text
    assert text.count("Not run.") == 3


def test_a_page_of_samples_of_real_models() -> None:
    starved = {"ok": None, "raised": True, "why": kernels.NO_MEMORY, "size": "vit"}
    found = [
        about(),
        verified("attention", torch.bfloat16, size="vit", error=0.9),
        verified("attention", torch.float16, **starved),
    ]
    text = page.page(found)
    assert "Small samples: 0 of " in text
    assert cells(text, "attention", "triton") == ["0.90", *["not run"] * 3, "16", "100", "yes"]


def test_verdicts_of_an_older_source_are_marked() -> None:
    row = verified("layer_norm", torch.float16)
    assert page.OLDER not in page.page([about(), row])
    for part in (-1, -3):  # the source, and vitkern's version
        words = row["key"].split()
        words[part] += "0"
        text = page.page([about(), {**row, "key": " ".join(words)}])
        assert cells(text, "layer_norm", "triton")[1] == "0.61 †"
        assert "†: of an older source" in text
    gone = {**verified("layer_norm", torch.float16), "op": "gone"}
    assert cells(page.page([about(), gone]), "gone", "triton")[1] == "0.61 †"


def test_a_page_of_the_rest() -> None:
    found = [
        about(),
        {"kind": "step", "what": "tests", "ok": True, "why": "exit code 0", "seconds": 93.2},
        {"kind": "step", "what": "models", "ok": False, "why": "slow", "seconds": 1.0},
        sanitized("memcheck", "layer_norm"),
        sanitized("memcheck", "layer_norm", config="M=32 warps=4"),
        sanitized("racecheck", "layer_norm", ok=False, errors=2, what=["Race reported"]),
        sanitized("initcheck", "layer_norm", ok=None, why="it hung"),
        sanitized("memcheck", "PyTorch", errors=1, what=["in cublas"]),
        {
            "kind": "sanitizer",
            "tool": "synccheck",
            "op": "all",
            "ok": None,
            "why": "no such device",
        },
        {"kind": "training", "what": "digits", "impl": "vitkern", "dtype": "bfloat16"}
        | {"losses": [2.0] * 40 + [0.5] * 10, "accuracy": 0.975},
        {"kind": "training", "what": "digits", "impl": "verdict", "ok": True, "why": "as near"},
        {"kind": "training", "what": "vit", "impl": "verdict", "ok": False, "why": "a gradient"},
    ]
    text = page.page(found)
    assert "They passed (exit code 0, 93 s)." in text
    assert cells(text, "layer_norm", "triton", "2 launches, 0 errors") == [
        "1 launch, 2 errors, **1 failed**",
        "not run",
        "not run",
    ]
    assert cells(text, "PyTorch", "triton")[0] == "1 launch, 1 error"
    assert "- racecheck layer_norm triton k.forward: Race reported" in text
    assert "- synccheck all: no such device" in text
    assert cells(text, "digits", "vitkern") == ["bfloat16", "50", "0.5000", "97.5 %"]
    assert "- digits: passed; as near" in text
    assert "- vit: **failed**; a gradient" in text
    counted = {**found[1], "tests": {"passed": 90, "failed": 2}, "ok": False}
    assert "They **failed** (90 passed, 2 failed; exit code 0, 93 s)." in page.page(
        [about(), counted]
    )


def test_sanitized_launches_of_an_older_source() -> None:
    old: Row = {"source": "0123 triton-3.6"}
    found = [
        about(),
        sanitized("memcheck", "layer_norm", config="gone", **old),
        sanitized("racecheck", "layer_norm", config="gone", ok=False, what=["a race"], **old),
        sanitized("initcheck", "layer_norm", **old),
        sanitized("initcheck", "control", source="triton-3.6"),
        sanitized("synccheck", "layer_norm", ok=None, why="out of time"),
        about(),
        sanitized("memcheck", "layer_norm"),
        sanitized("racecheck", "layer_norm"),
    ]
    text = page.page(found)
    one = "1 launch, 0 errors"
    assert cells(text, "layer_norm", "triton", one) == [one, f"{one} †", "not run"]
    assert cells(text, "control", "triton")[2] == one
    assert "a race" not in text
    assert "out of time" not in text


def test_a_tool_that_could_not_run_before_and_now_does() -> None:
    tool: Row = {"kind": "sanitizer", "tool": "memcheck", "op": "all", "ok": None, "why": "no port"}
    row = sanitized("memcheck", "layer_norm")
    assert "no port" in page.page([about(), row, tool])
    assert "no port" not in page.page([about(), tool, about(), row])


def test_files_are_read(tmp_path: Path) -> None:
    """As a run leaves them, with a torn line and rows of kinds that nobody here knows."""
    results, target = tmp_path / "results", tmp_path / "docs" / "verification.md"
    assert page.write(target, results)
    assert target.read_text() == page.page([])
    lines = [about(), verified("layer_norm", torch.float16), {"kind": "config", "key": "m1"}]
    path = results / "nvidia-h100" / "2026-12-01.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "ver')
    assert page.write(target, results)
    assert cells(target.read_text(), "layer_norm", "triton")[1] == "0.61"
    assert not page.write(target, results)


def test_the_page_is_what_the_results_say() -> None:
    made = page.page(page.recorded())
    assert page.PAGE.read_text() == made, "make it anew: python -m benchmarks verify page"
