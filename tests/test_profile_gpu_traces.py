"""What GPUs' traces have beyond the simplest: copies over PCIe, several streams, CUDA graphs, steps
without kernels, and everything that Kineto writes beside what is looked at.

No GPU was near: the traces are made up, in Kineto's format as PyTorch 2.8 to 2.11 writes it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_profile import CEILINGS, ENGINE, MAIN, MM, NORM, Maker, analysed, titles, training
from vitkern.kernels import REGISTRY
from vitkern.kernels._op import Op, Sample
from vitkern.profile import counting, report
from vitkern.profile.analysis import analyse
from vitkern.profile.figures import Analysis
from vitkern.profile.trace import load, parse

COPY = {
    "Input Dims": [[1024, 1024], [1024, 1024], []],
    "Input type": ["c10::BFloat16", "float", "Scalar"],
    "Input Strides": [[1024, 1], [1024, 1], []],
    "Concrete Inputs": ["", "", "False"],
}
SIZE = 4096 * 1024 * 2


def rows(a: Analysis) -> dict[str, Any]:
    return {row.op: row for row in a.rows}


def adds_up(a: Analysis) -> None:
    """Shares of ops and idle time, and phases, are a step's."""
    assert sum(r.share for r in a.rows) + a.idle.share == pytest.approx(1)
    assert sum(p.seconds for p in a.phases) == pytest.approx(a.seconds)
    assert sum(p.busy for p in a.phases) == pytest.approx(sum(r.seconds for r in a.rows))


# Copies


@pytest.mark.parametrize("name", ["Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH"])
def test_a_copy_over_pcie_is_a_row_of_its_own_without_a_roofline(name: str) -> None:
    made = Maker()
    made.host("aten::copy_", 0, 10, **COPY)
    made.kernel(name, 2, 10, 410, cat="gpu_memcpy", call="cudaMemcpyAsync", bytes=SIZE)
    made.host("aten::copy_", 20, 30, **COPY)  # a cast
    made.kernel("elementwise", 22, 410, 420)
    made.host("aten::copy_", 40, 50, **COPY)
    made.kernel("Memcpy DtoD (Device -> Device)", 42, 420, 430, cat="gpu_memcpy", bytes=SIZE)
    found = rows(analysed(made, 0))
    assert set(found) == {name.partition(" (")[0], "aten::copy_"}
    copy, cast = found[name.partition(" (")[0]], found["aten::copy_"]
    assert (copy.seconds, copy.launches, copy.bytes) == (pytest.approx(400e-6), 1, SIZE)
    assert copy.bytes_per_s == pytest.approx(SIZE / 400e-6)
    assert (copy.roofline, copy.bound) == (None, "")
    assert cast.calls == 2
    assert cast.roofline == pytest.approx(2 * 6 * 1024**2 / 3e12 / 20e-6)


# Several streams


def beside() -> Maker:
    """Four products, 100 us each, and a collective from the second to beyond the end."""
    made = Maker()
    for i in range(4):
        made.host("aten::mm", 10 * i, 10 * i + 8, **MM)
        made.kernel("gemm", 10 * i + 2, 100 * (i + 1), 100 * (i + 2))
    made.kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)", 45, 250, 650, tid=MAIN, stream=20)
    made.events[-1]["tid"] = 20
    return made


def test_what_runs_beside_a_busier_stream_is_hidden() -> None:
    a = analysed(beside(), 0)
    found = rows(a)
    product, collective = found["aten::mm"], found["ncclDevKernel_AllReduce_Sum_f32_RING_LL"]
    assert [product.seconds, product.hidden] == pytest.approx([400e-6, 0])
    assert [collective.seconds, collective.hidden] == pytest.approx([150e-6, 250e-6])
    adds_up(a)
    verdict = titles(a)["Kernels ran beside others"]
    assert "0.25 ms a step ran while another stream was busy: nccl" in verdict.evidence


def test_rates_are_over_all_the_time_that_a_kernel_ran() -> None:
    """Products on both streams, the whole of one behind the others."""
    made = Maker()
    for i in range(3):
        made.host("aten::mm", 10 * i, 10 * i + 8, **MM)
        made.kernel("gemm", 10 * i + 2, 100 * (i + 1), 100 * (i + 2))
    made.host("aten::mm", 40, 48, **MM)
    made.kernel("gemm", 42, 150, 350)
    made.events[-1]["tid"] = 20
    a = analysed(made, 0)
    (product,) = a.rows
    assert [product.seconds, product.hidden] == pytest.approx([300e-6, 200e-6])
    assert product.flops_per_s == pytest.approx(4 * 2 * 4096 * 1024 * 2048 / 500e-6)
    assert product.roofline == pytest.approx(product.flops_per_s / 8e14)
    adds_up(a)


def test_one_stream_hides_nothing() -> None:
    a = analysed(training())
    assert all(r.hidden == pytest.approx(0) for r in a.rows)
    assert "Kernels ran beside others" not in titles(a)
    adds_up(a)


# CUDA graphs


def graph(steps: int = 2) -> Maker:
    """Steps of 1,000 us: the images are copied, a graph runs, its result is read; idle between."""
    made = Maker()
    made.mark("vitkern begin", -0.5)
    made.host("aten::empty", -0.4, -0.3)
    made.memory(-0.2, 6 << 30)
    for t in range(0, 1000 * steps, 1000):
        made.host("aten::copy_", t + 5, t + 10, **COPY)
        made.kernel("elementwise", t + 6, t + 10, t + 20)
        made.kernel(
            "void cutlass::Kernel2<tile<128> >(params)", t + 400, t + 410, t + 510,
            call="cudaGraphLaunch", launches=5, **{"External id": made.number - 1},
        )  # fmt: skip
        made.host("aten::mm", t + 405, t + 420, **MM)
        made.kernel("gemm", t + 411, t + 910, t + 970)
        made.mark(f"vitkern step {t // 1000}", t + 999)
    return made


def test_kernels_of_a_graph_stay_their_own_though_they_carry_an_ops_number() -> None:
    a = analysed(graph(), 0)
    assert rows(a)["cutlass::Kernel2"].launches == 5
    assert a.graph_launches == 1


def test_a_graphs_step_holds_what_was_held_when_it_began() -> None:
    memory = analysed(graph(), 0).memory
    assert memory.peak == 6 << 30
    assert memory.curve[0] == (0.0, 6 << 30)


def test_what_was_held_before_the_first_event() -> None:
    """A release of 2 of 5 GiB within the step."""
    made = Maker()
    made.host("aten::mm", 0, 50, **MM)
    made.kernel("gemm", 20, 60, 100)
    made.memory(30, 3 << 30)
    made.events[-1]["args"]["Bytes"] = -(2 << 30)
    assert analysed(made, 0).memory.peak == 5 << 30


def test_advice_where_graphs_run_already() -> None:
    a = analysed(graph(), 0)
    verdict = titles(a)["The GPU waits for Python"]
    # The longest gap, 400 us before the product, is one of the device: it had been launched.
    assert a.idle.longest == pytest.approx(400e-6)
    assert a.idle.causes["device"] == pytest.approx(400e-6)
    assert "longest for 0.39 ms before cutlass::Kernel2" in verdict.evidence
    assert "7 kernels and copies a step. CUDA graphs were replayed 1.0 times" in verdict.evidence
    assert verdict.advice.startswith("Capture more of the step")
    assert "A larger batch would fit" not in verdict.advice  # a graph's own memory is not known
    assert "vitkern.capture" not in verdict.advice


def test_no_mfu_where_a_graph_hides_products() -> None:
    a = analysed(graph(), 0)
    assert rows(a)["aten::mm"].flops  # some are known
    assert a.unseen == pytest.approx(100 / 170)
    assert (a.model_flops, a.utilisation) == (None, {})
    assert "59% of the forward pass" in titles(a)["The model's FLOPs are unknown"].evidence


@pytest.mark.parametrize(
    ("name", "op", "phase", "hides"),
    [
        ("triton_poi_fused_gelu_0", None, "forward", False),
        ("ncclDevKernel_AllGather_RING_LL(args)", "c10d::_allgather_base_", "forward", False),
        ("triton_tem_fused_mm_1", None, "forward", True),
        ("flash_fwd_kernel", "flash_attn::_flash_attn_forward", "forward", True),
        ("flash_bwd_kernel", None, "backward", False),
        ("cat", "aten::cat", "forward", False),
    ],
)
def test_which_kernels_may_hide_products(
    name: str, op: str | None, phase: str, hides: bool
) -> None:
    made = Maker()
    made.host("aten::mm", 0, 10, **MM)
    made.kernel("gemm", 2, 20, 60)
    made.host(phase, 10, 30, cat="user_annotation")
    made.host(op or name, 12, 28)
    made.kernel(name, 15, 60, 100)
    a = analysed(made, 0)
    assert a.unseen == (pytest.approx(0.5) if hides else 0)
    assert (a.utilisation == {}) == hides


# Steps without kernels


def test_a_step_without_kernels_while_the_gpu_lags_has_no_length() -> None:
    made = Maker()
    made.mark("vitkern begin", -0.5)
    for i in range(3):
        made.host("aten::mm", 100 * i + 10, 100 * i + 20, **MM)
        if i != 1:
            made.kernel("gemm", 100 * i + 12, 1000 + 300 * i, 1300 + 300 * i)
        made.mark(f"vitkern step {i}", 100 * i + 99)
    a = analysed(made, 0)
    assert a.step_seconds == pytest.approx([1300e-6, 0, 600e-6])
    adds_up(a)


def test_a_step_in_which_nothing_runs_is_idle() -> None:
    made = Maker()
    made.mark("vitkern begin", -0.5)
    made.host("aten::mm", 10, 20, **MM)
    made.kernel("gemm", 12, 20, 60)
    made.mark("vitkern step 0", 99.5)
    made.mark("vitkern step 1", 199.5)
    a = analysed(made, 0)
    assert a.step_seconds == pytest.approx([60e-6, 140e-6])
    assert a.idle.longest_late_before == "the step's end"
    adds_up(a)


def test_steps_of_no_length_make_a_report() -> None:
    """All kernels were those of the steps that are left out."""
    made = Maker()
    made.mark("vitkern begin", -0.5)
    made.host("aten::mm", 10, 20, **MM)
    made.kernel("gemm", 12, 1000, 2000)
    made.mark("vitkern step 0", 99.5)
    made.mark("vitkern step 1", 199.5)
    a = analysed(made, 1, images=[4, 4])
    assert (a.seconds, a.images_per_s, a.utilisation, a.rows) == (0, None, {}, [])
    assert "Nothing ran in these steps" in report.html(a)


# As Kineto writes it


def captured() -> dict[str, Any]:
    """A step as recorded: layer_norm on ATen, forward and backward, and a memset on a side stream.

    Numbers ("External id") and correlations of an op and its kernels differ; kernels and calls both
    carry the number, and one call is on a thread that no op is on.
    """
    engine = "autograd::engine::evaluate_function: NativeLayerNormBackward0"
    backward = {"Sequence number": 7, "Fwd thread id": 1}
    host = [
        ("user_annotation", "vitkern begin", -2, -1, MAIN, {"External id": 1}),
        ("cpu_op", "vitkern::layer_norm", 0, 100, MAIN, {"External id": 2, **NORM}),
        ("cpu_op", "aten::native_layer_norm", 10, 90, MAIN,
         {"External id": 3, "Sequence number": 7, "Fwd thread id": 0}),
        ("cuda_runtime", "cudaLaunchKernel", 20, 25, MAIN,
         {"External id": 3, "cbid": 211, "correlation": 301}),
        ("cpu_op", "aten::zeros", 110, 140, MAIN, {"External id": 4}),
        ("cpu_op", "aten::zero_", 112, 138, MAIN, {"External id": 5}),
        ("cuda_runtime", "cudaMemsetAsync", 120, 125, MAIN + 5,
         {"External id": 5, "cbid": 51, "correlation": 302}),
        ("cpu_op", engine, 200, 300, ENGINE, {"External id": 6, **backward}),
        ("cpu_op", "NativeLayerNormBackward0", 205, 295, ENGINE, {"External id": 7, **backward}),
        ("cpu_op", "aten::native_layer_norm_backward", 210, 290, ENGINE, {"External id": 8}),
        ("cuda_driver", "cuLaunchKernelEx", 220, 225, ENGINE,
         {"External id": 8, "cbid": 652, "correlation": 303}),
        ("cuda_runtime", "cudaStreamSynchronize", 310, 900, MAIN,
         {"External id": 0, "cbid": 131, "correlation": 304}),
        ("user_annotation", "vitkern step 0", 950, 951, MAIN, {"External id": 9}),
    ]  # fmt: skip
    place = {"device": 0, "context": 1, "stream": 7}
    kernel = {"queued": 0, **place, "registers per thread": 32, "grid": [1, 1, 1]}
    name = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>(int)"
    grad = "void at::native::layer_norm_grad_input_kernel<float>(float const*)"
    device = [
        ("kernel", name, 100, 300, 7, {"External id": 3, "correlation": 301, **kernel}),
        ("gpu_memset", "Memset (Device)", 250, 350, 13,
         {"External id": 5, "correlation": 302, **place, "stream": 13, "bytes": 4096}),
        ("kernel", grad, 350, 750, 7, {"External id": 8, "correlation": 303, **kernel}),
        ("gpu_user_annotation", "vitkern step 0", 100, 750, 7, {"External id": 9}),
        ("cuda_sync", "Stream Synchronize", 310, 900, 7,
         {"cuda_sync_kind": "Stream Synchronize", "stream": 7, "correlation": 304, "device": 0}),
    ]  # fmt: skip
    base = 6_125_442_118_331.902
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "ts": base + start,
         "dur": end - start, "args": args}
        for pid, spans in ((3412, host), (0, device))
        for category, name, start, end, tid, args in spans
    ]  # fmt: skip
    flow = {"cat": "ac2g", "name": "ac2g", "id": 301, "pid": 3412, "tid": MAIN, "ts": base + 20}
    whole = {
        "cat": "Trace",
        "name": "PyTorch Profiler (0)",
        "pid": "Spans",
        "tid": "PyTorch Profiler",
    }
    events += [
        {"ph": "s", **flow},
        {"ph": "f", "bp": "e", **flow, "pid": 0, "tid": 7, "ts": base + 100},
        {"ph": "X", **whole, "ts": base - 500, "dur": 90_000},
        {"ph": "i", "name": "Iteration Start: PyTorch Profiler", "s": "g", "pid": "Traces",
         "tid": "Trace PyTorch Profiler", "ts": base - 500},
        {"ph": "M", "name": "process_labels", "pid": 0, "tid": 0, "ts": base, "args": {}},
    ]  # fmt: skip
    card = {"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 85_029_158_912}
    return {"schemaVersion": 1, "deviceProperties": [card], "traceEvents": events}


def test_a_trace_as_it_is_captured() -> None:
    contents: dict[str, Any] = json.loads(json.dumps(captured()))
    a = analyse(parse(contents), 0, CEILINGS)
    found = rows(a)
    assert {op: round(1e6 * (r.seconds + r.hidden), 1) for op, r in found.items()} == {
        "layer_norm": 200,
        "aten::zeros": 100,  # whose call is within no op of its thread
        "layer_norm (backward)": 400,
    }
    assert {op: r.implementation for op, r in found.items() if r.implementation} == {
        "layer_norm": "ATen",
        "layer_norm (backward)": "ATen",
    }
    assert found["layer_norm (backward)"].phase == "backward"
    assert found["aten::zeros"].hidden == pytest.approx(50e-6)  # beside layer_norm
    assert (a.launches, a.synchronisations, a.trains) == (3, 1, True)
    adds_up(a)


def test_an_ops_number_goes_before_what_surrounds_the_call() -> None:
    """Times are rounded, and a call may seem to be within the op beside its own."""
    made = Maker()
    made.host("aten::mm", 0, 10, **{"External id": 5001}, **MM)
    made.host("aten::copy_", 10, 20, **{"External id": 5002}, **COPY)
    made.kernel("gemm", 11, 30, 130, **{"External id": 5001})
    assert set(rows(analysed(made, 0))) == {"aten::mm"}


# What the dispatcher's record tells of a call: no strings


def samples() -> list[Any]:
    return [
        pytest.param(op, sample, id=f"{op.name}-{sample.label}")
        for op in REGISTRY.values()
        for sample in list(op.samples("tiny"))[:3]
    ]


def recorded(op: Op, arguments: dict[str, Any], path: Path) -> counting.Cost:
    """The cost of a call of an operator, read from a trace of it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        op.call(**arguments)
    profiler.export_chrome_trace(str(path))
    spans = [s for s in parse(load(path)).host if s.name == f"vitkern::{op.name}"]
    cost = counting.cost(spans[0])
    assert cost is not None
    return cost


@pytest.mark.parametrize(("op", "sample"), samples())
def test_figures_of_an_operators_call(op: Op, sample: Sample, tmp_path: Path) -> None:
    arguments = sample.make("cpu", torch.float32)
    cost = recorded(op, arguments, tmp_path / "trace.json")
    assert cost.flops == op.flops(**arguments)
    if op.name == "norm_linear" and not arguments["gated"]:
        # Narrower than any MLP: taken for q, k and v, without what is kept for an activation.
        arguments["activation"] = ""
    assert cost.bytes == op.bytes_moved(**arguments)


@pytest.mark.parametrize(
    ("features", "activation", "gated"),
    [(48, "", False), (96, "", False), (144, "", False), (192, "gelu", False), (64, "silu", True)],
)
def test_an_activation_is_told_from_the_width(
    features: int, activation: str, gated: bool, tmp_path: Path
) -> None:
    """q, k and v or one or two of them (the class token's block), and first layers of MLPs."""
    op, width = REGISTRY["norm_linear"], 48
    sample = next(iter(op.samples("tiny")))
    arguments = sample.make("cpu", torch.float32)
    arguments |= {
        "x": torch.randn(2, 5, width),
        "norm_weight": torch.ones(width),
        "norm_bias": torch.zeros(width),
        "weight": torch.randn(2 * features if gated else features, width),
        "bias": torch.zeros(2 * features if gated else features),
        "activation": activation,
        "gated": gated,
        "need_saved": True,
    }
    cost = recorded(op, arguments, tmp_path / "trace.json")
    assert cost.bytes == op.bytes_moved(**arguments)
