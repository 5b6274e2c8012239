"""Hugging Face's BEiT and Data2Vec: relative positions by a table, and keys without a bias.

They average the patches before the last norm (`use_mean_pooling`, which is usual), or read the
class token behind it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkern.checkpoint._rules import Fields, Format, State, layers, rule
from vitkern.checkpoint.huggingface import (
    HALF,
    PATCHES,
    prefix_of,
    problem_of,
    read_config,
    read_images,
    without,
)
from vitkern.model.config import ViTConfig

_TABLE = "relative_position_bias_table"
_FILE = "encoder.layer.{i}."
_LIVE = "layers.{i}."  # in memory, in transformers 5


def _block(at: str, attention: str, names: tuple[str, str, str]) -> dict[str, Any]:
    return {
        "blocks.{i}.norm1": at + "layernorm_before",
        "blocks.{i}.attn.qkv": tuple(f"{at}{attention}{name}" for name in names),
        "blocks.{i}.norm2": at + "layernorm_after",
    }


class HuggingFaceBeit(Format):
    """BeitModel, BeitForImageClassification, Data2VecVision's; trunks of their other models."""

    name = "huggingface-beit"
    title = "Hugging Face's BEiT"
    rules = (
        rule("cls_token", "embeddings.cls_token"),
        rule("pos_embed", "embeddings.position_embeddings"),
        *(
            rule(f"blocks.{{i}}.ls{n}.gamma", f"{at}lambda_{n}")
            for at in (_FILE, _LIVE)
            for n in "12"
        ),
        rule(
            f"blocks.{{i}}.attn.rel_pos.{_TABLE}",
            f"{_FILE}attention.attention.relative_position_bias.{_TABLE}",
        ),
        rule(f"blocks.{{i}}.attn.rel_pos.{_TABLE}", f"{_LIVE}relative_position_bias.{_TABLE}"),
        rule(f"shared_rel_pos.{_TABLE}", f"encoder.relative_position_bias.{_TABLE}"),
        rule(f"shared_rel_pos.{_TABLE}", f"shared_position_bias.{_TABLE}"),
        *layers(
            {
                "patch_embed.proj": "embeddings.patch_embeddings.projection",
                **_block(_FILE, "attention.attention.", ("query", "key", "value")),
                "blocks.{i}.attn.proj": _FILE + "attention.output.dense",
                "blocks.{i}.mlp.fc1": _FILE + "intermediate.dense",
                "blocks.{i}.mlp.fc2": _FILE + "output.dense",
                "norm": "layernorm",
                "fc_norm": "pooler.layernorm",
                "head": "classifier",
            }
        ),
        *layers(
            {
                **_block(_LIVE, "attention.", ("q_proj", "k_proj", "v_proj")),
                "blocks.{i}.attn.proj": _LIVE + "attention.o_proj",
                "blocks.{i}.mlp.fc1": _LIVE + "mlp.fc1",
                "blocks.{i}.mlp.fc2": _LIVE + "mlp.fc2",
            }
        ),
    )
    fields: ClassVar[Fields] = {"pos_resample": "huggingface"}
    dropped: ClassVar[dict[str, str]] = {
        r".*relative_position_index": "it follows from the grid",
        r"embeddings\.mask_token": "it stands in for masked patches, in pre-training only",
        r"lm_head\.": "it predicts visual words, in pre-training only",
        r"(fpn\d?|decode_head|auxiliary_head)\.": "it belongs to a segmenter around the trunk",
    }
    prefixes = ("beit.", "data2vec_vision.", "")

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the prefix; without it by keys that have no bias where queries have one."""
        prefix = prefix_of(state, PATCHES, self.prefixes)
        first = (f"{_FILE}attention.attention.query", f"{_LIVE}attention.q_proj")
        names = [f"{prefix}{name.format(i=0)}.bias" for name in first]
        return prefix is not None and any(
            name in state and _key_of(name) not in state for name in names
        )

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Without the prefix; with zeros as the bias of keys."""
        found = without(state, prefix_of(state, PATCHES, self.prefixes) or "")
        queries = [key for key in found if key.endswith((".query.bias", ".q_proj.bias"))]
        for key in queries:
            found.setdefault(_key_of(key), torch.zeros_like(found[key]))
        return found

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Two tables at once; grids whose tables that library itself mixes up."""
        tables = [key for key in state if key.endswith(_TABLE)]
        shared = [key for key in tables if ".layer" not in f".{key}"]
        if shared and len(tables) > len(shared):
            return "it adds two tables, one of each block and one for all of them"
        size = config.get("image_size", 0)
        if tables and isinstance(size, (list, tuple)) and size[0] != size[1]:
            return f"image_size={size} isn't square, where transformers mixes up rows and columns"
        return problem_of(config, self.prepared(state, config).get(PATCHES))

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What config.json says; the pool, as its norm tells."""
        mean = "pooler.layernorm.weight" in state
        return {
            **read_config(config, eps=1e-12, act="gelu"),
            **read_images(config, HALF, state[PATCHES]),
            "global_pool": "avg" if mean else "token",
            "fc_norm": mean,
        }

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Those of BeitConfig."""
        return {} if config else {"norm_layer": ("layernorm", 1e-12), "act_layer": "gelu"}

    def unfit(self, config: ViTConfig) -> str | None:
        """Read only."""
        return "files of this kind, which are read, not written"


def _key_of(query: str) -> str:
    """Name of the bias of keys beside that of queries."""
    return query.replace(".query.", ".key.").replace(".q_proj.", ".k_proj.")
