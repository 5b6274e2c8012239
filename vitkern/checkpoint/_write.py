"""Tensors -> a file or a folder."""

import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkern.checkpoint._config_file import to_json
from vitkern.checkpoint._rules import Format, State
from vitkern.model.config import ViTConfig

_TORCH = (".pt", ".pth", ".bin")


def write(model: Any, path: Path, format: Format) -> Path:
    """The model's weights in a format that has this network, into the container of this suffix.

    Raises:
        ValueError: an unknown suffix.
        ModuleNotFoundError: safetensors or numpy is missing; the text says how to get it.
    """
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    written = format.written(state, model.config)
    tensors = {key: _alone(value.contiguous()) for key, value in written.items()}
    if path.suffix and not path.is_dir():
        _file(tensors, path, model.config)
        return path
    path.mkdir(parents=True, exist_ok=True)
    _file(tensors, path / "model.safetensors", model.config)  # first: it may need what isn't there
    files = {
        "config.json": format.config_file(model.config),
        "preprocessor_config.json": format.images_file(model.config),
    }
    for name, contents in files.items():
        if contents is not None:
            text = json.dumps(contents, indent=2) + "\n"
            (path / name).write_text(text, encoding="utf-8")
    return path


def _file(tensors: State, path: Path, config: ViTConfig) -> None:
    """One file, with the config in a place where no other library looks.

    No other library's file tells eps, and few tell heads or activation: without it, what was saved
    would come back as another network.
    """
    own = json.dumps(to_json(config)["vitkern"])
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ModuleNotFoundError as error:
            raise _missing(path, error) from None
        save_file(tensors, str(path), {"format": "pt", "vitkern": own})
    elif path.suffix in _TORCH:
        state: Any = OrderedDict(tensors)
        state._metadata = OrderedDict({"": {"version": 1, "vitkern": own}})
        torch.save(state, path)
    elif path.suffix == ".npz":
        try:
            import numpy as np
        except ModuleNotFoundError as error:
            raise _missing(path, error) from None
        arrays: dict[str, Any] = {key: _array(value) for key, value in tensors.items()}
        with path.open("wb") as file:  # given a name, NumPy would change it
            np.savez(file, **arrays)
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = f"vitkern {own}".encode()
    else:
        known = ", ".join((".safetensors", *_TORCH, ".npz"))
        raise ValueError(f"path must end in one of {known}, or be a folder, got {str(path)!r}")


def _alone(value: Tensor) -> Tensor:
    """In memory of its own size, for torch.save writes all of it."""
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


def _array(value: Tensor) -> Any:
    """As NumPy has it; bfloat16, which it hasn't, as two bytes."""
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view("V2")
    return value.numpy()


def _missing(path: Path, error: ModuleNotFoundError) -> ModuleNotFoundError:
    text = f"{path} needs {error.name}: pip install 'vitkern[checkpoints]'"
    return ModuleNotFoundError(text, name=error.name)
