"""The demo: a small ViT learns real handwritten digits, and ViT-B/16 sees two real photographs.

Both run beside `EagerViT`, the same network in PyTorch's own modules, with the same weights and the
same images. All that is printed, drawn and written was measured in this run. Both data sets come
with scikit-learn, so nothing is downloaded.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import vitkern
from vitkern._memory import peak_memory

OURS, EAGER = "vitkern", "eager"
COLORS = {OURS: "#0b7285", EAGER: "#e8590c"}
BATCH = 128  # digits
# Eager's own error against float64 is what the precision costs; ours sums in another order, and may
# be this many times as large.
PARITY_BOUND = 2.0


@dataclass(frozen=True)
class Sizes:
    """How much the demo does."""

    epochs: int
    accuracy: float  # of the test digits, that training must reach
    model: str
    depth: int
    photos: dict[str, int]  # in a batch, by device type
    rounds: int  # timed runs of either model


FULL = Sizes(60, 0.97, "vit_base_patch16_224", 12, {"cpu": 2, "cuda": 64}, 5)
QUICK = Sizes(4, 0.50, "vit_tiny_patch16_224", 2, {"cpu": 2, "cuda": 2}, 2)


def run(device: torch.device, out: Path, seed: int, sizes: Sizes, epochs: int | None = None) -> int:
    """Everything; 0 if the digits' accuracy and the parity are as they should be, else 1."""
    console = Console(highlight=False)
    hardware = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the events and statistics below are the current device's
        hardware = torch.cuda.get_device_name(device)
    console.print(f"vitkern {vitkern.__version__}, torch {torch.__version__}, device: {hardware}")

    place = "one CPU thread" if device.type == "cpu" else hardware  # see one_thread
    console.print(f"\n[bold]1. Handwritten digits:[/] a small ViT learns from scratch on {place}")
    digits = load(seed)
    with one_thread():
        learners = train(digits, epochs or sizes.epochs, device, seed, console)
    learned = {"device": place, **report(learners, digits, sizes.accuracy)}
    for name in (OURS, EAGER):
        right, seconds = learned[name]["test_accuracy"], learned[name]["training_seconds"]
        console.print(f"   {name:<8} test accuracy {right:.2%} after {seconds:.1f} s of training")
    same, count = learned["same_predictions"], learned["test_images"]
    console.print(f"   They agree on {same} of {count} test digits.", end=" ")
    console.print(f"At least {sizes.accuracy:.0%} right was expected.")

    console.print(
        f"\n[bold]2. Real photographs:[/] {sizes.model}, {sizes.depth} blocks, "
        f"random weights (seed {seed})"
    )
    photos = load_sample_images().images
    with console.status("both models, forward and backward"):
        compared = compare(photos, device, seed, sizes)
    print_comparison(console, compared)

    versions = {"vitkern": vitkern.__version__, "torch": torch.__version__}
    figures = {"versions": versions, "device": hardware, "seed": seed}
    figures |= {"digits": learned, "photographs": compared}
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(out / "demo.png", figures, learners, digits, photos)
    draw_attention(out / "attention.png", learners[0], digits, device)
    written = [str(out / name) for name in ("demo.png", "attention.png", "demo.json")]
    console.print("\nwritten: " + "\n         ".join(written), soft_wrap=True)

    reached, failures = learned[OURS]["test_accuracy"], []
    if reached < sizes.accuracy:
        failures.append(f"test accuracy {reached:.2%} is below the expected {sizes.accuracy:.0%}")
    if not compared["parity_holds"]:
        failures.append(f"logits are off by more than {PARITY_BOUND:g} times the error of eager")
    for failure in failures:
        console.print(f"[bold red]FAILED:[/] {failure}", soft_wrap=True)
    return 1 if failures else 0


# 1. Digits

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def load(seed: int) -> Split:
    """scikit-learn's 1,797 digits, uint8 [B, 1, 8, 8], and labels: for training, for the test.

    A fifth is for the test, as much of each digit as its share.
    """
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = data.target.astype(np.int64)
    parts = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=seed)
    images, test_images, labels, test_labels = map(torch.from_numpy, parts)
    return images, labels, test_images, test_labels


@dataclass
class Learner:
    """One of the two models in training, and its course."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    predictions: Tensor  # of the test images, after the last epoch
    step_ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # mean of an epoch
    accuracies: list[float] = field(default_factory=list)  # of the test images, after an epoch

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One training step; its loss, still on the device."""
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def train(
    digits: Split, epochs: int, device: torch.device, seed: int, console: Console
) -> list[Learner]:
    """Train both models on the same batches from the same weights, a step each in turns."""
    train_images, train_labels = digits[:2]
    test_images, test_labels = (part.to(device) for part in digits[2:])
    steps = len(train_images) // BATCH
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    sizes |= {"embed_dim": 64, "depth": 3, "num_heads": 4}
    ours = vitkern.ViT(**sizes, class_token=False, global_pool="avg", weight_init="jax")
    # Positions start as large as the patches beside them, not at 0.02: in an image of so few
    # patches, where a stroke lies says as much as what it looks like.
    nn.init.normal_(ours.get_parameter("pos_embed"), std=0.5)
    learners = []
    for name, model in ((OURS, ours), (EAGER, eager_twin(ours))):
        optimizer = torch.optim.AdamW(model.to(device).parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(  # warm-up, then a cosine
            optimizer, max_lr=4e-3, total_steps=epochs * steps, pct_start=0.1, cycle_momentum=False
        )
        # Compile kernels and fill caches before the clock runs.
        F.cross_entropy(model(test_images[:BATCH]), test_labels[:BATCH]).backward()
        learners.append(Learner(name, model, optimizer, schedule, torch.empty_like(digits[3])))

    generator = torch.Generator().manual_seed(seed)
    columns = (
        *(TextColumn("   {task.description:<8}"), BarColumn(bar_width=24)),
        TextColumn("loss {task.fields[loss]:.4f}  test {task.fields[accuracy]:6.2%}"),
        TextColumn("{task.fields[speed]:7,.0f} images/s  ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        unknown: dict[str, Any] = {"loss": float("nan"), "accuracy": 0.0, "speed": 0.0}
        bars = [progress.add_task(each.name, total=epochs * steps, **unknown) for each in learners]
        for _ in range(epochs):
            order = torch.randperm(len(train_images), generator=generator)
            losses: dict[str, list[Tensor]] = {OURS: [], EAGER: []}
            for chosen in order[: steps * BATCH].split(BATCH):
                images = shifted(train_images[chosen], generator).to(device)
                labels = train_labels[chosen].to(device)
                for each, bar in zip(learners, bars, strict=True):
                    loss, elapsed = timed(device, partial(each.step, images, labels))
                    losses[each.name].append(loss)
                    each.step_ms.append(elapsed)
                    progress.advance(bar)
            for each, bar in zip(learners, bars, strict=True):
                each.losses.append(torch.stack(losses[each.name]).mean().item())
                with torch.no_grad():
                    each.predictions = each.model(test_images).argmax(1).cpu()
                right = each.predictions == digits[3]
                each.accuracies.append(right.double().mean().item())
                now: dict[str, Any] = {"loss": each.losses[-1], "accuracy": each.accuracies[-1]}
                speed = 1e3 * BATCH / statistics.median(each.step_ms)
                progress.update(bar, **now, speed=speed)
    return learners


def report(learners: list[Learner], digits: Split, expected: float) -> dict[str, Any]:
    """The figures of part 1."""
    ours, eager = learners
    figures: dict[str, Any] = {
        "expected_accuracy": expected,
        "train_images": len(digits[0]),
        "test_images": len(digits[2]),
        "same_predictions": int((ours.predictions == eager.predictions).sum()),
    }
    for each in learners:
        figures[each.name] = {
            "test_accuracy": each.accuracies[-1],
            "training_seconds": sum(each.step_ms) / 1e3,
            "median_step_ms": statistics.median(each.step_ms),
            "losses": each.losses,
            "accuracies": each.accuracies,
        }
    return figures


@contextmanager
def one_thread() -> Iterator[None]:
    """On the CPU: a model as small as that of the digits makes several mostly wait for each other.

    On cores that other programs keep busy, most of all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image [B, 1, H, W] moved by up to one pixel down, up, left or right; 0 moves in."""
    count, _, height, width = images.shape
    down, right = torch.randint(0, 3, (2, count, 1, 1), generator=generator)
    rows, columns = torch.arange(height)[:, None] + down, torch.arange(width) + right
    padded = F.pad(images, (1, 1, 1, 1))[:, 0]
    return padded[torch.arange(count)[:, None, None], rows, columns][:, None]


def eager_twin(model: vitkern.ViT) -> vitkern.EagerViT:
    """The same network with the same weights, without our ops."""
    twin = vitkern.EagerViT(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


# 2. Photographs


def crops(photos: list[Any], count: int, seed: int) -> Tensor:
    """Random square crops of the photographs in turn, 224 pixels wide: uint8 [B, 224, 224, 3]."""
    random, made = np.random.default_rng(seed), []
    for i in range(count):
        photo = Image.fromarray(photos[i % len(photos)])
        side = int(min(photo.size) * random.uniform(0.6, 1.0))
        x, y = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.resize((224, 224), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        made.append(torch.from_numpy(np.array(crop)))
    return torch.stack(made)


def compare(photos: list[Any], device: torch.device, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Parity, time and memory of both models: forward, and a training step without optimizer."""
    torch.manual_seed(seed)
    ours = vitkern.create_model(sizes.model, depth=sizes.depth)
    models: dict[str, nn.Module] = {OURS: ours.to(device), EAGER: eager_twin(ours).to(device)}
    pixels = crops(photos, sizes.photos[device.type], seed).to(device)
    labels = torch.randint(0, 1000, (len(pixels),)).to(device)
    # The eager model takes channels first only: a view of the same bytes.
    inputs = {OURS: pixels, EAGER: pixels.permute(0, 3, 1, 2)}
    mixed = device.type == "cuda"
    precision = torch.autocast(device.type, torch.bfloat16, enabled=mixed)

    def forward(name: str) -> Tensor:
        with torch.no_grad(), precision:
            logits: Tensor = models[name](inputs[name])
        return logits

    def step(name: str) -> None:
        models[name].zero_grad()
        with precision:
            loss = F.cross_entropy(models[name](inputs[name]).float(), labels)
        loss.backward()

    with torch.no_grad():
        exact = eager_twin(ours).to(device).double()
        # In parts, as the float64 intermediates of a large batch need not fit.
        oracle = torch.cat([exact(part) for part in inputs[EAGER].split(8)])
        del exact
        with precision:
            explanation = vitkern.explain(ours, pixels)
    logits = {name: forward(name) for name in models}
    errors = {name: difference(logits[name], oracle) for name in models}

    costs: dict[str, Any] = {}
    for label, work in (("forward", forward), ("training", step)):
        runs = {name: partial(work, name) for name in models}
        times: dict[str, list[float]] = {name: [] for name in models}
        memory = {}
        for name in models:
            runs[name]()  # warm-up
            models[name].zero_grad()  # what a step allocates anew counts, too
            memory[name] = peak_memory(device, runs[name])
        for _ in range(sizes.rounds):  # A B A B: what else the machine does hits both alike
            for name in models:
                times[name].append(timed(device, runs[name])[1])
        costs[label] = {
            name: {
                "median_ms": statistics.median(times[name]),
                "all_ms": times[name],
                "peak_mib": memory[name] / 2**20,
            }
            for name in models
        }
    gradients = [
        torch.cat(
            [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
        )
        for model in models.values()
    ]
    return {
        "model": f"{sizes.model}, {sizes.depth} blocks, random weights (seed {seed})",
        "images": f"{list(pixels.shape)} uint8",
        "precision": "bfloat16 autocast" if mixed else "float32",
        "implementations": {row.op: row.implementation for row in explanation.rows},
        "explanation": str(explanation),
        "parity": {
            f"logits: {OURS} - float64": errors[OURS],
            f"logits: {EAGER} - float64": errors[EAGER],
            f"logits: {OURS} - {EAGER}": difference(logits[OURS], logits[EAGER]),
            f"gradients: {OURS} - {EAGER}": difference(*gradients),
        },
        # The 1e-6 is for a model so small that eager's own error is nothing.
        "parity_holds": errors[OURS]["relative"] <= PARITY_BOUND * errors[EAGER]["relative"] + 1e-6,
        "costs": costs,
    }


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """Largest absolute difference, and its root mean square relative to that of `b`."""
    gap = a.double() - b.double()
    return {"largest": gap.abs().max().item(), "relative": (gap.norm() / b.double().norm()).item()}


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, and its milliseconds: by events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        return work(), 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = work()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end)


def print_comparison(console: Console, compared: dict[str, Any]) -> None:
    """The figures of part 2 as tables."""
    title = f"{compared['images']}, {compared['precision']}: median (least-most)"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for head in (OURS, EAGER, "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    for label, cost in compared["costs"].items():
        spread = [
            f"{short(c['median_ms'])} ({short(min(c['all_ms']))}-{short(max(c['all_ms']))})"
            for c in (cost[OURS], cost[EAGER])
        ]
        table.add_row(f"{label}, ms", *spread, ratio(cost, "median_ms"))
        mib = [f"{cost[name]['peak_mib']:,.0f}" for name in (OURS, EAGER)]
        table.add_row(f"{label}, peak MiB", *mib, ratio(cost, "peak_mib"))
    console.print(table)
    table = Table(title="parity", box=box.SIMPLE_HEAD)
    for head in ("difference", "largest absolute", "relative (RMS)"):
        table.add_column(head, no_wrap=True)
    for label, error in compared["parity"].items():
        table.add_row(label, f"{error['largest']:.2e}", f"{error['relative']:.2e}")
    console.print(table)
    console.print(f"implementations:\n{compared['explanation']}", markup=False, soft_wrap=True)
    if "triton" not in compared["implementations"].values():
        console.print("The portable implementations ran: the Triton kernels need an NVIDIA GPU.")


def short(number: float) -> str:
    """Three digits or more."""
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def ratio(cost: dict[str, Any], key: str) -> str:
    """How many times as much the eager model takes."""
    return f"{cost[EAGER][key] / cost[OURS][key]:.2f}x"


# The picture


def draw(
    path: Path, figures: dict[str, Any], learners: list[Learner], digits: Split, photos: list[Any]
) -> None:
    """Everything in one picture."""
    style: dict[str, Any] = {"axes.titlelocation": "left", "axes.titleweight": "bold"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 11), layout="constrained")
        figure.suptitle(f"vitkern {vitkern.__version__} on {figures['device']}", size=15)
        parts: Any = figure.subfigures(3, 1, height_ratios=[3.4, 1.3, 4.6])
        draw_curves(parts[0], learners, figures["digits"])
        draw_digits(parts[1], learners[0], *digits[2:])
        draw_comparison(parts[2], figures["photographs"], photos)
        figure.savefig(path, dpi=120)


def draw_curves(figure: Any, learners: list[Learner], learned: dict[str, Any]) -> None:
    """Loss and test accuracy; eager thin and dashed on top, so that equal curves show both."""
    loss, accuracy = figure.subplots(1, 2)
    for each, style, width in zip(learners, ("-", (0, (2, 3))), (4, 2), strict=True):
        look = {"color": COLORS[each.name], "linestyle": style, "linewidth": width}
        epochs, seconds = range(1, len(each.losses) + 1), learned[each.name]["training_seconds"]
        loss.plot(epochs, each.losses, label=f"{each.name}: {seconds:.1f} s in all", **look)
        percent = [100 * value for value in each.accuracies]
        accuracy.plot(epochs, percent, label=f"{each.name}: {percent[-1]:.2f} % at the end", **look)
    expected = 100 * learned["expected_accuracy"]
    accuracy.axhline(
        expected, color="0.6", linewidth=1, zorder=0, label=f"expected: {expected:g} %"
    )
    title = f"Handwritten digits: training loss, on {learned['device']}"
    loss.set(title=title, xlabel="epoch", yscale="log")
    accuracy.set(title="Test accuracy in %", xlabel="epoch")
    loss.legend(frameon=False)
    accuracy.legend(frameon=False, loc="lower right")


def draw_digits(figure: Any, learner: Learner, images: Tensor, labels: Tensor) -> None:
    """Some test digits over their predictions, the wrong ones first."""
    wrong = learner.predictions != labels
    shown = wrong.int().argsort(descending=True, stable=True)[:16].tolist()
    text = f"Test digits and predictions: {int(wrong.sum())} of {len(wrong)} are wrong, shown first"
    figure.suptitle(text, x=0.01, ha="left", weight="bold")
    for axes, i in zip(figure.subplots(1, len(shown)), shown, strict=True):
        axes.imshow(images[i, 0].numpy(), cmap="gray_r")
        guess, color = f"{learner.predictions[i]}", "0.3"
        if wrong[i]:
            guess, color = f"{guess}, not {labels[i]}", "red"
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(guess, color=color, size=12)
        axes.spines[:].set(visible=True, color=color)


def draw_attention(path: Path, learner: Learner, digits: Split, device: torch.device) -> None:
    """Where the model looks in a 0, 1, ... 4: the mean of its patches, as it has no class token."""
    shown = [int((digits[3] == digit).nonzero()[0]) for digit in range(5)]
    model: Any = learner.model
    images = digits[2][shown]
    maps = model.attention_maps(images.to(device))
    looks = {
        "last block": vitkern.token_map(maps[-1].mean(1), num_prefix_tokens=0),
        "rollout": vitkern.token_map(vitkern.attention_rollout(maps), num_prefix_tokens=0),
    }
    labels = [f"read as {guess}" for guess in learner.predictions[shown]]
    vitkern.plot_attention(255 - images, looks, path, labels=labels, interpolation="nearest")


def draw_comparison(figure: Any, compared: dict[str, Any], photos: list[Any]) -> None:
    """The photographs, bars of time and memory, and the parity figures."""
    text = f"Crops of two photographs, {compared['images']}, through {compared['model']}"
    figure.suptitle(f"{text}: {compared['precision']}", x=0.01, ha="left", weight="bold")
    axes = figure.subplot_mosaic([["a", "time", "memory"], ["b", "time", "memory"]])
    for name, photo in zip("ab", photos, strict=True):
        axes[name].imshow(photo)
        axes[name].axis("off")
    for name, key in (("time", "median_ms"), ("memory", "peak_mib")):
        for i, model in enumerate((OURS, EAGER)):
            costs = [cost[model] for cost in compared["costs"].values()]
            places, heights = [i * 0.4, 1 + i * 0.4], [cost[key] for cost in costs]
            bars = axes[name].bar(places, heights, 0.38, label=model, color=COLORS[model])
            if name == "memory":
                axes[name].bar_label(bars, fmt="{:,.0f}", padding=2)
            else:
                axes[name].bar_label(bars, map(short, heights), label_type="center", color="white")
                low, high = [min(c["all_ms"]) for c in costs], [max(c["all_ms"]) for c in costs]
                axes[name].vlines(places, low, high, color="0.2")
        axes[name].set(xticks=[0.2, 1.2], xticklabels=list(compared["costs"]), yticks=[])
        axes[name].spines["left"].set_visible(False)
    axes["time"].set_title("Median time in ms (line: least to most)")
    axes["memory"].set_title("Peak memory in MiB")
    axes["memory"].legend(frameon=False, loc="upper left")
    rows = [f"{label} {error['relative']:.1e}" for label, error in compared["parity"].items()]
    figure.supxlabel("Relative RMS difference of " + ",  ".join(rows), size=10)
