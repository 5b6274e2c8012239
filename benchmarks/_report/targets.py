"""Targets: what vitkern set out to reach on a GPU, declared once; verdicts.py judges them.

The order is that of value: groups of the grids that stand here are measured in this order, before
all others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

EAGER = ("eager", "timm")
AUTOTUNED = ("timm compile max-autotune",)
# Attentions that `auto` must not be behind, on a card on which they are.
ATTENTIONS = ("cudnn", "sdpa", "flash", "flash2", "flash3", "flash4")

# "Never slower" has room for what two runs differ by.
ROOM = 1 / 1.03


@dataclass(frozen=True)
class Target:
    """A figure that is to be reached.

    groups: whose rows it is of; of several the best counts. against: names of rivals, or for
    "product" the groups of plain products. must, aim: thresholds.
    """

    what: str
    measure: str
    groups: tuple[str, ...]
    must: float
    aim: float | None = None
    against: tuple[str, ...] = ()


def _training(
    what: str, model: str, batch: int, must: float, aim: float, eager: float, compiled: float
) -> list[Target]:
    group = (f"{model} b{batch} train bf16 autocast",)
    what = f"{what} b{batch} training"
    return [
        Target(what, "MFU", group, must, aim),
        Target(f"{what} against eager", "speed-up", group, eager, against=EAGER),
        Target(f"{what} against max-autotune", "speed-up", group, compiled, against=AUTOTUNED),
        Target(f"{what}, peak against eager", "memory", group, 0.6, against=EAGER),
    ]


def _inference(
    what: str, model: str, batch: int, must: float, aim: float | None = None
) -> list[Target]:
    """A user has the choice of how to get bfloat16."""
    groups = [f"{model} b{batch} forward {name} CUDA graph" for name in ("bf16", "bf16 autocast")]
    measure = "images/s" if batch == 256 else "time"
    return [Target(f"{what} b{batch}, CUDA graph", measure, tuple(groups), must, aim)]


def _op(
    what: str,
    group: str,
    measure: str,
    must: float,
    aim: float | None = None,
    against: tuple[str, ...] = (),
) -> Target:
    return Target(what, measure, (f"{group} bfloat16",), must, aim, against)


SMALL, BASE, LARGE = (f"vit_{name}_patch16_224" for name in ("small", "base", "large"))
HUGE = "vit_huge_patch14_224"
BLOCK = (f"{BASE} b256 bf16 autocast",)


class Product(NamedTuple):
    """x [rows, depth] by weight [features, depth], and bias: what the linear ops are held against
    at the same shape. As text, its group."""

    rows: int
    features: int
    depth: int

    def __str__(self) -> str:
        return f"product [{self.rows}x{self.depth} -> {self.features}] bfloat16"


# B/16's, of 64 images: fc2's two gradients are of fc1's shape, and one over all tokens.
ROWS = 64 * 197
QKV, PROJ = Product(ROWS, 3 * 768, 768), Product(ROWS, 768, 768)
FC1, FC2 = Product(ROWS, 4 * 768, 768), Product(ROWS, 768, 4 * 768)
FC2_WEIGHT = Product(768, 4 * 768, ROWS)
PRODUCTS = (QKV, FC1, FC2, PROJ, FC2_WEIGHT)


def _products(what: str, group: str, must: float, *alone: Product) -> Target:
    return _op(f"{what}, of cuBLAS", group, "product", must, against=tuple(map(str, alone)))


def _attentions() -> Iterable[Target]:
    """At the tokens of 224 px with patch 16 (alone: 197) and 32, with registers, patch 14; of 384
    px; of SigLIP, and a class token."""
    for tokens, batch in {197: 64, 50: 64, 201: 64, 257: 64, 577: 16, 730: 16}.items():
        for op, share in (("attention", 0.85), ("attention_backward", 0.65)):
            group = f"{op} [B={batch} N={tokens} H=12 d=64]"
            what = f"{op} N={tokens}"
            yield _op(f"{what} against the best", group, "speed-up", 1.0, against=ATTENTIONS)
            if tokens == 197:
                yield _op(f"{what}, of the roof", group, "roofline", share)


# H/14 trains on 128 images: for 256 eager PyTorch keeps more than an H100 of 80 GB has.
TARGETS: tuple[Target, ...] = (
    *_training("B/16", BASE, 256, 0.45, 0.55, 2.0, 1.35),
    *_inference("B/16", BASE, 1, 0.45e-3, 0.30e-3),
    *_training("L/16", LARGE, 256, 0.48, 0.57, 1.8, 1.25),
    *_inference("L/16", LARGE, 1, 0.95e-3),
    *_inference("L/16", LARGE, 256, 4630),
    *_inference("L/16", LARGE, 32, 8.0e-3),
    *_inference("B/16", BASE, 256, 15900),
    *_inference("B/16", BASE, 32, 2.3e-3),
    *_training("S/16", SMALL, 256, 0.36, 0.42, 3.0, 1.5),
    *_training("H/14", HUGE, 128, 0.50, 0.59, 1.7, 1.2),
    *_inference("H/14", HUGE, 1, 1.6e-3),
    *_inference("H/14", HUGE, 256, 1730),
    *_inference("H/14", HUGE, 32, 21.3e-3),
    Target("no model behind a rival", "never slower", ("model",), ROOM),
    Target("no op behind an implementation", "never slower", ("op",), ROOM),
    *_attentions(),
    _products(
        "qkv with its norm",
        "norm_linear [ln 64x197x768 ->  2304 saved given statistics]", 0.92, QKV,
    ),
    _products(
        "fc1 with its norm and GELU",
        "norm_linear [ln 64x197x768 -> gelu 3072 saved given statistics]", 0.92, FC1,
    ),
    _products(
        "fc2 with the residual", "linear_residual [64x197x3072 -> 768 statistics]", 0.95, FC2
    ),
    _products(
        "proj with the residual", "linear_residual [64x197x768 -> 768 statistics]", 0.95, PROJ
    ),
    _products("a layer with GELU", "linear_act [gelu 64x197x768 -> 3072]", 0.95, FC1),
    # 88 % of the one with GELU's gradient, 95 % of the one with the bias's: of both together.
    _products(
        "fc2's two gradients with GELU's and the bias's",
        "linear_residual_backward [64x197x3072 -> 768 statistics behind gelu]",
        2 / (1 / 0.88 + 1 / 0.95), FC1, FC2_WEIGHT,
    ),
    _op("LayerNorm", "layer_norm [ln 128x197x768]", "roofline", 0.92),
    _op(
        "residual, LayerScale, LayerNorm",
        "add_layer_norm [ln 128x197x768 scale drop fp32 stream]", "roofline", 0.90,
    ),
    _op("LayerNorm's gradients", "layer_norm_backward [ln 128x197x768]", "roofline", 0.80),
    _op("patch embedding", "patch_embed [128x3x224x224 /16x16 D=768]", "roofline", 0.80),
    _op(
        "patch embedding of bytes",
        "patch_embed [128x3x224x224 /16x16 D=768 nhwc uint8]", "roofline", 0.80,
    ),
    Target("kernels of a block forward, casts of weights apart", "launches", BLOCK, 6),
    Target("saved for backward, against eager", "saved", BLOCK, 0.56, against=("eager",)),
)  # fmt: skip


def order(targets: Sequence[Target] = TARGETS) -> dict[str, int]:
    """Groups that targets are of, and those that they are held against, by their place in value."""
    names = (
        name
        for target in targets
        for name in (*(target.against if target.measure == "product" else ()), *target.groups)
    )
    return {name: number for number, name in enumerate(dict.fromkeys(names))}
