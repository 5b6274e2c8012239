"""The report's pictures: first what they show, as data, then how it is drawn."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from .results import Results, Row, rate, ratio, sections, short

OURS, OWN, OTHERS = "#0b7285", "#66b2bf", "#e8590c"
ROWS = 40  # groups in one picture
PANELS = 12  # groups with memory bars
STYLE: dict[str, Any] = {
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
}

# By verdict: what the legend says, the full colour, and a hatch.
LEGEND = {
    "win": ("vitkern is faster", "#2f9e44", None),
    "even": ("even: within A/A", "#d0d0d0", None),
    "loss": ("vitkern is slower: a loss", "#e03131", None),
    "own": ("another variant of vitkern", "#d6eaf8", None),
    "missed": ("another of vitkern's, that auto had better taken", "#f59f00", None),
    "ours": ("what auto takes", "#ffffff", None),
    "wrong": ("failed its parity check: no speed-up", "#ffffff", "xxxx"),
    "void": ("vitkern is wrong or has no time", "#ffffff", ".."),
    "left out": ("left out, the report says why", "#ffffff", "//"),
    "absent": ("absent: not installed here", "#f1f3f5", "----"),
}


# The data


@dataclass(frozen=True)
class Grid:
    """Verdict and speed-up by group and implementation; pairs that were never meant are missing.

    nowhere: the implementations that have no column, since they were left out in all groups.
    """

    groups: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], tuple[str, float | None]]
    nowhere: list[str]


def grid(results: Results, level: str, groups: Sequence[str]) -> Grid:
    """What is known of some groups of a level: the baseline, rivals, then our own variants."""
    rows = [row for group in groups for row in results.groups(level)[group]]
    cells = {
        (r["group"], r["impl"]): (results.verdict(r), ratio(r) if "against_ours" in r else None)
        for r in rows
    }
    absent = {row["impl"] for row in results.of("absent")}
    for row in results.of("left out"):
        if row["group"] in groups:
            verdict = "absent" if row["impl"] in absent else "left out"
            cells.setdefault((row["group"], row["impl"]), (verdict, None))
    found: dict[str, set[str]] = {row["impl"]: set() for row in rows if row.get("baseline")}
    for (_, impl), (verdict, _) in cells.items():
        found.setdefault(impl, set()).add(verdict)
    # Many packages have but one or two ops: on most pictures their columns would be empty.
    nowhere = [i for i, verdicts in found.items() if verdicts <= {"left out", "absent"}]
    nowhere = nowhere if level == "op" else []
    # Our model, where it is right in all groups, is what the others are held against.
    silent = [i for i, verdicts in found.items() if level == "model" and verdicts == {"ours"}]
    own = {row["impl"] for row in rows if row.get("own")}
    shown = [impl for impl in found if impl not in [*nowhere, *silent]]
    return Grid(list(groups), sorted(shown, key=lambda impl: impl in own), cells, nowhere)


def pages(results: Results, level: str) -> list[list[str]]:
    """Groups in parts of at most `ROWS`: several models or ops, or a part of one."""
    made: list[list[str]] = [[]]
    for groups in sections(results.groups(level)).values():
        if len(made[-1]) + len(groups) <= ROWS:
            made[-1] += groups
            continue
        parts = -(-len(groups) // ROWS)
        size = -(-len(groups) // parts)
        made += [groups[start : start + size] for start in range(0, len(groups), size)]
        made += [[]] if parts > 1 else []  # the rest of this one stays alone
    return [part for part in made if part]


@dataclass(frozen=True)
class Point:
    """One implementation in one group on the roofline plot."""

    panel: str
    dtype: str
    backward: bool
    ours: bool
    intensity: float  # FLOPs a byte
    rate: float  # FLOPs a second


def points(results: Results) -> list[Point]:
    """All that has a time, FLOPs and bytes."""
    made = []
    for row in results.of("time"):
        if not ("seconds" in row and row.get("flops") and row.get("bytes")):
            continue
        case = row["case"]
        name, precision = case.get("op", "models"), case.get("precision", "float32")
        dtype = case.get("dtype") or ("float32" if precision == "float32" else "bfloat16")
        backward = name.endswith("_backward") or case.get("step") == "train"
        intensity, rate = row["flops"] / row["bytes"], row["flops"] / row["seconds"]["median"]
        panel = name.removesuffix("_backward")
        made.append(Point(panel, dtype, backward, bool(row.get("ours")), intensity, rate))
    return made


def memory(results: Results) -> dict[str, list[Row]]:
    """Rows with peak memory by training group: of each model and precision the largest batch."""
    largest: dict[tuple[str, str], tuple[int, str]] = {}
    groups = results.groups("model")
    for group, rows in groups.items():
        case = rows[0]["case"]
        if case["step"] == "train" and any(row.get("peak_bytes") for row in rows):
            key = (case["model"], case["precision"])
            largest[key] = max(largest.get(key, (0, "")), (case["batch"], group))
    names = [group for _, group in largest.values()]
    return {name: [row for row in groups[name] if row.get("peak_bytes")] for name in names}


# The drawing


def draw(results: Results, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Draw all that there are rows for; captions by file name, and what is missing and why."""
    made: dict[str, str] = {}
    missing: list[str] = []

    def add(name: str, figure: Figure, caption: str) -> None:
        figure.savefig(folder / name, dpi=110)
        made[name] = caption

    with mpl.rc_context(STYLE):
        for level in ("model", "op"):
            groups = pages(results, level)
            for number, part in enumerate(groups, 1):
                page = grid(results, level, part)
                caption = f"Speed-up of vitkern, {level}s"
                caption += f", {number} of {len(groups)}" if len(groups) > 1 else ""
                if page.nowhere:
                    caption += f"; in none of these groups: {', '.join(page.nowhere)}"
                name = f"speed-up-{level}s{f'-{number}' if len(groups) > 1 else ''}.png"
                if page.columns:
                    add(name, draw_grid(results, level, page), caption)
            if not groups:
                missing.append(f"speed-up of {level}s: none was timed")
        ceilings, found = results.about("ceilings"), points(results)
        if not ceilings or not found:
            lacking = "no ceilings were measured" if not ceilings else "no times with FLOPs, bytes"
            missing.append(f"roofline: {lacking}")
        for dtype in dict.fromkeys(point.dtype for point in found) if ceilings else ():
            some = [point for point in found if point.dtype == dtype]
            roof = ceilings["flops_per_s"].get(dtype)
            figure = draw_roofline(some, dtype, roof, ceilings["bytes_per_s"], results.device)
            add(f"roofline-{dtype}.png", figure, f"Roofline, {dtype}")
        if bars := memory(results):
            caption = "Peak memory of a training step, largest batch of each model and precision"
            if len(bars) > PANELS:
                caption += f"; the first {PANELS} of {len(bars)}, all others are in the tables"
            first = dict(list(bars.items())[:PANELS])
            add("memory.png", draw_memory(first, results.device), caption)
        else:
            missing.append("memory: no training step has a peak")
        if proxies := results.of("proxy"):
            add("proxies.png", draw_proxies(proxies), "A transformer block, counted without a GPU")
        else:
            missing.append("the block's launches and bytes: none were counted")
    return made, missing


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False))


def shade(verdict: str, value: float | None) -> tuple[float, float, float]:
    """The verdict's colour; of wins and losses the paler the nearer to 1, full from 2 times on.

    No loss is so small that it is pale.
    """
    full = mpl.colors.to_rgb(LEGEND[verdict][1])
    if verdict not in ("win", "loss") or value is None:
        return full
    least = 0.6 if verdict == "loss" else 0.25
    strength = least + (1 - least) * min(1.0, max(value, 1 / value) - 1)
    return tuple(1 - strength * (1 - part) for part in full)  # type: ignore[return-value]


def draw_grid(results: Results, level: str, part: Grid) -> Figure:
    """Rows are groups, columns rivals; a cell is the speed-up."""
    rows, columns = len(part.groups), len(part.columns)
    label = max(map(len, part.groups)) * 0.075 + 0.9  # inches
    found = {verdict for (_, impl), (verdict, _) in part.cells.items() if impl in part.columns}
    used = [verdict for verdict in LEGEND if verdict in found]
    width, lines = max(label + 0.95 * columns + 0.3, 9.0), -(-len(used) // 3)
    figure = Figure(figsize=(width, 1.9 + 0.27 * rows + 0.25 * lines), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    for y, group in enumerate(part.groups):
        for x, column in enumerate(part.columns):
            verdict, value = part.cells.get((group, column), (None, None))
            if verdict is None:
                continue
            hatch, color = LEGEND[verdict][2], shade(verdict, value)
            edge = "#adb5bd" if hatch else "white"
            axes.add_patch(Rectangle((x, y), 1, 1, hatch=hatch, facecolor=color, edgecolor=edge))
            text = {"wrong": "wrong", "ours": "auto"}.get(verdict, "")
            text = f"{value:.2f}" if value is not None else text
            weight, ink = ("bold", "white") if sum(color) < 1.5 else ("normal", "black")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1} if hatch and text else None
            look: dict[str, Any] = {"weight": weight, "color": ink, "bbox": box, "size": 9}
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", **look)
    labels = []
    for group in part.groups:
        far = results.noisy(group)
        labels.append(
            f"{group}  (A/A {results.ours[group]['a_a']['median']:.2f}!)" if far else group
        )
    axes.set_yticks([y + 0.5 for y in range(rows)], labels, size=9)
    names = [_wrapped(name, 11) for name in part.columns]
    axes.set_xticks([x + 0.5 for x in range(columns)], names, size=9)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.suptitle(
        f"{level.capitalize()}s on {results.device}: speed-up of vitkern against ...",
        x=0.01,
        ha="left",
        weight="bold",
    )
    legend = [
        Patch(facecolor=LEGEND[v][1], hatch=LEGEND[v][2], edgecolor="#adb5bd", label=LEGEND[v][0])
        for v in used
        if v != "ours" or level == "op"
    ]
    nowhere = f"In none of these groups: {', '.join(part.nowhere)}" if part.nowhere else None
    look = {"ncols": 3, "frameon": False, "fontsize": 9, "alignment": "left", "title": nowhere}
    figure.legend(handles=legend, loc="outside lower left", title_fontsize=9, **look)
    return figure


def draw_roofline(
    found: list[Point], dtype: str, roof: float | None, memory_rate: float, device: str
) -> Figure:
    """A panel an op: achieved FLOP/s over FLOPs a byte, under the ceilings of the same run."""
    panels = list(dict.fromkeys(point.panel for point in found))
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 4.2 * columns, 1.3 + 3.1 * height), layout="constrained")
    grid_of_axes = figure.subplots(height, columns, sharex=True, sharey=True, squeeze=False)
    low = min(p.intensity for p in found) / 2
    high = max([p.intensity for p in found] + ([roof / memory_rate] if roof else [])) * 3
    xs = sorted({low, high, *([roof / memory_rate] if roof else [])})
    for axes, panel in zip(grid_of_axes.flat, panels, strict=False):
        roof_line = [min(roof or float("inf"), x * memory_rate) for x in xs]
        axes.plot(xs, roof_line, color="0.3", linewidth=1.5)
        for point in sorted((p for p in found if p.panel == panel), key=lambda p: p.ours):
            axes.plot(
                *(point.intensity, point.rate),
                marker="^" if point.backward else "o",
                color=OURS if point.ours else OTHERS,
                markerfacecolor=OURS if point.ours else "none",
                markersize=6,
                alpha=0.8,
            )
        axes.set(title=panel, xscale="log", yscale="log", xlim=(low, high))
        axes.tick_params(labelbottom=True, labelsize=9)
        axes.grid(alpha=0.25)
    for axes in grid_of_axes.flat[len(panels) :]:
        axes.set_visible(False)
    ceiling = rate(roof, "FLOP") if roof else "no product"
    title = f"Roofline, {dtype} on {device}, measured: {ceiling}, {rate(memory_rate, 'B')}"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    looks: list[tuple[str, str, str, str]] = [
        ("forward, ours", "o", OURS, OURS),
        ("backward or training, ours", "^", OURS, OURS),
        ("forward, others", "o", OTHERS, "none"),
        ("backward or training, others", "^", OTHERS, "none"),
    ]
    handles = [
        Line2D([], [], linestyle="", label=text, marker=m, color=c, markerfacecolor=inner)
        for text, m, c, inner in looks
    ]
    text = "Up: FLOP/s. Across: FLOPs a byte. Both are counted as for a perfect kernel."
    look = {"frameon": False, "alignment": "left", "title": text, "title_fontsize": 9}
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=9, **look)
    return figure


def draw_memory(bars: dict[str, list[Row]], device: str) -> Figure:
    """A panel a group, a bar an implementation."""
    columns = min(2, len(bars))
    height = -(-len(bars) // columns)
    most = max(map(len, bars.values()))
    size = (1 + 6.2 * columns, 0.6 + height * (0.8 + 0.26 * most))
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for axes, (group, rows) in zip(panels, bars.items(), strict=False):
        values = [row["peak_bytes"] / 2**20 for row in rows]
        colors = [OURS if r.get("ours") else OWN if r.get("own") else OTHERS for r in rows]
        drawn = axes.barh([row["impl"] for row in rows], values, color=colors)
        axes.bar_label(drawn, [*map(short, values)], padding=3, size=9)
        axes.invert_yaxis()
        axes.set_title(group, size=10)
        axes.set(xticks=[], xlim=(0, 1.12 * max(values)))
        axes.tick_params(axis="y", labelsize=9, length=0)
        axes.spines["bottom"].set_visible(False)
    for axes in panels[len(bars) :]:
        axes.set_visible(False)
    text = f"Training step: peak MiB beyond what was held before it, on {device}"
    figure.suptitle(text, x=0.01, ha="left", weight="bold")
    return figure


def draw_proxies(rows: list[Row]) -> Figure:
    """Launches, bytes and saved bytes of a block; a line of panels a model and step."""
    cases = list(dict.fromkeys((r["model"], r["batch"], r["precision"], r["step"]) for r in rows))
    figure = Figure(figsize=(13, 0.6 + 2.3 * len(cases)), layout="constrained")
    lines: Any = figure.subfigures(len(cases), 1, squeeze=False)
    for line, case in zip(lines.flat, cases, strict=True):
        model, batch, precision, step = case
        text = f"A block of {model} b{batch} {precision}, {step}: counted, not measured"
        line.suptitle(text, x=0.01, ha="left", weight="bold")
        own = [r for r in rows if (r["model"], r["batch"], r["precision"], r["step"]) == case]
        panels = {
            "launches": [row["launches"] for row in own],
            "HBM bytes / (tokens x width)": [row["width_units"] for row in own],
            "saved for backward, MiB": [
                None if row.get("saved_bytes") is None else row["saved_bytes"] / 2**20
                for row in own
            ],
        }
        shown = {k: v for k, v in panels.items() if any(value is not None for value in v)}
        for axes, (title, values) in zip(line.subplots(1, 3), panels.items(), strict=True):
            if title not in shown:
                axes.set_visible(False)
                continue
            names = [row["impl"] for row in own]
            colors = [OURS if name.startswith("vitkern") else OTHERS for name in names]
            drawn = axes.barh(names, [value or 0 for value in values], color=colors)
            labels = ["not counted" if value is None else short(value) for value in values]
            axes.bar_label(drawn, labels, padding=3, size=9)
            axes.invert_yaxis()
            axes.set_title(title, size=10, weight="normal")
            axes.set(xticks=[], xlim=(0, 1.2 * max(value or 0 for value in values) or 1))
            axes.tick_params(axis="y", labelsize=9, length=0)
            axes.spines["bottom"].set_visible(False)
    return figure
