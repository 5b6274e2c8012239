"""Figures of a trace: time by op and by phase, the device's idle time, memory, and utilisation.

On a GPU an op's time is that of the kernels it launched, and a step lasts from the end of the
previous step's last kernel to the end of its own last. Of kernels that run at once only one counts,
so that shares add up. On a CPU an op's time is that in which it, and no other, ran, and a step
lasts from one mark to the next. All figures are means of a step.
"""

import bisect
import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vitkern.kernels import REGISTRY
from vitkern.profile import counting
from vitkern.profile.figures import (
    IDLE,
    MOST_UNSEEN,
    OVERHEAD,
    Analysis,
    Ceilings,
    Idle,
    MemoryUse,
    PhaseTime,
    Row,
)
from vitkern.profile.trace import (
    BACKWARD,
    LOADER,
    OPTIMIZER,
    PHASES,
    Phase,
    Span,
    Trace,
    Window,
    main_thread,
    phase_at,
    phases,
    windows,
)

SYNCHRONISING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
POINTS = 400  # of the curve of memory over a step


@dataclass
class _Sum:
    """What is added up for a row."""

    time: float = 0.0
    hidden: float = 0.0
    copied: int = 0  # bytes between GPU and host
    units: set[int] = field(default_factory=set)
    launches: int = 0
    counted: dict[int, Span] = field(default_factory=dict)
    phases: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    aten: float = 0.0  # time of kernels that ATen launched within the op, hidden or not


class _Names:
    """To which row of the table a span of the host belongs."""

    def __init__(self, trace: Trace) -> None:
        self.forward: dict[Any, list[Span]] = defaultdict(list)
        for span in trace.host:
            number = span.args.get("Sequence number")
            if number is not None and not _is_backward(span):
                self.forward[number].append(span)
        self.found: dict[int, tuple[str, Span, Span | None]] = {}

    def row(self, span: Span) -> tuple[str, Span, Span | None]:
        """(row, the span that is one call of it, the span that says what the call cost if any)."""
        key = id(span)
        if key not in self.found:
            self.found[key] = self._row(span)
        return self.found[key]

    def _row(self, span: Span) -> tuple[str, Span, Span | None]:
        ours = outer = node = None
        for above in span.ancestry():
            name = above.name
            if name.startswith(OPTIMIZER):
                return f"optimizer {name.partition('#')[2]}", above, above
            if name.startswith(LOADER):
                return "data loader", above, above
            if ours is None and counting.our_op(name):
                ours = above
            if name.startswith(BACKWARD):
                node = above
            elif above.category == "cpu_op" and counting.is_operator(name):
                outer = above
        if ours is not None:
            op, peer = counting.our_op(ours.name) or (None, "")
            assert op is not None
            return op.name + (f" ({peer})" if peer else ""), ours, ours
        if node is not None:
            origin = self._origin(node)
            if origin is not None:
                op, _ = counting.our_op(origin.name) or (None, "")
                assert op is not None
                return f"{op.name} (backward)", origin, outer
        if outer is not None:
            return outer.name, outer, outer
        if span.category != "cpu_op" or span.children or node is not None:
            return OVERHEAD, span, span
        return span.name, span, None

    def _origin(self, node: Span) -> Span | None:
        """The op of ours in whose forward pass autograd made the node."""
        made = [
            s
            for s in self.forward.get(node.args.get("Sequence number"), ())
            if s.start < node.start
        ]
        for span in made[-1].ancestry() if made else ():
            if counting.our_op(span.name):
                return span
        return None


def _is_backward(span: Span) -> bool:
    return any(a.name.startswith(BACKWARD) for a in span.ancestry())


def analyse(trace: Trace, warmup: int = 0, ceilings: Ceilings | None = None) -> Analysis:
    """The figures of a trace, its first `warmup` steps left out if it has more."""
    ceilings = ceilings or Ceilings()
    every = windows(trace)
    skipped = min(warmup, len(every) - 1)
    steps = every[skipped:]
    pieces = [phases(trace, step) for step in every]
    names = _Names(trace)
    if trace.on_gpu:
        figures = _device(trace, every, skipped, pieces, names)
    else:
        figures = _host(trace, steps, pieces[skipped:], names)
    lengths, sums, times, idle, timeline, unseen = figures
    total, n = sum(lengths), len(lengths)
    main_steps = pieces[skipped:]
    in_steps = [(s.start, s.end) for s in steps]
    rows = [_make_row(name, item, n, total, trace.on_gpu, ceilings) for name, item in sums.items()]
    flops = sum(row.flops or 0.0 for row in rows)
    forward_flops, dtypes = _forward(trace, main_steps, names)
    trains = any(p.name == "backward" for p in main_steps[-1])
    images, source = _images(trace, skipped, n, names, in_steps)
    seconds = total / n
    model_flops = (3 if trains else 1) * forward_flops / n or None
    if unseen > MOST_UNSEEN:
        model_flops = None
    main_dtype = dtypes.most_common(1)[0][0] if dtypes else ""
    calls = [s for s in trace.host if s.category in ("cuda_runtime", "cuda_driver")]
    inside = [s for s in calls if any(a <= s.start < b for a, b in in_steps)]
    return Analysis(
        device=trace.properties.get("name") or trace.extra.get("device", "CPU"),
        on_gpu=trace.on_gpu,
        steps=n,
        warmup_steps=skipped,
        step_seconds=[length / 1e6 for length in lengths],
        seconds=seconds / 1e6,
        images=images,
        images_from=source,
        images_per_s=images / (seconds / 1e6) if images and seconds else None,
        rows=sorted(rows, key=lambda row: -row.seconds),
        phases=[
            PhaseTime(
                name,
                times[name][0] / n / 1e6,
                times[name][0] / total if total else 0.0,
                times[name][1] / n / 1e6,
                times[name][2] / n if trace.on_gpu else None,
            )
            for name in PHASES
            if name in times
        ],
        loader_wait=sum(
            s.duration
            for s in trace.host
            if s.name.startswith(LOADER) and any(a <= s.start < b for a, b in in_steps)
        )
        / n
        / 1e6,
        idle=idle,
        launches=sum(item.launches for item in sums.values()) / n if trace.on_gpu else None,
        graph_launches=_count(inside, ("cudaGraphLaunch",), n) if trace.on_gpu else None,
        synchronisations=_count(inside, SYNCHRONISING, n) if trace.on_gpu else None,
        memory=_memory(trace, steps, main_steps),
        flops=flops,
        model_flops=model_flops,
        trains=trains,
        compiled=_compiled(trace),
        unseen=unseen,
        main_dtype=main_dtype,
        utilisation=_utilisation(trace, model_flops, seconds, main_dtype, ceilings),
        ceilings=ceilings,
        untraced_seconds=trace.extra.get("untraced_seconds"),
        settings=trace.extra.get("settings", {}),
        choices=trace.extra.get("choices", []),
        timeline=timeline,
    )


def _compiled(trace: Trace) -> bool:
    return any(s.name.startswith("Torch-Compiled Region") for s in trace.host)


def _count(calls: Iterable[Span], names: tuple[str, ...], n: int) -> float:
    return sum(s.name.startswith(names) for s in calls) / n


_Figures = tuple[
    list[float],
    dict[str, _Sum],
    dict[str, list[float]],
    Idle | None,
    list[tuple[str, str, float, float]],
    float,
]


def _host(trace: Trace, steps: list[Window], pieces: list[list[Phase]], names: _Names) -> _Figures:
    """Of a CPU: (lengths, sums by row, phases, None, the timeline of the last step, unseen)."""
    sums: dict[str, _Sum] = defaultdict(_Sum)
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    timeline: list[tuple[str, str, float, float]] = []
    main = main_thread(trace)
    for step, parts in zip(steps, pieces, strict=True):
        covered = 0.0
        for part in parts:
            times[part.name][0] += part.end - part.start
            times[part.name][1] += part.end - part.start
        last = step is steps[-1]
        for span in trace.host:
            if not step.start <= span.start < step.end or span.category in (
                "cuda_runtime",
                "cuda_driver",
            ):
                continue
            name, unit, cost_of = names.row(span)
            if name == OVERHEAD:
                continue
            own = span.own
            if span.track == main:
                covered += own
            item = sums[name]
            item.time += own
            item.units.add(id(unit))
            if cost_of is not None:
                item.counted[id(cost_of)] = cost_of
            item.phases[phase_at(parts, span.start)] += own
            if last and (span is unit or span.name.startswith(BACKWARD)):
                timeline.append((name, name, (span.start - step.start) / 1e6, span.duration / 1e6))
        sums[OVERHEAD].time += max(0.0, step.end - step.start - covered)
        sums[OVERHEAD].phases["other"] += 1
        if last:
            timeline += [
                ("phase", p.name, (p.start - step.start) / 1e6, (p.end - p.start) / 1e6)
                for p in parts
            ]
    lengths = [s.end - s.start for s in steps]
    # What torch.compile made for a CPU records nothing.
    total = sum(lengths)
    unseen = sums[OVERHEAD].time / total if total and _compiled(trace) else 0.0
    return lengths, sums, times, None, timeline, unseen


class _Kernel(NamedTuple):
    """What ran on a device: its row, phase, the call it is part of, the span that says its cost."""

    span: Span
    row: str
    phase: str
    unit: Span | None
    cost_of: Span | None
    op: Span | None
    launched: float

    @property
    def unseen(self) -> bool:
        """Whether it may be a product of the forward pass whose FLOPs no op tells."""
        # Kernels without products of TorchInductor, and collectives.
        plain = ("triton_poi", "triton_per", "triton_red", "nccl")
        if (
            self.span.category != "kernel"
            or self.phase in ("backward", "optimizer")
            or self.span.name.startswith(plain)
        ):
            return False
        if self.cost_of is None:
            return True
        if self.cost_of.name.startswith(("aten::", counting.PREFIX)):
            return False
        cost = counting.cost(self.cost_of)
        return cost is None or not cost.flops


def _device(
    trace: Trace,
    every: list[Window],
    skipped: int,
    pieces: list[list[Phase]],
    names: _Names,
) -> _Figures:
    """Of a GPU: (lengths, sums by row, phases, idle, the timeline of the last step, unseen)."""
    starts = [w.start for w in every]
    by_step: list[list[_Kernel]] = [[] for _ in every]
    for span in trace.device:
        op, launched = trace.launches.get(id(span), (None, span.start))
        number = max(0, bisect.bisect_right(starts, launched) - 1)
        if launched >= every[number].end and number == len(every) - 1:
            continue  # after the last step
        name, unit, cost_of = _kernel_row(span, op, names)
        phase = phase_at(pieces[number], launched)
        if span.name.startswith("Memcpy HtoD") and phase in ("forward", "other"):
            phase = "data"
        by_step[number].append(_Kernel(span, name, phase, unit, cost_of, op, launched))
    sums: dict[str, _Sum] = defaultdict(_Sum)
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    gaps: list[tuple[float, str, str]] = []
    timeline: list[tuple[str, str, float, float]] = []
    lengths: list[float] = []
    seen = unseen = 0.0  # of the forward pass
    before = every[0].start  # the end of the last kernel of the step before
    for number, (step, work) in enumerate(zip(every, by_step, strict=True)):
        start = cursor = before
        before = end = max(start, max((k.span.end for k in work), default=step.end))
        if number < skipped:
            continue
        for kernel, busy in zip(work, _visible([k.span for k in work], start), strict=True):
            span, name, phase, unit, cost_of, op, launched = kernel
            item = sums[name]
            item.time += busy
            item.hidden += span.duration - busy
            item.launches += 1
            item.phases[phase] += span.duration
            if unit is not None:
                item.units.add(id(unit))
            if cost_of is not None:
                item.counted[id(cost_of)] = cost_of
            elif _over_pcie(span):
                item.copied += span.args.get("bytes", 0)
            if unit is not None and op is not None and _by_aten(op, unit):
                item.aten += span.duration
            idle = max(0.0, span.start - cursor)
            if idle:
                cause = _cause(cursor, launched, pieces[number])
                gaps.append((idle, name, cause))
                times["data" if cause == "data" else phase][0] += idle
                if number == len(every) - 1:
                    timeline.append((IDLE, IDLE, (cursor - start) / 1e6, idle / 1e6))
            times[phase][0] += busy
            times[phase][1] += busy
            times[phase][2] += 1
            if phase not in ("backward", "optimizer"):
                seen += busy
                unseen += busy * kernel.unseen
            cursor = max(cursor, span.end)
            if number == len(every) - 1:
                timeline.append((name, phase, (span.start - start) / 1e6, span.duration / 1e6))
        if cursor < end:  # a step without kernels
            cause = _cause(cursor, end, pieces[number])
            gaps.append((end - cursor, "the step's end", cause))
            times["data" if cause == "data" else "other"][0] += end - cursor
        lengths.append(end - start)
    n, total = len(lengths), sum(lengths)
    causes: defaultdict[str, float] = defaultdict(float)
    following: defaultdict[str, float] = defaultdict(float)
    for idle, name, cause in gaps:
        causes[cause] += idle
        following[name] += idle
    longest = max(gaps, default=(0.0, "", ""))
    late = max((gap for gap in gaps if gap[2] == "host"), default=(0.0, "", ""))
    seconds = sum(causes.values())
    idle_time = Idle(
        seconds=seconds / n / 1e6,
        share=seconds / total if total else 0.0,
        longest=longest[0] / 1e6,
        longest_before=longest[1],
        longest_late=late[0] / 1e6,
        longest_late_before=late[1],
        causes={cause: value / n / 1e6 for cause, value in _descending(causes)},
        before={name: value / n / 1e6 for name, value in _descending(following)[:10]},
    )
    return lengths, sums, times, idle_time, timeline, unseen / seen if seen else 0.0


def _visible(spans: Sequence[Span], start: float) -> list[float]:
    """Of each span, in the order of their starts, the time since `start` in which it set the pace.

    Where several ran that is the one on the stream with most of them: a collective that waits
    beside the backward pass is hidden by what it waits for.
    """
    streams = Counter(span.track for span in spans)
    rank = {track: i for i, (track, _) in enumerate(streams.most_common())}
    shown = [0.0] * len(spans)
    running: list[tuple[int, int]] = []  # a heap of (rank, index)
    coming = 0
    cuts = sorted({max(time, start) for span in spans for time in (span.start, span.end)})
    for a, b in itertools.pairwise(cuts):
        while coming < len(spans) and spans[coming].start <= a:
            heapq.heappush(running, (rank[spans[coming].track], coming))
            coming += 1
        while running and spans[running[0][1]].end <= a:
            heapq.heappop(running)
        if running:
            shown[running[0][1]] += b - a
    return shown


def _over_pcie(span: Span) -> bool:
    """Whether this copies between the GPU and another place than its own memory."""
    return span.category == "gpu_memcpy" and "DtoD" not in span.name


def _by_aten(launcher: Span, op: Span) -> bool:
    """Whether what `launcher`, an op within `op`, launches is one of ATen's kernels."""
    for above in launcher.ancestry():
        if above is op:
            return False
        if above.name.startswith("aten::"):
            return True
    return False


def _cause(gap_start: float, launched: float, pieces: Sequence[Phase]) -> str:
    """What a GPU waited for that ran nothing from `gap_start` to the next kernel."""
    if launched <= gap_start:
        return "device"
    waited = sum(
        max(0.0, min(p.end, launched) - max(p.start, gap_start)) for p in pieces if p.name == "data"
    )
    return "data" if waited > (launched - gap_start) / 2 else "host"


def _kernel_row(span: Span, op: Span | None, names: _Names) -> tuple[str, Span | None, Span | None]:
    """The row of a kernel: its op's, or its own where a CUDA graph or unknown code launched it.

    So are copies over PCIe: an op's bytes are held against the GPU's own memory.
    """
    if op is not None and not _over_pcie(span):
        name, unit, cost_of = names.row(op)
        if name != OVERHEAD:
            return name, unit, cost_of
    return short_kernel(span.name), None, None


def short_kernel(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    name = re.sub(r"^(void|int|float)\s+", "", name)
    depth = 0
    kept: list[str] = []
    for character in name:
        if character == "<":
            depth += 1
        elif character == ">":
            depth -= 1
        elif depth == 0:
            if character == "(" and kept and "".join(kept).strip():
                break
            kept.append(character)
    short = "".join(kept).strip() or name
    if short.startswith("Mem"):  # "Memcpy HtoD (Pageable -> Device)"
        return name.partition("(")[0].strip()
    return short[-60:]


def _fused(span: Span) -> bool:
    return "::_fused_" in span.name or any(map(_fused, span.children))


def _descending(sums: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(sums.items(), key=lambda item: -item[1])


def _most(sums: dict[str, float]) -> str:
    return _descending(sums)[0][0]


def _make_row(name: str, item: _Sum, n: int, total: float, on_gpu: bool, ceilings: Ceilings) -> Row:
    seconds, hidden = item.time / n / 1e6, item.hidden / n / 1e6
    ran = seconds + hidden
    costs = [counting.cost(span) for span in item.counted.values()]
    known = [c for c in costs if c is not None]
    flops = sum(c.flops for c in known) / n if known else None
    moved = (sum(c.bytes for c in known) + item.copied) / n
    least = [(*ceilings.least_seconds(c), c.dtype) for c in known]
    possible = sum(least_time for least_time, *_ in least) / n
    bounds: defaultdict[str, float] = defaultdict(float)
    dtypes: defaultdict[str, float] = defaultdict(float)
    for least_time, bound, dtype in least:
        bounds[bound] += least_time
        dtypes[dtype] += least_time
    rated = possible > 0 and ran > 0 and len(known) == len(costs)
    rated = rated and all(bound for _, bound, _ in least)
    ours = name.partition(" ")[0] in REGISTRY
    kind = ""
    if on_gpu and ours:  # "NAME (cublas)" has ATen's product on purpose
        by_aten = name.endswith(" (backward)") or (
            item.aten > (item.time + item.hidden) / 2 and " (" not in name
        )
        kind = "ATen" if by_aten else "kernel"
    if name.startswith("optimizer") and any(map(_fused, item.counted.values())):
        kind = "fused"
    return Row(
        op=name,
        seconds=seconds,
        hidden=hidden,
        share=item.time / total if total else 0.0,
        calls=len(item.units) / n,
        launches=item.launches / n if on_gpu else None,
        flops=flops or None,
        bytes=moved or None,
        flops_per_s=flops / ran if flops and ran else None,
        bytes_per_s=moved / ran if moved and ran else None,
        roofline=possible / ran if rated else None,
        bound=_most(bounds) if rated else "",
        dtype=_most(dtypes) if dtypes else "",
        phase=_most(item.phases) if item.phases else "other",
        implementation=kind,
    )


def _forward(trace: Trace, pieces: list[list[Phase]], names: _Names) -> tuple[float, Counter[str]]:
    """FLOPs of all forward passes, and of the FLOPs of all phases those in each dtype."""
    flops, dtypes, seen = 0.0, Counter[str](), set()
    bounds = [(parts[0].start, parts[-1].end, parts) for parts in pieces]
    for span in trace.host:
        if span.category != "cpu_op":
            continue
        for start, end, parts in bounds:
            if start <= span.start < end:
                *_, cost_of = names.row(span)
                if cost_of is None or id(cost_of) in seen:
                    break
                seen.add(id(cost_of))
                cost = counting.cost(cost_of)
                if cost is None or not cost.flops:
                    break
                dtypes[cost.dtype] += cost.flops
                if phase_at(parts, cost_of.start) == "forward":
                    flops += cost.flops
                break
    return flops, dtypes


def _images(
    trace: Trace, skipped: int, n: int, names: _Names, steps: list[tuple[float, float]]
) -> tuple[float | None, str]:
    """Images of a step: as the user said, else as the patch embedding saw."""
    given = [i for i in trace.extra.get("images", [])[skipped : skipped + n] if i]
    if given:
        return sum(given) / len(given), "step(images=...)"
    embed = [
        s.args["Input Dims"][0][0]
        for s in trace.host
        if s.name == "vitkern::patch_embed"
        and s.args.get("Input Dims")
        and any(a <= s.start < b for a, b in steps)
        and not any(a.name == s.name for a in list(s.ancestry())[1:])
    ]
    return (sum(embed) / n, "the patch embedding") if embed else (None, "")


def _memory(trace: Trace, steps: list[Window], pieces: list[list[Phase]]) -> MemoryUse | None:
    kind = 1 if trace.on_gpu else 0
    states = trace.memory.get(kind, [])
    if not states:
        return None
    times = [s.time for s in states]

    def held(time: float) -> int:
        """Bytes allocated at a time."""
        i = bisect.bisect_right(times, time) - 1
        return states[i].allocated if i >= 0 else states[0].before

    base = 0 if trace.on_gpu else states[0].before
    peak, peak_phase, saved = 0, "", []
    for step, parts in zip(steps, pieces, strict=True):
        inside = [s for s in states if step.start <= s.time <= step.end]
        # A step that allocates nothing, a CUDA graph's say, holds what it found.
        found = [(step.start, held(step.start)), *((s.time, s.allocated) for s in inside)]
        for time, allocated in found:
            if allocated - base > peak:
                peak, peak_phase = allocated - base, phase_at(parts, time)
        first = next((p.start for p in parts if p.name == "backward"), None)
        if first is not None:
            began = next((p.start for p in parts if p.name == "forward"), step.start)
            saved.append(held(first) - held(began))
    start = steps[-1].start  # `found` is of the last step
    stride = max(1, len(found) // POINTS)
    curve = [
        ((chunk[0][0] - start) / 1e6, max(allocated for _, allocated in chunk) - base)
        for chunk in (found[i : i + stride] for i in range(0, len(found), stride))
    ]
    return MemoryUse(
        device="GPU" if trace.on_gpu else "CPU",
        peak=peak,
        peak_phase=peak_phase,
        saved=round(sum(saved) / len(saved)) if saved else None,
        total=trace.properties.get("totalGlobalMem"),
        curve=curve,
    )


def _utilisation(
    trace: Trace, model_flops: float | None, seconds: float, dtype: str, ceilings: Ceilings
) -> dict[str, float]:
    """Model FLOPs utilisation, against the peaks that are known."""
    peaks = {
        "measured": ceilings.rate(dtype),
        "datasheet": datasheet(trace.properties.get("name", ""), _rate_name(trace, dtype)),
    }
    if not model_flops or not seconds:
        return {}
    return {name: model_flops / (seconds / 1e6) / peak for name, peak in peaks.items() if peak}


def _rate_name(trace: Trace, dtype: str) -> str:
    """The name of a peak: float32 products run as TF32 where PyTorch was told that they may."""
    precision = trace.extra.get("settings", {}).get("float32_matmul_precision", "highest")
    return "tf32" if dtype == "float32" and precision != "highest" else dtype


def known_card(name: str) -> Any:
    """The entry of vitkern.roofline.MACHINES for the card that PyTorch calls `name`, or None."""
    from vitkern.roofline import MACHINES

    return next((m for m in MACHINES.values() if m.device == name), None)


def datasheet(name: str, dtype: str) -> float | None:
    """The dense peak of a card in FLOP/s as its maker states it; None where that is unknown."""
    known = known_card(name)
    if known is None:
        return None
    rate: float | None = getattr(known.peak, "bfloat16" if dtype == "float16" else dtype, None)
    return rate
