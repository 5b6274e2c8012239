"""explain(): which implementation every op of a model takes for given images, and why."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkern._table import columns
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


def explain(model: nn.Module, images: Tensor) -> Explanation:
    """Run one forward pass and report which implementations ran.

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
        with torch.random.fork_rng(devices), record_choices() as choices:
            model(images)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    counted = Counter((c.op, c.implementation, c.why) for c in choices)
    return Explanation(tuple(Row(*key, calls) for key, calls in counted.items()))
