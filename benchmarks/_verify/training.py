"""The command that trains beside eager PyTorch (`learning.py`), and its picture.

Each network is a process of its own, so that one whose kernels crash or hang takes nothing with it;
what it has found by then is on disk. Eager's runs are not done again where the results file has
them.
"""

import hashlib
import json
import math
import multiprocessing
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

import vitkern
from vitkern._device import device_name

from .._contest import Log, Row, failure
from .._measure import environment
from . import learning
from .learning import (
    EAGER,
    EAGERS,
    FACTOR,
    FLOAT32,
    GRADIENTS,
    NUDGED,
    OURS,
    TASKS,
    TRAINING,
    WINDOW,
    Task,
    distance,
)

MINUTES = 4.0  # unless told otherwise: a kernel that hangs must not keep the machine
NEEDS = ("sklearn", "PIL", "matplotlib", "rich")


def code() -> str:
    """A hash of what a run of eager's consists of."""
    total = hashlib.sha256()
    here, package = Path(__file__).parent, Path(vitkern.__file__).parent
    for path in (here / "learning.py", here / "photographs.py", package / "eager.py"):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def rows_in(results: Path) -> list[Row]:
    """What a results file holds of training."""
    rows = []
    for line in results.read_text().splitlines() if results.exists() else ():
        with suppress(json.JSONDecodeError):  # a process was killed as it wrote
            rows.append(json.loads(line))
    return [row for row in rows if row["kind"] in (TRAINING, GRADIENTS)]


def runs_before(results: Path, alike: Row) -> dict[str, dict[str, Row]]:
    """By task and impl, whole runs of eager's in a results file in which all of `alike` is so."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows_in(results):
        whole = row.get("impl") in EAGERS and len(row["losses"]) == row["steps"]
        if whole and {key: row.get(key) for key in alike} == alike:
            found.setdefault(row["what"], {})[row["impl"]] = row
    return found


def _child(
    rows: Connection, task: Task, device: torch.device, alike: Row, seconds: float, known: Any
) -> None:
    """One task, in a process of its own; what it finds goes to `rows`."""
    start = time.monotonic()
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    else:
        torch.set_num_threads(1)  # so small a network makes several mostly wait for each other
    try:
        late = lambda: time.monotonic() - start > seconds  # noqa: E731
        for row in learning.hold(task, device, alike["steps"], alike["seed"], known, late):
            rows.send({**row, **alike})
    except Exception as problem:  # before ours had its turn, or where it wasn't to blame
        traceback.print_exc()
        rows.send(_ended(task.what, alike, {**failure(problem), "ok": None}))


def _ended(what: str, alike: Row, found: Row) -> Row:
    """The verdict on a task that came to none."""
    return {"kind": TRAINING, "what": what, "impl": "verdict", **alike, **found}


def main(
    results: Path,
    device: torch.device,
    folder: Path,
    minutes: float | None = None,
    steps: int | None = None,
    only: Sequence[str] | None = None,
    toy: bool = False,
    seed: int = 0,
) -> int:
    """Train the networks named in `only`, or all; rows go to `results`, a picture to `folder`.

    Each is a process of its own, and all run at once, so that a run's "seconds" are no benchmark.

    Args:
        minutes: what isn't done by then is ended; a little earlier, no step is begun any more.
        steps: 200 unless given, or of a toy 20.
        toy: on the scale of a CPU.

    Returns:
        0 if all is well; 1 if something is wrong; 2 without a GPU or a package that is needed, or
        where time didn't suffice to tell.
    Raises:
        ValueError: `only` has unknown names, or there are too few steps.
    """
    tasks = [learning.rehearsal(task) if toy else task for task in TASKS.values()]
    if unknown := sorted(set(only or ()) - set(TASKS)):
        raise ValueError(f"--only: unknown {unknown[0]!r}; expected some of {', '.join(TASKS)}")
    if steps is None:
        steps = 20 if toy else 200
    if steps < 2 * WINDOW:
        raise ValueError(f"--steps: expected at least {2 * WINDOW}, got {steps}")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA GPU here, on which to train", file=sys.stderr)
        return 2
    if absent := [name for name in NEEDS if find_spec(name) is None]:
        print(f"error: training needs {', '.join(absent)}", file=sys.stderr)
        return 2
    alike = {"seed": seed, "steps": steps, "device": device_name(device)}
    alike |= {"toy": toy, "torch": torch.__version__, "code": code()}
    log, known = Log(results), runs_before(results, alike)
    log.add({"kind": "about", "environment": environment(device), "device": device.type})
    seconds = 60 * (MINUTES if minutes is None else minutes)
    context = multiprocessing.get_context("spawn")  # CUDA doesn't survive a fork
    running: dict[Connection, tuple[Any, str]] = {}
    for task in tasks:
        if only is None or task.what in only:
            here, there = context.Pipe(duplex=False)
            before = known.get(task.what, {})
            given = (there, task, device, alike, 0.8 * seconds, before)
            process = context.Process(target=_child, args=given, daemon=True)
            process.start()
            there.close()  # so that its end shows here
            running[here] = process, task.what
    verdicts: dict[str, bool | None] = {}

    def add(row: Row) -> None:
        log.add(row)
        print(_line(row), flush=True)
        if row.get("impl") == "verdict":
            verdicts[row["what"]] = row["ok"]

    deadline = time.monotonic() + seconds
    try:
        while running:
            ready: list[Any] = wait(list(running), max(0.0, deadline - time.monotonic()))
            if not ready:
                for _, what in running.values():
                    if what not in verdicts:
                        why = f"unfinished after {seconds:.0f} s"
                        add(_ended(what, alike, {"ok": None, "why": why}))
                break
            for rows in ready:
                process, what = running[rows]
                try:
                    add(rows.recv())
                except (EOFError, OSError):
                    process.join()
                    del running[rows]
                    if what not in verdicts:
                        why = f"its process ended with exit code {process.exitcode}"
                        add(_ended(what, alike, {"ok": False, "why": why}))
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()
        log.close()
    draw(rows_in(results), folder / "training.png")
    return 1 if False in verdicts.values() else 2 if None in verdicts.values() else 0


def _line(row: Row) -> str:
    """A row, for who waits."""
    if "losses" in row:
        losses = row["losses"] or [math.nan]
        text = f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
        text += f", {row['accuracy']:.1%} right, {row['seconds']:.1f} s"
        return f"{row['what']}, {row['impl']}: {text}"
    state = {True: "right", False: "WRONG", None: "unknown"}[row["ok"]]
    if row["kind"] == TRAINING:
        return f"{row['what']}, verdict: {state}: {row['why']}"
    figures = f"{row['worst']} off by {row['error']:.1e}, budget {row['budget']:.1e}"
    return f"{row['what']}, gradients at step {row['step']}: {state}: {figures}"


# The picture


def draw(rows: Sequence[Row], path: Path) -> None:
    """For each task in the rows of a results file: curves, their differences, gradients.

    Draws nothing where the rows have no run. Of several equal runs the last is taken.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from .._report.figures import OTHERS, STYLE
    from .._report.figures import OURS as COLOR

    rows = [row for row in rows if row["kind"] in (TRAINING, GRADIENTS)]
    tasks = list(dict.fromkeys(row["what"] for row in rows if row.get("losses")))
    if not tasks:
        return
    looks: dict[str, dict[str, Any]] = {
        FLOAT32: {"color": "0.6", "linewidth": 5},
        OURS: {"color": COLOR, "linewidth": 2.5},
        EAGER: {"color": OTHERS, "linewidth": 1.5, "linestyle": (0, (3, 2))},
    } | {name: {"color": OTHERS, "linewidth": 0.7, "alpha": 0.6} for name in NUDGED}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 4.6 * len(tasks)), layout="constrained")
        all_axes = figure.subplots(len(tasks), 3, squeeze=False)
        for (curves, gaps, dots), what in zip(all_axes, tasks, strict=True):
            mine = [row for row in rows if row["what"] == what]
            mine = [row for row in mine if row["steps"] == mine[-1]["steps"]]
            runs = {row["impl"]: row for row in mine if row.get("losses")}
            checks = {row["step"]: row for row in mine if row["kind"] == GRADIENTS}
            verdict: Row = {"ok": None, "why": "no verdict"}
            for row in mine:
                verdict = row if row.get("impl") == "verdict" else verdict
            for impl in sorted(runs, key=list(looks).index):
                run = runs[impl]
                label = f"{impl}: {run['accuracy']:.1%} of the test right"
                if impl not in NUDGED:
                    curves.plot(learning.smoothed(run["losses"]), label=label, **looks[impl])
                if impl != FLOAT32 and FLOAT32 in runs:
                    steps = min(len(run["losses"]), len(runs[FLOAT32]["losses"]))
                    pair = (learning.smoothed(r["losses"][:steps]) for r in (run, runs[FLOAT32]))
                    far = distance(run["losses"], runs[FLOAT32]["losses"])
                    label = f"{impl}: RMS {far:.1e}"
                    gaps.plot(next(pair) - next(pair), label=label, **looks[impl])
            pairs = [pair for row in checks.values() for pair in row["errors"].values()]
            for row, marker in zip(checks.values(), "osD", strict=False):
                own, eager = zip(*row["errors"].values(), strict=True)
                look: dict[str, Any] = {"marker": marker, "alpha": 0.5, "linewidths": 0}
                dots.scatter(eager, own, 16, COLOR, label=f"at step {row['step']}", **look)
            if pairs:
                ends = [min(eager for _, eager in pairs), max(eager for _, eager in pairs)]
                dots.plot(ends, ends, color="0.7", zorder=0, label="as far off as eager")
                dots.plot(ends, [FACTOR * end for end in ends], color="red", label="the budget")
            state = {True: "right", False: "WRONG", None: "unsettled"}[verdict["ok"]]
            run = next(iter(runs.values()))
            where = f"{what} ({run['network']}): {state}"
            curves.set_title(f"{where}\nTraining loss on {run['device']}")
            gaps.set_title("Loss less that of eager float32")
            dots.set_title("Error of each parameter's gradient")
            dots.set(xscale="log", yscale="log", xlabel=f"{EAGER} (relative)", ylabel=OURS)
            for axes in (curves, gaps, dots):
                if axes.has_data():
                    axes.legend(frameon=False, fontsize=8)
            curves.set_xlabel(f"step, mean of {WINDOW}")
            gaps.set_xlabel("\n".join(["step", *textwrap.wrap(verdict["why"], 75)]))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
