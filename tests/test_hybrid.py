"""Backbones before the patch projection, against timm's with the same weights."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkern
from vitkern.model.config import ViTConfig
from vitkern.model.embed import HybridEmbed, check_images, make_patch_embed

timm = pytest.importorskip("timm")

RESNETS: dict[str, dict[str, Any]] = {
    "vit_tiny_r_s16_p8_224": {"embed_layer": ("resnetv2", ()), "patch_size": 8},
    "vit_small_r26_s32_224": {"embed_layer": ("resnetv2", (2, 2, 2, 2)), "patch_size": 1},
    "vit_base_r50_s16_224": {"embed_layer": ("resnetv2", (3, 4, 9)), "patch_size": 1},
}
OTHERS: dict[str, dict[str, Any]] = {
    "vit_base_mci_224": {"embed_layer": ("conv_stem", (4, 2, 2)), "patch_size": 1},
    "vit_small_resnet26d_224": {"embed_layer": ("timm", ("resnet26d", 4)), "patch_size": 1},
    "vit_small_resnet50d_s16_224": {"embed_layer": ("timm", ("resnet50d", 3)), "patch_size": 1},
}
HYBRIDS = {**RESNETS, **OTHERS}
TINY: dict[str, Any] = {"img_size": 64, "depth": 1, "num_heads": 12, "num_classes": 3}
# The conv stem of timm's model knows no other width than 768.
SMALL = {**TINY, "embed_dim": 48}


def sizes(name: str) -> dict[str, Any]:
    return {**TINY, "embed_dim": 768} if "mci" in name else SMALL


def pair(name: str, **changes: Any) -> tuple[HybridEmbed, Any]:
    """Ours and timm's with the same weights, none of them at 0 or 1."""
    torch.manual_seed(0)
    arguments = {**sizes(name), **changes}
    ours = make_patch_embed(ViTConfig(**arguments, **HYBRIDS[name]))
    assert isinstance(ours, HybridEmbed)
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    theirs = timm.create_model(name, **arguments).patch_embed
    assert list(ours.state_dict()) == list(theirs.state_dict())  # in its order, too
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def close(actual: Tensor, expected: Tensor, name: str = "", rel: float = 1e-5) -> None:
    assert actual.shape == expected.shape, name
    error = (actual - expected).norm() / expected.norm()
    assert error <= rel, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", HYBRIDS)
def test_tokens_and_gradients_are_timms(name: str) -> None:
    ours, theirs = pair(name)
    for attribute in ("img_size", "patch_size", "grid_size", "num_patches", "feature_dim"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    for attribute in ("feature_size", "feature_ratio"):
        assert getattr(ours, attribute) == tuple(getattr(theirs, attribute)), attribute
    assert ours.feat_ratio() == theirs.feat_ratio()
    assert ours.feat_ratio(as_scalar=False) == theirs.feat_ratio(as_scalar=False)
    images = torch.randn(2, 3, 64, 64)
    close(ours(images), theirs(images))
    # A ReLU or a pool whose input is as good as a tie may go either way in float32.
    both = [images.double().requires_grad_() for _ in range(2)]
    outputs = [ours.double()(both[0]), theirs.double()(both[1])]
    weights = torch.randn_like(outputs[0])
    for out in outputs:
        (out * weights).sum().backward()
    close(both[0].grad, both[1].grad, "images", rel=1e-9)
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    for parameter, p in ours.named_parameters():
        close(p.grad, expected[parameter], parameter, rel=1e-9)
    ours.eval()
    theirs.eval()  # with the statistics that BatchNorm has gathered meanwhile
    close(ours(both[0]), theirs(both[1]), rel=1e-9)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
def test_a_whole_model_is_timms(name: str) -> None:
    ours = vitkern.ViT(**sizes(name), **HYBRIDS[name]).eval()
    theirs = timm.create_model(name, **sizes(name)).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    close(ours(images), theirs(images))
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    flip = torch.tensor([True, False])
    normalised = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    normalised = torch.where(flip.view(2, 1, 1, 1), normalised.flip(3), normalised)
    close(ours(pixels, flip=flip), theirs(normalised))


@pytest.mark.parametrize("name", HYBRIDS)
def test_weights_start_as_timms_do(name: str) -> None:
    models = []
    for build in (
        lambda: vitkern.ViT(**sizes(name), **HYBRIDS[name]),
        lambda: timm.create_model(name, **sizes(name)),
    ):
        torch.manual_seed(0)
        models.append(build().patch_embed.backbone.state_dict())
    ours, theirs = models
    for key, expected in theirs.items():
        assert torch.equal(ours[key], expected), key


@pytest.mark.parametrize("mode", ["reset", "skip", "jax"])
def test_other_schemes_start_a_backbone_as_timms_do(mode: str) -> None:
    name = "vit_small_r26_s32_224"
    ours = vitkern.ViT(**SMALL, **HYBRIDS[name], weight_init=mode).patch_embed.state_dict()
    theirs = timm.create_model(name, **SMALL, weight_init=mode).patch_embed.state_dict()
    for key, expected in theirs.items():
        if "backbone" in key and expected.numel() > 1000:
            assert ours[key].std().item() == pytest.approx(expected.std().item(), rel=0.1), key
        elif "backbone" in key and expected.std() == 0:
            assert torch.equal(ours[key], expected), key


@pytest.mark.parametrize("pad", [False, True])
def test_images_of_any_size(pad: bool) -> None:
    changes = {"dynamic_img_size": True, "dynamic_img_pad": pad}
    ours, theirs = pair("vit_tiny_r_s16_p8_224", **changes)
    size = (68, 100) if pad else (32, 96)
    images = torch.randn(1, 3, *size)
    grid = theirs.dynamic_feat_size(size)
    assert ours.dynamic_feat_size(size) == grid
    close(ours(images), theirs(images).flatten(1, 2))  # timm leaves the grid to the model
    assert ours(images).shape[1] == grid[0] * grid[1]
    wrong = torch.zeros(1, 3, 70, 96)
    with pytest.raises(ValueError, match=f"multiples of {4 if pad else 32} for H"):
        check_images(wrong, ours.config)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_base_r50_s16_224"])
def test_set_input_size_is_timms(name: str) -> None:
    ours, theirs = pair(name)
    for change in ({"img_size": (32, 96)}, {"patch_size": 2}):
        ours.set_input_size(**change)
        theirs.set_input_size(**change)
        for attribute in ("patch_size", "grid_size", "num_patches", "img_size"):
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
        for attribute in ("feature_size", "feature_ratio"):
            assert getattr(ours, attribute) == tuple(getattr(theirs, attribute)), attribute
        images = torch.randn(1, 3, 32, 96)
        close(ours(images), theirs(images))


def test_odd_images_are_padded_as_in_timm() -> None:
    """ "SAME" puts an odd pixel at the end; then there are ceil(size / stride) of them."""
    ours, theirs = pair("vit_small_r26_s32_224")
    for size in ((33, 47), (64, 35), (50, 50)):
        images = torch.randn(1, 3, *size)
        close(ours.backbone(images), theirs.backbone(images))


def test_checkpointing_changes_nothing_but_memory() -> None:
    ours, _ = pair("vit_small_r26_s32_224")
    images, found = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        ours.set_grad_checkpointing(enable)
        ours.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ours(images).sum().backward()
        found.append(([p.grad for p in ours.parameters()], sum(saved)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    ours.eval()
    ours(images)


def test_half_precision_and_autocast() -> None:
    ours, _ = pair("vit_small_r26_s32_224")
    images, positions = torch.randn(2, 3, 64, 64), torch.randn(4, 48)
    exact = ours(images, positions)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(images, positions)
    assert mixed.dtype == torch.float32
    close(mixed, exact, rel=3e-2)
    half = ours.bfloat16()(images.bfloat16(), positions.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), exact, rel=5e-2)


def test_backbones_are_built_without_memory() -> None:
    for name in ("vit_base_r50_s16_224", "vit_base_mci_224"):
        model = vitkern.ViT(**{**sizes(name), "img_size": 224}, **HYBRIDS[name], device="meta")
        assert model.patch_embed.grid_size == (14, 14)
        assert all(p.is_meta for p in model.parameters())
        assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"img_size": 72}, r"img_size must be a multiple of \(32, 32\).*got \(72, 72\)"),
        ({"embed_layer": ("resnetv2", (1,) * 5), "img_size": 512}, "at most four stages"),
        ({"embed_layer": ("conv_stem", (4, 2, 2)), "img_size": 256}, "patch_size must be 1"),
        (
            {
                "embed_layer": ("conv_stem", (4, 2, 2)),
                "embed_dim": 42,
                "num_heads": 1,
                "patch_size": 1,
            },
            "embed_dim must be a multiple of 4",
        ),
        (
            {"embed_layer": ("timm", ("convnext_atto", 1)), "patch_size": 1},
            "stage 1 must have a stride of 4, as in timm's ResNets, got 8",
        ),
    ],
)
def test_what_cannot_be_built_says_why(changes: dict[str, Any], text: str) -> None:
    arguments = {**SMALL, **HYBRIDS["vit_tiny_r_s16_p8_224"], **changes}
    with pytest.raises(ValueError, match=text):
        make_patch_embed(ViTConfig(**arguments))


def test_without_timm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"resnet26d.*pip install 'vitkern\[timm\]'"):
        make_patch_embed(ViTConfig(**SMALL, **HYBRIDS["vit_small_resnet26d_224"]))
    make_patch_embed(ViTConfig(**SMALL, **HYBRIDS["vit_tiny_r_s16_p8_224"]))  # needs none
