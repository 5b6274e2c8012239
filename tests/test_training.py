"""Training beside eager: the verdict passes what is right, and finds what isn't."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import _report
from benchmarks._verify import learning, training
from benchmarks._verify.learning import EAGER, EAGERS, FLOAT32, NUDGED, OURS, TASKS

photographs = pytest.importorskip("benchmarks._verify.photographs", exc_type=ImportError)
CPU = torch.device("cpu")
STEPS = 30
DIGITS = learning.rehearsal(TASKS["digits"])


@pytest.fixture(autouse=True)
def small():
    for module in training.NEEDS:
        pytest.importorskip(module)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planted(change: Callable[[Any], None]) -> learning.Build:
    """Eager's network, changed, in place of ours."""

    def build(task: Any, impl: str, weights: Any, device: torch.device) -> Any:
        model = learning.build(task, EAGER if impl == OURS else impl, weights, device)
        if impl == OURS:
            change(model)
        return model

    return build


def hold(known: dict[str, Any], change: Callable[[Any], None], **options: Any) -> list[Any]:
    rows = learning.hold(DIGITS, CPU, STEPS, known=known, build=planted(change), **options)
    return list(rows)


@pytest.fixture(scope="module")
def eager() -> dict[str, Any]:
    """Eager's runs."""
    torch.set_num_threads(1)
    rows = learning.hold(DIGITS, CPU, STEPS, build=planted(lambda model: None))
    return {row["impl"]: row for row in rows if row.get("impl") in EAGERS}


# What is right


def rounded_elsewhere(model: Any) -> None:
    """As right as eager, but rounded at other places: norms and probabilities to bfloat16."""

    def attend(self: Any, x: Any) -> Any:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(v.dtype)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))

    def normed(self: Any, x: Any) -> Any:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).bfloat16()

    for block in model.blocks:
        block.attn.forward = attend.__get__(block.attn)
        for norm in (block.norm1, block.norm2):
            norm.forward = normed.__get__(norm)


@pytest.mark.parametrize("change", [lambda model: None, rounded_elsewhere])
def test_what_is_right_passes(change, eager):
    *rows, verdict = hold(eager, change)
    assert verdict["ok"] is True, verdict
    assert [row.get("impl") for row in rows] == [OURS, *[None] * 3]
    assert {row["kind"] for row in rows[1:]} == {learning.GRADIENTS}
    assert [row["step"] for row in rows[1:]] == [0, STEPS // 2, STEPS]
    assert len(rows[0]["losses"]) == STEPS
    assert verdict["compared_steps"] == STEPS
    assert 0 < verdict["distance"] <= verdict["budget"]
    assert set(verdict["eager_distances"]) == set(EAGERS) - {FLOAT32}
    assert set(verdict["accuracy"]) == {OURS, *EAGERS}


# What isn't


def of(name: str, change: Callable[[Any, int], Any]) -> Callable[[Any], None]:
    """A fault in the gradient of one parameter; `change` gets it, and how often it was called."""

    def plant(model: Any) -> None:
        calls = iter(range(10**6))
        model.get_parameter(name).register_hook(lambda grad: change(grad, next(calls)))

    return plant


def softer(model: Any) -> None:
    """Logits 10 % too small."""
    block = model.blocks[1]
    block.attn.qkv.register_forward_hook(
        lambda _, args, out: out * torch.tensor([0.9, 1, 1]).repeat_interleave(64).to(out.dtype)
    )


def without_last_token(model: Any) -> None:
    """A tail that nobody computes."""
    model.blocks[0].mlp.register_forward_hook(
        lambda _, args, out: torch.cat([out[:, :-1], torch.zeros_like(out[:, -1:])], 1)
    )


QKV, BIAS = "blocks.1.attn.qkv.weight", "blocks.0.mlp.fc1.bias"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(of(QKV, lambda g, _: 1.05 * g), {QKV}, id="5 % too large"),
        pytest.param(of(BIAS, lambda g, _: 0 * g), {BIAS}, id="no gradient"),
        pytest.param(
            of(BIAS, lambda g, _: torch.cat([g[:-16], 0 * g[-16:]])), {BIAS}, id="a tile missing"
        ),
        pytest.param(softer, {}, id="scale of the softmax"),
        pytest.param(without_last_token, {}, id="a tail missing"),
    ],
)
def test_a_wrong_gradient_is_found(change, found):
    # Larger weights, so that attention is not the same everywhere.
    weights = {n: 3 * w if "qkv" in n else w for n, w in learning.first_weights(DIGITS, 0).items()}
    data = DIGITS.data(0)
    check = learning.gradient_check(DIGITS, weights, data, CPU, 0, planted(change))
    assert not check["ok"]
    assert check["error"] > 1.5 * check["budget"]
    assert not found or {check["worst"]} == found


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(of(QKV, lambda g, n: -g if n % 10 == 9 else g), id="now and then, the sign"),
        pytest.param(of(QKV, lambda g, n: g + g.norm() / 8 if n == 12 else g), id="once, garbage"),
        pytest.param(of(BIAS, lambda g, n: g * torch.nan if n == 20 else g), id="once, NaN"),
    ],
)
def test_what_is_too_seldom_for_gradients_shows_in_the_curve(change, eager):
    verdict = hold(eager, change)[-1]
    assert verdict["ok"] is False, verdict
    assert "the curve is " in verdict["why"]


def test_whatever_ours_raises_is_wrong(eager):
    def broken(model: Any) -> None:
        model.head = None

    (verdict,) = hold(eager, broken)
    assert verdict["ok"] is False
    assert "NoneType" in verdict["why"]


def test_what_eager_raises_is_not_ours_to_answer_for():
    def build(task: Any, impl: str, weights: Any, device: torch.device) -> Any:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        list(learning.hold(DIGITS, CPU, STEPS, build=build))


def run(*losses: float) -> dict[str, Any]:
    return {"losses": list(losses), "accuracy": 0.5, "steps": 40}


FALLING = torch.linspace(2, 1, 40).tolist()
ABOVE = [loss + 0.01 for loss in FALLING]
CHECK = {"ok": True, "worst": "head.bias", "step": 0, "error": 1.0, "budget": 2.0}


@pytest.mark.parametrize(
    ("changes", "checks", "said"),
    [
        ({OURS: {}}, [CHECK], "no run of vitkern"),
        ({}, [], "out of time after 40 of 40 steps"),
        (
            {OURS: run(*FALLING[:19])},
            [CHECK],
            "out of time after 19 of 40 steps",
        ),
        ({FLOAT32: run(*[2.0] * 40)}, [CHECK], "float32 learned nothing"),
        (
            {OURS: run(*[x + 0.01 for x in FALLING]), NUDGED[0]: run()},
            [CHECK],
            "by 1 of eager's runs",
        ),
    ],
)
def test_too_little_to_tell(changes, checks, said):
    near = [loss + 0.001 * (-1) ** (n // 20) for n, loss in enumerate(FALLING)]
    courses = {FLOAT32: run(*FALLING), EAGER: run(*near), OURS: run(*FALLING)}
    assert learning.verdict(courses, [CHECK])["ok"] is True
    if changes.get(FLOAT32):
        courses = dict.fromkeys(courses, changes[FLOAT32])
    found = learning.verdict(courses | changes, checks)
    assert found["ok"] is None
    assert said in found["why"]


def test_a_run_that_is_late_stops(eager):
    turns = iter([False] * 25)
    rows = hold(eager, lambda model: None, late=lambda: next(turns, True))
    assert 20 <= len(rows[0]["losses"]) < STEPS
    assert rows[-1]["compared_steps"] == len(rows[0]["losses"])
    assert rows[-1]["ok"] is not False


# What is learned from


def test_crops_for_the_test_come_from_elsewhere():
    from PIL import Image

    photo = Image.new("RGB", (400, 200), (0, 0, 255))
    photo.paste((255, 0, 0), (0, 0, 300, 200))
    for test, channel in ((False, 0), (True, 2)):
        crops = photographs.crops([photo, photo], 8, 32, seed=0, test=test)
        assert crops.images.shape == (8, 3, 32, 32)
        assert crops.images.dtype == torch.uint8
        assert crops.labels.tolist() == [0, 1] * 4
        assert (crops.images.argmax(1) == channel).float().mean() > 0.95
    again = photographs.crops([photo, photo], 8, 32, seed=0, test=True)
    assert torch.equal(again.images, crops.images)


def test_few_photographs_are_cut(monkeypatch):
    whole = photographs.photographs()
    assert len(whole) >= photographs.FEWEST
    monkeypatch.setattr(photographs, "FILES", {"sklearn": photographs.FILES["sklearn"]})
    parts = photographs.photographs()
    assert len(parts) == 8
    assert {part.size for part in parts.values()} == {(320, 213)}
    monkeypatch.setattr(photographs, "FILES", {"sklearn": ("nowhere", ("china.jpg",))})
    with pytest.raises(photographs.Absent, match="no photographs"):
        photographs.photographs()


# The command


def start(folder: Path, **options: Any) -> tuple[int, list[Any]]:
    results = folder / "results.jsonl"
    code = training.main(results, CPU, folder, **options)
    return code, training.rows_in(results)


def test_a_rehearsal(tmp_path, capsys):
    code, rows = start(tmp_path, toy=True)
    said = capsys.readouterr().out
    assert code == 0, said
    for what in TASKS:
        mine = [row for row in rows if row["what"] == what]
        assert {row.get("impl") for row in mine} == {OURS, *EAGERS, None, "verdict"}
        assert mine[-1]["impl"] == "verdict"
        assert f"{what}, verdict: right" in said
    runs = [row for row in rows if "losses" in row]
    assert {row["dtype"] for row in runs} == {"bfloat16", "float32"}
    ours = next(row for row in runs if row["impl"] == OURS)
    assert "norm_linear" in ours["implementations"]
    picture = tmp_path / "training.png"
    assert picture.stat().st_size > 50_000

    # Again: eager's runs are there already, and one network was asked for.
    picture.unlink()
    assert start(tmp_path, toy=True, only=["digits"])[0] == 0
    assert _report.read(tmp_path / "results.jsonl").about()["device"] == "cpu"
    more = training.rows_in(tmp_path / "results.jsonl")[len(rows) :]
    assert [row.get("impl") for row in more] == [OURS, *[None] * 3, "verdict"]
    assert {row["what"] for row in more} == {"digits"}
    assert picture.exists()


def dies(seed: int) -> learning.Data:
    os._exit(3)


def hangs(seed: int) -> learning.Data:
    time.sleep(600)
    raise AssertionError


def fails(seed: int) -> learning.Data:
    raise photographs.Absent("no photographs")


def test_what_ends_badly_has_a_verdict(monkeypatch, tmp_path):
    tasks = {f.__name__: replace(DIGITS, what=f.__name__, data=f) for f in (dies, fails)}
    monkeypatch.setattr(training, "TASKS", tasks)
    code, rows = start(tmp_path)
    assert code == 1
    found = {row["what"]: (row["impl"], row["ok"], row["why"]) for row in rows}
    assert found == {
        "dies": ("verdict", False, "its process ended with exit code 3"),
        "fails": ("verdict", None, "Absent: no photographs"),
    }
    assert not (tmp_path / "training.png").exists()


def test_what_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "TASKS", {"digits": replace(DIGITS, data=hangs)})
    code, (verdict,) = start(tmp_path, minutes=0.05)
    assert code == 2
    assert verdict["ok"] is None
    assert verdict["why"] == "unfinished after 3 s"


def test_what_is_asked_for_is_checked(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="--only: unknown 'digit'; expected some of digits, vit"):
        training.main(tmp_path / "r.jsonl", CPU, tmp_path, only=["digit"])
    with pytest.raises(ValueError, match="--steps: expected at least 20, got 5"):
        training.main(tmp_path / "r.jsonl", CPU, tmp_path, steps=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.main(tmp_path / "r.jsonl", torch.device("cuda"), tmp_path) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(training, "NEEDS", ("sklearn", "nowhere"))
    assert training.main(tmp_path / "r.jsonl", CPU, tmp_path) == 2
    assert "training needs nowhere" in capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()
