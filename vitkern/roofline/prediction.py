"""The time of a model on one card, by op."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from vitkern._table import columns
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS

from .executions import Work, forward_flops, resolve, works
from .machines import Machine, card


class Row(NamedTuple):
    """One op of one part of the step: totals over its kernels, and the share of its time in which
    FLOPs and not bytes set the pace."""

    op: str
    part: str
    kernels: int
    flops: int
    bytes: int
    seconds: float
    compute_share: float


@dataclass(frozen=True)
class Prediction:
    """A model's time on a machine; prints as a table by op."""

    model: str
    machine: Machine
    config: ViTConfig
    batch: int
    training: bool
    execution: str
    works: tuple[Work, ...]
    launch_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Of one call."""
        return sum(row.seconds for row in self.rows())

    def part_seconds(self, *parts: str) -> float:
        """Of "forward", "backward", "optimizer"."""
        return sum(row.seconds for row in self.rows() if row.part in parts)

    @property
    def images_per_s(self) -> float:
        """Images a second."""
        return self.batch / self.seconds

    @property
    def mfu(self) -> float:
        """FLOPs of the model, three times forward for training, over the datasheet's peak."""
        flops = forward_flops(self.config) * (3 if self.training else 1)
        dtype = next(work.dtype for work in self.works if work.flops)
        return flops * self.images_per_s / self.machine.rate(dtype, peak=True)

    def rows(self) -> list[Row]:
        """By op and part, in the order of the step."""
        grouped: dict[tuple[str, str], list[Work]] = {}
        for work in self.works:
            grouped.setdefault((work.op, work.part), []).append(work)
        found = []
        for (op, part), group in grouped.items():
            kernels = sum(work.calls for work in group)
            busy = sum(work.seconds(self.machine) for work in group)
            compute = sum(
                work.seconds(self.machine) for work in group if work.compute_bound(self.machine)
            )
            found.append(
                Row(
                    op, part, kernels,
                    sum(work.calls * work.flops for work in group),
                    sum(work.calls * work.bytes for work in group),
                    busy + kernels * self.launch_seconds,
                    compute / busy if busy else 0.0,
                )
            )  # fmt: skip
        return found

    def table(self) -> list[list[str]]:
        """Lines of cells: head, ops, total."""
        rows, total = self.rows(), self.seconds
        head = ["op", "part", "kernels", "GFLOP", "MB", "us", "share", "bound by"]
        lines = [
            [
                row.op, row.part, str(row.kernels), _number(row.flops / 1e9),
                _number(row.bytes / 1e6), _number(1e6 * row.seconds),
                f"{row.seconds / total:.1%}", _bound(row.compute_share),
            ]
            for row in rows
        ]  # fmt: skip
        compute = sum(row.seconds * row.compute_share for row in rows) / total
        sums = [sum(getattr(row, name) for row in rows) for name in ("kernels", "flops", "bytes")]
        last = ["total", "", str(sums[0]), _number(sums[1] / 1e9), _number(sums[2] / 1e6)]
        return [head, *lines, [*last, _number(1e6 * total), "100.0%", _bound(compute)]]

    def __str__(self) -> str:
        what = "a training step" if self.training else "a forward pass"
        return (
            f"{self.model}, {what} of {self.batch} images on {self.machine.name}, {self.execution} "
            f"(predicted): {1e3 * self.seconds:.3g} ms, {self.images_per_s:,.0f} images/s, "
            f"MFU {self.mfu:.1%}\n{columns(self.table())}"
        )


def _bound(compute_share: float) -> str:
    if compute_share in (0.0, 1.0):
        return "compute" if compute_share else "memory"
    return f"compute {compute_share:.0%}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _name(config: ViTConfig) -> str:
    """timm's name, if the model has one; what doesn't change the network doesn't count."""
    plain = replace(config, impl="auto", save=None)
    for name in PRESETS:
        if ViTConfig.from_name(name) == plain:
            return name
    return f"a ViT of width {config.embed_dim} and depth {config.depth}"


def predict(
    config: ViTConfig | str,
    machine: Machine | str,
    batch: int = 256,
    training: bool = False,
    execution: str = "vitkern",
    *,
    precision: str | None = None,
    optimizer: bool = True,
    launch_seconds: float = 0.0,
) -> Prediction:
    """The time of a forward pass or a training step on one GPU.

    Args: those of `works`, and
        machine: a card, or its name in MACHINES.
        launch_seconds: added for each kernel.

    Raises:
        ValueError: as `works`; an unknown card.
    """
    machine = card(machine) if isinstance(machine, str) else machine
    found = works(config, batch, execution, training, precision=precision, optimizer=optimizer)
    config = resolve(config)
    return Prediction(
        _name(config), machine, config, batch, training, execution, tuple(found), launch_seconds
    )
