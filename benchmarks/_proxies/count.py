"""Cost of a module, operator by operator, as they are dispatched; of our block, as it launches."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitkern.kernels import REGISTRY
from vitkern.kernels._launch import Launch, intercept
from vitkern.model.block import Block
from vitkern.model.fused import Stream

from .._models import AUTOCAST, Precision

ATEN = torch.ops.aten

# The card whose launches are counted.
CAPABILITY = (9, 0)

# Memory that is handed out, and no view: nothing is launched.
ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


@dataclass
class Cost:
    """Of one step: launches, among them those that only cast a weight; bytes read and written.

    bytes: launch by launch. declared_bytes: of our ops as they declare them.
    """

    launches: int = 0
    weight_casts: int = 0
    bytes: int = 0
    declared_bytes: int = 0
    saved_bytes: int | None = None


def extent(t: Tensor) -> tuple[Any, ...]:
    """Which elements of its storage `t` has, whatever its shape: offset, then (stride, number)."""
    dims: list[tuple[int, int]] = []
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if dims and stride == dims[-1][0] * dims[-1][1]:
            stride, size = dims[-1][0], dims.pop()[1] * size
        if stride != 0 and size != 1:
            dims.append((stride, size))
    return t.storage_offset(), *dims


def distinct_bytes(t: Tensor) -> int:
    """Bytes of the distinct elements of `t`: of an expanded tensor there are few."""
    return t.element_size() * math.prod(size for _, size in extent(t)[1:])


def moved_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, with those that several views have in common counted once."""
    views = {(t.untyped_storage()._cdata, extent(t)): t for t in tensors}
    return sum(map(distinct_bytes, views.values()))


def name_of(op: torch._ops.OpOverload) -> str:
    """ "mm" for aten::mm.default."""
    return op._schema.name.split("::")[-1]


def is_view(op: Any) -> bool:
    """Whether an operator (any callable) only looks at its first argument otherwise."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    return op.is_view or op is ATEN._unsafe_view.default


def is_free(op: torch._ops.OpOverload) -> bool:
    """Whether an operator launches nothing: a view, an allocation, or a question to the tensor."""
    return is_view(op) or op.namespace == "prim" or name_of(op) in ALLOCATIONS


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class Counter(TorchDispatchMode):
    """Adds the operators that are dispatched inside to `cost`, each one launch, our ops by theirs.

    weights: storages of parameters; those of their casts are added.
    """

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.cost = Cost()
        self._alive: list[Tensor] = list(weights)  # so that no storage's address is used again
        self._weights = {t.untyped_storage()._cdata for t in self._alive}

    def is_weight(self, t: Tensor) -> bool:
        """Whether `t` lies in a parameter or in a cast of one."""
        return t.untyped_storage()._cdata in self._weights

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "vitkern":
            return self._ours(func, args, kwargs)
        out = func(*args, **kwargs)
        if is_free(func):
            return out
        read, written = tensors_in((args, kwargs)), tensors_in(out)
        moved = moved_bytes(read) + moved_bytes(written)  # what is changed in place counts twice
        self.cost.launches += 1
        self.cost.bytes += moved
        self.cost.declared_bytes += moved
        if func is ATEN._to_copy.default and self.is_weight(read[0]):
            self.cost.weight_casts += 1
            self._alive.append(out)
            self._weights.add(out.untyped_storage()._cdata)
        return out

    def _ours(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One of our ops: what it declares, and what its launcher launches."""
        op = REGISTRY[name_of(func)]
        assert op.launcher is not None
        names = [argument.name for argument in func._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self.cost.declared_bytes += op.bytes_moved(**arguments)
        with intercept(self._launched, CAPABILITY), self:  # it may call ATen as well
            return op.launcher(**arguments)

    def _launched(self, launch: Launch) -> None:
        self.cost.launches += 1
        self.cost.bytes += moved_bytes(tensors_in(launch.args))


class FusedAttention(TorchFunctionMode):
    """Attention as the one operator that CUDA would call, where a CPU has another.

    Flash attention in 16 bits, the memory-efficient kernel in float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return attend(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention by an operator of CUDA's.

    Raises:
        NotImplementedError: an option that no block of a ViT asks for.
    """
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("attention with a mask, dropout or groups has no proxy")
    heads = [query, key, value]
    if torch.is_autocast_enabled("cpu"):
        heads = [t.to(torch.get_autocast_dtype("cpu")) for t in heads]
    if heads[0].dtype != torch.float32:
        return ATEN._scaled_dot_product_flash_attention(*heads, scale=scale)[0]
    need_lse = torch.is_grad_enabled() and any(t.requires_grad for t in heads)
    efficient = ATEN._scaled_dot_product_efficient_attention
    return efficient(*heads, None, need_lse, scale=scale)[0]


@dataclass
class Saved:
    """Bytes that autograd keeps, each storage once, but those of weights and of their casts."""

    is_weight: Callable[[Tensor], bool]
    storages: dict[int, Tensor] = field(default_factory=dict)

    def pack(self, t: Tensor) -> Tensor:
        """For `saved_tensors_hooks`."""
        if not self.is_weight(t):
            self.storages[t.untyped_storage()._cdata] = t
        return t

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.storages.values())


@contextlib.contextmanager
def as_on_cuda(precision: Precision) -> Iterator[None]:
    """Autocast and attention's operator for fake CPU tensors."""
    with FusedAttention(), precision.context(torch.device("cpu")):
        yield


def dispatched(
    call: Callable[[Tensor], Tensor],
    module: nn.Module,
    x: Tensor,
    step: str,
    precision: Precision = AUTOCAST,
) -> Cost:
    """Cost of ``call(x)``, and in a "train" step of all gradients, operator by operator.

    `call` runs `module`, whose parameters want gradients; `x` is on its device.
    """
    parameters = list(module.parameters())
    counter = Counter(parameters)
    if step == "forward":
        with torch.no_grad(), counter, as_on_cuda(precision):
            call(x)
        return counter.cost
    leaf = x.detach().requires_grad_()
    kept = Saved(counter.is_weight)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t)
    with hooks, counter, as_on_cuda(precision):
        y = call(leaf)
    counter.cost.saved_bytes = kept.bytes
    grad = torch.empty_like(y)
    with counter:
        torch.autograd.grad(y, [leaf, *parameters], grad)
    return counter.cost


def plain(module: nn.Module, x: Tensor, step: str, precision: Precision = AUTOCAST) -> Cost:
    """Cost of ``module(x)``, operator by operator."""
    return dispatched(module, module, x, step, precision)


def ours(block: Block, x: Tensor, step: str, precision: Precision = AUTOCAST) -> Cost:
    """Cost of vitkern's block in the midst of others.

    On CPU tensors, since the block takes no subclass of Tensor for plain; kernels don't run, so
    that memory as large as activations is asked for and never touched.
    """
    with intercept(lambda _: None, CAPABILITY):  # our kernels may be asked for without a GPU
        with torch.no_grad(), as_on_cuda(precision), Counter():
            stats = block.run(Stream(x), need_stats=True).stats
        return dispatched(
            lambda x: block.run(Stream(x, stats), need_stats=True).x, block, x, step, precision
        )
