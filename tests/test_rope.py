"""axial_rope against timm's rotary embeddings, and attention with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkern.kernels import attention
from vitkern.kernels.attention.reference import Options, Rope, rotate
from vitkern.kernels.attention.rope import axial_rope

pytest.importorskip("timm")
from timm.layers import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    apply_rot_embed_cat,
)

GRIDS = ((3, 5), (5, 3), (1, 7), (14, 16), (37, 24))


def theirs(
    style: str,
    grid: tuple[int, int],
    head_dim: int,
    ref_grid: tuple[int, int] | None = None,
    **base: float,
) -> Tensor:
    """timm's angles [rows * columns, 2 * d]: sin and cos, each laid out for the whole head."""
    if style == "dinov3":
        rope = RotaryEmbeddingDinoV3(head_dim, **base)
    else:
        rope = RotaryEmbeddingCat(head_dim, in_pixels=False, ref_feat_shape=ref_grid, **base)
    return rope.get_embed(shape=list(grid))


def turned(x: Tensor, rope: Rope) -> Tensor:
    return rotate(x, rope.sin, rope.cos, Options(interleaved=rope.interleaved))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("style", ["dinov3", "eva"])
@pytest.mark.parametrize("head_dim", [4, 64, 72])
def test_turns_queries_as_timm_does(style: str, grid: tuple[int, int], head_dim: int) -> None:
    x = torch.randn(2, 3, grid[0] * grid[1], head_dim)
    rope = axial_rope(grid, head_dim, style=style)
    assert rope.sin.shape == rope.cos.shape == (grid[0] * grid[1], head_dim // 2)
    assert rope.sin.dtype == rope.cos.dtype == torch.float32
    expected = apply_rot_embed_cat(x, theirs(style, grid, head_dim), half=style == "dinov3")
    torch.testing.assert_close(turned(x, rope), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ref_grid", [(16, 16), (14, 24)])
def test_eva_maps_a_grid_onto_that_of_its_training(
    grid: tuple[int, int], ref_grid: tuple[int, int]
) -> None:
    x = torch.randn(1, 2, grid[0] * grid[1], 32)
    rope = axial_rope(grid, 32, style="eva", ref_grid=ref_grid)
    expected = apply_rot_embed_cat(x, theirs("eva", grid, 32, ref_grid))
    torch.testing.assert_close(turned(x, rope), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("style", ["dinov3", "eva"])
def test_base_is_timms_temperature(style: str) -> None:
    x = torch.randn(1, 1, 15, 16)
    rope = axial_rope((3, 5), 16, style=style, base=37.0)
    expected = theirs(style, (3, 5), 16, temperature=37.0)
    expected = apply_rot_embed_cat(x, expected, half=style == "dinov3")
    torch.testing.assert_close(turned(x, rope), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("style", ["dinov3", "eva"])
def test_prefix_tokens_are_left_alone(style: str) -> None:
    x = torch.randn(2, 3, 5 + 12, 8)
    out = turned(x, axial_rope((3, 4), 8, style=style))
    assert torch.equal(out[..., :5, :], x[..., :5, :])
    assert not torch.equal(out[..., 5:, :], x[..., 5:, :])


@pytest.mark.parametrize("style", ["dinov3", "eva"])
def test_attention_with_a_class_token(style: str) -> None:
    grid, head_dim = (3, 5), 16
    qkv = torch.randn(2, 16, 3, 4, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    angles = theirs(style, grid, head_dim)
    q, k = (
        torch.cat(
            [x[..., :1, :], apply_rot_embed_cat(x[..., 1:, :], angles, half=style == "dinov3")], -2
        )
        for x in (q, k)
    )
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = attention(qkv, rope=axial_rope(grid, head_dim, style=style), impl="sdpa")
    torch.testing.assert_close(out, expected)


def test_angles_lie_on_the_device_asked_for() -> None:
    assert axial_rope((2, 2), 4).sin.device == torch.get_default_device()
    rope = axial_rope((2, 3), 8, device="meta")
    assert rope.sin.device.type == rope.cos.device.type == "meta"
    with torch.device("meta"):
        assert axial_rope((2, 3), 8).sin.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"head_dim": 6}, "head_dim must be a multiple of 4, got 6"),
        ({"head_dim": 0}, "head_dim must be a multiple of 4, got 0"),
        ({"style": "vit"}, "unknown style 'vit'; expected one of 'dinov3', 'eva'"),
        ({"grid": (0, 3)}, r"grid must be two positive numbers, got \(0, 3\)"),
        ({"grid": (3, -1)}, r"grid must be two positive numbers, got \(3, -1\)"),
        ({"grid": (3, 3, 3)}, r"grid must be two positive numbers, got \(3, 3, 3\)"),
        ({"style": "eva", "ref_grid": (0, 1)}, r"ref_grid must be two positive numbers"),
        ({"ref_grid": (2, 2)}, "ref_grid must be None for style 'dinov3'"),
        ({"base": 0.0}, r"base must be positive, got 0\.0"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=f"axial_rope: {text}"):
        axial_rope(**{"grid": (2, 3), "head_dim": 8, **arguments})
