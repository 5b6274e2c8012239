"""One run of ``pytest benchmarks``: what was measured so far, and how pytest-benchmark hears of it.

All contenders of a group are measured in turns when the first of its tests runs; every test then
hands its own times to pytest-benchmark, whose groups, JSON and comparisons work as ever.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ._contest import Bench, Contest, DeviceLost, Log, Result, Row
from ._grid import dtypes
from ._measure import Ceilings, Clock, Timer, clocks, environment
from .peers import networks, ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_now = 0.0


def replayed() -> float:
    """pytest-benchmark's clock: it stands still but for what `Session.test` lets pass."""
    return _now


def _pass(seconds: float) -> None:
    global _now
    _now += seconds


class Session:
    """What is to be measured, by group, and what has been."""

    def __init__(
        self,
        path: Path,
        grid: str,
        groups: Mapping[str, list[str]],
        minutes: float,
        seconds: float,
        tell: Callable[[str], object] = print,
        clock: Clock = time.monotonic,
    ) -> None:
        """Begin a run: `groups` says which contenders each group is to have.

        path: results are appended there. minutes: after these nothing new begins. seconds: for
        each contender. tell: prints a line.
        """
        self.log, self.grid, self.groups, self.seconds = Log(path), grid, groups, seconds
        self.tell, self.clock = tell, clock
        self.begun, self.limit = clock(), 60 * minutes
        self.timer = Timer(DEVICE)
        self._bench: Bench | None = None
        self._done: set[str] = set()
        self._last: dict[str, Result] = {}
        about = {"environment": environment(DEVICE), "policy": self.timer.policy}
        self.log.add({"kind": "about", **about, "grid": grid, "device": DEVICE.type})
        for name, why in {**networks.absent(), **ops.absent()}.items():
            self.log.add({"kind": "absent", "impl": name, "why": why})

    @property
    def bench(self) -> Bench:
        """Made when it is first needed: measuring the ceilings takes a moment."""
        if self._bench is None:
            ceilings = Ceilings.measure(DEVICE, dtypes(DEVICE))
            self.log.add({"kind": "ceilings", **vars(ceilings)})
            self.log.add(clocks(DEVICE))
            self._bench = Bench(self.timer, ceilings, self.seconds)
        return self._bench

    def result(self, group: str, contest: Callable[[], Contest], name: str) -> Result:
        """That of one contender; the first call of a group measures all of its contenders."""
        if group not in self._done:
            if self.late():
                row = {"kind": "left out", "group": group, "impl": name, "why": "out of time"}
                self.log.add(row)
                return Result(row)
            self._last = {}
            self._done.add(group)  # whatever comes of it: it isn't measured again
            networks.forget()  # what the last group has compiled
            try:
                for found in self.bench.hold(contest(), self.groups.get(group, [name]), self.late):
                    self.log.add(found.row)
                    self._last[found.row["impl"]] = found
            except DeviceLost as problem:
                pytest.exit(f"the GPU doesn't answer any more: {problem}", returncode=1)
            self.tell(self.progress(group))
        missing = {"kind": "left out", "group": group, "impl": name, "why": "its group broke off"}
        return self._last.get(name, Result(missing))

    def late(self) -> bool:
        """Whether time is up."""
        return self.clock() - self.begun > self.limit

    def progress(self, group: str) -> str:
        """A bar, the time left, and what was found last."""
        number = max(len(self.groups), len(self._done))
        share = len(self._done) / number
        left = (self.clock() - self.begun) * (1 / share - 1)
        found = in_words(group, [result.row for result in self._last.values()])
        bar = f"{'=' * round(20 * share):<20}"
        return f"[{bar}] {len(self._done)}/{number}, {in_minutes(left)} left | {found}"

    def test(self, group: str, contest: Callable[[], Contest], name: str, benchmark: Any) -> None:
        """One test: skips what can't take part, fails where a kernel of ours is wrong."""
        row, seconds = self.result(group, contest, name)
        if row["kind"] == "left out":
            pytest.skip(row["why"])
        benchmark.group = group
        benchmark.extra_info["row"] = row
        if not row["parity"]["ok"]:
            refused = f"{name} is not timed, for it is not right: {row['parity']}"
            if row["own"]:
                pytest.fail(refused, pytrace=False)
            pytest.skip(refused)
        left = iter(seconds)
        benchmark.pedantic(lambda: _pass(next(left)), rounds=len(seconds))


def in_minutes(seconds: float) -> str:
    """ "1:02:03", or "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def in_words(group: str, rows: list[Row]) -> str:
    """What was found: our time, and how many times as long the others take."""
    parts = []
    for row in rows:
        if row["kind"] != "time":
            continue
        if not row["parity"]["ok"]:
            parts.append(f"{row['impl']} WRONG")
        elif row["ours"]:
            parts.insert(0, f"{row['impl']} {1e3 * row['seconds']['median']:.3g} ms")
        elif "against_ours" in row:
            parts.append(f"{row['impl']} x {row['against_ours']['median']:.2f}")
    return f"{group}: {', '.join(parts)}"
