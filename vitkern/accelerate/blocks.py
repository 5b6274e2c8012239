"""A foreign block on our fused halves: its class is changed, its parameters stay where they are.

The new class derives from the block's own, so hooks, keys, isinstance and pickles see what they saw
before; its `forward` runs `fused.py` on the block's parameters, or, where a part is not what it
was, dropout is active, or a mask is given, the block's own.
"""

import inspect
import sys
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vitkern.accelerate.layouts import LAYOUTS, PAIRS, Layout
from vitkern.convert import foreign
from vitkern.kernels._op import note, product_dtype
from vitkern.model import fused
from vitkern.model.fused import Stream
from vitkern.model.layers import plain

Path = tuple[str, ...]
Parts = tuple[tuple[Path, type[nn.Module]], ...]
# Stochastic depth: called on ones, they tell the factor of every sample.
_DROP_PATHS = (
    "timm.DropPath",
    "transformers.Dinov2DropPath",
    "transformers.Dinov2WithRegistersDropPath",
)
# All compute softmax(q k^T / sqrt(d)) v.
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# Arguments that ask the caller of a block for something, and the block for nothing.
_UNREAD = ("output_hidden_states", "return_dict", "interpolate_pos_encoding")


class Swap(NamedTuple):
    """How a block is run: what was read from it when its class was changed.

    parts: every module of the block that its forward calls, and the class it had.
    """

    layout: Layout
    parts: Parts
    activation: str
    returns_tuple: bool
    impl: dict[str, str]
    save: str


def find(block: Any, name: str) -> Any:
    """The module or parameter by this dotted name, None where there is none."""
    *path, last = name.split(".")
    for part in path:
        block = block._modules.get(part) if block is not None else None
    if block is None:
        return None
    return (
        block._modules[last]
        if last in block._modules
        else block.__dict__.get(last, block._parameters.get(last))
    )


def examine(
    block: nn.Module, layouts: Iterable[Layout], impl: dict[str, str], save: str
) -> Swap | str:
    """How to run this block, by the first layout that fits; or why it is left alone."""
    reasons: list[tuple[int, str]] = []
    for layout in layouts:
        parts, activation, why = _fits(block, layout)
        if why is None:
            parameters = inspect.signature(type(block).forward).parameters
            returns_tuple = "output_attentions" in parameters
            return Swap(layout, parts, activation, returns_tuple, impl, save)
        reasons.append((len(parts), why))
    return max(reasons)[1]  # that of the layout which comes closest


def _known(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Modules of a layout, and the classes of which each may be; of an activation none is named."""
    names: dict[str, tuple[str, ...]] = {name: (cls,) for name, cls in layout.between}
    for scale in filter(None, (layout.ls1, layout.ls2)):
        name = scale.rpartition(".")[0]
        names[name] = (*names[name], "torch.Identity")
    roles: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
        ((layout.norm1, layout.norm2), tuple(foreign.NORMS)),
        ((layout.q_norm, layout.k_norm), (*foreign.NORMS, "torch.Identity")),
        ((*layout.fc1, layout.fc2, layout.proj, *layout.qkv), foreign.LINEARS),
        (layout.drops, foreign.DROPOUTS),
        ((layout.drop_path1, layout.drop_path2), (*_DROP_PATHS, "torch.Identity")),
        ((layout.act,), ()),
    )
    for members, classes in roles:
        names |= {name: classes for name in members if name and name not in names}
    return names


def _fits(block: nn.Module, layout: Layout) -> tuple[Parts, str, str | None]:
    """(parts and their classes, name of the activation, what doesn't fit): as far as it goes."""
    parts: list[tuple[Path, type[nn.Module]]] = []
    activation: str | None = layout.activation

    def result(why: str | None) -> tuple[Parts, str, str | None]:
        return tuple(parts), activation or "", why

    for name, classes in _known(layout).items():
        module = find(block, name)
        if not isinstance(module, nn.Module):
            return result(f"it has no {name}")
        if classes and foreign.class_name(module) not in classes:
            return result(f"its {name} is {foreign.class_name(module)}")
        parts.append((tuple(name.split(".")), type(module)))
    if layout.act:
        act = find(block, layout.act)
        activation = foreign.activation_of(act)
        if activation is None:
            return result(f"its {layout.act} is {foreign.class_name(act)}")
    for name in layout.idle:
        module = find(block, name)
        if module is not None and type(module) is not nn.Identity:
            return result(f"it has {name}, {foreign.class_name(module)}")
        if module is not None:
            parts.append((tuple(name.split(".")), nn.Identity))
    return result(_odd(block, layout))


def _odd(block: nn.Module, layout: Layout) -> str | None:
    """What in these parts is not built here."""
    q, mlp = find(block, layout.qkv[0]), find(block, layout.fc1[0].rpartition(".")[0])
    if isinstance(q, nn.MultiheadAttention) and (
        q.in_proj_weight is None or q.bias_k is not None or q.add_zero_attn or not q.batch_first
    ):
        return f"its {layout.qkv[0]} has other widths, extra keys, or puts tokens first"
    for names in (layout.qkv, layout.fc1):
        if len({getattr(find(block, name), "bias", None) is None for name in names}) > 1:
            return f"of {', '.join(names)} some have a bias and some have not"
    if layout.packed and getattr(mlp, "gate_last", False):
        return "its MLP's gate stands behind the value"
    for name in (layout.norm1, layout.norm2, layout.q_norm, layout.k_norm):
        module = find(block, name) if name else None
        if module is not None and type(module) is not nn.Identity and not foreign.norm_of(module):
            return f"its {name} is no plain norm over the last dimension"
    if layout.q_norm:
        pair = [find(block, name) for name in (layout.q_norm, layout.k_norm)]
        if type(pair[0]) is not type(pair[1]) or len({getattr(n, "eps", 0) for n in pair}) > 1:
            return "its norms of queries and keys differ"
    weight, _ = _qkv(block, layout)
    head_dim = weight.shape[0] / (3 * find(block, layout.heads))
    scale = find(block, layout.scale) if layout.scale else head_dim**-0.5
    if head_dim % 1 or not isinstance(scale, float) or abs(scale * head_dim**0.5 - 1) > 1e-6:
        return f"its attention is scaled by {scale} with heads of {head_dim:g}"
    return None


def _untouched(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling a part would do what its class says, as when the block was examined."""
    if plain(module, kind):
        return True
    if type(module) is not kind or not foreign.has_own_forward(module):
        return False
    hooks: Any = module._forward_hooks
    if hooks and not _idle_recorder(hooks.values()):
        return False
    others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(others) and module._compiled_call_impl is None and not _global_hooks()


def _idle_recorder(hooks: Iterable[Any]) -> bool:
    """Whether these hooks are those by which transformers 5 records outputs, switched off now."""
    home = "transformers.utils.output_capturing"
    if any(hook.__module__ != home for hook in hooks):
        return False
    recorder = getattr(sys.modules.get(home), "_active_collector", None)
    if recorder is None:
        return False
    return set(recorder.get() or ()) <= {"hidden_states", "_hidden_states_layers"}


def _global_hooks() -> bool:
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(torch_module, f"_global_{kind}") for kind in kinds)


def problem(block: Any, swap: Swap) -> str | None:
    """Why the block's own forward has to run now; None where the fused halves may."""
    for path, kind in swap.parts:
        module = block
        for name in path:
            module = module._modules.get(name)
            if module is None:
                break
        if not _untouched(module, kind):
            return f"{'.'.join(path)} was replaced, wrapped or hooked"
        if kind is nn.Dropout and module.training and module.p:
            return "dropout"
        if kind is nn.GELU and (module.approximate == "tanh") != (swap.activation == "gelu_tanh"):
            return f"{'.'.join(path)} is another GELU than it was"
        if "weight" in module._parameters and type(module.weight) not in (nn.Parameter, Tensor):
            return f"the weight of {'.'.join(path)} is quantised or distributed"
    layout = swap.layout
    for name in layout.idle:
        if not isinstance(find(block, name), (nn.Identity, type(None))):
            return f"{name} was added"
    attention = find(block, layout.heads.rpartition(".")[0])
    if layout.rate and attention.training and find(block, layout.rate):
        return "dropout of attention weights"
    used = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if used not in _ATTENTIONS:
        return f"attention is {used}"
    return None


def _norm(module: Any) -> fused.Norm:
    rms = type(module).__name__.lower().startswith("rms")
    return fused.Norm(module.weight, getattr(module, "bias", None), module.eps, rms)


def _head_norm(block: Any, name: str) -> fused.Norm | None:
    """Norm of queries or keys, None where there is none."""
    module = find(block, name) if name else None
    return None if module is None or type(module) is nn.Identity else _norm(module)


def _linear(block: Any, names: tuple[str, ...]) -> fused.Linear:
    """Linear layers as one, one below the other."""
    layers = [find(block, name) for name in names]
    if len(layers) == 1:
        return fused.Linear(layers[0].weight, layers[0].bias)
    biases = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return fused.Linear(torch.cat([layer.weight for layer in layers]), biases)


def _qkv(block: Any, layout: Layout) -> fused.Linear:
    attention = find(block, layout.qkv[0])
    if isinstance(attention, nn.MultiheadAttention):
        return fused.Linear(attention.in_proj_weight, attention.in_proj_bias)
    return _linear(block, layout.qkv)


def _joint(block: Any, x: Tensor, ls: str, drop_path: str, dtype: torch.dtype) -> fused.Joint:
    """LayerScale and the factors of stochastic depth."""
    gamma, factor = find(block, ls) if ls else None, None
    drop: Any = find(block, drop_path) if drop_path else None
    if drop is not None and drop.training and getattr(drop, "drop_prob", 0):
        if gamma is not None:  # DropPath would see their product
            dtype = torch.promote_types(dtype, gamma.dtype)
        factor = drop(x.new_ones((x.shape[0], 1, 1), dtype=dtype)).flatten()
    return fused.Joint(gamma, factor)


def run(block: Any, swap: Swap, x: Tensor) -> Tensor:
    """The stream [B, N, D] after the block, both halves fused."""
    layout = swap.layout
    qkv, proj = _qkv(block, layout), _linear(block, (layout.proj,))
    dtype = product_dtype(x, qkv.weight)
    stream = fused.attention_half(
        Stream(x),
        _norm(find(block, layout.norm1)),
        qkv,
        find(block, layout.heads),
        _head_norm(block, layout.q_norm),
        _head_norm(block, layout.k_norm),
        proj,
        _joint(block, x, layout.ls1, layout.drop_path1, dtype),
        fused.How(dtype, swap.save, True, swap.impl),
    )
    fc1, fc2 = _linear(block, layout.fc1), _linear(block, (layout.fc2,))
    dtype = product_dtype(x, fc2.weight)
    gated = layout.packed or len(layout.fc1) == 2
    joint = _joint(block, x, layout.ls2, layout.drop_path2, dtype)
    how = fused.How(dtype, swap.save, False, swap.impl)
    norm2 = _norm(find(block, layout.norm2))
    return fused.mlp_half(stream, norm2, fc1, swap.activation, gated, fc2, joint, how).x


class Swapped:
    """A block whose class was changed. `original` is what it was, `_swap` how it runs."""

    original: ClassVar[type]
    _swap: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here, so no pickle finds it by name.
        reduced: Any = super().__reduce_ex__(protocol)
        _, (cls, *rest), *state = reduced
        return (_remake, (cls.original, *rest), *state)

    def extra_repr(self) -> str:
        """Says so."""
        return ", ".join(filter(None, (super().extra_repr(), "run by vitkern")))  # type: ignore[misc]


class SwappedBlock(Swapped):
    """One block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block's own forward returns."""
        swap: Swap = self._swap
        name = swap.layout.argument
        x: Any = args[0] if args else kwargs.get(name)
        others = [*args[1:], *(v for k, v in kwargs.items() if k not in (name, *_UNREAD))]
        if x is None or x.dim() != 3:
            why: str | None = f"{name} is no [B, N, D]"
        elif any(value is not None and value is not False for value in others):
            why = "a mask or another option was given"
        else:
            why = problem(self, swap)
        if why:
            note(type(self).__name__, "its own forward", why)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x = run(self, swap, x)
        return (x,) if swap.returns_tuple else x


class SwappedStack(Swapped):
    """A stack of pairs, attention and MLP, with a norm behind; `_swap` has one Swap a pair."""

    def forward(self, x: Tensor) -> Tensor:
        """The stream after all pairs and the norm."""
        if len(self.layers) != len(self._swap):  # type: ignore[attr-defined]
            note(type(self).__name__, "its own forward", "its layers were added to or pruned")
            return super().forward(x)  # type: ignore[misc]
        pair: Any
        for pair, swap in zip(self.layers, self._swap, strict=True):  # type: ignore[attr-defined]
            why = problem(pair, swap)
            if why:
                note(type(self).__name__, "its own forward", why)
                attention, mlp = pair
                x = attention(x) + x
                x = mlp(x) + x
            else:
                x = run(pair, swap, x)
        return self.norm(x)  # type: ignore[attr-defined]


_CLASSES: dict[type, type] = {}


def _swapped_class(original: type) -> type:
    """The class that an instance of `original` is given."""
    if original not in _CLASSES:
        base = SwappedStack if foreign.class_name(None, original) in PAIRS else SwappedBlock
        named = {"original": original, "__module__": original.__module__}
        named["__doc__"] = original.__doc__ or ""
        # Under its own name: transformers and others know blocks by that.
        _CLASSES[original] = type(original.__name__, (base, original), named)
    return _CLASSES[original]


def _remake(original: type, *rest: Any) -> Any:
    cls: Any = _swapped_class(original)
    return cls.__new__(cls, *rest)


def known(block: nn.Module) -> bool:
    """Whether there is a layout for this class."""
    return foreign.class_name(block) in (*LAYOUTS, *PAIRS)


def swap(block: Any, impl: dict[str, str], save: str) -> str | None:
    """Have our halves run this block from now on; or say why it is left alone."""
    if not foreign.has_own_forward(block) or block._compiled_call_impl is not None:
        return "its forward was replaced, or compiled"
    name = foreign.class_name(block)
    found: Any
    if name in PAIRS:
        found = tuple(examine(pair, PAIRS[name], impl, save) for pair in block.layers)
        why = next((one for one in found if isinstance(one, str)), None)
    else:
        found = examine(block, LAYOUTS[name], impl, save)
        why = found if isinstance(found, str) else None
    if why is None:
        block.__dict__.pop("forward", None)  # the class's own, which would hide the new one
        block._swap = found
        block.__class__ = _swapped_class(type(block))
    return why


def put_back(block: Any) -> None:
    """The block as it was before `swap`."""
    if foreign.has_own_forward(block):
        block.__dict__.pop("forward", None)
    block.__class__ = type(block).original
    del block._swap
