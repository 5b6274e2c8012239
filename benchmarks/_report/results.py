"""Results files, read and judged.

A file has one JSON object a line, told apart by its "kind": the run itself ("about", "ceilings",
"step"), what was measured ("time"), what was not and why ("left out", "absent"), and what was
counted without a GPU ("proxy"). pytest-benchmark's own JSON holds the same rows. Kinds and keys
that nobody here knows are left alone.

Two rules hold wherever a figure is shown. An implementation that failed its parity check has no
time, whatever the file says; where that is ours, nothing in the group has a speed-up. And a ratio
is a win or a loss only where it is further from 1 than ours against itself, quartiles included.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .._measure import Stats

Row = dict[str, Any]

EXPECTED = (
    'expected JSON Lines, each an object with a "kind", or the JSON that pytest-benchmark wrote '
    "of these benchmarks"
)
A_A_BOUND = 0.02  # ours against itself should be nearer to 1 than this

# What tells two rows of a kind apart; of equal ones the last is taken.
KEYS = {
    "time": ("group", "impl"),
    "left out": ("group", "impl"),
    "absent": ("impl",),
    "proxy": ("model", "batch", "precision", "impl", "step"),
    "step": ("what",),
}
# All that is said of an implementation that is wrong.
IDENTITY = {"kind", "level", "group", "case", "impl", "package", "ours", "own", "parity"}


@dataclass(frozen=True)
class Results:
    """The rows of one or more files; of a group, those of one run that timed it (see `read`)."""

    paths: tuple[Path, ...]
    rows: tuple[Row, ...]

    def of(self, kind: str) -> list[Row]:
        """The rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def about(self, kind: str = "about") -> Row:
        """The rows of a kind that stands for the run, the last word on each key; or empty."""
        return {key: value for row in self.of(kind) for key, value in row.items()}

    @property
    def environment(self) -> Row:
        """Of the last run."""
        environment: Row = self.about().get("environment", {})
        return environment

    @property
    def device(self) -> str:
        """The name of the card, or of the CPU with its threads."""
        return _device(self.about())

    def groups(self, level: str) -> dict[str, list[Row]]:
        """The "time" rows of a level, "op" or "model", by group."""
        found: dict[str, list[Row]] = {}
        for row in self.of("time"):
            if row["level"] == level:
                found.setdefault(row["group"], []).append(row)
        return found

    @cached_property
    def ours(self) -> dict[str, Row]:
        """By group, the row that the group's ratios are against."""
        return {row["group"]: row for row in self.of("time") if row.get("ours")}

    def spread(self, row: Row) -> float:
        """How far the median and quartiles of ours against itself are from 1; 0 if not measured.

        In the rounds of this row, if it has them, as where rivals come one by one.
        """
        a_a = row.get("a_a") or self.ours.get(row["group"], {}).get("a_a")
        return max(abs(a_a[key] - 1) for key in ("median", "q1", "q3")) if a_a else 0.0

    def noisy(self, group: str) -> bool:
        """Whether ours against itself is further from 1 than it should be."""
        a_a = self.ours.get(group, {}).get("a_a")
        return a_a is not None and abs(a_a["median"] - 1) > A_A_BOUND

    def verdict(self, row: Row) -> str:
        """What a "time" row says of ours.

        "win", "even" or "loss" against a rival; "ours" itself; "own", another variant of ours, or
        "missed", one that `impl="auto"` had better taken; "wrong", it failed its parity check;
        "void", nothing, since ours was not timed.
        """
        if not row["parity"]["ok"]:
            return "wrong"
        if row.get("ours"):
            return "ours"
        if "against_ours" not in row:
            return "void"
        faster, noise = ratio(row), 1 + self.spread(row)
        if row.get("own"):
            return "missed" if row["level"] == "op" and faster < 1 / noise else "own"
        return "even" if 1 / noise <= faster <= noise else "win" if faster > 1 else "loss"

    def contests(self, level: str) -> list[Row]:
        """The rows of rivals that have a ratio to ours."""
        rows = [row for group in self.groups(level).values() for row in group]
        return [row for row in rows if self.verdict(row) in ("win", "even", "loss")]

    def behind(self, level: str) -> list[Row]:
        """The rows of rivals with a median ahead of ours, whatever the spread; worst first."""
        return sorted((row for row in self.contests(level) if ratio(row) < 1), key=ratio)

    def losses(self, level: str) -> list[Row]:
        """Those of `behind` that the spread of ours against itself doesn't explain; worst first."""
        return [row for row in self.behind(level) if self.verdict(row) == "loss"]

    def outcomes(self, level: str) -> Counter[str]:
        """In how many groups ours is the fastest, level with a rival, and so on."""
        counts: Counter[str] = Counter()
        for rows in self.groups(level).values():
            found = {self.verdict(row) for row in rows}
            if "ours" not in found:
                counts["not timed"] += 1
            elif "loss" in found:
                counts["slower"] += 1
            elif "even" in found:
                counts["level"] += 1
            else:
                counts["fastest" if "win" in found else "without a rival"] += 1
        return counts


def ratio(row: Row) -> float:
    """Time of a rival / time of ours, in the same rounds: above 1 ours is faster."""
    return float(row["against_ours"]["median"])


def read(*paths: Path) -> Results:
    """One or more results files as one; of what several hold, the last given is taken.

    Raises:
        ValueError: no results file, or files of different devices.
    """
    runs: list[list[Row]] = []
    origins: list[Path] = []
    for path in paths:
        runs.append([])
        for row in _parse(path):
            if row["kind"] == "about" and runs[-1]:  # a later run, appended
                runs.append([])
            runs[-1].append(row)
        origins += [path] * (len(runs) - len(origins))
    devices = {_device(row) for run in runs for row in run if row["kind"] == "about"}
    if len(devices) > 1:
        raise ValueError(f"expected files of one device, got: {', '.join(sorted(devices))}")
    # Ratios mean something within one run only, so a group is taken whole: from the run that timed
    # most of it, as one that was cut off must not take its losses away, and of such the last.
    timed_rows = Counter(
        (row["group"], n)
        for n, run in enumerate(runs)
        for row in run
        if row["kind"] == "time" and "seconds" in row
    )
    last: dict[Any, int] = {}
    for n, run in enumerate(runs):
        for group in dict.fromkeys(row["group"] for row in run if row["kind"] == "time"):
            if timed_rows[group, n] >= timed_rows[group, last.get(group, n)]:
                last[group] = n
    # But another grid of the same source has contenders of its own, compilers, whose ratios are to
    # ours in rounds of theirs.
    here = {
        (row["group"], row["impl"])
        for n, run in enumerate(runs)
        for row in run
        if row["kind"] == "time" and last[row["group"]] == n
    }
    sources = [_source(path, run) for path, run in zip(origins, runs, strict=True)]
    kept: dict[tuple[Any, ...], Row] = {}
    for n, run in enumerate(runs):
        for row in run:
            whole = last.get(row.get("group"), n)
            (source, grid), (chosen, other) = sources[n], sources[whole]
            more = source == chosen and grid != other and "against_ours" in row
            if whole == n or (more and (row["group"], row["impl"]) not in here):
                kind = row["kind"]
                told_apart = [row.get(k) for k in KEYS[kind]] if kind in KEYS else [len(kept)]
                key = (kind, *told_apart)
                kept[key] = row
    found = [row for row in kept.values() if row["kind"] == "time"]
    timed = {row["impl"] for row in found}
    told = {(row["group"], row["impl"]) for row in found}
    rows = [
        row
        for row in kept.values()
        if not (row["kind"] == "absent" and row["impl"] in timed)
        and not (row["kind"] == "left out" and (row["group"], row["impl"]) in told)
    ]
    return Results(tuple(paths), tuple(_believable(rows)))


def _source(path: Path, run: list[Row]) -> tuple[str, str | None]:
    """What a run measured, its file where that is unknown, and its grid."""
    about = next((row for row in run if row["kind"] == "about"), {})
    environment = about.get("environment", {})
    commit = None if environment.get("uncommitted") else environment.get("commit")
    return commit or str(path), about.get("grid")


def _believable(rows: Iterable[Row]) -> list[Row]:
    """Without times of what is wrong, and without ratios to ours where that has no time."""
    rows = [
        {k: v for k, v in row.items() if k in IDENTITY}
        if row["kind"] == "time" and not row["parity"]["ok"]
        else row
        for row in rows
    ]
    valid = {r["group"] for r in rows if r["kind"] == "time" and r.get("ours") and "seconds" in r}
    return [
        {k: v for k, v in row.items() if k != "against_ours"}
        if row["kind"] == "time" and row["group"] not in valid
        else row
        for row in rows
    ]


def _device(about: Row) -> str:
    found = about.get("environment", {})
    return str(found.get("card", {}).get("name") or found.get("cpu", "CPU"))


def _parse(path: Path) -> list[Row]:
    """The rows of one file, in order."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}; {EXPECTED}") from error
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict) and "benchmarks" in whole:
        rows = list(whole.get("vitkern", []))
        infos = [benchmark.get("extra_info", {}) for benchmark in whole["benchmarks"]]
        rows += [info["row"] for info in infos if "row" in info]
    else:
        rows = _parse_lines(path, text.split("\n"))
    if not rows:
        raise ValueError(f"{path}: no rows; {EXPECTED}")
    for row in rows:
        if not isinstance(row, dict) or "kind" not in row:
            raise ValueError(f"{path}: a row without a kind; {EXPECTED}")
        needed = {"group", "impl", "level", "parity"} if row["kind"] == "time" else set()
        if missing := needed - row.keys():
            raise ValueError(f"{path}: a time row without {', '.join(sorted(missing))}: {row}")
    return rows


def _parse_lines(path: Path, lines: Sequence[str]) -> list[Any]:
    rows: list[Any] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if rows:  # a process was killed in the middle of it
                continue
            raise ValueError(f"{path}, line {number}: not JSON; {EXPECTED}") from error
    return rows


# Words and figures


def stats(values: Row, scale: float = 1.0) -> Stats:
    """What a row holds of a distribution."""
    median, q1, q3 = (values[key] * scale for key in ("median", "q1", "q3"))
    return Stats(median, q1, q3, values["n"])


def duration(seconds: Stats) -> str:
    """Median and quartiles in the unit that suits the median."""
    unit, scale = next(
        (pair for pair in (("s", 1.0), ("ms", 1e3)) if seconds.median * pair[1] >= 1), ("us", 1e6)
    )
    return f"{stats(vars(seconds), scale):.4g} {unit}"


def short(number: float) -> str:
    """Three digits or more."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def rate(per_second: float, unit: str) -> str:
    """ "800 TFLOP/s", "8.79 GB/s"."""
    prefix, scale = ("T", 1e12) if per_second >= 1e12 else ("G", 1e9)
    return f"{per_second / scale:.4g} {prefix}{unit}/s"


def mib(number: float | None) -> str:
    """Bytes in MiB; empty for None."""
    return "" if number is None else short(number / 2**20)


def many(number: int, noun: str) -> str:
    """ "1 group", "2 groups"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def describe(row: Row) -> str:
    """One line on how ours does against a row in its group."""
    return f"{ratio(row):.3g} against {row['impl']} in {row['group']}"


def geometric_mean(values: Sequence[float]) -> float:
    """Of at least one value, all above 0."""
    return math.exp(sum(map(math.log, values)) / len(values))


def sections(groups: dict[str, list[Row]]) -> dict[str, list[str]]:
    """Groups by model or op."""
    found: dict[str, list[str]] = {}
    for group, rows in groups.items():
        case = rows[0].get("case", {})
        found.setdefault(str(case.get("model") or case.get("op") or "others"), []).append(group)
    return found


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table, and an empty one behind it."""
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, *lines)]
    made = [f"| {' | '.join(line)} |" for line in cells]
    return [made[0], "|" + "---|" * len(head), *made[1:], ""]
