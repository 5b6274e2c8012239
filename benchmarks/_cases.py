"""Which calls are looked at: every op in REGISTRY, its samples, and the dtypes its kernels take.

What is timed: of a forward op, each implementation on the op's arguments. Those of a backward op
are no rivals of our kernel, since they run the forward pass again or follow the definition. The
rivals are the backward passes of the forward op's implementations: each builds its graph once, and
what is timed is autograd's way back through it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.error_budget import as_tuple
from vitkern import kernels
from vitkern._table import columns as columns
from vitkern.kernels import REGISTRY
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._op import Op, Sample, dtype_name

DTYPES = (torch.bfloat16, torch.float32, torch.float16)

# Floating-point arguments that have no gradient.
CONSTANTS = frozenset({"mean", "std", "drop_scale", "sin", "cos", "stats"})


def public(op: Op, impl: str) -> Callable[..., Any]:
    """The public function of a forward op, called with the op's own arguments."""
    function, to_public = getattr(kernels, op.name), op.to_public

    def call(**arguments: Any) -> Any:
        return function(**to_public(arguments), impl=impl)

    return call


def require_grads(
    arguments: dict[str, Any], constants: Collection[str] = CONSTANTS
) -> dict[str, Any]:
    """Every floating-point argument wants a gradient, but for those that are constants."""
    return {
        k: v.detach().requires_grad_()
        if isinstance(v, Tensor) and v.is_floating_point() and k not in constants
        else v
        for k, v in arguments.items()
    }


@dataclass(frozen=True)
class Case:
    """One op on one sample in one dtype."""

    op: Op
    size: str
    sample: Sample
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op.name} [{self.sample.label}] {dtype_name(self.dtype)}"

    def as_dict(self) -> dict[str, Any]:
        """Its words, for tables."""
        dtype = dtype_name(self.dtype)
        return {"op": self.op.name, "sample": self.sample.label, "dtype": dtype}

    def meta(self) -> dict[str, Any]:
        """The op's arguments without memory or values, so that large samples cost nothing."""
        return self.sample.make("meta", self.dtype)

    @property
    def is_backward(self) -> bool:
        """Whether the op is the backward pass of another."""
        return self.op.backward_of is not None

    @property
    def forward(self) -> "Case":
        """The case whose gradients a backward case computes; a forward case is its own.

        Both ops yield their samples in one order, and under one label, to which the backward op
        may add what it was given of the forward pass.
        """
        if self.op.backward_of is None:
            return self
        op = REGISTRY[self.op.backward_of]
        pairs = zip(self.op.samples(self.size), op.samples(self.size), strict=True)
        sample = {own.label: theirs for own, theirs in pairs}[self.sample.label]
        if not self.sample.label.startswith(sample.label):
            raise ValueError(f"{self}: the sample of {op.name} there is [{sample.label}]")
        return replace(self, op=op, sample=sample)

    def arguments(self, device: str | torch.device) -> dict[str, Any]:
        """Those of the forward op; in a backward case they want the gradients that it computes."""
        arguments = self.forward.sample.make(device, self.dtype)
        if not self.is_backward:
            return arguments
        needed = self.sample.options  # need_images, say
        unneeded = (name for name in arguments if not needed.get(f"need_{name}", True))
        return require_grads(arguments, CONSTANTS.union(unneeded))


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
    """Every op with every sample of these sizes in every dtype it is for; all of one size first."""
    ops, dtypes = tuple(ops), tuple(dtypes)
    for size in sizes:
        for op in ops:
            for sample in op.samples(size):
                for dtype in dtypes:
                    if sample.dtypes is None or dtype in sample.dtypes:
                        yield Case(op, size, sample, dtype)


def dealt(found: Iterable[Case]) -> list[Case]:
    """The first case of every op, then the second of every op, and so on."""
    seen: Counter[str] = Counter()
    numbered = []
    for case in found:
        numbered.append((seen[case.op.name], case))
        seen[case.op.name] += 1
    return [case for _, case in sorted(numbered, key=lambda pair: pair[0])]


def launches(case: Case, capability: tuple[int, int]) -> list[Launch]:
    """What `case` would launch on a card of `capability`, by all of our kernels that do it."""
    seen: list[Launch] = []
    with intercept(seen.append, capability):
        for launcher in case.op.launchers.values():
            launcher(**case.meta())
    return seen


def kernel_name(launch: Launch) -> str:
    """ "attention.forward_kernel": two ops may give their kernels one name."""
    function = launch.kernel.fn
    place = function.__module__.removeprefix("vitkern.kernels.").split(".")[0]
    return f"{place.strip('_')}.{function.__name__.strip('_')}"


def implementations(case: Case) -> dict[str, Callable[..., Any]]:
    """By name, what `timed` takes: the op's own; in a backward case the public forward function."""
    op = case.forward.op
    if case.is_backward:
        return {impl: public(op, impl) for impl in op.implementations}
    return op.implementations


def unfit(case: Case, impl: str, arguments: dict[str, Any]) -> str | None:
    """Why `impl` can't run here, in the words of the public function; None where it can.

    Any other error is for the call itself to raise.
    """
    try:
        public(case.forward.op, impl)(**arguments)
    except Exception as problem:
        return str(problem) if "can't run here" in str(problem) else None
    return None


def timed(case: Case, function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    """The call to time: `function`, or in a backward case autograd from what it returned once.

    The gradients that this starts from are the same for every implementation.
    """
    if not case.is_backward:
        return partial(function, **arguments)
    with torch.enable_grad():
        outputs = as_tuple(function(**arguments))
    wanted = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(1)
    grads = [
        # In float64, too, they are values of the dtype under test.
        torch.randn(o.shape, generator=generator, device=device).to(case.dtype).to(o.dtype)
        for o in outputs
    ]
    return partial(torch.autograd.grad, outputs, wanted, grads, retain_graph=True)


def results(
    case: Case, function: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What the call to time returns."""
    with torch.no_grad():
        return as_tuple(timed(case, function, arguments)())


def save(path: Path, text: str) -> None:
    """Write a file, and the folders on the way to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
