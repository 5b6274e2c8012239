"""A Chrome trace of torch.profiler: what ran on the host, what on the device, steps and phases.

Times are microseconds since the first event. The host's spans are nested by time, thread by thread;
a device's spans (kernels, copies) know the op that launched them by its number ("External id"), and
where they have none by what surrounds the CUDA call with their correlation number.
"""

import bisect
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST = frozenset({"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"})
CALLS = frozenset({"cuda_runtime", "cuda_driver"})
DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})

PHASES = ("data", "forward", "backward", "optimizer", "other")
BEGIN, END, STEP = "vitkern begin", "vitkern end", "vitkern step"  # marks of vitkern.profile

BACKWARD = "autograd::engine::evaluate_function: "
LOADER = "enumerate(DataLoader)#"
OPTIMIZER = ("Optimizer.step#", "Optimizer.zero_grad#")


@dataclass(slots=True, eq=False)
class Span:
    """Something that ran from `start` to `end` on a thread of the host, or a stream of a device."""

    name: str
    category: str
    start: float
    end: float
    track: tuple[Any, Any]
    args: dict[str, Any]
    parent: "Span | None" = None
    children: list["Span"] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """Microseconds."""
        return self.end - self.start

    @property
    def own(self) -> float:
        """Microseconds in which none of its children ran."""
        return max(0.0, self.duration - sum(c.duration for c in self.children))

    def ancestry(self) -> Iterator["Span"]:
        """The span, its parent, and so on."""
        span: Span | None = self
        while span is not None:
            yield span
            span = span.parent


@dataclass(frozen=True)
class Memory:
    """Bytes that PyTorch's allocator holds after one allocation or release, and held before it."""

    time: float
    allocated: int
    before: int


@dataclass(frozen=True)
class Window:
    """One step: from `start` to `end`, on the host."""

    start: float
    end: float


@dataclass(frozen=True)
class Phase:
    """A piece of a step on the host's timeline."""

    name: str
    start: float
    end: float


@dataclass
class Trace:
    """The spans of a trace, in the order of their starts."""

    host: list[Span]
    device: list[Span]
    # By id() of a device's span: what launched it, None for a CUDA graph or no op; and when.
    launches: dict[int, tuple[Span | None, float]]
    memory: dict[int, list[Memory]]  # by device type: 0 the host, 1 a GPU
    properties: dict[str, Any]  # of the device
    extra: dict[str, Any]  # what vitkern.profile added to the file
    base: float  # where the file's clock stood at 0
    begin: float
    end: float

    @property
    def on_gpu(self) -> bool:
        """Whether anything ran on a GPU."""
        return bool(self.device)


def load(path: Path) -> dict[str, Any]:
    """The JSON of a trace, packed by gzip or not.

    Raises:
        ValueError: no such file, or no Chrome trace.
    """
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", errors="replace") as file:
            contents = json.load(file)
    except (OSError, EOFError, zlib.error) as error:  # also of a .gz that is cut off or broken
        raise ValueError(f"profile: can't read the trace {path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"profile: {path} is no Chrome trace: {error}") from None
    if isinstance(contents, list):  # the format allows a bare list of events
        contents = {"traceEvents": contents}
    if not isinstance(contents, dict) or not isinstance(contents.get("traceEvents"), list):
        raise ValueError(f"profile: {path} is no Chrome trace: it has no list traceEvents")
    contents["traceEvents"] = [e for e in contents["traceEvents"] if isinstance(e, dict)]
    return contents


def _usable(event: dict[str, Any]) -> bool:
    """Whether an event says what ran, and when: other tools' need not, and are skipped."""
    times = event.get("ts"), event.get("dur", 0)
    args = event.get("args")
    return (
        isinstance(event.get("name"), str)
        and all(isinstance(t, (int, float)) for t in times)
        and (args is None or isinstance(args, dict))
    )


def parse(contents: dict[str, Any]) -> Trace:
    """The trace of one process and of the device that it keeps busiest.

    Raises:
        ValueError: there is nothing in it that ran.
    """
    events = [e for e in contents["traceEvents"] if _usable(e)]
    timed = [e for e in events if e.get("ph") == "X" and str(e.get("cat")) in HOST | DEVICE]
    if not timed:
        raise ValueError("profile: the trace holds no ops and no kernels")
    base = min(e["ts"] for e in timed)
    host: list[Span] = []
    device: list[Span] = []
    for event in timed:
        start = event["ts"] - base
        span = Span(
            event["name"],
            event["cat"],
            start,
            start + event.get("dur", 0),
            (event.get("pid"), event.get("tid")),
            event.get("args") or {},
        )
        (device if event["cat"] in DEVICE else host).append(span)
    host.sort(key=lambda s: (s.start, -s.end))
    device = sorted(_busiest(device), key=lambda s: s.start)
    _nest(host)
    number = device[0].args.get("device", 0) if device else 0
    # A machine has GPUs also where a CPU ran.
    cards = contents.get("deviceProperties", []) if device else []
    properties = [p for p in cards if p.get("id") == number]
    ends = [s.end for s in host] + [s.end for s in device]
    return Trace(
        host=host,
        device=device,
        launches=_launches(host, device),
        memory=_memory(events, base, number),
        properties=properties[0] if properties else {},
        extra=contents.get("vitkern") or {},
        base=base,
        begin=0.0,
        end=max(ends),
    )


def _busiest(device: list[Span]) -> list[Span]:
    total: dict[Any, float] = {}
    for span in device:
        number = span.args.get("device")
        total[number] = total.get(number, 0.0) + span.duration
    most = max(total, key=lambda number: total[number], default=None)
    return [s for s in device if s.args.get("device") == most]


def _nest(host: Iterable[Span]) -> None:
    """Set parents and children; `host` is sorted by start, the longest first."""
    stacks: dict[tuple[Any, Any], list[Span]] = {}
    for span in host:
        stack = stacks.setdefault(span.track, [])
        while stack and stack[-1].end <= span.start:
            stack.pop()
        if stack:
            span.parent = stack[-1]
            stack[-1].children.append(span)
            span.end = min(span.end, stack[-1].end)  # ends are rounded
        stack.append(span)


def _launches(host: Iterable[Span], device: Iterable[Span]) -> dict[int, tuple[Span | None, float]]:
    calls = {
        s.args["correlation"]: s for s in host if s.category in CALLS and "correlation" in s.args
    }
    ops = {
        s.args["External id"]: s for s in host if s.category == "cpu_op" and "External id" in s.args
    }
    found: dict[int, tuple[Span | None, float]] = {}
    for span in device:
        call = calls.get(span.args.get("correlation"))
        if call is not None and "GraphLaunch" in call.name:
            found[id(span)] = None, call.start
            continue
        op = ops.get(span.args.get("External id")) or (call and call.parent)
        known = call or op
        if known is not None:
            found[id(span)] = op, known.start
    return found


def _memory(events: Iterable[dict[str, Any]], base: float, number: int) -> dict[int, list[Memory]]:
    found: dict[int, list[Memory]] = {}
    for event in events:
        if event.get("name") == "[memory]":
            args = event.get("args") or {}
            kind = args.get("Device Type", 0)
            if kind == 0 or args.get("Device Id", number) == number:
                held = args.get("Total Allocated", 0)
                state = Memory(event["ts"] - base, held, held - args.get("Bytes", 0))
                found.setdefault(kind, []).append(state)
    for states in found.values():
        states.sort(key=lambda state: state.time)
    return found


def main_thread(trace: Trace) -> tuple[Any, Any] | None:
    """The thread that runs the steps: the one with a mark, else the one with most time in ops."""
    busy: dict[tuple[Any, Any], float] = {}
    for span in trace.host:
        if span.name == BEGIN or span.name.startswith((STEP, "ProfilerStep#")):
            return span.track
        if span.parent is None and not span.name.startswith(BACKWARD):
            busy[span.track] = busy.get(span.track, 0.0) + span.duration
    return max(busy, key=lambda track: busy[track], default=None)


def windows(trace: Trace) -> list[Window]:
    """The steps: by marks of vitkern.profile, of torch.profiler, by optimizer steps, or one."""
    named = {"begin": trace.begin, "end": trace.end}
    marks, ranges, optimizer = [], [], []
    for span in trace.host:
        if span.name == BEGIN:
            named["begin"] = span.end
        elif span.name == END:
            named["end"] = span.start
        elif re.fullmatch(rf"{STEP} \d+", span.name):
            marks.append(span.end)
        elif span.name.startswith("ProfilerStep#"):
            ranges.append(Window(span.start, span.end))
        elif span.name.startswith("Optimizer.step#") and not any(
            child.name == END
            for child in span.children  # recording stopped within it
        ):
            optimizer.append(span)
    if not marks and ranges:
        return ranges
    if not marks:
        # Several optimizers make one step, unless something went backward between them.
        engine = [s.start for s in trace.host if s.name.startswith(BACKWARD)]
        for i, here in enumerate(optimizer):
            following = optimizer[i + 1].start if i + 1 < len(optimizer) else None
            if following is None or _any_between(engine, here.end, following):
                marks.append(here.end)
    if not marks:
        return [Window(named["begin"], named["end"])]
    bounds = [named["begin"], *marks]
    return [Window(a, b) for a, b in itertools.pairwise(bounds)]


def _any_between(times: Sequence[float], start: float, end: float) -> bool:
    i = bisect.bisect_left(times, start)
    return i < len(times) and times[i] < end


def phases(trace: Trace, step: Window) -> list[Phase]:
    """The step in pieces, one after the other without gaps.

    A range that the user named "data", "forward", "backward" or "optimizer" (record_function) is
    what it says. Otherwise: data is the loader's time; backward what autograd's engine ran;
    optimizer its step and zero_grad; forward what ran before the last backward, the loss included;
    other all else, such as clipping gradients, logging, and Python.
    """
    inside = [s for s in trace.host if s.end > step.start and s.start < step.end]
    claims: list[tuple[int, Phase]] = []  # the higher number wins
    for span in inside:
        name = span.name
        if name in PHASES and span.category == "user_annotation":
            claims.append((4, Phase(name, span.start, span.end)))
        elif name.startswith(LOADER):
            claims.append((3, Phase("data", span.start, span.end)))
        elif name.startswith(OPTIMIZER):
            claims.append((2, Phase("optimizer", span.start, span.end)))
    main = main_thread(trace)
    found = _backward(inside, [phase for _, phase in claims], main)
    claims += [(1, phase) for phase in found]
    pieces = _sweep(claims, step)
    last = max((i for i, p in enumerate(pieces) if p.name == "backward"), default=len(pieces))
    ops = [s for s in inside if s.category == "cpu_op" and s.track == main]
    result: list[Phase] = []
    for i, piece in enumerate(pieces):
        mine = [s for s in ops if s.start < piece.end and s.end > piece.start]
        if piece.name != "other" or i > last or not mine:
            result.append(piece)
            continue
        start = max(piece.start, min(s.start for s in mine))
        end = min(piece.end, max(s.end for s in mine))
        parts = ((piece.start, "other", start), (start, "forward", end), (end, "other", piece.end))
        result += [Phase(name, a, b) for a, name, b in parts if b > a]
    return result


def _backward(
    inside: list[Span], claimed: list[Phase], main: tuple[Any, Any] | None
) -> list[Phase]:
    """The engine's time; nodes between which nothing else ran on the main thread are one piece."""
    nodes = [s for s in inside if s.name.startswith(BACKWARD)]
    others = [
        s.start
        for s in inside
        if s.track == main
        and s.category == "cpu_op"
        and not s.name.startswith(BACKWARD)
        and (s.parent is None or s.parent.category == "user_annotation")
    ]
    others = sorted([*others, *(phase.start for phase in claimed)])
    result: list[Phase] = []
    for node in nodes:
        if node.parent is not None and any(
            a.name.startswith(BACKWARD) for a in node.parent.ancestry()
        ):
            continue
        before = result[-1] if result else None
        if before is not None and not _any_between(others, before.end, node.start):
            result[-1] = Phase("backward", before.start, max(before.end, node.end))
        else:
            result.append(Phase("backward", node.start, node.end))
    return result


def _sweep(claims: list[tuple[int, Phase]], step: Window) -> list[Phase]:
    """Pieces that cover the step; where claims overlap the strongest wins, elsewhere "other"."""
    cuts = {step.start, step.end}
    for _, claim in claims:
        cuts |= {min(max(t, step.start), step.end) for t in (claim.start, claim.end)}
    bounds = sorted(cuts)
    result: list[Phase] = []
    for start, end in itertools.pairwise(bounds):
        over = [(rank, c.name) for rank, c in claims if c.start < end and c.end > start]
        name = max(over)[1] if over else "other"
        if result and result[-1].name == name:
            result[-1] = Phase(name, result[-1].start, end)
        else:
            result.append(Phase(name, start, end))
    return result


def phase_at(pieces: Sequence[Phase], time: float) -> str:
    """The phase at a time; that of the nearest piece outside of all."""
    i = bisect.bisect_right([p.start for p in pieces], time) - 1
    return pieces[max(i, 0)].name if pieces else "other"
