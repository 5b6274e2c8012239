"""What is particular to attention: lengths, head sizes, hard logits, sequences, masks, errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.error_budget import assert_within_budget, gradients, in_float64
from vitkern.kernels import REGISTRY, QKNorm, Rope, attention, attention_pool
from vitkern.kernels._launch import intercept
from vitkern.kernels._op import record_choices
from vitkern.kernels.attention.configs import fits_single_pass
from vitkern.kernels.attention.launch import chunks, make_case, single_pass, split, tail
from vitkern.kernels.attention.reference import Options

LENGTHS = (1, 5, 17, 50, 197, 201, 257, 577)
HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 104, 128)
# Every length and every head size; all pairs of them in bfloat16 only, and so on a GPU only.
PAIRS = {(n, 64) for n in LENGTHS} | {(50, d) for d in HEAD_DIMS} | {(197, 80), (257, 72)}
OPTIONS = {"eps": 0.0, "rms": False, "interleaved": False, "max_seqlen": 0}
NOTHING = dict.fromkeys(
    ("q_weight", "q_bias", "k_weight", "k_bias", "sin", "cos", "key_mask", "cu_seqlens")
)


def normal(*shape: int, seed: int = 0, device: str = "cpu", dtype: Any = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def op_arguments(qkv: Tensor, scale: float | None = None) -> dict[str, Any]:
    return {"qkv": qkv, **NOTHING, **OPTIONS, "scale": scale or qkv.shape[-1] ** -0.5}


def check_forward_and_backward(
    qkv: Tensor, what: str = "", scale: float | None = None, two_launches: bool = True
) -> None:
    """Both kernels' results, and those of either way backward, against float64."""
    forward, backward = REGISTRY["attention"], REGISTRY["attention_backward"]
    arguments = op_arguments(qkv, scale)
    exact = in_float64(arguments)
    out, stats = forward.launcher(**arguments, need_stats=True)
    assert_within_budget(
        [f"out {what}"],
        [out],
        forward.portable(**arguments)[:1],
        forward.reference(**exact, need_stats=False)[:1],
    )
    dout = normal(*out.shape, seed=1, device=qkv.device, dtype=qkv.dtype)
    eager, _ = backward.portable(dout, out=None, stats=None, **arguments)
    right, _ = backward.reference(dout.double(), out=None, stats=None, **exact)
    ways = {"two launches": (out, stats)} if two_launches else {}
    # The interpreter has room for any head; a GPU has not.
    case = make_case(qkv, Options())
    if fits_single_pass(qkv.shape[1], case) or (qkv.is_cpu and qkv.shape[1] <= 256):
        ways["one launch"] = (None, None)
    for way, (saved_out, saved_lse) in ways.items():
        dqkv, _ = backward.launcher(dout, out=saved_out, stats=saved_lse, **arguments)
        results = [(f"dqkv {what} ({way})", dqkv, eager, right)]
        if qkv.shape[1] > 1:  # of a single token, dq and dk are zero but for roundings
            parts = (t.unbind(2) for t in (dqkv, eager, right))
            results += [
                (f"d{name} {what} ({way})", *p) for name, *p in zip("qkv", *parts, strict=True)
            ]
        assert_within_budget(*zip(*results, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_length_and_head_size(
    tokens: int, head_dim: int, dtype: torch.dtype, kernel_device: str
) -> None:
    if kernel_device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 products are wrong")
    if dtype != torch.bfloat16 and (tokens, head_dim) not in PAIRS:
        pytest.skip("all pairs are for bfloat16, on a GPU")
    qkv = normal(1, tokens, 3, 1, head_dim, device=kernel_device, dtype=dtype)
    check_forward_and_backward(qkv)


@pytest.mark.parametrize("scale", [0.001, None])
@pytest.mark.parametrize("tokens", [17, 70])
def test_logits_beyond_float16(tokens: int, scale: float | None, kernel_device: str) -> None:
    """Products that float16 can't hold, scaled back; or not, so that one key takes all."""
    qkv = normal(1, tokens, 3, 1, 64, device=kernel_device)
    qkv[:, :, :2] *= 80
    assert (qkv[0, :, 0, 0] @ qkv[0, :, 1, 0].T).abs().max() > 65_504
    for dtype in (torch.float32, torch.float16):
        check_forward_and_backward(
            qkv.to(dtype),
            str(dtype),
            scale=scale,
            # At logits of 30,000 the last bit of a float32 is 0.004. Two launches are right if both
            # get the same bits for a logit, as a GPU does; NumPy's products depend on the layout.
            two_launches=scale is not None or kernel_device == "cuda",
        )


def test_an_outlier_token(kernel_device: str) -> None:
    """One token a hundred times larger than the rest: its own logit is 10,000 times larger."""
    for dtype in (torch.float32, torch.float16):
        # Four heads: of one the gradient is all but a single number, which eager may get right. And
        # a seed: two launches need the same bits of a logit, which NumPy doesn't promise.
        qkv = normal(1, 37, 3, 4, 32, seed=2, device=kernel_device)
        qkv[:, 7] *= 100
        check_forward_and_backward(qkv.to(dtype), str(dtype))


def ragged(kernel_device: str, head_dim: int = 16) -> tuple[Tensor, Tensor, list[int]]:
    lengths = [5, 0, 17, 1, 150]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    qkv = normal(sum(lengths), 3, 2, head_dim, device=kernel_device)
    return qkv, ends.to(kernel_device), lengths


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_varying_lengths_are_a_loop_over_images(impl: str, kernel_device: str) -> None:
    qkv, ends, lengths = ragged(kernel_device)
    angles = normal(2, len(qkv), 8, seed=3, device=kernel_device)
    vector = normal(4, 16, seed=4, device=kernel_device)
    norm = QKNorm(*vector)
    qkv.requires_grad_()
    out = attention(qkv, qk_norm=norm, rope=Rope(*angles), cu_seqlens=ends, impl=impl)
    dout = normal(*out.shape, seed=5, device=kernel_device)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    for first, length in zip(ends.tolist(), lengths, strict=False):
        part = slice(first, first + length)
        if length == 0:
            continue
        alone = qkv[part].detach()[None].requires_grad_()
        rope = Rope(*angles[:, part])
        expected = attention(alone, qk_norm=norm, rope=rope, impl=impl)
        (d_alone,) = torch.autograd.grad(expected, alone, dout[part][None])
        torch.testing.assert_close(out[part], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dqkv[part], d_alone[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [19, 150])
@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_a_key_mask_leaves_tokens_out(impl: str, tokens: int, kernel_device: str) -> None:
    qkv = normal(2, tokens, 3, 1, 16, device=kernel_device).requires_grad_()
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False  # nobody to attend to: zeros, no NaN
    out = attention(qkv, key_mask=mask.to(kernel_device), impl=impl)
    (dqkv,) = torch.autograd.grad(out.square().sum(), qkv)
    assert not out[1].any()
    assert not dqkv[1].any()
    q, k, v = (t[0, :, 0] for t in qkv.detach().cpu().unbind(2))
    expected = F.scaled_dot_product_attention(q, k[mask[0]], v[mask[0]])
    torch.testing.assert_close(out[0].detach().cpu(), expected, rtol=1e-5, atol=1e-5)
    assert not dqkv[0, :, 1:].cpu()[~mask[0]].any()


def test_prefix_tokens_are_not_rotated(kernel_device: str) -> None:
    qkv = normal(1, 12, 3, 1, 8, device=kernel_device)
    quarter = torch.ones(12 - 3, 4, device=kernel_device)  # pairs (x, y) become (-y, x)
    rotated = qkv.clone()
    for interleaved in (False, True):
        for n in (0, 1):
            x = qkv[:, 3:, n]
            pairs = x.unflatten(-1, (4, 2) if interleaved else (2, 4))
            axis = -1 if interleaved else -2
            first, second = pairs.unbind(axis)
            rotated[:, 3:, n] = torch.stack([-second, first], axis).flatten(-2)
        rope = Rope(quarter, 0 * quarter, interleaved)
        actual = attention(qkv, rope=rope, impl="triton")
        torch.testing.assert_close(actual, attention(rotated, impl="triton"))


@pytest.mark.usefixtures("card_to_itself")
@pytest.mark.parametrize("where", ["images", "tokens"])
def test_offsets_beyond_int32(where: str, kernel_device: str) -> None:
    """Images, or tokens, 2^31 values apart; memory that is never touched costs nothing."""
    if kernel_device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 5 GB of GPU memory")
    storage = torch.empty(2**31 + 96, dtype=torch.float16, device=kernel_device)
    far = {
        "images": storage.as_strided((2, 2, 3, 1, 16), (2**31, 48, 16, 16, 1)),
        "tokens": storage.as_strided((1, 2, 3, 1, 16), (2**31, 2**31, 16, 16, 1)),
    }[where]
    near = normal(*far.shape, device=kernel_device, dtype=torch.float16)
    far.copy_(near)
    results = []
    for qkv in (far, near):
        arguments = op_arguments(qkv)
        out, stats = REGISTRY["attention"].launcher(**arguments, need_stats=True)
        backward = REGISTRY["attention_backward"].launcher
        one, _ = backward(out, out=None, stats=None, **arguments)
        two, _ = backward(out, out=out, stats=stats, **arguments)
        results.append((out, one, two))
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


def test_more_heads_than_a_grid_axis_holds() -> None:
    grids = []
    qkv = torch.empty(40_000, 2, 3, 4, 16, device="meta")
    with intercept(lambda launch: grids.append(launch.grid)):
        out, stats = REGISTRY["attention"].launcher(**op_arguments(qkv), need_stats=True)
        for saved in ((None, None), (out, stats)):
            REGISTRY["attention_backward"].launcher(
                out, out=saved[0], stats=saved[1], **op_arguments(qkv)
            )
    assert grids == [(160_000,)] * 4


def test_one_launch_saves_nothing_but_its_input(kernel_device: str) -> None:
    kept: dict[int, list[torch.Size]] = {}
    for tokens in (50, 300):
        qkv = normal(1, tokens, 3, 1, 16, device=kernel_device).requires_grad_()
        kept[tokens] = []

        def note(t: Tensor, shapes: list[torch.Size] = kept[tokens]) -> Tensor:
            shapes.append(t.shape)
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = attention(qkv, impl="triton")
    assert kept[50] == [(1, 50, 3, 1, 16)]
    assert kept[300] == [(1, 300, 3, 1, 16), out.shape, (2, 1, 300)]


def test_under_activation_checkpointing(kernel_device: str) -> None:
    qkv = normal(1, 20, 3, 2, 16, device=kernel_device).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return attention(x * 2, impl="triton").sin()

    (expected,) = torch.autograd.grad(function(qkv).sum(), qkv)
    (actual,) = torch.autograd.grad(checkpoint(function, qkv, use_reentrant=False).sum(), qkv)
    assert torch.equal(actual, expected)


def test_only_the_gradients_that_are_wanted(kernel_device: str) -> None:
    qkv = normal(1, 9, 3, 1, 16, device=kernel_device)
    vectors = [v.requires_grad_() for v in normal(4, 16, seed=1, device=kernel_device).unbind(0)]
    attention(qkv, qk_norm=QKNorm(*vectors), impl="triton").square().sum().backward()
    assert qkv.grad is None
    assert all(v.grad is not None for v in vectors)
    (only,) = torch.autograd.grad(
        attention(qkv, qk_norm=QKNorm(*vectors), impl="triton").square().sum(), vectors[2]
    )
    assert torch.equal(only, vectors[2].grad)


def test_norm_weights_of_another_dtype(kernel_device: str) -> None:
    """As under autocast: qkv is low, the parameters are float32."""
    qkv = normal(1, 9, 3, 1, 16, device=kernel_device, dtype=torch.float16).requires_grad_()
    vectors = tuple(v.requires_grad_() for v in normal(4, 16, seed=1, device=kernel_device) + 1)
    arguments = dict(zip(("q_weight", "q_bias", "k_weight", "k_bias"), vectors, strict=True))

    def function(impl: str) -> Any:
        return lambda qkv, **norm: attention(qkv, qk_norm=QKNorm(**norm), impl=impl)

    grads = (normal(1, 9, 16, seed=2, device=kernel_device, dtype=torch.float16),)
    arguments = {"qkv": qkv, **arguments}
    actual, _ = gradients(function("triton"), arguments, grads)
    eager, _ = gradients(function("sdpa"), arguments, grads)
    exact, _ = gradients(function("reference"), in_float64(arguments), (grads[0].double(),))
    assert_within_budget(exact, actual.values(), eager.values(), exact.values())


def test_dropout_goes_to_an_implementation_that_has_it() -> None:
    qkv = normal(2, 64, 3, 2, 16)
    with record_choices() as choices:
        out = attention(qkv, dropout_p=0.5)
    assert choices[0].implementation == "sdpa"
    assert not torch.allclose(out, attention(qkv))
    for impl in ("triton", "reference"):
        with pytest.raises(ValueError, match=f"impl='{impl}' can't run here: it has no dropout"):
            attention(qkv, dropout_p=0.5, impl=impl)


def test_the_record_names_the_backend_of_sdpa() -> None:
    with record_choices() as choices:
        attention(normal(1, 5, 3, 1, 16), impl="sdpa")
        attention(normal(1, 5, 3, 1, 16).double(), key_mask=torch.ones(1, 5).bool(), impl="sdpa")
    assert "flash" in choices[0].why
    assert choices[1].why.split()[-1] in ("flash", "math")


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_no_images_and_no_tokens(impl: str, kernel_device: str) -> None:
    for batch, tokens in ((0, 4), (2, 0)):
        qkv = torch.zeros(batch, tokens, 3, 1, 8, device=kernel_device, requires_grad=True)
        out = attention(qkv, impl=impl)
        out.sum().backward()
        assert out.shape == (batch, tokens, 8)
        assert qkv.grad.shape == qkv.shape


def test_a_wide_head_goes_to_pytorch() -> None:
    qkv = normal(1, 5, 3, 1, 160)
    torch.testing.assert_close(attention(qkv), attention(qkv, impl="reference"))
    with pytest.raises(ValueError, match="no kernel for heads of 160, above 128"):
        attention(qkv, impl="triton")


def test_given_the_longest_length_nothing_waits_for_the_gpu() -> None:
    """On "meta" tensors there are no values to read, as while a CUDA graph is captured."""
    qkv = torch.empty(30, 3, 2, 16, device="meta")
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    with intercept(lambda launch: None):  # so that tensors need not be on a GPU
        out = attention(qkv, cu_seqlens=ends, max_seqlen=20, impl="triton")
    assert out.shape == (30, 32)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"qkv": torch.zeros(2, 5, 2, 1, 8)}, ValueError, r"qkv must be \[B, N, 3, H, d\]"),
    "packed shape": (
        {"qkv": torch.zeros(2, 5, 3, 1, 8), "cu_seqlens": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        r"qkv must be \[total, 3, H, d\]",
    ),
    "dtype": ({"qkv": torch.zeros(2, 5, 3, 1, 8).int()}, TypeError, "qkv must be floating point"),
    "wide": ({"qkv": torch.zeros(1, 1, 3, 1, 257)}, ValueError, "at most 256, got 257"),
    "int64 lengths": ({"cu_seqlens": torch.tensor([0, 5])}, TypeError, "must be int32, got int64"),
    "start": ({"cu_seqlens": [1, 5]}, ValueError, "cu_seqlens must start at 0, got 1"),
    "end": ({"cu_seqlens": [0, 4]}, ValueError, "must end at the 5 tokens of qkv, got 4"),
    "order": ({"cu_seqlens": [0, 4, 2, 5]}, ValueError, "not decrease, got 4 before 2 at 2"),
    "scalar": ({"cu_seqlens": [0]}, ValueError, r"must be \[B \+ 1\] with B >= 1, got \[1\]"),
    "longest": (
        {"cu_seqlens": [0, 4, 5], "max_seqlen": 3},
        ValueError,
        "max_seqlen must be at least the longest sequence, 4, got 3",
    ),
    "lonely longest": ({"max_seqlen": 3}, ValueError, "max_seqlen needs cu_seqlens"),
    "mask dtype": ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be bool, got float32"),
    "mask shape": ({"key_mask": torch.ones(2, 4).bool()}, ValueError, r"key_mask must be \[2, 5\]"),
    "mask and lengths": (
        {"cu_seqlens": [0, 5], "key_mask": torch.ones(5).bool()},
        ValueError,
        "key_mask and cu_seqlens exclude each other",
    ),
    "rope": ({"rope": Rope(torch.ones(5, 3), torch.ones(5, 3))}, ValueError, r"rope.sin must be"),
    "rope pair": ({"rope": Rope(torch.ones(5, 4), torch.ones(4, 4))}, ValueError, "rope.cos must"),
    "rope rows": (
        {"rope": Rope(torch.ones(6, 4), torch.ones(6, 4))},
        ValueError,
        "at most the 5 tokens of qkv, got 6",
    ),
    "norm": (
        {"qk_norm": QKNorm(torch.ones(7), None, torch.ones(8), None)},
        ValueError,
        r"qk_norm.q_weight must be \[8\], got \[7\]",
    ),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "impl": ({"impl": "flsh"}, ValueError, "unknown impl 'flsh'; expected one of auto, triton"),
    "device": (
        {"key_mask": torch.ones(2, 5, device="meta").bool()},
        ValueError,
        "key_mask is on meta and qkv on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_launch(case: str) -> None:
    arguments, kind, message = BAD[case]
    arguments = dict(arguments)
    if isinstance(arguments.get("cu_seqlens"), list):
        arguments["cu_seqlens"] = torch.tensor(arguments["cu_seqlens"], dtype=torch.int32)
    ragged = "cu_seqlens" in arguments
    qkv = arguments.pop("qkv", torch.zeros(5, 3, 1, 8) if ragged else torch.zeros(2, 5, 3, 1, 8))

    def refuse(_: Any) -> None:
        raise AssertionError("launched")

    with intercept(refuse), pytest.raises(kind, match=message):
        attention(qkv, **{"impl": "triton", **arguments})


def test_pool_of_an_expanded_query(kernel_device: str) -> None:
    """As a pooling head has it: one learned query for all images."""
    query = normal(1, 1, 2, 16, device=kernel_device).requires_grad_()
    kv = normal(3, 40, 2, 2, 16, seed=1, device=kernel_device).requires_grad_()
    results = []
    for impl in ("triton", "reference"):
        out = attention_pool(query.expand(3, -1, -1, -1), kv, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, kv))))
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


def test_heads_are_split_into_the_narrowest_two_chunks() -> None:
    widths = {8: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16)}
    widths |= {88: (64, 32), 96: (64, 32), 104: (128, 0), 128: (128, 0)}
    assert {width: split(width) for width in widths} == widths
    assert chunks(80, True, torch.bfloat16) == (64, 64, 64, 16)  # halves of 40 each


def test_the_last_block_of_keys_is_as_small_as_it_can_be() -> None:
    tails = {1: 16, 50: 64, 64: 0, 197: 16, 201: 16, 257: 16, 577: 16, 730: 32, 1370: 32}
    assert {length: tail(length, 64) for length in tails} == tails


def test_what_is_computed_in_one_launch_backward() -> None:
    plain, other = Options(), Options(key_mask=torch.ones(1, 1).bool())
    qkv = torch.empty(1, 1, 3, 1, 64, dtype=torch.bfloat16, device="meta")
    most = {}
    for card in ((8, 0), (9, 0)):
        with intercept(lambda launch: None, card):
            for name, options in (("plain", plain), ("masked", other)):
                case = make_case(qkv, options)
                most[card, name] = max(n for n in range(1, 400) if single_pass(n, case))
            assert not single_pass(1, make_case(qkv.new_empty(1, 1, 3, 1, 80), plain))
    assert list(most.values()) == [128, 64, 256, 64]
