"""What only a GPU can show: streams, graphs, other devices, training in bfloat16."""

import gc
import time
import weakref
from functools import partial

import pytest
import torch

import vitkern
from benchmarks._measure import Timer
from benchmarks._models import graphed
from vitkern.kernels import QKNorm, add_layer_norm, attention, layer_norm, patch_embed

pytestmark = pytest.mark.gpu


def step(device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """Every Triton forward and backward once, on fixed inputs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    images, weight, pos = normal(2, 3, 32, 32), normal(64, 3, 8, 8), normal(17, 64)
    prefix, gamma, beta, scale = normal(1, 64), normal(64), normal(64), normal(64)
    tokens = patch_embed(images, weight, beta, pos, prefix, impl="triton")
    normed = layer_norm(tokens, gamma, beta, impl="triton")
    stream, out = add_layer_norm(tokens, normed, gamma, beta, layer_scale=scale, impl="triton")
    norm = QKNorm(*normal(4, 16).unbind(0))
    attended: list[torch.Tensor] = []
    for length in (50, 300):  # backward in one launch, and in two
        qkv = normal(1, length, 3, 2, 16)
        for qk_norm in (None, norm):
            result = attention(qkv, qk_norm=qk_norm, impl="triton")
            attended += [result.detach(), *torch.autograd.grad(result.square().sum(), qkv)]
    grads = torch.autograd.grad(
        (out * stream).sum(), [images, weight, pos, prefix, gamma, beta, scale]
    )
    return stream.detach(), out.detach(), *grads, *attended


def assert_equal(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), e.cpu())


def test_a_stream_of_ones_own() -> None:
    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = step()
    stream.synchronize()
    assert_equal(actual, expected)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_equal(step("cuda:1"), step("cuda:0"))


def test_captured_in_a_cuda_graph() -> None:
    model = vitkern.ViT(
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        init_values=0.1,
        device="cuda",
    ).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        expected = model(images)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = model(images)
    images.copy_(images.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected.flip(0), rtol=0, atol=1e-2)


def test_auto_takes_the_kernels() -> None:
    """Where nothing was measured."""
    model = vitkern.ViT(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, device="cuda"
    )
    with torch.autocast("cuda", torch.bfloat16):
        rows = vitkern.explain(model, torch.randn(2, 3, 32, 32, device="cuda")).rows
    taken = {row.op: row.implementation for row in rows}
    if "not measured" not in " ".join(row.why for row in rows):
        pytest.skip("this card has a table of measurements")
    ours = ("patch_embed", "norm_linear", "attention", "linear_residual", "layer_norm")
    assert {op: taken.get(op) for op in ours} == dict.fromkeys(ours, "triton")


@pytest.mark.parametrize("tokens", [50, 300])
def test_attention_forward_and_backward_in_a_cuda_graph(tokens: int) -> None:
    qkv = torch.randn(2, tokens, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([0, 20, tokens], dtype=torch.int32, device="cuda")

    def both() -> tuple[torch.Tensor, ...]:
        dense = attention(qkv, impl="triton")
        ragged = attention(qkv[0], cu_seqlens=ends, max_seqlen=tokens, impl="triton")
        return dense, ragged, *torch.autograd.grad(dense.sum() + ragged.sum(), qkv)

    expected = both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, expected)


def test_attention_of_more_heads_than_a_grid_axis_holds() -> None:
    qkv = torch.randn(40_000, 2, 3, 2, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = attention(qkv, impl="triton")
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    last = qkv.detach()[-3:].requires_grad_()
    alone = attention(last, impl="triton")
    assert_equal((out[-3:], dqkv[-3:]), (alone, *torch.autograd.grad(alone.sum(), last)))


@pytest.mark.parametrize("autocast", [True, False])
def test_trains_as_the_reference_does_in_bfloat16(autocast: bool) -> None:
    losses: dict[str, list[float]] = {}
    for impl in ("auto", "reference"):
        torch.manual_seed(0)
        model = vitkern.ViT(
            img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10,
            impl=impl, device="cuda", dtype=torch.float32 if autocast else torch.bfloat16,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        images = torch.randn(64, 3, 32, 32, device="cuda")
        labels = torch.arange(64, device="cuda") % 10
        losses[impl] = []
        for _ in range(50):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
                logits = model(images if autocast else images.bfloat16())
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[impl].append(loss.item())
    actual, expected = (torch.tensor(losses[impl]) for impl in ("auto", "reference"))
    assert expected[-1] < expected[0] / 2
    assert (actual - expected).abs().mean() < 0.05


@torch.no_grad()
def test_a_benchmarks_graph_keeps_what_it_reads() -> None:
    module, x = torch.nn.Linear(64, 64, device="cuda"), torch.randn(4, 64, device="cuda")
    expected, alive = module(x), weakref.ref(module)
    replay = graphed(partial(module, x))
    del module, x
    gc.collect()
    assert alive() is not None
    assert_equal((replay(),), (expected,))


def test_the_timer_leaves_the_host_out_of_an_ops_time() -> None:
    x = torch.randn(1024, 1024, device="cuda")

    def slow_to_launch() -> None:
        time.sleep(0.002)
        x.add_(1)

    timer = Timer(torch.device("cuda"))
    plain = timer(lambda: x.add_(1), seconds=0.05)
    assert timer(slow_to_launch, seconds=0.05).median < 0.001 + plain.median
