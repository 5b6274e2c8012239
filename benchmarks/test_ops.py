"""Every op of REGISTRY on its own samples: ``pytest benchmarks --benchmark-only``.

One group a call; its implementations stand beside each other. Without a GPU the shapes are tiny,
and what is compared is what runs there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.error_budget import as_tuple, in_float64
from vitkern.kernels import REGISTRY

from ._cases import Case, cases
from ._measure import parity

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float32) if GPU else (torch.float32,)


def _runs() -> list[Any]:
    found = []
    for case in cases(REGISTRY.values(), ["vit" if GPU else "tiny"], DTYPES):
        for name, run in case.op.implementations.items():
            if name != "triton" or GPU:
                found.append(pytest.param(case, run, id=f"{case} {name}"))
    return found


@pytest.mark.benchmark(warmup=True, warmup_iterations=3, min_rounds=5, max_time=0.1)
@pytest.mark.parametrize(("case", "run"), _runs())
def test_op(case: Case, run: Callable[..., Any], benchmark: Any) -> None:
    arguments = case.sample.make(DEVICE, case.dtype)
    with torch.no_grad():
        result = parity(
            as_tuple(run(**arguments)),
            as_tuple(case.op.portable(**arguments)),
            as_tuple(case.op.reference(**in_float64(arguments))),
        )
        assert result["ok"], result

        def call() -> None:
            run(**arguments)
            if GPU:
                torch.cuda.synchronize()

        benchmark.group = str(case)
        benchmark.extra_info["bytes"] = case.op.bytes_moved(**arguments)
        benchmark.extra_info["flops"] = case.op.flops(**arguments)
        benchmark(call)
