"""What can be read between the blocks of a ViT: their tokens, and their attention maps.

The mechanics of `ViT.forward_intermediates`, `get_intermediate_layers` and `attention_maps`.
"""

from collections.abc import Iterable
from operator import index
from typing import Any

import torch
from torch import Tensor

from vitkern.model.embed import check_images
from vitkern.model.fused import Stream


def check_layers(layers: Iterable[int] | None, depth: int, name: str = "layers") -> list[int]:
    """Numbers of the chosen blocks from 0, all if None; an error names `name` and says more."""
    if layers is None:
        return list(range(depth))
    problem = f"{name} must be one or more integers from {-depth} to {depth - 1}, got {layers!r}"
    try:
        given = list(layers)
        chosen = [index(layer) for layer in given]
    except TypeError:
        raise TypeError(problem) from None
    if any(isinstance(layer, bool) for layer in given):  # a mask would be read as blocks 0 and 1
        raise TypeError(problem)
    if not chosen or not all(-depth <= layer < depth for layer in chosen):
        raise ValueError(problem)
    return [layer % depth for layer in chosen]


def check_indices(indices: int | Iterable[int] | None, depth: int, name: str) -> list[int]:
    """The same, where one integer n stands for the last n blocks."""
    if isinstance(indices, bool) or not hasattr(indices, "__index__"):
        return check_layers(indices, depth, name)  # type: ignore[arg-type]
    count = index(indices)  # type: ignore[arg-type]
    if not 1 <= count <= depth:
        raise ValueError(f"{name} must be from 1 to {depth} blocks, or their numbers, got {count}")
    return list(range(depth - count, depth))


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """timm's arguments for masked attention, which no op here takes."""
    if attn_mask is not None or is_causal:
        name = "is_causal=True" if attn_mask is None else "attn_mask"
        raise ValueError(f"{name} is not supported; expected attn_mask=None and is_causal=False")


def forward_intermediates(
    model: Any,
    images: Tensor,
    indices: int | Iterable[int] | None,
    *,
    name: str = "indices",
    return_prefix_tokens: bool,
    norm: bool,
    stop_early: bool,
    output_fmt: str,
    intermediates_only: bool,
    output_dict: bool,
) -> Any:
    """See `ViT.forward_intermediates`; `name` is that of `indices` in errors."""
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    taken = set(check_indices(indices, len(model.blocks), name))
    config, prefix = model.config, model.num_prefix_tokens
    as_grid = output_fmt == "NCHW"
    if as_grid and config.patch_drop_rate and model.training:
        raise ValueError(
            "output_fmt='NCHW' needs every patch, and in training patch_drop_rate leaves some "
            "out: expected 'NLC', or a model in evaluation mode"
        )
    images = check_images(images, config)
    grid = config.grid_of(*images.shape[2:])
    stream, bias, last = Stream(model.embed(images)), model.attn_bias(), len(model.blocks) - 1
    kept: list[Tensor] = []
    for i, block in enumerate(model.blocks):
        stream = model.step(block, stream, i < last, bias)
        if i in taken:
            kept.append(model.norm(stream.x) if norm else stream.x)
        if stop_early and i == max(taken):
            break
    prefixes = [x[:, :prefix] for x in kept] if prefix and return_prefix_tokens else None
    kept = [x[:, prefix:] for x in kept]
    if as_grid:
        kept = [x.transpose(1, 2).unflatten(2, grid).contiguous() for x in kept]
    if output_dict:
        result: dict[str, Any] = {"image_intermediates": kept}
        if prefixes is not None:
            result["image_intermediates_prefix"] = prefixes
        if not intermediates_only:
            result["image_features"] = model.norm(stream.x)
        return result
    found = kept if prefixes is None else list(zip(kept, prefixes, strict=True))
    return found if intermediates_only else (model.norm(stream.x), found)


def attention_maps(model: Any, images: Tensor, layers: Iterable[int] | None) -> Tensor:
    """See `ViT.attention_maps`."""
    chosen = check_layers(layers, len(model.blocks))
    training = [module for module in model.modules() if module.training]
    maps: dict[int, Tensor] = {}
    try:
        for module in training:  # not by eval(): that of an adapter may merge its weights
            module.training = False
        stream, bias = Stream(model.embed(images)), model.attn_bias()
        for i, block in enumerate(model.blocks):
            if i in chosen:
                if not hasattr(block, "maps"):
                    raise ValueError(f"block {i}, a {type(block).__name__}, has no attention maps")
                maps[i] = block.maps(stream.x, *(() if bias is None else (bias,)))
            if i == max(chosen):
                break
            stream = model.step(block, stream, attn_bias=bias)
    finally:
        for module in training:
            module.training = True
    return torch.stack([maps[i] for i in chosen])
