"""TF32 emulated without a GPU: what a kernel's float32 products would be on tensor cores.

Triton's interpreter multiplies in full float32 whatever a kernel asks for, and hides what a card
does: `tl.dot` hands float32 to the tensor core as it is, which drops the lowest 13 bits of a
mantissa, where PyTorch's products round them (github.com/triton-lang/triton/issues/4574). Here the
interpreter's products truncate their operands, and ATen's round them. Eager attention stays in
float32, as on a card, where its kernel makes three TF32 products of one (CUTLASS's FastF32).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_conditions import TRITON, hold
from vitkern.kernels import REGISTRY, _verified
from vitkern.kernels._op import Op
from vitkern.kernels._product import round_to_tf32
from vitkern.kernels._triton import INTERPRET, jit, tl

pytestmark = pytest.mark.skipif(not INTERPRET, reason="an emulation beside the real thing")

CPU = torch.device("cpu")
LOW = 0x1FFF  # the bits of a float32 that TF32 has not
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
CONVOLUTIONS = (aten.convolution, aten.convolution_backward)

# Ops with products.
OPS = [op for op in REGISTRY.values() if op.launcher and "layer_norm" not in op.name]


def truncated(t: Tensor) -> Tensor:
    """As a tensor core reads float32."""
    return (t.contiguous().view(torch.int32) & ~LOW).view(torch.float32)


def rounded(t: Tensor) -> Tensor:
    """To the nearest TF32, ties away from zero, as PTX's cvt.rna does."""
    return ((t.contiguous().view(torch.int32) + (LOW + 1) // 2) & ~LOW).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """ATen's products of float32, where PyTorch's flag allows TF32."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        high = torch.get_float32_matmul_precision() == "high"
        if high and function._overloadpacket in (*PRODUCTS, *CONVOLUTIONS):
            args = [
                rounded(a) if isinstance(a, Tensor) and a.dtype == torch.float32 else a
                for a in args
            ]
        return function(*args, **(kwargs or {}))


@contextmanager
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TF32 as on a card inside the block."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def operand(handle: Any) -> Any:
        if handle.data.dtype != "float32":
            return handle
        data = truncated(torch.from_numpy(handle.data.copy())).numpy()
        return interpreter.TensorHandle(data, handle.dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *more: Any) -> Any:
        if str(precision).endswith("TF32"):
            a, b = (operand(h) for h in (a, b))
        return dot(self, a, b, d, precision, *more)

    with monkeypatch.context() as patch, RoundedProducts():
        patch.setattr(builder, "create_dot", create_dot)
        yield


def in_tf32(op: Op) -> _verified.Verdict:
    using = _verified.smallest(op, torch.float32)
    return _verified.check(op, "triton", torch.float32, CPU, using, precision="tf32")


def test_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding errs by at most half of what truncation does; nothing happens without the flag."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    spacing = 2.0 ** (x.abs().log2().floor() - 10)
    assert ((rounded(x) - x).abs() <= spacing / 2).all()
    assert ((x - truncated(x)).abs() < spacing).all()
    assert (truncated(x).abs() <= x.abs()).all()
    with emulated(monkeypatch):
        y = torch.mm(x[None], x[:, None])
        with _verified.float32_products("tf32"):
            assert torch.mm(x[None], x[:, None]) == torch.mm(rounded(x)[None], rounded(x)[:, None])
    assert y == torch.mm(x[None], x[:, None])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_in_ieee_precision_are_left_alone(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    using = _verified.smallest(op, torch.float32)
    with emulated(monkeypatch):
        assert _verified.check(op, "triton", torch.float32, CPU, using, precision="ieee").ok


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_in_tf32(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated(monkeypatch):
        verdict = in_tf32(op)
    assert verdict.ok, verdict


def test_a_network_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated(monkeypatch), _verified.float32_products("tf32"):
        hold(TRITON, "cpu", "float32")


@jit
def _round(x, out, N: tl.constexpr, PRECISION: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, round_to_tf32(tl.load(x + n), PRECISION))


def test_operands_are_rounded_to_the_nearest() -> None:
    """Any bits but NaN's as PTX's cvt.rna rounds them; a NaN stays one, GPUs' own above all."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1024,), generator=generator).to(torch.int32)
    limits = [0x0, 0x1, 0xFFF, 0x1000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF]
    bits[: 2 * len(limits)] = torch.tensor([*limits, *(n - 2**31 for n in limits)])
    x = bits.view(torch.float32)
    found = {precision: torch.empty_like(x) for precision in ("tf32", "ieee")}
    for precision, out in found.items():
        _round[(1,)](x, out, x.numel(), precision)
    assert found["ieee"].view(torch.int32).equal(bits)
    number = ~x.isnan()
    assert found["tf32"].isnan().equal(~number)
    assert found["tf32"][number].equal(rounded(x)[number])
    assert found["tf32"][x.isinf()].equal(x[x.isinf()])
    half = torch.arange(16, dtype=torch.float16)
    _round[(1,)](half, out := torch.empty_like(half), 16, "tf32")
    assert out.equal(half)
