"""What was measured on a card, by bucket of shapes and dtype: implementations, and launch configs.

A table is one file a card, ``tuned/<slug of its name>.json``, which `python -m benchmarks tune`
writes:

    {"schema": 1,
     "gpu": "NVIDIA H100 80GB HBM3",
     "runs": [{"torch": "2.11.0", "triton": "3.6.0", "date": "...", "commit": "..."}],
     "entries": [{"op": "layer_norm", "bucket": "m32768 d768", "dtype": "bfloat16",
                  "implementation": "triton",
                  "cases": {"<sample>": {"run": 0, "seconds": {"triton": 3.1e-5, "torch": ...}}}}],
     "configs": [{"kernel": "linear.forward", "bucket": "m65536 n3072 k768 gelu", "dtype": ...,
                  "config": {"block_m": 128, ...}, "default": {...}, "run": 0,
                  "seconds": {"default": 3.1e-4, "config": 2.9e-4}}],
     "verified": {"<key>": {"ok": true, ...}}}

"entries" tell the fastest implementation, "configs" how a kernel is launched (``_configs.py``;
older tables have none), "verified" is for the self-check (``_verified.py``). A folder of such files
named by VITKERN_TUNED wins, entry by entry, over the tables shipped here. A table is read once a
process, when a tensor on its card first asks.
"""

import contextlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from ._launch import next_power_of_2, watching

SCHEMA = 1
FOLDER = Path(__file__).parent / "tuned"

# Dimensions that only say how much of the same work there is.
ROUNDED = ("b", "m")

# Up to this factor between amounts of the same work, the fastest is taken to be the same.
NEAR = 4


class Entry(NamedTuple):
    """What a table says of one kind of call."""

    implementation: str
    why: str


class Measured(NamedTuple):
    """A launch config that was faster than the default, by their fields; `source`: the file."""

    config: dict[str, Any]
    default: dict[str, Any]
    source: str


Key: TypeAlias = tuple[str, str, torch.dtype]  # op or kernel, bucket, dtype
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """All that was measured on one card; `near`: what was found for keys that stand not in it.

    picked: configs that `_configs.py` made of `configs`. decisions: what `_op.remembered` keeps.
    """

    entries: dict[Key, Entry] = field(default_factory=dict)
    verified: dict[str, dict[str, Any]] = field(default_factory=dict)
    near: dict[Key, Entry | None] = field(default_factory=dict)
    configs: dict[Key, Measured] = field(default_factory=dict)
    picked: dict[tuple[Key, Any], Any] = field(default_factory=dict)
    decisions: dict[Any, Any] = field(default_factory=dict)

    def find(self, key: Key) -> Entry | None:
        """The entry under this key, or the one of the nearest size, if that is near."""
        try:
            return self.entries[key]
        except KeyError:
            pass
        if key not in self.near:
            self.near[key] = self._nearest(key)
        return self.near[key]

    def _nearest(self, key: Key) -> Entry | None:
        found = nearest(self.entries, key)
        if not found:
            return None
        other, entry = found[0]
        return Entry(entry.implementation, f"as {other}, {entry.why}")


def nearest(entries: dict[Key, T], key: Key) -> list[tuple[str, T]]:
    """(bucket, entry) of those that differ from `key` in the amount of work, up to NEAR times.

    The nearest comes first.
    """
    name, bucket, dtype = key
    kind, size = without_size(bucket)
    found: list[tuple[float, str, T]] = []
    for (other_name, other_bucket, other_dtype), entry in entries.items():
        other_kind, other = without_size(other_bucket)
        if (other_name, other_kind, other_dtype) == (name, kind, dtype):
            ratio = max(size, other) / min(size, other)
            if ratio <= NEAR:
                found.append((ratio, other_bucket, entry))
    return [(other, entry) for _, other, entry in sorted(found, key=lambda one: one[0])]


def card(device: torch.device) -> str | None:
    """The name by which tables know the GPU `device`; None for what is no GPU."""
    return slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def slug(name: str) -> str:
    """ "nvidia-h100-80gb-hbm3" for "NVIDIA H100 80GB HBM3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def bucket(**dims: int | bool | str) -> str:
    """ "m16384 n3072 k768": calls of one bucket are taken to prefer one implementation.

    Rows `m` and images `b` are rounded up to a power of two, other sizes stand as they are; of what
    is true or false, the name stands for True; a word stands for itself.
    """
    words = (_word(name, size) for name, size in dims.items() if size is not False)
    return " ".join(word for word in words if word)


def _word(name: str, size: int | bool | str) -> str:
    if isinstance(size, str):
        return size
    if size is True:
        return name
    return f"{name}{next_power_of_2(size) if name in ROUNDED else size}"


def without_size(bucket: str) -> tuple[str, int]:
    """A bucket without its amount of work, and that: ("m n3072", 16384) for "m16384 n3072"."""
    sizes = _SIZE.findall(bucket)
    return _SIZE.sub(r"\1", bucket), int(sizes[0][1]) if sizes else 1


_SIZE = re.compile(rf"\b([{''.join(ROUNDED)}])(\d+)")


@lru_cache(4096)
def bucket_of(shapes: tuple[tuple[int, ...] | None, ...]) -> str:
    """The bucket of a call by the shapes of its tensors alone: "m32768x768 768 -".

    The rows of tokens [..., D] are one number; of more than three dimensions the first counts
    samples. What shares its leading size with the first tensor is rounded with it, but for a vector
    as wide as that, which is one of features.
    """
    first = next((shape for shape in shapes if shape), (0,))

    def described(shape: tuple[int, ...] | None) -> str:
        if shape is None:
            return "-"
        if shape and shape[0] == first[0] and shape != first[-1:]:
            split = max(1, len(shape) - 1) if len(shape) <= 3 else 1
            rows = 1
            for size in shape[:split]:
                rows *= size
            return "x".join([f"m{next_power_of_2(rows)}", *map(str, shape[split:])])
        return "x".join(map(str, shape)) or "1"

    return " ".join(map(described, shapes))


def constant_in_graphs(function: Callable[..., Any]) -> None:
    """Have a compiler call `function` while it traces, and take the answer for a constant.

    That is torch.compiler.assume_constant_result, which would import the whole compiler here.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


_tables: dict[torch.device, Table] = {}


def reconsider() -> None:
    """Forget what was decided: something else than a table's measurements has changed."""
    for known in _tables.values():
        known.decisions.clear()


def table(device: torch.device) -> Table:
    """What was measured on the card `device`: an empty table where nothing was."""
    try:
        return _tables[device]
    except KeyError:
        name = card(device)
        found = Table() if name is None else load(name)
        _tables[device] = found
        return found


@contextlib.contextmanager
def using(device: torch.device, contents: Table) -> Iterator[None]:
    """Take `contents` for all that was measured on `device`, within the block."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    before = _tables.get(device)
    _tables[device] = contents
    try:
        with watching():
            yield
    finally:
        del _tables[device]
        if before is not None:
            _tables[device] = before


def lookup(
    device: torch.device,
    op: str,
    key: str | tuple[tuple[int, ...] | None, ...],
    dtype: torch.dtype,
    grad: bool,
) -> Entry | None:
    """What was measured for calls of `op` in the bucket `key`, or in that of the shapes `key`.

    Args:
        grad: whether the call is one of training, where forward and backward count together.
    """
    return table(device).find((op, full_bucket(key, grad), dtype))


constant_in_graphs(lookup)


def full_bucket(key: str | tuple[tuple[int, ...] | None, ...], grad: bool) -> str:
    """The bucket as tables spell it."""
    return (key if isinstance(key, str) else bucket_of(key)) + " grad" * grad


def load(name: str) -> Table:
    """The tables of the card `name`, the user's own over the one shipped."""
    merged = Table()
    for folder in (FOLDER, os.environ.get("VITKERN_TUNED")):
        contents = read(Path(folder) / f"{name}.json") if folder else None
        if contents is None:
            continue
        merged.entries.update(contents.entries)
        merged.verified.update(contents.verified)
        merged.configs.update(contents.configs)
    return merged


def read(path: Path) -> Table | None:
    """The table in a file; None without one, or, after a warning, for one of no use."""
    try:
        contents = json.loads(path.read_text())
        if contents["schema"] != SCHEMA:
            raise ValueError(f"schema {contents['schema']!r}, expected {SCHEMA}")
        entries = {
            (entry["op"], entry["bucket"], dtype_of(entry["dtype"])): Entry(
                entry["implementation"],
                f"measured on this card: {in_words(totals(entry['cases']))}",
            )
            for entry in contents["entries"]
        }
        configs = {
            (found["kernel"], found["bucket"], dtype_of(found["dtype"])): Measured(
                dict(found["config"]), dict(found["default"]), str(path)
            )
            for found in contents.get("configs", ())
        }
        return Table(entries, dict(contents["verified"]), configs=configs)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        what = f"{type(problem).__name__}: {problem}"
        warnings.warn(f"the table of measurements {path} is ignored: {what}", stacklevel=2)
        return None


def dtype_of(name: str) -> torch.dtype:
    """torch.bfloat16 for "bfloat16"."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype


def totals(cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Seconds over the cases of an entry, of the implementations that every case has."""
    first, *others = (case["seconds"] for case in cases.values())
    common = set(first).intersection(*others)
    return {impl: sum(case[impl] for case in (first, *others)) for impl in common}


def in_words(seconds: dict[str, float]) -> str:
    """ "triton 31.2 us, torch 40.1 us": the fastest first."""
    return ", ".join(f"{impl} {1e6 * s:.4g} us" for impl, s in sorted(seconds.items(), key=_second))


def fastest(seconds: dict[str, float]) -> str:
    """Who takes the least."""
    return min(seconds.items(), key=_second)[0]


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def replace(path: Path, contents: dict[str, Any]) -> None:
    """Write JSON so that a reader, in whichever process, finds the old file or the new one.

    Raises:
        OSError: the folder can't be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(contents, file, indent=1)
            file.write("\n")
        os.chmod(draft, 0o644)  # mkstemp's files are for their owner alone
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
