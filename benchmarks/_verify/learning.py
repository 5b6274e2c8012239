"""Training beside eager PyTorch: what is learned is the same.

Two networks, that of the digits and ViT-B/16 on photographs, train from the same weights on the
same batches, in bfloat16 autocast with float32 weights (AdamW, warm-up, cosine, clipping):

    eager float32        TF32 off: the curve that all would follow without rounding
    eager                bfloat16
    eager, nudged 1..3   the same, from weights that differ by less than bfloat16 can tell
    vitkern              bfloat16, each op's implementation as `auto` takes it

Training is chaotic: rounding makes two correct runs drift apart, and Adam hides a gradient that is
wrong by a factor. So the verdict has two halves, and neither has a tolerance picked by hand:

Gradients, where nothing has drifted yet. At three points of our run, the first, the middle and the
last, the weights are given to all. Every parameter's gradient is at most twice as far from
float32's as eager's is.

The curve. Its distance from float32's (root mean square over the steps, both smoothed) is at most
twice that of the farthest eager bfloat16 run: those are samples of what correct runs do. This sees
what three points can't: what happens now and then, or piles up.

Both were tried on a CPU, on small versions, with eager rounded at other places in place of ours. By
gradients from 8 batches one run of 23 was called wrong, and by the curve none (at most 0.8 of its
budget); hence the 24 batches of today. Which planted faults are found, and by which half,
tests/test_training.py shows.

DropPath drops the same samples in all: it draws alike, and is seeded anew in every step.
"""

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkern
from vitkern.kernels._error_budget import error, rounding
from vitkern.kernels._verified import KERNELS

from .._contest import Row, failure

TRAINING, GRADIENTS = "training", "training gradients"  # kinds of rows
OURS, EAGER, FLOAT32 = "vitkern", "eager", "eager float32"
NUDGED = tuple(f"eager, nudged {n}" for n in (1, 2, 3))
# Ours before the last samples of eager: where time runs out, those are what can be spared.
ORDER = (FLOAT32, EAGER, NUDGED[0], OURS, *NUDGED[1:])
EAGERS = (FLOAT32, EAGER, *NUDGED)
FACTOR = 2.0  # times what eager is off by
WINDOW = 10  # steps of the moving mean


class Data(NamedTuple):
    """Images, uint8 [B, C, H, W], and labels, int64 [B], for training and for the test."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Task:
    """One network and what it learns.

    rate: the highest of the schedule. data: by seed. looks: batches in which gradients are held
    against float32's; of 8, an unlucky half made a correct gradient 2.1 times as wrong as eager's,
    where of 32 none was more than 1.3 times.
    """

    what: str
    config: Mapping[str, Any]
    batch: int
    rate: float
    data: Callable[[int], Data]
    looks: int = 24

    def __str__(self) -> str:
        """ "12 blocks of 768, 224 px"."""
        config = vitkern.ViTConfig(**self.config)
        return f"{config.depth} blocks of {config.embed_dim}, {config.img_size[0]} px"


def digits(seed: int) -> Data:
    """Handwritten digits, those for training eight times, each moved by up to a pixel."""
    from vitkern import demo

    images, labels, *test = demo.load(seed)
    generator = torch.Generator().manual_seed(seed)
    moved = torch.cat([demo.shifted(images, generator) for _ in range(8)])
    return Data(moved, labels.repeat(8), *test)


def photographs(seed: int, size: int, count: int) -> Data:
    """Crops of photographs: which is it from?"""
    from . import photographs as source

    photos = list(source.photographs().values())
    train = source.crops(photos, count, size, seed)
    return Data(*train, *source.crops(photos, max(64, count // 4), size, seed, test=True))


# LayerScale starts at 0.1: at 1e-5, as in large models, 200 steps would hardly use the blocks.
_VIT: dict[str, Any] = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12}
_VIT |= {"num_heads": 12, "num_classes": 10, "init_values": 0.1, "drop_path_rate": 0.1}
_VIT |= {"mean": 0.45, "std": 0.27}
_DIGITS: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 64}
_DIGITS |= {"depth": 3, "num_heads": 4, "num_classes": 10}
_DIGITS |= {"class_token": False, "global_pool": "avg"}

# 200 steps of B/16 in float32 are 1 PFLOP, which should take an H100 25 s: a prediction, and more
# than a third of the whole.
TASKS = {
    task.what: task
    for task in (
        Task("digits", _DIGITS, 128, 4e-3, digits),
        Task(
            *("vit_base_patch16_224", _VIT, 48, 5e-4),
            partial(photographs, size=224, count=1024),
        ),
    )
}


def rehearsal(task: Task) -> Task:
    """The same on a scale for a CPU."""
    if task.what == "digits":
        return replace(task, batch=64, looks=4)
    small = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2}
    data = partial(photographs, size=64, count=256)
    return replace(task, config={**task.config, **small}, batch=32, rate=2e-3, data=data, looks=4)


# One run

Weights = dict[str, Tensor]


def first_weights(task: Task, seed: int, nudged: int = 0) -> Weights:
    """Where a run starts.

    All are moved a little from what they start at, since zeros hide mistakes: behind a head of
    zeros no parameter has a gradient. nudged: number of the nudge, of 1e-6 of a weight.
    """
    torch.manual_seed(seed)
    weights = vitkern.ViT(**task.config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        weight += 0.02 * torch.randn(weight.shape, generator=generator)
    generator.manual_seed(nudged)
    for weight in weights.values() if nudged else ():
        weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=generator)
    return weights


def build(task: Task, impl: str, weights: Weights, device: torch.device) -> nn.Module:
    """The network as `impl` computes it, on these weights."""
    model = vitkern.ViT(**task.config)
    built: nn.Module = model if impl == OURS else vitkern.EagerViT(model.config)
    built.load_state_dict(weights)
    return built.to(device).train()


def dtype_of(impl: str) -> torch.dtype:
    """What its products run in."""
    return torch.float32 if impl == FLOAT32 else torch.bfloat16


def logits(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32, of a network run under autocast."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        found: Tensor = model(images)
    return found.float()


def schedule(count: int, batch: int, steps: int, seed: int) -> Tensor:
    """Which images are in each step's batch, [steps, batch]: everyone's, in the same order."""
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps * batch / count)
    order = [torch.randperm(count, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[: steps * batch].view(steps, batch)


class Course(NamedTuple):
    """losses: of the steps taken. weights: at the steps that were asked for, by step."""

    losses: list[float]
    accuracy: float
    seconds: float
    weights: dict[int, Weights]


def train(
    model: nn.Module,
    dtype: torch.dtype,
    task: Task,
    data: Data,
    steps: int,
    seed: int,
    late: Callable[[], bool] = lambda: False,
    keep: Sequence[int] = (),
) -> Course:
    """Train on data that is on the model's device. late: whether to stop before the last step."""
    device = data.images.device
    order = schedule(len(data.images), task.batch, steps, seed).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=task.rate, weight_decay=0.05, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=task.rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    losses, kept = torch.empty(steps, device=device), {}
    # Compile kernels and fill caches before the clock runs.
    F.cross_entropy(logits(model, data.images[order[0]], dtype), data.labels[order[0]]).backward()
    synchronize(device)
    start, done = time.monotonic(), 0
    for step, chosen in enumerate(order):
        if late():
            break
        if step in keep:
            kept[step] = snapshot(model)
        torch.manual_seed(seed * 1_000_003 + step)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(model, data.images[chosen], dtype), data.labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        losses[step] = loss.detach()  # no .item(): the host runs ahead of the device
        done += 1
    synchronize(device)
    seconds = time.monotonic() - start
    if steps in keep:
        kept[steps] = snapshot(model)
    model.eval()
    with torch.no_grad():
        found = [logits(model, part, dtype).argmax(1) for part in data.test_images.split(64)]
    right = (torch.cat(found) == data.test_labels).double().mean().item()
    return Course(losses[:done].tolist(), right, seconds, kept)


def snapshot(model: nn.Module) -> Weights:
    """The weights as they are now."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gradients(
    model: nn.Module, dtype: torch.dtype, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Of every parameter; zeros where there is none."""
    loss = F.cross_entropy(logits(model, images, dtype), labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def gradient_check(
    task: Task, weights: Weights, data: Data, device: torch.device, seed: int, build: "Build"
) -> Row:
    """Every parameter's gradient held against float32's, and the one nearest to its budget.

    An error is the median of those in several batches, as in a single one a rounding error that
    all parameters share can make a correct one twice as wrong as another.

    Returns:
        "ok"; "worst", with its "error" and "budget"; "errors": of ours and of eager, by parameter.
    """
    models = {impl: build(task, impl, weights, device) for impl in (OURS, EAGER, FLOAT32)}
    found: dict[str, list[tuple[float, float]]] = {}
    order = schedule(len(data.images), task.batch, task.looks, seed + 1).to(device)
    for number, chosen in enumerate(order):
        grads = []
        for impl, model in models.items():
            torch.manual_seed(number)
            images, labels = data.images[chosen], data.labels[chosen]
            grads.append(gradients(model, dtype_of(impl), images, labels))
        for name, true in grads[2].items():
            pair = (error(grads[n][name], true.double()) for n in (0, 1))
            found.setdefault(name, []).append((next(pair), next(pair)))
    errors, worst, highest = {}, {}, -1.0
    for name, pairs in found.items():
        own, near = (torch.tensor(each).median().item() for each in zip(*pairs, strict=True))
        allowed = max(FACTOR * near, rounding(torch.float32))
        errors[name] = [own, near]
        ratio = own / allowed if math.isfinite(own) else math.inf
        if ratio > highest:
            highest, worst = ratio, {"worst": name, "error": own, "budget": allowed}
    return {"ok": highest <= 1, **worst, "errors": errors}


# The verdict


def smoothed(losses: Sequence[float]) -> Tensor:
    """Moving mean, float64."""
    return torch.tensor(losses, dtype=torch.float64).unfold(0, min(WINDOW, len(losses)), 1).mean(1)


def distance(losses: Sequence[float], others: Sequence[float]) -> float:
    """Root mean square of the difference of two curves, over the steps that both have."""
    steps = min(len(losses), len(others))
    gap = smoothed(losses[:steps]) - smoothed(others[:steps])
    return gap.square().mean().sqrt().item()


def verdict(courses: Mapping[str, Row], checks: Sequence[Row]) -> Row:
    """What the runs of one task say. ok: None where they don't suffice to tell.

    Few of eager's runs don't: now and then a correct one is four times as far off as others.

    Args:
        courses: rows of runs, by impl.
        checks: those of gradients.
    """
    missing = [impl for impl in (FLOAT32, EAGER, OURS) if not courses.get(impl, {}).get("losses")]
    if missing:
        return {"ok": None, "why": f"no run of {', '.join(missing)}"}
    losses = {
        impl: row["losses"]
        for impl, row in courses.items()
        if impl not in NUDGED or len(row["losses"]) == row["steps"]
    }
    asked, steps = courses[OURS]["steps"], min(map(len, losses.values()))
    exact = {impl: distance(each[:steps], losses[FLOAT32]) for impl, each in losses.items()}
    samples = {impl: found for impl, found in exact.items() if impl not in (OURS, FLOAT32)}
    allowed = FACTOR * max(samples.values())
    start, end = smoothed(losses[FLOAT32])[[0, -1]].tolist()
    row: Row = {"compared_steps": steps, "distance": exact[OURS], "budget": allowed}
    row |= {"eager_distances": samples, "accuracy": {k: c["accuracy"] for k, c in courses.items()}}
    wrong = [
        f"gradient of {check['worst']} at step {check['step']}: error {check['error']:.1e}, "
        f"budget {check['budget']:.1e}"
        for check in checks
        if not check["ok"]
    ]
    far = f"the curve is {exact[OURS]:.1e} from float32's, budget {allowed:.1e}"
    if not exact[OURS] <= allowed:  # NaN is no less than anything
        if not wrong and math.isfinite(exact[OURS]) and len(samples) < len(EAGERS) - 1:
            return {**row, "ok": None, "why": f"{far} by {len(samples)} of eager's runs"}
        wrong.append(far)
    if wrong:
        return {**row, "ok": False, "why": "; ".join(wrong)}
    if not checks or steps < asked / 2:
        return {**row, "ok": None, "why": f"out of time after {steps} of {asked} steps"}
    if not end < 0.95 * start:
        return {**row, "ok": None, "why": f"float32 learned nothing: loss {start:.3f}, {end:.3f}"}
    near = max(checks, key=lambda check: check["error"] / check["budget"])
    why = f"{far}; nearest to its budget, the gradient of {near['worst']}: "
    why += f"{near['error']:.1e} of {near['budget']:.1e}"
    return {**row, "ok": True, "why": why}


@contextmanager
def exact_float32() -> Iterator[None]:
    """Without TF32."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


Build = Callable[[Task, str, Weights, torch.device], nn.Module]


def hold(
    task: Task,
    device: torch.device,
    steps: int,
    seed: int = 0,
    known: Mapping[str, Row] | None = None,
    late: Callable[[], bool] = lambda: False,
    build: Build = build,
) -> Iterator[Row]:
    """Every run of a task and its verdict, a row each, as they come.

    Args:
        known: eager's runs from before, by impl, which are not done again.
        build: makes a network; another than this module's, to plant a fault.
    """
    data = Data(*(part.to(device) for part in task.data(seed)))
    courses, checks, points = dict(known or {}), [], (0, steps // 2, steps)
    alike: Row = {"kind": TRAINING, "what": task.what, "seed": seed, "batch": task.batch}
    alike |= {"steps": steps, "network": str(task)}
    for impl in ORDER:
        if impl in courses or late():
            continue
        dtype, nudged = dtype_of(impl), 1 + NUDGED.index(impl) if impl in NUDGED else 0
        row = {**alike, "impl": impl, "dtype": str(dtype).removeprefix("torch.")}
        try:
            model = build(task, impl, first_weights(task, seed, nudged), device)
            if impl == OURS:
                with torch.autocast(device.type, dtype):
                    explained = vitkern.explain(model, data.images[: task.batch]).rows
                row["implementations"] = {each.op: each.implementation for each in explained}
            with exact_float32():
                keep = points if impl == OURS else ()
                course = train(model, dtype, task, data, steps, seed, late, keep)
            row |= {"losses": course.losses, "accuracy": course.accuracy}
            courses[impl] = row | {"seconds": course.seconds}
            yield courses[impl]
            for step, weights in course.weights.items():
                with exact_float32():
                    check = gradient_check(task, weights, data, device, seed, build)
                checks.append({**alike, "kind": GRADIENTS, "step": step, **check})
                yield checks[-1]
        except Exception as problem:
            if impl != OURS:  # no kernel's fault
                raise
            traceback.print_exc()
            yield {**alike, "impl": "verdict", **failure(problem)}
            return
    found = verdict(courses, checks)
    chosen = set(courses.get(OURS, {}).get("implementations", {}).values())
    if device.type == "cuda" and found["ok"] and not chosen & KERNELS:
        found |= {"ok": None, "why": f"`auto` took none of our kernels, but {sorted(chosen)}"}
    yield {**alike, "impl": "verdict", **found}
