"""accelerate(): our kernels inside somebody else's model, in place; restore() undoes it.

A timm VisionTransformer inside a larger model becomes a `vitkern.ViT` that shares its parameters.
The blocks of torchvision, transformers, open_clip and vit-pytorch, and of a timm model that stays
as it is, run on our fused halves, everything around them as before. Either way the outer model
keeps its interface and its state dict's keys, and optimizers keep their parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from vitkern._table import columns
from vitkern.accelerate import blocks
from vitkern.accelerate.layouts import CAUSAL_TEXT, LAYOUTS, PAIRS
from vitkern.accelerate.tower import Tower, is_tower, put_back
from vitkern.accelerate.tower import swap as swap_tower
from vitkern.convert import ConvertError, foreign
from vitkern.model import ViT
from vitkern.model.arguments import implementations
from vitkern.model.config import SAVES, ViTConfig

ANEW, ALREADY, ALONE = "swapped", "already", "left alone"


class Row(NamedTuple):
    """One module: its dotted name, its class, what became of it, and why."""

    name: str
    module: str
    done: str
    why: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; prints as a table, and undoes it at the end of a ``with`` block."""

    rows: tuple[Row, ...]
    model: nn.Module = field(repr=False, compare=False)

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the modules that run on our kernels now."""
        return tuple(row.name for row in self.rows if row.done != ALONE)

    def __str__(self) -> str:
        return columns([Row._fields, *self.rows])

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        restore(self.model)


def accelerate(model: nn.Module, *, impl: Any = "auto", save: str | None = None) -> Report:
    """Have our kernels run the Vision Transformers inside `model`, in place.

    A module that can't be swapped is left as it is, and the report says why. A swapped block still
    runs its own forward, call by call, where it has to: with a mask, with active dropout, with
    hooks or other layers inside. `explain` shows that.

    Args:
        model: any module; one that is itself a timm VisionTransformer is swapped block by block,
            as it has no parent (as a whole: ``vitkern.convert(model, copy=False)``).
        impl, save: as for `ViTConfig`.

    Raises:
        TypeError: no module.
        ConvertError: there is nothing to swap; the text names what was seen.
    """
    _check_module(model)
    how = implementations(impl)
    impls = ViTConfig(impl=how).implementations
    if save is not None and save not in SAVES:
        raise ValueError(f"save must be None or one of {SAVES}, got {save!r}")
    rows = [*_towers(model, how, save)]
    done = {row.name for row in rows if row.done != ALONE}
    rows += _blocks(model, impls, save or "", done)
    if all(row.done == ALONE for row in rows):
        raise ConvertError(_nothing(model, rows))
    return Report(tuple(rows), model)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _towers(model: nn.Module, impl: Any, save: str | None) -> Iterator[Row]:
    for name, module in list(model.named_modules()):
        if isinstance(module, Tower):
            yield Row(name, "ViT", ALREADY, "as a whole, before")
        elif is_tower(module):
            done, why = ALONE, "it is the model itself: see its blocks"
            if name:
                try:
                    swap_tower(model, module, impl, save)
                    done, why = ANEW, "as a whole, with its parameters"
                except ConvertError as error:
                    why = f"{error}; see its blocks"
            yield Row(name, type(module).__name__, done, why)


def _blocks(model: nn.Module, impl: dict[str, str], save: str, towers: set[str]) -> Iterator[Row]:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not blocks.known(module) or any(name.startswith(f"{tower}.") for tower in towers):
            continue
        if isinstance(module, blocks.Swapped):
            yield Row(name, type(module).__name__, ALREADY, "on its own parameters, before")
            continue
        why = _causal(module, name, modules) or blocks.swap(module, impl, save)
        done = ALONE if why else ANEW
        yield Row(name, type(module).__name__, done, why or "on its own parameters")


def _causal(block: Any, name: str, modules: dict[str, nn.Module]) -> str | None:
    """Why a block of a tower for text is left alone: with its mask it would never run on ours."""
    why, cls = "it reads text, and is causal", foreign.class_name(block)
    if cls.removeprefix("transformers.").removesuffix("EncoderLayer") in CAUSAL_TEXT:
        config = type(getattr(block.self_attn, "config", None)).__name__
        return why if "Text" in config else None
    if cls != "open_clip.ResidualAttentionBlock":
        return None
    path = name.split(".")
    parents = [modules[".".join(path[:i])] for i in range(len(path))]
    visual = any(foreign.class_name(parent) == "open_clip.VisionTransformer" for parent in parents)
    masked = any(getattr(parent, "attn_mask", None) is not None for parent in parents)
    return why if masked and not visual else None


def _nothing(model: nn.Module, rows: list[Row]) -> str:
    """Why a model has nothing to swap."""
    if rows:
        reasons = [f"{row.name or 'the model'} ({row.module}): {row.why}" for row in rows]
        return "nothing to accelerate: " + "; ".join(reasons[:4])
    if any(isinstance(module, ViT) for module in model.modules()):
        return "nothing to accelerate: its Vision Transformer is a vitkern.ViT already"
    words = ("transformer", "vit", "block", "attention", "encoder", "layer")
    seen = {
        foreign.class_name(module)
        for module in model.modules()
        if any(word in type(module).__name__.lower() for word in words)
        and not type(module).__name__.startswith("Layer")
    }
    found = ", ".join(sorted(seen)[:8]) or f"no transformer in {type(model).__name__}"
    known = ", ".join(sorted((*LAYOUTS, *PAIRS)))
    return f"nothing to accelerate: found {found}; known are {known}"


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: every swapped module is the one it was, with the parameters of now.

    Harmless on a model with nothing swapped. Returns the model.

    Raises:
        TypeError: no module.
        ConvertError: `model` is itself what took a module's place in a larger one; or a module
            that stands in for another got parameters of other shapes meanwhile (a new head, say),
            hooks or adapters, for which the one that it replaced has no place.
    """
    _check_module(model)
    if isinstance(model, Tower):
        raise ConvertError("this ViT stands in a larger model: restore that one")
    for module in list(model.modules()):
        if isinstance(module, Tower):
            put_back(model, module)
    for module in list(model.modules()):
        if isinstance(module, blocks.Swapped):
            blocks.put_back(module)
    return model
