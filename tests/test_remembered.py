"""What a block remembers of earlier calls: never more than still holds."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune

from tests.test_block import CHANGES, EAGER, KERNELS, adapt, hook, make_block, outcome
from vitkern.kernels import REGISTRY, _op, _tuned, _verified
from vitkern.kernels._launch import watching
from vitkern.kernels._op import REMEMBERED, choose, record_choices, remembered
from vitkern.kernels._triton import INTERPRET
from vitkern.model import fused
from vitkern.model.block import Block

interpreted = pytest.mark.skipif(not INTERPRET, reason="a made-up GPU beside a real one")

LAYER_NORM = REGISTRY["layer_norm"]
X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
GRAD = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))
CPU = torch.device("cpu")


def decisions() -> dict[Any, Any]:
    return _tuned.table(CPU).decisions


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def both_adapted(block: Any) -> None:
    adapt(block.attn, "proj")
    adapt(block.mlp, "fc2")


def new_weight(block: Any) -> None:
    block.attn.proj.weight = nn.Parameter(2 * block.attn.proj.weight.detach())


def data_of_another_shape(block: Any) -> None:
    """An MLP half as wide, in the parameters that there are."""
    for p in (block.mlp.fc1.weight, block.mlp.fc1.bias):
        p.data = p.data[:96].clone()
    block.mlp.fc2.weight.data = block.mlp.fc2.weight.data[:, :96].clone()


def fc2(block: Any, x: Tensor) -> Tensor:
    return nn.functional.linear(x, block.mlp.fc2.weight, block.mlp.fc2.bias)


def double_grad(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(2 * g for g in inputs)


def double_grads(module: nn.Module, outputs: Any) -> Any:
    return tuple(2 * g for g in outputs)


def of_zeros(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """A compiler whose code can be told from what it compiled."""
    return lambda *given: tuple(0 * t for t in graph(*given))


def no_scale(block: Any) -> None:
    block.ls1 = block.ls2 = nn.Identity()


LATER: dict[str, Callable[[Any], Any]] = {
    **{name: change for name, (change, _) in CHANGES.items() if name != "dropout"},
    "a hook that changes": lambda b: b.mlp.fc2.register_forward_hook(lambda *a: 2 * a[-1]),
    "a hook of autograd": lambda b: b.attn.register_full_backward_hook(double_grad),
    "a hook before autograd": lambda b: b.mlp.register_full_backward_pre_hook(double_grads),
    "a hook before": lambda b: b.attn.qkv.register_forward_pre_hook(lambda _, given: 2 * given[0]),
    "forward replaced": lambda b: setattr(b.mlp.fc2, "forward", lambda x: b.mlp.act(fc2(b, x))),
    "parametrised": lambda b: parametrize.register_parametrization(b.attn.qkv, "weight", Doubled()),
    "pruned": lambda b: prune.l1_unstructured(b.mlp.fc1, "weight", 0.5),
    "a new weight": new_weight,
    "weights of another shape": data_of_another_shape,
    "another eps": lambda b: setattr(b.norm1, "eps", 0.5),
    "another save": lambda b: setattr(b, "save", "minimal"),
    "another impl": lambda b: b.impl.update(attention="reference"),
    "compiled": lambda b: b.mlp.compile(backend=of_zeros),
    "both adapted": both_adapted,
    "no LayerScale": no_scale,
    "fewer heads": lambda b: setattr(b.attn, "num_heads", 1),
    "another activation": lambda b: setattr(b.mlp, "act", nn.ReLU()),
    "double": lambda b: b.double(),
}


# Hooks that return nothing, and what makes another way to the same numbers.
UNSEEN = {name for name in CHANGES if "hooked" in name} | {"mlp compiled", "another save"}


@pytest.mark.parametrize("name", LATER)
def test_a_change_after_a_call_is_as_one_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients have the same bits, from the nodes that the kernels run in, too."""
    x = X.double() if name == "double" else X

    def changed(called_before: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(_tuned, "_tables", {})
        block = make_block(dict(EAGER), init_values=1.0, save="balanced")
        if called_before:
            outcome(block, X, GRAD)
            assert len(decisions()) == 2
        torch.manual_seed(0)
        LATER[name](block)
        return outcome(block, x, GRAD)

    expected, found = changed(False), changed(True)
    if name not in UNSEEN:
        before = outcome(make_block(dict(EAGER), init_values=1.0, save="balanced"), X, GRAD)
        assert not all(torch.equal(found[key], before[key]) for key in ("y", "x"))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_hook_on_all_modules_is_called_in_the_calls_after_it() -> None:
    block = make_block(dict(EAGER), save="balanced")
    expected, called = block(X), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
    try:
        torch.testing.assert_close(block(X), expected)
    finally:
        handle.remove()
    assert {block.attn.qkv, block.mlp.fc2, block.norm1} <= set(called)
    assert torch.equal(block(X), expected)


@interpreted
def test_what_is_frozen_later_gets_no_gradient() -> None:
    block = make_block(KERNELS)
    outcome(block, X, GRAD)
    for p in block.parameters():
        p.requires_grad_(p is block.attn.proj.weight)
    y = block(X)
    y.backward(GRAD)
    assert [n for n, p in block.named_parameters() if p.grad is not None] == ["attn.proj.weight"]
    block.requires_grad_(False)
    assert not block(X).requires_grad
    assert block(X.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert not block(X.clone().requires_grad_()).requires_grad


@interpreted
def test_dtypes_and_modes_of_a_call_are_its_own() -> None:
    block = make_block(KERNELS)
    expected = block(X)
    with torch.autocast("cpu", torch.float16):
        rounded = block(X)
    with torch.inference_mode():
        assert torch.equal(block(X), expected)
    assert torch.equal(block(X), expected)
    assert not torch.equal(rounded, expected)
    assert block(X[:1, :3]).shape == (1, 3, 48)
    with pytest.raises(ValueError, match="no kernel for float64"):
        block.double()(X.double())


@interpreted
def test_parameters_need_not_be_where_they_were() -> None:
    block = make_block(KERNELS)
    expected = block(X)
    swapped = {name: 2 * p.detach() for name, p in block.named_parameters()}
    other = torch.func.functional_call(block, swapped, (X,))
    doubled = make_block(KERNELS)
    doubled.load_state_dict(swapped)
    assert torch.equal(other, doubled(X))
    # nn.DataParallel's replicas have plain tensors in place of parameters.
    replica: Any = copy.deepcopy(block)
    for module in replica.modules():
        own = dict(module._parameters)
        module._parameters.clear()
        for name, p in own.items():
            setattr(module, name, None if p is None else p.detach())
    assert torch.equal(replica(X), expected)
    assert torch.equal(block(X), expected)


@interpreted
def test_explain_tells_of_calls_that_were_decided_before() -> None:
    block = make_block(KERNELS)

    def recorded() -> list[tuple[str, str]]:
        with record_choices() as choices:
            block(X)
        return [(c.op, c.implementation) for c in choices]

    first = recorded()
    block(X)
    assert recorded() == first
    assert {op for op, _ in first} == set(KERNELS)
    hook(block.mlp.fc1)
    assert ("MLP half", "module by module") in recorded()


def test_a_symbolic_trace_may_follow_a_call() -> None:
    block = make_block("auto").requires_grad_(False)
    block(X)
    graph = make_fx(block, tracing_mode="symbolic", _allow_non_fake_inputs=True)(X)
    torch.testing.assert_close(graph(X[:, :4]), block(X[:, :4]))


# `remembered` itself


class Asked:
    """A decision between implementations of a norm; counts how often it is asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tensors: tuple[Tensor, ...], *options: Any) -> str:
        self.count += 1
        return choose(LAYER_NORM, "auto", *tensors)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """CPU tensors pass for tensors on a GPU of which nothing is known."""
    if not INTERPRET:
        pytest.skip("a made-up GPU beside a real one")
    monkeypatch.setattr(_tuned, "card", lambda device: "made-up-gpu")
    monkeypatch.setattr(_op, "_on_gpu", lambda tensors: True)
    monkeypatch.setenv("VITKERN_CACHE", str(tmp_path))
    monkeypatch.setenv("VITKERN_SELFCHECK", "0")
    for module, name in ((_tuned, "_tables"), (_verified, "settled"), (_verified, "_verdicts")):
        monkeypatch.setattr(module, name, {})
    _verified.kept_at_start.cache_clear()


def norm_table(implementation: str, bucket: str) -> _tuned.Table:
    entry = _tuned.Entry(implementation, "measured")
    return _tuned.Table({("layer_norm", bucket, torch.float32): entry})


def test_equal_looks_are_asked_about_once(gpu: None) -> None:
    asked, w = Asked(), torch.ones(48)
    for x in (X, X + 1, X.detach()):
        assert remembered(asked, (x, w, None)) == "triton"
    assert asked.count == 1
    for tensors, options in (
        ((X[:1], w, None), ()),
        ((X, None, w), ()),
        ((X.half(), w, None), ()),
        ((X, w.clone().requires_grad_(), None), ()),
        ((X, w, None), ("minimal",)),
    ):
        before = asked.count
        remembered(asked, tensors, *options)
        remembered(asked, tensors, *options)
        assert asked.count == before + 1
    with torch.no_grad():
        remembered(asked, (X, w, None))
    assert asked.count == 7
    assert remembered(len, (X, w, None)) == 3


def test_a_table_is_asked_again(gpu: None) -> None:
    asked, tensors = Asked(), (X, torch.ones(48), None)
    assert remembered(asked, tensors) == "triton"
    table = norm_table("torch", _tuned.bucket_of((X.shape, (48,), None)))
    with _tuned.using(CPU, table):
        assert remembered(asked, tensors) == "torch"
    assert remembered(asked, tensors) == "triton"


def test_a_verdict_is_heeded(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITKERN_SELFCHECK")
    asked, tensors = Asked(), (X, torch.ones(48), None)
    assert [remembered(asked, tensors) for _ in range(2)] == ["triton"] * 2
    assert asked.count == 1
    key = _verified.key(LAYER_NORM, "triton", torch.float32, "made-up-gpu")
    _verified.record(key, _verified.Verdict(False, 1, why="wrong"))
    with pytest.warns(RuntimeWarning, match="failed its check"):
        assert remembered(asked, tensors) == "torch"


def test_what_could_not_be_checked_is_decided_again(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITKERN_SELFCHECK")
    asked, tensors = Asked(), (X, torch.ones(48), None)
    with FakeTensorMode():  # a mode that watches operators: no time for a check
        for _ in range(2):
            assert remembered(asked, tensors) == "triton"
    assert asked.count == 2
    assert [remembered(asked, tensors) for _ in range(2)] == ["triton"] * 2
    assert asked.count == 3


def test_a_tool_that_looks_on_sees_every_decision(gpu: None) -> None:
    asked, tensors = Asked(), (X, torch.ones(48), None)
    remembered(asked, tensors)
    with watching():
        remembered(asked, tensors)
    with record_choices() as choices:
        remembered(asked, tensors)
    assert asked.count == 3
    assert len(choices) == 1


def test_open_sizes_do_not_fill_the_memory(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "REMEMBERED", 3)
    assert REMEMBERED > 100
    for n in range(8):
        remembered(Asked(), (X, None), n)
    assert len(decisions()) <= 3


def test_attention_in_training_goes_by_what_was_measured_in_training(gpu: None) -> None:
    """Of a half whose qkv does not exist yet when it chooses."""
    block: Block = make_block("auto")
    bucket = _tuned.bucket_of(((2, 5, 3, 3, 16), *(None,) * 8))
    sdpa = _tuned.Entry("sdpa", "measured")
    half = torch.float16
    table = _tuned.Table({("attention", f"{bucket} grad", half): sdpa})

    def implementation(x: Tensor) -> str:
        with record_choices() as choices:
            block.attention_half(fused.Stream(x), False)
        (found,) = (c.implementation for c in choices if c.op == "attention")
        return found

    block.half()
    with _tuned.using(CPU, table):
        assert implementation(X.half()) == "sdpa"
        with torch.no_grad():
            assert implementation(X.half()) == "triton"
