"""A whole model on its kernels, under everything that scripts do to one: precisions, compilers,
recomputation, graphs, streams, other devices, wrappers for many GPUs.

Where it can, a test runs in Triton's interpreter too, where float16 stands for bfloat16.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkern
from tests.error_budget import assert_within_budget
from vitkern.kernels import linear_act, linear_residual, norm_linear

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "cuda": {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3},
}

ATEN = {"patch_embed": "torch", "attention": "sdpa"} | dict.fromkeys(
    ("layer_norm", "add_layer_norm", "norm_linear", "linear_act", "linear_residual"), "torch"
)
TRITON = dict.fromkeys(ATEN, "triton")
CUBLAS = {op: "cublas" if "linear" in op else "triton" for op in ATEN}

Results = dict[str, Tensor]


def make(impl: Any, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> vitkern.ViT:
    common: dict[str, Any] = {"num_classes": 10, "init_values": 0.5, "global_pool": "avg"}
    torch.manual_seed(0)
    model = vitkern.ViT(**{**SIZES[device.partition(":")[0]], **common, **options}, impl=impl)
    with torch.no_grad():  # as after some training: no zeros, no small branches
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.to(device, dtype)


@torch.no_grad()
def disturb(model: nn.Module, seed: int) -> None:
    """Other weights, the same for all dtypes and devices."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))


def batch(device: str, n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    side = SIZES[device.partition(":")[0]]["img_size"]
    images = torch.randn(n, 3, side, side, generator=generator)
    return images.to(device), (torch.arange(n) % 10).to(device)


def step(
    call: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, labels: Tensor
) -> Results:
    """Logits and all gradients of one training step of `model`, called by `call`."""
    images = images.detach().requires_grad_()
    logits = call(images)
    loss = F.cross_entropy(logits.double(), labels)
    leaves = {"images": images, **dict(model.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"logits": logits.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_equal(actual: Results, expected: Results) -> None:
    for (name, a), e in zip(actual.items(), expected.values(), strict=True):
        assert torch.equal(a.cpu(), e.cpu()), name


def autocast(device: str, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device, dtype) if dtype else nullcontext()


def half(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float16


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


# Parameters' dtype, and autocast's.
PRECISIONS = {
    "float32": (torch.float32, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast float16": (torch.float32, torch.float16),
    "autocast bfloat16": (torch.float32, torch.bfloat16),
}


def hold(
    impl: Any,
    device: str,
    precision: str,
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda model: model,
    **options: Any,
) -> None:
    """At most twice eager's error, in logits and in every gradient."""
    dtype, cast = PRECISIONS[precision]
    if device == "cpu" and torch.bfloat16 in (dtype, cast):
        pytest.skip("the interpreter's bfloat16 products are wrong")
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("as under autocast, but for a GPU, where it costs nothing")

    def results(
        impl: Any, dtype: torch.dtype, cast: torch.dtype | None, wrap: Any = lambda model: model
    ) -> Results:
        model = make(impl, device, **options).to(dtype)
        call = wrap(model)
        found: dict[str, list[Tensor]] = {}
        # With one batch and one set of weights, some small gradient of eager's is exact by luck.
        for seed in range(2 if device == "cpu" else 4):
            images, labels = batch(device, seed=seed)
            with autocast(device, cast):
                for name, value in step(call, model, images.to(dtype), labels).items():
                    found.setdefault(name, []).append(value)
            disturb(model, seed)
        return {name: torch.stack(values) for name, values in found.items()}

    exact = results("reference", torch.float64, None)
    actual, eager = results(impl, dtype, cast, wrap), results(ATEN, dtype, cast)
    assert_within_budget(exact, actual.values(), eager.values(), exact.values())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers, QK norm": {"reg_tokens": 2, "qk_norm": True, "class_token": True},
    "SwiGLU, RMS norms": {
        "mlp_layer": "swiglu_packed", "act_layer": "silu", "norm_layer": "rmsnorm",
    },
    "pre-norm, attention pool": {"pre_norm": True, "global_pool": "map"},
    "norms after the branches": {"block_fn": "res_post_norm", "init_values": None},
    "parallel branches": {"block_fn": "parallel_scaling"},
    "saves little": {"save": "minimal"},
}  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", OPTIONS)
def test_kinds_of_networks(options: str, precision: str, kernel_device: str) -> None:
    chosen = OPTIONS[options]
    pooled = {"attention_pool": "triton"} if chosen.get("global_pool") == "map" else {}
    hold(TRITON | pooled, kernel_device, precision, **chosen)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_by_pytorch(precision: str, kernel_device: str) -> None:
    hold(CUBLAS, kernel_device, precision)


@pytest.mark.parametrize("impl", [TRITON, CUBLAS, "auto"], ids=["triton", "cublas", "auto"])
@pytest.mark.usefixtures("tf32")
@pytest.mark.gpu
def test_tf32(impl: Any) -> None:
    """Without a GPU, where PyTorch has no TF32, see test_tf32.py."""
    hold(impl, "cuda", "float32")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_auto_takes(precision: str) -> None:
    hold("auto", "cuda", precision)


@pytest.mark.parametrize(("cast", "save"), [(True, None), (False, "minimal")])
def test_checkpointing_changes_no_bit(cast: bool, save: str | None, kernel_device: str) -> None:
    images, labels = batch(kernel_device)
    found = []
    for checkpoint in (False, True):
        model = make(TRITON, kernel_device, save=save, drop_path_rate=0.3)
        model.set_grad_checkpointing(checkpoint)
        torch.manual_seed(5)  # stochastic depth's draws are repeated, too
        with autocast(kernel_device, half(kernel_device) if cast else None):
            found.append(step(model, model, images, labels))
    assert_equal(found[1], found[0])


def test_frozen_parts_get_no_gradient_and_change_none(kernel_device: str) -> None:
    images, labels = batch(kernel_device)
    model = make(TRITON, kernel_device)
    expected = step(model, model, images, labels)
    for trained in ("head", "blocks.0.mlp", "blocks.0.attn.qkv.bias", "patch_embed"):
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(trained))
            p.grad = None
        F.cross_entropy(model(images).double(), labels).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert torch.equal(p.grad, expected[name]), (trained, name)
            else:
                assert p.grad is None, (trained, name)


def test_gradients_add_up_over_micro_batches(kernel_device: str) -> None:
    images, labels = batch(kernel_device, 4)
    model = make(TRITON, kernel_device)
    whole = step(model, model, images, labels)
    for part in range(2):
        rows = slice(2 * part, 2 * part + 2)
        (F.cross_entropy(model(images[rows]).double(), labels[rows]) / 2).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], msg=name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any], kernel_device: str) -> None:
    images, labels = batch(kernel_device)
    model = make(TRITON, kernel_device)
    expected = step(model, model, images, labels)["logits"]
    with mode():
        torch.testing.assert_close(model(images), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [TRITON, CUBLAS, "auto"], ids=["triton", "cublas", "auto"])
@pytest.mark.parametrize("precision", ["float32", "autocast bfloat16"])
def test_compiled_by_inductor(precision: str, impl: Any) -> None:
    torch.compiler.reset()
    hold(impl, "cuda", precision, lambda model: torch.compile(model, fullgraph=True))
    torch.compiler.reset()


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_into_cuda_graphs() -> None:
    images, _ = batch("cuda")
    model = make(TRITON, "cuda").eval()
    expected = model(images)
    torch.compiler.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # eager, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(images).clone(), expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [TRITON, CUBLAS, "auto"], ids=["triton", "cublas", "auto"])
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_a_training_step_in_a_cuda_graph(cast: torch.dtype | None, impl: Any) -> None:
    images, labels = batch("cuda")
    model = make(impl, "cuda")

    def run() -> Results:
        with torch.autocast("cuda", cast or torch.bfloat16, cast is not None, cache_enabled=False):
            return step(model, model, images, labels)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for p in captured.values():
        p.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [TRITON, CUBLAS, "auto"], ids=["triton", "cublas", "auto"])
def test_on_a_stream_of_ones_own(impl: Any) -> None:
    """A first use's own check, and memory for descriptors, must be on this stream as well."""
    images, labels = batch("cuda")
    model = make(impl, "cuda")
    expected = step(model, model, images, labels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            actual = step(model, model, images, labels)
    stream.synchronize()
    assert_equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [TRITON, CUBLAS], ids=["triton", "cublas"])
def test_two_streams_at_once(impl: Any) -> None:
    images, labels = batch("cuda")
    model = make(impl, "cuda")
    expected = step(model, model, images, labels)
    streams = [torch.cuda.Stream() for _ in range(2)]
    found: list[Results] = []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(step(model, model, images, labels))
    torch.cuda.synchronize()
    for each in found:
        assert_equal(each, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [TRITON, CUBLAS], ids=["triton", "cublas"])
def test_on_another_device_than_the_current_one(impl: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    models = [make(impl, device) for device in ("cuda:0", "cuda:1")]
    first, second = (step(m, m, *batch(f"cuda:{n}")) for n, m in enumerate(models))
    assert_equal(second, first)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [TRITON, CUBLAS, "auto"], ids=["triton", "cublas", "auto"])
def test_a_hundred_steps_are_equal_to_the_last_bit(impl: Any) -> None:
    images, labels = batch("cuda", 40)
    model = make(impl, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected = step(model, model, images, labels)
        for _ in range(100):
            assert_equal(step(model, model, images, labels), expected)


@pytest.mark.gpu
def test_float16_with_a_scaler_learns() -> None:
    images, labels = batch("cuda", 40)
    model = make("auto", "cuda")
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 1e-3), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    first, last = (float(losses[n]) for n in (0, -1))
    assert last < first / 2
    assert scaler.get_scale() >= 2.0**14  # a few steps are skipped at first, no more


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrapped_for_many_gpus(wrapper: str) -> None:
    images, labels = batch("cuda")
    plain = make("auto", "cuda")
    expected = step(plain, plain, images, labels)
    model: nn.Module = make("auto", "cuda")
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    logits = model(images)
    F.cross_entropy(logits.double(), labels).backward()
    torch.testing.assert_close(logits, expected["logits"])
    for name, p in model.named_parameters():
        grad: Any = p.grad
        grad = grad.full_tensor() if wrapper == "fsdp" else grad
        name = name.removeprefix("module.")
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("card_to_itself")
class TestLargeLinears:
    """More than 2^31 elements, and more programs than axes 1 and 2 of a grid can count."""

    def test_rows_far_apart(self, kernel_device: str) -> None:
        """Two rows 2^31 values apart, which PyTorch's own products refuse; memory that is never
        touched costs nothing.
        """
        if kernel_device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
            pytest.skip("needs 5 GB of GPU memory")
        storage = torch.empty(2**31 + 64, dtype=torch.float16, device=kernel_device)
        far = storage.as_strided((2, 1, 64), (2**31, 64, 1))
        generator = torch.Generator().manual_seed(0)
        near = torch.randn(2, 1, 64, generator=generator).to(far)
        weight = torch.randn(64, 64, generator=generator).to(far) / 8
        bias = gain = torch.ones(64).to(far)
        far.copy_(near)
        for call in (
            lambda x, w: linear_act(x, w, bias, activation="gelu", impl="triton"),
            lambda x, w: norm_linear(x, w, bias, gain, bias, impl="triton"),
            lambda x, w: linear_residual(x, w, bias, x, impl="triton"),
        ):
            found = []
            for x in (far, near):
                leaf, w = x.detach().requires_grad_(), weight.clone().requires_grad_()
                # Of a gradient whose rows are far apart, too.
                out = call(leaf, w)
                grads = torch.autograd.grad(out, (leaf, w), x)
                found.append((out, *grads))
            for a, e in zip(*found, strict=True):
                assert torch.equal(a, e)

    @pytest.mark.gpu
    @pytest.mark.parametrize("impl", ["triton", "cublas", "gluon"])
    @pytest.mark.parametrize("residual", [False, True])
    def test_results_of_more_than_int32_counts(self, residual: bool, impl: str) -> None:
        """The last rows of a tensor of 2^31 values and more, and the sum over all of them."""
        rows, width = 2**20 + 77, 2056
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GB of GPU memory")
        if impl == "gluon" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a GPU of compute capability 9.0")
        torch.manual_seed(0)
        x, weight, bias = (
            torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
            for shape in ((1, rows, 16), (width, 16), (width,))
        )
        weight.requires_grad_()
        bias.requires_grad_()
        stream = torch.ones(1, rows, width, device="cuda", dtype=torch.bfloat16)
        if residual:
            out = linear_residual(x, weight, bias, stream, impl=impl)
        else:
            out = linear_act(x, weight, bias, activation="gelu", impl=impl)
        (d_bias,) = torch.autograd.grad(out, bias, stream)

        last = slice(rows - 300, rows)
        product = F.linear(x[:, last].double(), weight.double(), bias.double())
        exact = product + 1 if residual else F.gelu(product)
        assert (out[:, last] - exact).norm() / exact.norm() < 6e-3  # bfloat16: two roundings
        if residual:  # a sum of ones
            torch.testing.assert_close(d_bias, torch.full_like(d_bias, rows), rtol=1e-2, atol=0)
        assert torch.isfinite(d_bias).all()
