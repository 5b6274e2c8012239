"""The rule by which a kernel is right: at most twice the error that eager PyTorch makes.

Errors are relative root-mean-square distances from a float64 result. Where eager is nearly exact
by luck, as happens on samples of a few values, the rounding that nobody can avoid stands in: one of
the result's dtype, and for float32, in which the sums are carried too, two.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with every floating-point tensor and dtype option in float64."""

    def raised(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        return value

    return {name: raised(value) for name, value in arguments.items()}


def error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|; absolute where `exact` is all zero."""
    scale = exact.norm() if exact.norm() > 0 else 1.0
    return float((actual.double() - exact).norm() / scale)


def budget(eager: Tensor, exact: Tensor, factor: float = 2.0) -> float:
    """The error that is allowed where eager PyTorch returned `eager`."""
    return max(factor * error(eager, exact), rounding(eager.dtype))


def rounding(dtype: torch.dtype) -> float:
    """The error that nobody can avoid in a result of this dtype."""
    return (2 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps / 2


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """What an op returned, always as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def parity(
    actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor], factor: float = 2.0
) -> dict[str, Any]:
    """Whether each tensor is at most `factor` times as far from `exact` as eager's is.

    Returns:
        "ok"; "error", "budget" and "eager_error" of the tensor that comes closest to its budget or
        exceeds it most; or "why", where there is no error to compare.
    """
    worst: dict[str, Any] = {"ok": True, "error": 0.0, "budget": 0.0, "eager_error": 0.0}
    highest = -1.0
    for n, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        if a.shape != x.shape or a.dtype != e.dtype:
            return {"ok": False, "why": f"output {n} is {a.dtype} {list(a.shape)}"}
        if x.numel() == 0:
            continue
        if not torch.isfinite(a).all():
            return {"ok": False, "why": f"output {n} is not finite"}
        own, allowed = error(a, x), budget(e, x, factor)
        if own / allowed > highest:
            highest = own / allowed
            worst = {"error": own, "budget": allowed, "eager_error": error(e, x)}
            worst["ok"] = own <= allowed
    return worst
