"""The transformer block and its two halves.

    x = x + attn(norm1(x)),  x = x + mlp(norm2(x)),  each branch scaled, dropped at random

The branches: `branches.py`. Other kinds of blocks: `block_variants.py`. How steps come together in
ops, and what happens where a module isn't `plain`: see `vit.py`.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitkern import kernels as ops
from vitkern.kernels._op import note, product_dtype
from vitkern.model import fused
from vitkern.model.branches import (
    BIASED,
    Attention,
    DiffAttention,
    Mlp,
    changed,
    linear_of,
    make_attention,
    make_mlp,
    norm_of,
)
from vitkern.model.config import ViTConfig
from vitkern.model.fused import Stream
from vitkern.model.layers import (
    NORMS,
    DropPath,
    LayerScale,
    activation_name,
    branch_scales,
    kept,
    make_drop_path,
    make_norm,
    parameter,
    plain,
)


def make_block(config: ViTConfig, index: int, drop_path: float, **dd: Any) -> nn.Module:
    """Block `index` of the kind that the config names.

    A `Block` hands the stream on by `run`; every other kind is called with tokens [B, N, D]. A
    `Block` and a `ResPostBlock` also take what relative positions add to the logits (`rel_pos.py`).
    """
    from vitkern.model import block_variants as variants  # which builds on this file

    kind, options = config.block
    if kind == "pre_norm":
        return Block(config, drop_path, index=index, **dd)
    return variants.BLOCKS[kind](config, index, drop_path, **options, **dd)


class Block(nn.Module):
    """Pre-norm transformer block.

    Each half runs fused (`fused.py`) where all of its modules are plain; else module by module.
    """

    def __init__(
        self, config: ViTConfig, drop_path: float = 0.0, *, index: int = 0, **dd: Any
    ) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.init_values
        self.impl, self.save = config.implementations, config.save or ""
        self.own_dtype = config.residual_dtype is not None
        self.norm1 = make_norm(config, dim, product=True, **dd)
        self.attn = make_attention(config, index, **dd)
        self.ls1 = LayerScale(dim, scale, **dd) if scale else nn.Identity()
        self.drop_path1 = make_drop_path(config, drop_path)
        self.norm2 = make_norm(config, dim, product=True, **dd)
        self.mlp = make_mlp(config, **dd)
        self.ls2 = LayerScale(dim, scale, **dd) if scale else nn.Identity()
        self.drop_path2 = make_drop_path(config, drop_path)
        self.asked = asked_problem(self.impl)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; attn_bias [1, H, N, N] is added to the attention's logits."""
        return self.run(Stream(x), False, attn_bias).x

    def maps(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """How much every token attends to every other: [B, N, D] -> float32 [B, H, N, N]."""
        return self.attn.maps(self.norm1(x), *given(attn_bias))

    def run(
        self, stream: Stream, need_stats: bool = False, attn_bias: Tensor | None = None
    ) -> Stream:
        """The stream [B, N, D] after this block, with its rows' statistics if a norm reads them."""
        stream = Stream(self.widened(stream.x), stream.stats)
        biased = None if attn_bias is None else BIASED
        attention, mlp = self.attention_problem() or biased, self.mlp_problem()
        if attention:
            note("attention half", "module by module", attention)
        if mlp:
            note("MLP half", "module by module", mlp)
        if attention and mlp and not (kept(self.drop_path1) or kept(self.drop_path2)):
            return Stream(self.by_modules(stream.x, attn_bias))
        stream = self.attention_half(stream, not mlp, problem=attention, attn_bias=attn_bias)
        return self.mlp_half(stream, need_stats, problem=mlp)

    def widened(self, x: Tensor) -> Tensor:
        """The stream in the dtype that it will have."""
        return x if self.own_dtype else widened(x, self._modules["ls1"])

    def attention_half(
        self,
        stream: Stream,
        need_stats: bool,
        *,
        problem: str | None = None,
        attn_bias: Tensor | None = None,
    ) -> Stream:
        """The stream after attention."""
        drop_path: Any = self._modules["drop_path1"]
        if kept(drop_path):
            branch = partial(self.attention_branch, attn_bias=attn_bias)
            return drop_path.on_subset(stream, branch, problem)
        return self.attention_branch(stream, need_stats, problem, None, attn_bias)

    def mlp_half(self, stream: Stream, need_stats: bool, *, problem: str | None = None) -> Stream:
        """The stream after the MLP."""
        drop_path: Any = self._modules["drop_path2"]
        if kept(drop_path):
            return drop_path.on_subset(stream, self.mlp_branch, problem)
        return self.mlp_branch(stream, need_stats, problem)

    def attention_branch(
        self,
        stream: Stream,
        need_stats: bool,
        problem: str | None,
        factor: Tensor | None = None,
        attn_bias: Tensor | None = None,
    ) -> Stream:
        """The stream after attention; `factor` [B] stands in for that of stochastic depth."""
        x, parts = stream.x, self._modules
        attn: Any = parts["attn"]
        if problem:
            branch = attn(self.norm1(x), *given(attn_bias))
            return Stream(self.add(x, branch, self.ls1, self.drop_path1, factor))
        within = attn._modules
        qkv, q_norm, k_norm = linear_of(within["qkv"]), within["q_norm"], within["k_norm"]
        dtype, normed = product_dtype(x, qkv.weight), not isinstance(q_norm, nn.Identity)
        return fused.attention_half(
            stream,
            norm_of(parts["norm1"]),
            qkv,
            attn.num_heads,
            norm_of(q_norm) if normed else None,
            norm_of(k_norm) if normed else None,
            linear_of(within["proj"]),
            joint_of(x, parts["ls1"], parts["drop_path1"], dtype, factor),
            fused.How(dtype, self.save, need_stats, self.impl),
        )

    def mlp_branch(
        self, stream: Stream, need_stats: bool, problem: str | None, factor: Tensor | None = None
    ) -> Stream:
        """The stream after the MLP; `factor` as above."""
        x, parts = stream.x, self._modules
        mlp: Any = parts["mlp"]
        if problem:
            return Stream(self.add(x, mlp(self.norm2(x)), self.ls2, self.drop_path2, factor))
        fc2 = linear_of(mlp._modules["fc2"])
        dtype = product_dtype(x, fc2.weight)
        return fused.mlp_half(
            stream,
            norm_of(parts["norm2"]),
            mlp.first_layer(),
            activation_name(mlp._modules["act"]) or "",
            mlp.layout != "mlp",
            fc2,
            joint_of(x, parts["ls2"], parts["drop_path2"], dtype, factor),
            fused.How(dtype, self.save, need_stats, self.impl),
        )

    def attention_problem(self) -> str | None:
        """Why the attention half runs module by module; None where it runs fused."""
        attn: Any = self._modules["attn"]
        if not plain(attn, Attention, DiffAttention):
            return changed("attn")
        return attn.problem() or self._problem("1")  # type: ignore[operator]

    def mlp_problem(self) -> str | None:
        """Why the MLP half runs module by module; None where it runs fused."""
        mlp: Any = self._modules["mlp"]
        return (mlp.problem() if plain(mlp, Mlp) else changed("mlp")) or self._problem("2")

    def _problem(self, half: str) -> str | None:
        """What both halves ask; `half` is the number in the names of its modules."""
        if self.asked:
            return self.asked
        own: Any = self._modules
        return joint_problem(own["norm" + half], own["ls" + half], own["drop_path" + half], half)

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
        x = self.widened(x)
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

    def by_modules(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D], with the first sum and the second norm in one op, if they may."""
        branch = self.attn(self.norm1(x), *given(attn_bias))
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
        return add_branch(x, branch, ls, drop_path, self.impl["residual_add"], factor)


def widened(x: Tensor, ls: Any) -> Tensor:
    """The stream before a branch with this LayerScale, in the dtype of their sum in eager.

    Under autocast tokens without positions may be 16 bit, and a float32 LayerScale widens them.
    """
    if isinstance(ls, LayerScale) and ls.gamma.dtype != x.dtype:
        return x.to(torch.promote_types(x.dtype, ls.gamma.dtype))
    return x


def add_branch(
    x: Tensor,
    branch: Tensor,
    ls: nn.Module,
    drop_path: nn.Module,
    impl: str,
    factor: Tensor | None = None,
) -> Tensor:
    """x + drop_path(ls(branch)), or with `factor` [B] in place of what drop_path would draw."""
    if factor is None:
        branch, gamma, factor = branch_scales(branch, ls, drop_path)
    else:
        branch, gamma = ls(branch), None
    return ops.residual_add(x, branch, layer_scale=gamma, drop_scale=factor, impl=impl)


def joint_of(
    x: Tensor, ls: Any, drop_path: Any, dtype: torch.dtype, factor: Tensor | None = None
) -> fused.Joint:
    """LayerScale and DropPath of a branch in `dtype`, both plain; `factor` overrides the latter."""
    gamma = None if isinstance(ls, nn.Identity) else parameter(ls, "gamma")
    if factor is None and not isinstance(drop_path, nn.Identity):
        if gamma is not None:  # DropPath would see their product
            dtype = torch.promote_types(dtype, gamma.dtype)
        factor = drop_path.factor(x, dtype)
    return fused.Joint(gamma, factor)


def asked_problem(impl: dict[str, str]) -> str | None:
    """That an op of the way module by module was asked for, and none of the fused way; or None."""
    single = ("layer_norm", "add_layer_norm", "linear_act", "residual_add")
    asked = [op for op in single if impl[op] != "auto"]
    fused = any(impl[op] != "auto" for op in ("norm_linear", "linear_residual"))
    return f"impl names {asked[0]}" if asked and not fused else None


def joint_problem(norm: Any, ls: Any, drop_path: Any, half: str = "") -> str | None:
    """Why the norm before a branch and what joins it to the stream can't be fused; or None."""
    if not plain(norm, *NORMS):
        return changed("norm" + half)
    if not (plain(ls, LayerScale, nn.Identity) and plain(drop_path, DropPath, nn.Identity)):
        return changed(f"ls{half} or drop_path{half}")
    return None


def given(bias: Tensor | None) -> tuple[Tensor, ...]:
    """The bias as an argument, for a module that may know of none."""
    return () if bias is None else (bias,)
