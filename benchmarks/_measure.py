"""Timers, statistics, parity and the environment: what every measurement here has in common."""

import datetime
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkern.kernels._error_budget import parity as parity

Call = Callable[[], Any]


@dataclass(frozen=True)
class Stats:
    """Median and quartiles of `n` values."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stats":
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3, len(values))

    def __format__(self, spec: str) -> str:
        spec = spec or ".3g"
        return f"{self.median:{spec}} [{self.q1:{spec}}, {self.q3:{spec}}]"


class Timer:
    """Seconds per call on one device.

    CUDA: events around each call, and before it, outside of them, a write to a buffer of twice the
    L2 cache (256 MiB at least), so that inputs come from memory and the queue stays ahead of the
    card. CPU: the wall clock, caches as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.policy = "wall clock; caches warm"
        self._flush: Tensor | None = None
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(2 * l2, 256 << 20)
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)
            self.policy = f"CUDA events; L2 ({l2 >> 20} MiB) flushed by a write of {size >> 20} MiB"

    def samples(self, call: Call, n: int) -> list[float]:
        """`n` timings of one call each, without a warm-up."""
        if self._flush is None:
            times = []
            for _ in range(n):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            return times
        events = []
        for _ in range(n):
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start_event.record()
            call()
            end_event.record()
            events.append((start_event, end_event))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def __call__(self, call: Call, seconds: float = 0.2, least: int = 5, most: int = 200) -> Stats:
        """Warm up, then time `call` for about `seconds`."""
        self.samples(call, 2)
        estimate = statistics.median(self.samples(call, 3))
        return Stats.of(self.samples(call, repeats(estimate, seconds, least, most)))

    def paired(self, a: Call, b: Call, seconds: float = 2.0) -> Stats:
        """time(a) / time(b) of neighbouring calls A B A B..., so that drift hits both alike."""
        for call in (a, b):
            self.samples(call, 2)
        estimate = self.samples(a, 1)[0] + self.samples(b, 1)[0]
        ratios = []
        for n in range(repeats(estimate, seconds, 5, 200)):
            # Either may go first: what runs second finds caches and clocks that the other left.
            pair = ((a, b), (b, a))[n % 2]
            first, second = (self.samples(call, 1)[0] for call in pair)
            ratios.append(first / second if n % 2 == 0 else second / first)
        return Stats.of(ratios)


def repeats(estimate: float, seconds: float, least: int, most: int) -> int:
    """How many calls of `estimate` seconds fit into `seconds`, within limits."""
    return max(least, min(most, int(seconds / max(estimate, 1e-7))))


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in the same run."""

    flops_per_s: float
    bytes_per_s: float
    matmul: str
    copy: str

    @classmethod
    def measure(cls, timer: Timer) -> "Ceilings":
        """A large bfloat16 product (float32 on a CPU) and a large copy, read plus written."""
        cuda = timer.device.type == "cuda"
        n, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
        size = 1 << 30 if cuda else 1 << 25
        a, b = (torch.randn(n, n, device=timer.device, dtype=dtype) for _ in range(2))
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=timer.device)
        target = torch.empty_like(source)
        return cls(
            flops_per_s=2 * n**3 / timer(lambda: a @ b).median,
            bytes_per_s=2 * size / timer(lambda: target.copy_(source)).median,
            matmul=f"{n}^3 {dtype}",
            copy=f"{size >> 20} MiB, read and written",
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions(*packages: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Card, driver, clocks (read only), versions, commit and date."""
    root = Path(__file__).parent.parent
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(root), "rev-parse", "HEAD"),
        "uncommitted": bool(_output("git", "-C", str(root), "status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "packages": _versions(
            "vitkern",
            "torch",
            "triton",
            "timm",
            "numpy",
            "flash-attn",
            "flash-attn-3",
            "flash-attn-4",
        ),
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["card"] = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
        fields = (
            "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        )
        about["nvidia_smi"] = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
        about["nvidia_smi_clocks"] = _output("nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE")
    return about
