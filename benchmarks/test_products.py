"""Plain products at the linear ops' shapes, on a GPU: ``pytest benchmarks/test_products.py``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ._products import LINEAR, contest
from ._report.targets import PRODUCTS, Product
from ._session import DEVICE, Session, replayed

if DEVICE.type != "cuda":
    pytest.skip("targets are for a GPU", allow_module_level=True)


def runs(grid: str, device: torch.device) -> Iterator[tuple[Product, str]]:
    """All of them, whatever the grid: each is a second's work."""
    return ((product, LINEAR) for product in PRODUCTS)


@pytest.mark.benchmark(timer=replayed)
def test_product(case: Product, impl: str, session: Session, benchmark: Any) -> None:
    session.test(str(case), lambda: contest(case, DEVICE), impl, benchmark)
