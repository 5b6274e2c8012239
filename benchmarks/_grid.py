"""Which cases ``pytest benchmarks`` measures, the most telling first, and who takes part.

On a GPU those come first that targets are of, in the order in which `_report/targets.py` has them.

"small" is minutes of work: on two CPU cores, or on a GPU. "compiled" has torch.compile take part,
which takes half a minute to minutes a case, and so in few of them. "full" is everything: the larger
models, batches, images and further precisions; "rest" is what "small" left of that. "toy" runs the
machinery, for its tests.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import TypeVar

import torch

from vitkern.kernels import REGISTRY
from vitkern.kernels._op import KERNELS

from . import _models
from ._cases import Case, cases, dealt
from ._models import AUTOCAST, BFLOAT16, FLOAT32, Setting
from ._report import targets
from ._report.shortfalls import belongs
from .peers.networks import RIVALS
from .peers.ops import OPS

GRIDS = ("small", "compiled", "full", "rest", "toy")

TINY, SMALL, BASE, LARGE = (f"vit_{n}_patch16_224" for n in ("tiny", "small", "base", "large"))
HUGE = "vit_huge_patch14_224"
STEPS = ("forward", "train")

# In the small grid of a CPU a model is compiled here only.
COMPILED = Setting(TINY, 4, "forward")


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """In which products run on the grid: what ceilings are needed for."""
    if device.type == "cuda":
        return (torch.bfloat16, torch.float16, torch.float32)
    return (torch.float32, torch.bfloat16)


T = TypeVar("T")


def by_value(found: Iterable[T], then: Callable[[T], int] = lambda each: 0) -> list[T]:
    """Settings or cases that targets are of, then all others by a key, or as they come."""
    places = targets.order()
    return sorted(found, key=lambda each: (places.get(str(each), len(places)), then(each)))


def model_of(case: Case) -> int:
    """B/16's ops, which tell why a target of it is missed, then L/16's, then all others."""
    words = case.as_dict()
    return next((n for n, name in enumerate((BASE, LARGE)) if belongs(words, name)), 2)


def settings(grid: str, device: torch.device) -> list[Setting]:
    """Of models."""
    if grid == "toy":
        return [Setting("toy", 2, step) for step in STEPS]
    if device.type == "cuda":
        small = [
            Setting(BASE, batch, step, AUTOCAST)
            for batch, step in ((256, "train"), (256, "forward"), (1, "forward"))
        ]
        small += [
            Setting(BASE, batch, step, AUTOCAST, graph=True)
            for batch, step in ((1, "forward"), (256, "train"))
        ]
        small += [Setting(LARGE, 256, step, AUTOCAST) for step in ("train", "forward")]
        small += [
            Setting(name, batch, "forward", BFLOAT16, graph=True)
            for name, batch in product((BASE, LARGE, HUGE), (1, 32, 256))
        ]
        small += [Setting(BASE, 256, step, BFLOAT16) for step in STEPS]
        small += [
            Setting(name, 128 if name == HUGE else 256, step, AUTOCAST)
            for name, step in product((SMALL, HUGE), ("train", "forward"))
        ]
        small = by_value(small)
        every = product(
            (AUTOCAST, BFLOAT16, FLOAT32),
            (256, 32, 8, 1),
            (BASE, LARGE, SMALL, HUGE, TINY),
            (None, 384),
            STEPS,
        )
    else:
        small = [
            Setting(name, batch, step)
            for name, batch, step in product((TINY, SMALL), (1, 4), STEPS)
        ]
        small += [Setting(BASE, 1, "forward")]
        every = product(
            (FLOAT32, AUTOCAST), (1, 4, 16), (TINY, SMALL, BASE, LARGE, HUGE), (None, 384), STEPS
        )
    if grid == "small":
        return small
    if grid == "compiled":
        if device.type == "cuda":
            trained = [s for s in small if s.step == "train" and s.precision is AUTOCAST]
            few = [Setting(BASE, batch, "forward", AUTOCAST) for batch in (256, 1)]
            return [*(setting for setting in trained if not setting.graph), *few]
        return [COMPILED, Setting(TINY, 4, "train")]
    full = [
        Setting(name, batch, step, precision, side)
        for precision, batch, name, side, step in every
        # Patch 14 doesn't divide 384, and at 378 nothing new is learnt.
        if side is None or name != HUGE
    ]
    if device.type == "cuda":
        full += [replace(setting, graph=True) for setting in full if setting.batch <= 8]
    rest = [setting for setting in full if setting not in small]
    return rest if grid == "rest" else [*small, *rest]


def model_contenders(grid: str, setting: Setting, device: torch.device) -> list[str]:
    """Who is worth the time in this setting; who takes the longest to compile comes last, but in
    the grid that is there for them."""
    here = {name: rival for name, rival in RIVALS.items() if rival.absent() is None}
    plain = [name for name, rival in here.items() if not rival.compiled]
    if setting.graph:
        return [_models.OURS, *(name for name in plain if name in _models.GRAPHS)]
    compiled = [name for name, rival in here.items() if rival.compiled]
    tuned = [name for name in compiled if "autotune" in name and device.type == "cuda"]
    compiled = [name for name in compiled if "autotune" not in name]
    if grid == "compiled" and tuned:  # a target is against these, and the small grid has the rest
        return [_models.OURS, *tuned, *compiled, *plain]
    beside = grid in ("compiled", "full", "rest") or (setting == COMPILED and device.type != "cuda")
    return [_models.OURS, *plain, *([*compiled, *tuned] if beside else [])]


def op_cases(grid: str, device: torch.device) -> Iterator[Case]:
    """Of ops. On a CPU their shapes are tiny, and times are mostly those of the calls."""
    if grid == "toy":
        yield from _first(cases([REGISTRY["layer_norm"]], ["tiny"], (torch.float32,)), 1)
        return
    if device.type != "cuda":
        most = 3 if grid in ("small", "compiled") else 100
        for op in REGISTRY.values():
            yield from _first(cases([op], ["tiny"], (torch.float32,)), most)
        return
    chosen = {"full": dtypes(device), "rest": dtypes(device)[1:]}.get(grid, (torch.bfloat16,))
    for dtype in chosen:
        found = dealt(cases(REGISTRY.values(), ["vit"], (dtype,)))
        yield from found[: len(REGISTRY)] if grid == "compiled" else by_value(found, model_of)


def _first(found: Iterator[Case], most: int) -> Iterator[Case]:
    yield from (case for _, case in zip(range(most), found, strict=False))


def op_contenders(grid: str, case: Case, device: torch.device) -> list[str]:
    """Who may be able to: our kernels and most peers need a GPU."""
    cuda = device.type == "cuda"
    op = case.forward.op
    names = list(op.implementations)
    if cuda:  # the definition is slow, and takes memory that large samples need
        names.remove("reference")
    else:
        names = [name for name in names if name not in KERNELS and not name.startswith("flash")]
    names += [name for name, peer in OPS.get(op.name, {}).items() if peer.absent() is None]
    if grid in ("compiled", "full", "rest"):
        names.append(f"compile({op.portable_name})")
    return names
