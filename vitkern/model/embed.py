"""Images to tokens: scale uint8 pixels, cut patches, project them, add positions and prefix.

plain:       one op, `patch_embed`
embed_norm:  patches projected by the op, a norm, then positions and prefix
patch_norm:  the pixels of a patch normalised in the prologue of the product, `norm_linear`
hybrid:      a backbone (`hybrid.py`), and all of that on its feature map
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkern import kernels as ops
from vitkern.kernels.patch_embed.reference import assemble, patchify
from vitkern.model.config import ViTConfig, backbone_stride
from vitkern.model.hybrid import make_backbone
from vitkern.model.layers import NORMS, make_norm, plain
from vitkern.model.weights import resample_patch_embed


class PatchEmbed(nn.Module):
    """Images to tokens: scale uint8 pixels, cut patches, project them, add positions and prefix."""

    mean: Tensor
    std: Tensor
    proj: nn.Module

    def __init__(self, config: ViTConfig, in_chans: int | None = None, **dd: Any) -> None:
        """in_chans: channels of what is projected, if not those of the image."""
        super().__init__()
        self._set_sizes(config)
        self.impl = config.implementations
        channels = in_chans or config.in_chans
        self.proj = nn.Conv2d(
            channels,
            config.embed_dim,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=not config.pre_norm,
            **dd,
        )
        as_norm = replace(config, norm_layer=config.embed_norm_layer or config.norm_layer)
        pixels = channels * config.patch_size[0] * config.patch_size[1]
        norm: Callable[..., nn.Module] = partial(make_norm, as_norm, recast=False, **dd)
        self.norm_in = norm(pixels, product=True) if config.patch_norm else None
        self.norm = nn.Identity() if config.embed_norm_layer is None else norm(config.embed_dim)
        self._normalisation(self.proj.weight.device)

    def _set_sizes(self, config: ViTConfig) -> None:
        self.config = config
        self.img_size, self.patch_size = config.img_size, config.patch_size
        self.grid_size = config.grid_size
        self.num_patches = self.grid_size[0] * self.grid_size[1]

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

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels of the image behind a token: the larger of height and width, or both."""
        return max(self.config.stride) if as_scalar else self.config.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patches in a column and a row of an image of this height and width."""
        return self.config.grid_of(*img_size)

    @torch.no_grad()
    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images, and cut patches, of another size; the projection is resampled to it.

        Args:
            img_size, patch_size: one integer or (height, width); None to leave it.

        Raises:
            ValueError: sizes that the config refuses; a patch size where no convolution cuts the
                patches, or their pixels are normalised (`patch_norm`).
        """
        config = replace(
            self.config,
            img_size=self.img_size if img_size is None else img_size,
            patch_size=self.patch_size if patch_size is None else patch_size,
        )
        _check_feature_map(config)
        size, old = config.patch_size, self.proj
        if size != self.patch_size:
            if not isinstance(old, nn.Conv2d) or self.norm_in is not None:
                why = "no convolution as patch_embed.proj" if self.norm_in is None else "patch_norm"
                raise ValueError(f"patch_size can't be changed to {size} in a model with {why}")
            like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
            bias = old.bias is not None
            new = nn.Conv2d(old.in_channels, old.out_channels, size, size, bias=bias, **like)
            new.weight.copy_(resample_patch_embed(old.weight, size))
            new.weight.requires_grad_(old.weight.requires_grad)
            if old.bias is not None:
                new.bias = old.bias
            self.proj = new.train(old.training)
        self._set_sizes(config)

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
        stream = self.config.residual_dtype
        if self.norm_in is None and plain(self.norm, nn.Identity) and plain(self.proj, nn.Conv2d):
            return self._fused(images, pos_embed, prefix, flip, stream)
        if self.norm_in is not None:
            tokens = self._normed_pixels(self._padded(self.pixels(images, flip)))
        elif plain(self.proj, nn.Conv2d):
            tokens = self._fused(images, None, None, flip, None)
        else:
            tokens = self.proj(self._padded(self.pixels(images, flip))).flatten(2).transpose(1, 2)
        tokens = assemble(self.norm(tokens), pos_embed, prefix)
        return tokens if stream is None else tokens.to(stream)

    def _fused(
        self,
        images: Tensor,
        pos_embed: Tensor | None,
        prefix: Tensor | None,
        flip: Tensor | None,
        out_dtype: torch.dtype | None,
    ) -> Tensor:
        proj: Any = self.proj
        pixels = images.dtype == torch.uint8
        return ops.patch_embed(
            images,
            proj.weight,
            proj.bias,
            pos_embed,
            prefix,
            mean=self.mean if pixels else None,
            std=self.std if pixels else None,
            flip=flip,
            pad=self.config.dynamic_img_pad,
            out_dtype=out_dtype,
            impl=self.impl["patch_embed"],
        )

    def _normed_pixels(self, images: Tensor) -> Tensor:
        """Patches [B, N, D], the pixels of each normalised in the order (c, p, q) and projected."""
        proj: Any = self.proj
        norm: Any = self.norm_in
        shape = (self.config.in_chans, *self.patch_size)
        patches = patchify(images, images.new_empty((1, *shape)))
        if plain(norm, *NORMS) and plain(proj, nn.Conv2d):
            impl, weight = self.impl["norm_linear"], proj.weight.flatten(1)
            affine = (norm.weight, norm.bias, norm.eps)
            return ops.norm_linear(patches, weight, proj.bias, *affine, rms=norm.rms, impl=impl)
        batch, count = patches.shape[:2]
        return proj(norm(patches).view(-1, *shape)).view(batch, count, -1)

    def pixels(self, images: Tensor, flip: Tensor | None) -> Tensor:
        """Images mirrored, and normalised to floats if they are uint8."""
        images = mirror(images, flip)
        if images.dtype != torch.uint8:
            return images
        scale = (-1, 1, 1)
        images = (images / 255 - self.mean.view(scale)) / self.std.view(scale)
        return images.to(next(self.parameters()).dtype)

    def _padded(self, images: Tensor) -> Tensor:
        if not self.config.dynamic_img_pad:
            return images
        (height, width), (rows, columns) = images.shape[2:], self.patch_size
        return F.pad(images, (0, -width % columns, 0, -height % rows))


class HybridEmbed(PatchEmbed):
    """Images to tokens through a backbone, whose feature map is cut into patches of `patch_size`.

    The state dict is that of timm's HybridEmbed: `backbone.*` and, but for "conv_stem", `proj.*`.
    """

    def __init__(self, config: ViTConfig, **dd: Any) -> None:
        _check_feature_map(config)
        backbone, width = make_backbone(config, **dd)  # drawn before the projection, as in timm
        super().__init__(config, width, **dd)
        self.feature_dim = width
        proj: Any = self._modules.pop("proj")  # parameters in timm's order: the backbone's first
        self.backbone = backbone
        self.proj = nn.Identity() if config.embed_layer[0] == "conv_stem" else proj

    def _set_sizes(self, config: ViTConfig) -> None:
        super()._set_sizes(config)
        down = backbone_stride(config.embed_layer)
        self.feature_ratio = (down, down)
        self.feature_size = (self.img_size[0] // down, self.img_size[1] // down)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the inputs of the backbone's blocks."""
        switch: Any = getattr(self.backbone, "set_grad_checkpointing", None)
        if switch is not None:
            switch(enable)

    def forward(
        self,
        images: Tensor,
        pos_embed: Tensor | None = None,
        prefix: Tensor | None = None,
        flip: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, T + N, D] of images [B, C, H, W]; arguments as for `PatchEmbed`."""
        features = self.backbone(self.pixels(images, flip))
        if isinstance(features, (list, tuple)):  # one feature map for each stage asked for
            features = features[-1]
        return super().forward(features, pos_embed, prefix)


def make_patch_embed(config: ViTConfig, **dd: Any) -> PatchEmbed:
    """What makes tokens of images in the model of `config`."""
    return (PatchEmbed if config.embed_layer is None else HybridEmbed)(config, **dd)


def _check_feature_map(config: ViTConfig) -> None:
    """A ValueError unless the feature map has the size that `config` counts on."""
    down = backbone_stride(config.embed_layer)
    if config.embed_layer is None:
        return
    if config.embed_layer[0] == "conv_stem" and config.patch_size != (1, 1):
        raise ValueError(f"patch_size must be 1 with a conv_stem, got {config.patch_size}")
    rows, columns = (down, down) if config.dynamic_img_pad else config.stride
    if config.img_size[0] % rows or config.img_size[1] % columns:
        raise ValueError(
            f"img_size must be a multiple of {(rows, columns)} with "
            f"embed_layer={config.embed_layer!r} and patch_size={config.patch_size}, got "
            f"{config.img_size}"
        )


def check_images(images: Tensor, config: ViTConfig) -> Tensor:
    """Images as [B, C, H, W], uint8 [B, H, W, C] as a view; a ValueError says what is expected."""
    channels, (height, width), (rows, columns) = config.in_chans, config.img_size, config.stride
    if config.dynamic_img_pad:  # a feature map is padded, not the image that it comes from
        rows = columns = backbone_stride(config.embed_layer)
    shape = images.shape
    if images.dtype == torch.uint8 and images.dim() == 4 and shape[1] != channels == shape[3]:
        images = images.permute(0, 3, 1, 2)
        shape = images.shape
    fits = images.dim() == 4 and shape[1] == channels
    expected = f"[B, {channels}, H, W]"
    if not config.dynamic_img_size:
        expected = f"[B, {channels}, {height}, {width}]"
        fits = fits and shape[2] == height and shape[3] == width
    elif rows > 1 or columns > 1:
        expected += f" with multiples of {rows} for H and of {columns} for W"
        fits = fits and shape[2] % rows == 0 and shape[3] % columns == 0
    if not fits:
        raise ValueError(f"images must be {expected}, got {list(shape)}")
    return images


def mirror(images: Tensor, flip: Tensor | None) -> Tensor:
    """Images [B, C, H, W] with the samples chosen by `flip` [B] mirrored left to right."""
    return images if flip is None else torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
