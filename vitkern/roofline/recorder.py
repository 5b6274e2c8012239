"""What a training step or a forward pass of a model really calls, recorded without running it.

The model is built and called as a user would; a dispatch mode takes every operator, computes shapes
alone, and hands back tensors without memory. So the calls, what is saved between forward and
backward, and (through the ops' own launchers) the launches are those of the code as it stands, at
any size, in a second, on any machine. The kernels are asked for by name: where "auto" takes another
implementation on a card, that card's calls differ. What a launcher does by ATen beside its kernels,
such as to round the weight of patch_embed, is left out.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from vitkern.eager import EagerViT
from vitkern.kernels import REGISTRY
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._op import Op
from vitkern.model import ViT
from vitkern.model.config import ViTConfig

# The card whose launches are looked at; those for others differ in tiles and splits, not in what
# they read and write.
CAPABILITY = (9, 0)


class Kernel(NamedTuple):
    """One kernel: FLOPs, and bytes of its tensor arguments, each read or written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Call:
    """One operator call: of vitkern's ops its declaration and launches, of ATen's its tensors.

    step: what of a ViT it does, "qkv" say. part: "forward" or "backward". flops, bytes: as the op
    declares them. kernels: what it launches.
    """

    op: str
    step: str
    part: str
    flops: int
    bytes: int
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Recording:
    """The calls in their order, and the bytes that autograd kept for the backward pass."""

    calls: tuple[Call, ...]
    saved_bytes: int


def record(
    config: ViTConfig,
    batch: int,
    training: bool,
    weights: torch.dtype,
    autocast: torch.dtype | None,
    eager: bool = False,
) -> Recording:
    """One forward pass in evaluation, or one training step up to the gradients.

    Args:
        batch: images.
        weights: dtype of parameters and images.
        autocast: dtype of autocast, or None.
        eager: record EagerViT, whose attention is what PyTorch takes on a CPU, in place of ViT.
    """
    model: nn.Module
    if eager:
        model = EagerViT(config, device="meta", dtype=weights)
    else:
        ours = {op.name: "triton" for op in REGISTRY.values() if op.launcher and not op.backward_of}
        config = replace(config, impl=ours, weight_init="skip")
        model = ViT.from_config(config, device="meta", dtype=weights)
    model.to_empty(device="cpu").train(training)
    for tensor in (*model.parameters(), *model.buffers()):
        _empty(tensor)
    recorder = _Recorder()
    saved: dict[int, int] = {}
    parameters = {_storage(p) for p in model.parameters()}

    def keep(t: Tensor) -> Tensor:
        memory = recorder.memory(t)
        if memory.number not in parameters:
            saved[memory.number] = memory.bytes
        return t

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(torch.set_grad_enabled(training))
        enter(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
        enter(intercept(lambda launch: None, CAPABILITY))
        enter(recorder)
        images = torch.empty(batch, config.in_chans, *config.img_size, dtype=weights)
        cast = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
        with cast:
            out = model(images)
        if training:
            logits = out if out.dim() == 2 else out.flatten(1)
            loss = F.cross_entropy(logits.float(), torch.empty(batch, dtype=torch.long))
            recorder.part = "backward"
            loss.backward()
    return Recording(tuple(recorder.calls), sum(saved.values()))


class _Memory(NamedTuple):
    """What would be one allocation."""

    number: int
    bytes: int


class _Recorder(TorchDispatchMode):
    """Computes shapes only. Tensors are on the CPU by name, since autocast knows no "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.part = "forward"
        self._before = ""
        self._memories: dict[int, _Memory] = {}
        self._numbers = itertools.count()
        self._costs: dict[tuple[Any, ...], tuple[int, int, tuple[Kernel, ...]]] = {}

    def memory(self, t: Tensor) -> "_Memory":
        """The memory of `t`, shared by what would be views; numbered by address if from outside.

        Not always by address: without memory to share, a view outlives its base, and addresses come
        again.
        """
        return self._memories.get(_storage(t), _Memory(_storage(t), _bytes(t)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        on_meta = {**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs
        shapes, named = tree_map_only(Tensor, _meta, (args, on_meta))
        out = func(*shapes, **named)
        if func.is_view or func._schema.name == "aten::_unsafe_view":
            return tree_map_only(Tensor, lambda t: self._hand_out(t, self.memory(args[0])), out)
        if func.namespace == "vitkern":
            self._op(func, shapes, named)
        else:
            self._aten(func, args, kwargs, out)
        if func._schema.is_mutable:  # copy_, add_
            return args[0]
        return tree_map_only(Tensor, self._hand_out, out)

    def _hand_out(self, meta: Tensor, memory: "_Memory | None" = None) -> Tensor:
        """A tensor like `meta` on the CPU, without memory, a view of `memory` or of its own."""
        shape, strides = meta.shape, meta.stride()
        made = _empty(torch.empty_strided(shape, strides, dtype=meta.dtype, device="cpu"))
        own = _Memory(next(self._numbers), _bytes(meta))
        self._memories[_storage(made)] = own if memory is None else memory
        return made

    def _op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        op = REGISTRY[func._schema.name.removeprefix("vitkern::")]
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        key = (op.name, *map(_plain, given.values()))  # blocks are alike
        if key not in self._costs:
            self._costs[key] = _costs(op, given)
        step = self._step(op.name, given)
        self.calls.append(Call(op.name, step, self.part, *self._costs[key]))

    def _step(self, op: str, given: dict[str, Any]) -> str:
        """Which layer this call is, from its options and from the layer that came before it."""
        name = op.removesuffix("_backward")
        if op == "norm_linear":
            step = "fc1" if given["activation"] or given["normalised"] else "qkv"
        elif op == "linear_residual":
            step = "proj" if self._before in ("qkv", "attention") else "fc2"
        elif op == "linear_residual_backward":
            step = "fc2" if given["activation"] else "proj"
        elif op == "norm_linear_backward":
            step = "fc1" if self._before == "fc2" else "qkv"
        elif name in ("attention", "attention_pool"):
            step = "attention"
        else:
            step = "norm" if "norm" in name else name
        self._before = step
        return step

    def _aten(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(("empty", "new_empty", "detach", "promote_types")):
            return
        count: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        shapes, named = tree_map_only(Tensor, _meta, (args, kwargs))
        flops = 0 if count is None else count(*shapes, **named, out_val=out)
        size = _tensor_bytes(tree_leaves((args, kwargs, out)))
        step = "head" if count else "casts" if name == "_to_copy" else "other"
        self.calls.append(Call(name, step, self.part, flops, size, (Kernel(flops, size),)))


def _costs(op: Op, given: dict[str, Any]) -> tuple[int, int, tuple[Kernel, ...]]:
    """FLOPs and bytes as the op declares them, and its launches, of arguments on "meta"."""
    launches: list[Launch] = []
    assert op.launcher is not None
    with _below_the_mode(), intercept(launches.append, CAPABILITY):
        op.launcher(**given)
        flops, declared = op.flops(**given), op.bytes_moved(**given)
    products = [_holds_product(launch) for launch in launches]  # an op's are of one size
    share = flops // max(1, sum(products))
    kernels = (
        Kernel(share if product else 0, _tensor_bytes(launch.args))
        for launch, product in zip(launches, products, strict=True)
    )
    return flops, declared, tuple(kernels)


def _plain(value: Any) -> Any:
    """A value that compares; of a tensor what shape alone decides."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _holds_product(launch: Launch) -> bool:
    """Kernels with a product are told its precision, or (persistent ones) three sides of a tile."""
    return "PRECISION" in launch.constexprs or {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= set(
        launch.constexprs
    )


@contextlib.contextmanager
def _below_the_mode() -> Iterator[None]:
    """Launchers allocate on "meta", and none of that is to be recorded."""
    with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
        yield


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _empty(t: Tensor) -> Tensor:
    """`t`, its memory given back: it keeps shape, strides and dtype, and is never read."""
    t.untyped_storage().resize_(0)
    return t


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _tensor_bytes(values: Any) -> int:
    """Bytes of the tensors among `values`, one that comes twice counted once."""
    distinct = {id(t): t for t in values if isinstance(t, Tensor)}
    return sum(map(_bytes, distinct.values()))
