"""fold(): a ViT for inference, whose norms and LayerScales are part of its linear layers.

    norm before a linear layer:   W (x_hat * g + b) + c  =  (W * g) x_hat + (W b + c)
    LayerScale behind one:        (W x + c) * gamma      =  (W * gamma) x + c * gamma

Both are exact but for the rounding of the new weight, which is computed in float64 and rounded
once. That costs about as much as the rounding of the activation which it replaces. What is not
`plain` (hooked, replaced, wrapped by LoRA) or shares a parameter stays as it is.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.model import ViT
from vitkern.model.block import Block
from vitkern.model.branches import Attention, AttentionPool, Mlp
from vitkern.model.layers import NORMS, LayerScale, plain


class FoldedViT(ViT):
    """What `fold` returns: a ViT for inference only. Its state dict is its own, not timm's."""

    def train(self, mode: bool = True) -> "FoldedViT":
        """Only ``train(False)``, which is ``eval()``.

        Raises:
            RuntimeError: training mode.
        """
        if mode:
            raise RuntimeError("a folded model can't be trained: train the model it came from")
        return super().train(False)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Only what a model with the same parts folded saved.

        Raises:
            ValueError: other keys, such as those of timm's state dicts.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(
                "state_dict isn't that of this folded model, whose norms and LayerScales are part "
                "of its linear layers; load it into a vitkern.ViT and fold that"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)


@torch.no_grad()
def fold(model: ViT, *, head: bool = False) -> FoldedViT:
    """A copy of `model` for inference, with norms and LayerScales folded into linear layers.

    Folded are ``norm1`` and ``norm2`` into the layers behind them, ``ls1`` and ``ls2`` into those
    before them, and the norm inside an attention pool. A norm keeps normalising, without weight and
    bias. In low precision, results are about as exact as before, with one exception that depends on
    the data: where a norm's bias cancels a constant in the normalised tokens, they cancel behind
    the product now. If such constants hold a share s of the tokens' squared norm, the layer's
    rounding error grows by up to 1 / sqrt(1 - s).

    Args:
        model: stays as it is, on whatever device and in whatever mode.
        head: fold the final norm into the head (or attention pool), too, where the pool between
            them allows it: "token", "avg", "map" or "". Then `forward_features`, and `forward_head`
            with `pre_logits`, return features that lack the norm's weight and bias.

    Returns:
        The copy, in evaluation mode and without gradients; it refuses training mode, and timm's
        state dicts. With float32 weights it fits autocast to any dtype.

    Raises:
        TypeError: anything but a vitkern.ViT, or one with a forward pass of its own. Fold a model
            before compiling or wrapping it.
    """
    if reason := unfoldable(model):
        raise TypeError(f"model must be a vitkern.ViT, got {type(model).__name__}{reason}")
    copy: Any = deepcopy(model)
    copy.__class__ = FoldedViT
    owners = Counter(id(p) for _, p in copy.named_parameters(remove_duplicate=False))
    shared = {parameter for parameter, count in owners.items() if count > 1}
    for block in copy.blocks:
        if plain(block, Block):
            _fold_block(block, shared)
    pool = copy.attn_pool
    if plain(pool, AttentionPool) and plain(pool.mlp, Mlp):
        _fold_norm(pool.norm, [pool.mlp.fc1], shared)
    if head:
        _fold_final_norm(copy, shared)
    folded: FoldedViT = copy.requires_grad_(False).eval()
    return folded


def unfoldable(model: nn.Module) -> str | None:
    """Why `model` can't be folded, as the end of an error; None where it can."""
    if not isinstance(model, ViT):
        return "; fold a model before compiling or wrapping it"
    other = model.overridden("forward")
    return other and f", whose {other}"


def _fold_block(block: Any, shared: set[int]) -> None:
    attn, mlp = block.attn, block.mlp
    if plain(attn, Attention):
        _fold_norm(block.norm1, [attn.qkv], shared)
        block.ls1 = _fold_scale(block.ls1, attn.proj, attn.proj_drop, shared)
    if plain(mlp, Mlp):
        _fold_norm(block.norm2, [getattr(mlp, name) for name in mlp.first], shared)
        block.ls2 = _fold_scale(block.ls2, mlp.fc2, mlp.drop2, shared)


def _fold_final_norm(model: Any, shared: set[int]) -> None:
    """Into the head, or an attention pool's keys and values: whatever reads the norm's output."""
    if not plain(model.head_drop, nn.Dropout):
        return
    readers = [model.head]
    if isinstance(model.pre_logits, nn.Sequential):
        if not plain(model.pre_logits, nn.Sequential):
            return
        readers = [model.pre_logits.fc]
    elif not plain(model.pre_logits, nn.Identity):
        return
    elif model.config.distilled:
        readers.append(model.head_dist)
    if plain(model.norm, nn.Identity):
        _fold_norm(model.fc_norm, readers, shared)
    elif plain(model.attn_pool, AttentionPool):
        _fold_norm(model.norm, [model.attn_pool.kv], shared)
    elif (
        model.attn_pool is None
        and model.global_pool in ("token", "avg", "")
        and plain(model.fc_norm, nn.Identity)
    ):
        _fold_norm(model.norm, readers, shared)


def _fold_norm(norm: Any, layers: list[Any], shared: set[int]) -> None:
    """Move weight and bias of `norm` into all `layers`, its only readers; or leave all as it is."""
    if not plain(norm, *NORMS) or norm.weight is None:
        return
    if not _free(layers, shared) or any(id(p) in shared for p in norm.parameters()):
        return
    shift = None if norm.bias is None or not norm.bias.any() else norm.bias.double()
    folded = []
    for layer in layers:
        weight, bias = _exact(layer)
        if shift is not None:
            moved = weight @ shift
            bias = moved if bias is None else bias + moved
        folded.append((weight * norm.weight.double(), bias))
    if all(_fits(new, layer) for new, layer in zip(folded, layers, strict=True)):
        for new, layer in zip(folded, layers, strict=True):
            _put(new, layer)
        norm.drop_affine()


def _fold_scale(ls: Any, layer: Any, drop: nn.Module, shared: set[int]) -> nn.Module:
    """Move LayerScale into `layer` before it; returns what takes its place."""
    if not (plain(ls, LayerScale) and plain(drop, nn.Dropout) and _free([layer], shared)):
        return ls
    weight, bias = _exact(layer)
    gamma = ls.gamma.double()
    new = weight * gamma[:, None], None if bias is None else bias * gamma
    if id(ls.gamma) in shared or not _fits(new, layer):
        return ls
    _put(new, layer)
    return nn.Identity()


def _free(layers: Iterable[nn.Module], shared: set[int]) -> bool:
    """Whether these are linear layers, and their parameters nobody else's."""
    return all(
        plain(layer, nn.Linear) and not any(id(p) in shared for p in layer.parameters())
        for layer in layers
    )


def _exact(layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    bias: Tensor | None = layer.bias
    return layer.weight.double(), None if bias is None else bias.double()


def _fits(new: tuple[Tensor, Tensor | None], layer: nn.Linear) -> bool:
    """Whether rounding to the layer's dtype costs no more than a rounding of normal numbers.

    It does where a small LayerScale takes weights to float16's subnormal numbers, or a large norm
    weight beyond its largest. Float32 weights may meet float16 as well, under autocast.
    """
    own = layer.weight.dtype
    narrow = torch.float16 if own == torch.float32 else own
    tensors = [t for t in new if t is not None]
    error = sum((t.to(narrow) - t).norm() ** 2 for t in tensors)
    allowed = sum((torch.finfo(narrow).eps / 2 * t.norm()) ** 2 for t in tensors)
    return bool(error <= allowed)


def _put(new: tuple[Tensor, Tensor | None], layer: nn.Linear) -> None:
    dtype = layer.weight.dtype
    layer.weight, layer.bias = (  # type: ignore[assignment]
        None if t is None else nn.Parameter(t.to(dtype), requires_grad=False) for t in new
    )
