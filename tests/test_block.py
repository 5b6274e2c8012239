"""The block on its kernels: errors, saved bytes, launches, what makes it step aside, and its ways
to do less: the class token alone, a subset of the batch."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkern
from tests.error_budget import assert_within_budget, budget, error
from vitkern.kernels._gemm.launch import weight_grad
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._op import record_choices
from vitkern.kernels._triton import INTERPRET
from vitkern.model.block import Block
from vitkern.model.config import ViTConfig
from vitkern.model.fused import Stream
from vitkern.model.layers import DropPath

KERNELS = {"norm_linear": "triton", "attention": "triton", "linear_residual": "triton"}
EAGER = {"norm_linear": "torch", "attention": "sdpa", "linear_residual": "torch"}
SIZE: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "img_size": 16, "patch_size": 4}


def make_block(
    impl: Any, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> Block:
    """A block with weights of ordinary sizes; equal for equal options and seed."""
    config = ViTConfig(**{**SIZE, **options, "impl": impl})
    torch.manual_seed(seed)
    block = Block(config, config.drop_path_rate)
    with torch.no_grad():
        for name, p in block.named_parameters():
            centre = 1.0 if name.endswith(("gamma", "norm1.weight", "norm2.weight")) else 0.0
            scale = p.shape[-1] ** -0.5 if p.dim() == 2 else 0.2
            p.copy_(centre + scale * torch.randn_like(p))
    return block.to(dtype)


def outcome(block: Block, x: Tensor, grad: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """Output and gradients; stochastic depth drops the same samples every time."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = block(x)
    leaves = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"init_values": 1.0, "drop_path_rate": 0.4},
    "qk_norm": {"qk_norm": True},
    "swiglu": {"mlp_layer": "swiglu_packed", "act_layer": "silu", "norm_layer": "rmsnorm"},
    "two first layers": {"mlp_layer": "swiglu", "act_layer": "silu", "mlp_ratio": 2.0},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "quick_gelu": {"act_layer": "quick_gelu", "init_values": 1.0},
}


@pytest.mark.parametrize("save", [None, "minimal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_fused_halves_are_within_the_error_budget(
    name: str, dtype: torch.dtype, save: str | None, kernel_device: str
) -> None:
    options = {**OPTIONS[name], "save": save}
    # With seed 0 eager's float32 gradient of q_norm.bias, 16 values, is nearly exact by luck.
    seed = 1
    generator = torch.Generator().manual_seed(seed + 1)
    x, grad = (torch.randn(3, 17, 48, generator=generator).to(dtype) for _ in range(2))
    x, grad = (t.to(kernel_device) for t in (x + 0.5, grad))
    actual = outcome(make_block(KERNELS, dtype, seed, **options).to(kernel_device), x, grad)
    eager = outcome(make_block(EAGER, dtype, seed, **OPTIONS[name]).to(kernel_device), x, grad)
    exact = outcome(
        make_block("reference", dtype, seed, **OPTIONS[name]).double().to(kernel_device),
        x.double(),
        grad.double(),
    )
    assert_within_budget(exact, actual.values(), eager.values(), exact.values())


@pytest.mark.parametrize("save", ["balanced", "minimal"])
def test_save_works_without_kernels(save: str) -> None:
    """On a CPU the node runs on ATen calls, if it was asked for."""
    x, grad = torch.randn(3, 17, 48, dtype=torch.float64), torch.randn(3, 17, 48)
    for options in OPTIONS.values():
        actual = outcome(make_block("auto", torch.float64, save=save, **options), x, grad)
        exact = outcome(make_block("auto", torch.float64, **options), x, grad)
        for key, value in exact.items():
            torch.testing.assert_close(actual[key], value, msg=key)


def test_strided_inputs_and_gradients(kernel_device: str) -> None:
    x, grad = (torch.randn(2, 5, 48, device=kernel_device) for _ in range(2))
    block = make_block(KERNELS).to(kernel_device)
    expected = outcome(block, x, grad)
    strided = {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda t: torch.stack([t, t + 1], -1)[..., 0],
        "columns first": lambda t: t.mT.contiguous().mT,
    }
    for kind, change in strided.items():
        actual = outcome(block, change(x), change(grad))
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, msg=f"{kind} {key}")
    one = torch.ones((), device=kernel_device).expand(2, 5, 48)
    torch.testing.assert_close(
        outcome(block, x, one)["x"], outcome(block, x, one.contiguous())["x"]
    )


def test_a_wide_stream_under_autocast(kernel_device: str) -> None:
    """float16 products under autocast, the stream stays float32 as in eager."""
    if kernel_device == "cpu":
        autocast = torch.autocast("cpu", torch.float16)
    else:
        autocast = torch.autocast("cuda", torch.float16)
    x, grad = (torch.randn(2, 9, 48, device=kernel_device) for _ in range(2))

    def run(impl: Any) -> dict[str, Tensor]:
        block = make_block(impl, init_values=1.0).to(kernel_device)
        leaf = x.clone().requires_grad_()
        with autocast:
            y = block(leaf)
        leaves = {"x": leaf, **dict(block.named_parameters())}
        found = torch.autograd.grad(y, list(leaves.values()), grad)
        return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}

    actual, eager = run(KERNELS), run(EAGER)
    exact = outcome(
        make_block("reference", init_values=1.0).double().to(kernel_device),
        x.double(),
        grad.double(),
    )
    for key, value in exact.items():
        assert actual[key].dtype == eager[key].dtype == torch.float32, key
        allowed = max(2 * error(eager[key], value), torch.finfo(torch.float16).eps / 2)
        assert error(actual[key], value) <= allowed, key


@pytest.mark.parametrize(
    ("mean", "spread"), [(100.0, 1.0), (1e3, 1.0), (1e4, 0.1)], ids=lambda v: f"{v:g}"
)
def test_rows_far_from_zero(mean: float, spread: float, kernel_device: str) -> None:
    """A stream whose mean is large against its spread, and one outlier channel."""
    x = mean + spread * torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 5
    x, grad = x.to(kernel_device), torch.randn(2, 9, 48).to(kernel_device)
    names = ("y", "x", "norm1.weight", "attn.qkv.weight")

    def run(impl: Any, dtype: torch.dtype) -> list[Tensor]:
        # What the branch adds, not its sum with the stream, which would hide everything.
        found = outcome(make_block(impl, dtype).to(kernel_device), x.to(dtype), grad.to(dtype))
        found["y"] = found["y"] - x.to(dtype)
        return [found[name] for name in names]

    assert_within_budget(
        names,
        run(KERNELS, torch.float32),
        run(EAGER, torch.float32),
        run("reference", torch.float64),
    )


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the kernels launched inside the block, which run all the same."""
    names: list[str] = []

    def handle(launch: Launch) -> None:
        names.append(launch.kernel.fn.__name__)
        launch.run()

    with intercept(handle):
        yield names


@pytest.mark.parametrize("tokens", [17, 200])
@pytest.mark.parametrize("save", [None, "minimal"])
def test_launches(tokens: int, save: str | None, kernel_device: str) -> None:
    block = make_block(
        KERNELS, init_values=1.0, drop_path_rate=0.2, save=save, embed_dim=32, num_heads=1
    )
    x = torch.randn(1, tokens, 32, device=kernel_device, requires_grad=True)
    with counted() as forward:
        y = block.to(kernel_device)(x)
    with counted() as backward:
        y.sum().backward()
    assert len(forward) == 6, forward  # the first norm's statistics, three and two products
    recomputed = 0 if save is None else 2  # fc1, attention
    attention = sum("backward" in name for name in backward)
    assert attention in (1, 2)
    # Of each of four layers: its input's gradient, its weight's, and what is left to do after both.
    assert len(backward) == 4 * 3 + attention + recomputed, backward
    with torch.no_grad(), counted() as chained:
        stream = block.run(Stream(x), need_stats=True)
        block.run(stream)
    assert len(chained) == 6 + 5, chained


class Saved:
    """Bytes that autograd keeps, each storage once, but those of weights and of their copies."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        self.weights = weights
        self.storages: dict[int, Tensor] = {}

    def pack(self, t: Tensor) -> Tensor:
        if {tuple(t.shape), tuple(reversed(t.shape))}.isdisjoint(self.weights):
            self.storages[t.untyped_storage().data_ptr()] = t
        return t

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.storages.values())


def saved_bytes(block: nn.Module, x: Tensor) -> float:
    """Bytes a token and unit of width that a training step keeps under CPU autocast in bfloat16."""
    shapes = {tuple(p.shape) for p in block.parameters() if p.dim() == 2}
    saved = Saved(shapes)
    x = x.clone().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        block(x)
    return saved.bytes / x.numel()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_saved_bytes_against_timm() -> None:
    """The values are of no interest here, so bfloat16 may go through the interpreter."""
    timm = pytest.importorskip("timm")
    if torch.cuda.is_available():
        pytest.skip("the kernels run on CPU tensors only where they are interpreted")
    size: dict[str, Any] = {"embed_dim": 192, "num_heads": 3}
    x = torch.randn(1, 197, 192)
    theirs = saved_bytes(timm.models.vision_transformer.Block(192, 3, qkv_bias=True), x)
    shares = {
        save: saved_bytes(make_block(KERNELS, save=save, **size), x) / theirs
        for save in (None, "balanced", "minimal")
    }
    assert shares[None] == shares["balanced"]
    assert shares["balanced"] <= 0.56
    assert shares["minimal"] <= 0.33


class Adapted(nn.Module):
    """A linear layer with a low-rank update, as PEFT libraries wrap one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def adapt(module: Any, name: str) -> None:
    setattr(module, name, Adapted(getattr(module, name)))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "attn.qkv wrapped": (lambda b: adapt(b.attn, "qkv"), "attention half"),
    "attn.proj hooked": (lambda b: hook(b.attn.proj), "attention half"),
    "attn hooked": (lambda b: hook(b.attn), "attention half"),
    "norm1 hooked": (lambda b: hook(b.norm1), "attention half"),
    "ls1 replaced": (lambda b: setattr(b, "ls1", nn.Identity()), ""),
    "dropout": (lambda b: setattr(b.attn.attn_drop, "p", 0.5), "attention half"),
    "mlp.fc1 wrapped": (lambda b: adapt(b.mlp, "fc1"), "MLP half"),
    "mlp.fc2 hooked": (lambda b: hook(b.mlp.fc2), "MLP half"),
    "mlp.act replaced": (lambda b: setattr(b.mlp, "act", nn.Tanh()), "MLP half"),
    "norm2 replaced": (lambda b: setattr(b, "norm2", nn.LayerNorm(48)), "MLP half"),
    "drop_path2 hooked": (lambda b: hook(b.drop_path2), "MLP half"),
    "mlp compiled": (lambda b: b.mlp.compile(backend="eager"), "MLP half"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fused_half_steps_aside_and_says_so(name: str) -> None:
    change, half = CHANGES[name]
    block = make_block("auto", init_values=1.0)
    change(block)
    with record_choices() as choices:
        block(torch.randn(2, 5, 48)).sum().backward()
    aside = {c.op: c.why for c in choices if c.implementation == "module by module"}
    assert list(aside) == ([half] if half else [])
    if half and name != "dropout":
        part = name.split()[0]
        assert part in aside[half] or "a layer of mlp" in aside[half]


def test_a_quantised_weight_is_not_taken_for_a_plain_one() -> None:
    class Quantised(Tensor):
        pass

    block = make_block("auto")
    weight: Any = block.attn.qkv.weight.detach().as_subclass(Quantised)
    block.attn.qkv.weight = nn.Parameter(weight)
    assert "attn.qkv" in (block.attention_problem() or "")


def test_a_save_that_attention_cannot_keep_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitkern.model import fused

    block = make_block("auto", save="minimal")
    monkeypatch.setattr(fused, "select_attention", lambda *_: "flash")
    monkeypatch.setattr(fused, "run_attention", lambda _, qkv, *__: qkv[:, :, 2].flatten(2))
    with record_choices() as choices:
        block(torch.randn(1, 5, 48)).sum().backward()
    (why,) = (c.why for c in choices if c.op == "attention half")
    assert why == "save='minimal' has no flash attention"


def test_an_op_asked_for_by_name_is_used() -> None:
    with record_choices() as choices:
        make_block({"linear_act": "reference"})(torch.randn(1, 5, 48))
    by_op = {c.op: c for c in choices}
    assert by_op["linear_act"].implementation == "reference"
    assert by_op["MLP half"].why == "impl names linear_act"
    assert "norm_linear" not in by_op


@pytest.mark.parametrize("save", ["balanced", "minimal"])
def test_activation_checkpointing(save: str) -> None:
    x, grad = torch.randn(2, 5, 48, dtype=torch.float64), torch.randn(2, 5, 48)
    options: dict[str, Any] = {"drop_path_rate": 0.5, "init_values": 1.0, "save": save}
    block = make_block("auto", torch.float64, **options)
    expected = outcome(block, x, grad)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(block, leaf, use_reentrant=False)
    y.backward(grad.double())
    torch.testing.assert_close(leaf.grad, expected["x"])
    torch.testing.assert_close(y.detach(), expected["y"])


@pytest.mark.parametrize("frozen", ["all but norms", "all but biases", "all but ls", "only x", "x"])
def test_some_gradients_only(frozen: str, kernel_device: str) -> None:
    block = make_block(KERNELS, init_values=1.0).to(kernel_device)
    x, grad = (torch.randn(2, 5, 48, device=kernel_device) for _ in range(2))
    expected = outcome(block, x, grad)
    for name, p in block.named_parameters():
        wanted = {
            "all but norms": "norm" in name,
            "all but biases": name.endswith("bias"),
            "all but ls": name.startswith("ls"),
            "only x": False,
            "x": True,
        }[frozen]
        p.requires_grad_(wanted)
    leaf = x.clone().requires_grad_(frozen != "x")
    torch.manual_seed(3)
    block(leaf).backward(grad)
    leaves: dict[str, Tensor] = {"x": leaf, **dict(block.named_parameters())}
    for name, t in leaves.items():
        if t.requires_grad:
            torch.testing.assert_close(t.grad, expected[name], msg=name)
        else:
            assert t.grad is None, name


MODEL: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5,
}  # fmt: skip


def logits_and_gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    logits = model(images)
    logits.square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return [logits.detach(), *(g for g in found if g is not None)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reg_tokens": 2, "qk_norm": True},
        {"init_values": 0.1, "drop_path_rate": 0.5, "qkv_bias": False},
        {"mlp_layer": "swiglu", "mlp_ratio": 2.0, "norm_layer": "rmsnorm"},
    ],
    ids=str,
)
def test_the_last_block_computes_the_class_token_alone(options: dict[str, Any]) -> None:
    model = vitkern.ViT(**MODEL, **options).double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert "attention_pool" in {r.op for r in vitkern.explain(model, images).rows}
    alone = logits_and_gradients(model, images)
    hook(model.norm)  # somebody looks at all tokens
    assert "attention_pool" not in {r.op for r in vitkern.explain(model, images).rows}
    for a, b in zip(alone, logits_and_gradients(model, images), strict=True):
        torch.testing.assert_close(a, b)


def test_all_tokens_are_computed_where_they_may_be_read() -> None:
    images = torch.randn(2, 3, 16, 16)

    def alone(model: vitkern.ViT) -> bool:
        return "attention_pool" in {r.op for r in vitkern.explain(model, images).rows}

    assert alone(vitkern.ViT(**MODEL))
    assert not alone(vitkern.ViT(**MODEL, global_pool="avg"))
    assert not alone(vitkern.ViT(**MODEL, impl={"attention": "sdpa"}))
    for path in ("blocks.2", "blocks.2.attn", "blocks.2.mlp.fc2", "blocks"):
        model = vitkern.ViT(**MODEL)
        hook(model.get_submodule(path))
        assert not alone(model), path

    class Other(vitkern.ViT):
        def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
            return x.mean(1)

    assert not alone(Other(**MODEL))
    model = vitkern.ViT(**MODEL)
    assert model.forward_features(images).shape == (2, 17, 32)


def test_checkpointing_a_model_whose_last_block_is_cut_short() -> None:
    model = vitkern.ViT(**MODEL, drop_path_rate=0.3).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = logits_and_gradients(model, images)
    model.set_grad_checkpointing()
    for a, b in zip(logits_and_gradients(model, images), expected, strict=True):
        torch.testing.assert_close(a, b)
    ran: list[int] = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    hook(model.blocks)  # which must not switch the checkpoints off
    model(images).sum().backward()
    assert len(ran) == 2


def test_a_model_without_blocks() -> None:
    model = vitkern.ViT(**MODEL)
    model.blocks = nn.Sequential()
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


class TestSubset:
    """drop_path_mode="subset"."""

    def test_the_samples_kept_are_scaled_and_the_others_pass(self) -> None:
        block = make_block("auto", torch.float64, drop_path_rate=0.5, drop_path_mode="subset")
        block.drop_path2 = nn.Identity()
        x = torch.randn(6, 5, 48, dtype=torch.float64)
        torch.manual_seed(5)
        y = block.attention_half(Stream(x), False).x
        torch.manual_seed(5)
        kept = torch.randperm(6)[:3]
        branch = block.attn(block.norm1(x)) * 2
        expected = x.clone()
        expected[kept] += branch[kept]
        torch.testing.assert_close(y, expected)

    def test_statistics(self) -> None:
        """Of B samples round(B (1 - p)) are kept, each equally often; the expectation is right."""
        block = make_block("auto", torch.float64, drop_path_rate=0.3, drop_path_mode="subset")
        x = torch.randn(5, 3, 48, dtype=torch.float64)
        full = block.eval().attention_half(Stream(x), False).x
        block.train()
        total, kept = torch.zeros_like(x), Counter[int]()
        rounds = 200
        for _ in range(rounds):
            y = block.attention_half(Stream(x), False).x
            changed = [b for b in range(5) if not torch.equal(y[b], x[b])]
            assert len(changed) == 4  # round(5 * 0.7)
            kept.update(changed)
            total += y
        # Each is kept with probability 4/5: 160 times, standard deviation below 6.
        assert all(abs(kept[b] - 160) < 30 for b in range(5)), kept
        shift = (total / rounds - x).norm() / (full - x).norm()
        assert abs(shift - 1) < 0.1

    def test_too_small_a_rate_drops_nothing(self) -> None:
        block = make_block("auto", drop_path_rate=0.1, drop_path_mode="subset")
        x = torch.randn(4, 5, 48)
        torch.testing.assert_close(block(x), block.eval()(x))

    def test_it_computes_less(self) -> None:
        seen: list[int] = []
        block = make_block("auto", drop_path_rate=0.5, drop_path_mode="subset")
        block.mlp.fc2.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
        block(torch.randn(6, 5, 48))
        assert seen == [3]

    def test_gradients(self) -> None:
        for impl in ("auto", "reference"):
            options: dict[str, Any] = {"drop_path_mode": "subset", "init_values": 1.0}
            block = make_block(impl, torch.float64, drop_path_rate=0.5, **options)
            x = torch.randn(4, 3, 48, dtype=torch.float64, requires_grad=True)

            def call(x: Tensor, block: Block = block) -> Tensor:
                torch.manual_seed(1)
                return block(x)

            assert torch.autograd.gradcheck(call, (x,))

    def test_a_model_takes_it(self) -> None:
        model = vitkern.ViT(**MODEL, drop_path_rate=0.5, drop_path_mode="subset")
        model(torch.randn(4, 3, 16, 16)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert isinstance(model.blocks[2].drop_path1, DropPath)


class TestCompile:
    """torch.compile with the whole model in one graph."""

    @pytest.mark.parametrize("save", [None, "balanced", "minimal"])
    def test_fullgraph(self, save: str | None) -> None:
        model = vitkern.ViT(**MODEL, init_values=0.1, save=save)
        images = torch.randn(2, 3, 16, 16)
        expected = logits_and_gradients(model, images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for a, b in zip(logits_and_gradients(compiled, images), expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.compiler.reset()

    def test_fullgraph_on_kernels(self, kernel_device: str) -> None:
        impl = {**KERNELS, "attention_pool": "triton"}
        model = vitkern.ViT(**{**MODEL, "depth": 2}, init_values=0.1, impl=impl).to(kernel_device)
        images = torch.randn(2, 3, 16, 16, device=kernel_device)
        expected = logits_and_gradients(model, images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for a, b in zip(logits_and_gradients(compiled, images), expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.compiler.reset()

    def test_few_recompilations_over_batches_and_resolutions(self) -> None:
        from torch._dynamo.testing import CompileCounter

        torch.compiler.reset()
        counter = CompileCounter()
        model = vitkern.ViT(**MODEL, dynamic_img_size=True).eval()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        with torch.no_grad():
            for batch in (2, 3, 5, 8):
                for side in (16, 24, 32):
                    images = torch.randn(batch, 3, side, side)
                    torch.testing.assert_close(compiled(images), model(images))
        # The first, one with the batch left open, one with the resolution left open, and those of
        # the trained resolution, whose positions need no resampling.
        assert counter.frame_count <= 4
        torch.compiler.reset()


def test_a_training_run_follows_the_eager_one(kernel_device: str) -> None:
    """100 steps on digits: the kernels' losses are as near to float64's as eager float32's."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=kernel_device)[:, None] / 16
    labels = torch.tensor(digits.target, device=kernel_device)
    size: dict[str, Any] = {
        "img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 1,
        "num_classes": 10, "init_values": 1.0, "weight_init": "jax",  # timm's own learns too late
    }  # fmt: skip

    def losses(impl: Any, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = vitkern.ViT(**size, impl=impl).to(kernel_device, dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        curve = []
        for step in range(100):
            rows = slice(16 * step % 1600, 16 * step % 1600 + 16)
            loss = nn.functional.cross_entropy(model(images[rows].to(dtype)), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        return torch.stack(curve).cpu()

    exact = losses("reference", torch.float64)
    eager = losses({**EAGER, "attention_pool": "sdpa"}, torch.float32)
    actual = losses({**KERNELS, "attention_pool": "triton"}, torch.float32)
    assert exact[-20:].mean() < exact[:20].mean() - 0.3  # it learns
    assert error(actual, exact) <= budget(eager, exact)


def test_a_bias_gradient_of_many_tokens_is_as_right_as_pytorchs() -> None:
    """On cards that weights alone fill, one program adds up what hundreds of steps give."""
    if not INTERPRET:
        pytest.skip("the kernels are compiled in this process: TRITON_INTERPRET is not set")
    dy = torch.randn(12608, 8, generator=torch.Generator().manual_seed(0))
    with intercept(Launch.run, (9, 0), 1):
        partial = weight_grad(dy, dy)
    assert partial.splits == 1
    exact = dy.double().sum(0)
    assert error(partial.bias.sum(0), exact) <= budget(dy.sum(0), exact)
