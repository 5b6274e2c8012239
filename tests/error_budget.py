"""The rule by which a kernel is right: at most twice the error that eager PyTorch makes.

Errors are relative root-mean-square distances from a float64 result. Where eager is nearly exact
by luck, as happens on samples of a few values, the rounding that nobody can avoid stands in: one of
the result's dtype, and for float32, in which the sums are carried too, two.
"""

from collections.abc import Callable, Iterable
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
    roundings = 2 if eager.dtype == torch.float32 else 1
    return max(factor * error(eager, exact), roundings * torch.finfo(eager.dtype).eps / 2)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_within_budget(
    names: Iterable[str],
    actual: Iterable[Tensor],
    eager: Iterable[Tensor],
    exact: Iterable[Tensor],
    factor: float = 2.0,
) -> None:
    """Each tensor of `actual` is at most `factor` times as far from `exact` as eager's is."""
    for name, a, e, x in zip(names, actual, eager, exact, strict=True):
        assert a.shape == x.shape, f"{name}: shape {list(a.shape)}, expected {list(x.shape)}"
        assert a.dtype == e.dtype, f"{name}: {a.dtype}, eager returns {e.dtype}"
        assert torch.isfinite(a).all(), f"{name}: not finite"
        a, e, x = a.cpu(), e.cpu(), x.cpu()
        allowed = budget(e, x, factor)
        assert error(a, x) <= allowed, f"{name}: error {error(a, x):.2e}, budget {allowed:.2e}"


def gradients(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    grads: tuple[Tensor, ...],
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """(gradient of each tensor argument that requires one, outputs) for these output gradients."""
    outputs = as_tuple(function(**arguments))
    wanted = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    found = torch.autograd.grad(
        outputs,
        list(wanted.values()),
        [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)],
        allow_unused=True,
    )
    assert all(g is not None for g in found), "an argument got no gradient"
    return dict(zip(wanted, found, strict=True)), outputs
