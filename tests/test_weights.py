"""How weights start: as timm's do, number for number, from one seed."""

from typing import Any

import pytest
import torch

import vitkern
from vitkern.model.weights import draw_normal

STARTS: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {"weight_init": "jax", "qk_norm": True, "init_values": 0.3}),
    ("vit_tiny_patch16_224", {"weight_init": "jax_nlhb"}),
    ("vit_tiny_patch16_224", {"weight_init": "moco"}),
    ("vit_tiny_patch16_224", {"weight_init": "reset"}),
    ("vit_tiny_patch16_224", {"fix_init": True, "reg_tokens": 2}),
    ("vit_base_patch16_siglip_224", {}),
    ("vit_base_patch16_siglip_224", {"weight_init": "jax"}),
    ("vit_giant_patch14_dinov2", {"img_size": 28}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("vit_tiny_r_s16_p8_224", {}),
    ("vit_small_r26_s32_224", {"weight_init": "jax"}),
    ("vit_relpos_small_patch16_rpn_224", {}),
    ("vit_dwee_patch16_reg1_gap_256", {}),
    ("vit_dpwee_patch16_reg1_gap_256", {}),
    ("vit_pwee_patch16_reg1_gap_256", {}),
    ("vit_small_patch16_18x2_224", {}),
    ("vit_base_patch16_rpn_224", {}),
    ("aimv2_large_patch14_224", {"img_size": 28}),
    ("beit3_base_patch16_224", {}),
]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("name", "arguments"), STARTS)
def test_one_seed_starts_both_alike(name: str, arguments: dict[str, Any], again: bool) -> None:
    timm = pytest.importorskip("timm")
    small: dict[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 4}
    states = []
    for create in (vitkern.create_model, timm.create_model):
        torch.manual_seed(0)
        model = create(name, **{**small, "num_classes": 100, **arguments})
        if again:
            model.init_weights()
        states.append(model.state_dict())
    ours, theirs = states
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normal_numbers_are_normal_in_every_dtype(dtype: torch.dtype) -> None:
    for cut, spread in ((6.0, 1.0), (2.0, 0.87962566)):
        drawn = draw_normal(torch.empty(1000, 1000, dtype=dtype), 0.02, cut).float() / 0.02
        assert float(drawn.mean()) == pytest.approx(0, abs=0.01)
        assert float(drawn.std()) == pytest.approx(spread, rel=0.01)
        assert 0.9 * min(cut, 5) <= float(drawn.abs().max()) <= 1.001 * min(cut, 6)
