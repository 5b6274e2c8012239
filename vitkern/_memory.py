"""How much memory something takes."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """Most bytes that PyTorch's allocator held at once during `work`, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU's allocator keeps no such count, but tells the profiler of every block.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains where there is no GPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted(
        ((e["ts"], e["args"]) for e in events if e["name"] == "[memory]"),
        key=lambda event: event[0],
    )
    if not memory:
        return 0
    first = memory[0][1]  # the count goes on from one profile to the next
    before = first["Total Allocated"] - first["Bytes"]
    return max(0, max(state["Total Allocated"] for _, state in memory) - before)
