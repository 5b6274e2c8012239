"""How weights start, and how positions follow the model to another resolution."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def draw_weights(model: Any, mode: str, needs_reset: bool) -> None:
    """Draw all weights of a ViT anew, by the scheme `mode` (see `ViT.init_weights`)."""
    reset_only = mode in ("reset", "skip")
    head_bias = -math.log(model.num_classes) if mode == "jax_nlhb" and model.num_classes else 0.0
    if model.pos_embed is not None:
        nn.init.trunc_normal_(model.pos_embed, std=0.02)
    for token in (model.cls_token, model.reg_token):
        if token is not None:
            nn.init.normal_(token, std=1e-6)
    # Children before parents: an MLP's or a pool's own start overrides that of its layers.
    for name, module in reversed(list(model.named_modules())[1:]):
        if not reset_only and isinstance(module, nn.Linear):
            _init_linear(module, name, mode, head_bias)
        elif mode.startswith("jax") and isinstance(module, nn.Conv2d):
            std = module.weight[0].numel() ** -0.5 / 0.87962566103423978  # of the cut normal
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
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
        nn.init.trunc_normal_(weight, std=0.02)
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


def resample_pos_embed(
    pos_embed: Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int], prefix_tokens: int
) -> Tensor:
    """Position embeddings [1, T + N, D] for another grid: bicubic with antialias, the T kept.

    As timm does it (`resample_abs_pos_embed`); computed in float32.
    """
    if tuple(new_grid) == tuple(old_grid):
        return pos_embed
    kept, grid = pos_embed[:, :prefix_tokens], pos_embed[:, prefix_tokens:]
    grid = grid.float().unflatten(1, old_grid).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([kept, grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)], 1)


def fit_pos_embed(
    key: str,
    given: Tensor,
    grid: tuple[int, int],
    old_grid: tuple[int, int] | None,
    prefix_tokens: int,
) -> Tensor:
    """Positions `given` [1, T + M, D] of a state dict, resampled for `grid`.

    Their own grid is `old_grid` where the state dict says it; else `grid` if they are as many, else
    a square.

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
    return resample_pos_embed(given, grid, old_grid, prefix_tokens)
