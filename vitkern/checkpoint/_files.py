"""Any container of tensors -> `Source`. Nothing in a file is ever executed.

    file     safetensors, torch.save's zip or older pickle (weights_only), TorchScript, .npz
    folder   config.json or open_clip_config.json beside one of them, or beside several shards
    memory   a state dict, also nested, also of NumPy arrays; a training checkpoint around one

What a file is, its first bytes say and not its name.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkern.checkpoint._rules import CheckpointError, State
from vitkern.checkpoint._torchscript import read_torchscript

# Under which keys training scripts put a model; the first that is there counts. Averaged weights
# come first, as in timm; "teacher" is DINO's average, "encoder" I-JEPA's, "vit" is of nobody.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model", "module", "teacher", "encoder", "student"),
    *("net", "network", "weights", "params", "target"),
)
# What wraps a whole model adds to all names: DDP, torch.compile, EMA, Lightning, DINO.
PREFIXES = (
    *("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
    *("model.", "net.", "network.", "ema_model.", "backbone.", "teacher.", "student."),
)
# Names of a weight file in a folder, the best first.
_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_CONFIGS = ("config.json", "open_clip_config.json")
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: run `git lfs pull`",
    b"<!doctype": "an HTML page: the download went wrong",
    b"<html": "an HTML page: the download went wrong",
    b"\x89HDF": "an HDF5 file (Keras): vitkern doesn't read those",
    b"GGUF": "a GGUF file: vitkern doesn't read those",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
}


@dataclass(frozen=True)
class Source:
    """Tensors as they were found.

    state: name -> tensor, on the device they are on; those of a file on the CPU, mapped.
    config: config.json as parsed; "architecture", "grid_size" or "vitkern" if the weight file says
        such things itself; or empty.
    path: file or folder; None for memory. container: "safetensors", "torch", "npz", "folder" or
        "state dict". part: the keys that led to the state within a training checkpoint.
    dropped: key -> why it is no part of the state.
    """

    state: State
    config: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    container: str = "state dict"
    part: str = ""
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"this {self.container}" if self.path is None else str(self.path)


def read(path_or_state: "str | os.PathLike[str] | Mapping[str, Any] | Source") -> Source:
    """What is in a file, a folder or a state dict.

    Raises:
        FileNotFoundError: no such path.
        TypeError: neither a path nor a mapping.
        CheckpointError: an empty, truncated or foreign file; a pickle that would have to be
            executed; a mapping without tensors. The text says what was found.
        ModuleNotFoundError: safetensors or numpy is missing; the text says how to get it.
    """
    if isinstance(path_or_state, Source):
        return path_or_state
    if isinstance(path_or_state, Mapping):
        return _unwrapped(path_or_state, {}, None, "state dict")
    if not isinstance(path_or_state, (str, os.PathLike)):
        expected = "a path or a state dict; a live module goes to vitkern.convert"
        raise TypeError(f"expected {expected}, got {type(path_or_state).__name__}")
    path = Path(path_or_state).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"no file or folder {str(path)!r}; vitkern.ViT.from_pretrained reads the Hub's"
        )
    if not path.is_dir():
        # A file by one of these names has its config beside it.
        config = _config(path.parent) if path.name in _WEIGHTS else {}
        return _file(path, config, path)
    found = [path / name for name in _WEIGHTS if (path / name).is_file()] or [
        file
        for suffix in (".safetensors", ".npz", ".pth", ".pt", ".bin")
        for file in sorted(path.glob("*" + suffix))
    ]
    if not found:
        names = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{path} holds no weights: found {names}, expected {_WEIGHTS[0]}")
    if found[0].name not in _WEIGHTS and len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise CheckpointError(f"{path} holds several weight files, name one of them: {names}")
    return _file(found[0], _config(path), path)


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config, and what stands beside it on the normalisation of images."""
    found: dict[str, Any] = {}
    for name in _CONFIGS:
        if not found and (folder / name).is_file():
            found = _json(folder / name)
    images = folder / "preprocessor_config.json"
    if found and images.is_file():
        found["preprocessor_config"] = _json(images)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(found).__name__}")
    return found


def _file(file: Path, config: Mapping[str, Any], path: Path) -> Source:
    with file.open("rb") as opened:
        head = opened.read(64)
    folder = path.is_dir()
    if not head:
        raise CheckpointError(f"{file} is empty")
    for start, what in _FOREIGN.items():
        if head.lstrip().lower().startswith(start.lower()):
            raise CheckpointError(f"{file} is {what}")
    if file.name.endswith(".index.json"):
        return _shards(file, config, path)
    found: Any
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names, comment = archive.namelist(), archive.comment
        if names and all(name.endswith(".npy") for name in names):
            if comment.startswith(b"vitkern "):
                config = {"vitkern": comment.removeprefix(b"vitkern ").decode(), **config}
            return _unwrapped(_npz(file), config, path, "folder" if folder else "npz")
        found = _torch(file, names)
    elif head.startswith(b"PK"):
        raise CheckpointError(f"{file} is a truncated zip file: its end is missing")
    elif head[8:9] == b"{":
        found, metadata = _safetensors(file)
        if "vitkern" in metadata:
            config = {"vitkern": metadata["vitkern"], **config}
        return _unwrapped(found, config, path, "folder" if folder else "safetensors")
    elif head.startswith(b"\x80") or b"ustar" in head:
        found = _torch(file, [])
    else:
        raise CheckpointError(
            f"{file} begins with {head[:12]!r}: expected safetensors, a file of torch.save, or .npz"
        )
    if not isinstance(found, Mapping):
        what = type(found).__name__
        raise CheckpointError(f"{file} holds a {what}, expected a state dict")
    return _unwrapped(found, config, path, "folder" if folder else "torch")


def _shards(index: Path, config: Mapping[str, Any], path: Path) -> Source:
    """A state in several files, as index.json distributes it."""
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{index} has no weight_map")
    state: State = {}
    for name in sorted(set(files.values())):
        shard = index.parent / str(name)
        if Path(str(name)).name != str(name) or not shard.is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which is missing")
        state.update(_file(shard, {}, shard).state)
    missing = sorted(set(files) - set(state))
    if missing:
        raise CheckpointError(f"the shards of {index} lack {', '.join(missing[:5])}")
    return _unwrapped(state, config, path, "folder" if path.is_dir() else "safetensors")


def _safetensors(file: Path) -> tuple[State, dict[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise _missing(file, error) from None
    try:
        with safe_open(str(file), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, (  # noqa: SIM118
                opened.metadata() or {}
            )
    except (SafetensorError, ValueError, OSError) as error:
        why = f"{error}; is the download incomplete?"
        raise CheckpointError(f"{file} is no complete safetensors file: {why}") from None


def _npz(file: Path) -> State:
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        raise _missing(file, error) from None
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: as_tensor(archive[name]) for name in archive.files}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} is no readable .npz of plain arrays: {error}") from None


def as_tensor(array: Any) -> Tensor:
    """A NumPy array as a tensor; NumPy stores bfloat16, which it doesn't know, as two bytes."""
    if array.dtype.str in ("|V2", "<V2") or array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("<i2")).view(torch.bfloat16)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"an array of {array.dtype}, expected numbers")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _missing(file: Path, error: ModuleNotFoundError) -> ModuleNotFoundError:
    text = f"{file} needs {error.name}: pip install 'vitkern[checkpoints]'"
    return ModuleNotFoundError(text, name=error.name)


def _torch(file: Path, members: list[str]) -> Any:
    """A file of torch.save, by its unpickler that knows tensors and plain containers only."""
    zipped = bool(members)
    if any(name.endswith("/constants.pkl") for name in members):
        return read_torchscript(file)
    if zipped and not any(name.endswith("data.pkl") for name in members):
        inside = ", ".join(members[:5])
        raise CheckpointError(f"{file} is a zip file of something else: {inside}")
    try:
        # Scripts put their command line beside the weights: a container that does nothing.
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_numbers()]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        wanted = _unsafe(file, error, zipped)
        if not wanted:
            why = _first_line(error)
            raise CheckpointError(f"{file} is no readable pickle of torch.save: {why}") from None
        raise CheckpointError(
            f"{file} is a pickle that would run code of {wanted}; vitkern executes nothing from a "
            "file. Where you trust it, save its state dict alone: "
            "torch.save(torch.load(path, weights_only=False)[...].state_dict(), new_path)"
        ) from None
    except Exception as error:  # a damaged pickle raises whatever its opcodes come upon
        why = _first_line(error)
        raise CheckpointError(f"{file} is no complete file of torch.save: {why}") from None


def _unsafe(file: Path, error: Exception, zipped: bool) -> str:
    """Names of the classes and functions that a pickle asks for."""
    asked = set(re.findall(r"GLOBAL (\S*\w) ", str(error)))  # a damaged one is no name
    if zipped:
        with contextlib.suppress(Exception):  # can't walk through: the error names the first
            asked |= set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    return ", ".join(sorted(asked))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _numpy_numbers() -> list[Any]:
    """What a number of NumPy beside the weights, the best accuracy, say, is pickled with."""
    try:
        import numpy as np
    except ModuleNotFoundError:
        return []
    scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = (np.float64, np.float32, np.int64)
    return [np.dtype, *((scalar, n) for n in names), *(type(np.dtype(kind)) for kind in kinds)]


def _unwrapped(
    found: Mapping[str, Any], config: Mapping[str, Any], path: Path | None, container: str
) -> Source:
    """The state dict within a training checkpoint, without what wraps the whole model."""
    config, part = dict(config), []
    # A mapping by such a name may hold something else, as the decay of an average.
    while inner := [
        key for key in WRAPPERS if isinstance(found.get(key), Mapping) and _flat(found[key])
    ]:
        for key in ("arch", "model_name", "architecture"):
            if isinstance(found.get(key), str):
                config.setdefault("architecture", found[key])
        arguments = found.get("args")
        model = getattr(arguments, "model", None) or getattr(arguments, "arch", None)
        if isinstance(model, str):
            config.setdefault("architecture", model)
        part.append(inner[0])
        found = found[inner[0]]
    metadata = getattr(found, "_metadata", {}).get("", {})
    for key in ("grid_size", "vitkern"):
        if key in metadata:
            config.setdefault(key, metadata[key])
    flat = _flat(found)
    state = {key: v if isinstance(v, Tensor) else as_tensor(v) for key, v in flat.items()}
    where = "this state dict" if path is None else str(path)
    if not state:
        keys = ", ".join(map(repr, list(found)[:8])) or "nothing"
        raise CheckpointError(f"{where} holds no tensors by name: found {keys}")
    dropped = {
        str(key): f"a {type(value).__name__} and no tensor"
        for key, value in found.items()
        if not _is_array(value) and not isinstance(value, Mapping)
    }
    if state.pop("n_averaged", None) is not None:
        dropped["n_averaged"] = "how many models torch.optim.swa_utils averaged"
    return Source(_without_prefix(state), config, path, container, ".".join(part), dropped)


def _is_array(value: Any) -> bool:
    """A tensor, or an array of NumPy's or JAX's; their single numbers are statistics."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and value.ndim > 0)


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, as Flax has them, with their keys joined by "/"."""
    flat = {}
    for key, value in found.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{inner}": array for inner, array in _flat(value).items()})
        elif _is_array(value):
            flat[str(key)] = value if isinstance(value, Tensor) else _numpy(value)
    return flat


def _numpy(value: Any) -> Any:
    import numpy as np

    return np.asarray(value)


def _without_prefix(state: State) -> State:
    """Without prefixes that all names share."""
    while True:
        first = next(iter(state))
        prefix = next((p for p in PREFIXES if first.startswith(p)), None)
        if prefix is None or not all(key.startswith(prefix) for key in state):
            return state
        state = {key.removeprefix(prefix): value for key, value in state.items()}
