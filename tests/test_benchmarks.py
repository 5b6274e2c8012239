"""What is timed is what should be, and only after it was found right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import _cases, _gpu, test_ops
from benchmarks._cases import Case, cases, implementations, results, timed, unfit
from benchmarks._measure import parity
from tests.error_budget import as_tuple, in_float64
from vitkern import kernels
from vitkern.kernels import REGISTRY, layer_norm
from vitkern.kernels._op import Op

LAYER_NORM, LAYER_NORM_BACKWARD = REGISTRY["layer_norm"], REGISTRY["layer_norm_backward"]
BACKWARDS = [op for op in REGISTRY.values() if op.backward_of is not None]


def case_of(op: Op, number: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    return Case(op, "tiny", list(op.samples("tiny"))[number], dtype)


@pytest.mark.parametrize("size", ["tiny", "vit"])
@pytest.mark.parametrize("op", BACKWARDS, ids=lambda op: op.name)
def test_a_backward_case_finds_its_forward_pass(op: Op, size: str) -> None:
    found = []
    for case in cases([op], [size], [torch.float16]):  # every sample is for this one
        forward = case.forward
        assert forward.op.name == op.backward_of
        assert forward.forward is forward
        for name, arg in case.sample.args.items():
            assert arg is None or arg == forward.sample.args.get(name, arg), (case, name)
        for name, option in case.sample.options.items():
            assert option == forward.sample.options.get(name, option), (case, name)
        found.append(forward.sample.label)
    assert found == [sample.label for sample in REGISTRY[op.backward_of].samples(size)]


def test_samples_that_do_not_correspond_are_refused() -> None:
    samples = list(LAYER_NORM_BACKWARD.samples("tiny"))
    fewer = replace(LAYER_NORM_BACKWARD, samples=lambda size: samples[1:])
    with pytest.raises(ValueError, match="longer"):
        _ = replace(case_of(LAYER_NORM_BACKWARD, -1), op=fewer).forward
    turned = replace(LAYER_NORM_BACKWARD, samples=lambda size: samples[::-1])
    with pytest.raises(ValueError, match=r"layer_norm_backward .* of layer_norm there is"):
        _ = replace(case_of(LAYER_NORM_BACKWARD), op=turned).forward


@pytest.mark.parametrize("op", BACKWARDS, ids=lambda op: op.name)
def test_the_graph_is_built_once_and_walked_again_and_again(op: Op) -> None:
    case = case_of(op)
    arguments = case.arguments("cpu")
    passes: list[int] = []

    def counted(**given: Any) -> Any:
        passes.append(1)
        return implementations(case)["reference"](**given)

    call = timed(case, counted, arguments)
    first, second = call(), call()
    assert len(passes) == 1
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = results(case, implementations(case)["reference"], in_float64(arguments))
    portable = results(case, implementations(case)[op.portable_name], arguments)
    assert parity(first, portable, exact)["ok"]


def test_only_the_gradients_that_the_sample_needs_are_computed() -> None:
    wanted = {}
    for size, device in (("tiny", "cpu"), ("vit", "meta")):
        case = next(cases([REGISTRY["patch_embed_backward"]], [size]))
        arguments = case.arguments(device)
        wanted[size] = {
            k for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad
        }
    assert wanted["tiny"] == {"images", "weight", "bias", "pos_embed", "prefix"}
    assert wanted["vit"] == wanted["tiny"] - {"images"}
    rope = next(s for s in REGISTRY["attention"].samples("tiny") if s.args["sin"] is not None)
    made = _cases.require_grads(rope.make("cpu", torch.float32))
    assert made["qkv"].requires_grad
    assert not made["sin"].requires_grad


def test_a_forward_case_times_the_implementation_itself() -> None:
    case = case_of(LAYER_NORM)
    arguments = case.arguments("cpu")
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in arguments.values())
    call = timed(case, implementations(case)["torch"], arguments)
    assert torch.equal(call(), LAYER_NORM.portable(**arguments))


def test_unfit_tells_what_cannot_run_from_what_fails() -> None:
    case = case_of(LAYER_NORM, dtype=torch.float64)
    arguments = case.arguments("cpu")
    assert "layer_norm: impl='triton' can't run here" in unfit(case, "triton", arguments)
    assert unfit(case, "torch", arguments) is None
    assert unfit(case, "torch", {**arguments, "weight": None}) is None


def made_up(x: Tensor, weight: Tensor, bias: Tensor | None, *, impl: str, **options: Any) -> Tensor:
    """A public function: "absent" can't run, "broken" raises, "wrong" has wrong gradients."""
    if impl == "absent":
        raise ValueError("made_up: impl='absent' can't run here: it is not installed")
    if impl == "broken":
        raise ValueError("made_up: something else")
    out = layer_norm(
        x, weight, bias, impl="reference" if impl == "reference" else "torch", **options
    )
    return out + 0.01 * (x - x.detach()) if impl == "wrong" else out


@pytest.fixture
def made_up_ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, Op]:
    """An op with two samples and all sorts of implementations, and its backward."""

    def few(op: Op) -> Any:
        return lambda size: list(op.samples(size))[:2]

    def scaled(*args: Any, **options: Any) -> Any:
        return tuple(1.01 * t for t in as_tuple(LAYER_NORM_BACKWARD.portable(*args, **options)))

    def broken(**_: Any) -> Tensor:
        raise RuntimeError("broken")

    peers = {"absent": broken, "broken": broken, "wrong": LAYER_NORM.portable}
    forward = replace(
        LAYER_NORM, name="made_up", samples=few(LAYER_NORM), peers=peers, call=LAYER_NORM.portable
    )
    backward = replace(
        LAYER_NORM_BACKWARD,
        name="made_up_backward",
        backward_of="made_up",
        samples=few(LAYER_NORM_BACKWARD),
        call=LAYER_NORM_BACKWARD.portable,
    )
    bad_kernel = replace(backward, name="bad_backward", call=scaled)
    ops = {op.name: op for op in (forward, backward, bad_kernel)}
    for module in (_cases, _gpu, test_ops):
        monkeypatch.setattr(module, "REGISTRY", ops)
    monkeypatch.setattr(kernels, "made_up", made_up, raising=False)
    return ops


def test_gpu_command_rehearsed_on_a_cpu(tmp_path: Path, made_up_ops: dict[str, Op]) -> None:
    assert _gpu.main(1.0, tmp_path, torch.device("cpu")) == 1
    assert {p.name for p in tmp_path.iterdir()} == {
        "environment.json",
        "results.jsonl",
        "summary.md",
    }
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    def seen(kind: str, ok: bool | None = None) -> set[tuple[str, str]]:
        chosen = (r for r in rows if r["kind"] == kind and (ok is None or r["ok"] == ok))
        return {(r["case"].split(" ")[0], r["impl"]) for r in chosen}

    assert seen("op parity", ok=False) == {
        ("made_up", "broken"),
        ("made_up_backward", "broken"),
        ("made_up_backward", "wrong"),
        ("bad_backward", "broken"),
        ("bad_backward", "wrong"),
        ("bad_backward", "triton, by itself"),
    }
    assert seen("note") == {(op, "absent") for op in made_up_ops}
    assert ("made_up_backward", "triton, by itself") in seen("op parity", ok=True)
    assert seen("op time") == {
        ("made_up", "triton"),
        ("made_up", "wrong"),  # wrong in its gradients only
        ("made_up", "torch"),
        ("made_up", "compile(torch)"),
        ("made_up_backward", "triton"),
        ("made_up_backward", "torch"),
        ("made_up_backward", "compile(torch)"),
        ("bad_backward", "torch"),
        ("bad_backward", "compile(torch)"),
    }
    kinds = [r["kind"] for r in rows]
    assert kinds.index("op parity") < kinds.index("model parity") < kinds.index("op time")
    assert "model time" in kinds
    summary = (tmp_path / "summary.md").read_text()
    assert "FAILED" in summary
    reason = "made_up: impl='absent' can't run here: it is not installed"
    assert f"- left out of 6 op cases: {reason}" in summary


class Benchmark:
    """Stands in for pytest-benchmark."""

    def __init__(self) -> None:
        self.group = ""
        self.extra_info: dict[str, Any] = {}
        self.ran: list[Any] = []

    def __call__(self, function: Any) -> None:
        self.ran.append(function())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the shapes are large")
def test_benchmarks_check_before_they_time(made_up_ops: dict[str, Op]) -> None:
    for name in ("made_up", "made_up_backward"):
        case = case_of(made_up_ops[name])
        for impl in ("torch", "reference"):
            benchmark = Benchmark()
            test_ops.test_op(case, impl, benchmark)
            assert (len(benchmark.ran), benchmark.group) == (1, str(case))
            assert benchmark.extra_info["bytes"] > 0
        with pytest.raises(pytest.skip.Exception, match="it is not installed"):
            test_ops.test_op(case, "absent", benchmark)
        with pytest.raises((RuntimeError, ValueError), match=r"broken|something else"):
            test_ops.test_op(case, "broken", benchmark)
    with pytest.raises(AssertionError):
        test_ops.test_op(case, "wrong", benchmark)
    listed = {param.id for param in test_ops._runs()}
    assert f"{case} torch" in listed
    assert f"{case} triton" not in listed
