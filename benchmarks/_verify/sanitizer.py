"""NVIDIA's compute-sanitizer over every kernel and launch config, at small shapes.

    memcheck    accesses out of bounds or misaligned, in global, shared and local memory
    racecheck   threads of a block that meet in shared memory without a barrier between them
    initcheck   reads of global memory that nobody wrote
    synccheck   barriers that not all come to

The calls are those of ``small.py``, with the configs of a table of this card among them. First they
run without a tool, in parallel processes, which compiles all kernels. Then each tool gets the calls
in chunks, each a process that makes one after the other and says so ("@@ 17"), so that what the
tool reports has a call to belong to. A process that dies or hangs costs the call it was at; another
goes on behind that.

Reports in kernels that aren't ours (cuBLAS, ATen) get rows of their own and fail nothing. A race
that the tool itself calls a warning is counted, and fails nothing either. A call is right when it
was made under the tool, to its end, and nothing was reported; where the tool couldn't run, or there
was no time, its row says None. Rows that are right are kept: another run goes on with the rest.

Whether a tool sees anything at all is asked, too: each gets a kernel that is wrong on purpose
(``faults.py``), and must report it.

What to expect (version 2025.3, of CUDA 13.0), as others found it; none of it seen here yet:

- racecheck on reductions: all lanes of a warp store what a butterfly left them, to one word. Where
  that differs in the last bit it is reported as a write-write race (triton-lang/triton#7264; Triton
  3.7 let one lane store, 3.8 no longer does: #11614). Which of the values is taken then is open.
- initcheck knows bulk copies, so TMA's loads and stores, since 2025.4 only (NVIDIA's release
  notes): what Gluon's product stored looks unwritten to a kernel that reads it in the same call.
- memcheck once took wgmma's operand for larger than it is (NVIDIA/compute-sanitizer-samples#19).
  "Invalid __shared__" may also be true, and ptxas's doing: its versions 12.8 and 13.0 miscompiled
  kernels for Hopper, 13.1 did not (fla-org/flash-linear-attention#1262; triton-lang/triton#11366,
  #11781). Triton 3.6 brings 12.8; TRITON_PTXAS_PATH names another one to compare with.
- synccheck on warp-specialised kernels: "Missing wait" at mbarriers of CUTLASS's
  (NVIDIA/cutlass#2626), divergent `bar.sync` where groups meet from different code.
"""

import argparse
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from .._contest import Log, Row
from .._measure import environment
from .reports import FOREIGN
from .watch import OPTIONS, PLAIN, PYTHON, ROOT, Outcome, Runner

TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")  # the slowest first


def find_tool() -> str | None:
    """Path of compute-sanitizer: on PATH, or in the toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(home, "bin") for home in homes if home]
    found = [shutil.which("compute-sanitizer", path=str(place)) for place in places]
    return shutil.which("compute-sanitizer") or next((path for path in found if path), None)


# ---- the child: what runs under the tool


def plan(device: str, ops: Sequence[str] | None, table: Path | None) -> None:
    """Print every call as a line of JSON. In a process of its own, where kernels are compiled.

    Raises:
        ValueError: the file holds no table.
    """
    from vitkern.kernels import _tuned, _verified
    from vitkern.kernels._triton import triton

    from .._cases import choose_ops
    from . import faults, small

    chosen = choose_ops(ops)
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    compiler = f"triton-{triton.__version__}"
    if table is not None:
        tuned = _tuned.read(table)
        if tuned is None:
            raise ValueError(f"--table: expected a table of measured configs, got {table}")
    else:  # what is launched here: VITKERN_TUNED may name it
        tuned = _tuned.table(torch.device(device, 0))
    for call in small.small_calls(chosen, capability, tuned):
        op = next(op for op in chosen if op.name == call.op)
        source = _verified.digest(inspect.unwrap(op.reference).__code__.co_filename)
        if device == "cuda" or call.impl == "triton":  # the interpreter knows no more
            row = {**asdict(call), "label": call.label}
            print(json.dumps({**row, "source": f"{source} {compiler}"}), flush=True)
    for tool, kernel in faults.KERNELS.items():
        row = {"control": tool, "op": "control", "impl": "triton", "label": "a planted fault"}
        row |= {"dtype": "int32", "kernels": [kernel], "configs": [""], "source": compiler}
        print(json.dumps(row), flush=True)


def child(plan_file: Path, numbers: Sequence[int], device: str) -> int:
    """Make calls one after the other; 3 if the GPU no longer answers."""
    from vitkern.kernels._launch import Launch

    from . import faults, small

    rows = [json.loads(line) for line in plan_file.read_text().splitlines()]
    known = {f.name for f in fields(small.SmallCall)}
    for n in numbers:
        print(f"@@ {n} start", flush=True)
        try:
            if "control" not in rows[n]:
                call = small.SmallCall(**{k: v for k, v in rows[n].items() if k in known})
                call.run(call.arguments(device), Launch.run)
            elif device == "cuda":
                faults.run(rows[n]["control"])
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as problem:
            text = " ".join(f"{type(problem).__name__}: {problem}".split())
            print(f"@@ {n} raised {text[:400]}", flush=True)
            try:
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception:
                return 3
        else:
            time.sleep(0.02)  # the tool is another process, and may still have to print
            print(f"@@ {n} done", flush=True)
    return 0


# ---- the parent


def rows(outcome: Outcome, calls: list[Row]) -> list[Row]:
    """Results for the file: one a launch config, and one more if others' kernels were reported."""
    base: Row = {"kind": "sanitizer", "tool": outcome.tool}
    if outcome.number is None:
        return [{**base, "op": "unattributed", "ok": False, "errors": 1, "what": [outcome.why]}]
    call = calls[outcome.number]
    base |= {key: call[key] for key in ("op", "impl", "dtype", "source")}
    base |= {"sample": call["label"], "seconds": round(outcome.seconds, 3)}
    made = []
    for kernel, config in zip(call["kernels"], call["configs"], strict=True):
        own = [r for r in outcome.reports if r.kernel in (kernel.split(".")[-1], None)]
        errors = [r for r in own if not (r.warning or r.internal)]
        row = {**base, "kernel": kernel, "config": config, "errors": len(errors)}
        row["ok"] = False if errors else outcome.ok
        row["warnings"] = sum(r.warning for r in own)
        row["what"] = [r.text for r in errors[:3]]
        if "control" in call and outcome.ok is not None:
            row["ok"] = bool(errors)
            row["why"] = "" if errors else "the tool doesn't see a fault made on purpose"
        elif outcome.why:
            row["why"] = outcome.why
        made.append(row)
    foreign = [r for r in outcome.reports if r.kernel == FOREIGN]
    if foreign:
        what = [r.text for r in foreign[:3]]
        made.append({**base, "op": "PyTorch", "ok": True, "errors": len(foreign), "what": what})
    return made


def settled(path: Path) -> set[tuple[Any, ...]]:
    """The calls under tools of which every row in a file of results is right."""
    found: dict[tuple[Any, ...], dict[Any, bool]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # torn, as the process that wrote it was killed
            row = json.loads(line)
            if row.get("kind") == "sanitizer" and "kernel" in row:
                found.setdefault(identity(row), {})[row["kernel"], row["config"]] = bool(row["ok"])
    return {key for key, each in found.items() if all(each.values())}


def identity(row: Row) -> tuple[Any, ...]:
    """What tells a call under a tool from others."""
    return tuple(row[key] for key in ("tool", "op", "impl", "sample", "dtype", "source"))


def chunks(numbers: Sequence[int], count: int) -> list[list[int]]:
    """`numbers`, dealt to so many lists, of which none is empty."""
    return [list(numbers[i::count]) for i in range(min(count, len(numbers)))]


def make_plan(
    device: str, ops: Sequence[str] | None, path: Path, table: Path | None = None
) -> list[Row]:
    """The calls, as rows, and in the file `path`.

    Raises:
        RuntimeError: they could not be planned; the text says why.
    """
    argv = [*PYTHON, "--plan", "--device", device, *(["--op", *ops] if ops else [])]
    argv += ["--table", str(table.absolute())] if table else []
    own = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no plan of calls: {done.stderr.strip()[-500:]}")
    path.write_text(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(
    results: Path,
    device: torch.device | str = "cuda",
    ops: Sequence[str] | None = None,
    tools: Sequence[str] = TOOLS,
    minutes: float | None = None,
    processes: int | None = None,
    command: Sequence[str] | None = None,
    table: Path | None = None,
) -> int:
    """Run `tools` over the calls of `ops` (all for None); 0 no error, 1 errors, 2 not (all) run.

    Args:
        results: a file of results, to which rows of kind "sanitizer" are added.
        minutes: after which what was not checked is left out.
        processes: how many at a time; by default two fewer than there are cores.
        command: in place of compute-sanitizer; a rehearsal on "cpu" needs one.
        table: whose launch configs are looked at beside the defaults; None for that of this card,
            which VITKERN_TUNED may name.
    """
    where = torch.device(device).type
    stop = time.monotonic() + 60 * (1e6 if minutes is None else minutes)
    for tool in tools:
        if tool not in OPTIONS:
            raise ValueError(f"--tool: expected some of {', '.join(OPTIONS)}, got {tool!r}")
    if where == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA GPU here, and compute-sanitizer looks at one", file=sys.stderr)
        return 2
    found = find_tool()
    if command is None and found is None:
        print("error: no compute-sanitizer here; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    processes = processes or max(1, (os.cpu_count() or 3) - 2)
    log = Log(results)
    with tempfile.TemporaryDirectory() as folder:
        plan_file = Path(folder, "plan.jsonl")
        try:
            calls = make_plan(where, ops, plan_file, table)
        except RuntimeError as problem:
            print(f"error: {problem}", file=sys.stderr)
            return 2
        runner = Runner(calls, plan_file, where, command or [str(found)], stop)
        done = settled(results)
        todo = {
            tool: [
                n
                for n, call in enumerate(calls)
                if call.get("control", tool) == tool
                and identity({**call, "tool": tool, "sample": call["label"]}) not in done
            ]
            for tool in tools
        }
        if any(todo.values()):
            about = environment(torch.device(device))  # without which rows are of no card
            log.add({"kind": "about", "environment": about, "device": where})
        _run(runner, todo, processes, log)
    log.close()
    return _verdict(log, runner)


def _run(runner: Runner, todo: dict[str, list[int]], processes: int, log: Log) -> None:
    """First all calls without a tool, then each tool's; results go to the log at once."""
    calls, begun = runner.calls, time.monotonic()
    once = sorted({n for numbers in todo.values() for n in numbers if "control" not in calls[n]})
    broken, made = dict[int, str](), 0
    with closing(runner.run([(PLAIN, c) for c in chunks(once, processes)], processes)) as outcomes:
        for outcome in outcomes:
            made += outcome.ok is True
            if outcome.number is not None and outcome.ok is False:
                broken[outcome.number] = outcome.why
    if PLAIN in runner.unusable:
        why = f"without a tool, too: {runner.unusable.pop(PLAIN)}"
        runner.unusable |= dict.fromkeys(todo, why)
    seconds = time.monotonic() - begun
    counted = f"{made} of {len(once)} calls made without a tool, {len(broken)} failed"
    print(f"{counted} ({seconds:.0f} s)", flush=True)
    for tool, numbers in todo.items():
        for n in numbers if tool != "memcheck" else ():  # which may say more, so it tries
            if n in broken:
                _add(log, rows(Outcome(tool, n, False, f"without a tool, too: {broken[n]}"), calls))
    work = _dealt(todo, broken, calls, processes)
    told, count, total = time.monotonic(), 0, sum(len(numbers) for _, numbers in work)
    with closing(runner.run(work, processes)) as outcomes:
        for count, outcome in enumerate(outcomes, 1):
            if outcome.tool not in runner.unusable or outcome.ok is not None:
                _add(log, rows(outcome, calls))
            if time.monotonic() - told > 15:
                told = time.monotonic()
                print(f"{count} of {total} calls ({told - begun:.0f} s)", flush=True)
    for tool, why in runner.unusable.items():
        log.add({"kind": "sanitizer", "tool": tool, "op": "all", "ok": None, "why": why})
    print(f"{count} calls under {len(todo)} tools ({time.monotonic() - begun:.0f} s)", flush=True)


def _dealt(
    todo: dict[str, list[int]], broken: Collection[int], calls: list[Row], processes: int
) -> list[tuple[str, list[int]]]:
    """Chunks of work: the controls first, and what is broken alone, where it stops nobody."""
    work = [(tool, [n]) for tool, each in todo.items() for n in each if "control" in calls[n]]
    for tool, numbers in todo.items():
        right = [n for n in numbers if n not in broken and "control" not in calls[n]]
        # What cuBLAS loads is instrumented, too: better in one process than in all of them.
        cublas = [n for n in right if calls[n]["impl"] == "cublas"]
        others = [n for n in right if calls[n]["impl"] != "cublas"]
        work += [(tool, each) for each in chunks(cublas, 1) + chunks(others, processes // 2 or 1)]
        work += [(tool, [n]) for n in numbers if n in broken and tool == "memcheck"]
    return work


def _add(log: Log, found: list[Row]) -> None:
    for row in found:
        log.add(row)
        if row["ok"] is False:
            what = (row["what"] or [row.get("why")])[0]
            print(f"{row['tool']}: {row['op']} {row.get('kernel', '')}: {what}", flush=True)


def _verdict(log: Log, runner: Runner) -> int:
    """The exit code, with a line or two on what it stands for."""
    found = [row for row in log.rows if row["kind"] == "sanitizer"]
    wrong = [row for row in found if row["ok"] is False]
    missing = [row for row in found if row["ok"] is None]
    for tool, why in runner.unusable.items():
        print(f"error: {tool} can't run here: {why}", file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} launches are wrong or failed", file=sys.stderr)
        return 1
    late = [row for row in missing if row["op"] != "all"]
    if late:
        print(f"{len(late)} were not checked: {late[0].get('why', '')}", file=sys.stderr)
    return 2 if missing else 0


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, help="the file to which results are added")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--table", type=Path, help="of measured launch configs (this card's own)")
    parser.add_argument("--op", nargs="+", help="these ops only (default: all)")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--minutes", type=float, help="after which the rest is left out")
    parser.add_argument("--processes", type=int, help="default: two fewer than there are cores")
    for option in ("--plan", "--child", "--calls"):  # for the processes that `main` starts
        kind = {"action": "store_true"} if option == "--plan" else {"type": str}
        parser.add_argument(option, help=argparse.SUPPRESS, **kind)
    asked = parser.parse_args()
    if asked.plan:
        plan(asked.device, asked.op, asked.table)
    elif asked.child:
        sys.exit(child(Path(asked.child), _ints(asked.calls), asked.device))
    elif asked.results is None:
        parser.error("--results: expected a file to which results are added")
    else:
        options = asked.op, asked.tools, asked.minutes, asked.processes
        sys.exit(main(asked.results, asked.device, *options, table=asked.table))
