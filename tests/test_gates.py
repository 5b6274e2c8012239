"""The gates fail when they should: each is shown a kernel or a result that is wrong on purpose."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import _offline, _sanitize
from benchmarks.__main__ import main
from benchmarks._cases import Case, save
from benchmarks._measure import parity
from vitkern.kernels import REGISTRY
from vitkern.kernels._launch import launch
from vitkern.kernels._op import Arg, Sample
from vitkern.kernels._triton import INTERPRET, TRITON_MISSING, jit, tl

LAYER_NORM = REGISTRY["layer_norm"]
interpreted = pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")

GOOD_ROW: _offline.Row = {
    "arch": 90,
    "num_warps": 4,
    "spill_bytes": 0,
    "local_loads": 0,
    "local_stores": 0,
    "shared_bytes": 65_536,
    "tensor_core": {"HGMMA": 8},
    "dots": [{"m": 64, "n": 64, "k": 32, "operand": "bf16", "precision": "tf32"}],
}


def row(**changes: Any) -> _offline.Row:
    return {**GOOD_ROW, **changes}


def dot(**changes: Any) -> list[_offline.Row]:
    return [{**GOOD_ROW["dots"][0], **changes}]


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "blocks"),
    [
        # 32 * 32 = 1,024 registers a warp, 16 in a quarter, so all 64 warps.
        (80, 8, 32, 0, 8),
        # 33 registers are 1,056 a warp, handed out as 1,280: 12 in a quarter, 48 in all.
        (80, 8, 33, 0, 6),
        # 168 * 32 = 5,376 = 21 * 256: 3 in a quarter, 12 in all.
        (90, 4, 168, 0, 3),
        # 96 * 32 = 3,072: 5 in a quarter, 20 in all, though 65,536 / 3,072 is 21.
        (90, 1, 96, 0, 20),
        # 255 * 32 = 8,160, handed out as 8,192: 2 in a quarter, 8 in all.
        (90, 8, 255, 0, 1),
        (90, 16, 255, 0, 0),
        # 49,152 + 1,024 = 50,176 bytes: 3 in 167,936, 4 in 233,472, 2 in 102,400.
        (80, 4, 64, 49_152, 3),
        (90, 4, 64, 49_152, 4),
        (86, 4, 64, 49_152, 2),
        # 57,345 + 1,024 = 58,369, handed out as 58,496: 3; one byte less is 58,368, a quarter.
        (90, 4, 64, 57_345, 3),
        (90, 4, 64, 57_344, 4),
        (90, 4, 64, 232_448, 1),
        (90, 4, 64, 232_449, 0),
        # One warp a block: as many as the card takes blocks.
        (80, 1, 16, 0, 32),
        (86, 1, 16, 0, 16),
        (89, 1, 16, 0, 24),
        (89, 4, 16, 0, 12),
    ],
)
def test_resident_blocks(arch: int, warps: int, registers: int, shared: int, blocks: int) -> None:
    assert _offline.MULTIPROCESSORS[arch].resident(warps, registers, shared) == blocks


def test_results_are_saved_into_a_folder_that_was_not_there(tmp_path: Path) -> None:
    save(tmp_path / "new" / "one" / "rows.json", "[]\n")
    assert (tmp_path / "new" / "one" / "rows.json").read_text() == "[]\n"


def test_the_markdown_has_a_table_a_kernel_and_a_line_a_compilation() -> None:
    def compiled(kernel: str, **changes: Any) -> _offline.Row:
        about = {
            "op": "attention", "kernel": kernel, "sample": "N=197", "dtype": "bfloat16",
            "config": "BLOCK_M=64", "blocks": "M=64", "num_stages": 2, "registers": 168,
            "blocks_per_sm": 3, "occupancy_percent": 18,
        }  # fmt: skip
        return row(**{**about, **changes})

    broken = compiled("a.forward", sample="N=50", error="no")
    for missing in ("registers", "spill_bytes", "shared_bytes", "blocks_per_sm", "dots"):
        del broken[missing]
    text = _offline.markdown(
        [
            compiled("b.backward", spill_bytes=8, tensor_core={"HGMMA": 8, "HMMA": 4}),
            compiled("a.forward", sample="N=1370"),
            compiled("a.forward", dtype="float32", dots=dot(operand="f32"), arch=80),
            compiled("a.forward"),
            broken,
        ],
        "3.9.0",
        "python -m benchmarks offline --op attention",
    )
    head, first, second = text.split("\n## ")
    assert "Triton 3.9.0, `python -m benchmarks offline --op attention`" in head
    assert "not a measurement" in head
    tables = []
    for part in (first, second):
        lines = part.strip().splitlines()[2:]
        assert len({len(line) for line in lines}) == 1
        tables.append([[cell.strip() for cell in line[1:-1].split("|")] for line in lines])
    assert [line[1:4] for line in tables[0][2:]] == [
        ["N=50", "bfloat16", "90"],
        ["N=197", "bfloat16", "90"],
        ["N=197", "float32 tf32", "80"],
        ["N=1370", "bfloat16", "90"],
    ]
    assert tables[0][2][-1] == "does not compile"
    assert dict(zip(tables[1][0], tables[1][2], strict=True)) == {
        "op": "attention", "sample": "N=197", "dtype": "bfloat16", "sm": "90", "blocks": "M=64",
        "warps": "4", "stages": "2", "registers": "168", "spill": "8", "shared": "65,536",
        "blocks/SM": "3", "occupancy": "18 %", "tensor cores": "8 HGMMA 4 HMMA",
    }  # fmt: skip


@pytest.mark.parametrize(
    "good",
    [
        row(),
        row(arch=80, tensor_core={"HMMA": 16}),
        row(shared_bytes=232_448),
        row(tensor_core={}, dots=[]),
        row(tensor_core={}, dots=dot(operand="f32", precision="ieee")),
        row(tensor_core={"HMMA": 4}, dots=dot(m=32)),
        row(tensor_core={"HMMA": 4}, num_warps=2),
    ],
)
def test_the_judge_passes(good: _offline.Row) -> None:
    assert _offline.judge(good) == []


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (row(spill_bytes=24, local_stores=6, local_loads=5), "spills 24 bytes"),
        (row(shared_bytes=232_449), "shared memory 232,449 bytes, sm_90 has 232,448"),
        (row(arch=80, tensor_core={"HMMA": 1}, shared_bytes=166_913), "sm_80 has 166,912"),
        (row(arch=86, tensor_core={"HMMA": 1}, shared_bytes=101_377), "sm_86 has 101,376"),
        (row(arch=80, tensor_core={}), "without tensor-core instructions"),
        (row(tensor_core={}, dots=dot(operand="f32")), "without tensor-core instructions"),
        (row(tensor_core={"HMMA": 64}), "64 rows without HGMMA"),
        ({"error": "CompilationError: no"}, "does not compile"),
    ],
)
def test_the_judge_fails(bad: _offline.Row, text: str) -> None:
    (problem,) = _offline.judge(bad)
    assert text in problem


# Compiled in a process of its own: in this one kernels are interpreted.
KERNELS = '''
import json, sys
from types import SimpleNamespace
import torch
from benchmarks import _offline
from benchmarks._cases import Case
from vitkern.kernels._launch import Launch
from vitkern.kernels._op import Arg, Sample
from vitkern.kernels._triton import jit, tl


@jit
def spilling(x, N: tl.constexpr):
    """Holds N squared values in 32 lanes, over a barrier that no compiler moves them across."""
    i = tl.arange(0, N)
    value = tl.load(x + i[:, None] * N + i[None, :])
    total = tl.sum(tl.sum(value, 1), 0)
    tl.store(x + i[:, None] * N + i[None, :], value / total)


@jit
def product(x, PRECISION: tl.constexpr):
    i = tl.arange(0, 64)
    tile = x + i[:, None] * 64 + i[None, :]
    a = tl.load(tile)
    tl.store(tile, tl.dot(a, a, input_precision=PRECISION).to(a.dtype))


rows = []
for arch in (80, 90):
    for kernel, dtype, constexprs, warps in (
        (spilling, torch.float32, {"N": 128}, 1),
        (product, torch.bfloat16, {"PRECISION": "tf32"}, 4),
        (product, torch.float32, {"PRECISION": "ieee"}, 4),
    ):
        case = Case(SimpleNamespace(name="made up"), "tiny", Sample("-", {}), dtype)
        x = torch.empty(128, 128, dtype=dtype, device="meta")
        launch = Launch(kernel, (1,), (x,), constexprs, warps, 2)
        rows.append(_offline.compile_job(_offline.make_job(case, launch, arch)))
print(json.dumps(rows))
'''


@pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))
def test_a_spill_shows_and_tensor_cores_are_counted(tmp_path: Path) -> None:
    script = tmp_path / "kernels_to_compile.py"
    script.write_text(KERNELS)
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for spilling, product, exact in zip(*[iter(json.loads(done.stdout))] * 3, strict=True):
        assert "spills" in _offline.judge(spilling)[0]
        assert spilling["local_stores"] > 0
        assert product["kernel"] == "main.product"
        processor = _offline.MULTIPROCESSORS[product["arch"]]
        resident = processor.resident(4, product["registers"], product["shared_bytes"])
        assert product["blocks_per_sm"] == resident
        assert product["occupancy_percent"] == 100 * 4 * resident // 64
        assert list(product["tensor_core"]) == ["HMMA" if product["arch"] == 80 else "HGMMA"]
        assert product["dots"] == [
            {"m": 64, "n": 64, "k": 64, "operand": "bf16", "precision": "tf32"}
        ]
        assert exact["tensor_core"] == {}
        assert exact["dots"][0]["precision"] == "ieee"
        assert _offline.judge(product) == []
        assert not any("tensor-core" in problem for problem in _offline.judge(exact))


@jit
def unmasked_copy(x, out, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    tl.store(out + offsets, value, mask=offsets < N)


@jit
def copy_of_the_first_programs(x, out, N, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < N
    tl.store(out + offsets, tl.load(x + offsets, mask=mask), mask=mask)


@jit
def copy_of_rows(x, out, stride, D, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + columns, mask=columns < D)
    tl.store(out + row * D + columns, value, mask=columns < D)


def run_copy(kernel: Any, x: Tensor, programs: int = 1, block: int = 8) -> Tensor:
    out = torch.empty(x.shape)
    launch(kernel, (programs,), x, out, x.numel(), BLOCK=block)
    return out


@interpreted
def test_a_missing_mask_is_caught_at_its_line() -> None:
    _, trace = _sanitize.run_exactly(lambda: run_copy(unmasked_copy, torch.ones(5)))
    (problem,) = trace.problems
    assert "unmasked_copy: 3 of 8 lanes of a load are out of bounds in program (0, 0, 0)" in problem
    assert problem.endswith("value = tl.load(x + offsets)")
    assert "test_gates.py" in problem


@interpreted
def test_the_gaps_of_a_view_are_out_of_bounds() -> None:
    _, trace = _sanitize.run_exactly(lambda: run_copy(unmasked_copy, torch.ones(8, 2)[:, 0]))
    assert "4 of 8 lanes of a load" in trace.problems[0]
    _, trace = _sanitize.run_exactly(lambda: run_copy(unmasked_copy, torch.ones(8)))
    assert trace.problems == []


@interpreted
def test_outputs_are_written_once() -> None:
    x = torch.ones(8)
    for programs, block, text in (
        (1, 8, None),
        (2, 8, "32 bytes 2 times"),
        (1, 4, "16 bytes 0 times, 16 bytes 1 times"),
    ):
        out, trace = _sanitize.run_exactly(
            lambda: run_copy(copy_of_the_first_programs, x, programs, block)  # noqa: B023
        )
        problems = _sanitize.check_writes([out], trace)
        assert (text is None and problems == []) or text in problems[0]
    unwritten, trace = _sanitize.run_exactly(lambda: torch.empty(3))
    assert "never written" in _sanitize.check_writes([unwritten], trace)[0]


@interpreted
@pytest.mark.parametrize(("declared", "right"), [(64, True), (63, False), (65, False)])
def test_the_declaration_is_held_against_the_traffic(declared: int, right: bool) -> None:
    x = torch.ones(8)
    op = SimpleNamespace(name="copy", bytes_moved=lambda x: declared)
    case = Case(op, "tiny", Sample("-", {}), torch.float32)
    out, trace = _sanitize.run_exactly(lambda: run_copy(unmasked_copy, x))
    traffic = _sanitize.measure_traffic(case, {"x": x}, [out], trace)
    assert (traffic.distinct, traffic.requested, traffic.scratch) == (64, 64, 0)
    assert (traffic.problem is None) == right


@interpreted
def test_a_missing_mask_is_caught_symbolically() -> None:
    pytest.importorskip("triton_viz", reason="triton-viz is not installed")
    found, refused = _sanitize.check_symbolically(lambda: run_copy(unmasked_copy, torch.ones(5)))
    assert refused == []
    assert "tl.load(x + offsets)" in found[0]


@interpreted
@pytest.mark.parametrize("columns", [5, 6])
def test_a_view_is_held_against_its_own_place_symbolically(columns: int) -> None:
    """The last of three parts, as v in qkv; where it has 5 columns, a sixth isn't its own."""
    pytest.importorskip("triton_viz", reason="triton-viz is not installed")
    part, out = torch.ones(4, 3, 5)[:, 2], torch.empty(4, columns)

    def run() -> None:
        launch(copy_of_rows, (4,), part, out, part.stride(0), columns, BLOCK=8)

    found, refused = _sanitize.check_symbolically(run)
    assert refused == []
    assert [("tl.load(x" in problem) for problem in found] == [True] * (columns - 5)


@pytest.mark.parametrize("view", _sanitize.VIEWS)
def test_views_keep_given_values_and_what_follows_from_others(view: str) -> None:
    sample = Sample(
        "-",
        {
            "x": Arg((4, 3)),
            "ends": Arg((4,), torch.int32, values=(0, 1, 1, 4)),
            "total": None,
        },
        derive=lambda arguments: {"total": arguments["x"].sum(0)},
    )
    made = sample.make("cpu", torch.float32)
    viewed = _sanitize.viewed(sample, made, view)
    assert viewed["ends"].tolist() == [0, 1, 1, 4]
    assert torch.equal(viewed["total"], viewed["x"].sum(0))
    assert viewed["total"].is_contiguous()
    assert viewed["x"].is_contiguous() == (view == "dense")
    assert torch.equal(viewed["x"], made["x"]) == (view != "expanded")


@interpreted
def test_traffic_counts_what_was_derived_anew() -> None:
    """A dense call reads the arguments that the last `derive` made, not those made before."""
    op = REGISTRY["attention_pool_backward"]
    saving = [s for s in op.samples("tiny") if s.derive is not None]
    case = Case(op, "tiny", saving[0], torch.float32)
    _, traffic, _ = _sanitize.check_exactly(case, "dense")
    assert traffic.problem is None


@interpreted
def test_sanitize_passes_and_fails_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    small = replace(LAYER_NORM, samples=lambda size: list(LAYER_NORM.samples(size))[:1])
    assert _sanitize.main([small], symbolic=False) == 0
    assert _sanitize.main([replace(small, bytes_moved=lambda **_: 1)], symbolic=False) == 1
    assert "FAIL layer_norm [ln" in capsys.readouterr().out


def test_parity_has_no_mercy_for_nan_shape_or_dtype() -> None:
    exact = torch.randn(64, dtype=torch.float64)
    eager = exact.float()
    assert parity([eager], [eager], [exact])["ok"]
    for bad in (eager * torch.nan, eager[:5], eager.double(), eager * 1.00001):
        assert not parity([bad], [eager], [exact])["ok"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["offline", "--arch", "75"], "--arch: 75 is not known; expected some of 80"),
        (["offline", "--op", "nothing"], "--op: unknown op 'nothing'"),
        (["gpu", "--minutes", "0", "--device", "cpu"], "--minutes: must be above 0"),
        (["report", "nowhere.jsonl"], "nowhere.jsonl"),
        (["proxies", "vit_bsae_patch16_224"], "vit_bsae_patch16_224"),
        (["proxies", "--batch", "0"], "batch must be 1 or more"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert text in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_command_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
