"""timm's other blocks: a norm behind each branch, or branches side by side.

    res_post_norm          x + norm1(attn(x)), then x + norm2(mlp(x))
    parallel_things        x + sum_i attn_i(norm_i(x)), then the same of MLPs
    parallel_scaling       x + attn(norm(x)) + mlp(norm(x)), whose first layers are one
    diff_parallel_scaling  the same with differential attention

Sources: Liu et al., "Swin Transformer V2", 2022; Touvron et al., "Three things everyone should know
about Vision Transformers", 2022; Dehghani et al., "Scaling Vision Transformers to 22 Billion
Parameters", 2023.

Each takes tokens [B, N, D] and returns them. Where their modules are plain, parallel branches run
op by op: the norm in the first product, the sum with the stream in the last.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkern import kernels as ops
from vitkern.kernels._op import note, product_dtype
from vitkern.model.block import add_branch, asked_problem, given, joint_of, joint_problem, widened
from vitkern.model.branches import (
    Attention,
    DiffAttention,
    Difference,
    Mlp,
    changed,
    linear_of,
    make_attention,
    make_mlp,
    maps_of,
    norm_of,
    pack,
)
from vitkern.model.config import ViTConfig
from vitkern.model.fused import Joint, Linear, Stream
from vitkern.model.layers import (
    ACTIVATIONS,
    LayerScale,
    activation_name,
    kept,
    make_drop_path,
    make_norm,
    own_norm_dtype,
    plain,
    plain_linear,
)

ONTO = "the norm is in the first product, the sum with the stream in the last"


class ResPostBlock(nn.Module):
    """A norm behind each branch, whose weight starts at `init_values`."""

    def __init__(self, config: ViTConfig, index: int, drop_path: float, **dd: Any) -> None:
        super().__init__()
        dim, self.init_values = config.embed_dim, config.init_values
        self.impl = config.implementations["residual_add"]
        self.own_dtype = config.residual_dtype is not None
        self.attn = make_attention(config, index, **dd)
        self.norm1 = make_norm(config, dim, recast=False, **dd)
        self.drop_path1 = make_drop_path(config, drop_path)
        self.mlp = make_mlp(config, **dd)
        self.norm2 = make_norm(config, dim, recast=False, **dd)
        self.drop_path2 = make_drop_path(config, drop_path)
        self.norm1.feeds_sum = self.norm2.feeds_sum = True
        self.init_weights()

    def init_weights(self) -> None:
        """The norms scale their branches down at first, as LayerScale does."""
        if self.init_values is not None:
            nn.init.constant_(self.norm1.weight, self.init_values)
            nn.init.constant_(self.norm2.weight, self.init_values)

    def maps(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """How much every token attends to every other: [B, N, D] -> float32 [B, H, N, N]."""
        return self.attn.maps(x, *given(attn_bias))

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; attn_bias [1, H, N, N] is added to the attention's logits."""
        note("block", "module by module", "res_post_norm: a norm between each branch and its sum")
        if not self.own_dtype:  # then the stream has the dtype that eager's sum would have
            x = x.to(own_norm_dtype(x))
        x = self._add(x, lambda x: self.norm1(self.attn(x, *given(attn_bias))), self.drop_path1)
        return self._add(x, lambda x: self.norm2(self.mlp(x)), self.drop_path2)

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor], drop_path: Any) -> Tensor:
        """x + branch(x), of the samples that stochastic depth keeps if it is to skip the others."""

        def half(stream: Stream, _: bool, __: None, factor: Tensor | None = None) -> Stream:
            x = stream.x
            y = branch(x.to(product_dtype(x, self.norm1.weight)) if self.own_dtype else x)
            return Stream(add_branch(stream.x, y, nn.Identity(), drop_path, self.impl, factor))

        if kept(drop_path):
            after: Stream = drop_path.on_subset(Stream(x), half, None)
            return after.x
        return half(Stream(x), False, None).x


class ParallelThingsBlock(nn.Module):
    """Attentions side by side, then MLPs side by side, each with a norm of its own."""

    def __init__(
        self, config: ViTConfig, index: int, drop_path: float, num_parallel: int, **dd: Any
    ) -> None:
        super().__init__()
        self.impl = config.implementations
        self.asked = asked_problem(self.impl)
        self.own_dtype = config.residual_dtype is not None
        dim, scale = config.embed_dim, config.init_values

        def branch(name: str, part: nn.Module) -> nn.Sequential:
            parts: dict[str, nn.Module] = {
                "norm": make_norm(config, dim, product=True, **dd),
                name: part,
                "ls": LayerScale(dim, scale, **dd) if scale else nn.Identity(),
                "drop_path": make_drop_path(config, drop_path),
            }
            return nn.Sequential(OrderedDict(parts))

        self.attns, self.ffns = nn.ModuleList(), nn.ModuleList()
        for _ in range(num_parallel):
            self.attns.append(branch("attn", make_attention(config, index, **dd)))
            self.ffns.append(branch("mlp", make_mlp(config, **dd)))

    def maps(self, x: Tensor) -> Tensor:
        """[B, N, D] -> float32 [B, P * H, N, N]: the heads of all P attentions."""
        branches: Any = self.attns
        return torch.cat([branch.attn.maps(branch.norm(x)) for branch in branches], 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        if not self.own_dtype:
            x = widened(x, getattr(self.attns[0], "ls", None))
        for what, branches in (("attention branch", self.attns), ("MLP branch", self.ffns)):
            total = x
            for branch in branches:
                problem = self._problem(branch)
                note(what, "module by module" if problem else "op by op", problem or ONTO)
                total = self._add(total, x, branch, problem)
            x = total
        return x

    def _problem(self, branch: Any) -> str | None:
        """Why the modules of this branch have to be called."""
        if not plain(branch, nn.Sequential):
            return changed("a branch")
        part: Any
        norm, part, ls, drop_path = branch
        if any(plain(part, kind) for kind in (Attention, DiffAttention, Mlp)):
            return self.asked or part.problem() or joint_problem(norm, ls, drop_path)
        return changed("attn or mlp")

    def _add(self, total: Tensor, x: Tensor, branch: Any, problem: str | None) -> Tensor:
        """total + branch(x), of the samples that stochastic depth keeps if it is to skip others."""
        if not plain(branch, nn.Sequential):
            return ops.residual_add(total, branch(x), impl=self.impl["residual_add"])
        drop_path: Any = branch[-1]
        if not kept(drop_path):
            return self._onto(total, x, branch, problem, None)
        index, factor = drop_path.choose(x)
        if index is None:
            return self._onto(total, x, branch, problem, factor)
        after = self._onto(
            total.index_select(0, index), x.index_select(0, index), branch, problem, factor
        )
        return total.index_copy(0, index, after)

    def _onto(
        self, total: Tensor, x: Tensor, branch: Any, problem: str | None, factor: Tensor | None
    ) -> Tensor:
        part: Any
        norm, part, ls, drop_path = branch
        if problem:
            impl = self.impl["residual_add"]
            return add_branch(total, part(norm(x)), ls, drop_path, impl, factor)
        if isinstance(part, Mlp):
            name, gated = activation_name(part.act) or "", part.layout != "mlp"
            y = first_product(x, norm, part.first_layer(), self.impl, name, gated)
            last = part.fc2
        else:
            qkv = first_product(x, norm, linear_of(part.qkv), self.impl)
            y, last = part.attend(qkv), part.proj
        joint = joint_of(x, ls, drop_path, product_dtype(x, last.weight), factor)
        return last_product(y, linear_of(last), total, joint, self.impl)


class ParallelScalingBlock(nn.Module):
    """Attention and MLP side by side, behind one norm and one linear layer.

    fuse_out_proj: one linear layer behind them, too.
    """

    def __init__(
        self,
        config: ViTConfig,
        index: int,
        drop_path: float,
        fuse_out_proj: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        dim, hidden, bias = config.embed_dim, config.hidden_dim, config.proj_bias
        self.impl, self.split = config.implementations, [hidden, 3 * dim]
        self.asked = asked_problem(self.impl)
        self.own_dtype = config.residual_dtype is not None
        self.in_norm = make_norm(config, dim, product=True, **dd)
        self.in_proj = nn.Linear(dim, hidden + 3 * dim, bias=config.qkv_bias, **dd)
        # As in timm, the MLP has a bias even if queries, keys and values have none.
        self.mlp_bias = None if config.qkv_bias else nn.Parameter(torch.empty(hidden, **dd))
        self.set_up_attention(config, index, dd)
        self.mlp_drop = nn.Dropout(config.proj_drop_rate)
        self.mlp_act = ACTIVATIONS[config.act_layer]()
        self.out_proj = self.attn_out_proj = self.mlp_out_proj = None
        if fuse_out_proj:
            self.out_proj = nn.Linear(dim + hidden, dim, bias=bias, **dd)
        else:
            self.attn_out_proj = nn.Linear(dim, dim, bias=bias, **dd)
            self.mlp_out_proj = nn.Linear(hidden, dim, bias=bias, **dd)
        scale = config.init_values  # 0 makes a LayerScale here, in timm as well
        self.ls = nn.Identity() if scale is None else LayerScale(dim, scale, **dd)
        self.drop_path = make_drop_path(config, drop_path)
        self.reset_parameters()

    def set_up_attention(self, config: ViTConfig, index: int, dd: dict[str, Any]) -> None:
        """Add what stands between the two linear layers."""
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q_norm, self.k_norm = (
            make_norm(config, self.head_dim, **dd) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.attn_drop = nn.Dropout(config.attn_drop_rate)

    def reset_parameters(self) -> None:
        """The MLP's bias starts at 0."""
        if self.mlp_bias is not None:
            nn.init.zeros_(self.mlp_bias)

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention [B, N, D] of packed queries, keys and values [B, N, 3 D]."""
        heads = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        heads, norm = pack(heads, self.q_norm, self.k_norm)
        dropout_p = self.attn_drop.p if self.training else 0.0
        return ops.attention(heads, qk_norm=norm, dropout_p=dropout_p, impl=self.impl["attention"])

    def attention_weights(self, qkv: Tensor) -> Tensor:
        """What the values are weighted with, float32 [B, H, N, N]."""
        heads = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        return maps_of(heads, self.q_norm, self.k_norm)

    def maps(self, x: Tensor) -> Tensor:
        """How much every token attends to every other: [B, N, D] -> float32 [B, H, N, N]."""
        return self.attention_weights(self.in_proj(self.in_norm(x)).split(self.split, -1)[1])

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        problem = self.problem()
        drop_path: Any = self.drop_path
        x = x if self.own_dtype else widened(x, self.ls)
        note("block", "module by module" if problem else "op by op", problem or ONTO)
        if kept(drop_path):
            after: Stream = drop_path.on_subset(Stream(x), self._half, problem)
            return after.x
        return self._half(Stream(x), False, problem).x

    def problem(self) -> str | None:
        """Why the modules have to be called; None where ops stand in for them."""
        if self.asked:
            return self.asked
        linear = (self.in_proj, self.out_proj, self.attn_out_proj, self.mlp_out_proj)
        if not all(layer is None or plain_linear(layer) for layer in linear):
            return changed("a linear layer")
        if activation_name(self.mlp_act) is None:
            return changed("mlp_act")
        return joint_problem(self.in_norm, self.ls, self.drop_path)

    def _half(
        self, stream: Stream, _: bool, problem: str | None, factor: Tensor | None = None
    ) -> Stream:
        x = stream.x
        if problem:
            y, impl = self._branch(x), self.impl["residual_add"]
            return Stream(add_branch(x, y, self.ls, self.drop_path, impl, factor))
        # Two products of x, though the layer is one: the activation is then part of the first,
        # which spares a pass over the hidden layer, wider than x by far.
        mlp, attn = self._first_layers()
        y = self.attend(first_product(x, self.in_norm, attn, self.impl))  # first, as it may draw
        name = activation_name(self.mlp_act) or ""
        hidden = self.mlp_drop(first_product(x, self.in_norm, mlp, self.impl, name))
        dtype = product_dtype(x, self.in_proj.weight)
        joint = joint_of(x, self.ls, self.drop_path, dtype, factor)
        first, second = self._last_layers()
        x = last_product(y, first, x, joint, self.impl)
        return Stream(last_product(hidden, second, x, joint, self.impl))

    def _first_layers(self) -> tuple[Linear, Linear]:
        """in_proj's parts, of the MLP and of attention."""
        bias: Any = self.in_proj.bias
        biases = (self.mlp_bias, None) if bias is None else bias.split(self.split)
        mlp, attn = self.in_proj.weight.split(self.split)
        return Linear(mlp, biases[0]), Linear(attn, biases[1])

    def _last_layers(self) -> tuple[Linear, Linear]:
        """The same of out_proj, of attention and of the MLP."""
        if self.out_proj is None:
            return linear_of(self.attn_out_proj), linear_of(self.mlp_out_proj)
        attn, mlp = self.out_proj.weight.split([self.split[1] // 3, self.split[0]], 1)
        return Linear(attn, self.out_proj.bias), Linear(mlp, None)

    def _branch(self, x: Tensor) -> Tensor:
        """Both branches together, by their modules."""
        mlp, qkv = self.in_proj(self.in_norm(x)).split(self.split, -1)
        if self.mlp_bias is not None:
            mlp = mlp + self.mlp_bias
        attn = self.attend(qkv)
        mlp = self.mlp_drop(self.mlp_act(mlp))
        if self.out_proj is not None:
            return self.out_proj(torch.cat([attn, mlp], -1))
        layers: Any = (self.attn_out_proj, self.mlp_out_proj)
        return layers[0](attn) + layers[1](mlp)


class DiffParallelScalingBlock(ParallelScalingBlock, Difference):
    """`ParallelScalingBlock` with differential attention, and one linear layer behind it."""

    def __init__(
        self, config: ViTConfig, index: int, drop_path: float, dual_lambda: bool, **dd: Any
    ) -> None:
        self.dual = dual_lambda
        super().__init__(config, index, drop_path, True, **dd)

    def set_up_attention(self, config: ViTConfig, index: int, dd: dict[str, Any]) -> None:
        """Those of differential attention."""
        self.set_up(config, index, self.dual, dd)
        self.sub_norm = self.make_sub_norm(dd)

    def reset_parameters(self) -> None:
        """Those of both."""
        ParallelScalingBlock.reset_parameters(self)
        Difference.reset_parameters(self)

    def attend(self, qkv: Tensor) -> Tensor:
        """Differential attention [B, N, D] of packed queries, keys and values [B, N, 3 D]."""
        return self.difference(qkv)

    def attention_weights(self, qkv: Tensor) -> Tensor:
        """What the values are weighted with, float32 [B, H, N, N]."""
        return self.difference_of_maps(qkv)


def first_product(
    x: Tensor, norm: Any, layer: Linear, impl: dict[str, str], activation: str = "",
    gated: bool = False,
) -> Tensor:  # fmt: skip
    """The norm, a linear layer and an activation in one op: [B, N, D] -> [B, N, F]."""
    kind = norm_of(norm)
    return ops.norm_linear(
        x, *layer, kind.weight, kind.bias, kind.eps, rms=kind.rms, activation=activation,
        gated=gated, impl=impl["norm_linear"],
    )  # fmt: skip


def last_product(
    x: Tensor, layer: Linear, stream: Tensor, joint: Joint, impl: dict[str, str]
) -> Tensor:
    """The stream [B, N, D] with a branch added, whose last linear layer reads x [B, N, F]."""
    return ops.linear_residual(
        x, *layer, stream, layer_scale=joint.layer_scale, drop_scale=joint.drop_scale,
        impl=impl["linear_residual"],
    )  # fmt: skip


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "res_post_norm": ResPostBlock,
    "parallel_things": ParallelThingsBlock,
    "parallel_scaling": ParallelScalingBlock,
    "diff_parallel_scaling": DiffParallelScalingBlock,
}
