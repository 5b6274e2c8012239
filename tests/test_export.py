"""Exported files give the model's numbers, in ONNX Runtime and in torch.export's own program."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkern
from vitkern.export import export

SIZES = {
    "img_size": (16, 24),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "map": {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": ("layernorm", 1e-5)},
    "modern": {
        "mlp_layer": "swiglu_packed",
        "norm_layer": "rmsnorm",
        "act_layer": "silu",
        "qk_norm": True,
        "init_values": 0.1,
        "reg_tokens": 2,
        "global_pool": "avg",
    },
}


def model(**options: Any) -> vitkern.ViT:
    torch.manual_seed(0)
    made = vitkern.ViT(**{**SIZES, **options})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def run(path: Path, images: Tensor) -> Tensor:
    """By whoever reads this kind of file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.fixture(params=[".pt2", ".onnx"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == ".onnx":
        pytest.importorskip("onnxscript")
    return tmp_path / "new folder" / f"model{request.param}"


@pytest.mark.parametrize("name", MODELS)
def test_any_batch_gives_the_models_logits(name: str, path: Path) -> None:
    ours = model(**MODELS[name])
    assert export(ours, path) == path
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 24)
        assert close(run(path, images), ours(images))


def test_bytes_are_normalised_in_the_file(path: Path) -> None:
    ours = model(mean=(0.1, 0.5, 0.9), std=0.3)
    export(ours, path, torch.zeros(1, 16, 24, 3, dtype=torch.uint8))
    images = torch.randint(0, 256, (3, 16, 24, 3), dtype=torch.uint8)
    assert close(run(path, images), ours(images))


def test_a_fixed_batch_and_another_size(path: Path) -> None:
    ours = model(dynamic_img_size=True)
    images = torch.randn(1, 3, 32, 8)
    export(ours, path, images, dynamic_batch=False)
    assert close(run(path, images), ours(images))


def test_what_the_model_runs_on_is_not_in_the_file(path: Path) -> None:
    ours = model(impl="reference", drop_path_rate=0.5, attn_drop_rate=0.5).train()
    export(ours, path)
    assert ours.training
    assert "auto" not in ours.blocks[0].attn.impl.values()
    images = torch.randn(2, 3, 16, 24)
    assert close(run(path, images), ours.eval()(images))
    if path.suffix == ".pt2":
        graph = torch.export.load(path).graph
        assert not [n for n in graph.nodes if "vitkern" in str(n.target)]


def test_a_folded_model(path: Path) -> None:
    ours = vitkern.fold(model())
    export(ours, path)
    images = torch.randn(2, 3, 16, 24)
    assert close(run(path, images), ours(images))


def test_no_file_is_called_good_that_is_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    module = sys.modules["vitkern.export"]
    real = module.portable

    def wrong(model: Any) -> Any:
        plain, calls = real(model), []
        forward = plain.forward

        def changed(images: Tensor) -> Tensor:
            calls.append(1)
            return forward(images) * (1 if len(calls) < 3 else 1.01)  # after tracing

        plain.forward = changed
        return plain

    monkeypatch.setattr(module, "portable", wrong)
    with pytest.raises(ValueError, match=r"differs from the model by .*allowed are 1e-04"):
        export(model(), path)


def test_a_batch_that_is_baked_in_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a tracer takes the example's batch for a constant."""
    if path.suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    real, module = torch.export.export, sys.modules["vitkern.export"]

    def fixed(model: Any, images: Any, dynamic_shapes: Any) -> Any:
        return real(model, images)

    monkeypatch.setattr(module.torch.export, "export", fixed)
    with pytest.raises((ValueError, AssertionError, RuntimeError), match=r"size|dimension"):
        export(model(), path)


def test_logits_that_are_all_zero(tmp_path: Path) -> None:
    """As those of a new head are, in some schemes."""
    ours = model()
    torch.nn.init.zeros_(ours.head.weight)
    torch.nn.init.zeros_(ours.head.bias)
    assert export(ours, tmp_path / "model.pt2").exists()


def test_what_onnxruntime_has_not_is_written_unchecked(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    ours, path = model().bfloat16(), tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"onnxruntime can't run .*check=False"):
        export(ours, path)
    assert export(ours, path, check=False).stat().st_size > 10_000


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"must end in one of .onnx \(ONNX\), .pt2.*got 'model.pt'"
    ):
        export(model(), "model.pt")
    with pytest.raises(TypeError, match=r"must be a vitkern.ViT, got Linear"):
        export(torch.nn.Linear(2, 2), tmp_path / "a.pt2")
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 16, 24\], got \[2, 3, 8, 8\]"):
        export(model(), tmp_path / "a.pt2", torch.zeros(2, 3, 8, 8))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"ONNX needs onnx.*vitkern\[export\]"):
        export(model(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
