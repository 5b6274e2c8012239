"""Everything that needs a GPU, in one command: the most valuable first, all of it written at once.

Correctness comes first: the GPU tests, every kernel against float64, NVIDIA's compute-sanitizer,
training beside eager. Then the tuner, and by its table the times of the models and the ops of the
small grid, where a training step's time goes, and the grids with compilers and of all the rest with
what time remains. Each step is a process of its own with a share of the time, so that one that
hangs or crashes takes nothing with it; those of the first kind use all cores, since what takes long
there is compiling. Nothing is installed, and nothing is asked of a network; what is missing is left
out, and said so.

Into the folder go results.jsonl (every result, a line each), steps.log (what the steps printed),
tests.jsonl (what came of each test), tuned/<gpu>.json (the tuner's table), training.png and
report.md; ``python -m benchmarks report`` draws the other pictures from results.jsonl anywhere.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from vitkern.kernels import _tuned

from . import _proxies, _report
from ._contest import Log, Row
from ._measure import Clock, environment

ROOT = Path(__file__).parent.parent

# pytest's exit codes: all passed; there was nothing to do, which without a GPU is right.
NOTHING_FAILED = (0, 5)

# In the folder, what came of each test.
OUTCOMES = "tests.jsonl"

# Seconds that a step has to end by itself.
PATIENCE = 15


@dataclass(frozen=True)
class Step:
    """One process, Python's.

    share: of the time, against those of the other steps; what one leaves over goes to the next.
    argv: what Python is given, for a step of so many seconds. needs: modules and programs without
    which it is left out. good: exit codes of success. not_run: those that say that it couldn't, or
    not to the end. variables: of its environment.
    """

    what: str
    share: float
    argv: Callable[[float], list[str]]
    needs: tuple[str, ...] = ()
    good: tuple[int, ...] = (0,)
    not_run: tuple[int, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """What of `needs` isn't here."""
        return [name for name in self.needs if find_spec(name) is None and not shutil.which(name)]


def table(folder: Path, device: str) -> Path:
    """Where in `folder` the tuner's table is, under the name by which VITKERN_TUNED finds it."""
    card = _tuned.card(torch.device(device)) if torch.cuda.is_available() else None
    return folder / "tuned" / f"{card or 'cpu'}.json"


def within(seconds: float) -> str:
    """The option by which a step stops by itself before it is stopped; to start takes time, too."""
    return f"--minutes={max(0.8 * seconds, seconds - 25) / 60:.3f}"


def steps(folder: Path, device: str) -> list[Step]:
    """In order of value. A rehearsal on a CPU takes the same steps, through little of the work."""
    toy = device == "cpu"
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    results = folder / "results.jsonl"

    def bench(what: str, grid: str, share: float) -> Step:
        # What the linear ops are held against is known first, in seconds.
        alone = ["benchmarks/test_products.py"] if (what, grid) == ("ops", "small") else []
        argv = [*pytest, *alone, f"benchmarks/test_{what}.py", "--benchmark-only", "--no-report"]
        argv += [f"--grid={'toy' if toy else grid}", f"--results={results}"]
        return Step(
            what if grid == "small" else f"{what}-{grid}",
            share,
            lambda seconds: [*argv, within(seconds)],
            needs=("pytest", "pytest_benchmark"),
            good=NOTHING_FAILED,
        )

    tests = "tests/test_gpu.py" if toy else "tests"
    tests_argv = [*pytest, tests, "-m", "gpu", f"--outcomes={folder / OUTCOMES}"]
    if find_spec("xdist") and not toy:
        # A test takes milliseconds, and to compile its kernels seconds.
        tests_argv += ["-n", str(max(1, min(16, (os.cpu_count() or 1) - 2)))]
        tests_argv += ["--max-worker-restart=1000"]
        if find_spec("pytest_timeout"):  # a kernel that waits for ever costs one worker, not all
            tests_argv += ["--timeout=200", "--timeout-method=thread"]
    few = ["--op", "layer_norm"] if toy else []

    def verify(what: str, share: float, *options: str, name: str = "") -> Step:
        argv = ["-m", "benchmarks", "verify", what, "--out", str(folder), "--device", device]
        return Step(
            name or what,
            share,
            lambda seconds: [*argv, *options, within(seconds)],
            not_run=(2,),
            # On a CPU kernels can only be interpreted.
            variables={"TRITON_INTERPRET": "1" if toy else "0"},
        )

    def profile(model: str, batch: int) -> Step:
        argv = ["-m", "vitkern", "profile", "vit_tiny_patch16_224" if toy else model]
        argv += ["--batch", str(1 if toy else batch), "--out", str(folder / f"profile-{model}")]
        argv += ["--device", device, *([] if toy else ["--precision", "autocast"])]
        return Step(f"profile-{model.split('_')[1]}", 3, lambda _: argv, needs=("matplotlib",))

    tune_argv = ["-m", "benchmarks", "tune", "--device", device, *few]
    tune_argv += ["--out", str(table(folder, device)), "--results", str(results)]
    return [
        Step(
            "native",
            5,
            lambda _: ["setup.py", "-q", "build_ext", "--inplace"],
            needs=("setuptools", "cmake", "nvcc"),
            variables={"VITKERN_NATIVE": "1", "VITKERN_CUDA": "1"},
        ),
        Step("tests", 24, lambda _: tests_argv, needs=("pytest",), good=NOTHING_FAILED),
        verify("kernels", 10, *few, *(["--repeats", "2"] if toy else ["--size", "tiny", "vit"])),
        verify("sanitizer", 14, *few),
        verify("training", 14, *(["--toy", "--only", "digits"] if toy else [])),
        Step("tune", 20, lambda seconds: [*tune_argv, within(seconds)]),
        bench("models", "small", 25),
        bench("ops", "small", 15),
        profile("vit_base_patch16_224", 256),
        profile("vit_large_patch16_224", 128),
        # What the tuner has chosen since; the rest is on record.
        verify("sanitizer", 5, *few, name="sanitizer-tuned"),
        bench("models", "compiled", 15),
        bench("ops", "compiled", 5),
        bench("models", "rest", 10),
        bench("ops", "rest", 5),
    ][1 if toy else 0 :]  # a rehearsal leaves no library behind


def choose(every: list[Step], names: Sequence[str] | None) -> list[Step]:
    """The steps of these names, in the order of all; all for None.

    Raises:
        ValueError: there is no such step.
    """
    known = [step.what for step in every]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--steps: unknown step {name!r}; expected some of {', '.join(known)}")
    return [step for step in every if names is None or step.what in names]


def run(step: Step, seconds: float, output: IO[str], tables: Path) -> Row:
    """Run one step for so many seconds at most, by the tables in `tables`; what came of it."""
    missing = step.missing()
    if missing:
        return {"ok": True, "why": f"left out: {', '.join(missing)} missing"}
    if seconds < 1:
        return {"ok": True, "why": "left out: no time remains"}
    output.write(f"\n=== {step.what}\n")
    output.flush()
    # A rehearsal may run within a test, whose settings are not for another pytest.
    own = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    inherited = {k: v for k, v in os.environ.items() if k not in own}
    process = subprocess.Popen(
        [sys.executable, *step.argv(seconds)],
        cwd=ROOT,
        env={**inherited, **step.variables, "VITKERN_TUNED": str(tables)},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it has started ends with it
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _stop(process)
        return {"ok": None, "why": f"unfinished after {seconds:.0f} s; see steps.log"}
    except BaseException:
        _stop(process)
        raise
    ok = None if code in step.not_run else code in step.good
    return {"ok": ok, "why": f"exit code {code}; see steps.log"}


def tested(folder: Path) -> dict[str, int]:
    """How many tests of the step in this folder passed, failed and were skipped."""
    path, found = folder / OUTCOMES, dict[str, str]()
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # torn, as the process that wrote it was killed
            row = json.loads(line)
            if found.get(row["test"]) != "failed":  # which may come twice: test and teardown
                found[row["test"]] = row["outcome"]
    return dict(Counter(found.values()))


def mistakes(folder: Path, what: str) -> str:
    """What the files in `folder` tell of failures in a step; "" for nothing."""
    if what == "tests":
        counts = tested(folder)
        failed = counts.get("failed", 0)
        return f"{failed} of {sum(counts.values())} tests failed" if failed else ""
    level = what.partition("-")[0].removesuffix("s")
    rows = _report.read(folder / "results.jsonl").of("time")
    wrong = [r["impl"] for r in rows if r["level"] == level and r["own"] and not r["parity"]["ok"]]
    return f"{len(wrong)} of ours are wrong" if wrong else ""


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a step: as Ctrl-C does, so that it can write its report; then for good."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(
    minutes: float,
    folder: Path,
    device: torch.device,
    names: Sequence[str] | None = None,
    clock: Clock = time.monotonic,
) -> int:
    """Run the steps of these names, all for None; 0 if all was right, 1 if not, 2 without a GPU."""
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA GPU here, and this command measures one", file=sys.stderr)
        return 2
    if minutes <= 0:
        raise ValueError(f"--minutes: must be above 0, got {minutes}")
    begun, folder = clock(), folder.resolve()
    chosen = choose(steps(folder, device.type), names)
    log = Log(folder / "results.jsonl")
    log.add({"kind": "about", "environment": environment(device), "device": device.type})
    try:
        with (folder / "steps.log").open("a") as output:
            for number, step in enumerate(chosen):
                start = clock()
                if step.what == "tests":  # an earlier run's say nothing of this one
                    (folder / OUTCOMES).unlink(missing_ok=True)
                left = begun + 60 * minutes - start
                share = step.share / sum(other.share for other in chosen[number:])
                found = run(step, share * left, output, folder / "tuned")
                wrong = mistakes(folder, step.what)
                if wrong and found["ok"] is not False:  # cut off, and some of it had failed
                    found |= {"ok": False, "why": f"{wrong}; {found['why']}"}
                row = {"kind": "step", "what": step.what, **found, "seconds": clock() - start}
                if step.what == "tests":
                    row["tests"] = tested(folder)
                    if device.type == "cuda" and row["ok"] and not row["tests"].get("passed"):
                        row |= {"ok": None, "why": f"no test ran; {row['why']}"}
                log.add(row)
                state = "FAILED: " if found["ok"] is False else ""
                print(
                    f"[{number + 1}/{len(chosen)}] {step.what}: {state}{found['why']} "
                    f"({row['seconds']:.0f} s)",
                    flush=True,
                )
        if any(step.what.startswith("models") for step in chosen):  # what they are held beside
            _proxies.add(log)
    finally:
        log.close()
        _report.main_report([log.path], folder, pictures=False)
    return 1 if any(row.get("ok") is False for row in log.rows) else 0
