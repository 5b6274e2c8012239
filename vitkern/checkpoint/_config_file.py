"""config.json of a model saved by vitkern: what timm reads of it, and what vitkern does.

timm finds "architecture" (a name of its own), "model_args" (its arguments that differ) and
"pretrained_cfg" there, so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` works.
Under "vitkern" stand all fields of `ViTConfig` that aren't their defaults: they alone are exact.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from vitkern._version import __version__
from vitkern.checkpoint._rules import CheckpointError, by_channel
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS

# How to run a model, which is the reader's choice and not the checkpoint's.
_RUN = ("impl", "save", "weight_init", "fix_init")
# timm takes classes here, which JSON can't name, or has no such argument at all.
_NOT_JSON = (
    *("embed_layer", "embed_norm_layer", "norm_layer", "block_fn", "mlp_layer", "attn_layer"),
    *("dim_head", "patch_norm", "representation_size", "distilled"),
    *("rel_pos", "rel_pos_dim", "shared_rel_pos"),
)
_OURS = ("pos_resample", "mean", "std", "residual_dtype", "drop_path_mode", *_RUN)


def to_json(config: ViTConfig) -> dict[str, Any]:
    """The contents of config.json."""
    default = ViTConfig()
    own = {
        field.name: _plain(getattr(config, field.name))
        for field in fields(config)
        if field.name not in _RUN and getattr(config, field.name) != getattr(default, field.name)
    }
    return {
        "library_name": "vitkern",
        "vitkern_version": __version__,
        **_timms(config),
        "vitkern": own,
    }


def from_json(contents: Mapping[str, Any]) -> dict[str, Any] | None:
    """All fields of `ViTConfig`, of a config.json or a weight file of ours; None if it isn't ours.

    contents: with an object under "vitkern", or, of a weight file, with its text.

    Raises:
        CheckpointError: it is no such object, or says what this version doesn't know.
    """
    own = contents.get("vitkern")
    if own is None:
        return None
    try:
        own = json.loads(own) if isinstance(own, str) else own
    except ValueError as error:
        raise CheckpointError(f"what it says of its config is no JSON: {error}") from None
    if not isinstance(own, Mapping):
        raise CheckpointError(f"its config must be a JSON object, found {type(own).__name__}")
    found = {**vars(ViTConfig()), **own}
    unknown = sorted(own.keys() - vars(ViTConfig()).keys())
    if unknown:
        raise CheckpointError(
            f"its config has {', '.join(unknown)}, which vitkern {__version__} doesn't know: was "
            "it saved by a newer version?"
        )
    if isinstance(found["residual_dtype"], str):
        dtype = getattr(torch, found["residual_dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"its residual_dtype is {found['residual_dtype']!r}, no dtype")
        found["residual_dtype"] = dtype
    return found


def _timms(config: ViTConfig) -> dict[str, Any]:
    """What timm reads; empty where none of its names leads to this network."""
    best: tuple[str, dict[str, Any]] | None = None
    for name in PRESETS:
        preset = ViTConfig.from_name(name)
        if any(getattr(preset, field) != getattr(config, field) for field in _NOT_JSON):
            continue
        differing = {
            field.name: _plain(getattr(config, field.name))
            for field in fields(config)
            if field.name not in (*_NOT_JSON, *_OURS)
            and getattr(config, field.name) != getattr(preset, field.name)
        }
        if best is None or len(differing) < len(best[1]):
            best = (name, differing)
    if best is None:
        return {}
    name, arguments = best
    arguments.pop("num_classes", None)  # which timm takes from outside of them
    return {
        "architecture": name,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": config.global_pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [config.in_chans, *config.img_size],
            "fixed_input_size": not config.dynamic_img_size,
            "num_classes": config.num_classes,
            **by_channel(config),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value
