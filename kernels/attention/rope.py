"""Angles of the rotary position embedding over the two axes of an image."""

import math

import torch

from .reference import Rope

# What frequencies fall off with, in the models that each style is named after.
BASES = {"dinov3": 100.0, "eva": 10000.0}


def axial_rope(
    grid: tuple[int, int],
    head_dim: int,
    *,
    base: float | None = None,
    style: str = "dinov3",
    ref_grid: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> Rope:
    """Rotary position embedding over rows and columns of patches.

    Half of the d / 2 pairs of a head turn with a patch's row, the other half with its column. With
    F = d / 4 frequencies an axis, n patches along it, i = 0 .. n - 1 and f = 0 .. F - 1:

        "dinov3": angle = 2 pi x / base^(f / F),  x = 2 (i + 1/2) / n - 1;  pairs (p, p + d / 2)
        "eva":    angle = x / base^(f / F),  x = i, or i ref_n / n;  pairs (2 p, 2 p + 1)

    So DINOv3 sees every image as the square [-1, 1]^2, and EVA-02 sees patches of one size, unless
    `ref_grid` stretches them to the grid that a model was trained on.

    Args:
        grid: rows and columns of patches.
        head_dim: d, a multiple of 4.
        base: what frequencies fall off with; None for the style's own, 100 or 10000.
        style: "dinov3" or "eva".
        ref_grid: for "eva", rows and columns in training; None for those of `grid`.
        device: of the angles; None for torch's default. They are computed on the CPU in any case,
            and so are the same on all devices.

    Returns:
        Rope of sin and cos [rows * columns, d / 2], float32, row by row; `attention` leaves the
        tokens before those, such as a class token, unturned.

    Raises:
        ValueError: an argument other than above.

    Source: Simeoni et al., "DINOv3", 2025; Fang et al., "EVA-02", 2023.
    """
    if style not in BASES:
        known = ", ".join(map(repr, BASES))
        raise ValueError(f"axial_rope: unknown style {style!r}; expected one of {known}")
    if head_dim <= 0 or head_dim % 4:
        raise ValueError(f"axial_rope: head_dim must be a multiple of 4, got {head_dim}")
    for name, sizes in (("grid", grid), ("ref_grid", ref_grid)):
        if sizes is not None and (len(sizes) != 2 or min(sizes) <= 0):
            raise ValueError(f"axial_rope: {name} must be two positive numbers, got {sizes}")
    if ref_grid is not None and style != "eva":
        raise ValueError(f"axial_rope: ref_grid must be None for style {style!r}")
    base = BASES[style] if base is None else base
    if base <= 0:
        raise ValueError(f"axial_rope: base must be positive, got {base}")
    count = head_dim // 4
    spread = base ** (torch.arange(count, dtype=torch.float32, device="cpu") / count)
    axes = []
    # Each step rounds as in timm, so that its weights meet the very angles they were used with.
    for size, reference in zip(grid, ref_grid or (None, None), strict=True):
        place = torch.arange(size, dtype=torch.float32, device="cpu")[:, None]
        if style == "dinov3":
            axes.append(2 * math.pi * (2 * ((place + 0.5) / size) - 1) / spread)
        else:
            place = place if reference is None else place / size * reference
            axes.append(place * (1 / spread))
    rows, columns = axes  # [rows, F], [columns, F]
    angles = torch.cat(torch.broadcast_tensors(rows[:, None], columns[None]), -1).flatten(0, 1)
    device = torch.get_default_device() if device is None else device
    return Rope(angles.sin().to(device), angles.cos().to(device), style == "eva")
