"""ViTConfig: what it accepts, how it normalises, and the errors of everything else."""

import dataclasses
import functools
import inspect
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import vitkern
from vitkern.model.config import ViTConfig


def test_defaults_and_order_are_timms() -> None:
    transformer = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    theirs = inspect.signature(transformer).parameters
    names = [f.name for f in dataclasses.fields(ViTConfig)]
    ours = inspect.signature(ViTConfig).parameters
    expected = [name for name in theirs if name not in ("device", "dtype")]
    assert names[: len(expected)] == expected
    own = ["dim_head", "patch_norm", "representation_size", "distilled"]
    own += ["rel_pos", "rel_pos_dim", "shared_rel_pos", "pos_resample"]
    own += ["mean", "std", "residual_dtype", "drop_path_mode", "save", "impl"]
    assert names[len(expected) :] == own
    for name in expected:
        if not name.endswith(("_layer", "_fn")):  # classes of timm's own; None here
            assert ours[name].default == theirs[name].default, name


def test_signature_of_the_model_shows_every_argument() -> None:
    parameters = inspect.signature(vitkern.ViT).parameters
    fields = [f.name for f in dataclasses.fields(ViTConfig)]
    assert list(parameters) == [*fields, "device", "dtype"]
    assert parameters["embed_dim"].default == 768


def test_a_config_is_plain_and_its_own_normal_form() -> None:
    config = ViTConfig(
        img_size=[32, 48],
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-3),
        act_layer=nn.SiLU,
        mlp_layer="swiglu",
        mean=[0.1, 0.2, 0.3],
        impl={"attention": "reference"},
    )
    assert config.img_size == (32, 48)
    assert config.patch_size == (16, 16)
    assert config.norm_layer == ("layernorm", 1e-3)
    assert config.act_layer == "silu"
    assert config.mean == (0.1, 0.2, 0.3)
    assert config.implementations["attention"] == "reference"
    assert config.implementations["layer_norm"] == "auto"
    assert ViTConfig(**vars(config)) == config == dataclasses.replace(config)
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, ViTConfig(**vars(config))}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3  # type: ignore[misc]


class _Unknown(nn.Module):
    pass


NORMS: list[tuple[Any, tuple[str, float]]] = [
    (None, ("layernorm", 1e-6)),
    ("", ("layernorm", 1e-6)),
    ("layernorm", ("layernorm", 1e-6)),
    ("rms_norm", ("rmsnorm", 1e-6)),
    (nn.LayerNorm, ("layernorm", 1e-5)),
    (functools.partial(nn.LayerNorm, eps=1e-6), ("layernorm", 1e-6)),
    (functools.partial(nn.RMSNorm, eps=1e-6), ("rmsnorm", 1e-6)),
    (functools.partial(nn.LayerNorm, elementwise_affine=True), ("layernorm", 1e-5)),
    (("rmsnorm", 1e-5), ("rmsnorm", 1e-5)),
]


@pytest.mark.parametrize(("given", "expected"), NORMS)
def test_norms(given: Any, expected: tuple[str, float]) -> None:
    assert ViTConfig(norm_layer=given).norm_layer == expected


def test_timms_classes_are_understood() -> None:
    layers = pytest.importorskip("timm.layers")
    transformer = pytest.importorskip("timm.models.vision_transformer")
    partial = functools.partial
    for given, expected in (
        ({"norm_layer": layers.LayerNorm}, ("layernorm", 1e-6)),
        ({"norm_layer": partial(layers.RmsNorm, eps=1e-5)}, ("rmsnorm", 1e-5)),
        ({"act_layer": layers.QuickGELU}, "quick_gelu"),
        ({"act_layer": layers.GELUTanh}, "gelu_tanh"),
        ({"act_layer": layers.GELU}, "gelu"),
        ({"mlp_layer": layers.Mlp}, "mlp"),
        ({"mlp_layer": layers.SwiGLU}, "swiglu"),
        ({"mlp_layer": layers.SwiGLUPacked}, "swiglu_packed"),
        ({"embed_layer": layers.PatchEmbed}, None),
        ({"embed_norm_layer": layers.LayerNorm}, ("layernorm", 1e-6)),
        ({"block_fn": transformer.Block}, "pre_norm"),
        ({"block_fn": transformer.ResPostBlock}, "res_post_norm"),
        ({"block_fn": partial(transformer.ParallelThingsBlock, num_parallel=2)}, "parallel_things"),
        (
            {"block_fn": partial(transformer.ParallelThingsBlock, num_parallel=3)},
            ("parallel_things", (("num_parallel", 3),)),
        ),
        ({"attn_layer": layers.Attention}, "attn"),
        ({"attn_layer": layers.DiffAttention}, "diff"),
    ):
        (name,) = given
        assert getattr(ViTConfig(**given), name) == expected
    for wrong in (
        {"mlp_layer": layers.GluMlp},  # gates with its last half
        {"mlp_layer": partial(layers.SwiGLU, align_to=8)},
        {"norm_layer": partial(layers.LayerNorm, affine=False)},
        {"norm_layer": layers.LayerNorm2d},
        {"block_fn": partial(transformer.ParallelThingsBlock, num_heads=3)},
        {"attn_layer": layers.AttentionRope},
        {"embed_layer": layers.PatchEmbedWithSize},
    ):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}=.*expected"):
            ViTConfig(**wrong)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"embed_dim": 100, "num_heads": 12}, ValueError, "embed_dim=100 and num_heads=12"),
    ({"embed_dim": 768.0}, TypeError, "embed_dim must be an integer, got 768.0"),
    ({"depth": True}, TypeError, "depth must be an integer, got True"),
    ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
    ({"num_classes": -1}, ValueError, "num_classes must be at least 0"),
    ({"img_size": None}, TypeError, "img_size must be an integer, got None"),
    ({"img_size": (224, 224, 3)}, ValueError, r"img_size must be one integer or \(height, width\)"),
    ({"img_size": 8}, ValueError, r"img_size \(8, 8\) is smaller than one patch"),
    ({"img_size": 30, "dynamic_img_pad": True}, ValueError, "img_size must be a multiple"),
    ({"class_token": "no"}, TypeError, "class_token must be True or False, got 'no'"),
    ({"fc_norm": 2}, TypeError, "fc_norm must be True or False, got 2"),
    ({"class_token": False}, ValueError, "global_pool='token' needs class_token"),
    ({"global_pool": "mean"}, ValueError, "global_pool must be one of 'token'.*got 'mean'"),
    ({"global_pool": None}, ValueError, "global_pool must be one of"),
    ({"pos_embed": "rope"}, ValueError, "pos_embed must be one of 'learn', 'none', got 'rope'"),
    ({"weight_init": "xavier"}, ValueError, "weight_init must be one of"),
    ({"drop_rate": 1.0}, ValueError, r"drop_rate must be in \[0, 1\), got 1.0"),
    ({"drop_path_rate": -0.1}, ValueError, "drop_path_rate must be in"),
    ({"attn_drop_rate": "0.1"}, TypeError, "attn_drop_rate must be a number"),
    ({"mlp_ratio": 0}, ValueError, "mlp_ratio must give at least one hidden unit"),
    (
        {"mlp_ratio": 3, "embed_dim": 3, "num_heads": 1, "mlp_layer": "swiglu_packed"},
        ValueError,
        "mlp_ratio must give an even hidden width",
    ),
    ({"init_values": "small"}, TypeError, "init_values must be a number"),
    ({"init_values": math.nan}, ValueError, "init_values must be finite, got nan"),
    ({"mlp_ratio": math.inf}, ValueError, "mlp_ratio must be finite, got inf"),
    ({"std": (1, 1, math.nan)}, ValueError, "std must be finite, got nan"),
    (
        {"scale_attn_norm": True, "block_fn": "parallel_scaling"},
        ValueError,
        "scale_attn_norm=True is not built in parallel_scaling blocks",
    ),
    (
        {"mlp_layer": "swiglu", "block_fn": "parallel_scaling"},
        ValueError,
        "mlp_layer='swiglu' is not built in parallel_scaling blocks",
    ),
    (
        {"attn_layer": "diff", "block_fn": "diff_parallel_scaling"},
        ValueError,
        "attn_layer='diff' is not built in diff_parallel_scaling blocks",
    ),
    (
        {"dim_head": 16, "block_fn": "parallel_scaling"},
        ValueError,
        "dim_head=16 is not built in parallel_scaling blocks",
    ),
    ({"embed_norm_layer": nn.BatchNorm1d}, ValueError, "embed_norm_layer=.*BatchNorm1d"),
    ({"embed_layer": "resnet"}, ValueError, "embed_layer='resnet'.*expected None, timm.PatchEmbed"),
    ({"embed_layer": ("conv_stem", (2, 2))}, ValueError, "embed_layer=.*strides of three layers"),
    ({"attn_layer": "diff", "num_heads": 256}, ValueError, "needs an even head width"),
    ({"dim_head": 0}, ValueError, "dim_head must be at least 1, got 0"),
    ({"rel_pos": "table"}, ValueError, "rel_pos must be one of 'bias', 'mlp', None"),
    ({"rel_pos": "bias", "reg_tokens": 1}, ValueError, "rel_pos='bias' needs every patch"),
    ({"shared_rel_pos": True}, ValueError, "shared_rel_pos=True needs rel_pos"),
    ({"distilled": True, "global_pool": "avg"}, ValueError, "distilled=True needs class_token"),
    ({"distilled": True, "fc_norm": True}, ValueError, "distilled=True needs.*no fc_norm"),
    ({"pos_resample": "scipy"}, ValueError, "pos_resample must be one of 'timm'"),
    ({"norm_layer": nn.BatchNorm1d}, ValueError, "norm_layer=.*BatchNorm1d.*expected 'layernorm'"),
    ({"norm_layer": nn.RMSNorm}, ValueError, "norm_layer=.*RMSNorm"),
    ({"norm_layer": _Unknown}, ValueError, "norm_layer="),
    ({"norm_layer": functools.partial(nn.LayerNorm, bias=False)}, ValueError, "norm_layer="),
    ({"norm_layer": functools.partial(nn.LayerNorm, eps="x")}, TypeError, "norm_layer eps"),
    ({"act_layer": "mish"}, ValueError, "act_layer='mish' is not supported; expected 'gelu'"),
    ({"act_layer": nn.ELU}, ValueError, "act_layer="),
    ({"act_layer": functools.partial(nn.ReLU, inplace=True)}, ValueError, "act_layer="),
    ({"act_layer": nn.functional.gelu}, ValueError, "act_layer="),
    ({"mlp_layer": nn.Linear}, ValueError, "mlp_layer=.*expected 'mlp'"),
    ({"block_fn": _Unknown}, ValueError, "block_fn=.*expected one of 'pre_norm'"),
    (
        {"block_fn": ("parallel_things", {"num_parallel": 0})},
        ValueError,
        "block_fn option num_parallel must be like 2, got 0",
    ),
    ({"attn_layer": "differential"}, ValueError, "attn_layer='differential'.*'attn', 'diff'"),
    ({"mean": (0.5, 0.5)}, ValueError, "mean must be a number or in_chans=3 of them"),
    ({"std": 0.0}, ValueError, "std must be positive"),
    ({"residual_dtype": "float32"}, TypeError, "residual_dtype must be a torch.dtype"),
    ({"residual_dtype": torch.int8}, ValueError, "residual_dtype must be floating point"),
    (
        {"residual_dtype": torch.float32, "final_norm": False},
        ValueError,
        "residual_dtype needs a norm",
    ),
    ({"impl": "cuda"}, ValueError, "impl='cuda' for .*; expected one of auto"),
    ({"impl": {"atention": "auto"}}, ValueError, "impl names the op 'atention'"),
    ({"impl": {"attention": "tritn"}}, ValueError, "impl='tritn' for attention"),
    ({"impl": 3}, TypeError, "impl must be a string or a mapping"),
    ({"save": "all"}, ValueError, "save must be one of 'balanced', 'minimal'"),
    ({"drop_path_mode": "batch"}, ValueError, "drop_path_mode must be one of 'scale', 'subset'"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), WRONG, ids=lambda v: str(v)[:40])
def test_mistakes_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        vitkern.ViT(**arguments, device="meta")


def test_unknown_arguments_offer_a_close_one() -> None:
    with pytest.raises(TypeError, match="unknown argument 'embed_dims'; did you mean 'embed_dim"):
        vitkern.ViT(embed_dims=768)
    with pytest.raises(TypeError, match=r"'drop_path'; did you mean .*'drop_path_rate'"):
        vitkern.create_model("vit_tiny_patch16_224", drop_path=0.1)


def test_names() -> None:
    assert ViTConfig.from_name("vit_base_patch16_384").img_size == (384, 384)
    assert ViTConfig.from_name("vit_base_patch16_224", num_classes=5).num_classes == 5
    assert ViTConfig.from_name("vit_giant_patch14_224").hidden_dim == 6144
    with pytest.raises(ValueError, match="model 'vit_bas_patch16_224'; did you mean 'vit_base"):
        vitkern.create_model("vit_bas_patch16_224")
    with pytest.raises(ValueError, match="unknown model 'resnet50'"):
        vitkern.create_model("resnet50")
    with pytest.raises(
        ValueError, match=r"pretrained=True: .*from_pretrained\('timm/vit_tiny_patch16_224.TAG'\)"
    ):
        vitkern.create_model("vit_tiny_patch16_224", pretrained=True)
    with pytest.raises(ValueError, match=r"weights \('augreg_in21k'\): .*224.augreg_in21k'"):
        vitkern.create_model("vit_tiny_patch16_224.augreg_in21k")


def test_import_is_quiet_and_leaves_the_gpu_alone() -> None:
    script = (
        "import sys, vitkern, torch;"
        "assert not torch.cuda.is_initialized();"
        "assert 'timm' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:vitkern", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
