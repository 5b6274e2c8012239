"""Every ViT that timm has by name, timm's model and ours with the same weights, side by side.

Weights are drawn so that a mistake shows: matrices keep the scale of what they multiply; biases,
norms, LayerScale, positions and tables are random, too. Both models share their storage.
An error is max |ours - timm's| / max |timm's|, in float32; for intermediates and gradients the
largest of all blocks, parameters and the images.
"""

import fnmatch
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_deprecated_models
from torch import Tensor, nn

import vitkern
from vitkern._table import columns
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS, REFUSED

TOLERANCE = 1e-5
EXACT = 1e-10  # the same in float64, which is asked where float32 is above
HEAD = ("name", "parameters", "blocks", "image", "logits", "intermediates", "gradients", "verdict")
GRID = (5, 7)  # of patches, where the model's own image would take too long; rows are no columns
WORK = 25e9  # parameters times patches up to which it doesn't
TILE = 1 << 25  # random numbers drawn for a model; a parameter takes a stretch of them
# What makes a model larger or other weights' home, but not another kind of network.
SIZES = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes"}
SIZES |= {"mean", "std", "rel_pos_dim"}


@dataclass(frozen=True)
class Row:
    """What was found for one name; an error that was not measured is None."""

    name: str
    parameters: int = 0
    blocks: str = ""
    image: str = ""
    logits: float | None = None
    intermediates: float | None = None
    gradients: float | None = None
    exact: float | None = None  # the largest of the three in float64
    refused: str = ""
    failed: str = ""

    @property
    def equal(self) -> bool:
        """Whether all that was measured is within `TOLERANCE`."""
        errors = (self.logits, self.intermediates, self.gradients)
        return self.logits is not None and all(e <= TOLERANCE for e in errors if e is not None)

    @property
    def verdict(self) -> str:
        """One word, or the reason."""
        if self.refused or self.failed:
            return f"refused: {self.refused}" if self.refused else f"failed: {self.failed}"
        if self.equal or self.exact is None or self.exact > EXACT:
            return "equal" if self.equal else "differs"
        return f"equal in float64: {self.exact:.1e}"

    @property
    def agrees(self) -> bool:
        """Whether it is equal, or would be but for float32."""
        return self.verdict.startswith("equal")

    def cells(self) -> list[str]:
        """The row of a table."""
        errors = (self.logits, self.intermediates, self.gradients)
        count = f"{self.parameters / 1e6:,.1f} M" if self.parameters else ""
        shown = ["" if e is None else f"{e:.1e}" for e in errors]
        return [self.name, count, self.blocks, self.image, *shown, self.verdict]


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|; infinite where shapes or finiteness differ."""
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return math.inf
    ours, theirs = ours.detach(), theirs.detach()
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    difference = float((ours - theirs).abs().max()) if theirs.numel() else 0.0
    return difference / largest if largest else (math.inf if difference else 0.0)


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Weights of which none is special: see the head of this file."""
    most = max(p.numel() for p in model.parameters())
    tile = torch.randn(max(most, min(TILE, 2 * sum(p.numel() for p in model.parameters()))))
    for name, p in model.named_parameters():
        start = int(torch.randint(tile.numel() - p.numel() + 1, ()))
        normal = tile[start : start + p.numel()].view_as(p)
        last = name.rsplit(".", 1)[-1]
        if p.dim() == 1 and last in ("weight", "gamma"):  # a norm's or LayerScale's
            torch.add(1, normal, alpha=0.1, out=p)
        elif p.dim() == 1:  # biases, differential attention's lambdas
            torch.mul(normal, 0.1, out=p)
        elif "embed" in last or "token" in last or "table" in last or "latent" in last:
            torch.mul(normal, 0.5, out=p)
        else:
            torch.mul(normal, p[0].numel() ** -0.5, out=p)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def twins(name: str, **arguments: Any) -> tuple[Any, Any]:
    """timm's model and ours on the same random weights, which take their memory once."""
    theirs = timm.create_model(name, device="meta", **arguments)
    if any(True for _ in theirs.buffers()):  # tables of positions, BatchNorm: to be computed
        theirs = timm.create_model(name, **arguments)
    else:
        theirs = theirs.to_empty(device="cpu")
    draw(theirs)
    ours = vitkern.create_model(name, device="meta", **arguments)
    here = vitkern.create_model(name, **{**arguments, "depth": 1}, weight_init="skip")
    if any("blocks." in key for key, _ in ours.named_buffers()):  # tables of positions again
        ours = vitkern.create_model(name, **arguments)
    for key, buffer in here.named_buffers():
        module, _, last = key.rpartition(".")
        if ours.get_buffer(key).is_meta:
            setattr(ours.get_submodule(module), last, buffer)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs.eval(), ours.eval()


def _gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Of every parameter and of the images, for a weighted sum of the logits."""
    images = images.clone().requires_grad_()
    inputs = {"images": images, **dict(model.named_parameters())}
    logits = model(images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((logits * weights).sum(), list(inputs.values()))
    slopes = dict(zip(inputs, found, strict=True))
    for key in [key for key in slopes if key.endswith("rel_pos.mlp.fc2.bias")]:
        # The same for all scores of a head, so softmax cancels it: nothing but rounding is left,
        # to be measured against the gradient of the weight beside it.
        weight = slopes[key.replace("bias", "weight")]
        slopes[key] = torch.cat([slopes[key], weight.flatten()])
    return slopes


def compare(
    name: str,
    gradients: bool = False,
    depth: int | None = None,
    full: bool = False,
    memory: float = math.inf,
    **overrides: Any,
) -> Row:
    """timm's `name` beside ours, with other arguments if given.

    depth: at most so many blocks, and images of `GRID`. full: images of its own size in any case.
    memory: bytes for weights, weights packed by a product, and gradients; blocks that don't fit
    are left out.
    """
    if name in REFUSED:
        return Row(name, refused=REFUSED[name])
    config = ViTConfig.from_name(name, **overrides)
    plan = vitkern.create_model(name, device="meta", **{**overrides, "depth": 1})
    block = sum(p.numel() for p in plan.blocks.parameters())
    rest = sum(p.numel() for p in plan.parameters()) - block
    copies = 3 if gradients else 2
    most = memory if config.embed_layer is None else math.inf  # those are small
    fit = (most / 4 / copies - rest) / block
    blocks = int(max(1, min(config.depth, depth or config.depth, fit)))
    size = config.img_size
    work = (rest + blocks * block) * math.prod(config.grid_size)
    if depth or (work > WORK and not full):
        size = (GRID[0] * config.stride[0], GRID[1] * config.stride[1])
    torch.manual_seed(0)
    theirs, ours = twins(name, **{**overrides, "depth": blocks, "img_size": size})
    few = blocks * block > 1e8 or config.embed_layer is not None  # images are what costs there
    images = torch.randn(1 if few else 2, config.in_chans, *size)
    prefix = config.num_prefix_tokens > 0
    # Rounding may turn over a near tie of a backbone's ReLU or max-pool, and with it a gradient.
    narrow = gradients and config.embed_layer is None
    errors = _errors(ours, theirs, images, prefix, narrow)
    worst = max(e for e in errors if e is not None)
    exact = None
    if (worst > TOLERANCE or gradients != narrow) and blocks * block < 5e8:
        ours, theirs = ours.double(), theirs.double()
        wide = _errors(ours, theirs, images.double(), prefix, gradients)
        if gradients != narrow:
            errors = (*errors[:2], wide[2])
        if worst > TOLERANCE:
            exact = max(e for e in wide if e is not None)
    return Row(
        name,
        sum(p.numel() for p in ours.parameters()),
        f"{blocks}" if blocks == config.depth else f"{blocks} of {config.depth}",
        f"{size[0]}x{size[1]}",
        *errors,
        exact=exact,
    )


def _errors(
    ours: Any, theirs: Any, images: Tensor, prefix: bool, gradients: bool
) -> tuple[float, float, float | None]:
    """Of logits, intermediates (with prefix tokens, if there are any) and gradients."""
    with torch.no_grad():
        logits = error(ours(images), theirs(images))
        (final, features), (their_final, expected) = (
            model.forward_intermediates(images, return_prefix_tokens=prefix)
            for model in (ours, theirs)
        )
        between = [error(final, their_final)]
        for mine, wanted in zip(features, expected, strict=True):
            pairs = zip(mine, wanted, strict=True) if isinstance(mine, tuple) else [(mine, wanted)]
            between += [error(a, b) for a, b in pairs]
    if not gradients:
        return logits, max(between), None
    grads, slopes = (_gradients(model, images) for model in (ours, theirs))
    if grads.keys() != slopes.keys():
        return logits, max(between), math.inf
    return logits, max(between), max(error(grads[key], slopes[key]) for key in slopes)


def _work(config: ViTConfig) -> int:
    return config.embed_dim**2 * config.depth * math.prod(config.grid_size)


def representative() -> set[str]:
    """A third of the names: the smallest of every kind of network, then the next of each."""
    kinds: dict[Any, list[tuple[int, str]]] = {}
    for name in PRESETS:
        config = ViTConfig.from_name(name)
        kind = tuple(getattr(config, f.name) for f in fields(config) if f.name not in SIZES)
        kinds.setdefault(kind, []).append((_work(config), name))
    queues = [sorted(members) for members in kinds.values()]
    chosen: list[str] = []
    for turn in range(max(map(len, queues))):
        chosen += [queue[turn][1] for queue in queues if turn < len(queue)]
        if 3 * len(chosen) >= len(PRESETS):
            break
    return set(chosen[: max(len(queues), -(-len(PRESETS) // 3))])


def names(patterns: Sequence[str] = ()) -> list[str]:
    """Names that match a pattern (all without one); a ValueError if none does."""
    every = sorted([*PRESETS, *REFUSED])
    found = [n for n in every if not patterns or any(fnmatch.fnmatch(n, p) for p in patterns)]
    if not found:
        raise ValueError(f"no model matches {' '.join(patterns)}; expected some of vitkern.PRESETS")
    return found


def rows(chosen: Sequence[str], depth: int | None, full: bool, memory: float) -> Iterator[Row]:
    """One after the other, the smallest first; what raises is a row, too."""
    third = representative()

    def work(name: str) -> float:
        return _work(ViTConfig.from_name(name)) if name in PRESETS else 0

    for name in sorted(chosen, key=work):
        try:
            yield compare(name, name in third, depth, full, memory)
        except Exception as problem:  # the table shall be whole
            reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
            yield Row(name, failed=reason.replace("|", "/"))
        gc.collect()


def versions() -> str:
    """What was compared."""
    torch_version = torch.__version__.partition("+")[0]
    return f"timm {timm.__version__}, vitkern {vitkern.__version__}, PyTorch {torch_version}"


def markdown(found: Sequence[Row]) -> str:
    """docs/timm.md."""
    built = [row for row in found if not row.refused]
    equal = sum(row.equal for row in built)
    with_gradients = sum(row.gradients is not None for row in built)
    old = get_deprecated_models()
    lines = [
        "# timm's Vision Transformers by name",
        "",
        "Every entry of timm's `vision_transformer*` and `deit` files: timm's model and ours on",
        f"the same random weights and images, in float32 on a CPU ({versions()}).",
        "An error is max |ours - timm's| / max |timm's|: of the logits; of what",
        "`forward_intermediates` gives for every block and at the end, the largest; of the",
        "gradients of every parameter and of the images, the largest; those of hybrids in float64,",
        "as rounding may turn over a near tie of a ReLU or a max-pool, and with it a gradient.",
        f"*equal*: none is above {TOLERANCE:.0e}. Where one is, all are measured again in float64.",
        f"*equal in float64*: the largest, which is given, is below {EXACT:.0e} there; what",
        "float32 shows is rounding, of timm's model as of ours.",
        "",
        f"**{equal} of {len(built)} built are equal ({equal / max(len(built), 1):.1%}), "
        f"{sum(row.agrees for row in built) - equal} more in float64; "
        f"{len(found) - len(built)} of {len(found)} names are refused, with a reason.**",
        f"Gradients were compared for {with_gradients}, the smallest of every kind of network",
        f"among them. Models with many weights and patches get images of {GRID[0]} x {GRID[1]}",
        "patches in place of their own size; the largest lack blocks that memory had no room for.",
        "Old names that timm maps to newer ones: \\*.",
        "",
        "Written by `python -m benchmarks names --markdown docs/timm.md`; with names or patterns,",
        "those rows are made anew.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|" + "---:|" * (len(HEAD) - 2) + "---|",
    ]
    for row in sorted(found, key=lambda row: row.name):
        name, *cells = row.cells()
        lines.append("| " + " | ".join([f"`{name}`" + r" \*" * (name in old), *cells]) + " |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, Row]:
    """The rows of a table that `markdown` wrote, by name.

    Raises:
        ValueError: it is of other versions.
    """
    if not path.exists():
        return {}
    text = path.read_text()
    if versions() not in text:
        raise ValueError(f"{path} is not of {versions()}; run all names anew, into another file")
    found = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            name, count, blocks, image, *errors, verdict = (
                c.strip() for c in line.split("|")[1:-1]
            )
            name = name.split("`")[1]
            logits, between, slopes = (float(e) if e else None for e in errors)
            parameters = round(1e6 * float(count.rstrip(" M").replace(",", ""))) if count else 0
            kind, _, told = verdict.partition(": ")
            found[name] = Row(
                name,
                parameters,
                blocks,
                image,
                logits,
                between,
                slopes,
                exact=float(told) if kind.startswith("equal in") else None,
                refused=told if kind == "refused" else "",
                failed=told if kind == "failed" else "",
            )
    return found


def main(
    patterns: Sequence[str],
    depth: int | None = None,
    full: bool = False,
    path: Path | None = None,
    memory: float = math.inf,
    missing: bool = False,
) -> int:
    """Print a line a model as it comes; write the table. 1: a model differs or failed.

    missing: only those that the table lacks, so that a run that was cut off goes on.
    """
    found: dict[str, Row] = {}
    kept = read(path) if path is not None else {}
    chosen = [name for name in names(patterns) if not (missing and name in kept)]
    print("  ".join(HEAD), flush=True)
    for row in rows(chosen, depth, full, memory):
        found[row.name] = row
        print("  ".join(filter(None, row.cells())), flush=True)
        if path is not None:  # for every row: a long run that is cut off leaves what it has
            path.write_text(markdown(list({**kept, **found}.values())))
    built = [row for row in found.values() if not row.refused]
    wrong = [row for row in built if not row.agrees]
    equal = sum(row.equal for row in built)
    wide = len(built) - len(wrong) - equal
    print(f"{equal} of {len(built)} equal, {wide} in float64, {len(found) - len(built)} refused")
    if wrong:
        print(columns([HEAD, *(row.cells() for row in wrong)]))
    return int(bool(wrong))
