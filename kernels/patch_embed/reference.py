"""The definition of patch_embed and of its gradients, and the same forward by fast ATen calls."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._launch import cdiv
from .._op import accumulate_dtype


class Geometry(NamedTuple):
    """Sizes of one call: grid of patches, their number, and the length K of one."""

    grid_h: int
    grid_w: int
    patches: int
    length: int


def geometry(images: Tensor, weight: Tensor, pad: bool) -> Geometry:
    """Patches that fit into the images; with `pad` also those that reach over the lower right."""
    height, width = images.shape[2:]
    patch_h, patch_w = weight.shape[2:]
    grid_h = cdiv(height, patch_h) if pad else height // patch_h
    grid_w = cdiv(width, patch_w) if pad else width // patch_w
    return Geometry(grid_h, grid_w, grid_h * grid_w, weight[0].numel())


def covered_pixels(images: Tensor, weight: Tensor, pad: bool) -> int:
    """Pixel values inside some patch."""
    g = geometry(images, weight, pad)
    height = min(images.shape[2], g.grid_h * weight.shape[2])
    width = min(images.shape[3], g.grid_w * weight.shape[3])
    return images.shape[0] * images.shape[1] * height * width


def prepare(
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    pad: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Normalised, flipped and padded images [B, C, H, W] in `dtype`."""
    x = images.to(dtype)
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None and std is not None:
        x = (x - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    if pad:
        x = F.pad(x, (0, -x.shape[3] % weight.shape[3], 0, -x.shape[2] % weight.shape[2]))
    return x


def patchify(images: Tensor, weight: Tensor) -> Tensor:
    """Patches [B, N, K] of prepared images, each in the order (c, p, q); the rest is cut off."""
    batch, channels, height, width = images.shape
    patch_h, patch_w = weight.shape[2:]
    rows, columns = height // patch_h, width // patch_w
    x = images[:, :, : rows * patch_h, : columns * patch_w]
    x = x.reshape(batch, channels, rows, patch_h, columns, patch_w)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, weight[0].numel())


def assemble(patches: Tensor, pos_embed: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Prefix tokens and positions around the projected patches [B, N, D]."""
    if prefix is None:
        return patches if pos_embed is None else patches + pos_embed
    rows = prefix.expand(patches.shape[0], -1, -1)
    if pos_embed is not None and pos_embed.shape[0] == patches.shape[1]:
        return torch.cat([rows, patches + pos_embed], dim=1)
    tokens = torch.cat([rows, patches], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed


def reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    pad: bool,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """The definition, accumulated in float32 (float64 where the weight is float64)."""
    acc = accumulate_dtype(weight)
    x = patchify(prepare(images, weight, mean, std, flip, pad, acc), weight)
    y = x @ weight.flatten(1).to(acc).t()
    if bias is not None:
        y = y + bias.to(acc)
    pos_embed, prefix = (None if t is None else t.to(acc) for t in (pos_embed, prefix))
    return assemble(y, pos_embed, prefix).to(out_dtype).contiguous()


def portable(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    pad: bool,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """ATen's convolution with the patch as stride."""
    # Half precision would lose the bytes' normalising; else nothing is gained by a detour.
    normalised = mean is not None or images.dtype == torch.uint8
    dtype = accumulate_dtype(weight) if normalised else compute_dtype
    x = prepare(images, weight, mean, std, flip, pad, dtype)
    y = F.conv2d(
        x.to(compute_dtype),
        weight.to(compute_dtype),
        None if bias is None else bias.to(compute_dtype),
        stride=weight.shape[2:],
    )
    y = y.flatten(2).transpose(1, 2)
    pos_embed, prefix = (None if t is None else t.to(out_dtype) for t in (pos_embed, prefix))
    return assemble(y.to(out_dtype), pos_embed, prefix).contiguous()


def backward_reference(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    prefix_tokens: int,
    pad: bool,
    compute_dtype: torch.dtype,
    need_images: bool,
    need_weight: bool,
    need_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_images, d_weight, d_bias [D], d_tokens [T + N, D]); empty where not needed.

    d_tokens is the gradient summed over the batch: its rows are those of dprefix and dpos. d_bias
    and d_tokens are float32, d_weight has the dtype of the weight.
    """
    acc = accumulate_dtype(grad, weight)
    tokens = grad.to(acc).sum(0)
    dy = grad.to(acc)[:, prefix_tokens:]
    d_images = d_weight = d_bias = d_tokens = weight.new_empty(0)
    if need_images:
        d_images = _unpatchify(dy @ weight.flatten(1).to(acc), images, weight, std, flip, pad)
    if need_weight:
        x = patchify(prepare(images, weight, mean, std, flip, pad, acc), weight)
        d_weight = torch.einsum("bnd,bnk->dk", dy, x).view(weight.shape).to(weight.dtype)
    if need_tokens:
        d_bias, d_tokens = tokens[prefix_tokens:].sum(0), tokens
    return (
        d_images if need_images else weight.new_empty(0),
        d_weight.contiguous() if need_weight else weight.new_empty(0),
        d_bias if need_tokens else grad.new_empty(0, dtype=acc),
        d_tokens if need_tokens else grad.new_empty(0, dtype=acc),
    )


def _unpatchify(
    x: Tensor, images: Tensor, weight: Tensor, std: Tensor | None, flip: Tensor | None, pad: bool
) -> Tensor:
    """Gradient of the images from the gradient [B, N, K] of normalised patches."""
    g, (channels, patch_h, patch_w) = geometry(images, weight, pad), weight.shape[1:]
    x = x.view(x.shape[0], g.grid_h, g.grid_w, channels, patch_h, patch_w)
    x = x.permute(0, 3, 1, 4, 2, 5).reshape(
        x.shape[0], channels, g.grid_h * patch_h, g.grid_w * patch_w
    )
    height, width = images.shape[2:]
    x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))  # crops where negative
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    if std is not None:
        x = x / std.to(x.dtype)[:, None, None]
    return torch.empty_like(images).copy_(x)
