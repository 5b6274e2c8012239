"""DINOv2 as Meta saves it; TIPSv2's image encoder has its names, too.

Nearly timm's names. Without registers the class token has a position. With them Meta's code adds
position 0 to the class token before it puts the registers behind: they are summed up on reading,
for the network never sees one without the other, and written as the sum and zeros.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkern.checkpoint._rules import CheckpointError, Fields, State, only
from vitkern.checkpoint.timm import Timm, tower
from vitkern.model.config import ViTConfig
from vitkern.model.presets import IMAGENET

_CHUNKED = re.compile(r"blocks\.\d+\.(\d+\.)")  # the inner number counts through
_NAMES = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}


class Dinov2(Timm):
    """Meta's DinoVisionTransformer, with and without registers, also in chunks of blocks (FSDP)."""

    name = "dinov2"
    title = "Meta's DINOv2"
    fields: ClassVar[Fields] = {"norm_layer": ("layernorm", 1e-6), "num_classes": 0, **IMAGENET}
    dropped: ClassVar[dict[str, str]] = {
        **Timm.dropped,
        r"(linear_)?head\.": "it reads the class token beside the mean of the patches",
        r"(text_encoder|temperature)\b": "the text encoder",
    }

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By what timm's ViT has not: a mask token beside LayerScale, w12, chunks, registers."""
        if not any("patch_embed.proj." in key for key in state):
            return False
        start = tower(state) if not any(_CHUNKED.search(key) for key in state) else ""
        names = {key.removeprefix(start) for key in state if key.startswith(start)}
        scaled = any(name.endswith(".ls1.gamma") for name in names)
        return scaled and (
            "mask_token" in names
            or "register_tokens" in names
            or any(_CHUNKED.search(name) or ".mlp.w12." in name for name in names)
        )

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Under timm's names."""
        start, found = tower(state), State()
        for key, value in state.items():
            key = _CHUNKED.sub(r"blocks.\1", key.removeprefix(start))
            for theirs, ours in _NAMES.items():
                key = key.replace(theirs, ours)
            found[key] = value
        if "register_tokens" in found:
            missing = [key for key in ("cls_token", "pos_embed") if key not in found]
            if missing:
                raise CheckpointError(f"it lacks {', '.join(missing)}")
            positions = found["pos_embed"]
            found["reg_token"] = found.pop("register_tokens")
            found["cls_token"] = found["cls_token"] + positions[:, :1]
            found["pos_embed"] = positions[:, 1:]
        return found

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """DINOv3, say."""
        plain = {_CHUNKED.sub(r"blocks.\1", key): value for key, value in state.items()}
        return super().problem(plain, config)

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Registers came with another way to resize positions; the gated MLP has SiLU."""
        registers = "reg_token" in state
        return {
            **super().described(state, config),
            "no_embed_class": registers,
            "pos_resample": "timm" if registers else "dinov2",
            "global_pool": "token",
            "act_layer": "silu" if _gated(state) else "gelu",
        }

    def unfit(self, config: ViTConfig) -> str | None:
        """A trunk with LayerScale."""
        if not config.init_values:
            return "no init_values=None"
        gated = config.mlp_layer == "swiglu_packed"
        fixed = {
            "norm_layer": ("layernorm", 1e-6),
            "num_classes": 0,
            "no_embed_class": config.reg_tokens > 0,
            "act_layer": "silu" if gated else "gelu",
            "mlp_layer": config.mlp_layer if gated else "mlp",
        }
        if config.num_classes:
            return f"no num_classes={config.num_classes} (expected 0)"
        return only(config, ("in_chans", "init_values", "reg_tokens"), fixed)

    def written(self, state: State, config: ViTConfig) -> State:
        """Under Meta's names, with a mask token of zeros."""
        found = State()
        for key, value in state.items():
            if config.mlp_layer == "swiglu_packed":
                for theirs, ours in _NAMES.items():
                    key = key.replace(ours, theirs)
            found[key] = value
        token = found["cls_token"]
        found["mask_token"] = torch.zeros_like(token[0])
        if config.reg_tokens:
            found["register_tokens"] = found.pop("reg_token")
            found["pos_embed"] = torch.cat([torch.zeros_like(token), found["pos_embed"]], 1)
        return found

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """Meta has none."""
        return None


def _gated(state: Mapping[str, Tensor]) -> bool:
    first, second = (state.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]
