"""Processes that make calls under a tool, watched: one that dies or hangs costs the call it was at.

A process says what it does in lines of its own, among which the tool's come:

    @@ 17 start
    @@ 17 done            or: raised, and the text of the exception
"""

import itertools
import os
import queue
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .._contest import Row
from .reports import Report, Stream

ROOT = Path(__file__).parent.parent.parent
PLAIN = "no tool"

# Seconds without a sign of life after which a process is given up: from its start to its first
# call, and for a call, which may have to be compiled or instrumented first.
START, CALL = 180.0, 120.0

# Reports after which a process is replaced by another: the tool would soon print no more of them.
ENOUGH = 200

FOUND = 97  # exit code of the tool after a report

OUT_OF_TIME = "out of time"
PYTHON = (sys.executable, "-m", "benchmarks._verify.sanitizer")

COMMON = (
    "--target-processes", "application-only",  # neither gcc nor ptxas, which Triton may start
    "--launch-timeout", str(int(START)),  # for the connection; 10 s by default
    "--error-exitcode", str(FOUND),
    "--print-limit", str(10 * ENOUGH),
    "--show-backtrace", "device",
    "--check-exit-code", "no",
)  # fmt: skip
OPTIONS = {
    # An error ends the kernel, not the context. The padding keeps what overruns one tensor from
    # landing in the next. Failed API calls raise in Python, and PyTorch asks some that may fail.
    "memcheck": (
        "--destroy-on-device-error", "kernel", "--padding", "65536",
        "--report-api-errors", "no", "--check-device-heap", "no",
    ),
    "racecheck": ("--racecheck-report", "analysis", "--racecheck-num-workers", "2"),
    "initcheck": (),
    "synccheck": (),
}  # fmt: skip


@dataclass
class Outcome:
    """What came of one call under one tool; ok None: it was not checked.

    number: the call's, or None for what belongs to none.
    """

    tool: str
    number: int | None
    ok: bool | None = None
    why: str = ""
    seconds: float = 0.0
    reports: list[Report] = field(default_factory=list)


class Runner:
    """Makes calls under tools, in processes of which a thread each looks after one.

    calls: rows of the plan. command: the tool's, before its options. stop: when to give up, by
    time.monotonic. unusable: by tool, why it can't run here.
    """

    def __init__(
        self, calls: list[Row], plan_file: Path, device: str, command: Sequence[str], stop: float
    ) -> None:
        self.calls, self.plan_file, self.device = calls, plan_file, device
        self.command, self.stop = list(command), stop
        self.kernels = [{k.split(".")[-1] for k in call["kernels"]} for call in calls]
        self.unusable: dict[str, str] = {}
        self._worked: set[str] = set()
        self._internal: Counter[str] = Counter()
        self._outcomes: queue.Queue[Outcome | None] = queue.Queue()
        # A tool takes ten of them; there is room for a thousand at a time.
        self._ports = itertools.cycle(range(49152, 65152, 16))
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(
        self, work: Sequence[tuple[str, list[int]]], processes: int
    ) -> Generator[Outcome, None, None]:
        """The outcomes of these chunks of calls under tools, as they come."""

        def all_of_it() -> None:
            with ThreadPoolExecutor(processes) as pool:
                for chunk in work:
                    pool.submit(self._chunk, *chunk)
            self._outcomes.put(None)

        thread = threading.Thread(target=all_of_it, daemon=True)
        thread.start()
        try:
            while (outcome := self._outcomes.get()) is not None:
                yield outcome
        finally:  # were this process interrupted, others would go on for nobody
            self.stop = min(self.stop, time.monotonic()) if thread.is_alive() else self.stop
            while thread.is_alive():
                for process in list(self._running):
                    kill(process)
                thread.join(0.1)

    def _chunk(self, tool: str, numbers: list[int]) -> None:
        """Make these calls, in as many processes as that takes."""
        left, why, failures = numbers, OUT_OF_TIME, 0
        try:
            while left and tool not in self.unusable and time.monotonic() < self.stop:
                left, problem = self._process(tool, left)
                failures += bool(problem)
                if failures > 1:  # one may be by chance
                    why = problem
                    if tool not in self._worked:
                        self.unusable.setdefault(tool, why)
                    break
        except Exception as problem:  # a mistake of ours must not take other chunks with it
            why = f"{type(problem).__name__}: {problem}"
        for n in left:
            self._outcomes.put(Outcome(tool, n, why=self.unusable.get(tool, why)))

    def argv(self, tool: str, numbers: Sequence[int]) -> list[str]:
        """The command line of a process that makes these calls under `tool`."""
        head: list[str] = []
        if tool != PLAIN:
            with self._lock:
                port = next(self._ports)
            head = [*self.command, "--tool", tool, "--port", str(port), *COMMON, *OPTIONS[tool]]
        tail = ["--child", str(self.plan_file), "--device", self.device, "--calls"]
        return [*head, *PYTHON, *tail, ",".join(map(str, numbers))]

    def _process(self, tool: str, numbers: list[int]) -> tuple[list[int], str]:
        """Make these calls in one process until it ends.

        Returns: those that it didn't come to; and why it came to none, or may as well not have.
        """
        process = start(self.argv(tool, numbers), self.device)
        self._running.add(process)
        stream = Stream(set().union(*self.kernels))
        seen: list[Outcome] = []
        told, begun, running, late, killed = 0, 0.0, False, "", False
        for line in lines(process, lambda: min(self.stop, time.monotonic() + patience(seen))):
            if line is None:
                late = f"no answer in {patience(seen):.0f} s"
                late = late if time.monotonic() < self.stop else OUT_OF_TIME
                break
            stream.feed(line, seen[-1].number if seen else None)
            if stream.unfit:
                self.unusable.setdefault(tool, stream.unfit)
                break
            marker = re.match(r"@@ (\d+) (start|done|raised)\s*(.*)", line)
            if marker and marker[2] == "start":
                if len(stream.reports) >= ENOUGH:
                    killed = True
                    break
                # A report may still come for the last one.
                told = self._tell(seen, told, len(seen) - 1, stream)
                seen.append(Outcome(tool, int(marker[1])))
                begun, running = time.monotonic(), True
            elif marker:
                seen[-1].ok, seen[-1].why = marker[2] == "done", marker[3]
                seen[-1].seconds, running = time.monotonic() - begun, False
        code = end(process)
        self._running.discard(process)
        ended = late or f"ended with exit code {code}: {' | '.join(stream.tail)[-300:]}"
        left = [n for n in numbers if n not in {o.number for o in seen}]
        if stream.unfit:  # so that nothing that looks right since is believed
            return [o.number for o in seen[told:] if o.number is not None] + left, stream.unfit
        if running:
            seen[-1].ok, seen[-1].why = None if late == OUT_OF_TIME else False, ended
        self._tell(seen, told, len(seen), stream)
        if not (stream.reports or late or killed) and (stream.summary or code == FOUND):
            why = f"{stream.summary} errors were counted, and none could be read; {ended}"
            self._outcomes.put(Outcome(tool, None, False, why))
        return left, "" if seen or late == OUT_OF_TIME else ended

    def _tell(self, seen: list[Outcome], first: int, end: int, stream: Stream) -> int:
        """Pass on the outcomes from first to end, with their reports; where to go on."""
        for outcome in seen[first:end]:
            outcome.reports = [r for r in stream.reports if self._owner(r, seen) == outcome.number]
            internal = [r.text for r in outcome.reports if r.internal]
            if internal:
                outcome.ok, outcome.why = None, internal[0]
                self._internal[outcome.tool] += 1
                if self._internal[outcome.tool] >= 5 and outcome.tool not in self._worked:
                    self.unusable.setdefault(outcome.tool, internal[0])
            elif outcome.ok is not None:
                self._worked.add(outcome.tool)
            self._outcomes.put(outcome)
        return max(first, end)

    def _owner(self, report: Report, seen: list[Outcome]) -> int | None:
        """The call that a report is about: the last with its kernel when it came."""
        numbers = [o.number for o in seen if o.number is not None]
        if report.call not in numbers:
            return numbers[0] if numbers else None
        before = numbers[: numbers.index(report.call) + 1]
        with_it = [n for n in before if report.kernel in self.kernels[n]]
        return with_it[-1] if with_it else report.call


def patience(seen: list[Outcome]) -> float:
    """Seconds that the next line may take: a process has to start before its first call."""
    return CALL if seen else START


def start(argv: Sequence[str], device: str) -> "subprocess.Popen[bytes]":
    """A process for `device`, whose output is one stream."""
    own = {
        "VITKERN_SELFCHECK": "0",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        # Every tensor is an allocation of its own then, whose bounds the tool knows.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "TRITON_INTERPRET": "1" if device == "cpu" else "0",
    }
    return subprocess.Popen(
        argv,
        cwd=ROOT,
        env={**os.environ, **own},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it has started ends with it
    )


def lines(
    process: "subprocess.Popen[bytes]", deadline: Callable[[], float]
) -> Iterator[str | None]:
    """What `process` prints; None when nothing came until `deadline`, by time.monotonic."""
    assert process.stdout is not None
    file, rest = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(file, selectors.EVENT_READ)
        while True:
            until = deadline()
            while b"\n" not in rest:
                if not selector.select(max(0.0, until - time.monotonic())):
                    yield None
                    return
                more = os.read(file, 1 << 16)
                if not more:
                    if rest:
                        yield rest.decode(errors="replace")
                    return
                rest += more
            line, _, rest = rest.partition(b"\n")
            yield line.decode(errors="replace").rstrip("\r")


def end(process: "subprocess.Popen[bytes]") -> int:
    """Its exit code, once it has ended: by itself within a second, else by force."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    kill(process)
    code = process.wait()
    if process.stdout is not None:
        process.stdout.close()
    return code


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it has started, in whatever session that is."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):  # it has just ended
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(
                int(stat.parent.name)
            )
    doomed = [process.pid] if process.poll() is None else []
    for pid in doomed:
        doomed += parents.get(pid, [])
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
