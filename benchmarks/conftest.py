"""Options of ``pytest benchmarks``, and the report at its end."""

import datetime
from pathlib import Path
from typing import Any

import pytest

from . import _proxies, _report
from ._grid import GRIDS
from ._measure import clocks
from ._session import DEVICE, Session

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("vitkern").addoption
    add("--grid", choices=GRIDS, default="small", help="how many cases (default: %(default)s)")
    add(
        "--results",
        type=Path,
        metavar="FILE",
        help="append every result here at once, and write the report beside it "
        "(default: a new file in build/benchmarks)",
    )
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        metavar="M",
        help="skip what has not begun by then (default: no limit)",
    )
    add(
        "--seconds",
        type=float,
        default=0.3,
        metavar="S",
        help="of timing for each contender (default: %(default)s)",
    )
    add("--no-report", action="store_true", help="write the results only")


def pytest_configure(config: pytest.Config) -> None:
    # A kernel that auto gives up with a warning must not be an error here, as in the tests it is.
    config.addinivalue_line("filterwarnings", "default:::vitkern")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test module's `runs(grid, device)` yields pairs of a case and a contender's name."""
    if "impl" in metafunc.fixturenames:
        runs = metafunc.module.runs(metafunc.config.getoption("grid"), DEVICE)
        made = [pytest.param(case, impl, id=f"{case} {impl}") for case, impl in runs]
        metafunc.parametrize(("case", "impl"), made)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly:
        return
    groups: dict[str, list[str]] = {}
    for item in session.items:  # those that -k and the like have left
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if "impl" in given:
            groups.setdefault(str(given["case"]), []).append(given["impl"])
    if not groups:
        return
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    path = config.getoption("results") or Path(f"build/benchmarks/{now}/results.jsonl")
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")

    def tell(line: str) -> None:
        if reporter is not None and capture is not None:
            with capture.global_and_fixture_disabled():
                reporter.ensure_newline()
                reporter.write_line(line)

    options = {name: config.getoption(name) for name in ("grid", "minutes", "seconds")}
    config.stash[SESSION] = Session(path, groups=groups, tell=tell, **options)


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Session:
    """The run that a test belongs to."""
    return request.config.stash[SESSION]


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """No dots for what passed: the session tells of every group."""
    return ("passed", "", "PASSED") if report.passed and report.when == "call" else None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """What a report needs beside the times."""
    run = config.stash.get(SESSION, None)
    if run is not None:
        # The times are the tests' own, but what is wrong has no test that passed.
        timed = (row["kind"] == "time" and row["parity"]["ok"] for row in run.log.rows)
        others = zip(run.log.rows, timed, strict=True)
        output_json["vitkern"] = [row for row, has_time in others if not has_time]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash.get(SESSION, None)
    if run is None:
        return
    run.log.add(clocks(DEVICE))
    if run.log.timed and not config.getoption("no_report"):
        terminalreporter.section("vitkern")
        _proxies.add(run.log)  # what can be told without a GPU, beside what was measured
        _report.main_report([run.log.path], run.log.path.parent)
    run.log.close()
