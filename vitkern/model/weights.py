"""How weights start, and how positions and patches follow the model to another resolution."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def draw_normal(tensor: Tensor, std: float, cut: float = 6.0) -> Tensor:
    """Fill a tensor with normal numbers, none of them beyond `cut` standard deviations.

    By the inverse of the distribution, as timm draws them, so that one seed starts both models
    alike; PyTorch does it otherwise from 2.14 on. In float32, as uniform numbers of 16 bit are -1
    every few hundred times, whose inverse is infinite.
    """
    edge = math.erf(cut / math.sqrt(2))
    drawn = torch.empty_like(tensor, dtype=torch.float32).uniform_(-edge, edge).erfinv_()
    return tensor.copy_(drawn.mul_(std * math.sqrt(2)).clamp_(-cut * std, cut * std))


def _children_first(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names and modules below `module`, in timm's order."""
    for last, child in module.named_children():
        yield from _children_first(child, f"{name}{last}.")
        yield name + last, child


@torch.no_grad()
def draw_weights(model: Any, mode: str, needs_reset: bool) -> None:
    """Draw all weights of a ViT anew, by the scheme `mode` (see `ViT.init_weights`)."""
    reset_only = mode in ("reset", "skip")
    head_bias = -math.log(model.num_classes) if mode == "jax_nlhb" and model.num_classes else 0.0
    if model.pos_embed is not None:
        draw_normal(model.pos_embed, 0.02)
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.normal_(token, std=1e-6)
    # Children before parents: an MLP's or a pool's own start overrides that of its layers.
    for name, module in _children_first(model):
        if not reset_only and isinstance(module, nn.Linear):
            _init_linear(module, name, mode, head_bias)
        elif mode.startswith("jax") and isinstance(module, nn.Conv2d):
            std = module.weight[0].numel() ** -0.5 / 0.87962566103423978  # of the cut normal
            draw_normal(module.weight, std, cut=2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif not reset_only and hasattr(module, "init_weights"):
            module.init_weights()
        elif needs_reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if model.config.fix_init:
        for name, parameter in model.blocks.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                parameter.div_(math.sqrt(2 * (int(name.partition(".")[0]) + 1)))


def _init_linear(layer: nn.Linear, name: str, mode: str, head_bias: float) -> None:
    """Start of a linear layer under timm's schemes; `name` is its place in the model."""
    weight, bias = layer.weight, layer.bias
    if bias is not None:
        nn.init.zeros_(bias)
    if not mode:
        draw_normal(weight, 0.02)
    elif mode == "moco" and "qkv" in name:  # three matrices in one
        bound = math.sqrt(6 / (weight.shape[0] // 3 + weight.shape[1]))
        nn.init.uniform_(weight, -bound, bound)
    elif mode.startswith("jax") and name.startswith("head"):
        nn.init.zeros_(weight)
        nn.init.constant_(bias, head_bias)
    else:
        nn.init.xavier_uniform_(weight)
        if mode.startswith("jax") and "mlp" in name and bias is not None:
            nn.init.normal_(bias, std=1e-6)


# How each house resizes the grid of positions: arguments of F.interpolate, in float32.
_RESIZE: dict[str, dict[str, Any]] = {
    # timm's resample_abs_pos_embed; also DINOv2 with registers, Meta's and Hugging Face's. timm
    # reads Google's files by another way of its own: bilinear, align_corners=False.
    "timm": {"mode": "bicubic", "antialias": True},
    # torchvision's interpolate_embeddings
    "torchvision": {"mode": "bicubic", "align_corners": True},
    # interpolate_pos_encoding of Hugging Face's ViT, DeiT and Dinov2
    "huggingface": {"mode": "bicubic"},
    # Meta's DINO and DINOv2 without registers: by the factor (new + 0.1) / old, see below
    "dinov2": {"mode": "bicubic"},
    # scipy.ndimage.zoom of order 1, in google-research/vision_transformer and big_vision
    "google": {"mode": "bilinear", "align_corners": True},
}


def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    old_grid: tuple[int, int],
    prefix_tokens: int,
    mode: str = "timm",
) -> Tensor:
    """Position embeddings [1, T + N, D] for another grid, the first T kept; computed in float32.

    mode: whose way, one of `config.RESAMPLINGS`. A checkpoint gives its authors' numbers at another
    resolution only if resized as they did it.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in _RESIZE:
        raise ValueError(f"mode must be one of {', '.join(map(repr, _RESIZE))}, got {mode!r}")
    if tuple(new_grid) == tuple(old_grid):
        return pos_embed
    kept, grid = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    grid = grid.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    size: dict[str, Any] = {"size": tuple(new_grid)}
    if mode == "dinov2":  # the factor itself places the samples, so 0.1 shifts them a little
        factors = tuple((new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True))
        size = {"scale_factor": factors}
    grid = F.interpolate(grid, **size, **_RESIZE[mode])
    return torch.cat([kept, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], 1)


def fit_pos_embed(
    key: str,
    given: Tensor,
    grid: tuple[int, int],
    old_grid: tuple[int, int] | None,
    prefix_tokens: int,
    mode: str = "timm",
) -> Tensor:
    """Positions `given` [1, T + M, D] of a state dict, resampled for `grid`.

    Their own grid is `old_grid` where the state dict says it; else `grid` if they are as many, else
    a square. mode: as for `resample_pos_embed`.

    Raises:
        ValueError: they fit no such grid; the text names `key`.
    """
    patches = given.shape[1] - prefix_tokens
    side = math.isqrt(max(patches, 0))
    if old_grid is None or math.prod(old_grid) != patches:  # unknown, or replaced since
        old_grid = grid if math.prod(grid) == patches else (side, side)
    if patches < 1 or math.prod(old_grid) != patches:
        raise ValueError(
            f"{key} is {list(given.shape)}, expected "
            f"{[1, prefix_tokens + math.prod(grid), given.shape[2]]}: without {prefix_tokens} "
            f"prefix tokens its {patches} positions are no grid to resample from"
        )
    return resample_pos_embed(given, grid, old_grid, prefix_tokens, mode)


def resample_patch_embed(weight: Tensor, new_size: tuple[int, int]) -> Tensor:
    """A patch projection [D, C, P, Q] for patches of another size, [D, C, P', Q'].

    With R [P'Q', PQ] the matrix that resizes a patch (bicubic, antialias), the new weight is
    w' = w pinv(R): of all weights the one for which <w', R x> comes closest to <w, x> over random
    patches x, and equals it where patches grow. Computed in float32.

    Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes", 2023; the numbers are timm's.

    Raises:
        ValueError: a weight that isn't of four dimensions.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight must be [D, C, P, Q], got {list(weight.shape)}")
    old_size = weight.shape[2:]
    if tuple(new_size) == tuple(old_size):
        return weight
    pixels = old_size.numel()
    unit = torch.eye(pixels, device=weight.device).view(pixels, 1, *old_size)
    resize = F.interpolate(unit, size=tuple(new_size), mode="bicubic", antialias=True)
    resized = weight.flatten(2).float() @ torch.linalg.pinv(resize.flatten(1).T)
    return resized.unflatten(2, tuple(new_size)).to(weight.dtype)


def adapt_input_conv(weight: Tensor, in_chans: int) -> Tensor:
    """The first convolution [D, 3, P, Q] of a network of RGB images, for `in_chans` channels.

    As timm does it: one channel gets the sum of the three, so that a grey image in it gives what it
    gave in all of them; more repeat R, G, B, scaled by 3 / in_chans.

    Raises:
        ValueError: a weight of another shape, or no channels.
    """
    if weight.dim() != 4 or in_chans < 1:
        raise ValueError(
            f"expected weight [D, C, P, Q] and in_chans of at least 1, got {list(weight.shape)} "
            f"and {in_chans}"
        )
    channels = weight.shape[1]
    if in_chans == channels:
        return weight
    if channels != 3:
        raise ValueError(f"weight must have 3 input channels to be adapted, got {channels}")
    wide = weight.float()
    if in_chans == 1:
        return wide.sum(1, keepdim=True).to(weight.dtype)
    wide = wide.repeat(1, -(-in_chans // 3), 1, 1)[:, :in_chans]
    return (wide * (3 / in_chans)).to(weight.dtype)
