"""The command line's tables, and the page docs/roofline.md."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import vitkern.roofline
from vitkern._table import columns
from vitkern.model.config import ViTConfig

from .executions import EXECUTIONS, PRECISIONS, positive, resolve
from .machines import MACHINES, Machine, card
from .prediction import Prediction, predict
from .projection import STRATEGIES, project

Lines = list[list[str]]

PASSES = (
    "vitkern passes the bound where it saves more by computing the class token only in its last "
    "block than it loses elsewhere."
)
COMMAND = "python -m vitkern roofline --markdown > docs/roofline.md"
MODELS = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "H/14": "vit_huge_patch14_224",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="timm's name; tables of all cards if left out")
    add("--gpu", default="H100", help=f"one of {', '.join(MACHINES)} (%(default)s)")
    add("--batch", type=int, default=256, help="images on a GPU (%(default)s)")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--train", action="store_true", help="a training step (with several GPUs)")
    step.add_argument("--forward", action="store_true", help="a forward pass (default)")
    add("--execution", choices=EXECUTIONS, default="vitkern", help="whose ops (%(default)s)")
    add("--precision", choices=list(PRECISIONS), help="default: bf16 autocast; of fused: bf16")
    add("--save", choices=["balanced", "minimal"], help="what vitkern keeps for backward")
    add("--gpus", type=int, default=1, help="in all (%(default)s)")
    add("--gpus-per-node", type=int, default=8, help="%(default)s")
    add("--strategy", choices=STRATEGIES, default="ddp", help="%(default)s")
    add("--markdown", action="store_true", help="tables in Markdown")


def run(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        ValueError: an unknown model or GPU, sizes that make no sense, options that exclude each
            other, or that need a model and have none; the text says which.
    """
    card(options.gpu)
    for name in ("batch", "gpus", "gpus_per_node"):
        positive(_flag(name), getattr(options, name))
    if options.forward and options.gpus > 1:
        raise ValueError(
            f"--forward and --gpus {options.gpus} exclude each other: several GPUs are projected "
            "for training only"
        )
    if options.model is None:
        alone = argparse.ArgumentParser()
        add_options(alone)
        given = [
            _flag(name)
            for name, default in vars(alone.parse_args([])).items()
            if name != "markdown" and getattr(options, name) != default
        ]
        if given:
            raise ValueError(f"{', '.join(given)} only with a MODEL; the tables are of all cards")
        return page()
    config = resolve(options.model)
    if options.save:
        config = replace(config, save=options.save)
    training = options.train or options.gpus > 1
    layout = markdown if options.markdown else columns
    wide = options.precision in ("tf32", "float32")
    found = {}
    for execution in EXECUTIONS:
        if execution == "vitkern" and wide:
            continue
        precision = None if execution == "fused" and not wide else options.precision
        found[execution] = predict(
            config, options.gpu, options.batch, training, execution, precision=precision
        )
    shown = found.get(options.execution, found["eager"])
    what = "a training step" if training else "a forward pass"
    parts = [
        f"{shown.model}, {what} of {options.batch} images on {shown.machine.name}. Predicted, "
        "not measured.",
        layout(comparison(found)),
    ]
    if not wide and found["vitkern"].seconds < found["fused"].seconds:
        parts.append(PASSES)
    parts += [f"By op, {shown.execution}:", layout(shown.table())]
    if wide:
        parts.append("vitkern leaves float32 products to PyTorch: no prediction for it.")
    else:
        parts += [
            "Where vitkern as it is launched takes longer than the bound, in us, with the whole "
            "last block:",
            layout(excess(config, shown.machine, options.batch, training, options.precision)),
        ]
    if options.gpus > 1:
        plan = project(
            config, options.gpu, options.batch, gpus=options.gpus, strategy=options.strategy,
            gpus_per_node=options.gpus_per_node, execution=shown.execution,
            precision=options.precision,
        )  # fmt: skip
        parts.append(str(plan))
    return "\n\n".join(parts)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The lines as a table; the first is the head."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def comparison(found: dict[str, Prediction]) -> Lines:
    """A line an execution."""
    bound = found["fused"].seconds
    head = ["execution", "ms", "images/s", "MFU", "over the bound", "GB moved", "kernels"]
    return [
        head,
        *(
            [
                name, f"{1e3 * p.seconds:.3g}", f"{p.images_per_s:,.0f}", f"{p.mfu:.1%}",
                f"{p.seconds / bound:.2f}x", f"{sum(w.calls * w.bytes for w in p.works) / 1e9:.3g}",
                str(sum(w.calls for w in p.works)),
            ]
            for name, p in found.items()
        ),
    ]  # fmt: skip


def excess(
    config: ViTConfig, machine: Machine | str, batch: int, training: bool, precision: str | None
) -> Lines:
    """Time by op beside that of the bound, the largest difference first.

    Of the model that pools by the mean, so that vitkern, too, computes its whole last block.
    """
    if config.global_pool == "token":
        config = replace(config, global_pool="avg")
    own, least = (
        {
            (row.op, row.part): 1e6 * row.seconds
            for row in predict(config, machine, batch, training, execution, precision=p).rows()
        }
        for execution, p in (("vitkern", precision), ("fused", None))
    )
    keys = sorted({**own, **least}, key=lambda key: least.get(key, 0.0) - own.get(key, 0.0))
    lines = [["op", "part", "vitkern", "fused", "difference"]]
    for key in keys:
        x, y = own.get(key, 0.0), least.get(key, 0.0)
        lines.append([*key, f"{x:,.1f}", f"{y:,.1f}", f"{x - y:+,.1f}"])
    return lines


def page() -> str:
    """docs/roofline.md: what the model assumes, and its tables for all cards."""
    base = resolve(MODELS["B/16"])
    text = [
        "# The roofline of Vision Transformers",
        f"Written by `{COMMAND}`. All figures are predictions of this model:",
        "\n\n".join((vitkern.roofline.__doc__ or "").split("\n\n")[2:]).strip(),
        "## Cards",
        markdown(_cards()),
        "## One GPU, images/s",
        "224 pixels, batch 256, whether or not that fits into memory. In each cell: eager / "
        f"compiler / vitkern / fused. {PASSES}",
        markdown(_throughput()),
        "## Where vitkern is above its bound",
        "A training step of B/16 on an H100, batch 256, us by op; pooled by the mean, so that both "
        "compute the whole last block.",
        markdown(excess(base, "H100", 256, True, "bf16 autocast")),
        "The same with bfloat16 weights and stream (`model.bfloat16()`).",
        markdown(excess(base, "H100", 256, True, "bf16")),
        "## Several GPUs",
        "H100, 256 images a GPU, vitkern under autocast. Images/s and efficiency: communication "
        "not hidden at all, and hidden as far as it can be. Memory of a GPU in GB, and the same "
        'with `save="minimal"`.',
        markdown(_several()),
    ]
    return "\n\n".join(text)


def _cards() -> Lines:
    def row(m: Machine) -> list[str]:
        assert m.peak.bfloat16 is not None
        return [
            m.name, f"{m.peak.bfloat16 / 1e12:.0f}", f"{m.rate('bfloat16') / 1e12:.0f}",
            f"{m.peak_bytes_per_s / 1e12:.3g}", f"{m.bytes_per_s / 1e12:.3g}",
            f"{m.memory / 1e9:.0f}", f"{m.node_link / 1e9:.3g}", f"{m.network / 1e9:.3g}",
        ]  # fmt: skip

    head = ["card", "bf16 TFLOP/s, datasheet", "achievable", "TB/s, datasheet", "achievable"]
    head += ["memory GB", "node link GB/s, achievable", "network GB/s, achievable"]
    return [head, *(row(m) for m in MACHINES.values())]


def _throughput() -> Lines:
    lines = [["card", "model", "forward", "training", "MFU of training"]]
    for machine in MACHINES:
        for short, name in MODELS.items():
            cells = []
            for training in (False, True):
                found = [predict(name, machine, 256, training, e) for e in EXECUTIONS]
                cells.append(" / ".join(f"{p.images_per_s:,.0f}" for p in found))
            mfu = " / ".join(f"{p.mfu:.0%}" for p in found)
            lines.append([machine, short, *cells, mfu])
    return lines


def _several() -> Lines:
    lines = [["model", "GPUs", "strategy", "images/s", "efficiency", "GB", "GB, minimal"]]
    for short in ("B/16", "L/16", "H/14"):
        for gpus in (8, 64):
            for strategy in STRATEGIES:
                plans = [
                    project(
                        replace(resolve(MODELS[short]), save=save),
                        "H100", 256, gpus=gpus, strategy=strategy,
                    )
                    for save in (None, "minimal")
                ]  # fmt: skip
                (best, worst), (high, low) = plans[0].images_per_s, plans[0].efficiency
                sizes = [
                    f"{sum(p.memory.values()) / 1e9:.1f}{'' if p.fits else ' (too much)'}"
                    for p in plans
                ]
                speed = f"{worst:,.0f} to {best:,.0f}"
                lines.append(
                    [short, str(gpus), strategy, speed, f"{low:.0%} to {high:.0%}", *sizes]
                )
    return lines
