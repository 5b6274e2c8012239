"""Other kinds of blocks and attention, and norms before last layers, held against timm's."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkern
from tests.error_budget import assert_within_budget
from vitkern.kernels._op import record_choices
from vitkern.model.block import Block, make_block
from vitkern.model.branches import Attention, DiffAttention, Difference, make_attention
from vitkern.model.config import ViTConfig
from vitkern.model.layers import DropPath

DIM, HEADS = 48, 4
KERNELS = {"norm_linear": "triton", "attention": "triton", "linear_residual": "triton"}
EAGER = {"norm_linear": "torch", "attention": "sdpa", "linear_residual": "torch"}

# Name -> our options, and the name and options of timm's block.
BOTH: dict[str, Any] = {"init_values": 0.3, "qkv_bias": False, "qk_norm": True}
SCALED: dict[str, Any] = {"scale_attn_norm": True, "scale_mlp_norm": True}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "pre_norm": (BOTH, "Block", BOTH),
    "norms before last layers": ({**SCALED, "init_values": 0.3}, "Block", {"init_values": 0.3}),
    "the same, gated": ({**SCALED, "mlp_layer": "swiglu"}, "Block", {"mlp_layer": "SwiGLU"}),
    "packed": ({**SCALED, "mlp_layer": "swiglu_packed"}, "Block", {"mlp_layer": "SwiGLUPacked"}),
    "res_post_norm": ({"block_fn": "res_post_norm", **BOTH}, "ResPostBlock", BOTH),
    "scaled res_post_norm": ({"block_fn": "res_post_norm", **SCALED}, "ResPostBlock", {}),
    "parallel_things": ({"block_fn": "parallel_things", **BOTH}, "ParallelThingsBlock", BOTH),
    "three things": (
        {"block_fn": ("parallel_things", {"num_parallel": 3}), "mlp_layer": "swiglu"},
        "ParallelThingsBlock",
        {"num_parallel": 3, "mlp_layer": "SwiGLU"},
    ),
    "scaled things": ({"block_fn": "parallel_things", **SCALED}, "ParallelThingsBlock", {}),
    "parallel_scaling": ({"block_fn": "parallel_scaling", **BOTH}, "ParallelScalingBlock", BOTH),
    "one layer out": (
        {"block_fn": ("parallel_scaling", {"fuse_out_proj": True}), "proj_bias": False},
        "ParallelScalingBlock",
        {"fuse_out_proj": True, "proj_bias": False},
    ),
    "zero LayerScale": (
        {"block_fn": "parallel_scaling", "init_values": 0.0},
        "ParallelScalingBlock",
        {"init_values": 0.0},
    ),
    "diff_parallel_scaling": (
        {"block_fn": "diff_parallel_scaling", **BOTH},
        "DiffParallelScalingBlock",
        BOTH,
    ),
    "dual lambda": (
        {"block_fn": ("diff_parallel_scaling", {"dual_lambda": True})},
        "DiffParallelScalingBlock",
        {"dual_lambda": True},
    ),
    "diff": ({"attn_layer": "diff", **SCALED, **BOTH}, "Block", {"attn_layer": "diff", **BOTH}),
    "diff and dual": (
        {"attn_layer": ("diff", {"dual_lambda": True})},
        "Block",
        {"attn_layer": "dual"},
    ),
    "diff behind": (
        {"attn_layer": "diff", "block_fn": "res_post_norm"},
        "ResPostBlock",
        {"attn_layer": "diff"},
    ),
    "diff things": (
        {"attn_layer": "diff", "block_fn": "parallel_things"},
        "ParallelThingsBlock",
        {"attn_layer": "diff"},
    ),
}


def ours(name: str, index: int = 2, **options: Any) -> Any:
    """Our block of a case, seeded."""
    config = ViTConfig(
        img_size=12, patch_size=4, embed_dim=DIM, num_heads=HEADS, **{**CASES[name][0], **options}
    )
    torch.manual_seed(0)
    return make_block(config, index, config.drop_path_rate)


def theirs(name: str, index: int = 2, drop: float = 0.0, drop_path: float = 0.0) -> Any:
    """timm's block of the same case, seeded."""
    pytest.importorskip("timm")
    from timm import layers
    from timm.models import vision_transformer as models

    class Dual(layers.DiffAttention):  # timm's own blocks have no way to ask for this
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, dual_lambda=True)

    own, kind, given = CASES[name]
    options: dict[str, Any] = {
        "qkv_bias": True,
        "norm_layer": partial(layers.LayerNorm, eps=1e-6),
        "proj_drop": drop,
        "attn_drop": drop,
        **{key: own[key] for key in SCALED if key in own},
        **given,
    }
    if "mlp_layer" in options:
        options["mlp_layer"] = getattr(layers, options["mlp_layer"])
    if options.get("attn_layer") == "dual":
        options["attn_layer"] = Dual
    torch.manual_seed(0)
    return getattr(models, kind)(DIM, HEADS, drop_path=drop_path, depth=index, **options)


def shaken(block: nn.Module) -> nn.Module:
    """Weights away from where they start, so that every parameter has a say."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return block


def outcome(block: nn.Module, x: Tensor, grad: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients, with equal random numbers each time."""
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = block(x)
    leaves = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad(y, list(leaves.values()), torch.cos(y) if grad is None else grad)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def pair(name: str, dtype: torch.dtype = torch.float64, **rates: float) -> tuple[Any, Any]:
    """Both blocks with the same weights."""
    drop, drop_path = rates.get("drop", 0.0), rates.get("drop_path", 0.0)
    block = ours(name, attn_drop_rate=drop, proj_drop_rate=drop, drop_path_rate=drop_path)
    reference = shaken(theirs(name, drop=drop, drop_path=drop_path)).to(dtype)
    block.load_state_dict(reference.state_dict())
    return block.to(dtype), reference


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_results_and_gradients_are_timms(name: str, tokens: int) -> None:
    block, reference = pair(name)
    x = torch.randn(3, tokens, DIM, dtype=torch.float64)
    assert_same(outcome(block, x), outcome(reference, x))
    assert_same(outcome(block.eval(), x), outcome(reference.eval(), x))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "rates", [{"drop": 0.3}, {"drop_path": 0.4}, {"drop": 0.2, "drop_path": 0.4}]
)
def test_training_draws_timms_random_numbers(name: str, rates: dict[str, float]) -> None:
    block, reference = pair(name, **rates)
    x = torch.randn(6, 5, DIM, dtype=torch.float64)
    assert_same(outcome(block, x), outcome(reference, x))


@pytest.mark.parametrize("name", CASES)
def test_weights_start_as_timms(name: str) -> None:
    block, reference = ours(name), theirs(name)
    assert [key for key, _ in block.named_parameters()] == [
        key for key, _ in reference.named_parameters()
    ]
    for key, value in reference.state_dict().items():
        assert torch.equal(block.state_dict()[key], value), key
    for module in (block, reference):  # as a model draws them anew
        shaken(module)
        torch.manual_seed(5)
        for part in reversed(list(module.modules())):
            if not isinstance(part, nn.Linear):
                for start in ("reset_parameters", "init_weights"):
                    getattr(part, start, lambda: None)()
    for key, value in reference.state_dict().items():
        if "lambda" not in key:  # the only random ones left, in an order of their own
            torch.testing.assert_close(block.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_near_as_eager(name: str) -> None:
    block, reference = pair(name, torch.float32)
    x = torch.randn(3, 17, DIM)
    exact = outcome(deepcopy(reference).double(), x.double())
    grad = torch.cos(exact["y"])
    found, eager = outcome(block, x, grad.float()), outcome(reference, x, grad.float())
    exact = outcome(deepcopy(reference).double(), x.double(), grad)
    # The gradient of a key's shift is nothing but rounding, as softmax doesn't see it; those of
    # lambda's parts have the rounding of one number, and that is luck.
    keys = [key for key in exact if not key.endswith("k_norm.bias") and "lambda" not in key]
    for key in exact:
        if "lambda" in key:
            torch.testing.assert_close(found[key].double(), exact[key], rtol=1e-5, atol=1e-6)
    assert_within_budget(keys, *([part[k] for k in keys] for part in (found, eager, exact)))


@pytest.mark.parametrize("name", CASES)
def test_strided_inputs_and_gradients(name: str) -> None:
    block = shaken(ours(name)).double()
    x, grad = (torch.randn(2, 5, DIM, dtype=torch.float64) for _ in range(2))
    expected = outcome(block, x, grad)
    for change in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack([t, t + 1], -1)[..., 0],
        lambda t: t.mT.contiguous().mT,
    ):
        assert_same(outcome(block, change(x), change(grad)), expected)
    one = torch.ones((), dtype=torch.float64).expand(2, 5, DIM)
    assert_same(outcome(block, x[:1].expand(2, -1, -1), one), outcome(block, x[[0, 0]], one + 0))
    assert block(x[:0]).shape == (0, 5, DIM)


@pytest.mark.parametrize("name", CASES)
def test_dtypes_under_autocast_are_eagers(name: str) -> None:
    block, reference = pair(name, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, DIM, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = block(x), reference(x)
        assert y.dtype == expected.dtype
        assert (y - expected).norm() < 0.02 * expected.norm()
        y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


HOW = {  # what explain() says of a block: the part, how it runs, why
    "norms before last layers": {
        ("attention half", "module by module", "scale_attn_norm"),
        ("MLP half", "module by module", "scale_mlp_norm"),
    },
    "res_post_norm": {("block", "module by module", "res_post_norm")},
    "parallel_things": {
        ("attention branch", "op by op", "the norm is in the first product"),
        ("MLP branch", "op by op", "the norm is in the first product"),
    },
    "parallel_scaling": {("block", "op by op", "the norm is in the first product")},
    "diff_parallel_scaling": {
        ("block", "op by op", "the norm is in the first product"),
        ("attention", "sdpa", "heads of q and k are half as wide"),
    },
    "diff": {
        ("attention half", "module by module", "differential attention"),
        ("attention", "sdpa", "heads of q and k are half as wide"),
    },
}


@pytest.mark.parametrize("name", HOW)
def test_compiles_in_one_graph(name: str) -> None:
    block = shaken(ours(name, drop_path_rate=0.3)).double()
    x = torch.randn(3, 5, DIM, dtype=torch.float64)
    expected = outcome(block.eval(), x)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = x.requires_grad_()
    y = compiled(x)
    torch.testing.assert_close(y, expected["y"])
    y.backward(torch.cos(y))
    torch.testing.assert_close(x.grad, expected["x"])
    torch.compile(block.train(), fullgraph=True, backend="aot_eager")(x).sum().backward()
    torch.compiler.reset()


@pytest.mark.parametrize("name", CASES)
def test_copies(name: str) -> None:
    block, x = ours(name).eval(), torch.randn(2, 5, DIM)
    for copy in (deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(copy(x), block(x))


@pytest.mark.parametrize("name", HOW)
def test_explain_says_how_it_runs(name: str) -> None:
    rows = vitkern.explain(ours(name), torch.randn(1, 5, DIM)).rows
    for what, how, why in HOW[name]:
        assert any((r.op, r.implementation) == (what, how) and why in r.why for r in rows), rows


def test_what_runs_fused() -> None:
    """A norm before the last layer is part of its product; a side branch is three ops or two."""

    def ops_of(name: str) -> list[str]:
        with record_choices() as choices:
            ours(name)(torch.randn(1, 5, DIM))
        return [c.op for c in choices if c.implementation not in ("op by op", "module by module")]

    assert ops_of("norms before last layers") == [
        "layer_norm", "attention", "norm_linear", "add_layer_norm", "linear_act", "norm_linear",
        "residual_add",
    ]  # fmt: skip
    branches = ["norm_linear", "attention", "linear_residual"] * 2
    assert ops_of("parallel_things") == branches + ["norm_linear", "linear_residual"] * 2
    assert ops_of("one layer out") == [
        "norm_linear", "attention", "norm_linear", "linear_residual", "linear_residual"
    ]  # fmt: skip


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "in_proj hooked": ("parallel_scaling", lambda b: hook(b.in_proj)),
    "in_norm hooked": ("one layer out", lambda b: hook(b.in_norm)),
    "out_proj hooked": ("one layer out", lambda b: hook(b.out_proj)),
    "ls hooked": ("parallel_scaling", lambda b: hook(b.ls)),
    "mlp_act hooked": ("diff_parallel_scaling", lambda b: hook(b.mlp_act)),
    "branch hooked": ("parallel_things", lambda b: hook(b.attns[1])),
    "attn hooked": ("parallel_things", lambda b: hook(b.attns[1].attn)),
    "mlp.fc1 hooked": ("three things", lambda b: hook(b.ffns[2].mlp.fc1_g)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_modules_are_called(name: str) -> None:
    case, change = CHANGES[name]
    block = shaken(ours(case)).double()
    x = torch.randn(3, 5, DIM, dtype=torch.float64)
    expected = outcome(block, x)
    change(block)
    with record_choices() as choices:
        assert_same(outcome(block, x), expected)
    assert any("replaced, wrapped or hooked" in c.why for c in choices)


@pytest.mark.parametrize("name", ["parallel_things", "one layer out", "scaled res_post_norm"])
def test_an_op_asked_for_by_name_is_used(name: str) -> None:
    block = ours(name, impl={"residual_add": "reference"})
    with record_choices() as choices:
        block(torch.randn(1, 5, DIM))
    assert {c.implementation for c in choices if c.op == "residual_add"} == {"reference"}


@pytest.mark.parametrize("name", ["diff", "dual lambda"])
def test_differential_attention_refuses_kernels_by_name(name: str) -> None:
    block = ours(name, impl={"attention": "triton"})
    with pytest.raises(ValueError, match="impl='triton' for attention can't run here: heads"):
        block(torch.randn(1, 5, DIM))


@pytest.mark.parametrize("name", ["diff", "dual lambda"])
def test_the_definition_of_differential_attention_can_be_asked_for(name: str) -> None:
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    block = shaken(ours(name, impl="reference")).double()
    with record_choices() as choices:
        found = outcome(block, x)
    assert "sdpa" not in {c.implementation for c in choices}
    assert_same(found, outcome(shaken(ours(name)).double(), x))
    with pytest.raises(ValueError, match=r"impl='reference' for attention.*it has no dropout"):
        ours(name, impl="reference", attn_drop_rate=0.1)(x.float())


@pytest.mark.parametrize("name", CASES)
def test_stochastic_depth_on_a_subset(name: str) -> None:
    """On average the block is what it is without stochastic depth, and it computes less."""
    block = shaken(ours(name, drop_path_rate=0.5, drop_path_mode="subset"))
    x = torch.randn(4, 3, DIM)
    seen: list[int] = []
    for module in block.modules():
        if isinstance(module, (Attention, DiffAttention)):
            module.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    y = block(x)
    assert set(seen) <= {2}
    y.sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    one_branch = "scaling" in str(CASES[name][0].get("block_fn"))
    if one_branch:  # two samples as they were, the others with twice the branch
        same = torch.tensor([torch.equal(a, b) for a, b in zip(x, y, strict=True)])
        assert same.sum() == 2
        full = block.eval()(x)
        torch.testing.assert_close(y[~same], (x + 2 * (full - x))[~same])


@pytest.mark.parametrize("name", CASES)
def test_a_stream_with_its_own_dtype_keeps_it(name: str) -> None:
    block = ours(name, residual_dtype=torch.float32).to(torch.bfloat16)
    x = torch.randn(2, 5, DIM)
    assert block(x).dtype == torch.float32


def test_each_branch_side_by_side_has_a_subset_of_its_own(monkeypatch: Any) -> None:
    """A sample that one branch leaves out keeps what the branch before it added."""
    block = shaken(ours("parallel_things", drop_path_rate=0.5, drop_path_mode="subset")).double()
    x, factor = torch.randn(4, 5, DIM, dtype=torch.float64), torch.full((2,), 2.0).double()
    subsets = [torch.tensor(chosen) for chosen in ([0, 1], [1, 2], [2, 3], [3, 0])]
    expected, rest = x, iter(subsets)
    for branches in (block.attns, block.ffns):
        total = expected.clone()
        for norm, part, ls, _ in branches:
            index = next(rest)
            total[index] += 2 * ls(part(norm(expected[index])))
        expected = total
    rest = iter(subsets)
    monkeypatch.setattr(DropPath, "choose", lambda self, x: (next(rest), factor))
    torch.testing.assert_close(block.train()(x), expected)


@pytest.mark.parametrize("name", ["parallel_things", "one layer out", "norms before last layers"])
def test_kernels_are_within_the_error_budget(name: str, kernel_device: str) -> None:
    x, grad = (torch.randn(2, 5, DIM).to(kernel_device) for _ in range(2))

    def run(impl: Any, dtype: torch.dtype) -> list[Tensor]:
        block = shaken(ours(name, impl=impl)).to(kernel_device, dtype)
        return list(outcome(block, x.to(dtype), grad.to(dtype)).values())

    exact = run("reference", torch.float64)
    names = ["y", "x", *(key for key, _ in ours(name).named_parameters())]
    assert_within_budget(names, run(KERNELS, torch.float32), run(EAGER, torch.float32), exact)


class TestDimHead:
    """Heads whose widths don't add up to that of a token."""

    @pytest.mark.parametrize("width", [4, 20])
    def test_as_timms_attention(self, width: int) -> None:
        timm = pytest.importorskip("timm")
        config = ViTConfig(
            embed_dim=DIM, num_heads=HEADS, dim_head=width, qk_norm=True, scale_attn_norm=True
        )
        norm = partial(nn.LayerNorm, eps=1e-6)
        torch.manual_seed(0)
        reference = timm.layers.Attention(
            DIM, HEADS, attn_head_dim=width, qkv_bias=True, qk_norm=True, scale_norm=True,
            norm_layer=norm,
        )  # fmt: skip
        attn = Attention(config).double()
        attn.load_state_dict(shaken(reference).double().state_dict())
        x = torch.randn(2, 5, DIM, dtype=torch.float64)
        assert_same(outcome(attn, x), outcome(reference, x))

    @pytest.mark.parametrize("width", [4, 20])
    def test_the_fused_half_takes_them(self, width: int) -> None:
        torch.manual_seed(0)
        config = ViTConfig(embed_dim=DIM, num_heads=5, dim_head=width)
        block = shaken(Block(config)).double()
        assert block.attn.qkv.weight.shape == (15 * width, DIM)
        assert block.attention_problem() is None
        x = torch.randn(2, 5, DIM, dtype=torch.float64)
        fused = outcome(block, x)
        torch.testing.assert_close(block.class_token(x), block(x)[:, :1])
        hook(block.attn)
        assert_same(outcome(block, x), fused)
        for save in ("balanced", "minimal"):
            saving = Block(ViTConfig(embed_dim=DIM, num_heads=5, dim_head=width, save=save))
            saving.double().load_state_dict(block.state_dict())
            assert_same(outcome(saving, x), fused)

    def test_an_attention_pool_has_heads_of_its_own(self) -> None:
        options: dict[str, Any] = {"img_size": 8, "patch_size": 4, "depth": 1, "dim_head": 16}
        model = vitkern.ViT(**options, embed_dim=24, num_heads=3, global_pool="map", num_classes=2)
        assert model(torch.randn(2, 3, 8, 8)).shape == (2, 2)
        with pytest.raises(ValueError, match="embed_dim=24 and num_heads=5"):
            vitkern.ViT(**options, embed_dim=24, num_heads=5, global_pool="map")


class TestMaps:
    """Attention weights, of every kind of block."""

    @pytest.mark.parametrize("name", CASES)
    def test_rows_sum_to_what_they_should(self, name: str) -> None:
        """To 1; of a difference of two maps to 1 - lambda."""
        block = shaken(ours(name)).eval()
        maps = block.maps(torch.randn(2, 5, DIM))
        parallel = ViTConfig(**CASES[name][0]).block[1].get("num_parallel", 1)
        assert maps.dtype == torch.float32
        assert maps.shape == (2, parallel * HEADS, 5, 5)
        weights = [m.weight().detach() for m in block.modules() if isinstance(m, Difference)]
        expected = 1 - torch.stack(weights).repeat_interleave(HEADS) if weights else torch.ones(1)
        torch.testing.assert_close(maps.sum(-1).mT, expected.expand(2, 5, parallel * HEADS))

    @pytest.mark.parametrize("attn_layer", ["attn", "diff"])
    def test_they_weight_the_values(self, attn_layer: str) -> None:
        attn = shaken(make_attention(self.config(attn_layer), 1)).double()
        x = torch.randn(2, 5, DIM, dtype=torch.float64)
        v = attn.qkv(x).unflatten(-1, (3, HEADS, -1))[:, :, 2].transpose(1, 2)
        seen = (attn.maps(x).double() @ v).transpose(1, 2)
        if attn_layer == "diff":
            seen = attn.sub_norm(seen) * (1 - attn.lambda_init)
        torch.testing.assert_close(attn.proj(seen.flatten(2)).float(), attn(x).float())

    def config(self, attn_layer: str) -> ViTConfig:
        return ViTConfig(embed_dim=DIM, num_heads=HEADS, qk_norm=True, attn_layer=attn_layer)
