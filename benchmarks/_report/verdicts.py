"""Verdicts on the targets, from results.

Absolute figures (MFU, milliseconds, images/s) are those of an H100 or H200 with SXM's clocks. On
another card they become shares of the roofline: what the target would be of the least time that
such a model takes at an H100's 800 TFLOP/s and 3.0 TB/s is then asked of the least time at that
card's own ceilings, measured in the same run. Ratios hold on any GPU.

Where ours was timed, A/A blurs the figure: a threshold that is no further from it than ours is from
itself, quartiles included, is "even", neither met nor missed. Counts and bytes have no such blur.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from vitkern import roofline

from .results import Results, Row, many, ratio, short
from .targets import TARGETS, Target

H100 = roofline.card("H100")
OF_ITS_CLASS = re.compile(r"\bG?H[12]00\b(?!.*(PCIe|NVL|MIG))")

OUTCOMES = ("missed", "even", "met", "aim met", "not measured")


class Unmeasured(Exception):
    """Why there is no figure."""


class Wrong(Exception):
    """Ours was measured and is not right, which no threshold can excuse."""


class Figure(NamedTuple):
    """What results say: a value, of which rows, and how far ours is from itself there."""

    value: float
    source: str
    spread: float = 0.0


@dataclass(frozen=True)
class Measure:
    """How a figure comes from rows, and how it is written.

    read: (results, a group, rivals or further groups) -> the figure; raises Unmeasured or Wrong.
    less: whether less is better. seconds: of an absolute threshold what it means for one call of a
    model and batch, None for a ratio.
    """

    read: Callable[[Results, str, tuple[str, ...]], Figure]
    write: Callable[[float], str]
    less: bool = False
    seconds: Callable[[float, str, int], float] | None = None


class Verdict(NamedTuple):
    """One of OUTCOMES on a target; what was asked and found in words, and of which rows, or why
    there is none."""

    target: Target
    outcome: str
    must: str
    aim: str
    found: str
    source: str


# How figures are read


def _why(results: Results, group: str, impl: str | None = None) -> str:
    """Why a contender, by default ours, has no time in a group."""
    timed = [row for row in results.of("time") if row["group"] == group]
    if any(row["impl"] == impl and not row["parity"]["ok"] for row in timed):
        return f"{impl} failed its parity check"
    # In a group that never began all are left out for one reason.
    names = {impl} if impl else {"vitkern", "auto"} if timed else None
    left_out = (row for row in results.of("left out") if row["group"] == group)
    absent = (row for row in results.of("absent") if row["impl"] == impl)
    found = (r["why"] for r in (*left_out, *absent) if names is None or r["impl"] in names)
    reason = next(found, "not in this run")
    return f"{impl}: {reason}" if impl else reason


def _ours(results: Results, group: str) -> Row:
    row = results.ours.get(group)
    if row is None:
        raise Unmeasured(_why(results, group))
    if "seconds" not in row:
        raise Wrong(f"{row['impl']} failed its parity check in {group}")
    return row


def _of(results: Results, row: Row) -> str:
    noise = results.spread(row)
    return f"{row['impl']} in {row['group']}" + (f", A/A within {noise:.1%}" if noise else "")


def _timed(value: Callable[[Row], float], results: Results, group: str, _: object) -> Figure:
    row = _ours(results, group)
    return Figure(value(row), _of(results, row), results.spread(row))


def _mfu(row: Row) -> float:
    """Three forward passes, whatever else was computed, of the datasheet's dense peak."""
    flops = 3 * roofline.forward_flops(row["case"]["model"])
    return float(flops * row["images_per_s"] / H100.rate("bfloat16", peak=True))


def _rivals(results: Results, group: str, names: tuple[str, ...]) -> list[Row]:
    return [r for r in results.of("time") if r["group"] == group and r["impl"] in names]


def _speed_up(results: Results, group: str, against: tuple[str, ...]) -> Figure:
    """Against the fastest of these; where `auto` takes one of them, ours is that one."""
    mine = _ours(results, group)
    rows = [row for row in _rivals(results, group, against) if "against_ours" in row]
    fastest = min(rows, key=ratio, default=None)
    if mine["impl"] in against and (fastest is None or ratio(fastest) > 1):
        return Figure(1.0, f"auto takes {mine['impl']} in {group}", results.spread(mine))
    if fastest is None:
        reasons = (_why(results, group, impl) for impl in against)
        raise Unmeasured("; ".join(dict.fromkeys(reasons)))
    others = [row["impl"] for row in rows if row is not fastest]
    ahead = f"ahead of {', '.join(others)}: " if others else ""
    return Figure(ratio(fastest), ahead + _of(results, fastest), results.spread(fastest))


def _memory(results: Results, group: str, against: tuple[str, ...]) -> Figure:
    """Peaks of one call, beyond what was held before it; of these the least."""
    mine = _ours(results, group)
    rows = [row for row in _rivals(results, group, against) if row.get("peak_bytes")]
    if not rows or not mine.get("peak_bytes"):
        raise Unmeasured("; ".join(dict.fromkeys(_why(results, group, i) for i in against)))
    least = min(rows, key=lambda row: int(row["peak_bytes"]))
    peaks = [row["peak_bytes"] / 2**30 for row in (mine, least)]
    source = f"{peaks[0]:.3g} GiB, {least['impl']} {peaks[1]:.3g} GiB, in {group}"
    return Figure(peaks[0] / peaks[1], source)


def _product(results: Results, group: str, against: tuple[str, ...]) -> Figure:
    """Time of the plain products by PyTorch's library / time of ours with all around them."""
    mine = _ours(results, group)
    alone = [row for each in against for row in results.of("time") if row["group"] == each]
    if len(alone) < len(against) or not all("seconds" in row for row in alone):
        raise Unmeasured("a plain product of its shape has no time")
    seconds = sum(row["seconds"]["median"] for row in alone)
    return Figure(seconds / mine["seconds"]["median"], _of(results, mine), results.spread(mine))


def _counted(
    count: Callable[[Row], int], step: str, results: Results, group: str, against: tuple[str, ...]
) -> Figure:
    """A count of a block, as a share of a rival's if there is one."""
    found = {
        row["impl"]: count(row)
        for row in results.of("proxy")
        if f"{row['model']} b{row['batch']} {row['precision']}" == group and row["step"] == step
    }
    if not {"vitkern", *against} <= found.keys():
        raise Unmeasured(_why(results, "proxies"))
    whole = found[against[0]] if against else 1
    return Figure(found["vitkern"] / whole, f"a block of {group}, counted without a GPU")


def _slowest(results: Results, level: str, _: object) -> Figure:
    """The nearest to a loss of all that `auto` could have taken, or that a user could."""
    rows = [row for row in offers(results, level) if "against_ours" in row]
    if not rows:
        raise Unmeasured("no group of these has a rival")
    worst = min(rows, key=lambda row: ratio(row) * (1 + results.spread(row)))
    groups = len({row["group"] for row in rows})
    return Figure(
        ratio(worst), f"worst of {len(rows)} in {many(groups, 'group')}", results.spread(worst)
    )


def offers(results: Results, level: str) -> list[Row]:
    """Rows that ours must not be slower than: of ops also our other kernels, nothing compiled
    together with ours."""
    own = ("missed", "own") if level == "op" else ()
    rows = (row for group in results.groups(level).values() for row in group)
    return [row for row in rows if results.verdict(row) in ("win", "even", "loss", *own)]


def _percent(value: float) -> str:
    return f"{short(100 * value)} %"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms"


MEASURES = {
    "MFU": Measure(
        partial(_timed, _mfu),
        _percent,
        seconds=lambda share, model, batch: (
            3 * batch * roofline.forward_flops(model) / H100.rate("bfloat16", peak=True) / share
        ),
    ),
    "time": Measure(
        partial(_timed, lambda row: float(row["seconds"]["median"])),
        _milliseconds,
        less=True,
        seconds=lambda seconds, model, batch: seconds,
    ),
    "images/s": Measure(
        partial(_timed, lambda row: float(row["images_per_s"])),
        lambda rate: f"{short(rate)}/s",
        seconds=lambda rate, model, batch: batch / rate,
    ),
    "speed-up": Measure(_speed_up, "{:.3g} x".format),
    "memory": Measure(_memory, "{:.2f} x".format, less=True),
    "roofline": Measure(partial(_timed, lambda row: float(row["roofline"])), _percent),
    "product": Measure(_product, _percent),
    "saved": Measure(
        partial(_counted, lambda row: int(row["saved_bytes"]), "train"),
        "{:.2f} x".format,
        less=True,
    ),
    "launches": Measure(
        partial(_counted, lambda row: int(row["launches"] - row.get("weight_casts", 0)), "forward"),
        "{:.0f}".format,
        less=True,
    ),
    "never slower": Measure(_slowest, "{:.3f} x".format),
}


# The judge


def absolute_here(device: str) -> bool:
    """Whether figures of an H100 are asked of the card of this name."""
    return OF_ITS_CLASS.search(device) is not None


def floor(row: Row) -> float:
    """The least seconds on an H100 of what a model's row timed."""
    case = row["case"]
    training, precision = case["step"] == "train", case["precision"].removesuffix(" CUDA graph")
    works = roofline.works(
        case["model"], case["batch"], "fused", training, precision=precision, optimizer=False
    )
    return sum(work.seconds(H100) for work in works)


def judge(results: Results, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """A verdict on each target; none without a GPU, for which targets are."""
    if results.about().get("device") != "cuda":
        return []
    return [_judged(results, target) for target in targets]


def _judged(results: Results, target: Target) -> Verdict:
    best: Verdict | None = None
    nearest, problems = 0.0, list[Exception]()
    for group in target.groups:
        try:
            measure, figure, must, aim = _found(results, target, group)
        except (Unmeasured, Wrong) as problem:
            problems.append(problem)
            continue
        reached = _quotient(measure, figure, must)
        if best is None or reached > nearest:
            nearest, noise = reached, 1 + figure.spread
            if reached < 1 / noise:
                outcome = "missed"
            elif noise > 1 and reached <= noise:
                outcome = "even"
            else:
                aimed = aim is not None and _quotient(measure, figure, aim) >= 1
                outcome = "aim met" if aimed else "met"
            words = _asked(measure, must, aim)
            best = Verdict(target, outcome, *words, measure.write(figure.value), figure.source)
    if best is not None:
        return best
    wrong = [str(problem) for problem in problems if isinstance(problem, Wrong)]
    why = "; ".join(dict.fromkeys(wrong or map(str, problems)))
    words = _asked(MEASURES[target.measure], target.must, target.aim)
    return Verdict(target, "missed" if wrong else "not measured", *words, "", why)


def _asked(measure: Measure, must: float, aim: float | None) -> tuple[str, str]:
    return measure.write(must), "" if aim is None else measure.write(aim)


def _quotient(measure: Measure, figure: Figure, threshold: float) -> float:
    """Above 1 where the figure is better than the threshold."""
    if measure.less:
        return threshold / figure.value if figure.value else float("inf")
    return figure.value / threshold


def _found(
    results: Results, target: Target, group: str
) -> tuple[Measure, Figure, float, float | None]:
    """(measure, figure, must, aim) in a group: on a card of another class, of its roofline."""
    measure, must, aim = MEASURES[target.measure], target.must, target.aim
    seconds = measure.seconds
    if seconds is None or absolute_here(results.device):
        return measure, measure.read(results, group, target.against), must, aim
    row = _ours(results, group)
    model, batch = row["case"]["model"], row["case"]["batch"]
    least, share = floor(row), MEASURES["roofline"]
    aimed = None if aim is None else least / seconds(aim, model, batch)
    return share, share.read(results, group, ()), least / seconds(must, model, batch), aimed


def in_words(verdicts: Sequence[Verdict]) -> str:
    """How many there are of each outcome."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    met = counts["met"] + counts["aim met"]
    return (
        f"Of {many(len(verdicts), 'target')} {met} are met, {counts['aim met']} of them with what "
        f"was aimed at; {counts['even']} are even within A/A, {counts['missed']} missed, "
        f"{counts['not measured']} not measured."
    )
