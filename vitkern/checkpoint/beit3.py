"""The image side of BEiT-3, as Microsoft saves it; also fine-tuned as a classifier."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkern.checkpoint._rules import Fields, Format, State, View, layers, only, rule
from vitkern.model.config import ViTConfig
from vitkern.model.presets import IMAGENET

_LAYER = "beit3.encoder.layers.{i}."
# Its table of positions begins with two rows that nothing reads.
_POSITIONS = View(
    lambda theirs, fields: theirs[0][2:].unsqueeze(0),
    lambda ours, count, config: [torch.cat([torch.zeros_like(ours[0, :2]), ours[0]])],
)


class Beit3(Format):
    """Of the experts of each layer "A", which sees images. "B" sees text."""

    name = "beit3"
    title = "Microsoft's BEiT-3"
    rules = (
        rule("cls_token", "beit3.vision_embed.cls_token"),
        rule("pos_embed", "beit3.encoder.embed_positions.A.weight", view=_POSITIONS),
        *layers(
            {
                "patch_embed.proj": "beit3.vision_embed.proj",
                "blocks.{i}.norm1": _LAYER + "self_attn_layer_norm.A",
                "blocks.{i}.attn.qkv": tuple(_LAYER + f"self_attn.{n}_proj.A" for n in "qkv"),
                "blocks.{i}.attn.norm": _LAYER + "self_attn.inner_attn_ln.A",
                "blocks.{i}.attn.proj": _LAYER + "self_attn.out_proj.A",
                "blocks.{i}.norm2": _LAYER + "final_layer_norm.A",
                "blocks.{i}.mlp.fc1": _LAYER + "ffn.A.fc1",
                "blocks.{i}.mlp.norm": _LAYER + "ffn.A.ffn_layernorm",
                "blocks.{i}.mlp.fc2": _LAYER + "ffn.A.fc2",
                "norm": "beit3.encoder.layer_norm.A",
                "fc_norm": "fc_norm",
                "head": "head",
            }
        ),
    )
    fields: ClassVar[Fields] = {"norm_layer": ("layernorm", 1e-5), "act_layer": "gelu", **IMAGENET}
    dropped: ClassVar[dict[str, str]] = {
        r".*\.B\.": "the expert for text",
        r"beit3\.text_embed\.": "embedding of words",
        r"beit3\.vision_embed\.mask_token$": "only for masked pretraining",
        r"(mim|mlm)_head\.": "only for masked pretraining",
    }

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the name of its patches."""
        return "beit3.vision_embed.proj.weight" in state

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """A classifier reads the mean of the patches; without one, the class token is as good."""
        return {"global_pool": "avg" if "fc_norm.weight" in state else "token"}

    def unfit(self, config: ViTConfig) -> str | None:
        """One architecture in several sizes, with the classifier behind the mean of patches."""
        fixed = {
            "norm_layer": ("layernorm", 1e-5),
            "scale_attn_norm": True,
            "scale_mlp_norm": True,
            "global_pool": "avg" if config.norm_after_pool else "token",
        }
        return only(config, ("in_chans",), fixed)
