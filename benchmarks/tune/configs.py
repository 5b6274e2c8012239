"""The tuner's first stage: which launch config of each kernel is the fastest on this card.

A launcher's question, its default and its alternatives come from the launcher itself
(``kernels/_configs.py``); where it is asked, from ``places.py``. Alternatives are compiled ahead by
many processes without a GPU, into the cache that Triton reads when a kernel is launched; what
spills registers or needs more shared memory than there is takes no further part. The others run in
one process that has the GPU: each is held against float64 on the call's own arguments, timed
shortly, and properly if it is not far behind; at last the best and the default, and the default
again, are timed in turns. An alternative that crashes that process, or hangs, is left out, and the
next one finds a new process. What is found is on disk before the next kernel's turn.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as OutOfTime
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitkern.kernels import _launch
from vitkern.kernels._configs import TUNABLE, override, record
from vitkern.kernels._error_budget import as_tuple, in_float64, parity
from vitkern.kernels._op import Op, dtype_name
from vitkern.kernels._tuned import Key

from .._measure import Stats, Timer
from .._workers import Died, Raised, Worker
from .ahead import Compiler
from .places import STAGES, Place, looked_at, of_samples, of_steps

if TYPE_CHECKING:
    from . import Draft

Row = dict[str, Any]
Configs = Mapping[Key, Any]

SLOWER = 1.2  # times the default's seconds: what short timings show as far behind
WIN = 0.02  # of the seconds; a smaller gain isn't worth an entry
TIMEOUT = 90.0  # seconds for a process to start, and to make a call's arguments and reference
ANSWER_TIMEOUT = 20.0  # for what comes after that
AS_WRONG = 1.1  # times the default's error, where that is beyond the budget
LOST = 4  # processes in a row that ended: then the GPU, or all of it, is broken


def describe(device: str) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors) of the card that configs are made for."""
    where = torch.device(device)
    if where.type == "cuda":
        torch.empty(1, device=where)
        where = torch.device("cuda", torch.cuda.current_device())
    return _launch.capability(where), _launch.sm_count(where)


class Bench:
    """One call, its arguments, and what it should return; in the process that has the GPU.

    A question may be asked as arguments are made: whether a forward pass saves statistics, say. So
    arguments are made anew for each answer to those.
    """

    def __init__(self, place: Place, device: torch.device, timer: Timer) -> None:
        self.place, self.timer, self.device = place, timer, device
        self.case, self.made = place.case(), dict[Any, dict[str, Any]]()
        with record() as asked:
            arguments = self.case.sample.make(device, self.case.dtype)
        self.early = {question.key: question.default for question in asked}
        with torch.no_grad():
            self.eager = as_tuple(self.case.op.portable(**arguments))
            self.exact = as_tuple(self.case.op.reference(**in_float64(arguments)))

    def arguments(self, configs: Configs) -> dict[str, Any]:
        """Those that are made with these configs."""
        early = {key: configs.get(key, default) for key, default in self.early.items()}
        kind = tuple(early.items())
        if kind not in self.made:
            with override(early):
                self.made[kind] = self.case.sample.make(self.device, self.case.dtype)
        return self.made[kind]

    def call(self, configs: Configs) -> Callable[[], tuple[Tensor, ...]]:
        """The call, with these configs."""
        arguments, launcher = self.arguments(configs), self.place.launcher()

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad(), override(configs):
                return as_tuple(launcher(**arguments))

        return run


_timers: dict[torch.device, Timer] = {}
_bench: Bench | None = None


def bench(place: Place, device: str) -> Bench:
    """The bench of a call; one is kept at a time."""
    global _bench
    where = torch.device(device)
    if where not in _timers:
        _timers[where] = Timer(where)
    if _bench is None or replace(_bench.place, impl=place.impl) != place:
        _bench = None  # so that its memory is free
        if where.type == "cuda":
            torch.cuda.empty_cache()
        _bench = Bench(place, where, _timers[where])
    _bench.place = place
    return _bench


def measure(place: Place, device: str, configs: Configs, limit: float, excess: float) -> Row:
    """Check the call with these configs and time it; {"ok", "seconds"} or {"ok", "why"}.

    limit: seconds above which three timings will do, as "short". excess: error over budget that is
    allowed; above 1 the answer tells it. An answer with "lost" is the last of this process: the GPU
    doesn't answer it any more.
    """
    on = bench(place, device)
    try:
        call = on.call(configs)
        verdict = parity(call(), on.eager, on.exact)
        if not verdict["ok"]:
            if "why" in verdict or not verdict["budget"]:
                return {"ok": False, "why": verdict.get("why") or _exceeded(verdict)}
            ratio = verdict["error"] / verdict["budget"]
            if ratio > excess:
                return {"ok": False, "why": _exceeded(verdict), "excess": ratio}
        # The queue ahead of the card, as where it is timed properly: else launches would count.
        quick = Stats.of(on.timer.samples(call, 3, on.timer.host_seconds(call))).median
        if quick > limit:
            return {"ok": True, "seconds": quick, "short": True}
        return {"ok": True, "seconds": on.timer(call, 0.03, 5, 50).median}
    except Exception as problem:
        row: Row = {"ok": False, "why": f"{type(problem).__name__}: {problem}"[:300]}
        if type(problem).__name__ == "OutOfResources":  # Triton's, before it launches anything
            row["ok"] = None
        try:
            if on.timer.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception:
            row["lost"] = True
        return row


def _exceeded(verdict: Row) -> str:
    return f"error {verdict['error']:.1e}, budget {verdict['budget']:.1e}"


def compare(place: Place, device: str, default: Configs, best: Configs) -> dict[str, float]:
    """Seconds of the default, of the default again and of the best, timed in turns."""
    on = bench(place, device)
    calls = {"default": default, "again": default, "config": best}
    runs = {name: on.call(configs) for name, configs in calls.items()}
    times = on.timer.in_turns(runs, 0.06, 7, 60, ahead=True)
    return {name: Stats.of(seconds).median for name, seconds in times.items()}


@dataclass
class Tuner:
    """One run: what is asked of whom, and what was found.

    fail: hears of what is wrong. end: when to begin nothing new, by time.monotonic.
    """

    draft: "Draft"
    device: str
    end: float
    worker: Worker
    compiler: Compiler
    add: Callable[[Row], None]
    fail: Callable[[str, Any], None]
    target: tuple[int, int] = (0, 0)
    processors: int = 0
    lost: int = 0
    chosen: dict[Key, Any] = field(default_factory=dict)
    ready: Place | None = None  # whose arguments the process has

    def late(self) -> bool:
        """Whether time is up, or there is no GPU left to ask."""
        return time.monotonic() > self.end or self.lost >= LOST

    def ask(self, function: Callable[..., Row], *arguments: Any) -> Row:
        """An answer of the process that has the GPU, whatever becomes of it."""
        place: Place = arguments[0]
        same = self.ready is not None and replace(self.ready, impl=place.impl) == place
        self.ready = None
        try:
            row = self.worker.ask(function, *arguments, timeout=ANSWER_TIMEOUT if same else TIMEOUT)
        except Died as problem:
            self.lost += 1
            return {"ok": False, "why": str(problem)}
        except Raised as problem:  # as arguments were made, say: it may have lost the GPU by that
            self.worker.close()
            return {"ok": False, "why": str(problem)}
        if row.get("lost"):
            self.worker.close()
            self.lost += 1
        else:
            self.lost, self.ready = 0, place
        return row

    def questions(self, places: Iterable[Place]) -> "Iterator[Question]":
        """What is still to be found out there, each only where it is asked first."""
        for place in places:
            try:
                asked = looked_at(place, self.target, self.processors, self.chosen)
            except Exception as problem:
                self.fail(str(place), {"why": f"{type(problem).__name__}: {problem}"[:300]})
                continue
            beside = [question.key for question, _ in asked]
            for question, _ in asked:
                key, default = question.key, question.default
                others = [c for c in dict.fromkeys(question.candidates()) if c != default]
                if key not in self.chosen:
                    self.chosen[key] = default
                    if others:
                        yield Question(place, beside, key, default, others, self.compiler)

    def answer(self, question: "Question") -> Row:
        """Find the fastest config for one question."""
        key, default = question.key, question.default
        here = partial(self.ask, measure, question.place, self.device)
        # Whatever a table says, the other kernels of the call are launched as they are best known.
        base = {other: self.chosen[other] for other in question.beside}
        row: Row = {"kind": "config", "kernel": key[0], "bucket": key[1]}
        row |= {"dtype": dtype_name(key[2]), "place": str(question.place)}
        row |= {"default": asdict(default), "candidates": []}
        excess, first = 1.0, here({**base, key: default}, math.inf, 1.0)
        row["candidates"].append({"config": asdict(default), **first})
        if "excess" in first:
            # Which is told, and no reason to launch it slowly.
            excess = AS_WRONG * first["excess"]
            first = here({**base, key: default}, math.inf, excess)
        if not first["ok"]:
            return {**row, "why": f"the default: {first['why']}"}
        best, least = default, first["seconds"]
        for config, future in question.compiled.items():
            if self.late():
                return {**row, "why": "out of time"}
            problems = self.problems_of(future)
            if problems:
                found: Row = {"ok": None, "why": problems[0][:200]}
            else:
                found = here({**base, key: config}, SLOWER * first["seconds"], excess)
            row["candidates"].append({"config": asdict(config), **found})
            if found["ok"] and found["seconds"] < least:
                best, least = config, found["seconds"]
        if best == default:
            return {**row, "config": asdict(default), "seconds": {"default": first["seconds"]}}
        both = ({**base, key: default}, {**base, key: best})
        seconds = self.ask(compare, question.place, self.device, *both)
        if "why" in seconds:
            return {**row, "why": seconds["why"]}
        noise = abs(seconds["again"] / seconds["default"] - 1)
        if 1 - seconds["config"] / seconds["default"] <= max(WIN, noise):
            best = default
        self.chosen[key] = best
        return {**row, "config": asdict(best), "seconds": seconds}

    def problems_of(self, future: "Future[list[str]]") -> list[str]:
        """Why a config is of no use, from who compiled it; a compiler that died is a reason."""
        try:
            return future.result(max(0.1, self.end - time.monotonic()))
        except OutOfTime:
            return ["not compiled in time"]
        except (Died, Raised) as problem:
            return [f"the compiler: {problem}"]

    def work(self, places: Iterable[Place]) -> int:
        """Answer all questions, in order, until time is up; how many were left."""
        todo = self.prepared(places)
        while todo and not self.late():
            question = todo.pop(0)
            try:
                row = self.answer(question)
            except Exception as problem:  # one question must not end the run
                row = {"kind": "config", "kernel": question.key[0], "bucket": question.key[1]}
                row |= {"candidates": [], "why": f"{type(problem).__name__}: {problem}"[:300]}
            self.add(row)
            name = f"{row['kernel']} {row['bucket']}"
            for tried in row["candidates"]:
                if tried["ok"] is False:
                    self.fail(name, tried)
            if "config" in row:
                self.draft.add_config(question.key, row)
                if row["config"] != row["default"]:  # which may have called for other kernels
                    todo[:0] = self.prepared([question.place])
            print(f"{name}: {in_words(row)}", flush=True)
        return len(todo)

    def prepared(self, places: Iterable[Place]) -> "list[Question]":
        """The questions that are asked there; their alternatives are being compiled."""
        found = list(self.questions(places))
        for question in found:
            question.compile(self.target, self.processors)
        return found


@dataclass
class Question:
    """One key: where it is asked, the default, and the alternatives, as they are compiled.

    beside: all keys of that call.
    """

    place: Place
    beside: list[Key]
    key: Key
    default: Any
    others: list[Any]
    compiler: Compiler
    compiled: "dict[Any, Future[list[str]]]" = field(default_factory=dict)

    def compile(self, target: tuple[int, int], processors: int) -> None:
        """Have all of them compiled, in the order in which they are asked for."""
        for config in [self.default, *self.others]:
            future = self.compiler.submit(self.place, target, processors, self.key, config)
            if config != self.default:
                self.compiled[config] = future


def known(draft: "Draft") -> dict[Key, Any]:
    """What a run like this one has found before, so far as those kernels still exist."""
    found: dict[Key, Any] = {}
    for key, config in draft.found_configs().items():
        with suppress(LookupError, TypeError):
            found[key] = TUNABLE[key[0]].config(**config)
    return found


def in_words(row: Row) -> str:
    """ "-12.3 %, BlockConfig...": what one row says."""
    if "config" not in row:
        return row["why"]
    tried = [c for c in row["candidates"] if c.get("seconds")]
    names = [k for k, v in row["config"].items() if v != row["default"][k]]
    change = ", ".join(f"{k} {row['default'][k]} -> {row['config'][k]}" for k in names)
    seconds = row["seconds"]
    text = f"{1e6 * seconds['default']:.4g} us, {len(tried)} of {len(row['candidates'])} timed"
    if not names:
        return f"{text}: the default stays"
    return f"{text}: {100 * (seconds['config'] / seconds['default'] - 1):+.1f} % by {change}"


def tune(
    draft: "Draft",
    ops: list[Op],
    device: torch.device,
    end: float,
    again: bool,
    add: Callable[[Row], None],
    fail: Callable[[str, Any], None],
    processes: int | None = None,
) -> None:
    """Fill the table's configs until done or until `end`, by time.monotonic."""
    cuda = device.type == "cuda"
    processes = processes or max(1, (os.cpu_count() or 2) - 2)
    with ExitStack() as stack:
        worker = Worker({} if cuda else {"TRITON_INTERPRET": "1"})
        stack.callback(worker.close)
        compiler = Compiler(processes)
        stack.callback(compiler.close)
        tuner = Tuner(draft, str(device), end, worker, compiler, add, fail)
        tuner.chosen |= {} if again else known(draft)
        try:
            tuner.target, tuner.processors = worker.ask(describe, str(device), timeout=TIMEOUT)
        except (Died, Raised) as problem:
            fail("configs", {"why": f"no process with this device: {problem}"})
            return
        if cuda:
            dtypes = (torch.bfloat16, torch.float16, torch.float32)
            stages: Iterator[Iterable[Place]] = itertools.chain(
                (of_steps(ops, batches, tuner.target, tuner.processors) for batches in STAGES),
                (of_samples(ops, "vit", [dtype]) for dtype in dtypes),
            )
        else:
            stages = iter([of_samples(ops, "tiny", [torch.float32])])
        for places in stages:
            left = tuner.work(places)
            if tuner.lost >= LOST:
                fail("configs", {"why": f"{LOST} processes in a row were lost"})
            if tuner.late():
                print(f"launch configs: stopped, {left} questions of this stage are left")
                return
