"""convert(): live modules of other libraries, and what it refuses."""

import copy
import os
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitkern.convert import convert, foreign
from vitkern.convert.describe import ConvertError
from vitkern.model import ViT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {**SIZES, "image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-3}
MLP = {"intermediate_size": 48}
TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
TIMM["num_classes"] = 5


@pytest.fixture
def vit() -> Callable[..., Any]:
    """A tiny VisionTransformer of timm, drawn."""
    module = pytest.importorskip("timm.models.vision_transformer")
    return lambda **options: drawn(module.VisionTransformer(**{**TIMM, **options}))


def drawn(module: Any) -> Any:
    """The module with weights of which none is zero or all alike."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def close(ours: Tensor, theirs: Tensor, limit: float = 2e-6) -> None:
    """Equal within `limit` of the largest number, or of 1e-3: some gradients are but noise."""
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).item() <= limit


# timm


@pytest.mark.parametrize(
    "options",
    [
        {"img_size": (16, 24), "reg_tokens": 2, "init_values": 0.1, "qk_norm": True},
        {"global_pool": "avg", "class_token": False, "no_embed_class": True, "pos_embed": "none"},
        {"global_pool": "max", "fc_norm": False, "act_layer": "gelu_tanh"},
        {"global_pool": "", "pre_norm": True, "qkv_bias": False, "proj_bias": False},
        {"global_pool": "map", "num_classes": 0, "norm_layer": "rmsnorm"},
        {"global_pool": "prr", "scale_attn_norm": True, "scale_mlp_norm": True},
        {"embed_norm_layer": "layernorm", "final_norm": False, "mlp_ratio": 2.7},
        {"dynamic_img_size": True, "dynamic_img_pad": True},
    ],
    ids=lambda options: ",".join(options),
)
def test_timm(vit: Callable[..., Any], options: dict[str, Any]) -> None:
    theirs = vit(**options)
    images = torch.randn(2, 3, *theirs.patch_embed.img_size)
    ours = convert(theirs)
    close(ours(images), theirs(images))
    ours(images).square().sum().backward()
    theirs(images).square().sum().backward()
    grads = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter is not grads[name]
        close(parameter.grad, grads[name].grad, 1e-4)
    shared = convert(theirs, copy=False)
    assert all(parameter is grads[name] for name, parameter in shared.named_parameters())


def test_timms_other_parts(vit: Callable[..., Any]) -> None:
    layers = pytest.importorskip("timm.layers")
    module = pytest.importorskip("timm.models.vision_transformer")
    for options in (
        {"mlp_layer": layers.SwiGLU},
        {"mlp_layer": layers.SwiGLUPacked, "mlp_ratio": 3.0},
        {"block_fn": module.ResPostBlock, "init_values": 0.1},
        {"block_fn": module.ParallelThingsBlock},
        {"block_fn": module.ParallelScalingBlock},
        {"block_fn": module.DiffParallelScalingBlock, "norm_layer": "rmsnorm"},
        {"attn_layer": "diff"},
    ):
        convert(vit(**options), check=IMAGES)


@pytest.mark.parametrize(
    "name",
    [
        "vit_relpos_base_patch16_clsgap_224",
        "vit_small_r26_s32_224",
        "vit_base_mci_224",
        "deit_tiny_distilled_patch16_224",
        "vit_base_patch16_siglip_224",
    ],
)
def test_timms_models_by_name(name: str) -> None:
    timm = pytest.importorskip("timm")
    theirs = drawn(
        timm.create_model(name, img_size=64, depth=2, embed_dim=48, num_heads=4, num_classes=3)
        if "mci" not in name
        else timm.create_model(name, img_size=64, depth=1, num_classes=3)
    )
    ours = convert(theirs, copy=False, check=torch.randn(1, 3, 64, 64))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    config = theirs.pretrained_cfg
    assert ours.config.mean == tuple(config["mean"])
    assert ours.pretrained_cfg is config


def test_what_training_does_is_carried_over(vit: Callable[..., Any]) -> None:
    theirs = vit(
        drop_path_rate=0.4, proj_drop_rate=0.1, attn_drop_rate=0.2, pos_drop_rate=0.3, drop_rate=0.5
    )
    theirs.set_grad_checkpointing()
    theirs.train()
    theirs.norm.eval()
    theirs.patch_embed.proj.weight.requires_grad_(False)
    ours = convert(theirs)
    config = ours.config
    rates = (config.proj_drop_rate, config.attn_drop_rate, config.pos_drop_rate, config.drop_rate)
    assert rates == (0.1, 0.2, 0.3, 0.5)
    assert config.drop_path_rate == pytest.approx(0.4)
    assert ours.training
    assert not ours.norm.training
    assert ours.grad_checkpointing
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert frozen == ["patch_embed.proj.weight"]
    results = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        results.append(model(IMAGES.repeat(8, 1, 1, 1)))
    close(results[1], results[0], 1e-5)


def test_after_pruning(vit: Callable[..., Any]) -> None:
    theirs = vit(depth=4)
    theirs.prune_intermediate_layers([0, 1], prune_norm=True)
    ours = convert(theirs)
    assert ours.config.depth == 2
    given = [model.forward_intermediates(IMAGES, [1])[1][0] for model in (ours, theirs)]
    close(*given)


def test_overrides(vit: Callable[..., Any]) -> None:
    theirs = vit()
    ours = convert(theirs, img_size=32, num_classes=7, impl="reference", drop_path_rate=0.1)
    assert ours(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert ours.config.drop_path_rate == 0.1
    assert ours.config.impl == "reference"
    averaged = convert(theirs, global_pool="avg")
    assert "fc_norm.weight" in averaged.state_dict()
    with pytest.raises(TypeError, match="img_sise"):
        convert(theirs, img_sise=32)
    with pytest.raises(ConvertError, match=r"qkv\.bias"):
        convert(theirs, qkv_bias=False)


def test_a_vitkern_model_and_another_dtype(vit: Callable[..., Any]) -> None:
    ours = convert(vit().double())
    assert ours.head.weight.dtype == torch.float64
    again = convert(ours, copy=False, impl="reference")
    assert again.head.weight is ours.head.weight
    assert again.config.impl == "reference"
    close(again(IMAGES.double()), ours(IMAGES.double()), 1e-12)


def test_the_random_numbers_stay(vit: Callable[..., Any]) -> None:
    theirs = vit()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    convert(theirs)
    assert torch.equal(torch.rand(1), expected)


# What is refused


def _hook(module: Any) -> None:
    module.blocks[1].mlp.register_forward_hook(lambda *_: None)


def _patch(module: Any) -> None:
    module.blocks[0].forward = lambda x: x


def _patch_a_helper(module: Any) -> None:
    module._pos_embed = types.MethodType(lambda self, x: type(self)._pos_embed(self, 2 * x), module)


def _parametrise(module: Any) -> None:
    nn.utils.parametrize.register_parametrization(module.head, "weight", nn.Identity())


def _wrap(module: Any) -> None:
    class LoRA(nn.Linear):
        pass

    module.blocks[0].attn.qkv.__class__ = LoRA


def _norm(module: Any) -> None:
    module.blocks[1].norm1.eps = 0.1


def _act(module: Any) -> None:
    module.blocks[1].mlp.act = nn.Tanh()


def _scale(module: Any) -> None:
    module.blocks[0].attn.scale = 1.0


def _uneven(module: Any) -> None:
    for block in module.blocks:
        block.attn.proj_drop.p = 0.1
    module.blocks[0].attn.proj_drop.p = 0.2


def _paths(module: Any) -> None:
    module.blocks[0].drop_path1.drop_prob = 0.3
    module.blocks[0].drop_path2.drop_prob = 0.3


def _overlap(module: Any) -> None:
    module.patch_embed.proj.stride = (4, 4)


def _pad(module: Any) -> None:
    module.patch_embed.proj.padding = (4, 4)


def _meta(module: Any) -> None:
    module.to("meta")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_hook, r"blocks\.1\.mlp has hooks"),
        (_patch, r"the forward of blocks\.0 was replaced"),
        (_patch_a_helper, "the _pos_embed of it was replaced"),
        (_parametrise, "head is parametrised|head is a"),
        (_wrap, r"blocks\.0\.attn\.qkv is a tests\.test_convert"),
        (_norm, "its norms differ"),
        (_act, "activation Tanh"),
        (_scale, "scaled by 1.0"),
        (_uneven, "projection dropouts differ"),
        (_paths, "stochastic depth"),
        (_overlap, "patches don't lie side by side"),
        (_pad, "patches don't lie side by side"),
        (_meta, "on device 'meta'"),
    ],
)
def test_refusals(vit: Callable[..., Any], change: Callable[[Any], None], text: str) -> None:
    module = vit(drop_path_rate=0.2)
    if change is _paths:
        module.blocks[0].drop_path1 = copy.deepcopy(module.blocks[1].drop_path1)
        module.blocks[0].drop_path2 = copy.deepcopy(module.blocks[1].drop_path2)
    change(module)
    with pytest.raises(ConvertError, match=text):
        convert(module)


def _tanh(module: Any) -> None:
    module.blocks[0].mlp.act = nn.Tanh()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_hook, r"blocks\.1\.mlp has hooks"),
        (_patch, r"forward of blocks\.0 was replaced"),
        (_wrap, r"qkv is a tests\.test_convert"),
        (_norm, r"blocks\.1\.norm1 is LayerNorm.*eps=0\.1.*config"),
        (_tanh, r"act is Tanh\(\), and not so by its config"),
    ],
)
def test_a_vitkern_model_that_was_changed(change: Callable[[Any], None], text: str) -> None:
    module = ViT(**TIMM)
    convert(module)
    change(module)
    with pytest.raises(ConvertError, match=text):
        convert(module)


def test_refused_classes(vit: Callable[..., Any]) -> None:
    timm = pytest.importorskip("timm")
    base = type(vit())

    class Own(base):  # type: ignore[valid-type, misc]
        def forward_features(self, x: Tensor) -> Tensor:
            return self.norm(x)

    class Harmless(base):  # type: ignore[valid-type, misc]
        def summary(self) -> str:
            return "as it was"

    with pytest.raises(ConvertError, match="overrides forward_features"):
        convert(Own(**TIMM))
    convert(drawn(Harmless(**TIMM)), check=IMAGES)
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2)
    with pytest.raises(ConvertError, match=r"timm\.Beit is no ViT that is known"):
        convert(beit)
    with pytest.raises(ConvertError, match="it holds one: convert its '0'"):
        convert(nn.Sequential(vit()))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        convert("model.pth")
    with pytest.raises(TypeError, match="check must be images"):
        convert(vit(), check=True)
    gated = vit()
    gated.blocks[0].attn.gate = nn.Linear(32, 32)
    with pytest.raises(ConvertError, match=r"attn\.gate"):
        convert(gated)


def test_check_sees_a_difference(vit: Callable[..., Any]) -> None:
    module = vit()
    # What no attribute tells: a constant of the code itself.
    module.blocks[0].ls1.__class__ = type(
        "Identity", (nn.Identity,), {"forward": lambda self, x: 2 * x, "__module__": "torch.nn"}
    )
    module.train()
    with pytest.raises(ConvertError, match="check: results differ"):
        convert(module, check=IMAGES)
    assert module.training


# The other libraries


def test_torchvision() -> None:
    module = pytest.importorskip("torchvision.models.vision_transformer")
    for options in ({}, {"representation_size": 20}):
        theirs = drawn(
            module.VisionTransformer(
                16, 8, 2, 4, 32, 48, num_classes=5, dropout=0.1, attention_dropout=0.2, **options
            )
        )
        for block in theirs.encoder.layers:
            block.ln_1.eps = block.ln_2.eps = 0.01
        theirs.encoder.ln.eps = 0.01
        ours = convert(theirs, copy=False, check=IMAGES)
        own = {id(parameter) for parameter in theirs.parameters()}
        assert all(id(parameter) in own for parameter in ours.parameters())
        config = ours.config
        assert config.norm_layer == ("layernorm", 0.01)
        assert config.pos_resample == "torchvision"
        assert (config.proj_drop_rate, config.attn_drop_rate) == (0.1, 0.2)
        ours(IMAGES).sum().backward()
        assert theirs.conv_proj.weight.grad is not None
    theirs = module.VisionTransformer(16, 8, 1, 2, 16, 16, representation_size=20)
    theirs.heads.act = nn.ReLU()
    with pytest.raises(ConvertError, match=r"heads\.act is ReLU"):
        convert(theirs)
    stem = [module.ConvStemConfig(8, 3, 2), module.ConvStemConfig(8, 3, 4)]
    with pytest.raises(ConvertError, match="stem"):
        convert(module.VisionTransformer(16, 8, 1, 2, 16, 16, conv_stem_configs=stem))


def test_vit_pytorch() -> None:
    module = pytest.importorskip("vit_pytorch.vit")
    sizes = {"image_size": (16, 16), "patch_size": 8, "dim": 32, "depth": 2, "mlp_dim": 48}
    for options in (
        {"heads": 3, "dim_head": 8},
        {"heads": 1, "dim_head": 32},
        {"heads": 4, "pool": "mean", "dim_head": 16},
    ):
        theirs = drawn(module.ViT(**sizes, num_classes=5, dropout=0.1, emb_dropout=0.2, **options))
        ours = convert(theirs, check=IMAGES)
        assert (ours.config.proj_drop_rate, ours.config.pos_drop_rate) == (0.1, 0.2)
        with pytest.raises(ConvertError, match=r"patch_embed.*another way"):
            convert(theirs, copy=False)
    # What no tensor tells, and the module does.
    theirs = drawn(module.ViT(**{**sizes, "channels": 5}, num_classes=5, heads=3, dim_head=8))
    convert(theirs, check=torch.randn(1, 5, 16, 16))
    theirs = drawn(module.ViT(**sizes, num_classes=5, heads=3, dim_head=8))
    theirs.to_patch_embedding[1].eps = theirs.to_patch_embedding[3].eps = 0.1
    convert(theirs, check=IMAGES)
    theirs.pool = "mean"  # beside a class token, as all had it until 2025-11
    assert convert(theirs, check=IMAGES).config.pool_include_prefix
    theirs.to_patch_embedding[0].pattern = "b c (h p1) (w p2) -> b (h w) (c p1 p2)"
    with pytest.raises(ConvertError, match="patches are cut as"):
        convert(theirs)


def test_vit_pytorch_that_is_not_square() -> None:
    module = pytest.importorskip("vit_pytorch.vit")
    for image, patch in (((16, 24), (8, 4)), ((16, 64), 8)):  # 2 x 8 patches could be 4 x 4
        sizes = {"image_size": image, "patch_size": patch, "dim": 32, "depth": 1, "mlp_dim": 48}
        theirs = drawn(module.ViT(**sizes, num_classes=5, heads=3, dim_head=8))
        convert(theirs, img_size=image, check=torch.randn(1, 3, *image))


HF = {
    "ViTModel": {},
    "ViTForImageClassification": {"qkv_bias": False, "hidden_act": "gelu_new"},
    "DeiTModel": {},
    "DeiTForImageClassificationWithTeacher": {},
    "ViTMSNModel": {},
    "IJepaModel": {},
    "Dinov2Model": {"use_swiglu_ffn": True},
    "Dinov2WithRegistersModel": {},
    "CLIPVisionModel": {},
    "CLIPVisionModelWithProjection": {},
    "SiglipVisionModel": {},
    "BeitModel": {},  # without any positions
    "BeitForImageClassification": {"use_relative_position_bias": True, "drop_path_rate": 0.1},
}


def of_hf(hf: Any, name: str, **options: Any) -> Any:
    """A tiny model of transformers."""
    stem = name.split("Model")[0].split("For")[0]
    sizes = CONFIG if "Dinov2" in name else {**CONFIG, **MLP}
    return drawn(getattr(hf, name)(getattr(hf, f"{stem}Config")(**{**sizes, **options})))


@pytest.mark.parametrize(("name", "options"), HF.items(), ids=HF)
def test_transformers(hf: Any, name: str, options: dict[str, Any]) -> None:
    theirs = of_hf(hf, name, **options)
    ours = convert(theirs, check=IMAGES)
    assert ours.config.norm_layer == ("layernorm", 1e-3)
    if "Projection" in name:  # a bias that isn't there is none that is trained
        assert not ours.head.bias.requires_grad
        assert ours.head.weight.requires_grad
    with pytest.raises(ConvertError, match=r"copy=False.*qkv.*accelerate"):
        convert(theirs, copy=False)


def test_transformers_gradients(hf: Any) -> None:
    theirs = of_hf(hf, "ViTForImageClassification")
    ours = convert(theirs)
    ours(IMAGES).square().sum().backward()
    theirs(IMAGES).logits.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    at = "vit.layers.1.attention"
    names = [name for name in grads if name.endswith(("q_proj.weight", "query.weight"))]
    parts = [names[1].replace("q_proj", x).replace("query", y) for x, y in (
        ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))]  # fmt: skip
    assert at.split(".")[0] in names[1]
    close(ours.blocks[1].attn.qkv.weight.grad, torch.cat([grads[n] for n in parts]), 1e-4)
    patches = "vit.embeddings.patch_embeddings.projection.weight"
    close(ours.patch_embed.proj.weight.grad, grads[patches], 1e-4)


def test_refused_options_of_transformers(hf: Any) -> None:
    with pytest.raises(ConvertError, match=r"hidden_dropout_prob=0\.1"):
        convert(of_hf(hf, "ViTModel", hidden_dropout_prob=0.1))
    with pytest.raises(ConvertError, match="stochastic depth"):
        convert(of_hf(hf, "Dinov2Model", drop_path_rate=0.1))
    with pytest.raises(ConvertError, match="convert its 'dinov2'"):
        convert(of_hf(hf, "Dinov2ForImageClassification"))
    with pytest.raises(ConvertError, match="MishActivation"):
        convert(of_hf(hf, "ViTModel", hidden_act="mish"))
    overlapping = of_hf(hf, "Dinov2Model")
    overlapping.embeddings.patch_embeddings.projection.stride = (4, 4)
    with pytest.raises(ConvertError, match="side by side"):
        convert(overlapping)
    theirs = of_hf(hf, "ViTModel")
    theirs(IMAGES, output_hidden_states=True)  # leaves transformers' own hooks behind
    convert(theirs, check=IMAGES)


def test_open_clip() -> None:
    module = pytest.importorskip("open_clip.transformer")
    sizes = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "heads": 4}
    for options in (
        {},
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {"ls_init_value": 0.1, "act_layer": module.QuickGELU, "patch_dropout": 0.5},
    ):
        theirs = drawn(module.VisionTransformer(**sizes, mlp_ratio=1.5, output_dim=12, **options))
        ours = convert(theirs, check=IMAGES)
        assert ours.config.patch_drop_rate == options.get("patch_dropout", 0.0)
    with pytest.raises(ConvertError, match="output_tokens"):
        convert(module.VisionTransformer(**sizes, mlp_ratio=1.0, output_tokens=True))


# Names


def test_names_that_mean_several_classes() -> None:
    quantised = torch.ao.nn.quantized.Linear(4, 4)
    assert foreign.class_name(nn.Linear(2, 2)) == "torch.Linear"
    assert foreign.class_name(quantised) not in foreign.LINEARS
    beit = pytest.importorskip("timm.models.beit")
    assert foreign.class_name(None, beit.Block) == "timm.models.beit.Block"
