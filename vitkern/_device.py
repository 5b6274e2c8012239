"""What a person calls a device."""

from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3 (sm_90)", or "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, 'CPU')}, {torch.get_num_threads()} threads"
