"""define(), choose() and the launch gate themselves."""

import pytest
import torch

from vitkern.kernels import REGISTRY, layer_norm
from vitkern.kernels._launch import Launch, cdiv, intercept, next_power_of_2
from vitkern.kernels._op import choose, record_choices

LAYER_NORM = REGISTRY["layer_norm"]


def test_auto_on_a_cpu_is_portable_and_says_why() -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    with record_choices() as choices:
        layer_norm(x, weight)
        layer_norm(x, weight, impl="reference")
        layer_norm(x.double(), weight.double())
    assert [(c.op, c.implementation) for c in choices] == [
        ("layer_norm", "torch"),
        ("layer_norm", "reference"),
        ("layer_norm", "torch"),
    ]
    assert choices[1].why == "asked for"
    assert all(c.why for c in choices)


def test_recording_ends_with_its_block() -> None:
    with record_choices() as outer:
        with record_choices() as inner:
            layer_norm(torch.randn(2, 8), torch.ones(8))
        assert (len(outer), len(inner)) == (0, 1)
    layer_norm(torch.randn(2, 8), torch.ones(8))
    assert not outer


def test_an_explicit_choice_never_falls_back() -> None:
    for op in REGISTRY.values():
        with pytest.raises(ValueError, match="unknown impl 'nothing'; expected one of auto"):
            choose(op, "nothing")
        if op.launcher is not None:
            with pytest.raises(ValueError, match="impl='triton' can't run here: no kernel for"):
                choose(op, "triton", torch.zeros(1, dtype=torch.float64))


def test_an_option_can_rule_an_implementation_out() -> None:
    x = torch.zeros(1)
    assert choose(LAYER_NORM, "auto", x, unfit={"torch": "too plain"}) == "reference"
    with pytest.raises(ValueError, match="impl='torch' can't run here: too plain"):
        choose(LAYER_NORM, "torch", x, unfit={"torch": "too plain"})


def test_implementations_are_named_in_the_order_auto_tries_them() -> None:
    assert list(LAYER_NORM.implementations) == ["triton", "torch", "reference"]
    assert list(REGISTRY["residual_add"].implementations) == ["torch", "reference"]


def test_backward_ops_are_listed_beside_their_forward() -> None:
    for op in REGISTRY.values():
        if op.backward_of is not None:
            assert REGISTRY[op.backward_of].launcher is not None


def test_intercepted_launches_never_run() -> None:
    launches: list[Launch] = []
    x, weight = torch.zeros(3, 8, device="meta"), torch.ones(8, device="meta")
    with intercept(launches.append, capability=(9, 0)):
        y = LAYER_NORM.launcher(x, weight, None, 1e-6, False, torch.float16)
    assert (y.shape, y.dtype) == (x.shape, torch.float16)
    assert [launch.constexprs["D"] for launch in launches] == [8]


def test_helpers() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 588)] == [1, 1, 2, 4, 1024]
