"""``python -m vitkern COMMAND``: the command line.

A command is a function below, listed once in COMMANDS. It imports what it needs beyond torch by
itself, so that the others run without it.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import vitkern
from vitkern._device import device_name
from vitkern.kernels import REGISTRY, _native
from vitkern.kernels._op import KERNEL_DTYPES, dtype_name
from vitkern.kernels._triton import TRITON_MISSING, triton

# Modules of optional packages, by the name under which one installs them.
PACKAGES = {
    "PIL": "pillow",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "rich": "rich",
    "sklearn": "scikit-learn",
}


@dataclass(frozen=True)
class Command:
    """What runs, which options it takes, and the extra of vitkern that brings what it imports."""

    run: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    extra: str = ""


def demo(options: argparse.Namespace) -> int:
    """train on real digits and run ViT-B/16 on real photographs, beside eager PyTorch"""
    from vitkern import demo

    sizes = demo.QUICK if options.quick else demo.FULL
    return demo.run(options.device, options.out, options.seed, sizes, options.epochs)


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--device", type=device, default=default, help="cpu, cuda or cuda:N (here: %(default)s)")
    add("--epochs", type=positive, help="passes over the digits")
    add("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="%(default)s")
    add("--seed", type=int, default=0, help="of weights, split and batches (%(default)s)")
    add("--quick", action="store_true", help="a smoke test: fewer epochs, a smaller model")


def info(options: argparse.Namespace) -> int:
    """print versions, the device, and every op with its implementations"""
    native = _native.load()
    cuda = torch.version.cuda and f"CUDA {torch.version.cuda}"
    built = native and f"{native.version}, {native.compiler}, CUDA {native.cuda or 'none'}"
    rows = {
        "vitkern": vitkern.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} ({cuda or 'no CUDA'})",
        "triton": TRITON_MISSING or triton.__version__,
        "native part": built or "not built (optional)",
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }
    ops = {
        op.name: ", ".join(op.implementations)
        + (f"    (backward of {op.backward_of})" if op.backward_of else "")
        for op in REGISTRY.values()
    }
    width = max(map(len, [*rows, *ops]))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")
    print("\nops and their implementations, in the order in which auto tries them:")
    for name, text in ops.items():
        print(f"{name:<{width}}  {text}")
    return 0


def inspect(options: argparse.Namespace) -> int:
    """print what a checkpoint is: whose, which network, what it leaves open, what is left out"""
    from vitkern.inspect import run

    return run(options)


def inspect_options(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    from vitkern.inspect import add_options

    add_options(parser)


def roofline(options: argparse.Namespace) -> int:
    """predict a model's speed and memory on one card or several, by op; nothing is run"""
    from vitkern.roofline import report

    try:
        print(report.run(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def roofline_options(parser: argparse.ArgumentParser) -> None:
    """Options of `roofline`."""
    from vitkern.roofline import report

    report.add_options(parser)


def selfcheck(options: argparse.Namespace) -> int:
    """hold every kernel against float64 on this GPU; exit code 1 if one is wrong"""
    dtypes = None if options.dtype is None else [getattr(torch, name) for name in options.dtype]
    try:
        report = vitkern.selfcheck(options.op, dtypes, options.device, options.repeats)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.ok else 1


def selfcheck_options(parser: argparse.ArgumentParser) -> None:
    """Options of `selfcheck`."""
    add = parser.add_argument
    add("--op", nargs="+", metavar="NAME", help="these ops only (default: all with a kernel)")
    names = [dtype_name(dtype) for dtype in KERNEL_DTYPES]
    add("--dtype", nargs="+", choices=names, help="these dtypes only (default: all)")
    add("--device", type=device, help="cuda, cuda:N, or cpu for Triton's interpreter")
    text = "of each call, whose results must have the same bits (default: 1)"
    add("--repeats", type=int, default=1, metavar="N", help=text)


def profile(options: argparse.Namespace) -> int:
    """profile steps of a model, or a saved trace: what holds it back, and what to do"""
    from vitkern.profile import command

    return command.run(options)


def profile_options(parser: argparse.ArgumentParser) -> None:
    """Options of `profile`."""
    from vitkern.profile import command

    command.options(parser, device, positive)


COMMANDS = {
    "demo": Command(demo, demo_options, extra="demo"),
    "info": Command(info),
    "inspect": Command(inspect, inspect_options, extra="checkpoints"),
    "roofline": Command(roofline, roofline_options),
    "profile": Command(profile, profile_options),
    "selfcheck": Command(selfcheck, selfcheck_options),
}


def device(text: str) -> torch.device:
    """A device that this machine has; for argparse."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"no device {text!r}; expected cpu or cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(f"no {text!r} here: PyTorch sees {count} CUDA GPUs")
    return found


def positive(text: str) -> int:
    """An integer from 1; for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m vitkern", description=vitkern.__doc__)
    top.add_argument("--version", action="version", version=f"vitkern {vitkern.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = command.run.__doc__
        command.options(commands.add_parser(name, help=text, description=text))
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code, 2 where it lacks a package."""
    top = parser()
    options = top.parse_args(arguments)
    if options.command is None:
        top.print_help()
        return 0
    command = COMMANDS[options.command]
    try:
        return command.run(options)
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None or not command.extra:
            raise
        mend = f"pip install 'vitkern[{command.extra}]'"
        print(f"the {options.command} needs {package}: {mend}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
