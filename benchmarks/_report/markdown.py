"""report.md: the losses as large as the wins, everything that has no figure, and why."""

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .._cases import save
from . import shortfalls
from .results import (
    A_A_BOUND,
    Results,
    Row,
    describe,
    duration,
    geometric_mean,
    many,
    mib,
    rate,
    ratio,
    read,
    sections,
    short,
    stats,
    table,
)

LEVELS = ("model", "op")


def main_report(paths: Sequence[Path], out: Path, pictures: bool = True) -> int:
    """``python -m benchmarks report FILE... --out DIR``; the exit code, 0."""
    results = read(*paths)
    written = _write(results, out, pictures)
    for level in LEVELS:
        counts = results.outcomes(level)
        found = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
        print(f"groups of {level}s: {found or 'none'}")
    print("written:\n" + "\n".join(f"  {path}" for path in written))
    return 0


def report(paths: Sequence[Path], out: Path, pictures: bool = True) -> list[Path]:
    """Write report.md and, if they are wanted, its pictures into a folder; the files written.

    Raises:
        ValueError: as `read`.
    """
    return _write(read(*paths), out, pictures)


def _write(results: Results, out: Path, pictures: bool) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}
    if not pictures:
        missing = ["any, so far; `python -m benchmarks report` does it, on any machine"]
    elif find_spec("matplotlib") is None:
        missing = ["any: matplotlib is not installed"]
    else:
        from . import figures

        drawn, missing = figures.draw(results, out)
    save(out / "report.md", markdown(results, drawn, missing))
    return [out / "report.md", *(out / name for name in drawn)]


def markdown(results: Results, pictures: dict[str, str], missing: Sequence[str]) -> str:
    """The report; pictures are captions by file name, and `missing` says what isn't drawn."""
    lines = [f"# vitkern and what else there is, on: {results.device}", ""]
    if results.about().get("device") == "cpu":
        lines += ["A run on a CPU: it says nothing about a GPU.", ""]
    lines += [*_in_short(results), *_losses(results), *shortfalls.section(results)]
    lines += [*_failed_parity(results), "## Pictures", ""]
    for name, caption in pictures.items():
        lines += [f"![{caption}]({name})", "", caption, ""]
    lines += [*(f"- Not drawn: {what}" for what in missing), *([""] if missing else [])]
    for level in LEVELS:
        lines += _times(results, level)
    lines += [*_proxies(results), *_absent(results), *_left_out(results), *_run(results)]
    return "\n".join(lines).rstrip() + "\n"


def _in_short(results: Results) -> list[str]:
    lines = [
        "## In short",
        "",
        "A speed-up is a rival's time / vitkern's, the median of rounds in which both ran: above 1 "
        "vitkern is faster. It is a win or a loss where it lies outside the quartiles of A/A, "
        "which is vitkern against itself in the same rounds.",
        "",
    ]
    for level in LEVELS:
        groups, counts = results.groups(level), results.outcomes(level)
        if not groups:
            lines += [f"No {level} was timed.", ""]
            continue
        text = (
            f"**{level.capitalize()}s.** Of {many(len(groups), 'group')} vitkern is the fastest in "
            f"{counts['fastest']}, level with its nearest rival in {counts['level']}, and slower "
            f"than a rival in {counts['slower']}."
        )
        if noisy := sum(map(results.noisy, groups)):
            text += f" A/A is off by more than {A_A_BOUND:.0%} in {noisy}: don't lean on those."
        if counts["without a rival"]:
            text += f" It has no rival in {counts['without a rival']}."
        if counts["not timed"]:
            text += f" It is wrong or was not timed in {counts['not timed']}: no speed-up there."
        foreign = [g for g in groups if g in results.ours and not results.ours[g].get("own")]
        if foreign:
            text += f' `impl="auto"` takes none of our kernels in {many(len(foreign), "group")}.'
        losses = results.losses(level)
        text += f" Worst loss: {describe(losses[0])}." if losses else " There is no loss."
        lines += [text, ""]
        if rows := results.contests(level):
            head = ("rival", "package", "groups", "geometric mean", "wins", "even", "losses")
            lines += table((*head, "least", "most"), _by_rival(results, rows))
    return lines


def _by_rival(results: Results, rows: list[Row]) -> list[tuple[Any, ...]]:
    made = []
    for impl in dict.fromkeys(row["impl"] for row in rows):
        mine = [row for row in rows if row["impl"] == impl]
        ratios, verdicts = [*map(ratio, mine)], Counter(map(results.verdict, mine))
        packages = sorted({str(row["package"]) for row in mine if row.get("package")})
        numbers = (verdicts["win"], verdicts["even"], verdicts["loss"])
        least, most = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
        mean = f"{geometric_mean(ratios):.2f}"
        made.append((impl, ", ".join(packages), len(mine), mean, *numbers, least, most))
    return made


def _losses(results: Results) -> list[str]:
    behind = sorted((row for level in LEVELS for row in results.behind(level)), key=ratio)
    lines = ["## Losses", ""]
    if not behind:
        lines += ["No rival was faster than vitkern in any group.", ""]
    else:
        beyond = sum(results.verdict(row) == "loss" for row in behind)
        within = len(behind) - beyond
        lines += [f"All of them, worst first: {beyond} beyond the A/A spread, {within} within.", ""]
        made = []
        for row in behind:
            ours = results.ours[row["group"]]
            times = [duration(stats(each["seconds"])) for each in (row, ours)]
            note = "**loss**" if results.verdict(row) == "loss" else "within A/A"
            speed_up = f"{stats(row['against_ours']):.3f}"
            made.append((row["group"], row["impl"], speed_up, *times, _a_a(results, ours), note))
        lines += table(("group", "rival", "speed-up", "its time", "our time", "A/A", ""), made)
    missed = [row for row in results.of("time") if results.verdict(row) == "missed"]
    if missed:
        lines += ['Faster than what `impl="auto"` takes, and ours all the same:', ""]
        lines += [*(f"- {describe(row)}" for row in sorted(missed, key=ratio)), ""]
    return lines


def _a_a(results: Results, ours: Row) -> str:
    """A/A of a group, flagged where its median is out of bounds."""
    if "a_a" not in ours:
        return "not measured"
    far = f" **off by more than {A_A_BOUND:.0%}**" if results.noisy(ours["group"]) else ""
    return f"{stats(ours['a_a']):.3f}{far}"


def _failed_parity(results: Results) -> list[str]:
    lines = ["## Failed parity checks", ""]
    wrong = [row for row in results.of("time") if results.verdict(row) == "wrong"]
    if not wrong:
        return [*lines, "None: all that has a time in this report was right.", ""]
    made = []
    for row in wrong:
        parity = row["parity"]
        figures = [f"{parity[k]:.2e}" if k in parity else "" for k in ("error", "budget")]
        name = f"**{row['impl']}**, ours" if row.get("ours") or row.get("own") else row["impl"]
        made.append((row["group"], name, *figures, parity.get("why", "")))
    head = ("group", "implementation", "error", "budget", "why")
    return [*lines, "These have no time and no speed-up.", "", *table(head, made)]


def _times(results: Results, level: str) -> list[str]:
    groups = results.groups(level)
    if not groups:
        return []
    lines = [f"## All {level}s", "", "Median [quartiles]. Bold: what the speed-ups are of.", ""]
    head = ["group", "implementation", "time", "speed-up", "% of roofline", "peak MiB"]
    head += ["images/s"] if level == "model" else []
    if any("host_seconds" in row for rows in groups.values() for row in rows):
        head.append("host")
        lines[2] += (
            " Host: Python's part of a call, until its last launch; where it is the time, it is "
            "what the card waits for."
        )
    for section, names in sections(groups).items():
        made = []
        for group in names:
            labels = [group.removeprefix(section).strip(), *[""] * len(groups[group])]
            for label, row in zip(labels, groups[group], strict=False):
                made.append([label, *_time(results, row)][: len(head)])
        lines += [f"### {section}", "", *table(head, made)]
    return lines


def _time(results: Results, row: Row) -> list[str]:
    """A row's cells: implementation, time, speed-up, roofline's share, memory, images/s, host."""
    verdict = results.verdict(row)
    name = f"**{row['impl']}**" if row.get("ours") else row["impl"]
    if verdict == "wrong":
        return [name, "failed its parity check", "", "", "", "", ""]
    marks = {"loss": " **loss**", "even": " within A/A", "missed": " **missed by auto**"}
    if "against_ours" in row:
        speed_up = f"{stats(row['against_ours']):.2f}{marks.get(verdict, '')}"
    else:
        speed_up = f"A/A {_a_a(results, row)}" if verdict == "ours" else "none: ours has no time"
    roofline, images, host = (row.get(k) for k in ("roofline", "images_per_s", "host_seconds"))
    return [
        name,
        duration(stats(row["seconds"])) if "seconds" in row else "",
        speed_up,
        "" if roofline is None else f"{100 * roofline:.0f} %",
        mib(row.get("peak_bytes")),
        "" if images is None else short(images),
        "" if host is None else f"{1e3 * host:.3g} ms",
    ]


def _proxies(results: Results) -> list[str]:
    rows = results.of("proxy")
    if not rows:
        return []
    made = []
    for row in rows:
        case = f"{row['model']} b{row['batch']} {row['precision']}"
        declared = row["width_units"] * row.get("declared_bytes", row["bytes"]) / row["bytes"]
        casts = f" ({row['weight_casts']} cast weights)" if row.get("weight_casts") else ""
        memory = (f"{row['width_units']:.0f}", f"{declared:.0f}", mib(row.get("saved_bytes")))
        made.append((case, row["step"], row["impl"], f"{row['launches']}{casts}", *memory))
    head = ("model", "step", "implementation", "launches", "bytes, in units", "as declared")
    return [
        "## A transformer block, counted",
        "",
        "From launches, declarations and graphs, without a GPU: not measured. Bytes of HBM by "
        "launch, and of our ops as they declare them, both per token and unit of width.",
        "",
        *table((*head, "saved for backward, MiB"), made),
    ]


def _absent(results: Results) -> list[str]:
    rows = [(row["impl"], row["why"]) for row in results.of("absent")]
    lines = ["## Absent", "", *table(("rival", "why"), rows)] if rows else []
    notes = {(row["impl"], row["note"]): "" for row in results.of("time") if row.get("note")}
    if notes:
        lines += ["## Adapted, so as to compute the same", "", *table(("rival", "how"), notes)]
    return lines


def _left_out(results: Results) -> list[str]:
    absent = {(row["impl"], row["why"]) for row in results.of("absent")}
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results.of("left out"):
        reason = (row["impl"], row["why"])
        if reason not in absent:
            reasons.setdefault(reason, []).append(row["group"])
    made = []
    for (impl, why), groups in reasons.items():
        more = f", and {len(groups) - 3} more" if len(groups) > 3 else ""
        made.append((impl, why, ", ".join(groups[:3]) + more))
    head = ("implementation", "why", "groups")
    return ["## Left out", "", *table(head, made)] if made else []


def _run(results: Results) -> list[str]:
    about, environment = results.about(), results.environment
    apart = ("card", "packages", "nvidia_smi")
    facts = {k: v for k, v in environment.items() if k not in apart}
    packages = environment.get("packages", {})
    facts |= {f"card, {key}": value for key, value in environment.get("card", {}).items()}
    facts |= {key: value for key, value in packages.items() if value}
    facts["not installed"] = ", ".join(k for k, v in packages.items() if not v) or "none of them"
    facts |= {key: about[key] for key in ("policy", "grid", "device") if key in about}
    if ceilings := results.about("ceilings"):
        for dtype, speed in ceilings["flops_per_s"].items():
            product = f"product of {ceilings['matmul']}"
            facts[f"ceiling, {dtype}"] = f"{rate(speed, 'FLOP')}, {product}"
        moved = rate(ceilings["bytes_per_s"], "B")
        facts["ceiling, memory"] = f"{moved}, copy of {ceilings['copy']}"
    lines = ["## The run", "", *table(("", ""), facts.items())]
    told = [environment.get("nvidia_smi"), *(row["nvidia_smi"] for row in results.of("clocks"))]
    if any(told):  # the card, then its clocks behind the ceilings and at the end
        lines += ["```", *filter(None, told), "```", ""]
    steps = []
    for row in results.of("step"):
        took = "" if row.get("seconds") is None else f"{row['seconds']:.0f} s"
        done = {True: "ok", None: "unfinished"}.get(row["ok"], "**failed**")
        steps.append((row["what"], done, row.get("why", ""), took))
    if steps:
        lines += ["### Steps", "", *table(("step", "", "why", "took"), steps)]
    lines += ["### Again", "", "```sh"]
    if commit := environment.get("commit"):
        dirty = environment.get("uncommitted")
        changed = "   # and the changes that were not committed" if dirty else ""
        lines += [f"git checkout {commit}{changed}"]
    files = " ".join(path.name for path in results.paths)
    lines += [
        f"python -m pytest benchmarks --benchmark-only --grid {about.get('grid', 'small')}",
        f"python -m benchmarks report {files}",
        *("```", ""),
    ]
    return lines
