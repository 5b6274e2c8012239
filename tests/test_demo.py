"""The command line, and the demo: what it writes, and how it ends where something is amiss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitkern import __main__ as cli
from vitkern.kernels import REGISTRY


def stop(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make `module` look as if it weren't installed, and the demo as if it weren't imported yet."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "vitkern.demo", raising=False)


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_every_command_says_what_it_does(capsys):
    for name, command in cli.COMMANDS.items():
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--help"])
        assert stopped.value.code == 0
        assert command.run.__doc__.split()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--epochs", "0"], "expected a positive integer, got '0'"),
        (["demo", "--device", "gpu"], "no device 'gpu'"),
        (["demo", "--device", "meta"], "expected cpu or cuda, got 'meta'"),
        (["demo", "--device", "cuda:99"], "no 'cuda:99' here"),
    ],
)
def test_typos_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_info_lists_every_op(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for op in REGISTRY.values():
        assert f"{op.name} " in text
        assert ", ".join(op.implementations) in text


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "PIL", "rich"])
def test_missing_package_is_named(module, monkeypatch, capsys):
    for other in cli.PACKAGES:  # the others may be missing where the tests run
        if other != module:
            pytest.importorskip(other)
    stop(monkeypatch, module)
    assert cli.main(["demo"]) == 2
    expected = f"the demo needs {cli.PACKAGES[module]}: pip install 'vitkern[demo]'"
    assert capsys.readouterr().err.strip() == expected


def test_other_missing_modules_are_errors(monkeypatch):
    stop(monkeypatch, "statistics")  # a broken Python is not to be mended by an extra
    with pytest.raises(ModuleNotFoundError, match="statistics"):
        cli.main(["demo"])


def test_quick_demo(tmp_path: Path):
    for module in cli.PACKAGES:
        pytest.importorskip(module)
    command = [sys.executable, "-m", "vitkern", "demo", "--quick", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "new")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "device: CPU" in done.stdout
    assert "FAILED" not in done.stdout
    figures = tmp_path / "new" / "demo.json"
    assert str(figures) in done.stdout
    for name, size in (("demo.png", 50_000), ("attention.png", 10_000)):
        picture = tmp_path / "new" / name
        assert str(picture) in done.stdout
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > size

    found = json.loads(figures.read_text())
    assert set(found) == {"versions", "device", "seed", "digits", "photographs"}
    digits, photographs = found["digits"], found["photographs"]
    assert digits["train_images"] + digits["test_images"] == 1797
    for name in ("vitkern", "eager"):
        assert len(digits[name]["losses"]) == len(digits[name]["accuracies"])
        assert digits[name]["losses"][-1] < digits[name]["losses"][0]
        assert digits[name]["test_accuracy"] > digits["expected_accuracy"]
    # The same weights saw the same batches.
    assert digits["vitkern"]["losses"] == pytest.approx(digits["eager"]["losses"], rel=1e-3)

    assert photographs["parity_holds"]
    for label, error in photographs["parity"].items():
        assert error["relative"] < 1e-5, label
    assert set(photographs["costs"]) == {"forward", "training"}
    for cost in photographs["costs"].values():
        for name in ("vitkern", "eager"):
            assert cost[name]["median_ms"] > 0
        # Where no kernel runs, both models hold the same activations; the rest is small change.
        ours, eager = (cost[name]["peak_mib"] for name in ("vitkern", "eager"))
        assert 0 < ours < 1.5 * eager
        assert 0 < eager < 1.5 * ours


def test_too_little_training_fails(monkeypatch, tmp_path, capsys):
    for module in cli.PACKAGES:
        pytest.importorskip(module)
    from dataclasses import replace

    from vitkern import demo

    monkeypatch.setattr(demo, "QUICK", replace(demo.QUICK, accuracy=1.0, epochs=1, rounds=1))
    assert cli.main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "is below the expected 100%" in capsys.readouterr().out
