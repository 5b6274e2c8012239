"""The self-check: a kernel is held against float64 before its results on a new card are trusted.

The first time a kernel runs on a model of GPU, by an op and in a dtype for which no verdict is on
record, the op's smallest samples go through it, through eager PyTorch and through the reference in
float64, and the rule of ``_error_budget.py`` decides. Verdicts are shipped with the tables of
measurements ("verified" in ``tuned/<gpu>.json``) or kept in ``verified.json`` under VITKERN_CACHE,
~/.cache/vitkern by default; another Triton, another vitkern or another source asks for a new one.
VITKERN_SELFCHECK=0 turns all of it off.

That check is a quick one: three samples, once each, float32 under the setting for its products that
PyTorch is in, which is the one that the caller is about to use. The thorough check, of
``vitkern.selfcheck`` and ``python -m benchmarks verify kernels``, takes all samples and holds
float32 under both settings, IEEE and TF32, eager's error being that under the same; memory that a
kernel gets is filled with NaN, so that an element nobody wrote is found; and a call may be
repeated, always with the same bits. Both kinds of verdict are kept under one key, and of several
settings the worst.
"""

import hashlib
import inspect
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from vitkern._version import __version__

from . import _tuned
from ._error_budget import as_tuple, in_float64, parity
from ._launch import intercepted
from ._triton import triton

if TYPE_CHECKING:
    from ._op import Op, Sample

# Implementations of our own that run on a GPU.
KERNELS = frozenset({"triton", "cublas", "gluon"})

# Samples that the check before a first use runs: each may compile a kernel.
SMALLEST = 3

# What torch.set_float32_matmul_precision is given for each precision of float32 products.
PRECISIONS = {"ieee": "highest", "tf32": "high"}

# Types of tensors that hold data on their device; others may be distributed, or fake.
PLAIN = (Tensor, torch.nn.Parameter, type(None))

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: the error that exceeded its budget most, or came closest to it.

    why: what was wrong, where it wasn't an error of finite size.
    raised: whether that was an exception, which may be the machine's fault.
    sample: the one that this is of. repeats: calls of each sample, all with the same bits.
    poisoned: whether memory was filled with NaN before a kernel got it.
    """

    ok: bool
    samples: int
    error: float = 0.0
    budget: float = 0.0
    why: str = ""
    raised: bool = False
    sample: str = ""
    repeats: int = 1
    poisoned: bool = False

    @property
    def ratio(self) -> float:
        """Error over budget: above 1 is wrong."""
        if self.why:
            return math.inf
        return self.error / self.budget if self.budget else 0.0

    def __str__(self) -> str:
        return self.why or f"error {self.error:.1e}, budget {self.budget:.1e}"


def samples(op: "Op", dtype: torch.dtype, size: str = "tiny") -> "list[Sample]":
    """The op's samples for checks in `dtype`."""
    return [s for s in op.samples(size) if s.dtypes is None or dtype in s.dtypes]


def smallest(op: "Op", dtype: torch.dtype) -> "list[Sample]":
    """The few with the fewest elements, but some."""
    sizes = [
        (sum(counts), n, sample)
        for n, sample in enumerate(samples(op, dtype))
        if all(counts := [math.prod(arg.shape) for arg in sample.args.values() if arg is not None])
    ]
    return [sample for _, _, sample in sorted(sizes, key=lambda size: size[:2])[:SMALLEST]]


def kernels(op: "Op", device: torch.device) -> list[str]:
    """Names of our kernels for the op; off a GPU those that Triton's interpreter can run."""
    names = [name for name in op.implementations if name in KERNELS]
    return names if device.type == "cuda" else [name for name in names if name in op.launchers]


def precisions(dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """In which precisions products of `dtype` are to be right; "" where there is but one.

    Off a GPU eager has no TF32 to be held against.
    """
    if dtype != torch.float32:
        return ("",)
    return tuple(PRECISIONS) if device.type == "cuda" else ("ieee",)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Products, and convolutions, of float32 in this precision inside the block; "": as it is."""
    if not precision:
        yield
        return
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(PRECISIONS[precision])
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty and its like return inside the block is NaN, or the largest integer.

    PyTorch does that itself, for every dtype and device, when it is to be deterministic. Asked to
    warn only it refuses nothing, and nobody needs the warnings.
    """
    utilities: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), utilities.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            utilities.fill_uninitialized_memory = True
            # use_deterministic_algorithms would do the same, and import the compiler.
            torch.set_deterministic_debug_mode("warn")
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            utilities.fill_uninitialized_memory = fill


def check(
    op: "Op",
    impl: str,
    dtype: torch.dtype,
    device: torch.device,
    using: "Iterable[Sample]",
    *,
    precision: str = "",
    repeats: int = 1,
    poison: bool = False,
) -> Verdict:
    """Hold the implementation `impl` against float64 on samples; random numbers stay as they are.

    Args:
        precision: of float32 products, ours and eager's: of PRECISIONS, or "" for PyTorch's own.
        repeats: how often each call is made; the results must have the same bits.
        poison: fill the memory that the first of them gets with NaN.

    Raises:
        Unfit: no sample is for this implementation.
        Exception: what making a sample or PyTorch's own implementation raises.
    """
    worst, count = Verdict(True, 0), 0
    run = op.implementations[impl]
    if poison:
        with poisoned():  # a verdict may claim no more than what this PyTorch does
            poison = bool(torch.empty(1, device=device).isnan())
    with ExitStack() as stack:
        stack.enter_context(float32_products(precision))
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for sample in using:
            with torch.device("cpu"):  # a caller's default device is not where values are drawn
                arguments = sample.make(device, dtype)
            eager = as_tuple(op.portable(**arguments))
            exact = as_tuple(op.reference(**in_float64(arguments)))
            try:
                found = held(run, arguments, eager, exact, repeats, poison)
            except Unfit:
                continue
            count += 1
            if not found.ok or found.ratio >= worst.ratio:
                worst = replace(found, sample=sample.label)
            if not worst.ok:
                break
    if not count:
        raise Unfit(f"{op.name}: no sample fits impl={impl!r}")
    return replace(worst, samples=count, repeats=repeats, poisoned=poison)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Of at least one: a wrong one if there is one, else that which comes closest to its budget."""
    return min(verdicts, key=lambda verdict: (verdict.ok, -verdict.ratio))


class Unfit(Exception):
    """An implementation that can't take a sample."""


def held(
    run: Callable[..., Any],
    arguments: dict[str, Any],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
    repeats: int = 1,
    poison: bool = False,
) -> Verdict:
    """The verdict on one call, and on repeating it; one that raises is wrong."""
    try:
        with poisoned() if poison else nullcontext():
            first = as_tuple(run(**arguments))
        result = parity(first, eager, exact)
        if result["ok"] and repeats > 1 and (why := unlike(run, arguments, first, repeats)):
            result = {"why": why}
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        if "can't run here" in str(problem):  # not made for such shapes, and says so
            raise Unfit from problem
        return Verdict(False, 1, why=f"{type(problem).__name__}: {problem}"[:300], raised=True)
    if "why" in result:
        return Verdict(False, 1, why=result["why"])
    return Verdict(result["ok"], 1, result["error"], result["budget"])


def unlike(
    run: Callable[..., Any], arguments: dict[str, Any], first: Sequence[Tensor], repeats: int
) -> str:
    """Which of `repeats` calls returned other bits than `first`, the first of them; "" for none.

    The device compares; the host asks once, so that calls follow each other closely.
    """
    bits = [_bits(t) for t in first]
    found = [
        torch.stack([(_bits(a) != b).sum() for a, b in zip(as_tuple(again), bits, strict=True)])
        for again in (run(**arguments) for _ in range(repeats - 1))
    ]
    for number, counts in enumerate(torch.stack(found).tolist(), 2):
        for output, count in enumerate(counts):
            if count:
                size = first[output].numel()
                call = f"call {number} of {repeats} with equal arguments"
                return f"output {output}: {call} differs in {count} of {size} elements"
    return ""


def _bits(t: Tensor) -> Tensor:
    """Its elements as integers, by which NaN equals itself and 0.0 is not -0.0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.view(kinds[t.element_size()])


@cache
def digest(source: str) -> str:
    """A hash of all code that a kernel in the file `source` can consist of.

    That is the file, or its folder if the op is one, and what ops share: too much rather than too
    little, since what a new verdict costs is milliseconds.
    """
    own = Path(source)
    files = {p for p in HERE.rglob("*.py") if p.relative_to(HERE).parts[0].startswith("_")}
    files |= {own} if own.parent == HERE or HERE not in own.parents else {*own.parent.glob("*.py")}
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()[:16]


def key(op: "Op", impl: str, dtype: torch.dtype, card: str) -> str:
    """By what a verdict is kept: nothing that could change it is missing."""
    version = "none" if triton is None else triton.__version__
    code = digest(inspect.unwrap(op.reference).__code__.co_filename)
    return f"{card} {op.name} {impl} {dtype} vitkern-{__version__} triton-{version} {code}"


def cache_file() -> Path:
    """Where verdicts are kept between processes."""
    folder = os.environ.get("VITKERN_CACHE") or os.path.expanduser("~/.cache/vitkern")
    return Path(folder) / "verified.json"


def kept() -> dict[str, dict[str, Any]]:
    """The verdicts in the cache file; none where it can't be read."""
    try:
        contents = json.loads(cache_file().read_text())
        return dict(contents["verified"]) if contents["schema"] == _tuned.SCHEMA else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


kept_at_start = cache(kept)


def keep(name: str, verdict: Verdict) -> None:
    """Add a verdict to the cache file; without one, the next process checks again."""
    # Of two processes that write at once one may lose its verdict, and will check again.
    contents = {"schema": _tuned.SCHEMA, "verified": {**kept(), name: asdict(verdict)}}
    with suppress(OSError):
        _tuned.replace(cache_file(), contents)


_verdicts: dict[str, Verdict] = {}
_lock = threading.RLock()
_busy = False


def known(name: str, device: torch.device) -> Verdict | None:
    """The verdict on record under this key: of this process, shipped, or in the cache file."""
    if name not in _verdicts:
        record = _tuned.table(device).verified.get(name) or kept_at_start().get(name)
        try:
            if record is not None:
                _verdicts[name] = Verdict(**record)
        except TypeError:  # of another make
            return None
    return _verdicts.get(name)


def settle(op: "Op", impl: str, dtype: torch.dtype, device: torch.device) -> Verdict | None:
    """The verdict on a kernel, from a check if none is on record; None where that is impossible."""
    global _busy
    card = _tuned.card(device)
    if card is None:
        return None
    name = key(op, impl, dtype, card)
    with _lock:
        verdict = known(name, device)
        if verdict is not None or _busy:  # busy: a check's own calls are not checked
            return verdict
        _busy = True
        try:
            verdict = check(op, impl, dtype, device, smallest(op, dtype))
        except Exception:  # nothing the kernel did: no memory, say
            return None
        finally:
            _busy = False
        record(name, verdict)
        return verdict


def record(name: str, verdict: Verdict) -> None:
    """Take a verdict for granted from now on, in later processes too."""
    _verdicts[name] = verdict
    settled.clear()
    _tuned.reconsider()
    if not verdict.raised:  # the next process may have the compiler that this one lacked
        keep(name, verdict)


def enabled() -> bool:
    """Whether kernels are checked."""
    return os.environ.get("VITKERN_SELFCHECK", "1") != "0"


def possible(device: torch.device) -> bool:
    """Whether a check can run here and now: not for a tool that watches operators or launches."""
    watched = torch._C._len_torch_dispatch_stack() > 0 or intercepted()
    return not (watched or torch.compiler.is_compiling() or capturing(device))


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, in which a check can't wait for its results."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# An op, its implementation, the dtype, the device, and whether gradients are wanted.
Call: TypeAlias = tuple[str, str, torch.dtype, torch.device, bool]

# What is wrong with the kernels of a call, if that is known for good in this process.
settled: dict[Call, str | None] = {}

# How often that was not known: what was decided meanwhile is to be decided again.
open_questions = 0


def problem(
    call: Call, registry: "Mapping[str, Op]", tensors: tuple[Tensor | None, ...]
) -> str | None:
    """Why a kernel of the op, or with gradients one of its backward, can't be trusted.

    Args:
        tensors: those of the call. Only if they are of no subclass, and so hold data on this
            device, may a check be run; none are given while a compiler traces the call.
    """
    global open_questions
    op, impl, dtype, device, grad = call
    card = _tuned.card(device) if enabled() else None
    found, final = None, True
    if card is not None:
        run = bool(tensors) and possible(device) and all(type(t) in PLAIN for t in tensors)
        backward = [o for o in registry.values() if o.backward_of == op and grad]
        for each in (registry[op], *backward):
            own = impl if impl in each.implementations else "triton"
            if run:
                verdict = settle(each, own, dtype, device)
            else:
                verdict = known(key(each, own, dtype, card), device)
                final = final and verdict is not None
            if verdict is not None and not verdict.ok:
                found = f"{each.name}: the {own} kernel failed its check in {dtype}: {verdict}"
                break
    if final:
        settled[call] = found
    else:
        open_questions += 1
    return found


_warned: set[str] = set()


def warn_once(text: str) -> None:
    """One warning a process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"vitkern: {text}", RuntimeWarning, stacklevel=5)
