"""convert(): a live ViT of timm, torchvision, transformers, vit-pytorch or open_clip as a ViT.

    model = vitkern.convert(module)              # a copy, on the same device, in the same mode
    model = vitkern.convert(module, copy=False)  # the very same parameters, where they fit

What tensors are called and how they are arranged, the formats of `checkpoint` know; what tensors
don't show, `describe.py` reads from the module's attributes. Nothing is run.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vitkern.checkpoint import understand
from vitkern.checkpoint._files import Source
from vitkern.checkpoint._fit import fit
from vitkern.convert import foreign
from vitkern.convert.describe import KINDS, TIMM, ConvertError, Kind
from vitkern.model import ViT
from vitkern.model.config import ViTConfig, check_arguments
from vitkern.model.surgery import changed_part

__all__ = ["TIMM", "ConvertError", "convert", "sound"]

# Arguments that tensors can be adapted to; all others, but these, must agree with the tensors.
_ADAPTED = ("img_size", "patch_size", "in_chans", "global_pool", "fc_norm")
# Keys of a checkpoint that are no part of the function, whatever the format drops besides.
_UNUSED = (
    *("mask_token", "pooler.", "decoder", "unread."),
    *("relative_position_index", "rel_coords_log", "relative_coords_log"),
)


def convert(
    module: nn.Module,
    copy: bool = True,
    *,
    check: Tensor | None = None,
    **overrides: Any,
) -> ViT:
    """The same network with the same weights, as a vitkern model.

    Device, dtypes, training mode, requires_grad and gradient checkpointing are carried over; where
    a layer here holds several of theirs (query, key, value), it is trained if one of them is. A
    pooler of transformers, and the random masking of its ViTMAEModel, are not part of the result;
    in place of hidden states it returns features or logits, as every `ViT`.

    Args:
        module: timm's VisionTransformer, with its hybrids, distilled and relative-position kinds;
            torchvision's; vit-pytorch's ViT; the visual tower of an open_clip model; ViTModel,
            DeiTModel, Dinov2Model, CLIPVisionModel, SiglipVisionModel and their relatives, and
            their classifiers, of transformers.
        copy: False to share parameters: training one trains the other.
        check: images [B, C, H, W] to run both on, in evaluation mode; None to run nothing.
        overrides: any argument of `ViT`. Weights are adapted to `img_size`, `patch_size`,
            `in_chans`, `global_pool` and `fc_norm`, and the head is drawn anew for `num_classes`.

    Raises:
        TypeError: no module, no images to `check`, or an unknown argument.
        ConvertError: a class that isn't known, an option that vitkern hasn't, hooks, adapters,
            parametrised, quantised or meta tensors; with copy=False tensors that are packed in
            another way, or would have to be adapted; a `check` with a relative error above 1e-4.
            The text names them.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if check is not None and not isinstance(check, Tensor):
        raise TypeError(f"check must be images [B, C, H, W] or None, got {check!r}")
    check_arguments(overrides)
    kind = Kind(lambda module: {}) if isinstance(module, ViT) else _kind(module)
    sound(module)
    _numbers(module)
    if isinstance(module, ViT):
        changed = changed_part(module)
        if changed:
            raise ConvertError(changed)
        config, state = module.config, dict(module.state_dict(keep_vars=True))
    else:
        config, state = _understood(module, kind, overrides)
    classes = overrides.pop("num_classes", None)
    try:
        target = replace(config, **{k: v for k, v in overrides.items() if k not in _ADAPTED})
        changes = {k: v for k, v in overrides.items() if k in _ADAPTED}
        target, state, _, _ = fit(state, target, changes)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{_name(module)}: {error}") from None
    if not copy:
        _check_shared(module, state)
    model = _built(module, target, state, copy)
    if classes is not None and classes != target.num_classes:
        model.reset_classifier(classes)
    if check is not None:
        _check(module, kind, model, check)
    return model


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}"


def _kind(module: nn.Module) -> Kind:
    """How to read this class, or the one that it derives from and changes nothing in."""
    derived: list[type] = []
    for cls in type(module).__mro__:
        kind = KINDS.get(foreign.class_name(None, cls))
        if kind is not None:
            for name in (name for one in derived for name in vars(one)):
                if callable(getattr(cls, name, None)) and not name.startswith("__"):
                    raise ConvertError(f"{_name(module)} overrides {name} of {cls.__name__}")
            return kind
        derived.append(cls)
    package = type(module).__module__.partition(".")[0]
    own = [name for name in KINDS if name.startswith(package + ".")]
    known = own or sorted({name.partition(".")[0] for name in KINDS})
    inside = [n for n, part in module.named_modules() if n and foreign.class_name(part) in KINDS]
    hint = f"; it holds one: convert its {inside[0]!r}" if inside else ""
    raise ConvertError(f"{_name(module)} is no ViT that is known: {', '.join(known)}{hint}")


def sound(module: nn.Module) -> None:
    """An error for whatever makes a module do something else than its classes say."""
    home = type(module).__module__.partition(".")[0]
    homes = {home, "torch", "timm", "einops", "vitkern"}
    for name, part in module.named_modules():
        where, cls = name or "it", type(part)
        package = cls.__module__.partition(".")[0]
        if package not in homes or cls.__module__.startswith(("torch.ao", "torch.distributed")):
            raise ConvertError(f"{where} is a {cls.__module__}.{cls.__name__}, not {home}'s own")
        if getattr(part, "parametrizations", None):
            raise ConvertError(f"{where} is parametrised: remove the parametrisation first")
        replaced = foreign.replaced_method(part)
        if replaced:
            raise ConvertError(f"the {replaced} of {where} was replaced")
        hooks = _hooks(part)
        if hooks:
            raise ConvertError(f"{where} has hooks ({hooks[0]}), which would no longer be called")


def _numbers(module: nn.Module) -> None:
    """An error for tensors that aren't plain numbers in one place, and for hooks on all modules."""
    if _hooks(torch_module, "_global"):
        raise ConvertError("global module hooks are registered")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ConvertError(f"{name} is on device 'meta', without numbers")
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_quantized:
            raise ConvertError(f"{name} is a {type(tensor).__name__}: quantised or distributed")
    devices = {tensor.device for _, tensor in tensors}
    if len(devices) > 1:
        raise ConvertError(f"its tensors are on several devices: {', '.join(map(str, devices))}")


def _hooks(part: Any, prefix: str = "") -> list[str]:
    """Names of hooks, but for those by which transformers records outputs when asked to."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return [
        getattr(hook, "__qualname__", type(hook).__name__)
        for kind in kinds
        for hook in getattr(part, f"{prefix}_{kind}").values()
        if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
    ]


def _understood(
    module: nn.Module, kind: Kind, overrides: dict[str, Any]
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """The module's config, and its tensors under our names."""
    state = {kind.prefix + key: v for key, v in module.state_dict(keep_vars=True).items()}
    try:
        live = kind.live(module)
        # Of a grid that isn't square the number of positions tells nothing.
        given: dict[str, Any] = dict(kind.config(module))
        grid = getattr(getattr(module, "patch_embed", module), "grid_size", None)
        if grid is not None:
            given["grid_size"] = tuple(grid)
        claims = {k: v for k, v in live.items() if k not in _ADAPTED or k in kind.told}
        if "img_size" not in live and "img_size" in overrides:
            claims["img_size"] = overrides["img_size"]  # nothing else may tell it
        found = understand(Source(state, given, container=type(module).__name__), **claims)
        used = {key: why for key, why in found.dropped.items() if not _is_unused(key)}
        if used:
            key, why = next(iter(used.items()))
            raise ConvertError(f"it has {key}, which would be lost: {why}")
        config = replace(found.config, **live)
        after = "fc_norm.weight" in found.state
        if config.final_norm and config.norm_after_pool != after:
            config = replace(config, fc_norm=after)  # as built, whatever is usual for the pool
    except AttributeError as error:
        raise ConvertError(f"{_name(module)} isn't made as usual: {error}") from None
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{_name(module)}: {error}") from None
    return config, found.state


def _is_unused(key: str) -> bool:
    return any(part in key for part in _UNUSED)


def _check_shared(module: nn.Module, state: dict[str, Tensor]) -> None:
    """An error unless all tensors are the module's own."""
    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    packed = [name for name, tensor in state.items() if id(tensor) not in own]
    if packed:
        more = f" and {len(packed) - 4} more" if len(packed) > 4 else ""
        raise ConvertError(
            f"copy=False: {_name(module)} has {', '.join(packed[:4])}{more} packed in another way; "
            "vitkern.accelerate(model) runs its blocks on the parameters it has"
        )


def _built(module: Any, config: ViTConfig, state: dict[str, Tensor], copy: bool) -> ViT:
    """A model of this config around these tensors, or copies of them."""
    model = ViT(**{**vars(config), "weight_init": "skip"}, device="meta")
    model.config = config
    like = next(iter(state.values()))
    model.to_empty(device=like.device)
    part: Any
    for part in model.modules():  # what no state dict holds
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()
    for name, parameter in model.named_parameters():
        if name in state:
            parameter.requires_grad_(state[name].requires_grad)
    if copy:
        state = {name: tensor.detach().clone() for name, tensor in state.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ConvertError(f"{_name(module)}: {error}") from None
    model.train(module.training)
    theirs = dict(getattr(module, "trunk", module).named_modules())
    for name, part in model.named_modules():
        if name in theirs:
            part.training = theirs[name].training
    trunk = getattr(module, "trunk", module)
    if _checkpointing(trunk):
        model.set_grad_checkpointing(True)
    for name in ("pretrained_cfg", "default_cfg", "distilled_training"):
        if hasattr(trunk, name):
            setattr(model, name, getattr(trunk, name))
    return model


def _checkpointing(module: Any) -> bool:
    """Whether training keeps only the blocks' inputs."""
    for owner in (module, getattr(module, "transformer", None)):
        # transformers 5 warns of the name that version 4 has.
        names = ("grad_checkpointing", "is_activation_checkpointing", "is_gradient_checkpointing")
        name = next((name for name in names if hasattr(type(owner), name)), names[0])
        if getattr(owner, name, False):
            return True
    return False


@torch.no_grad()
def _check(module: nn.Module, kind: Kind, model: ViT, images: Tensor) -> None:
    """An error if both, in evaluation mode, differ by more than 1e-4 of the largest number."""
    modes = [(part, part.training) for m in (module, model) for part in m.modules()]
    try:
        for part, _ in modes:
            part.training = False
        theirs, ours = _outputs(module, kind, model, images)
    finally:
        for part, mode in modes:
            part.training = mode
    if theirs.shape != ours.shape:
        raise ConvertError(f"check: {list(ours.shape)}, where {list(theirs.shape)} was expected")
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
    if not error <= 1e-4:
        raise ConvertError(f"check: results differ by {error:.1e} of the largest number")


def _outputs(module: Any, kind: Kind, model: ViT, images: Tensor) -> Iterator[Tensor]:
    given = module(images)
    if not kind.output:
        return iter((given, model(images)))
    if kind.output == "tokens":
        return iter((given.last_hidden_state, model.forward_features(images)))
    theirs = getattr(given, kind.output)
    if theirs is None:
        raise ConvertError(f"check: {_name(module)} returns no {kind.output} to compare with")
    return iter((theirs, model(images)))
