"""The README's table, made of the results that are kept: no figure in it is typed by hand."""

from pathlib import Path

from .._cases import save
from .results import Results, Row, describe, many, ratio, read, short, table
from .verdicts import in_words, judge

ROOT = Path(__file__).parents[2]
MARKS = ("<!-- results -->", "<!-- /results -->")
NO_GPU = (
    "There is no result from a GPU yet, and no GPU figure is claimed: `make gpu` on a machine with "
    "an NVIDIA GPU makes one."
)


def main_readme() -> int:
    """``python -m benchmarks readme``: write the table anew; the exit code, 0."""
    changed = update_readme(ROOT / "README.md", ROOT / "benchmarks" / "results")
    print("README.md: " + ("written" if changed else "nothing new"))
    return 0


def update_readme(path: Path, folder: Path) -> bool:
    """Put `readme_table` between the marks in a file; whether that changed the file.

    Raises:
        ValueError: there are no such marks, or a results file is none.
    """
    text = path.read_text()
    before, opened, rest = text.partition(MARKS[0])
    _, closed, behind = rest.partition(MARKS[1])
    if not closed:
        raise ValueError(f"{path}: expected the lines {MARKS[0]} and, below it, {MARKS[1]}")
    made = f"{before}{opened}\n{readme_table(folder)}\n{closed}{behind}"
    if made != text:
        save(path, made)
    return made != text


def readme_table(folder: Path) -> str:
    """Markdown of the newest results of models among ``<folder>/<device>/*.jsonl``.

    Rows: of each model, step and precision the largest batch, and forward the smallest, too. What
    is not shown is counted in the sentence below.

    Raises:
        ValueError: as `read`.
    """
    newest: dict[str, tuple[str, Results]] = {}
    for path in sorted(folder.glob("*/*.jsonl")):
        results, device = read(path), path.parent.name
        date = str(results.environment.get("date", ""))
        if results.groups("model") and date >= newest.get(device, ("",))[0]:
            newest[device] = (date, results)
    on_gpu = any(r.about().get("device") == "cuda" for _, r in newest.values())
    text = [] if on_gpu else [NO_GPU, ""]
    for device, (date, results) in newest.items():
        file = f"{folder.parent.name}/{folder.name}/{device}/{results.paths[0].name}"
        packages = results.environment.get("packages", {})
        about = [f"**{results.device}**", date[:10]]
        about += [f"{k} {packages[k]}" for k in ("torch", "timm") if packages.get(k)]
        text += [f"{', '.join(about)} (`{file}`):", ""]
        text += [*_table(results), _summary(results), ""]
    return "\n".join(text).rstrip()


def _table(results: Results) -> list[str]:
    groups = results.groups("model")
    made: list[tuple[str, ...]] = []
    for group in _shown(groups):
        ours = results.ours.get(group, {})
        if "seconds" not in ours:
            made.append((group, "wrong: no time", "", "", "", ""))
            continue
        rivals = [row for row in groups[group] if results.verdict(row) in ("win", "even", "loss")]
        plain = [[row for row in rivals if row["impl"] == name] for name in ("eager", "timm")]
        compiled = [row for row in rivals if "compile" in row["impl"]]
        cells = [_nearest(results, rows) for rows in (*plain, compiled)]
        cells.append(_nearest(results, rivals, named=True))
        made.append((group, short(ours["images_per_s"]), *cells))
    head = ("", "vitkern, images/s", "speed-up against eager", "against timm")
    return table((*head, "against the best torch.compile", "against the fastest of all"), made)


def _shown(groups: dict[str, list[Row]]) -> list[str]:
    kinds: dict[tuple[str, ...], dict[int, str]] = {}
    for group, rows in groups.items():
        case = rows[0]["case"]
        kind = (case["model"], case["step"], case["precision"])
        kinds.setdefault(kind, {})[case["batch"]] = group
    shown = {found[max(found)] for found in kinds.values()}
    shown |= {found[min(found)] for kind, found in kinds.items() if kind[1] == "forward"}
    return [group for group in groups if group in shown]


def _nearest(results: Results, rivals: list[Row], named: bool = False) -> str:
    """The speed-up against the fastest of some rivals; and its name, if that is wanted."""
    if not rivals:
        return "not run"
    fastest = min(rivals, key=ratio)
    text = f"{ratio(fastest):.2f} x" + (f" {fastest['impl']}" if named else "")
    marked = {"loss": f"**{text}, a loss**", "even": f"{text}, within A/A"}
    return marked.get(results.verdict(fastest), text)


def _summary(results: Results) -> str:
    counts, losses = results.outcomes("model"), results.losses("model")
    text = (
        f"Of all {many(len(results.groups('model')), 'group')} of that run vitkern is the fastest "
        f"in {counts['fastest']}, level with its nearest rival in {counts['level']}, and slower "
        f"than a rival in {counts['slower']}."
    )
    text += f" Worst loss: {describe(losses[0])}." if losses else ""
    verdicts = judge(results)
    return text + (f" {in_words(verdicts)}" if verdicts else "")
