"""Launch configs that were measured, in place of those that were reasoned.

Every launcher gets its config from a pure function, whose reasons stand beside it, and passes that
default through `Tunable.pick`:

    config = FORWARD.pick(default, device, dtype, candidates, lambda: {"m": rows, "k": width})

There a table of this card may replace it (``_tuned.py``, "configs", which `python -m benchmarks
tune` writes), and a tool may: `record` lists what a call asks for, `override` decides it. Without a
table that costs a launch less than a microsecond. The table of the real card counts for nothing
where a tool makes configs for another one (`_launch.intercept`).

`candidates` are the alternatives next to the default that the tuner tries, and all that a table may
choose from: each obeys what its kernel demands of a tile, and was seen to compile without spilling
for shapes of ViTs. An entry for rows of about the same number counts too, if it replaced the same
default. What is no candidate any more, and what names a kernel or a field that is gone, is left
alone with one warning.

What is guaranteed: an entry is written only after the kernel, so launched, kept within the error
budget on the tuned shape in float64's eyes. The self-check (``_verified.py``) is of small samples,
which have buckets, and so configs, of their own: it tells of the kernel, not of every entry.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from . import _launch, _tuned

C = TypeVar("C")


class Asked(NamedTuple):
    """One question of a launcher: under which key, the default, and makes the alternatives.

    measured: the answer came from a table, be it the default.
    """

    key: _tuned.Key
    default: Any
    candidates: Callable[[], Sequence[Any]]
    measured: bool


# Plain globals and not context variables: autograd calls backward launchers from its own threads.
_asked: list[Asked] | None = None
_overrides: Mapping[Any, Any] = {}
_watched = False


@dataclass(frozen=True)
class Tunable(Generic[C]):
    """A kernel with configs of one class, a frozen dataclass of whole numbers."""

    kernel: str
    config: type[C]

    def pick(
        self,
        default: C,
        device: torch.device,
        dtype: torch.dtype,
        candidates: Callable[[], Sequence[C]],
        dims: Callable[[], dict[str, int | bool | str]],
    ) -> C:
        """The config to launch with on `device`: `default`, or what was measured to be faster.

        Args:
            candidates: makes the alternatives, for this very call.
            dims: makes all that the best config depends on, as `_tuned.bucket` takes it; like
                `candidates` it is called only where somebody wants to know.
        """
        if not _watched and (_launch.pretended() or not _tuned.table(device).configs):
            return default
        key = (self.kernel, _bucket(tuple(dims().items())), dtype)
        config, measured = self._answer(key, default, device, candidates)
        if _asked is not None:
            _asked.append(Asked(key, default, candidates, measured))
        return config

    def _answer(
        self,
        key: _tuned.Key,
        default: C,
        device: torch.device,
        candidates: Callable[[], Sequence[C]],
    ) -> tuple[C, bool]:
        """(the config, whether a table says so)."""
        for name in (key, self.kernel):
            if name in _overrides:
                return _overrides[name], False
        if _launch.pretended():
            return default, False
        table = _tuned.table(device)
        try:
            found = table.picked[key, default]
        except KeyError:
            found = table.picked[key, default] = self.measured(table, key, default, candidates)
        answer: tuple[C, bool] = found
        return answer

    def measured(
        self,
        table: _tuned.Table,
        key: _tuned.Key,
        default: C,
        candidates: Callable[[], Sequence[C]],
    ) -> tuple[C, bool]:
        """What `table` has for this key, or a near one, and whether that is anything of use."""
        _warn_of_unknown(table)
        for bucket, found in _tuned.nearest(table.configs, key):
            if bucket != key[1] and found.default != asdict(default):  # type: ignore[call-overload]
                continue
            where = f"{found.source}: the config of {key[0]} for {bucket} is ignored"
            try:
                config = self.config(**found.config)
            except TypeError as problem:
                _warn_once(f"{where}: {problem}")
                continue
            # Not what the file says itself: 8.0 and True equal numbers that a kernel can take.
            for allowed in (default, *candidates()):
                if allowed == config:
                    return allowed, True
            _warn_once(f"{where}: {config} is none of those that the kernel may have")
        return default, False


@lru_cache(4096)
def _bucket(dims: tuple[tuple[str, Any], ...]) -> str:
    return _tuned.bucket(**dict(dims))


# By name; launchers add theirs as they are imported.
TUNABLE: dict[str, Tunable[Any]] = {}


def tunable(kernel: str, config: type[C]) -> Tunable[C]:
    """A new entry of TUNABLE."""
    made = Tunable(kernel, config)
    TUNABLE[kernel] = made
    return made


def variants(base: C, *changes: Mapping[str, int]) -> list[C]:
    """`base` with each of these changes of fields."""
    return [replace(base, **change) for change in changes]  # type: ignore[type-var]


@contextlib.contextmanager
def record() -> Iterator[list[Asked]]:
    """List all that launchers ask within the block, as they ask it."""
    global _asked, _watched
    before = _asked, _watched
    _asked, _watched = [], True
    try:
        with _launch.watching():
            yield _asked
    finally:
        _asked, _watched = before


@contextlib.contextmanager
def override(configs: Mapping[Any, Any]) -> Iterator[None]:
    """Launch with these configs within the block, whatever tables say.

    Args:
        configs: by key, or by the name of a kernel, for all calls of it.

    Raises:
        TypeError: a config isn't of the class that its kernel takes.
    """
    global _overrides, _watched
    for name, config in configs.items():
        kernel = name if isinstance(name, str) else name[0]
        if type(config) is not TUNABLE[kernel].config:
            raise TypeError(
                f"configs: that of {kernel} must be a {TUNABLE[kernel].config.__name__}, "
                f"got {config!r}"
            )
    before = _overrides, _watched
    _overrides, _watched = {**_overrides, **configs}, True
    try:
        with _launch.watching():
            yield
    finally:
        _overrides, _watched = before


_warned: set[str] = set()


def _warn_of_unknown(table: _tuned.Table) -> None:
    gone = sorted({key[0] for key in table.configs if key[0] not in TUNABLE})
    for source in {found.source for found in table.configs.values()} if gone else ():
        _warn_once(f"{source}: there are no kernels {', '.join(gone)} (any more) to configure")


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"vitkern: {text}", RuntimeWarning, stacklevel=4)
