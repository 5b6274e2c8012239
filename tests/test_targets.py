"""Targets can be measured, and are judged by what was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import _gpu, _grid, _products
from benchmarks.__main__ import main
from benchmarks._contest import Bench, Unfit
from benchmarks._measure import Ceilings, Timer
from benchmarks._report import compare, main_targets, read, readme_table, report
from benchmarks._report.targets import PRODUCTS, TARGETS, Product, Target, order
from benchmarks._report.verdicts import MEASURES, absolute_here, floor, judge
from benchmarks.peers import cudnn
from benchmarks.peers.networks import RIVALS
from benchmarks.peers.ops import OPS
from tests.test_report import Row, cell, lines, rows_of_a_run, spread, time_row
from vitkern import kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BASE, LARGE = "vit_base_patch16_224", "vit_large_patch16_224"
TRAIN = f"{BASE} b256 train bf16 autocast"
ATTENTION = "attention [B=64 N=197 H=12 d=64] bfloat16"


def started(card: str = "NVIDIA H100 80GB HBM3", grid: str = "small", commit: str = "a") -> Row:
    environment = {"card": {"name": card}, "commit": commit, "date": "2026-12-01"}
    return {"kind": "about", "device": "cuda", "grid": grid, "environment": environment}


def model_row(group: str, impl: str, seconds: float, **values: Any) -> Row:
    """One contender of ``<model> b<batch> <step> <precision>``; without a ratio it is ours."""
    model, batch, step, precision = group.split(" ", 3)
    case = {"model": model, "batch": int(batch[1:]), "step": step, "precision": precision}
    more = {"seconds": spread(seconds), "images_per_s": int(batch[1:]) / seconds}
    return time_row("model", group, case, impl, **measured(**more, **values))


def op_row(group: str, impl: str, seconds: float, **values: Any) -> Row:
    op, sample, dtype = group.replace("]", "[").split("[")
    case = {"op": op.strip(), "sample": sample, "dtype": dtype.strip()}
    return time_row("op", group, case, impl, **measured(seconds=spread(seconds), **values))


def measured(against: float | None = None, a_a: float = 1.0, **values: Any) -> Row:
    """Ours with an A/A within 1 %, or a rival with a ratio."""
    more: Row = {"a_a": {**spread(a_a), "q1": a_a - 0.01, "q3": a_a + 0.01}}
    if against is None:
        return {**values, **more, "ours": True, "own": True}
    return {**values, **more, "against_ours": spread(against)}


def judged(path: Path, *rows: Row, card: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    results = read(lines(path / "results.jsonl", [started(card), *rows]))
    return {verdict.target.what: verdict for verdict in judge(results)}


def test_each_target_can_be_measured() -> None:
    """Its groups are in the grids that `make gpu` measures, with those it is against."""
    models = {
        str(setting): setting
        for grid in ("small", "compiled")
        for setting in _grid.settings(grid, CUDA)
    }
    compiled = {str(setting) for setting in _grid.settings("compiled", CUDA)}
    ops = {str(case): case for case in _grid.op_cases("small", CUDA)}
    for target in TARGETS:
        assert target.measure in MEASURES
        group = target.groups[0]
        if target.measure in ("saved", "launches"):
            assert group == f"{BASE} b256 bf16 autocast"  # of which _proxies.add counts a block
        elif target.measure == "never slower":
            assert group in ("model", "op")
        elif group in models:
            assert set(target.against) <= RIVALS.keys()
            assert group in compiled or not any(RIVALS[name].compiled for name in target.against)
        elif target.measure == "product":
            assert group in ops
            assert set(target.against) <= set(map(str, PRODUCTS))
        else:
            forward = ops[group].forward.op
            known = {*forward.implementations, *OPS.get(forward.name, {})}
            assert not target.against or known & set(target.against)
            assert {"sdpa", "flash3"} <= known or not target.against
    assert len({target.what for target in TARGETS}) == len(TARGETS)


def test_the_grids_begin_with_what_counts() -> None:
    small = [*map(str, _grid.settings("small", CUDA))]
    graph = f"{BASE} b1 forward bf16 CUDA graph"
    assert small[:2] == [TRAIN, graph]
    assert small[3] == TRAIN.replace("base", "large")
    places = [small.index(name) for name in order() if name in small]
    assert places == [*range(len(places))]
    compiled = _grid.settings("compiled", CUDA)
    assert [s.name.split("_")[1] for s in compiled[:4]] == ["base", "large", "small", "huge"]
    assert {s.step for s in compiled[:4]} == {"train"}
    if RIVALS["timm compile max-autotune"].absent() is None:
        who = _grid.model_contenders("compiled", compiled[0], CUDA)
        assert who[:2] == ["vitkern", "timm compile max-autotune"]
        assert _grid.model_contenders("full", compiled[0], CUDA)[-1] == who[1]
    ops = [*map(str, _grid.op_cases("small", CUDA))]
    assert ops[0] == ATTENTION
    assert ops[1] == ATTENTION.replace("attention", "attention_backward")
    assert len(ops) == len(set(ops))
    assert all(name.startswith("attention") for name in ops[:12])
    # Behind the targets' the rest of B/16's, then L/16's.
    widths = ["-> 768 scale drop fp32", "linear_act [gelu 64x197x1024", "64x257x1280 ->"]
    firsts = [next(n for n, name in enumerate(ops) if width in name) for width in widths]
    assert firsts == sorted(firsts)
    assert (
        ops.index("norm_linear_backward [ln 64x197x768 ->  2304 saved given statistics] bfloat16")
        < 40
    )
    kinds = ["norm_linear", "layer_norm [", "patch_embed ["]
    first = [next(n for n, name in enumerate(ops) if name.startswith(kind)) for kind in kinds]
    assert first == sorted(first)
    (step,) = [step for step in _gpu.steps(Path("out"), "cuda") if step.what == "ops"]
    files = [word for word in step.argv(60.0) if word.startswith("benchmarks/")]
    assert files == ["benchmarks/test_products.py", "benchmarks/test_ops.py"]
    # Nothing of the small grid is measured again in the rest, whatever the order.
    assert not set(small) & set(map(str, _grid.settings("rest", CUDA)))


def test_a_figure_is_met_missed_or_even(tmp_path: Path) -> None:
    """MFU: 3 x 35.1 GFLOP an image, of 989.4 TFLOP/s; A/A is within 1 %."""

    def outcome(mfu: float, **values: Any) -> str:
        seconds = 256 * 3 * 35.13e9 / (mfu * 989.4e12)
        found = judged(tmp_path, model_row(TRAIN, "vitkern", seconds, **values))
        verdict = found["B/16 b256 training"]
        assert verdict.found == f"{100 * mfu:.3g} %"
        assert (verdict.must, verdict.aim) == ("45 %", "55 %")
        assert f"vitkern in {TRAIN}, A/A within" in verdict.source
        return str(verdict.outcome)

    assert outcome(0.44) == "missed"
    assert outcome(0.448) == outcome(0.453) == "even"
    assert outcome(0.44, a_a=1.02) == "even"
    assert outcome(0.47) == "met"
    assert outcome(0.56) == "aim met"


def test_less_is_better_for_times_and_memory(tmp_path: Path) -> None:
    groups = [f"{BASE} b1 forward {name} CUDA graph" for name in ("bf16", "bf16 autocast")]
    what = "B/16 b1, CUDA graph"
    for seconds, outcome in ((0.46e-3, "missed"), (0.4e-3, "met"), (0.29e-3, "aim met")):
        slow = model_row(groups[0], "vitkern", 2 * seconds)
        verdict = judged(tmp_path, slow, model_row(groups[1], "vitkern", seconds))[what]
        assert verdict.outcome == outcome
        assert groups[1] in verdict.source  # the better of the two ways to bfloat16
    mine = model_row(TRAIN, "vitkern", 0.05, peak_bytes=6 * 2**30)
    for gib, outcome in ((11, "met"), (9, "missed")):
        rivals = [
            model_row(TRAIN, name, 0.1, against=2.0, peak_bytes=size * 2**30)
            for name, size in (("eager", 12), ("timm", gib))
        ]
        verdict = judged(tmp_path, mine, *rivals)["B/16 b256 training, peak against eager"]
        assert verdict.outcome == outcome  # against the weaker eager there would be more
        assert f"6 GiB, timm {gib} GiB" in verdict.source


def test_ratios_are_against_the_fastest(tmp_path: Path) -> None:
    mine = model_row(TRAIN, "vitkern", 0.05)
    rivals = [model_row(TRAIN, name, 0.1, against=x) for name, x in (("eager", 2.3), ("timm", 1.9))]
    found = judged(tmp_path, mine, *rivals)
    assert found["B/16 b256 training against eager"].outcome == "missed"
    source = found["B/16 b256 training against eager"].source
    assert source.startswith(f"ahead of eager: timm in {TRAIN}, A/A within")
    verdict = found["B/16 b256 training against max-autotune"]
    assert (verdict.outcome, verdict.found) == ("not measured", "")
    assert verdict.source == "timm compile max-autotune: not in this run"
    tuned = model_row(TRAIN, "timm compile max-autotune", 0.07, against=1.4)
    verdict = judged(tmp_path, mine, tuned)["B/16 b256 training against max-autotune"]
    assert (verdict.outcome, verdict.found) == ("met", "1.4 x")


def test_attention_is_held_against_all_others(tmp_path: Path) -> None:
    what = "attention N=197 against the best"
    mine = op_row(ATTENTION, "triton", 1e-4, roofline=0.8)
    for ratio, outcome in ((0.95, "missed"), (0.995, "even"), (1.1, "met")):
        rival = op_row(ATTENTION, "sdpa", 1e-4 * ratio, against=ratio, roofline=0.8)
        other = op_row(ATTENTION, "flash2", 2e-4, against=2.0, roofline=0.4)
        found = judged(tmp_path, mine, rival, other)
        assert found[what].outcome == outcome
        assert found[what].source.startswith("ahead of flash2: sdpa in attention [")
        assert found["attention N=197, of the roof"].outcome == "missed"  # 80 of 85 %
    # Where auto takes a rival, ours is as fast as that, and other rivals still count.
    taken = {**op_row(ATTENTION, "sdpa", 1e-4, roofline=0.8), "own": False}
    ours = op_row(ATTENTION, "triton", 2e-4, against=2.0, roofline=0.4)
    assert judged(tmp_path, taken, ours)[what].outcome == "even"
    better = op_row(ATTENTION, "flash3", 8e-5, against=0.8, roofline=0.9)
    assert judged(tmp_path, taken, better)[what].outcome == "missed"


def test_linear_ops_are_held_against_plain_products(tmp_path: Path) -> None:
    def alone(product: Product, seconds: float) -> Row:
        row = op_row(str(product), "linear", seconds)
        return {**row, "level": "product", "own": False}

    qkv, _, _, _, weight = PRODUCTS
    target = next(t for t in TARGETS if t.what.startswith("fc2's two gradients"))
    assert target.against[1] == str(weight)
    mine = op_row(target.groups[0], "triton", 2e-4)
    assert judged(tmp_path, mine, alone(qkv, 1e-4))[target.what].outcome == "not measured"
    both = [op_row(group, "linear", 0.95e-4) for group in target.against]
    for row in both:
        row |= {"level": "product", "own": False}
    verdict = judged(tmp_path, mine, *both)[target.what]
    assert (verdict.outcome, verdict.found) == ("met", "95 %")
    # Nobody's, so that nothing is lost or won by it.
    before = lines(tmp_path / "a.jsonl", [started(), *both])
    results = read(before)
    assert not results.groups("op")
    assert not results.contests("op")
    assert results.outcomes("op") == {}
    slower = [{**row, "seconds": spread(1.0)} for row in both]
    after = lines(tmp_path / "b.jsonl", [started(), *slower])
    assert [change.ours for change in compare(before, after).changes] == [False, False]


def test_a_plain_product_is_timed() -> None:
    contest = _products.contest(Product(12, 8, 16), CPU)
    ceilings = Ceilings({"bfloat16": 1e12}, 1e10, "a product", "a copy")
    bench = Bench(Timer(CPU), ceilings, seconds=0.001)
    (row,) = [found.row for found in bench.hold(contest, contest.contenders)]
    assert row["group"] == str(Product(12, 8, 16)) == "product [12x16 -> 8] bfloat16"
    assert row["parity"]["ok"]
    assert 0 < row["seconds"]["median"] < 1
    assert row["flops"] == 2 * 12 * 8 * 16
    assert row["bytes"] == 2 * (12 * 16 + 8 * 16 + 8 + 12 * 8)


def test_never_slower_has_three_per_cent_and_the_spread(tmp_path: Path) -> None:
    what = "no op behind an implementation"

    def verdict(*ratios: float, **values: Any) -> Any:
        rows = []
        for n, ratio in enumerate(ratios):
            group = f"layer_norm [{n}] bfloat16"
            rows.append(op_row(group, "triton", 1e-4, roofline=0.9))
            rows.append(op_row(group, "cublas", 1e-4, against=ratio, own=True, **values))
        return judged(tmp_path, *rows)[what]

    assert verdict(1.2, 0.985).outcome == "met"
    assert verdict(1.2, 0.97).outcome == "even"
    assert verdict(1.2, 0.95).outcome == "missed"
    assert verdict(0.95, a_a=1.05).outcome == "even"
    assert verdict(1.2, 0.95).source == "worst of 2 in 2 groups"
    assert judged(tmp_path)[what].outcome == "not measured"
    # What is compiled together with ours is a variant of ours, and no alternative.
    mine = model_row(TRAIN, "vitkern", 0.05)
    own = model_row(TRAIN, "vitkern compile", 0.04, against=0.8, own=True)
    assert judged(tmp_path, mine, own)["no model behind a rival"].outcome == "not measured"


def test_what_is_wrong_misses_and_what_is_missing_says_why(tmp_path: Path) -> None:
    wrong = model_row(TRAIN, "vitkern", 0.01)
    wrong["parity"] = {"ok": False, "why": "nan"}
    found = judged(tmp_path, wrong)
    assert found["B/16 b256 training"].outcome == "missed"
    assert "failed its parity check" in found["B/16 b256 training"].source
    text = report([tmp_path / "results.jsonl"], tmp_path, pictures=False)[0].read_text()
    assert "### Missed" not in text  # no time explains that
    group = TRAIN.replace("base", "large")
    rows = [
        {"kind": "left out", "group": group, "impl": impl, "why": why}
        for impl, why in (("openvino", "it needs a CPU"), ("vitkern", "not enough memory"))
    ]
    rival = model_row(group, "eager", 0.1)
    rival = {k: v for k, v in rival.items() if k != "ours"}
    assert judged(tmp_path, *rows, rival)["L/16 b256 training"].source == "not enough memory"
    late = [{**row, "why": "out of time"} for row in rows]
    assert judged(tmp_path, *late)["L/16 b256 training"].source == "out of time"
    bad = model_row(TRAIN, "timm compile max-autotune", 0.1, against=3.0)
    bad["parity"] = {"ok": False}
    mine = model_row(TRAIN, "vitkern", 0.05)
    verdict = judged(tmp_path, mine, bad)["B/16 b256 training against max-autotune"]
    assert verdict.outcome == "not measured"
    assert "max-autotune failed its parity check" in verdict.source


@pytest.mark.parametrize(
    ("card", "absolute"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA H100 PCIe", False),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", False),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA H20", False),
    ],
)
def test_absolute_figures_are_of_one_class_of_cards(card: str, absolute: bool) -> None:
    assert absolute_here(card) == absolute


def test_on_another_card_absolute_figures_are_shares_of_its_roof(tmp_path: Path) -> None:
    """45 % MFU is 60.7 ms for 256 images, of which an H100's bound are 41.1 ms."""
    row = model_row(TRAIN, "vitkern", 0.2, roofline=0.7)
    assert floor(row) == pytest.approx(41.1e-3, rel=2e-3)
    verdict = judged(tmp_path, row, card="NVIDIA A100-SXM4-80GB")["B/16 b256 training"]
    assert (verdict.must, verdict.aim, verdict.found) == ("67.9 %", "83 %", "70 %")
    assert verdict.outcome == "met"
    group = f"{LARGE} b256 forward bf16 CUDA graph"
    slow = model_row(group, "vitkern", 1.0, roofline=0.7)
    found = judged(tmp_path, row, slow, card="NVIDIA A100-SXM4-80GB")
    assert found["L/16 b256, CUDA graph"].outcome == "missed"  # 4,630 of 6,172 images/s are 75 %
    assert found["L/16 b256, CUDA graph"].must == "75 %"
    # Ratios stay ratios.
    rival = model_row(TRAIN, "eager", 0.5, against=2.5)
    found = judged(tmp_path, row, rival, card="NVIDIA A100-SXM4-80GB")
    assert found["B/16 b256 training against eager"].must == "2 x"
    text = report([tmp_path / "results.jsonl"], tmp_path, pictures=False)[0].read_text()
    assert "on this card they are asked as shares" in text


def test_counts_of_a_block(tmp_path: Path) -> None:
    whole = {"kind": "proxy", "model": BASE, "batch": 256, "precision": "bf16 autocast"}
    counted = {"width_units": 1.0, "bytes": 1}

    def proxy(impl: str, step: str, **values: Any) -> Row:
        return {**whole, **counted, "impl": impl, "step": step, "weight_casts": 8, **values}

    rows = [
        proxy("vitkern", "forward", launches=14, saved_bytes=None),
        proxy("vitkern", "train", launches=26, saved_bytes=57),
        proxy("eager", "train", launches=52, saved_bytes=100),
    ]
    found = judged(tmp_path, *rows)
    assert found["kernels of a block forward, casts of weights apart"].outcome == "met"
    verdict = found["saved for backward, against eager"]
    assert (verdict.outcome, verdict.found) == ("missed", "0.57 x")
    text = report([tmp_path / "results.jsonl"], tmp_path, pictures=False)[0].read_text()
    assert "### Missed: saved for backward, against eager\n\na block of vit_base" in text


def test_the_report_says_why_a_target_is_missed(tmp_path: Path) -> None:
    rows = [started(), model_row(TRAIN, "vitkern", 0.1)]
    rows += [model_row(TRAIN, "eager", 0.05, against=0.5)]
    shapes = {
        "norm_linear [ln 64x197x768 ->  2304 saved given statistics] bfloat16": 0.7,
        "linear_residual_backward [64x197x3072 -> 768 statistics behind gelu] bfloat16": 0.4,
        ATTENTION: 0.6,
        "patch_embed [128x3x224x224 /16x16 D=768] bfloat16": 0.5,
        "norm_linear [ln 64x197x1024 ->  3072 saved given statistics] bfloat16": 0.1,
        "layer_norm_backward [ln 128x197x1024] bfloat16": 0.1,
        "attention [B=64 N=257 H=16 d=80] bfloat16": 0.2,
        "layer_norm [ln 128x197x768] float16": 0.3,
    }
    rows += [op_row(group, "triton", 1e-4, roofline=share) for group, share in shapes.items()]
    path = lines(tmp_path / "results.jsonl", rows)
    profile = tmp_path / f"profile-{BASE}" / "report.json"
    profile.parent.mkdir()
    row = {"op": "aten::mm", "phase": "backward", "seconds": 0.012, "share": 0.3}
    row |= {"launches": 48.0, "roofline": 0.61}
    small = {**row, "op": "aten::add", "seconds": 0.001, "roofline": None, "launches": None}
    profile.write_text(json.dumps({"rows": [small, row]}))
    text = report([path], tmp_path, pictures=False)[0].read_text()
    assert text.index("## Losses") < text.index("## Targets") < text.index("## Failed parity")
    told = text.split("## Targets")[1].split("## Failed parity")[0]
    assert cell(told, "| B/16 b256 training |")[3:5] == ["27.3 %", "**missed**"]
    reason = told.split("### Missed: B/16 b256 training; B/16 b256 training against eager\n")[1]
    reason = reason.split("###")[0]
    listed = [line.split("|")[1].strip() for line in reason.split("\n") if "| triton |" in line]
    theirs = {name: share for name, share in shapes.items() if share >= 0.4}
    assert listed == sorted(theirs, key=lambda name: theirs[name])
    longest = reason.index("aten::mm")
    assert longest < reason.index("aten::add")
    assert "12 ms | 30.0 % | 48 | 61 |" in reason
    # Attention is shared, of inference there is no backward; where nothing was timed, that is said.
    forward = f"{LARGE} b1 forward bf16 CUDA graph"
    lines(path, [*rows, model_row(forward, "vitkern", 0.1)])
    text = report([path], tmp_path, pictures=False)[0].read_text()
    assert "The ops at vit_large_patch16_224's shapes, the furthest from the roof first (2" in text
    lines(path, [started(), model_row(TRAIN, "vitkern", 0.1)])
    text = report([path], tmp_path, pictures=False)[0].read_text()
    assert "No op was timed at vit_base_patch16_224's shapes." in text


def test_an_ops_reason_is_who_else_did_it(tmp_path: Path) -> None:
    mine = op_row(ATTENTION, "triton", 2e-4, roofline=0.4)
    rival = op_row(ATTENTION, "sdpa", 1e-4, against=0.5, roofline=0.8)
    path = lines(tmp_path / "results.jsonl", [started(), mine, rival])
    text = report([path], tmp_path, pictures=False)[0].read_text().split("## Targets")[1]
    reason = text.split("### Missed: attention N=197 against the best; attention N=197, of")[1]
    assert reason.index("| sdpa | 100 [") < reason.index("| triton | 200 [")
    reason = text.split("### Missed: no op behind an implementation")[1]
    assert f"- 0.5 against sdpa in {ATTENTION}" in reason


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = [started(), model_row(TRAIN, "vitkern", 0.05)]
    path = lines(tmp_path / "a.jsonl", fast)
    assert main(["targets", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1 are met, 1 of them with what was aimed at; 0 are even" not in out  # 54.6 % MFU
    assert f"Of {len(TARGETS)} targets 1 are met, 0 of them" in out
    assert "not in this run" in out
    slow = lines(tmp_path / "b.jsonl", [started(), model_row(TRAIN, "vitkern", 0.5)])
    assert main(["targets", str(path), str(slow)]) == 1
    assert "**missed**" in capsys.readouterr().out
    cpu = lines(tmp_path / "c.jsonl", rows_of_a_run(device="cpu"))
    assert main(["targets", str(cpu)]) == 2
    assert "RESULTS: expected a run on a GPU, got one on: A CPU" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a run on a GPU"):
        main_targets([cpu])
    assert "## Targets" not in report([cpu], tmp_path, pictures=False)[0].read_text()


def test_the_readme_counts_targets_of_a_gpu_only(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    lines(folder / "cpu" / "a.jsonl", rows_of_a_run(device="cpu"))
    assert "targets" not in readme_table(folder)
    lines(folder / "h100" / "a.jsonl", [started(), model_row(TRAIN, "vitkern", 0.5)])
    text = readme_table(folder)
    assert f"Of {len(TARGETS)} targets 0 are met" in text
    assert "1 missed" in text


def test_a_compilers_ratio_outlives_a_grid_that_was_cut_off(tmp_path: Path) -> None:
    """The grid with compilers has few rows by then, and the small one most of a group's."""
    small = [started(), model_row(TRAIN, "vitkern", 0.05)]
    small += [model_row(TRAIN, name, 0.1, against=2.1) for name in ("eager", "timm", "hf")]
    small += [
        {"kind": "left out", "group": TRAIN, "impl": impl, "why": "out of time"}
        for impl in ("timm compile", "timm compile max-autotune")
    ]
    tuned = model_row(TRAIN, "timm compile max-autotune", 0.07, against=1.4)
    again = model_row(TRAIN, "eager", 0.3, against=9.0)
    cut = [model_row(TRAIN, "vitkern", 0.06), tuned, again]
    cut += [{"kind": "left out", "group": TRAIN, "impl": "hf", "why": "out of time"}]
    path = tmp_path / "a.jsonl"

    def impls(second: Row) -> dict[str, Row]:
        results = read(lines(path, [*small, second, *cut]))
        assert results.ours[TRAIN]["seconds"]["median"] == 0.05
        found = {row["impl"]: row for row in results.groups("model")[TRAIN]}
        left_out = {"timm compile", "timm compile max-autotune"} - found.keys()
        assert {row["impl"] for row in results.of("left out")} == left_out
        return found

    found = impls(started(grid="compiled"))
    assert found.keys() == {"vitkern", "eager", "timm", "hf", "timm compile max-autotune"}
    assert found["eager"]["against_ours"]["median"] == 2.1
    # Of another source, or the same grid again, a group is that of one run.
    assert len(impls(started(grid="compiled", commit="b"))) == 4
    assert len(impls(started())) == 4
    wrong = {**found["timm compile max-autotune"], "parity": {"ok": False}}
    small.append(wrong)
    assert not impls(started(grid="compiled"))["timm compile max-autotune"]["parity"]["ok"]


def test_targets_have_an_order() -> None:
    first = Target("a", "product", ("op a",), 1.0, against=("product",))
    second = Target("b", "speed-up", ("op b", "op a"), 1.0, against=("sdpa",))
    assert order([first, second]) == {"product": 0, "op a": 1, "op b": 2}


def test_cudnns_attention_is_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another backend in its place it is our attention; what it can't do it says."""
    qkv = torch.randn(2, 7, 3, 4, 8)
    with pytest.raises(Unfit, match=r"doesn't take torch.float32 \[2, 7, 3, 4, 8\] on cpu"):
        cudnn.cudnn_attention(qkv)
    with pytest.raises(Unfit, match="is called without key_mask"):
        cudnn.cudnn_attention(qkv, key_mask=torch.ones(2, 7, dtype=torch.bool))
    asked: list[Any] = []

    def allowed(backend: Any) -> Any:
        asked.append(backend)
        return sdpa_kernel(SDPBackend.MATH)

    monkeypatch.setattr(cudnn, "sdpa_kernel", allowed)
    for scale in (None, 0.3):
        made = cudnn.cudnn_attention(qkv, scale=scale)
        torch.testing.assert_close(made, kernels.attention(qkv, scale=scale, impl="reference"))
    assert asked == [SDPBackend.CUDNN_ATTENTION] * 2
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):  # which is no refusal
        cudnn.cudnn_attention(qkv)


def broken(*_: Any, **__: Any) -> torch.Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
