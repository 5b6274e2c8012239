"""The transformer block, its two halves, and the pooling head that is made of the same parts.

    x = x + attn(norm1(x)),  x = x + mlp(norm2(x)),  each branch scaled, dropped at random

How steps come together in ops, and what happens where a module isn't `plain`: see `model.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitkern import fused
from vitkern import kernels as ops
from vitkern.config import ViTConfig
from vitkern.fused import Stream
from vitkern.kernels._op import accumulate_dtype, note, product_dtype
from vitkern.kernels.attention.reference import Options, heads, probabilities
from vitkern.layers import (
    ACTIVATIONS,
    NORMS,
    DropPath,
    LayerScale,
    activation_name,
    branch_scales,
    idle,
    make_drop_path,
    make_norm,
    plain,
    plain_linear,
)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig, **dd: Any) -> None:
        super().__init__()
        dim, self.num_heads, self.head_dim = config.embed_dim, config.num_heads, config.head_dim
        self.impl = config.implementations["attention"]
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias, **dd)
        self.q_norm, self.k_norm = (
            make_norm(config, self.head_dim, **dd) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.attn_drop = nn.Dropout(config.attn_drop_rate)
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias, **dd)
        self.proj_drop = nn.Dropout(config.proj_drop_rate)

    def packed_norm(self) -> ops.QKNorm | None:
        """The norms of queries and keys as the op takes them; None where it can't, or has none."""
        q, k = self.q_norm, self.k_norm
        if plain(q, *NORMS) and plain(k, type(q)) and q.eps == k.eps:
            return ops.QKNorm(q.weight, q.bias, k.weight, k.bias, q.eps, q.rms)
        return None

    def packed(self, x: Tensor) -> tuple[Tensor, ops.QKNorm | None]:
        """qkv [B, N, 3, H, d] of tokens [B, N, D], and the norm that the op has still to apply."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q_norm, k_norm, norm = self.q_norm, self.k_norm, self.packed_norm()
        if norm is None and not (plain(q_norm, nn.Identity) and plain(k_norm, nn.Identity)):
            q, k, v = qkv.unbind(2)
            qkv = torch.stack([q_norm(q).to(v.dtype), k_norm(k).to(v.dtype), v], 2)
        return qkv, norm

    def maps(self, x: Tensor) -> Tensor:
        """How much every token attends to every other: [B, N, D] -> float32 [B, H, N, N]."""
        qkv, norm = self.packed(x)
        options = Options(**({} if norm is None else norm._asdict()))
        with torch.autocast(x.device.type, enabled=False):
            q, k, *_ = heads(qkv, options, accumulate_dtype(qkv, options.q_weight))
            return probabilities(q, k, None, self.head_dim**-0.5)[0].float()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        qkv, norm = self.packed(x)
        dropout_p = self.attn_drop.p if self.training else 0.0
        x = ops.attention(qkv, qk_norm=norm, dropout_p=dropout_p, impl=self.impl)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Two layers and an activation; or first layers in a gated pair, act(gate) * value.

    layout: "mlp"; "swiglu_packed", where fc1 is [gate; value]; or "swiglu", with fc1_g and fc1_x.
    """

    def __init__(self, config: ViTConfig, layout: str, bias: bool, drop: float, **dd: Any) -> None:
        super().__init__()
        dim, hidden, self.layout = config.embed_dim, config.hidden_dim, layout
        self.impl = config.implementations["linear_act"]
        self.first = ("fc1_g", "fc1_x") if layout == "swiglu" else ("fc1",)
        for name in self.first:
            self.add_module(name, nn.Linear(dim, hidden, bias=bias, **dd))
        self.act = ACTIVATIONS[config.act_layer]()
        self.drop1 = nn.Dropout(drop)
        width = hidden // 2 if layout == "swiglu_packed" else hidden
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

    def first_layers(self) -> list[Any]:
        """fc1, or the gated pair."""
        return [getattr(self, name) for name in self.first]

    def plain_layers(self) -> bool:
        """Whether an op may stand in for the first layers and the activation."""
        return activation_name(self.act) is not None and all(map(plain_linear, self.first_layers()))

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
            options: dict[str, Any] = {"activation": activation_name(self.act), "impl": self.impl}
            return ops.linear_act(x, *self.first_layer(), gated=self.layout != "mlp", **options)
        outputs = [layer(x) for layer in self.first_layers()]
        if self.layout == "swiglu_packed":
            outputs = outputs[0].chunk(2, -1)
        activated = self.act(outputs[0])
        return activated if self.layout == "mlp" else activated * outputs[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.drop2(self.fc2(self.drop1(self.hidden(x))))


class Block(nn.Module):
    """Pre-norm transformer block.

    Each half runs fused (`fused.py`) where all of its modules are plain; else module by module.
    """

    def __init__(self, config: ViTConfig, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.init_values
        self.impl, self.save = config.implementations, config.save or ""
        self.norm1 = make_norm(config, dim, product=True, **dd)
        self.attn = Attention(config, **dd)
        self.ls1 = LayerScale(dim, scale, **dd) if scale else nn.Identity()
        self.drop_path1 = make_drop_path(config, drop_path)
        self.norm2 = make_norm(config, dim, product=True, **dd)
        self.mlp = Mlp(config, config.mlp_layer, config.proj_bias, config.proj_drop_rate, **dd)
        self.ls2 = LayerScale(dim, scale, **dd) if scale else nn.Identity()
        self.drop_path2 = make_drop_path(config, drop_path)
        # An op of the way module by module was asked for, and none of the fused way.
        fused = ("norm_linear", "linear_residual")
        single = ("layer_norm", "add_layer_norm", "linear_act", "residual_add")
        asked = [op for op in single if self.impl[op] != "auto"]
        self.asked = asked[0] if asked and all(self.impl[op] == "auto" for op in fused) else ""

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.run(Stream(x)).x

    def run(self, stream: Stream, need_stats: bool = False) -> Stream:
        """The stream [B, N, D] after this block, with its rows' statistics if a norm reads them."""
        attention, mlp = self.attention_problem(), self.mlp_problem()
        for half, problem in (("attention half", attention), ("MLP half", mlp)):
            if problem:
                note(half, "module by module", problem)
        if attention and mlp and not (kept(self.drop_path1) or kept(self.drop_path2)):
            return Stream(self.by_modules(stream.x))
        stream = self.attention_half(stream, not mlp, problem=attention)
        return self.mlp_half(stream, need_stats, problem=mlp)

    def attention_half(
        self, stream: Stream, need_stats: bool, *, problem: str | None = None
    ) -> Stream:
        """The stream after attention."""
        drop_path: Any = self.drop_path1
        if kept(drop_path):
            return drop_path.on_subset(stream, self.attention_branch, problem)
        return self.attention_branch(stream, need_stats, problem)

    def mlp_half(self, stream: Stream, need_stats: bool, *, problem: str | None = None) -> Stream:
        """The stream after the MLP."""
        drop_path: Any = self.drop_path2
        if kept(drop_path):
            return drop_path.on_subset(stream, self.mlp_branch, problem)
        return self.mlp_branch(stream, need_stats, problem)

    def attention_branch(
        self, stream: Stream, need_stats: bool, problem: str | None, factor: Tensor | None = None
    ) -> Stream:
        """The stream after attention; `factor` [B] stands in for that of stochastic depth."""
        x, attn = stream.x, self.attn
        if problem:
            branch = attn(self.norm1(x))
            return Stream(self.add(x, branch, self.ls1, self.drop_path1, factor))
        dtype, normed = product_dtype(x, attn.qkv.weight), not isinstance(attn.q_norm, nn.Identity)
        return fused.attention_half(
            stream,
            norm_of(self.norm1),
            linear_of(attn.qkv),
            attn.num_heads,
            norm_of(attn.q_norm) if normed else None,
            norm_of(attn.k_norm) if normed else None,
            linear_of(attn.proj),
            joint_of(x, self.ls1, self.drop_path1, dtype, factor),
            fused.How(dtype, self.save, need_stats, self.impl),
        )

    def mlp_branch(
        self, stream: Stream, need_stats: bool, problem: str | None, factor: Tensor | None = None
    ) -> Stream:
        """The stream after the MLP; `factor` as above."""
        x, mlp = stream.x, self.mlp
        if problem:
            return Stream(self.add(x, mlp(self.norm2(x)), self.ls2, self.drop_path2, factor))
        dtype = product_dtype(x, mlp.fc2.weight)
        return fused.mlp_half(
            stream,
            norm_of(self.norm2),
            mlp.first_layer(),
            activation_name(mlp.act) or "",
            mlp.layout != "mlp",
            linear_of(mlp.fc2),
            joint_of(x, self.ls2, self.drop_path2, dtype, factor),
            fused.How(dtype, self.save, need_stats, self.impl),
        )

    def attention_problem(self) -> str | None:
        """Why the attention half runs module by module; None where it runs fused."""
        attn = self.attn
        if not plain(attn, Attention):
            return changed("attn")
        parts: Any = attn._modules  # not by attribute: that takes a microsecond each
        if not (plain_linear(parts["qkv"]) and plain_linear(parts["proj"])):
            return changed("attn.qkv or attn.proj")
        if not (idle(parts["attn_drop"]) and idle(parts["proj_drop"])):
            return "dropout"
        identities = plain(parts["q_norm"], nn.Identity) and plain(parts["k_norm"], nn.Identity)
        if not identities and attn.packed_norm() is None:
            return changed("attn.q_norm or attn.k_norm")
        return self._problem("1")

    def mlp_problem(self) -> str | None:
        """Why the MLP half runs module by module; None where it runs fused."""
        mlp = self.mlp
        if not plain(mlp, Mlp):
            return changed("mlp")
        parts: Any = mlp._modules
        if not (mlp.plain_layers() and plain_linear(parts["fc2"])):
            return changed("a layer of mlp")
        if not (idle(parts["drop1"]) and idle(parts["drop2"])):
            return "dropout"
        return self._problem("2")

    def _problem(self, half: str) -> str | None:
        """What both halves ask; `half` is the number in the names of its modules."""
        parts: Any = self._modules
        if self.asked:
            return f"impl names {self.asked}"
        if not plain(parts["norm" + half], *NORMS):
            return changed("norm" + half)
        ls, drop_path = parts["ls" + half], parts["drop_path" + half]
        if not (plain(ls, LayerScale, nn.Identity) and plain(drop_path, DropPath, nn.Identity)):
            return changed(f"ls{half} or drop_path{half}")
        return None

    def class_token_problem(self) -> str | None:
        """Why `class_token` can't stand in for the whole block."""
        impl = self.impl
        if impl["attention"] != impl["attention_pool"]:
            return "attention was asked for by name"
        if kept(self.drop_path1) or kept(self.drop_path2):
            return "stochastic depth on a subset"
        return self.attention_problem() or self.mlp_problem()

    def class_token(self, x: Tensor) -> Tensor:
        """The first token of ``forward(x)`` alone, [B, 1, D]: of the others only keys and values.

        What a classifier reads of the last block, for a sixth of that block's FLOPs (B/16).
        """
        attn, norm, own = self.attn, norm_of(self.norm1), x[:, :1]
        dtype = product_dtype(x, attn.qkv.weight)
        weight, bias = linear_of(attn.qkv)

        def project(rows: Tensor, part: slice, count: int) -> Tensor:
            shift = None if bias is None else bias[part]
            out = ops.norm_linear(
                rows, weight[part], shift, norm.weight, norm.bias, norm.eps, rms=norm.rms,
                impl=self.impl["norm_linear"],
            )  # fmt: skip
            return out.unflatten(-1, (count, attn.num_heads, attn.head_dim))

        inner = weight.shape[0] // 3
        q, kv = project(own, slice(0, inner), 1)[:, :, 0], project(x, slice(inner, None), 2)
        if not isinstance(attn.q_norm, nn.Identity):
            k, v = kv.unbind(2)
            q, kv = attn.q_norm(q).to(v.dtype), torch.stack([attn.k_norm(k).to(v.dtype), v], 2)
        out = ops.attention_pool(q, kv, impl=self.impl["attention_pool"])
        joint = joint_of(x, self.ls1, self.drop_path1, dtype)
        own = ops.linear_residual(
            out, *linear_of(attn.proj), own, layer_scale=joint.layer_scale,
            drop_scale=joint.drop_scale, impl=self.impl["linear_residual"],
        )  # fmt: skip
        return self.mlp_branch(Stream(own), False, None).x

    def by_modules(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D], with the first sum and the second norm in one op, if they may."""
        branch = self.attn(self.norm1(x))
        if plain(self.norm2, *NORMS):
            branch, gamma, factor = branch_scales(branch, self.ls1, self.drop_path1)
            x, normed = ops.add_layer_norm(
                x,
                branch,
                self.norm2.weight,
                self.norm2.bias,
                self.norm2.eps,
                layer_scale=gamma,
                drop_scale=factor,
                rms=self.norm2.rms,
                out_dtype=self.norm2.out_dtype(x),
                impl=self.impl["add_layer_norm"],
            )
        else:
            x = self.add(x, branch, self.ls1, self.drop_path1)
            normed = self.norm2(x)
        return self.add(x, self.mlp(normed), self.ls2, self.drop_path2)

    def add(
        self,
        x: Tensor,
        branch: Tensor,
        ls: nn.Module,
        drop_path: nn.Module,
        factor: Tensor | None = None,
    ) -> Tensor:
        """x + drop_path(ls(branch)), or with `factor` in place of what drop_path would draw."""
        if factor is None:
            branch, gamma, factor = branch_scales(branch, ls, drop_path)
        else:
            branch, gamma = ls(branch), None
        impl = self.impl["residual_add"]
        return ops.residual_add(x, branch, layer_scale=gamma, drop_scale=factor, impl=impl)


def norm_of(norm: Any) -> fused.Norm:
    """A norm's parameters and options."""
    return fused.Norm(norm.weight, norm.bias, norm.eps, norm.rms)


def linear_of(layer: Any) -> fused.Linear:
    """A linear layer's parameters."""
    return fused.Linear(layer.weight, layer.bias)


def joint_of(
    x: Tensor, ls: Any, drop_path: Any, dtype: torch.dtype, factor: Tensor | None = None
) -> fused.Joint:
    """LayerScale and DropPath of a branch in `dtype`, both plain; `factor` overrides the latter."""
    gamma = None if isinstance(ls, nn.Identity) else ls.gamma
    if factor is None and not isinstance(drop_path, nn.Identity):
        if gamma is not None:  # DropPath would see their product
            dtype = torch.promote_types(dtype, gamma.dtype)
        factor = drop_path.factor(x, dtype)
    return fused.Joint(gamma, factor)


def kept(drop_path: Any) -> bool:
    """Whether this DropPath leaves samples out of the branch, in place of multiplying it by 0."""
    return plain(drop_path, DropPath) and drop_path.subset and drop_path.active


def changed(what: str) -> str:
    """Why a half is not fused."""
    return f"{what} was replaced, wrapped or hooked"


class AttentionPool(nn.Module):
    """Pooling by attention from one learned query, then an MLP: timm's AttentionPoolLatent."""

    def __init__(self, config: ViTConfig, **dd: Any) -> None:
        super().__init__()
        dim, self.num_heads, self.head_dim = config.embed_dim, config.num_heads, config.head_dim
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
        with torch.no_grad():
            nn.init.trunc_normal_(self.latent).mul_(self.latent.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, D]."""
        q = self.q(self.latent).unflatten(-1, (self.num_heads, self.head_dim))
        kv = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim))
        x = self.proj(ops.attention_pool(q.expand(x.shape[0], -1, -1, -1), kv, impl=self.impl))
        return (x + self.mlp(self.norm(x)))[:, 0]
