"""What a device does at best, measured in a second or two: a large product and a large copy."""

from collections.abc import Iterable
from contextlib import nullcontext

import torch

from vitkern.kernels._op import dtype_name
from vitkern.profile.figures import Ceilings

SECONDS = 0.15  # for each measurement


def measure(
    device: torch.device, dtypes: Iterable[torch.dtype], n: int = 0, size: int = 0
) -> Ceilings:
    """FLOP/s of a square product in each dtype, and bytes/s of a copy, read plus written.

    Args:
        n: side of the product; by default 4,096 on a GPU and 1,024 on a CPU.
        size: bytes of the copy; by default 256 MiB and 64 MiB.

    The caller's autocast has no part in it, nor do its random numbers change.
    """
    from torch.utils.benchmark import Timer  # which looks for a CUDA toolkit, and logs that

    cuda = device.type == "cuda"
    n, size = n or (4096 if cuda else 1024), size or (1 << 28 if cuda else 1 << 26)

    def seconds(statement: str, **names: torch.Tensor) -> float:
        timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
        # The best of its blocks: what else the machine does is no ceiling.
        return min(timer.blocked_autorange(min_run_time=SECONDS).times)

    rates = {}
    # Timer waits for the current GPU.
    here = torch.cuda.device(device) if cuda else nullcontext()
    with here, torch.no_grad(), torch.autocast(device.type, enabled=False):
        own = torch.Generator(device).manual_seed(0)
        for dtype in dtypes:
            a, b = (torch.randn(n, n, device=device, generator=own).to(dtype) for _ in range(2))
            rates[dtype_name(dtype)] = 2 * n**3 / seconds("a @ b", a=a, b=b)
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        copy = seconds("b.copy_(a)", a=source, b=torch.empty_like(source))
    how = f"measured: a product of {n}^3, a copy of {size >> 20} MiB"
    return Ceilings(rates, 2 * size / copy, how)
