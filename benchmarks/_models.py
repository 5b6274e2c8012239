"""Contests between whole models: one network with equal weights, by everyone's implementation.

The images timed are two distinct ones, again and again, so that logits and gradients of the very
calls that are timed can be held against float64: a mean over copies has the gradients of one.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkern
from vitkern import roofline
from vitkern.kernels._error_budget import error, rounding

from ._contest import Contender, Contest, Ready, Unfit
from ._measure import Call, Ceilings, parity
from .peers.networks import RIVALS, Network, build_ours

# A network for checking the machinery where the real ones would take minutes.
TOY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 10,
}

OURS = "vitkern"

# Whose steps are captured as CUDA graphs where that is asked for; compilers capture by themselves.
GRAPHS = (OURS, "eager", "timm")


@dataclass(frozen=True)
class Precision:
    """Dtype of the weights, and of autocast where that is on."""

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def products(self) -> torch.dtype:
        """The dtype in which products run."""
        return self.autocast or self.weights

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Autocast, or nothing."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


FLOAT32 = Precision("float32", torch.float32)
AUTOCAST = Precision("bf16 autocast", torch.float32, torch.bfloat16)
BFLOAT16 = Precision("bf16", torch.bfloat16)
FLOAT64 = Precision("float64", torch.float64)


@dataclass(frozen=True)
class Setting:
    """What is timed of a model: "forward", without a graph, or "train": forward, loss, backward.

    name: timm's, or "toy". side: of the square images; None for what the name says. graph: replayed
    from CUDA graphs, against others that are; such have groups of their own.
    """

    name: str
    batch: int
    step: str
    precision: Precision = FLOAT32
    side: int | None = None
    graph: bool = False

    def __str__(self) -> str:
        side = "" if self.side is None else f" {self.side} px"
        graph = " CUDA graph" if self.graph else ""
        return f"{self.name}{side} b{self.batch} {self.step} {self.precision.name}{graph}"

    def as_dict(self) -> dict[str, Any]:
        """Its words, for tables."""
        name = self.name if self.side is None else f"{self.name} {self.side} px"
        precision = self.precision.name + (" CUDA graph" if self.graph else "")
        return {"model": name, "batch": self.batch, "step": self.step, "precision": precision}


@lru_cache(maxsize=1)
def ours(name: str, side: int | None = None) -> vitkern.ViT:
    """The network of one timm name ("toy" for `TOY`), with the same random weights every time.

    On the CPU, in float32, and to copy from: it is the same object every time, too.
    """
    options: dict[str, Any] = {} if side is None else {"img_size": side}
    torch.manual_seed(0)
    if name == "toy":
        model = vitkern.ViT(**{**TOY, **options})
    else:
        model = vitkern.create_model(name, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh head is zero in places, and zeros hide mistakes
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    return model


def batch(
    config: vitkern.ViTConfig, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and labels [B]: at most two distinct ones, repeated."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, config.in_chans, *config.img_size, generator=generator)
    labels = torch.randint(0, config.num_classes, (2,), generator=generator)
    nth = torch.arange(size) % 2
    return images.to(device, dtype)[nth.to(device)], labels[nth].to(device)


class Outcome(NamedTuple):
    """What a step computes: logits, d loss / d images, and gradients by parameter."""

    logits: Tensor
    d_images: Tensor
    grads: dict[str, Tensor]


def forward(model: Callable[..., Tensor], images: Tensor, precision: Precision) -> Tensor:
    """Logits, without a graph."""
    with torch.no_grad(), precision.context(images.device):
        return model(images)


def train(
    module: nn.Module, call: Callable[..., Tensor], images: Tensor, labels: Tensor, p: Precision
) -> Tensor:
    """Forward, loss and backward into fresh gradients; optimizers are the same for all models."""
    module.zero_grad(set_to_none=True)
    with p.context(images.device):
        logits = call(images)
        loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    return logits.detach()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that has one; they are taken away from it."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def outcome(
    network: Network, images: Tensor, labels: Tensor, precision: Precision, train_too: bool
) -> Outcome:
    """Of a plain call, without a timer."""
    if not train_too or network.module is None:
        return Outcome(forward(network.call, images, precision), images[:0], {})
    images = images.detach().requires_grad_()
    logits = train(network.module, network.call, images, labels, precision)
    assert images.grad is not None
    return Outcome(logits, images.grad, gradients(network.module))


@lru_cache(maxsize=2)
def reference(
    name: str,
    side: int | None,
    size: int,
    precision: Precision,
    device: torch.device,
    train_too: bool,
) -> Outcome:
    """Of plain PyTorch on as many images."""
    model = ours(name, side)
    eager = vitkern.EagerViT(model.config)
    eager.load_state_dict(model.state_dict())
    eager.to(device, precision.weights)
    images, labels = batch(model.config, size, device, precision.weights)
    return outcome(Network(eager, eager), images, labels, precision, train_too)


def graphed(step: Call) -> Call:
    """`step` as one CUDA graph.

    Raises:
        Unfit: there is no CUDA.
    """
    if not torch.cuda.is_available():
        raise Unfit("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay(kept: Call = step) -> Any:  # the graph reads the weights and images of `step`
        graph.replay()
        return result

    return replay


def start(
    setting: Setting,
    device: torch.device,
    build: Callable[[vitkern.ViT, Precision, torch.device], Network],
    graph: bool,
) -> Ready:
    """Build a network for `setting`; with `graph` as a CUDA graph, ours by `vitkern.capture`.

    Raises:
        Absent, Unfit: why it can't be.
    """
    precision, training = setting.precision, setting.step == "train"
    network = build(ours(setting.name, setting.side), precision, device)
    module = network.module
    if training and module is None:
        raise Unfit("it doesn't train")
    if module is not None:
        module.train(training)
    config = ours_config(setting)
    images, labels = batch(config, setting.batch, device, precision.weights)
    run: Callable[[Tensor], Tensor] = network.call
    if graph and module is not None and build is build_ours and not training:
        graphed(lambda: None)  # there must be a GPU
        with precision.context(device):
            captured = vitkern.capture(module, images, batch_sizes=[setting.batch])
        if captured.problem is not None:
            raise Unfit(f"there is no graph: {captured.problem}")
        run = captured
    if training:
        assert module is not None
        call: Call = partial(train, module, run, images, labels, precision)
    else:
        call = partial(forward, run, images, precision)
    if graph and run is network.call:
        call = graphed(call)

    def check() -> dict[str, Any]:
        distinct = min(setting.batch, 2)
        eager, exact = (
            reference(setting.name, setting.side, distinct, p, device, training)
            for p in (precision, FLOAT64)
        )
        nth = torch.arange(setting.batch, device=device) % distinct
        made, near, true = [call()], [eager.logits[nth]], [exact.logits[nth]]
        own_names = module is not None and set(exact.grads) == set(dict(module.named_parameters()))
        if module is not None and training and not own_names:
            # With names of its own, the gradient to which all others lead stands for them.
            few, classes = batch(config, distinct, device, precision.weights)
            made.append(outcome(network, few, classes, precision, True).d_images)
            near.append(eager.d_images)
            true.append(exact.d_images)
        verdict = parity([m.to(n.dtype) for m, n in zip(made, near, strict=True)], near, true)
        if verdict["ok"] and module is not None and training and own_names:
            return gradient_parity(gradients(module), eager.grads, exact.grads)
        return verdict

    # A graph's memory is set aside before, and an engine's isn't PyTorch's.
    return Ready(call, check, network.note, memory=not graph and module is not None)


def gradient_parity(
    made: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, Any]:
    """`parity` of all parameters' gradients, each relative to its own size, so that none is lost
    among larger ones: the root mean square of their errors, against twice that of eager's."""
    missing = sorted(set(exact) - set(made))
    if missing:
        return {"ok": False, "why": f"no gradient of {missing[0]}, and of {len(missing)} in all"}

    def together(grads: dict[str, Tensor]) -> float:
        return (sum(error(grads[name], x) ** 2 for name, x in exact.items()) / len(exact)) ** 0.5

    own, near = together(made), together(eager)
    allowed = max(2 * near, rounding(next(iter(eager.values())).dtype))
    return {"ok": own <= allowed, "error": own, "budget": allowed, "eager_error": near}


@lru_cache
def ours_config(setting: Setting) -> vitkern.ViTConfig:
    """The network's config."""
    return ours(setting.name, setting.side).config


def contest(setting: Setting, device: torch.device, memory: bool = False) -> Contest:
    """Everyone's implementation of one setting."""
    enter = partial(start, setting, device, graph=setting.graph)
    contenders = {OURS: Contender(partial(enter, build_ours), own=True)}
    for name, rival in RIVALS.items():
        own, eager = name.startswith(OURS), name == "eager"
        contenders[name] = Contender(partial(enter, rival.build), rival.package, own, eager)
    config, training = ours_config(setting), setting.step == "train"

    # The bound is that of kernels without a fault, the same for all contenders.
    works = roofline.works(
        config, setting.batch, "fused", training, precision=setting.precision.name, optimizer=False
    )

    def bound(ceilings: Ceilings) -> float:
        here = roofline.Machine.measured("here", ceilings.flops_per_s, ceilings.bytes_per_s)
        return sum(work.seconds(here) for work in works)

    return Contest(
        level="model",
        group=str(setting),
        case=setting.as_dict(),
        contenders=contenders,
        ours=lambda: OURS,
        flops=sum(work.flops * work.calls for work in works),
        moved=sum(work.bytes * work.calls for work in works),
        bound=bound,
        images=setting.batch,
        memory=memory,
    )
