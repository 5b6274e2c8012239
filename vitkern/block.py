"""The transformer block, its two halves, and the pooling head that is made of the same parts.

    x = x + attn(norm1(x)),  x = x + mlp(norm2(x)),  each branch scaled, dropped at random

How steps come together in ops, and what happens where a module isn't `plain`: see `model.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitkern import kernels as ops
from vitkern.config import ViTConfig
from vitkern.kernels._op import accumulate_dtype
from vitkern.kernels.attention.reference import Options, heads, probabilities
from vitkern.layers import (
    ACTIVATIONS,
    NORMS,
    DropPath,
    LayerScale,
    activation_name,
    branch_scales,
    make_norm,
    plain,
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

    def packed(self, x: Tensor) -> tuple[Tensor, ops.QKNorm | None]:
        """qkv [B, N, 3, H, d] of tokens [B, N, D], and the norm that the op has still to apply."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q_norm, k_norm, norm = self.q_norm, self.k_norm, None
        if plain(q_norm, *NORMS) and plain(k_norm, type(q_norm)) and q_norm.eps == k_norm.eps:
            norm = ops.QKNorm(
                q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, q_norm.eps, q_norm.rms
            )
        elif not (plain(q_norm, nn.Identity) and plain(k_norm, nn.Identity)):
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

    def hidden(self, x: Tensor) -> Tensor:
        """The activated hidden layer [..., F] of [..., D]."""
        layers: list[Any] = [getattr(self, name) for name in self.first]
        activation = activation_name(self.act)
        if activation and all(plain(layer, nn.Linear) for layer in layers):
            weight, bias = layers[0].weight, layers[0].bias
            if len(layers) > 1:  # one product: packing weights costs less than a second pass over x
                weight = torch.cat([layer.weight for layer in layers])
                bias = None if bias is None else torch.cat([layer.bias for layer in layers])
            options: dict[str, Any] = {"activation": activation, "impl": self.impl}
            return ops.linear_act(x, weight, bias, gated=self.layout != "mlp", **options)
        outputs = [layer(x) for layer in layers]
        if self.layout == "swiglu_packed":
            outputs = outputs[0].chunk(2, -1)
        activated = self.act(outputs[0])
        return activated if self.layout == "mlp" else activated * outputs[1]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.drop2(self.fc2(self.drop1(self.hidden(x))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0, **dd: Any) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.init_values
        self.impl = config.implementations
        self.norm1 = make_norm(config, dim, product=True, **dd)
        self.attn = Attention(config, **dd)
        self.ls1 = LayerScale(dim, scale, **dd) if scale else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = make_norm(config, dim, product=True, **dd)
        self.mlp = Mlp(config, config.mlp_layer, config.proj_bias, config.proj_drop_rate, **dd)
        self.ls2 = LayerScale(dim, scale, **dd) if scale else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
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

    def add(self, x: Tensor, branch: Tensor, ls: nn.Module, drop_path: nn.Module) -> Tensor:
        """x + drop_path(ls(branch))."""
        branch, gamma, factor = branch_scales(branch, ls, drop_path)
        impl = self.impl["residual_add"]
        return ops.residual_add(x, branch, layer_scale=gamma, drop_scale=factor, impl=impl)


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
