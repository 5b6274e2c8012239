"""Op, define() and REGISTRY: the one list of ops, read by tests, benchmarks, tools and explain().

An op is a PyTorch operator ``torch.ops.vitkern.<name>`` with an exact fake: CUDA tensors run its
Triton launcher, tensors on any other device its portable implementation. The public function of the
same name in the op's file checks arguments, asks `choose` for an implementation, and adds autograd.

Autocast never reaches an op: the public function turns it into explicit dtypes (`autocast_dtype`).
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.utils.flop_counter import register_flop_formula

from . import _tuned, _verified
from ._launch import intercepted, watched
from ._replay import replayed
from ._triton import INTERPRET, TRITON_MISSING
from ._verified import KERNELS as KERNELS

LIBRARY = torch.library.Library("vitkern", "DEF")
REGISTRY: dict[str, "Op"] = {}

T = TypeVar("T")

HALF = (torch.bfloat16, torch.float16)

# What the Triton kernels read and write; everything else (float64, say) is for the portable path.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Arg:
    """How a sample makes one tensor argument: normal values, or integers for uint8 and bool.

    dtype None stands for the dtype under test; channels_last lays an image out as [B, H, W, C];
    values are the very ones, for an argument that is no data.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    scale: float = 1.0
    offset: float = 0.0
    channels_last: bool = False
    values: tuple[int, ...] | None = None

    def make(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """A tensor of this kind; the values are drawn on the CPU, so that all devices agree."""
        dtype = self.dtype or dtype
        if device.type == "meta":  # for tools that look at launches: there are no values to draw
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            return torch.empty(self.shape, dtype=dtype, device=device, memory_format=layout)
        if self.values is not None:
            value = torch.tensor(self.values)
        elif dtype == torch.uint8:
            value = torch.randint(0, 256, self.shape, generator=generator, dtype=dtype)
        elif dtype == torch.bool:
            value = torch.randint(0, 2, self.shape, generator=generator).bool()
        else:
            value = torch.randn(self.shape, generator=generator) * self.scale + self.offset
        if self.channels_last:
            value = value.contiguous(memory_format=torch.channels_last)
        return value.to(device, dtype)


@dataclass(frozen=True)
class Sample:
    """One set of arguments for an op: what tests check, benchmarks time and tools compile.

    Option values that are a function are called with the dtype under test, for arguments such as
    `out_dtype` that follow it. `derive` makes arguments that follow from the others, such as what a
    forward pass saved: given all, it returns those to replace. `dtypes` are those in which tools
    compile and time it; all that kernels take if None.
    """

    label: str
    args: dict[str, Arg | None]
    options: dict[str, Any] = field(default_factory=dict)
    derive: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def make(self, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the op."""
        device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        made = {
            name: None if arg is None else arg.make(device, dtype, generator)
            for name, arg in self.args.items()
        }
        options = {k: v(dtype) if callable(v) else v for k, v in self.options.items()}
        return self.complete({**made, **options})

    def complete(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """`arguments`, with those anew that follow from others."""
        return arguments if self.derive is None else {**arguments, **self.derive(arguments)}


def same(dtype: torch.dtype) -> torch.dtype:
    """Option value for a Sample: the dtype under test itself."""
    return dtype


def unchanged(arguments: dict[str, Any]) -> dict[str, Any]:
    """For an op whose public function takes the op's own arguments."""
    return arguments


def recorded(
    name: str,
    function: Callable[..., Any],
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """`function`, which a profiler sees as the op `name`, as it does what the dispatcher calls.

    Without a profiler that costs 0.2 us a call. A compiler, which asks first, never sees more than
    the function: a guard on the profiler would have a profile compile everything again.

    Args:
        arguments: makes those of the op from those of `function`, where they differ.
    """
    label, signature = f"vitkern::{name}", inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
            return function(*args, **kwargs)
        given = arguments(*args, **kwargs) if arguments else signature.bind(*args, **kwargs).args
        # Traces have the values of numbers among the arguments, but not those of strings.
        words = {f"argument {i}": repr(a) for i, a in enumerate(given) if isinstance(a, str)}
        with torch._C._profiler._RecordFunctionFast(label, given, words):
            return function(*args, **kwargs)

    return call


@dataclass(frozen=True)
class Op:
    """One operator and all that is known about it.

    reference: the definition, in plain differentiable PyTorch, accumulated in float32 or better.
    portable: the same by the fastest ATen calls; differentiable too.
    launcher: the same by Triton kernels, without autograd; None where there is no kernel yet.
    samples: "tiny" for correctness (odd shapes), "vit" for benchmarks (shapes of real models).
    flops, bytes_moved: of a perfect kernel, from the op's own keyword arguments.
    to_public: those arguments as keyword arguments of the public function.
    peers: further implementations by name, which other packages bring; those of `kernel_peers` are
        ours, launchers like `launcher`, and stand in `peers` as operators of the same schema.
    """

    name: str
    reference: Callable[..., Any]
    portable: Callable[..., Any]
    portable_name: str
    launcher: Callable[..., Any] | None
    fake: Callable[..., Any]
    samples: Callable[[str], Iterable[Sample]]
    flops: Callable[..., int]
    bytes_moved: Callable[..., int]
    backward_of: str | None
    to_public: Callable[[dict[str, Any]], dict[str, Any]]
    peers: Mapping[str, Callable[..., Any]]
    call: Callable[..., Any]
    kernel_peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def launchers(self) -> dict[str, Callable[..., Any]]:
        """Of the implementations that are our kernels, what launches them, for tools to look at.

        Gluon is left out: it can't be interpreted, and its TMA descriptors need addresses.
        tests/test_gluon.py compiles it.
        """
        kernel = {} if self.launcher is None else {"triton": self.launcher}
        peers = {name: f for name, f in self.kernel_peers.items() if name != "gluon"}
        return {**kernel, **peers}

    def kernel(self, name: str) -> Callable[..., Any]:
        """The operator that runs our kernels called `name`; "triton" where the op has none such."""
        return self.peers.get(name, self.call)

    @property
    def implementations(self) -> dict[str, Callable[..., Any]]:
        """Implementations by the name that `impl` takes, in the order in which auto tries them."""
        kernel = {} if self.launcher is None else {"triton": self.call}
        own = {self.portable_name: self.portable, "reference": self.reference}
        return {**kernel, **self.peers, **own}


def define(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Callable[[str], Iterable[Sample]],
    flops: Callable[..., int],
    bytes_moved: Callable[..., int],
    portable: Callable[..., Any] | None = None,
    portable_name: str = "torch",
    launcher: Callable[..., Any] | None = None,
    backward_of: str | None = None,
    to_public: Callable[[dict[str, Any]], dict[str, Any]] = unchanged,
    peers: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> Op:
    """Register ``torch.ops.vitkern.<name>`` (schema inferred from `reference`) and list it.

    A peer that is ours becomes the operator ``torch.ops.vitkern.<name>_<peer>``.
    """
    portable = portable or reference
    schema = torch.library.infer_schema(reference, mutates_args=())
    call = _operator(name, schema, fake, launcher)
    LIBRARY.impl(name, portable, "CompositeExplicitAutograd")
    kernel_peers = {peer: function for peer, function in peers.items() if peer in KERNELS}
    operators = {
        peer: _operator(f"{name}_{peer}", schema, fake, function)
        for peer, function in kernel_peers.items()
    }
    _count_flops((call, *operators.values()), inspect.signature(reference), flops)
    op = Op(
        name=name,
        reference=recorded(name, reference),
        portable=recorded(name, portable),
        portable_name=portable_name,
        launcher=launcher,
        fake=fake,
        samples=samples,
        flops=flops,
        bytes_moved=bytes_moved,
        backward_of=backward_of,
        to_public=to_public,
        peers={**peers, **operators},
        call=call,
        kernel_peers=kernel_peers,
    )
    REGISTRY[name] = op
    return op


def _operator(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    launcher: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """Define ``torch.ops.vitkern.<name>``; on a GPU it runs `launcher`, if there is one."""
    LIBRARY.define(name + schema)
    torch.library.register_fake(f"vitkern::{name}", fake, lib=LIBRARY)
    if launcher is not None:
        run = replayed(launcher)
        LIBRARY.impl(name, run, "CUDA")
        if INTERPRET:  # the interpreter runs kernels on CPU tensors
            LIBRARY.impl(name, run, "CPU")
    operator: Callable[..., Any] = getattr(torch.ops.vitkern, name).default
    return operator


def _count_flops(
    operators: Iterable[Any], signature: inspect.Signature, flops: Callable[..., int]
) -> None:
    """Have ``torch.utils.flop_counter.FlopCounterMode`` count these operators by `flops`."""

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return flops(**signature.bind(*args, **kwargs).arguments)

    for operator in operators:
        register_flop_formula(operator.overloadpacket, get_raw=True)(formula)


@dataclass(frozen=True)
class Choice:
    """Which implementation an op took for one call, and why; and the call, as tables name it."""

    op: str
    implementation: str
    why: str
    bucket: str
    dtype: torch.dtype


_recorded: list[Choice] | None = None


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collect the choices made inside the block, one a call."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def note(what: str, how: str, why: str) -> None:
    """Record how something that is no op runs, and why."""
    # A compiler is asked about first: a guard on the record would have it compile again.
    if not torch.compiler.is_compiling() and _recorded is not None:
        _recorded.append(Choice(what, how, why, "", torch.float32))


def choose(
    op: Op,
    impl: str,
    *tensors: Tensor | None,
    unfit: Mapping[str, str | None] | None = None,
    avoid: str | None = None,
    detail: Callable[[str], str | None] | None = None,
    bucket: Callable[[], str] | None = None,
    dtype: torch.dtype | None = None,
    peer_unfit: Callable[[str], str | None] | None = None,
    grad: bool | None = None,
) -> str:
    """Name of the implementation that runs this call.

    Auto takes what was measured to be the fastest on this card, if that can run here; without a
    measurement our kernel, unless there is a reason to avoid it; a kernel that failed its check
    (``_verified.py``) never.

    Args:
        impl: "auto", or a name from ``op.implementations``; a name that can't run raises.
        tensors: the call's tensors, whose device and dtype decide; the first is never None.
        unfit: for implementations that this call's options rule out, the reason.
        avoid: why auto, without a measurement, should leave our kernel alone, though it could run.
        detail: for the record, more about what the chosen implementation does here.
        bucket: makes the name of the calls among which measurements are shared (`_tuned.bucket`);
            by default the shapes of the tensors.
        dtype: in which the kernel computes; by default that of the first floating-point tensor.
        peer_unfit: why the peer of this name can't run here; asked where it is named, by the caller
            or by a table.
        grad: whether a gradient is wanted; by default, whether these tensors want one.

    Raises:
        ValueError: unknown name, or an explicit one that can't run here; the text says why.
    """
    unfit = unfit or {}
    grad = wants_grad(*tensors) if grad is None else grad
    if impl == "auto":
        name, why = _automatic(op, tensors, unfit, avoid, bucket, dtype, peer_unfit, grad)
    else:
        if impl not in op.implementations:
            known = ", ".join(["auto", *op.implementations])
            raise ValueError(f"{op.name}: unknown impl {impl!r}; expected one of {known}")
        problem = unfit.get(impl) or (kernel_problem(tensors) if impl in KERNELS else None)
        if not problem and impl in op.peers and impl not in unfit and peer_unfit is not None:
            problem = peer_unfit(impl)
        if problem:
            raise ValueError(f"{op.name}: impl={impl!r} can't run here: {problem}")
        name, why = impl, "asked for"
        _distrust(op, name, tensors, dtype, grad, f"it runs, as impl={impl!r} was asked for")
    if not torch.compiler.is_compiling() and _recorded is not None:
        more = None if detail is None else detail(name)
        why = f"{why}; {more}" if more else why
        full = _tuned.full_bucket(_key(tensors, bucket), grad)
        _recorded.append(Choice(op.name, name, why, full, dtype or _dtype(tensors)))
    return name


# Decisions kept for a card: a training run takes a few, images of any size take any number.
REMEMBERED = 4096


def remembered(decide: Callable[..., T], tensors: tuple[Tensor | None, ...], *options: Any) -> T:
    """``decide(tensors, *options)``, which chooses implementations, without asking it twice.

    Args:
        decide: goes by how the tensors look, by whether they want gradients, and by the hashable
            options; else by nothing but tables of measurements and verdicts on kernels.
        tensors: the first is never None.
    """
    if torch.compiler.is_compiling() or _recorded is not None or watched():
        return decide(tensors, *options)
    known = _tuned.table(_device(tensors)).decisions
    key: list[Any] = [decide, options, torch.is_grad_enabled()]
    for t in tensors:
        key += (None,) if t is None else (t.shape, t.dtype, t.device, t.requires_grad)
    look = tuple(key)
    try:
        found: T = known[look]
        return found
    except KeyError:
        pass
    except TypeError:  # a size is a symbol of a tracer's, and no key
        return decide(tensors, *options)
    before = _verified.open_questions
    found = decide(tensors, *options)
    if _verified.open_questions == before:
        if len(known) >= REMEMBERED:
            known.clear()
        known[look] = found
    return found


def _automatic(
    op: Op,
    tensors: tuple[Tensor | None, ...],
    unfit: Mapping[str, str | None],
    avoid: str | None,
    bucket: Callable[[], str] | None,
    dtype: torch.dtype | None,
    peer_unfit: Callable[[str], str | None] | None,
    grad: bool,
) -> tuple[str, str]:
    ignored = "auto leaves it alone"
    on_gpu = _on_gpu(tensors)
    if on_gpu:
        entry = _measured(op, tensors, unfit, avoid, bucket, dtype, peer_unfit, grad)
        if entry and not _distrust(op, entry.implementation, tensors, dtype, grad, ignored):
            return entry.implementation, entry.why
    if unfit.get(op.portable_name):
        fallback, ruled_out = "reference", f"; {op.portable_name}: {unfit[op.portable_name]}"
    else:
        fallback, ruled_out = op.portable_name, ""
    if op.launcher is None:
        return fallback, "no kernel of our own yet" + ruled_out
    if INTERPRET and not on_gpu:
        return fallback, "the interpreter is for tests: ask for impl='triton' to run it" + ruled_out
    problem = unfit.get("triton") or kernel_problem(tensors)
    if problem:
        return fallback, problem + ruled_out
    if avoid:
        return fallback, f"{avoid}; not measured on this card{ruled_out}"
    problem = _distrust(op, "triton", tensors, dtype, grad, ignored)
    if problem:
        return fallback, problem + ruled_out
    return "triton", "CUDA tensors of a kernel dtype; not measured on this card"


def _measured(
    op: Op,
    tensors: tuple[Tensor | None, ...],
    unfit: Mapping[str, str | None],
    avoid: str | None,
    bucket: Callable[[], str] | None,
    dtype: torch.dtype | None,
    peer_unfit: Callable[[str], str | None] | None,
    grad: bool,
) -> _tuned.Entry | None:
    """What was measured of such calls on this card, if it can run this one."""
    device = _device(tensors)
    if torch.compiler.is_compiling():
        # Tables are of calls without a compiler: a reason that speaks of one goes before them. A
        # look-up would tie what is compiled to sizes that were to stay open.
        if avoid or not sizes_are_known(n for t in tensors if t is not None for n in t.shape):
            return None
    elif not _tuned.table(device).entries:
        return None
    key = _key(tensors, bucket)
    entry = _tuned.lookup(device, op.name, key, dtype or _dtype(tensors), grad)
    if entry is None or entry.implementation not in op.implementations:
        return None
    name = entry.implementation
    problem = unfit.get(name)
    if name in KERNELS:
        problem = problem or kernel_problem(tensors)
    if not problem and name in op.peers and name not in unfit:
        unasked = None if name in KERNELS else "unknown"
        problem = unasked if peer_unfit is None else peer_unfit(name)
    return None if problem else entry


def _distrust(
    op: Op,
    impl: str,
    tensors: tuple[Tensor | None, ...],
    dtype: torch.dtype | None,
    grad: bool,
    then: str,
) -> str | None:
    """Why `impl` is not to be trusted on this GPU; with a warning, once, that says what happens."""
    if impl not in KERNELS or not _on_gpu(tensors):
        return None
    call = (op.name, impl, dtype or _dtype(tensors), _device(tensors), grad)
    if torch.compiler.is_compiling():
        return _problem(call, ())
    try:
        problem = _verified.settled[call]
    except KeyError:
        problem = _problem(call, tensors)
    if problem:
        _verified.warn_once(f"{problem}; {then}")
    return problem


def _problem(call: _verified.Call, tensors: tuple[Tensor | None, ...]) -> str | None:
    return _verified.problem(call, REGISTRY, tensors)


_tuned.constant_in_graphs(_problem)


# No generator here or in `wants_grad`: it would take a microsecond, and every call asks.


def _on_gpu(tensors: tuple[Tensor | None, ...]) -> bool:
    return tensors[0] is not None and tensors[0].is_cuda


def _device(tensors: tuple[Tensor | None, ...]) -> torch.device:
    assert tensors[0] is not None
    return tensors[0].device


def _dtype(tensors: tuple[Tensor | None, ...]) -> torch.dtype:
    for t in tensors:
        if t is not None and t.is_floating_point():
            return t.dtype
    raise TypeError("a call without floating-point tensors")


def _key(
    tensors: tuple[Tensor | None, ...], bucket: Callable[[], str] | None
) -> str | tuple[tuple[int, ...] | None, ...]:
    """For a table: the bucket of a call, or the shapes that make it."""
    # Not `if bucket`: PyTorch 2.11's compiler knows no truth of a function.
    return (
        bucket() if bucket is not None else tuple([None if t is None else t.shape for t in tensors])
    )


def sizes_are_known(sizes: Iterable[int]) -> bool:
    """Whether none is a symbol, in a call that a compiler traces."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return all(has_static_value(size) for size in sizes)


def lone_norm() -> str | None:
    """Why auto leaves the kernel of a lone norm alone: a compiler fuses a norm, or a pointwise op,
    into its neighbours, while a kernel would be a wall between them.
    """
    if torch.compiler.is_compiling():
        return "inside torch.compile, which fuses it with its neighbours"
    return None


def kernel_problem(tensors: Iterable[Tensor | None]) -> str | None:
    """Why the Triton kernels can't take these tensors; None where they can."""
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    for t in tensors:
        if t is None:
            continue
        if not (t.is_cuda or INTERPRET or intercepted()):
            return f"Triton kernels need CUDA tensors, these are on {t.device.type}"
        if t.is_floating_point() and t.dtype not in KERNEL_DTYPES:
            return f"no kernel for {dtype_name(t.dtype)}"
    return None


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks matrix products to run in on `device`; None outside autocast."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None  # autocast knows no "meta", and raises
    return torch.get_autocast_dtype(kind)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a product of x and a weight runs: autocast's, else the weight's own."""
    dtype = autocast_dtype(x.device)
    return weight.dtype if dtype is None or torch.float64 in (x.dtype, weight.dtype) else dtype


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors that there are, in `dtype`."""
    # to() costs a microsecond even where there is nothing to do, and by name a third less.
    return tuple([t if t is None or t.dtype is dtype else t.to(dtype=dtype) for t in tensors])


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What a reference computes in: float32, or float64 where an argument is float64."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return torch.float64
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def total_bytes(*tensors: Tensor | None) -> int:
    """Bytes of all elements of these tensors, each read or written once."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Every named tensor is floating point, and all lie on one device."""
    first: tuple[str, Tensor] | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {dtype_name(t.dtype)}")
        if first is None:
            first = (name, t)
        elif t.device != first[1].device:
            raise ValueError(
                f"{op}: {name} is on {t.device} and {first[0]} on {first[1].device}; "
                "expected all tensors on one device"
            )


def check_shape(op: str, name: str, t: Tensor | None, *expected: int | str) -> None:
    """`t` has this shape; a string in `expected` is a dimension of any size, named in the error."""
    if t is None or t.shape == expected:  # most calls end here, at the price of one comparison
        return
    if len(t.shape) == len(expected):
        for size, wanted in zip(t.shape, expected, strict=True):
            if size != wanted and not isinstance(wanted, str):
                break
        else:
            return
    raise ValueError(f"{op}: {name} must be [{', '.join(map(str, expected))}], got {list(t.shape)}")
