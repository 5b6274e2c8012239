"""What is particular to the norms: hard rows, autocast, far addresses."""

import pytest
import torch
import torch.nn.functional as F

from tests.error_budget import assert_within_budget, error
from vitkern.kernels import add_layer_norm, layer_norm


def outliers(rows: int = 6, width: int = 96) -> torch.Tensor:
    """Rows far from zero with little spread, a row with one huge value, a constant row."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    x[0] = x[0] * 1e-3 + 1e4
    x[1] = x[1] * 1e-3 - 3e3
    x[2, 5] = 3e4
    x[3] = 7.0
    return x


@pytest.mark.parametrize("rms", [False, True])
def test_rows_with_a_mean_far_above_their_spread(rms: bool, kernel_device: str) -> None:
    x = outliers().to(kernel_device)
    weight = torch.ones(96, device=kernel_device)
    actual = layer_norm(x, weight, rms=rms, impl="triton")
    eager = layer_norm(x, weight, rms=rms, impl="torch")
    exact = layer_norm(x.double(), weight.double(), rms=rms, impl="reference")
    for row in range(len(x)):  # one by one: the hard rows must not hide behind the others
        if row == 3 and not rms:  # constant: exactly zero, and no NaN from 0 / 0
            assert actual[row].abs().max() <= eager[row].abs().max() == 0
        else:
            assert_within_budget([f"row {row}"], [actual[row]], [eager[row]], [exact[row]])


def test_float16_rows_whose_squares_overflow(kernel_device: str) -> None:
    x = torch.full((2, 64), 6e4, dtype=torch.float16, device=kernel_device)
    x[:, ::2] = -6e4
    weight = torch.ones(64, dtype=torch.float16, device=kernel_device)
    assert torch.equal(layer_norm(x, weight, impl="triton").float(), x.float().sign())


@pytest.mark.usefixtures("card_to_itself")
def test_offsets_beyond_int32(kernel_device: str) -> None:
    """Two rows 2^31 values apart; memory that is never touched costs nothing."""
    if kernel_device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=kernel_device)
    x = storage.as_strided((2, 1, 64), (2**31, 64, 1))
    rows = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).half()
    x.copy_(rows)
    weight = torch.ones(64, dtype=torch.float16, device=kernel_device)
    expected = layer_norm(rows.to(kernel_device), weight, impl="triton")
    assert torch.equal(layer_norm(x, weight, impl="triton"), expected)
    stream, normed = add_layer_norm(x, x, weight, impl="triton")
    assert torch.equal(stream, 2 * rows.to(kernel_device))
    assert error(normed, expected.double()) < 1e-3


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_the_stream_keeps_its_dtype_under_autocast(impl: str, kernel_device: str) -> None:
    stream = torch.randn(2, 5, 16, device=kernel_device)
    branch = torch.randn(2, 5, 16, device=kernel_device).bfloat16()
    if kernel_device == "cpu" and impl == "triton":
        branch = branch.half()
    weight = torch.ones(16, device=kernel_device)
    with torch.autocast(kernel_device, dtype=torch.bfloat16):
        new, normed = add_layer_norm(stream, branch, weight, out_dtype=torch.float16, impl=impl)
        alone = layer_norm(stream, weight, impl=impl)
    assert (new.dtype, normed.dtype, alone.dtype) == (torch.float32, torch.float16, torch.float32)
    torch.testing.assert_close(alone, F.layer_norm(stream, (16,), weight, None, 1e-6))


def test_only_the_gradients_that_are_wanted(kernel_device: str) -> None:
    x, branch = torch.randn(2, 2, 3, 8, device=kernel_device).unbind(0)
    scale, weight = torch.ones(2, 8, device=kernel_device).unbind(0)
    branch.requires_grad_()
    stream, normed = add_layer_norm(x, branch, weight, layer_scale=scale, impl="triton")
    (normed.sum() + stream.sum()).backward()
    assert branch.grad is not None
    assert x.grad is None
    for only_the_stream in (True, False):
        branch.grad = None
        stream, normed = add_layer_norm(x, branch, weight, layer_scale=scale, impl="triton")
        (stream if only_the_stream else normed).square().sum().backward()
        assert torch.isfinite(branch.grad).all()


def test_second_derivatives_are_refused(kernel_device: str) -> None:
    x = torch.randn(2, 8, device=kernel_device, requires_grad=True)
    y = layer_norm(x, torch.ones(8, device=kernel_device), impl="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_errors_name_the_argument_and_what_was_expected() -> None:
    x, weight = torch.zeros(2, 5, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight must be \[8\], got \[7\]"):
        layer_norm(x, torch.ones(7))
    with pytest.raises(TypeError, match="x must be floating point, got int64"):
        layer_norm(x.long(), weight)
    with pytest.raises(ValueError, match="weight is on meta and x on cpu"):
        layer_norm(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"unknown impl 'trion'; expected one of auto, triton"):
        layer_norm(x, weight, impl="trion")
    with pytest.raises(ValueError, match="impl='triton' can't run here: no kernel for float64"):
        layer_norm(x.double(), weight.double(), impl="triton")
    with pytest.raises(ValueError, match="rows of 9000 values"):
        layer_norm(torch.zeros(1, 9000), torch.ones(9000), impl="triton")
    with pytest.raises(ValueError, match=r"branch must be \[2, 5, 8\], got \[2, 4, 8\]"):
        add_layer_norm(x, torch.zeros(2, 4, 8), weight)
    with pytest.raises(ValueError, match=r"drop_scale must be \[2\], got \[3\]"):
        add_layer_norm(x, x, weight, drop_scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"residual must be \[B, N, D\], got \[2, 8\]"):
        add_layer_norm(x[:, 0], x[:, 0], weight)
