"""timm's VisionTransformer, whose names are ours; Meta's MAE and DeiT have them, too."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from vitkern.checkpoint._config_file import from_json, to_json
from vitkern.checkpoint._rules import Fields, Format, State
from vitkern.config import ViTConfig


class Timm(Format):
    """All of timm's vision_transformer files: ViT, hybrids, DeiT, relative positions.

    Read, too: patch projections stored as a matrix, LayerScale as `gamma_1` (DeiT3's files), and a
    folder of ``timm.models.push_to_hf_hub``, or of vitkern's own `save`.
    """

    name = "timm"
    title = "timm's VisionTransformer"
    dropped: ClassVar[dict[str, str]] = {
        "mask_token$": "only for masked pretraining",
        r"decoder_(embed|blocks|norm|pred|pos_embed)\b": "MAE's decoder",
        r".*relative_position_index$": "computed here",
        r".*rel_coords_log$": "computed here",
        r".*relative_coords_log$": "computed here",
    }

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By its blocks and its patches, or by a backbone before them."""
        projected = any(key.startswith("patch_embed.") for key in state)
        blocks = any(re.match(r"blocks\.0\.(norm1|in_norm|attns)\b", key) for key in state)
        return projected and blocks

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """LayerScale under its name of today; a matrix of the projection as a convolution."""
        renamed = {
            re.sub(r"\.gamma_([12])\Z", r".ls\1.gamma", key): value for key, value in state.items()
        }
        weight = renamed.get("patch_embed.proj.weight")
        if weight is not None and weight.dim() == 2:
            side = round((weight.shape[1] / 3) ** 0.5)
            if side * side * 3 == weight.shape[1]:
                renamed["patch_embed.proj.weight"] = weight.unflatten(1, (3, side, side))
        return renamed

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Relatives of timm that share its names, but not its layers."""
        known = {
            r"blocks\.0\.attn\.(q|k|v)_proj\.": "separate query, key and value layers (EVA-02)",
            r"blocks\.0\.attn\.(q|v)_bias$": "BEiT's query and value biases",
            r".*rope\b": "rotary positions",
            r"blocks\.0\.blocks\.": "stages of blocks",
            r"blocks\.\d+\.cross_attn": "cross attention",
            r"blocks_token_only": "CaiT's class attention",
            r"patch_embed\.(proj|conv)\.\d+\.": "a stem of several convolutions",
        }
        for pattern, what in known.items():
            if any(re.match(pattern, key) for key in state):
                return f"it has {what}, which vitkern has not"
        return None

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What config.json says, vitkern's own or timm's."""
        own = from_json(config)
        if own is not None:
            return {**vars(ViTConfig()), **own}
        found: Fields = dict(config.get("model_args") or {})
        if "global_pool" in config and config["global_pool"] is not None:
            found["global_pool"] = config["global_pool"]
        images = config.get("pretrained_cfg") or {}
        if "input_size" in images:
            found.setdefault("img_size", tuple(images["input_size"][1:]))
        found.update({key: images[key] for key in ("mean", "std") if key in images})
        return found

    def translated(self, state: State, fields: Fields) -> tuple[State, State]:
        """Every name is ours already."""
        left = {key for key in state if any(re.match(p, key) for p in self.dropped)}
        return (
            {key: value for key, value in state.items() if key not in left},
            {key: state[key] for key in left},
        )

    def unfit(self, config: ViTConfig) -> str | None:
        """These are our names: everything can be written, whether or not timm has it."""
        return None

    def written(self, state: State, config: ViTConfig) -> State:
        """As they are."""
        return state

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """As timm and vitkern read it."""
        return to_json(config)
