"""Checkpoints: containers, detection, what shapes show, errors; files of timm's and Meta's."""

import argparse
import json
import os
import pickle
import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

from vitkern.checkpoint import FORMATS, CheckpointError, load, read, save, understand
from vitkern.config import ViTConfig
from vitkern.inspect import add_options, inspect, run
from vitkern.model import ViT

TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


def tiny(**changes):
    """A small model with weights that all matter."""
    torch.manual_seed(0)
    model = ViT(**{**TINY, "num_classes": 5, **changes})
    return stir(model)


@torch.no_grad()
def stir(model):
    """Every parameter drawn anew, also those that start at 0 or 1, and some buffers."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def quietly(*args, **kwargs):
    """`load` without a warning, which becomes an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(*args, **kwargs).eval()


def assert_same(ours, theirs, images, within=1e-6):
    """Equal logits and gradients, relative to the largest."""
    expected, found = theirs(images), ours(images)
    assert expected.abs().max() > 0.01
    assert (found - expected).abs().max() <= within * expected.abs().max()
    probe = torch.randn_like(expected)
    wanted = dict(zip(*gradients(theirs, expected, probe), strict=True))
    largest = max(grad.abs().max() for grad in wanted.values())
    for name, grad in zip(*gradients(ours, found, probe), strict=True):
        if name in wanted:  # some are 0 but for rounding, those of the keys' biases, say
            allowed = 1e-5 * wanted[name].abs().max() + 1e-7 * largest
            assert (grad - wanted[name]).abs().max() <= allowed, name


def gradients(model, output, probe):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return names, torch.autograd.grad((output * probe).sum(), parameters)


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
    import zipfile

    made = str(tmp_path / "made")
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Evil(made)))
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        read(tmp_path / "evil.pt")
    assert not os.path.exists(made)


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
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read(tmp_path / "missing")
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


# What is no ViT, or not a whole one


def test_foreign_networks_are_refused():
    torchvision = pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm.models.swin_transformer")
    resnet = torchvision.models.resnet18().state_dict()
    text = nn.TransformerEncoderLayer(16, 2, 16).state_dict()
    sizes = {"img_size": 56, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
    swin = timm.SwinTransformer(**sizes).state_dict()
    for state in (resnet, text, swin):
        with pytest.raises(CheckpointError, match="no ViT that vitkern knows"):
            load(state)


def test_relatives_of_timm_are_refused_by_name():
    timm = pytest.importorskip("timm.models.eva")
    eva = timm.Eva(img_size=24, patch_size=8, embed_dim=64, depth=1, num_heads=2, qkv_fused=False)
    with pytest.raises(CheckpointError, match="separate query, key and value"):
        load(eva.state_dict())


def test_dinov3_is_refused_by_name():
    state = {
        **tiny(init_values=0.1, pos_embed="none").state_dict(),
        "mask_token": torch.zeros(1, 64),
    }
    with pytest.raises(CheckpointError, match=r"DINOv2, but it has rotary.*rope_embed\.periods"):
        load(
            {**state, "storage_tokens": torch.zeros(1, 4, 64), "rope_embed.periods": torch.ones(4)}
        )


def test_tensors_that_are_missing_or_too_many():
    state = tiny().state_dict()
    for name in ("blocks.1.attn.proj.weight", "head.bias", "blocks.0.norm2.bias", "norm.bias"):
        with pytest.raises(CheckpointError, match=f"lacks {name}"):
            load({key: value for key, value in state.items() if key != name}, num_heads=4)
    with pytest.raises(CheckpointError, match=r"no place here: decode_head\.weight"):
        load({**state, "decode_head.weight": torch.zeros(1)}, num_heads=4)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc2\.weight is \[64, 200\]"):
        load({**state, "blocks.1.mlp.fc2.weight": torch.zeros(64, 200)}, num_heads=4)
    gap = {key: value for key, value in state.items() if not key.startswith("blocks.0.mlp")}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.fc1\.weight is missing"):
        load(gap)
    gap = {key.replace("blocks.1.", "blocks.2."): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"\[1\] are missing"):
        load(gap)
    with pytest.raises(CheckpointError, match="num_heads"):
        load(state, num_heads=5)


# The architecture, off the shapes

VARIANTS = [
    {},
    {"num_classes": 0},
    {"mlp_ratio": 2.75},
    {"mlp_layer": "swiglu_packed", "act_layer": "silu"},
    {"mlp_layer": "swiglu", "qkv_bias": False, "proj_bias": False},
    {"patch_size": (8, 12), "in_chans": 2},
    {"class_token": False, "global_pool": "avg"},
    {"class_token": False, "global_pool": "avg", "fc_norm": False},
    {"class_token": False, "global_pool": "map", "num_classes": 0},
    {"global_pool": "map", "fc_norm": True},
    {"reg_tokens": 3},
    {"reg_tokens": 4, "no_embed_class": True},
    {"class_token": False, "reg_tokens": 2, "global_pool": "avg", "no_embed_class": True},
    {"distilled": True},
    {"representation_size": 40},
    {"pos_embed": "none"},
    {"qk_norm": True, "norm_layer": "rmsnorm"},
    {"init_values": 1e-5, "pre_norm": True},
    {"scale_attn_norm": True, "scale_mlp_norm": True},
    {"final_norm": False},
    {"embed_norm_layer": "rmsnorm", "norm_layer": "rmsnorm"},
    {"patch_norm": True, "embed_norm_layer": "layernorm"},
    {"dim_head": 24, "num_heads": 3},
    {"block_fn": "parallel_scaling", "qkv_bias": False, "qk_norm": True},
    {"block_fn": ("parallel_scaling", {"fuse_out_proj": True}), "init_values": 1e-5},
    {"block_fn": ("parallel_things", {"num_parallel": 3}), "init_values": 1e-5},
    {"block_fn": ("diff_parallel_scaling", {"dual_lambda": True})},
    {"attn_layer": "diff"},
    {"attn_layer": ("diff", {"dual_lambda": True}), "reg_tokens": 1},
    {"rel_pos": "bias", "pos_embed": "none"},
    {"rel_pos": "bias", "pos_embed": "none", "shared_rel_pos": True, "class_token": False,
     "global_pool": "avg"},
    {"rel_pos": "mlp", "pos_embed": "none", "rel_pos_dim": 48},
    {"embed_layer": ("resnetv2", (1, 2)), "patch_size": 1, "img_size": 32},
    {"embed_layer": ("resnetv2", ()), "patch_size": 2},
    {"embed_layer": ("conv_stem", (2, 2, 2)), "patch_size": 1, "no_embed_class": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(map(str, c)) or "plain")
def test_every_field_that_shapes_show(changes):
    model = ViT(**{**TINY, "num_classes": 5, **changes}, device="meta")
    unseen = {"num_heads", "act_layer", "img_size", "norm_layer"}
    if changes.get("pos_embed") != "none":
        unseen.discard("img_size")
    elif "rel_pos" not in changes:
        unseen.add("pos_embed")  # they may be computed
    if changes.get("in_chans"):  # not a square grid: then somebody has to say it
        unseen.add("img_size")
    told = {field: getattr(model.config, field) for field in unseen}
    found = understand(model.state_dict(), **told)
    wanted, free = vars(model.config), {"init_values", "weight_init"}
    differing = {key for key, value in vars(found.config).items() if value != wanted[key]} - free
    assert not differing
    assert bool(found.config.init_values) == bool(model.config.init_values)
    expected = model.state_dict()
    assert {key: value.shape for key, value in found.state.items()} == {
        key: value.shape for key, value in expected.items()
    }


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224", "vit_huge_patch14_224", "deit3_small_patch16_224",
        "vit_base_r50_s16_384", "vit_so400m_patch14_siglip_384", "vit_giant_patch14_reg4_dinov2",
        "vit_base_patch16_rpn_224", "vit_relpos_base_patch16_clsgap_224", "aimv2_large_patch14_224",
    ],
)  # fmt: skip
def test_models_of_timms_by_their_shapes(name):
    config = ViTConfig.from_name(name)
    model = ViT(**vars(config), device="meta")
    found = understand({"arch": name, "state_dict": model.state_dict()})
    free = {"weight_init", "init_values", "fc_norm"}
    wanted = vars(config)
    assert not {k for k, value in vars(found.config).items() if value != wanted[k]} - free
    assert found.config.norm_after_pool == config.norm_after_pool
    assert found.names == (name,)
    found = understand(model.state_dict())
    assert found.config.num_heads == config.num_heads
    assert found.config.norm_layer == config.norm_layer
    assert "as in timm's" in found.assumed["norm_layer"]


def test_guesses_are_said():
    with pytest.warns(UserWarning, match=r"tells num_heads=1 \(usual\)"):
        load(tiny().state_dict())
    config = ViTConfig.from_name("vit_base_patch32_clip_224")
    state = ViT(**vars(config), device="meta").state_dict()
    with pytest.warns(UserWarning, match="others have quick_gelu"):
        load(state, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(state, device="meta", act_layer="gelu")


def test_positions_of_a_grid_that_is_not_square():
    model, images = tiny(img_size=(24, 32)), torch.randn(1, 3, 24, 32)
    state = OrderedDict(model.state_dict())
    with pytest.raises(CheckpointError, match=r"13 positions.*img_size"):
        load(state, num_heads=4)
    own = model.state_dict()  # a state dict of ours knows its grid, while it is what it was
    for loaded in (load(own, num_heads=4), load(state, num_heads=4, img_size=(24, 32))):
        assert torch.equal(loaded.eval()(images), model(images))


# timm's live models


def theirs(**changes):
    """A model of timm's, stirred."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    return stir(timm.VisionTransformer(**{**TINY, "num_classes": 5, **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm_layer": partial(nn.LayerNorm, eps=1e-2)}, {"norm_layer": ("layernorm", 1e-2)}),
        ({"img_size": (24, 32)}, {"img_size": (24, 32)}),
        ({"class_token": False, "global_pool": "avg", "init_values": 0.3}, {}),
        ({"reg_tokens": 2, "no_embed_class": True, "qk_norm": True, "pre_norm": True}, {}),
        ({"act_layer": "quick_gelu", "global_pool": "map"}, {"act_layer": "quick_gelu"}),
    ],
)
def test_timms_own_numbers(changes, told):
    model, size = theirs(**changes), changes.get("img_size", (24, 24))
    ours = quietly(model.state_dict(), num_heads=4, **told)
    assert_same(ours, model, torch.randn(2, 3, *size))


def test_distilled_and_hybrid_files_of_timms():
    deit = pytest.importorskip("timm.models.deit")
    torch.manual_seed(0)
    model = stir(deit.VisionTransformerDistilled(**TINY, num_classes=5))
    assert_same(quietly(model.state_dict(), num_heads=4), model, torch.randn(2, 3, 24, 24))


def test_spellings_of_older_files():
    model, images = theirs(init_values=0.3), torch.randn(1, 3, 24, 24)
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in model.state_dict().items()
    }
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    assert torch.allclose(quietly(state, num_heads=4)(images), model(images), atol=1e-5)


# Adapting to another size


@pytest.mark.parametrize("size", [(40, 24), (32, 32), (16, 48)])
@pytest.mark.parametrize("reg", [{}, {"reg_tokens": 2, "no_embed_class": True}])
def test_positions_follow_the_image_as_timms_do(size, reg):
    timm = pytest.importorskip("timm.models.vision_transformer")
    model, other = theirs(**reg), theirs(img_size=size, **reg)
    other.load_state_dict(timm.checkpoint_filter_fn(model.state_dict(), other))
    images = torch.randn(1, 3, *size)
    ours = quietly(model.state_dict(), num_heads=4, img_size=size)
    assert torch.allclose(ours(images), other(images), atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (16, 32)])
def test_tables_of_relative_positions_follow_as_timms_do(size):
    timm = pytest.importorskip("timm.models.beit")
    torch.manual_seed(0)
    kinds = {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "num_classes": 5}
    model, other = (stir(timm.Beit(**{**TINY, **kinds, **s})) for s in ({}, {"img_size": size}))
    other.load_state_dict(timm.checkpoint_filter_fn(model.state_dict(), other), strict=False)
    images = torch.randn(1, 3, *size)
    ours = load(model.state_dict(), img_size=size).eval()
    assert torch.allclose(ours(images), other(images), atol=1e-5)
    same = load(other.state_dict(), img_size=size).eval()
    assert torch.allclose(same(images), other(images), atol=1e-5)


def test_patches_and_channels_follow_as_timms_do():
    timm = pytest.importorskip("timm.models.vision_transformer")
    manipulate = pytest.importorskip("timm.models._manipulate")
    model, other = theirs(), theirs(patch_size=12, in_chans=5)
    state = model.state_dict()
    weight = manipulate.adapt_input_conv(5, state["patch_embed.proj.weight"])
    state = {**state, "patch_embed.proj.weight": weight}
    other.load_state_dict(timm.checkpoint_filter_fn(state, other))
    images = torch.randn(1, 5, 24, 24)
    ours = quietly(model.state_dict(), num_heads=4, patch_size=12, in_chans=5)
    assert torch.allclose(ours(images), other(images), atol=1e-4)
    with pytest.raises(CheckpointError, match="in_chans=3"):
        load(other.state_dict(), num_heads=4, in_chans=3)


def test_another_head():
    state, images = tiny().state_dict(), torch.randn(1, 3, 24, 24)
    with pytest.warns(UserWarning, match=r"no head\.weight, head\.bias"):
        model = load(state, num_heads=4, num_classes=7)
    assert model(images).shape == (1, 7)
    assert 0.01 < model.head.weight.std() < 0.03
    assert not model.head.bias.any()
    features = quietly(state, num_heads=4, num_classes=0)
    expected = tiny().forward_head(tiny().forward_features(images), pre_logits=True)
    assert torch.allclose(features(images), expected, atol=1e-5)


def test_another_pool_moves_the_norm():
    model, images = tiny(), torch.randn(1, 3, 24, 24)
    pooled = quietly(model.state_dict(), num_heads=4, global_pool="avg")
    assert torch.equal(pooled.fc_norm.weight, model.norm.weight)
    before = quietly(model.state_dict(), num_heads=4, global_pool="avg", fc_norm=False)
    expected = model.head(model.forward_features(images)[:, 1:].mean(1))
    assert torch.allclose(before(images), expected, atol=1e-6)
    with pytest.raises(CheckpointError, match="attn_pool"):
        load(model.state_dict(), num_heads=4, global_pool="map")
    mapped = understand(tiny(global_pool="map").state_dict(), num_heads=4, global_pool="avg")
    assert "attn_pool.latent" in mapped.dropped


def test_dtype_and_device():
    state = tiny().half().state_dict()
    assert {p.dtype for p in load(state, num_heads=4).parameters()} == {torch.float32}
    model = load(state, num_heads=4, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.patch_embed.mean.dtype == torch.float32
    meta = load(state, num_heads=4, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_buffers_that_no_file_holds_are_filled():
    model = tiny(rel_pos="bias", pos_embed="none")
    images = torch.randn(1, 3, 24, 24)
    assert torch.equal(quietly(model.state_dict())(images), model(images))


# Meta's, Microsoft's and Apple's


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2(tmp_path, registers, gated):
    timm = pytest.importorskip("timm.models.vision_transformer")
    layers = pytest.importorskip("timm.layers")
    mlp = {"mlp_layer": layers.SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}
    changes = {"init_values": 0.1, "num_classes": 0, "reg_tokens": registers, **mlp}
    model = theirs(**changes, no_embed_class=registers > 0)
    told = {"act_layer": "silu"} if gated else {}
    path = tmp_path / "dinov2.pth"
    save(quietly(model.state_dict(), num_heads=4, **told), path, "dinov2")
    state = read(path).state
    names = {"mask_token", "pos_embed", "cls_token"} | ({"register_tokens"} if registers else set())
    assert names <= set(state)
    assert ("blocks.0.mlp.w12.weight" in state) == gated
    assert state["pos_embed"].shape[1] == 10  # the class token has one, whatever it is worth
    theirs_again = theirs(**changes, no_embed_class=registers > 0)
    theirs_again.load_state_dict(timm.checkpoint_filter_fn(dict(state), theirs_again))
    ours, images = quietly(path, num_heads=4), torch.randn(2, 3, 24, 24)
    assert_same(ours, theirs_again, images)
    assert ours.config.pos_resample == ("timm" if registers else "dinov2")
    if registers:  # position 0 belongs to the class token
        state["pos_embed"][:, 0] += 1.0
        state["cls_token"] -= 1.0
        assert torch.allclose(quietly(state, num_heads=4)(images), ours(images), atol=1e-5)


def test_dinov2_in_chunks_and_in_training():
    model = tiny(init_values=0.1, num_classes=0)
    images = torch.randn(1, 3, 24, 24)
    state = {
        "backbone." + key.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): v
        for key, v in model.state_dict().items()
    }
    state |= {"backbone.mask_token": torch.zeros(1, 64), "dino_head.mlp.0.weight": torch.ones(2, 2)}
    found = understand({"teacher": state, "iteration": 3}, num_heads=4)
    assert found.format.name == "dinov2"
    assert "dino_head.mlp.0.weight" in found.dropped
    assert torch.equal(quietly({"teacher": state}, num_heads=4)(images), model(images))


def test_mae_loses_its_decoder_and_dino_its_projection():
    model = tiny(num_classes=0)
    extras = {
        "mask_token",
        "decoder_pos_embed",
        "decoder_blocks.0.norm1.weight",
        "decoder_pred.bias",
    }
    state = {**model.state_dict(), **dict.fromkeys(extras, torch.zeros(1))}
    found = understand({"model": state}, num_heads=4)
    assert found.config == model.config
    assert set(found.dropped) == extras
    dino = {"module.backbone." + key: value for key, value in model.state_dict().items()}
    dino["module.head.last_layer.weight_g"] = torch.zeros(1)
    found = understand({"student": {}, "teacher": dino}, num_heads=4)
    assert set(found.dropped) == {"head.last_layer.weight_g"}


def test_moco_and_ijepa():
    model = tiny(num_classes=0)
    moco = {
        f"module.{which}_encoder.{key}": value
        for which in ("base", "momentum")
        for key, value in model.state_dict().items()
    }
    moco["module.base_encoder.head.0.weight"] = torch.zeros(2, 2)
    found = understand({"arch": "vit_small", "state_dict": moco}, num_heads=4)
    assert found.config == model.config
    assert all("slow copy" in why or "projection" in why for why in found.dropped.values())
    jepa = tiny(class_token=False, global_pool="avg", fc_norm=False, num_classes=0)
    state = {"module." + key: value for key, value in jepa.state_dict().items()}
    found = understand({"encoder": state, "target_encoder": {}, "predictor": {}}, num_heads=4)
    assert found.config == jepa.config


@pytest.mark.parametrize(
    "positions",
    [
        {"use_rel_pos_bias": True, "use_abs_pos_emb": False},
        {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False, "global_pool": "token"},
        {"qkv_bias": False},
    ],
)
def test_beit(tmp_path, positions):
    timm = pytest.importorskip("timm.models.beit")
    torch.manual_seed(0)
    arguments = {"qkv_bias": True, "init_values": 0.1, "num_classes": 5, **TINY, **positions}
    model = stir(timm.Beit(**arguments))
    ours = load(model.state_dict(), num_heads=4).eval()
    assert_same(ours, model, torch.randn(2, 3, 24, 24))
    if arguments["qkv_bias"]:
        state = read(save(ours, tmp_path / "beit.pt", "beit")).state
        assert set(state) == set(model.state_dict())
        model.load_state_dict(state)
        assert all(torch.equal(state[key], v) for key, v in model.state_dict().items())
        with torch.no_grad():
            ours.blocks[0].attn.qkv.bias += 1
        with pytest.raises(CheckpointError, match="keys' part"):
            save(ours, tmp_path / "beit.pt", "beit")


def test_aimv2(tmp_path):
    timm = pytest.importorskip("timm.models.vision_transformer")
    layers = pytest.importorskip("timm.layers")
    rms = partial(layers.RmsNorm, eps=1e-5)
    changes = {
        "class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0,
        "qkv_bias": False, "proj_bias": False, "act_layer": "silu", "mlp_layer": layers.SwiGLU,
        "norm_layer": rms, "embed_norm_layer": rms,
    }  # fmt: skip
    model = theirs(**changes)
    told = {"norm_layer": ("rmsnorm", 1e-5), "act_layer": "silu", "global_pool": "avg"}
    ours = load(model.state_dict(), num_heads=4, embed_norm_layer=("rmsnorm", 1e-5), **told)
    state = read(save(ours, tmp_path / "aim.pt", "aimv2")).state
    assert "trunk.blocks.0.mlp.fc3.weight" in state
    again = theirs(**changes)
    again.load_state_dict(timm.checkpoint_filter_fn(dict(state), again))
    assert_same(quietly(state, num_heads=4), again, torch.randn(2, 3, 24, 24))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_beit3(tmp_path, pool):
    timm = pytest.importorskip("timm.models.vision_transformer")
    layer = partial(nn.LayerNorm, eps=1e-5)
    changes = {"scale_attn_norm": True, "scale_mlp_norm": True, "norm_layer": layer}
    model = theirs(**changes, global_pool=pool)
    ours = load(model.state_dict(), num_heads=4, norm_layer=("layernorm", 1e-5)).eval()
    state = read(save(ours, tmp_path / "beit3.pt", "beit3")).state
    state["beit3.encoder.layers.0.ffn.B.fc1.weight"] = torch.zeros(3)
    state["beit3.text_embed.weight"] = torch.zeros(3)
    assert_same(quietly(state, num_heads=4), model, torch.randn(2, 3, 24, 24))
    if pool == "avg":  # the only one that timm's reader expects
        again = theirs(**changes, global_pool=pool)
        again.load_state_dict(timm.checkpoint_filter_fn(dict(state), again))
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_eva_without_rotary_positions():
    timm = pytest.importorskip("timm.models.eva")
    torch.manual_seed(0)
    for changes in ({"global_pool": "avg"}, {"global_pool": "token", "qkv_bias": False}):
        model = stir(timm.Eva(**{**TINY, "num_classes": 5, **changes}))
        assert_same(load(model.state_dict(), num_heads=4).eval(), model, torch.randn(2, 3, 24, 24))
    rotary = timm.Eva(**TINY, use_rot_pos_emb=True, use_abs_pos_emb=False)
    with pytest.raises(CheckpointError, match=r"no positions.*rotary"):
        load(rotary.state_dict(), num_heads=4)


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
