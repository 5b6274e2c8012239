"""What the shapes of tensors under our names show, for all formats alike."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitkern.checkpoint._rules import CheckpointError, Fields, State
from vitkern.model.arguments import pair
from vitkern.model.config import backbone_stride

Size = tuple[int, int]
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
    else:
        found["img_size"] = _window(state, found, hints)
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


class _Block:
    """Names of the first block: whether they are there, and their shapes."""

    def __init__(self, state: State) -> None:
        self.state = state

    def has(self, name: str) -> bool:
        return f"blocks.0.{name}" in self.state

    def shape(self, name: str) -> Any:
        if not self.has(name):
            raise CheckpointError(f"blocks.0.{name} is missing")
        return self.state[f"blocks.0.{name}"].shape


def _block(state: State, hints: Mapping[str, Any]) -> Fields:
    """What the first block is made of."""
    block = _Block(state)
    norm = _first_norm(state)
    found: Fields = {
        "norm_kind": "layernorm" if norm.replace(".weight", ".bias") in state else "rmsnorm",
        "attn_kind": "attn",
        "scale_attn_norm": False,
        "scale_mlp_norm": False,
        "mlp_layer": "mlp",
        "rel_pos": None,
        "shared_rel_pos": False,
    }
    dim = state[norm].shape[0]
    if block.has("in_proj.weight"):
        found |= _one_projection(block, dim)
        attn = ""
    else:
        attn, mlp = "attn.", "mlp."
        found["block_kind"] = "pre_norm"
        if block.has("attns.0.norm.weight"):
            things = [k for k in state if re.match(r"blocks\.0\.attns\.\d+\.norm\.weight\Z", k)]
            found["block_kind"] = "parallel_things"
            found["block_options"] = {"num_parallel": len(things)}
            attn, mlp = "attns.0.attn.", "ffns.0.mlp."
        found |= {**_attention(block, attn), **_mlp(block, mlp)}
        found |= _relative(state, f"blocks.0.{attn}rel_pos.")
    for name in (attn + "q_norm.weight", attn + "sub_norm.weight"):  # of a head's width
        if block.has(name):
            found["num_heads"] = found["inner_dim"] // block.shape(name)[0]
            break
    heads = found.get("num_heads") or hints.get("num_heads")
    if heads and found["inner_dim"] != dim:
        found["dim_head"] = found["inner_dim"] // heads
    return {**found, "mlp_ratio": _ratio(found["hidden_dim"], dim)}


def _one_projection(block: _Block, dim: int) -> Fields:
    """A block whose branches share their first layer."""
    fused, two = block.has("out_proj.weight"), block.has("lambda_a")
    kind, options = "parallel_scaling", {"fuse_out_proj": fused}
    if two or block.has("lambda_q1"):
        kind, options = "diff_parallel_scaling", {"dual_lambda": two}
    out = block.shape("out_proj.weight" if fused else "mlp_out_proj.weight")
    return {
        "block_kind": kind,
        "block_options": options,
        "qkv_bias": block.has("in_proj.bias"),
        "proj_bias": block.has("out_proj.bias" if fused else "attn_out_proj.bias"),
        "qk_norm": block.has("q_norm.weight"),
        "init": block.has("ls.gamma"),
        "inner_dim": dim,
        "hidden_dim": out[1] - dim if fused else out[1],
    }


def _attention(block: _Block, at: str) -> Fields:
    found: Fields = {
        "qkv_bias": block.has(at + "qkv.bias"),
        "proj_bias": block.has(at + "proj.bias"),
        "qk_norm": block.has(at + "q_norm.weight"),
        "scale_attn_norm": block.has(at + "norm.weight"),
        "init": block.has("ls1.gamma") or block.has("attns.0.ls.gamma"),
        "inner_dim": block.shape(at + "proj.weight")[1],
    }
    two = block.has(at + "lambda_a")
    if two or block.has(at + "lambda_q1"):
        found |= {"attn_kind": "diff", "attn_options": {"dual_lambda": two}}
    return found


def _mlp(block: _Block, at: str) -> Fields:
    gated = block.has(at + "fc1_g.weight")
    hidden = block.shape(at + ("fc1_g" if gated else "fc1") + ".weight")[0]
    halved = block.shape(at + "fc2.weight")[1] * 2 == hidden
    return {
        "hidden_dim": hidden,
        "mlp_layer": "swiglu" if gated else "swiglu_packed" if halved else "mlp",
        "scale_mlp_norm": block.has(at + "norm.weight"),
    }


def _relative(state: State, own: str) -> Fields:
    """Relative positions, one for all blocks or the first block's `own`."""
    for at in ("shared_rel_pos.", own):
        found: Fields = {"shared_rel_pos": at != own}
        if at + "relative_position_bias_table" in state:
            heads = state[at + "relative_position_bias_table"].shape[1]
            return {**found, "rel_pos": "bias", "num_heads": heads}
        if at + "mlp.fc1.weight" in state and at + "mlp.fc2.weight" in state:
            width, heads = (state[f"{at}mlp.fc{i}.weight"].shape[0] for i in (1, 2))
            dim = None if width == 128 else width  # 128 is timm's choice
            return {**found, "rel_pos": "mlp", "rel_pos_dim": dim, "num_heads": heads}
    return {}


def _positions(positions: Tensor, found: Fields, hints: Mapping[str, Any]) -> Fields:
    """img_size and no_embed_class of learned positions [1, T + N, D]."""
    if positions.dim() != 3:
        raise CheckpointError(f"pos_embed is {list(positions.shape)}, expected [1, N, D]")
    count, prefix = positions.shape[1], found["class_token"] + found["distilled"]
    prefix += found["reg_tokens"]
    known = hints.get("no_embed_class")
    usual = found["reg_tokens"] > 0  # then class and register tokens have no positions
    options = [known] if known is not None and prefix else [usual, not usual][: prefix + 1]
    stride, sizes, grids = _grids(found, hints)
    for without in options:
        side = math.isqrt(max(count - (0 if without else prefix), 0))
        grids.append((side, side))
    for grid in grids:
        for without in options:
            if math.prod(grid) == count - (0 if without else prefix) > 0:
                return {"no_embed_class": without, "img_size": _image(grid, stride, sizes)}
    raise CheckpointError(
        f"pos_embed has {count} positions, of {prefix} prefix tokens and a grid that isn't square: "
        "give the image size of the checkpoint, as img_size=(height, width)"
    )


def _window(state: State, found: Fields, hints: Mapping[str, Any]) -> Any:
    """img_size where a table of relative positions [(2 R - 1) (2 C - 1) + 3 T, H] shows it."""
    key = next((key for key in state if key.endswith("relative_position_bias_table")), None)
    if key is None:
        return None
    stride, sizes, grids = _grids(found, hints)
    offsets = state[key].shape[0] - 3 * found["class_token"]
    side = (math.isqrt(max(offsets, 0)) + 1) // 2
    for rows, columns in (*grids, (side, side)):
        if (2 * rows - 1) * (2 * columns - 1) == offsets:
            return _image((rows, columns), stride, sizes)
    raise CheckpointError(
        f"{key} has {state[key].shape[0]} rows, of a grid that isn't square: give the image size "
        "of the checkpoint, as img_size=(height, width)"
    )


def _grids(found: Fields, hints: Mapping[str, Any]) -> tuple[Size, list[Size], list[Size]]:
    """(pixels behind a token, sizes of images that were hinted at, grids that were)."""
    down = backbone_stride(found["embed_layer"])
    stride = (found["patch_size"][0] * down, found["patch_size"][1] * down)
    sizes = [pair("img_size", hints[key]) for key in _IMAGES if key in hints]
    grids = [(size[0] // stride[0], size[1] // stride[1]) for size in sizes]
    if "grid_size" in hints:
        grids.insert(0, pair("grid_size", hints["grid_size"]))
    return stride, sizes, grids


def _image(grid: Size, stride: Size, sizes: list[Size]) -> Size:
    """A hinted size of images that has this grid, else the smallest."""
    fits = (s for s in sizes if (s[0] // stride[0], s[1] // stride[1]) == grid)
    return next(fits, (grid[0] * stride[0], grid[1] * stride[1]))
