"""From images to tokens: positions and patches of another size, and norms around the projection."""

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkern
from vitkern.model.config import RESAMPLINGS, ViTConfig
from vitkern.model.embed import PatchEmbed, check_images, make_patch_embed
from vitkern.model.weights import (
    adapt_input_conv,
    fit_pos_embed,
    resample_patch_embed,
    resample_pos_embed,
)

SMALL: dict[str, Any] = {
    "img_size": (16, 24),
    "patch_size": (4, 8),
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 3,
}
GRIDS = [((7, 7), (4, 4)), ((4, 4), (7, 7)), ((5, 5), (3, 8))]  # old, new


def positions(grid: tuple[int, int], prefix: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, prefix + grid[0] * grid[1], 6, generator=generator)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter at a start that would hide it: norms are not 1 and biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return module


def close(actual: Tensor, expected: Tensor, rel: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).norm() / expected.norm()
    assert error <= rel, f"relative error {error:.1e}"


# Positions


def from_torchvision(given: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    vit = pytest.importorskip("torchvision.models.vision_transformer")
    state = {"encoder.pos_embedding": given}
    return vit.interpolate_embeddings(new[0], 1, state)["encoder.pos_embedding"]


def from_hugging_face(name: str, given: Tensor, new: tuple[int, int]) -> Tensor:
    """The positions as an image of `new` patches of one pixel gets them."""
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # a checkout's folder, not theirs
    try:
        hf = pytest.importorskip("transformers")
        side = round((given.shape[1] - 1) ** 0.5)
        options = {"image_size": side, "patch_size": 1, "hidden_size": given.shape[2]}
        config = getattr(hf, f"{name}Config")(num_attention_heads=1, **options)
        module = sys.modules[getattr(hf, f"{name}Model").__module__]
    finally:
        sys.modules.pop("kernels")
        if before is not None:
            sys.modules["kernels"] = before
    embeddings = getattr(module, f"{name}Embeddings")(config)
    embeddings.position_embeddings.data = given
    tokens = torch.empty(1, 1 + new[0] * new[1], given.shape[2])
    return embeddings.interpolate_pos_encoding(tokens, *new).detach()


def from_scipy(given: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    ndimage = pytest.importorskip("scipy.ndimage")
    factors = (new[0] / old[0], new[1] / old[1], 1)
    grid = ndimage.zoom(given[0, 1:].unflatten(0, old).numpy(), factors, order=1)
    return torch.cat([given[:, :1], torch.from_numpy(grid).flatten(0, 1)[None]], 1)


def from_timm(given: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    layers = pytest.importorskip("timm.layers")
    return layers.resample_abs_pos_embed(given, list(new), list(old), num_prefix_tokens=1)


def from_meta(given: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """What Meta's factor (new + 0.1) / old means: where samples lie, and Keys' four weights."""

    def keys(x: Tensor, a: float = -0.75) -> Tensor:
        x = x.abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        return torch.where(x <= 1, near, torch.where(x < 2, far, 0))

    def matrix(old: int, new: int) -> Tensor:
        out = torch.zeros(new, old, dtype=torch.float64)
        at = (torch.arange(new, dtype=torch.float64) + 0.5) * old / (new + 0.1) - 0.5
        for tap in range(-1, 3):
            source = at.floor() + tap
            column = source.clamp(0, old - 1).long()  # the border repeats
            out[torch.arange(new), column] += keys(at - source)
        return out

    grid = given[0, 1:].double().unflatten(0, old)
    grid = torch.einsum("yi,xj,ijd->yxd", matrix(old[0], new[0]), matrix(old[1], new[1]), grid)
    return torch.cat([given[:, :1], grid.flatten(0, 1)[None].float()], 1)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_positions_are_resized_as_each_source_does_it(
    old: tuple[int, int], new: tuple[int, int]
) -> None:
    given = positions(old)
    expected = {
        "timm": from_timm(given, old, new),
        "huggingface": from_hugging_face("ViT", given, new),
        "dinov2": from_meta(given, old, new),
        "google": from_scipy(given, old, new),
    }
    if new[0] == new[1]:  # theirs knows squares only
        expected["torchvision"] = from_torchvision(given, old, new)
    for mode, source in expected.items():
        ours = resample_pos_embed(given, new, old, 1, mode)
        torch.testing.assert_close(ours, source, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[:, :1], given[:, :1])
    dinov2 = from_hugging_face("Dinov2", given, new)
    assert torch.equal(resample_pos_embed(given, new, old, 1, "huggingface"), dinov2)
    registers = from_hugging_face("Dinov2WithRegisters", given, new)
    assert torch.equal(resample_pos_embed(given, new, old, 1, "timm"), registers)


@pytest.mark.parametrize("old", [(3, 5), (6, 2)])
def test_positions_of_a_rectangle(old: tuple[int, int]) -> None:
    given, new = positions(old), (4, 7)
    for mode, source in (("timm", from_timm), ("dinov2", from_meta), ("google", from_scipy)):
        ours = resample_pos_embed(given, new, old, 1, mode)
        torch.testing.assert_close(ours, source(given, old, new), rtol=1e-5, atol=1e-5)


def test_resizing_of_positions_has_modes() -> None:
    given = positions((6, 6), 2)
    found = [resample_pos_embed(given, (4, 4), (6, 6), 2, mode) for mode in RESAMPLINGS]
    for i, one in enumerate(found):
        assert all(not torch.allclose(one, other, rtol=1e-3) for other in found[:i])
    for mode, expected in zip(RESAMPLINGS, found, strict=True):
        assert torch.equal(fit_pos_embed("pos_embed", given, (4, 4), None, 2, mode), expected)
        assert resample_pos_embed(given, (6, 6), (6, 6), 2, mode) is given
    half = resample_pos_embed(given.half(), (4, 4), (6, 6), 2)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), found[0], rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"mode must be one of 'timm'.*got 'bicubic'"):
        resample_pos_embed(given, (4, 4), (6, 6), 2, "bicubic")


# Patches


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((8, 8), (3, 5)), ((6, 4), (6, 9))])
def test_patch_projection_of_another_size(old: tuple[int, int], new: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm.layers.patch_embed")
    weight = torch.randn(8, 3, *old, generator=torch.Generator().manual_seed(1))
    close(resample_patch_embed(weight, new), timm.resample_patch_embed(weight, list(new)))
    assert resample_patch_embed(weight, old) is weight
    assert resample_patch_embed(weight.bfloat16(), new).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"\[D, C, P, Q\], got \[8, 48\]"):
        resample_patch_embed(torch.zeros(8, 48), new)


def test_larger_patches_give_the_same_tokens() -> None:
    weight, image = torch.randn(8, 3, 5, 5), torch.randn(1, 3, 5, 5)
    large = nn.functional.interpolate(image, (12, 12), mode="bicubic", antialias=True)
    resized = resample_patch_embed(weight, (12, 12))
    close(
        torch.einsum("dcpq,bcpq->bd", resized, large), torch.einsum("dcpq,bcpq->bd", weight, image)
    )


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
def test_first_convolution_for_other_channels(in_chans: int) -> None:
    timm = pytest.importorskip("timm.models")
    for dtype in (torch.float32, torch.float16):
        weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(2)).to(dtype)
        before = weight.clone()
        ours = adapt_input_conv(weight, in_chans)
        assert ours.dtype == dtype
        expected = timm.adapt_input_conv(in_chans, weight.clone())
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
        assert torch.equal(weight, before)


def test_what_cannot_be_adapted_to_channels() -> None:
    for weight, chans, text in (
        (torch.zeros(4, 12), 1, r"weight \[D, C, P, Q\]"),
        (torch.zeros(4, 3, 2, 2), 0, "in_chans of at least 1"),
        (torch.zeros(4, 5, 2, 2), 3, "3 input channels to be adapted, got 5"),
    ):
        with pytest.raises(ValueError, match=text):
            adapt_input_conv(weight, chans)


# Norms around the projection


def build(**changes: Any) -> PatchEmbed:
    embed = make_patch_embed(ViTConfig(**{**SMALL, **changes}))
    assert type(embed) is PatchEmbed
    randomised(embed)
    return embed


def grads(module: nn.Module, out: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", [{}, {"dynamic_img_size": True, "dynamic_img_pad": True}])
def test_norm_behind_the_projection_is_timms(changes: dict[str, Any]) -> None:
    layers = pytest.importorskip("timm.layers")
    ours = build(embed_norm_layer=("layernorm", 1e-3), **changes)
    theirs = layers.PatchEmbed(
        SMALL["img_size"], SMALL["patch_size"], 3, 32,
        norm_layer=partial(nn.LayerNorm, eps=1e-3), strict_img_size=not changes,
        dynamic_img_pad=bool(changes),
    )  # fmt: skip
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 18, 20) if changes else torch.randn(2, 3, 16, 24)
    close(ours(images), theirs(images))
    expected = grads(theirs, theirs(images))
    for name, grad in grads(ours, ours(images)).items():
        close(grad, expected[name])


def in_pixel_order(vector: Tensor) -> Tensor:
    """[..., p1 p2 c] of vit-pytorch's patches as [..., c p1 p2]."""
    return vector.unflatten(-1, (*SMALL["patch_size"], 3)).movedim(-1, -3).flatten(-3)


def test_norms_on_both_sides_are_vit_pytorchs() -> None:
    vit = pytest.importorskip("vit_pytorch.vit")
    sizes = {"image_size": SMALL["img_size"], "patch_size": SMALL["patch_size"]}
    theirs = vit.ViT(**sizes, num_classes=3, dim=32, depth=1, heads=2, mlp_dim=8)
    to_patch = randomised(theirs.to_patch_embedding)
    ours = build(patch_norm=True, embed_norm_layer=("layernorm", 1e-5))
    given = to_patch.state_dict()
    ours.load_state_dict(
        {
            "proj.weight": in_pixel_order(given["2.weight"]).view(32, 3, *SMALL["patch_size"]),
            "proj.bias": given["2.bias"],
            "norm_in.weight": in_pixel_order(given["1.weight"]),
            "norm_in.bias": in_pixel_order(given["1.bias"]),
            "norm.weight": given["3.weight"],
            "norm.bias": given["3.bias"],
        }
    )
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(3))
    close(ours(images), to_patch(images))
    theirs_grads, ours_grads = grads(to_patch, to_patch(images)), grads(ours, ours(images))
    close(ours_grads["norm_in.weight"], in_pixel_order(theirs_grads["1.weight"]))
    close(ours_grads["proj.weight"].flatten(1), in_pixel_order(theirs_grads["2.weight"]))
    close(ours_grads["norm.bias"], theirs_grads["3.bias"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embed_norm_layer": "layernorm"},
        {"patch_norm": True},
        {"patch_norm": True, "norm_layer": "rmsnorm", "pre_norm": True},
        {"patch_norm": True, "dynamic_img_size": True, "dynamic_img_pad": True},
    ],
)
def test_bytes_mirroring_and_hooks(changes: dict[str, Any]) -> None:
    """Bytes are as good as floats, `flip` as flipped images, and module by module as fused."""
    embed = build(**changes, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    pixels = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8)
    scale = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    mean, std = scale
    floats = (pixels / 255 - mean) / std
    flip = torch.tensor([True, False, True])
    mirrored = torch.where(flip.view(3, 1, 1, 1), floats.flip(3), floats)
    around = {"pos_embed": torch.randn(13, 32), "prefix": torch.randn(1, 32)}
    expected = embed(mirrored, **around)
    assert expected.shape == (3, 13, 32)
    close(embed(pixels, **around, flip=flip), expected)
    assert not torch.allclose(embed(pixels, **around), expected, rtol=1e-2)
    seen: list[Any] = []
    for name, module in embed.named_modules():
        if name and not name.startswith("norm."):
            module.register_forward_hook(lambda m, *_: seen.append(m))
    close(embed(pixels, **around, flip=flip), expected)
    assert {id(m) for m in seen} == {id(m) for m in embed.children()}


def test_norms_keep_the_dtype_of_the_stream() -> None:
    for changes in ({"patch_norm": True}, {"embed_norm_layer": "layernorm"}):
        embed = build(**changes, residual_dtype=torch.bfloat16)
        images, around = torch.randn(2, 3, 16, 24), torch.randn(12, 32)
        assert embed(images, around).dtype == torch.bfloat16
        embed = build(**changes)
        exact = embed(images, around)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = embed(images, around)
        assert mixed.dtype == torch.float32  # that of the positions
        close(mixed, exact, 2e-2)
        half = embed.bfloat16()(images.bfloat16(), around.bfloat16())
        assert half.dtype == torch.bfloat16
        close(half.float(), exact, 3e-2)


# Another size


@pytest.mark.parametrize("changes", [{}, {"embed_norm_layer": "layernorm"}, {"pre_norm": True}])
def test_set_input_size_is_timms(changes: dict[str, Any]) -> None:
    layers = pytest.importorskip("timm.layers")
    ours = build(**changes)
    norm = partial(nn.LayerNorm, eps=1e-6) if "embed_norm_layer" in changes else None
    theirs = layers.PatchEmbed(
        SMALL["img_size"],
        SMALL["patch_size"],
        3,
        32,
        norm_layer=norm,
        bias="pre_norm" not in changes,
    )
    theirs.load_state_dict(ours.state_dict())
    ours.proj.weight.requires_grad_(False)
    for sizes in (
        {"img_size": (32, 48)},
        {"patch_size": 8},
        {"img_size": 24, "patch_size": (6, 4)},
    ):
        ours.set_input_size(**sizes)
        theirs.set_input_size(**sizes)
        for name in ("patch_size", "grid_size", "num_patches"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.img_size == ours.config.img_size
        assert ours.feat_ratio() == theirs.feat_ratio()
        images = torch.randn(2, 3, *ours.img_size)
        close(ours(images), theirs(images))
        assert not ours.proj.weight.requires_grad
        if ours.proj.bias is not None:
            assert ours.proj.bias.requires_grad


def test_sizes_that_cannot_be_set() -> None:
    embed = build(patch_norm=True)
    before = embed.state_dict()
    with pytest.raises(ValueError, match=r"patch_size can't be changed to \(8, 8\).*patch_norm"):
        embed.set_input_size(patch_size=8)
    with pytest.raises(ValueError, match="smaller than one patch"):
        embed.set_input_size(img_size=3)
    assert embed.patch_size == (4, 8)
    assert embed.img_size == (16, 24)
    assert embed.state_dict().keys() == before.keys()
    embed.set_input_size(img_size=(32, 32))
    assert embed(torch.randn(1, 3, 32, 32)).shape == (1, 32, 32)
    wrapped = build()
    wrapped.proj = nn.Sequential(wrapped.proj)
    with pytest.raises(ValueError, match=r"no convolution as patch_embed\.proj"):
        wrapped.set_input_size(patch_size=8)


def test_images_of_another_size_are_refused() -> None:
    dynamic = {**SMALL, "dynamic_img_size": True}
    wrong = torch.zeros(1, 3, 18, 24)
    with pytest.raises(ValueError, match="multiples of 4 for H and of 8 for W"):
        check_images(wrong, ViTConfig(**dynamic))
    assert check_images(wrong, ViTConfig(**dynamic, dynamic_img_pad=True)) is wrong
    with pytest.raises(ValueError, match=r"\[B, 3, 16, 24\], got \[1, 3, 18, 24\]"):
        check_images(wrong, ViTConfig(**SMALL))


@pytest.mark.parametrize("changes", [{"patch_norm": True}, {"embed_norm_layer": "layernorm"}])
def test_a_model_with_norms_in_its_patches_trains(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = vitkern.ViT(**{**SMALL, **changes})
    images = torch.randint(0, 256, (4, 16, 24, 3), dtype=torch.uint8)
    loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in model.patch_embed.parameters()
    )
