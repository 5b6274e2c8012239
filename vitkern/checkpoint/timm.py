"""timm's VisionTransformer, whose names are ours; the files of DINO, MAE, DeiT, MoCo v3 and I-JEPA
have them, too.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vitkern.checkpoint._config_file import to_json
from vitkern.checkpoint._rules import CheckpointError, Fields, Format, State, renamed
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS

# Other networks that have names in common with these.
_RELATIVES = {
    r"blocks\.\d+\.attn\.[qk]_proj\.": "separate query, key and value layers, as in EVA-02",
    r"blocks\.\d+\.attn\.[qv]_bias$": "biases of queries and values alone, as in BEiT",
    r"(.*\.)?rope\b": "rotary positions",
    r"(rope_embed|.*\.periods$)": "rotary positions",
    r"blocks\.\d+\.blocks\.": "stages of blocks",
    r"blocks\.\d+\.\d+\.": "stages of blocks",
    r"layers\.\d+\.blocks\.": "stages of blocks",
    r"blocks_token_only\.": "CaiT's class attention",
    r"blocks\.\d+\.attn\.(proj_l|talking_head)": "attention with talking heads",
    r"patch_embed\.(proj|conv)\.\d+\.": "a stem of several convolutions",
    r"patch_embed\.conv\d": "a stem of several convolutions",
    r"blocks\.\d+\.attn\.local": "positional gates of ConViT",
}


class Timm(Format):
    """All of timm's vision_transformer files: ViT, hybrids, DeiT, relative positions.

    Read, too: patch projections stored as a matrix, LayerScale as `gamma_1` (DeiT3's files), a
    tower within what pretrains it, and a folder of ``timm.models.push_to_hf_hub`` or of `save`.
    """

    name = "timm"
    title = "timm's VisionTransformer"
    dropped: ClassVar[dict[str, str]] = {
        "mask_token$": "only for masked pretraining",
        r"decoder_(embed|blocks|norm|pred|pos_embed)\b": "MAE's decoder",
        r"head\.(mlp|last_layer)\.": "DINO's projection head",
        r"(dino|ibot)_head\.": "DINOv2's projection heads",
        r"momentum_encoder\.": "MoCo's slow copy",
        r"(base_encoder\.)?head\.\d+\.": "a projection head",
        r"predictor\.": "MoCo's prediction head",
        r".*(relative_position_index|relative_coords_table|rel_coords_log|relative_coords_log)$": (
            "follows from the grid"
        ),
    }

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By its patches and its blocks."""
        start = re.escape(tower(state))
        projected = any(re.match(start + r"patch_embed\.", key) for key in state)
        block = re.compile(start + r"blocks\.0\.(norm1|in_norm|attns)\b")
        return projected and any(block.match(key) for key in state)

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Without what stands before all names; the spelling of today."""
        start, scale = tower(state), re.compile(r"\.gamma_([12])\Z")
        found = renamed(state, lambda key: scale.sub(r".ls\1.gamma", key.removeprefix(start)))
        weight = found.get("patch_embed.proj.weight")
        if weight is not None and weight.dim() == 2:
            side = round((weight.shape[1] / 3) ** 0.5)
            if side * side * 3 == weight.shape[1]:
                found["patch_embed.proj.weight"] = weight.unflatten(1, (3, side, side))
        return found

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Relatives that share its names, but not its layers."""
        start = tower(state)
        for pattern, what in _RELATIVES.items():
            found = re.compile(re.escape(start) + pattern)
            key = next((key for key in state if found.match(key)), None)
            if key:
                return f"it has {what} ({key}), and no vitkern.ViT has"
        return None

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What timm's config.json says."""
        found: Fields = dict(config.get("model_args") or {})
        if config.get("architecture") in PRESETS:  # the name and these arguments are all of it
            try:
                found = vars(ViTConfig.from_name(config["architecture"], **found)).copy()
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"config.json: {error}") from None
        if config.get("global_pool") is not None:
            found["global_pool"] = config["global_pool"]
        images = config.get("pretrained_cfg") or {}
        if "input_size" in images:
            found["img_size"] = tuple(images["input_size"][1:])
        found.update({key: images[key] for key in ("mean", "std") if key in images})
        return found

    def translated(self, state: State, fields: Fields) -> tuple[State, State]:
        """Every name is ours already."""
        left = [key for key in state if any(re.match(p, key) for p in self.dropped)]
        gone = {key: state[key] for key in left}
        return {key: value for key, value in state.items() if key not in gone}, gone

    def unfit(self, config: ViTConfig) -> str | None:
        """These are our names: everything can be written, whether or not timm has it."""
        return None

    def written(self, state: State, config: ViTConfig) -> State:
        """As they are."""
        return state

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """As timm and vitkern read it."""
        return to_json(config)


def tower(state: Mapping[str, Tensor]) -> str:
    """What stands before the names of the one ViT of timm's names in here; "" if nothing does.

    Raises:
        CheckpointError: there are several, and none is the one to take.
    """
    end = re.compile(r"(.*?)patch_embed\.(proj|backbone)\.")
    found = sorted({match[1] for key in state if (match := end.match(key))})
    if "base_encoder." in found:  # MoCo's, beside the slow copy
        return "base_encoder."
    found = [one for one in found if any(key.startswith(one + "blocks.0.") for key in state)]
    if len(found) > 1:
        raise CheckpointError(
            f"there are several ViTs: {', '.join(found)}; give the tensors of one"
        )
    return found[0] if found else ""
