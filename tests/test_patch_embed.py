"""What is particular to patch_embed: it is the convolution, in every layout, from bytes too."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitkern.kernels import patch_embed

IMPLS = ["triton", "torch", "reference"]


def arguments(
    device: str, channels: int = 3, patch: tuple[int, int] = (4, 4), width: int = 24
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "images": normal(2, channels, 8, 12),
        "weight": normal(width, channels, *patch) * 0.1,
        "bias": normal(width),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("patch", [(4, 4), (8, 8), (2, 3), (4, 12)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_is_the_convolution(
    channels: int, patch: tuple[int, int], impl: str, kernel_device: str
) -> None:
    a = arguments(kernel_device, channels, patch)
    expected = F.conv2d(a["images"], a["weight"], a["bias"], stride=patch).flatten(2).mT
    torch.testing.assert_close(patch_embed(**a, impl=impl), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [(9, 14), (8, 13), (5, 12)])
def test_padding_and_cutting_off(size: tuple[int, int], impl: str, kernel_device: str) -> None:
    a = arguments(kernel_device)
    a["images"] = torch.randn(2, 3, *size, device=kernel_device)
    cut = F.conv2d(a["images"], a["weight"], a["bias"], stride=4).flatten(2).mT
    torch.testing.assert_close(patch_embed(**a, impl=impl), cut, rtol=1e-5, atol=1e-5)
    padded = F.pad(a["images"], (0, -size[1] % 4, 0, -size[0] % 4))
    expected = F.conv2d(padded, a["weight"], a["bias"], stride=4).flatten(2).mT
    actual = patch_embed(**a, pad=True, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padded", [False, True])
def test_bytes_in_any_layout_equal_normalised_floats(
    padded: bool, impl: str, kernel_device: str
) -> None:
    a = arguments(kernel_device)
    size = (9, 14) if padded else (8, 12)
    generator = torch.Generator().manual_seed(1)
    nchw = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)
    nchw = nchw.to(kernel_device)
    mean = torch.tensor([0.48, 0.45, 0.4], device=kernel_device)
    std = torch.tensor([0.22, 0.25, 0.3], device=kernel_device)
    a["images"] = (nchw.float() / 255 - mean[:, None, None]) / std[:, None, None]
    expected = patch_embed(**a, pad=padded, impl="reference")
    nhwc = nchw.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    batch_last = nchw.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    with_alpha = torch.cat([nchw, nchw[:, :1]], 1).permute(0, 2, 3, 1).contiguous()[..., :3]
    crop = F.pad(nchw, (3, 2, 1, 4))[:, :, 1 : 1 + size[0], 3 : 3 + size[1]]
    for images in (nchw, nhwc, batch_last, with_alpha.permute(0, 3, 1, 2), crop):
        a["images"] = images
        actual = patch_embed(**a, mean=mean, std=std, pad=padded, impl=impl)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flips_the_chosen_samples(
    layout: torch.memory_format, impl: str, kernel_device: str
) -> None:
    a = arguments(kernel_device)
    a["images"] = a["images"].to(memory_format=layout)
    flip = torch.tensor([False, True], device=kernel_device)
    actual = patch_embed(**a, flip=flip, impl=impl)
    plain = patch_embed(**a, impl=impl)
    a["images"] = a["images"].flip(3)
    torch.testing.assert_close(actual[0], plain[0])
    torch.testing.assert_close(actual[1], patch_embed(**a, impl=impl)[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_prefix_positions", [True, False])
def test_prefix_tokens_and_positions(
    with_prefix_positions: bool, impl: str, kernel_device: str
) -> None:
    a = arguments(kernel_device)
    prefix = torch.randn(3, 24, device=kernel_device)
    pos = torch.randn(6 + 3 * with_prefix_positions, 24, device=kernel_device)
    patches = F.conv2d(a["images"], a["weight"], a["bias"], stride=4).flatten(2).mT
    tokens = torch.cat([prefix.expand(2, 3, 24), patches], dim=1)
    tokens[:, 9 - len(pos) :] += pos
    actual = patch_embed(**a, pos_embed=pos, prefix=prefix, impl=impl)
    torch.testing.assert_close(actual, tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_returns_what_eager_would(impl: str, kernel_device: str) -> None:
    a = arguments(kernel_device)
    pos = torch.randn(6, 24, device=kernel_device)
    dtype = torch.float16 if kernel_device == "cpu" else torch.bfloat16
    with torch.autocast(kernel_device, dtype=dtype):
        assert patch_embed(**a, impl=impl).dtype == dtype
        y = patch_embed(**a, pos_embed=pos, impl=impl)
        half = patch_embed(**a, pos_embed=pos, out_dtype=dtype, impl=impl)
    assert (y.dtype, half.dtype) == (torch.float32, dtype)
    a["weight"].requires_grad_()
    with torch.autocast(kernel_device, dtype=dtype):
        patch_embed(**a, pos_embed=pos, impl=impl).sum().backward()
    assert a["weight"].grad.dtype == torch.float32


@pytest.mark.usefixtures("card_to_itself")
def test_offsets_beyond_int32(kernel_device: str) -> None:
    """Two images 2^31 bytes apart; memory that is never touched costs nothing."""
    a = arguments(kernel_device)
    constants = {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.5)}
    constants = {k: v.to(kernel_device) for k, v in constants.items()}
    near = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, device=kernel_device)
    storage = torch.empty(2**31 + near[0].numel(), dtype=torch.uint8, device=kernel_device)
    far = storage.as_strided(near.shape, (2**31, *near.stride()[1:]))
    far.copy_(near)
    far_weight, near_weight = (a["weight"].clone().requires_grad_() for _ in range(2))
    a.pop("weight")
    y = patch_embed(**a | {"images": far}, weight=far_weight, **constants, impl="triton")
    expected = patch_embed(**a | {"images": near}, weight=near_weight, **constants, impl="triton")
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(far_weight.grad, near_weight.grad)


def test_errors_name_the_argument_and_what_was_expected() -> None:
    a = arguments("cpu")
    images, weight = a["images"], a["weight"]
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\], got \[2, 1, 8, 12\]"):
        patch_embed(images[:, :1], weight)
    with pytest.raises(ValueError, match="at least one patch of 4 x 4"):
        patch_embed(images[:, :, :3], weight)
    with pytest.raises(ValueError, match="mean and std go together, and uint8 images need them"):
        patch_embed(images.byte(), weight)
    with pytest.raises(TypeError, match="images must be uint8 or floating point, got int64"):
        patch_embed(images.long(), weight)
    with pytest.raises(ValueError, match=r"pos_embed must be \[6, 24\]"):
        patch_embed(images, weight, pos_embed=torch.zeros(5, 24))
    with pytest.raises(ValueError, match=r"prefix must be \[T, 24\], got \[1, 8\]"):
        patch_embed(images, weight, prefix=torch.zeros(1, 8))
    with pytest.raises(TypeError, match="flip must be bool, got float32"):
        patch_embed(images, weight, flip=torch.zeros(2))
    with pytest.raises(ValueError, match="images are on cpu and weight on meta"):
        patch_embed(images, weight.to("meta"))
