"""``python -m benchmarks COMMAND``: the gates that need no GPU, and the measurements."""

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    offline = commands.add_parser(
        "offline",
        help="compile every kernel without a GPU; fail on spills, too much shared memory, no MMA",
        description="Compile every kernel for cards that aren't here and print registers, spills, "
        "shared memory and tensor-core instructions. Exit code 1 lists the offenders.",
    )
    offline.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="80 86 89 90")
    offline.add_argument("--op", nargs="+", help="these ops only (default: all)")
    offline.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    offline.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    offline.add_argument(
        "--size", nargs="+", choices=["vit", "tiny"], default=["vit", "tiny"], help="default: both"
    )
    offline.add_argument(
        "--all", action="store_true", help="every dtype and alignment of every sample"
    )
    offline.add_argument("--verbose", action="store_true", help="one line a compilation")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
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
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 2


if __name__ == "__main__":
    sys.exit(main())
