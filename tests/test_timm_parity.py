"""vitkern.ViT against timm's VisionTransformer with the same weights: logits and gradients."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

import vitkern
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS, REFUSED

timm = pytest.importorskip("timm")
from timm.layers import (  # noqa: E402
    GELUTanh,
    Mlp,
    QuickGELU,
    RmsNorm,
    SwiGLU,
    SwiGLUPacked,
    resample_abs_pos_embed,
)
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from benchmarks import _names  # noqa: E402
from benchmarks._names import (  # noqa: E402
    Row,
    compare,
    error,
    main,
    read,
    representative,
    twins,
)

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}
DROP_ALL = {
    "drop_rate": 0.2,
    "pos_drop_rate": 0.2,
    "proj_drop_rate": 0.2,
    "attn_drop_rate": 0.2,
    "drop_path_rate": 0.4,
}

# (name, constructor arguments, then the shape of the images where it is not 3, 3, 32, 32)
CASES: list[tuple[Any, ...]] = [
    ("default", {}),
    ("no_class_token", {"class_token": False, "global_pool": "avg"}),
    ("registers", {"reg_tokens": 3}),
    ("registers_only", {"reg_tokens": 2, "class_token": False, "global_pool": "max"}),
    ("no_embed_class", {"no_embed_class": True, "reg_tokens": 2}),
    ("no_positions", {"pos_embed": "none", "pos_drop_rate": 0.3}),
    ("no_prefix_no_positions", {"pos_embed": "", "class_token": False, "global_pool": "avg"}),
    ("layer_scale", {"init_values": 0.1}),
    ("drop_path", {"drop_path_rate": 0.5}),
    ("layer_scale_drop_path", {"init_values": 0.1, "drop_path_rate": 0.5}),
    ("dropouts", DROP_ALL),
    ("dropouts_everything", {**DROP_ALL, "init_values": 1.0, "qk_norm": True}),
    ("no_qkv_bias", {"qkv_bias": False}),
    ("no_proj_bias", {"proj_bias": False}),
    ("qk_norm", {"qk_norm": True}),
    ("pre_norm", {"pre_norm": True}),
    ("mlp_ratio", {"mlp_ratio": 2.7}),
    ("gelu", {"act_layer": nn.GELU}),
    ("gelu_tanh", {"act_layer": "gelu_tanh"}),
    ("gelu_tanh_class", {"act_layer": GELUTanh}),
    ("gelu_tanh_partial", {"act_layer": functools.partial(nn.GELU, approximate="tanh")}),
    ("quick_gelu", {"act_layer": QuickGELU}),
    ("relu", {"act_layer": "relu"}),
    ("silu", {"act_layer": nn.SiLU}),
    ("mlp_class", {"mlp_layer": Mlp}),
    ("swiglu", {"mlp_layer": SwiGLU, "act_layer": nn.SiLU}),
    ("swiglu_gelu", {"mlp_layer": SwiGLU, "proj_drop_rate": 0.2}),
    ("swiglu_packed", {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}),
    ("swiglu_packed_gelu", {"mlp_layer": SwiGLUPacked, "proj_bias": False}),
    ("pool_avg", {"global_pool": "avg"}),
    ("pool_avgmax", {"global_pool": "avgmax"}),
    ("pool_max", {"global_pool": "max"}),
    ("pool_none", {"global_pool": ""}),
    ("pool_map", {"global_pool": "map"}),
    ("pool_map_fc_norm", {"global_pool": "map", "fc_norm": True, "act_layer": "gelu_tanh"}),
    ("pool_map_prefix", {"global_pool": "map", "pool_include_prefix": True}),
    ("fc_norm", {"fc_norm": True}),
    ("avg_no_fc_norm", {"global_pool": "avg", "fc_norm": False}),
    ("no_final_norm", {"final_norm": False}),
    ("avg_no_final_norm", {"final_norm": False, "global_pool": "avg"}),
    ("pool_include_prefix", {"global_pool": "avg", "pool_include_prefix": True}),
    ("rmsnorm", {"norm_layer": RmsNorm, "qk_norm": True, "global_pool": "map"}),
    ("rmsnorm_name", {"norm_layer": "rmsnorm", "pre_norm": True}),
    ("norm_eps", {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-3)}),
    ("norm_torch", {"norm_layer": nn.LayerNorm}),
    ("dynamic_same", {"dynamic_img_size": True}),
    ("dynamic_larger", {"dynamic_img_size": True}, 2, 3, 48, 40),
    (
        "dynamic_no_embed_class",
        {"dynamic_img_size": True, "no_embed_class": True, "reg_tokens": 1},
        *(2, 3, 24, 40),
    ),
    ("dynamic_no_positions", {"dynamic_img_size": True, "pos_embed": "none"}, 2, 3, 24, 24),
    ("dynamic_pad", {"dynamic_img_size": True, "dynamic_img_pad": True}, 2, 3, 27, 41),
    ("pad_alone", {"dynamic_img_pad": True}),
    ("rectangle", {"img_size": (48, 32), "patch_size": (8, 16)}, 2, 3, 48, 32),
    ("patch14", {"img_size": 42, "patch_size": 14}, 2, 3, 42, 42),
    ("remainder", {"img_size": (37, 33)}, 2, 3, 37, 33),
    ("features", {"num_classes": 0}),
    ("grey", {"in_chans": 1}, 2, 1, 32, 32),
    ("batch_of_one", {}, 1, 3, 32, 32),
    ("empty_batch", {"drop_path_rate": 0.5}, 0, 3, 32, 32),
    ("fix_init", {"fix_init": True}),
]


def pair(**arguments: Any) -> tuple[VisionTransformer, vitkern.ViT]:
    """timm's model and ours with the same generic weights, loaded strictly both ways."""
    torch.manual_seed(0)
    arguments = {**SMALL, **arguments}
    theirs, ours = VisionTransformer(**arguments), vitkern.ViT(**arguments)
    with torch.no_grad():
        for p in theirs.parameters():  # nothing stays at a special start such as 0 or 1
            p.copy_(p + torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.1))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    return theirs, ours


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance=1e-5) -> None:
    assert ours.shape == theirs.shape, what
    assert ours.dtype == theirs.dtype, what
    error = (ours.double() - theirs.double()).norm()
    assert error <= tolerance * theirs.double().norm(), (
        f"{what}: {error / theirs.double().norm():.2e}"
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """By name; those of the q and k norms as one, as a key's shift has no effect on a softmax."""
    found: dict[str, torch.Tensor | None] = {}
    for name, p in model.named_parameters():
        if name.endswith("k_norm.bias"):
            partner = model.get_parameter(name.replace("k_norm", "q_norm"))
            found[name] = torch.cat([p.grad, partner.grad])
        else:
            found[name] = p.grad
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_logits_and_gradients_are_timms(case: tuple[Any, ...], training: bool) -> None:
    _, arguments, *shape = case
    theirs, ours = pair(**arguments)
    images = torch.randn(shape or (3, 3, 32, 32))
    results = []
    for model in (theirs, ours):
        model.train(training)
        torch.manual_seed(3)
        x = images.clone().requires_grad_()
        out = model(x)
        after = torch.rand(())  # as many random numbers were drawn
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        (out * weights).sum().backward()
        results.append((out.detach(), x.grad, after, gradients(model)))
    (their_out, their_dx, their_after, their_grads), (out, dx, after, grads) = results
    assert_close(out, their_out, "logits")
    assert_close(dx, their_dx, "images")
    assert after == their_after
    assert grads.keys() == their_grads.keys()
    for name, expected in their_grads.items():
        if expected is None:
            assert grads[name] is None, name
        else:
            assert_close(grads[name], expected, name)


THIRD = representative()


def slim(name: str) -> dict[str, Any]:
    """What makes the model `name` small and leaves its kind: its heads 16 wide, ten classes."""
    config = ViTConfig.from_name(name)
    classes = {"num_classes": min(10, config.num_classes)}
    if config.embed_layer and config.embed_layer[0] == "conv_stem":  # its width is the model's
        return classes
    return {"embed_dim": 16 * config.num_heads, **classes}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore:Mapping deprecated model name")
def test_every_name_is_timms_model(name: str) -> None:
    gradients = not PRESETS[name].get("embed_layer") or name in THIRD  # a backbone isn't slim
    row = compare(name, gradients=gradients, depth=2, **slim(name))
    assert row.equal, row
    assert gradients == (row.gradients is not None)


def test_a_difference_is_seen() -> None:
    theirs, ours = twins("test_vit2", depth=2, img_size=(80, 112))
    images = torch.randn(2, 3, 80, 112)
    assert error(ours(images), theirs(images)) <= 1e-5
    ours.blocks[1].norm2.eps = 1e-5  # for 1e-6
    assert error(ours(images), theirs(images)) > 1e-6
    ours.blocks[1].norm2.eps = 1e-6
    with torch.no_grad():  # the storage is shared, the parameter is not
        ours.blocks[0].ls1.gamma = nn.Parameter(ours.blocks[0].ls1.gamma * 1.001)
    assert error(ours(images), theirs(images)) > 1e-5
    assert error(ours(images)[:, :3], theirs(images)) == math.inf
    assert error(theirs(images) * math.nan, theirs(images)) == math.inf


def test_a_third_of_all_kinds_has_its_gradients_compared() -> None:
    chosen = representative()
    assert len(chosen) >= len(PRESETS) / 3
    assert {"test_vit", "vit_base_r50_s16_224", "vit_dwee_patch16_reg1_gap_256"} <= chosen
    assert "vit_base_mci_224" in chosen


def test_the_table_is_kept_and_read_again(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "timm.md"
    assert main(["test_vit", "samvit_base_patch16"], 1, False, path) == 0
    before = read(path)
    assert before["samvit_base_patch16"].refused == REFUSED["samvit_base_patch16"]
    assert before["test_vit"].equal
    assert before["test_vit"].blocks == "1 of 6"
    capsys.readouterr()
    assert main(["test_vit*"], 1, False, path, missing=True) == 0
    assert "\ntest_vit  " not in capsys.readouterr().out
    after = read(path)
    assert after["test_vit"] == before["test_vit"]
    assert len(after) == 6
    assert (
        "5 of 5 built are equal (100.0%), 0 more in float64; 1 of 6 names are" in path.read_text()
    )
    assert "| `test_vit` |" in path.read_text()
    path.write_text(path.read_text().replace("timm 1", "timm 9"))
    with pytest.raises(ValueError, match="is not of timm"):
        main(["test_vit"], 1, False, path)
    with pytest.raises(ValueError, match="no model matches resnet50"):
        main(["resnet50"])


def test_what_differs_or_fails_is_told(
    tmp_path: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str, *arguments: Any) -> Row:
        if name == "test_vit2":
            raise RuntimeError("no | luck")
        exact = {"test_vit3": 1e-12, "test_vit4": 1e-7}.get(name)
        return Row(name, 5, "1", "8x8", 1e-7, 2e-5, exact=exact)

    monkeypatch.setattr(_names, "compare", broken)
    path = tmp_path / "timm.md"
    assert main(["test_vit", "test_vit?"], path=path) == 1
    out = capsys.readouterr().out
    assert "0 of 4 equal, 1 in float64, 0 refused" in out
    assert "failed: RuntimeError: no / luck" in out
    verdicts = {name: row.verdict for name, row in read(path).items()}
    assert verdicts["test_vit"] == verdicts["test_vit4"] == "differs"
    assert verdicts["test_vit3"] == "equal in float64: 1.0e-12"
    assert main(["test_vit3"]) == 0


@pytest.mark.parametrize("weight_init", ["", "reset", "jax", "jax_nlhb", "moco"])
@pytest.mark.parametrize("layer", ["mlp", "swiglu", "swiglu_packed"])
def test_initial_weights_have_timms_statistics(weight_init: str, layer: str) -> None:
    layers = {"mlp": Mlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}
    arguments: dict[str, Any] = {
        **SMALL,
        "embed_dim": 96,
        "num_classes": 100,
        "global_pool": "map",
        "qk_norm": True,
        "init_values": 0.3,
        "reg_tokens": 2,
        "weight_init": weight_init,
        "fix_init": True,
    }
    for again in (False, True):
        torch.manual_seed(0)
        theirs = VisionTransformer(**arguments, mlp_layer=layers[layer])
        torch.manual_seed(1)
        ours = vitkern.ViT(**arguments, mlp_layer=layer)
        if again:
            theirs.init_weights()
            ours.init_weights()
        for name, expected in theirs.state_dict().items():
            # The two halves of a gated layer start differently.
            parts = 2 if "fc1" in name else 1
            halves = zip(ours.state_dict()[name].chunk(parts), expected.chunk(parts), strict=True)
            for half, wanted in halves:
                n = wanted.numel()
                spread = float(wanted.std())
                assert abs(half.mean() - wanted.mean()) <= 6 * spread / n**0.5 + 1e-7, name
                assert float(half.std()) == pytest.approx(spread, rel=6 / n**0.5), name
                if n > 5000:  # the largest tells a cut normal from a uniform distribution
                    largest = float(wanted.abs().max())
                    assert float(half.abs().max()) == pytest.approx(largest, rel=0.3), name


@pytest.mark.parametrize("reg_tokens", [0, 2])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_positions_resize_on_load_as_timms(reg_tokens: int, no_embed_class: bool) -> None:
    arguments = {**SMALL, "reg_tokens": reg_tokens, "no_embed_class": no_embed_class}
    old = VisionTransformer(**arguments)
    new = vitkern.ViT(**{**arguments, "img_size": (48, 40)})
    new.load_state_dict(old.state_dict())
    prefix = 0 if no_embed_class else 1 + reg_tokens
    expected = resample_abs_pos_embed(old.pos_embed, [6, 5], num_prefix_tokens=prefix)
    assert torch.equal(new.pos_embed, expected)


@pytest.mark.parametrize("init_values", [None, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_is_as_close_to_float32_as_timm(init_values: float | None, training: bool) -> None:
    theirs, ours = pair(init_values=init_values, drop_path_rate=0.4, global_pool="avg")
    images = torch.randn(4, 3, 32, 32)
    out: dict[Any, torch.Tensor] = {}
    grad: dict[Any, torch.Tensor] = {}
    for name, model in (("exact", theirs), ("timm", theirs), ("ours", ours)):
        model.train(training).zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            out[name] = model(images)
        out[name].float().square().sum().backward()
        grad[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert out["ours"].dtype == out["timm"].dtype
    for values in (out, grad):
        error = {name: (values[name] - values["exact"]).norm() for name in ("timm", "ours")}
        assert error["ours"] <= 1.5 * error["timm"]


def test_timm_loads_ours_after_resizing_and_a_round_trip(tmp_path: Any) -> None:
    ours = vitkern.ViT(**SMALL, reg_tokens=1, init_values=0.1)
    torch.save(ours.state_dict(), tmp_path / "model.pt")
    theirs = VisionTransformer(**SMALL, reg_tokens=1, init_values=0.1)
    theirs.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert_close(ours.eval()(images), theirs.eval()(images), "logits")


@pytest.mark.parametrize("pool", ["token", "avg", "map", ""])
def test_timms_interface(pool: str) -> None:
    theirs, ours = pair(global_pool=pool)
    theirs.eval(), ours.eval()
    images = torch.randn(2, 3, 32, 32)
    features = ours.forward_features(images)
    assert_close(features, theirs.forward_features(images), "features")
    assert_close(ours.pool(features), theirs.pool(features), "pool")
    expected = theirs.forward_head(features, pre_logits=True)
    assert_close(ours.forward_head(features, pre_logits=True), expected, "pre_logits")
    assert ours.no_weight_decay() == theirs.no_weight_decay() - {"dist_token"}
    for model in (theirs, ours):
        model.reset_classifier(5, "avg")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_close(ours(images), theirs(images), "logits after reset_classifier")
    assert ours.get_classifier() is ours.head
    assert (ours.num_classes, ours.global_pool) == (5, "avg") == (ours.config.num_classes, "avg")
