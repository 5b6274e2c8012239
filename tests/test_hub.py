"""Folders in the manner of Hugging Face, written here and read here and by timm."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vitkern

pytest.importorskip("safetensors")

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model(**options: Any) -> vitkern.ViT:
    torch.manual_seed(1)
    made = vitkern.ViT(**{**SIZES, "num_classes": 5, **options})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_layer": ("layernorm", 1e-3), "act_layer": "quick_gelu", "pre_norm": True},
        {"block_fn": ("parallel_things", {"num_parallel": 3}), "mean": (0.1, 0.2, 0.3), "std": 0.3},
        {"residual_dtype": torch.float32, "embed_norm_layer": ("rmsnorm", 1e-4), "dim_head": 8},
        {"embed_layer": ("resnetv2", ()), "patch_size": 2, "embed_dim": 48},
        {"img_size": (16, 24), "rel_pos": "mlp", "rel_pos_dim": 12, "pos_embed": "none"},
        {"distilled": True, "reg_tokens": 2, "drop_path_rate": 0.2, "pos_resample": "dinov2"},
    ],
)
def test_what_was_saved_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    saved = model(**options)
    folder = saved.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = vitkern.ViT.from_pretrained(folder).eval()
    assert loaded.config == saved.config
    images = torch.randn(2, 3, *saved.config.img_size)
    assert torch.equal(loaded(images), saved(images))
    pixels = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    assert torch.equal(loaded(pixels), saved(pixels))


def test_how_it_runs_is_the_readers_choice(tmp_path: Path) -> None:
    folder = model(impl="reference", save="minimal").save_pretrained(tmp_path)
    assert vitkern.ViT.from_pretrained(folder).config.impl == "auto"
    again = vitkern.ViT.from_pretrained(folder, impl="reference", num_classes=0, dtype=torch.half)
    assert (again.config.impl, again.num_classes) == ("reference", 0)
    assert {p.dtype for p in again.parameters()} == {torch.half}


def test_timm_reads_the_folder(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    ours = model(init_values=0.1, reg_tokens=1, global_pool="avg", mean=(0.1, 0.2, 0.3))
    folder = ours.save_pretrained(tmp_path)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.testing.assert_close(theirs(IMAGES), ours(IMAGES), rtol=1e-5, atol=1e-5)
    assert list(theirs.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert list(theirs.pretrained_cfg["input_size"]) == [3, 32, 32]
    contents = json.loads((folder / "config.json").read_text())
    assert "architecture" in contents
    # An MLP class can't be said in JSON, and no ViT of timm's with this eps has this one.
    odd = model(mlp_layer="swiglu", norm_layer=("layernorm", 1e-3)).save_pretrained(tmp_path / "b")
    assert "architecture" not in json.loads((odd / "config.json").read_text())


def test_a_folder_of_timms(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("timm.models._hub")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    hub.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = vitkern.ViT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_repository_is_fetched_once_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    saved = model()
    folder, asked = saved.save_pretrained(tmp_path), []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    class Api:
        def __init__(self, token: Any) -> None:
            pass

        def list_repo_files(self, name: str, revision: str | None) -> list[str]:
            assert (name, revision) == ("someone/a-vit", "v2")
            if gone:
                raise OSError("no network")
            names = ("config.json", "model.safetensors", "pytorch_model.bin", "README.md")
            return [*names, "onnx/config.json", "onnx/model.safetensors"]

    gone: list[int] = []
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    options: dict[str, Any] = {"revision": "v2", "cache_dir": tmp_path}
    loaded = vitkern.ViT.from_pretrained("someone/a-vit", **options, drop_path_rate=0.1).eval()
    assert torch.equal(loaded(IMAGES), saved(IMAGES))
    assert loaded.config.drop_path_rate == 0.1
    ((name, given),) = asked
    assert name == "someone/a-vit"
    assert options.items() <= given.items()
    assert given["allow_patterns"] == ["config.json", "model.safetensors"]
    gone.append(1)
    for local in (False, True):
        vitkern.ViT.from_pretrained("someone/a-vit", **options, local_files_only=local)
        assert {"*.safetensors", "*.bin", "*.json"} <= set(asked[-1][1]["allow_patterns"])
        assert asked[-1][1]["local_files_only"] == local


def test_pushing_uploads_what_saving_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Api:
        def __init__(self, token: Any) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            assert (private, exist_ok) == (True, True)
            return type("Repo", (), {"repo_id": f"someone/{repo_id}"})

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    saved = model()
    assert saved.push_to_hub("a-vit", private=True, token="secret") == "https://hub/someone/a-vit"
    loaded = vitkern.ViT.from_pretrained(tmp_path / "someone" / "a-vit").eval()
    assert torch.equal(loaded(IMAGES), saved(IMAGES))


def test_what_a_file_would_not_tell_is_refused(tmp_path: Path) -> None:
    changed = model()
    changed.pos_drop.p = 0.5  # is no part of the function
    changed.save_pretrained(tmp_path)
    changed.blocks[1].mlp.act = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"blocks.1.mlp.act is ReLU\(\), and not .* would be lost"):
        changed.save_pretrained(tmp_path)


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no-such-folder", "./nothing/here", "a/b/c", str(tmp_path / "gone")):
        with pytest.raises(FileNotFoundError, match=r"is no file or folder here, nor 'owner/name'"):
            vitkern.ViT.from_pretrained(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"folder must be a directory, '.*file' is a file"):
        model().save_pretrained(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"no folder here, and .*vitkern\[hub\]"):
        vitkern.ViT.from_pretrained("someone/a-vit")
    with pytest.raises(ModuleNotFoundError, match=r"vitkern\[hub\]"):
        model().push_to_hub("a-vit")
