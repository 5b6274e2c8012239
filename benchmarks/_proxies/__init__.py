"""What a transformer block costs, counted without a GPU: launches, bytes of HBM, bytes kept.

Nothing is computed and nothing is timed: the block of a model runs on fake tensors, forward and
backward, and what it would have launched is counted. Fake CPU tensors, since without a GPU PyTorch
refuses to go backward through fake CUDA ones; CPU autocast casts what CUDA's does here, and
attention is replaced by the operator that CUDA would call. (Forward, where both can be had, the
operators are the same, one by one.)

Four ways of running it:

vitkern                    Our kernels, launches as they pass the one gate. The block is one of
                           many: the statistics of its first norm come from the block before, and it
                           leaves some to the next. A model has one launch more, which makes the
                           first. Casts of weights are ATen's.
eager, timm                Each operator that PyTorch dispatches, views and allocations apart, is
                           one launch; its bytes are the distinct elements that it reads and writes.
timm compile (predicted)   The graphs that torch.compile would make of timm's block: AOTAutograd,
                           Inductor's decompositions, its min-cut partitioner. What Inductor would
                           make of those is a rule, `Fusion`, not Inductor itself.

All are lower bounds: a kernel may read twice what is larger than a cache, and an operator of ATen's
may be several kernels, such as the backward of attention and of layer norm.

Our ops declare what a perfect kernel moves. What the launches of one op read again (dz, dqkv) or
leave to each other (act(z)) is not in it, fifty units a training step. So there are two figures:
`declared_bytes`, and `bytes`, which counts ours as everything else is counted, by the tensors that
each launch is given.

Checked against what else is known, for B/16 at batch 256 under autocast, in bytes per token and
unit of width, traffic of weights (1.4 forward, 3.3 in all) taken off:

- eager 104 forward, 322 in all, where a model by hand said 104 and 360. The 38 are kernels within
  one operator: in attention's backward the pass for delta and dq in float32, 22; in layer norm's
  the sums for its parameters, which read both inputs again, 16.
- compile 84 and 270, where the model said 280; with those 22 of attention's it would be 292.
- Inductor's own scheduler (PyTorch 2.14.1, a made-up H100, by hand, on these graphs) makes 17
  launches and 83.5 units forward, 48 and 267.7 in a training step, weights included. The rule: 17
  and 85.5, 47 and 273.5, of PyTorch 2.8's graphs and of 2.14's. Inductor adds up the stream twice
  in place of keeping it after attention, and sums for the norms' parameters along with their rows
  ("mix-order reductions").
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vitkern
from vitkern.model.block import Block

from .._cases import columns, save
from .._contest import Log
from .._models import AUTOCAST, TOY, Precision
from .count import Cost, ours, plain
from .fusion import compiled

COMPILED = "timm compile (predicted)"
STEPS = ("forward", "train")

# Our kernels by name: on a CPU "auto" would not take them.
KERNELS = {"norm_linear": "triton", "attention": "triton", "linear_residual": "triton"}


def block_config(name: str) -> vitkern.ViTConfig:
    """Of a timm name ("toy" for `_models.TOY`), with one block, on our kernels."""
    options: dict[str, Any] = {"depth": 1, "impl": KERNELS}
    if name == "toy":
        return vitkern.ViTConfig(**{**TOY, **options})
    return vitkern.ViTConfig.from_name(name, **options)


def faked(module: Any) -> Any:
    """`module`, with the tensors of the current mode, fake ones, in place of its parameters."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
    return module


def timm_block(name: str) -> nn.Module:
    """A block of timm's model `name`.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: timm has no such model.
    """
    import timm

    if name == "toy":
        return timm.models.VisionTransformer(**{**TOY, "depth": 1}).blocks[0]
    if not timm.is_model(name):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}")
    return timm.create_model(name, depth=1).blocks[0]


def proxies(
    model: str = "vit_base_patch16_224", batch: int = 256, precision: Precision = AUTOCAST
) -> list[dict[str, Any]]:
    """What a block of `model` costs, by implementation and step, as rows of a results file.

    Rows of kind "proxy" have the fields of `Cost`, saved_bytes in training steps only, without
    parameters and their casts; and width_units, which is bytes per token and unit of width. What
    can't be had is a row "absent" or "left out" with the reason.

    Raises:
        ValueError: an unknown model, a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    config = block_config(model)
    rows, cols = config.grid_size
    tokens = batch * (rows * cols + config.num_prefix_tokens)
    case = {"model": model, "batch": batch, "precision": precision.name}
    made: list[dict[str, Any]] = []
    builders: dict[str, tuple[Callable[[], Any], Callable[..., Cost]]] = {
        "vitkern": (lambda: Block(config), ours),
        "eager": (lambda: vitkern.EagerViT(config).blocks[0], plain),
        "timm": (lambda: timm_block(model), plain),
        COMPILED: (lambda: timm_block(model), compiled),
    }
    for impl, (build, count) in builders.items():
        try:
            real = build().to(precision.weights)
            fake = count is not ours
            with FakeTensorMode() if fake else contextlib.nullcontext():
                block = faked(real) if fake else real
                x = torch.empty(batch, tokens // batch, config.embed_dim, dtype=precision.weights)
                costs = {step: count(block, x, step, precision) for step in STEPS}
        except ModuleNotFoundError as error:
            made.append({"kind": "absent", "impl": impl, "why": f"{error.name} is not installed"})
            continue
        except (ValueError, NotImplementedError) as error:
            group = f"{model} b{batch} {precision.name} block"
            made.append({"kind": "left out", "group": group, "impl": impl, "why": str(error)})
            continue
        for step, cost in costs.items():
            row = {"kind": "proxy", **case, "impl": impl, "step": step, **vars(cost)}
            made.append({**row, "width_units": cost.bytes / (tokens * config.embed_dim)})
    return made


def add(log: Log) -> None:
    """Append the proxies of B/16 to a run's results, or why there are none: they use PyTorch's
    internals, and must not take the report with them."""
    try:
        rows = proxies()
    except Exception as problem:
        why = f"{type(problem).__name__}: {problem}"
        rows = [{"kind": "left out", "group": "proxies", "impl": "all", "why": why}]
    for row in rows:
        log.add(row)


HEAD = (
    *("block of", "step", "implementation", "launches", "HBM MiB"),
    *("units", "units declared", "saved MiB"),
)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """For people: the proxies' rows, then what is missing."""
    lines = [HEAD]
    missing = []
    for row in rows:
        if row["kind"] != "proxy":
            missing.append(f"{row['impl']}: {row['why']}")
            continue
        kept = row["saved_bytes"]
        lines.append(
            (
                f"{row['model']} b{row['batch']} {row['precision']}",
                row["step"],
                row["impl"],
                f"{row['launches']} ({row['weight_casts']} cast weights)",
                f"{row['bytes'] / 2**20:,.0f}",
                f"{row['width_units']:.1f}",
                f"{row['width_units'] * row['declared_bytes'] / row['bytes']:.1f}",
                "" if kept is None else f"{kept / 2**20:,.0f}",
            )
        )
    return "\n".join([columns(lines), *dict.fromkeys(missing)])


def main(model: str, batch: int, json_path: Path | None) -> int:
    """Count, print a table, write the rows to `json_path` as JSON Lines."""
    rows = proxies(model, batch)
    print(table(rows))
    print("\nCounted, not measured. Units: bytes per token and unit of width.")
    if json_path is not None:
        save(json_path, "".join(json.dumps(row) + "\n" for row in rows))
    return 0
