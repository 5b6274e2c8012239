"""BEiT, BEiTv2 and the first EVA, by Microsoft's and BAAI's files or by timm's.

timm's names, but for the biases of queries and values, which stand alone (keys have none), and for
the positions: a table of relative ones in each block, or one for all of them, or absolute ones.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkern.checkpoint._rules import CheckpointError, Fields, State, only
from vitkern.checkpoint.timm import Timm
from vitkern.model.config import ViTConfig

_TABLE = "relative_position_bias_table"


class Beit(Timm):
    """timm's Beit, and Eva without rotary positions."""

    name = "beit"
    title = "BEiT"
    fields: ClassVar[Fields] = {"norm_layer": ("layernorm", 1e-6), "act_layer": "gelu"}
    dropped: ClassVar[dict[str, str]] = {
        **Timm.dropped,
        r"lm_head\.": "it predicts visual words",
        r"cls_pt_layers\.": "BEiTv2's layers for pretraining",
        r".*k_bias$": "zeros",
    }

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By its biases, or its table."""
        own = ("blocks.0.attn.q_bias", f"blocks.0.attn.{_TABLE}", f"rel_pos_bias.{_TABLE}")
        return super().recognises(state, config) and any(
            key.endswith(name) for key in state for name in own
        )

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Both tables at once, and the layers of EVA-02."""
        renamed = {key.replace("q_bias", "").replace("v_bias", ""): state[key] for key in state}
        if f"blocks.0.attn.{_TABLE}" in state and f"rel_pos_bias.{_TABLE}" in state:
            return f"it adds two {_TABLE}, one of each block and one for all of them"
        return super().problem(renamed, config)

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """One bias for queries, keys and values; tables under the names of timm's other ViTs."""
        found = super().prepared(state, config)
        for key in [key for key in found if key.endswith(".attn.q_bias")]:
            query, other = found.pop(key), key.replace("q_bias", "v_bias")
            if other not in found:
                raise CheckpointError(f"{key} is there, but {other} is missing")
            bias = torch.cat([query, torch.zeros_like(query), found.pop(other)])
            found[key.replace("q_bias", "qkv.bias")] = bias
        return {
            key.replace(f".attn.{_TABLE}", f".attn.rel_pos.{_TABLE}").replace(
                "rel_pos_bias.", "shared_rel_pos."
            ): value
            for key, value in found.items()
        }

    def unfit(self, config: ViTConfig) -> str | None:
        """A class token, relative positions by a table or absolute ones."""
        if config.global_pool not in ("token", "avg"):
            return f"no global_pool={config.global_pool!r}"
        if config.rel_pos is not None and config.pos_embed == "learn":
            return "no pos_embed='learn' beside rel_pos"
        fixed = {
            "norm_layer": ("layernorm", 1e-6),
            "rel_pos": None if config.rel_pos is None else "bias",
        }
        free = ("in_chans", "init_values", "global_pool", "fc_norm", "qkv_bias", "shared_rel_pos")
        return only(config, (*free, "pos_embed"), fixed)

    def written(self, state: State, config: ViTConfig) -> State:
        """As timm's Beit has them.

        Raises:
            CheckpointError: a bias of keys, which BEiT hasn't, isn't zero.
        """
        found = State()
        for key, value in state.items():
            if key.endswith(".attn.qkv.bias"):
                query, keys, values = value.chunk(3)
                if keys.any():
                    raise CheckpointError(f"{self.title} has no place for the keys' part of {key}")
                start = key.removesuffix("qkv.bias")
                found[start + "q_bias"], found[start + "v_bias"] = query, values
                continue
            for i in "12":
                key = key.replace(f".ls{i}.gamma", f".gamma_{i}")
            key = key.replace(f".rel_pos.{_TABLE}", f".{_TABLE}")
            found[key.replace("shared_rel_pos.", "rel_pos_bias.")] = value
        return found

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """None."""
        return None
