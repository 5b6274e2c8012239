"""Where launch configs are tuned: calls of our kernels, the most valuable first.

First come the calls that ViT-B/16 and L/16 make under autocast to bfloat16: those of a training
step and of inference with 256 images, then of inference with 1 and with 32. Nobody lists them: the
models run, on tensors that nothing is written to, and what they call is taken down, so that nothing
can be forgotten. Then come all other samples of real models. A run may be cut off after a minute:
so trifles come last, B/16 before L/16, what `auto` takes before its rivals, and what takes long, as
predicted, before the rest.
"""

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vitkern
from vitkern.kernels import REGISTRY
from vitkern.kernels._configs import Asked, override, record
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._op import Arg, Op, Sample, dtype_name
from vitkern.kernels._triton import gluon
from vitkern.kernels._tuned import Key, dtype_of

from .._cases import Case, cases

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")
POOLS = ("token", "avg")  # with which the last block differs
STAGES = (((256, True), (256, False)), ((1, False), (32, False)))  # images, and whether they train

Batches: TypeAlias = Iterable[tuple[int, bool]]

# Blocks: the first, the last, the one before that, and one that stands for all others.
DEPTH = 4

TRIFLE = 0.01  # of what a model's longest call takes

# Of an H100's data sheet, at what products and copies usually reach of it: these only order calls.
FLOPS_PER_S, BYTES_PER_S = 700e12, 2.8e12


@dataclass(frozen=True)
class Laid(Arg):
    """An argument as a model gave it, with its strides; large ones are drawn where they lie."""

    strides: tuple[int, ...] = ()

    def make(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """The tensor, on the device: on a CPU the values of a large batch would take seconds."""
        dtype = self.dtype or dtype
        # What is the same all along a dimension lies there once.
        shape = [
            1 if stride == 0 else n for n, stride in zip(self.shape, self.strides, strict=True)
        ]
        made = torch.empty_strided(shape, self.strides, dtype=dtype, device=device)
        if device.type != "meta":
            seed = int(torch.randint(1 << 31, (), generator=generator))
            own = torch.Generator(device).manual_seed(seed)
            values = torch.randn(shape, generator=own, device=device)
            made.copy_(values.mul_(self.scale).add_(self.offset))
        return made.expand(self.shape)


def laid(t: Tensor) -> Laid:
    """What makes a tensor of the form of `t`."""
    return Laid(tuple(t.shape), t.dtype, strides=tuple(t.stride()))


class Call(NamedTuple):
    """A call of an operator: by the names of its arguments what makes a tensor, or the value."""

    op: str
    given: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        """What tells it from others of its op: shapes, options that are set, tensors that came."""
        args = {name: arg for name, arg in self.given if isinstance(arg, Arg)}
        first = next(iter(args))
        shapes = ["x".join(map(str, args[n].shape)) for n in (first, "weight") if n in args]
        words = [v for _, v in self.given if isinstance(v, str) and v]
        flags = [name for name, value in self.given if value is True]
        others = [name for name in args if name != first and not name.endswith(("weight", "bias"))]
        return " ".join([*dict.fromkeys(shapes), *words, *flags, *others])

    def sample(self, label: str) -> Sample:
        """The values are drawn, and derived, as those of the sample most like it.

        Raises:
            LookupError: what is to be derived is not what came.
        """
        given = dict(self.given)

        def likeness(sample: Sample) -> tuple[int, ...]:
            made = sample.make("meta", torch.bfloat16)
            pairs = [(given[name], made[name]) for name in sample.args]
            there = sum((ours is None) == (theirs is None) for ours, theirs in pairs)
            options = sum(given[name] == made[name] for name in sample.options)
            alike = sum(o.shape[1:] == t.shape[1:] for o, t in pairs if o is not None is not t)
            return there - len(pairs), options, alike

        for like in sorted(REGISTRY[self.op].samples("vit"), key=likeness, reverse=True):
            args: dict[str, Arg | None] = {}
            for name, other in like.args.items():
                arg: Laid | None = given[name]
                if arg is not None and other is not None:
                    arg = replace(arg, scale=other.scale, offset=other.offset)
                args[name] = arg
            # Its gradient, were it float32, would be held against a definition that rounds nothing.
            if self.op == "patch_embed_backward":
                args["weight"] = replace(given["weight"], dtype=given["compute_dtype"])
            found = Sample(label, args, {name: given[name] for name in like.options}, like.derive)
            made = found.make("meta", torch.bfloat16)
            if all((made[name] is None) == (given[name] is None) for name in args):
                return found
        raise LookupError(f"{self.op}: no sample derives the tensors that {self} has")


class _Calls(TorchDispatchMode):
    """Takes down the calls of our operators, whose results nobody writes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = {op.call: op for op in REGISTRY.values()}
        self.found: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        op = self.ops.get(func)
        if op is None:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(op.reference).bind(*args, **(kwargs or {})).arguments
        made = ((k, laid(v) if isinstance(v, Tensor) else v) for k, v in given.items())
        self.found.append(Call(op.name, tuple(made)))
        return op.fake(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """A forward pass of a model, with its backward pass if it trains."""

    model: str
    images: int
    train: bool
    pool: str = "token"

    def __str__(self) -> str:
        what = "train" if self.train else "forward"
        return f"{self.model.split('_')[1]} b{self.images} {what} {self.pool}"

    def calls(self, dtype: torch.dtype = torch.bfloat16, **config: Any) -> list[Call]:
        """All calls of our operators, by our kernels, under autocast to `dtype`, in order.

        The card is that of `intercept`: what is saved for backward may depend on it. `config`: of
        the model, in place of the preset's.
        """
        ours = {op.name for op in REGISTRY.values() if op.launcher and op.backward_of is None}
        own = {"depth": DEPTH, "img_size": 224, "global_pool": self.pool, **config}
        with torch.device("meta"):  # so that no weight is drawn
            model = vitkern.create_model(self.model, impl=dict.fromkeys(ours, "triton"), **own)
        # Memory that nobody writes to is promised only. "meta" knows no autocast.
        model.to_empty(device="cpu")
        images = torch.empty(self.images, 3, own["img_size"], own["img_size"])
        with _Calls() as calls, torch.set_grad_enabled(self.train):
            with torch.autocast("cpu", dtype):
                logits = model(images)
            if self.train:
                logits.float().sum().backward()
        return calls.found


def steps(batches: Batches) -> list[list[Step]]:
    """Those of each model."""
    pairs = [(images, train, pool) for images, train in batches for pool in POOLS]
    return [[Step(model, *pair) for pair in pairs] for model in MODELS]


def step_sample(op: str, label: str) -> Sample:
    """The call of a model's first stage that has this label, on the card of `intercept`.

    Raises:
        LookupError: there is none such.
    """
    for step in (step for each in steps(STAGES[0]) for step in each):
        if label.startswith(f"{step} "):
            for call in step.calls():
                if (call.op, f"{step} {call}") == (op, label):
                    return call.sample(label)
    raise LookupError(f"{op}: no step calls it as [{label}]")


@dataclass(frozen=True)
class Place:
    """A call of one of our kernels, as it goes from process to process.

    label: of one of the op's samples of this `size`, or of the `sample` that came along. worth:
    predicted seconds of such calls.
    """

    op: str
    impl: str
    size: str
    label: str
    dtype: str
    worth: float = 0.0
    sample: Sample | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.impl} [{self.label}] {self.dtype}"

    def case(self) -> Case:
        """The op on the sample.

        Raises:
            LookupError: there is none such.
        """
        op, dtype = REGISTRY[self.op], dtype_of(self.dtype)
        for sample in (self.sample,) if self.sample is not None else op.samples(self.size):
            if sample.label == self.label:
                return Case(op, self.size, sample, dtype)
        raise LookupError(f"{self.op}: no sample [{self.label}]")

    def launcher(self) -> Any:
        """What launches the kernels."""
        op = REGISTRY[self.op]
        return {**op.launchers, **op.kernel_peers}[self.impl]


def looked_at(
    place: Place, target: tuple[int, int], processors: int, configs: Mapping[Key, Any]
) -> list[tuple[Asked, list[Launch]]]:
    """What the call asks, and what it launches for each answer, on a card that isn't here."""
    launches: list[tuple[int, Launch]] = []
    case, launcher = place.case(), place.launcher()
    with record() as asked, override(configs):

        def seen(launch: Launch) -> None:
            launches.append((len(asked) - 1, launch))

        with intercept(seen, target, processors):
            launcher(**case.meta())
    found: dict[Key, tuple[Asked, list[Launch]]] = {}
    for number, question in enumerate(asked):
        own = [launch for n, launch in launches if n == number]
        found.setdefault(question.key, (question, []))[1].extend(own)
    return list(found.values())


def seconds(case: Case) -> float:
    """How long a call takes, as predicted."""
    arguments = case.meta()
    flops, moved = case.op.flops(**arguments), case.op.bytes_moved(**arguments)
    return max(flops / FLOPS_PER_S, moved / BYTES_PER_S)


def of_steps(
    ops: Iterable[Op], batches: Batches, target: tuple[int, int], processors: int
) -> list[Place]:
    """The calls of the models' steps with these batches on such a card, in the order said above."""
    names, found = {op.name for op in ops}, list[tuple[bool, Place]]()
    with intercept(lambda launch: None, target, processors):
        for each in steps(batches):
            own = dict[Call, Place]()
            for step in each:
                for call, count in Counter(step.calls()).items():
                    if call.op in names and call not in own:
                        sample = call.sample(f"{step} {call}")
                        place = Place(
                            call.op, "triton", "vit", sample.label, "bfloat16", 0.0, sample
                        )
                        own[call] = replace(place, worth=count * seconds(place.case()))
            ordered = sorted(own.values(), key=lambda place: -place.worth)
            found += [(place.worth < TRIFLE * ordered[0].worth, place) for place in ordered]
    everywhere = [
        (trifle, impl != "triton", replace(place, impl=impl))
        for trifle, place in found
        for impl in launchers(REGISTRY[place.op], target)
    ]
    return [place for *_, place in sorted(everywhere, key=lambda one: one[:2])]


def launchers(op: Op, target: tuple[int, int]) -> dict[str, Any]:
    """Those of all of our kernels, Gluon's among them where they can run."""
    absent = gluon().missing is not None or target != (9, 0)
    peers = op.kernel_peers.items()
    return op.launchers | {name: f for name, f in peers if name == "gluon" and not absent}


@dataclass(frozen=True)
class StepCase(Case):
    """A call of a model's, for all implementations; `given`: the forward call of a backward one."""

    given: Case | None = None

    @property
    def forward(self) -> Case:
        """The case whose gradients a backward case computes; a forward case is its own."""
        return self if self.given is None else self.given


def step_cases(
    ops: Iterable[Op], batches: Batches, target: tuple[int, int], processors: int
) -> list[StepCase]:
    """The calls of the models' steps, of a training step by the backward pass of each."""
    names, found = {op.name for op in ops}, dict[Any, StepCase]()

    def case(call: Call, label: str, given: Case | None = None) -> StepCase:
        op = REGISTRY[call.op]
        return StepCase(op, "vit", call.sample(label), torch.bfloat16, given)

    with intercept(lambda launch: None, target, processors):
        for step in (step for each in steps(batches) for step in each):
            calls = step.calls()
            for op in (REGISTRY[name] for name in dict.fromkeys(call.op for call in calls)):
                if op.name not in names or step.train == (op.backward_of is None):
                    continue
                own = [call for call in calls if call.op == op.name]
                # Backward comes back the way that forward went.
                there = [call for call in reversed(calls) if call.op == op.backward_of]
                for call, forward in zip(own, there or own, strict=True):
                    shown = REGISTRY[forward.op].to_public(dict(forward.given))
                    key, label = (op.name, *shown.items()), f"{step} {forward}"
                    if key not in found:
                        given = case(forward, label) if there else None
                        found[key] = case(call, label, given)
        # A label begins with the model's name.
        order = [str(each[0]).split()[0] for each in steps(batches)]
        return sorted(
            found.values(), key=lambda c: (order.index(c.sample.label.split()[0]), -seconds(c))
        )


def of_samples(ops: Iterable[Op], size: str, dtypes: Iterable[torch.dtype]) -> Iterator[Place]:
    """The calls of all samples, dtype by dtype; of real models the longest first."""
    ops = list(ops)
    for dtype in dtypes:
        found = [
            Place(c.op.name, impl, size, c.sample.label, dtype_name(dtype), worth=seconds(c))
            for c in cases(ops, [size], [dtype])
            for impl in c.op.launchers
        ]
        yield from sorted(found, key=lambda place: -place.worth) if size == "vit" else found
