"""Two results files, before and after."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from vitkern._table import columns

from .._cases import save
from .._measure import Stats
from .results import A_A_BOUND, Results, Row, duration, geometric_mean, read, stats

# That a run may have otherwise than the one before, without a word.
VARYING = ("date", "commit", "uncommitted", "card", "packages", "nvidia_smi")
COLORS = {"broken": "red", "slower": "red", "faster": "green", "mended": "green"}


@dataclass(frozen=True)
class Change:
    """One implementation in one group: seconds before and after, None where it has none."""

    group: str
    impl: str
    ours: bool  # or a variant of ours
    before: Stats | None
    after: Stats | None
    verdict: str

    @property
    def ratio(self) -> float | None:
        """Median time after / before: above 1 it became slower."""
        if self.before is None or self.after is None:
            return None
        return self.after.median / self.before.median


@dataclass(frozen=True)
class Comparison:
    """Two runs, and what differs between them besides the code."""

    changes: tuple[Change, ...]
    warnings: tuple[str, ...]

    def of(self, verdict: str, ours: bool) -> list[Change]:
        """The changes of a kind, the largest ratio first."""
        found = [c for c in self.changes if (c.verdict, c.ours) == (verdict, ours)]
        return sorted(found, key=lambda change: -(change.ratio or 0))

    def failures(self, percent: float) -> list[Change]:
        """Ours that are slower by more than `percent`, both quartiles apart, or no longer right."""
        slower = [c for c in self.of("slower", ours=True) if (c.ratio or 0) > 1 + percent / 100]
        return [*self.of("broken", ours=True), *slower]


def compare(before: Path, after: Path) -> Comparison:
    """Every implementation in every group of two results files.

    Raises:
        ValueError: as `read`.
    """
    results = [read(before), read(after)]
    rows = [{(r["group"], r["impl"]): r for r in each.of("time")} for each in results]
    changes, groups = [], {r["group"] for r in results[1].rows if "group" in r}
    for key in {**rows[0], **rows[1]}:
        old, new = rows[0].get(key), rows[1].get(key)
        either: Row = new or old or {}
        was, now = (stats(r["seconds"]) if r and "seconds" in r else None for r in (old, new))
        # A plain product is timed beside our ops, and nobody's of those here.
        mine = bool(either.get("own") or either.get("ours")) and either.get("level") != "product"
        verdict = _verdict(old, new, was, now)
        if verdict == "only before" and mine and key[0] in groups:
            verdict = "broken"  # its group was measured, and it isn't there any more
        changes.append(Change(*key, mine, was, now, verdict))
    return Comparison(tuple(changes), tuple(_differences(*results)))


def _verdict(old: Row | None, new: Row | None, was: Stats | None, now: Stats | None) -> str:
    if old is None or new is None:
        return "only before" if new is None else "only after"
    if old["parity"]["ok"] != new["parity"]["ok"]:
        return "broken" if old["parity"]["ok"] else "mended"
    if was is None or now is None:
        return "not timed"
    if was.q1 <= now.q3 and now.q1 <= was.q3:  # the quartiles overlap
        return "unchanged"
    return "slower" if now.median > was.median else "faster"


def _differences(before: Results, after: Results) -> list[str]:
    old, new = _conditions(before), _conditions(after)
    return [
        f"{key}: {old.get(key)} before, {new.get(key)} after"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def _conditions(results: Results) -> Row:
    """What should be equal in two runs that are compared."""
    environment = results.environment
    found: Row = {"device": results.device, "policy": results.about().get("policy")}
    found |= {k: v for k, v in environment.items() if k not in VARYING}
    found |= {k: v for k, v in environment.get("packages", {}).items() if k != "vitkern"}
    lines = (environment.get("nvidia_smi") or "").splitlines()
    if len(lines) > 1:  # as CSV: names, then values
        pairs = zip(lines[0].split(", "), lines[1].split(", "), strict=False)
        found |= {k: v for k, v in pairs if not k.startswith(("name", "temperature"))}
    return found


def main_compare(
    before: Path,
    after: Path,
    json_path: Path | None = None,
    fail_slower: float = 100 * A_A_BOUND,
) -> int:
    """``python -m benchmarks compare BEFORE AFTER [--json FILE] [--fail-slower PERCENT]``.

    Returns:
        1 if something of ours is slower by more than `fail_slower` per cent, the quartiles of both
        runs apart, or is no longer right; else 0.
    """
    if fail_slower < 0:
        raise ValueError(f"--fail-slower: expected 0 or more per cent, got {fail_slower:g}")
    compared = compare(before, after)
    _print(compared)
    for warning in compared.warnings:
        print(f"warning: other conditions, {warning}")
    for ours, whose in ((True, "vitkern"), (False, "the others")):
        counts = Counter(change.verdict for change in compared.changes if change.ours == ours)
        text = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        ratios = [c.ratio for c in compared.changes if c.ours == ours and c.ratio]
        mean = f"; after / before {geometric_mean(ratios):.3f}" if ratios else ""
        print(f"{whose}: {text or 'nothing'}{mean}")
    print("after / before: geometric mean. A change of the others is the machine's, not vitkern's.")
    failures = compared.failures(fail_slower)
    for failure in failures:
        print(f"FAILED: {failure.impl} is {failure.verdict} in {failure.group}", file=sys.stderr)
    if json_path is not None:
        rows = [{**asdict(change), "ratio": change.ratio} for change in compared.changes]
        about = {"before": str(before), "after": str(after), "warnings": compared.warnings}
        save(json_path, json.dumps({**about, "changes": rows}, indent=1) + "\n")
    return 1 if failures else 0


def _print(compared: Comparison) -> None:
    """All that changed: by rich on a terminal; a file has no width to fit into."""
    head = ("group", "implementation", "before", "after", "after / before", "")
    lines: list[Sequence[str]] = []
    for ours in (True, False):
        for change in (c for verdict in COLORS for c in compared.of(verdict, ours)):
            times = [duration(t) if t else "wrong" for t in (change.before, change.after)]
            ratio = f"{change.ratio:.3f}" if change.ratio else ""
            lines.append((change.group, change.impl, *times, ratio, change.verdict))
    for verdict in ("only before", "only after"):
        found = [*compared.of(verdict, ours=True), *compared.of(verdict, ours=False)]
        lines += [(change.group, change.impl, "", "", "", verdict) for change in found]
    if not lines:
        print("nothing changed: the quartiles of all times overlap")
    elif not sys.stdout.isatty() or find_spec("rich") is None:
        print(columns([head, *lines]))
    else:
        from rich.console import Console
        from rich.table import Table

        shown = Table(*head)
        for line in lines:
            shown.add_row(*line, style=COLORS.get(line[-1]))
        Console(highlight=False).print(shown)
