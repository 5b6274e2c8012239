"""ViTConfig: every argument of a ViT, checked and made plain.

A config holds numbers, strings, booleans and tuples only, whatever it was given (classes, say), so
it can be compared, hashed, pickled and printed. It is checked once, here: the model trusts it. How
one argument is read: `arguments.py`; the models that have a name: `presets.py`.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from vitkern.model import arguments as read
from vitkern.model.presets import PRESETS, REFUSED, preset

POOLS = ("token", "avg", "avgmax", "max", "map", "prr", "")
SAVES = ("balanced", "minimal")
WEIGHT_INITS = ("", "skip", "reset", "jax", "jax_nlhb", "moco")
RESAMPLINGS = ("timm", "torchvision", "huggingface", "dinov2", "google")


@dataclass(frozen=True)
class ViTConfig:
    """Arguments of a Vision Transformer: timm's names, order and defaults, then vitkern's own.

    Args:
        img_size: image height and width in pixels, or one number for both.
        patch_size: patch height and width in pixels, or one number for both.
        in_chans: image channels.
        num_classes: width of the classifier; 0 for none.
        global_pool: "token", "avg", "avgmax", "max", "map" (attention pooling), "prr" (attention
            without weights, then the first token) or "" (all tokens).
        embed_dim: width D of a token, a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over `embed_dim`.
        qkv_bias: bias in the query, key and value projection.
        qk_norm: normalise queries and keys over the head dimension.
        scale_attn_norm, scale_mlp_norm: normalise what the last linear layer of a branch reads.
        proj_bias: bias in the attention's output projection and in the MLP.
        init_values: start of LayerScale; None or 0 for no LayerScale.
        class_token: prepend a class token.
        pos_embed: "learn" or "none".
        no_embed_class: positions for patches only, none for class and register tokens.
        reg_tokens: number of register tokens.
        pre_norm: normalise before the blocks; the patch projection then has no bias.
        final_norm: normalise after the blocks.
        fc_norm: put that norm after pooling; None does so for average and max pooling.
        pool_include_prefix: pool class and register tokens too.
        dynamic_img_size: take images of any size, with resampled positions.
        dynamic_img_pad: pad such images at the bottom and right to whole patches.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, after
            the positions, after projections and the MLP's layers, and on attention weights.
        patch_drop_rate: share of the patches that training leaves out, chosen for each image.
        drop_path_rate: stochastic depth of the last block; earlier ones follow linearly from 0.
        weight_init: "", "skip", "reset", "jax", "jax_nlhb" or "moco".
        fix_init: scale the residual projections' start by depth.
        embed_layer: None; or what stands before the projection, which then cuts patches from its
            feature map: ("resnetv2", blocks of each stage), () for its stem alone;
            ("conv_stem", strides of three layers), without projection; ("timm", (name, stage)).
        embed_norm_layer: norm behind the patch projection, given as `norm_layer` is; None for none.
        norm_layer: "layernorm" (eps 1e-6), "rmsnorm", a (name, eps) pair, or torch's or timm's
            class, plain or in a partial with `eps`.
        act_layer: "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", or torch's or timm's class.
        block_fn: "pre_norm", "res_post_norm", "parallel_things", "parallel_scaling" or
            "diff_parallel_scaling", or timm's class, with its options in a partial or a pair.
        mlp_layer: "mlp", "swiglu", "swiglu_packed", or timm's class. As in timm, the gate of a
            SwiGLU is `act_layer`, so GELU where none is given.
        attn_layer: "attn" or "diff" (differential), or timm's class.
        dim_head: width of an attention head; None for embed_dim / num_heads.
        patch_norm: normalise the pixels of a patch before the projection, as vit-pytorch does, by
            the kind of norm and with the eps of `embed_norm_layer`, else of `norm_layer`.
        representation_size: width of a layer with tanh before the head; 0 for none.
        distilled: a second class token with a head of its own, as in DeiT.
        rel_pos: positions relative within attention: "bias" (a table), "mlp" (a small network on
            logarithmic distances) or None.
        rel_pos_dim: hidden width of that network; None for timm's choice.
        shared_rel_pos: one such table or network for all blocks.
        pos_resample: whose way of fitting positions to another grid: "timm", "torchvision",
            "huggingface", "dinov2" or "google" (see `weights.resample_pos_embed`).
        mean, std: normalisation of uint8 images, (pixel / 255 - mean) / std; each a number, or one
            for every channel.
        residual_dtype: dtype of the residual stream; None for what eager PyTorch would give it.
        drop_path_mode: "scale" multiplies the branches of dropped samples by zero; "subset" leaves
            those samples out of the computation (see `layers.DropPath` for the statistics).
        save: what the fused halves of a block keep for their backward pass: "balanced" (recompute
            activations only), "minimal" (recompute fc1 and attention too), or None: "balanced"
            where fused kernels run, what PyTorch's autograd keeps elsewhere. Other kinds of blocks
            than "pre_norm", and halves that run module by module, keep what autograd does.
        impl: implementation of every op ("auto", "triton", "reference"), or a mapping from op name
            to implementation.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """

    img_size: Any = 224
    patch_size: Any = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    scale_attn_norm: bool = False
    scale_mlp_norm: bool = False
    proj_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    pos_embed: str = "learn"
    no_embed_class: bool = False
    reg_tokens: int = 0
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    pool_include_prefix: bool = False
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    patch_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    weight_init: str = ""
    fix_init: bool = False
    embed_layer: Any = None
    embed_norm_layer: Any = None
    norm_layer: Any = None
    act_layer: Any = None
    block_fn: Any = None
    mlp_layer: Any = None
    attn_layer: Any = None
    dim_head: int | None = None
    patch_norm: bool = False
    representation_size: int = 0
    distilled: bool = False
    rel_pos: str | None = None
    rel_pos_dim: int | None = None
    shared_rel_pos: bool = False
    pos_resample: str = "timm"
    mean: Any = 0.5
    std: Any = 0.5
    residual_dtype: torch.dtype | None = None
    drop_path_mode: str = "scale"
    save: str | None = None
    impl: Any = "auto"

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # the dataclass is frozen
        for name in ("img_size", "patch_size"):
            put(name, read.pair(name, getattr(self, name)))
        for name in ("in_chans", "embed_dim", "depth", "num_heads"):
            put(name, read.integer(name, getattr(self, name), 1))
        for name in ("num_classes", "reg_tokens", "representation_size"):
            put(name, read.integer(name, getattr(self, name), 0))
        for field in fields(self):
            if field.type is bool:
                put(field.name, read.flag(field.name, getattr(self, field.name)))
            elif field.name.endswith("drop_rate") or field.name == "drop_path_rate":
                put(field.name, read.rate(field.name, getattr(self, field.name)))
        if self.fc_norm is not None:
            put("fc_norm", read.flag("fc_norm", self.fc_norm))
        if self.init_values is not None:
            put("init_values", read.number("init_values", self.init_values))
        put("mlp_ratio", read.number("mlp_ratio", self.mlp_ratio))
        put("pos_embed", self.pos_embed or "none")
        read.one_of("pos_embed", self.pos_embed, ("learn", "none"))
        read.one_of("global_pool", self.global_pool, POOLS)
        read.one_of("weight_init", self.weight_init, WEIGHT_INITS)
        read.one_of("drop_path_mode", self.drop_path_mode, ("scale", "subset"))
        if self.save is not None:
            read.one_of("save", self.save, SAVES)
        for name in ("dim_head", "rel_pos_dim"):
            if getattr(self, name) is not None:
                put(name, read.integer(name, getattr(self, name), 1))
        read.one_of("pos_resample", self.pos_resample, RESAMPLINGS)
        read.one_of("rel_pos", self.rel_pos, ("bias", "mlp", None))
        put("embed_layer", read.backbone(self.embed_layer))
        put("norm_layer", read.norm("norm_layer", self.norm_layer))
        if self.embed_norm_layer is not None:
            put("embed_norm_layer", read.norm("embed_norm_layer", self.embed_norm_layer))
        block = self.block_fn or "pre_norm"
        put("block_fn", read.choice("block_fn", block, read.BLOCKS, read.BLOCK_OPTIONS))
        attn = self.attn_layer or "attn"
        put("attn_layer", read.choice("attn_layer", attn, read.ATTENTIONS, read.ATTENTION_OPTIONS))
        put("act_layer", read.activation(self.act_layer))
        put("mlp_layer", read.mlp(self.mlp_layer))
        for name in ("mean", "std"):
            put(name, read.per_channel(name, getattr(self, name), self.in_chans))
        put("impl", read.implementations(self.impl))
        self._check()

    def _check(self) -> None:
        """What one argument alone can't tell."""
        if self.dim_head is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got embed_dim={self.embed_dim} "
                f"and num_heads={self.num_heads}"
            )
        if self.hidden_dim < 1:
            raise ValueError(
                f"mlp_ratio must give at least one hidden unit, got {self.mlp_ratio} "
                f"with embed_dim={self.embed_dim}"
            )
        if self.mlp_layer == "swiglu_packed" and self.hidden_dim % 2:
            raise ValueError(
                f"mlp_ratio must give an even hidden width for swiglu_packed, got {self.mlp_ratio} "
                f"* embed_dim={self.embed_dim} -> {self.hidden_dim}"
            )
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool='token' needs class_token=True; expected another pool")
        self._check_blocks()
        if min(self.grid_size) < 1:
            raise ValueError(f"img_size {self.img_size} is smaller than one patch, {self.stride}")
        whole = all(s % p == 0 for s, p in zip(self.img_size, self.stride, strict=True))
        if self.dynamic_img_pad and not self.dynamic_img_size and not whole:
            raise ValueError(
                f"img_size must be a multiple of patch_size with dynamic_img_pad alone, got "
                f"{self.img_size} and {self.stride}; or set dynamic_img_size=True"
            )
        if any(s <= 0 for s in (self.std if isinstance(self.std, tuple) else (self.std,))):
            raise ValueError(f"std must be positive, got {self.std}")
        stream = self.residual_dtype
        if stream is None:
            return
        if not isinstance(stream, torch.dtype):
            raise TypeError(f"residual_dtype must be a torch.dtype or None, got {stream!r}")
        if not stream.is_floating_point:
            raise ValueError(f"residual_dtype must be floating point, got {stream}")
        if not self.final_norm or (self.global_pool == "map" and self.fc_norm):
            # The norm behind the blocks is what casts back to the dtype of the layers after it.
            raise ValueError("residual_dtype needs a norm between the blocks and the pool or head")

    def _check_blocks(self) -> None:
        """Options that one kind of block or attention has and another has not."""
        block, _ = self.block
        if block in ("parallel_scaling", "diff_parallel_scaling"):  # whose branches share layers
            own = self.dim_head is not None and self.inner_dim != self.embed_dim
            for name, given in (
                ("scale_attn_norm", self.scale_attn_norm),
                ("scale_mlp_norm", self.scale_mlp_norm),
                ("mlp_layer", self.mlp_layer != "mlp"),
                ("attn_layer", self.attn_layer != "attn"),
                ("dim_head", own),
            ):
                if given:
                    value = getattr(self, name)
                    raise ValueError(f"{name}={value!r} is not built in {block} blocks")
        halves = self.attention[0] == "diff" or block == "diff_parallel_scaling"
        if halves and (self.dim_head is not None or self.head_dim % 2):
            raise ValueError(
                f"differential attention needs an even head width, embed_dim / num_heads, got "
                f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dim_head={self.dim_head}"
            )
        if self.rel_pos and (self.attention[0] == "diff" or "parallel" in block):
            raise ValueError(
                f"rel_pos={self.rel_pos!r} is not built with block_fn={block!r} and "
                f"attn_layer={self.attention[0]!r}"
            )
        if self.rel_pos and (self.dynamic_img_size or self.patch_drop_rate or self.reg_tokens):
            raise ValueError(
                f"rel_pos={self.rel_pos!r} needs every patch of a known grid: no dynamic_img_size, "
                f"patch_drop_rate or reg_tokens"
            )
        if self.shared_rel_pos and not self.rel_pos:
            raise ValueError("shared_rel_pos=True needs rel_pos")
        fits = self.global_pool in ("token", "") and self.class_token and not self.fc_norm
        if self.distilled and not fits:
            raise ValueError(
                "distilled=True needs class_token=True, global_pool='token' and no fc_norm"
            )
        if self.patch_norm and self.embed_layer is not None:
            raise ValueError("patch_norm=True is not built with an embed_layer")

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "ViTConfig":
        """The preset of timm's model `name`, with any argument replaced.

        Raises:
            ValueError: unknown name (the text offers close ones, or all), one of `presets.REFUSED`,
                or a pretrained tag.
            TypeError: unknown argument.
        """
        if overrides.pop("pretrained", False):
            base, _, tag = name.partition(".")
            raise ValueError(f"pretrained=True: {_no_download(base, tag or 'TAG')}")
        if name not in PRESETS:
            base, _, tag = name.partition(".")
            if base in REFUSED:
                raise ValueError(f"model {name!r} is not built: {REFUSED[base]}")
            if tag and base in PRESETS:
                raise ValueError(
                    f"model {name!r} asks for weights ({tag!r}): {_no_download(base, tag)}"
                )
            raise ValueError(f"unknown model {name!r}{read.similar(base, PRESETS)}")
        check_arguments(overrides)
        return cls(**preset(name, **overrides))

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches in a column and in a row of an image of `img_size`."""
        return (self.img_size[0] // self.stride[0], self.img_size[1] // self.stride[1])

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The same for an image of this height and width, the last patches padded or left out."""
        rows, columns = self.stride
        if self.dynamic_img_pad:
            return -(-height // rows), -(-width // columns)
        return height // rows, width // columns

    @property
    def stride(self) -> tuple[int, int]:
        """Height and width of the image behind one token, in pixels."""
        down = backbone_stride(self.embed_layer)
        return (self.patch_size[0] * down, self.patch_size[1] * down)

    @property
    def block(self) -> tuple[str, dict[str, Any]]:
        """Kind of the blocks, and all of its options."""
        return _with_options(self.block_fn, read.BLOCK_OPTIONS)

    @property
    def attention(self) -> tuple[str, dict[str, Any]]:
        """Kind of attention, and all of its options."""
        return _with_options(self.attn_layer, read.ATTENTION_OPTIONS)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim_head or self.embed_dim // self.num_heads

    @property
    def inner_dim(self) -> int:
        """Width of all heads together: what the attention's output projection reads."""
        return self.head_dim * self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP's first layer."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens before the patches."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def num_pos_prefix(self) -> int:
        """Those of them that have a position."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def norm_after_pool(self) -> bool:
        """Whether the final norm is `fc_norm`, behind the pool, and not `norm`, before it."""
        if self.fc_norm is not None:
            return self.fc_norm
        return self.global_pool in ("avg", "avgmax", "max")

    @property
    def implementations(self) -> dict[str, str]:
        """Op name -> implementation, for every op of the model."""
        if isinstance(self.impl, str):
            return dict.fromkeys(read.OPS, self.impl)
        return {**dict.fromkeys(read.OPS, "auto"), **dict(self.impl)}


def backbone_stride(backbone: tuple[str, tuple[Any, ...]] | None) -> int:
    """Pixels of the image behind one of a backbone's feature map, 1 without a backbone."""
    if backbone is None:
        return 1
    kind, values = backbone
    if kind == "conv_stem":
        return math.prod(values)
    if kind == "timm":
        return 2 ** int(values[1]) * 2  # stage 0 is the stem
    return 2 ** (max(len(values), 1) + 1)  # stem and its pool: 4; every stage but the first: 2


def _with_options(choice: Any, options: Any) -> tuple[str, dict[str, Any]]:
    kind, changed = (choice, ()) if isinstance(choice, str) else choice
    return kind, {**options.get(kind, {}), **dict(changed)}


def check_arguments(arguments: Iterable[str]) -> None:
    """Every name is a field of ViTConfig; otherwise a TypeError that offers close ones, or all."""
    known = [f.name for f in fields(ViTConfig)]
    for name in arguments:
        if name not in known:
            raise TypeError(f"unknown argument {name!r}{read.similar(name, known)}")


def _no_download(base: str, tag: str) -> str:
    return (
        f"a name gets weights drawn at random. vitkern.ViT.from_pretrained('timm/{base}.{tag}') "
        f"fetches timm's from the Hugging Face Hub, and vitkern.load(path) reads a file"
    )
