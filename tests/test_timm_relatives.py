"""Files in nearly timm's names: Meta's, Microsoft's and Apple's."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.small_vits import TINY, assert_same, quietly, stir, theirs, tiny
from vitkern.checkpoint import CheckpointError, load, read, save, understand

# Meta's, Microsoft's and Apple's


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2(tmp_path, registers, gated):
    timm = pytest.importorskip("timm.models.vision_transformer")
    layers = pytest.importorskip("timm.layers")
    mlp = {"mlp_layer": layers.SwiGLUPacked, "act_layer": nn.SiLU} if gated else {}
    changes = {"init_values": 0.1, "num_classes": 0, "reg_tokens": registers, **mlp}
    model = theirs(**changes, no_embed_class=registers > 0)
    told = {"act_layer": "silu"} if gated else {}
    path = tmp_path / "dinov2.pth"
    save(quietly(model.state_dict(), num_heads=4, **told), path, "dinov2")
    state = read(path).state
    names = {"mask_token", "pos_embed", "cls_token"} | ({"register_tokens"} if registers else set())
    assert names <= set(state)
    assert ("blocks.0.mlp.w12.weight" in state) == gated
    assert state["pos_embed"].shape[1] == 10  # the class token has one, whatever it is worth
    theirs_again = theirs(**changes, no_embed_class=registers > 0)
    theirs_again.load_state_dict(timm.checkpoint_filter_fn(dict(state), theirs_again))
    ours, images = quietly(state, num_heads=4, **told), torch.randn(2, 3, 24, 24)
    assert_same(ours, theirs_again, images)
    assert ours.config.pos_resample == ("timm" if registers else "dinov2")
    if registers:  # position 0 belongs to the class token
        state["pos_embed"][:, 0] += 1.0
        state["cls_token"] -= 1.0
        assert torch.allclose(quietly(state, num_heads=4)(images), ours(images), atol=1e-5)


def test_dinov2_in_chunks_and_in_training():
    model = tiny(init_values=0.1, num_classes=0)
    images = torch.randn(1, 3, 24, 24)
    state = {
        "backbone." + key.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): v
        for key, v in model.state_dict().items()
    }
    state |= {"backbone.mask_token": torch.zeros(1, 64), "dino_head.mlp.0.weight": torch.ones(2, 2)}
    found = understand({"teacher": state, "iteration": 3}, num_heads=4)
    assert found.format.name == "dinov2"
    assert "dino_head.mlp.0.weight" in found.dropped
    assert torch.equal(quietly({"teacher": state}, num_heads=4)(images), model(images))


def test_mae_loses_its_decoder_and_dino_its_projection():
    model = tiny(num_classes=0)
    extras = {
        "mask_token",
        "decoder_pos_embed",
        "decoder_blocks.0.norm1.weight",
        "decoder_pred.bias",
    }
    state = {**model.state_dict(), **dict.fromkeys(extras, torch.zeros(1))}
    found = understand({"model": state}, num_heads=4)
    assert found.config == model.config
    assert set(found.dropped) == extras
    dino = {"module.backbone." + key: value for key, value in model.state_dict().items()}
    dino["module.head.last_layer.weight_g"] = torch.zeros(1)
    found = understand({"student": {}, "teacher": dino}, num_heads=4)
    assert set(found.dropped) == {"head.last_layer.weight_g"}


def test_moco_and_ijepa():
    model = tiny(num_classes=0)
    moco = {
        f"module.{which}_encoder.{key}": value
        for which in ("base", "momentum")
        for key, value in model.state_dict().items()
    }
    moco["module.base_encoder.head.0.weight"] = torch.zeros(2, 2)
    found = understand({"arch": "vit_small", "state_dict": moco}, num_heads=4)
    assert found.config == model.config
    assert all("slow copy" in why or "projection" in why for why in found.dropped.values())
    jepa = tiny(class_token=False, global_pool="avg", fc_norm=False, num_classes=0)
    state = {"module." + key: value for key, value in jepa.state_dict().items()}
    found = understand({"encoder": state, "target_encoder": {}, "predictor": {}}, num_heads=4)
    assert found.config == jepa.config


@pytest.mark.parametrize(
    "positions",
    [
        {"use_rel_pos_bias": True, "use_abs_pos_emb": False},
        {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False, "global_pool": "token"},
        {"qkv_bias": False},
    ],
)
def test_beit(tmp_path, positions):
    timm = pytest.importorskip("timm.models.beit")
    torch.manual_seed(0)
    arguments = {"qkv_bias": True, "init_values": 0.1, "num_classes": 5, **TINY, **positions}
    model = stir(timm.Beit(**arguments))
    ours = load(model.state_dict(), num_heads=4).eval()
    assert_same(ours, model, torch.randn(2, 3, 24, 24))
    if arguments["qkv_bias"]:
        state = read(save(ours, tmp_path / "beit.pt", "beit")).state
        assert set(state) == set(model.state_dict())
        model.load_state_dict(state)
        assert all(torch.equal(state[key], v) for key, v in model.state_dict().items())
        with torch.no_grad():
            ours.blocks[0].attn.qkv.bias += 1
        with pytest.raises(CheckpointError, match="keys' part"):
            save(ours, tmp_path / "beit.pt", "beit")


def test_aimv2(tmp_path):
    timm = pytest.importorskip("timm.models.vision_transformer")
    layers = pytest.importorskip("timm.layers")
    rms = partial(layers.RmsNorm, eps=1e-5)
    changes = {
        "class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0,
        "qkv_bias": False, "proj_bias": False, "act_layer": "silu", "mlp_layer": layers.SwiGLU,
        "norm_layer": rms, "embed_norm_layer": rms,
    }  # fmt: skip
    model = theirs(**changes)
    told = {"norm_layer": ("rmsnorm", 1e-5), "act_layer": "silu", "global_pool": "avg"}
    ours = load(model.state_dict(), num_heads=4, embed_norm_layer=("rmsnorm", 1e-5), **told)
    state = read(save(ours, tmp_path / "aim.pt", "aimv2")).state
    assert "trunk.blocks.0.mlp.fc3.weight" in state
    again = theirs(**changes)
    again.load_state_dict(timm.checkpoint_filter_fn(dict(state), again))
    assert_same(quietly(state, num_heads=4), again, torch.randn(2, 3, 24, 24))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_beit3(tmp_path, pool):
    timm = pytest.importorskip("timm.models.vision_transformer")
    layer = partial(nn.LayerNorm, eps=1e-5)
    changes = {"scale_attn_norm": True, "scale_mlp_norm": True, "norm_layer": layer}
    model = theirs(**changes, global_pool=pool)
    ours = load(model.state_dict(), num_heads=4, norm_layer=("layernorm", 1e-5)).eval()
    state = read(save(ours, tmp_path / "beit3.pt", "beit3")).state
    state["beit3.encoder.layers.0.ffn.B.fc1.weight"] = torch.zeros(3)
    state["beit3.text_embed.weight"] = torch.zeros(3)
    assert_same(quietly(state, num_heads=4), model, torch.randn(2, 3, 24, 24))
    if pool == "avg":  # the only one that timm's reader expects
        again = theirs(**changes, global_pool=pool)
        again.load_state_dict(timm.checkpoint_filter_fn(dict(state), again))
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_eva_without_rotary_positions():
    timm = pytest.importorskip("timm.models.eva")
    torch.manual_seed(0)
    for changes in ({"global_pool": "avg"}, {"global_pool": "token", "qkv_bias": False}):
        model = stir(timm.Eva(**{**TINY, "num_classes": 5, **changes}))
        assert_same(load(model.state_dict(), num_heads=4).eval(), model, torch.randn(2, 3, 24, 24))
    rotary = timm.Eva(**TINY, use_rot_pos_emb=True, use_abs_pos_emb=False)
    with pytest.raises(CheckpointError, match=r"no positions.*rotary"):
        load(rotary.state_dict(), num_heads=4)
