"""Whole networks that compute what a vitkern.ViT does, with equal weights, by other people's code.

    network = RIVALS["hf"].build(ours, FLOAT32, torch.device("cpu"))
    logits = network.call(images)

Each is built from our model alone: its config says which network it is, and its state dict, whose
keys are timm's, holds the weights. What a library has no option for raises `Unfit`, naming the
option; where a library's network differs from timm's in a way that can be mended from outside, it
is mended, and `Network.note` says how.

Read and run on a CPU: timm 1.0.31, torchvision 0.29.1, transformers 5.24.0, vit-pytorch 1.26.11,
onnxruntime 1.32.0, openvino 2026.4.1. Read only, since it needs a GPU: flash-attn 2.8.4.
"""

from __future__ import annotations  # _models.py, which knows Precision, imports this file

import contextlib
import copy
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import vitkern

from .._contest import Absent, Unfit
from . import _packages
from ._packages import load

if TYPE_CHECKING:
    from .._models import Precision

State = dict[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A rival, built.

    call: images [B, 3, H, W] of the weights' dtype -> logits [B, classes].
    module: whose parameters train; None: inference only.
    note: how it was adapted to compute the same function.
    """

    call: Callable[[Tensor], Tensor]
    module: nn.Module | None
    note: str = ""


@dataclass(frozen=True)
class Rival:
    """A network of others, by the name that a report gives it.

    make: builds it of our model, on a device, in the dtype of a precision's weights; autocast is
        the caller's.
    distribution: the package that computes it, for its version; None for PyTorch's own.
    requires: what must be there: (distribution, module) each.
    compiled: by torch.compile, at the first call.
    """

    name: str
    make: Callable[[vitkern.ViT, Precision, torch.device], Network]
    distribution: str | None = None
    requires: tuple[tuple[str, str], ...] = ()
    compiled: bool = False

    @property
    def package(self) -> str | None:
        """ "timm 1.0.31"; None for what is PyTorch's or ours, and where it isn't installed."""
        if self.distribution is None:
            return None
        found = _packages.version(self.distribution)
        return None if found is None else f"{self.distribution} {found}"

    def absent(self) -> str | None:
        """Why it isn't here, found without importing anything; None if it seems to be."""
        problems = (_packages.problem(*needed) for needed in self.requires)
        return next(filter(None, problems), None)

    def build(self, ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
        """The network of `ours`, with its weights and in its mode (training or evaluation).

        Raises:
            Absent: a package is missing or doesn't load.
            Unfit: it has no such network, or can't run it in this precision or on this device.
        """
        missing = self.absent()
        if missing:
            raise Absent(missing)
        network = self.make(ours, precision, device)
        if network.module is not None:
            network.module.train(ours.training)
        return network


def absent() -> dict[str, str]:
    """Name -> reason, of the rivals that aren't here; imports nothing."""
    reasons = {name: rival.absent() for name, rival in RIVALS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def forget() -> None:
    """Drop what torch.compile holds. For the caller, when a case with compiled rivals is done.

    Dynamo counts what it compiled of one forward function, over all networks that share it, and
    past a limit it doesn't compile any more.
    """
    torch.compiler.reset()


# Fields that change nothing in the function of images that are floats: how weights start, how
# uint8 images are normalised, and how vitkern runs.
_NEUTRAL = frozenset(
    ("weight_init", "fix_init", "mean", "std", "impl", "save", "residual_dtype", "drop_path_mode")
)
_SIZES = frozenset(("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads"))
_SIZES |= {"mlp_ratio"}


def _only(who: str, config: vitkern.ViTConfig, *free: str) -> None:
    """Every field but `free`, sizes and neutral ones has its default.

    Raises:
        Unfit: another has not.
    """
    for name, default in vars(vitkern.ViTConfig()).items():
        value = getattr(config, name)
        if value != default and name not in _NEUTRAL and name not in _SIZES and name not in free:
            raise Unfit(f"{who} has no {name}={value!r}")


def _eps(who: str, config: vitkern.ViTConfig) -> float:
    """Eps of a LayerNorm.

    Raises:
        Unfit: the norm is another.
    """
    kind, eps = config.norm_layer
    if kind != "layernorm":
        raise Unfit(f"{who} has no norm_layer={kind!r}")
    return eps


def _weights(ours: vitkern.ViT) -> State:
    return {name: value.detach() for name, value in ours.state_dict().items()}


def _ready(module: nn.Module, state: State, precision: Precision, device: torch.device) -> None:
    module.load_state_dict(state)
    module.to(device, precision.weights)


def _renamed(state: State, root: Mapping[str, str], block: Mapping[str, str], prefix: str) -> State:
    """`state` under another library's names.

    root: theirs -> timm's, outside of the blocks.
    block: the same within a block; `prefix` holds "{}" where the block's number stands. A name that
        ends in "[i]" at timm's side is the i-th third of a packed qkv.
    """
    names = dict(root)
    depth = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1)
    for i in range(depth):
        names |= {prefix.format(i) + theirs: f"blocks.{i}.{t}" for theirs, t in block.items()}
    found: State = {}
    for theirs, timms in names.items():
        name, _, third = timms.partition("[")
        value = state.get(name)
        if value is not None:  # no bias, no classifier: where it isn't ours, it isn't theirs
            found[theirs] = value.chunk(3)[int(third[0])] if third else value
    return found


def _pairs(table: Mapping[str, str]) -> dict[str, str]:
    """Modules' names -> names of their weights and biases."""
    return {
        f"{theirs}.{kind}": f"{name}.{kind}{bracket}{third}"
        for theirs, timms in table.items()
        for kind in ("weight", "bias")
        for name, bracket, third in (timms.partition("["),)
    }


def _eager(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    try:
        model = vitkern.EagerViT(ours.config, device=device)
    except ValueError as error:
        raise Unfit(str(error)) from None
    _ready(model, _weights(ours), precision, device)
    return Network(model, model)


_TIMM_MLPS = {"mlp": "Mlp", "swiglu": "SwiGLU", "swiglu_packed": "SwiGLUPacked"}
_TIMM_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RmsNorm"}
_NOT_TIMMS = ("mean", "std", "residual_dtype", "drop_path_mode", "save", "impl", "pos_resample")
# Whose classes timm wants, or which it has in models of other classes, or not at all.
_NOT_BUILT = (
    *("embed_layer", "embed_norm_layer", "block_fn", "attn_layer", "dim_head", "patch_norm"),
    *("representation_size", "distilled", "rel_pos", "rel_pos_dim", "shared_rel_pos"),
)


def _timm(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    timm = load("timm", "timm")
    config, layers = ours.config, timm.layers
    free = [name for name in vars(config) if name not in _NOT_BUILT]
    _only("timm's VisionTransformer", config, *free)
    kind, eps = config.norm_layer
    named = {
        "norm_layer": functools.partial(getattr(layers, _TIMM_NORMS[kind]), eps=eps),
        "mlp_layer": getattr(layers, _TIMM_MLPS[config.mlp_layer]),
        "pos_embed": config.pos_embed,
        "weight_init": "skip",  # all of it is overwritten
    }
    plain = {
        name: value
        for name, value in vars(config).items()
        if name not in (*_NOT_TIMMS, *_NOT_BUILT, *named)
        and value is not None  # None is timm's own choice
    }
    with torch.device(device):
        try:
            model = timm.models.VisionTransformer(**plain, **named)
        except TypeError as error:  # an option that this version doesn't know
            raise Unfit(f"timm {timm.__version__}: {error}") from error
    _ready(model, _weights(ours), precision, device)
    return Network(model, model)


_TORCHVISION = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    **_pairs({"conv_proj": "patch_embed.proj", "encoder.ln": "norm", "heads.head": "head"}),
}
_TORCHVISION_BLOCK = {
    "self_attention.in_proj_weight": "attn.qkv.weight",
    "self_attention.in_proj_bias": "attn.qkv.bias",
    **_pairs(
        {
            "self_attention.out_proj": "attn.proj",
            "ln_1": "norm1",
            "ln_2": "norm2",
            "mlp.0": "mlp.fc1",
            "mlp.3": "mlp.fc2",
        }
    ),
}


def _torchvision(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    config = ours.config
    _only("torchvision", config, "norm_layer")
    eps = _eps("torchvision", config)
    for name in ("img_size", "patch_size"):
        rows, columns = getattr(config, name)
        if rows != columns:
            raise Unfit(f"torchvision has no {name}={(rows, columns)}: squares only")
    if not config.num_classes:
        raise Unfit("torchvision has no num_classes=0")
    models = load("torchvision", "torchvision.models.vision_transformer")
    with torch.device(device):
        model = models.VisionTransformer(
            image_size=config.img_size[0],
            patch_size=config.patch_size[0],
            num_layers=config.depth,
            num_heads=config.num_heads,
            hidden_dim=config.embed_dim,
            mlp_dim=config.hidden_dim,
            num_classes=config.num_classes,
            norm_layer=functools.partial(nn.LayerNorm, eps=eps),
        )
    prefix = "encoder.layers.encoder_layer_{}."
    state = _renamed(_weights(ours), _TORCHVISION, _TORCHVISION_BLOCK, prefix)
    _ready(model, state, precision, device)
    return Network(model, model)


_HF = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    **_pairs(
        {
            "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
            "vit.layernorm": "norm",
            "classifier": "head",
        }
    ),
}
# By the prefix of a block's keys: transformers 5 and later, then 4.
_HF_BLOCKS = {
    "vit.layers.{}.": {
        "attention.q_proj": "attn.qkv[0]",
        "attention.k_proj": "attn.qkv[1]",
        "attention.v_proj": "attn.qkv[2]",
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    "vit.encoder.layer.{}.": {
        "attention.attention.query": "attn.qkv[0]",
        "attention.attention.key": "attn.qkv[1]",
        "attention.attention.value": "attn.qkv[2]",
        "attention.output.dense": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    },
}
_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


@contextlib.contextmanager
def _folder_hidden() -> Iterator[None]:
    """A checkout's folder kernels/ is not the package `kernels` that transformers looks for."""
    before = {k: v for k, v in sys.modules.items() if k == "kernels"}
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        sys.modules.update(before)


def _hf(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    config = ours.config
    _only("transformers", config, "in_chans", "qkv_bias", "norm_layer", "act_layer")
    eps = _eps("transformers", config)
    with _folder_hidden(), torch.device(device):
        vit = load("transformers", "transformers.models.vit.modeling_vit")
        options = load("transformers", "transformers.models.vit.configuration_vit").ViTConfig(
            image_size=config.img_size,
            patch_size=config.patch_size,
            num_channels=config.in_chans,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.hidden_dim,
            qkv_bias=config.qkv_bias,
            hidden_act=_HF_ACTIVATIONS[config.act_layer],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=eps,
            num_labels=config.num_classes,
            attn_implementation="sdpa",
        )
        model = vit.ViTForImageClassification(options)
    keys = model.state_dict().keys()
    state = _weights(ours)
    for prefix, block in _HF_BLOCKS.items():
        renamed = _renamed(state, _HF, _pairs(block), prefix)
        if renamed.keys() == keys:
            _ready(model, renamed, precision, device)
            return Network(lambda images: model(pixel_values=images).logits, model, "sdpa")
    found = _packages.version("transformers")
    raise Absent(f"transformers {found} names its weights in a way not known here")


_VIT_PYTORCH = {
    "cls_token": "cls_token",
    "pos_embedding": "pos_embed",
    **_pairs(
        {
            "to_patch_embedding.2": "patch_embed.proj",
            "transformer.norm": "norm",
            "mlp_head": "head",
        }
    ),
}
_VIT_PYTORCH_BLOCK = _pairs(
    {
        "0.norm": "norm1",
        "0.to_qkv": "attn.qkv",
        "0.to_out.0": "attn.proj",
        "1.net.0": "norm2",
        "1.net.1": "mlp.fc1",
        "1.net.4": "mlp.fc2",
    }
)


def _vit_pytorch(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    config = ours.config
    _only("vit-pytorch", config, "in_chans", "qkv_bias", "norm_layer")
    eps = _eps("vit-pytorch", config)
    if not config.num_classes:
        raise Unfit("vit-pytorch has no num_classes=0")
    if config.num_heads == 1:
        raise Unfit("vit-pytorch has no output projection with num_heads=1")
    for name, size, patch in zip("HW", config.img_size, config.patch_size, strict=True):
        if size % patch:
            raise Unfit(f"vit-pytorch has no img_size={config.img_size}: {name} % {patch} != 0")
    module = load("vit-pytorch", "vit_pytorch.vit")
    with torch.device(device):
        model = module.ViT(
            image_size=config.img_size,
            patch_size=config.patch_size,
            num_classes=config.num_classes,
            dim=config.embed_dim,
            depth=config.depth,
            heads=config.num_heads,
            mlp_dim=config.hidden_dim,
            channels=config.in_chans,
            dim_head=config.head_dim,
        )
        try:
            for i in (1, 3):
                model.to_patch_embedding[i] = nn.Identity()
            if config.qkv_bias:
                for attention, _ in model.transformer.layers:
                    attention.to_qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        except (AttributeError, IndexError) as error:
            found = _packages.version("vit-pytorch")
            raise Absent(f"vit-pytorch {found} is built in a way not known here") from error
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = eps
    state = _weights(ours)
    # A patch's values in the order (row, column, channel).
    weight = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = weight.permute(0, 2, 3, 1).flatten(1)
    state = _renamed(state, _VIT_PYTORCH, _VIT_PYTORCH_BLOCK, "transformer.layers.{}.")
    shapes = model.state_dict()
    for name in ("cls_token", "pos_embedding"):  # [1, n, D] before 2025-11-27
        state[name] = state[name].reshape(shapes[name].shape)
    _ready(model, state, precision, device)
    note = f"its norms around the patch projection taken out, eps {eps:g} in place of 1e-5"
    return Network(model, model, note + ", a bias in qkv" * config.qkv_bias)


def _flash_attn(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    config, who = ours.config, "flash-attn's ViT"
    _only(who, config, "in_chans", "norm_layer", "no_embed_class")
    eps = _eps(who, config)
    if config.depth < 2:  # its last block is told apart from the others
        raise Unfit(f"{who} has no depth={config.depth}")
    if device.type != "cuda":
        raise Unfit(f"{who} needs a CUDA GPU")
    if precision.products not in (torch.float16, torch.bfloat16):
        raise Unfit(f"{who} runs in float16 and bfloat16, not in {precision.name}")
    module = load("flash-attn", "flash_attn.models.vit")
    with torch.device(device):
        try:
            model = module.VisionTransformer(
                img_size=config.img_size,
                patch_size=config.patch_size,
                in_chans=config.in_chans,
                num_classes=config.num_classes,
                embed_dim=config.embed_dim,
                depth=config.depth,
                num_heads=config.num_heads,
                mlp_ratio=config.mlp_ratio,
                no_embed_class=config.no_embed_class,
                norm_layer=functools.partial(nn.LayerNorm, eps=eps),
                use_flash_attn=True,
                fused_dropout_add_ln=True,
            )
        except ImportError as error:  # parts of it are asked for when they are built
            raise Absent(f"flash-attn's ViT doesn't build: {error}") from error
    _ready(model, _weights(ours), precision, device)  # it takes timm's keys
    note = "residual in float32; in the last block it computes the class token only"
    return Network(model, model, note)


def _compiled(
    build: Callable[[vitkern.ViT, Precision, torch.device], Network], mode: str
) -> Callable[[vitkern.ViT, Precision, torch.device], Network]:
    """`build`, compiled at the first call; whole, so that nothing runs eagerly in silence."""

    def make(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
        network = build(ours, precision, device)
        assert network.module is not None
        compiled = torch.compile(network.module, mode=mode, fullgraph=True, dynamic=False)

        def call(images: Tensor) -> Tensor:
            if mode == "default":
                return compiled(images)
            # CUDA graphs write their outputs to the same place at every call.
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(images).clone()

        return Network(call, network.module, f"torch.compile, {mode}")

    return make


def build_ours(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    """A copy of the model itself."""
    model = copy.deepcopy(ours).to(device, precision.weights)
    short = model._class_token_problem() is None
    return Network(model, model, "in the last block the class token only" if short else "")


def _cpu_float32(who: str, precision: Precision, device: torch.device) -> None:
    if device.type != "cpu" or precision.products != torch.float32:
        raise Unfit(f"{who} is compared on the CPU in float32 only")


def _by_batch(export: Callable[[Tensor], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    """Images -> logits, by what `export` makes of images of each shape when it first sees it."""
    made: dict[torch.Size, Callable[[Tensor], Tensor]] = {}

    def call(images: Tensor) -> Tensor:
        if images.requires_grad:
            raise Unfit("forward pass only")
        if images.shape not in made:
            made[images.shape] = export(images)
        return made[images.shape](images)

    return call


def _onnxruntime(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    _cpu_float32("onnxruntime", precision, device)
    runtime = load("onnxruntime", "onnxruntime")
    model = _eager(ours, precision, device).module
    assert model is not None
    model.eval()

    def export(images: Tensor) -> Callable[[Tensor], Tensor]:
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
        assert program is not None
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Its threads wait by spinning; between calls that would slow down whoever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as folder:  # weights apart: protobuf ends at 2 GiB
            path = Path(folder, "model.onnx")
            program.save(path, external_data=True)
            session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return Network(_by_batch(export), None, "exported from eager, forward only")


def _openvino(ours: vitkern.ViT, precision: Precision, device: torch.device) -> Network:
    _cpu_float32("openvino", precision, device)
    openvino = load("openvino", "openvino")
    model = _eager(ours, precision, device).module
    assert model is not None
    model.eval()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # where a CPU has bfloat16, that is the default
        "PERFORMANCE_HINT": "LATENCY",
    }

    def export(images: Tensor) -> Callable[[Tensor], Tensor]:
        converted = openvino.convert_model(torch.export.export(model, (images,)))
        request = openvino.compile_model(converted, "CPU", options).create_infer_request()
        return lambda images: torch.from_numpy(request.infer([images.numpy()])[0])

    return Network(_by_batch(export), None, "exported from eager, forward only")


_TIMM_HERE = (("timm", "timm"),)
_ONNX_HERE = (("onnxruntime", "onnxruntime"), ("onnx", "onnx"), ("onnxscript", "onnxscript"))
_FLASH_HERE = (
    ("flash-attn", "flash_attn.models.vit"),
    ("einops", "einops"),
    ("timm", "timm"),
    ("torchvision", "torchvision"),
)

# In the order in which they are displayed.
RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("eager", _eager),
        Rival("timm", _timm, "timm", _TIMM_HERE),
        Rival("timm compile", _compiled(_timm, "default"), "timm", _TIMM_HERE, compiled=True),
        Rival(
            "timm compile max-autotune",
            _compiled(_timm, "max-autotune"),
            "timm",
            _TIMM_HERE,
            compiled=True,
        ),
        Rival("vitkern compile", _compiled(build_ours, "default"), compiled=True),
        Rival("torchvision", _torchvision, "torchvision", (("torchvision", "torchvision"),)),
        Rival("hf", _hf, "transformers", (("transformers", "transformers.models.vit"),)),
        Rival("vit-pytorch", _vit_pytorch, "vit-pytorch", (("vit-pytorch", "vit_pytorch.vit"),)),
        Rival("flash-attn ViT", _flash_attn, "flash-attn", _FLASH_HERE),
        Rival("onnxruntime", _onnxruntime, "onnxruntime", _ONNX_HERE),
        Rival("openvino", _openvino, "openvino", (("openvino", "openvino"),)),
    )
}
