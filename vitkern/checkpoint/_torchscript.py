"""Tensors of a TorchScript archive, as OpenAI's CLIP comes in, without its code being run.

Its pickle is read by an unpickler that knows no class but the containers below: an object of the
archive's own classes becomes a bag of attributes, anything else is refused.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkern.checkpoint._rules import CheckpointError, State

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Bag:
    """An object of a class of the archive's: its attributes, and nothing that runs."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _same(value: Any, *rest: Any) -> Any:
    return value


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Of a closed list; nothing is imported."""
        if module.startswith("__torch__"):
            return _Bag
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # typed lists
            return _same
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, from its file in the archive."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"it has a {kind!r} that is no storage")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else empty
        return self.storages[key]


def read_torchscript(file: Path) -> State:
    """Parameters and buffers by the names of `module.state_dict()`.

    Raises:
        CheckpointError: the archive is damaged, or holds something else than modules of tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            folder = archive.namelist()[0].partition("/")[0]
            root = _Unpickler(archive, folder).load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes come upon
        why = str(error) or type(error).__name__
        raise CheckpointError(f"{file} is no TorchScript archive of a module: {why}") from None
    state: State = {}
    _collect(root, "", state)
    if not state:
        raise CheckpointError(f"{file} is a TorchScript archive without tensors")
    return state


def _collect(bag: Any, prefix: str, state: State) -> None:
    for name, value in getattr(bag, "attributes", {}).items():
        if isinstance(value, Tensor):
            state[prefix + name] = value
        elif isinstance(value, _Bag):
            _collect(value, f"{prefix}{name}.", state)
