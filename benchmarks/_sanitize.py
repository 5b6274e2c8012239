"""Memory safety without a GPU: every access of every kernel, checked and counted.

Two checks, on odd shapes and on views (sliced, transposed, expanded):

* Exact: Triton's interpreter runs the kernels, and every load and store is held against the
  elements of the launch's tensors, not just against their storage: a read of the gap between two
  rows of a slice is an error too. Each output element must be written exactly once, and the
  distinct bytes of inputs and outputs must be those that the op declares in `bytes_moved`.
  Float16 stands for bfloat16, whose products the interpreter gets wrong.
* Symbolic, where triton-viz is installed: its sanitizer solves for a violating program, lane and
  loop index. It takes contiguous tensors only, and not every operation; what it refuses is listed.

TRITON_INTERPRET=1 must be set before vitkern is imported: ``python -m benchmarks sanitize`` does.
"""

import contextlib
import itertools
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._op import Op, Sample

from ._cases import Case, cases, columns, kernel_name, launches

CAPABILITY = (9, 0)
DTYPES = (torch.float32, torch.float16)


@dataclass
class Access:
    """Addresses of one load or store, element by element."""

    store: bool
    addresses: np.ndarray
    size: int


@dataclass
class Trace:
    """What the launches of one call touched, and what they should not have."""

    accesses: list[Access] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)

    def addresses(self, store: bool) -> np.ndarray:
        """Address of every byte read or written, repeats included."""
        touched = [
            (a.addresses[:, None] + np.arange(a.size, dtype=np.uint64)).ravel()
            for a in self.accesses
            if a.store == store
        ]
        return np.concatenate(touched) if touched else np.empty(0, dtype=np.uint64)


def byte_addresses(t: Tensor) -> np.ndarray:
    """Address of every byte of the elements of `t`, sorted, each once (expanded tensors repeat)."""
    if t.numel() == 0:
        return np.empty(0, dtype=np.uint64)
    offsets = np.zeros((), dtype=np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    starts = np.unique(offsets.ravel()) * t.element_size() + t.data_ptr()
    return (starts[:, None] + np.arange(t.element_size())).ravel().astype(np.uint64)


@contextlib.contextmanager
def _recorded(launch: Launch, trace: Trace) -> Iterator[None]:
    """Inside the block, interpreted loads and stores are checked, recorded and kept in bounds."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    tensors = [a for a in launch.args if isinstance(a, Tensor)]
    allowed = np.unique(np.concatenate([byte_addresses(t) for t in tensors]))
    name = launch.kernel.fn.__name__

    def check(store: bool, pointers: Any, mask: Any) -> Any:
        """Record an access; the mask without its stray lanes, so that they harm nobody."""
        size = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        # A load by a tensor descriptor brings a bare array as its mask; a mask that a number had a
        # part in is an array of integers.
        address, active = np.broadcast_arrays(pointers.data, np.asarray(mask.data, dtype=bool))
        wanted = address[active]
        ends = wanted + np.uint64(size - 1)
        inside = np.isin(wanted, allowed) & np.isin(ends, allowed)
        trace.accesses.append(Access(store, wanted[inside], size))
        if not inside.all():
            what = "store" if store else "load"
            trace.problems.append(
                f"{name}: {np.count_nonzero(~inside)} of {inside.size} lanes of a {what} are out "
                f"of bounds in program {tuple(builder.grid_idx)} at {_kernel_line()}"
            )
            active = active.copy()
            active[active] = inside
        return interpreter.TensorHandle(active, interpreter.tl.int1)

    load, store, rmw = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )

    def checked_load(pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        return load(pointers, check(False, pointers, mask), *rest, **options)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(pointers, value, check(True, pointers, mask), *rest)

    def checked_rmw(kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return rmw(kind, pointers, value, check(True, pointers, mask), *rest)

    patches = {
        "create_masked_load": checked_load,
        "create_masked_store": checked_store,
        "create_atomic_rmw": checked_rmw,
    }
    for attribute, function in patches.items():
        setattr(builder, attribute, function)
    try:
        yield
    finally:
        for attribute in patches:
            delattr(builder, attribute)


def _kernel_line() -> str:
    """The innermost line that belongs neither to Triton nor to this file."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and "/triton/" not in file and "/triton_viz/" not in file:
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{file}:{frame.f_lineno}: {text}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown line"


def run_exactly(call: Callable[[], Any]) -> tuple[Any, Trace]:
    """Result of `call`, whose launches are interpreted, and their trace."""
    trace = Trace()

    def handle(launch: Launch) -> None:
        trace.kernels.add(kernel_name(launch))
        with _recorded(launch, trace):
            launch.run()

    with _poisoned(), intercept(handle, CAPABILITY):
        result = call()
    return result, trace


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that what nobody wrote, or what was read before, shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in an op's arguments or result."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        value = [value]
    return [t for t in value if isinstance(t, Tensor)]


def check_writes(outputs: list[Tensor], trace: Trace) -> list[str]:
    """Every element of every output is written exactly once."""
    written = Counter(trace.addresses(store=True).tolist())
    problems = []
    for n, out in enumerate(outputs):
        addresses = byte_addresses(out).tolist()
        counts = Counter(written[a] for a in addresses)
        if set(counts) == {0}:  # made by an ATen call: the poison tells whether it was written
            if out.is_floating_point() and out.isnan().any():
                problems.append(f"output {n} {list(out.shape)} was never written")
        elif counts and set(counts) != {1}:
            times = ", ".join(f"{c} bytes {k} times" for k, c in sorted(counts.items()))
            problems.append(f"output {n} {list(out.shape)} must be written once: {times}")
    return problems


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call.

    declared: by `bytes_moved`.
    distinct: of inputs read and outputs written by kernels, each byte once.
    aten: of inputs and outputs that no kernel touches: read through a copy, say, or unneeded.
    scratch: distinct bytes read and written elsewhere: copies, partial sums.
    requested: by all loads and stores, masked lanes apart.
    """

    declared: int
    distinct: int
    aten: int
    scratch: int
    requested: int

    @property
    def problem(self) -> str | None:
        """Why the declaration can't be right; None where it can."""
        if self.distinct <= self.declared <= self.distinct + self.aten:
            return None
        return (
            f"bytes_moved declares {self.declared:,} bytes; the kernels touch {self.distinct:,} of "
            f"inputs and outputs, and leave {self.aten:,} to other calls"
        )


def measure_traffic(
    case: Case, arguments: dict[str, Any], outputs: list[Tensor], trace: Trace
) -> Traffic:
    """Count the bytes of one traced call on dense tensors."""
    read, written = trace.addresses(store=False), trace.addresses(store=True)
    distinct = aten = 0
    for tensors, touched in ((tensors_of(arguments), read), (outputs, written)):
        for t in tensors:
            addresses = byte_addresses(t)
            count = int(np.isin(addresses, touched).sum())
            distinct += count
            aten += len(addresses) if count == 0 else 0
    return Traffic(
        declared=case.op.bytes_moved(**arguments),
        distinct=distinct,
        aten=aten,
        scratch=len(np.unique(read)) + len(np.unique(written)) - distinct,
        requested=len(read) + len(written),
    )


def _sliced(t: Tensor) -> Tensor:
    """Every second value of the inner part of a larger tensor."""
    shape = [n + 2 for n in t.shape[:-1]] + [2 * t.shape[-1] + 3]
    place = (*(slice(1, 1 + n) for n in t.shape[:-1]), slice(1, 1 + 2 * t.shape[-1], 2))
    view = t.new_empty(shape)[place]
    return view.copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """The same values with the order of the dimensions in memory reversed."""
    back = tuple(range(t.dim() - 1, -1, -1))
    return t.permute(back).contiguous().permute(back)


def _expanded(t: Tensor) -> Tensor:
    """The first entry again and again, by a stride of zero."""
    return t[:1].expand_as(t)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "sliced": _sliced,
    "transposed": _transposed,
    "expanded": _expanded,
}


def viewed(sample: Sample, arguments: dict[str, Any], view: str) -> dict[str, Any]:
    """`arguments` as views of one kind; what is given value by value keeps its values."""
    change = VIEWS[view]
    exact = {k for k, arg in sample.args.items() if arg is not None and arg.values is not None}
    changed = {
        k: change(v)
        if isinstance(v, Tensor) and v.dim() and not (view == "expanded" and k in exact)
        else v
        for k, v in arguments.items()
    }
    return sample.complete(changed)


def check_exactly(
    case: Case, view: str, impl: str = "triton"
) -> tuple[list[str], Traffic | None, set[str]]:
    """(problems, traffic of a dense call, kernels that ran) of one case."""
    arguments = viewed(case.sample, case.sample.make("cpu", case.dtype), view)
    launcher = case.op.launchers[impl]
    result, trace = run_exactly(lambda: launcher(**arguments))
    outputs = tensors_of(result)
    problems = [*dict.fromkeys(trace.problems), *check_writes(outputs, trace)]
    traffic = None
    if view == "dense" and trace.accesses:
        traffic = measure_traffic(case, arguments, outputs, trace)
        problems += [traffic.problem] if traffic.problem else []
    return problems, traffic, trace.kernels


def check_symbolically(call: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """(problems, launches that triton-viz can't analyse) of the launches in `call`."""
    import triton_viz
    from triton_viz.clients import Sanitizer

    problems: list[str] = []
    refused: list[str] = []

    def handle(launch: Launch) -> None:
        name = launch.kernel.fn.__name__
        # triton-viz 3.0 adds a view's storage offset to its address, which holds it already: give
        # it the same memory as tensors whose storage begins where they do.
        args = [from_dlpack(a) if isinstance(a, Tensor) else a for a in launch.args]
        launch = replace(launch, args=tuple(args))
        sanitizer = Sanitizer(abort_on_error=False)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                launch.run(triton_viz.trace(client=sanitizer)(launch.kernel))
        except Exception as error:
            refused.append(f"{name}: {str(error) or repr(error)}")
        for record in sanitizer.records:
            lines = [
                f"{f.filename}:{f.lineno}: {f.line_of_code}" for f in record.user_code_tracebacks
            ]
            where = lines[-1] if lines else "an unknown line"
            kind = record.op_type.__name__.lower()
            problems.append(f"{name}: {kind} out of bounds (symbolic) at {where}")

    with intercept(handle, CAPABILITY):
        call()
    return list(dict.fromkeys(problems)), refused


def exact_pass(ops: list[Op]) -> tuple[list[str], set[str]]:
    """Check every op exactly, print the traffic table; (problems, kernels that ran)."""
    offenders: list[str] = []
    seen: set[str] = set()
    lines: list[tuple[str, ...]] = [
        ("op", "calls", "kernels", "requested", "distinct", "aten", "scratch")
    ]
    for op in ops:
        traffics: list[Traffic] = []
        kernels: set[str] = set()
        calls = 0
        for case in cases([op], ["tiny"], DTYPES):
            for view, impl in itertools.product(VIEWS, op.launchers):
                problems, traffic, ran = check_exactly(case, view, impl)
                offenders += [f"{case} {impl} {view}: {p}" for p in problems]
                traffics += [traffic] if traffic else []
                kernels |= ran
                calls += 1
        declared = sum(t.declared for t in traffics) or 1
        shares = [
            f"{sum(getattr(t, kind) for t in traffics) / declared:.3f}"
            for kind in ("requested", "distinct", "aten", "scratch")
        ]
        lines.append((op.name, str(calls), str(len(kernels)), *shares))
        print(f"checked {op.name}: {calls} calls", file=sys.stderr)
        real = {
            kernel_name(launch)
            for case in cases([op], ["vit"], DTYPES)
            for launch in launches(case, CAPABILITY)
        }
        offenders += [f"{op.name}: {k} runs in no tiny sample" for k in sorted(real - kernels)]
        seen |= kernels
    print(
        "Bytes as a multiple of those declared; at these sizes scratch and masked tiles weigh most."
    )
    print(columns(lines))
    return offenders, seen


def symbolic_pass(ops: list[Op]) -> list[str]:
    """Check every op by triton-viz's symbolic sanitizer; what it refuses is printed."""
    offenders: list[str] = []
    refused: Counter[str] = Counter()
    analysed = 0
    for case in cases(ops, ["tiny"], DTYPES):
        arguments = case.sample.make("cpu", case.dtype)
        for impl, launcher in case.op.launchers.items():
            problems, not_taken = check_symbolically(partial(launcher, **arguments))
            offenders += [f"{case} {impl}: {p}" for p in problems]
            refused.update(not_taken)
            analysed += not not_taken
    print(f"\nsymbolic: {analysed} calls analysed as a whole; launches that triton-viz refused:")
    print("\n".join(f"  {count} x {reason}" for reason, count in refused.most_common()) or "  none")
    return offenders


def main(ops: list[Op], symbolic: bool) -> int:
    """Check all ops, print a table; 1 where an access or a declaration is wrong."""
    from vitkern.kernels._triton import INTERPRET

    if not INTERPRET:
        raise ValueError("TRITON_INTERPRET must be 1 before vitkern is imported")
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another
    ops = [op for op in ops if op.launchers]
    offenders, seen = exact_pass(ops)
    if symbolic:  # second, because triton-viz rewrites kernels in a way that only its own runs take
        offenders += symbolic_pass(ops)
    else:
        print("\nsymbolic: left out")
    print(f"\n{len(seen)} kernels, {len(offenders)} problems")
    for offender in offenders:
        print(f"  FAIL {offender}")
    return 1 if offenders else 0
