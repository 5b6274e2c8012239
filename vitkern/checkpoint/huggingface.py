"""Hugging Face's ViT, and those of its models that share its names: DeiT, MAE, MSN, I-JEPA.

    class token                 ViTModel, ViTForImageClassification, ViTMAE, ViTMSN
    class + distillation token  DeiT. Only DeiTForImageClassificationWithTeacher reads the second
                                one (`distilled`); elsewhere it is a register token, with a position
    patches alone               I-JEPA, averaged after the norm

Dropout isn't read: it is a choice of a training run, and its places differ.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from vitkern.checkpoint._rules import Fields, Format, State, by_channel, layers, only, renamed, rule
from vitkern.model.config import ViTConfig
from vitkern.model.presets import IMAGENET

PATCHES = "embeddings.patch_embeddings.projection.weight"
# Names of activations there; the first of those that mean the same is the one that is written.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# What images were normalised with, where preprocessor_config.json is missing.
HALF: Fields = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

# Files have these names, whichever version of transformers wrote them.
_FILE = "encoder.layer.{i}."
# Models of transformers 5 have these in memory.
_LIVE = "layers.{i}."


class HuggingFace(Format):
    """With or without a prefix ("vit.", "deit.", "ijepa."), in a file's spelling or a module's."""

    name = "huggingface"
    title = "Hugging Face's ViT"
    rules = (
        rule("cls_token", "embeddings.cls_token"),
        # Both are read, and `finished` keeps the one that fits.
        rule("dist_token", "embeddings.distillation_token"),
        rule("reg_token", "embeddings.distillation_token"),
        rule("pos_embed", "embeddings.position_embeddings"),
        *layers(
            {
                "patch_embed.proj": "embeddings.patch_embeddings.projection",
                "blocks.{i}.norm1": _FILE + "layernorm_before",
                "blocks.{i}.attn.qkv": (
                    _FILE + "attention.attention.query",
                    _FILE + "attention.attention.key",
                    _FILE + "attention.attention.value",
                ),
                "blocks.{i}.attn.proj": _FILE + "attention.output.dense",
                "blocks.{i}.norm2": _FILE + "layernorm_after",
                "blocks.{i}.mlp.fc1": _FILE + "intermediate.dense",
                "blocks.{i}.mlp.fc2": _FILE + "output.dense",
                "norm": "layernorm",
                "head": "classifier",
                "head_dist": "distillation_classifier",
            }
        ),
        *layers(
            {
                "blocks.{i}.norm1": _LIVE + "layernorm_before",
                "blocks.{i}.attn.qkv": (
                    _LIVE + "attention.q_proj",
                    _LIVE + "attention.k_proj",
                    _LIVE + "attention.v_proj",
                ),
                "blocks.{i}.attn.proj": _LIVE + "attention.o_proj",
                "blocks.{i}.norm2": _LIVE + "layernorm_after",
                "blocks.{i}.mlp.fc1": _LIVE + "mlp.fc1",
                "blocks.{i}.mlp.fc2": _LIVE + "mlp.fc2",
                "head": "cls_classifier",
            }
        ),
    )
    fields: ClassVar[Fields] = {"pos_resample": "huggingface"}
    dropped: ClassVar[dict[str, str]] = {
        r"pooler\..*": "the pooler is no part of the classifier: that reads the class token itself",
        r"embeddings\.mask_token": "it stands in for masked patches, in pre-training only",
        r"decoder\..*": "the decoder is for pre-training only",
    }
    prefixes = ("vit.", "deit.", "ijepa.", "")

    def recognises(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
        """By the names of the patch projection and of the first block's norm."""
        prefix = prefix_of(state, PATCHES, self.prefixes)
        # A model of transformers 5 writes the blocks of ViTMSN without the prefix.
        starts = () if prefix is None else (prefix, "")
        norm = "0.layernorm_before.weight"
        return any(
            start + _FILE.format(i="0") + "layernorm_before.weight" in state
            or start + "layers." + norm in state
            for start in starts
        )

    def prepared(self, state: State, config: Mapping[str, Any]) -> State:
        """Without the prefix."""
        return without(state, prefix_of(state, PATCHES, self.prefixes) or "")

    def problem(self, state: State, config: Mapping[str, Any]) -> str | None:
        """What its relatives have beyond a ViT."""
        if any(key.endswith("embeddings.detection_tokens") for key in state):
            return "it is a detector, YOLOS, with detection tokens"
        if "cls_classifier.weight" in state and "distillation_classifier.weight" not in state:
            return "it has cls_classifier, but no distillation_classifier"
        return problem_of(config, self.prepared(state, config).get(PATCHES))

    def described(self, state: State, config: Mapping[str, Any]) -> Fields:
        """What config.json says; how I-JEPA pools."""
        weight = state[PATCHES]
        usual = HALF if _of_vit(state, config) else IMAGENET
        found = {
            **read_config(config, eps=_default_eps(config), act="gelu"),
            **read_images(config, usual, weight),
        }
        if "embeddings.cls_token" in state:
            return {**found, "global_pool": "token"}
        return {**found, "global_pool": "avg", "fc_norm": False}

    def defaults(self, state: State, config: Mapping[str, Any]) -> Fields:
        """eps of every one of them but MSN."""
        return {} if config else {"norm_layer": ("layernorm", 1e-12), "act_layer": "gelu"}

    def finished(self, state: State, fields: Fields) -> State:
        """A second token without a classifier of its own is a register."""
        state.pop("reg_token" if "head_dist.weight" in state else "dist_token", None)
        return state

    def unfit(self, config: ViTConfig) -> str | None:
        """Pre-norm blocks as they are in ViT, and one of the three kinds of tokens."""
        if config.distilled and not config.num_classes:
            return "no distilled=True without classes"
        if config.reg_tokens + config.distilled > 1 or (
            config.reg_tokens and (config.no_embed_class or not config.class_token)
        ):
            return f"no reg_tokens={config.reg_tokens}, but for DeiT's one, which has a position"
        fixed: Fields = {}
        if not config.class_token:
            fixed = {"global_pool": "avg", "fc_norm": False}
        elif config.fc_norm is False:
            fixed = {"fc_norm": False}
        if config.norm_layer[0] != "layernorm":
            return f"no norm_layer={config.norm_layer!r}"
        free = ("norm_layer", "act_layer", "qkv_bias", "in_chans", "class_token", "reg_tokens")
        return only(config, (*free, "distilled"), fixed)

    def written(self, state: State, config: ViTConfig) -> State:
        """In the spelling of files, with the prefix where there is a classifier."""
        found = super().written(state, config)
        heads = ("classifier.", "distillation_classifier.")
        prefix = _kind(config) + "." if config.num_classes else ""
        named = {
            key if key.startswith(heads) else prefix + key: value for key, value in found.items()
        }
        if config.distilled:
            for kind in ("weight", "bias"):
                named[f"cls_classifier.{kind}"] = named.pop(f"classifier.{kind}")
        return named

    def config_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """For `from_pretrained` of the class named under "architectures"."""
        kind = _kind(config)
        stem = {"vit": "ViT", "deit": "DeiT", "ijepa": "IJepa"}[kind]
        task = "ForImageClassification" if config.num_classes else "Model"
        return {
            "architectures": [stem + task + "WithTeacher" * config.distilled],
            "model_type": kind,
            **written_config(config),
            "qkv_bias": config.qkv_bias,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }

    def images_file(self, config: ViTConfig) -> dict[str, Any] | None:
        """For `AutoImageProcessor.from_pretrained`."""
        return written_images(config)


def _kind(config: ViTConfig) -> str:
    """Their "model_type", and the prefix."""
    if not config.class_token:
        return "ijepa"
    return "deit" if config.distilled or config.reg_tokens else "vit"


def _of_vit(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether it is a ViT proper; its relatives saw images normalised as ImageNet's."""
    kind = config.get("model_type", "vit" if "embeddings.cls_token" in state else "ijepa")
    return kind == "vit" and "embeddings.distillation_token" not in state


def _default_eps(config: Mapping[str, Any]) -> float:
    return 1e-6 if config.get("model_type") == "vit_msn" else 1e-12


# For all formats of Hugging Face


def prefix_of(keys: Iterable[str], name: str, prefixes: Iterable[str]) -> str | None:
    """The first of the prefixes under which `name` is there; None if it isn't."""
    return next((prefix for prefix in prefixes if prefix + name in keys), None)


def without(state: State, prefix: str) -> State:
    """The tensors, without the prefix where they have it."""
    return renamed(state, lambda key: key.removeprefix(prefix))


def problem_of(config: Mapping[str, Any], patches: Tensor | None) -> str | None:
    """An activation that isn't built here, or a config.json that belongs to another model.

    patches: weight of the patch projection, which tells the sizes.
    """
    act = config.get("hidden_act")
    if act is not None and act not in ACTIVATIONS:
        return f"its hidden_act {act!r} is none of {', '.join(ACTIVATIONS)}"
    if patches is None or patches.dim() != 4:
        shape = None if patches is None else list(patches.shape)
        return f"its patch projection is no convolution [D, C, P, P], but {shape}"
    for name, size in (("hidden_size", patches.shape[0]), ("num_channels", patches.shape[1])):
        if config.get(name, size) != size:
            return f"config.json says {name}={config[name]}, its tensors say {size}"
    return None


def read_images(config: Mapping[str, Any], usual: Fields, patches: Tensor) -> Fields:
    """mean and std of preprocessor_config.json; without it those this model is usual with."""
    images = config.get("preprocessor_config") or {}
    if images.get("do_normalize", True) and "image_mean" in images and "image_std" in images:
        usual = {"mean": tuple(images["image_mean"]), "std": tuple(images["image_std"])}
    return usual if len(usual["mean"]) == patches.shape[1] else {}


def read_config(config: Mapping[str, Any], *, eps: float, act: str, image: int = 224) -> Fields:
    """Fields that config.json tells; what it leaves out has the default of its class."""
    if not config:
        return {}
    found: Fields = {
        "norm_layer": ("layernorm", config.get("layer_norm_eps", eps)),
        "act_layer": ACTIVATIONS[config.get("hidden_act", act)],
        "num_heads": config.get("num_attention_heads", 12),
    }
    size = config.get("image_size", image)
    found["img_size"] = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    if config.get("head_dim"):
        found["dim_head"] = config["head_dim"]
    return found


def written_images(config: ViTConfig) -> dict[str, Any]:
    """preprocessor_config.json, for `AutoImageProcessor`: how this model's images are made.

    ViT's processor, whichever model it is: those of CLIP and DINOv2 cut out a centre, for which a
    config has no size.
    """
    images, (height, width) = by_channel(config), config.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": height, "width": width},
        "image_mean": images["mean"],
        "image_std": images["std"],
    }


def written_config(config: ViTConfig) -> dict[str, Any]:
    """The part of config.json that they all share."""

    def size(pair: tuple[int, int]) -> int | list[int]:
        return pair[0] if pair[0] == pair[1] else list(pair)

    labels = {i: f"LABEL_{i}" for i in range(config.num_classes)}
    return {
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": size(config.img_size),
        "patch_size": size(config.patch_size),
        "num_channels": config.in_chans,
        "layer_norm_eps": config.norm_layer[1],
        "hidden_act": next(k for k, act in ACTIVATIONS.items() if act == config.act_layer),
        **(
            {
                "id2label": {str(i): label for i, label in labels.items()},
                "label2id": {label: i for i, label in labels.items()},
            }
            if labels
            else {}
        ),
    }
