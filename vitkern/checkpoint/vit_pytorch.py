"""vit-pytorch's ViT, from 0.7 to 1.26.

    blocks    a PreNorm around each half until 2023-08, the norm within it since
    patches   projected; with a norm of the pixels and one behind the projection since 2022-12
    norm      in mlp_head, behind the pool, at first; at the end of the transformer later
    tokens    [1, N, D] until 2025-11; [N, D] since, and then without a class token where the mean
              is pooled

All are read; the last is written, which is the one that has every norm.

Which pool an older one has can't be told: the mean took the class token in, and left no trace. Load
such a model with global_pool="avg", pool_include_prefix=True, and fc_norm=False if its norm is in
the transformer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkern.checkpoint._rules import (
    BATCHED,
    CheckpointError,
    Fields,
    Format,
    State,
    View,
    layers,
    only,
    rule,
)
from vitkern.model.config import ViTConfig

_NORM = ("layernorm", 1e-5)  # PyTorch's default
_BLOCK = "transformer.layers.{i}."
# In order: a residual around all, PreNorm around each half, the norm of the MLP counted with it.
_ERAS = (
    (re.compile(r"^(transformer\.layers\.\d+\.[01])\.fn\.(?=fn\.|norm\.)"), r"\1."),
    (re.compile(r"^(transformer\.layers\.\d+\.1)\.fn\.net\.0\."), r"\1.net.1."),
    (re.compile(r"^(transformer\.layers\.\d+\.1)\.fn\.net\.3\."), r"\1.net.4."),
    (re.compile(r"^(transformer\.layers\.\d+\.1)\.norm\."), r"\1.net.0."),
    (re.compile(r"^(transformer\.layers\.\d+\.0)\.fn\."), r"\1."),
    (re.compile(r"^mlp_head\.0\."), "mlp_norm."),
    (re.compile(r"^mlp_head\.1\."), "mlp_head."),
)


def _patch(pixels: int, fields: Mapping[str, Any]) -> tuple[int, int, int]:
    """Height, width and channels of a patch of so many numbers; square and RGB if nothing tells.

    Raises:
        CheckpointError: no such patch.
    """
    size = fields.get("target_patch_size", fields.get("patch_size"))
    channels = fields.get("target_in_chans", fields.get("in_chans"))
    if size is not None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        if pixels % (height * width) == 0:
            return height, width, pixels // (height * width)
    for count in (3, 1, 4, 2) if channels is None else (channels,):
        side = math.isqrt(pixels // count)
        if side * side * count == pixels:
            return side, side, count
    raise CheckpointError(
        f"a patch has {pixels} numbers, which is no square of pixels: give patch_size and in_chans"
    )


def _read_pixels(theirs: Sequence[Tensor], fields: Fields) -> Tensor:
    """Their order within a patch is (row, column, channel)."""
    by_channel = theirs[0].unflatten(-1, _patch(theirs[0].shape[-1], fields)).movedim(-1, -3)
    return by_channel.contiguous()


def _write_pixels(ours: Tensor) -> Tensor:
    return ours.movedim(-3, -1).flatten(-3)


_CONV = View(_read_pixels, lambda ours, count, config: [_write_pixels(ours)])
_PIXELS = View(
    lambda theirs, fields: _read_pixels(theirs, fields).flatten(),
    lambda ours, count, config: [
        _write_pixels(ours.unflatten(0, (config.in_chans, *config.patch_size)))
    ],
)


class VitPytorch(Format):
    """`vit_pytorch.ViT`. Its heads are 64 wide unless something else is said, as there."""

    name = "vit-pytorch"
    title = "vit-pytorch's ViT"
    rules = (
        rule("cls_token", "cls_token", view=BATCHED),
        rule("pos_embed", "pos_embedding", view=BATCHED),
        rule("patch_embed.norm_in.weight", "to_patch_embedding.1.weight", view=_PIXELS),
        rule("patch_embed.norm_in.bias", "to_patch_embedding.1.bias", view=_PIXELS),
        rule("patch_embed.proj.weight", "to_patch_embedding.2.weight", view=_CONV),
        rule("patch_embed.proj.bias", "to_patch_embedding.2.bias"),
        rule("blocks.{i}.attn.qkv.weight", _BLOCK + "0.to_qkv.weight"),
        *layers(
            {
                "patch_embed.norm": "to_patch_embedding.3",
                "blocks.{i}.norm1": _BLOCK + "0.norm",
                "blocks.{i}.attn.proj": _BLOCK + "0.to_out.0",
                "blocks.{i}.norm2": _BLOCK + "1.net.0",
                "blocks.{i}.mlp.fc1": _BLOCK + "1.net.1",
                "blocks.{i}.mlp.fc2": _BLOCK + "1.net.4",
                "norm": "transformer.norm",
                "fc_norm": "mlp_norm",
                "head": "mlp_head",
            }
        ),
    )
    fields: ClassVar[Fields] = {"norm_layer": _NORM, "act_layer": "gelu"}

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the names of its patches and of the first attention."""
        qkv = any(f"transformer.layers.0.0.{fn}to_qkv.weight" in state for fn in _NESTED)
        first = ("to_patch_embedding.1.weight", "patch_to_embedding.weight")
        return qkv and any(name in state for name in first)

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Under the names of today; the output layer that one wide head leaves out as identity."""
        renamed = {}
        for key, value in state.items():
            for old, new in _ERAS:
                key = old.sub(new, key)
            renamed[key] = value
        if renamed["to_patch_embedding.1.weight"].dim() == 2:  # the projection, without norms
            for kind in ("weight", "bias"):
                name = f"to_patch_embedding.1.{kind}"
                if name in renamed:
                    renamed[f"to_patch_embedding.2.{kind}"] = renamed.pop(name)
        for key in ("cls_token", "pos_embedding"):
            if key in renamed and renamed[key].dim() == 3:
                renamed[key] = renamed[key].squeeze(0)
        if "cls_token" in renamed and not renamed["cls_token"].shape[0]:
            del renamed["cls_token"]
        for key in [key for key in renamed if key.endswith(".to_qkv.weight")]:
            out = key.replace("to_qkv", "to_out.0")
            if out not in renamed:
                dim = renamed[key].shape[1]
                like: dict[str, Any] = {"dtype": renamed[key].dtype, "device": renamed[key].device}
                renamed[out] = torch.eye(dim, **like)
                renamed[out.replace("weight", "bias")] = torch.zeros(dim, **like)
        return renamed

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """Relatives and ancestors that compute something else under nearly the same names."""
        if "patch_to_embedding.weight" in state:
            return "it is of before version 0.7, which divided scores by another root"
        if "pos_embedding" not in state:
            return "it is a SimpleViT or the like, whose positions are computed and not stored"
        if "mlp_head.0.weight" in state and "transformer.norm.weight" in state:
            return "it has a norm before the pool and another behind it"
        if state["pos_embedding"].dim() not in (2, 3):
            return f"its positions are {list(state['pos_embedding'].shape)}, no list of patches"
        return None

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """The pool that goes with a class token; the norm of patches; one head without output."""
        token = "cls_token" in state
        found: Fields = {"global_pool": "token" if token else "avg"}
        found["fc_norm"] = "mlp_norm.weight" in state
        if "to_patch_embedding.3.weight" in state:
            found["embed_norm_layer"] = _NORM
        if _is_identity(state["transformer.layers.0.0.to_out.0.weight"]):
            found["num_heads"] = 1
        return found

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """dim_head is 64 there, whatever the width, unless said otherwise."""
        inner = state["transformer.layers.0.0.to_qkv.weight"].shape[0] // 3
        return {"num_heads": inner // 64} if inner % 64 == 0 else {}

    def unfit(self, config: ViTConfig) -> str | None:
        """All of its norms, at one eps, and no bias for queries, keys and values."""
        for name in ("norm_layer", "embed_norm_layer"):
            if getattr(config, name) != _NORM:
                return f"no {name}={getattr(config, name)!r}: {_NORM} everywhere"
        fixed: Fields = {
            "patch_norm": True,
            "qkv_bias": False,
            "embed_norm_layer": _NORM,
            "norm_layer": _NORM,
        }
        if not config.class_token:
            fixed |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
        elif config.fc_norm is False:
            fixed["fc_norm"] = False
        return only(config, ("in_chans", "dim_head"), fixed)

    def written(self, state: State, config: ViTConfig) -> State:
        """As version 1.26 has them."""
        found = super().written(state, config)
        if not config.class_token:
            found["cls_token"] = found["pos_embedding"].new_empty(0, config.embed_dim)
        if config.num_heads == 1 and config.head_dim == config.embed_dim:
            for i in range(config.depth):
                start = f"transformer.layers.{i}.0.to_out.0."
                weight, bias = found.pop(start + "weight"), found.pop(start + "bias")
                if bias.any() or not _is_identity(weight):
                    raise CheckpointError(
                        f"{self.title} has no output layer for one head as wide as the tokens, so "
                        f"blocks.{i}.attn.proj has to be the identity"
                    )
        return found


def _is_identity(weight: Tensor) -> bool:
    rows, columns = weight.shape
    return rows == columns and torch.equal(weight, torch.eye(rows).to(weight))


_NESTED = ("", "fn.", "fn.fn.")
