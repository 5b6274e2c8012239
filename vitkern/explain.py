"""explain(): which implementation every op of a model takes for given images, and why."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitkern._table import columns
from vitkern.kernels import REGISTRY
from vitkern.kernels._configs import Asked, record
from vitkern.kernels._op import record_choices


class Row(NamedTuple):
    """One op, in one implementation, for one reason; and how often in a forward pass."""

    op: str
    implementation: str
    why: str
    calls: int


@dataclass(frozen=True)
class Explanation:
    """Rows in the order of first use; prints as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return columns([Row._fields, *(tuple(map(str, row)) for row in self.rows)])


class _Launches(TorchDispatchMode):
    """Tells which op, in which implementation, asked for each launch config."""

    def __init__(self, asked: list[Asked]) -> None:
        super().__init__()
        self.asked = asked
        self.ours = {
            op.kernel(name): (op.name, name)
            for op in REGISTRY.values()
            for name in ("triton", *op.kernel_peers)
        }
        self.all, self.measured = Counter[Any](), Counter[Any]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = len(self.asked)
        result = func(*args, **(kwargs or {}))
        own = self.asked[before:]
        self.all[self.ours.get(func)] += len(own)
        self.measured[self.ours.get(func)] += sum(question.measured for question in own)
        return result

    def of(self, op: str, implementation: str) -> str:
        """What there is to add to a reason: nothing where nothing was measured."""
        which = (op, implementation)
        if not self.measured[which]:
            return ""
        return f"; {self.measured[which]} of {self.all[which]} launch configs measured on this card"


def explain(model: nn.Module, images: Tensor) -> Explanation:
    """Run one forward pass and report which implementations ran, and how many launches are tuned.

    The pass runs in the model's mode (training or not) and under the caller's autocast and grad
    mode, as these decide, too. It leaves no trace: random numbers and buffers are put back.

    Args:
        model: a ViT, or any module that uses the ops; as it is before ``torch.compile``.
        images: what the model takes, on the model's device.

    Raises:
        TypeError: a compiled model, whose choices were made when it was compiled.
    """
    if hasattr(model, "_orig_mod"):
        raise TypeError("model was compiled by torch.compile: give explain() the model itself")
    devices = [images.device] if images.device.type == "cuda" else []
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with (
            torch.random.fork_rng(devices),
            record_choices() as choices,
            record() as asked,
            _Launches(asked) as launches,
        ):
            model(images)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    counted = Counter((c.op, c.implementation, c.why) for c in choices)
    return Explanation(
        tuple(
            Row(op, impl, why + launches.of(op, impl), calls)
            for (op, impl, why), calls in counted.items()
        )
    )
