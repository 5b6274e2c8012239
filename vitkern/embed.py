"""Images to tokens: scale uint8 pixels, cut patches, project them, add positions and prefix."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkern import kernels as ops
from vitkern.config import ViTConfig
from vitkern.kernels.patch_embed.reference import assemble
from vitkern.layers import plain


class PatchEmbed(nn.Module):
    """Images to tokens: scale uint8 pixels, cut patches, project them, add positions and prefix."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ViTConfig, **dd: Any) -> None:
        super().__init__()
        self.config = config
        self.img_size, self.patch_size = config.img_size, config.patch_size
        self.grid_size = config.grid_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.impl = config.implementations["patch_embed"]
        self.proj = nn.Conv2d(
            config.in_chans,
            config.embed_dim,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=not config.pre_norm,
            **dd,
        )
        self._normalisation(self.proj.weight.device)

    def _normalisation(self, device: torch.device) -> None:
        for name in ("mean", "std"):
            value = torch.tensor(getattr(self.config, name), dtype=torch.float32, device=device)
            channels = value.expand(self.config.in_chans).contiguous()
            self.register_buffer(name, channels, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PatchEmbed":
        # half(), to(dtype) and to_empty() would round or lose the two buffers: make them anew.
        super()._apply(fn, recurse)
        self._normalisation(self.mean.device)
        return self

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patches in a column and a row of an image of this height and width."""
        height, width = img_size
        rows, columns = self.patch_size
        if self.config.dynamic_img_pad:
            return -(-height // rows), -(-width // columns)
        return height // rows, width // columns

    def forward(
        self,
        images: Tensor,
        pos_embed: Tensor | None = None,
        prefix: Tensor | None = None,
        flip: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, T + N, D] of images [B, C, H, W], floating point or uint8.

        pos_embed: [N, D] or [T + N, D]. prefix: [T, D], before the patches. flip: bool [B].
        """
        pixels = images.dtype == torch.uint8
        pad, stream = self.config.dynamic_img_pad, self.config.residual_dtype
        if plain(self.proj, nn.Conv2d):
            return ops.patch_embed(
                images,
                self.proj.weight,
                self.proj.bias,
                pos_embed,
                prefix,
                mean=self.mean if pixels else None,
                std=self.std if pixels else None,
                flip=flip,
                pad=pad,
                out_dtype=stream,
                impl=self.impl,
            )
        images = mirror(images, flip)
        if pixels:
            scale = (-1, 1, 1)
            images = (images / 255 - self.mean.view(scale)) / self.std.view(scale)
            images = images.to(next(self.proj.parameters()).dtype)
        if pad:
            (height, width), (rows, columns) = images.shape[2:], self.patch_size
            images = F.pad(images, (0, -width % columns, 0, -height % rows))
        tokens = self.proj(images).flatten(2).transpose(1, 2)
        return assemble(tokens, pos_embed, prefix).to(stream or tokens.dtype)


def check_images(images: Tensor, config: ViTConfig) -> Tensor:
    """Images as [B, C, H, W], uint8 [B, H, W, C] as a view; a ValueError says what is expected."""
    channels, (height, width), (rows, columns) = config.in_chans, config.img_size, config.patch_size
    shape = images.shape
    if images.dtype == torch.uint8 and images.dim() == 4 and shape[1] != channels == shape[3]:
        images = images.permute(0, 3, 1, 2)
        shape = images.shape
    fits = images.dim() == 4 and shape[1] == channels
    expected = f"[B, {channels}, H, W]"
    if not config.dynamic_img_size:
        expected = f"[B, {channels}, {height}, {width}]"
        fits = fits and shape[2] == height and shape[3] == width
    elif not config.dynamic_img_pad:
        expected += f" with multiples of {rows} for H and of {columns} for W"
        fits = fits and shape[2] % rows == 0 and shape[3] % columns == 0
    if not fits:
        raise ValueError(f"images must be {expected}, got {list(shape)}")
    return images


def mirror(images: Tensor, flip: Tensor | None) -> Tensor:
    """Images [B, C, H, W] with the samples chosen by `flip` [B] mirrored left to right."""
    return images if flip is None else torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
