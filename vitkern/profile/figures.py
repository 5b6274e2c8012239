"""The figures of a profile, as report.json holds them. Seconds are those of a mean step."""

from dataclasses import asdict, dataclass, field
from typing import Any

from vitkern.profile.counting import Cost

OVERHEAD = "Python, PyTorch's overhead"  # the row of what is no op
IDLE = "GPU idle"  # a lane of the timeline
MOST_UNSEEN = 0.05  # of Analysis.unseen, up to which there is an MFU


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured or given; empty where unknown."""

    flops_per_s: dict[str, float] = field(default_factory=dict)  # by dtype
    bytes_per_s: float | None = None
    how: str = ""

    def rate(self, dtype: str) -> float | None:
        """FLOP/s in a dtype, None where unknown; float16 goes as fast as bfloat16."""
        same = "bfloat16" if dtype == "float16" else dtype
        return self.flops_per_s.get(dtype) or self.flops_per_s.get(same)

    def least_seconds(self, cost: Cost) -> tuple[float, str]:
        """The least time of a call, and what bounds it: "compute", "memory", "" for unknown."""
        rate = self.rate(cost.dtype)
        if cost.flops and not rate:
            return 0.0, ""
        compute = cost.flops / rate if rate else 0.0
        memory = cost.bytes / self.bytes_per_s if self.bytes_per_s else 0.0
        return max(compute, memory), "compute" if compute > memory else "memory"


@dataclass
class Row:
    """One op, in one step.

    seconds: what it adds to the step; hidden: what more of it ran on a GPU beside kernels of a
    busier stream. Rates are over both.
    launches: kernels, copies and fills that ran on a GPU, those of a CUDA graph each.
    bytes: of a copy between GPU and host those copied, without a roofline: PCIe bounds it.
    implementation: of vitkern's ops on a GPU "kernel" or "ATen"; of a fused optimizer "fused".
    """

    op: str
    seconds: float
    hidden: float
    share: float
    calls: float
    launches: float | None
    flops: float | None
    bytes: float | None
    flops_per_s: float | None
    bytes_per_s: float | None
    roofline: float | None
    bound: str
    dtype: str
    phase: str
    implementation: str


@dataclass
class PhaseTime:
    """One phase, in one step; of a GPU's time `busy` is that in which a kernel ran.

    The rest is idle time, which counts towards the phase of the kernel that ends it, or as data
    where the loader was what the kernel waited for.
    """

    name: str
    seconds: float
    share: float
    busy: float
    launches: float | None


@dataclass
class Idle:
    """When a GPU ran nothing, in one step.

    longest, longest_late: seconds of the longest gap, and of the longest that waited for the host.
    causes: seconds by what it waited for: "data" (the loader), "host" (the launch came late),
    "device" (all else: between kernels that were launched in time).
    """

    seconds: float
    share: float
    longest: float
    longest_before: str
    longest_late: float
    longest_late_before: str
    causes: dict[str, float]
    before: dict[str, float]  # seconds by the op that came next


@dataclass
class MemoryUse:
    """Bytes. peak: most at once; on a CPU beyond what was held when recording began.

    On a GPU it lacks what CUDA graphs keep in pools of their own: PyTorch's count leaves that out.

    saved: held when backward begins, beyond what was held when the step began.
    """

    device: str
    peak: int
    peak_phase: str
    saved: int | None
    total: int | None
    curve: list[tuple[float, int]]  # seconds of the last step, bytes


@dataclass
class Analysis:
    """All figures of a profile; ``asdict`` of it is report.json."""

    device: str
    on_gpu: bool
    steps: int
    warmup_steps: int
    step_seconds: list[float]
    seconds: float
    images: float | None
    images_from: str
    images_per_s: float | None
    rows: list[Row]
    phases: list[PhaseTime]
    loader_wait: float  # seconds of a step in which the loop waited for its loader
    idle: Idle | None
    launches: float | None
    graph_launches: float | None
    synchronisations: float | None
    memory: MemoryUse | None
    flops: float
    model_flops: float | None
    trains: bool
    compiled: bool  # whether code ran that torch.compile had made
    # Share of the forward pass in kernels that no op stands for, so that nothing tells their FLOPs.
    unseen: float
    main_dtype: str
    utilisation: dict[str, float]  # MFU against "measured" and "datasheet" peaks
    ceilings: Ceilings
    untraced_seconds: float | None  # of a step, without the profiler
    settings: dict[str, Any]
    choices: list[dict[str, Any]]
    timeline: list[tuple[str, str, float, float]]  # lane, phase or op, start, seconds
    verdicts: list[Any] = field(default_factory=list)

    @property
    def overhead(self) -> float | None:
        """By how much the profiler made a step longer; None where nothing ran without it."""
        if not self.untraced_seconds:
            return None
        return self.seconds / self.untraced_seconds - 1

    def phase(self, name: str) -> PhaseTime:
        """The phase of this name; of no length where it never came."""
        found = [p for p in self.phases if p.name == name]
        return found[0] if found else PhaseTime(name, 0.0, 0.0, 0.0, None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "overhead": self.overhead}


def short(name: str) -> str:
    """An op's name in at most 40 letters, from its begin and its end."""
    return name if len(name) <= 40 else f"{name[:24]}…{name[-15:]}"
