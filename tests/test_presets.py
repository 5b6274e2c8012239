"""Names: every ViT of timm, with the arguments, shapes and normalisation that timm gives it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import vitkern
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS, REFUSED

timm = pytest.importorskip("timm")
from timm.models import deit, vision_transformer, vision_transformer_relpos  # noqa: E402

FILES = ("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "deit")
# What VisionTransformerRelPos has for default and ours says otherwise.
RELATIVE = {
    "init_values": 1e-6,
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
    "pos_embed": "none",
    "rel_pos": "mlp",
    "weight_init": "reset",
}

pytestmark = pytest.mark.filterwarnings("ignore:Mapping deprecated model name")


class _Asked(Exception):
    """Instead of a model: what timm's constructor was asked for."""


def asked(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[type[nn.Module], dict[str, Any]]:
    """Class and arguments of timm's model, all of them."""

    def stop(self: nn.Module, *args: Any, **arguments: Any) -> None:
        assert not args
        raise _Asked(type(self), arguments)

    with monkeypatch.context() as patch:
        for module, kind in (
            (vision_transformer, "VisionTransformer"),
            (deit, "VisionTransformerDistilled"),
            (vision_transformer_relpos, "VisionTransformerRelPos"),
        ):
            patch.setattr(getattr(module, kind), "__init__", stop)
        with pytest.raises(_Asked) as caught:
            timm.create_model(name, device="meta")
    return caught.value.args


def plain(config: ViTConfig) -> dict[str, Any]:
    """A config to compare: hidden widths, not the ratios that round to them; three channels."""
    values = dataclasses.asdict(config)
    values["mlp_ratio"] = config.hidden_dim
    for key in ("mean", "std"):
        value = values[key]
        values[key] = tuple(value) if isinstance(value, (tuple, list)) else (value,) * 3
    return values


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_timm_builds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, arguments = asked(name, monkeypatch)
    for key in ("device", "dtype"):
        arguments.pop(key, None)
    ours = ViTConfig.from_name(name)
    if kind.__name__ == "VisionTransformerRelPos":
        arguments = {**RELATIVE, **arguments}
    arguments["distilled"] = kind.__name__ == "VisionTransformerDistilled"
    if "embed_layer" in arguments:  # a backbone that is a module: its shapes are compared below
        assert arguments.pop("embed_layer").func.__name__ == "HybridEmbed"
        arguments["embed_layer"] = ours.embed_layer
        assert ours.embed_layer is not None
    theirs = timm.create_model(name, device="meta", depth=2)
    cfg = theirs.pretrained_cfg
    expected = ViTConfig(**arguments, mean=cfg["mean"], std=cfg["std"])
    assert plain(ours) == plain(expected)
    model = vitkern.create_model(name, device="meta", depth=2)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in theirs.named_parameters()]
    for attribute in (
        *("num_classes", "global_pool", "embed_dim", "num_features", "head_hidden_size"),
        *("num_prefix_tokens", "grad_checkpointing", "feature_info"),
        *("num_reg_tokens", "has_class_token", "no_embed_class", "dynamic_img_size"),
    ):
        if hasattr(theirs, attribute):  # VisionTransformerRelPos lacks some
            assert getattr(model, attribute) == getattr(theirs, attribute), attribute
    assert model.patch_embed.grid_size == theirs.patch_embed.grid_size
    for key, norm in theirs.named_modules():
        if hasattr(norm, "eps") and "Norm" in type(norm).__name__:
            assert model.get_submodule(key).eps == norm.eps, key


def test_every_entry_has_a_preset_or_a_reason() -> None:
    registry = timm.models._registry
    theirs = {name for file in FILES for name in registry._module_to_models[file]}
    theirs |= registry._module_to_models["vision_transformer_sam"]
    assert theirs == PRESETS.keys() | REFUSED.keys()
    assert not PRESETS.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    with pytest.raises(ValueError, match="is not built: ") as caught:
        vitkern.create_model(name)
    assert REFUSED[name] in str(caught.value)
    with pytest.raises(ValueError, match="is not built: "):
        vitkern.create_model(f"{name}.some_tag")


def test_timm_cannot_build_what_is_refused_for_that() -> None:
    for name in [name for name, reason in REFUSED.items() if "timm itself" in reason]:
        with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
            timm.create_model(name, device="meta")


def test_overrides_win_and_other_channels_take_the_average() -> None:
    assert ViTConfig.from_name("deit_tiny_patch16_224", img_size=64).img_size == (64, 64)
    grey = ViTConfig.from_name("deit_tiny_patch16_224", in_chans=1)
    assert grey.mean == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    assert grey.std == pytest.approx((0.229 + 0.224 + 0.225) / 3)
    own = ViTConfig.from_name("deit_tiny_patch16_224", in_chans=2, mean=(0.1, 0.2))
    assert own.mean == (0.1, 0.2)
    assert own.std == pytest.approx((0.229 + 0.224 + 0.225) / 3)
    assert PRESETS["deit_tiny_patch16_224"]["mean"] == (0.485, 0.456, 0.406)  # still


def test_uint8_images_are_normalised_as_the_weights_were_trained() -> None:
    model = vitkern.create_model("deit_tiny_patch16_224", depth=1, img_size=32).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    cfg = timm.get_pretrained_cfg("deit_tiny_patch16_224")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cfg.mean, cfg.std))
    expected = model((images / 255 - mean) / std)
    assert (model(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
