"""Contests of plain products: what the linear ops, with all around them, are held against.

PyTorch's linear layer, which is cuBLAS's on an NVIDIA GPU, alone in its group: it has no rival, and
is none, since it computes less than the ops do. Its kernel is what is timed: the card takes longer
to flush its L2 before each call than the host to launch one.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ._contest import Contender, Contest, Ready
from ._measure import parity
from ._report.targets import Product

LINEAR = "linear"


def contest(product: Product, device: torch.device) -> Contest:
    """The time of one product, in bfloat16."""
    rows, features, depth = product
    dtype = torch.bfloat16

    def start() -> Ready:
        own = torch.Generator(device).manual_seed(0)
        shapes = ((rows, depth), (features, depth), (features,))
        x, weight, bias = (
            torch.randn(shape, device=device, generator=own).to(dtype) for shape in shapes
        )
        call = partial(F.linear, x, weight * depth**-0.5, bias)

        def check() -> dict[str, Any]:
            made = call()
            exact = F.linear(*(t.double() for t in call.args))
            return parity([made], [made], [exact])

        return Ready(call, check)

    flops = 2 * rows * features * depth
    moved = dtype.itemsize * (rows * depth + features * (depth + 1) + rows * features)
    group = str(product)
    sample = group[group.index("[") + 1 : group.index("]")]
    return Contest(
        level="product",
        group=group,
        case={"op": "product", "sample": sample, "dtype": "bfloat16"},
        contenders={LINEAR: Contender(start, f"torch {torch.__version__}")},
        ours=lambda: LINEAR,
        flops=flops,
        moved=moved,
        bound=lambda ceilings: ceilings.seconds(flops, moved, dtype),
    )
