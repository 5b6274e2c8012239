"""Attention maps against a softmax by hand in timm's model; rollout; what the pictures need."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitkern
from vitkern import attention_rollout, plot_attention, token_map

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 5,
}
DROP_ALL = {
    "drop_rate": 0.2,
    "pos_drop_rate": 0.2,
    "proj_drop_rate": 0.2,
    "attn_drop_rate": 0.2,
    "drop_path_rate": 0.4,
}


def build(**arguments: Any) -> vitkern.ViT:
    """A model far from its start, where all maps are flat and norms do nothing."""
    torch.manual_seed(0)
    model = vitkern.ViT(**{**SMALL, **arguments})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p), alpha=0.5)
            elif "qkv.weight" in name:
                p.mul_(20)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# The maps of a model


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"qk_norm": True},
        {"qkv_bias": False, "reg_tokens": 3, "init_values": 0.3},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "avg", "reg_tokens": 2, "qk_norm": True},
    ],
    ids=str,
)
def test_maps_are_the_softmax_in_timms_model(arguments: dict[str, Any], images: Tensor) -> None:
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    ours = build(**arguments)
    timms = VisionTransformer(**{**SMALL, **arguments}).eval()
    timms.load_state_dict(ours.state_dict())
    expected = []

    def keep(attn: Any, args: tuple[Tensor, ...]) -> None:
        batch, tokens, _ = args[0].shape
        qkv = attn.qkv(args[0]).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        expected.append((q * attn.scale @ k.transpose(-2, -1)).softmax(-1))

    for block in timms.blocks:
        block.attn.register_forward_pre_hook(keep)
    with torch.no_grad():
        timms(images)
    maps = ours.attention_maps(images)
    tokens = 16 + ours.num_prefix_tokens
    assert maps.shape == (3, 2, 4, tokens, tokens)
    assert maps.std() > 0.03, "flat maps would prove little"
    torch.testing.assert_close(maps, torch.stack(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 4, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["none", "lora", "norm", "hook"])
def test_maps_times_values_is_what_the_block_computes(change: str, images: Tensor) -> None:
    model = build(qk_norm=True)
    attn = model.blocks[1].attn
    if change == "lora":
        attn.qkv = nn.Sequential(attn.qkv, nn.Linear(96, 96))
    elif change == "norm":
        attn.q_norm = nn.Sequential(attn.q_norm, nn.Tanh())
    elif change == "hook":
        attn.k_norm.register_forward_hook(lambda m, args, out: 2 * out)
    seen: dict[str, Tensor] = {}
    handle = attn.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    with torch.no_grad():
        model(images)
        handle.remove()
        values = attn.qkv(seen["x"]).unflatten(-1, (3, 4, 8))[:, :, 2].transpose(1, 2)
        maps = model.attention_maps(images, layers=[1])[0]
        out = attn.proj((maps @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, seen["out"], rtol=1e-4, atol=1e-5)
    if change != "none":
        assert not torch.allclose(maps, build(qk_norm=True).attention_maps(images)[1], atol=1e-3)


def test_layers_come_in_the_order_asked_for(images: Tensor) -> None:
    model = build()
    every = model.attention_maps(images)
    for layers in ([2, 0], (-1,), range(3), [1, 1, -3], np.array([0, 2]), iter([1])):
        given = [1] if not hasattr(layers, "__len__") else list(layers)
        assert torch.equal(model.attention_maps(images, layers), every[given])
    assert torch.equal(model.attention_maps(images, layers=[-2]), every[1:2])


def test_blocks_after_the_last_one_asked_for_do_not_run(images: Tensor) -> None:
    model, ran = build(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    model.attention_maps(images, layers=[1])
    assert ran == [0]  # of block 1, all that is needed are queries and keys
    for block in model.blocks[1:]:
        block.mlp = None
    model.attention_maps(images, layers=[-2])


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ([3], ValueError),
        ([0, -4], ValueError),
        ([], ValueError),
        (1, TypeError),
        ([1.0], TypeError),
        (["1"], TypeError),
        ("1", TypeError),
        ([True, False, True], TypeError),
    ],
)
def test_layers_that_do_not_exist_are_refused(
    layers: Any, error: type[Exception], images: Tensor
) -> None:
    with pytest.raises(error, match="layers must be one or more integers from -3 to 2, got"):
        build().attention_maps(images, layers)


def test_images_are_checked_as_in_forward() -> None:
    model = build().train()
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\], got \[2, 3, 32, 40\]"):
        model.attention_maps(torch.zeros(2, 3, 32, 40))
    assert all(module.training for module in model.modules())


def test_nothing_is_left_behind_and_dropout_does_not_blur(images: Tensor) -> None:
    model = build(**DROP_ALL, init_values=0.5)
    expected = model.attention_maps(images)
    model.train()
    model.blocks[1].eval()  # frozen
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    images.requires_grad_()
    maps = model.attention_maps(images)
    assert torch.equal(maps, expected)
    assert not maps.requires_grad
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert images.grad is None
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.requires_grad
        assert torch.equal(p, before[name])


def test_other_sizes_and_pixels(images: Tensor) -> None:
    model = build(dynamic_img_size=True, reg_tokens=2)
    pixels = torch.randint(0, 256, (2, 24, 40, 3), dtype=torch.uint8)
    maps = model.attention_maps(pixels)
    assert maps.shape == (3, 2, 4, 18, 18)
    floats = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.testing.assert_close(maps, model.attention_maps(floats), rtol=0, atol=1e-4)
    grid = model.patch_embed.dynamic_feat_size((24, 40))
    assert token_map(maps, grid, model.num_prefix_tokens).shape == (3, 2, 4, 3, 5)
    assert model.attention_maps(images[:0]).shape == (3, 0, 4, 19, 19)


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float64"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_maps_are_float32_in_any_precision(how: str, qk_norm: bool, images: Tensor) -> None:
    model = build(qk_norm=qk_norm)
    with torch.no_grad():
        for block in model.blocks:  # rounding moves a sharp softmax far
            block.attn.qkv.weight /= 4
    expected = model.attention_maps(images)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            maps = model.attention_maps(images)
    else:
        dtype = getattr(torch, how)
        maps = copy.deepcopy(model).to(dtype).attention_maps(images.to(dtype))
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]), rtol=0, atol=1e-5)
    tolerance = 1e-5 if how == "float64" else 0.03
    assert (maps - expected).norm() <= tolerance * expected.norm()


# Rollout, and what a token looks at


def random_maps(layers: int = 3, tokens: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(layers, 2, 4, tokens, tokens, generator=generator).softmax(-1)


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.8])
def test_rollout_equals_a_plain_loop(residual: float) -> None:
    maps = random_maps()
    rollout = attention_rollout(maps, residual=residual)
    assert rollout.shape == (2, 5, 5)
    for image in range(2):
        flow = np.eye(5)
        for layer in maps[:, image].double().numpy():
            mixed = residual * np.eye(5) + (1 - residual) * sum(layer) / len(layer)
            flow = (mixed / mixed.sum(1, keepdims=True)) @ flow
        np.testing.assert_allclose(rollout[image], flow, atol=1e-6)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 5))


def test_rollout_where_nothing_flows_is_the_identity() -> None:
    identity = torch.eye(5).expand(3, 2, 4, 5, 5)
    assert torch.equal(attention_rollout(identity), torch.eye(5).expand(2, 5, 5))
    assert torch.equal(attention_rollout(random_maps(), residual=1), torch.eye(5).expand(2, 5, 5))


def test_rollout_keeps_its_precision() -> None:
    maps = random_maps(12)
    expected = attention_rollout(maps)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attention_rollout(maps), expected)
    half = attention_rollout(maps.bfloat16())  # rows that sum to 1 only roughly
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(-1), torch.ones(2, 5))
    assert attention_rollout(maps.double()).dtype == torch.float64


def test_rollout_refuses_what_it_cannot_use() -> None:
    for shape in ((3, 2, 5, 5), (0, 2, 4, 5, 5), (3, 2, 4, 5, 6)):
        with pytest.raises(ValueError, match=r"maps must be \[L, B, H, T, T\] with L >= 1, got"):
            attention_rollout(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"residual must be from 0 to 1, got 1\.5"):
        attention_rollout(random_maps(), residual=1.5)


def test_token_map_is_the_row_of_a_token() -> None:
    maps = random_maps(tokens=11)
    looks = token_map(maps, (2, 5))
    assert looks.shape == (3, 2, 4, 2, 5)
    assert torch.equal(looks.flatten(-2), maps[..., 0, 1:])
    assert torch.equal(token_map(maps, (3, 3), 2, query=1).flatten(-2), maps[..., 1, 2:])
    patches = token_map(maps, num_prefix_tokens=2, query=slice(2, None))  # a square by itself
    assert torch.equal(patches.flatten(-2), maps[..., 2:, 2:].mean(-2))
    none = token_map(attention_rollout(maps), (1, 11), num_prefix_tokens=0)
    assert torch.equal(none.flatten(-2), attention_rollout(maps).mean(-2))


def test_token_map_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="the 10 patches that follow 1 prefix tokens, got 3 x 3"):
        token_map(random_maps(tokens=11))
    with pytest.raises(ValueError, match=r"grid must have the 10 patches .* got 2 x 4"):
        token_map(random_maps(tokens=11), (2, 4))
    with pytest.raises(ValueError, match=r"attention must be \[..., 5 \+ N, 5 \+ N\], got"):
        token_map(random_maps(), num_prefix_tokens=5)
    with pytest.raises(ValueError, match=r"attention must be .* got \[5\]"):
        token_map(torch.zeros(5))
    with pytest.raises(IndexError):
        token_map(random_maps(), query=5)


# The picture


@pytest.mark.parametrize("images", [(2, 3, 32, 48), (2, 32, 48, 3), (2, 1, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_a_picture_is_written(images: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    pixels = (torch.rand(images) * 255).to(dtype)
    maps = {"last block": torch.rand(2, 4, 6, requires_grad=True), "flat": torch.zeros(2, 2, 2)}
    path = tmp_path / "attention.png"
    plot_attention(pixels, maps, path, labels=["a", "b"], interpolation="nearest")
    drawn = imread(path)
    assert drawn.shape[0] > 100
    assert drawn.shape[1] > 300
    assert drawn[..., :3].std() > 0.05
    assert not np.allclose(drawn[..., 0], drawn[..., 2], atol=0.1), "no tint"


@pytest.mark.parametrize(
    ("images", "maps", "options", "said"),
    [
        ((2, 3, 8, 8), {"a": (3, 2, 2)}, {}, r"maps\['a'\] must be \[2, rows, columns\], got"),
        ((2, 3, 8, 8), {"a": (2, 4, 5, 5, 1)}, {}, r"maps\['a'\] must be \[2, rows, columns\]"),
        ((2, 3, 8, 8), {"a": (2, 2, 2)}, {"labels": ["one"]}, "labels must be 2, one an image"),
        ((2, 4, 8, 8), {"a": (2, 2, 2)}, {}, r"images must be \[B, C, H, W\] or .* got \[2, 4, 8"),
        ((3, 8, 8), {"a": (2, 2, 2)}, {}, r"images must be \[B, C, H, W\] or .* got \[3, 8, 8\]"),
    ],
)
def test_a_picture_of_what_does_not_fit_is_refused(
    images: tuple[int, ...],
    maps: dict[str, Any],
    options: dict[str, Any],
    said: str,
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    made = {title: torch.rand(shape) for title, shape in maps.items()}
    with pytest.raises(ValueError, match=said):
        plot_attention(torch.rand(images), made, tmp_path / "never.png", **options)
    assert not list(tmp_path.iterdir())


def test_maps_without_titles_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(TypeError, match="maps must be a mapping of titles to maps, got Tensor"):
        plot_attention(torch.rand(1, 3, 8, 8), torch.rand(1, 2, 2), tmp_path / "never.png")


def test_matplotlib_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vitkern\[demo\]'") as missing:
        plot_attention(torch.rand(1, 3, 8, 8), {}, "never.png")
    assert missing.value.name.startswith("matplotlib")


def test_importing_vitkern_does_not_import_matplotlib() -> None:
    code = "import sys, vitkern; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
