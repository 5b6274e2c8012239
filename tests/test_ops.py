"""Every op of REGISTRY, by its own samples: kernels against float64, gradients, strides, compilers.

A new op is tested by being defined; only what is particular to one op stands in its own file.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._cases import public, require_grads
from tests.error_budget import as_tuple, assert_within_budget, gradients, in_float64
from vitkern.kernels import REGISTRY
from vitkern.kernels._launch import intercept
from vitkern.kernels._op import Op, Sample

SAMPLES = [(op, sample) for op in REGISTRY.values() for sample in op.samples("tiny")]
KERNEL_SAMPLES = [(op, sample) for op, sample in SAMPLES if op.launcher is not None]
DIFFERENTIABLE = [(op, s) for op, s in KERNEL_SAMPLES if op.backward_of is None]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def name(value: Any) -> str:
    return value.name if isinstance(value, Op) else getattr(value, "label", str(value)[6:])


def skip_unless_kernels_take(dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 products are wrong; bfloat16 runs on GPUs only")


def restride(t: Tensor, kind: str) -> Tensor:
    """`t` with other strides; "expanded" repeats its first sample with stride 0."""
    if kind == "sliced":
        return torch.stack([t, torch.full_like(t, 7)], dim=-1)[..., 0]
    if kind == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    assert kind == "expanded"
    return t[:1].expand(t.shape) if t.dim() > 1 else t


def with_strides(arguments: dict[str, Any], kind: str) -> dict[str, Any]:
    return {k: restride(v, kind) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=name)
def test_portable_is_the_reference(op: Op, sample: Sample) -> None:
    arguments = in_float64(sample.make("cpu", torch.float64))
    for p, r in zip(
        as_tuple(op.portable(**arguments)), as_tuple(op.reference(**arguments)), strict=True
    ):
        torch.testing.assert_close(p, r, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strides", ["dense", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("op", "sample"), KERNEL_SAMPLES, ids=name)
def test_kernel_is_within_the_error_budget(
    op: Op, sample: Sample, dtype: torch.dtype, strides: str, kernel_device: str
) -> None:
    skip_unless_kernels_take(dtype, kernel_device)
    arguments = sample.make(kernel_device, dtype)
    if strides != "dense":
        arguments = sample.complete(with_strides(arguments, strides))
    actual = as_tuple(op.launcher(**arguments))
    eager = as_tuple(op.portable(**arguments))
    exact = as_tuple(op.reference(**in_float64(arguments)))
    assert_within_budget([f"output {i}" for i in range(len(exact))], actual, eager, exact)
    fake = as_tuple(op.fake(**{k: on_meta(v) for k, v in arguments.items()}))
    for made_by, outputs in (("kernel", actual), ("portable", eager)):
        for o, f in zip(outputs, fake, strict=True):
            assert (o.shape, o.dtype) == (f.shape, f.dtype), made_by
            if o.numel():
                assert o.stride() == f.stride(), made_by


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(("op", "sample"), DIFFERENTIABLE, ids=name)
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
        "sliced": tuple(restride(g, "sliced") for g in dense),
        "transposed": tuple(restride(g, "transposed") for g in dense),
        "expanded": tuple(restride(g, "expanded") for g in dense),
        "stride 0, as of .sum()": tuple(one.to(o.dtype).expand(o.shape) for o in outputs),
        "a slice of a cat": tuple(torch.cat([g, g], dim=-1)[..., : g.shape[-1]] for g in dense),
    }.items():
        actual, _ = gradients(public(op, "triton"), arguments, grads)
        eager, _ = gradients(public(op, op.portable_name), arguments, grads)
        exact, _ = gradients(
            public(op, "reference"), in_float64(arguments), tuple(g.double() for g in grads)
        )
        names = [f"gradient of {k} ({kind})" for k in exact]
        assert_within_budget(names, actual.values(), eager.values(), exact.values())


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=name)
def test_opcheck(op: Op, sample: Sample) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.library.opcheck(op.call, (), sample.make(device, torch.float32))


@pytest.mark.parametrize(("op", "sample"), DIFFERENTIABLE, ids=name)
def test_compiles_to_one_graph_with_its_gradient(
    op: Op, sample: Sample, kernel_device: str
) -> None:
    arguments = require_grads(sample.make(kernel_device, torch.float32))
    for impl in ("triton", "auto"):
        function = public(op, impl)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        outputs = as_tuple(function(**arguments))
        grads = tuple(torch.ones_like(o) for o in outputs)
        expected, outputs = gradients(function, arguments, grads)
        actual, compiled_outputs = gradients(compiled, arguments, grads)
        for a, e in zip(compiled_outputs, outputs, strict=True):
            torch.testing.assert_close(a, e)
        for k, e in expected.items():
            torch.testing.assert_close(actual[k], e, msg=k)
        torch.compiler.reset()


@pytest.mark.parametrize(("op", "sample"), KERNEL_SAMPLES, ids=name)
def test_equal_inputs_give_equal_bits(op: Op, sample: Sample, kernel_device: str) -> None:
    arguments = sample.make(kernel_device, torch.float32)
    first, second = (as_tuple(op.launcher(**arguments)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("op", "sample"), KERNEL_SAMPLES, ids=name)
def test_grids_use_the_axis_without_a_limit(op: Op, sample: Sample) -> None:
    """Axes 1 and 2 of a CUDA grid end at 65,535; the interpreter would not tell."""
    grids: list[tuple[int, ...]] = []
    arguments = sample.make("meta", torch.float32)
    with intercept(lambda launch: grids.append(launch.grid)):
        op.launcher(**arguments)
    assert all(len(grid) == 1 and grid[0] > 0 for grid in grids)


@pytest.mark.parametrize(("op", "sample"), SAMPLES, ids=name)
def test_costs_are_declared(op: Op, sample: Sample) -> None:
    arguments = sample.make("meta", torch.float32)
    empty = any(isinstance(v, Tensor) and v.dim() and v.shape[0] == 0 for v in arguments.values())
    for cost in (op.flops(**arguments), op.bytes_moved(**arguments)):
        assert isinstance(cost, int)
        assert cost > 0 or (empty and cost == 0)


def test_every_op_has_samples_of_both_sizes() -> None:
    for op in REGISTRY.values():
        for size in ("tiny", "vit"):
            labels = [s.label for s in op.samples(size)]
            assert labels, (op.name, size)
            assert len(set(labels)) == len(labels), (op.name, size)
