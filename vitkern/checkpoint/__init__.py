"""Checkpoints of other libraries: read, understood, loaded, and written again.

    model = load("model.safetensors")                 # whose it is, its names tell
    found = understand("checkpoint.pth", num_heads=6) # the same without a model
    save(model, "model.npz", format="google")

A file of this folder is one library's layout (`_rules.Format`), a table that is read in both
directions. `_files.py` opens containers, `_infer.py` reads the architecture off the shapes.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vitkern.checkpoint._complete import AMBIGUOUS, USUAL, completed
from vitkern.checkpoint._config_file import from_json
from vitkern.checkpoint._files import Source, read
from vitkern.checkpoint._fit import fit
from vitkern.checkpoint._infer import infer
from vitkern.checkpoint._rules import CheckpointError, Fields, Format, State
from vitkern.checkpoint._write import write
from vitkern.checkpoint.aimv2 import Aimv2
from vitkern.checkpoint.beit import Beit
from vitkern.checkpoint.beit3 import Beit3
from vitkern.checkpoint.clip import Clip, ClipTrunk
from vitkern.checkpoint.dinov2 import Dinov2
from vitkern.checkpoint.google import Google
from vitkern.checkpoint.hf_beit import HuggingFaceBeit
from vitkern.checkpoint.hf_dinov2 import HuggingFaceDinov2
from vitkern.checkpoint.hf_towers import HuggingFaceAimv2, HuggingFaceClip, HuggingFaceSiglip
from vitkern.checkpoint.huggingface import HuggingFace
from vitkern.checkpoint.timm import Timm
from vitkern.checkpoint.torchvision import Torchvision
from vitkern.checkpoint.vit_pytorch import VitPytorch
from vitkern.model import ViT
from vitkern.model.config import ViTConfig, check_arguments
from vitkern.model.surgery import changed_part

__all__ = [
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "Format",
    "Source",
    "detect",
    "load",
    "read",
    "save",
    "understand",
]

# In the order of detection: the more particular before those that would take its names, too.
FORMATS: tuple[Format, ...] = (
    Torchvision(),
    HuggingFaceDinov2(),
    HuggingFaceBeit(),
    HuggingFace(),
    HuggingFaceClip(),
    HuggingFaceSiglip(),
    HuggingFaceAimv2(),
    VitPytorch(),
    Google(),
    Clip(),
    ClipTrunk(),
    Aimv2(),
    Beit3(),
    Dinov2(),
    Beit(),
    Timm(),
)

# What `load` adapts the tensors to; all other arguments are claims about the checkpoint.
_ADAPTED = ("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "fc_norm")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was understood.

    format: whose it is. fields: of `ViTConfig`. state: tensors under our names, which are timm's.
    dropped: key -> why it is of no use here. assumed: field -> why, where nothing told it.
    fresh: names of tensors that the checkpoint can't give, as those of a head of another width.
    names: timm's, of models with these shapes; sizes of image, input and head may differ.
    """

    format: Format
    fields: Fields
    state: State
    dropped: dict[str, str]
    assumed: dict[str, str]
    fresh: tuple[str, ...]
    names: tuple[str, ...]
    source: Source

    @property
    def config(self) -> ViTConfig:
        """The model's."""
        return ViTConfig(**self.fields)


def detect(source: Source) -> Format:
    """Whose layout this is.

    Raises:
        CheckpointError: nobody's that is known; the text says which names were found, and what
            config.json calls the model.
    """
    for candidate in FORMATS:
        if candidate.recognises(source.state, source.config):
            return candidate
    names = ", ".join(list(source.state)[:6])
    tried = ", ".join(candidate.title for candidate in FORMATS)
    kinds = ((key, source.config.get(key)) for key in ("model_type", "architecture"))
    called = next((f"its {key} is {kind!r}, and " for key, kind in kinds if kind), "")
    raise CheckpointError(
        f"{source} is no ViT that vitkern knows: {called}its {len(source.state)} tensors begin "
        f"with {names}; tried {tried}"
    )


def understand(
    path_or_state: str | os.PathLike[str] | Mapping[str, Any] | Source, **overrides: Any
) -> Checkpoint:
    """What a checkpoint is: whose, which architecture, and its tensors under our names.

    Args:
        path_or_state: a file, a folder, a state dict, or what `read` made of one.
        overrides: any argument of `ViT`. To `img_size`, `patch_size`, `in_chans`, `num_classes`,
            `global_pool` and `fc_norm` the tensors are adapted; all others say what the checkpoint
            itself doesn't (`num_heads`, `norm_layer`, ...).

    Raises:
        FileNotFoundError, ModuleNotFoundError, TypeError: as `read`, or an unknown argument.
        CheckpointError: no ViT, or one that vitkern has no network for; tensors that are missing or
            that nothing is known about. The text says which.
    """
    check_arguments(overrides)
    source = read(path_or_state)
    format = detect(source)
    problem = format.problem(source.state, source.config)
    if problem:
        raise CheckpointError(f"{source} is of {format.title}, but {problem}")
    try:
        return _understood(source, format, overrides)
    except CheckpointError as error:
        raise CheckpointError(f"{source}, read as {format.title}: {error}") from None


def _understood(source: Source, format: Format, overrides: Fields) -> Checkpoint:
    state = format.prepared(dict(source.state), source.config)
    claims = {key: value for key, value in overrides.items() if key not in _ADAPTED}
    told = from_json(source.config)
    if told is None:
        told = {**format.fields, **format.described(state, source.config)}
    known = {field.name for field in fields(ViTConfig)}
    told = {**{key: value for key, value in told.items() if key in known}, **claims}
    defaults = format.defaults(state, source.config)
    hints: Fields = {**defaults, **told}
    if "grid_size" in source.config:
        hints["grid_size"] = source.config["grid_size"]
    for name in ("img_size", "patch_size", "in_chans"):
        if name in overrides:
            hints[f"target_{name}"] = overrides[name]
    found, left = format.translated(state, hints)
    found = format.finished(found, hints)
    dropped = {**source.dropped, **_dropped(left, format)}
    seen = infer(found, hints)
    for key in ("num_classes", "img_size", "in_chans", "patch_size"):  # tensors know better
        if seen.get(key) is not None and told.get(key) != seen[key]:
            told.pop(key, None)
    own, assumed, names = completed(seen, told, defaults, _called(source))
    try:
        native = ViTConfig(**own)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    _check_whole(found, native)
    changes = {key: value for key, value in overrides.items() if key in _ADAPTED}
    target, found, fresh, gone = fit(found, native, changes)
    for field in changes:
        assumed.pop(field, None)
    return Checkpoint(
        format=format,
        fields=dict(vars(target)),
        state=found,
        dropped={**dropped, **gone},
        assumed=assumed,
        fresh=fresh,
        names=tuple(names),
        source=source,
    )


def _called(source: Source) -> str | None:
    """What the source calls its architecture, or its file is called: "vit_base_patch16_224.pth"."""
    named = source.config.get("architecture")
    if isinstance(named, str) or source.path is None:
        return named
    return source.path.name.partition(".")[0]


def _dropped(left: State, format: Format) -> dict[str, str]:
    """Why each tensor that no rule took is of no use; an error where nobody knows."""
    reasons, unknown = {}, []
    for key in left:
        why = next((why for p, why in format.dropped.items() if re.match(p, key)), None)
        if why is None:
            unknown.append(key)
        else:
            reasons[key] = why
    if unknown:
        raise CheckpointError(f"it has tensors that have no place here: {_some(unknown)}")
    return reasons


def _check_whole(state: State, config: ViTConfig) -> None:
    """An error unless the tensors are those of a model of `config`, name by name."""
    expected = ViT(**{**vars(config), "weight_init": "skip"}, device="meta").state_dict()
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected]
    if missing or extra:
        parts = [f"it lacks {_some(missing)}"] if missing else []
        parts += [f"it has tensors that have no place here: {_some(extra)}"] if extra else []
        raise CheckpointError("; ".join(parts))
    for key, value in state.items():
        if value.is_floating_point() != expected[key].is_floating_point():  # quantised, perhaps
            raise CheckpointError(f"{key} is {value.dtype}, expected {expected[key].dtype}")
        if value.shape != expected[key].shape:
            raise CheckpointError(
                f"{key} is {list(value.shape)}, expected {list(expected[key].shape)}"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def load(
    path_or_state: str | os.PathLike[str] | Mapping[str, Any] | Source,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> ViT:
    """The model of a checkpoint, whosever it is, with the same logits as its own library gives.

    It is in training mode, as a new model is.

    Args:
        path_or_state: a file (safetensors, torch.save, .npz), a folder (Hugging Face's, timm's,
            open_clip's, vitkern's), or a state dict in memory, whose tensors are copied.
            Averaged weights (EMA) come first where a training checkpoint has both.
        device: of the parameters.
        dtype: of the parameters; None for PyTorch's default, float32, whatever the file has: half
            precision is widened, as in timm.
        overrides: any argument of `ViT`; see `understand`. With other `num_classes` the head is
            drawn anew; positions follow `img_size` as the source's own library resizes them.

    Warns:
        UserWarning: the head was drawn anew; the number of heads was guessed by their usual width,
            or known networks of these shapes differ in it, in eps, activation or pool.

    Raises:
        As `understand`.
    """
    found = understand(path_or_state, **overrides)
    model = ViT(**{**found.fields, "weight_init": "skip"}, device="meta", dtype=dtype)
    model.to_empty(device=device or torch.get_default_device())
    module: Any
    for module in model.modules():  # what no state dict holds
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    model.config = found.config
    if found.fresh:
        _draw(model, found.fresh)
        names = ", ".join(found.fresh)
        warnings.warn(f"{found.source} has no {names} of these shapes: drawn anew", stacklevel=2)
    guessed = [field for field in _GUESSES if _is_guess(found, field)]
    if guessed:
        text = "; ".join(f"{f}={found.fields[f]!r} ({found.assumed[f]})" for f in guessed)
        warnings.warn(f"nothing in {found.source} tells {text}; say it to load()", stacklevel=2)
    own = model.state_dict()
    if next(model.parameters()).is_meta:
        return model  # a shape of a model, which has no place for numbers
    model.load_state_dict({**{name: own[name] for name in found.fresh}, **found.state})
    return model


# Fields that change the logits, and that a checkpoint may leave open.
_GUESSES = ("num_heads", "norm_layer", "act_layer", "global_pool", "block_fn")


def _is_guess(found: Checkpoint, field: str) -> bool:
    """Whether more than one network has these shapes, or no known one."""
    why = found.assumed.get(field, "")
    return AMBIGUOUS in why or (field == "num_heads" and why == USUAL)


def _draw(model: ViT, names: tuple[str, ...]) -> None:
    """A new head starts as a new model's does."""
    for name in {name.rpartition(".")[0] for name in names}:
        layer: Any = model.get_submodule(name)
        torch.nn.init.trunc_normal_(layer.weight, std=0.02)
        torch.nn.init.zeros_(layer.bias)


def save(model: ViT, path: str | os.PathLike[str], format: str = "timm") -> Path:
    """Write a model's weights as another library has them; returns the path.

    Args:
        model: unchanged. Layers that were replaced, wrapped or folded have no place in a file.
        path: its suffix chooses the container: .safetensors, .pt, .pth, .bin or .npz; without a
            suffix a folder, with config.json where the library has one.
        format: name of one of `FORMATS`.

    Raises:
        TypeError: no `ViT`.
        ValueError: an unknown format or suffix, a network that the library hasn't, or a model whose
            parameters or modules aren't those of its config; the text names the option, the
            tensors or the module.
        ModuleNotFoundError: safetensors or numpy is missing; the text says how to get it.
    """
    if not isinstance(model, ViT):
        kind = type(model).__name__
        raise TypeError(f"model must be a vitkern.ViT (vitkern.convert makes one), got {kind}")
    chosen = next((one for one in FORMATS if one.name == format), None)
    if chosen is None:
        names = ", ".join(repr(one.name) for one in FORMATS)
        raise ValueError(f"format must be one of {names}, got {format!r}")
    problem = chosen.unfit(model.config)
    if problem:
        raise ValueError(f"{chosen.title} has {problem}")
    _check_whole(model.state_dict(), model.config)
    changed = changed_part(model, dropout=False)
    if changed:
        raise ValueError(f"{changed}: that would be lost")
    return write(model, Path(path), chosen)
