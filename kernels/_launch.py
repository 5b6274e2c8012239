"""Launching a kernel: the one gate that every launch goes through, and pure helpers for configs.

Because every launch passes `launch`, a tool can look at launches without a GPU: `intercept` hands
each one, with its arguments and config, to a function in place of the device. The offline compiler,
the memory-safety gate and the launch counter are built on that, so none of them declares a kernel's
arguments a second time.
"""

import contextlib
import contextvars
import inspect
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._triton import INTERPRET, triton


@dataclass(frozen=True)
class Launch:
    """One kernel launch: ``kernel[grid](*args, **constexprs)`` with its compile options.

    scratch: the kernel makes tensor descriptors, which lie in memory that Triton asks us for.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    scratch: bool = False

    def run(self, kernel: Any = None) -> Any:
        """Run it, through `kernel` (a wrapped copy of the same kernel) where one is given.

        Returns:
            What Triton has compiled for it; None from its interpreter.
        """
        call = (self.kernel if kernel is None else kernel)[self.grid]
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            # Triton 3.10 turns the contraction of a * b + c off by default.
            "enable_fp_fusion": True,
        }
        if self.scratch:
            return with_scratch(call, *self.args, **self.constexprs, **options)
        return call(*self.args, **self.constexprs, **options)

    def arguments(self) -> list[Any]:
        """All that the kernel declares, in its order: what compiled code is called with."""
        signature: inspect.Signature = self.kernel.signature
        bound = signature.bind(*self.args, **self.constexprs)
        bound.apply_defaults()
        return list(bound.arguments.values())


def with_scratch(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call something of Triton's that launches a kernel with a `Launch.scratch`.

    Triton keeps its allocator in a context variable, which autograd's threads don't have; in a
    context of our own we don't take away one that the caller has set, either.
    """
    return contextvars.copy_context().run(_with_scratch, call, args, kwargs)


def _with_scratch(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    triton.set_allocator(_scratch)
    return call(*args, **kwargs)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for one launch, on the current device and stream, which are those of the launch.

    PyTorch aligns to 512 bytes, and reuses memory in a stream's order only, so that it may be given
    back before the kernel has run.
    """
    return torch.empty(size, dtype=torch.uint8, device="cuda")


# Plain globals and not context variables: autograd calls backward launchers from its own threads.
_watchers = 0
_interceptor: Callable[[Launch], None] | None = None
_capability: tuple[int, int] | None = None
_processors: int | None = None

# Streaming multiprocessors of the cards that configs are compiled for without a card.
_SM_COUNT = {(8, 0): 108, (9, 0): 132}


@contextlib.contextmanager
def intercept(
    handle: Callable[[Launch], None],
    capability: tuple[int, int] | None = None,
    processors: int | None = None,
) -> Iterator[None]:
    """Send every launch to `handle` instead of the device; `handle` may run it there.

    Configs are made for a card of this compute capability, with so many multiprocessors: the
    actual one's if None. On a card of one, a few rows are as many as fill it.
    """
    global _interceptor, _capability, _processors
    before = _interceptor, _capability, _processors
    _interceptor, _capability, _processors = handle, capability, processors
    try:
        with watching():
            yield
    finally:
        _interceptor, _capability, _processors = before


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Within the block launchers decide each launch anew: a tool looks on, or has a say."""
    global _watchers
    _watchers += 1
    try:
        yield
    finally:
        _watchers -= 1


def watched() -> bool:
    """Whether a tool looks at launches: ours, or one that has hung itself into Triton."""
    return _watchers > 0 or _hooked()


def _hooked() -> bool:
    if triton is None:
        return False
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    # None, or in newer releases a chain of any length.
    return any(getattr(hook, "calls", hook) for hook in hooks)


_heard = threading.local()


@contextlib.contextmanager
def heard(by: Callable[[Launch, Any], None]) -> Iterator[None]:
    """Tell `by` of each launch of this thread, after it, and what Triton had compiled for it."""
    _heard.by = by
    try:
        yield
    finally:
        _heard.by = None


def intercepted() -> bool:
    """Whether launches go to a tool, so that tensors need not be on a GPU."""
    return _interceptor is not None


def pretended() -> bool:
    """Whether configs are made for a card other than the one that is here."""
    return _capability is not None or _processors is not None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    scratch: Any = False,  # a bool; as such mypy would hold callers' **constexprs against it
    **constexprs: Any,
) -> None:
    """Launch `kernel` on the device of its first tensor argument; an empty grid does nothing."""
    if 0 in grid:
        return
    this = Launch(kernel, grid, args, constexprs, num_warps, num_stages, scratch)
    if _interceptor is not None:
        _interceptor(this)
        return
    device = next(a for a in args if isinstance(a, Tensor)).device
    if INTERPRET or device.index == current_device():
        compiled = this.run()
    else:  # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device(device):
            compiled = this.run()
    by = getattr(_heard, "by", None)
    if by is not None:
        by(this, compiled)


def current_device() -> int:
    """Index of the GPU that is current; -1 without one, for Triton's interpreter."""
    return _get_device()


# What torch.cuda.current_device() and Triton's driver call in the end, after a microsecond of
# questions whether CUDA is there; it is, where a launcher has CUDA tensors.
_get_device: Callable[[], int] = (
    (lambda: -1) if INTERPRET else getattr(torch._C, "_cuda_getDevice", lambda: -1)
)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability that configs are made for: the card's, or sm_80 where there is none."""
    if _capability is not None:
        return _capability
    if device.type != "cuda":
        return (8, 0)
    return torch.cuda.get_device_capability(device)


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of `device` (or of the card compiled for)."""
    if _processors is not None:
        return _processors
    if device.type == "cuda" and _capability is None:
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _SM_COUNT.get(capability(device), 108)


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """Precision of a float32 ``tl.dot``: torch's own flag, since Triton would default to TF32."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def precision_of(dtype: torch.dtype) -> str:
    """What of `dot_precision` tells two buckets apart: 16-bit products know one only."""
    return dot_precision(dtype) if dtype == torch.float32 else ""


@dataclass(frozen=True)
class TileConfig:
    """Tile of a product: rows, columns and depth of one step; warps; software-pipeline stages.

    parts: slices of columns that the epilogue takes one after the other, to hold fewer registers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1


@dataclass(frozen=True)
class SplitConfig(TileConfig):
    """Tile of a weight's gradient, a sum over tokens in steps of block_m.

    programs: split it for one wave of so many a multiprocessor; 0: as `split` predicts to be best.
    """

    programs: int = 0


@lru_cache(4096)
def split(
    rows: int, tiles: int, config: SplitConfig, processors: int, dtype: torch.dtype
) -> tuple[int, int]:
    """(into how many parts the sum over `rows` tokens is split, steps of each part).

    Programs come in waves, and one that is hardly begun takes as long as a full one: the 72 tiles
    of B/16's fc1 on 132 multiprocessors, unsplit, leave 45 % of their time unused; in 7 parts 5 %.
    But each part is written, and read, in float32. Parts of four steps at least.
    """
    whole = cdiv(rows, config.block_m)
    best, least = 1, math.inf
    if config.programs:
        best = max(1, min(config.programs * processors // tiles, whole // 4))
    else:
        part = (PART_COST if dtype != torch.float32 else PART_COST / 15) / config.block_m
        for parts in range(1, max(1, min(whole // 4, MOST_PARTS)) + 1):
            # Programs that share a multiprocessor take as long as one after the other.
            steps = cdiv(tiles * parts, processors) * cdiv(whole, parts)
            cost = steps + part * tiles * parts / processors
            if cost < least:
                best, least = parts, cost
    steps = cdiv(whole, best)
    return (cdiv(whole, steps) if whole else 0), steps


# Clocks in which a multiprocessor of an H100 writes and reads one float32, at its share of 3 TB/s,
# over those of one product in 16 bits: 8 / 13 against 2 / 4096. FMA units take 15 times the latter.
PART_COST = 1260

MOST_PARTS = 64


def fit(block: int, size: int) -> int:
    """`block`, or a smaller power of two that covers `size` too; 16 is the least `tl.dot` takes."""
    while block > 16 and block >= 2 * size:
        block //= 2
    return block
