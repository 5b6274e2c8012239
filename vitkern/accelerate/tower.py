"""A timm VisionTransformer inside a larger model, replaced by a ViT on the same parameters."""

from typing import Any

from torch import nn

from vitkern.convert import TIMM, ConvertError, convert, foreign
from vitkern.model import ViT


class Tower(ViT):
    """A ViT in the place of a timm model, which it keeps beside it, and not below."""

    def __getattr__(self, name: str) -> Any:
        # Parents may use parts of timm's model that ours is made without, `_pos_embed` say. The
        # old module, on the same parameters, answers for those.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_replaced" not in self.__dict__:
                raise
            return getattr(self.__dict__["_replaced"][0], name)


def is_tower(module: nn.Module) -> bool:
    """Whether this is one of timm's VisionTransformers."""
    return foreign.class_name(module) in TIMM


def swap(model: nn.Module, module: nn.Module, impl: Any, save: str | None) -> None:
    """Replace `module`, wherever it stands in `model`.

    Raises:
        ConvertError: `convert` refuses it.
    """
    ours: Any = convert(module, copy=False, impl=impl, save=save)
    ours.__class__ = Tower
    # In a tuple: a module as such would be registered, and have keys in the state dict.
    ours.__dict__["_replaced"] = (module,)
    _replace(model, module, ours)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def put_back(model: nn.Module, tower: Any) -> None:
    """The module that `tower` replaced, with the parameters, buffers and modes of now.

    Raises:
        ConvertError: a parameter got another shape meanwhile.
    """
    (old,) = tower.__dict__["_replaced"]
    ours, theirs = dict(tower.named_modules()), dict(old.named_modules())
    now, before = tower.state_dict(keep_vars=True), old.state_dict(keep_vars=True)
    for key in now.keys() | before.keys():
        shapes = [list(state[key].shape) if key in state else None for state in (now, before)]
        if shapes[0] != shapes[1]:
            raise ConvertError(f"{key} is {shapes[0]} now and was {shapes[1]}: it can't be undone")
    for key, value in now.items():
        path, _, name = key.rpartition(".")
        owner = theirs[path]
        (owner._parameters if name in owner._parameters else owner._buffers)[name] = value
    for name, module in theirs.items():
        module.training = ours[name].training if name in ours else tower.training
    _replace(model, old=tower, new=old)
