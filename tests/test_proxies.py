"""Offline proxies: small networks and graphs whose costs can be counted by hand, and known rows."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks import _proxies
from benchmarks._models import FLOAT32
from benchmarks._proxies import COMPILED, proxies
from benchmarks._proxies.count import Cost, Counter, attend, ours, plain
from benchmarks._proxies.fusion import Fusion, compiled
from vitkern.model.block import Block

Row = dict[str, Any]


def by_case(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(r["impl"], r["step"]): r for r in rows if r["kind"] == "proxy"}


class Mlp(nn.Module):
    """D = 8, hidden 32."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def mlp_cost(count: Callable[..., Cost], step: str, rows: int = 4) -> Cost:
    with FakeTensorMode():
        return count(Mlp(), torch.empty(rows, 8), step, FLOAT32)


# Of the MLP on four rows: x and y have 32 values, the hidden layer 128, each weight 256.
FORWARD = (32 + 256 + 32 + 128) + (128 + 128) + (128 + 256 + 8 + 32)
LAYER_2_BACKWARD = (32 + 256 + 128) + (32 + 128 + 256) + (32 + 8)
LAYER_1_BACKWARD = (128 + 256 + 32) + (128 + 32 + 256) + (128 + 32)
BACKWARD = LAYER_2_BACKWARD + (128 + 128 + 128) + LAYER_1_BACKWARD


def test_operators_of_an_mlp_by_hand() -> None:
    forward, train = mlp_cost(plain, "forward"), mlp_cost(plain, "train")
    assert forward == Cost(3, 0, 4 * FORWARD, 4 * FORWARD)
    assert train.launches == 3 + 3 + 1 + 3
    assert train.bytes == train.declared_bytes == 4 * (FORWARD + BACKWARD)
    assert train.saved_bytes == 4 * (32 + 128 + 128)  # x, and both sides of the GELU


def test_kernels_of_an_mlp_by_hand() -> None:
    """GELU is one kernel each way, however many operators it is made of; sums are two launches."""
    forward, train = mlp_cost(compiled, "forward"), mlp_cost(compiled, "train")
    assert forward == Cost(3, 0, 4 * FORWARD, 4 * FORWARD)
    # The partitioner may keep the activated rows, or make them again where it has both inputs.
    again = train.saved_bytes == 4 * (32 + 128)
    assert again or train.saved_bytes == 4 * (32 + 128 + 128)
    assert train.launches == 3 + 4 + 1 + 4
    assert train.bytes == 4 * (FORWARD + BACKWARD + (128 if again else 0))


def fusion(f: Callable[..., Any], *inputs: Tensor) -> Fusion:
    return Fusion(make_fx(f)(*inputs).graph)


def cost(f: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[int, int]:
    """(launches, values moved) of the kernels of `f`, on float32 tensors of these shapes."""
    with FakeTensorMode():
        total = Cost()
        fusion(f, *(torch.empty(shape) for shape in shapes)).add_to(total, set())
    assert total.bytes % 4 == 0
    return total.launches, total.bytes // 4


class TestFusion:
    """On X [6, 8] = 48 values and a weight W [8, 8] = 64."""

    def test_pointwise_operators_on_both_sides_of_a_product(self) -> None:
        launches, values = cost(lambda x, w: ((x + 1).relu() @ w).exp() * 2, (6, 8), (8, 8))
        assert launches == 3
        assert values == (48 + 48) + (48 + 64 + 48) + (48 + 48)

    def test_what_a_product_lies_between_cannot_be_one_kernel(self) -> None:
        def f(x: Tensor, w: Tensor) -> Tensor:
            y = x + 1
            return y * (y @ w)

        assert cost(f, (6, 8), (8, 8)) == (3, (48 + 48) + (48 + 64 + 48) + (48 + 48 + 48))

    def test_cycles_through_another_kernel(self) -> None:
        """y reaches the last operator by two ways, one through a product: it stays outside."""

        def f(x: Tensor, w: Tensor) -> Tensor:
            y = x + 1
            z = (y @ w).exp()
            return (z @ w) + z + y

        first, product, middle, last = 48 + 48, 48 + 64 + 48, 48 + 48, 3 * 48 + 48
        assert cost(f, (6, 8), (8, 8)) == (5, first + 2 * product + middle + last)

    def test_a_norm_is_one_kernel(self) -> None:
        def f(x: Tensor, g: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            return centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * g

        assert cost(f, (6, 8), (8,)) == (1, 48 + 8 + 48)

    def test_sums_over_rows_do_not_write_what_they_sum(self) -> None:
        assert cost(lambda x, y: (x * y).sum(0), (6, 8), (6, 8)) == (2, 48 + 48 + 8)

    def test_sums_over_rows_share_a_kernel(self) -> None:
        def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return (x * y).sum(0).exp(), y.sum(0)

        assert cost(f, (6, 8), (6, 8)) == (2, 48 + 48 + 8 + 8)

    def test_sums_over_rows_of_other_tensors_do_not(self) -> None:
        assert cost(lambda x, y: (x.sum(0), y.sum(0)), (6, 8), (6, 8)) == (4, 2 * (48 + 8))

    def test_a_sum_reads_what_was_written_for_a_product(self) -> None:
        def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            y = x.exp()
            return y @ w, y.sum(0)

        assert cost(f, (6, 8), (8, 8)) == (1 + 1 + 2, (48 + 48) + (48 + 64 + 48) + (48 + 8))

    def test_views_are_parts_of_one_tensor(self) -> None:
        """Of [3, 6, 8] a kernel reads the two parts that it needs, and one of them once only."""

        def f(x: Tensor) -> Tensor:
            a, b, _ = x.unbind(0)
            return a @ b.t()

        assert cost(f, (3, 6, 8)) == (1, 48 + 48 + 36)
        assert cost(lambda x: x[0] @ x[0].t(), (3, 6, 8)) == (1, 48 + 36)

    def test_a_cast_of_a_weight_is_told_apart(self) -> None:
        with FakeTensorMode():
            x, w = torch.empty(6, 8), torch.empty(8, 8)
            graph = make_fx(lambda x, w: x.bfloat16() @ w.bfloat16())(x, w).graph
            total = Cost()
            Fusion(graph).add_to(total, {graph.find_nodes(op="placeholder")[1]})
        assert (total.launches, total.weight_casts) == (3, 1)


def test_bytes_of_views_and_of_expanded_tensors() -> None:
    x = torch.empty(4, 6)
    with Counter() as counter:
        x.t().reshape(2, 2, 6, 1).expand(2, 2, 6, 9)  # t() makes it a copy
    assert (counter.cost.launches, counter.cost.bytes) == (1, 2 * 4 * 24)
    with Counter() as counter:
        x.view(24)[3:].unsqueeze(0).detach()
        torch.empty_like(x)
    assert counter.cost == Cost()
    with Counter() as counter:
        torch.add(x, torch.ones(()).expand(4, 6))
    assert counter.cost.bytes == 4 * (24 + 1 + 24) + 4  # ones() is a launch, too
    with Counter() as counter:
        x.mul_(2)
    assert counter.cost.bytes == 2 * 4 * 24


def test_attention_is_one_call_each_way() -> None:
    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    for count in (plain, compiled):
        with FakeTensorMode():
            x = torch.empty(2, 3, 16, 8, dtype=torch.bfloat16)
            forward = count(Attend(), x, "forward", FLOAT32)
        assert forward.launches == 1
        values = 2 * 3 * 16 * 8
        # q, k and v are one tensor here. Of a row 4 bytes of statistics, of all two random states.
        assert 2 * 2 * values <= forward.bytes <= 2 * 2 * values + 4 * 2 * 3 * 16 + 64
    with pytest.raises(NotImplementedError, match="mask"):
        attend(x, x, x, is_causal=True)


def our_cost(model: str, batch: int, step: str) -> Cost:
    config = _proxies.block_config(model)
    rows, columns = config.grid_size
    tokens = rows * columns + config.num_prefix_tokens
    return ours(Block(config), torch.empty(batch, tokens, config.embed_dim), step)


@pytest.mark.parametrize(("model", "attention"), [("toy", 1), ("vit_tiny_patch16_384", 2)])
def test_launches_of_our_block(model: str, attention: int) -> None:
    """Those that tests/test_block.py finds by running it, and the casts of layers' parameters."""
    forward, train = (our_cost(model, 2, step) for step in ("forward", "train"))
    assert forward.weight_casts == train.weight_casts == 8
    assert forward.launches - 8 == 5
    assert train.launches - forward.launches == 4 * 3 + attention
    assert forward.declared_bytes == pytest.approx(forward.bytes, rel=0.01)
    assert train.declared_bytes < train.bytes  # which has what one launch leaves to the next


def test_known_figures() -> None:
    """A batch so large that the traffic of weights does not count, against what was worked out."""
    pytest.importorskip("timm")
    rows = by_case(proxies("vit_base_patch16_224", 8192))
    units = {case: row["width_units"] for case, row in rows.items()}
    # LayerNorm 8, cast 6, qkv 8, attention 8, projection 4, sum 10; 8, 6, fc1 10, GELU 16, 10, 10.
    assert units["eager", "forward"] == pytest.approx(104, abs=0.2)
    # 360 by hand; 22 within attention's backward and 16 within the norms' are not seen from here.
    assert units["eager", "train"] == pytest.approx(360 - 22 - 16, abs=0.5)
    assert units[COMPILED, "train"] == pytest.approx(280, rel=0.05)
    assert rows["eager", "train"]["launches"] == rows["timm", "train"]["launches"] == 52
    for step in ("forward", "train"):
        assert units["eager", step] == units["timm", step]
        assert units["vitkern", step] < units[COMPILED, step] < units["eager", step]


def test_saved_bytes_are_those_of_the_design() -> None:
    """docs/design.md, D = 192 and 197 tokens, measured by hooks while the block ran."""
    pytest.importorskip("timm")
    rows = by_case(proxies("vit_tiny_patch16_224", 4))
    saved = {impl: rows[impl, "train"]["saved_bytes"] / (4 * 197 * 192) for impl, _ in rows}
    # The table has 20.3 and 36.2 with the norms' parameters, and our attention's statistics, which
    # sm_80 needs. Here, beyond the tokens, there are those of two norms, and those of flash.
    assert saved["vitkern"] == pytest.approx(20 + 2 * 4 / 192)
    assert saved["timm"] == saved["eager"]
    assert saved["timm"] == pytest.approx(36 + (2 * 2 * 4 + 3 * 4) / 192, abs=1e-3)
    assert saved["vitkern"] < saved[COMPILED] < saved["timm"]
    assert all(rows[impl, "forward"]["saved_bytes"] is None for impl, _ in rows)


def test_bytes_grow_with_the_batch_by_as_much_every_time() -> None:
    timm = pytest.importorskip("timm")

    def theirs(batch: int, step: str) -> Cost:
        with FakeTensorMode():
            block = timm.models.vision_transformer.Block(48, 3, qkv_bias=True)
            return plain(block, torch.empty(batch, 17, 48), step)

    for step in ("forward", "train"):
        for costs in (
            [theirs(batch, step) for batch in (64, 128, 192)],
            [our_cost("toy", batch, step) for batch in (64, 128, 192)],
        ):
            first, second, third = costs
            # By declaration: how many rows of partial sums launches pass on goes in steps.
            moved = [cost.declared_bytes for cost in costs]
            assert 0 < moved[1] - moved[0] == moved[2] - moved[1]
            assert first.bytes < second.bytes < third.bytes
            assert first.launches == second.launches == third.launches
            if step == "train":
                kept = [c.saved_bytes for c in costs]
                assert 0 < kept[1] - kept[0] == kept[2] - kept[1]


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    rows = proxies("toy", 1)
    absent = [r for r in rows if r["kind"] == "absent"]
    assert [r["impl"] for r in absent] == ["timm", COMPILED]
    assert {r["why"] for r in absent} == {"timm is not installed"}
    assert {impl for impl, _ in by_case(rows)} == {"vitkern", "eager"}
    assert "timm: timm is not installed" in _proxies.table(rows)


def test_what_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitkern.kernels import _op

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(_op, "TRITON_MISSING", "triton can't be imported (no such module)")
    rows = proxies("toy", 1)
    (row,) = (r for r in rows if r["kind"] == "left out")
    assert (row["impl"], row["group"]) == ("vitkern", "toy b1 bf16 autocast block")
    assert "triton can't be imported" in row["why"]
    assert ("eager", "train") in by_case(rows)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
        proxies("toy", 0)
    with pytest.raises(ValueError, match="unknown model 'vit_wide'"):
        proxies("vit_wide")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proxies.jsonl"
    assert _proxies.main("toy", 2, path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {r["kind"] for r in rows} <= {"proxy", "absent"}
    wanted = {"model", "batch", "precision", "impl", "step", "launches", "bytes", "saved_bytes"}
    assert all(wanted < row.keys() for row in by_case(rows).values())
    shown = capsys.readouterr().out
    assert "Counted, not measured" in shown
    assert f"{by_case(rows)['eager', 'train']['width_units']:.1f}" in shown
