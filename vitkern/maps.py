"""From attention maps to pictures: rollout, what a token looks at, and a drawing of it.

`ViT.attention_maps` makes the maps; nothing here knows the model, so those of others will do.
"""

from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def attention_rollout(maps: Tensor, *, residual: float = 0.5) -> Tensor:
    """How much of every input token reaches every output token, through all layers.

    Attention rollout (Abnar & Zuidema, "Quantifying Attention Flow in Transformers", 2020): in each
    layer the heads are averaged, the residual path is mixed in as an identity, and rows are made to
    sum to 1; the layers' matrices are multiplied.

    Args:
        maps: floating point [L, B, H, T, T], layers from first to last, as of `attention_maps`.
        residual: the identity's share, from 0 to 1; a half in the paper.

    Returns:
        [B, T, T] in the maps' dtype, at least float32: output tokens by input tokens.

    Raises:
        ValueError: maps of another shape, or none; a share outside of [0, 1].
    """
    if maps.dim() != 5 or not len(maps) or maps.shape[3] != maps.shape[4]:
        raise ValueError(f"maps must be [L, B, H, T, T] with L >= 1, got {list(maps.shape)}")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must be from 0 to 1, got {residual}")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    rollout = identity.expand(maps.shape[1], -1, -1)
    with torch.autocast(maps.device.type, enabled=False):
        for layer in maps:
            mixed = residual * identity + (1 - residual) * layer.mean(1)
            rollout = mixed / mixed.sum(-1, keepdim=True) @ rollout
    return rollout


def token_map(
    attention: Tensor,
    grid: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    query: int | slice | None = None,
) -> Tensor:
    """What a token looks at, as a picture: its attention to every patch, where that patch lies.

    Args:
        attention: [..., T + N, T + N], of one layer or several, with heads or their mean, or the
            rollout.
        grid: rows and columns of patches; a square if None.
        num_prefix_tokens: T, the class and register tokens; the model's attribute of that name.
        query: number of the token that looks, or a slice of tokens, for their mean. If None, it is
            token 0, the class token, or without prefix tokens the mean of all patches. Registers
            without a class token, or a model that pools patches, call for slice(T, None).

    Returns:
        [..., rows, columns]. What goes to the T tokens in front isn't in it: the sum is at most 1.

    Raises:
        ValueError: another shape, or patches that don't fill the grid.
        IndexError: a query that doesn't exist.
    """
    patches = attention.shape[-1] - num_prefix_tokens
    if attention.dim() < 2 or attention.shape[-2] != attention.shape[-1] or patches < 1:
        expected = f"[..., {num_prefix_tokens} + N, {num_prefix_tokens} + N]"
        raise ValueError(f"attention must be {expected}, got {list(attention.shape)}")
    rows, columns = grid or (isqrt(patches), isqrt(patches))
    if rows * columns != patches:
        raise ValueError(
            f"grid must have the {patches} patches that follow {num_prefix_tokens} prefix tokens, "
            f"got {rows} x {columns}"
        )
    if query is None:
        query = 0 if num_prefix_tokens else slice(None)
    looks = attention[..., query, num_prefix_tokens:]
    return (looks.mean(-2) if isinstance(query, slice) else looks).unflatten(-1, (rows, columns))


def plot_attention(
    images: Tensor,
    maps: Mapping[str, Tensor],
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    interpolation: str = "bilinear",
) -> None:
    """Draw a row for every image: the image, then each map laid over it, and write it to a file.

    The tint of each map grows from none at 0 to full at its largest value. Below it stand its least
    and its largest value.

    Args:
        images: [B, C, H, W], or [B, H, W, C], in grey or RGB: uint8, or floating point, which is
            shown from its least to its largest value, however it was normalised.
        maps: [B, rows, columns] by their titles, as made by `token_map`.
        path: the file to write, in the format that its suffix names, such as ".png".
        labels: a text beside each image, or None.
        interpolation: between patches; "nearest" shows each as it is. All of matplotlib's do.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the text says what to install.
        TypeError: maps without titles.
        ValueError: images or maps of another shape, or not as many as there are images.
    """
    try:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        needs = f"plot_attention needs {error.name}: pip install 'vitkern[demo]'"
        raise ModuleNotFoundError(needs, name=error.name) from None
    if not isinstance(maps, Mapping):
        raise TypeError(f"maps must be a mapping of titles to maps, got {type(maps).__name__}")
    pictures = _pictures(images)
    count, (height, width) = len(pictures), pictures.shape[1:3]
    for title, shown in maps.items():
        if shown.dim() != 3 or len(shown) != count:
            expected = f"[{count}, rows, columns]"
            raise ValueError(f"maps[{title!r}] must be {expected}, got {list(shown.shape)}")
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels must be {count}, one an image, got {len(labels)}")

    # One hue, the stronger the higher the map: where it is low, the image below shows as it is.
    tint = LinearSegmentedColormap.from_list("tint", ["#e8590c00", "#e8590ccc"])
    place = (-0.5, width - 0.5, height - 0.5, -0.5)  # all of the image, in pixels
    side = 2.0  # inches
    size = (side * (1 + len(maps)), (side * height / width + 0.2) * count + 0.2)
    figure = Figure(size, dpi=120, layout="compressed")
    panels: Any = figure.subplots(count, 1 + len(maps), squeeze=False)
    for axes, title in zip(panels[0], ("image", *maps), strict=True):
        axes.set_title(title, size=10, weight="bold")
    for i, row in enumerate(panels):
        picture = pictures[i]
        grey = picture if picture.ndim == 2 else picture @ (0.299, 0.587, 0.114)
        row[0].imshow(picture, cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(labels[i] if labels else "", rotation=0, ha="right", va="center")
        for axes, shown in zip(row[1:], maps.values(), strict=True):
            heat = shown[i].detach().float().cpu().numpy()
            axes.imshow(0.4 + 0.6 * grey, cmap="gray", vmin=0, vmax=1)  # paler than the tint
            axes.imshow(heat, tint, vmin=0, extent=place, interpolation=interpolation)
            axes.set_xlabel(f"{heat.min():.1%} to {heat.max():.1%} per patch", size=7, color="0.4")
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("0.8")
    figure.savefig(path, bbox_inches="tight")


def _pictures(images: Tensor) -> Any:
    """Images as a float array [B, H, W] or [B, H, W, 3], from 0 to 1."""
    shape = images.shape
    if images.dim() == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3):
        images = images.movedim(3, 1)
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be [B, C, H, W] or [B, H, W, C] with C 1 or 3, got {list(shape)}"
        )
    pixels = images.detach().cpu().float()
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    else:
        pixels = pixels - pixels.amin((1, 2, 3), keepdim=True)
        pixels = pixels / pixels.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    return pixels.movedim(1, 3).squeeze(3).numpy()
