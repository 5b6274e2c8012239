"""What the documents list is what there is."""

import re
from pathlib import Path

from benchmarks import _gpu
from benchmarks.__main__ import parser
from vitkern.checkpoint import FORMATS
from vitkern.model.config import RESAMPLINGS, ViTConfig

DOCS = Path(__file__).resolve().parent.parent / "docs"
READ_ONLY = re.compile(r"read, not written|doesn't write")


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of every table row whose first cell is code."""
    lines = (re.match(r"\| `([^`]+)` \| (.*) \|$", line) for line in text.splitlines())
    return {match[1]: match[2].split(" | ") for match in lines if match}


def test_every_layout_is_in_the_table() -> None:
    listed = rows((DOCS / "checkpoints.md").read_text())
    assert set(listed) == {one.name for one in FORMATS} | set(RESAMPLINGS)
    config = ViTConfig()
    for one in FORMATS:
        readable = READ_ONLY.search(one.unfit(config) or "") is None
        assert (listed[one.name][-1] != "no") == readable, one.name


def test_every_file_of_the_network_is_in_the_plan() -> None:
    plan = (DOCS / "design.md").read_text()
    folder = DOCS.parent / "vitkern"
    for path in [*folder.glob("[!_]*.py"), *(folder / "model").glob("[!_]*.py")]:
        if path.stem not in ("demo", "maps", "eager", "explain", "selfcheck"):
            assert path.name in plan, path.name


def test_every_step_of_the_gpu_command_is_listed() -> None:
    steps = [step.what for step in _gpu.steps(Path("out"), "cuda")]
    table = (DOCS.parent / "CONTRIBUTING.md").read_text().partition("| steps | |")[2]
    cells = re.findall(r"^\| (`.*?`) \|", table.partition("\n\n")[0], re.M)
    assert [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)] == steps
    (commands,) = (a.choices for a in parser()._actions if isinstance(a.choices, dict))
    (option,) = (a for a in commands["gpu"]._actions if a.dest == "steps")
    assert option.help == f"of {' '.join(steps)} (default: all)"
