"""vitkern.ViT, EagerViT and timm on this machine's CPU; the ratio vitkern / timm is in extra_info.

The GPU has its own command, ``python -m benchmarks gpu``, which needs no plugin and no network.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from ._cpu import BATCHES, DEVICE, NAMES, STEPS, Pair
from ._measure import Timer

IMPLEMENTATIONS = ("vitkern", "eager", *(("timm",) if find_spec("timm") else ()))


@cache
def _pair(name: str, size: int) -> Pair:
    pair = Pair.of(name, size)
    pair.check()
    return pair


@pytest.mark.benchmark(min_rounds=5, max_time=0.5, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("what", STEPS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_model(name: str, size: int, implementation: str, what: str, benchmark: Any) -> None:
    pair = _pair(name, size)
    benchmark.group = f"{name} b{size} {what}"
    benchmark(pair.step(implementation, what))
    if implementation == "vitkern":
        ratio = pair.ratio(Timer(DEVICE), what, seconds=1.0)
        benchmark.extra_info[f"time / time of {pair.rival}, paired"] = vars(ratio)
