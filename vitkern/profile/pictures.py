"""The report's pictures, as PNG in base64."""

import base64
import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from vitkern.profile.figures import IDLE, Analysis, short
from vitkern.profile.trace import PHASES

COLORS = dict(zip(PHASES, ("#f08c00", "#1971c2", "#0b7285", "#9c36b5", "#adb5bd"), strict=True))
RED = "#e03131"
STYLE = {
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}
BARS, LANES = 14, 12


def draw(a: Analysis) -> dict[str, str]:
    """Base64 of a PNG by title."""
    drawn = {"Time of a step by phase and by op": _times(a)}
    if a.timeline:
        drawn["Timeline of the last step"] = _timeline(a)
    if a.memory is not None and len(a.memory.curve) > 1:
        drawn["Memory over the last step"] = _memory(a)
    return drawn


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _unit(seconds: float) -> tuple[float, str]:
    return (1e3, "ms") if seconds < 10 else (1.0, "s")


def _times(a: Analysis) -> str:
    factor, unit = _unit(a.seconds)
    rows = a.rows[:BARS]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.7 + 0.27 * len(rows)), layout="constrained")
        axes = figure.subplots(2, 1, height_ratios=[1, max(2.0, 0.42 * len(rows))])
        top, bottom = axes
        left = 0.0
        for phase in a.phases:
            width = factor * phase.seconds
            top.barh(0, width, left=left, color=COLORS[phase.name], height=0.6)
            if phase.share > 0.07:
                text = f"{phase.name} {phase.share:.0%}"
                top.text(left + width / 2, 0, text, ha="center", va="center", color="white")
            if a.on_gpu and phase.seconds > phase.busy:  # what of it was idle
                idle = factor * (phase.seconds - phase.busy)
                top.barh(-0.42, idle, left=left + width - idle, color=RED, height=0.18)
            left += width
        title = "Time of a step by phase"
        top.set(title=title + (", and how much of it the GPU was idle (red)" * a.on_gpu), yticks=[])
        top.spines["left"].set_visible(False)
        top.set_xlim(0, left or 1)
        bottom.barh(
            range(len(rows)),
            [factor * row.seconds for row in rows],
            color=[COLORS[r.phase] for r in rows],
        )
        for i, row in enumerate(rows):
            rate = "" if row.roofline is None else f", {row.roofline:.0%} of roofline"
            bottom.text(factor * row.seconds, i, f" {row.share:.1%}{rate}", va="center", size=9)
        bottom.set_yticks(range(len(rows)), [short(row.op) for row in rows])
        bottom.invert_yaxis()
        bottom.margins(x=0.22)
        bottom.set(title="By op, in the color of its phase", xlabel=f"{unit} a step")
        handles = [Patch(color=COLORS[p.name], label=p.name) for p in a.phases]
        bottom.legend(handles=handles, frameon=False, loc="lower right", ncols=len(handles))
        return _png(figure)


def _timeline(a: Analysis) -> str:
    """One lane an op, the longest ones; on a CPU one of phases above."""
    factor, unit = _unit(a.seconds)
    longest = [row.op for row in a.rows if row.share >= 0.003]
    spans: dict[str, list[tuple[float, float]]] = {}
    colors: dict[str, list[str]] = {}
    phases = {row.op: row.phase for row in a.rows}
    for lane, kind, start, seconds in a.timeline:
        spans.setdefault(lane, []).append((factor * start, factor * seconds))
        name = kind if kind in COLORS else phases.get(lane, "other")
        colors.setdefault(lane, []).append(RED if lane == IDLE else COLORS[name])
    lanes: list[Any] = [lane for lane in ("phase", IDLE) if lane in spans]
    lanes += [op for op in longest if op in spans][:LANES]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.2 + 0.27 * len(lanes)), layout="constrained")
        axes = figure.subplots()
        for i, lane in enumerate(lanes):
            axes.broken_barh(spans[lane], (i - 0.38, 0.76), facecolors=colors[lane])
        axes.set_yticks(range(len(lanes)), list(map(short, lanes)))
        axes.invert_yaxis()
        where = "the GPU" if a.on_gpu else "the CPU"
        axes.set(title=f"Timeline of the last step on {where}", xlabel=unit)
        axes.set_xlim(0)
        axes.grid(axis="x", alpha=0.3)
        handles = [Patch(color=COLORS[p.name], label=p.name) for p in a.phases]
        figure.legend(handles=handles, frameon=False, loc="outside right upper")
        return _png(figure)


def _memory(a: Analysis) -> str:
    assert a.memory is not None
    factor, unit = _unit(a.seconds)
    times = [factor * time for time, _ in a.memory.curve]
    mib = [size / 2**20 for _, size in a.memory.curve]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(times, mib, step="post", color="#74c0fc", alpha=0.6)
        axes.plot(times, mib, drawstyle="steps-post", color="#1971c2", linewidth=1)
        peak = a.memory.peak / 2**20
        axes.axhline(peak, color=RED, linewidth=1, linestyle="--")
        text = f"peak {peak:,.1f} MiB, in {a.memory.peak_phase}"
        place = axes.get_yaxis_transform()  # x in shares of the width
        axes.text(0.005, peak, text, transform=place, va="bottom", color=RED, size=9)
        held = "" if a.on_gpu else ", beyond what was there when recording began"
        title = f"Memory over the last step on the {a.memory.device}{held}"
        axes.set(title=title, xlabel=f"{unit}, when the host asked for it", ylabel="MiB")
        axes.set_ylim(0, 1.15 * max([peak, *mib, 1e-9]))
        axes.set_xlim(0, times[-1])
        return _png(figure)
