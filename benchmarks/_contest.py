"""One comparison: all that compute the same are held against float64, and what is right is timed.

Times are taken in turns with ours, so that a ratio is of neighbouring calls, and ours takes part
twice: what it then seems to gain on itself (A/A) is what the ratios can't be trusted by. Whatever
is wrong, or raises, has no time and no ratio; where ours is wrong, nothing has a ratio.
"""

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


class Absent(Exception):
    """Why a rival isn't here: which package is missing, or which part of it."""


class Unfit(Exception):
    """Why a rival can't do this case."""


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
    return {"ok": False, "why": f"{type(problem).__name__}: {problem}"[:500]}


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

    def hold(self, contest: Contest, names: Iterable[str]) -> Iterator[Result]:
        """The results of these contenders and of ours."""
        ours = contest.ours()
        names = [name for name in names if name != ours]
        rows: dict[str, Row] = {}
        mine = self._enter(contest, ours, rows, ours=True)
        times: dict[str, list[float]] = {}
        ratios: dict[str, list[float]] = {}
        a_a: list[float] = []
        for start in range(0, max(len(names), 1), self.together):
            part = names[start : start + self.together]
            calls = {name: call for name in part if (call := self._enter(contest, name, rows))}
            if mine is not None and (calls or not times):
                calls = {ours: mine, AGAIN: mine, **calls}
            try:
                found = self.timer.in_turns(calls, self.seconds) if calls else {}
            except torch.OutOfMemoryError:
                for name in part:
                    rows[name] = _left_out(contest, name, "not enough memory beside ours")
                found = {}
            for name, seconds in found.items():
                if name == AGAIN:
                    a_a += _ratios(seconds, found[ours])
                    continue
                times.setdefault(name, []).extend(seconds)
                if mine is not None and name != ours:
                    ratios[name] = _ratios(seconds, found[ours])
            calls.clear()
            _free(self.timer.device)
        for name, row in rows.items():
            if name in times:
                stats = Stats.of(times[name])
                row["seconds"] = vars(stats)
                if name in ratios:
                    row["against_ours"] = vars(Stats.of(ratios[name]))
                if name == ours:
                    row["a_a"] = vars(Stats.of(a_a))
                row |= {"flops": contest.flops, "bytes": contest.moved}
                row["roofline"] = contest.bound(self.ceilings) / stats.median
                if contest.images is not None:
                    row["images_per_s"] = contest.images / stats.median
            yield Result(row, times.get(name, []))

    def _enter(
        self, contest: Contest, name: str, rows: dict[str, Row], ours: bool = False
    ) -> Call | None:
        """Build and check; the call to time, or None, and in any case a row."""
        contender = contest.contenders[name]
        row: Row = {
            "kind": "time",
            "level": contest.level,
            "group": contest.group,
            "case": contest.case,
            "impl": name,
            "package": contender.package,
            "ours": ours,
            "own": contender.own,
            "baseline": contender.baseline,
        }
        rows[name] = row
        try:
            try:
                ready = contender.start()
                row["parity"] = held(ready.check)
                asked = contest.memory or self.timer.device.type == "cuda"
                if row["parity"]["ok"] and ready.memory and asked:
                    row["peak_bytes"] = peak_memory(self.timer.device, ready.call)
            except (Absent, Unfit) as reason:
                rows[name] = _left_out(contest, name, str(reason))
                return None
        except torch.OutOfMemoryError:
            rows[name] = _left_out(contest, name, "not enough memory")
            _free(self.timer.device)
            return None
        except Exception as problem:  # one contender must not end the run
            row["parity"] = failure(problem)
            return None
        if ready.note:
            row["note"] = ready.note
        return ready.call if row["parity"]["ok"] else None


def _ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _left_out(contest: Contest, name: str, why: str) -> Row:
    return {"kind": "left out", "group": contest.group, "impl": name, "why": why}


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Log:
    """A growing file of results: JSON, one object a line, on disk before `add` returns."""

    def __init__(self, path: Path) -> None:
        """Begin `path`, or go on with it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows: list[Row] = []
        self._file = path.open("a")

    def add(self, row: Row) -> None:
        """Append one result."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
