"""Whole models, ours beside everyone's: ``pytest benchmarks/test_models.py --benchmark-only``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ._grid import model_contenders, settings
from ._models import Setting, contest
from ._session import DEVICE, Session, replayed


def runs(grid: str, device: torch.device) -> Iterator[tuple[Setting, str]]:
    """Every setting with everyone who takes part in it."""
    for setting in settings(grid, device):
        for impl in model_contenders(grid, setting, device):
            yield setting, impl


@pytest.mark.benchmark(timer=replayed)
def test_model(case: Setting, impl: str, session: Session, benchmark: Any) -> None:
    # On a CPU asking for memory takes a second, and it is training that needs it.
    memory = case.step == "train"
    session.test(str(case), lambda: contest(case, DEVICE, memory), impl, benchmark)
