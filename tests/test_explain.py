"""explain(): its rows, its table, and that it leaves no trace."""

from typing import Any

import pytest
import torch
from torch import nn

import vitkern

SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}


def test_rows_count_every_call() -> None:
    impl = {"attention": "reference"}
    model = vitkern.ViT(**SMALL, impl=impl)
    rows = vitkern.explain(model, torch.randn(2, 3, 32, 32)).rows
    assert {row.op: row.calls for row in rows} == {
        "patch_embed": 1,
        "norm_linear": 4,
        "attention": 2,
        "linear_residual": 4,
        "layer_norm": 1,
    }
    assert rows[0].op == "patch_embed"
    by_op = {row.op: row for row in rows}
    assert by_op["attention"].implementation == "reference"
    assert by_op["attention"].why == "asked for"
    assert all(row.why for row in rows)


def test_the_table_is_aligned() -> None:
    text = str(vitkern.explain(vitkern.ViT(**SMALL), torch.randn(1, 3, 32, 32)))
    head, *lines = text.splitlines()
    assert head.split() == ["op", "implementation", "why", "calls"]
    assert len(lines) == 6
    for column in ("implementation", "why", "calls"):
        at = head.index(column)
        assert all(line[at - 1] == " " and line[at] != " " for line in lines)


def test_a_pass_leaves_no_trace() -> None:
    model = vitkern.ViT(**SMALL, drop_path_rate=0.5, proj_drop_rate=0.5)
    model.blocks.append(nn.BatchNorm1d(17))  # a module with state of its own
    before = {name: b.clone() for name, b in model.named_buffers()}
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    vitkern.explain(model, torch.randn(2, 3, 32, 32, generator=torch.Generator()))
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_a_compiled_model_is_refused() -> None:
    model = torch.compile(vitkern.ViT(**SMALL), backend="eager")
    with pytest.raises(TypeError, match="model was compiled"):
        vitkern.explain(model, torch.randn(1, 3, 32, 32))
