"""A config from tensors under our names, for all formats alike.

`infer` reads what shapes show, exactly. `completed` adds what they can't (number of heads, eps,
activation, the pool behind a plain `norm`): from the one preset that has these shapes, else by the
field's convention; and says of each such field why.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from vitkern.arguments import pair
from vitkern.checkpoint._rules import CheckpointError, Fields, State
from vitkern.config import ViTConfig, backbone_stride
from vitkern.presets import PRESETS

# Reasons of an assumption that is a guess.
USUAL = "usual"
AMBIGUOUS = "with the same shapes, others have"

# Fields that shapes don't tell; with what is usual where nothing tells them.
_UNSEEN: Fields = {
    "num_heads": None,  # see `_usual_heads`
    "norm_layer": None,  # the kind is seen, the eps isn't: timm's 1e-6
    "act_layer": "gelu",
    "global_pool": None,  # see `_usual_pool`
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


# Hints at the size of the images: the checkpoint's own, and the one that is wanted.
_IMAGES = ("img_size", "target_img_size")


def infer(state: State, hints: Mapping[str, Any]) -> Fields:
    """Fields that the shapes of tensors under our names show.

    hints: fields known otherwise; a grid that isn't square needs `img_size` of them.

    Raises:
        CheckpointError: no blocks or no patch projection; positions that fit no grid.
    """
    depth = _depth(state)
    found: Fields = {"depth": depth, **_patches(state), **_block(state, hints)}
    dim = found["embed_dim"]

    def rows(name: str) -> int:
        return state[name].shape[0] if name in state else 0

    found |= {
        "class_token": "cls_token" in state,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "distilled": "dist_token" in state,
        "pre_norm": "norm_pre.weight" in state,
        "num_classes": rows("head.weight"),
        "representation_size": rows("pre_logits.fc.weight"),
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
        "pos_embed": "learn" if "pos_embed" in state else "none",
    }
    if found["pos_embed"] == "learn":
        found |= _positions(state["pos_embed"], found, hints)
    elif "img_size" not in hints:
        found["img_size"] = _window(state, found)
    if "attn_pool.latent" in state:
        found["global_pool"] = "map"
    if found["final_norm"]:
        found["norm_after_pool"] = "fc_norm.weight" in state
    if state.get("norm.weight", state.get("fc_norm.weight", state[_first_norm(state)])).shape != (
        dim,
    ):
        raise CheckpointError(f"its norms aren't {dim} wide, as its patches are")
    return found


def _depth(state: State) -> int:
    numbers = {int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
    if not numbers:
        raise CheckpointError("it has no blocks")
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    if missing:
        raise CheckpointError(
            f"its blocks go up to number {max(numbers)}, but {missing[:5]} are missing"
        )
    return len(numbers)


def _first_norm(state: State) -> str:
    names = ("norm1", "in_norm", "attns.0.norm")
    for name in names:
        if f"blocks.0.{name}.weight" in state:
            return f"blocks.0.{name}.weight"
    raise CheckpointError("its first block has no norm (expected blocks.0.norm1.weight)")


def _ratio(hidden: int, dim: int) -> float:
    """mlp_ratio such that int(dim * mlp_ratio) is `hidden`."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


# Blocks of the stages of timm's ResNets that stand before some of its ViTs.
_RESNETS = {"resnet26d": (2, 2, 2, 2), "resnet50d": (3, 4, 6, 3)}
_RESNET_BLOCK = re.compile(r"layer(\d)\.\d+\.conv3\.weight\Z")


def _patches(state: State) -> Fields:
    """What stands before the blocks."""
    start = "patch_embed.backbone."
    backbone = [key.removeprefix(start) for key in state if key.startswith(start)]
    weight: Tensor | None = state.get("patch_embed.proj.weight")
    found: Fields = {"embed_layer": None}
    if backbone:
        stages = Counter(
            m[1] for k in backbone if (m := re.match(r"stages\.(\d+)\.blocks\.\d+\.conv1\.w", k))
        )
        convolutions = sorted(k for k in backbone if re.match(r"\d+\.conv\.weight\Z", k))
        if "stem.conv.weight" in backbone or "conv.weight" in backbone:
            depths = tuple(stages[str(i)] for i in range(len(stages)))
            found["embed_layer"] = ("resnetv2", depths)
            first = state.get(start + "stem.conv.weight", state.get(start + "conv.weight"))
        elif convolutions:
            sizes = tuple(state[start + k].shape[2] for k in convolutions)
            found["embed_layer"], first = ("conv_stem", sizes), state[start + convolutions[0]]
        else:
            blocks = Counter(m[1] for k in backbone if (m := _RESNET_BLOCK.match(k)))
            depths = tuple(blocks[str(i + 1)] for i in range(len(blocks)))
            names = [name for name, d in _RESNETS.items() if depths and d[: len(depths)] == depths]
            if len(names) != 1 or "conv1.0.weight" not in backbone:
                raise CheckpointError(f"its backbone is none that is known: {backbone[0]}, ...")
            found["embed_layer"] = ("timm", (names[0], len(depths)))
            first = state[start + "conv1.0.weight"]
        found["in_chans"] = first.shape[1] if first is not None else 3
    if weight is None:
        if not backbone:
            raise CheckpointError("it has no patch projection (expected patch_embed.proj.weight)")
        return {**found, "patch_size": (1, 1), "embed_dim": state[_first_norm(state)].shape[0]}
    if weight.dim() != 4:
        raise CheckpointError(f"its patch projection is {list(weight.shape)}, no image convolution")
    if not backbone:
        found["in_chans"] = weight.shape[1]
    return {
        **found,
        "embed_dim": weight.shape[0],
        "patch_size": tuple(weight.shape[2:]),
        "patch_norm": "patch_embed.norm_in.weight" in state,
        "embed_norm": "patch_embed.norm.weight" in state,
        "embed_norm_kind": "layernorm" if "patch_embed.norm.bias" in state else "rmsnorm",
    }


def _block(state: State, hints: Mapping[str, Any]) -> Fields:
    """What the first block is made of."""
    at = "blocks.0."

    def has(name: str) -> bool:
        return at + name in state

    def shape(name: str) -> Any:
        if at + name not in state:
            raise CheckpointError(f"{at + name} is missing")
        return state[at + name].shape

    dim = shape(_first_norm(state).removeprefix(at))[0]
    found: Fields = {
        "norm_kind": "layernorm" if _first_norm(state)[:-6] + "bias" in state else "rmsnorm",
        "block_kind": "pre_norm",
        "attn_kind": "attn",
        "scale_attn_norm": False,
        "scale_mlp_norm": False,
        "mlp_layer": "mlp",
        "rel_pos": None,
        "shared_rel_pos": False,
    }
    attn, mlp = "attn.", "mlp."
    if has("in_proj.weight"):
        fused = has("out_proj.weight")
        hidden = (shape("out_proj.weight")[1] - dim) if fused else shape("mlp_out_proj.weight")[1]
        out = "out_proj." if fused else "attn_out_proj."
        kind = "parallel_scaling"
        options: Fields = {"fuse_out_proj": fused}
        if has("lambda_a") or has("lambda_q1"):
            kind, options = "diff_parallel_scaling", {"dual_lambda": has("lambda_a")}
        found |= {
            "block_kind": kind,
            "block_options": options,
            "qkv_bias": has("in_proj.bias"),
            "proj_bias": has(out + "bias"),
            "qk_norm": has("q_norm.weight"),
            "init": has("ls.gamma"),
            "inner_dim": dim,
        }
        attn = ""
    else:
        if has("attns.0.norm.weight"):
            things = [k for k in state if re.match(r"blocks\.0\.attns\.\d+\.norm\.weight\Z", k)]
            found |= {
                "block_kind": "parallel_things",
                "block_options": {"num_parallel": len(things)},
            }
            attn, mlp = "attns.0.attn.", "ffns.0.mlp."
        first = "fc1_g" if has(mlp + "fc1_g.weight") else "fc1"
        hidden = shape(mlp + first + ".weight")[0]
        if first == "fc1_g":
            found["mlp_layer"] = "swiglu"
        elif shape(mlp + "fc2.weight")[1] * 2 == hidden:
            found["mlp_layer"] = "swiglu_packed"
        found |= {
            "qkv_bias": has(attn + "qkv.bias"),
            "proj_bias": has(attn + "proj.bias"),
            "qk_norm": has(attn + "q_norm.weight"),
            "scale_attn_norm": has(attn + "norm.weight"),
            "scale_mlp_norm": has(mlp + "norm.weight"),
            "init": has("ls1.gamma") or has("attns.0.ls.gamma"),
            "inner_dim": shape(attn + "proj.weight")[1],
        }
    if attn and (has(attn + "lambda_a") or has(attn + "lambda_q1")):
        found["attn_kind"] = "diff"
        found["attn_options"] = {"dual_lambda": has(attn + "lambda_a")}
    for where in ("shared_rel_pos.", at + attn + "rel_pos."):
        table = state.get(where + "relative_position_bias_table")
        network = state.get(where + "mlp.fc1.weight")
        if table is not None or network is not None:
            found["rel_pos"] = "mlp" if table is None else "bias"
            found["shared_rel_pos"] = where.startswith("shared")
            if table is not None:
                found["num_heads"] = table.shape[1]
            elif network is not None:
                found["num_heads"] = state[where + "mlp.fc2.weight"].shape[0]
                inside = network.shape[0]
                found["rel_pos_dim"] = None if inside == 128 else inside  # 128 is timm's choice
    width = None
    if found["qk_norm"]:
        width = shape(attn + "q_norm.weight")[0]
    elif has(attn + "sub_norm.weight"):
        width = shape(attn + "sub_norm.weight")[0]
    if width:
        found["num_heads"] = found["inner_dim"] // width
    heads = found.get("num_heads") or hints.get("num_heads")
    if heads and found["inner_dim"] != dim:
        found["dim_head"] = found["inner_dim"] // heads
    return {**found, "hidden_dim": hidden, "mlp_ratio": _ratio(hidden, dim)}


def _positions(positions: Tensor, found: Fields, hints: Mapping[str, Any]) -> Fields:
    """img_size and no_embed_class of learned positions [1, T + N, D]."""
    if positions.dim() != 3:
        raise CheckpointError(f"pos_embed is {list(positions.shape)}, expected [1, N, D]")
    count, prefix = positions.shape[1], found["class_token"] + found["distilled"]
    prefix += found["reg_tokens"]
    known = hints.get("no_embed_class")
    options = [known] if known is not None and prefix else [False, True] if prefix else [False]
    down = backbone_stride(found["embed_layer"])
    stride = (found["patch_size"][0] * down, found["patch_size"][1] * down)
    sizes = [tuple(pair("img_size", hints[key])) for key in _IMAGES if key in hints]
    grids = [(size[0] // stride[0], size[1] // stride[1]) for size in sizes]
    if "grid_size" in hints:
        grids.insert(0, tuple(hints["grid_size"]))
    for without in options:
        side = math.isqrt(max(count - (0 if without else prefix), 0))
        grids.append((side, side))
    for grid in grids:
        for without in options:
            if math.prod(grid) == count - (0 if without else prefix) > 0:
                exact = (grid[0] * stride[0], grid[1] * stride[1])
                fits = (s for s in sizes if (s[0] // stride[0], s[1] // stride[1]) == grid)
                return {"no_embed_class": without, "img_size": next(fits, exact)}
    raise CheckpointError(
        f"pos_embed has {count} positions, of {prefix} prefix tokens and a grid that isn't square: "
        "give the image size of the checkpoint, as img_size=(height, width)"
    )


def _window(state: State, found: Fields) -> Any:
    """img_size without positions: from tables of relative ones, if they are square."""
    for key, table in state.items():
        if key.endswith("relative_position_bias_table"):
            side = math.isqrt(table.shape[0] - 3 * found["class_token"])
            return tuple((side + 1) // 2 * p for p in found["patch_size"])
    return None


def completed(
    seen: Fields, told: Fields, defaults: Fields, name: str | None = None
) -> tuple[Fields, dict[str, str]]:
    """(fields of ViTConfig, field -> why it is what it is, of those that nothing told).

    seen: from `infer`. told: what format, config file and user say; it overrides. defaults: the
    library's own, where nothing tells. name: what the source calls the architecture.
    """
    fits = [preset for preset in PRESETS if _fits(_config_of(preset), seen, told)]
    if name in fits:
        fits = [name]
    models = [_config_of(preset) for preset in fits]
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
    return fields, assumed


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
    if field in ("block_fn", "attn_layer"):
        kind = seen["block_kind" if field == "block_fn" else "attn_kind"]
        options = seen.get("block_options" if field == "block_fn" else "attn_options", {})
        if kind != "pre_norm" or field == "attn_layer":
            if field == "attn_layer" and seen["block_kind"] != "pre_norm":
                kind, options = seen["attn_kind"], seen.get("attn_options", {})
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
    for key in _SEEN:
        known = key not in told and seen.get(key) is not None
        if known and getattr(model, key) != seen[key]:
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
