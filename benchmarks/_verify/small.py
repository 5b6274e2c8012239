"""The fewest and cheapest calls that together reach every launch config of every kernel.

That is, those that launchers choose for any sample and for the calls that ViT-B/16 and L/16 make
(``tune/places.py``); and those that a table has in place of these.

A tool that instruments kernels makes them 10 to 100 times slower, so it wants small calls; but
large tiles are chosen for large calls only. Two things bring them to small ones: a "vit" sample of
fewer images, and a launcher that chooses as on a card of few multiprocessors, which few rows fill.

All of it is decided on tensors without memory, on any machine. What a launch config is,
``_offline.Job.config_key`` says; which there are, ``_offline.collect``, and for the product in
Gluon, which that leaves out, its launchers on the same samples.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vitkern.kernels import REGISTRY
from vitkern.kernels._configs import TUNABLE, override, record
from vitkern.kernels._launch import Launch, intercept, sm_count
from vitkern.kernels._op import Arg, Op, Sample, dtype_name
from vitkern.kernels._tuned import Table

from .. import _offline
from .._cases import Case, cases, kernel_name
from ..tune import places

# As few as possible first; 132 are an H100's.
PROCESSORS = (1, 2, 4, 8, 16, 33, 66, 132)

STEP = "step"  # the size of what is no sample of an op, but a call of a model's

# Images, and at most so many tokens of each where an op takes tokens one by one.
ROWS = ((1, 64), (1, 256), (1, None), (2, None), (4, None), (8, None), (16, None), (32, None))

# Arguments that are the same for all images.
PARAMETER = re.compile("weight|bias|layer_scale|pos_embed|prefix|mean|std|sin|cos")

# FLOPs that cost as much as what every call costs: compiling, patching, copying.
OVERHEAD = 200_000_000


@dataclass(frozen=True)
class SmallCall:
    """One call of a launcher, and the launches that it makes.

    precision: ``torch.set_float32_matmul_precision``. images, tokens: how many are left of the
    sample's; None: all. processors: multiprocessors of the card that configs are made for. tuned:
    by kernel, a table's config in place of the default, by its fields.
    kernels, configs, keys: of its distinct launches, in order. flops: of the op.
    """

    op: str
    impl: str
    size: str
    sample: str
    dtype: str
    precision: str
    images: int | None
    tokens: int | None
    processors: int
    arch: int
    kernels: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    flops: int = 0
    elements: int = 0
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} {self.impl} [{self.label}] {self.dtype}"

    @property
    def label(self) -> str:
        """The sample, and what was made of it."""
        parts = [self.sample]
        if self.images is not None:
            parts.append(f"{self.images} images")
        if self.tokens is not None:
            parts.append(f"{self.tokens} tokens")
        if self.dtype == "float32" and self.precision != "highest":
            parts.append("TF32")
        parts.append(f"as on {self.processors} SM")
        for kernel, config in self.tuned.items():
            parts.append(f"{kernel} tuned to {' '.join(map(str, config.values()))}")
        return ", ".join(parts)

    def arguments(self, device: str | torch.device) -> dict[str, Any]:
        """The op's own; values are drawn, cast and completed on a CPU, and only then copied.

        Raises:
            ValueError: the op has no such sample.
        """
        here = "meta" if torch.device(device).type == "meta" else "cpu"
        # What a forward pass saves may depend on the card; an interpreter may run it for that.
        with self._on_its_card(Launch.run):
            made = self._sample().make(here, getattr(torch, self.dtype))
        # Channels last and other strides stay as they are.
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}

    def run(self, arguments: dict[str, Any], handle: Callable[[Launch], None]) -> Any:
        """Call the launcher, whose launches go to `handle`: ``Launch.run`` to have them done."""
        with self._on_its_card(handle):
            return places.launchers(REGISTRY[self.op], divmod(self.arch, 10))[self.impl](
                **arguments
            )

    @contextmanager
    def _on_its_card(self, handle: Callable[[Launch], None]) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        tuned = {name: TUNABLE[name].config(**fields) for name, fields in self.tuned.items()}
        card = intercept(handle, divmod(self.arch, 10), self.processors)
        try:
            with torch.no_grad(), card, override(tuned):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _sample(self) -> Sample:
        if self.size == STEP:
            return shrunk(_step_sample(self.op, self.sample, self.arch), self.images, self.tokens)
        for sample in REGISTRY[self.op].samples(self.size):
            if sample.label == self.sample:
                return shrunk(sample, self.images, self.tokens)
        raise ValueError(f"sample: {self.op} has no {self.size} sample {self.sample!r}")


@cache
def _step_sample(op: str, label: str, arch: int) -> Sample:
    with torch.enable_grad(), intercept(lambda launch: None, divmod(arch, 10)):
        return places.step_sample(op, label)


def card(arch: int) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors that configs are made for."""
    capability = divmod(arch, 10)
    with intercept(lambda launch: None, capability):
        return capability, sm_count(torch.device("meta"))


def step_cases(ops: Iterable[Op], arch: int) -> list[Case]:
    """The calls of the models' training and inference, with many images."""
    found = places.of_steps(ops, places.STAGES[0], *card(arch))
    return [replace(p.case(), size=STEP) for p in found if p.impl == "triton"]


def shrunk(sample: Sample, images: int | None, tokens: int | None) -> Sample:
    """`sample` with so many images, of so many tokens each; None leaves them as they are.

    What starts with the sizes of the first tensor shrinks with it, also where images and tokens are
    one size; parameters don't, whose width may happen to be the number of images.
    """
    first = next(arg for arg in sample.args.values() if arg is not None)
    old = first.shape[:2]
    new = (
        old[0] if images is None else min(images, old[0]),
        old[1] if tokens is None else min(tokens, old[1]),
    )
    if new == old:
        return sample

    def shrink(name: str, arg: Arg | None) -> Arg | None:
        if arg is None or arg.values is not None or PARAMETER.search(name):
            return arg
        shape = arg.shape
        if shape[:2] == old:
            return replace(arg, shape=(*new, *shape[2:]))
        if shape[0] == math.prod(old):
            return replace(arg, shape=(math.prod(new), *shape[1:]))
        return replace(arg, shape=(new[0], *shape[1:])) if shape[0] == old[0] else arg

    return replace(sample, args={name: shrink(name, arg) for name, arg in sample.args.items()})


def by_token(op: Op) -> bool:
    """Whether the op takes tokens one by one, so that it may have fewer of them."""
    return not op.name.startswith(("attention", "patch_embed"))


def look(call: SmallCall, case: Case) -> SmallCall | None:
    """`call` with the launches that it makes on such a card; None if it can't be made."""
    seen: list[Launch] = []
    try:
        arguments = call.arguments("meta")
        call.run(arguments, seen.append)
    except Exception:  # a sample that this launcher, or the op with fewer tokens, does not take
        return None
    jobs = {j.config_key: j for j in (_offline.make_job(case, each, call.arch) for each in seen)}
    return replace(
        call,
        kernels=tuple(kernel_name(job.launch) for job in jobs.values()),
        configs=tuple(job.config for job in jobs.values()),
        keys=tuple(jobs),
        flops=case.op.flops(**arguments),
        elements=sum(v.numel() for v in arguments.values() if isinstance(v, Tensor)),
    )


def plain(found: Iterable[Case], arch: int, processors: int) -> Iterator[tuple[SmallCall, Case]]:
    """The calls of these cases as they are, by every launcher, with TF32 and without."""
    for case in found:
        for precision in ("highest", "high") if case.dtype == torch.float32 else ("highest",):
            for impl in places.launchers(case.op, divmod(arch, 10)):
                yield (
                    SmallCall(
                        case.op.name, impl, case.size, case.sample.label, dtype_name(case.dtype),
                        precision, None, None, processors, arch,
                    ),
                    case,
                )  # fmt: skip


def smaller(call: SmallCall, case: Case) -> Iterator[SmallCall]:
    """The same with fewer rows, the fewest first, as on cards of so many multiprocessors."""
    for images, tokens in ROWS:
        if tokens is None or by_token(case.op):
            for processors in PROCESSORS:
                yield replace(call, images=images, tokens=tokens, processors=processors)


@dataclass(frozen=True)
class Survey:
    """Every launch config there is for a card, with the calls that make it at full size.

    tiny: what is known of the calls of the "tiny" samples.
    """

    goals: dict[str, list[tuple[SmallCall, Case]]]
    tiny: list[SmallCall]


def survey(ops: Sequence[Op], arch: int, table: Table | None = None) -> Survey:
    """What the offline compiler finds, Gluon's, those of models' steps, and those of `table`.

    Raises:
        RuntimeError: a launcher fails without a GPU.
    """
    jobs, failed = _offline.collect(ops, [arch], everything=True)
    if failed:
        raise RuntimeError(f"launchers that fail without a GPU: {'; '.join(failed)}")
    goals: dict[str, list[tuple[SmallCall, Case]]] = {job.config_key: [] for job in jobs}
    tiny = []
    known = [*cases(ops, ("tiny", "vit")), *step_cases(ops, arch)]
    for call, case in plain(known, arch, card(arch)[1]):
        for each in (call, *(as_tuned(call, table) if table is not None else ())):
            looked = look(each, case)
            if looked is not None:
                tiny += [looked] if call.size == "tiny" else []
                for key in looked.keys:
                    goals.setdefault(key, []).append((each, case))
    return Survey(goals, tiny)


def as_tuned(call: SmallCall, table: Table) -> Iterator[SmallCall]:
    """The call with each config that the table has for it in place of the default."""
    try:
        with record() as asked:
            call.run(call.arguments("meta"), lambda launch: None)
    except Exception:  # a sample that this launcher does not take
        return
    for key, question in {question.key: question for question in asked}.items():
        kernel, default = TUNABLE[key[0]], question.default
        config, _ = kernel.measured(table, key, default, question.candidates)
        if config != default:
            yield replace(call, tuned={key[0]: asdict(config)})


def small_calls(
    ops: Iterable[Op], capability: tuple[int, int], table: Table | None = None
) -> list[SmallCall]:
    """Calls that reach every launch config for a card of this compute capability, cheapest first.

    Raises:
        ValueError: there are no kernels for such a card.
    """
    arch = 10 * capability[0] + capability[1]
    if arch not in _offline.MULTIPROCESSORS:
        known = ", ".join(map(str, _offline.MULTIPROCESSORS))
        raise ValueError(f"capability: expected one of {known}, got {arch}")
    ops = list(ops)
    return fewest(survey(ops, arch, table), ops, arch)


def fewest(found: Survey, ops: Sequence[Op], arch: int) -> list[SmallCall]:
    """Few and cheap calls that reach all of these configs."""
    goals, candidates = found.goals, list(found.tiny)
    few = (look(call, case) for call, case in plain(cases(ops, ("tiny",)), arch, 1))
    candidates += [call for call in few if call is not None]
    open_keys = goals.keys() - {key for call in candidates for key in call.keys}
    for key in goals:  # in order, so that every machine finds the same calls
        if key in open_keys:
            more = _cheapest(key, goals[key])
            candidates += more
            open_keys -= {k for call in more for k in call.keys}
    return _cover(candidates, set(goals))


def _cheapest(key: str, sources: list[tuple[SmallCall, Case]]) -> list[SmallCall]:
    """The smallest call that reaches this config: of each source, or if none does, as it is."""
    found = []
    for call, case in sources:
        for candidate in (*smaller(call, case), call):
            looked = look(candidate, case)
            if looked is not None and key in looked.keys:
                found.append(looked)
                break
    return sorted(found, key=lambda c: c.flops)[:1]


def _cost(call: SmallCall) -> int:
    return OVERHEAD + call.flops + 10 * call.elements


def _cover(candidates: list[SmallCall], goals: set[str]) -> list[SmallCall]:
    """Few of them that reach all of `goals` that any reaches: the most for its cost each time."""
    chosen = []
    left = [(c, goals & set(c.keys)) for c in candidates]
    while left := [(c, keys) for c, keys in left if keys]:
        best, reached = max(left, key=lambda pair: len(pair[1]) / _cost(pair[0]))
        chosen.append(best)
        left = [(c, keys - reached) for c, keys in left]
    return sorted(chosen, key=_cost)
