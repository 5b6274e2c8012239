"""The branches of a block, attention and MLP, and the pooling head that is made of the same parts.

Each is a module that can be called by itself. A block puts fused halves in their place where it
can; `problem` says why it can't.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkern import kernels as ops
from vitkern.kernels._op import accumulate_dtype, note
from vitkern.kernels.attention.reference import Options, heads, probabilities
from vitkern.model import fused
from vitkern.model.config import ViTConfig
from vitkern.model.layers import (
    ACTIVATIONS,
    NORMS,
    RmsNorm,
    activation_name,
    idle,
    make_norm,
    parameter,
    plain,
    plain_linear,
)
from vitkern.model.rel_pos import make_rel_pos
from vitkern.model.weights import draw_normal

# Why attention with relative positions is PyTorch's.
BIASED = "rel_pos: no op adds a bias to the logits"


def norm_of(norm: Any) -> fused.Norm:
    """A norm's parameters and options."""
    return fused.Norm(parameter(norm, "weight"), parameter(norm, "bias"), norm.eps, norm.rms)


def linear_of(layer: Any) -> fused.Linear:
    """A linear layer's parameters."""
    return fused.Linear(parameter(layer, "weight"), parameter(layer, "bias"))


def changed(what: str) -> str:
    """Why a half is not fused."""
    return f"{what} was replaced, wrapped or hooked"


def norm_then_linear(x: Tensor, norm: Any, layer: Any, impl: dict[str, str]) -> Tensor:
    """layer(norm(x)): one op, where there is a norm and nothing speaks against it."""
    lone = impl["layer_norm"] != "auto" and impl["norm_linear"] == "auto"  # as asked for
    if lone or not (plain(norm, *NORMS) and plain_linear(layer)):
        return layer(norm(x))
    kind = norm_of(norm)
    return ops.norm_linear(
        x, *linear_of(layer), kind.weight, kind.bias, kind.eps, rms=kind.rms,
        impl=impl["norm_linear"],
    )  # fmt: skip


def packed_norm(q: Any, k: Any) -> ops.QKNorm | None:
    """The norms of queries and keys as the op takes them; None where it can't, or has none."""
    if plain(q, *NORMS) and plain(k, type(q)) and q.eps == k.eps:
        return ops.QKNorm(q.weight, q.bias, k.weight, k.bias, q.eps, q.rms)
    return None


def pack(qkv: Tensor, q_norm: nn.Module, k_norm: nn.Module) -> tuple[Tensor, ops.QKNorm | None]:
    """qkv [B, N, 3, H, d] for the op, and the norm that the op has still to apply."""
    norm = packed_norm(q_norm, k_norm)
    if norm is None and not (plain(q_norm, nn.Identity) and plain(k_norm, nn.Identity)):
        q, k, v = qkv.unbind(2)
        qkv = torch.stack([q_norm(q).to(v.dtype), k_norm(k).to(v.dtype), v], 2)
    return qkv, norm


def maps_of(
    qkv: Tensor, q_norm: nn.Module, k_norm: nn.Module, bias: Tensor | None = None
) -> Tensor:
    """How much every token attends to every other: qkv [B, N, 3, H, d] -> float32 [B, H, N, N]."""
    qkv, norm = pack(qkv, q_norm, k_norm)
    options, scale = Options(**({} if norm is None else norm._asdict())), qkv.shape[-1] ** -0.5
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, *_ = heads(qkv, options, accumulate_dtype(qkv, options.q_weight))
        if bias is None:
            return probabilities(q, k, None, scale)[0].float()
        return (q @ k.transpose(-2, -1) * scale + bias.to(q.dtype)).softmax(-1).float()


def by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float, impl: str, why: str
) -> Tensor:
    """PyTorch's attention [B, N, H, d] of q, k and v [B, H, N, d] that no op of ours takes.

    why: for explain(), and for the error.

    Raises:
        ValueError: another implementation was asked for by name.
    """
    if impl == "reference" and not dropout_p:
        note("attention", impl, why)
        with torch.autocast(q.device.type, enabled=False):
            acc = accumulate_dtype(q)
            logits = q.to(acc) @ k.to(acc).transpose(-2, -1) * q.shape[-1] ** -0.5
            logits = logits if bias is None else logits + bias.to(acc)
            return (logits.softmax(-1) @ v.to(acc)).to(v.dtype).transpose(1, 2)
    if impl not in ("auto", "sdpa"):
        why = "it has no dropout" if impl == "reference" else why
        raise ValueError(f"impl={impl!r} for attention can't run here: {why}")
    note("attention", "sdpa", why)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig, **dd: Any) -> None:
        super().__init__()
        dim, inner = config.embed_dim, config.inner_dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.impl = config.implementations
        self.biased = config.rel_pos is not None
        self.qkv = nn.Linear(dim, 3 * inner, bias=config.qkv_bias, **dd)
        self.q_norm, self.k_norm = (
            make_norm(config, self.head_dim, **dd) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        own = self.biased and not config.shared_rel_pos
        self.rel_pos = make_rel_pos(config, **dd) if own else None
        self.attn_drop = nn.Dropout(config.attn_drop_rate)
        scaled = config.scale_attn_norm
        self.norm = make_norm(config, inner, product=True, **dd) if scaled else nn.Identity()
        self.proj = nn.Linear(inner, dim, bias=config.proj_bias, **dd)
        self.proj_drop = nn.Dropout(config.proj_drop_rate)

    def problem(self) -> str | None:
        """Why the fused half can't stand in for these modules; None where it can."""
        parts: Any = self._modules  # not by attribute: that takes a microsecond each
        if self.biased:
            return BIASED
        if not (plain_linear(parts["qkv"]) and plain_linear(parts["proj"])):
            return changed("attn.qkv or attn.proj")
        if not (idle(parts["attn_drop"]) and idle(parts["proj_drop"])):
            return "dropout"
        if type(parts["norm"]) in NORMS:
            return "scale_attn_norm: the product that has a norm before it adds no residual"
        if not plain(parts["norm"], nn.Identity):
            return changed("attn.norm")
        q_norm, k_norm = parts["q_norm"], parts["k_norm"]
        identities = plain(q_norm, nn.Identity) and plain(k_norm, nn.Identity)
        if not identities and packed_norm(q_norm, k_norm) is None:
            return changed("attn.q_norm or attn.k_norm")
        return None

    def packed(self, qkv: Tensor) -> Tensor:
        """[B, N, 3 * H * d] as [B, N, 3, H, d]."""
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim))

    def bias(self, shared: Tensor | None) -> Tensor | None:
        """What is added to the logits [1, H, N, N]: this module's own relative positions, or what
        the model shares among all.
        """
        return shared if self.rel_pos is None else self.rel_pos()

    def maps(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """How much every token attends to every other: [B, N, D] -> float32 [B, H, N, N]."""
        return maps_of(self.packed(self.qkv(x)), self.q_norm, self.k_norm, self.bias(attn_bias))

    def attend(self, qkv: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """Attention [B, N, H * d] of packed queries, keys and values [B, N, 3 * H * d]."""
        dropout_p = self.attn_drop.p if self.training else 0.0
        qkv, impl = self.packed(qkv), self.impl["attention"]
        bias = self.bias(attn_bias)
        if bias is None:
            qkv, norm = pack(qkv, self.q_norm, self.k_norm)
            return ops.attention(qkv, qk_norm=norm, dropout_p=dropout_p, impl=impl)
        if bias.shape[-1] != qkv.shape[1]:
            raise ValueError(
                f"relative positions are those of {bias.shape[-1]} tokens, got {qkv.shape[1]}: an "
                f"image of another size needs set_input_size"
            )
        q, k, v = qkv.unbind(2)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return by_sdpa(q, k, v, bias.to(v.dtype), dropout_p, impl, BIASED).flatten(2)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; attn_bias [1 or B, H, N, N] is added to the logits."""
        x = self.attend(self.qkv(x), attn_bias)
        return self.proj_drop(norm_then_linear(x, self.norm, self.proj, self.impl))


class Difference(nn.Module):
    """What differential attention has beyond attention (Ye et al., "Differential Transformer",
    2024): of two maps, softmax(q1 k1^T) - lambda softmax(q2 k2^T), and a norm for each head.

    q and k of a head are two halves d / 2 wide, v is d wide. lambda comes from two numbers
    (`dual`), or from four vectors, and starts higher in later blocks.
    """

    lambda_init: float
    sub_norm: RmsNorm

    def set_up(self, config: ViTConfig, index: int, dual: bool, dd: dict[str, Any]) -> None:
        """Add the parameters; `index` is that of the block."""
        self.num_heads, self.head_dim = config.num_heads, config.embed_dim // config.num_heads // 2
        self.impl = config.implementations
        self.q_norm, self.k_norm = (
            make_norm(config, self.head_dim, **dd) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.attn_drop = nn.Dropout(config.attn_drop_rate)
        self.names = ("a", "b") if dual else ("q1", "k1", "q2", "k2")
        for name in self.names:  # float32 whatever the other parameters are, as timm has them
            size = () if dual else (self.head_dim,)
            value = torch.empty(size, dtype=torch.float32, device=dd.get("device"))
            self.register_parameter(f"lambda_{name}", nn.Parameter(value))
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * index)

    def make_sub_norm(self, dd: dict[str, Any]) -> RmsNorm:
        """The norm for each head, which each user has at another place among its parameters."""
        norm = RmsNorm(2 * self.head_dim, 1e-5, **dd)
        norm.impl = self.impl["layer_norm"]
        return norm

    def reset_parameters(self) -> None:
        """Two numbers start at 0, vectors at random."""
        for name in self.names:
            value = getattr(self, f"lambda_{name}")
            if value.dim():
                nn.init.normal_(value, std=0.1)
            else:
                nn.init.zeros_(value)

    def weight(self) -> Tensor:
        """lambda, a float32 scalar."""
        values = [getattr(self, f"lambda_{name}") for name in self.names]
        if len(values) == 4:
            values = [(values[i] * values[i + 1]).sum(-1).float() for i in (0, 2)]
        return values[0].exp() - values[1].exp() + self.lambda_init

    def pairs(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [2, B, H, N, d / 2] of [B, N, H * d], normalised."""
        sizes = (2 * self.num_heads, self.head_dim)
        q, k = self.q_norm(q.unflatten(-1, sizes)), self.k_norm(k.unflatten(-1, sizes))
        q, k = (t.unflatten(2, (-1, 2)).permute(3, 0, 2, 1, 4) for t in (q, k))
        return q, k

    def difference(self, qkv: Tensor) -> Tensor:
        """Attention [B, N, H * d] of packed queries, keys and values [B, N, 3 * H * d]."""
        q, k, v = qkv.chunk(3, -1)
        q, k = (t.to(v.dtype) for t in self.pairs(q, k))
        v = v.unflatten(-1, (self.num_heads, 2 * self.head_dim)).transpose(1, 2)
        dropout_p = self.attn_drop.p if self.training else 0.0
        impl, why = self.impl["attention"], "heads of q and k are half as wide as v's"
        one, two = (by_sdpa(q[i], k[i], v, None, dropout_p, impl, why) for i in (0, 1))
        x = self.sub_norm(one - self.weight().type_as(q) * two)
        return (x * (1 - self.lambda_init)).flatten(2)

    def difference_of_maps(self, qkv: Tensor) -> Tensor:
        """What the values are weighted with, float32 [B, H, N, N]; it may be negative."""
        q, k, _ = qkv.chunk(3, -1)
        q, k = self.pairs(q, k)
        with torch.autocast(qkv.device.type, enabled=False):
            acc = accumulate_dtype(q)
            one, two = (q.to(acc) @ k.to(acc).transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
            return (one - self.weight() * two).float()


class DiffAttention(Difference):
    """Multi-head differential attention."""

    def __init__(self, config: ViTConfig, index: int, dual_lambda: bool, **dd: Any) -> None:
        super().__init__()
        dim = config.embed_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias, **dd)
        self.set_up(config, index, dual_lambda, dd)
        scaled = config.scale_attn_norm
        self.norm = make_norm(config, dim, product=True, **dd) if scaled else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias, **dd)
        self.proj_drop = nn.Dropout(config.proj_drop_rate)
        self.sub_norm = self.make_sub_norm(dd)
        self.reset_parameters()

    def problem(self) -> str:
        """Why the fused half can't stand in for these modules."""
        return "differential attention has no op"

    def maps(self, x: Tensor) -> Tensor:
        """What the values are weighted with: [B, N, D] -> float32 [B, H, N, N]."""
        return self.difference_of_maps(self.qkv(x))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = self.difference(self.qkv(x))
        return self.proj_drop(norm_then_linear(x, self.norm, self.proj, self.impl))


def make_attention(config: ViTConfig, index: int, **dd: Any) -> Attention | DiffAttention:
    """The kind of attention that the config names, for block `index`."""
    kind, options = config.attention
    return (
        DiffAttention(config, index, **options, **dd) if kind == "diff" else Attention(config, **dd)
    )


class Mlp(nn.Module):
    """Two layers and an activation; or first layers in a gated pair, act(gate) * value.

    layout: "mlp"; "swiglu_packed", where fc1 is [gate; value]; or "swiglu", with fc1_g and fc1_x.
    scaled: a norm before the last layer.
    """

    def __init__(
        self,
        config: ViTConfig,
        layout: str,
        bias: bool,
        drop: float,
        scaled: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        dim, hidden, self.layout = config.embed_dim, config.hidden_dim, layout
        self.impl = config.implementations
        self.first = ("fc1_g", "fc1_x") if layout == "swiglu" else ("fc1",)
        for name in self.first:
            self.add_module(name, nn.Linear(dim, hidden, bias=bias, **dd))
        self.act = ACTIVATIONS[config.act_layer]()
        self.drop1 = nn.Dropout(drop)
        width = hidden // 2 if layout == "swiglu_packed" else hidden
        self.norm = make_norm(config, width, product=True, **dd) if scaled else nn.Identity()
        self.fc2 = nn.Linear(width, dim, bias=bias, **dd)
        self.drop2 = nn.Dropout(drop)

    def init_weights(self) -> None:
        """A gated pair starts as timm's does: one of the two near 0, its bias 1."""
        if self.layout == "mlp":
            return
        layer: Any = getattr(self, self.first[0])
        start = 0 if self.layout == "swiglu" else layer.weight.shape[0] // 2
        nn.init.normal_(layer.weight[start:], std=1e-6)
        if layer.bias is not None:
            nn.init.ones_(layer.bias[start:])

    def problem(self) -> str | None:
        """Why the fused half can't stand in for these modules; None where it can."""
        parts: Any = self._modules
        if not (self.plain_layers() and plain_linear(parts["fc2"])):
            return changed("a layer of mlp")
        if not (idle(parts["drop1"]) and idle(parts["drop2"])):
            return "dropout"
        if type(parts["norm"]) in NORMS:
            return "scale_mlp_norm: the product that has a norm before it adds no residual"
        return None if plain(parts["norm"], nn.Identity) else changed("mlp.norm")

    def first_layers(self) -> list[Any]:
        """fc1, or the gated pair."""
        return [self._modules[name] for name in self.first]

    def plain_layers(self) -> bool:
        """Whether an op may stand in for the first layers and the activation."""
        act: Any = self._modules["act"]
        for layer in self.first_layers():
            if not plain_linear(layer):
                return False
        return activation_name(act) is not None

    def first_layer(self) -> fused.Linear:
        """The first layers as one: packing weights costs less than a second pass over x."""
        layers = self.first_layers()
        if len(layers) == 1:
            return linear_of(layers[0])
        biases = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        return fused.Linear(torch.cat([layer.weight for layer in layers]), biases)

    def hidden(self, x: Tensor) -> Tensor:
        """The activated hidden layer [..., F] of [..., D]."""
        if self.plain_layers():
            name, impl = activation_name(self.act) or "", self.impl["linear_act"]
            gated = self.layout != "mlp"
            return ops.linear_act(x, *self.first_layer(), activation=name, gated=gated, impl=impl)
        outputs = [layer(x) for layer in self.first_layers()]
        if self.layout == "swiglu_packed":
            outputs = outputs[0].chunk(2, -1)
        activated = self.act(outputs[0])
        return activated if self.layout == "mlp" else activated * outputs[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x = self.drop1(self.hidden(x))
        return self.drop2(norm_then_linear(x, self.norm, self.fc2, self.impl))


def make_mlp(config: ViTConfig, **dd: Any) -> Mlp:
    """The MLP of a block."""
    bias, drop, scaled = config.proj_bias, config.proj_drop_rate, config.scale_mlp_norm
    return Mlp(config, config.mlp_layer, bias, drop, scaled, **dd)


class AttentionPool(nn.Module):
    """Pooling by attention from one learned query, then an MLP: timm's AttentionPoolLatent."""

    def __init__(self, config: ViTConfig, **dd: Any) -> None:
        super().__init__()
        dim, self.num_heads = config.embed_dim, config.num_heads
        if dim % self.num_heads:  # with a dim_head of their own, the blocks don't mind
            raise ValueError(
                f"global_pool='map' needs an embed_dim that is a multiple of num_heads, got "
                f"embed_dim={dim} and num_heads={self.num_heads}"
            )
        self.head_dim = dim // self.num_heads
        self.impl = config.implementations["attention_pool"]
        self.latent = nn.Parameter(torch.zeros(1, 1, dim, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm = make_norm(config, dim, product=True, **dd)
        self.mlp = Mlp(config, "mlp", True, 0.0, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """The query starts with unit length."""
        draw_normal(self.latent, self.latent.shape[-1] ** -0.5, cut=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, D]."""
        q = self.q(self.latent).unflatten(-1, (self.num_heads, self.head_dim))
        kv = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim))
        x = self.proj(ops.attention_pool(q.expand(x.shape[0], -1, -1, -1), kv, impl=self.impl))
        return (x + self.mlp(self.norm(x)))[:, 0]
