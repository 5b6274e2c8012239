"""Every op of REGISTRY on its own samples: ``pytest benchmarks/test_ops.py --benchmark-only``.

In a backward case, what is timed of an implementation is autograd's way back through it.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ._cases import Case
from ._grid import op_cases, op_contenders
from ._ops import contest
from ._session import DEVICE, Session, replayed


def runs(grid: str, device: torch.device) -> Iterator[tuple[Case, str]]:
    """Every case with everyone who takes part in it."""
    for case in op_cases(grid, device):
        for impl in op_contenders(grid, case, device):
            yield case, impl


@pytest.mark.benchmark(timer=replayed)
def test_op(case: Case, impl: str, session: Session, benchmark: Any) -> None:
    session.test(str(case), lambda: contest(case, DEVICE, "inductor"), impl, benchmark)
