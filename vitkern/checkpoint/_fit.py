"""Tensors of one config, adapted to another: classes, image, patches, channels, pool."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitkern.checkpoint._complete import averaged
from vitkern.checkpoint._rules import CheckpointError, State
from vitkern.model.config import ViTConfig
from vitkern.model.rel_pos import resize_bias_table
from vitkern.model.weights import adapt_input_conv, resample_patch_embed, resample_pos_embed

_HEADS = ("head", "head_dist")


def fit(
    state: State, native: ViTConfig, changes: Mapping[str, Any]
) -> tuple[ViTConfig, State, tuple[str, ...], dict[str, str]]:
    """(config with `changes`, its tensors, names that must be drawn anew, key -> why it was left).

    As timm does it when it loads pretrained weights into another size: patches by FlexiViT's
    pseudo-inverse, positions in the way of `config.pos_resample`, RGB weights summed or repeated
    for other channels, `norm` and `fc_norm` renamed where the norm changes sides of the pool.

    Raises:
        CheckpointError: a change that these tensors can't follow.
    """
    changes = dict(changes)
    # A norm said to stand before the pool (SigLIP's) stays there, as in timm's "gap" models.
    if changes.get("global_pool", native.global_pool) != native.global_pool and native.fc_norm:
        changes.setdefault("fc_norm", None)
    channels = changes.get("in_chans", native.in_chans)
    images = {key: averaged(getattr(native, key), channels) for key in ("mean", "std")}
    try:
        target = replace(native, **images, **changes)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    state, gone, fresh = dict(state), dict[str, str](), list[str]()
    if target.num_classes != native.num_classes:
        for head in _HEADS[: 1 + native.distilled]:
            for key in (f"{head}.weight", f"{head}.bias"):
                if state.pop(key, None) is not None:
                    gone[key] = f"num_classes is {target.num_classes}"
                if target.num_classes:
                    fresh.append(key)
    if native.global_pool != target.global_pool:
        _pool(state, native, target, gone)
    if native.final_norm and native.norm_after_pool != target.norm_after_pool:
        old, new = ("fc_norm", "norm") if native.norm_after_pool else ("norm", "fc_norm")
        for key in [key for key in state if key.startswith(old + ".")]:
            state[new + key.removeprefix(old)] = state.pop(key)
    key = "patch_embed.proj.weight"
    plain = key in state and native.embed_layer is None and not native.patch_norm
    if native.in_chans != target.in_chans or native.patch_size != target.patch_size:
        if not plain:
            raise CheckpointError(
                "in_chans and patch_size can't be changed behind a backbone or with patch_norm"
            )
        try:
            state[key] = adapt_input_conv(state[key], target.in_chans)
        except ValueError as error:
            raise CheckpointError(f"in_chans={target.in_chans}: {error}") from None
        state[key] = resample_patch_embed(state[key], target.patch_size)
    if native.grid_size != target.grid_size:
        for table in (name for name in state if name.endswith("relative_position_bias_table")):
            state[table] = resize_bias_table(state[table], native.grid_size, target.grid_size)
        if "pos_embed" in state:
            grids = (target.grid_size, native.grid_size)
            prefix, way = native.num_pos_prefix, native.pos_resample
            state["pos_embed"] = resample_pos_embed(state["pos_embed"], *grids, prefix, way)
    return target, state, tuple(fresh), gone


def _pool(state: State, native: ViTConfig, target: ViTConfig, gone: dict[str, str]) -> None:
    """Attention pooling can be taken off, but not put on."""
    if target.global_pool == "map":
        raise CheckpointError("global_pool='map' needs attn_pool, which the checkpoint hasn't")
    if native.global_pool == "map":
        for key in [key for key in state if key.startswith("attn_pool.")]:
            del state[key]
            gone[key] = f"global_pool is {target.global_pool!r}"
