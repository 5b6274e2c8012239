"""A foreign layout of a ViT's tensors: rules that are read in both directions, and `Format`.

A rule pairs a name of ours, which is timm's, with the names that hold the same numbers elsewhere,
and says how those are arranged. "{i}" stands for the number of a block on both sides:

    Rule("blocks.{i}.attn.qkv.weight", ("layer.{i}.q.weight", "layer.{i}.k.weight",
         "layer.{i}.v.weight"), STACKED)

A file of this folder is one format: a table of rules, what that library's code always does (eps,
activation, the way positions are resized), and what its own config file says.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vitkern.model.config import ViTConfig

State = dict[str, Tensor]
Fields = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that is no ViT; the text says what was found and what is missing."""


class View(NamedTuple):
    """How the numbers of one tensor of ours are arranged in theirs.

    read: (their tensors, fields known so far) -> ours.
    write: (ours, their count, config) -> theirs.
    """

    read: Callable[[Sequence[Tensor], Fields], Tensor]
    write: Callable[[Tensor, int, ViTConfig], Sequence[Tensor]]


# The same tensor, the very object: a live module's parameter stays the parameter it is.
SAME = View(lambda theirs, fields: theirs[0], lambda ours, count, config: [ours])
# One below the other: query, key and value in one matrix.
STACKED = View(
    lambda theirs, fields: torch.cat(list(theirs)),
    lambda ours, count, config: ours.chunk(count),
)
# A matrix [in, out], as x @ w has it.
TRANSPOSED = View(
    lambda theirs, fields: theirs[0].t(),
    lambda ours, count, config: [ours.t()],
)

# Without our leading dimension of 1.
BATCHED = View(
    lambda theirs, fields: theirs[0].unsqueeze(0),
    lambda ours, count, config: [ours.squeeze(0)],
)


def reshaped(ours: tuple[int, ...], theirs: tuple[int, ...]) -> View:
    """The same numbers in the same order; shapes with one -1 each."""
    return View(
        lambda given, fields: given[0].reshape(ours),
        lambda given, count, config: [given.reshape(theirs)],
    )


@dataclass(frozen=True)
class Rule:
    """`ours` <-> `theirs`, arranged as `view` says."""

    ours: str
    theirs: tuple[str, ...]
    view: View = SAME


def rule(ours: str, *theirs: str, view: View = SAME) -> Rule:
    """A rule; `theirs` may be one name or several."""
    return Rule(ours, theirs, view)


def layers(table: Mapping[str, str | tuple[str, ...]], view: View = STACKED) -> tuple[Rule, ...]:
    """Rules for weight and bias of every layer of a table ours -> theirs; tuples are stacked."""
    return tuple(
        Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in names), view_of)
        for ours, theirs in table.items()
        for names in (theirs if isinstance(theirs, tuple) else (theirs,),)
        for view_of in (view if len(names) > 1 else SAME,)
        for kind in ("weight", "bias")
    )


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(re.escape("{i}"), r"(\d+)") + r"\Z")


def _numbers(name: str, keys: Iterable[str]) -> list[str | None]:
    """Numbers of the blocks that have `name`; [None] for a name without a number that is there."""
    pattern = _pattern(name)
    found = [match for key in keys if (match := pattern.match(key))]
    return [match[1] if pattern.groups else None for match in found]


def _named(name: str, number: str | None) -> str:
    return name if number is None else name.replace("{i}", number)


def renamed(state: Mapping[str, Tensor], name_of: Callable[[str], str]) -> State:
    """The tensors by other names.

    Raises:
        CheckpointError: two get the same name, of which one would be lost.
    """
    found, old = State(), dict[str, str]()
    for key, value in state.items():
        name = name_of(key)
        if name in found:
            raise CheckpointError(f"{old[name]} and {key} would both be {name}")
        found[name], old[name] = value, key
    return found


def to_ours(
    state: Mapping[str, Tensor], rules: Iterable[Rule], fields: Fields
) -> tuple[State, State]:
    """(tensors under our names, tensors that no rule took).

    Raises:
        CheckpointError: a rule finds some of its tensors, but not all.
    """
    left, found = dict(state), State()
    for one in rules:
        for number in _numbers(one.theirs[0], state):
            names = [_named(name, number) for name in one.theirs]
            missing = [name for name in names if name not in state]
            if missing:
                raise CheckpointError(f"{names[0]} is there, but {', '.join(missing)} is missing")
            found[_named(one.ours, number)] = one.view.read([state[n] for n in names], fields)
            for name in names:
                left.pop(name, None)
    return found, left


def to_theirs(
    state: Mapping[str, Tensor], rules: Iterable[Rule], config: ViTConfig
) -> tuple[State, State]:
    """(tensors under their names, tensors of ours that no rule took)."""
    left, found = dict(state), State()
    for one in rules:
        for number in _numbers(one.ours, state):
            ours = _named(one.ours, number)
            if ours not in left:  # an earlier rule, of another spelling, took it
                continue
            values = one.view.write(left.pop(ours), len(one.theirs), config)
            for name, value in zip(one.theirs, values, strict=True):
                found[_named(name, number)] = value
    return found, left


class Format:
    """One library's layout. A subclass is a table, and overrides a method where a table won't do.

    name: what `save(format=...)` and reports call it. title: whose it is, in words.
    rules: ours <-> theirs; the first rule for a name of ours is the spelling that is written.
    fields: config fields that this library's code always has, whatever the checkpoint.
    dropped: pattern of a key -> why it is of no use here.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]] = ()
    fields: ClassVar[Fields] = {}
    dropped: ClassVar[dict[str, str]] = {}

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """Whether these names are this library's. `config` is its parsed config.json, or empty."""
        raise NotImplementedError

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """The tensors under the names that the rules expect (prefixes, eras, scanned layers)."""
        return state

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """What in this architecture a vitkern.ViT doesn't have; None if it fits."""
        return None

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Config fields that config.json or these shapes tell, beyond `fields`.

        What timm's names show by their shapes (depth, widths, patch, prefix tokens, classes, ...)
        is found by `_infer.py`, for all formats alike, and needn't be told here.
        """
        return {}

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """Config fields that nothing here tells, as this library's defaults have them.

        They yield to `fields`, `described` and to what a user says, and are reported as assumed.
        """
        return {}

    def translated(self, state: State, fields: Fields) -> tuple[State, State]:
        """(tensors under our names, tensors that no rule took); as `to_ours`."""
        return to_ours(state, self.rules, fields)

    def finished(self, state: State, fields: Fields) -> State:
        """The tensors under our names, after the rules, with what no rule can say."""
        return state

    def unfit(self, config: ViTConfig) -> str | None:
        """Why this library has no such network; None if `written` can write it."""
        return None

    def written(self, state: State, config: ViTConfig) -> State:
        """A model's tensors under their names.

        Raises:
            CheckpointError: tensors that have no place there; the text names them.
        """
        found, left = to_theirs(state, self.rules, config)
        if left:
            names = ", ".join(sorted(left)[:5])
            raise CheckpointError(f"{self.title} has no place for {names}")
        return found

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """What this library's config.json says of the model; None where it has no such file."""
        return None

    def images_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """What its preprocessor_config.json says of images; None where it has no such file."""
        return None


def by_channel(config: ViTConfig) -> dict[str, list[float]]:
    """`mean` and `std` as files have them, one number for each channel."""
    values = {"mean": config.mean, "std": config.std}
    return {
        key: list(value) if isinstance(value, tuple) else [value] * config.in_chans
        for key, value in values.items()
    }


def only(
    config: ViTConfig, free: Iterable[str], fixed: Mapping[str, Any] | None = None
) -> str | None:
    """For `Format.unfit`: the first field that isn't `free` and differs from `fixed`, else default.

    Sizes, and fields that change nothing in the function of float images, are always free.
    """
    expected = {**vars(ViTConfig()), **(fixed or {})}
    for name, value in vars(config).items():
        if name not in _NEUTRAL and name not in free and value != expected[name]:
            return f"no {name}={value!r} (expected {expected[name]!r})"
    return None


_NEUTRAL = frozenset(
    (
        *("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio"),
        *("dynamic_img_size", "dynamic_img_pad", "pos_resample", "weight_init", "fix_init"),
        *("mean", "std", "residual_dtype", "drop_path_mode", "save", "impl", "drop_rate"),
        *("pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
        "drop_path_rate",
    )
)
