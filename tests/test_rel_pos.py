"""Positions relative within attention, held against timm's: the modules, and whole models."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkern
from vitkern.kernels._op import record_choices
from vitkern.model.block import Block, make_block
from vitkern.model.config import ViTConfig
from vitkern.model.rel_pos import RelPosBias, RelPosMlp, make_rel_pos

WINDOWS = [(1, 1), (1, 4), (3, 5), (7, 7)]
SIZE: dict[str, Any] = {"img_size": (12, 20), "patch_size": 4, "embed_dim": 48, "num_heads": 3}
KINDS: dict[str, dict[str, Any]] = {
    "mlp": {"rel_pos": "mlp", "rel_pos_dim": 20},
    "bias": {"rel_pos": "bias"},
}


def ours_and_theirs(kind: str, window: tuple[int, int], prefix: int) -> tuple[Any, Any]:
    """Both modules from one seed."""
    layers = pytest.importorskip("timm").layers
    torch.manual_seed(0)
    own = RelPosBias(window, 3, prefix) if kind == "bias" else RelPosMlp(window, 3, prefix, 20)
    torch.manual_seed(0)
    if kind == "bias":
        return own, layers.RelPosBias(window, 3, prefix)
    return own, layers.RelPosMlp(window, 3, 20, prefix)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
class TestModule:
    """RelPosBias and RelPosMlp."""

    def test_as_timms(self, kind: str, window: tuple[int, int], prefix: int) -> None:
        own, their = ours_and_theirs(kind, window, prefix)
        assert own.state_dict().keys() == their.state_dict().keys()
        for key, value in their.state_dict().items():
            assert torch.equal(own.state_dict()[key], value), key
        for mode in (True, False):
            found = []
            for module in (own.train(mode), their.train(mode)):
                torch.manual_seed(1)
                bias = module() if module is own else module.get_bias()
                grads = torch.autograd.grad(bias.sin().sum(), list(module.parameters()))
                found.append([bias, *grads])
            for mine, expected in zip(*found, strict=True):
                torch.testing.assert_close(mine, expected)
        tokens = window[0] * window[1] + prefix
        assert own().shape == (1, 3, tokens, tokens)
        assert own().is_contiguous()

    @pytest.mark.parametrize("new", [(5, 5), (9, 4), (14, 16)], ids=str)
    def test_another_grid(
        self, kind: str, window: tuple[int, int], prefix: int, new: tuple[int, int]
    ) -> None:
        own, their = ours_and_theirs(kind, window, prefix)
        if kind == "bias":
            own.relative_position_bias_table.requires_grad_(False)
        own.eval().set_window_size(new)
        their.eval().set_window_size(new)
        torch.testing.assert_close(own(), their.get_bias(), atol=1e-6, rtol=1e-4)
        if kind == "bias":
            assert not own.relative_position_bias_table.requires_grad
        for copy in (deepcopy(own), pickle.loads(pickle.dumps(own))):
            assert torch.equal(copy(), own())

    def test_buffers_after_to_empty(self, kind: str, window: tuple[int, int], prefix: int) -> None:
        own, _ = ours_and_theirs(kind, window, prefix)
        with torch.device("meta"):
            empty, _ = ours_and_theirs(kind, window, prefix)
        empty = empty.to_empty(device="cpu")
        for buffer in empty.buffers():
            buffer.zero_()
        empty.load_state_dict(own.state_dict())
        empty.init_non_persistent_buffers()
        assert torch.equal(empty.eval()(), own.eval()())


def test_a_table_of_another_grid_is_resampled_as_it_is_loaded() -> None:
    timm = pytest.importorskip("timm")
    given = RelPosBias((7, 7), 3, 1).state_dict()
    module = RelPosBias((5, 9), 3, 1)
    module.load_state_dict(given)
    expected = timm.layers.resize_rel_pos_bias_table(
        given["relative_position_bias_table"], (5, 9), module.relative_position_bias_table.shape
    )
    torch.testing.assert_close(module.relative_position_bias_table, expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"expected \[156, 3\], or 3 rows and the square of an odd"
    ):
        module.load_state_dict({"relative_position_bias_table": torch.zeros(20, 3)})


def test_a_table_takes_one_prefix_token() -> None:
    with pytest.raises(ValueError, match="rel_pos='bias' takes one prefix token at most, got 2"):
        RelPosBias((2, 2), 1, 2)


def block_of(kind: str, **options: Any) -> Any:
    """A block on a grid of 3 x 5 and a class token, seeded."""
    config = ViTConfig(**{**SIZE, **KINDS[kind], "class_token": True, **options})
    torch.manual_seed(0)
    return make_block(config, 0, config.drop_path_rate)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_fn", ["pre_norm", "res_post_norm"])
class TestBlock:
    """Blocks whose attention has a bias."""

    def test_explain(self, kind: str, block_fn: str) -> None:
        block = block_of(kind, block_fn=block_fn)
        with record_choices() as choices:
            block(torch.randn(2, 16, 48))
        why = {c.op: c.why for c in choices}
        assert why["attention"] == "rel_pos: no op adds a bias to the logits"
        half = "attention half" if block_fn == "pre_norm" else "block"
        assert "rel_pos" in why[half] or "res_post_norm" in why[half]
        if block_fn == "pre_norm":  # the MLP doesn't mind
            assert why.keys() >= {"norm_linear", "linear_residual"}
            assert "MLP half" not in why

    def test_maps_make_the_output(self, kind: str, block_fn: str) -> None:
        attn = block_of(kind, block_fn=block_fn, qk_norm=True).eval().double().attn
        x = torch.randn(2, 16, 48, dtype=torch.float64)
        v = attn.qkv(x).unflatten(-1, (3, 3, -1))[:, :, 2].transpose(1, 2)
        seen = (attn.maps(x).double() @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attn.proj(seen).float(), attn(x).float())

    def test_a_bias_from_outside(self, kind: str, block_fn: str) -> None:
        """Shared among blocks: the same as one's own, in every way there is to call a block."""
        own = block_of(kind, block_fn=block_fn).eval().double()
        shared = block_of(kind, block_fn=block_fn, shared_rel_pos=True).eval().double()
        assert shared.attn.rel_pos is None
        shared.load_state_dict({k: v for k, v in own.state_dict().items() if "rel_pos" not in k})
        x = torch.randn(2, 16, 48, dtype=torch.float64)
        bias = own.attn.rel_pos()
        torch.testing.assert_close(shared(x, bias), own(x))
        torch.testing.assert_close(shared.maps(x, bias), own.maps(x))
        assert not torch.allclose(shared(x), own(x))
        plain = block_of(kind, block_fn=block_fn, rel_pos=None, rel_pos_dim=None).eval().double()
        plain.load_state_dict(shared.state_dict())
        torch.testing.assert_close(plain(x, bias), own(x))  # no less than one that expects it

    def test_on_a_subset(self, kind: str, block_fn: str) -> None:
        options: dict[str, Any] = {"drop_path_rate": 0.5, "drop_path_mode": "subset"}
        block = block_of(kind, block_fn=block_fn, shared_rel_pos=True, **options)
        bias = torch.randn(1, 3, 16, 16, requires_grad=True)
        block(torch.randn(4, 16, 48), bias).sum().backward()
        assert bias.grad is not None

    def test_compiles_in_one_graph(self, kind: str, block_fn: str) -> None:
        block = block_of(kind, block_fn=block_fn)
        x = torch.randn(2, 16, 48)
        torch.compiler.reset()
        compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        assert all(p.grad is not None for p in block.parameters())
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(x), block.eval()(x))
        torch.compiler.reset()

    def test_errors(self, kind: str, block_fn: str) -> None:
        block = block_of(kind, block_fn=block_fn)
        with pytest.raises(ValueError, match=r"those of 16 tokens, got 17.*set_input_size"):
            block(torch.randn(1, 17, 48))
        block = block_of(kind, block_fn=block_fn, impl={"attention": "triton"})
        with pytest.raises(ValueError, match="impl='triton' for attention can't run here: rel_pos"):
            block(torch.randn(1, 16, 48))


# The options of timm's entries, on tiny models: both kinds, shared or not, with and without a
# class token, norms behind branches, each pool, with fc_norm or without.
MODELS: dict[str, dict[str, Any]] = {
    "relpos": {"fc_norm": True},
    "relpos_plus": {"qkv_bias": True},
    "srelpos": {"shared_rel_pos": True, "rel_pos_dim": 24},
    "relpos_cls": {"class_token": True, "global_pool": "token", "rel_pos_dim": 16},
    "relpos_clsgap": {"class_token": True, "fc_norm": True},
    "relpos_rpn": {"res_post": True},
    "srelpos_rpn_cls": {"res_post": True, "shared_rel_pos": True, "class_token": True},
    "table": {"rel_pos_type": "bias", "qk_norm": True},
    "shared table_cls": {"rel_pos_type": "bias", "shared_rel_pos": True, "class_token": True},
}


def models(name: str, **rates: float) -> tuple[Any, Any]:
    """Our model and timm's, with the same weights."""
    relpos = pytest.importorskip("timm.models.vision_transformer_relpos")
    options: dict[str, Any] = {
        "qkv_bias": False,
        "fc_norm": False,
        "init_values": 0.1,
        **MODELS[name],
        **rates,
    }
    size: dict[str, Any] = {**SIZE, "depth": 2, "num_classes": 5}
    theirs, own = dict(options), dict(options)
    if own.pop("res_post", False):
        own["block_fn"], theirs["block_fn"] = "res_post_norm", relpos.ResPostRelPosBlock
        del theirs["res_post"]
    own["rel_pos"] = own.pop("rel_pos_type", "mlp")
    own = {"class_token": False, "global_pool": "avg", "pos_embed": "none", **own}
    torch.manual_seed(0)
    reference = relpos.VisionTransformerRelPos(**size, **theirs)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model = vitkern.ViT(**size, **own)
    model.load_state_dict(reference.state_dict())
    return model.double(), reference.double()


def outcome(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    logits = model(images)
    names = dict(model.named_parameters())
    grads = torch.autograd.grad(logits.sin().sum(), list(names.values()))
    return {"logits": logits.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rates", [{}, {"drop_path_rate": 0.4, "attn_drop_rate": 0.2}], ids=str)
def test_models_are_timms(name: str, rates: dict[str, float]) -> None:
    model, reference = models(name, **rates)
    images = torch.randn(4, 3, 12, 20, dtype=torch.float64)
    for mode in (True, False):
        found, expected = (outcome(m.train(mode), images) for m in (model, reference))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.parametrize("name", ["relpos", "relpos_rpn", "shared table_cls"])
def test_dtypes_under_autocast_are_eagers(name: str) -> None:
    model, reference = (m.float().eval() for m in models(name))
    images = torch.randn(2, 3, 12, 20)
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [(m.forward_features(images), m(images)) for m in (model, reference)]
    for found, expected in zip(*pairs, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["srelpos", "shared table_cls"])
def test_a_shared_bias_under_gradient_checkpointing(name: str) -> None:
    model, _ = models(name, drop_path_rate=0.3)
    images = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    expected = outcome(model, images)
    model.set_grad_checkpointing()
    for key, value in outcome(model, images).items():
        torch.testing.assert_close(value, expected[key], msg=key)


def test_the_class_token_alone_is_no_shortcut_here() -> None:
    model, _ = models("relpos_cls")
    assert isinstance(model.blocks[-1], Block)
    assert "rel_pos" in model.blocks[-1].class_token_problem()


@pytest.mark.parametrize("kind", KINDS)
def test_made_by_the_config(kind: str) -> None:
    config = ViTConfig(**SIZE, **KINDS[kind], class_token=True)
    module = make_rel_pos(config)
    assert module.window_size == (3, 5)
    assert module().shape == (1, 3, 16, 16)
    if kind == "mlp":
        assert module.mlp.fc1.out_features == 20
        default = make_rel_pos(ViTConfig(**SIZE, rel_pos="mlp"))
        assert default.mlp.fc1.out_features == 128
