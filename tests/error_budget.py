"""The rule by which a kernel is right (vitkern.kernels._error_budget), as tests ask for it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vitkern.kernels._error_budget import as_tuple, budget, error, in_float64

__all__ = ["as_tuple", "assert_within_budget", "budget", "error", "gradients", "in_float64"]


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
