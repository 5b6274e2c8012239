"""One comparison: all that compute the same are held against float64, and what is right is timed.

Times are taken in turns with ours, so that a ratio is of neighbouring calls, and ours takes part
twice: what it then seems to gain on itself (A/A) is what the ratios can't be trusted by. Whatever
is wrong, or raises, has no time and no ratio; where ours is wrong, nothing has a ratio.
"""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitkern._memory import peak_memory

from ._measure import Call, Ceilings, Stats, Timer

Row = dict[str, Any]

AGAIN = "ours again"
AUTO = "auto"


class Absent(Exception):
    """Why a rival isn't here: which package is missing, or which part of it."""


class Unfit(Exception):
    """Why a rival can't do this case."""


class OursFailed(Exception):
    """What `impl="auto"` takes could not be asked, since calling it raised."""


class DeviceLost(Exception):
    """The GPU doesn't answer any more."""


@dataclass(frozen=True)
class Ready:
    """What is left to do with an implementation that was built: `check` it, and time its `call`.

    check: `_error_budget.parity` of what `call` computes. note: for the report. memory: whether its
    memory comes from PyTorch's allocator, call by call.
    """

    call: Call
    check: Callable[[], Row]
    note: str = ""
    memory: bool = True


@dataclass(frozen=True)
class Contender:
    """One implementation. `start` builds it, or raises Absent or Unfit.

    package: where it comes from, with its version. own: it is vitkern's. baseline: it is plain
    eager PyTorch.
    """

    start: Callable[[], Ready]
    package: str | None = None
    own: bool = False
    baseline: bool = False


@dataclass(frozen=True)
class Contest:
    """What is compared.

    case: the words of `group`, for tables. ours: tells which contender is what a user of vitkern
    gets. flops, moved: of one call. bound: its least seconds. images: in a call. memory: whether
    the peak is wanted on a CPU, too, where asking costs a second.
    """

    level: str
    group: str
    case: dict[str, Any]
    contenders: Mapping[str, Contender]
    ours: Callable[[], str]
    flops: int
    moved: int
    bound: Callable[[Ceilings], float]
    images: int | None = None
    memory: bool = False


class Result(NamedTuple):
    """A row, and the timings that it sums up."""

    row: Row
    seconds: Sequence[float] = ()


def failure(problem: Exception) -> Row:
    """A verdict on what raised."""
    return {"ok": False, "why": _in_words(problem)}


def _in_words(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:500]


def held(check: Callable[[], Row]) -> Row:
    """The verdict of `check`; whatever raises has failed, unless it is memory that was missing."""
    try:
        return check()
    except (Absent, Unfit, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        return failure(problem)


class Bench:
    """Where contests are held: a device, its ceilings, how long to look, who shares a round.

    seconds: for each contender. together: how many rivals share their rounds with ours; each of
    them stays in memory meanwhile, so on a GPU they come one by one.
    """

    def __init__(
        self, timer: Timer, ceilings: Ceilings, seconds: float, together: int | None = None
    ) -> None:
        self.timer, self.ceilings, self.seconds = timer, ceilings, seconds
        self.together = together or (1 if timer.device.type == "cuda" else 100)

    def hold(
        self, contest: Contest, names: Iterable[str], late: Callable[[], bool] = lambda: False
    ) -> Iterator[Result]:
        """The results of ours and of these contenders, as they come.

        late: whether time is up; then the rest is left out.
        """
        names = list(names)
        try:
            ours = contest.ours()
        except OursFailed as problem:  # which is a result: whoever asks for auto would see it
            mine = _Entered({**_row(contest, AUTO), "ours": True, "own": True})
            mine.row["parity"] = failure(problem)
            rivals = names
        except Exception as problem:  # the reference, then, which all would be held against
            for name in names:
                yield Result(_left_out(contest, name, f"no reference: {_in_words(problem)}"))
            self._free()
            return
        else:
            mine = self._enter(contest, ours)
            mine.row["ours"] = True
            rivals = [name for name in names if name != ours]
        if len(rivals) <= self.together:
            yield from self._round(contest, mine, rivals, with_ours=True)
            return
        yield from self._round(contest, mine, [], with_ours=True)
        for start in range(0, len(rivals), self.together):
            part = rivals[start : start + self.together]
            if late():
                yield from (Result(_left_out(contest, name, "out of time")) for name in part)
            else:
                yield from self._round(contest, mine, part)

    def _round(
        self, contest: Contest, mine: "_Entered", names: list[str], with_ours: bool = False
    ) -> Iterator[Result]:
        """The results of these, and perhaps of ours, timed in turns with it."""
        entered = [self._enter(contest, name) for name in names]
        yield from self._time(contest, mine, entered, with_ours)
        entered.clear()
        self._free()

    def _time(
        self, contest: Contest, mine: "_Entered", entered: list["_Entered"], with_ours: bool
    ) -> Iterator[Result]:
        ours = mine.row["impl"]
        calls = {e.row["impl"]: e.call for e in entered if e.call is not None}
        if mine.call is not None and (calls or with_ours):
            calls = {ours: mine.call, AGAIN: mine.call, **calls}
        times: dict[str, list[float]] = {}
        host: dict[str, float] = {}
        try:
            # What a launch of an op costs Python is the model's to show.
            alone = contest.level == "op"
            times = self.timer.in_turns(calls, self.seconds, ahead=alone)
            if not alone:
                host = {name: self.timer.host_seconds(call, 5) for name, call in calls.items()}
        except Exception as problem:
            self._free()
            right = [e for e in entered if e.call is not None]
            if with_ours and right:  # who is to blame shows when they are timed one by one
                yield from self._time(contest, mine, [], with_ours=True)
            if len(right) > 1 or (with_ours and right):
                for each in entered:
                    yield from self._time(contest, mine, [each], with_ours=False)
                return
            if right and mine.call is not None and isinstance(problem, torch.OutOfMemoryError):
                # Not beside ours, but perhaps alone: a time, without a ratio.
                yield from self._time(contest, _Entered(mine.row), entered, with_ours=False)
                return
            (right[0] if right else mine).fail(contest, problem)
        for each in ([mine] if with_ours else []) + entered:
            row = each.row
            seconds = times.get(row["impl"], [])
            if seconds:
                stats = Stats.of(seconds)
                row["seconds"] = vars(stats)
                if host.get(row["impl"]):  # of a GPU; a CPU does all of it itself
                    row["host_seconds"] = host[row["impl"]]
                if ours in times:
                    row["a_a"] = vars(Stats.of(_ratios(times[AGAIN], times[ours])))
                    if row["impl"] != ours:
                        row["against_ours"] = vars(Stats.of(_ratios(seconds, times[ours])))
                row |= {"flops": contest.flops, "bytes": contest.moved}
                row["roofline"] = contest.bound(self.ceilings) / stats.median
                if contest.images is not None:
                    row["images_per_s"] = contest.images / stats.median
            yield Result(row, seconds)

    def _enter(self, contest: Contest, name: str) -> "_Entered":
        """Build and check one."""
        contender = contest.contenders[name]
        row = _row(contest, name)
        row |= {"package": contender.package, "own": contender.own, "baseline": contender.baseline}
        entered = _Entered(row)
        try:
            ready = contender.start()
            row["parity"] = held(ready.check)
            asked = contest.memory or self.timer.device.type == "cuda"
            if row["parity"]["ok"] and ready.memory and asked:
                row["peak_bytes"] = peak_memory(self.timer.device, ready.call)
        except Exception as problem:  # one contender must not end the run
            entered.fail(contest, problem)
            self._free()
            return entered
        if ready.note:
            row["note"] = ready.note
        if row["parity"]["ok"]:
            entered.call = ready.call
        return entered

    def _free(self) -> None:
        """Give memory back to the GPU.

        Raises:
            DeviceLost: an error has left the GPU unusable; no result from here on would be one.
        """
        if self.timer.device.type != "cuda":
            return
        gc.collect()
        try:
            torch.cuda.synchronize(self.timer.device)
            torch.cuda.empty_cache()
        except Exception as problem:
            raise DeviceLost(_in_words(problem)) from problem


@dataclass
class _Entered:
    """A contender's row as far as it goes, and what is to be timed of it, if it is right."""

    row: Row
    call: Call | None = None

    def fail(self, contest: Contest, problem: Exception) -> None:
        """Write down why it has no time."""
        self.call = None
        if isinstance(problem, (Absent, Unfit)):
            why = str(problem)
        elif isinstance(problem, torch.OutOfMemoryError):
            why = "not enough memory"
        else:
            self.row["parity"] = failure(problem)
            return
        self.row = _left_out(contest, self.row["impl"], why)


def _row(contest: Contest, name: str) -> Row:
    words = {"level": contest.level, "group": contest.group, "case": contest.case, "impl": name}
    return {
        "kind": "time",
        **words,
        "package": None,
        "ours": False,
        "own": False,
        "baseline": False,
    }


def _ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _left_out(contest: Contest, name: str, why: str) -> Row:
    return {"kind": "left out", "group": contest.group, "impl": name, "why": why}


class Log:
    """A growing file of results: JSON, one object a line, on disk before `add` returns."""

    def __init__(self, path: Path) -> None:
        """Begin `path`, or go on with it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[Row] = []
        torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._file = path.open("a")
        if torn:  # by a process that was killed as it wrote
            self._file.write("\n")

    def add(self, row: Row) -> None:
        """Append one result."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def timed(self) -> bool:
        """Whether anything was."""
        return any(row["kind"] == "time" for row in self.rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
