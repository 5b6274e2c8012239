"""docs/verification.md, made of the results that are kept: nothing on a card is typed by hand.

Rows are taken as they lie in the files, of those that say the same the last. A row counts for the
card of the run that it stands in, which the "about" row before it names; runs on a CPU are
rehearsals and count for nothing. A verdict is marked as of an older source if the code that its
kernel can consist of, or vitkern's version, has changed since; of the sanitizers' those are left
out where there are newer ones.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from vitkern.kernels import REGISTRY, _tuned, _verified
from vitkern.kernels._verified import Verdict

from .._cases import save
from .._contest import Row
from .._report import read
from .._report.results import many, table
from .kernels import items
from .watch import OUT_OF_TIME

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "verification.md"

# What tells rows of a kind apart.
KEYS = {
    "verified": ("op", "impl", "dtype", "precision", "size"),
    "sanitizer": ("tool", "op", "impl", "kernel", "config", "sample", "dtype"),
    "step": ("what",),
    "training": ("what", "impl", "dtype"),
}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
COLUMNS = {
    "bfloat16": ("bfloat16", ""),
    "float16": ("float16", ""),
    "float32, IEEE": ("float32", "ieee"),
    "float32, TF32": ("float32", "tf32"),
}
SAMPLES = {"tiny": "Small samples", "vit": "Samples of the sizes of real models"}
NO_OPS = ("control", "PyTorch", "all", "unattributed")  # what else the sanitizers' rows name
OLDER = "†"
NOT_RUN = "not run"
LAST = 10  # losses whose mean stands for the end of a curve

HEAD = """\
# What was verified on GPUs

Made by `python -m benchmarks verify page` of the results kept in `benchmarks/results/`.
"""

HOW = """\
**Kernels.** On all small samples of an op, of odd sizes and with its options, and on those of the
sizes of real models, a kernel's error against float64 is at most twice that of eager PyTorch in the
same dtype. All memory that the kernel gets is filled with NaN before, so that an element which
nobody wrote is found; and every call is repeated, always with the same bits. Float32 is checked
with products in IEEE's precision and in TF32, eager being given the same. A figure is the largest
error over what is allowed: above 1 is wrong.

**Memory.** NVIDIA's compute-sanitizer watches every launch config: accesses out of bounds
(memcheck), races in shared memory (racecheck), reads of what nobody wrote (initcheck), misuse of
barriers (synccheck). A control has a fault made on purpose, which the tool must report.

**Training.** The same network, weights and batches in vitkern and in eager PyTorch. At the first,
the middle and the last step every parameter's gradient is at most twice as far from that of eager
float32 as eager's in bfloat16 is, and so is the whole curve of the loss.
"""

NOTHING = """\
**Nothing has been verified on a GPU yet.** No kernel of vitkern has run on one, and all that is
said of GPUs elsewhere in these pages is a prediction.

What is known without a GPU, and checked by `make test`:

- Triton's interpreter runs the kernels, but for those in Gluon, on a CPU in float32 and float16, at
  small and odd sizes: results and gradients are held to the rule above. It sees no races and knows
  no TF32, and its bfloat16 products are wrong, so that no kernel has been checked in bfloat16.
- The compiler makes code of every kernel and launch config for sm_80 and sm_90 that fits into the
  shared memory of such cards.
- A symbolic sanitizer follows every load and store of small samples: none leaves its tensor.

{count} wait for a card: {ops} with one to three kernels each, in bfloat16, float16, and float32 as
IEEE and as TF32.
"""

COMMAND = """\
## How to verify a card

One command does all of it on a machine with an NVIDIA GPU, and needs no network:

    make gpu MINUTES=15 OUT=build/gpu PYTHON=python3

Copy `build/gpu/results.jsonl` to `benchmarks/results/<device>/<date>.jsonl`, and make this page
anew: `python -m benchmarks verify page`.
"""


@dataclass
class Card:
    """What was recorded on one model of GPU: its runs, and by kind and key the last rows."""

    runs: dict[tuple[str, ...], None] = field(default_factory=dict)
    rows: dict[str, dict[tuple[object, ...], Row]] = field(default_factory=dict)

    def of(self, kind: str) -> list[Row]:
        """The rows of a kind."""
        return list(self.rows.get(kind, {}).values())


def cards(rows: Iterable[Row]) -> dict[str, Card]:
    """By name, the GPUs that rows say something of."""
    found: dict[str, Card] = {}
    about: Row = {}
    for row in rows:
        kind = row["kind"]
        if kind == "about":
            about = row
        elif kind in KEYS and about.get("device") == "cuda":
            if kind == "step" and row["what"] != "tests":
                continue
            environment = about["environment"]
            card = found.setdefault(environment["card"]["name"], Card())
            card.runs[_run(environment)] = None
            key = tuple([row.get(name) for name in KEYS[kind]])
            card.rows.setdefault(kind, {})[key] = row
            if kind == "sanitizer" and row["op"] != "all":  # it runs here after all
                gone = {"tool": row["tool"], "op": "all"}
                card.rows[kind].pop(tuple([gone.get(name) for name in KEYS[kind]]), None)
    return found


def _run(environment: Row) -> tuple[str, ...]:
    """Date, commit, driver and versions of a run."""
    packages = environment.get("packages", {})
    lines = (environment.get("nvidia_smi") or "").strip().splitlines()
    driver = lines[-1].split(", ")[1] if len(lines) > 1 and ", " in lines[-1] else "unknown"
    commit = (environment.get("commit") or "unknown")[:12]
    return (
        str(environment.get("date", ""))[:10],
        commit + (" and changes" if environment.get("uncommitted") else ""),
        driver,
        str(environment.get("cuda")),
        str(packages.get("torch")),
        str(packages.get("triton")),
    )


def page(rows: Iterable[Row]) -> str:
    """The page, as Markdown."""
    text = [HEAD, HOW]
    found = cards(rows)
    if not found:
        every = items(None, torch.device("cuda"))
        ops = many(len({item.op for item in every}), "op")
        text += [NOTHING.format(count=many(len(every), "check"), ops=ops)]
    for name, card in found.items():
        text += ["\n".join(_of_card(name, card))]
    return "\n".join([*text, COMMAND])


def _of_card(name: str, card: Card) -> list[str]:
    head = ("date", "commit", "driver", "CUDA", "torch", "triton")
    parts = [_tests(card), _kernels(card), _sanitizer(card), _training(card)]
    return [f"## {name}", "", *table(head, card.runs), *(line for part in parts for line in part)]


def _listed(wrong: Sequence[str]) -> list[str]:
    return [*(f"- {line}" for line in wrong), ""] if wrong else []


def _outcome(ok: bool | None) -> str:
    return {True: "passed", False: "**failed**", None: "came to no end"}[ok]


def _tests(card: Card) -> list[str]:
    text = ["### The GPU tests", ""]
    for row in card.of("step"):
        counts = row.get("tests") or {}
        counted = ", ".join(f"{number} {what}" for what, number in counts.items())
        about = "; ".join(part for part in (counted, row["why"]) if part)
        text += [f"They {_outcome(row['ok'])} ({about}, {row['seconds']:.0f} s).", ""]
    return text if card.of("step") else [*text, f"{NOT_RUN.capitalize()}.", ""]


def older(row: Row) -> bool:
    """Whether the kernel of a "verified" or "sanitizer" row may have changed since."""
    op = REGISTRY.get(row["op"])
    if op is None:
        return row["op"] not in NO_OPS
    now = _verified.key(op, row["impl"], _tuned.dtype_of(row["dtype"]), "card").split()
    if row["kind"] == "sanitizer":  # no number is of it, so that a version alone changes nothing
        return now[-1] not in row["source"].split()
    words = row["key"].split()
    # The version of Triton is that of the machine there, as the table of runs says.
    return any(new not in words for new in now if new.startswith("vitkern-") or new == now[-1])


def _kernels(card: Card) -> list[str]:
    text = ["### Kernels", ""]
    if any(map(older, card.of("verified"))):
        text += [f"{OLDER}: of an older source.", ""]
    for size, about in SAMPLES.items():
        rows: dict[tuple[str, ...], Row] = {
            (r["op"], r["impl"], r["dtype"], r["precision"]): r
            for r in card.of("verified")
            if r["size"] == size
        }
        text += _of_size(about, size, rows)
    return text


def _of_size(about: str, size: str, rows: dict[tuple[str, ...], Row]) -> list[str]:
    expected = [
        (item.op, item.impl, item.words["dtype"], item.precision)
        for item in items(None, torch.device("cuda"), [size])
    ]
    lines = []
    for op, impl in sorted({key[:2] for key in (*expected, *rows)}, key=_place):
        own = {name: rows.get((op, impl, *kind)) for name, kind in COLUMNS.items()}
        there = [row for row in own.values() if row is not None and row["ok"] is not None]
        counts = [_range(row[name] for row in there) for name in ("samples", "repeats")]
        poisoned = "" if not there else "yes" if all(row["poisoned"] for row in there) else "no"
        lines.append((op, impl, *map(_figure, own.values()), *counts, poisoned))
    done = [rows[key] for key in expected if key in rows]
    wrong = sum(row["ok"] is False for row in rows.values())
    summary = f"{about}: {len(done)} of {many(len(expected), 'check')} done, {wrong} wrong."
    head = ("op", "implementation", *COLUMNS, "samples", "calls each", "NaN-filled")
    faults = [
        f"{' '.join((r['op'], r['impl'], r['dtype'], r['precision'])).rstrip()}, "
        f"{r['sample'] or 'before the first sample'}: {_verdict(r)}"
        for r in rows.values()
        if r["ok"] is False
    ]
    return [summary, "", *(table(head, lines) if rows else []), *_listed(faults)]


def _place(pair: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Ops in the order of the registry, then those that are no longer in it."""
    names = list(REGISTRY)
    return names.index(pair[0]) if pair[0] in names else len(names), pair


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return "" if not found else f"{found[0]}" + (f" to {found[-1]}" if len(found) > 1 else "")


def _verdict(row: Row) -> Verdict:
    return Verdict(**{f.name: row[f.name] for f in fields(Verdict) if f.name in row})


def _figure(row: Row | None) -> str:
    if row is None:
        return NOT_RUN
    mark = f" {OLDER}" if older(row) else ""
    if row["ok"] is None:
        return f"{NOT_RUN if row['raised'] else 'none fits'}{mark}"
    return (f"{_verdict(row).ratio:.2f}" if row["ok"] else "**WRONG**") + mark


def _sanitizer(card: Card) -> list[str]:
    text = ["### compute-sanitizer", ""]
    if not card.of("sanitizer"):
        return [*text, f"{NOT_RUN.capitalize()}.", ""]
    grouped: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in card.of("sanitizer"):
        group = grouped.setdefault((row["op"], row.get("impl") or ""), {})
        group.setdefault(row["tool"], []).append(row)
    lines, shown = [], list[Row]()
    for pair in sorted(grouped, key=_place):
        found = [_newest(grouped[pair].get(tool, [])) for tool in TOOLS]
        lines.append((*pair, *map(_launches, found)))
        shown += [row for rows in found for row in rows if row["ok"] is not True]
    shown = [row for row in shown if row.get("why") != OUT_OF_TIME]  # which are counted above
    if any(OLDER in cell for line in lines for cell in line):
        text += [f"{OLDER}: of an older source.", ""]
    faults = Counter(
        f"{' '.join(filter(None, (r['tool'], r['op'], r.get('impl'), r.get('kernel'))))}: "
        f"{(r.get('what') or [r.get('why') or NOT_RUN])[0]}"
        for r in shown
    )
    listed = [f"{text} ({number} times)" if number > 1 else text for text, number in faults.items()]
    head = ("op", "implementation", *TOOLS)
    return [*text, *table(head, lines), *_listed(listed)]


def _newest(rows: Sequence[Row]) -> Sequence[Row]:
    """Those of the source of today, if there are any."""
    return [row for row in rows if not older(row)] or rows


def _launches(rows: Sequence[Row]) -> str:
    """What a tool said of some launches."""
    if not rows or all(row["ok"] is None for row in rows):
        return NOT_RUN
    errors, wrong = sum(r.get("errors", 0) for r in rows), sum(r["ok"] is False for r in rows)
    left = sum(row["ok"] is None for row in rows)
    words = [many(len(rows) - left, "launch").replace("launchs", "launches")]
    words += [many(errors, "error")]
    words += [f"**{wrong} failed**"] if wrong else []
    words += [f"{left} {NOT_RUN}"] if left else []
    return ", ".join(words) + (f" {OLDER}" if any(map(older, rows)) else "")


def _training(card: Card) -> list[str]:
    text = ["### Training", ""]
    rows = card.of("training")
    lines, verdicts = [], []
    for row in rows:
        if row["impl"] == "verdict":
            verdicts.append(f"{row['what']}: {_outcome(row['ok'])}; {row['why']}")
            continue
        losses = row["losses"]
        end = f"{sum(losses[-LAST:]) / len(losses[-LAST:]):.4f}" if losses else ""
        accuracy = row.get("accuracy")
        shown = "" if accuracy is None else f"{100 * accuracy:.1f} %"
        lines.append((row["what"], row["impl"], row["dtype"], str(len(losses)), end, shown))
    if not rows:
        return [*text, f"{NOT_RUN.capitalize()}.", ""]
    head = ("network", "by", "dtype", "steps", f"loss, the last {LAST}", "accuracy")
    return [*text, *_listed(verdicts), *table(head, lines)]


def recorded(folder: Path = RESULTS) -> list[Row]:
    """The rows of all results that are kept: ``<folder>/<device>/*.jsonl``.

    Raises:
        ValueError: one of them is no results file.
    """
    return [row for path in sorted(folder.glob("*/*.jsonl")) for row in read(path).rows]


def write(path: Path = PAGE, folder: Path = RESULTS) -> bool:
    """Make the page anew; whether that changed it."""
    made = page(recorded(folder))
    changed = not path.exists() or path.read_text() != made
    if changed:
        save(path, made)
    return changed


def main() -> int:
    """``python -m benchmarks verify page``: make docs/verification.md anew; the exit code, 0."""
    print(f"{PAGE.name}: " + ("written" if write() else "nothing new"))
    return 0
