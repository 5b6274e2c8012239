"""fold(): the same results from fewer parameters; the original untouched; what is left alone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.error_budget import assert_within_budget, error
from vitkern import ViT, fold
from vitkern.fold import FoldedViT
from vitkern.kernels import add_layer_norm, layer_norm
from vitkern.model.layers import LayerNorm

SMALL: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 7,
    "init_values": 0.1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "avg, norm before": {"global_pool": "avg", "fc_norm": False},
    "max, norm before": {"global_pool": "max", "fc_norm": False},
    "all tokens": {"global_pool": ""},
    "attention pool": {"global_pool": "map", "class_token": False},
    "attention pool, norm after": {"global_pool": "map", "fc_norm": True},
    "rms": {"norm_layer": "rmsnorm", "qk_norm": True},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "swiglu": {"mlp_layer": "swiglu", "act_layer": "silu"},
    "swiglu packed, no bias": {"mlp_layer": "swiglu_packed", "proj_bias": False},
    "pre-norm": {"pre_norm": True, "reg_tokens": 2},
    "no head": {"num_classes": 0},
    "no final norm": {"final_norm": False},
    "dropout": {"proj_drop_rate": 0.5, "drop_path_rate": 0.5, "drop_rate": 0.5},
}
# Of these some parts have to stay.
OTHERS: dict[str, dict[str, Any]] = {
    "relative positions": {"rel_pos": "bias", "qk_norm": True, "pos_embed": "none"},
    "shared relative positions": {"rel_pos": "mlp", "shared_rel_pos": True},
    "differential": {"attn_layer": "diff"},
    "norms behind": {"block_fn": "res_post_norm"},
    "branches side by side": {"block_fn": "parallel_things"},
    "one branch": {"block_fn": "parallel_scaling", "qkv_bias": False},
    "norms within": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "distilled": {"distilled": True},
    "distilled, layer before the head": {"distilled": True, "representation_size": 9},
    "norms of patches": {"embed_norm_layer": "layernorm", "patch_norm": True},
    "prr": {"global_pool": "prr"},
    "wide heads": {"dim_head": 24},
}


def trained(**arguments: Any) -> ViT:
    """A ViT whose parameters all differ from their start, in size about as training leaves them."""
    model = ViT(**{**SMALL, **arguments})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            middle = float(p.dim() == 1 and "norm" in name and name.endswith("weight"))
            p.copy_(torch.randn(p.shape, generator=generator) * spread + middle)
    return model.eval()


def images(batch: int = 5) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def left(model: nn.Module) -> set[str]:
    """Kinds of parameters that folding removes, as they are left in a model."""
    names = (name for name, _ in model.named_parameters())
    kinds = ("norm1", "norm2", "ls1", "ls2", "attn_pool.norm", "fc_norm", "norm.", "norm_pre")
    return {next(k for k in kinds if k in name) for name in names if any(k in name for k in kinds)}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_but_rounding_changes(variant: str, head: bool) -> None:
    model = trained(**VARIANTS[variant])
    before = copy.deepcopy(model.state_dict())
    folded = fold(model, head=head)
    assert left(folded) <= {"fc_norm", "norm.", "norm_pre"}
    in_double = copy.deepcopy(model).double()
    x = images().double()
    expected = in_double(x)
    torch.testing.assert_close(fold(in_double, head=head)(x), expected, rtol=1e-12, atol=1e-12)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(now, before[name]) for name, now in model.state_dict().items())


@pytest.mark.parametrize("other", OTHERS)
def test_other_networks_change_no_more(other: str) -> None:
    model, x = trained(**OTHERS[other]).double(), images().double()
    folded = fold(model, head=True)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert len(list(folded.parameters())) < len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_within_twice_the_error_of_the_model_itself(variant: str, dtype: torch.dtype) -> None:
    model = trained(**VARIANTS[variant]).to(dtype)
    x = images(32).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    with torch.no_grad():
        assert_within_budget(["logits"], [fold(model, head=True)(x)], [model(x)], [exact])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_within_twice_the_error_of_the_model_itself_under_autocast(dtype: torch.dtype) -> None:
    model = trained()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images(32).double())
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        actual, eager = fold(model, head=True)(images(32)), model(images(32))
    assert_within_budget(["logits"], [actual], [eager], [exact])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bias_that_cancels_half_of_every_token(dtype: torch.dtype) -> None:
    model: Any = trained(depth=1, embed_dim=64)
    with torch.no_grad():
        model.pos_embed[..., 0] += model.embed(images()).std() * 8
        norm, x = model.blocks[0].norm1, model.embed(images(32))
        normed = layer_norm(x)
        assert 0.4 < (normed[..., 0].square().mean() / normed.square().sum(-1).mean()) < 0.6
        norm.bias[0] = -norm.weight[0] * normed[..., 0].mean()
        model.to(dtype)
        exact = copy.deepcopy(model).double()(images(32).to(dtype).double())
        actual, own = fold(model)(images(32).to(dtype)), model(images(32).to(dtype))
    assert_within_budget(["logits"], [actual], [own], [exact])


@torch.no_grad()
def test_features_stay_unless_the_head_is_asked_for() -> None:
    model = trained().double()
    x = images().double()
    features = model.forward_features(x)
    torch.testing.assert_close(fold(model).forward_features(x), features)
    assert error(fold(model, head=True).forward_features(x), features) > 0.1
    assert left(fold(model)) == {"norm."}
    assert left(fold(model, head=True)) == set()


@pytest.mark.parametrize(
    ("variant", "stays"),
    [
        ("max, norm before", {"norm."}),
        ("no head", {"norm."}),
        ("pre-norm", {"norm_pre"}),
        ("attention pool", set()),
        ("attention pool, norm after", set()),
        ("avg, norm before", set()),
        ("all tokens", set()),
    ],
)
def test_the_final_norm_goes_where_the_pool_lets_it(variant: str, stays: set[str]) -> None:
    assert left(fold(trained(**VARIANTS[variant]), head=True)) == stays


def test_a_hooked_or_replaced_part_stays() -> None:
    model = trained()
    blocks: Any = model.blocks
    seen: list[Tensor] = []
    blocks[0].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    blocks[0].attn.proj_drop = nn.Hardtanh()
    blocks[1].mlp.fc1 = nn.Sequential(blocks[1].mlp.fc1)
    blocks[2].register_forward_hook(lambda module, args, out: out * 2)
    folded: Any = fold(model.double())
    assert left(folded.blocks[0]) == {"norm1", "ls1"}
    assert left(folded.blocks[1]) == {"norm2"}
    assert left(folded.blocks[2]) == {"norm1", "ls1", "norm2", "ls2"}
    x = images().double()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(*seen)


@pytest.mark.parametrize("what", ["weight", "module", "norm", "block"])
def test_what_is_shared_is_not_folded_twice(what: str) -> None:
    model = trained()
    blocks: Any = model.blocks
    if what == "weight":
        blocks[1].attn.qkv.weight = blocks[0].attn.qkv.weight
    elif what == "module":
        blocks[1].mlp = blocks[0].mlp
    elif what == "norm":
        blocks[1].norm1 = blocks[0].norm1
    else:
        blocks[1] = blocks[0]
    model.double()
    folded: Any = fold(model)
    x = images().double()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    count = sum(p.numel() for p in folded.parameters())
    assert count < sum(p.numel() for p in model.parameters())
    assert left(folded.blocks[2]) == set()


def test_a_scale_that_would_underflow_stays() -> None:
    model = trained()
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(1e-6)
    assert left(fold(copy.deepcopy(model).half())) == {"ls1", "norm."}
    assert left(fold(model)) == {"ls1", "norm."}  # its weights may meet float16 under autocast
    assert left(fold(copy.deepcopy(model).bfloat16())) == {"norm."}


def test_a_norm_whose_product_would_overflow_stays() -> None:
    model = trained()
    with torch.no_grad():
        model.blocks[0].norm1.weight[3] = 6e4
        model.blocks[0].attn.qkv.weight[:, 3] = 2.0
    assert left(fold(model.half())) == {"norm1", "norm."}


def test_it_folds_again_and_finds_nothing() -> None:
    once = fold(trained())
    twice = fold(once)
    assert [n for n, _ in twice.named_parameters()] == [n for n, _ in once.named_parameters()]
    assert all(
        torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True)
    )


def test_for_inference_only() -> None:
    model = trained(drop_path_rate=0.5).train()
    folded = fold(model)
    assert model.training
    assert not any(module.training for module in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    assert folded.eval() is folded
    with pytest.raises(RuntimeError, match="a folded model can't be trained"):
        folded.train()


def test_only_its_own_state_dict() -> None:
    model = trained()
    folded = fold(model)
    with pytest.raises(ValueError, match="isn't that of this folded model"):
        folded.load_state_dict(model.state_dict(), strict=False)
    other = fold(model)
    for p in other.parameters():
        p.zero_()
    other.load_state_dict(folded.state_dict())
    assert torch.equal(other(images()), folded(images()))


def test_copies_and_pickles() -> None:
    folded = fold(trained())
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert type(other) is FoldedViT
        assert torch.equal(other(images()), folded(images()))


def test_a_stream_of_its_own_dtype_ends_where_it_did() -> None:
    model = trained(residual_dtype=torch.float32).bfloat16()
    folded = fold(model, head=True)
    assert folded(images().bfloat16()).dtype == torch.bfloat16
    assert folded.half()(images().half()).dtype == torch.float16


def test_uint8_and_attention_maps() -> None:
    model = trained().double()
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    folded = fold(model)
    torch.testing.assert_close(folded(pixels), model(pixels))
    torch.testing.assert_close(folded.attention_maps(pixels), model.attention_maps(pixels))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, ViT], ids=lambda m: str(m)[:8])
def test_refuses_what_is_no_vit(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a vitkern\.ViT, got"):
        fold(model)


class Named(ViT):
    """A subclass that computes what a ViT does."""


class Halved(ViT):
    """One that doesn't."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x, pre_logits) / 2


def test_a_subclass_folds_unless_it_computes_something_else() -> None:
    model = Named(**SMALL).eval()
    assert type(fold(model)) is FoldedViT
    torch.testing.assert_close(fold(model)(images()), model(images()))
    with pytest.raises(TypeError, match="got Halved, whose forward_head was overridden"):
        fold(Halved(**SMALL))
    setattr(model, "forward", lambda x: x)  # noqa: B010
    with pytest.raises(TypeError, match="got Named, whose forward was overridden"):
        fold(model)


def test_refuses_a_compiled_model() -> None:
    with pytest.raises(TypeError, match="got OptimizedModule"):
        fold(torch.compile(trained()))


def test_a_shift_needs_a_scale() -> None:
    x = torch.ones(2, 5, 8)
    for call in (lambda **k: layer_norm(x, **k), lambda **k: add_layer_norm(x, x, **k)):
        with pytest.raises(ValueError, match="bias must be None where weight is None"):
            call(bias=torch.zeros(8))
    assert torch.equal(layer_norm(x), torch.zeros(2, 5, 8))


def test_a_norm_without_affine_part_says_so() -> None:
    norm = LayerNorm(8)
    norm.drop_affine()
    assert "elementwise_affine=False" in repr(norm)
    norm.reset_parameters()  # nothing to reset
    assert not norm.state_dict()
