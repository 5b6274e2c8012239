"""``python -m vitkern profile``: steps of a model on random images, or a trace from elsewhere."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function
from torch.utils.data import DataLoader

import vitkern
from vitkern.profile import report
from vitkern.profile.session import profile
from vitkern.profile.trace import load

PRECISIONS = ("float32", "autocast", "bf16")
# Steps before the profiler begins: what compiles, tunes or checks itself does so in these.
PREPARE = 2
# Steps that run after those recorded, and tell what recording costs.
UNTRACED = 3


def options(parser: argparse.ArgumentParser, device: Any, positive: Any) -> None:
    """Options of the command; `device` and `positive` check an argument."""
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    here = "cuda" if gpu else "cpu"
    add("model", nargs="?", metavar="MODEL", help="a name from vitkern.PRESETS (here: %(default)s)",
        default="vit_base_patch16_224" if gpu else "vit_tiny_patch16_224")  # fmt: skip
    add("--batch", type=positive, default=128 if gpu else 4, help="images a step (%(default)s)")
    add("--steps", type=positive, default=5 if gpu else 3, help="steps to report (%(default)s)")
    add("--warmup", type=int, default=5 if gpu else 1, help="steps before them (%(default)s)")
    add("--image-size", type=positive, metavar="S", help="side of the images (the model's)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--train", dest="forward", action="store_false", help="training (default)")
    kind.add_argument("--forward", action="store_true", help="inference, without gradients")
    parser.set_defaults(forward=False)
    add("--precision", choices=PRECISIONS, default="autocast" if gpu else "float32",
        help="float32; autocast to bfloat16; or bf16 weights (%(default)s)")  # fmt: skip
    add("--save", choices=("balanced", "minimal"), help="what blocks keep for backward")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--fused-optimizer", action="store_true", help="AdamW(fused=True)")
    add("--workers", type=int, default=0, help="of the loader (%(default)s)")
    add("--device", type=device, default=here, help="cpu, cuda or cuda:N (here: %(default)s)")
    add("--out", type=Path, default=Path("runs/profile"), metavar="FOLDER", help="%(default)s")
    add("--trace", type=Path, metavar="FILE", help="report on a saved trace (.json or .json.gz)")
    add("--nvtx", action="store_true", help="NVTX ranges in place of a report, for nsys profile")


def run(options: argparse.Namespace) -> int:
    """Profile, and print the report; the exit code is 2 where an argument can't be."""
    try:
        if options.trace is not None:
            return _trace(options)
        return _model(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _trace(options: argparse.Namespace) -> int:
    contents = load(options.trace)
    try:
        analysis = report.write(contents, options.out)
    except ValueError as error:
        raise ValueError(f"{error} ({options.trace})") from error
    report.save(contents, options.out / "trace.json")
    report.show(analysis, options.out)
    return 0


def _model(options: argparse.Namespace) -> int:
    if options.warmup < 0 or options.workers < 0:
        raise ValueError("--warmup and --workers must be 0 or more")
    device: torch.device = options.device
    asked = {"img_size": options.image_size, "save": options.save}
    overrides = {name: value for name, value in asked.items() if value is not None}
    model: nn.Module = vitkern.create_model(options.model, **overrides)
    config: Any = model.config
    weights = torch.bfloat16 if options.precision == "bf16" else torch.float32
    model = model.to(device, weights).train(not options.forward)
    loader = _loader(options, (options.batch, config.in_chans, *config.img_size))
    call = torch.compile(model) if options.compile else model
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        steps = (_forward if options.forward else _train)(options, model, call, loader, weights)
        for _ in range(PREPARE):
            next(steps)
        p = stack.enter_context(
            profile(options.out, warmup=options.warmup, steps=options.steps, nvtx=options.nvtx)
        )
        for count in steps:
            p.step(images=count)
    if p.error is not None:
        raise p.error
    if options.nvtx:
        print("NVTX ranges were emitted: run this under `nsys profile --trace cuda,nvtx`.")
    return 0


def _loader(options: argparse.Namespace, shape: tuple[int, ...]) -> Any:
    """The same random images and labels over and over: data that costs next to nothing."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(len(images), dtype=torch.long)
    pin = options.device.type == "cuda"
    if pin and not options.workers:  # once; what workers send has to be pinned each time
        images, labels = images.pin_memory(), labels.pin_memory()
    batches: Any = [(images, labels)] * (PREPARE + options.warmup + options.steps + UNTRACED)
    return DataLoader(batches, batch_size=None, num_workers=options.workers, pin_memory=pin)


def _autocast(options: argparse.Namespace) -> AbstractContextManager[Any]:
    if options.precision != "autocast":
        return nullcontext()
    return torch.autocast(options.device.type, dtype=torch.bfloat16)


def _train(
    options: argparse.Namespace, model: nn.Module, call: Any, loader: Any, weights: torch.dtype
) -> Iterator[int]:
    """Training steps; yields how many images each took."""
    fused = options.fused_optimizer or None  # None leaves the choice to PyTorch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    for images, labels in loader:
        with record_function("data"):
            # Cast on the device: on the host that takes longer than all else here.
            images = images.to(options.device, non_blocking=True).to(weights)
            labels = labels.to(options.device, non_blocking=True)
        with record_function("forward"), _autocast(options):
            loss = F.cross_entropy(call(images).float(), labels)
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield len(images)


def _forward(
    options: argparse.Namespace, model: nn.Module, call: Any, loader: Any, weights: torch.dtype
) -> Iterator[int]:
    """Inference steps; yields how many images each took."""
    for images, _ in loader:
        with record_function("data"):
            images = images.to(options.device, non_blocking=True).to(weights)
        with record_function("forward"), torch.inference_mode(), _autocast(options):
            call(images)
        yield len(images)
