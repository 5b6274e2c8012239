"""vitkern.ViT as a PyTorch module: hooks, copies, dtypes, export, compile, loading, odd inputs."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import vitkern
from vitkern.model.weights import resample_pos_embed

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
EVERYTHING: dict[str, Any] = {
    **SMALL,
    "init_values": 0.5,
    "qk_norm": True,
    "reg_tokens": 2,
    "pre_norm": True,
    "drop_path_rate": 0.4,
    "proj_drop_rate": 0.1,
    "pos_drop_rate": 0.1,
    "drop_rate": 0.1,
}


def build(**arguments: Any) -> vitkern.ViT:
    torch.manual_seed(0)
    return vitkern.ViT(**{**SMALL, **arguments})


def run(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits and gradients of one seeded pass."""
    model.zero_grad()
    torch.manual_seed(7)
    out = model(images)
    out.float().square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor | None]],
    theirs: tuple[Tensor, dict[str, Tensor | None]],
    tolerance: float = 1e-5,
) -> None:
    pairs = [("logits", ours[0], theirs[0])]
    pairs += [(n, ours[1].get(n), g) for n, g in theirs[1].items()]
    for name, a, b in pairs:
        if b is None:
            assert a is None, name
        elif "k_norm.bias" not in name:  # its gradient is zero but for rounding
            assert (a - b).norm() <= tolerance * b.norm(), name


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# Hooks and replaced submodules


def _ran(model: nn.Module) -> set[str]:
    """Submodules that one pass calls when each of them is hooked."""
    return {
        name
        for name, m in model.named_modules()
        # SDPA drops attention weights itself, in timm too: the module only holds the rate.
        if name and not isinstance(m, nn.Sequential) and not name.endswith("attn_drop")
    }


KINDS: dict[str, dict[str, Any]] = {
    "everything": EVERYTHING,
    "plain": {},
    "map": {"global_pool": "map", "norm_layer": "rmsnorm", "qk_norm": True},
    "swiglu": {"mlp_layer": "swiglu", "act_layer": "silu"},
    "swiglu_packed": {"mlp_layer": "swiglu_packed", "act_layer": "quick_gelu"},
    "rms": {"norm_layer": "rmsnorm", "global_pool": "avg"},
    "prr": {"global_pool": "prr", "representation_size": 16, "patch_drop_rate": 0.3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_any_submodule_fires_and_changes_nothing(kind: str, images: Tensor) -> None:
    model = build(**{**KINDS[kind], "depth": 1})
    expected = run(model, images)
    for name in _ran(model):
        fired: list[int] = []
        handle = model.get_submodule(name).register_forward_hook(lambda *_, to=fired: to.append(1))
        assert_same(run(model, images), expected)
        assert fired == [1], name
        handle.remove()
    assert_same(run(model, images), expected, tolerance=0)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # images need no gradient
@pytest.mark.parametrize("hook", ["forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_of_any_kind_fires_and_changes_nothing(hook: str, images: Tensor) -> None:
    model = build(**{**EVERYTHING, "depth": 1})
    expected = run(model, images)
    fired: list[str] = []
    names = [f"blocks.0.{n}" for n in ("norm2", "ls1", "drop_path2", "mlp.fc1", "mlp.act")]
    names += ["blocks.0.attn.q_norm", "patch_embed", "patch_embed.proj"]
    for name in names:  # what a fused op stands in for
        register = getattr(model.get_submodule(name), f"register_{hook}_hook")
        register(lambda *_, name=name: fired.append(name))
    assert_same(run(model, images), expected)
    assert sorted(fired) == sorted(names)


def test_hooks_on_all_modules_fire(images: Tensor) -> None:
    model = build(**EVERYTHING)
    expected = run(model, images)
    seen = set()
    handle = torch_module.register_module_forward_hook(lambda m, *_: seen.add(id(m)))
    try:
        assert_same(run(model, images), expected)
    finally:
        handle.remove()
    assert {id(model.get_submodule(name)) for name in _ran(model)} <= seen


def test_a_hook_may_change_the_result(images: Tensor) -> None:
    for name in ("blocks.0.norm2", "blocks.0.mlp.fc1", "blocks.0.mlp.act", "patch_embed.proj"):
        model = build()
        before = model(images)
        model.get_submodule(name).register_forward_hook(lambda m, args, out: out * 0.5)
        assert not torch.allclose(model(images), before), name


class _LoRA(nn.Module):
    """A layer with a low-rank term beside it, as adapters wrap them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        out, width = next(layer.parameters()).shape
        self.a = nn.Parameter(torch.randn(2, width))
        self.b = nn.Parameter(torch.zeros(out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_wrapped_layers_run_and_learn(layer: str, images: Tensor) -> None:
    model = build()
    expected = model(images)
    parent, _, name = f"blocks.1.{layer}".rpartition(".")
    wrapped = _LoRA(model.get_submodule(f"{parent}.{name}"))
    setattr(model.get_submodule(parent), name, wrapped)
    out = model(images)
    assert torch.allclose(out, expected, atol=1e-6)
    out.square().sum().backward()
    assert wrapped.b.grad is not None
    assert wrapped.b.grad.abs().sum() > 0


class _Twice(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.module(x)


def test_replaced_submodules_are_called(images: Tensor) -> None:
    model = build(**{**EVERYTHING, "depth": 1}).eval()
    before = model(images)
    for name in _ran(model):
        other = copy.deepcopy(model)
        parent, _, child = name.rpartition(".")
        setattr(other.get_submodule(parent), child, _Twice(other.get_submodule(name)))
        assert not torch.equal(other(images), before), name


def test_an_overridden_forward_is_called(images: Tensor) -> None:
    model = build()
    before = model(images)
    norm = model.blocks[0].norm2
    norm.forward = lambda x: torch.zeros_like(x)  # as accelerate and others patch modules
    assert not torch.allclose(model(images), before)


def test_parametrized_weights_are_used(images: Tensor) -> None:
    model = build()
    before = model(images)
    nn.utils.parametrize.register_parametrization(model.blocks[0].mlp.fc1, "weight", _Double())
    assert not torch.allclose(model(images), before)


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


# Copies, dtypes, devices


def test_copies_are_equal_and_independent(images: Tensor) -> None:
    model = build(**EVERYTHING).eval()
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), expected)
        assert twin.config == model.config
        with torch.no_grad():
            twin.head.weight.zero_()
    assert torch.equal(model(images), expected)
    again = vitkern.ViT.from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, images: Tensor) -> None:
    exact = build(init_values=0.5, qk_norm=True, mean=(0.4, 0.5, 0.6), std=0.2)
    model = copy.deepcopy(exact).to(dtype)
    out, grads = run(model, images.to(dtype))
    assert out.dtype == dtype
    assert all(g is not None and g.dtype == dtype for g in grads.values())
    expected, _ = run(exact, images)
    assert (out - expected).norm() <= 0.05 * expected.norm()
    # The constants of uint8 images keep float32 whatever the model's dtype, there and back.
    for m in (model, model.half(), model.float()):
        assert torch.equal(m.patch_embed.mean, exact.patch_embed.mean)
        assert torch.equal(m.patch_embed.std, exact.patch_embed.std)
    built = vitkern.ViT(**SMALL, dtype=dtype)
    assert {p.dtype for p in built.parameters()} == {dtype}


def test_shapes_on_meta() -> None:
    model = vitkern.ViT(**SMALL, device="meta")
    images = torch.empty(2, 3, *model.config.img_size, device="meta")
    logits = model(images)
    assert logits.shape == (2, model.config.num_classes)
    logits.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_from_meta_to_a_device(images: Tensor) -> None:
    model = build(mean=0.3)
    empty = vitkern.ViT(**SMALL, mean=0.3, device="meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(empty.eval()(pixels), model.eval()(pixels))
    assert "patch_embed.mean" not in model.state_dict()


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_residual_dtype(stream: torch.dtype, pool: str, images: Tensor) -> None:
    arguments = {**EVERYTHING, "global_pool": pool, "drop_path_rate": 0.0}
    exact = build(**arguments).eval()
    model = build(**arguments, residual_dtype=stream).eval()
    expected = exact(images)
    streams = []
    model.blocks[1].register_forward_pre_hook(lambda m, args: streams.append(args[0].dtype))
    for weights in (torch.float32, torch.bfloat16):
        out = model.to(weights)(images.to(weights))
        assert out.dtype == weights
        assert (out - expected).norm() <= 0.05 * expected.norm()
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images.to(weights)).dtype == torch.bfloat16
    assert set(streams) == {stream}


def test_frozen_parts_get_no_gradient(images: Tensor) -> None:
    model = build(**EVERYTHING)
    _, expected = run(model, images)
    frozen = ("patch_embed", "pos_embed", "cls_token", "blocks.0", "blocks.1.norm2", "blocks.1.ls1")
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    _, grads = run(model, images)
    for name, g in grads.items():
        if name.startswith(frozen):
            assert g is None, name
        elif "k_norm.bias" not in name:
            assert torch.allclose(g, expected[name], rtol=1e-4, atol=1e-6), name
    model.requires_grad_(False)
    assert not model(images).requires_grad
    x = images.clone().requires_grad_()  # a gradient for the images alone
    model(x).sum().backward()
    assert x.grad is not None


# Inputs


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_pixels_in_either_layout_equal_normalised_floats(in_chans: int) -> None:
    channels = torch.linspace(0.2, 0.6, in_chans)
    model = build(in_chans=in_chans, mean=channels.tolist(), std=0.25).eval()
    pixels = torch.randint(0, 256, (3, in_chans, 32, 32), dtype=torch.uint8)
    floats = (pixels / 255 - channels.view(-1, 1, 1)) / 0.25
    expected = model(floats)
    for given in (pixels, pixels.permute(0, 2, 3, 1), pixels.permute(0, 2, 3, 1).contiguous()):
        assert torch.allclose(model(given), expected, rtol=1e-5, atol=1e-6)
    model.patch_embed.proj.register_forward_hook(lambda *_: None)  # step by step
    assert torch.allclose(model(pixels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "shape", "expected"),
    [
        ({}, (2, 3, 32, 40), r"images must be \[B, 3, 32, 32\], got \[2, 3, 32, 40\]"),
        ({}, (3, 32, 32), r"images must be \[B, 3, 32, 32\], got \[3, 32, 32\]"),
        ({}, (2, 1, 32, 32), r"images must be \[B, 3, 32, 32\]"),
        ({}, (2, 32, 32, 3), r"images must be \[B, 3, 32, 32\]"),
        ({"dynamic_img_size": True}, (2, 3, 33, 32), r"\[B, 3, H, W\] with multiples of 8 for H"),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (2, 4, 33, 32), r"\[B, 3, H, W\]"),
    ],
)
def test_images_of_another_shape_are_refused(
    arguments: dict[str, Any], shape: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        build(**arguments)(torch.zeros(shape))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind: str) -> None:
    model = build(**KINDS[kind])
    out, grads = run(model, torch.zeros(0, 3, 32, 32))
    assert out.shape == (0, 5)
    assert all(g is not None and not g.any() for g in grads.values())


# Compile, export, checkpointing


@pytest.mark.parametrize("kind", ["everything", "map", "swiglu"])
def test_compiled_equals_eager(kind: str, images: Tensor) -> None:
    model = build(**KINDS[kind])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = run(model, images)
    model.zero_grad()
    torch.manual_seed(7)
    out = compiled(images)
    out.square().sum().backward()
    assert_same((out.detach(), {n: p.grad for n, p in model.named_parameters()}), expected)


@pytest.mark.parametrize("kind", ["everything", "map"])
def test_exported_equals_eager(kind: str, images: Tensor) -> None:
    model = build(**KINDS[kind]).eval()
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    for batch in (images, images[:2]):
        assert torch.allclose(program.module()(batch), model(batch), atol=1e-6)


def test_checkpointing_changes_nothing_but_memory(images: Tensor) -> None:
    model = build(**EVERYTHING)
    expected = run(model, images)
    model.set_grad_checkpointing()
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    assert_same(run(model, images), expected)
    assert len(calls) == 2
    model.eval()(images)
    assert len(calls) == 3
    assert model.grad_checkpointing


# Loading


def test_positions_resize_from_the_grid_that_was_saved(tmp_path: Any) -> None:
    wide = build(img_size=(16, 64), reg_tokens=1)  # 2 x 8 patches: as many as 4 x 4
    square = build(reg_tokens=1)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    state = torch.load(tmp_path / "wide.pt", weights_only=True)
    assert list(state) == list(wide.state_dict())
    square.pos_embed.requires_grad_(False)
    square.load_state_dict(state)
    assert torch.equal(square.pos_embed, resample_pos_embed(wide.pos_embed, (4, 4), (2, 8), 2))
    assert not square.pos_embed.requires_grad
    parent = nn.ModuleDict({"encoder": build(img_size=(24, 48), reg_tokens=1)})
    parent["encoder"].load_state_dict(wide.state_dict())
    nested = nn.ModuleDict({"encoder": build(img_size=(16, 64), reg_tokens=1)})
    nested.load_state_dict(parent.state_dict())
    assert torch.equal(
        nested["encoder"].pos_embed,
        resample_pos_embed(parent["encoder"].pos_embed, (2, 8), (3, 6), 2),
    )


def test_positions_replaced_by_hand_are_a_square() -> None:
    small, large = build(), build(img_size=48)
    state = small.state_dict()
    state["pos_embed"] = large.pos_embed.detach()  # the grid that was saved with it is another
    large.load_state_dict(state)
    assert torch.equal(large.pos_embed, state["pos_embed"])
    wide = build(img_size=(16, 64))
    wide.load_state_dict(state)
    assert torch.equal(wide.pos_embed, resample_pos_embed(large.pos_embed, (2, 8), (6, 6), 1))


def test_positions_that_fit_no_grid_are_refused_and_nothing_is_loaded() -> None:
    model, other = build(), build(img_size=(24, 40))
    before = copy.deepcopy(model.state_dict())
    state = dict(other.state_dict())  # without metadata: 3 x 5 is no square
    with pytest.raises(
        ValueError, match=r"pos_embed is \[1, 16, 32\], expected.*15 positions are no grid"
    ):
        model.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_reset_classifier_refuses_and_leaves_the_model_alone(images: Tensor) -> None:
    model = build().eval()
    before, config, head = model(images), model.config, model.head
    for arguments in ((-1,), (3, "map"), (3, "mean"), ("ten",)):
        with pytest.raises((ValueError, TypeError)):
            model.reset_classifier(*arguments)
        assert model.config is config
        assert model.head is head
    assert torch.equal(model(images), before)
    model.reset_classifier(0, "")
    assert not model.head.training
    assert model(images).shape == (4, 17, 32)
    assert build(class_token=False, global_pool="avg").pool_include_prefix is False
    with pytest.raises(ValueError, match="'token' needs class_token"):
        build(class_token=False, global_pool="avg").reset_classifier(3, "token")


def test_init_weights_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        build().init_weights("xavier")


# The eager baseline


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 0.3, "drop_path_rate": 0.5},
        {"global_pool": "avg", "class_token": False},
        {"no_embed_class": True, "reg_tokens": 2, "qkv_bias": False, "mlp_ratio": 2},
        {"num_classes": 0, "final_norm": False, "mean": (0.1, 0.2, 0.3)},
    ],
)
def test_the_eager_baseline_is_the_same_network(arguments: dict[str, Any], images: Tensor) -> None:
    model = build(**arguments)
    eager = vitkern.EagerViT(model.config)
    eager.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(eager.state_dict(), strict=True)
    assert_same(run(eager, images), run(model, images))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(eager.eval()(pixels), model.eval()(pixels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [{"qk_norm": True}, {"global_pool": "max"}, {"act_layer": "relu"}, {"proj_drop_rate": 0.1}],
)
def test_the_eager_baseline_refuses_the_rest(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"EagerViT has no {next(iter(arguments))}="):
        vitkern.EagerViT(build(**arguments).config)


def test_public_names() -> None:
    for name in vitkern.__all__:
        value = getattr(vitkern, name)
        assert name == "__version__" or name == "PRESETS" or inspect.getdoc(value)


@pytest.mark.parametrize("hooked", ["", "patch_embed", "patch_embed.proj"])
def test_flips_chosen_samples_on_every_path(hooked: str, images: Tensor) -> None:
    model = build().eval()
    if hooked:  # then the fused op steps aside
        model.get_submodule(hooked).register_forward_hook(lambda *_: None)
    flip = torch.tensor([True, False, False, True])
    mirrored = images.clone()
    mirrored[flip] = images[flip].flip(3)
    torch.testing.assert_close(model(images, flip=flip), model(mirrored))
    pixels = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    mirrored = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    torch.testing.assert_close(model(pixels, flip=flip), model(mirrored))
