"""Timers, statistics, parity and the environment: what every measurement here has in common."""

import datetime
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkern._device import device_name
from vitkern.kernels._error_budget import parity as parity
from vitkern.kernels._op import dtype_name
from vitkern.profile import ceilings

# Whose versions a measurement depends on.
PACKAGES = (
    "vitkern",
    "torch",
    "triton",
    "numpy",
    "timm",
    "torchvision",
    "transformers",
    "vit-pytorch",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
    "apex",
    "transformer-engine",
    "liger-kernel",
    "quack-kernels",
    "onnxruntime",
    "openvino",
)

Call = Callable[[], Any]
Clock = Callable[[], float]


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


# Of a spinning GPU; a card that is slower than that only spins longer.
CYCLES_PER_S = 2e9


class Timer:
    """Seconds per call on one device.

    CUDA: events around each call, and before it, outside of them, a write to a buffer of twice the
    L2 cache (256 MiB at least), so that inputs come from memory. Where the queue is to be ahead of
    the card, the card also spins as long as the host takes to launch the call: of an op the kernels
    are timed, of a model at batch 1 the launches, too. CPU: the wall clock, caches as they are.
    """

    def __init__(self, device: torch.device, clock: Clock = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.policy = "wall clock; caches warm"
        self._flush: Tensor | None = None
        if device.type == "cuda":
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(2 * l2, 256 << 20)
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)
            self.policy = (
                f"CUDA events; L2 ({l2 >> 20} MiB) flushed by a write of {size >> 20} MiB; "
                "ops with the queue ahead of the card, models as they are launched"
            )

    def _record(self, call: Call, lead: float = 0.0) -> Callable[[], float]:
        """Make one call; what comes back tells its time, once the device is through with it.

        lead: seconds by which the card is to begin later than the host.
        """
        if self._flush is None:
            start = self.clock()
            call()
            seconds = self.clock() - start
            return lambda: seconds
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if lead:
            torch.cuda._sleep(int(lead * CYCLES_PER_S))
        self._flush.zero_()
        first.record()
        call()
        last.record()
        return lambda: first.elapsed_time(last) / 1e3

    def host_seconds(self, call: Call, times: int = 1) -> float:
        """How long the host takes over a call that is warm, a GPU's queue being empty: the median.

        0 on a CPU, where that is all.
        """
        if self._flush is None:
            return 0.0
        found = []
        for _ in range(times):
            torch.cuda.synchronize(self.device)
            start = self.clock()
            call()
            found.append(self.clock() - start)
        return statistics.median(found)

    def _read(self, records: Iterable[Callable[[], float]]) -> list[float]:
        if self._flush is not None:
            torch.cuda.synchronize(self.device)
        return [record() for record in records]

    def samples(self, call: Call, n: int, lead: float = 0.0) -> list[float]:
        """`n` timings of one call each, without a warm-up."""
        return self._read([self._record(call, lead) for _ in range(n)])

    def __call__(self, call: Call, seconds: float = 0.2, least: int = 5, most: int = 200) -> Stats:
        """Warm up, then time `call` for about `seconds`, the queue ahead of the card."""
        self.samples(call, 2)
        lead = self.host_seconds(call)
        estimate = statistics.median(self.samples(call, 3, lead))
        return Stats.of(self.samples(call, repeats(estimate, seconds, least, most), lead))

    def in_turns(
        self,
        calls: Mapping[str, Call],
        seconds: float,
        least: int = 5,
        most: int = 200,
        ahead: bool = False,
    ) -> dict[str, list[float]]:
        """Timings of several calls by name, the nth of each from the same round.

        A round makes every call once, in an order of its own, so that drift, and the caches and
        clocks that one call leaves to the next, hit all alike; `seconds` are for each call.
        ahead: keep the queue ahead of the card.
        """
        for call in calls.values():
            self.samples(call, 2)
        leads = {name: self.host_seconds(call) if ahead else 0.0 for name, call in calls.items()}
        estimate = sum(self.samples(call, 1)[0] for call in calls.values())
        rounds = repeats(estimate, seconds * len(calls), least, most)
        shuffle = random.Random(0).shuffle
        records: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
        order = list(calls)
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                records[name].append(self._record(calls[name], leads[name]))
        return {name: self._read(made) for name, made in records.items()}


def repeats(estimate: float, seconds: float, least: int, most: int) -> int:
    """How many calls of `estimate` seconds fit into `seconds`, within limits."""
    return max(least, min(most, int(seconds / max(estimate, 1e-7))))


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in the same run: FLOP/s by dtype, and bytes/s."""

    flops_per_s: dict[str, float]
    bytes_per_s: float
    matmul: str
    copy: str

    @classmethod
    def measure(cls, device: torch.device, dtypes: Iterable[torch.dtype]) -> "Ceilings":
        """A large square product in each dtype, and a large copy, read plus written."""
        n, size = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 26)
        found = ceilings.measure(device, dtypes, n, size)
        assert found.bytes_per_s is not None
        return cls(
            flops_per_s=dict(found.flops_per_s),
            bytes_per_s=found.bytes_per_s,
            matmul=f"{n}^3",
            copy=f"{size >> 20} MiB, read and written",
        )

    def seconds(self, flops: int, moved: int, dtype: torch.dtype) -> float:
        """The least time for so much work: the longer of computing and moving."""
        return max(flops / self.flops_per_s[dtype_name(dtype)], moved / self.bytes_per_s)


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of installed distributions; None for the others."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Card, driver, clocks (read only), versions, commit and date."""
    here = ("-C", str(Path(__file__).parent.parent))
    changed = _output("git", *here, "status", "--porcelain")
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # A machine that gets files without git's folder is told: VITKERN_COMMIT.
        "commit": os.environ.get("VITKERN_COMMIT") or _output("git", *here, "rev-parse", "HEAD"),
        "uncommitted": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": device_name(torch.device("cpu")),
        "cpu_threads": torch.get_num_threads(),
        "packages": versions(PACKAGES),
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
        fields = "name,driver_version,power.limit"
        about["nvidia_smi"] = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
    return about


def clocks(device: torch.device) -> dict[str, Any]:
    """What the card runs at now, a row of results: of use right after work, as idle cards sleep."""
    if device.type != "cuda":
        return {"kind": "clocks", "nvidia_smi": None}
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    found = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv")
    more = _output("nvidia-smi", "-q", "-d", "PERFORMANCE")
    return {"kind": "clocks", "nvidia_smi": found, "performance": more}
