"""Which calls are looked at: every op in REGISTRY, its samples, and the dtypes its kernels take."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitkern.kernels import REGISTRY
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._op import Op, Sample, dtype_name

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class Case:
    """One op on one sample in one dtype."""

    op: Op
    size: str
    sample: Sample
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op.name} [{self.sample.label}] {dtype_name(self.dtype)}"

    def meta(self) -> dict[str, Any]:
        """The op's arguments without memory or values, so that large samples cost nothing."""
        return self.sample.make("meta", self.dtype)


def choose_ops(names: Iterable[str] | None) -> list[Op]:
    """The ops of these names; all of them for None.

    Raises:
        ValueError: a name that is not in the registry.
    """
    chosen = list(REGISTRY) if names is None else list(names)
    for name in chosen:
        if name not in REGISTRY:
            raise ValueError(f"--op: unknown op {name!r}; expected one of {', '.join(REGISTRY)}")
    return [REGISTRY[name] for name in chosen]


def cases(
    ops: Iterable[Op], sizes: Iterable[str], dtypes: Iterable[torch.dtype] = DTYPES
) -> Iterator[Case]:
    """Every op with every sample of these sizes in every dtype; all of one size first."""
    ops, dtypes = tuple(ops), tuple(dtypes)
    for size in sizes:
        for op in ops:
            for sample in op.samples(size):
                for dtype in dtypes:
                    yield Case(op, size, sample, dtype)


def launches(case: Case, capability: tuple[int, int]) -> list[Launch]:
    """What `case` would launch on a card of `capability`."""
    seen: list[Launch] = []
    if case.op.launcher is not None:
        with intercept(seen.append, capability):
            case.op.launcher(**case.meta())
    return seen


def columns(lines: Sequence[tuple[str, ...]]) -> str:
    """A plain-text table; the first line is the head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
