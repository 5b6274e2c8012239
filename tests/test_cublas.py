"""The implementations that leave the product to PyTorch, and the kernels around it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._cases import public, require_grads
from tests.error_budget import as_tuple, assert_within_budget, gradients, in_float64
from tests.test_ops import name, restride, skip_unless_kernels_take, with_strides
from vitkern.kernels import REGISTRY
from vitkern.kernels._gemm import cublas, pointwise
from vitkern.kernels._gemm.launch import Norm
from vitkern.kernels._launch import intercept
from vitkern.kernels._op import Op, Sample
from vitkern.model.block import Block
from vitkern.model.config import ViTConfig

OPS = [op for op in REGISTRY.values() if "cublas" in op.kernel_peers]
SAMPLES = [(op, sample) for op in OPS for sample in op.samples("tiny")]
FORWARD = [(op, sample) for op, sample in SAMPLES if op.backward_of is None]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def hold(op: Op, arguments: dict[str, Any]) -> None:
    actual = as_tuple(op.kernel("cublas")(**arguments))
    eager = as_tuple(op.portable(**arguments))
    exact = as_tuple(op.reference(**in_float64(arguments)))
    names = [f"output {n}" for n in range(len(exact))]
    assert_within_budget(names, actual, eager, exact)
    fakes = as_tuple(op.fake(**arguments))
    for a, f in zip(actual, fakes, strict=True):
        assert (a.shape, a.dtype) == (f.shape, f.dtype)
        if a.numel():
            assert a.stride() == f.stride()


def test_six_ops_have_it() -> None:
    forward = ("linear_act", "linear_residual", "norm_linear")
    expected = {*forward, *(f"{op}_backward" for op in forward)}
    assert {op.name for op in OPS} == expected


@pytest.mark.parametrize("strides", ["dense", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=name)
def test_within_the_error_budget(
    op: Op, sample: Sample, dtype: torch.dtype, strides: str, kernel_device: str
) -> None:
    skip_unless_kernels_take(dtype, kernel_device)
    arguments = sample.make(kernel_device, dtype)
    if strides != "dense":
        arguments = sample.complete(with_strides(arguments, strides))
    hold(op, arguments)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("op", "sample"), [(op, s) for op, s in SAMPLES if op.backward_of], ids=name
)
def test_what_is_not_needed_is_not_made(
    op: Op, sample: Sample, needs: tuple[bool, bool], kernel_device: str
) -> None:
    arguments = sample.make(kernel_device, torch.float16)
    hold(op, {**arguments, "need_x": needs[0], "need_params": needs[1]})


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_every_kind_of_norm(
    affine: bool, rms: bool, normalised: bool, x_dtype: torch.dtype, saved: bool, kernel_device: str
) -> None:
    op = REGISTRY["norm_linear"]
    sample = next(s for s in op.samples("tiny") if s.args["norm_bias"] is not None)
    arguments = sample.make(kernel_device, torch.float16)
    arguments |= {"rms": rms, "normalised": normalised, "need_saved": saved, "stats": None}
    arguments["x"] = arguments["x"].to(x_dtype)
    if not affine:
        arguments |= {"norm_weight": None, "norm_bias": None}
    hold(op, arguments)


def test_cancelling_norm_biases_and_small_weights_cost_no_digits(kernel_device: str) -> None:
    """Where a norm's weight or bias folded into the layer's weight breaks the rule."""
    op = REGISTRY["norm_linear"]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, weight = normal(1, 40, 96), normal(48, 96) / 10
    x[..., :4] += 60
    outliers = torch.zeros(96)
    outliers[:4] = -torch.nn.functional.layer_norm(x, (96,))[..., :4].mean((0, 1))
    norms = ((torch.ones(96), outliers), (1e-4 * (1 + normal(96).abs()), torch.zeros(96)))
    for gain, shift in norms:
        tensors = {"x": x, "norm_weight": gain, "norm_bias": shift, "weight": weight}
        arguments: dict[str, Any] = {
            k: t.to(kernel_device, torch.float16) for k, t in tensors.items()
        }
        arguments |= {"bias": None, "stats": None, "eps": 1e-6, "rms": False, "normalised": False}
        arguments |= {"activation": "", "gated": False, "need_saved": True}
        hold(op, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("op", "sample"), FORWARD, ids=name)
def test_gradients_are_within_the_error_budget(
    op: Op, sample: Sample, dtype: torch.dtype, kernel_device: str
) -> None:
    skip_unless_kernels_take(dtype, kernel_device)
    arguments = require_grads(sample.make(kernel_device, dtype))
    outputs = as_tuple(public(op, "reference")(**arguments))
    generator = torch.Generator().manual_seed(1)
    dense = tuple(torch.randn(o.shape, generator=generator).to(o) for o in outputs)
    one = torch.ones((), device=kernel_device)
    for kind, grads in {
        "dense": dense,
        "transposed": tuple(restride(g, "transposed") for g in dense),
        "stride 0, as of .sum()": tuple(one.to(o.dtype).expand(o.shape) for o in outputs),
    }.items():
        actual, _ = gradients(public(op, "cublas"), arguments, grads)
        eager, _ = gradients(public(op, op.portable_name), arguments, grads)
        exact, _ = gradients(
            public(op, "reference"), in_float64(arguments), tuple(g.double() for g in grads)
        )
        names = [f"gradient of {k} ({kind})" for k in exact]
        assert_within_budget(names, actual.values(), eager.values(), exact.values())


@pytest.mark.parametrize(("op", "sample"), FORWARD, ids=name)
def test_compiles_to_one_graph_with_its_gradient(
    op: Op, sample: Sample, kernel_device: str
) -> None:
    arguments = require_grads(sample.make(kernel_device, torch.float32))
    function = public(op, "cublas")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = tuple(torch.ones_like(o) for o in as_tuple(function(**arguments)))
    expected, outputs = gradients(function, arguments, grads)
    actual, compiled_outputs = gradients(compiled, arguments, grads)
    torch.testing.assert_close(compiled_outputs, outputs)
    for k, e in expected.items():
        torch.testing.assert_close(actual[k], e, msg=k)
    torch.compiler.reset()


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=name)
def test_equal_inputs_give_equal_bits(op: Op, sample: Sample, kernel_device: str) -> None:
    arguments = sample.make(kernel_device, torch.float32)
    first, second = (as_tuple(op.kernel("cublas")(**arguments)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=name)
def test_grids_use_the_axis_without_a_limit(op: Op, sample: Sample) -> None:
    grids: list[tuple[int, ...]] = []
    with intercept(lambda launch: grids.append(launch.grid)):
        op.kernel_peers["cublas"](**sample.make("meta", torch.float32))
    assert all(len(grid) == 1 for grid in grids)


@pytest.mark.parametrize("rows", [1000, 993])
def test_sums_over_many_tiles_take_turns(
    rows: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tiles than programs, which do not share them evenly, or the last one's rows."""
    monkeypatch.setattr(pointwise, "sm_count", lambda device: 2)
    dy = torch.randn(rows, 2 * 70, device=kernel_device)[:, :70]
    steps = pointwise.turns(rows, 70, pointwise.tile_config(70), True, dy.device).steps
    assert steps == 8
    g, _, partial = pointwise.scale(dy, torch.float16)
    assert torch.equal(g, dy.half())
    exact = g.double().sum(0)
    assert_within_budget(
        ["sums"],
        [pointwise.total(partial, torch.float32)],
        [g.sum(0, dtype=torch.float32)],
        [exact],
    )
    z = torch.randn(rows, 140, device=kernel_device, dtype=torch.float16)
    dz, _, partial = pointwise.slope(dy, z, "silu", True, sums=True)
    exact = dz.double().sum(0)
    total = pointwise.total(partial, torch.float32)
    assert_within_budget(["sums"], [total], [dz.sum(0, dtype=torch.float32)], [exact])


def test_normalised_rows_without_a_weight_need_no_kernel() -> None:
    launches: list[Any] = []
    x = torch.randn(2, 3, 8)
    with intercept(launches.append):
        a, *_ = pointwise.normalise(x, Norm(None, None, None, 0.0, False), True, True, x.dtype)
    assert not launches
    assert a.data_ptr() == x.data_ptr()


def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitkern.kernels import _op, norm_linear

    wide = torch.randn(2, 9000)
    with pytest.raises(ValueError, match=r"impl='cublas' can't run here: rows of 9000 values"):
        norm_linear(wide, torch.randn(4, 9000), impl="cublas")
    monkeypatch.setattr(_op, "INTERPRET", False)
    for op, sample in FORWARD:
        with pytest.raises(ValueError, match=r"impl='cublas' can't run here: .* CUDA tensors"):
            public(op, "cublas")(**sample.make("cpu", torch.float32))


@pytest.mark.parametrize("save", [None, "minimal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
@pytest.mark.parametrize(
    "impls", [("cublas", "cublas"), ("cublas", "triton"), ("triton", "cublas")]
)
def test_halves_of_a_block_are_nodes_on_it(
    impls: tuple[str, str], dtype: torch.dtype, save: str | None, kernel_device: str
) -> None:
    """Either op of a half may be this one, beside another kernel."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 9, 40, generator=generator).to(dtype) + 0.5 for _ in range(2))
    options: dict[str, Any] = {"embed_dim": 40, "num_heads": 2, "init_values": 1.0}

    def outcome(impl: Any, double: bool = False, **more: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        block = Block(ViTConfig(**options, **more, impl=impl)).to(kernel_device, dtype)
        given, start = x, grad
        if double:
            block, given, start = block.double(), x.double(), grad.double()
        leaves = {"x": given.to(kernel_device).requires_grad_(), **dict(block.named_parameters())}
        y = block(leaves["x"])
        if more:
            assert type(y.grad_fn).__name__ == "_MlpHalfBackward"
        found = torch.autograd.grad(y, list(leaves.values()), start.to(kernel_device))
        return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}

    ours = dict(zip(("norm_linear", "linear_residual"), impls, strict=True))
    actual = outcome({**ours, "attention": "triton"}, save=save)
    eager = outcome({**dict.fromkeys(ours, "torch"), "attention": "sdpa"})
    exact = outcome("reference", double=True)
    assert_within_budget(exact, actual.values(), eager.values(), exact.values())


@pytest.mark.gpu
def test_weight_gradients_leave_the_product_in_float32() -> None:
    a, b = (torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    exact = a.double() @ b.double().t()
    found = cublas.product(a, b.t(), torch.float32)
    assert (found - exact).norm() / exact.norm() < 1e-4  # rounded to bfloat16 it would be 1.7e-3
