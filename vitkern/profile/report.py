"""From a trace to report.html, report.json and a table on the terminal."""

import json
from dataclasses import asdict
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vitkern._table import columns
from vitkern.profile import ceilings as measured
from vitkern.profile.analysis import analyse, known_card
from vitkern.profile.figures import Analysis, Ceilings, Row, short
from vitkern.profile.trace import CALLS, Span, Trace, parse, phases, windows
from vitkern.profile.verdicts import Verdict, judge, ms

LONGEST = 25  # rows of the table; the rest is one row
NO_PICTURES = (
    "More pictures need matplotlib. Where it is installed, python -m vitkern profile --trace "
    "trace.json draws them from what was recorded here."
)

HEAD = ("op", "time", "share", "calls", "kernels", "TFLOP/s", "GB/s", "roofline")

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
  color: #212529; }
h1 { font-size: 1.5em; margin-bottom: 0; } h2 { font-size: 1.15em; margin-top: 2em; }
.about { color: #666; } .tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 1.2em 0; }
.tile { background: #f1f3f5; border-radius: 6px; padding: 8px 14px; }
.tile b { display: block; font-size: 1.35em; } .tile span { color: #666; font-size: .85em; }
.verdict { border-left: 5px solid #e8590c; background: #fff4ec; padding: 8px 14px; margin: 10px 0; }
.verdict.good { border-color: #2b8a3e; background: #ebfbee; } .verdict p { margin: 3px 0; }
.gain { float: right; color: #666; } img { max-width: 100%; }
.phases { display: flex; } .phases div { background: #74c0fc; border-right: 2px solid white;
  overflow: hidden; white-space: nowrap; padding: 6px 0; text-indent: 6px; }
table { border-collapse: collapse; font-size: .9em; width: 100%; }
th, td { text-align: right; padding: 3px 8px; border-bottom: 1px solid #e9ecef; }
th:first-child, td:first-child { text-align: left; }
.bar { background: linear-gradient(#74c0fc, #74c0fc) no-repeat left / var(--w) 100%; }
"""


def write(contents: dict[str, Any], out: Path, measure: bool = False) -> Analysis:
    """Analyse a trace and write report.html and report.json.

    Args:
        contents: of the trace; gains an entry "vitkern" and a track with the phases.
        out: the folder; it is made if need be.
        measure: measure the ceilings of the device that ran, here; without, they are those that the
            trace brings, or those of a known card.
    """
    trace = parse(contents)
    extra = contents.setdefault("vitkern", {})
    unseen = 0 if trace.on_gpu else sum(_launches(span) for span in trace.host)
    ceilings = _ceilings(trace, measure and not unseen)
    extra["ceilings"] = asdict(ceilings)
    a = analyse(trace, int(extra.get("warmup", 0)), ceilings)
    a.verdicts = [_no_kernels(unseen)] if unseen else judge(a)
    if not any(e.get("pid") == "vitkern" for e in contents["traceEvents"]):
        contents["traceEvents"] += _phase_track(trace)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(a.as_dict(), indent=1))
    (out / "report.html").write_text(html(a), encoding="utf-8")
    return a


def save(contents: dict[str, Any], path: Path) -> None:
    """Write a trace; what was at `path` stays there until all is written."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(contents))
    part.replace(path)


def _launches(span: Span) -> bool:
    return span.category in CALLS and "Launch" in span.name


def _no_kernels(launches: int) -> Verdict:
    """The only verdict where it holds: all figures are the host's, and no rule is about those."""
    return Verdict(
        "No kernels in the trace",
        f"{launches:,} launches were recorded, and nothing that ran on the GPU: CUPTI, which tells "
        "PyTorch of kernels, gave none. All figures are the host's: what it took to launch.",
        "End other profilers (nsys, ncu, DCGM's profiling metrics): only one can listen to a GPU. "
        "Otherwise see what PyTorch prints about CUPTI or Kineto when recording begins.",
        0.0,
    )


def _ceilings(trace: Trace, measure: bool) -> Ceilings:
    if measure:
        device = torch.device("cpu")
        if trace.on_gpu:
            device = torch.device("cuda", trace.device[0].args.get("device", 0))
        try:
            return measured.measure(device, (torch.float32, torch.bfloat16))
        except RuntimeError as error:  # of memory, say: then there are no percentages
            return Ceilings(how=f"not measured: {error}")
    brought = trace.extra.get("ceilings")
    if brought:
        return Ceilings(**brought)
    known = known_card(trace.properties.get("name", ""))
    if known is None:
        return Ceilings(how="unknown: the trace brings none, and its device is not in the tables")
    rates = {k: v for k, v in known.flops_per_s._asdict().items() if v}
    return Ceilings(rates, known.bytes_per_s, f"assumed: usual figures of {known.name}")


def _phase_track(trace: Trace) -> list[dict[str, Any]]:
    """The phases of all steps as events of the trace."""
    events = []
    for number, step in enumerate(windows(trace)):
        pieces = [(p.name, p.start, p.end, "phases") for p in phases(trace, step)]
        for name, start, end, track in [(f"step {number}", step.start, step.end, "steps"), *pieces]:
            events.append(
                {
                    "ph": "X", "cat": "vitkern", "name": name, "pid": "vitkern", "tid": track,
                    "ts": start + trace.base, "dur": end - start,
                }
            )  # fmt: skip
    return events


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table as text."""
    return (
        short(row.op) + (" [ATen]" if row.implementation == "ATen" else ""),
        ms(row.seconds),
        f"{row.share:.1%}",
        f"{row.calls:,.0f}" if row.calls else "",
        "" if row.launches is None else f"{row.launches:,.0f}",
        f"{row.flops_per_s / 1e12:.3g}" if row.flops_per_s else "",
        f"{row.bytes_per_s / 1e9:,.0f}" if row.bytes_per_s else "",
        f"{row.roofline:.0%} {row.bound}" if row.roofline is not None else "",
    )


def lines(a: Analysis) -> list[tuple[str, ...]]:
    """The table's rows; what is short comes together in the last."""
    shown, rest = a.rows[:LONGEST], a.rows[LONGEST:]
    result = [cells(row) for row in shown]
    if rest:
        seconds, share = sum(r.seconds for r in rest), sum(r.share for r in rest)
        launches = f"{sum(r.launches or 0 for r in rest):,.0f}" if a.on_gpu else ""
        name = f"{len(rest)} others"
        result.append((name, ms(seconds), f"{share:.1%}", "", launches, "", "", ""))
    return result


def tiles(a: Analysis) -> list[tuple[str, str]]:
    """(figure, what it is): what to see first."""
    found = [(ms(a.seconds), f"a step, mean of {a.steps}")]
    if a.images_per_s:
        found.append((f"{a.images_per_s:,.4g}", f"images/s at {a.images:g} a step"))
    for against, value in a.utilisation.items():
        found.append((f"{value:.1%}", f"MFU, of the {against} {a.main_dtype} peak"))
    if a.idle is not None:
        found.append((f"{a.idle.share:.0%}", f"GPU idle; longest {ms(a.idle.longest)}"))
        found.append((f"{a.launches:,.0f}", "kernels and copies a step"))
    if a.memory is not None:
        found.append((_size(a.memory.peak), f"peak memory, in {a.memory.peak_phase}"))
        if a.memory.saved is not None:
            found.append((_size(a.memory.saved), "saved for backward"))
    found.append((ms(a.loader_wait), "wait for the loader a step"))
    return found


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"


def cost(a: Analysis) -> str:
    """What the profiler itself cost."""
    if a.overhead is None or a.untraced_seconds is None:
        return (
            "What the profiler costs is unknown: no step ran without it. Let the loop go on for a "
            "few steps after those recorded."
        )
    return (
        f"With the profiler a step took {ms(a.seconds)}, in the steps after it without "
        f"{ms(a.untraced_seconds)} ({a.overhead:+.0%}). All figures are of steps with it."
    )


def method(a: Analysis) -> list[str]:
    """How it was measured."""
    rates = ", ".join(f"{v / 1e12:.3g} TFLOP/s {k}" for k, v in a.ceilings.flops_per_s.items() if v)
    copy = a.ceilings.bytes_per_s and f", {a.ceilings.bytes_per_s / 1e9:,.0f} GB/s"
    what = (
        "Of a GPU: an op's time is that of its kernels; a step ends with its last kernel; idle "
        "time counts towards the phase whose kernel ends it, or as data where that waited for the "
        "loader."
        if a.on_gpu
        else "Of a CPU: an op's time is that in which no op within it ran."
    )
    names = (
        "FLOPs and bytes of vitkern's ops are those of a perfect kernel, as the op declares; of "
        "ATen's ops FLOPs by torch.utils.flop_counter, bytes of all tensors given and returned, "
        "which caches can make more than 100 % of a roofline. 'NAME (backward)' is autograd's way "
        "back through an op that ran on ATen."
    )
    return [
        f"{a.steps} steps after {a.warmup_steps} for warming up. {what}",
        cost(a),
        f"Ceilings, {a.ceilings.how}{f': {rates}{copy}' if rates and copy else ''}.",
        names,
    ]


def html(a: Analysis) -> str:
    """The whole page."""
    about = ", ".join(
        [a.device, "training" if a.trains else "inference"]
        + [f"{k} {v}" for k, v in a.settings.items()]
    )
    boxes = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for value, name in tiles(a)
    )
    judged = "".join(
        f"<div class='verdict{' good' * v.good}'>"
        + (f"<span class=gain>up to {v.gain:.0%} of a step</span>" if v.gain else "")
        + f"<b>{escape(v.title)}</b><p>{escape(v.evidence)}</p>"
        + f"<p><i>{escape(v.advice)}</i></p></div>"
        for v in a.verdicts
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width"><title>vitkern profile</title>
<style>{STYLE}</style><h1>What holds this run back, and what to do</h1>
<p class=about>{escape(about)}</p><div class=tiles>{boxes}</div>{judged}
<h2>Where the time goes</h2>{_pictures(a)}
<h2>By op</h2>{_table(a)}
<h2>How it was measured</h2>{"".join(f"<p>{escape(text)}</p>" for text in method(a))}
{_choices(a)}</html>
"""


def _table(a: Analysis) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    body = []
    for line in lines(a):
        first, *others = (escape(cell) for cell in line)
        # A share is a bar behind the name, and read without a picture.
        bar = f"<td class=bar style='--w:{line[2]}'>{first}</td>"
        body.append(f"<tr>{bar}{''.join(f'<td>{cell}</td>' for cell in others)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _choices(a: Analysis) -> str:
    if not a.choices:
        return ""
    body = "".join(
        f"<tr><td>{escape(c['op'])}</td><td>{escape(c['implementation'])}</td>"
        f"<td>{escape(c['why'])}</td><td>{c['calls']}</td></tr>"
        for c in a.choices
    )
    return (
        "<h2>What vitkern chose, and why</h2><table><tr><th>op<th>implementation<th>why<th>calls"
        f"</tr>{body}</table>"
    )


def _pictures(a: Analysis) -> str:
    if find_spec("matplotlib") is None:
        parts = "".join(
            f"<div style='width:{p.share:.2%}'>{escape(p.name)} {p.share:.0%}</div>"
            for p in a.phases
        )
        return f"<div class=phases>{parts}</div><p>{NO_PICTURES}</p>"
    from vitkern.profile.pictures import draw

    return "".join(
        f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
        for title, data in draw(a).items()
    )


def show(a: Analysis, out: Path) -> None:
    """Print the table, the phases and the verdicts."""
    summary = ", ".join(f"{value} {name}" for value, name in tiles(a))
    parts = ", ".join(f"{p.name} {ms(p.seconds)} ({p.share:.0%})" for p in a.phases)
    if find_spec("rich") is not None:
        from rich import box, markup
        from rich.console import Console
        from rich.table import Table

        console = Console(soft_wrap=True)
        console.print(f"{a.device}: {summary}", markup=False, highlight=False)
        table = Table(box=box.SIMPLE_HEAD)
        for i, head in enumerate(HEAD):
            table.add_column(head, justify="right" if i else "left", no_wrap=True)
        for line in lines(a):
            table.add_row(*map(markup.escape, line))
        Console(width=max(console.width, 116)).print(table)
        say = lambda text: console.print(text, markup=False, highlight=False)  # noqa: E731
    else:
        print(f"{a.device}: {summary}\n{columns([HEAD, *lines(a)])}")
        say = print
    say(f"Phases: {parts}.")
    for verdict in a.verdicts:
        gain = f" (up to {verdict.gain:.0%} of a step)" if verdict.gain else ""
        say(f"\n* {verdict.title}{gain}\n  {verdict.evidence}\n  {verdict.advice}")
    say(f"\n{cost(a)}\nreport: {out / 'report.html'}")
