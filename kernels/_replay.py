"""An op's launches, written down once and done again without its launcher.

A launcher decides (tiles, grids, tables of measurements), and Triton looks at every argument again:
50 to 100 us of Python a launch, where a block of a small ViT takes a GPU no longer. But what a
launcher does follows from what its arguments look like: the dtype, shape, strides and alignment of
the tensors, the values of all else. So a second call that looks like one before is recorded, and
later ones run the record: a Python function, written by `_Recorder`, that allocates, calls ATen and
launches compiled kernels on the new addresses, and decides nothing. Of proj of ViT-S:

    def replay(a0, a1, a2, a3, a4, a5, a6):
        stream = current_stream(0)
        t0 = empty_cuda((64, 197, 384), (75648, 384, 1), torch.bfloat16)
        t1 = empty_cuda((2, 6, 12608), (75648, 12608, 1), torch.float32)
        scratch(run15, 132, 1, 1, stream, ..., a0.data_ptr(), a1.data_ptr(), a2.data_ptr(), ...)
        return t0, t1,

Not recorded: what runs while a tool looks at launches (`_launch.watched`), calls on a device that
is not the current one, and launchers that read values on the host or launch with more than tensors,
numbers and strings (Gluon's host-side descriptors). They run as ever.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _launch
from ._triton import INTERPRET

# Looks remembered for each op: a training run knows a few, open resolutions any number.
LIMIT = 1024

# Allocations without contents, which may be made again by one quick call.
_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
)

_deterministic: Callable[[], bool] = torch._C._get_deterministic_algorithms

# By what the code of PyTorch's compiler allocates on the current device: 1.0 us in place of 2.3.
_empty_cuda: Callable[..., Tensor] | None = getattr(
    getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None
)


def replayed(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """`launcher`, recorded when a call looks like one before, and from then on replayed.

    Args:
        launcher: takes tensors, numbers, strings, dtypes, and lists of such but tensors; returns a
            tensor or a tuple of tensors, none of them an argument. But for what the arguments look
            like, nothing may decide what it does, and it must not keep their memory.
    """
    known: dict[tuple[Any, ...], Callable[..., Any] | None] = {}

    @functools.wraps(launcher)
    def call(*args: Any) -> Any:
        if _launch.watched():
            return launcher(*args)
        key = looks(args)
        try:
            replay = known[key]
        except KeyError:
            if len(known) >= LIMIT:
                known.clear()
            known[key] = None  # seen once; what comes but once is not worth a record
            return launcher(*args)
        if replay is None:
            results, replay = record(launcher, args)
            known[key] = replay
            return results
        return replay(*args)

    return call


def looks(args: Iterable[Any]) -> tuple[Any, ...]:
    """All of a call that a launcher may go by."""
    precision = torch.get_float32_matmul_precision()
    found: list[Any] = [precision, _deterministic(), _launch.current_device()]
    for a in args:
        if isinstance(a, Tensor):
            found += (a.get_device(), a.dtype, a.shape, a.stride(), a.data_ptr() & 15)
        else:
            found.append(tuple(a) if type(a) is list else a)
    return tuple(found)


def record(launcher: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Callable[..., Any]]:
    """(the results of this call, what does the same for arguments that look alike).

    The latter is the launcher itself where there is more to it than can be recorded.
    """
    recorder = _Recorder(launcher.__qualname__, args)
    with recorder, _launch.heard(recorder.launched):
        results = launcher(*args)
    if recorder.problem is None:
        recorder.finish(results)
    return results, launcher if recorder.problem else recorder.compile()


class _Step:
    """A line of a replay: it needs the tensors of some names, and makes those of others."""

    def __init__(self, line: str, needs: Iterable[str], makes: Iterable[str], kept: bool) -> None:
        self.line, self.needs, self.makes, self.kept = line, set(needs), set(makes), kept


class _Recorder(TorchDispatchMode):
    """Writes down what happens while it is entered, and is told of launches.

    problem: why this can't be replayed; None where it can.
    """

    def __init__(self, what: str, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.what, self.count = what, len(args)
        self.problem: str | None = None
        self.steps: list[_Step] = []
        self.results = ""
        # Of tensors by id: the name; and that of the tensor whose memory it views, with the offset
        # in bytes, by which kernels get an address without the view being made.
        self.names: dict[int, str] = {}
        self.roots: dict[int, tuple[str, int]] = {}
        self.alive: list[Tensor] = []  # so that an id stays one tensor's
        self.fresh = itertools.count()
        self.busy = False
        tensors = [(f"a{i}", a) for i, a in enumerate(args) if isinstance(a, Tensor)]
        self.device = tensors[0][1].device
        self.space: dict[str, Any] = {  # what the replay's Python may name
            "torch": torch,
            "empty": torch.empty,
            "empty_cuda": _empty_cuda,
            "device": self.device,
            "current_stream": _launch.current_stream,
            "scratch": _launch.with_scratch,
        }
        for name, tensor in tensors:
            # One tensor in two places can't be told from two that look alike.
            if id(tensor) in self.names or tensor.device != self.device:
                self.problem = "one tensor twice, or tensors on several devices"
            self._own(tensor, name)
        if not INTERPRET and self.device.index != _launch.current_device():
            self.problem = "a device that is not the current one"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.busy = True  # launches of an op that is called count as that op
        try:
            results = func(*args, **kwargs)
        finally:
            self.busy = False
        if self.problem is None:
            self._called(func, args, kwargs, results)
        return results

    def _called(self, func: Any, args: Any, kwargs: dict[str, Any], results: Any) -> None:
        made = results if isinstance(results, tuple | list) else (results,)
        if not all(isinstance(t, Tensor) for t in made):
            self.problem = f"{func} brings values to the host"
            return
        if func in _EMPTY and made[0].is_contiguous() and made[0].device == self.device:
            name = self._own(made[0])
            shape, dtype = tuple(made[0].shape), made[0].dtype
            line = f"{name} = empty({shape}, dtype={dtype}, device=device)"
            # Where PyTorch is asked to fill memory, its own empty() must be called.
            if self.device.type == "cuda" and _empty_cuda and not _deterministic():
                line = f"{name} = empty_cuda({shape}, {made[0].stride()}, {dtype})"
            self.steps.append(_Step(line, (), (name,), False))
            return
        needs: list[str] = []
        given = [self._word(a, needs) for a in args]
        given += [f"{k}={self._word(v, needs)}" for k, v in kwargs.items()]
        inputs = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if id(a) in self.roots]
        new = [t for t in made if id(t) not in self.names]
        names = [self._made(t, inputs) for t in made]
        call = f"{self._constant('f', func)}({', '.join(given)})"
        line = f"{', '.join(names)}{',' * isinstance(results, tuple | list)} = {call}"
        written = func._schema.is_mutable or not new
        self.steps.append(_Step(line, needs, names, written))

    def _made(self, tensor: Tensor, inputs: list[Tensor]) -> str:
        """The name of what ATen made or changed: of memory of its own, or of one of the inputs."""
        if id(tensor) in self.names:
            return self.names[id(tensor)]
        memory = tensor.untyped_storage().data_ptr()
        for other in inputs:
            if memory and other.untyped_storage().data_ptr() == memory:
                name, offset = self.roots[id(other)]
                offset += tensor.data_ptr() - other.data_ptr()
                return self._own(tensor, root=(name, offset))
        return self._own(tensor)

    def _own(
        self, tensor: Tensor, name: str | None = None, root: tuple[str, int] | None = None
    ) -> str:
        name = name or f"t{next(self.fresh)}"
        self.names[id(tensor)] = name
        self.roots[id(tensor)] = root or (name, 0)
        self.alive.append(tensor)
        return name

    def _constant(self, kind: str, value: Any) -> str:
        name = f"{kind}{len(self.space)}"
        self.space[name] = value
        return name

    def _word(self, value: Any, needs: list[str]) -> str:
        """An argument of ATen's."""
        if isinstance(value, Tensor):
            if id(value) not in self.names:
                self.problem = "a tensor from elsewhere"
                return ""
            needs.append(self.names[id(value)])
            return needs[-1]
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._word(v, needs) for v in value)}]"
        if value is None or type(value) in (int, bool):
            return repr(value)
        return self._constant("c", value)

    def launched(self, this: _launch.Launch, compiled: Any) -> None:
        """A kernel was launched, so `compiled`."""
        if self.problem is not None or self.busy:
            return
        needs: list[str] = []
        given = [self._argument(a, needs) for a in this.args]
        if (
            not INTERPRET
        ):  # which is called as launchers do; compiled code with all that is declared
            given += [self._constant("c", value) for value in this.arguments()[len(given) :]]
        if self.problem is None:
            line = self._launch_line(this, compiled, given)
            self.steps.append(_Step(line, needs, (), True))

    def _argument(self, value: Any, needs: list[str]) -> str:
        """An argument of a kernel: the address of a tensor, since no one looks at more again."""
        if isinstance(value, Tensor):
            if id(value) not in self.names:
                self.problem = "a tensor from elsewhere"
                return ""
            if INTERPRET:  # which takes tensors
                needs.append(self.names[id(value)])
                return needs[-1]
            name, offset = self.roots[id(value)]
            needs.append(name)
            return f"{name}.data_ptr()" + (f" + {offset}" if offset else "")
        if value is None or type(value) in (int, bool):
            return repr(value)
        if not isinstance(value, float | str | torch.dtype):
            self.problem = f"a kernel takes a {type(value).__name__}"
        return self._constant("c", value)

    def _launch_line(self, this: _launch.Launch, compiled: Any, given: list[str]) -> str:
        if INTERPRET:
            call = self._constant("call", functools.partial(_interpret, this))
            return f"{call}({', '.join(given)})"
        # As Triton's JIT launches what it has compiled; no hook is here, or this would not be run.
        grid = (*this.grid, 1, 1)[:3]
        run = self._constant("run", compiled.run)
        handle = self._constant("handle", compiled.function)
        meta = self._constant("meta", compiled.packed_metadata)
        head = [*map(str, grid), "stream", handle, meta, "None", "None", "None"]
        if this.scratch:
            return f"scratch({', '.join([run, *head, *given])})"
        return f"{run}({', '.join([*head, *given])})"

    def finish(self, results: Any) -> None:
        """The launcher has returned these."""
        made = results if isinstance(results, tuple | list) else (results,)
        if any(id(t) not in self.names for t in made):
            self.problem = "it returns a tensor from elsewhere"
            return
        names = [self.names[id(t)] for t in made]
        self.results = ", ".join(names) + "," * isinstance(results, tuple | list)
        needed, kept = set(names), []
        for step in reversed(self.steps):
            if step.kept or step.makes & needed:
                needed |= step.needs
                kept.append(step)
        self.steps = kept[::-1]

    def source(self) -> str:
        """The function as Python."""
        lines = [f"def replay({', '.join(f'a{i}' for i in range(self.count))}):"]
        if not INTERPRET:
            lines.append(f"    stream = current_stream({self.device.index})")
        lines += [f"    {step.line}" for step in self.steps]
        return "\n".join([*lines, f"    return {self.results}"])

    def compile(self) -> Callable[..., Any]:
        """What does this again."""
        self.alive.clear()
        space = dict(self.space)
        exec(compile(self.source(), f"<replay of {self.what}>", "exec"), space)
        replay: Callable[..., Any] = space["replay"]
        return replay


def _interpret(this: _launch.Launch, *args: Any) -> None:
    this.kernel[this.grid](*args, **this.constexprs)
