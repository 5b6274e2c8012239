"""vitkern against timm on this CPU: ratios of neighbouring calls, so that drift hits both alike."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _models
from ._cases import columns, save
from ._measure import Stats, Timer, environment, parity

DEVICE = torch.device("cpu")
NAMES = ("vit_tiny_patch16_224", "vit_small_patch16_224")
BATCHES = (1, 4)
STEPS = ("forward", "train")


@dataclass(frozen=True)
class Pair:
    """vitkern and its rival, timm's eager model or, without timm, EagerViT, on one batch."""

    models: dict[str, nn.Module]
    rival: str
    size: int

    @classmethod
    def of(cls, name: str, size: int) -> "Pair":
        """The pair for a timm name."""
        models = _models.build(name)
        return cls(models, "timm" if "timm" in models else "eager", size)

    def step(self, which: str, what: str) -> Callable[[], Any]:
        """A forward pass or a training step of one of the models."""
        model = self.models[which]
        images, labels = _models.batch(self.models["vitkern"], self.size, DEVICE, torch.float32)
        if what == "forward":
            return lambda: _models.forward(model, images, _models.FLOAT32)
        return lambda: _models.train_step(model, model, images, labels, _models.FLOAT32)

    def check(self) -> None:
        """Logits and gradients are as near to float64 as plain PyTorch's, within a factor of two.

        Raises:
            AssertionError: they are not; then there is nothing to time.
        """
        images, labels = _models.batch(self.models["vitkern"], 1, DEVICE, torch.float32)
        model = self.models["eager"].double()
        exact = _models.outcome(
            model, model, images.double(), labels, _models.Precision("float64", torch.float64)
        )
        self.models["eager"].float()
        ours, eager = (
            _models.outcome(self.models[k], self.models[k], images, labels, _models.FLOAT32)
            for k in ("vitkern", "eager")
        )
        result = parity(ours, eager, exact)
        assert result["ok"], f"vitkern differs from float64: {result}"

    def ratio(self, timer: Timer, what: str, seconds: float) -> Stats:
        """time(vitkern) / time(rival)."""
        return timer.paired(self.step("vitkern", what), self.step(self.rival, what), seconds)


def main(json_path: Path | None, seconds: float) -> int:
    """Measure all pairs, print a table, write `json_path`."""
    if seconds <= 0:
        raise ValueError(f"--seconds: must be above 0, got {seconds}")
    timer = Timer(DEVICE)
    rows: list[dict[str, Any]] = []
    lines = [("model", "batch", "step", "vitkern / rival", "A/A", "pairs", "rival")]
    for name in NAMES:
        for size in BATCHES:
            pair = Pair.of(name, size)
            pair.check()
            for what in STEPS:
                stats = pair.ratio(timer, what, seconds)
                step = pair.step("vitkern", what)
                control = timer.paired(step, step, seconds)
                rows.append(
                    {
                        "model": name,
                        "batch": size,
                        "step": what,
                        "rival": pair.rival,
                        "ratio": vars(stats),
                        "a_a": vars(control),
                    }
                )
                lines.append(
                    (
                        name,
                        str(size),
                        what,
                        f"{stats:.3f}",
                        f"{control:.3f}",
                        str(stats.n),
                        pair.rival,
                    )
                )
                print(f"measured {name} b{size} {what}: {stats:.3f}", flush=True)
    print()
    print(columns(lines))
    print("\nRatios of times, median [quartiles]; below 1 vitkern is faster. A/A: vitkern twice.")
    if json_path is not None:
        report = {"environment": environment(DEVICE), "policy": timer.policy, "rows": rows}
        save(json_path, json.dumps(report, indent=1) + "\n")
    return 0
