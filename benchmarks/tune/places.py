"""Where launch configs are tuned: calls of our kernels, the most valuable first.

First come the calls that ViT-B/16 and L/16 make with 256 images under autocast to bfloat16, in
training and without a graph; then all other samples of real models. A run may be cut off after a
minute: so B/16 comes before L/16, what `auto` takes before its rivals, and what all layers take
long, as predicted, before the rest.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitkern.kernels import REGISTRY
from vitkern.kernels._configs import Asked, override, record
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._op import Arg, Op, Sample, dtype_name
from vitkern.kernels._tuned import Key, dtype_of

from .._cases import Case, cases

IMAGES = 256

# Of an H100's data sheet, at what products and copies usually reach of it: these only order calls.
FLOPS_PER_S, BYTES_PER_S = 700e12, 2.8e12


def calls(width: int) -> dict[tuple[str, str], int]:
    """(op, sample): how often a training step calls it for a layer, of 12 of them."""
    layers = {768: 12, 1024: 24}[width]
    qkv = f"ln 64x197x{width} ->  {3 * width} saved given statistics"
    fc1 = f"ln 64x197x{width} -> gelu {4 * width} saved given statistics"
    projection, fc2 = (f"64x197x{k} -> {width} statistics" for k in (width, 4 * width))
    per_layer = [
        ("norm_linear", qkv),
        ("norm_linear_backward", qkv),
        ("norm_linear", fc1),
        ("norm_linear_backward", fc1),
        ("linear_residual", projection),
        ("linear_residual_backward", projection),
        ("linear_residual", fc2),
        ("linear_residual_backward", f"{fc2} behind gelu"),
        ("attention", "B=64 N=197 H=12 d=64"),
        ("attention_backward", "B=64 N=197 H=12 d=64"),
    ]
    once = [
        (op, f"128x3x224x224 /16x16 D={width}") for op in ("patch_embed", "patch_embed_backward")
    ]
    return {**dict.fromkeys(per_layer, layers), **dict.fromkeys(once, 1)}


# What stays float32 under autocast: images, the stream, and parameters that are cast within the op;
# but not the weight of patch_embed_backward, whose gradient, were it float32, would be held against
# a definition that rounds nothing to 16 bits.
FLOAT32 = {
    "patch_embed": ("images", "weight", "bias", "pos_embed", "prefix"),
    "patch_embed_backward": ("grad", "images"),
    "norm_linear": ("x", "norm_weight", "norm_bias"),
    "norm_linear_backward": ("norm_weight", "norm_bias", "d_stream"),
    "linear_residual": ("residual",),
    "linear_residual_backward": ("d_stream",),
}


def under_autocast(op: str, sample: Sample, step: str) -> Sample:
    """The sample as a block under autocast calls the op: samples have one dtype for nearly all.

    The gradient of fc1 comes without z, as that of fc2 has gone through the activation already. A
    step "forward" saves nothing.
    """
    args, options = dict(sample.args), dict(sample.options)
    for name in FLOAT32.get(op, ()):
        arg = args[name]
        if arg is not None and arg.dtype is None:  # bytes stay bytes
            args[name] = replace(arg, dtype=torch.float32)
    options |= dict.fromkeys({"out_dtype", "param_dtype"} & options.keys(), torch.float32)
    if op == "norm_linear_backward":
        args["z"] = None
        options |= {"activation": "", "gated": False}
    if op == "norm_linear":
        options["need_saved"] = step == "train"
    return replace(sample, args=args, options=options)


@dataclass(frozen=True)
class Repeated(Arg):
    """An argument with `times` as many rows or images, the same again and again.

    So the values of a large batch needn't be drawn on the CPU, which would take seconds.
    """

    times: int = 1

    def make(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """The tensor of so many."""
        once = super().make(device, dtype, generator)
        more = once.repeat(self.times, *(1 for _ in self.shape[1:]))
        return more.contiguous(memory_format=torch.channels_last) if self.channels_last else more


def repeated(sample: Sample, times: int) -> Sample:
    """The sample with a larger batch: all whose leading size is the images', or their rows'."""
    first = next(arg for arg in sample.args.values() if arg is not None).shape
    counts = (first[0], first[0] * first[1])

    def larger(arg: Arg | None) -> Arg | None:
        if arg is None or not arg.shape or arg.shape[0] not in counts or arg.shape == first[-1:]:
            return arg
        return Repeated(**vars(arg), times=times)

    return replace(sample, args={name: larger(arg) for name, arg in sample.args.items()})


@dataclass(frozen=True)
class Place:
    """A call of one of our kernels: plain words, as it goes from process to process.

    times: how many times the sample's batch. worth: predicted seconds of such calls. step: "train"
    or "forward", for a call as a model makes it under autocast to `dtype`.
    """

    op: str
    impl: str
    size: str
    label: str
    dtype: str
    times: int = 1
    worth: float = 0.0
    step: str = ""

    def __str__(self) -> str:
        more = f" x{self.times}" if self.times > 1 else ""
        more += f" {self.step} under autocast" if self.step else ""
        return f"{self.op} {self.impl} [{self.label}]{more} {self.dtype}"

    def case(self) -> Case:
        """The op on the sample.

        Raises:
            LookupError: there is none such.
        """
        for sample in REGISTRY[self.op].samples(self.size):
            if sample.label == self.label:
                sample = under_autocast(self.op, sample, self.step) if self.step else sample
                sample = repeated(sample, self.times) if self.times > 1 else sample
                return Case(REGISTRY[self.op], self.size, sample, dtype_of(self.dtype))
        raise LookupError(f"{self.op}: no sample [{self.label}]")

    def launcher(self) -> Any:
        """What launches the kernels."""
        return REGISTRY[self.op].launchers[self.impl]


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


def of_steps(ops: Iterable[Op]) -> list[Place]:
    """The calls of a training step, and of one forward that differ, in the order said above."""
    names, unique = {op.name for op in ops}, dict[Place, Place]()
    for width in (768, 1024):
        found: list[Place] = []
        for (op, label), count in calls(width).items():
            if op not in names:
                continue
            batch = 128 if op.startswith("patch_embed") else 64
            for step in ("train", "forward") if op == "norm_linear" else ("train",):
                place = Place(op, "triton", "vit", label, "bfloat16", IMAGES // batch, step=step)
                worth = count * seconds(place.case())
                found += [replace(place, impl=i, worth=worth) for i in REGISTRY[op].launchers]
        for place in sorted(found, key=lambda place: -place.worth):
            unique.setdefault(replace(place, worth=0.0), place)  # attention is in both
    return sorted(unique.values(), key=lambda place: place.impl != "triton")


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
