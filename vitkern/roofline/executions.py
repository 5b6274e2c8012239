"""The kernels of a forward pass or a training step, with their FLOPs and bytes, by execution."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vitkern.model import ViT
from vitkern.model.config import ViTConfig

from .machines import Machine
from .recorder import Recording, record

EXECUTIONS = ("eager", "compiler", "vitkern", "fused")


class Precision(NamedTuple):
    """Dtype of products (a field of Rates); bytes of their operands, of the stream, of weights."""

    dtype: str
    operand: int
    stream: int
    weight: int


PRECISIONS = {
    "bf16 autocast": Precision("bfloat16", 2, 4, 4),
    "bf16": Precision("bfloat16", 2, 2, 2),
    "tf32": Precision("tf32", 4, 4, 4),
    "float32": Precision("float32", 4, 4, 4),
}


@dataclass(frozen=True)
class Work:
    """One kernel, run `calls` times: its FLOPs and bytes, and the op whose part it is.

    part: "forward", "backward" or "optimizer". dtype: of its products, a field of Rates.
    """

    op: str
    part: str
    flops: int
    bytes: int
    dtype: str = "bfloat16"
    calls: int = 1

    def seconds(self, machine: Machine) -> float:
        """Of all calls."""
        compute = self.flops / machine.rate(self.dtype) if self.flops else 0.0
        return self.calls * max(compute, self.bytes / machine.bytes_per_s)

    def compute_bound(self, machine: Machine) -> bool:
        """Whether FLOPs take longer than bytes."""
        return self.flops > 0 and self.flops / machine.rate(self.dtype) >= (
            self.bytes / machine.bytes_per_s
        )


def works(
    config: ViTConfig | str,
    batch: int = 256,
    execution: str = "vitkern",
    training: bool = False,
    *,
    precision: str | None = None,
    optimizer: bool = True,
) -> list[Work]:
    """The kernels of a forward pass, or of a training step.

    Args:
        config: a config, or timm's name of a model.
        batch: images on one GPU.
        execution: "fused", "vitkern", "compiler" or "eager"; see above.
        training: forward, backward and optimizer; else a forward pass without gradients.
        precision: a key of PRECISIONS. None for what the tables assume: "bf16" for "fused", and
            "bf16 autocast" for the others.
        optimizer: whether a training step ends with AdamW.

    Raises:
        ValueError: an unknown name, or "vitkern" in float32, which leaves products to PyTorch.
    """
    config = resolve(config)
    one_of("execution", execution, EXECUTIONS)
    positive("batch", batch)
    if precision is None:
        precision = "bf16" if execution == "fused" else "bf16 autocast"
    one_of("precision", precision, PRECISIONS)
    return list(_works(config, batch, execution, training, precision, optimizer))


@functools.lru_cache(maxsize=128)
def _works(
    config: ViTConfig, batch: int, execution: str, training: bool, precision: str, optimizer: bool
) -> tuple[Work, ...]:
    p = PRECISIONS[precision]
    if execution == "vitkern":
        found = _launched(config, batch, training, precision)
    else:
        opaque = execution != "fused"
        block = (
            _opaque(config, batch, p, training, eager=execution == "eager")
            if opaque
            else _fused(config, batch, p, training)
        )
        found = [replace(work, calls=config.depth) for work in block]
        found += _ends(config, batch, p, training)
        if opaque and p.weight != p.operand:
            found += _weight_casts(config, p, training)
    if training and optimizer:
        # AdamW in one pass: weight, gradient and two moments in float32 in, all but the gradient
        # out. The bound leaves the weights in the dtype of the products as well.
        each = 28 + (2 if execution == "fused" and p.operand == 2 else 0)
        found.append(Work("adamw", "optimizer", 0, each * parameters(config)))
    found = [work for work in found if work.flops or work.bytes]  # no casts in float32
    return tuple(sorted(found, key=_place))


def _place(work: Work) -> tuple[int, int]:
    """Where it stands in a step: by part, the blocks between the two ends."""
    end = {"patch_embed": -1, "head": 1}.get(work.op, 0)
    part = ("forward", "backward", "optimizer").index(work.part)
    return part, -end if work.part == "backward" else end


@functools.lru_cache(maxsize=64)
def parameters(config: ViTConfig) -> int:
    """Number of weights of the model."""
    model = ViT.from_config(replace(config, weight_init="skip"), device="meta")
    return sum(p.numel() for p in model.parameters())


def forward_flops(config: ViTConfig | str) -> int:
    """FLOPs of the matrix products of one image's forward pass; training has three times these."""
    found = works(config, 1, "fused")
    return sum(work.calls * work.flops for work in found)


def resolve(config: ViTConfig | str) -> ViTConfig:
    """The config itself, or that of timm's name.

    Raises:
        ValueError: an unknown name; a network with parts that the formulas here don't count.
    """
    config = ViTConfig.from_name(config) if isinstance(config, str) else config
    for name in _UNCOUNTED:
        value = getattr(config, name)
        if value != getattr(_DEFAULT, name):
            raise ValueError(f"the roofline doesn't count {name}={value!r}")
    return config


_DEFAULT = ViTConfig()
_UNCOUNTED = (
    *("embed_layer", "embed_norm_layer", "patch_norm", "block_fn", "attn_layer", "rel_pos"),
    *("scale_attn_norm", "scale_mlp_norm", "dim_head", "representation_size", "distilled"),
    "patch_drop_rate",
)


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raises a ValueError that lists what `value` may be, unless it is one of them."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def positive(name: str, value: int) -> None:
    """Raises a ValueError unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


class _Widths(NamedTuple):
    """Rows, tokens an image; width, width behind fc1, width before fc2; bytes of an operand times
    each (D, F, G), and of the stream's row (S)."""

    rows: int
    tokens: int
    dim: int
    hidden: int
    inner: int
    D: int
    F: int
    G: int
    S: int


def _widths(config: ViTConfig, batch: int, p: Precision) -> _Widths:
    height, width = config.grid_size
    tokens, dim = height * width + config.num_prefix_tokens, config.embed_dim
    hidden = config.hidden_dim * (2 if config.mlp_layer == "swiglu" else 1)
    inner = hidden if config.mlp_layer == "mlp" else hidden // 2
    c = p.operand
    return _Widths(
        batch * tokens, tokens, dim, hidden, inner, c * dim, c * hidden, c * inner, p.stream * dim
    )


class _Lister:
    """Makes Works of one block from weights' elements and bytes a token."""

    def __init__(self, w: _Widths, p: Precision) -> None:
        self.w, self.p = w, p

    def product(self, op: str, part: str, weight: int, moved: int) -> Work:
        """A product of all tokens with `weight` elements; `moved` bytes a token."""
        w, c = self.w, self.p.operand
        return Work(op, part, 2 * w.rows * weight, w.rows * moved + c * weight, self.p.dtype)

    def attention(self, part: str, moved: int) -> Work:
        """Two products forward, five backward."""
        w, products = self.w, 2 if part == "forward" else 5
        flops = 2 * products * w.rows * w.tokens * w.dim
        return Work("attention", part, flops, w.rows * moved, self.p.dtype)

    def sweep(self, op: str, part: str, moved: int) -> Work:
        """A pointwise pass or a reduction."""
        return Work(op, part, 0, self.w.rows * moved, self.p.dtype)


def _fused(config: ViTConfig, batch: int, p: Precision, training: bool) -> Iterator[Work]:
    """One block at its bound: 44 D and 148 D in bfloat16, an MLP of 4 D and a bfloat16 stream."""
    w = _widths(config, batch, p)
    make, D, F, S = _Lister(w, p), w.D, w.F, w.S
    square, first, second = w.dim * w.dim, w.dim * w.hidden, w.dim * w.inner
    # What fc1 leaves: in training its result before the activation, which fc2 then applies.
    left = F if training else w.G
    yield make.product("qkv", "forward", 3 * square, S + 3 * D)  # norm in the prologue
    yield make.attention("forward", 3 * D + D)
    yield make.product("proj", "forward", square, D + 2 * S)  # the stream in the epilogue
    yield make.product("fc1", "forward", first, S + left)
    yield make.product("fc2", "forward", second, left + 2 * S)
    if not training:
        return
    # Of each layer the gradients of input and weight, bias gradients along the way. The norm's
    # backward joins the gradient that the stream brings: d_a, x and that in, the new one out.
    norm = D + 3 * S
    yield make.product("fc2", "backward", second, S + 2 * F)  # through the activation: z in, dz out
    yield make.product("fc2", "backward", second, S + F)  # the activation again, from z
    yield make.product("fc1", "backward", first, F + D)
    yield make.product("fc1", "backward", first, F + S)  # the norm again, from x
    yield make.sweep("fc1", "backward", norm)
    yield make.product("proj", "backward", square, S + D)
    yield make.product("proj", "backward", square, S + D)
    yield make.attention("backward", 3 * D + 2 * D + 3 * D)  # qkv, out and its gradient; dqkv
    yield make.product("qkv", "backward", 3 * square, 3 * D + D)
    yield make.product("qkv", "backward", 3 * square, 3 * D + S)
    yield make.sweep("qkv", "backward", norm)


def _opaque(
    config: ViTConfig, batch: int, p: Precision, training: bool, eager: bool
) -> Iterator[Work]:
    """One block of opaque products and attention, and the passes between them.

    In bfloat16 with a float32 stream and an MLP of 4 D: forward 40 D of calls, then 64 D of passes
    in eager mode or 40 D behind a compiler; backward 80 D and 176 D or 120 D.
    """
    w = _widths(config, batch, p)
    make, D, F, G, S = _Lister(w, p), w.D, w.F, w.G, w.S
    square, first, second = w.dim * w.dim, w.dim * w.hidden, w.dim * w.inner
    cast = D + S if D != S else 0
    gated, scaled = config.mlp_layer != "mlp", bool(config.init_values)
    dropped = training and config.drop_path_rate > 0
    branch = S if scaled else D  # a float32 LayerScale makes the branch float32, too

    def forward(op: str, moved: int) -> Work:
        return make.sweep(op, "forward", moved)

    yield make.product("qkv", "forward", 3 * square, D + 3 * D)
    yield make.attention("forward", 3 * D + D)
    yield make.product("proj", "forward", square, D + D)
    yield make.product("fc1", "forward", first, D + F)
    yield make.product("fc2", "forward", second, G + D)
    if not eager:
        # Twice: stream and branch in, their sum and its normalised rows out.
        yield forward("add + norm", 2 * (S + D + S + D))
        yield forward("activation", F + G)
    else:
        yield forward("norm", 2 * (S + S))
        yield forward("cast of norm", 2 * cast)
        # Gated: the activation of one half, then the product of both.
        yield forward("activation", (G + G) + (3 * G) if gated else F + G)
        if scaled:
            yield forward("layer scale", 2 * (D + S))
        if dropped:
            yield forward("drop path", 2 * (branch + branch))
        yield forward("residual add", 2 * (S + branch + S))
    if not training:
        return

    def backward(op: str, moved: int) -> Work:
        return make.sweep(op, "backward", moved)

    for op, weight, moved in (
        ("fc2", second, D + G),
        ("fc1", first, F + D),
        ("proj", square, D + D),
        ("qkv", 3 * square, 3 * D + D),
    ):
        yield make.product(op, "backward", weight, moved)  # of the input
        yield make.product(op, "backward", weight, moved)  # of the weight
    yield make.attention("backward", 3 * D + 2 * D + 3 * D)
    # FlashAttention's passes beside its main kernel: out and its gradient for delta; dq in float32
    # set to zero, added to (read and written), read again and rounded.
    yield backward("attention delta and dq", 2 * D + w.dim * (4 + 8 + 4) + D)
    yield backward("bias gradients", D + F + D + 3 * D)  # each reads its layer's gradient again
    if scaled:  # its gradient: branch and the stream's gradient in
        yield backward("layer scale", 2 * (D + S + (3 * S + S + S if eager else 0)))
    if not eager:
        yield backward("activation", G + F + F)
        yield backward("stack of dqkv", 3 * D + 3 * D)
        # d_a, x and the stream's gradient in; the new one out, rounded, too; then the sums for the
        # norm's own gradients, which read d_a and x again.
        yield backward("norm", 2 * (D + 3 * S + (D if D != S else 0) + D + S))
        return
    # Gated: both factors' gradients, the activation's, and the two halves put together.
    yield backward("activation", (3 * G + 3 * G + 3 * G + 4 * G) if gated else G + F + F)
    yield backward("stack of dqkv", 2 * (3 * D + 3 * D))  # stack, then a copy in order
    yield backward("cast to branch", 2 * cast)
    if dropped:
        yield backward("drop path", 2 * (branch + branch))
    yield backward("cast to norm", 2 * cast)
    yield backward("norm", 2 * (3 * S + 2 * S))  # of the input, then of its own parameters
    yield backward("sum of gradients", 2 * (S + S + S))


def _ends(config: ViTConfig, batch: int, p: Precision, training: bool) -> list[Work]:
    """Patch embedding, final norm and classifier: one kernel each in every execution."""
    w, (rows, columns) = _widths(config, batch, p), config.patch_size
    patches, pixels = config.grid_size[0] * config.grid_size[1], config.in_chans * rows * columns
    weight, image = pixels * w.dim, batch * patches * pixels * p.operand
    flops, moved = 2 * batch * patches * weight, image + p.operand * weight + w.rows * w.S
    head = config.num_classes * w.dim * (2 if config.global_pool == "avgmax" else 1)
    logits = batch * config.num_classes * p.operand
    pooled = batch * w.dim * p.operand
    # Only what the pool reads is normalised.
    read = batch * (1 if config.global_pool == "token" else w.tokens) * w.S
    out = [
        Work("patch_embed", "forward", flops, moved, p.dtype),
        Work("head", "forward", 0, read + pooled, p.dtype),
        Work("head", "forward", 2 * batch * head, pooled + logits + p.operand * head, p.dtype),
    ]
    if training:
        both = 2 * (pooled + logits + p.operand * head)
        out += [
            Work("head", "backward", 4 * batch * head, both, p.dtype),
            Work("head", "backward", 0, pooled + read + w.rows * w.S, p.dtype),
            Work("patch_embed", "backward", flops, moved, p.dtype),
        ]
    return out


def _weight_casts(config: ViTConfig, p: Precision, training: bool) -> list[Work]:
    """Autocast rounds the weights in every pass, and autograd widens their gradients again."""
    size = (p.weight + p.operand) * parameters(config)
    parts = ("forward", "backward") if training else ("forward",)
    return [Work("casts", part, 0, size) for part in parts]


# Of parameters, and of autocast.
_DTYPES = {
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, None),
    "tf32": (torch.float32, None),
    "float32": (torch.float32, None),
}


@functools.lru_cache(maxsize=32)
def recording(
    config: ViTConfig,
    batch: int,
    training: bool,
    precision: str = "bf16 autocast",
    eager: bool = False,
) -> Recording:
    """What vitkern.ViT (or EagerViT) calls, launches and keeps; see `recorder.py`."""
    if not eager and PRECISIONS[precision].operand == 4:
        raise ValueError(
            f"precision must be 'bf16 autocast' or 'bf16' for vitkern, got {precision!r}: it "
            "leaves float32 products to PyTorch"
        )
    weights, autocast = _DTYPES[precision]
    return record(config, batch, training, weights, autocast, eager)


def _launched(config: ViTConfig, batch: int, training: bool, precision: str) -> list[Work]:
    counted: dict[Work, int] = {}
    for call in recording(config, batch, training, precision).calls:
        for kernel in call.kernels:
            work = Work(call.step, call.part, kernel.flops, kernel.bytes)
            counted[work] = counted.get(work, 0) + 1
    return [replace(work, calls=calls) for work, calls in counted.items()]
