"""oneDNN's fused linear layers: as exact as eager, never stale, and out of the way of all else."""

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vitkern.kernels import _onednn as onednn

from .error_budget import assert_within_budget

pytestmark = pytest.mark.skipif(onednn.problem() is not None, reason=str(onednn.problem()))

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    onednn.clear()
    with torch.no_grad():
        yield
    onednn.clear()


def case(depth: int = 192, features: int = 768, rows: int = 67) -> tuple[Tensor, nn.Linear]:
    """Tokens [2, rows, depth], and a layer of enough work for oneDNN."""
    torch.manual_seed(0)
    return torch.randn(2, rows, depth), nn.Linear(depth, features)


def run(x: Tensor, layer: nn.Linear, *args: Any) -> Tensor:
    y = onednn.linear(x, layer.weight, layer.bias, *args)
    assert y is not None
    return y


@pytest.mark.parametrize("depth", [192, 768, 1024, 1536, 3072, 1537])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parameter", [True, False], ids=["packed", "plain"])
def test_error_is_within_twice_eagers(depth: int, activation: str | None, parameter: bool) -> None:
    x, layer = case(depth, 640)
    weight = layer.weight if parameter else layer.weight.detach()
    y = onednn.linear(x, weight, layer.bias, activation)
    if not parameter and depth > onednn.DEEPEST:
        assert y is None
        return
    act = ACTIVATIONS[activation]
    exact = act(F.linear(x.double(), weight.double(), layer.bias.double()))
    assert y is not None
    assert y.is_contiguous()
    assert_within_budget(["y"], [y], [act(F.linear(x, weight, layer.bias))], [exact])


@pytest.mark.parametrize("depth", [768, 3072])
def test_residual(depth: int) -> None:
    x, layer = case(depth)
    residual = torch.randn(2, 67, 768)
    before = residual.clone()
    eager = residual + layer(x)
    exact = residual.double() + F.linear(x.double(), layer.weight.double(), layer.bias.double())
    y = run(x, layer, None, residual)
    assert_within_budget(["y"], [y], [eager], [exact])
    assert torch.equal(residual, before)
    for view in (
        residual.transpose(0, 1).contiguous().transpose(0, 1),
        residual[:1].expand(2, -1, -1),
    ):
        torch.testing.assert_close(run(x, layer, None, view), view + layer(x))


def test_gelu_is_by_erf() -> None:
    """The two GELUs differ by up to 5e-4, which float32's own errors are far below."""
    z = torch.linspace(-6, 6, 1 << 16)[:, None].expand(-1, 64).contiguous()
    eye = torch.eye(64)
    for activation in ("gelu", "gelu_tanh", "silu"):
        y = onednn.linear(z, eye, None, activation)
        assert y is not None
        act = ACTIVATIONS[activation]
        assert_within_budget([activation], [y], [act(z)], [act(z.double())])
    erf, tanh = (onednn.linear(z, eye, None, name) for name in ("gelu", "gelu_tanh"))
    assert erf is not None
    assert tanh is not None
    assert (erf - tanh).abs().max() > 1e-4


def test_special_values_are_as_eagers() -> None:
    x, layer = case()
    x[0, 0, 0], x[0, 1, 0], x[0, 2, 0] = float("nan"), float("inf"), float("-inf")
    for activation, act in ACTIVATIONS.items():
        expected = act(layer(x))
        y = run(x, layer, activation)
        assert torch.equal(y.isnan(), expected.isnan()), activation
        assert torch.equal(y.isposinf(), expected.isposinf()), activation


@pytest.mark.skipif(torch.bfloat16 not in onednn.DTYPES, reason="no bfloat16 on this processor")
def test_bfloat16() -> None:
    x, layer = case()
    x, layer = x.bfloat16(), layer.bfloat16()
    exact = F.gelu(F.linear(x.double(), layer.weight.double(), layer.bias.double()))
    assert_within_budget(["y"], [run(x, layer, "gelu")], [F.gelu(layer(x))], [exact])


def test_layouts() -> None:
    x, layer = case()
    wide = torch.randn(2, 67, 384)
    wide[..., ::2] = x
    views = (x.transpose(0, 1).contiguous().transpose(0, 1), wide[..., ::2], x[None], x[0])
    for view in views:
        torch.testing.assert_close(run(view, layer), layer(view))
    torch.testing.assert_close(
        onednn.linear(x, layer.weight), F.linear(x, layer.weight), msg="without a bias"
    )
    # One that is strided would run in code that is a thousand times slower.
    assert onednn.linear(x, torch.randn(768, 384)[:, ::2]) is None


def test_equal_inputs_give_equal_bits() -> None:
    x, layer = case()
    first = run(x, layer, "gelu").clone()
    assert torch.equal(first, run(x, layer, "gelu"))
    onednn.clear()
    assert torch.equal(first, run(x, layer, "gelu"))


def double_(weight: nn.Parameter) -> None:
    weight.mul_(2)


def write_one_value(weight: nn.Parameter) -> None:
    weight[0, 1] += 1  # which is in no sample: the version counter has to tell


def double_in_inference_mode(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        weight.mul_(2)


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


def transpose_data(weight: nn.Parameter) -> None:
    weight.data = weight.data.t()


def transpose_values(weight: nn.Parameter) -> None:
    weight.data = weight.data.t().contiguous()


def write_past_the_counter(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def add_to_data(weight: nn.Parameter) -> None:
    weight.data += 1


def write_by_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] *= 2


def swap_storage(weight: nn.Parameter) -> None:
    other = weight.detach() * 2
    weight.data = torch.empty(0)
    weight.data = other


def from_vector(weight: nn.Parameter) -> None:
    nn.utils.vector_to_parameters(torch.randn(weight.numel()), [weight])


def optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Parameter], None]:
    def step(weight: nn.Parameter) -> None:
        weight.grad = torch.ones_like(weight)
        kind([weight], lr=1e-3, **options).step()  # type: ignore[call-arg]

    step.__name__ = f"{kind.__name__} {options}"
    return step


CHANGES = [
    double_,
    write_one_value,
    double_in_inference_mode,
    replace_data,
    transpose_data,
    transpose_values,
    write_past_the_counter,
    add_to_data,
    write_by_numpy,
    swap_storage,
    from_vector,
    optimizer(torch.optim.SGD),
    optimizer(torch.optim.SGD, fused=True),
    optimizer(torch.optim.AdamW, foreach=True),
    optimizer(torch.optim.AdamW, foreach=False),
    optimizer(torch.optim.AdamW, fused=True),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_packed_weights_are_never_stale(change: Callable[[nn.Parameter], None]) -> None:
    x, layer = case(384, 384)
    before = run(x, layer).clone()
    change(layer.weight)
    y = onednn.linear(x, layer.weight, layer.bias)
    if change is transpose_data:
        assert y is None
        return
    assert y is not None
    assert not torch.equal(y, before)
    onednn.clear()
    assert torch.equal(y, run(x, layer))


def test_load_state_dict() -> None:
    x, layer = case()
    run(x, layer)
    for assign in (False, True):
        layer.load_state_dict(nn.Linear(192, 768).state_dict(), assign=assign)
        torch.testing.assert_close(run(x, layer), layer(x))


def test_one_copy_a_parameter_that_dies_with_it() -> None:
    x, layer = case()
    twin = copy.deepcopy(layer)
    for _ in range(2):
        run(x, layer), run(x, twin)
    one = layer.weight.nbytes
    assert 2 * one <= onednn.packed_bytes() < 2.5 * one
    layer.weight.mul_(2)
    run(x, layer)
    assert onednn.packed_bytes() < 2.5 * one
    del layer
    gc.collect()
    assert one <= onednn.packed_bytes() < 1.25 * one
    with torch.enable_grad():  # training: the copy would only take memory
        assert onednn.linear(x, twin.weight, twin.bias) is None
    assert onednn.packed_bytes() == 0


def test_only_parameters_are_packed() -> None:
    x, layer = case()
    y = onednn.linear(x, layer.weight.detach(), layer.bias)
    torch.testing.assert_close(y, layer(x))
    assert onednn.packed_bytes() == 0
    with torch.inference_mode():
        made_here = nn.Linear(192, 768)
        torch.testing.assert_close(run(x, made_here), made_here(x))
        assert onednn.packed_bytes() == 0
        torch.testing.assert_close(run(x, layer), layer(x))
    torch.testing.assert_close(
        run(x, layer), layer(x), msg="packed in inference mode, used outside"
    )
    assert onednn.packed_bytes() > 0


def test_pickling_and_copying_know_nothing_of_it(tmp_path: Any) -> None:
    x, layer = case()
    run(x, layer)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    torch.save(layer, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    torch.testing.assert_close(run(x, again), layer(x))


def test_a_wanted_gradient_is_left_to_autograd() -> None:
    x, layer = case()
    with torch.enable_grad():
        assert onednn.linear(x, layer.weight, layer.bias) is None
        assert onednn.linear(x, layer.weight.detach(), layer.bias) is None
        assert onednn.linear(x.requires_grad_(), layer.weight.detach()) is None
        layer.requires_grad_(False)
        assert onednn.linear(x.detach(), layer.weight, layer.bias) is not None


def test_warns_of_nothing() -> None:
    x, layer = case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x, layer)


def test_out_of_the_way() -> None:
    """Each of these sees F.linear, or nothing that oneDNN could take."""
    x, layer = case()
    w, b = layer.weight, layer.bias
    none: list[Callable[[], Any]] = [
        lambda: onednn.linear(x[:, :2], w, b),  # too little work
        lambda: onednn.linear(x, w, b, "relu"),
        lambda: onednn.linear(x.double(), w.double(), b.double()),
        lambda: onednn.linear(x.half(), w.half(), b.half()),
        lambda: onednn.linear(x, w, b.double()),
        lambda: onednn.linear(x.to("meta"), w.to("meta")),
        lambda: onednn.linear(x, w.to_sparse()),
        lambda: onednn.linear(x[:0], w, b),
    ]
    for n, call in enumerate(none):
        assert call() is None, n
    with torch.backends.mkldnn.flags(enabled=False):
        assert onednn.linear(x, w, b) is None
        assert onednn.problem() is not None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert onednn.linear(x, w, b) is None
        assert onednn.linear(mode.from_tensor(x), mode.from_tensor(w.detach())) is None
    with FlopCounterMode(display=False):
        assert onednn.linear(x, w, b) is None
    with forward_ad.dual_level():
        assert onednn.linear(forward_ad.make_dual(x, x), w, b) is None
    assert onednn.linear(x, w, b) is not None


def by_either(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = onednn.linear(x, w, b)
    return F.linear(x, w, b) if y is None else y


def test_function_transforms() -> None:
    x, layer = case()
    w, b = layer.weight.detach(), layer.bias.detach()
    expected = F.linear(x, w, b)
    torch.testing.assert_close(torch.vmap(by_either, (0, None, None))(x, w, b), expected)

    def none(x: Tensor) -> Tensor:
        assert onednn.linear(x, w, b) is None
        return x

    torch.vmap(none, 1)(x.repeat(100, 1, 1))
    tangent: Any = torch.func.jvp(lambda x: by_either(x, w, b), (x,), (x,))[1]
    torch.testing.assert_close(tangent, F.linear(x, w))
    with torch.enable_grad():
        grad = torch.func.grad(lambda w: by_either(x, w, b).sum())(w)
    torch.testing.assert_close(grad, x.sum((0, 1)).expand_as(w), atol=1e-4, rtol=1e-4)


def test_tracers() -> None:
    x, layer = case()
    inputs = (x, layer.weight.detach(), layer.bias.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(by_either, inputs)
    assert "mkldnn" not in str(traced.graph)

    class Either(nn.Module):
        def forward(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return by_either(x, w, b)

    assert "mkldnn" not in str(torch.export.export(Either(), inputs).graph)
    compiled = torch.compile(by_either, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), by_either(*inputs))


def test_subclasses_are_called() -> None:
    class Logged(Tensor):
        pass

    x, layer = case()
    assert onednn.linear(x.as_subclass(Logged), layer.weight, layer.bias) is None
    assert onednn.linear(x, layer.weight.detach().as_subclass(Logged)) is None
