"""A model that exists, changed: another head, another input size, fewer blocks.

The mechanics of `ViT.reset_classifier`, `set_input_size` and `prune_intermediate_layers`, and of
loading weights of another input size. The new config comes first, so what it refuses leaves the
model as it was; then the modules follow it.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vitkern.model.intermediates import check_indices
from vitkern.model.layers import DropPath
from vitkern.model.rel_pos import RelPosBias, RelPosMlp
from vitkern.model.weights import fit_pos_embed, resample_patch_embed, resample_pos_embed


def make_heads(model: Any, **dd: Any) -> None:
    """A new `head`, and `head_dist` if distilled; identities without classes."""
    for name in ("head", "head_dist")[: 1 + model.config.distilled]:
        width, classes = model.head_hidden_size, model.config.num_classes
        head = nn.Linear(width, classes, **dd) if classes else nn.Identity()
        setattr(model, name, head.train(model.training))


def reset_classifier(model: Any, num_classes: int, global_pool: str | None) -> None:
    """See `ViT.reset_classifier`."""
    config = model.config
    if config.distilled:
        if global_pool not in (None, "", "token"):
            raise ValueError(
                f"global_pool must be 'token' in a distilled model, whose heads read the class "
                f"and distillation tokens, got {global_pool!r}"
            )
        global_pool = None
    pool = config.global_pool if global_pool is None else global_pool
    new = replace(
        config,
        num_classes=num_classes,
        global_pool=pool,
        fc_norm=not isinstance(model.fc_norm, nn.Identity),
        pool_include_prefix=model.pool_include_prefix,
    )
    if pool in ("map", "prr") and (model.attn_pool is None or pool != config.global_pool):
        raise ValueError(f"global_pool={pool!r} can't be added later: build the model with it")
    if pool not in ("map", "prr"):
        model.attn_pool = None
    model.config, model.num_classes, model.global_pool = new, new.num_classes, pool
    like = next(model.parameters())
    make_heads(model, device=like.device, dtype=like.dtype)


@torch.no_grad()
def set_input_size(model: Any, img_size: Any, patch_size: Any) -> None:
    """See `ViT.set_input_size`."""
    embed, old_grid = model.patch_embed, model.config.grid_size
    if not hasattr(embed, "set_input_size"):
        raise ValueError(
            f"img_size and patch_size can't be changed in a model whose patch_embed, a "
            f"{type(embed).__name__}, has no set_input_size"
        )
    embed.set_input_size(img_size, patch_size)
    config = replace(model.config, img_size=embed.img_size, patch_size=embed.patch_size)
    grid, kept, positions = config.grid_size, config.num_pos_prefix, model.pos_embed
    if positions is not None and grid != old_grid:
        new = resample_pos_embed(positions, grid, old_grid, kept, mode=config.pos_resample)
        model.pos_embed = nn.Parameter(new, requires_grad=positions.requires_grad)
    for module in model.modules():
        if isinstance(module, (RelPosBias, RelPosMlp)):
            module.set_window_size(grid)
    model.config = config
    for info in model.feature_info:
        info["reduction"] = max(config.stride)


def fit_weights(
    model: Any, state_dict: dict[str, Any], prefix: str, old_grid: tuple[int, int] | None
) -> None:
    """Resample positions and patch projection of a state dict for the model's grid and patches.

    old_grid: that of the positions, where the state dict says it.
    """
    config = model.config
    key = prefix + "pos_embed"
    given, own = state_dict.get(key), model.pos_embed
    if own is not None and given is not None and given.dim() == 3:
        kept, mode = config.num_pos_prefix, config.pos_resample
        state_dict[key] = fit_pos_embed(key, given, config.grid_size, old_grid, kept, mode)
    key = prefix + "patch_embed.proj.weight"
    proj = getattr(model.patch_embed, "proj", None)
    if isinstance(proj, nn.Conv2d) and key in state_dict:
        given = state_dict[key]
        if given.dim() == 4 and given.shape[:2] == proj.weight.shape[:2]:
            state_dict[key] = resample_patch_embed(given, config.patch_size)


def prune(
    model: Any, indices: int | Iterable[int], prune_norm: bool, prune_head: bool
) -> list[int]:
    """See `ViT.prune_intermediate_layers`."""
    old = model.config
    taken = check_indices(indices, len(model.blocks), "indices")
    depth = max(taken) + 1
    before = not (prune_norm or isinstance(model.norm, nn.Identity))
    after = not (prune_head or isinstance(model.fc_norm, nn.Identity))
    share = (depth - 1) / max(1, old.depth - 1)  # stochastic depth rises from block to block
    changes: dict[str, Any] = {"depth": depth, "drop_path_rate": old.drop_path_rate * share}
    changes |= {"final_norm": before or after, "fc_norm": after}
    if prune_head:
        changes["representation_size"] = 0
    model.config = replace(old, **changes)
    del model.blocks[depth:]
    if not before:
        model.norm = nn.Identity()
    if not after:
        model.fc_norm = nn.Identity()
    if prune_head:
        model.pre_logits, model.head_hidden_size = nn.Identity(), model.embed_dim
        reset_classifier(model, 0, "")
    return taken


def changed_part(model: Any, dropout: bool = True) -> str | None:
    """A module that isn't what the config says (another activation, say), in words; None for none.

    dropout: whether another rate counts.
    """
    from vitkern.model.vit import ViT  # which imports this file

    made = ViT(**{**vars(model.config), "weight_init": "skip"}, device="meta")
    usual = {name: (type(part), part.extra_repr()) for name, part in made.named_modules()}
    for name, part in model.named_modules():
        kind, details = type(part), part.extra_repr()
        same = usual.get(name) == (kind, details)
        if not (same or not name or (isinstance(part, (nn.Dropout, DropPath)) and not dropout)):
            return f"{name} is {kind.__name__}({details}), and not so by its config"
    return None
