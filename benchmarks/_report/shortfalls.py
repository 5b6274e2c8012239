"""What is told of the targets: a section of the report, the command, and why one is missed.

What the same results say of a reason: of a model the ops at its shapes, the furthest from the roof
first, and where a training step's time goes, if it was profiled; of an op all that did it; of
"never slower" everything that was faster.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vitkern.model.config import ViTConfig

from .results import Results, Row, describe, duration, many, ratio, read, stats, table
from .verdicts import Verdict, absolute_here, in_words, judge, offers

MOST = 10  # lines of a reason


def main_targets(paths: Sequence[Path]) -> int:
    """``python -m benchmarks targets FILE...``: print the verdicts.

    Returns:
        1 if a target is missed, else 0.

    Raises:
        ValueError: as `read`; or there is no result from a GPU, for which targets are.
    """
    results = read(*paths)
    verdicts = judge(results)
    if not verdicts:
        raise ValueError(f"RESULTS: expected a run on a GPU, got one on: {results.device}")
    print("\n".join(_told(results, verdicts)).rstrip())
    return int(any(verdict.outcome == "missed" for verdict in verdicts))


def section(results: Results) -> list[str]:
    """Lines of the report; none without a GPU."""
    verdicts = judge(results)
    return _told(results, verdicts) if verdicts else []


def _told(results: Results, verdicts: Sequence[Verdict]) -> list[str]:
    text = (
        "Even: the threshold is no further from the figure than vitkern's A/A from 1. Declared in "
        "`benchmarks/_report/targets.py`."
    )
    if not absolute_here(results.device):
        text += (
            " MFU, times and images/s are set for an H100; on this card they are asked as shares "
            "of the roofline at its own ceilings, as large as they would be of an H100's."
        )
    lines = ["## Targets", "", in_words(verdicts), "", text, ""]
    head = ("target", "must", "aim", "is", "", "from")
    made = [
        (v.target.what, v.must, v.aim, v.found, _marked(v.outcome), v.source)
        for v in verdicts
        if v.outcome != "not measured"
    ]
    lines += table(head, made) if made else []
    without: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.outcome == "not measured":
            without.setdefault(verdict.source, []).append(verdict.target.what)
    if without:
        lines += ["Not measured:", ""]
        lines += [*(f"- {'; '.join(names)}: {why}" for why, names in without.items()), ""]
    return [*lines, *_reasons(results, verdicts)]


def _marked(outcome: str) -> str:
    return f"**{outcome}**" if outcome == "missed" else outcome


def _reasons(results: Results, verdicts: Iterable[Verdict]) -> list[str]:
    """What several targets of one model and step, or of one op's group, miss has one reason."""
    together: dict[str, list[Verdict]] = {}
    rows: dict[str, Row] = {}
    for verdict in verdicts:
        if verdict.outcome == "missed" and verdict.found:  # what is wrong has no time to explain
            groups = verdict.target.groups
            group = next((g for g in groups if g in results.ours), groups[0])
            row = results.ours.get(group, {})
            model = row.get("level") == "model"
            key = f"{row['case']['model']} {row['case']['step']}" if model else group
            together.setdefault(key, []).append(verdict)
            rows[key] = row
    lines: list[str] = []
    for key, missed in together.items():
        lines += [f"### Missed: {'; '.join(verdict.target.what for verdict in missed)}", ""]
        if missed[0].target.measure == "never slower":
            lines += _faster(results, key)
        elif rows[key].get("level") == "model":
            lines += _of_a_model(results, rows[key]["case"])
        elif rows[key]:
            lines += _of_an_op(results, key)
        else:  # counted: all is said in the table
            lines += [missed[0].source, ""]
    return lines


def _faster(results: Results, level: str) -> list[str]:
    """The worst of all that beat ours beyond A/A."""
    rows = [row for row in offers(results, level) if results.verdict(row) in ("loss", "missed")]
    rows.sort(key=ratio)
    lines = [f"- {describe(row)}" for row in rows[:MOST]]
    more = [f"- and {len(rows) - MOST} more"] if len(rows) > MOST else []
    return [*lines, *more, ""]


def _of_a_model(results: Results, case: Row) -> list[str]:
    """The ops at its shapes, the worst first; and the profile of a training step."""
    training = case["step"] == "train"
    rows = [
        row
        for row in results.ours.values()
        if row["level"] == "op"
        and "roofline" in row
        and belongs(row["case"], case["model"])
        # At batch 1 ops have other shapes than in training, and no backward.
        and (training or "backward" not in row["case"]["op"])
    ]
    rows.sort(key=lambda row: float(row["roofline"]))
    lines = []
    if rows:
        named = f"The ops at {case['model']}'s shapes, the furthest from the roof first"
        lines += [f"{named} ({len(rows)} were timed):", ""]
        lines += _ops(rows[:MOST])
    else:
        lines += [f"No op was timed at {case['model']}'s shapes.", ""]
    return [*lines, *(_profile(results, case["model"]) if training else [])]


def _ops(rows: Iterable[Row]) -> list[str]:
    cells = (
        (row["group"], row["impl"], duration(stats(row["seconds"])), f"{100 * row['roofline']:.0f}")
        for row in rows
    )
    return table(("op", "implementation", "time", "% of roofline"), cells)


def belongs(case: Row, model: str) -> bool:
    """Whether an op's sample has a model's widths, tokens or heads."""
    config = ViTConfig.from_name(model)
    tokens, width = math.prod(config.grid_size) + config.num_prefix_tokens, config.embed_dim
    hidden, patch = round(width * config.mlp_ratio), config.patch_size[0]
    attention = rf"N={tokens} H=\d+ d={width // config.num_heads}\b"
    shapes = (rf"x{tokens}x({width}|{hidden})\b", attention, rf"/{patch}x{patch} D={width}\b")
    return case["dtype"] == "bfloat16" and any(re.search(s, case["sample"]) for s in shapes)


def _of_an_op(results: Results, group: str) -> list[str]:
    rows = [row for row in results.groups("op").get(group, []) if "roofline" in row]
    return _ops(sorted(rows, key=lambda row: float(row["seconds"]["median"])))


def _profile(results: Results, model: str) -> list[str]:
    """Where a training step's time goes, of the profile that lies beside the results, if any."""
    paths = (path.parent / f"profile-{model}" / "report.json" for path in results.paths)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return []
    rows = json.loads(path.read_text())["rows"]
    rows.sort(key=lambda row: -float(row["seconds"]))
    cells = [
        (
            row["op"],
            row["phase"],
            f"{1e3 * row['seconds']:.3g} ms",
            f"{100 * row['share']:.1f} %",
            "" if row["launches"] is None else f"{row['launches']:.0f}",
            "" if row["roofline"] is None else f"{100 * row['roofline']:.0f}",
        )
        for row in rows[:MOST]
    ]
    head = ("op", "phase", "of a step", "share", "launches", "% of roofline")
    whole = many(len(rows), "row")
    return [f"A training step, profiled ({whole}, the longest first):", "", *table(head, cells)]
