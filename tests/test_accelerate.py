"""accelerate(): our kernels inside somebody else's model, and out again."""

import copy
import os
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitkern import explain
from vitkern.accelerate import ALONE, accelerate, blocks, restore
from vitkern.accelerate.tower import Tower
from vitkern.convert import ConvertError
from vitkern.kernels._op import record_choices
from vitkern.model import ViT

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {**SIZES, "image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-3}
MLP = {"intermediate_size": 48}
TEXT = {**SIZES, **MLP, "vocab_size": 50, "max_position_embeddings": 9, "bos_token_id": 0}
TEXT["eos_token_id"] = 49
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
IDS = torch.tensor([[0, 5, 6, 49], [0, 7, 8, 49]])


def drawn(module: Any) -> Any:
    """The module with weights of which none is zero or all alike, in float64."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval().double()


def of_hf(hf: Any, name: str, **options: Any) -> Any:
    """A tiny model of transformers."""
    stem = name.split("Model")[0].split("For")[0]
    stem = stem if hasattr(hf, f"{stem}Config") else stem.removesuffix("Vision") + "Vision"
    sizes = CONFIG if "Dinov2" in name else {**CONFIG, **MLP}
    return drawn(getattr(hf, name)(getattr(hf, f"{stem}Config")(**{**sizes, **options})))


def torchvision_model(**options: Any) -> Any:
    """A tiny VisionTransformer of torchvision."""
    module = pytest.importorskip("torchvision.models.vision_transformer")
    return drawn(module.VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=5, **options))


class Wrapped(nn.Module):
    """A larger model around a VisionTransformer of timm."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
        self.vit = vit(**{**sizes, "num_classes": 5, **options})
        self.head = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.vit(images))


class Segmentation(nn.Module):
    """Features of two blocks of a timm backbone, and a head on them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = pytest.importorskip("timm").create_model(
            "vit_tiny_patch16_224", features_only=True, out_indices=(0, 2), depth=4,
            img_size=32, patch_size=8, embed_dim=48, num_heads=3,
        )  # fmt: skip
        self.head = nn.Conv2d(96, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.cat(self.backbone(images), 1))


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, whatever its class."""
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in tensors(part)]
    return []


def ran_fused(run: Callable[[], Any]) -> set[str]:
    """Ops of ours that ran, and blocks that did not run on them."""
    with record_choices() as choices:
        run()
    return {choice.op for choice in choices}


def hold(model: Any, run: Callable[[Any], Any], limit: float = 1e-10) -> Any:
    """Accelerated, copied, undone: outputs, gradients, keys and parameters as before."""

    def outputs_and_grads(model: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(5)
        found = tensors(run(model))
        torch.manual_seed(6)
        sum((t * torch.randn_like(t)).sum() for t in found if t.requires_grad).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return [t.detach() for t in found], grads

    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    before, grads = outputs_and_grads(model)
    report = accelerate(model)
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    after, new_grads = outputs_and_grads(model)
    assert len(after) == len(before)
    for ours, theirs in zip(after, before, strict=True):
        assert ((ours - theirs).abs().max() / theirs.abs().max()).item() <= limit
    assert new_grads.keys() == grads.keys()
    for name, grad in grads.items():
        error = (new_grads[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3)
        assert error.item() <= 10 * limit, name
    again = accelerate(model)
    assert again.swapped == report.swapped
    copies = [copy.deepcopy(model)]
    if not any(module._forward_hooks for module in model.modules()):
        copies.append(pickle.loads(pickle.dumps(model)))
    for other in copies:
        for ours, theirs in zip(outputs_and_grads(other)[0], after, strict=True):
            assert torch.equal(ours, theirs)
        restore(other)
        assert not any(isinstance(m, (Tower, blocks.Swapped)) for m in other.modules())
    restore(model)
    for ours, theirs in zip(outputs_and_grads(model)[0], before, strict=True):
        assert torch.equal(ours, theirs)
    assert restore(model) is model
    return report


# Blocks

HF = {
    "ViTModel": {},
    "DeiTModel": {"qkv_bias": False},
    "ViTMSNModel": {},
    "IJepaModel": {"hidden_act": "gelu_new"},
    "Dinov2Model": {"use_swiglu_ffn": True},
    "Dinov2WithRegistersModel": {},
    "CLIPVisionModel": {},
    "SiglipVisionModel": {},
    "CLIPSegVisionModel": {},
    "OwlViTVisionModel": {},
    "Owlv2VisionModel": {},
    "AltCLIPVisionModel": {},
}


@pytest.mark.parametrize(("name", "options"), HF.items(), ids=HF)
def test_transformers(hf: Any, name: str, options: dict[str, Any]) -> None:
    model = of_hf(hf, name, **options)
    report = hold(model, lambda m: m(pixel_values=IMAGES))
    assert len(report.swapped) == 2
    assert all(row.done == "swapped" for row in report.rows)


def test_masked_autoencoder(hf: Any) -> None:
    model = of_hf(hf, "ViTMAEForPreTraining", decoder_hidden_size=24, decoder_num_hidden_layers=1,
                  decoder_num_attention_heads=2, decoder_intermediate_size=32)  # fmt: skip
    noise = torch.rand(2, 4).double()
    report = hold(model, lambda m: m(pixel_values=IMAGES, noise=noise))
    assert len(report.swapped) == 3


def _call(options: dict[str, Any], model: Any) -> Any:
    return model(pixel_values=IMAGES, **options)


def test_recorded_outputs_of_transformers(hf: Any) -> None:
    for attention in ("sdpa", "eager"):
        model = of_hf(hf, "ViTForImageClassification", attn_implementation=attention)
        asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        hold(model, partial(_call, asked))
    expected = model(pixel_values=IMAGES, output_attentions=True).attentions
    accelerate(model)
    assert "norm_linear" in ran_fused(lambda: model(pixel_values=IMAGES))
    # Recording needs the weights, so blocks run their own forward; the hooks stay, switched off.
    ran = ran_fused(lambda: model(pixel_values=IMAGES, output_attentions=True))
    assert ran == {"ViTLayer"}
    found = model(pixel_values=IMAGES, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "ViTLayer" not in ran_fused(lambda: model(pixel_values=IMAGES))


def test_clip(hf: Any) -> None:
    vision = {**CONFIG, **MLP}
    model = drawn(hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=vision)))
    report = hold(model, lambda m: m(pixel_values=IMAGES, input_ids=IDS))
    assert report.swapped == ("vision_model.encoder.layers.0", "vision_model.encoder.layers.1")
    assert {row.why for row in report.rows if row.done == ALONE} == {"it reads text, and is causal"}
    siglip = drawn(hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=vision)))
    report = hold(siglip, lambda m: m(pixel_values=IMAGES, input_ids=IDS))
    assert len(report.swapped) == 4  # its text is not causal
    accelerate(siglip)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    ran = ran_fused(lambda: siglip(pixel_values=IMAGES, input_ids=IDS, attention_mask=mask))
    assert "SiglipEncoderLayer" in ran  # but masked in this call


def test_stochastic_depth_of_dinov2(hf: Any) -> None:
    model = of_hf(hf, "Dinov2Model", drop_path_rate=0.4)
    model.train()
    hold(model, lambda m: m(pixel_values=IMAGES.repeat(8, 1, 1, 1)))


def test_gradient_checkpointing(hf: Any) -> None:
    model = of_hf(hf, "ViTForImageClassification")
    model.gradient_checkpointing_enable()
    model.train()
    hold(model, lambda m: m(pixel_values=IMAGES).logits)


def test_torchvision() -> None:
    report = hold(torchvision_model(), lambda m: m(IMAGES))
    assert report.swapped == tuple(f"encoder.layers.encoder_layer_{i}" for i in range(2))


def test_vit_pytorch() -> None:
    module = pytest.importorskip("vit_pytorch.vit")
    sizes = {"image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "mlp_dim": 48, "heads": 3}
    model = drawn(module.ViT(**sizes, num_classes=5, dim_head=8))
    assert hold(model, lambda m: m(IMAGES)).swapped == ("transformer",)
    accelerate(model)
    model.transformer.layers = model.transformer.layers[:1]
    pruned = model(IMAGES)
    assert torch.equal(restore(model)(IMAGES), pruned)
    simple = pytest.importorskip("vit_pytorch.simple_vit").SimpleViT
    hold(drawn(simple(**sizes, num_classes=5, dim_head=8)), lambda m: m(IMAGES))
    alone = drawn(module.ViT(**{**sizes, "heads": 1}, num_classes=5, dim_head=32))
    with pytest.raises(ConvertError, match=r"0\.to_out"):  # it has no projection
        accelerate(alone)


def test_open_clip() -> None:
    module = pytest.importorskip("open_clip.model")
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
    text = {"context_length": 4, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
    for cls, start in ((module.CLIP, "visual."), (module.CustomTextCLIP, "visual.")):
        model = drawn(cls(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=True))
        report = hold(model, lambda m: m(IMAGES, IDS))
        assert len(report.swapped) == 2
        assert all(name.startswith(start) for name in report.swapped)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True, "init_values": 0.1, "norm_layer": "rmsnorm"},
        {"mlp_layer": "SwiGLU", "act_layer": "gelu_tanh"},
        {"mlp_layer": "SwiGLUPacked"},
    ],
    ids=str,
)
def test_a_timm_model_itself_runs_block_by_block(options: dict[str, Any]) -> None:
    layers = pytest.importorskip("timm.layers")
    if "mlp_layer" in options:
        options = {**options, "mlp_layer": getattr(layers, options["mlp_layer"])}
    report = hold(drawn(Wrapped(**options)).vit, lambda m: m(IMAGES))
    assert report.swapped == ("blocks.0", "blocks.1")
    assert report.rows[0].done == ALONE


# Where a block steps aside


def _train(model: Any) -> None:
    model.train()


def _hook(model: Any) -> None:
    for layer in model.encoder.layers:
        layer.ln_1.register_forward_hook(lambda *_: None)


def _replace(model: Any) -> None:
    for layer in model.encoder.layers:
        layer.mlp[0] = nn.Sequential(layer.mlp[0])


def _gelu(model: Any) -> None:
    for layer in model.encoder.layers:
        layer.mlp[1].approximate = "tanh"


class Quantised(Tensor):
    """Stands in for the tensors of quantisation and of sharding."""


def _quantise(model: Any) -> None:
    for layer in model.encoder.layers:
        weight = layer.mlp[3].weight.detach().as_subclass(Quantised)
        layer.mlp[3].weight = nn.Parameter(weight)


@pytest.mark.parametrize(
    ("change", "text", "rates"),
    [
        (_train, "^dropout$", (0.1, 0.0)),
        (_train, "^dropout of attention weights$", (0.0, 0.1)),
        (_gelu, r"mlp\.1 is another GELU", (0.0, 0.0)),
        (_hook, "ln_1 was replaced, wrapped or hooked", (0.0, 0.0)),
        (_replace, r"mlp\.0 was replaced", (0.0, 0.0)),
        (_quantise, r"the weight of mlp\.3 is quantised", (0.0, 0.0)),
    ],
)
def test_a_block_that_changed_runs_its_own_forward(
    change: Callable[[Any], None], text: str, rates: tuple[float, float]
) -> None:
    model = torchvision_model(dropout=rates[0], attention_dropout=rates[1])
    model.encoder.dropout.p = 0.0
    accelerate(model)
    plain = copy.deepcopy(restore(copy.deepcopy(model)))
    assert "own forward" not in str(explain(model, IMAGES))
    change(model)
    change(plain)
    rows = explain(model, IMAGES).rows
    assert [row.op for row in rows] == ["EncoderBlock"]
    assert re.search(text, rows[0].why)
    results = []
    for one in (model, plain):
        torch.manual_seed(7)
        results.append(one(IMAGES))
    assert torch.equal(*results)


def test_a_block_that_got_another_attention_or_part(hf: Any) -> None:
    model = of_hf(hf, "ViTModel")
    accelerate(model)
    model.layers[0].attention.config._attn_implementation = "of_ones_own"
    assert blocks.problem(model.layers[0], model.layers[0]._swap) == "attention is of_ones_own"
    model = drawn(Wrapped()).vit
    accelerate(model)
    block = model.blocks[0]
    assert blocks.problem(block, block._swap) is None
    block.attn.gate = nn.Linear(32, 32)
    assert "attn.gate" in str(blocks.problem(block, block._swap))


def _scale(attn: Any) -> None:
    attn.scale = 0.5


def _norms(attn: Any) -> None:
    attn.k_norm.eps = 0.1


def _gate(attn: Any) -> None:
    attn.gate = nn.Linear(32, 32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_scale, r"scaled by 0\.5 with heads of 8"),
        (_norms, "norms of queries and keys differ"),
        (_gate, r"it has attn\.gate, torch\.Linear"),
    ],
)
def test_attention_that_is_none_of_ours(change: Callable[[Any], None], text: str) -> None:
    model = drawn(Wrapped(qk_norm=True)).vit
    for block in model.blocks:
        change(block.attn)
    with pytest.raises(ConvertError, match=text):
        accelerate(model)


def test_layers_that_are_none_of_ours(hf: Any) -> None:
    module = pytest.importorskip("timm.layers")
    model = of_hf(hf, "ViTModel")
    for layer in model.layers:
        layer.attention.q_proj.bias = None
    with pytest.raises(ConvertError, match="some have a bias and some have not"):
        accelerate(model)
    model = torchvision_model()
    for layer in model.encoder.layers:
        layer.ln_2 = nn.LayerNorm(32, elementwise_affine=False)
    with pytest.raises(ConvertError, match="its ln_2 is no plain norm"):
        accelerate(model)
    model = drawn(Wrapped(mlp_layer=partial(module.GluMlp, gate_last=True))).vit
    with pytest.raises(ConvertError, match="gate stands behind the value"):
        accelerate(model)


def test_what_is_left_alone() -> None:
    model = torchvision_model()
    first, second = model.encoder.layers
    first.forward = lambda x: x
    second.mlp[1] = nn.Tanh()
    with pytest.raises(ConvertError, match=r"forward was replaced.*its mlp\.1 is torch\.Tanh"):
        accelerate(model)
    model = torchvision_model()
    model.encoder.layers[0].ln_1 = nn.BatchNorm1d(5)
    report = accelerate(model)
    assert [row.done for row in report.rows] == [ALONE, "swapped"]
    assert "BatchNorm1d" in str(report)
    late = nn.MultiheadAttention(32, 4)  # tokens first
    model = torchvision_model()
    for layer in model.encoder.layers:
        layer.self_attention = late
    with pytest.raises(ConvertError, match="tokens first"):
        accelerate(model)


def test_nothing_to_do() -> None:
    with pytest.raises(ConvertError, match=r"torch\.TransformerEncoderLayer.*timm\.Block"):
        accelerate(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1))
    with pytest.raises(ConvertError, match="no transformer in Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ConvertError, match=r"is a vitkern\.ViT already"):
        accelerate(nn.Sequential(ViT(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)))
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            function("model.pth")
    with pytest.raises(ValueError, match="impl"):
        accelerate(torchvision_model(), impl="fastest")
    with pytest.raises(ValueError, match="save"):
        accelerate(torchvision_model(), save="all")


# Around the blocks


def test_hooks_on_a_block_and_a_context() -> None:
    model, seen = torchvision_model(), []
    before = model(IMAGES)
    layer = model.encoder.layers[0]
    cls = type(layer)
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with accelerate(model) as report:
        assert "swapped" in str(report)
        assert isinstance(layer, cls)
        assert type(layer) is not cls
        assert type(layer).__name__ == "EncoderBlock"
        assert "run by vitkern" in repr(model)
        model(IMAGES)
    assert seen == [torch.Size([2, 5, 32])]
    assert type(layer) is cls
    assert torch.equal(model(IMAGES), before)


def test_an_optimizer_made_before_trains_it() -> None:
    model = torchvision_model()
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    accelerate(model)
    for _ in range(2):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            one(IMAGES).square().mean().backward()
            optimizer.step()
    restore(model)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_compiles_whole() -> None:
    model = torchvision_model()
    expected = model(IMAGES)
    accelerate(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(IMAGES), expected, atol=1e-5)


def test_autocast_and_dtypes() -> None:
    model, images = torchvision_model().float(), IMAGES.float()
    before = model(images)
    with accelerate(model):
        assert (model(images) - before).abs().max() <= 1e-5 * before.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(images)
        accelerate(model)
        after = model(images)
    assert after.dtype == before.dtype
    assert torch.allclose(after.float(), before.float(), atol=0.05, rtol=0.05)
    restore(model)
    model.bfloat16()
    before = model(IMAGES.bfloat16())
    accelerate(model)
    after = model(IMAGES.bfloat16())
    assert after.dtype == torch.bfloat16
    assert torch.allclose(after.float(), before.float(), atol=0.05, rtol=0.05)


def test_our_kernels_run(kernel_device: str) -> None:
    """As the halves hand statistics on from one to the other."""
    model, images = torchvision_model().float().to(kernel_device), IMAGES.float().to(kernel_device)
    expected = model(images)
    accelerate(model, impl={"norm_linear": "triton", "linear_residual": "triton"}, save="minimal")
    found = model(images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    rows = explain(model, images).rows
    assert {r.implementation for r in rows if r.op == "norm_linear"} == {"triton"}
    found.sum().backward()
    assert model.encoder.layers[0].self_attention.in_proj_weight.grad is not None


# Towers of timm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mlp_layer": "SwiGLU", "drop_path_rate": 0.5},
        {"global_pool": "map", "norm_layer": "rmsnorm"},
        {"scale_mlp_norm": True},
    ],
    ids=str,
)
def test_a_timm_model_inside(options: dict[str, Any]) -> None:
    layers = pytest.importorskip("timm.layers")
    if "mlp_layer" in options:
        options = {**options, "mlp_layer": getattr(layers, options["mlp_layer"])}
    model = drawn(Wrapped(**options))
    model.train()
    theirs = model.vit
    report = hold(model, lambda m: m(IMAGES.repeat(4, 1, 1, 1)))
    assert report.swapped == ("vit",)
    assert model.vit is theirs


def test_a_segmentation_model() -> None:
    model, images = drawn(Segmentation()), torch.randn(2, 3, 32, 32).double()
    report = hold(model, lambda m: m(images))
    assert report.swapped == ("backbone.model",)
    accelerate(model)
    assert isinstance(model.backbone.model, Tower)
    # Parts that a ViT of ours is made without, as segmentation models use them.
    vit = model.backbone.model
    tokens = vit._pos_embed(vit.patch_embed(images))
    assert tokens.shape == (2, 17, 48)
    with pytest.raises(ConvertError, match="restore that one"):
        restore(vit)
    # Training goes on in either.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().mean().backward()
    optimizer.step()
    after = model(images)
    restore(model)
    assert torch.allclose(model(images), after, atol=1e-5)


def test_a_tower_goes_through_to_and_load_state_dict() -> None:
    model = drawn(Wrapped())
    state = {key: value * 0.5 for key, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    plain.load_state_dict(state)
    accelerate(model)
    model.load_state_dict(state, assign=True)
    model.float().double()
    restore(model)
    assert torch.allclose(model(IMAGES), plain(IMAGES), atol=1e-5)
    accelerate(model)
    model.vit.reset_classifier(3)
    with pytest.raises(ConvertError, match=r"head\.bias is \[3\] now, was \[5\]"):
        restore(model)


class Dense(Wrapped):
    """One that takes its backbone apart."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x)


def test_parts_that_only_timm_has_follow_the_tower() -> None:
    model = drawn(Dense(pos_drop_rate=0.5))
    expected = model(IMAGES)
    model.train()
    accelerate(model)
    model.eval()
    assert torch.allclose(model(IMAGES), expected, atol=1e-12)
    halved = {key: value * 0.5 for key, value in model.state_dict().items()}
    model.load_state_dict(halved, assign=True)
    after = model(IMAGES)
    restore(model)
    assert torch.allclose(model(IMAGES), after, atol=1e-12)
    assert not torch.allclose(after, expected)


def test_tables_that_no_state_dict_holds_follow_the_tower() -> None:
    module = pytest.importorskip("timm.models.vision_transformer_relpos")
    model = nn.Sequential(
        module.VisionTransformerRelPos(
            img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=5
        )
    )
    accelerate(model)
    model.double()
    after = model(IMAGES)
    restore(model)
    assert torch.allclose(model(IMAGES), after, atol=1e-12)


def test_what_restoring_would_lose() -> None:
    class LoRA(nn.Linear):
        pass

    for change, text in (
        (lambda vit: vit.register_forward_hook(lambda *_: None), "it has hooks"),
        (lambda vit: setattr(vit.blocks[0].attn.qkv, "__class__", LoRA), "LoRA, not vitkern's"),
    ):
        model = drawn(Wrapped())
        accelerate(model)
        change(model.vit)
        with pytest.raises(ConvertError, match=f"can't be undone: .*{text}"):
            restore(model)


def test_a_tower_that_convert_refuses_runs_block_by_block() -> None:
    model = drawn(Wrapped())
    model.vit.norm.register_forward_hook(lambda *_: None)
    report = hold(model, lambda m: m(IMAGES))
    assert report.swapped == ("vit.blocks.0", "vit.blocks.1")
    assert "has hooks" in str(report)
