"""``python -m benchmarks COMMAND``: the gates that need no GPU, and the measurements."""

import argparse
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    offline = commands.add_parser(
        "offline",
        help="compile every kernel without a GPU; fail on spills, too much shared memory, no MMA",
        description="Compile every kernel for cards that aren't here and print registers, spills, "
        "shared memory, occupancy and tensor-core instructions. Exit code 1 lists the offenders.",
    )
    offline.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="80 86 89 90")
    offline.add_argument("--op", nargs="+", help="these ops only (default: all)")
    offline.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    offline.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write a table a kernel here"
    )
    offline.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    offline.add_argument(
        "--size", nargs="+", choices=["vit", "tiny"], default=["vit", "tiny"], help="default: both"
    )
    offline.add_argument(
        "--all", action="store_true", help="every dtype and alignment of every sample"
    )
    offline.add_argument("--verbose", action="store_true", help="one line a compilation")

    sanitize = commands.add_parser(
        "sanitize",
        help="run every kernel interpreted; fail on an access out of bounds or undeclared traffic",
        description="Run every kernel on odd shapes and on views, interpreted on the CPU; check "
        "each access, count the bytes, and compare with what the op declares. With triton-viz "
        "installed its symbolic sanitizer runs too. Exit code 1 names op, kernel, sample and line.",
    )
    sanitize.add_argument("--op", nargs="+", help="these ops only (default: all)")
    sanitize.add_argument("--no-symbolic", action="store_true", help="leave triton-viz out")

    report = commands.add_parser(
        "report",
        help="tables and pictures of what `pytest benchmarks` measured",
        description="Write report.md and its pictures from files that `pytest benchmarks` or "
        "`python -m benchmarks gpu` wrote, or pytest-benchmark's --benchmark-json.",
    )
    report.add_argument("results", type=Path, nargs="+", metavar="RESULTS")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="default: the folder of the first file"
    )

    compare = commands.add_parser(
        "compare",
        help="what got faster or slower from one run to another",
        description="Compare two runs, contender by contender. Exit code 1: one of ours is slower "
        "by more than --fail-slower and than both runs scatter, or is no longer right.",
    )
    compare.add_argument("before", type=Path, metavar="A")
    compare.add_argument("after", type=Path, metavar="B")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the ratios here")
    compare.add_argument(
        "--fail-slower", type=float, default=2, metavar="PERCENT", help="default: %(default)s"
    )

    targets = commands.add_parser(
        "targets",
        help="which targets a GPU's results meet or miss, and why",
        description="Judge results from a GPU by the targets of benchmarks/_report/targets.py. "
        "Exit code 1: one is missed; what was not measured is listed, and misses nothing.",
    )
    targets.add_argument("results", type=Path, nargs="+", metavar="RESULTS")

    commands.add_parser(
        "readme",
        help="write the README's table anew from benchmarks/results",
        description="Write the table between the markers in README.md anew, from the newest "
        "results of each device in benchmarks/results.",
    )

    proxies = commands.add_parser(
        "proxies",
        help="launches, bytes moved and bytes saved of a block, counted without a GPU",
        description="Count what one transformer block launches, moves and keeps for its backward "
        "pass: as vitkern, eager PyTorch and timm run it, and as torch.compile would.",
    )
    proxies.add_argument("model", nargs="?", default="vit_base_patch16_224", help="%(default)s")
    proxies.add_argument("--batch", type=int, default=256, help="default: %(default)s")
    proxies.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")

    names = commands.add_parser(
        "names",
        help="every ViT of timm beside ours: logits, intermediates, gradients",
        description="Build every ViT that timm has by name, timm's and ours on the same random "
        "weights, and compare. Exit code 1: one differs by more than 1e-5.",
    )
    names.add_argument("pattern", nargs="*", help="names, * and ? allowed (default: all)")
    names.add_argument("--depth", type=int, help="at most so many blocks, and small images")
    names.add_argument(
        "--memory", type=float, default=10, metavar="GB", help="for weights; default: %(default)s"
    )
    names.add_argument("--full", action="store_true", help="the image size of each, always")
    names.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write these rows here, keep others"
    )
    names.add_argument("--missing", action="store_true", help="only what FILE lacks")

    _add_verify(commands)

    gpu = commands.add_parser(
        "gpu",
        help="everything that needs an NVIDIA GPU: tests, checks, times, tuning",
        description="Run the GPU tests, verify every kernel, time models and ops beside all peers "
        "that are installed, and tune, the most valuable first. Exit code 0: all is right; 1: "
        "something is wrong; 2: there is no GPU.",
    )
    gpu.add_argument("--minutes", type=float, default=10, help="time budget, default: %(default)s")
    gpu.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="DIR")
    gpu.add_argument(
        "--steps",
        nargs="+",
        metavar="STEP",
        help="of native tests kernels sanitizer training tune models ops profile-base "
        "profile-large sanitizer-tuned models-compiled ops-compiled models-rest ops-rest "
        "(default: all)",
    )
    gpu.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a rehearsal

    tune = commands.add_parser(
        "tune",
        help="measure the fastest launch configs, and implementation of each op, on this GPU",
        description="Hold alternative launch configs, and then every implementation of every op, "
        "against float64, time them, and write the table by which kernels and auto choose on this "
        "card; a run goes on where the last one stopped. "
        "Exit code 0: all is right; 1: something is wrong; 2: there is no GPU.",
    )
    tune.add_argument("--minutes", type=float, default=10, help="time budget, default: %(default)s")
    tune.add_argument("--op", nargs="+", help="these ops only (default: all)")
    tune.add_argument(
        "--out", type=Path, metavar="FILE", help="default: the card's in kernels/tuned/"
    )
    tune.add_argument(
        "--results", type=Path, metavar="FILE", help="rows of launch configs; default: beside --out"
    )
    tune.add_argument(
        "--share", type=float, default=0.6, help="of the time for launch configs; %(default)s"
    )
    tune.add_argument(
        "--processes", type=int, help="that compile (default: two fewer than there are cores)"
    )
    tune.add_argument("--again", action="store_true", help="measure anew what stands in the table")
    tune.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a rehearsal
    return top


def _add_verify(commands: Any) -> None:
    """``verify`` and the kinds of it."""
    verify = commands.add_parser(
        "verify",
        help="on a GPU: every kernel against float64, under compute-sanitizer, in training",
        description="Verify kernels on a GPU. Results go to results.jsonl in the folder of --out, "
        "a line each, at once; what stands there, of the same source, isn't done again. Exit code "
        "0: all is right; 1: something is wrong; 2: it couldn't run here, or not to the end.",
    )
    kinds = verify.add_subparsers(dest="kind", required=True, metavar="WHAT")
    texts = {
        "kernels": "every kernel against float64: memory poisoned, equal to the bit when repeated",
        "sanitizer": "NVIDIA's compute-sanitizer over every kernel and launch config",
        "training": "digits and ViT-B/16 on photographs, beside eager PyTorch",
    }
    parsers = {}
    for name, text in texts.items():
        parsers[name] = kind = kinds.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + "."
        )
        kind.add_argument("--out", type=Path, default=Path("build/verify"), metavar="DIR")
        kind.add_argument("--minutes", type=float, help="time budget (default: none)")
        kind.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a rehearsal
    for name in ("kernels", "sanitizer"):
        parsers[name].add_argument("--op", nargs="+", help="these ops only (default: all)")
        parsers[name].add_argument(
            "--processes", type=int, help="at a time (default: two fewer than there are cores)"
        )
    parsers["kernels"].add_argument(
        "--repeats", type=int, default=100, help="of each call, default: %(default)s"
    )
    parsers["kernels"].add_argument(
        "--size", nargs="+", choices=["tiny", "vit"], default=["tiny"],
        help="of samples: odd shapes, those of real models; default: tiny",
    )  # fmt: skip
    parsers["sanitizer"].add_argument(
        "--tool", nargs="+", help="of memcheck racecheck initcheck synccheck (default: all)"
    )
    parsers["sanitizer"].add_argument(
        "--table", type=Path, metavar="FILE",
        help="the tuner's, whose launch configs are looked at, too (default: this card's)",
    )  # fmt: skip
    parsers["training"].add_argument("--steps", type=int, help="default: 200")
    parsers["training"].add_argument("--only", nargs="+", metavar="NETWORK", help="default: both")
    parsers["training"].add_argument("--toy", action="store_true", help=argparse.SUPPRESS)
    kinds.add_parser("page", help="write docs/verification.md anew from benchmarks/results")


def _verify(options: argparse.Namespace) -> int:
    import torch

    if options.kind == "page":
        from ._verify import page

        return page.main()
    device, results = torch.device(options.device), options.out / "results.jsonl"
    if options.kind == "kernels":
        from ._gpu import table
        from ._verify import kernels

        return kernels.main(
            results,
            table(options.out, options.device),
            device,
            options.op,
            options.repeats,
            options.minutes,
            options.processes,
            options.size,
        )
    if options.kind == "sanitizer":
        from ._verify import sanitizer

        tools = options.tool or sanitizer.TOOLS
        return sanitizer.main(
            results,
            device,
            options.op,
            tools,
            options.minutes,
            options.processes,
            table=options.table,
        )
    from ._verify import training

    return training.main(
        results, device, options.out, options.minutes, options.steps, options.only, options.toy
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    try:
        if options.command == "offline":
            from . import _offline
            from ._cases import choose_ops

            ops = choose_ops(options.op)
            return _offline.main(
                options.arch,
                ops,
                options.json,
                options.processes,
                options.size,
                everything=options.all,
                verbose=options.verbose,
                markdown_path=options.markdown,
                command=shlex.join(["python", "-m", "benchmarks", *arguments]),
            )
        if options.command == "sanitize":
            os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a kernel is decorated
            from . import _sanitize
            from ._cases import choose_ops

            symbolic = not options.no_symbolic and find_spec("triton_viz") is not None
            return _sanitize.main(choose_ops(options.op), symbolic)
        if options.command == "report":
            from ._report import main_report

            return main_report(options.results, options.out or options.results[0].parent)
        if options.command == "compare":
            from ._report import main_compare

            return main_compare(options.before, options.after, options.json, options.fail_slower)
        if options.command == "targets":
            from ._report import main_targets

            return main_targets(options.results)
        if options.command == "readme":
            from ._report import main_readme

            return main_readme()
        if options.command == "proxies":
            from . import _proxies

            return _proxies.main(options.model, options.batch, options.json)
        if options.command == "names":
            from . import _names

            path, memory = options.markdown, options.memory * 1e9
            chosen, depth, full = options.pattern, options.depth, options.full
            return _names.main(chosen, depth, full, path, memory, options.missing)
        if options.command == "verify":
            return _verify(options)
        if options.command == "gpu":
            import torch

            from . import _gpu

            device = torch.device(options.device)
            return _gpu.main(options.minutes, options.out, device, options.steps)
        if options.command == "tune":
            import torch

            from . import tune
            from ._cases import choose_ops

            device = torch.device(options.device)
            ops = choose_ops(options.op)
            return tune.main(
                options.minutes, ops, options.out, device, options.again,
                options.results, options.share, options.processes,
            )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2


if __name__ == "__main__":
    sys.exit(main())
