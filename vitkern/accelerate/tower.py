"""A timm VisionTransformer inside a larger model, replaced by a ViT on the same parameters."""

from types import MethodType
from typing import Any

from torch import nn

from vitkern.convert import TIMM, ConvertError, convert, foreign, sound
from vitkern.model import ViT


class Tower(ViT):
    """A ViT in the place of a timm model, which it keeps beside it, and not below."""

    def __getattr__(self, name: str) -> Any:
        # Parents may use what timm's model has and ours has not, `_pos_embed` say. Methods of the
        # old module run on this one: its own tensors and modes are those of then.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_replaced" not in self.__dict__:
                raise
            (old,) = self.__dict__["_replaced"]
            value = getattr(old, name)
            bound = getattr(value, "__self__", None) is old
            return MethodType(value.__func__, self) if bound else value


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
        ConvertError: a tensor got another shape meanwhile; or hooks, adapters or other forwards
            were put into the tower, for which the old module has no place.
    """
    try:
        sound(tower)
    except ConvertError as error:
        raise ConvertError(f"it can't be undone: {error}") from None
    (old,) = tower.__dict__["_replaced"]
    kept = tower.state_dict().keys() | old.state_dict().keys()
    now, before = _tensors(tower), _tensors(old)
    for key in sorted(kept | before.keys()):
        shapes = [list(t[key].shape) if key in t else None for t in (now, before)]
        if shapes[0] != shapes[1]:
            raise ConvertError(f"it can't be undone: {key} is {shapes[0]} now, was {shapes[1]}")
    ours = dict(tower.named_modules())
    for path, module in old.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name in tensors:
                tensors[name] = now.get(f"{path}.{name}" if path else name)
        module.training = ours.get(path, tower).training
    _replace(model, old=tower, new=old)


def _tensors(module: nn.Module) -> dict[str, Any]:
    """Parameters and buffers, also those that no state dict holds, under all their names."""
    tensors: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    return tensors | dict(module.named_buffers(remove_duplicate=False))
