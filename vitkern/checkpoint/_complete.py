"""A whole config, from what shapes show and what the source tells.

What neither does (number of heads, eps, activation, the pool behind a plain `norm`) comes from the
presets that have these shapes, else from the field's convention; of each such field is said why.
"""

import math
from collections import Counter
from functools import cache
from typing import Any

from vitkern.checkpoint._rules import CheckpointError, Fields
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS

# Reasons of an assumption that is a guess.
USUAL = "usual"
AMBIGUOUS = "with the same shapes, others have"

# Fields that shapes don't tell; with what is usual where nothing tells them.
_UNSEEN: Fields = {
    "num_heads": None,  # see `usual_heads`
    "norm_layer": None,  # the kind is seen, the eps isn't: timm's 1e-6
    "act_layer": "gelu",
    "global_pool": None,  # see `_usual`
    "block_fn": "pre_norm",  # a norm behind its branch has the names of one before it
    "attn_layer": None,
    "embed_norm_layer": None,
    "pool_include_prefix": False,
    "mean": 0.5,
    "std": 0.5,
}
# Assumed without a word where usual.
_SILENT = ("mean", "std", "pool_include_prefix", "block_fn")
# Fields that a preset must share with the tensors; sizes of image, input and head may differ.
_SEEN = (
    *("embed_dim", "depth", "patch_size", "class_token", "reg_tokens", "distilled", "pos_embed"),
    *("qkv_bias", "proj_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "pre_norm"),
    *("final_norm", "mlp_layer", "representation_size", "embed_layer", "patch_norm", "rel_pos"),
    *("shared_rel_pos", "rel_pos_dim", "hidden_dim", "norm_after_pool", "inner_dim"),
)


def completed(
    seen: Fields, told: Fields, defaults: Fields, name: str | None = None
) -> tuple[Fields, dict[str, str], list[str]]:
    """(fields of ViTConfig, field -> why, of those that nothing told, presets of these shapes).

    seen: from `infer`. told: what format, config file and user say; it overrides. defaults: the
    library's own, where nothing tells. name: what the source calls the architecture.
    """
    fits = [preset for preset in PRESETS if _fits(_config_of(preset), seen, told)]
    if name in fits:
        fits = [name]
    models = [_config_of(preset) for preset in fits]
    placed = seen["pos_embed"] != "none" or seen["rel_pos"] or "pos_embed" in told
    if not placed and not models:
        raise CheckpointError(
            "it has no positions: if its network computes them, as rotary ones, vitkern has none "
            "such; if it does without, say pos_embed='none'"
        )
    assumed: dict[str, str] = {}
    fields: Fields = {
        key: seen[key]
        for key in (
            *("embed_dim", "depth", "mlp_ratio", "mlp_layer", "patch_size", "in_chans"),
            *("class_token", "reg_tokens", "distilled", "pre_norm", "num_classes", "final_norm"),
            *("representation_size", "pos_embed", "qkv_bias", "proj_bias", "qk_norm", "rel_pos"),
            *("scale_attn_norm", "scale_mlp_norm", "shared_rel_pos", "rel_pos_dim", "dim_head"),
            *("no_embed_class", "img_size", "embed_layer", "patch_norm"),
        )
        if seen.get(key) is not None
    }
    if seen["init"]:
        values = {model.init_values for model in models} or {1e-5}
        fields["init_values"] = min(value for value in values if value)
    for field, value in defaults.items():
        if field not in told and (field in _UNSEEN or field not in seen):
            fields[field], assumed[field] = value, "the library's default"
    for field in _UNSEEN:
        if field in told or field in assumed:
            continue
        value, why = _guess(field, seen, told, models, fits)
        if why and not (field in _SILENT and value == _UNSEEN[field]):
            assumed[field] = why
        if value is not None:
            fields[field] = value
    _sizes(fields, told, models, fits, assumed)
    fields |= told
    for key in ("mean", "std"):
        fields[key] = averaged(fields[key], fields["in_chans"])
    pool = fields.get("global_pool")
    if seen["final_norm"] and "fc_norm" not in told:
        usual = pool in ("avg", "avgmax", "max")
        fields["fc_norm"] = None if seen["norm_after_pool"] == usual else seen["norm_after_pool"]
    return fields, assumed, fits


def _sizes(
    fields: Fields, told: Fields, models: list[ViTConfig], fits: list[str], assumed: dict[str, str]
) -> None:
    """img_size where no positions show a grid; or where it is no multiple of the patches."""
    if "img_size" in told:
        return
    size, patch = fields.get("img_size"), fields["patch_size"]
    if size is None:
        fields["img_size"] = models[0].img_size if models else (224, 224)
        assumed["img_size"] = _as(fits) or USUAL
        return
    grid = (size[0] // patch[0], size[1] // patch[1])
    same = {model.img_size for model in models if model.grid_size == grid}
    if len(same) == 1:
        fields["img_size"] = same.pop()


def _guess(
    field: str, seen: Fields, told: Fields, models: list[ViTConfig], fits: list[str]
) -> tuple[Any, str]:
    """(value, why) of a field; "" where the tensors tell it after all."""
    if field in ("global_pool", "num_heads") and seen.get(field) is not None:
        return seen[field], ""
    if field == "attn_layer" or (field == "block_fn" and seen["block_kind"] != "pre_norm"):
        start = field.removesuffix("_fn").removesuffix("_layer")
        kind, options = seen[f"{start}_kind"], seen.get(f"{start}_options")
        return ((kind, tuple(options.items())) if options else kind), ""
    if field == "embed_norm_layer" and not seen.get("embed_norm"):
        return None, ""
    usual = _usual(field, seen, told)
    values = Counter(getattr(model, field) for model in models)
    if not values:
        return usual, USUAL
    value = usual if usual in values else values.most_common(1)[0][0]
    why = _as([name for name in fits if getattr(_config_of(name), field) == value])
    others = ", ".join(str(other) for other in values if other != value)
    return value, why + (f"; {AMBIGUOUS} {others}" if others else "")


def _usual(field: str, seen: Fields, told: Fields) -> Any:
    """What most ViTs have."""
    if field == "num_heads":
        return usual_heads(seen["inner_dim"])
    if field == "norm_layer":
        return (seen["norm_kind"], 1e-6)
    if field == "embed_norm_layer":
        return (seen["embed_norm_kind"], told.get("norm_layer", ("", 1e-6))[1])
    if field == "block_fn":
        return "pre_norm"
    if field == "global_pool":
        if seen.get("norm_after_pool"):
            return "avg"
        return "token" if seen["class_token"] else "avg"
    return _UNSEEN[field]


def usual_heads(inner: int) -> int:
    """How many heads `inner` numbers are split into where nothing tells: of 64, or nearly so."""
    widths = [w for w in range(1, inner + 1) if inner % w == 0]
    return inner // min(widths, key=lambda w: (abs(math.log2(w / 64)), w))


def averaged(values: Any, channels: int) -> Any:
    """`mean` or `std`; of another number of channels the average, as `presets.preset` has it."""
    if isinstance(values, (tuple, list)) and len(values) != channels:
        return sum(values) / len(values)
    return values


def _as(presets: list[str]) -> str:
    """Whose value it is."""
    if not presets:
        return ""
    more = len(presets) - 1
    return f"as in timm's {presets[0]}" + (f" and {more} more of these shapes" if more else "")


@cache
def _config_of(preset: str) -> ViTConfig:
    return ViTConfig.from_name(preset)


def _fits(model: ViTConfig, seen: Fields, told: Fields) -> bool:
    """Whether a preset has the shapes that were seen, and as many heads as was told."""
    if any(getattr(model, key) != seen[key] for key in _SEEN if key in seen):
        return False
    block, options = model.block
    kind = "pre_norm" if block == "res_post_norm" else block
    heads = seen.get("num_heads", told.get("num_heads", model.num_heads))
    placed = seen["pos_embed"] == "learn" and model.num_prefix_tokens > 0
    return (
        kind == seen["block_kind"]
        and options == seen.get("block_options", options)
        and model.attention[0] == seen["attn_kind"]
        and bool(model.init_values and block != "res_post_norm") == seen["init"]
        and model.norm_layer[0] == seen["norm_kind"]
        and (model.embed_norm_layer is not None) == bool(seen.get("embed_norm"))
        and (model.global_pool == "map") == (seen.get("global_pool") == "map")
        and model.num_heads == heads
        and (not placed or model.no_embed_class == seen["no_embed_class"])
    )
