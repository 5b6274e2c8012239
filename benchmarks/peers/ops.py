"""Other packages' kernels for our ops: ``OPS["layer_norm"]["liger"].call(x=x, weight=w, ...)``.

A peer takes the keyword arguments of our public function, returns what that returns, and is
differentiable wherever its package is. What it lacks raises `Unfit`, naming the option; nothing is
left out or converted behind the reader's back. Where an op is more than the package has a kernel
for, PyTorch does the rest, as it would for a user, and `Peer.note` says so.

Read in the sources of xformers 0.0.35, NVIDIA's apex at 6424da3, TransformerEngine 2.20
(d0067d0), flash-attn 2.8.4, quack-kernels 0.6.5 and liger-kernel 0.8.5. Liger's have run in
Triton's interpreter; not run yet, for want of a GPU: all others, and Liger's compiled.

Left out: FlashAttention's attention, which is an implementation of our op (`impl="flash"`);
TransformerEngine's LayerNormMLP and apex's FusedDenseGeluDense, two linear layers in one, and with
the tanh form of GELU, which no op of ours is; ops for which no package has a kernel.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkern.kernels import QKNorm, Rope
from vitkern.kernels._gemm.activation import fused
from vitkern.kernels._op import dtype_name, wants_grad
from vitkern.kernels._triton import INTERPRET

from .._contest import Absent, Unfit
from . import _packages
from .cudnn import cudnn_attention


@dataclass(frozen=True)
class Part:
    """A module of a package, and those of its extensions without which it can do nothing."""

    distribution: str
    module: str
    extensions: tuple[str, ...] = ()

    def absent(self) -> str | None:
        """Why it isn't here, found without importing it; None if it seems to be."""
        return _packages.problem(self.distribution, self.module, *self.extensions)


@functools.cache  # the call is timed
def _get(part: Part, name: str) -> Any:
    """What `part` calls `name`.

    Raises:
        Absent: it isn't installed, doesn't load or has no such thing.
    """
    reason = part.absent()
    if reason:
        raise Absent(reason)
    module = _packages.load(part.distribution, part.module)
    try:
        return getattr(module, name)
    except AttributeError:
        found = _packages.version(part.distribution)
        raise Absent(f"{part.distribution} {found} has no {part.module}.{name}") from None


@dataclass(frozen=True)
class Peer:
    """One package's way to do an op.

    call: takes what our public function takes but for `impl`; raises Absent or Unfit, and errors of
        the package as they are.
    parts: what it calls.
    note: what else it does.
    """

    call: Callable[..., Any]
    parts: tuple[Part, ...]
    note: str = ""

    @property
    def distribution(self) -> str:
        """Whose it is."""
        return self.parts[0].distribution

    def absent(self) -> str | None:
        """Why it isn't here, found without importing anything; None if it seems to be."""
        return next(filter(None, (part.absent() for part in self.parts)), None)


def absent() -> dict[str, str]:
    """Name of a peer -> reason, of those none of whose ops are here; imports nothing."""
    found: dict[str, list[str | None]] = {}
    for peers in OPS.values():
        for name, peer in peers.items():
            found.setdefault(name, []).append(peer.absent())
    return {name: reasons[0] for name, reasons in found.items() if all(reasons) and reasons[0]}


CUDNN = Part("torch", "torch.nn.attention")
XFORMERS = Part("xformers", "xformers.ops")
APEX_NORM = Part("apex", "apex.normalization.fused_layer_norm", ("fused_layer_norm_cuda",))
APEX_DENSE = Part("apex", "apex.fused_dense.fused_dense", ("fused_dense_cuda",))
ENGINE = Part("transformer_engine", "transformer_engine.pytorch")
FLASH = Part("flash-attn", "flash_attn.ops.triton.layer_norm")
LIGER = Part("liger-kernel", "liger_kernel.ops")
QUACK_NORM = Part("quack-kernels", "quack.rmsnorm")
QUACK_LINEAR = Part("quack-kernels", "quack.linear")
QUACK_GEMM = Part("quack-kernels", "quack.gemm_interface")


def _fits(part: Part, x: Tensor, *others: Tensor | None, mixed: bool = False) -> None:
    """`x` is on a GPU and not empty; unless `mixed`, all have one dtype.

    Raises:
        Unfit: why not.
    """
    who = part.distribution
    if not (x.is_cuda or INTERPRET):
        raise Unfit(f"{who} needs CUDA tensors, these are on {x.device.type}")
    if x.numel() == 0:
        raise Unfit(f"{who} isn't asked for empty tensors, and this is {list(x.shape)}")
    for t in () if mixed else others:
        if t is not None and t.dtype != x.dtype:
            both = f"{dtype_name(x.dtype)} and {dtype_name(t.dtype)}"
            raise Unfit(f"{who} takes one dtype for all, not {both}")


def _lacks(part: Part, **options: Any) -> None:
    """None of these options is set.

    Raises:
        Unfit: one is.
    """
    for name, value in options.items():
        if value is not None and value is not False and value != "":
            given = f"={value!r}" if isinstance(value, (str, bool, float)) else ""
            raise Unfit(f"{part.distribution} has no {name}{given} here")


def _needs(part: Part, **arguments: Tensor | None) -> None:
    """Every one of these is there.

    Raises:
        Unfit: one is None.
    """
    for name, value in arguments.items():
        if value is None:
            raise Unfit(f"{part.distribution} can't do without {name}")


def _forward_only(part: Part, *tensors: Tensor | None) -> None:
    if wants_grad(*tensors):
        raise Unfit(f"{part.distribution} has no gradient of this")


def _returns(part: Part, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """The result is to be of `dtype`.

    Raises:
        Unfit: another is asked for.
    """
    if out_dtype not in (None, dtype):
        raise Unfit(f"{part.distribution} returns {dtype_name(dtype)} here, not {out_dtype}")


def xformers_attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    qk_norm: QKNorm | None = None,
    rope: Rope | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` by memory_efficient_attention, which picks CUTLASS's or FlashAttention's."""
    # It masks by a dense bias, and by block-diagonal ones that are made on the host.
    _lacks(XFORMERS, qk_norm=qk_norm, rope=rope, key_mask=key_mask, cu_seqlens=cu_seqlens)
    _fits(XFORMERS, qkv)
    return _xformers(*qkv.unbind(2), p=dropout_p, scale=scale)


def xformers_attention_pool(q: Tensor, kv: Tensor, *, scale: float | None = None) -> Tensor:
    """`attention_pool` by the same."""
    _fits(XFORMERS, q, kv)
    return _xformers(q, *kv.unbind(2), p=0.0, scale=scale)


def _xformers(*qkv: Tensor, p: float, scale: float | None) -> Tensor:
    try:
        out = _get(XFORMERS, "memory_efficient_attention")(*qkv, p=p, scale=scale)
    except NotImplementedError as error:  # a page on why each of its kernels can't
        raise Unfit(f"xformers: {str(error).strip().partition(chr(10))[0]}") from error
    return out.flatten(2)


def apex_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_norm` by FusedLayerNorm's and FusedRMSNorm's functions."""
    _fits(APEX_NORM, x, weight, bias)
    _returns(APEX_NORM, x.dtype, out_dtype)
    shape = x.shape[-1:]
    if weight is None:
        name = "fused_rms_norm" if rms else "fused_layer_norm"
        return _get(APEX_NORM, name)(x, shape, eps)
    if rms:
        _lacks(APEX_NORM, bias=bias)
        return _get(APEX_NORM, "fused_rms_norm_affine")(x, weight, shape, eps)
    _needs(APEX_NORM, bias=bias)
    return _get(APEX_NORM, "fused_layer_norm_affine")(x, weight, bias, shape, eps)


def _apex_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _needs(APEX_DENSE, bias=bias)
    _fits(APEX_DENSE, x, weight, bias)
    y = _get(APEX_DENSE, "FusedDenseFunc").apply(x.flatten(0, -2), weight, bias)
    return y.unflatten(0, x.shape[:-1])


def apex_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    activation: str = "",
    gated: bool = False,
) -> Tensor:
    """`norm_linear` by its norm and its fused dense layer, then PyTorch's activation."""
    normed = apex_norm(x, norm_weight, norm_bias, eps, rms=rms)
    return fused(_apex_dense(normed, weight, bias), activation, gated)


def apex_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    gated: bool = False,
) -> Tensor:
    """`linear_act` by its fused dense layer, then PyTorch's activation."""
    return fused(_apex_dense(x, weight, bias), activation, gated)


@functools.lru_cache(maxsize=8)
def _engine_module(name: str, *sizes: int, **options: Any) -> Any:
    return _get(ENGINE, name)(*sizes, **options)


def _engine(module: Any, x: Tensor, **parameters: Tensor | None) -> Tensor:
    """The module's result with these in place of its parameters.

    Put where nn.Module looks for them, since what isn't an nn.Parameter can't be set, and
    ``torch.func.functional_call`` would take its time at every call.
    """
    module._parameters.update(parameters)
    return module(x)


def engine_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_norm` by TransformerEngine's LayerNorm and RMSNorm."""
    _needs(ENGINE, weight=weight)
    _fits(ENGINE, x, weight, bias)
    _returns(ENGINE, x.dtype, out_dtype)
    options = {"eps": eps, "device": x.device, "dtype": x.dtype}
    if rms:
        _lacks(ENGINE, bias=bias)
        return _engine(_engine_module("RMSNorm", x.shape[-1], **options), x, weight=weight)
    _needs(ENGINE, bias=bias)
    module = _engine_module("LayerNorm", x.shape[-1], **options)
    return _engine(module, x, weight=weight, bias=bias)


def engine_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    activation: str = "",
    gated: bool = False,
) -> Tensor:
    """`norm_linear` by TransformerEngine's LayerNormLinear."""
    _lacks(ENGINE, activation=activation, gated=gated)
    _needs(ENGINE, norm_weight=norm_weight)
    _fits(ENGINE, x, weight, bias, norm_weight, norm_bias)
    norm = {"layer_norm_weight": norm_weight}
    if rms:
        _lacks(ENGINE, norm_bias=norm_bias)
    else:
        _needs(ENGINE, norm_bias=norm_bias)
        norm["layer_norm_bias"] = norm_bias
    module = _engine_module(
        "LayerNormLinear",
        x.shape[-1],
        weight.shape[0],
        eps=eps,
        bias=bias is not None,
        normalization="RMSNorm" if rms else "LayerNorm",
        params_dtype=x.dtype,
        device=x.device,
    )
    linear = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return _engine(module, x, **norm, **linear)


def flash_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_norm` by flash-attn's layer_norm_fn (Triton)."""
    _needs(FLASH, weight=weight)
    _fits(FLASH, x, weight, bias)
    return _get(FLASH, "layer_norm_fn")(
        x, weight, bias, eps=eps, is_rms_norm=rms, out_dtype=out_dtype
    )


def flash_add_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` by the same, whose `rowscale` is stochastic depth."""
    _lacks(FLASH, layer_scale=layer_scale)
    _needs(FLASH, weight=weight)
    _fits(FLASH, branch, weight, bias, mixed=True)
    rowscale = None if drop_scale is None else drop_scale[:, None].expand(branch.shape[:-1])
    normed, stream = _get(FLASH, "layer_norm_fn")(
        branch,
        weight,
        bias,
        residual=residual,
        eps=eps,
        rowscale=rowscale,
        prenorm=True,
        is_rms_norm=rms,
        out_dtype=out_dtype or residual.dtype,
    )
    return stream, normed


def liger_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_norm` by LigerLayerNormFunction and LigerRMSNormFunction."""
    _fits(LIGER, x, weight, bias)
    _returns(LIGER, x.dtype, out_dtype)
    if rms:
        _lacks(LIGER, bias=bias)
        # "gemma": all in float32, rounded once. Not in place, which overwrites the gradient.
        return _get(LIGER, "LigerRMSNormFunction").apply(x, weight, eps, 0.0, "gemma", False)
    _needs(LIGER, weight=weight, bias=bias)
    return _get(LIGER, "LigerLayerNormFunction").apply(x, weight, bias, eps)


def liger_add_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` by LigerFusedAddRMSNormFunction."""
    if not rms:
        raise Unfit("liger-kernel has no LayerNorm here, only RMSNorm")
    _lacks(LIGER, bias=bias, layer_scale=layer_scale, drop_scale=drop_scale)
    _needs(LIGER, weight=weight)
    _fits(LIGER, branch, residual, weight)
    _returns(LIGER, branch.dtype, out_dtype)
    function = _get(LIGER, "LigerFusedAddRMSNormFunction")
    normed, stream = function.apply(branch, residual, weight, eps, 0.0, "gemma", False)
    return stream, normed


def liger_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    gated: bool = False,
) -> Tensor:
    """`linear_act` by PyTorch's linear layer, then Liger's SwiGLU or GEGLU (tanh)."""
    if not gated or activation not in ("silu", "gelu_tanh"):
        raise Unfit(f"liger-kernel has no {activation} with gated={gated}; gated silu, gelu_tanh")
    _fits(LIGER, x, weight, bias)
    z = F.linear(x, weight, bias)
    if activation == "silu":  # the gradient of more than two dimensions has two in 0.8.5
        y = _get(LIGER, "LigerFusedGateUpSiLUMulFunction").apply(z.flatten(0, -2))
        return y.unflatten(0, x.shape[:-1])
    # Its backward pass overwrites what it saved. A second one through the same graph, as a timer
    # makes, takes as long but computes something else.
    return _get(LIGER, "LigerGELUMulFunction").apply(*z.chunk(2, -1))


def quack_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`layer_norm` by quack's rmsnorm, or its layernorm_fwd, which autograd doesn't know."""
    _fits(QUACK_NORM, x, mixed=True)
    if rms:
        return _get(QUACK_NORM, "rmsnorm")(x, weight, bias, eps=eps, out_dtype=out_dtype)
    _needs(QUACK_NORM, weight=weight)
    _forward_only(QUACK_NORM, x, weight, bias)
    _returns(QUACK_NORM, x.dtype, out_dtype)
    assert weight is not None
    scale, shift = weight.float(), None if bias is None else bias.float()  # it asks for that
    y = _get(QUACK_NORM, "layernorm_fwd")(x.flatten(0, -2), scale, shift, eps=eps)
    return y.unflatten(0, x.shape[:-1])


def quack_add_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    rms: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` by quack's rmsnorm with a residual."""
    if not rms:
        raise Unfit("quack-kernels has no LayerNorm here, only RMSNorm")
    _lacks(QUACK_NORM, layer_scale=layer_scale, drop_scale=drop_scale)
    _fits(QUACK_NORM, branch, mixed=True)
    normed, stream = _get(QUACK_NORM, "rmsnorm")(
        branch,
        weight,
        bias,
        residual=residual,
        out_dtype=out_dtype or residual.dtype,
        eps=eps,
        prenorm=True,
    )
    return stream, normed


# Ours -> quack's; gated ones, too. Its "geglu" is the tanh form, and it has no gated erf form.
_QUACK_ACTIVATIONS = {
    ("gelu", False): "gelu_erf",
    ("gelu_tanh", False): "gelu_tanh_approx",
    ("quick_gelu", False): "quick_gelu",
    ("relu", False): "relu",
    ("silu", False): "silu",
    ("gelu_tanh", True): "geglu",
    ("relu", True): "reglu",
    ("silu", True): "swiglu",
}


def _quack_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor | None) -> None:
    _fits(QUACK_GEMM, x, weight, bias, *others)
    if x.dtype == torch.float32:
        raise Unfit("quack-kernels multiplies in 16 bits here, not in float32")
    for name, size in zip(("F", "D"), weight.shape, strict=True):
        if size % 8:
            raise Unfit(f"quack-kernels takes a weight [F, D] of multiples of 8, not {name}={size}")


def quack_linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "gelu",
    gated: bool = False,
) -> Tensor:
    """`linear_act` by quack's gemm_act; its gradients come with those of the layer behind only."""
    name = _QUACK_ACTIVATIONS.get((activation, gated))
    if name is None:
        raise Unfit(f"quack-kernels has no activation={activation!r} with gated={gated}")
    _quack_sizes(x, weight, bias)
    _forward_only(QUACK_GEMM, x, weight, bias)
    _, y = _get(QUACK_GEMM, "gemm_act")(
        x.flatten(0, -2),
        weight.T,
        bias=bias,
        activation=name,
        store_preact=False,
        concat_layout=("B", "bias") if gated and bias is not None else ("B",) if gated else None,
    )
    return y.unflatten(0, x.shape[:-1])


def quack_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    activation: str = "",
    gated: bool = False,
) -> Tensor:
    """`norm_linear` by quack's norm, then its linear layer.

    Its own way to fold a norm into a product needs statistics of the product before.
    """
    _quack_sizes(x, weight, bias)
    normed = quack_norm(x, norm_weight, norm_bias, eps, rms=rms, out_dtype=weight.dtype)
    if activation:
        return quack_linear_act(normed, weight, bias, activation=activation, gated=gated)
    return _get(QUACK_LINEAR, "linear_func")(normed, weight, bias)


def quack_linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
) -> Tensor:
    """`linear_residual` by quack's gemm_add, which autograd doesn't know."""
    _lacks(QUACK_GEMM, layer_scale=layer_scale, drop_scale=drop_scale)
    _quack_sizes(x, weight, bias)
    _forward_only(QUACK_GEMM, x, weight, bias, residual)
    stream = _get(QUACK_GEMM, "gemm_add")(
        x.flatten(0, -2),
        weight.T,
        residual.flatten(0, -2),
        bias=bias,
        out_dtype=residual.dtype,
    )
    return stream.unflatten(0, residual.shape[:-1])


# By op, then by the name that a report gives the peer.
OPS: dict[str, dict[str, Peer]] = {
    "attention": {
        "cudnn": Peer(cudnn_attention, (CUDNN,), "PyTorch's own call of cuDNN"),
        "xformers": Peer(xformers_attention, (XFORMERS,)),
    },
    "attention_pool": {"xformers": Peer(xformers_attention_pool, (XFORMERS,))},
    "layer_norm": {
        "apex": Peer(apex_norm, (APEX_NORM,)),
        "transformer engine": Peer(engine_norm, (ENGINE,)),
        "flash-attn": Peer(flash_norm, (FLASH,)),
        "liger": Peer(liger_norm, (LIGER,)),
        "quack": Peer(quack_norm, (QUACK_NORM,)),
    },
    "add_layer_norm": {
        "flash-attn": Peer(flash_add_norm, (FLASH,)),
        "liger": Peer(liger_add_norm, (LIGER,)),
        "quack": Peer(quack_add_norm, (QUACK_NORM,)),
    },
    "norm_linear": {
        "apex": Peer(apex_norm_linear, (APEX_NORM, APEX_DENSE), "norm, then fused dense"),
        "transformer engine": Peer(engine_norm_linear, (ENGINE,)),
        "quack": Peer(quack_norm_linear, (QUACK_NORM, QUACK_GEMM, QUACK_LINEAR), "norm, then gemm"),
    },
    "linear_act": {
        "apex": Peer(apex_linear_act, (APEX_DENSE,), "fused dense, then PyTorch's activation"),
        "liger": Peer(liger_linear_act, (LIGER,), "PyTorch's linear layer, then Liger's gate"),
        "quack": Peer(quack_linear_act, (QUACK_GEMM,)),
    },
    "linear_residual": {"quack": Peer(quack_linear_residual, (QUACK_GEMM,))},
}
