"""Checkpoints of torchvision, Hugging Face and vit-pytorch: the same network, there and back."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkern
from vitkern.checkpoint import load, save, understand
from vitkern.checkpoint._rules import (
    BATCHED,
    STACKED,
    CheckpointError,
    Rule,
    rule,
    to_ours,
    to_theirs,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
IMAGE = {"image_size": [32, 24], "patch_size": 8}
VIT = {**TINY, **IMAGE, "intermediate_size": 80}
SQUARE = {**VIT, "image_size": 32}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 8,
}


TOWER = "vision_model."


def drawn(module: nn.Module) -> nn.Module:
    """Every parameter away from its start: biases that are zero hide a swap."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def images(size: tuple[int, int] = (32, 24), channels: int = 3) -> Tensor:
    return torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(4))


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for rounding: within 1e-6 of the largest."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-6 * max(1.0, theirs.abs().max().item())


def gradients(output: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Of a sum that no symmetry makes vanish, for every parameter that has one."""
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output * weights).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(
    source: nn.Module,
    run: Callable[[Any, Tensor], Tensor],
    given: Any = None,
    x: Tensor | None = None,
    made: tuple[str, ...] = (),
    **overrides: Any,
) -> vitkern.ViT:
    """The model that is loaded has the source's logits, and its gradients under our names.

    made: names of parameters that the source hasn't at all.
    """
    x = images() if x is None else x
    given = dict(source.state_dict()) if given is None else given
    model = load(given, **overrides).eval()
    theirs, ours = run(source, x), model(x)
    close(ours, theirs)
    source.zero_grad()
    expected = gradients(theirs, source)
    found = gradients(ours, model)
    # As a checkpoint of gradients: the same rules take them to our names.
    told = understand(given, **overrides)
    full = {key: expected.get(key, torch.zeros_like(v)) for key, v in source.state_dict().items()}
    as_ours, _ = told.format.translated(
        told.format.prepared(full, told.source.config), dict(told.fields)
    )
    compared = 0
    for name, gradient in found.items():
        if name in as_ours and name not in SHIFTED and not any(part in name for part in made):
            scale = max(1.0, as_ours[name].abs().max().item())
            assert (gradient - as_ours[name]).abs().max() <= 1e-5 * scale, name
            compared += 1
    assert compared >= 10
    return model


# Where two of their tensors make one of ours: a sum, a zero that we add.
SHIFTED = {"cls_token", "pos_embed", "head.bias"}


def back(
    model: vitkern.ViT, path: Path, format: str, theirs: dict[str, Tensor], prefix: str = ""
) -> None:
    """Written again: the same names, the same bits.

    prefix: what transformers 4 has before the names of a tower alone, and 5 reads, too.
    """
    save(model, path, format)
    from safetensors.torch import load_file

    written = load_file(path / "model.safetensors")
    kept = {prefix + key: value for key, value in theirs.items() if not key.startswith("pooler")}
    assert sorted(written) == sorted(kept)
    for key, value in kept.items():
        assert torch.equal(written[key], value), key


def test_rules_are_read_both_ways() -> None:
    """A table, there and back: stacked, with a leading dimension, and by number."""
    rules: tuple[Rule, ...] = (
        rule("blocks.{i}.qkv", "l.{i}.q", "l.{i}.k", "l.{i}.v", view=STACKED),
        rule("pos", "p", view=BATCHED),
    )
    theirs = {f"l.{i}.{n}": torch.randn(2, 3) for i in range(11) for n in "qkv"}
    theirs["p"] = torch.randn(4, 3)
    ours, left = to_ours({**theirs, "x": torch.zeros(1)}, rules, {})
    assert ours["pos"].shape == (1, 4, 3)
    assert list(left) == ["x"]
    assert torch.equal(ours["blocks.10.qkv"][2:4], theirs["l.10.k"])
    again, left = to_theirs(ours, rules, vitkern.ViTConfig())
    assert not left
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)
    del theirs["l.3.v"]
    with pytest.raises(CheckpointError, match=r"l\.3\.q is there, but l\.3\.v is missing"):
        to_ours(theirs, rules, {})


# torchvision


def torchvision_vit(**changes: Any) -> nn.Module:
    from torchvision.models import VisionTransformer

    options: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3}
    options |= {"hidden_dim": 48, "mlp_dim": 80, "num_classes": 7, **changes}
    return drawn(VisionTransformer(**options))


@pytest.mark.parametrize("wide", [None, 20])
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_torchvision(wide: int | None, eps: float, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")

    def norm(dim: int) -> nn.LayerNorm:
        return nn.LayerNorm(dim, eps=eps)

    source = torchvision_vit(representation_size=wide, norm_layer=norm)
    options: dict[str, Any] = {} if eps == 1e-6 else {"norm_layer": ("layernorm", eps)}
    x = images((32, 32))
    model = same(source, lambda m, x: m(x), x=x, num_heads=3, **options)
    assert model.config.representation_size == (wide or 0)
    assert model.config.norm_layer == ("layernorm", eps)
    save(model, tmp_path / "x.pth", "torchvision")
    written = torch.load(tmp_path / "x.pth", weights_only=True)
    assert all(torch.equal(written[key], value) for key, value in source.state_dict().items())
    torchvision_vit(representation_size=wide).load_state_dict(written)


def test_torchvisions_old_names_and_stems() -> None:
    pytest.importorskip("torchvision")
    from torchvision.models.vision_transformer import ConvStemConfig

    source = torchvision_vit()
    old = {
        key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
        for key, value in source.state_dict().items()
    }
    assert any("linear_1" in key for key in old)
    x = images((32, 32))
    close(load(old, num_heads=3).eval()(x), source(x))
    stems = [ConvStemConfig(48, 3, 2), ConvStemConfig(48, 3, 2), ConvStemConfig(48, 3, 2)]
    with pytest.raises(CheckpointError, match="stem"):
        load(torchvision_vit(conv_stem_configs=stems).state_dict())


def test_torchvisions_positions_are_resized_as_there() -> None:
    pytest.importorskip("torchvision")
    from torchvision.models.vision_transformer import interpolate_embeddings

    source = torchvision_vit()
    larger = torchvision_vit(image_size=48)
    state: Any = dict(source.state_dict())
    larger.load_state_dict(interpolate_embeddings(48, 8, state))
    x = images((48, 48))
    close(load(source.state_dict(), num_heads=3, img_size=48).eval()(x), larger(x))


# Hugging Face


def logits(model: Any, x: Tensor) -> Tensor:
    return model(x).logits


def first(model: Any, x: Tensor) -> Tensor:
    """The class token behind the norm."""
    return model(x).last_hidden_state[:, 0]


def pooled(model: Any, x: Tensor) -> Tensor:
    return model(x).pooler_output


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path


def files(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


VITS = [
    ("ViTForImageClassification", "ViTConfig", {"num_labels": 5}, logits),
    ("ViTForImageClassification", "ViTConfig", {"num_labels": 5, "qkv_bias": False}, logits),
    ("ViTModel", "ViTConfig", {"num_channels": 4}, first),
    ("DeiTForImageClassification", "DeiTConfig", {"num_labels": 5}, logits),
    ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {"num_labels": 5}, logits),
    ("DeiTModel", "DeiTConfig", {}, first),
    ("IJepaForImageClassification", "IJepaConfig", {"num_labels": 5}, logits),
]


@pytest.mark.parametrize("act", ["gelu", "relu"])
@pytest.mark.parametrize(("name", "config", "options", "run"), VITS, ids=[v[0] for v in VITS])
def test_vit_of_hugging_face(
    hf: Any, tmp_path: Path, name: str, config: str, options: Any, run: Any, act: str
) -> None:
    """From a folder, in the spelling of files, and in memory; and written again."""
    settings = getattr(hf, config)(**VIT, layer_norm_eps=1e-3, hidden_act=act, **options)
    source = drawn(getattr(hf, name)(settings))
    x = images(channels=settings.num_channels)
    folder = saved(source, tmp_path / "theirs")
    model = same(source, run, folder, x)
    assert model.config.norm_layer == ("layernorm", 1e-3)
    assert model.config.act_layer == act
    facts = {"img_size": (32, 24), "num_heads": 3, "norm_layer": ("layernorm", 1e-3)}
    told = {**facts, "act_layer": act}
    close(load(source.state_dict(), **told).eval()(x), run(source, x))  # the spelling in memory
    back(model, tmp_path / "ours", "huggingface", files(folder))
    again = getattr(hf, name).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(run(again, x), run(source, x))


def test_relatives_of_vit(hf: Any, tmp_path: Path) -> None:
    """MSN, whose files mix two spellings; MAE, whose decoder is dropped; I-JEPA's trunk."""
    msn = drawn(hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**VIT, num_labels=5)))
    model = same(msn, logits, saved(msn, tmp_path / "msn"))
    assert model.config.norm_layer == ("layernorm", 1e-6)
    config = tmp_path / "msn" / "config.json"
    config.write_text(config.read_text().replace("layer_norm_eps", "nothing"))
    assert load(tmp_path / "msn").config.norm_layer == ("layernorm", 1e-6)  # unlike ViT's
    decoder = {f"decoder_{key}": value for key, value in VIT.items() if key in TINY}
    settings = hf.ViTMAEConfig(**SQUARE, **decoder, decoder_intermediate_size=40, mask_ratio=0.0)
    mae = drawn(hf.ViTMAEForPreTraining(settings))
    found = understand(saved(mae, tmp_path / "mae"))
    assert any(key.startswith("decoder") for key in found.dropped)
    order = torch.linspace(0, 1, 16).expand(3, -1)  # nothing masked, nothing shuffled
    x = images((32, 32))
    close(load(tmp_path / "mae").eval()(x), mae.vit(x, noise=order).last_hidden_state[:, 0])
    simmim = hf.ViTForMaskedImageModeling(hf.ViTConfig(**SQUARE, encoder_stride=8))
    dropped = understand(simmim.state_dict(), num_heads=3).dropped
    assert sorted(dropped) == ["decoder.0.bias", "decoder.0.weight", "embeddings.mask_token"]
    jepa = drawn(hf.IJepaModel(hf.IJepaConfig(**VIT)))
    tokens = load(saved(jepa, tmp_path / "jepa")).eval().forward_features(images())
    close(tokens, jepa(images()).last_hidden_state)


def test_vit_without_its_config(hf: Any, tmp_path: Path) -> None:
    """eps is theirs, and it is said that nothing told it."""
    source = drawn(hf.ViTForImageClassification(hf.ViTConfig(**SQUARE, num_labels=5)))
    saved(source, tmp_path)
    assert not understand(tmp_path).assumed
    (tmp_path / "config.json").unlink()
    found = understand(tmp_path / "model.safetensors", num_heads=3)
    assert found.config.norm_layer == ("layernorm", 1e-12)
    assert "norm_layer" in found.assumed
    assert "num_heads" not in found.assumed
    x = images((32, 32))
    close(load(tmp_path / "model.safetensors", num_heads=3).eval()(x), source(x).logits)
    wide = {**SQUARE, "hidden_size": 128, "num_attention_heads": 2}
    plain = hf.ViTModel(hf.ViTConfig(**wide))
    with pytest.warns(UserWarning, match="num_heads=2"):
        model = load(plain.state_dict())
    assert model.config.num_heads == 2


def test_vit_whose_heads_are_wider(hf: Any, tmp_path: Path) -> None:
    """Only transformers 5 has head_dim, so this is read and not written."""
    source = drawn(hf.ViTForImageClassification(hf.ViTConfig(**SQUARE, head_dim=20)))
    model = same(source, logits, saved(source, tmp_path), images((32, 32)))
    assert model.config.dim_head == 20


def test_pooler_is_dropped_with_a_reason(hf: Any) -> None:
    source = hf.ViTModel(hf.ViTConfig(**SQUARE))
    found = understand(source.state_dict(), num_heads=3)
    assert sorted(found.dropped) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert "class token" in found.dropped["pooler.dense.bias"]


def test_images_are_normalised_as_the_processor_says(hf: Any, tmp_path: Path) -> None:
    source = hf.ViTModel(hf.ViTConfig(**SQUARE))
    saved(source, tmp_path)
    assert load(tmp_path).config.mean == (0.5, 0.5, 0.5)
    text = '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    (tmp_path / "preprocessor_config.json").write_text(text)
    config = load(tmp_path).config
    assert config.mean == (0.1, 0.2, 0.3)
    assert config.std == (0.4, 0.5, 0.6)
    (tmp_path / "preprocessor_config.json").write_text(text[:-1] + ', "do_normalize": false}')
    assert load(tmp_path).config.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("mean", [(0.1, 0.2, 0.3), 0.4])
@pytest.mark.parametrize("format", ["huggingface", "huggingface-dinov2", "huggingface-clip"])
def test_the_processor_makes_images_as_the_model_does(
    hf: Any, tmp_path: Path, format: str, mean: Any
) -> None:
    """Of bytes that need no resizing; and of an image that does, the right size."""
    model = vitkern.ViT(
        img_size=32 if "clip" in format else (32, 24),
        patch_size=8,
        embed_dim=48,
        depth=1,
        num_heads=3,
        num_classes=0,
        init_values=1.0 if "dinov2" in format else None,
        pre_norm="clip" in format,
        mean=mean,
        std=0.25,
    ).eval()
    save(model, tmp_path, format)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path)
    raw = torch.randint(0, 256, (2, *model.config.img_size, 3), dtype=torch.uint8)
    pixels = processor(list(raw.numpy()), return_tensors="pt").pixel_values
    close(model(pixels), model(raw))
    large = torch.zeros(50, 70, 3, dtype=torch.uint8).numpy()
    assert processor(large, return_tensors="pt").pixel_values.shape[2:] == model.config.img_size


RESIZED = ["ViT", "DeiT", "IJepa", "Dinov2", "Dinov2WithRegisters", "CLIPVision", "SiglipVision"]


@pytest.mark.parametrize("kind", [*RESIZED, "Beit"])
def test_positions_of_hugging_face_are_resized_as_there(hf: Any, tmp_path: Path, kind: str) -> None:
    """To a larger image that isn't square, at once and for each image."""
    sizes: dict[str, Any] = dict(SQUARE)
    options = {"interpolate_pos_encoding": True}
    if kind.startswith("Dino"):
        sizes, options = {**sizes, "mlp_ratio": 2}, {}
    if kind == "Beit":
        sizes, options = {**sizes, "use_absolute_position_embeddings": True}, {}
    source = drawn(getattr(hf, kind + "Model")(getattr(hf, kind + "Config")(**sizes)))
    x = images((48, 40))
    found = source(x, **options)
    tower = kind.endswith("Vision") or kind == "Beit"
    expected = found.pooler_output if tower else found.last_hidden_state
    model = load(saved(source, tmp_path), img_size=(48, 40)).eval()
    close(model(x) if tower else model.forward_features(x), expected)
    dynamic = load(tmp_path, dynamic_img_size=True).eval()
    close(dynamic(x) if tower else dynamic.forward_features(x), expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_of_hugging_face(hf: Any, tmp_path: Path, kind: str, gated: bool) -> None:
    """Backbone exact; a classifier on two kinds of tokens is dropped."""
    options = {**TINY, **IMAGE, "image_size": 32, "layer_norm_eps": 1e-3, "mlp_ratio": 3}
    settings = getattr(hf, kind + "Config")(**options, use_swiglu_ffn=gated, num_labels=5)
    source = drawn(getattr(hf, kind + "Model")(settings))
    x = images((32, 32))
    folder = saved(source, tmp_path / "theirs")
    model = same(source, pooled, folder, x)
    assert model.config.norm_layer == ("layernorm", 1e-3)
    assert model.config.act_layer == ("silu" if gated else "gelu")
    close(model.forward_features(x), source(x).last_hidden_state)
    facts = {"norm_layer": ("layernorm", 1e-3), "num_heads": 3}
    close(load(source.state_dict(), **facts).eval()(x), pooled(source, x))
    save(model, tmp_path / "ours", "huggingface-dinov2")
    again = getattr(hf, kind + "Model").from_pretrained(tmp_path / "ours").eval()
    close(again(x).last_hidden_state, source(x).last_hidden_state)
    assert sorted(files(tmp_path / "ours")) == sorted(files(folder))
    changed = {"embeddings.mask_token"}
    if "Registers" in kind:  # their sum is what the network sees
        changed |= {"embeddings.cls_token", "embeddings.position_embeddings"}
    for key, value in files(tmp_path / "ours").items():
        assert key in changed or torch.equal(value, files(folder)[key]), key
    classifier = drawn(getattr(hf, kind + "ForImageClassification")(settings))
    found = understand(classifier.state_dict(), num_heads=3)
    assert found.config.num_classes == 0
    assert "2 D wide" in found.dropped["classifier.weight"]


@pytest.mark.parametrize(
    "options",
    [
        {"use_relative_position_bias": True},
        {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0},
        {"use_absolute_position_embeddings": True, "use_mean_pooling": False},
        {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["Beit", "Data2VecVision"])
def test_beit_of_hugging_face(hf: Any, tmp_path: Path, kind: str, options: Any) -> None:
    """Tables of each block or of all, absolute positions, both pools, keys without a bias."""
    settings = {**SQUARE, "layer_norm_eps": 1e-3, "num_labels": 5, "drop_path_rate": 0.0}
    config = getattr(hf, kind + "Config")(**settings, **options)
    source = drawn(getattr(hf, kind + "ForImageClassification")(config))
    x = images((32, 32))
    model = same(source, logits, saved(source, tmp_path), x)
    assert model.config.norm_layer == ("layernorm", 1e-3)
    mean = config.use_mean_pooling
    assert model.config.global_pool == ("avg" if mean else "token")
    facts = {"num_heads": 3, "norm_layer": ("layernorm", 1e-3)}
    close(load(source.state_dict(), **facts).eval()(x), logits(source, x))


def test_beits_that_are_refused(hf: Any, tmp_path: Path) -> None:
    both = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
    twice = hf.BeitModel(hf.BeitConfig(**SQUARE, **both))
    with pytest.raises(CheckpointError, match="two tables"):
        load(twice.state_dict())
    oblong = hf.BeitModel(hf.BeitConfig(**VIT, use_relative_position_bias=True))
    with pytest.raises(CheckpointError, match="square"):
        load(saved(oblong, tmp_path))


def test_clip_of_hugging_face(hf: Any, tmp_path: Path) -> None:
    settings = {**SQUARE, "layer_norm_eps": 1e-3, "projection_dim": 12}
    tower = drawn(hf.CLIPVisionModel(hf.CLIPVisionConfig(**settings)))
    x = images((32, 32))
    model = same(tower, pooled, saved(tower, tmp_path / "tower"), x)
    assert model.config.act_layer == "quick_gelu"
    assert model.config.pre_norm
    back(model, tmp_path / "ours", "huggingface-clip", files(tmp_path / "tower"), TOWER)
    again = hf.CLIPVisionModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(pooled(again, x), pooled(tower, x))
    named = {f"vision_model.{key}": v for key, v in tower.state_dict().items()}  # transformers 4
    named["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    facts = {"num_heads": 3, "norm_layer": ("layernorm", 1e-3)}
    close(load(named, **facts).eval()(x), pooled(tower, x))

    def projected(model: Any, x: Tensor) -> Tensor:
        return model(x).image_embeds

    whole = drawn(hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**settings)))
    model = same(whole, projected, saved(whole, tmp_path / "whole"), x)
    assert model.config.num_classes == 12
    assert not model.head.bias.any()
    back(model, tmp_path / "projected", "huggingface-clip", files(tmp_path / "whole"))
    again = hf.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "projected").eval()
    assert torch.equal(projected(again, x), projected(whole, x))
    with torch.no_grad():
        model.head.bias.fill_(1)
    with pytest.raises(CheckpointError, match=r"head\.bias"):
        save(model, tmp_path / "biased", "huggingface-clip")


def test_clip_with_text_and_with_classes(hf: Any, tmp_path: Path) -> None:
    settings = hf.CLIPConfig(
        vision_config={**SQUARE, "hidden_act": "gelu"}, text_config=TEXT, projection_dim=12
    )
    both = drawn(hf.CLIPModel(settings))
    x = images((32, 32))

    def features(model: Any, x: Tensor) -> Tensor:
        found = model.get_image_features(x)
        return found if isinstance(found, Tensor) else found.pooler_output

    model = same(both, features, saved(both, tmp_path / "both"), x)
    assert model.config.act_layer == "gelu"
    dropped = understand(tmp_path / "both").dropped
    assert "logit_scale" in dropped
    assert all("text" in why for why in dropped.values())
    settings.num_labels = 5
    classes = drawn(hf.CLIPForImageClassification(settings))
    model = same(classes, logits, saved(classes, tmp_path / "classes"), x)
    assert model.config.global_pool == "avg"
    assert not model.config.final_norm


def test_siglip_of_hugging_face(hf: Any, tmp_path: Path) -> None:
    settings = {**SQUARE, "layer_norm_eps": 1e-3}
    tower = drawn(hf.SiglipVisionModel(hf.SiglipVisionConfig(**settings)))
    x = images((32, 32))
    model = same(tower, pooled, saved(tower, tmp_path / "tower"), x)
    assert model.config.act_layer == "gelu_tanh"
    assert model.config.global_pool == "map"
    close(model.forward_features(x), tower(x).last_hidden_state)
    back(model, tmp_path / "ours", "huggingface-siglip", files(tmp_path / "tower"), TOWER)
    again = hf.SiglipVisionModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(pooled(again, x), pooled(tower, x))
    bare = drawn(hf.SiglipVisionModel(hf.SiglipVisionConfig(**settings, vision_use_head=False)))
    close(load(saved(bare, tmp_path / "bare")).eval()(x), bare(x).last_hidden_state)
    text = {**TEXT, "projection_size": 48}
    config = hf.SiglipConfig(vision_config=SQUARE, text_config=text)
    both = drawn(hf.SiglipModel(config))
    close(load(saved(both, tmp_path / "both")).eval()(x), pooled(both.vision_model, x))
    config.num_labels = 5
    classes = drawn(hf.SiglipForImageClassification(config))
    same(classes, logits, saved(classes, tmp_path / "classes"), x)


def test_what_a_config_leaves_out_is_its_class_default(hf: Any, tmp_path: Path) -> None:
    """Files on the hub have a vision_config of nothing but its kind."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    text = {**TEXT, "projection_size": 48}
    both = drawn(hf.SiglipModel(hf.SiglipConfig(vision_config=sizes, text_config=text)))
    saved(both, tmp_path)
    sparse = '{"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}'
    (tmp_path / "config.json").write_text(sparse)
    model = load(tmp_path).eval()
    assert model.config.num_heads == 12
    assert model.config.act_layer == "gelu_tanh"
    x = images((224, 224))
    close(model(x), pooled(both.vision_model, x))


def test_aimv2_of_hugging_face(hf: Any, tmp_path: Path) -> None:
    settings = {**SQUARE, "rms_norm_eps": 1e-3, "use_head": False}
    tower = drawn(hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**settings)))
    x = images((32, 32))
    model = same(tower, lambda m, x: m(x).last_hidden_state.mean(1), saved(tower, tmp_path), x)
    assert model.config.norm_layer == ("rmsnorm", 1e-3)
    headed = hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**{**settings, "use_head": True}))
    assert "head.cls_token" in understand(headed.state_dict(), num_heads=3).dropped
    vision = {**settings, "use_head": True}
    both = hf.Aimv2Model(hf.Aimv2Config(vision_config=vision, text_config=TEXT))
    dropped = understand(saved(both, tmp_path / "both")).dropped
    assert "text" in dropped["text_projection.weight"]
    assert "visual_projection.weight" in dropped
    native = hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**settings, is_native=True))
    with pytest.raises(CheckpointError, match="native"):
        load(native.state_dict())


def test_what_is_no_vit_of_hugging_face(hf: Any, tmp_path: Path) -> None:
    yolos = hf.YolosModel(hf.YolosConfig(**VIT))
    with pytest.raises(CheckpointError, match="YOLOS"):
        load(yolos.state_dict())
    odd = hf.ViTModel(hf.ViTConfig(**SQUARE, hidden_act="mish"))
    with pytest.raises(CheckpointError, match="'mish'"):
        load(saved(odd, tmp_path / "odd"))
    swin = hf.SwinModel(hf.SwinConfig(image_size=32, embed_dim=12, depths=[1], num_heads=[2]))
    with pytest.raises(CheckpointError, match="no ViT that vitkern knows"):
        load(swin.state_dict())
    text = hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT))
    with pytest.raises(CheckpointError, match="no ViT that vitkern knows"):
        load(text.state_dict())


def test_a_missing_and_an_extra_tensor(hf: Any, tmp_path: Path) -> None:
    source = hf.ViTModel(hf.ViTConfig(**SQUARE))
    state = dict(source.state_dict())
    with pytest.raises(CheckpointError, match="adapter"):
        load({**state, "adapter.weight": torch.zeros(3)}, num_heads=3)
    del state["layers.1.attention.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.k_proj\.weight is missing"):
        load(state, num_heads=3)
    saved(source, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"hidden_size": 48', '"hidden_size": 64'))
    with pytest.raises(CheckpointError, match="hidden_size=64"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("format", "options", "reason"),
    [
        ("huggingface", {"init_values": 1e-5}, "init_values"),
        ("huggingface", {"reg_tokens": 4}, "reg_tokens"),
        ("huggingface", {"global_pool": "avg"}, "global_pool"),
        ("huggingface", {"norm_layer": "rmsnorm"}, "norm_layer"),
        ("huggingface", {"dim_head": 20}, "dim_head"),
        ("huggingface-dinov2", {"num_classes": 0}, "LayerScale"),
        ("huggingface-dinov2", {"init_values": 1.0}, "num_classes"),
        ("huggingface-clip", {}, "pre_norm"),
        ("huggingface-clip", {"img_size": (16, 24)}, "img_size"),
        ("huggingface-siglip", {"num_classes": 0}, "global_pool|class_token"),
        ("huggingface-aimv2", {}, "read"),
        ("huggingface-beit", {}, "read"),
        ("vit-pytorch", {}, "norm_layer"),
        ("torchvision", {"qkv_bias": False}, "qkv_bias"),
    ],
)
def test_a_network_that_a_library_has_not(
    tmp_path: Path, format: str, options: Any, reason: str
) -> None:
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = vitkern.ViT(**{**size, "num_classes": 3, **options})
    with pytest.raises(ValueError, match=reason):
        save(model, tmp_path / "x.pt", format)


# vit-pytorch


def vit_pytorch_vit(**changes: Any) -> nn.Module:
    package = pytest.importorskip("vit_pytorch")
    options: dict[str, Any] = {"image_size": (32, 24), "patch_size": 8, "num_classes": 7}
    options |= {"dim": 48, "depth": 2, "heads": 3, "mlp_dim": 80, "dim_head": 20}
    return drawn(package.ViT(**{**options, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "mean"},
        {"heads": 1, "dim_head": 48},
        {"heads": 1, "dim_head": 24},
        {"channels": 1},
        {"num_classes": 0},
        {"dim_head": 16},
    ],
    ids=str,
)
def test_vit_pytorch(changes: Any, tmp_path: Path) -> None:
    source = vit_pytorch_vit(**changes)
    x = images(channels=changes.get("channels", 3))
    identity = changes == {"heads": 1, "dim_head": 48}
    heads = {} if identity else {"num_heads": changes.get("heads", 3)}

    def run(model: Any, x: Tensor) -> Tensor:
        return model(x) if model.mlp_head is not None else model(x)[:, 0]

    made = ("attn.proj",) if identity else ()
    model = same(source, run, x=x, made=made, img_size=(32, 24), **heads)
    assert model.config.dim_head == (
        None if model.config.inner_dim == 48 else changes.get("dim_head", 20)
    )
    assert model.config.class_token == (changes.get("pool") != "mean")
    save(model, tmp_path / "x.pt", "vit-pytorch")
    written = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(written[key], value) for key, value in source.state_dict().items())
    vit_pytorch_vit(**changes).load_state_dict(written)
    if identity:
        with torch.no_grad():
            model.blocks[1].attn.proj.bias[3] = 1
        with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.proj"):
            save(model, tmp_path / "x.pt", "vit-pytorch")


def test_vit_pytorch_of_patches_that_are_no_squares() -> None:
    source = vit_pytorch_vit(image_size=(32, 32), patch_size=(8, 4))
    with pytest.raises(CheckpointError, match="patch_size"):
        load(source.state_dict(), num_heads=3)
    x = images((32, 32))
    model = load(source.state_dict(), num_heads=3, patch_size=(8, 4), img_size=32).eval()
    close(model(x), source(x))


def test_vit_pytorchs_heads_are_64_wide_by_default() -> None:
    source = vit_pytorch_vit(image_size=32, heads=2, dim_head=64)
    found = understand(source.state_dict())
    assert found.config.num_heads == 2
    assert found.config.dim_head == 64
    assert "num_heads" in found.assumed
    x = images((32, 32))
    close(load(source.state_dict()).eval()(x), source(x))


class Older(nn.Module):
    """vit-pytorch's ViT as it was: its function, of today's parts, under names of `era`."""

    def __init__(self, era: int, pool: str) -> None:
        super().__init__()
        self.net, self.era, self.pool = vit_pytorch_vit(image_size=32), era, pool

    def forward(self, x: Tensor) -> Tensor:
        net: Any = self.net
        patches = net.to_patch_embedding[0](x)
        if self.era == 0:
            tokens = net.to_patch_embedding[2](patches)
        else:
            tokens = net.to_patch_embedding[1:](patches)
        tokens = torch.cat([net.cls_token.expand(len(x), -1, -1), tokens], 1) + net.pos_embedding
        for attention, feedforward in net.transformer.layers:
            tokens = attention(tokens) + tokens
            tokens = feedforward(tokens) + tokens
        if self.era == 2:
            tokens = net.transformer.norm(tokens)
        tokens = tokens.mean(1) if self.pool == "mean" else tokens[:, 0]
        return net.mlp_head(tokens if self.era == 2 else net.transformer.norm(tokens))

    def named(self) -> dict[str, Tensor]:
        """0: of 2020, a residual around PreNorm; 1: of early 2023; 2: of 2024."""
        found = {}
        for key, value in self.net.state_dict().items():
            if key in ("cls_token", "pos_embedding"):
                value = value[None]
            if self.era < 2:
                key = key.replace("mlp_head.", "mlp_head.1.")
                key = key.replace("transformer.norm.", "mlp_head.0.")
                key = key.replace(".1.net.0.", ".1.norm.").replace(".1.net.1.", ".1.fn.net.0.")
                key = key.replace(".1.net.4.", ".1.fn.net.3.")
                key = key.replace(".0.to_", ".0.fn.to_")
            if self.era == 0:
                if key.startswith(("to_patch_embedding.1.", "to_patch_embedding.3.")):
                    continue
                key = key.replace("to_patch_embedding.2", "to_patch_embedding.1")
                key = key.replace(".0.fn.", ".0.fn.fn.").replace(".1.fn.", ".1.fn.fn.")
                key = key.replace(".0.norm.", ".0.fn.norm.").replace(".1.norm.", ".1.fn.norm.")
            found[key] = value
        return found


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("era", [0, 1, 2])
def test_older_vit_pytorch(era: int, pool: str) -> None:
    source = Older(era, pool)
    mean = {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": era < 2}
    model = load(source.named(), num_heads=3, **(mean if pool == "mean" else {})).eval()
    assert model.config.patch_norm == (era > 0)
    x = images((32, 32))
    close(model(x), source(x))


def test_what_is_no_vit_of_vit_pytorch() -> None:
    package = pytest.importorskip("vit_pytorch")
    options: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 48}
    simple = package.SimpleViT(**options, depth=1, heads=2, mlp_dim=64)
    with pytest.raises(CheckpointError, match="SimpleViT"):
        load(simple.state_dict())
    state = dict(vit_pytorch_vit().state_dict())
    state["patch_to_embedding.weight"] = state.pop("to_patch_embedding.2.weight")
    with pytest.raises(CheckpointError, match=r"0\.7"):
        load(state)
