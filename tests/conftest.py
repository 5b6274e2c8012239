"""Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors.

That is decided when a kernel is decorated, so before vitkern is imported anywhere.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# On a GPU, verdicts on kernels that tests break on purpose must not outlive the tests.
_scratch = os.path.join(tempfile.gettempdir(), f"vitkern-{os.getpid()}")
os.environ.setdefault("VITKERN_CACHE", _scratch)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--outcomes", type=Path, metavar="FILE", help="each test's outcome, a line of JSON, at once"
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(path))


class Outcomes:
    """Written as they come: a run that is cut off never comes to its summary."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")

    def pytest_runtest_logreport(self, report: Any) -> None:
        # Neither setup nor teardown is worth a line, unless it is where the test ended.
        if report.when in ("setup", "teardown") and report.passed:
            return
        why = "" if report.passed else report.longreprtext[-3000:]
        row = {"test": report.nodeid, "outcome": report.outcome, "why": why}
        self.file.write(json.dumps({**row, "seconds": report.duration}) + "\n")
        self.file.flush()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and (not GPU or INTERPRET):
            reason = "TRITON_INTERPRET=1 is set" if GPU else "needs a CUDA GPU"
            item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: "slow" in item.keywords)  # a time budget must not cut off the rest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """A worker whose CUDA context is broken makes way for another: all that follows would fail."""
    report = yield
    if GPU and report.failed and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            print(f"{item.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)
            os._exit(1)
    return report


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def kernel_device(request: pytest.FixtureRequest) -> str:
    """A device on which the Triton kernels run: interpreted on the CPU, compiled on a GPU."""
    if request.param == "cpu" and not INTERPRET:
        pytest.skip("the kernels are compiled in this process: TRITON_INTERPRET is not set")
    return request.param


@pytest.fixture
def card_to_itself() -> Iterator[None]:
    """Of tests in several processes, those that need much of a card's memory take turns."""
    if not GPU:
        yield
        return
    import fcntl

    with open(os.path.join(tempfile.gettempdir(), "vitkern-card"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def hf() -> Iterator[Any]:
    """transformers, which mistakes our folder kernels/ for a package of its own dependencies."""
    pytest.importorskip("transformers")
    modules: Any = sys.modules
    before = {name: modules.pop(name) for name in ("kernels",) if name in modules}
    modules["kernels"] = None
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        yield transformers
    finally:
        del modules["kernels"]
        modules.update(before)
