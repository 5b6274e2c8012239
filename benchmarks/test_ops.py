"""Every op of REGISTRY on its own samples: ``pytest benchmarks --benchmark-only``.

One group a call; its implementations stand beside each other, in a backward op those of its forward
op. Without a GPU the shapes are tiny, and what is compared is what runs there.
"""

from typing import Any

import pytest
import torch

from tests.error_budget import in_float64
from vitkern.kernels import REGISTRY

from ._cases import Case, cases, implementations, results, timed, unfit
from ._measure import parity

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.bfloat16, torch.float32) if GPU else (torch.float32,)


def _runs() -> list[Any]:
    return [
        pytest.param(case, impl, id=f"{case} {impl}")
        for case in cases(REGISTRY.values(), ["vit" if GPU else "tiny"], DTYPES)
        for impl in implementations(case)
        if impl != "triton" or GPU
    ]


@pytest.mark.benchmark(warmup=True, warmup_iterations=3, min_rounds=5, max_time=0.1)
@pytest.mark.parametrize(("case", "impl"), _runs())
def test_op(case: Case, impl: str, benchmark: Any) -> None:
    arguments, known = case.arguments(DEVICE), implementations(case)
    reason = unfit(case, impl, arguments)
    if reason is not None:
        pytest.skip(reason)
    result = parity(
        results(case, known[impl], arguments),
        results(case, known[case.forward.op.portable_name], arguments),
        results(case, known["reference"], in_float64(arguments)),
    )
    assert result["ok"], result
    call = timed(case, known[impl], arguments)

    def finished() -> None:
        call()
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.extra_info["bytes"] = case.op.bytes_moved(**case.meta())
    benchmark.extra_info["flops"] = case.op.flops(**case.meta())
    with torch.no_grad():
        benchmark(finished)
