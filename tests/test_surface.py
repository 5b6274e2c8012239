"""The rest of timm's surface on vitkern.ViT, held against timm with the same weights."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkern

timm = pytest.importorskip("timm")
from timm.models._features import FeatureGetterNet  # noqa: E402
from timm.models._manipulate import group_parameters  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import (  # noqa: E402
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
    checkpoint_filter_fn,
)
from timm.models.vision_transformer_relpos import VisionTransformerRelPos  # noqa: E402

SMALL: dict[str, Any] = {
    "img_size": (32, 24),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 6,
}
DISTILLED = {"distilled": True}


def build(**arguments: Any) -> vitkern.ViT:
    torch.manual_seed(0)
    return vitkern.ViT(**{**SMALL, **arguments})


def pair(**arguments: Any) -> tuple[Any, vitkern.ViT]:
    """timm's model and ours with the same generic weights."""
    ours = build(**arguments)
    distilled = arguments.pop("distilled", False)
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    theirs = kind(**{**SMALL, **arguments})
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))


def tensors(value: Any) -> list[Tensor]:
    """All tensors of nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for part in values for tensor in tensors(part)]


def shape_of(value: Any) -> Any:
    """The nesting itself."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shape_of(part) for key, part in value.items()}
    return type(value)(shape_of(part) for part in value)


def assert_equal(
    theirs: nn.Module, ours: nn.Module, call: Callable[[Any], Any], seed: int = 5
) -> None:
    """Results and all gradients of `call`, within 1e-5 relative."""
    results, grads = [], []
    for model in (theirs, ours):
        model.zero_grad()
        torch.manual_seed(seed)
        results.append(call(model))
        loss = sum(t.square().sum() + t[..., 0].sum() for t in tensors(results[-1]))
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert shape_of(results[1]) == shape_of(results[0])
    found = [(str(i), *both) for i, both in enumerate(zip(*map(tensors, results), strict=True))]
    for name, expected in grads[0].items():
        if expected is None or not expected.any():
            assert grads[1][name] is None or not grads[1][name].any(), name
        elif not name.endswith("k_norm.bias"):
            found.append((name, expected, grads[1][name]))
    for name, expected, given in found:
        assert given.dtype == expected.dtype
        assert (given - expected).norm() <= 1e-5 * expected.norm(), name


# Intermediates

INTERMEDIATES: list[dict[str, Any]] = [
    {},
    {"indices": 2, "norm": True},
    {"indices": [2, -3], "return_prefix_tokens": True},
    {"indices": (1, 1), "stop_early": True, "output_fmt": "NLC"},
    {"indices": [0], "intermediates_only": True, "return_prefix_tokens": True},
    {"indices": 1, "output_dict": True},
    {"indices": 2, "output_dict": True, "return_prefix_tokens": True, "norm": True},
    {"indices": [0], "output_dict": True, "intermediates_only": True, "stop_early": True},
]


@pytest.mark.parametrize("options", INTERMEDIATES)
def test_intermediates_are_timms(options: dict[str, Any], images: Tensor) -> None:
    theirs, ours = pair(init_values=0.3, reg_tokens=2)
    assert_equal(theirs, ours, lambda model: model.forward_intermediates(images, **options))


@pytest.mark.parametrize(
    "arguments",
    [
        {"class_token": False, "global_pool": "avg", "drop_path_rate": 0.4},
        {"pos_embed": "none", "patch_drop_rate": 0.3, "pre_norm": True},
        {"block_fn": ResPostBlock, "init_values": 0.2},
        {"block_fn": ParallelThingsBlock},
        DISTILLED,
    ],
)
def test_intermediates_of_other_models(arguments: dict[str, Any], images: Tensor) -> None:
    theirs, ours = pair(**arguments)
    options: dict[str, Any] = {"output_fmt": "NLC", "return_prefix_tokens": True, "norm": True}
    assert_equal(theirs, ours, lambda model: model.forward_intermediates(images, **options))


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "reshape": True, "norm": True}, {"n": [0], "return_prefix_tokens": 1}]
)
def test_intermediate_layers_are_timms(options: dict[str, Any], images: Tensor) -> None:
    theirs, ours = pair()
    assert_equal(theirs, ours, lambda model: model.get_intermediate_layers(images, **options))


def test_intermediates_of_images_of_any_size_and_of_bytes() -> None:
    images = torch.randn(2, 3, 27, 41)
    theirs, ours = pair(dynamic_img_size=True, dynamic_img_pad=True)
    assert_equal(theirs, ours, lambda model: model.forward_intermediates(images))
    pixels = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8)
    floats = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    for given, expected in zip(
        ours.get_intermediate_layers(pixels, 3, reshape=True),
        theirs.get_intermediate_layers(floats, 3, reshape=True),
        strict=True,
    ):
        assert given.shape == (2, 32, 2, 3)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_intermediates_are_checkpointed_in_training(images: Tensor) -> None:
    theirs, ours = pair(drop_path_rate=0.3)
    ours.set_grad_checkpointing()
    ran: list[int] = []
    ours.blocks[0].attn.register_forward_hook(lambda *_: ran.append(1))
    assert_equal(theirs, ours, lambda model: model.forward_intermediates(images))
    assert len(ran) == 2


def test_stopping_early_runs_no_further_block_and_hooks_fire(images: Tensor) -> None:
    model = build()
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.forward_intermediates(images, [1], stop_early=True)
    assert ran == [0, 1]
    model.forward_intermediates(images, [1])
    assert ran == [0, 1, 0, 1, 2]


def test_compiled_intermediates_equal_eager(images: Tensor) -> None:
    model = build(depth=2).eval()
    torch._dynamo.reset()
    run = torch.compile(model.forward_intermediates, fullgraph=True, backend="aot_eager")
    expected = model.forward_intermediates(images, [0, 1], norm=True)
    for given, wanted in zip(
        tensors(run(images, [0, 1], norm=True)), tensors(expected), strict=True
    ):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "text"),
    [
        ("forward_intermediates", {"indices": 4}, ValueError, "indices must be from 1 to 3"),
        ("forward_intermediates", {"indices": 0}, ValueError, "indices must be from 1 to 3"),
        ("forward_intermediates", {"indices": [3]}, ValueError, "indices must be one or more"),
        ("forward_intermediates", {"indices": []}, ValueError, "indices must be one or more"),
        ("forward_intermediates", {"indices": True}, TypeError, "indices must be one or more"),
        ("forward_intermediates", {"indices": 1.5}, TypeError, "indices must be one or more"),
        ("forward_intermediates", {"output_fmt": "NHWC"}, ValueError, "output_fmt must be"),
        ("get_intermediate_layers", {"n": 7}, ValueError, "n must be from 1 to 3"),
        ("get_intermediate_layers", {"n": ["a"]}, TypeError, "n must be one or more"),
        ("prune_intermediate_layers", {"indices": [0, -4]}, ValueError, "indices must be one"),
    ],
)
def test_intermediates_that_do_not_exist(
    method: str, arguments: dict[str, Any], error: type[Exception], text: str, images: Tensor
) -> None:
    model = build()
    given = () if method.startswith("prune") else (images,)
    with pytest.raises(error, match=text):
        getattr(model, method)(*given, **arguments)
    assert len(model.blocks) == model.config.depth == 3


def test_masks_are_refused(images: Tensor) -> None:
    model, mask = build(), torch.zeros(13, 13)
    for method in ("forward", "forward_features", "forward_intermediates"):
        with pytest.raises(ValueError, match="attn_mask is not supported"):
            getattr(model, method)(images, attn_mask=mask)
        with pytest.raises(ValueError, match="is_causal=True is not supported"):
            getattr(model, method)(images, is_causal=True)
        getattr(model, method)(images, attn_mask=None, is_causal=False)
    with pytest.raises(ValueError, match="attn_mask is not supported"):
        model.get_intermediate_layers(images, attn_mask=mask)


def test_dropped_patches_leave_no_grid(images: Tensor) -> None:
    model = build(patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="output_fmt='NCHW' needs every patch"):
        model.forward_intermediates(images)
    assert model.eval().forward_intermediates(images)[1][0].shape == (2, 32, 4, 3)


# Pruning and features


@pytest.mark.parametrize("arguments", [{}, {"global_pool": "avg"}, {"global_pool": "map"}])
@pytest.mark.parametrize("prune_norm", [False, True])
@pytest.mark.parametrize("prune_head", [False, True])
def test_pruned_as_by_timm(
    arguments: dict[str, Any], prune_norm: bool, prune_head: bool, images: Tensor
) -> None:
    theirs, ours = pair(**arguments, drop_path_rate=0.4)
    kept = [
        model.prune_intermediate_layers([-3, 1], prune_norm=prune_norm, prune_head=prune_head)
        for model in (theirs, ours)
    ]
    assert kept[0] == kept[1] == [0, 1]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_equal(theirs, ours, lambda model: model.forward_intermediates(images, 1, norm=True))
    assert_equal(theirs, ours, lambda model: model(images))
    again = vitkern.ViT.from_config(ours.config)  # the config has followed
    again.load_state_dict(ours.state_dict(), strict=True)
    rates = [block.drop_path1 for block in ours.blocks]
    for block, rate in zip(again.blocks, rates, strict=True):
        drop = block.drop_path1
        assert getattr(drop, "drop_prob", 0) == pytest.approx(getattr(rate, "drop_prob", 0))
    assert torch.equal(again.eval()(images), ours.eval()(images))


def test_pruning_takes_pre_logits_and_both_heads(images: Tensor) -> None:
    model = build(representation_size=16).eval()
    features = model.forward_features(images)
    assert model.prune_intermediate_layers(1) == [2]
    assert not isinstance(model.pre_logits, nn.Sequential)
    assert torch.equal(model(images), features)
    theirs, ours = pair(**DISTILLED)
    for other in (theirs, ours):
        other.prune_intermediate_layers([0])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_equal(theirs, ours, lambda other: other(images))
    stream = build(residual_dtype=torch.float32)
    with pytest.raises(ValueError, match="residual_dtype needs a norm"):
        stream.prune_intermediate_layers(1, prune_norm=True)
    assert len(stream.blocks) == 3
    assert isinstance(stream.norm, nn.LayerNorm)


def test_timms_feature_extractor_takes_it(images: Tensor) -> None:
    theirs, ours = pair()
    nets = [FeatureGetterNet(model, out_indices=(0, 1), norm=True) for model in (theirs, ours)]
    assert nets[0].feature_info.info == nets[1].feature_info.info
    assert_equal(nets[0], nets[1], lambda net: net(images))


# Input size


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({}, {"img_size": (48, 40)}),
        ({}, {"patch_size": 4}),
        ({"reg_tokens": 1, "pre_norm": True}, {"img_size": (48, 36), "patch_size": (12, 6)}),
        ({"no_embed_class": True, "reg_tokens": 1}, {"img_size": (24, 32)}),  # as many, another way
        ({"pos_embed": "none"}, {"img_size": (16, 16), "patch_size": 4}),
        ({"dynamic_img_size": True}, {"img_size": (64, 64), "patch_size": 16}),
        (DISTILLED, {"img_size": (40, 40)}),
        ({}, {"img_size": (32, 24), "patch_size": 8}),
    ],
)
def test_another_input_size_as_by_timm(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    theirs, ours = pair(**arguments)
    frozen = [key for key in dict(ours.named_parameters()) if "embed" in key or "token" in key]
    for key in frozen:
        ours.get_parameter(key).requires_grad_(False)
    for model in (theirs, ours):
        model.set_input_size(**sizes)
    assert not any(ours.get_parameter(key).requires_grad for key in frozen)
    ours.requires_grad_(True)
    images = torch.randn(2, 3, *ours.config.img_size)
    assert_equal(theirs, ours, lambda model: model(images))
    assert ours.config.img_size == theirs.patch_embed.img_size
    assert ours.patch_embed.grid_size == ours.config.grid_size == theirs.patch_embed.grid_size
    assert ours.feature_info[0]["reduction"] == max(ours.config.patch_size)
    again = vitkern.ViT.from_config(ours.config)
    again.load_state_dict(ours.state_dict(), strict=True)
    twin = copy.deepcopy(ours)
    for model in (again, twin):
        assert torch.equal(model.eval()(images), ours.eval()(images))
    state: Any = ours.state_dict()
    assert state._metadata[""]["grid_size"] == ours.config.grid_size
    with pytest.raises(ValueError, match="images must be"):
        ours(torch.zeros(2, 3, 29, 31))


def test_another_input_size_follows_the_checkpoints_source() -> None:
    model = build(pos_resample="torchvision")
    before, grid = model.pos_embed.detach().clone(), model.config.grid_size
    model.set_input_size((48, 48))
    expected = vitkern.model.weights.resample_pos_embed(before, (6, 6), grid, 1, mode="torchvision")
    assert torch.equal(model.pos_embed, expected)
    other = build(pos_resample="torchvision", img_size=48)
    other.load_state_dict(build(pos_resample="torchvision").state_dict())
    assert torch.equal(other.pos_embed, expected)


def test_another_input_size_of_relative_positions() -> None:
    arguments = {**SMALL, "rel_pos_type": "bias", "global_pool": "avg", "init_values": None}
    torch.manual_seed(0)
    theirs = VisionTransformerRelPos(**arguments)
    ours = build(
        rel_pos="bias", pos_embed="none", class_token=False, global_pool="avg", fc_norm=False
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for model in (theirs, ours):
        model.set_input_size((48, 40))
    images = torch.randn(2, 3, 48, 40)
    assert_equal(theirs, ours, lambda model: model(images))


@pytest.mark.parametrize("rel_pos", ["bias", "mlp"])
def test_shared_relative_positions(rel_pos: str, images: Tensor) -> None:
    arguments = {**SMALL, "class_token": True, "global_pool": "token", "shared_rel_pos": True}
    theirs = VisionTransformerRelPos(**arguments, rel_pos_type=rel_pos, init_values=0.1)
    ours = build(
        rel_pos=rel_pos, shared_rel_pos=True, pos_embed="none", fc_norm=False, init_values=0.1
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_equal(theirs, ours, lambda model: model(images))
    ours.set_grad_checkpointing()
    assert_equal(
        theirs, ours, lambda model: model.forward_intermediates(images, output_fmt="NLC")[1]
    )
    maps = ours.attention_maps(images)
    assert maps.shape == (3, 2, 4, 13, 13)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 4, 13))


def intermediates(images: Tensor, model: Any) -> Any:
    return model.forward_intermediates(images, 1)


def test_a_hybrid_has_the_same_surface() -> None:
    name, arguments = "vit_tiny_r_s16_p8_224", {"img_size": 64, "depth": 2, "num_classes": 5}
    torch.manual_seed(0)
    theirs, ours = timm.create_model(name, **arguments), vitkern.create_model(name, **arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.feature_info == theirs.feature_info
    for sizes in ({}, {"img_size": (64, 96)}, {"patch_size": 4}):
        for model in (theirs, ours):
            model.set_input_size(**sizes)
        images = torch.randn(2, 3, *ours.config.img_size)
        assert_equal(theirs, ours, partial(intermediates, images))
    assert ours.feature_info[0]["reduction"] == 16
    model = vitkern.ViT.from_config(ours.config)
    model.load_state_dict(ours.state_dict(), strict=True)


def test_input_sizes_that_make_no_sense() -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    for sizes in ({"img_size": 4}, {"patch_size": -1}, {"img_size": (1, 2, 3)}, {"img_size": "a"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(sizes))):
            model.set_input_size(**sizes)
    assert model.config == build().config
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class OwnPatches(nn.Module):
    """A user's patch embedding."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.proj = given.proj

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_patches_of_ones_own(dynamic: bool, images: Tensor) -> None:
    model = build(dynamic_img_size=dynamic)
    options = {"return_prefix_tokens": True, "norm": True}
    expected = model.forward_intermediates(images, **options)
    model.patch_embed = OwnPatches(model.patch_embed)  # type: ignore[assignment]
    found = model.forward_intermediates(images, **options)
    for actual, wanted in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(actual, wanted)
    with pytest.raises(ValueError, match=r"patch_size.* OwnPatches, has no set_input"):
        model.set_input_size(48)


def test_a_state_dict_of_another_patch_size_is_resampled(images: Tensor) -> None:
    theirs, ours = pair()
    large = build(img_size=(64, 48), patch_size=16)
    large.load_state_dict(ours.state_dict())
    reference = VisionTransformer(**{**SMALL, "img_size": (64, 48), "patch_size": 16})
    reference.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), reference))
    pictures = torch.randn(2, 3, 64, 48)
    assert_equal(reference, large, lambda model: model(pictures))
    with pytest.raises(RuntimeError, match=r"size mismatch for patch_embed\.proj\.weight"):
        build(embed_dim=64).load_state_dict(ours.state_dict())


# Tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {"patch_drop_rate": 0.2},  # of 12 patches 9.6 would stay, so 9
        {"patch_drop_rate": 0.9999},  # one patch is kept
        {"patch_drop_rate": 0.25, "class_token": False, "global_pool": "avg", "reg_tokens": 2},
        {"patch_drop_rate": 0.3, "pos_drop_rate": 0.2, "drop_path_rate": 0.4, "drop_rate": 0.1},
        {"patch_drop_rate": 0.3, "pos_embed": "none"},
    ],
)
def test_equal_seeds_drop_equal_patches(arguments: dict[str, Any], images: Tensor) -> None:
    theirs, ours = pair(**arguments)
    for seed in (1, 2):
        assert_equal(theirs, ours, lambda model: model(images), seed)
    whole = ours.eval()(images)
    assert torch.equal(whole, ours(images))
    torch.testing.assert_close(whole, theirs.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"reg_tokens": 1},
        {"class_token": False, "reg_tokens": 1},
        {"class_token": False},
        {"fc_norm": True},
    ],
)
def test_pooling_by_attention_without_weights(arguments: dict[str, Any], images: Tensor) -> None:
    theirs, ours = pair(global_pool="prr", **arguments)
    assert ours.pool_include_prefix is theirs.pool_include_prefix is True
    assert_equal(theirs, ours, lambda model: model(images))
    assert_equal(theirs, ours, lambda model: model.double()(images.double()))


# Heads


def test_reset_classifier_of_attention_pools(images: Tensor) -> None:
    for pool, other in (("map", "prr"), ("prr", "map")):
        theirs, ours = pair(global_pool=pool)
        with pytest.raises(ValueError, match=f"global_pool='{other}' can't be added later"):
            ours.reset_classifier(3, other)
        ours.reset_classifier(3, pool)
        assert ours.attn_pool is not None
        for model in (theirs, ours):
            model.reset_classifier(0, "avg")
        assert ours.attn_pool is None
        assert_equal(theirs, ours, lambda model: model(images))
        again = vitkern.ViT.from_config(ours.config)
        again.load_state_dict(ours.state_dict(), strict=True)
        assert torch.equal(again.eval()(images), ours.eval()(images))
        with pytest.raises(ValueError, match="can't be added later"):
            ours.reset_classifier(3, pool)


def test_pre_logits(images: Tensor) -> None:
    model = build(representation_size=16, drop_rate=0.1)
    assert model.head_hidden_size == 16
    assert model.head.weight.shape == (6, 16)
    keys = [key for key in model.state_dict() if "pre_logits" in key]
    assert keys == ["pre_logits.fc.weight", "pre_logits.fc.bias"]
    model.eval()
    token = model.forward_features(images)[:, 0]
    features = torch.tanh(model.pre_logits.fc(token))
    torch.testing.assert_close(model.forward_head(model.forward_features(images), True), features)
    torch.testing.assert_close(model(images), model.head(features))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), features)


@pytest.mark.parametrize("arguments", [{}, {"drop_rate": 0.3, "pos_drop_rate": 0.2}])
def test_distilled(arguments: dict[str, Any], images: Tensor) -> None:
    theirs, ours = pair(**DISTILLED, **arguments)
    with torch.no_grad():
        theirs.norm.weight.mul_(2)
        ours.norm.weight.mul_(2)
    assert_equal(theirs, ours, lambda model: model(images))
    for model in (theirs, ours):
        model.set_distilled_training()
    assert isinstance(ours(images), tuple)
    assert_equal(theirs, ours, lambda model: model(images))
    assert_equal(theirs, ours, lambda model: model.eval()(images))
    assert_equal(
        theirs, ours, lambda model: model.forward_head(model.forward_features(images), True)
    )
    assert ours.get_classifier() == (ours.head, ours.head_dist)
    for classes in (4, 0):
        for model in (theirs, ours):
            model.reset_classifier(classes)
        assert [type(m) for m in ours.get_classifier()] == [
            type(m) for m in theirs.get_classifier()
        ]
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert_equal(theirs, ours, lambda model: model(images))
    assert ours.config.num_classes == 0
    with pytest.raises(ValueError, match="global_pool must be 'token'"):
        ours.reset_classifier(3, "avg")


def test_distilled_with_registers_puts_them_behind(images: Tensor) -> None:
    model = build(**DISTILLED, reg_tokens=2, patch_drop_rate=0.5)
    assert model.num_prefix_tokens == 4
    seen: list[Tensor] = []
    model.norm_pre.register_forward_hook(lambda _m, _a, out: seen.append(out))
    model(images)
    prefix = torch.cat([model.cls_token, model.dist_token, model.reg_token], 1)
    expected = (prefix + model.pos_embed[:, :4]).expand(2, -1, -1)
    torch.testing.assert_close(seen[0][:, :4], expected)
    assert seen[0].shape == (2, 4 + 6, 32)


def test_initial_distillation_token_and_heads() -> None:
    model = build(**DISTILLED, embed_dim=768, weight_init="jax_nlhb")
    assert model.dist_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.head_dist.weight.any()
    assert model.head_dist.bias.mean().item() == pytest.approx(-torch.tensor(6.0).log().item())


@pytest.mark.parametrize("arguments", [{"reg_tokens": 1, "pre_norm": True}, DISTILLED])
def test_parameters_are_grouped_as_by_timm(arguments: dict[str, Any]) -> None:
    theirs, ours = pair(**arguments)
    for reverse in (False, True):
        groups = [
            group_parameters(model, model.group_matcher(), reverse=reverse)
            for model in (theirs, ours)
        ]
        assert groups[0] == groups[1]
    names = {name for name, _ in ours.named_parameters()}
    assert ours.no_weight_decay() & names == theirs.no_weight_decay() & names


# What else a model goes through

KINDS: dict[str, dict[str, Any]] = {
    "distilled": DISTILLED,
    "prr": {"global_pool": "prr"},
    "prr_mean": {"global_pool": "prr", "class_token": False},
    "pre_logits": {"representation_size": 16},
    "patch_drop": {"patch_drop_rate": 0.5},
    "shared_rel_pos": {"rel_pos": "mlp", "shared_rel_pos": True, "pos_embed": "none"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_folded_copied_explained_compiled(kind: str, images: Tensor) -> None:
    model = build(**KINDS[kind], depth=1).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    images = images.double()
    expected = model(images)
    torch.testing.assert_close(copy.deepcopy(model)(images), expected)
    for head in (False, True):
        torch.testing.assert_close(vitkern.fold(model, head=head)(images), expected)
    assert "patch_embed" in str(vitkern.explain(model, images))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected)
    assert replace(model.config) == model.config
