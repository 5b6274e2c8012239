"""GELU in registers is a polynomial of ours: here it is held against float64 and PyTorch's."""

# Triton has no types to give its kernels:
# mypy: allow-untyped-defs

import math

import pytest
import torch
from torch import Tensor

from vitkern.kernels._gemm.activation import activate, derive
from vitkern.kernels._triton import jit, tl


@jit
def _both_kernel(x, y, again, slope, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    z = tl.load(x + at)
    tl.store(y + at, activate(z, "gelu"))
    value, derivative = derive(z, "gelu")
    tl.store(again + at, value)
    tl.store(slope + at, derivative)


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu, its derivative) of float32 [2^n], by the kernels' function."""
    y, again, slope = (torch.empty_like(x) for _ in range(3))
    _both_kernel[(1,)](x, y, again, slope, SIZE=x.numel())
    assert torch.equal(y.nan_to_num(7), again.nan_to_num(7))
    return y, slope


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    z = x.double()
    below = 0.5 * torch.erfc(-z / math.sqrt(2))
    return z * below, below + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def test_it_is_nearer_to_float64_than_pytorchs_float32(kernel_device: str) -> None:
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    x.requires_grad_()
    eager = torch.nn.functional.gelu(x)
    (eager_slope,) = torch.autograd.grad(eager.sum(), x)
    x = x.detach()
    (y, slope), (exact_y, exact_slope) = gelu(x), exact(x)
    assert distance(y, exact_y) < distance(eager.detach(), exact_y)
    assert distance(slope, exact_slope) < distance(eager_slope, exact_slope)


def test_it_is_right_at_every_point(kernel_device: str) -> None:
    """To half a unit in the last place of values near 4, and far out to what the tail still is."""
    x = torch.linspace(-12, 12, 1 << 15, device=kernel_device)
    for made, wanted in zip(gelu(x), exact(x), strict=True):
        assert (made.double() - wanted).abs().max() < 1.2e-6
        assert (made.double() - wanted)[x.abs() < 4].abs().max() < 4e-7
        assert (made.double() - wanted)[x < -6].abs().max() < 2e-8


@pytest.mark.parametrize("size", [20.0, 1e4, 1e20, 3e38])
def test_far_out_it_is_relu(size: float, kernel_device: str) -> None:
    y, slope = gelu(torch.tensor([size, -size], device=kernel_device))
    assert y.tolist() == [pytest.approx(size), 0.0]
    assert slope.tolist() == [1.0, 0.0]


def test_what_is_no_number_stays_none(kernel_device: str) -> None:
    y, slope = gelu(torch.tensor([math.nan, -math.inf], device=kernel_device))
    assert y.isnan().all()
    assert slope[0].isnan()
