"""Checkpoints understood: what shapes show, errors, other sizes; timm's live models."""

import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

from tests.small_vits import TINY, assert_same, quietly, stir, theirs, tiny
from vitkern.checkpoint import CheckpointError, Source, detect, load, understand
from vitkern.checkpoint._complete import _fits, _sizes
from vitkern.checkpoint._infer import infer
from vitkern.model import ViT
from vitkern.model.config import ViTConfig
from vitkern.model.weights import resample_pos_embed

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


@pytest.mark.parametrize("config", [{"model_type": "swinv2"}, {"architecture": "swinv2"}])
def test_a_foreign_network_is_called_by_its_name(config):
    source = Source({"layers.0.weight": torch.zeros(2)}, config)
    with pytest.raises(CheckpointError, match="is 'swinv2', and its 1 tensors begin with layers"):
        detect(source)


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


def test_tensors_that_would_be_lost_or_misread():
    state = tiny().state_dict()
    twice = {f"backbone.{key}": value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=r"backbone\.norm\.weight and norm\.weight would"):
        load({**twice, "norm.weight": torch.ones(64)}, num_heads=4)
    for dtype in (torch.int8, torch.complex64):
        quantised = {**state, "blocks.1.mlp.fc1.weight": torch.zeros(256, 64, dtype=dtype)}
        with pytest.raises(CheckpointError, match=rf"fc1.weight is {dtype}, expected torch"):
            load(quantised, num_heads=4)


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


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ({"norm_kind": "rmsnorm"}, {}),
        ({"init": True}, {}),
        ({"no_embed_class": True}, {}),
        ({"attn_kind": "diff"}, {}),
        ({"block_kind": "parallel_things"}, {}),
        ({"embed_norm": True}, {}),
        ({"global_pool": "map"}, {}),
        ({"num_heads": 6}, {}),
        ({}, {"num_heads": 6}),
        ({"hidden_dim": 3000}, {}),
    ],
)
def test_a_model_of_timms_is_meant_only_if_all_is_its_own(seen, told):
    config = ViTConfig.from_name("vit_base_patch16_224")
    state = ViT(**vars(config), device="meta").state_dict()
    own = infer(dict(state), {})
    assert _fits(config, own, {})
    assert not _fits(config, {**own, **seen}, told)


def test_an_image_that_is_no_multiple_of_its_patches():
    name = "vit_so400m_patch14_siglip_384"
    fields = {"img_size": (378, 378), "patch_size": (14, 14)}  # as its positions show
    _sizes(fields, {}, [ViTConfig.from_name(name)], [name], {})
    assert fields["img_size"] == (384, 384)


def test_the_norm_of_patches_has_the_others_eps():
    norm = ("layernorm", 1e-3)
    state = dict(tiny(norm_layer=norm, embed_norm_layer=norm).state_dict())
    assert load(state, num_heads=4, norm_layer=norm).config.embed_norm_layer == norm


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
    long = tiny(img_size=(16, 64))  # of as many patches as a square
    found = load(long.state_dict(), num_heads=4, img_size=32)
    resized = resample_pos_embed(long.pos_embed, (4, 4), (2, 8), 1)
    assert torch.equal(found.pos_embed, resized)


def test_tensors_know_the_image_better_than_their_config():
    source = Source(dict(tiny().state_dict()), {"pretrained_cfg": {"input_size": [3, 48, 48]}})
    assert load(source, num_heads=4).config.img_size == (24, 24)


# timm's live models


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
    two = tiny(distilled=True).state_dict()
    with pytest.warns(UserWarning, match=r"head_dist\.weight, head_dist\.bias"):
        assert load(two, num_heads=4, num_classes=7).head_dist.weight.shape == (7, 64)
    grey = load(state, num_heads=4, mean=(0.1, 0.2, 0.6), in_chans=1)
    assert grey.config.mean == pytest.approx(0.3)


def test_another_pool_moves_the_norm():
    model, images = tiny(), torch.randn(1, 3, 24, 24)
    pooled = quietly(model.state_dict(), num_heads=4, global_pool="avg")
    assert torch.equal(pooled.fc_norm.weight, model.norm.weight)
    before = quietly(model.state_dict(), num_heads=4, global_pool="avg", fc_norm=False)
    expected = model.head(model.forward_features(images)[:, 1:].mean(1))
    assert torch.allclose(before(images), expected, atol=1e-6)
    with pytest.raises(CheckpointError, match="attn_pool"):
        load(model.state_dict(), num_heads=4, global_pool="map")
    assert "global_pool" in understand(model.state_dict()).assumed
    assert "global_pool" not in understand(model.state_dict(), global_pool="avg").assumed
    mapped = understand(tiny(global_pool="map").state_dict(), num_heads=4, global_pool="avg")
    assert "attn_pool.latent" in mapped.dropped
    siglip = tiny(global_pool="map", class_token=False, fc_norm=False, num_classes=0)
    found = load(siglip.state_dict(), num_heads=4, fc_norm=False, global_pool="avg").eval()
    told = Source(dict(siglip.state_dict()), {"vitkern": {**vars(siglip.config)}})
    assert torch.equal(load(told, global_pool="avg").eval()(images), found(images))
    assert torch.allclose(found(images), siglip.forward_features(images).mean(1), atol=1e-5)


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
