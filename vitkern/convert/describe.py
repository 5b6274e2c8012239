"""What a live ViT of another library is, beyond the shapes of its tensors: fields of ViTConfig.

`KINDS` has a `Kind` for every class that `convert` knows. A description reads the module's own
attributes and submodules, not what it was once made with; what doesn't fit raises a ConvertError.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitkern.convert import foreign
from vitkern.model.arguments import ATTENTIONS, BLOCKS

Fields = dict[str, Any]


class ConvertError(ValueError):
    """A module that can't become a vitkern model; the text names what doesn't fit."""


@dataclass(frozen=True)
class Kind:
    """How one class is read.

    live: fields that the tensors don't show. config: what its format reads as config.json.
    prefix: what its names need in front to be those of a checkpoint. output: the attribute of what
    forward returns that a `ViT` computes, "tokens" where that is its `forward_features`. told:
    fields of `live` without which its tensors can't be read.
    """

    live: Callable[[Any], Fields]
    config: Callable[[Any], Mapping[str, Any]] = lambda module: {}
    prefix: str = ""
    output: str = ""
    told: tuple[str, ...] = ()


def only_one(what: str, values: Iterable[Any]) -> Any:
    """The value that all have; an error if they differ, None for none."""
    found = list(dict.fromkeys(values))
    if len(found) > 1:
        raise ConvertError(f"its {what} differ: {', '.join(map(str, found[:4]))}")
    return found[0] if found else None


def norms(modules: Iterable[nn.Module]) -> tuple[str, float] | None:
    """(kind, eps) of all norms among the modules."""
    found = []
    for module in modules:
        if foreign.class_name(module) in foreign.NORMS:
            norm = foreign.norm_of(module)
            if norm is None:
                raise ConvertError(f"a norm without weights, or over several dimensions: {module}")
            found.append(norm)
        elif type(module).__name__.lower().endswith(("norm", "normfp32", "normfp64")):
            raise ConvertError(f"its norm {type(module).__name__} is none of vitkern's")
    result: tuple[str, float] | None = only_one("norms", found)
    return result


def activations(modules: Iterable[nn.Module]) -> str | None:
    """Our name of the one activation among these modules."""
    found = []
    for module in modules:
        name = foreign.activation_of(module)
        if name is None:
            raise ConvertError(f"its activation {type(module).__name__} is none of vitkern's")
        found.append(name)
    result: str | None = only_one("activations", found)
    return result


def rate(what: str, modules: Iterable[Any]) -> float:
    """The rate of dropout modules, all the same."""
    return float(only_one(what, [m.p for m in modules if isinstance(m, nn.Dropout)]) or 0.0)


def schedule(blocks: Iterable[nn.Module]) -> float:
    """Rate of the last block's stochastic depth, which must grow from 0 block by block."""
    rates: list[float] = []
    for block in blocks:
        drops = [m for m in block.modules() if type(m).__name__.endswith("DropPath")]
        own = [float(getattr(m, "drop_prob", None) or 0.0) for m in drops]
        rates.append(only_one("rates of stochastic depth in a block", own) or 0.0)
    last, steps = rates[-1], max(len(rates) - 1, 1)
    even = [last * number / steps for number in range(len(rates))]
    if any(abs(a - b) > 1e-6 for a, b in zip(rates, even, strict=True)):
        raise ConvertError(f"its stochastic depth doesn't grow evenly from 0: {rates}")
    return last


def heads(attentions: Iterable[Any], name: str = "num_heads") -> int:
    """Number of heads of all attentions; their scale must be that of their width."""
    found = []
    for attention in attentions:
        width = getattr(attention, "head_dim", None)
        scale = getattr(attention, "scale", getattr(attention, "scaling", None))
        if (
            width
            and isinstance(scale, float)
            and not math.isclose(scale, width**-0.5, rel_tol=1e-6)
        ):
            raise ConvertError(f"its attention is scaled by {scale}, with heads of {width}")
        found.append(getattr(attention, name))
    count: int = only_one("numbers of heads", found)
    return count


def patches(conv: nn.Module) -> None:
    """An error for a convolution whose patches overlap or leave gaps: tensors don't show that."""
    if isinstance(conv, nn.Conv2d) and not (
        conv.stride == conv.kernel_size
        and conv.padding in ((0, 0), "valid")
        and conv.dilation == (1, 1)
        and conv.groups == 1
    ):
        raise ConvertError(f"its patches don't lie side by side: {conv}")


# timm


def timm(module: Any) -> Fields:
    """VisionTransformer, its hybrids, DeiT with two heads, and those with relative positions."""
    blocks, embed = list(module.blocks), module.patch_embed
    if foreign.class_name(embed) not in ("timm.PatchEmbed", "timm.HybridEmbed"):
        raise ConvertError(f"patch_embed is {type(embed).__name__}: none of vitkern's")
    patches(embed.proj)
    if embed.img_size is None:
        raise ConvertError("patch_embed.img_size is None: the size of its images is unknown")
    outer = [m for name, m in module.named_children() if name not in ("patch_embed", "blocks")]
    inner = [m for block in blocks for _, m in _parts(block)]
    found: Fields = {
        "img_size": tuple(embed.img_size),
        "global_pool": module.global_pool,
        "pos_embed": "none" if getattr(module, "pos_embed", None) is None else "learn",
        "no_embed_class": bool(getattr(module, "no_embed_class", False)),
        "norm_layer": norms([*inner, *(m for part in outer for m in part.modules())]),
        "dynamic_img_size": bool(getattr(module, "dynamic_img_size", False)),
        "dynamic_img_pad": bool(getattr(embed, "dynamic_img_pad", False)),
        "drop_rate": module.head_drop.p,
        "pos_drop_rate": rate("position dropouts", [getattr(module, "pos_drop", None)]),
        "patch_drop_rate": getattr(getattr(module, "patch_drop", None), "prob", 0.0),
        "weight_init": getattr(module, "weight_init_mode", ""),
        "fix_init": bool(getattr(module, "fix_init", False)),
        "pool_include_prefix": bool(getattr(module, "pool_include_prefix", False)),
        **_timm_blocks(blocks),
    }
    norm = getattr(embed, "norm", None)
    if norm is not None and type(norm) is not nn.Identity:
        found["embed_norm_layer"] = norms([norm])
    pool = getattr(module, "attn_pool", None)
    if pool is not None:
        _timm_pool(pool, found)
    _timm_rel_pos([getattr(module, "shared_rel_pos", None), *(m for m in inner)])
    return {**found, **_timm_images(module)}


def _parts(block: nn.Module) -> list[tuple[str, Any]]:
    """A block's modules with the last part of their names.

    Without what makes relative positions, and differential attention's own norm: both are always
    made alike.
    """
    return [
        (name.rpartition(".")[2], module)
        for name, module in block.named_modules()
        if ".rel_pos." not in f".{name}" and not name.endswith("sub_norm")
    ]


def _timm_blocks(blocks: list[Any]) -> Fields:
    """What all blocks are, and how often they drop."""
    cls = only_one("blocks", map(foreign.class_name, blocks))
    if cls not in BLOCKS:
        raise ConvertError(f"block_fn is {type(blocks[0]).__name__}: none of vitkern's")
    kind, parts = BLOCKS[cls], [part for block in blocks for part in _parts(block)]

    def named(*names: str) -> list[Any]:
        return [module for name, module in parts if name in names]

    attentions = [m for m in named("attn") if not isinstance(m, nn.Sequential)]
    layer = only_one("attentions", map(foreign.class_name, attentions)) or "timm.Attention"
    if layer not in (*ATTENTIONS, "timm.RelPosAttention"):
        raise ConvertError(f"attn_layer is {layer}: none of vitkern's")
    if any(getattr(attention, "gate", None) is not None for attention in attentions):
        raise ConvertError("attn.gate: gated attention is not built here")
    if kind in ("parallel_scaling", "diff_parallel_scaling"):
        attentions = blocks
    options: Fields = {}
    if kind == "parallel_things":
        options["num_parallel"] = blocks[0].num_parallel
    elif kind == "parallel_scaling":
        options["fuse_out_proj"] = blocks[0].out_proj is not None
    elif kind == "diff_parallel_scaling":
        options["dual_lambda"] = blocks[0].lambda_a is not None
    starts = [getattr(m, "init_values", None) for m in (*named("ls", "ls1", "ls2"), *blocks)]
    found: Fields = {
        "num_heads": heads(attentions),
        "act_layer": activations(named("act", "mlp_act")),
        "block_fn": (kind, tuple(options.items())),
        "init_values": next((value for value in starts if value is not None), None),
        "drop_path_rate": schedule(blocks),
        "attn_drop_rate": _attn_drop(attentions),
        "proj_drop_rate": rate(
            "projection dropouts", named("proj_drop", "drop1", "drop2", "mlp_drop")
        ),
    }
    if layer == "timm.DiffAttention":
        dual = only_one("lambdas", [attention.lambda_a is not None for attention in attentions])
        found["attn_layer"] = ("diff", (("dual_lambda", dual),))
    return found


def _attn_drop(attentions: list[Any]) -> float:
    """Dropout of attention weights; differential attention has it as a number."""
    rates = [
        attention.attn_drop_p if hasattr(attention, "attn_drop_p") else attention.attn_drop.p
        for attention in attentions
    ]
    return float(only_one("attention dropouts", rates))


def _timm_pool(pool: Any, found: Fields) -> None:
    kind = type(pool).__name__
    if kind == "AttentionPoolPrr":
        found["pool_include_prefix"] = False  # timm's sets the attribute, whatever the argument
        return
    plain = (
        kind == "AttentionPoolLatent"
        and pool.pool == "token"
        and pool.latent_len == 1
        and pool.pos_embed is None
        and all(
            type(getattr(pool, name, nn.Identity())) is nn.Identity for name in ("q_norm", "k_norm")
        )
        and isinstance(pool.q, nn.Linear)
        and pool.num_heads == found["num_heads"]
        and not pool.proj_drop.p
    )
    if not plain:
        raise ConvertError(f"attn_pool is {kind} with options that are not built here")


def _timm_rel_pos(modules: Iterable[Any]) -> None:
    for module in modules:
        mode = getattr(module, "mode", "cr")
        if type(module).__name__ == "RelPosMlp" and mode != "cr":
            raise ConvertError(f"rel_pos_type: RelPosMlp in mode {mode!r} is not built here")


def _timm_images(module: Any) -> Fields:
    """How its images were normalised, by its pretrained_cfg."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    config = config if isinstance(config, Mapping) else vars(config) if config else {}
    channels = getattr(module, "in_chans", None)
    found = {key: tuple(config[key]) for key in ("mean", "std") if config.get(key)}
    return found if all(len(value) == channels for value in found.values()) else {}


# torchvision, vit-pytorch, open_clip


def torchvision(module: Any) -> Fields:
    """VisionTransformer."""
    blocks = list(module.encoder.layers)
    patches(module.conv_proj)
    if type(getattr(module.heads, "act", None)) not in (nn.Tanh, type(None)):
        raise ConvertError(f"heads.act is {module.heads.act}: only Tanh is built here")
    only_one(
        "blocks", [foreign.class_name(block) for block in blocks] + ["torchvision.EncoderBlock"]
    )
    return {
        "img_size": (module.image_size, module.image_size),
        "num_heads": heads(block.self_attention for block in blocks),
        "norm_layer": norms(module.modules()),
        "act_layer": activations(block.mlp[1] for block in blocks),
        "pos_drop_rate": module.encoder.dropout.p,
        "proj_drop_rate": rate(
            "dropouts", (m for b in blocks for m in (b.dropout, b.mlp[2], b.mlp[4]))
        ),
        "attn_drop_rate": only_one(
            "attention dropouts", [b.self_attention.dropout for b in blocks]
        ),
    }


def vit_pytorch(module: Any) -> Fields:
    """ViT of vit_pytorch.vit."""
    pairs = [tuple(pair) for pair in module.transformer.layers]
    drops = [m for a, f in pairs for m in (*a.to_out.modules(), *f.modules())]
    if type(module.to_latent) is not nn.Identity:
        raise ConvertError("to_latent is no Identity")
    cut, embed = module.to_patch_embedding[0], list(module.to_patch_embedding.modules())
    if not cut.pattern.replace(" ", "").endswith("(p1p2c)"):
        raise ConvertError(f"its patches are cut as {cut.pattern!r}")
    found: Fields = {
        "patch_size": (cut.axes_lengths["p1"], cut.axes_lengths["p2"]),
        "num_heads": heads((attention for attention, _ in pairs), "heads"),
        "norm_layer": norms(m for m in module.modules() if m not in embed),
        "act_layer": activations(m for _, f in pairs for m in f.net if type(m).__name__ == "GELU"),
        "pos_drop_rate": module.dropout.p,
        "attn_drop_rate": rate("attention dropouts", (attention.dropout for attention, _ in pairs)),
        "proj_drop_rate": rate("dropouts", drops),
    }
    within = norms(embed)
    if within is not None:
        found["embed_norm_layer"] = within
    if getattr(module, "mlp_head", None) is None:
        found["global_pool"] = ""
    elif module.pool == "mean" and module.cls_token.numel():  # until 2025-11
        found |= {"global_pool": "avg", "pool_include_prefix": True}
    return found


def open_clip(module: Any) -> Fields:
    """VisionTransformer of open_clip.transformer."""
    blocks = list(module.transformer.resblocks)
    patches(module.conv1)
    for name, expected in (("attn_pool", None), ("output_tokens", False)):
        if getattr(module, name, expected) is not expected and getattr(module, name):
            raise ConvertError(f"{name}={type(getattr(module, name)).__name__} is not built here")
    only_one("blocks", map(foreign.class_name, blocks))
    if foreign.class_name(blocks[0]) != "open_clip.ResidualAttentionBlock":
        raise ConvertError(f"its blocks are {type(blocks[0]).__name__}: none of vitkern's")
    pools = {"tok": "token", "avg": "avg", "none": ""}
    return {
        "img_size": tuple(module.image_size),
        "num_heads": heads(block.attn for block in blocks),
        "norm_layer": norms(module.modules()),
        "act_layer": activations(block.mlp.gelu for block in blocks),
        "global_pool": pools[module.pool_type],
        "patch_drop_rate": getattr(module.patch_dropout, "prob", 0.0),
    }


def _open_clip_config(module: Any) -> Mapping[str, Any]:
    return {
        "vision_cfg": {
            "pool_type": module.pool_type,
            "final_ln_after_pool": bool(module.final_ln_after_pool),
            "head_width": module.transformer.resblocks[0].attn.head_dim,
            "image_size": list(module.image_size),
        }
    }


def open_clip_trunk(module: Any) -> Fields:
    """TimmModel of open_clip: a model of timm's, and perhaps a projection behind it."""
    if foreign.class_name(module.trunk) not in TIMM:
        raise ConvertError(f"its trunk is {type(module.trunk).__name__}, no VisionTransformer")
    drop = rate("dropouts", module.head.modules())
    return {**timm(module.trunk), **({"drop_rate": drop} if drop else {})}


# transformers


def transformers(module: Any) -> Fields:
    """What training does. Everything else its config says, which the formats read."""
    config = module.config
    hidden = getattr(config, "hidden_dropout_prob", 0)
    if hidden:
        raise ConvertError(
            f"hidden_dropout_prob={hidden}: transformers has no dropout between the MLP's layers, "
            "and a ViT here has; set it to 0"
        )
    inside = [m for name, m in module.named_modules() if "pooler" not in name.split(".")]
    for part in inside:
        patches(part)
    acts = [m for m in inside if "activation" in type(m).__name__.lower()]
    acts += [m for m in inside if foreign.activation_of(m) and m not in acts]
    lists = [list(m) for m in inside if isinstance(m, nn.ModuleList)]
    blocks = next((m for m in lists if m and type(m[0]).__name__.endswith("Layer")), None)
    if blocks is None:
        raise ConvertError("it has no list of layers")
    names = ("attention_probs_dropout_prob", "attention_dropout")
    placed = any("position_embedding" in name for name, _ in module.named_parameters())
    return {
        "pos_embed": "learn" if placed else "none",  # none of these classes computes them
        "norm_layer": norms(inside),
        "attn_drop_rate": next((getattr(config, n) for n in names if hasattr(config, n)), 0.0),
        "drop_path_rate": schedule(blocks),
        **({"act_layer": activations(acts)} if acts else {}),
    }


def _transformers_config(module: Any) -> Mapping[str, Any]:
    config: Mapping[str, Any] = module.config.to_dict()
    return config


def _transformers(output: str) -> Kind:
    return Kind(transformers, _transformers_config, output=output)


TIMM = {
    "timm.VisionTransformer": Kind(timm),
    "timm.VisionTransformerDistilled": Kind(timm),
    "timm.VisionTransformerRelPos": Kind(timm),
}
KINDS: dict[str, Kind] = {
    **TIMM,
    "torchvision.VisionTransformer": Kind(torchvision),
    "vit_pytorch.ViT": Kind(vit_pytorch, told=("patch_size",)),
    "open_clip.VisionTransformer": Kind(open_clip, _open_clip_config),
    "open_clip.TimmModel": Kind(open_clip_trunk, prefix="visual."),
    **{
        f"transformers.{name}": _transformers("tokens")
        for name in (
            *("ViTModel", "DeiTModel", "ViTMSNModel", "ViTMAEModel", "IJepaModel"),
            *("Dinov2Model", "Dinov2WithRegistersModel"),
        )
    },
    **{
        f"transformers.{name}ForImageClassification": _transformers("logits")
        for name in ("ViT", "DeiT", "ViTMSN", "IJepa", "CLIP", "Siglip", "Beit", "Data2VecVision")
    },
    "transformers.DeiTForImageClassificationWithTeacher": _transformers("logits"),
    "transformers.BeitModel": _transformers("pooler_output"),
    "transformers.CLIPVisionModel": _transformers("pooler_output"),
    "transformers.CLIPVisionModelWithProjection": _transformers("image_embeds"),
    "transformers.SiglipVisionModel": _transformers("pooler_output"),
    # What a CLIPModel and a SiglipModel of version 4 have inside.
    "transformers.CLIPVisionTransformer": _transformers("pooler_output"),
    "transformers.SiglipVisionTransformer": _transformers("pooler_output"),
}
