"""Reports say what the rows say, and nothing that they don't."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _report
from benchmarks._report import (
    compare,
    figures,
    main_compare,
    main_report,
    markdown,
    read,
    readme_table,
    report,
)
from benchmarks._report.readme import NO_GPU, ROOT, update_readme

MODELS = {"vit_small_patch16_224": 1.0, "vit_base_patch16_224": 3.8}
IMAGES = 1e4  # a second, of the small model
# How many times as long as ours each takes, forward and in training.
RIVALS = {
    "eager": (1.8, 2.0),
    "timm": (1.7, 1.9),
    "timm compile": (1.15, 1.004),
    "timm compile max-autotune": (0.92, 1.2),
    "vit-pytorch": (2.6, 2.9),
    "vitkern graph": (0.7, 0.95),
}
OPS = {"layer_norm": (1.2e9, 4e8), "attention": (3e10, 3e8), "attention_backward": (8e10, 6e8)}
CEILINGS = {"bfloat16": 8e14, "float32": 4e14}

Row = dict[str, Any]


def spread(median: float, width: float = 0.005, n: int = 41) -> Row:
    return {"median": median, "q1": median * (1 - width), "q3": median * (1 + width), "n": n}


def time_row(level: str, group: str, case: Row, impl: str, **values: Any) -> Row:
    parity = {"ok": True, "error": 1e-3, "budget": 2e-3, "eager_error": 1e-3}
    flags = {"ours": False, "own": False, "baseline": False}
    return {
        "kind": "time",
        "level": level,
        "group": group,
        "case": case,
        "impl": impl,
        "package": None,
        **flags,
        "parity": parity,
        **values,
    }


def timed(seconds: float, against: float | None, flops: float, moved: float) -> Row:
    values: Row = {
        "flops": int(flops),
        "bytes": int(moved),
        "peak_bytes": int(2e9 * (against or 1)),
    }
    values |= {"seconds": spread(seconds * (against or 1))}
    values["roofline"] = flops / 8e14 / values["seconds"]["median"]
    ratios = "a_a" if against is None else "against_ours"
    return {**values, ratios: spread(against or 1.002)}


def rows_of_a_run(date: str = "2026-12-01T10:00:00+00:00", device: str = "cuda") -> list[Row]:
    """Wins, losses, draws, a wrong rival, a noisy group, absent peers."""
    environment: Row = {
        "date": date,
        "commit": "c0ffee",
        "uncommitted": False,
        "cpu": "A CPU, 2 threads",
    }
    environment["packages"] = {"torch": "2.11.0", "timm": "1.0.31", "flash-attn": None}
    if device == "cuda":
        smi = "name, driver_version, clocks.current.sm [MHz], temperature.gpu"
        environment["card"] = {"name": "NVIDIA H100", "l2_bytes": 50 << 20}
        environment["nvidia_smi"] = f"{smi}\nNVIDIA H100, 580.1, 1980 MHz, 41"
    about = {"environment": environment, "policy": "CUDA events", "grid": "small"}
    copy = "1024 MiB, read and written"
    rows: list[Row] = [
        {"kind": "about", **about, "device": device},
        {"kind": "absent", "impl": "flash-attn ViT", "why": "flash-attn is not installed"},
        {"kind": "absent", "impl": "apex", "why": "NVIDIA's apex is not installed"},
        {"kind": "ceilings", "flops_per_s": CEILINGS, "bytes_per_s": 3e12, "matmul": "8192^3"}
        | {"copy": copy},
        {"kind": "clocks", "nvidia_smi": "clocks.current.sm [MHz]\n1725 MHz", "performance": ""},
        {"kind": "something new", "value": 1},
    ]
    for number, (model, size) in enumerate(MODELS.items()):
        for batch in (1, 128):
            for step in ("forward", "train"):
                rows += model_rows(model, size, batch, step, noisy=number == 1 and batch == 1)
    for op, (flops, moved) in OPS.items():
        for dtype in ("bfloat16", "float32"):
            rows += op_rows(op, dtype, flops, moved)
    for step, factor in (("forward", 1), ("train", 3)):
        for impl, units in (("vitkern", 48), ("eager", 104), ("timm compile (predicted)", 80)):
            case = {"model": "vit_base_patch16_224", "batch": 256, "precision": "bf16 autocast"}
            saved = None if step == "forward" else units * 10**8
            counted = {"launches": units * factor // 8, "bytes": units * factor * 10**8}
            counted |= {"saved_bytes": saved, "width_units": units * factor}
            rows.append({"kind": "proxy", **case, "impl": impl, "step": step, **counted})
    rows.append({"kind": "step", "what": "tests", "ok": True, "why": "exit code 0", "seconds": 41})
    return rows


def model_rows(model: str, size: float, batch: int, step: str, noisy: bool) -> list[Row]:
    group = f"{model} b{batch} {step} bf16 autocast"
    case = {"model": model, "batch": batch, "step": step, "precision": "bf16 autocast"}
    seconds = batch * size * (3 if step == "train" else 1) / IMAGES
    work = (seconds * 4e14, seconds * 2e12)
    mine = {"ours": True, "own": True, **timed(seconds, None, *work)}
    if noisy:
        mine["a_a"] = {**spread(1.03), "q3": 1.1}
    rows = [time_row("model", group, case, "vitkern", **mine)]
    for impl, factors in RIVALS.items():
        values = timed(seconds, factors[step == "train"], *work)
        values |= {"own": impl == "vitkern graph", "baseline": impl == "eager"}
        values["package"] = "timm 1.0.31" if "timm" in impl else None
        rows.append(time_row("model", group, case, impl, **values))
    wrong = {"parity": {"ok": False, "error": 0.3, "budget": 2e-3}}
    rows.append(time_row("model", group, case, "torchvision", **wrong))
    for row in rows:
        if "seconds" in row:
            row["images_per_s"] = batch / row["seconds"]["median"]
    why = {"flash-attn ViT": "flash-attn is not installed", "openvino": "it needs a CPU"}
    return rows + [
        {"kind": "left out", "group": group, "impl": impl, "why": reason}
        for impl, reason in why.items()
        if impl == "flash-attn ViT" or step == "train"
    ]


def op_rows(op: str, dtype: str, flops: float, moved: float) -> list[Row]:
    group, case = f"{op} [B/16] {dtype}", {"op": op, "sample": "B/16", "dtype": dtype}
    seconds = moved / 2e12
    rows = [
        time_row(
            "op", group, case, "triton", ours=True, own=True, **timed(seconds, None, flops, moved)
        ),
        time_row("op", group, case, "torch", baseline=True, **timed(seconds, 1.5, flops, moved)),
        time_row("op", group, case, "cublas", own=True, **timed(seconds, 0.9, flops, moved)),
    ]
    why = "NVIDIA's apex is not installed"
    return [*rows, {"kind": "left out", "group": group, "impl": "apex", "why": why}]


def lines(path: Path, rows: list[Row], tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def find(rows: list[Row], impl: str, group: str) -> Row:
    return next(r for r in rows if r.get("impl") == impl and group in r.get("group", ""))


def cell(text: str, *words: str) -> list[str]:
    """The cells of the only table line with these words."""
    (line,) = [t for t in text.split("\n") if t.startswith("|") and all(w in t for w in words)]
    return [part.strip() for part in line.strip("|").split("|")]


def test_a_report_of_all_sorts(tmp_path: Path) -> None:
    written = report([lines(tmp_path / "a.jsonl", rows_of_a_run())], tmp_path / "out")
    names = ["report.md", "speed-up-models.png", "speed-up-ops.png", "roofline-bfloat16.png"]
    names += ["roofline-float32.png", "memory.png", "proxies.png"]
    assert [path.name for path in written] == names
    assert all(path.stat().st_size > 1000 for path in written)
    text = written[0].read_text()
    assert all(f"]({name})" in text for name in names[1:])
    # A rival: groups, geometric mean, wins, draws, losses.
    mean = math.sqrt(1.15 * 1.004)
    head = text.split("## Losses")[0]
    assert cell(head, "| timm compile |")[2:7] == ["8", f"{mean:.2f}", "4", "4", "0"]
    assert "**Models.** Of 8 groups vitkern is the fastest in 0" in head
    assert "level with its nearest rival in 5, and slower than a rival in 3" in head
    assert "A/A is off by more than 2% in 2: don't lean on those." in head
    for word in ("NVIDIA H100", "CUDA events", "800 TFLOP/s", "c0ffee", "580.1", "| tests | ok |"):
        assert word in text
    assert cell(text, "apex") == ["apex", "NVIDIA's apex is not installed"]
    assert cell(text, "it needs a CPU")[2].endswith(
        "vit_base_patch16_224 b1 train bf16 autocast, and 1 more"
    )


def test_losses_are_listed_and_red(tmp_path: Path) -> None:
    results = read(lines(tmp_path / "a.jsonl", rows_of_a_run()))
    losses = results.losses("model")
    assert {row["impl"] for row in losses} == {"timm compile max-autotune"}
    assert len(losses) == 3  # in the noisy group the A/A spread is wider than this loss
    assert len(results.behind("model")) == 4
    text = markdown.markdown(results, {}, [])
    group = "vit_base_patch16_224 b128 forward bf16 autocast"
    listed = text.split("## Losses")[1].split("## Failed")[0]
    assert cell(listed, group)[1:3] == ["timm compile max-autotune", "0.920 [0.915, 0.925]"]
    assert cell(listed, group)[-1] == "**loss**"
    assert cell(listed, "base_patch16_224 b1 forward")[-1] == "within A/A"
    assert "**off by more than 2%**" in cell(listed, "base_patch16_224 b1 forward")[5]
    assert "0.9 against cublas" in listed  # ours, but auto took a slower one
    shown = figures.grid(results, "model", list(results.groups("model")))
    assert shown.cells[(group, "timm compile max-autotune")] == ("loss", 0.92)
    red, green, blue = figures.shade("loss", 0.92)
    assert red > green
    assert red > blue
    assert shown.cells[(group, "vitkern graph")][0] == "own"  # no rival, so no loss
    assert shown.cells[(group, "flash-attn ViT")][0] == "absent"
    assert shown.cells[(group.replace("forward", "train"), "openvino")][0] == "left out"


@pytest.mark.parametrize("lying", [False, True], ids=["as written", "with times"])
def test_what_is_wrong_has_no_time_and_no_speed_up(tmp_path: Path, lying: bool) -> None:
    rows = rows_of_a_run()
    bad = [row for row in rows if row.get("impl") == "torchvision"]
    assert bad
    if lying:  # a file that breaks the rule doesn't get the better of it
        for row in bad:
            row |= {**timed(1.0, 777123.0, 1e9, 1e8), "images_per_s": 7.77123e9}
    results = read(lines(tmp_path / "a.jsonl", rows))
    text = markdown.markdown(results, {}, [])
    assert "7771" not in text.replace(",", "")
    listed = text.split("## All models")[1].split("## All ops")[0]
    for line in (line for line in listed.split("\n") if "torchvision" in line):
        assert line.split("|")[3:] == [" failed its parity check ", *[" " * 2] * 4, ""]
    shown = figures.grid(results, "model", list(results.groups("model")))
    cells = [value for (_, impl), value in shown.cells.items() if impl == "torchvision"]
    assert cells == [("wrong", None)] * len(bad)
    assert all(row["impl"] != "torchvision" for row in results.contests("model"))
    bars = [row for rows in figures.memory(results).values() for row in rows]
    assert "vitkern" in [row["impl"] for row in bars]
    assert "torchvision" not in [row["impl"] for row in bars]


def test_where_ours_is_wrong_nothing_has_a_speed_up(tmp_path: Path) -> None:
    rows = rows_of_a_run()
    group = "vit_base_patch16_224 b128 train bf16 autocast"
    find(rows, "vitkern", group)["parity"] = {"ok": False, "why": "RuntimeError: no"}
    results = read(lines(tmp_path / "a.jsonl", rows))
    text = markdown.markdown(results, {}, [])
    assert "wrong or was not timed in 1" in text
    assert cell(text, group, "RuntimeError: no")[1] == "**vitkern**, ours"
    shown = figures.grid(results, "model", [group])
    assert {verdict for verdict, _ in shown.cells.values()} == {
        "wrong",
        "void",
        "left out",
        "absent",
    }
    assert all(value is None for _, value in shown.cells.values())
    figures.draw_grid(results, "model", shown)
    listed = text.split("### vit_base")[1]
    assert cell(listed, "b128 train", "vitkern")[2] == "failed its parity check"
    assert "none: ours has no time" in listed
    right = read(lines(tmp_path / "b.jsonl", rows_of_a_run()))
    assert len(figures.points(results)) == len(figures.points(right)) - 1


def test_both_kinds_of_files_say_the_same(tmp_path: Path) -> None:
    rows = rows_of_a_run()
    others = [row for row in rows if row["kind"] != "time"]
    benchmarks = [{"extra_info": {"row": r}} for r in rows if r["kind"] == "time"]
    whole = tmp_path / "a.json"
    whole.write_text(
        json.dumps({"machine_info": {}, "vitkern": others, "benchmarks": benchmarks}, indent=1)
    )
    texts = []
    for path in (whole, lines(tmp_path / "a.jsonl", rows)):
        text = markdown.markdown(read(path), {}, [])
        texts.append(text.replace(path.name, "FILE"))
    assert texts[0] == texts[1]


def test_a_run_that_was_cut_off_is_read(tmp_path: Path) -> None:
    rows = rows_of_a_run()
    whole = read(lines(tmp_path / "a.jsonl", rows))
    cut = read(lines(tmp_path / "b.jsonl", rows, tail='{"kind": "time", "gro'))
    assert cut.rows == whole.rows
    path = tmp_path / "c.jsonl"
    # A step that was killed, and the next one, which began a line of its own.
    path.write_text('{"kind": "about"}\n{"kind": "ti\n{"kind": "step", "what": "tune"}\n')
    assert [row["kind"] for row in read(path).rows] == ["about", "step"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no rows"),
        ("\n\n", "no rows"),
        ('{"kind": "abo', "line 1: not JSON"),
        ("time,1\n", "line 1: not JSON"),
        ('{"environment": {}, "rows": []}', "a row without a kind"),
        ("[1, 2]", "a row without a kind"),
        ('{"benchmarks": [{"extra_info": {}}], "machine_info": {}}', "no rows"),
        ('{"kind": "time", "group": "a", "impl": "b"}', "without level, parity"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"results\.jsonl.*{complaint}"):
        main_report([path], tmp_path)
    with pytest.raises(ValueError, match=r"missing\.jsonl: .*No such file.*expected JSON Lines"):
        read(tmp_path / "missing.jsonl")


def test_several_files_and_runs_are_read_as_one(tmp_path: Path) -> None:
    first = rows_of_a_run()
    second = [row for row in rows_of_a_run("2026-12-02") if "op" not in row.get("case", {})]
    group = "vit_small_patch16_224 b1 forward bf16 autocast"
    find(second, "timm", group)["impl"] = "hf"
    find(second, "vitkern", group)["seconds"] = spread(42.0)
    second.append(
        {"kind": "left out", "group": "attention [B/16] bfloat16", "impl": "torch", "why": "no"}
    )
    a, b = lines(tmp_path / "a.jsonl", first), lines(tmp_path / "b.jsonl", second)
    appended = lines(tmp_path / "c.jsonl", first + second)
    assert read(a, b).rows == read(appended).rows
    results = read(a, b)
    assert results.environment["date"] == "2026-12-02"
    # Groups are taken whole: a rival of an earlier run has no ratio to ours of this one.
    assert "timm" not in [row["impl"] for row in results.groups("model")[group]]
    assert results.ours[group]["seconds"]["median"] == 42
    assert len(results.groups("op")) == 6
    assert all(row["why"] != "no" for row in results.of("left out"))
    other = lines(tmp_path / "d.jsonl", rows_of_a_run(device="cpu"))
    with pytest.raises(ValueError, match="one device, got: A CPU, 2 threads, NVIDIA H100"):
        read(a, other)


def test_a_run_that_was_cut_off_takes_no_losses_away(tmp_path: Path) -> None:
    rows = rows_of_a_run()
    group = "vit_small_patch16_224 b1 forward bf16 autocast"
    assert find(rows, "timm compile max-autotune", group)["against_ours"]["median"] < 1
    few = [r for r in rows_of_a_run("2026-12-02") if r["kind"] != "time" or r["ours"]]
    results = read(lines(tmp_path / "a.jsonl", rows + few))
    assert results.losses("model") == read(lines(tmp_path / "b.jsonl", rows)).losses("model")


def test_without_times_the_report_says_so(tmp_path: Path, capsys: Any) -> None:
    about = [row for row in rows_of_a_run() if row["kind"] in ("about", "step", "clocks")]
    path = lines(tmp_path / "a.jsonl", about)
    assert main_report([path], tmp_path / "out") == 0
    assert "groups of models: none" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No model was timed." in text
    assert "\n1725 MHz\n" in text
    assert "No op was timed." in text
    assert text.count("- Not drawn: ") == 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]


def test_without_matplotlib_there_is_a_report(tmp_path: Path, monkeypatch: Any) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        markdown, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    path = lines(tmp_path / "a.jsonl", rows_of_a_run())
    assert [p.name for p in report([path], tmp_path / "out")] == ["report.md"]
    assert "matplotlib is not installed" in (tmp_path / "out" / "report.md").read_text()
    report([path], tmp_path / "out", pictures=False)
    assert "Not drawn: any, so far" in (tmp_path / "out" / "report.md").read_text()


def test_large_grids_are_split(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(figures, "ROWS", 4)
    rows = rows_of_a_run()[:5]
    for model, batches in {"a": 5, "b": 2, "c": 2}.items():
        for batch in range(batches):
            rows += model_rows(model, 1.0, batch + 1, "train", noisy=False)
    results = read(lines(tmp_path / "a.jsonl", rows))
    parts = figures.pages(results, "model")
    assert [len(part) for part in parts] == [3, 2, 4]
    assert sorted(group for part in parts for group in part) == sorted(results.groups("model"))
    made, _ = figures.draw(results, tmp_path)
    names = [f"speed-up-models-{number}.png" for number in (1, 2, 3)]
    assert [name for name in made if "speed" in name] == names


def test_compare_finds_what_became_slower(tmp_path: Path, capsys: Any) -> None:
    before, rows = lines(tmp_path / "a.jsonl", rows_of_a_run()), rows_of_a_run("2026-12-02")
    assert main_compare(before, lines(tmp_path / "b.jsonl", rows)) == 0
    out = capsys.readouterr().out
    assert "nothing changed" in out
    assert "warning" not in out

    slow, fast = "vit_base_patch16_224 b128 train", "vit_small_patch16_224 b1 forward"
    mine = find(rows, "vitkern", slow)
    mine["seconds"] = spread(mine["seconds"]["median"] * 1.1)
    find(rows, "eager", fast)["seconds"] = spread(1e-5)
    wide = find(rows, "timm", fast)
    wide["seconds"] = {**spread(wide["seconds"]["median"] * 1.2, width=0.3)}
    environment = rows[0]["environment"]
    environment["packages"]["torch"] = "2.12.0"
    smi = environment["nvidia_smi"].replace("1980", "1200")
    environment["nvidia_smi"] = smi.replace(" 41", " 50")  # it is warmer: no matter
    rows.remove(find(rows, "torch", "layer_norm [B/16] bfloat16"))
    after = lines(tmp_path / "b.jsonl", rows)
    found = compare(before, after)
    (slower,) = found.of("slower", ours=True)
    assert slower.group.startswith(slow)
    assert slower.ratio == pytest.approx(1.1)
    assert [c.group for c in found.of("faster", ours=False)] == [f"{fast} bf16 autocast"]
    assert len(found.of("only before", ours=False)) == 1
    assert found.warnings == (
        "torch: 2.11.0 before, 2.12.0 after",
        "clocks.current.sm [MHz]: 1980 MHz before, 1200 MHz after",
    )
    assert main_compare(before, after, tmp_path / "c.json") == 1
    out, err = capsys.readouterr()
    assert f"FAILED: vitkern is slower in {slow}" in err
    assert "1.100" in out
    assert "1 slower" in out
    kept = json.loads((tmp_path / "c.json").read_text())
    assert [c["impl"] for c in kept["changes"] if c["verdict"] == "slower"] == ["vitkern"]
    assert main_compare(before, after, fail_slower=15) == 0
    assert main_compare(after, before) == 0  # it became faster
    with pytest.raises(ValueError, match="--fail-slower: expected 0 or more"):
        main_compare(before, after, fail_slower=-1)


def test_compare_finds_what_is_no_longer_right(tmp_path: Path, capsys: Any) -> None:
    rows = rows_of_a_run()
    before = lines(tmp_path / "a.jsonl", rows)
    find(rows, "triton", "attention [B/16]")["parity"] = {"ok": False}
    after = lines(tmp_path / "b.jsonl", rows)
    assert main_compare(before, after) == 1
    assert "triton is broken in attention [B/16]" in capsys.readouterr().err
    assert main_compare(after, before) == 0


def test_readme_table(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    assert readme_table(folder) == NO_GPU
    lines(folder / "cpu" / "2.jsonl", rows_of_a_run("2026-12-01", "cpu"))
    text = readme_table(folder)
    assert text.startswith(NO_GPU)
    assert (
        "**A CPU, 2 threads**, 2026-12-01, torch 2.11.0, timm 1.0.31 "
        "(`benchmarks/results/cpu/2.jsonl`)" in text
    )
    assert cell(text, "vit_base_patch16_224 b128 forward")[1:] == [
        "2,632",
        "1.80 x",
        "1.70 x",
        "**0.92 x, a loss**",
        "**0.92 x timm compile max-autotune, a loss**",
    ]
    assert cell(text, "vit_base_patch16_224 b128 train")[-2] == "1.00 x, within A/A"
    assert "b1 train" not in text  # the largest batch only
    assert "fastest in 0, level with its nearest rival in 5, and slower than a rival in 3" in text

    old = lines(folder / "h100" / "b.jsonl", rows_of_a_run("2026-12-01"))
    new = rows_of_a_run("2026-12-03")
    for row in new:
        if row.get("impl") == "vitkern" and row.get("group", "").endswith(
            "b128 train bf16 autocast"
        ):
            row["parity"] = {"ok": False, "why": "wrong"}
    lines(folder / "h100" / "a.jsonl", new)
    lines(folder / "h100" / "c.jsonl", [row for row in new if row["kind"] == "about"])
    text = readme_table(folder)
    assert NO_GPU not in text
    assert "h100/a.jsonl" in text
    assert old.name not in text
    wrong = cell(text.split("NVIDIA")[1], "vit_base_patch16_224 b128 train")
    assert wrong[1:] == ["wrong: no time", "", "", "", ""]
    assert text == readme_table(folder)


def test_update_readme(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("# Head\n<!-- results -->\nold\n<!-- /results -->\nfoot\n")
    assert _report.update_readme(readme, folder)
    text = readme.read_text()
    assert text == f"# Head\n<!-- results -->\n{NO_GPU}\n<!-- /results -->\nfoot\n"
    assert not _report.update_readme(readme, folder)
    readme.write_text("# Head\n<!-- results -->\n")
    with pytest.raises(ValueError, match=r"README\.md: expected the lines <!-- results -->"):
        _report.update_readme(readme, folder)


def test_the_readme_is_what_the_results_make(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    assert not update_readme(copy, ROOT / "benchmarks" / "results")
