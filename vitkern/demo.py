"""The demo: a small ViT learns real handwritten digits, and ViT-B/16 sees two real photographs.

Both run beside `EagerViT`, the same network in PyTorch's own modules, with the same weights and the
same images. All that is printed, drawn and written was measured in this run. Both data sets come
with scikit-learn, so nothing is downloaded.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import vitkern

OURS, EAGER = "vitkern", "eager PyTorch"
COLORS = {OURS: "#0b7285", EAGER: "#e8590c"}
# The error that any implementation makes in this precision is eager's own; ours may be this many
# times as large, as it sums in another order.
PARITY_BOUND = 2.0


@dataclass(frozen=True)
class Sizes:
    """How much the demo does."""

    epochs: int
    accuracy: float  # of the test digits, that training must reach
    model: str
    depth: int
    batch: dict[str, int]  # photographs, by device type
    rounds: int  # timed runs of either model


FULL = Sizes(60, 0.97, "vit_base_patch16_224", 12, {"cpu": 4, "cuda": 64}, 5)
QUICK = Sizes(12, 0.60, "vit_tiny_patch16_224", 2, {"cpu": 2, "cuda": 2}, 2)


def run(device: torch.device, out: Path, seed: int, sizes: Sizes, epochs: int | None = None) -> int:
    """Everything; 0 if both the digits' accuracy and the parity are as they should be, else 1."""
    console = Console(highlight=False)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for the events and streams below
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
    console.print(f"vitkern {vitkern.__version__}, torch {torch.__version__}, device: {name}\n")

    console.print("[bold]1. Handwritten digits[/]: a small ViT, from scratch")
    digits = Digits.load(seed)
    learners = train(digits, epochs or sizes.epochs, device, seed, console)
    report = digits_report(digits, learners, sizes.accuracy)
    for learner in learners:
        figures = report[learner.name]
        console.print(
            f"   {learner.name:<14} test accuracy {figures['test_accuracy']:.2%}, "
            f"{figures['seconds']:.1f} s, {figures['images_per_second']:,.0f} images/s"
        )
    same, count = report["same_predictions"], report["test_images"]
    console.print(f"   The two agree on {same} of {count} test digits.\n")

    text = f"{sizes.model}, {sizes.depth} blocks, random weights (seed {seed})"
    console.print(f"[bold]2. Real photographs[/]: {text}")
    photos = load_sample_images().images
    comparison = compare(photos, device, seed, sizes)
    print_comparison(console, comparison)

    figures = {
        "versions": {"vitkern": vitkern.__version__, "torch": torch.__version__},
        "device": name,
        "seed": seed,
        "digits": report,
        "photos": comparison,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(out / "demo.png", figures, digits, learners, photos)
    console.print(f"\nwritten: {out / 'demo.png'}\n         {out / 'demo.json'}", soft_wrap=True)

    failures = []
    reached = report[OURS]["test_accuracy"]
    if reached < sizes.accuracy:
        failures.append(f"test accuracy {reached:.2%} is below the expected {sizes.accuracy:.0%}")
    if not comparison["parity"]["holds"]:
        failures.append(f"the logits are off by more than {PARITY_BOUND:g} times eager's own error")
    for failure in failures:
        console.print(f"[bold red]FAILED[/]: {failure}")
    return 1 if failures else 0


# 1. Digits


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 digits: images uint8 [B, 1, 8, 8], labels int64 [B]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, seed: int) -> "Digits":
        """Every fifth for the test, as many of each digit as its share."""
        data = load_digits()
        pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
        parts = train_test_split(
            pixels, data.target, test_size=0.2, stratify=data.target, random_state=seed
        )
        train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
        return cls(train_x, train_y.long(), test_x, test_y.long())


@dataclass
class Learner:
    """One of the two models in training, and its course."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)  # mean of an epoch
    accuracies: list[float] = field(default_factory=list)  # of the test images, after it
    predictions: Tensor | None = None  # of the test images, after the last one
    seconds: float = 0.0  # in training steps alone
    images: int = 0

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One training step; its loss, still on the device."""
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def train(
    digits: Digits, epochs: int, device: torch.device, seed: int, console: Console
) -> list[Learner]:
    """Train both models, epoch by epoch in turns, on the same batches from the same weights."""
    batch = 128
    steps = len(digits.train_images) // batch
    torch.manual_seed(seed)
    ours = vitkern.ViT(
        img_size=8,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=3,
        num_heads=4,
        class_token=False,
        global_pool="avg",
        weight_init="jax",
    )
    # Positions start as large as the patches beside them, not at 0.02: in an image of so few
    # patches, where a stroke lies says as much as what it looks like.
    nn.init.normal_(ours.pos_embed, std=0.5)
    learners = [learner(OURS, ours, device, epochs * steps)]
    learners.append(learner(EAGER, eager_twin(ours), device, epochs * steps))
    test_images, test_labels = digits.test_images.to(device), digits.test_labels.to(device)
    for each in learners:  # compile kernels and fill caches before the clock runs
        F.cross_entropy(each.model(test_images[:batch]), test_labels[:batch]).backward()

    generator = torch.Generator().manual_seed(seed)
    columns = (
        TextColumn("   {task.description:<14}"),
        BarColumn(bar_width=24),
        TextColumn("loss {task.fields[loss]:.4f}  test {task.fields[accuracy]:6.2%}"),
        TextColumn("{task.fields[speed]:7,.0f} images/s  ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        start = {"loss": float("nan"), "accuracy": 0.0, "speed": 0.0}
        bars = [progress.add_task(each.name, total=epochs * steps, **start) for each in learners]
        for _ in range(epochs):
            order = torch.randperm(len(digits.train_images), generator=generator)
            batches = [
                (
                    shifted(digits.train_images[chosen], generator).to(device),
                    digits.train_labels[chosen].to(device),
                )
                for chosen in order[: steps * batch].split(batch)
            ]
            for each, bar in zip(learners, bars, strict=True):
                began, losses = time.perf_counter(), []
                for images, labels in batches:
                    losses.append(each.step(images, labels))
                    progress.advance(bar)
                each.losses.append(torch.stack(losses).mean().item())  # waits for the device
                each.seconds += time.perf_counter() - began
                each.images += steps * batch
                with torch.no_grad():
                    each.predictions = each.model(test_images).argmax(1).cpu()
                right = each.predictions == digits.test_labels
                each.accuracies.append(right.double().mean().item())
                speed = each.images / each.seconds
                now = {"loss": each.losses[-1], "accuracy": each.accuracies[-1], "speed": speed}
                progress.update(bar, **now)
    return learners


def learner(name: str, model: nn.Module, device: torch.device, steps: int) -> Learner:
    """`model` with its optimizer: AdamW, warm-up over a tenth of the steps, then a cosine."""
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 4e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    return Learner(name, model, optimizer, schedule)


def eager_twin(model: vitkern.ViT) -> vitkern.EagerViT:
    """The same network with the same weights, without our ops."""
    twin = vitkern.EagerViT(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image [B, 1, H, W] moved by up to one pixel in each direction, black moving in."""
    count, _, height, width = images.shape
    down, right = torch.randint(0, 3, (2, count, 1, 1), generator=generator)
    rows = torch.arange(height)[:, None] + down
    columns = torch.arange(width) + right
    padded = F.pad(images, (1, 1, 1, 1))[:, 0]
    return padded[torch.arange(count)[:, None, None], rows, columns][:, None]


def digits_report(digits: Digits, learners: list[Learner], threshold: float) -> dict[str, Any]:
    """The figures of part 1."""
    ours, eager = learners
    assert ours.predictions is not None  # set by the first epoch, of which there is one at least
    assert eager.predictions is not None
    return {
        "train_images": len(digits.train_images),
        "test_images": len(digits.test_images),
        "expected_accuracy": threshold,
        "same_predictions": int((ours.predictions == eager.predictions).sum()),
        **{
            each.name: {
                "test_accuracy": each.accuracies[-1],
                "seconds": each.seconds,
                "images_per_second": each.images / each.seconds,
                "losses": each.losses,
                "accuracies": each.accuracies,
            }
            for each in learners
        },
    }


# 2. Photographs


def crops(photos: list[np.ndarray], count: int, seed: int) -> Tensor:
    """Random square crops of the photographs in turn, 224 pixels wide: uint8 [B, 224, 224, 3]."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(count):
        photo = Image.fromarray(photos[i % len(photos)])
        side = int(min(photo.size) * random.uniform(0.6, 1.0))
        x, y = (int(random.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.resize((224, 224), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        made.append(torch.from_numpy(np.array(crop)))
    return torch.stack(made)


def compare(
    photos: list[np.ndarray], device: torch.device, seed: int, sizes: Sizes
) -> dict[str, Any]:
    """Parity, time and memory of both models: forward, and a training step without optimizer."""
    torch.manual_seed(seed)
    ours = vitkern.create_model(sizes.model, depth=sizes.depth)
    models = {OURS: ours.to(device), EAGER: eager_twin(ours).to(device)}
    pixels = crops(photos, sizes.batch[device.type], seed).to(device)
    # The eager model takes channels first; a view of the same bytes.
    inputs = {OURS: pixels, EAGER: pixels.permute(0, 3, 1, 2)}
    labels = torch.randint(0, 1000, (len(pixels),)).to(device)
    half = device.type == "cuda"  # mixed precision is for the tensor cores

    def forward(name: str) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits: Tensor = models[name](inputs[name])
        return logits

    @torch.no_grad()
    def infer(name: str) -> Tensor:
        return forward(name)

    def step(name: str) -> None:
        models[name].zero_grad()
        F.cross_entropy(forward(name).float(), labels).backward()

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        explanation = vitkern.explain(ours, pixels)
    exact = eager_twin(ours).to(device).double()
    with torch.no_grad():
        # In parts: float64 intermediates of the whole batch need not fit.
        oracle = torch.cat([exact(part) for part in inputs[EAGER].split(8)])
    del exact

    logits = {name: infer(name).double() for name in models}
    errors = {name: difference(logits[name], oracle) for name in models}
    figures: dict[str, Any] = {}
    for label, work in (("forward", infer), ("training step", step)):
        memory = {}
        for name, model in models.items():
            model.zero_grad()
            work(name)  # warm-up, as the one before it may have been a compilation
            model.zero_grad()
            memory[name] = peak_memory(device, lambda n=name, w=work: w(n))  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(sizes.rounds):  # A B A B: what else the machine does hits both alike
            for name in models:
                times[name].append(milliseconds(device, lambda n=name, w=work: w(n)))  # type: ignore[misc]
        figures[label] = {
            name: {
                "milliseconds": times[name],
                "median_ms": statistics.median(times[name]),
                "peak_bytes": memory[name],
            }
            for name in models
        }
    gradients = {
        name: torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])
        for name, model in models.items()
    }
    return {
        "model": sizes.model,
        "blocks": sizes.depth,
        "weights": f"random, seed {seed}",
        "images": list(pixels.shape),
        "precision": "bfloat16 autocast" if half else "float32",
        "implementations": {row.op: row.implementation for row in explanation.rows},
        "explanation": str(explanation),
        "parity": {
            f"{OURS} against float64": errors[OURS],
            f"{EAGER} against float64": errors[EAGER],
            f"{OURS} against {EAGER}": difference(logits[OURS], logits[EAGER]),
            "gradients against eager": difference(gradients[OURS], gradients[EAGER]),
            # The 1e-6 is for a model so small that eager's error is nothing.
            "holds": errors[OURS]["relative"] <= PARITY_BOUND * errors[EAGER]["relative"] + 1e-6,
        },
        **figures,
    }


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """Largest absolute difference, and the root mean square one relative to that of `b`."""
    gap = (a - b).double()
    return {"max_abs": gap.abs().max().item(), "relative": (gap.norm() / b.norm()).item()}


def milliseconds(device: torch.device, work: Callable[[], object]) -> float:
    """Time of one run: by events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """Most bytes that PyTorch's allocator held at once during one run, beyond those before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU's allocator keeps no such count; the profiler sees every allocation and release.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains where there is no GPU
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")


def print_comparison(console: Console, comparison: dict[str, Any]) -> None:
    """The figures of part 2 as tables."""
    table = Table(
        title=f"{comparison['images']} uint8, {comparison['precision']}", title_justify="left"
    )
    for head in ("", OURS, EAGER, f"{EAGER} / {OURS}"):
        table.add_column(head, justify="right" if head else "left")
    for label in ("forward", "training step"):
        both = comparison[label]
        cells = []
        for name in (OURS, EAGER):
            low, high = min(both[name]["milliseconds"]), max(both[name]["milliseconds"])
            cells.append(f"{both[name]['median_ms']:,.1f} ms  ({low:,.1f} to {high:,.1f})")
        table.add_row(f"{label}, time", *cells, f"{ratio(both, 'median_ms'):.2f}")
        cells = [f"{both[name]['peak_bytes'] / 2**20:,.0f} MiB" for name in (OURS, EAGER)]
        table.add_row(f"{label}, peak memory", *cells, f"{ratio(both, 'peak_bytes'):.2f}")
    console.print(table)
    rounds = len(comparison["forward"][OURS]["milliseconds"])
    console.print(f"median (least to most) of {rounds} runs, the two models in turns\n")
    table = Table(title="parity", title_justify="left")
    for head in ("", "largest absolute", "relative (RMS)"):
        table.add_column(head, justify="right" if head else "left")
    for label, error in parity_rows(comparison):
        table.add_row(label, f"{error['max_abs']:.2e}", f"{error['relative']:.2e}")
    console.print(table)
    console.print(f"\nimplementations:\n{comparison['explanation']}", markup=False, soft_wrap=True)
    if "triton" not in comparison["implementations"].values():
        console.print("The portable implementations ran; the Triton kernels need an NVIDIA GPU.")


def parity_rows(comparison: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The differences, without the verdict."""
    return [(label, error) for label, error in comparison["parity"].items() if label != "holds"]


def ratio(both: dict[str, Any], key: str) -> float:
    """How many times as much eager PyTorch takes."""
    quotient: float = both[EAGER][key] / both[OURS][key]
    return quotient


# The picture


def draw(
    path: Path,
    figures: dict[str, Any],
    digits: Digits,
    learners: list[Learner],
    photos: list[np.ndarray],
) -> None:
    """Everything in one picture."""
    report, comparison = figures["digits"], figures["photos"]
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 10.5), layout="constrained")
        figure.suptitle(f"vitkern {figures['versions']['vitkern']} on {figures['device']}", size=15)
        curves, row, bottom = figure.subfigures(3, 1, height_ratios=[3.4, 1.5, 4.2])
        draw_curves(curves, learners, report)
        draw_digits(row, digits, learners[0])
        draw_comparison(bottom, comparison, photos)
        figure.savefig(path, dpi=120)


def draw_curves(figure: Any, learners: list[Learner], report: dict[str, Any]) -> None:
    """Loss and test accuracy; eager dashed on top, so that equal curves show both."""
    loss, accuracy = figure.subplots(1, 2)
    for each in learners:
        look = {"color": COLORS[each.name], "linestyle": "-" if each.name == OURS else (0, (2, 3))}
        look["linewidth"] = 4 if each.name == OURS else 2
        epochs = range(1, len(each.losses) + 1)
        seconds, last = report[each.name]["seconds"], report[each.name]["test_accuracy"]
        loss.plot(epochs, each.losses, label=f"{each.name}: {seconds:.1f} s", **look)
        percent = [100 * value for value in each.accuracies]
        accuracy.plot(epochs, percent, label=f"{each.name}: {last:.2%}", **look)
    expected = 100 * report["expected_accuracy"]
    accuracy.axhline(expected, color="0.6", linewidth=1, zorder=0)
    accuracy.annotate(f"expected: {expected:g} %", (1, expected - 1), va="top", color="0.4")
    loss.set(title="Handwritten digits: training loss", xlabel="epoch", yscale="log")
    accuracy.set(title="Test accuracy in %", xlabel="epoch")
    loss.legend(frameon=False)
    accuracy.legend(frameon=False, loc="lower right")


def draw_digits(figure: Any, digits: Digits, learner: Learner) -> None:
    """Some test digits under their predictions, the wrong ones first."""
    assert learner.predictions is not None
    wrong = learner.predictions != digits.test_labels
    count = int(wrong.sum())
    shown = wrong.int().argsort(descending=True, stable=True)[:16]
    figure.suptitle(
        f"Predictions for test digits: {count} of {len(wrong)} are wrong, and come first",
        x=0.01,
        ha="left",
        weight="bold",
    )
    for axes, i in zip(figure.subplots(1, len(shown)), shown.tolist(), strict=True):
        axes.imshow(digits.test_images[i, 0], cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        guess, truth = int(learner.predictions[i]), int(digits.test_labels[i])
        text, color = (f"{guess}", "black") if guess == truth else (f"{guess}, not {truth}", "red")
        axes.set_xlabel(text, color=color, size=12, weight="normal" if guess == truth else "bold")
        axes.spines[:].set(visible=True, color="0.8" if guess == truth else "red")


def draw_comparison(figure: Any, comparison: dict[str, Any], photos: list[np.ndarray]) -> None:
    """The photographs, bars of time and memory, and the parity figures."""
    axes = figure.subplot_mosaic(
        [["left", "right", "time", "memory"]], width_ratios=[1, 1, 1.1, 1.1]
    )
    figure.suptitle(
        f"{comparison['model']} ({comparison['blocks']} blocks, {comparison['weights']}) on crops of "
        f"two photographs: {comparison['images']} uint8, {comparison['precision']}",
        x=0.01,
        ha="left",
        weight="bold",
    )
    for name, photo in zip(("left", "right"), photos, strict=True):
        axes[name].imshow(photo)
        axes[name].axis("off")
    labels = ("forward", "training step")
    for name, key, unit, scale in (
        ("time", "median_ms", "ms", 1.0),
        ("memory", "peak_bytes", "MiB", 2**-20),
    ):
        for i, model in enumerate((OURS, EAGER)):
            heights = [scale * comparison[label][model][key] for label in labels]
            places = [place + 0.4 * i for place in range(len(labels))]
            bars = axes[name].bar(places, heights, 0.38, label=model, color=COLORS[model])
            if key == "median_ms":
                runs = [comparison[label][model]["milliseconds"] for label in labels]
                below = [h - min(r) for h, r in zip(heights, runs, strict=True)]
                above = [max(r) - h for h, r in zip(heights, runs, strict=True)]
                axes[name].errorbar(
                    places, heights, [below, above], fmt="none", color="0.2", capsize=3
                )
            axes[name].bar_label(bars, fmt="{:,.0f}", label_type="center", color="white")
        axes[name].set_xticks([0.2, 1.2], labels)
        axes[name].set_yticks([])
        axes[name].spines["left"].set_visible(False)
    axes["time"].set_title("Median time in ms")
    axes["memory"].set_title("Peak memory in MiB")
    axes["memory"].legend(frameon=False, loc="upper left")
    rows = [
        f"{label}: {error['relative']:.1e} (largest {error['max_abs']:.1e})"
        for label, error in parity_rows(comparison)
    ]
    figure.supxlabel("relative RMS difference.  " + "    ".join(rows), size=9)
