"""Checkpoints in every container; files that are no checkpoint; save and inspect."""

import argparse
import json
import os
import pickle
import warnings
import zipfile
from functools import partial

import pytest
import torch
from torch import nn

from tests.small_vits import TINY, quietly, stir, tiny
from vitkern.checkpoint import FORMATS, CheckpointError, load, read, save, understand
from vitkern.inspect import add_options, inspect, run
from vitkern.model import ViT
from vitkern.model.config import ViTConfig

# Containers


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".npz", ""])
def test_what_was_saved_is_loaded(tmp_path, suffix):
    pytest.importorskip("safetensors")
    model, path = tiny(), tmp_path / f"model{suffix}"
    assert save(model, path) == path
    loaded = load(path, num_heads=4).eval()
    assert loaded.config == model.config
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_our_own_files_tell_everything(tmp_path, suffix):
    pytest.importorskip("safetensors")
    changes = {"img_size": (24, 33), "norm_layer": ("layernorm", 3e-4), "act_layer": "relu"}
    model = tiny(embed_dim=60, num_heads=3, dynamic_img_size=True, mean=(0.1, 0.2, 0.3), **changes)
    save(model, tmp_path / f"model{suffix}")
    loaded, images = quietly(tmp_path / f"model{suffix}"), torch.randn(1, 3, 24, 32)
    assert loaded.config == model.config
    assert torch.equal(loaded(images), model(images))


FOREIGN = {
    "torchvision": {},
    "huggingface": {"act_layer": "relu"},
    "huggingface-dinov2": {"act_layer": "relu", "init_values": 0.5, "num_classes": 0},
    "clip": {"act_layer": "quick_gelu", "pre_norm": True},
    "google": {"act_layer": "gelu_tanh", "norm_layer": ("layernorm", 1e-6), "img_size": 24},
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz", ""])
@pytest.mark.parametrize("format", FOREIGN)
def test_what_is_saved_for_others_comes_back_as_it_was(tmp_path, format, suffix):
    pytest.importorskip("safetensors")
    changes = {"norm_layer": ("layernorm", 3e-4), "num_heads": 4, **FOREIGN[format]}
    model, path = tiny(std=0.25, pos_resample="dinov2", **changes), tmp_path / f"model{suffix}"
    if format == "clip":  # whose projection has no bias
        torch.nn.init.zeros_(model.head.bias)
    save(model, path, format)
    assert understand(path).format.name == format
    loaded, images = load(path).eval(), torch.randn(1, 3, 24, 24)
    assert vars(loaded.config) == vars(model.config)
    assert torch.equal(loaded(images), model(images))
    assert load(path, act_layer="silu").config.act_layer == "silu"  # a user knows better


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{nope", "no JSON"),
        ("[1]", "found list"),
        ('{"rotary": true}', "rotary.*newer"),
        ('{"residual_dtype": "load"}', "'load', no dtype"),
        ('{"embed_dim": "wide"}', "embed_dim"),
    ],
)
def test_what_our_own_files_say_is_checked(tmp_path, text, why):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file(tiny().state_dict(), path, {"vitkern": text})
    with pytest.raises(CheckpointError, match=why):
        load(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_timm_reads_what_save_writes(tmp_path, suffix):
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("timm.models")
    path = tmp_path / f"model{suffix}"
    save(tiny(), path)
    theirs = timm.models.VisionTransformer(**TINY, num_classes=5).eval()
    models.load_checkpoint(theirs, str(path / "model.safetensors" if not suffix else path))
    images = torch.randn(1, 3, 24, 24)
    assert torch.allclose(theirs(images), tiny()(images), atol=1e-6)


def test_a_state_dict_in_memory_is_copied():
    model = tiny()
    before = torch.get_rng_state()
    loaded = load(model.state_dict(), num_heads=4)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn only to be overwritten
    assert loaded.head.weight.data_ptr() != model.head.weight.data_ptr()


def test_shards_in_a_folder(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny()
    state = list(model.state_dict().items())
    places = {}
    for i, part in enumerate((state[:9], state[9:])):
        name = f"model-{i}.safetensors"
        safetensors.save_file(dict(part), tmp_path / name)
        places.update(dict.fromkeys(dict(part), name))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for path in (tmp_path, index):
        assert torch.equal(load(path, num_heads=4).head.weight, model.head.weight)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors"):
        read(tmp_path)
    places["head.weight"] = "../model-0.safetensors"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"\.\./model-0"):
        read(tmp_path)


def test_npz_holds_bfloat16_and_nothing_pickled(tmp_path):
    numpy = pytest.importorskip("numpy")
    save(tiny().bfloat16(), tmp_path / "model.npz")
    assert read(tmp_path / "model.npz").state["head.weight"].dtype == torch.bfloat16
    numpy.savez(tmp_path / "bad.npz", a=numpy.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="plain arrays"):
        read(tmp_path / "bad.npz")


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "backbone."])
def test_training_checkpoints(wrapper, prefix):
    model = tiny()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    found = {"epoch": 3, "optimizer": {"state": {}}, wrapper: state}
    source = read(found)
    assert set(source.state) == set(model.state_dict())
    assert source.part == wrapper


def test_averaged_weights_come_first():
    model, other = tiny(), stir(tiny())
    average = torch.optim.swa_utils.AveragedModel(model)
    assert understand(average.state_dict(), num_heads=4).dropped.keys() == {"n_averaged"}
    found = {"ema": {"decay": 0.9}, "model": model.state_dict()}  # no weights of any average
    assert read(found).part == "model"
    found = {"state_dict": other.state_dict(), "state_dict_ema": model.state_dict()}
    assert torch.equal(load(found, num_heads=4).head.weight, model.head.weight)


def test_what_scripts_save_beside_weights(tmp_path):
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "checkpoint.pth"
    model = ViT(**vars(ViTConfig.from_name("vit_tiny_patch16_224")), device="meta")
    state = {key: torch.zeros(value.shape) for key, value in model.state_dict().items()}
    args = argparse.Namespace(model="deit_tiny_patch16_224", lr=0.1)
    torch.save({"model": state, "args": args, "best": numpy.float64(0.5), "epoch": 1}, path)
    found = understand(path)
    assert found.source.config["architecture"] == "deit_tiny_patch16_224"
    assert found.config.mean == (0.485, 0.456, 0.406)  # DeiT's, of the same shapes as ViT's


def test_a_folder_of_timms_hub(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny(global_pool="avg", norm_layer=("layernorm", 1e-6))
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    arguments = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    images = {"input_size": [3, 24, 24], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    contents = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": images,
    }
    (tmp_path / "config.json").write_text(json.dumps(contents))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = understand(path).config
        assert (found.num_heads, found.global_pool, found.fc_norm) == (4, "avg", None)
        assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_not_executed(tmp_path, zipped):
    made, path = str(tmp_path / "made"), tmp_path / "evil.pt"
    contents = {"model": tiny().state_dict(), "x": Evil(made)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir.*executes nothing"):
        load(path)
    path.write_bytes(pickle.dumps(contents))
    with pytest.raises(CheckpointError, match=r"evil\.pt"):
        load(path)
    assert not os.path.exists(made)


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"Linear.*state dict alone"):
        read(tmp_path / "module.pt")


def script(module, path):
    """As OpenAI saved CLIP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), path)


def test_torchscript_gives_tensors_without_its_code(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4)))
    module[0].half()
    script(module, tmp_path / "model.pt")
    found = read(tmp_path / "model.pt").state
    assert set(found) == set(module.state_dict())
    assert all(torch.equal(found[key], value) for key, value in module.state_dict().items())


def test_a_vit_out_of_torchscript(tmp_path):
    model, copy = tiny(), nn.Module()
    for name, value in model.state_dict().items():
        *parents, last = name.split(".")
        at = copy
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        at.register_parameter(last, nn.Parameter(value.clone()))
    script(copy, tmp_path / "model.pt")
    loaded, images = quietly(tmp_path / "model.pt", num_heads=4), torch.randn(1, 3, 24, 24)
    assert torch.equal(loaded(images), model(images))


def test_torchscript_with_foreign_classes_is_refused(tmp_path):
    made = str(tmp_path / "made")
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Evil(made)))
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        read(tmp_path / "evil.pt")
    assert not os.path.exists(made)


@pytest.mark.parametrize("kind", ["zip", "script"])
def test_damaged_pickles_are_called_so(tmp_path, kind):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    module = nn.Linear(3, 4)
    script(module, whole) if kind == "script" else torch.save(module.state_dict(), whole)
    with zipfile.ZipFile(whole) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    data = next(name for name in contents if name.endswith("/data.pkl"))
    for end in range(1, len(contents[data]) - 1, 3):
        with zipfile.ZipFile(cut, "w") as archive:
            for name, value in contents.items():
                archive.writestr(name, value[:end] if name == data else value)
        with pytest.raises(CheckpointError, match=r"cut\.pt is (no|a .* code of \w)"):
            read(cut)


def containers(folder):
    """One file of every kind."""
    model = tiny()
    for suffix in (".safetensors", ".pt", ".npz"):
        yield save(model, folder / f"model{suffix}")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    yield folder / "old.pt"
    script(nn.Linear(3, 4), folder / "script.pt")
    yield folder / "script.pt"


def test_truncated_files_are_called_so(tmp_path):
    pytest.importorskip("safetensors")
    for path in containers(tmp_path):
        whole = path.read_bytes()
        for share in (0.02, 0.5, 0.99):
            path.write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(CheckpointError, match=path.name):
                read(path)
        path.write_bytes(whole)
        assert read(path).state


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "HTML page"),
        (b"\x89HDF\r\n\x1a\n0000000", "Keras"),
        (b"just some text, long enough", "expected safetensors"),
    ],
)
def test_files_of_another_kind(tmp_path, contents, expected):
    path = tmp_path / "model.bin"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=expected):
        read(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder.*from_pretrained"):
        read(tmp_path / "missing")
    with pytest.raises(TypeError, match=r"model must be a vitkern\.ViT .*got Linear"):
        save(nn.Linear(2, 2), tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match="holds no weights: found nothing"):
        read(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a\.pth, b\.pth"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="no tensors"):
        read(tmp_path / "a.pth")
    with pytest.raises(TypeError, match=r"vitkern\.convert"):
        read(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="did you mean 'num_heads'"):
        load(tiny().state_dict(), num_head=4)


@pytest.mark.parametrize("package", ["safetensors", "numpy"])
def test_missing_packages_are_named(tmp_path, monkeypatch, package):
    pytest.importorskip("safetensors")
    path = save(tiny(), tmp_path / f"model{'.npz' if package == 'numpy' else '.safetensors'}")
    for name in (package, f"{package}.torch"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    for attempt in (partial(read, path), partial(save, tiny(), path)):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'vitkern\[checkpoints\]'"):
            attempt()


# save


def test_save_refuses_what_a_library_has_not(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="format must be one of"):
        save(model, tmp_path / "x.pt", "nobody")
    with pytest.raises(ValueError, match=r"\.safetensors, .*, or be a folder"):
        save(model, tmp_path / "x.h5")
    with pytest.raises(ValueError, match="no init_values"):
        save(model, tmp_path / "x.pt", "dinov2")
    with pytest.raises(ValueError, match="no pre_norm=True"):
        save(tiny(pre_norm=True), tmp_path / "x.pt", "beit")
    model.head = nn.Sequential(model.head)
    with pytest.raises(ValueError, match=r"lacks head\.weight.*head\.0\.weight"):
        save(model, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_views_are_saved_alone(tmp_path):
    model = tiny()
    whole = torch.zeros(100_000)
    whole[:5] = model.head.bias.detach()
    model.head.bias = nn.Parameter(whole[:5])
    path = save(model, tmp_path / "model.pt")
    assert path.stat().st_size < 4 * (sum(p.numel() for p in model.parameters()) + 5_000)


def test_the_formats_have_names_of_their_own():
    names = [one.name for one in FORMATS]
    assert len(set(names)) == len(names)
    assert all(one.title for one in FORMATS)


# inspect


def test_inspect_tells_what_a_file_is(tmp_path, capsys):
    path = tmp_path / "mae.pth"
    state = {
        **tiny().half().state_dict(),
        "mask_token": torch.zeros(1),
        "decoder_pred.bias": torch.zeros(1),
    }
    torch.save({"model": state}, path)
    found = inspect(path)
    assert found.parameters == sum(p.numel() for p in tiny().parameters())
    assert found.dtypes == {"float16": found.parameters, "float32": 2}
    assert found.architecture["embed_dim"] == 64
    text = str(found)
    for part in ("timm's VisionTransformer", "under 'model'", "MAE's decoder", "usual"):
        assert part in text
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert run(parser.parse_args([str(path)])) == 0
    assert "MAE's decoder" in capsys.readouterr().out
    assert run(parser.parse_args([str(path), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["container"] == "torch"
    assert run(parser.parse_args([str(tmp_path / "missing")])) == 2
    assert "no file or folder" in capsys.readouterr().err


def test_inspect_names_timms_model():
    state = ViT(**vars(ViTConfig.from_name("vit_tiny_patch16_224")), device="meta").state_dict()
    found = inspect(state)
    assert "vit_tiny_patch16_224" in found.models
    assert found.assumed["num_heads"].startswith("as in timm's")
    state = {**state, "blocks.0.ls1.gamma": state["norm.weight"]}
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.ls2\.gamma"):
        inspect(state)


def test_our_own_files_are_named_by_their_shapes(tmp_path):
    save(tiny(), tmp_path / "model.pt")
    assert inspect(tmp_path / "model.pt").models == ()
    name = "vit_tiny_patch16_224"
    save(ViT(**vars(ViTConfig.from_name(name)), device="cpu"), tmp_path / "model.pt")
    assert name in inspect(tmp_path / "model.pt").models
