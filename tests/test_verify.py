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

from benchmarks._verify import kernels
from benchmarks._verify.kernels import serve
from vitkern.kernels import REGISTRY, _tuned, _verified
from vitkern.kernels._op import Op

CPU = torch.device("cpu")
LAYER_NORM = REGISTRY["layer_norm"]
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

    kernels.healthy = lambda device: not lost
    faults = {
        ("layer_norm", torch.float16): unwritten,
        ("layer_norm", torch.float32): unsteady,
        ("layer_norm_backward", torch.float16): dies,
        ("layer_norm_backward", torch.float32): hangs,
        ("add_layer_norm", torch.float16): loses_the_gpu,
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


def test_a_fault_costs_one_item(tmp_path: Path, capsys: Any) -> None:
    options: Row = {"ops": OPS, "repeats": 40, "processes": 3, "patience": 3.0}
    assert check(tmp_path, serve=serve_faulty, **options) == 1
    found = {(row["op"], row["dtype"]): row for row in rows(tmp_path / "results.jsonl")}
    assert len(found) == len(rows(tmp_path / "results.jsonl")) == 6
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
    assert f"layer_norm triton float16: WRONG: output 0 is not finite [{first}]" in out

    # Verdicts are what came to an end; the rest is tried again.
    table = json.loads((tmp_path / "tuned.json").read_text())["verified"]
    assert sorted(verdict["ok"] for verdict in table.values()) == [False, False, True]
    settled = kernels.settled(tmp_path / "results.jsonl", 40)
    assert {key for key, _ in settled} == set(table)


def test_time_runs_out(tmp_path: Path, capsys: Any) -> None:
    now = iter(range(0, 10**9, 30))
    clock: Row = {"minutes": 2, "clock": lambda: float(next(now))}
    assert check(tmp_path, ops=["layer_norm", "layer_norm_backward"], processes=1, **clock) == 0
    assert not rows(tmp_path / "results.jsonl")
    assert "out of time: 4 kernels are left for the next run" in capsys.readouterr().out
    # The table was made, and holds nothing that isn't known.
    assert json.loads((tmp_path / "tuned.json").read_text())["verified"] == {}


def test_a_verdict_on_one_precision_is_none_on_both() -> None:
    gpu = torch.device("cuda")
    verdict = {**vars(_verified.Verdict(True, 3, 0.5, 1.0)), "dtype": "float32"}
    tf32 = {**vars(_verified.Verdict(True, 3, 0.9, 1.0)), "dtype": "float32"}
    wrong = {**vars(_verified.Verdict(False, 3, 1.9, 1.0)), "dtype": "float32"}
    assert kernels.verdicts({("k", "ieee"): verdict}, gpu) == {}
    both = kernels.verdicts({("k", "ieee"): verdict, ("k", "tf32"): tf32}, gpu)
    assert both["k"].ratio == 0.9
    assert not kernels.verdicts({("k", "ieee"): wrong}, gpu)["k"].ok
    half = {("h", ""): {**verdict, "dtype": "float16"}}
    assert kernels.verdicts(half, gpu)["h"].ok
    assert kernels.verdicts({("h", ""): {**half["h", ""], "ok": None}}, gpu) == {}


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


def test_errors(tmp_path: Path, capsys: Any) -> None:
    results = tmp_path / "results.jsonl"
    if not torch.cuda.is_available():
        assert kernels.main(results, None, torch.device("cuda")) == 2
        assert "no CUDA GPU here" in capsys.readouterr().err
    for name in ("repeats", "minutes", "processes"):
        options: Row = {name: 0}
        with pytest.raises(ValueError, match=f"--{name}: must be above 0, got 0"):
            kernels.main(results, None, CPU, **options)
    with pytest.raises(ValueError, match="unknown op 'nothing'"):
        kernels.main(results, None, CPU, ops=["nothing"])
    with pytest.raises(ValueError, match="at least one op that has a kernel"):
        kernels.main(results, None, CPU, ops=["residual_add"])
    table = tmp_path / "tuned.json"
    table.write_text(json.dumps({"schema": 1, "gpu": "H100", "entries": [], "verified": {}}))
    with pytest.raises(ValueError, match="is of H100, and this is cpu"):
        check(tmp_path, ops=["layer_norm"])
    assert not rows(results) if results.exists() else True
