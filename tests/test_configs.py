"""Launch configs: who decides, what a table may say, and that every alternative is right."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vitkern
from vitkern.kernels import REGISTRY, _configs, _norm, _tuned, attention
from vitkern.kernels._configs import override, record
from vitkern.kernels._error_budget import as_tuple, in_float64, parity
from vitkern.kernels._gemm import launch as gemm
from vitkern.kernels._gemm.configs import work
from vitkern.kernels._launch import Launch, intercept
from vitkern.kernels._triton import INTERPRET

CPU = torch.device("cpu")
KEY = ("norm.forward", "m16 d64", torch.float32)
DEFAULT = _norm.forward_config(64)
OTHER = replace(DEFAULT, num_warps=4)

interpreted = pytest.mark.skipif(not INTERPRET, reason="a made-up GPU beside a real one")


def launched(rows: int = 10, **card: Any) -> tuple[int, int]:
    """Rows a program and warps with which a norm of [rows, 64] is launched."""
    seen: list[Launch] = []
    with intercept(seen.append, **card):
        _norm.forward(torch.ones(rows, 64), None, None, None, None, None, 0.0, False, torch.float32)
    return seen[0].constexprs["ROWS"], seen[0].num_warps


def entry(config: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    kernel, bucket, _ = KEY
    whole = {"kernel": kernel, "bucket": bucket, "dtype": "float32", "default": asdict(DEFAULT)}
    return {**whole, "config": config or asdict(OTHER), "seconds": {}, **changed}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes the table of a made-up GPU, on which CPU tensors pass to be."""
    monkeypatch.setattr(_tuned, "card", lambda device: "made-up-gpu")
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(_tuned, "_tables", {})
    monkeypatch.setattr(_configs, "_warned", set())
    monkeypatch.delenv("VITKERN_TUNED", raising=False)

    def write(*configs: dict[str, Any]) -> Path:
        contents = {"schema": _tuned.SCHEMA, "entries": [], "configs": configs, "verified": {}}
        path = tmp_path / "made-up-gpu.json"
        path.write_text(json.dumps(contents))
        return path

    return write


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_without_a_table_the_default_decides(quiet: None) -> None:
    assert launched() == (DEFAULT.rows, DEFAULT.num_warps)


def test_a_tool_sees_the_question_and_may_answer_it(quiet: None) -> None:
    with record() as asked:
        launched()
    assert [(q.key, q.default) for q in asked] == [(KEY, DEFAULT)]
    assert OTHER in asked[0].candidates()
    with override({KEY: OTHER}):
        assert launched() == (OTHER.rows, 4)
        assert launched(capability=(9, 0)) == (OTHER.rows, 4)
        assert launched(rows=40) == (DEFAULT.rows, DEFAULT.num_warps)
    assert launched() == (DEFAULT.rows, DEFAULT.num_warps)
    problem = "that of norm.forward must be a RowConfig, got 3"
    with pytest.raises(TypeError, match=problem), override({KEY: 3}):
        pass


@interpreted
def test_a_table_decides(table: Any, quiet: None) -> None:
    table(entry())
    assert launched() == (OTHER.rows, 4)
    assert launched(rows=16) == (OTHER.rows, 4)
    # Of another card nothing was measured, nor of this one with fewer multiprocessors.
    assert launched(capability=(9, 0)) == (DEFAULT.rows, DEFAULT.num_warps)
    assert launched(processors=1) == (DEFAULT.rows, DEFAULT.num_warps)
    with override({KEY: DEFAULT}):
        assert launched() == (DEFAULT.rows, DEFAULT.num_warps)


@interpreted
def test_what_a_table_says_in_other_words_is_launched_in_ours(table: Any, quiet: None) -> None:
    table(entry({**asdict(OTHER), "num_warps": 4.0}))
    assert [type(n) for n in launched()] == [int, int]
    assert launched() == (OTHER.rows, 4)


@interpreted
def test_near_sizes_count_where_the_default_is_the_same(table: Any, quiet: None) -> None:
    table(entry(bucket="m64 d64"))
    assert launched() == (OTHER.rows, 4)
    assert launched(rows=8) == (DEFAULT.rows, DEFAULT.num_warps)  # 8 times as many
    _tuned._tables.clear()
    table(entry(bucket="m64 d64", default=asdict(OTHER)))
    assert launched() == (DEFAULT.rows, DEFAULT.num_warps)
    assert launched(rows=64) == (OTHER.rows, 4)  # measured on just that


@interpreted
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"config": {**asdict(OTHER), "num_warps": 3}}, "is none of those that the kernel may"),
        ({"config": {**asdict(OTHER), "rows": 1 << 20}}, "is none of those that the kernel may"),
        ({"config": {**asdict(OTHER), "gone": 3}}, "unexpected keyword argument 'gone'"),
        ({"config": {"rows": 32}}, "missing 2 required"),
        ({"kernel": "norm.gone"}, "there are no kernels norm.gone"),
    ],
)
def test_what_a_kernel_can_not_take_is_left_alone(
    table: Any, wrong: dict[str, Any], what: str
) -> None:
    path = table(entry(**wrong))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (10, 10, 32):
            assert launched(rows) == (DEFAULT.rows, DEFAULT.num_warps)
    texts = [str(w.message) for w in caught]
    assert len(set(texts)) == len(texts) == 1
    assert what in texts[0]
    assert str(path) in texts[0]


@interpreted
def test_a_table_of_no_form_is_ignored(table: Any) -> None:
    table({"kernel": "norm.forward"})
    with pytest.warns(UserWarning, match="is ignored: KeyError"):
        assert launched() == (DEFAULT.rows, DEFAULT.num_warps)


@interpreted
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_attention_is_launched_as_the_table_says(table: Any, dynamic: bool) -> None:
    one, two = {"single": True}, {"single": False}
    table(entry(two, kernel="attention.passes", bucket="k5 d16 plain", default=one))
    seen: list[str] = []

    def handle(launch: Launch) -> None:
        seen.append(launch.kernel.fn.__name__)
        launch.run()

    def call(qkv: Tensor) -> Tensor:
        return attention(qkv, impl="triton")

    qkv = torch.randn(2, 5, 3, 2, 16, requires_grad=True)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with intercept(handle):
        compiled(qkv).sum().backward()
    # A graph for any number of tokens can't go by that of one.
    assert ("backward_kernel" in seen) == dynamic
    assert ("backward_query_kernel" in seen) != dynamic
    torch._dynamo.reset()


@interpreted
def test_explain_counts_what_was_measured(table: Any, quiet: None) -> None:
    size = {"img_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 1, "num_classes": 2}
    model = vitkern.ViT(**size, patch_size=8, global_pool="avg", impl={"attention": "triton"})
    images = torch.randn(1, 3, 16, 16)
    with record() as asked, torch.no_grad():
        model(images)
        before = vitkern.explain(model, images)
    assert [question.measured for question in asked] == [False] * len(asked)
    (kernel, bucket, _), default = asked[0].key, asdict(asked[0].default)
    assert kernel == "attention.forward"
    table(entry(default, kernel=kernel, bucket=bucket, default=default))
    _tuned._tables.clear()
    with torch.no_grad():
        rows = {row.op: row.why for row in vitkern.explain(model, images).rows}
    assert rows["attention"] == "asked for; 2 of 2 launch configs measured on this card"
    # Of the others nothing was; nor of any, before.
    assert all("measured on" not in why for op, why in rows.items() if op != "attention")
    assert all("configs" not in row.why for row in before.rows)


def test_older_tables_have_no_configs(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema": _tuned.SCHEMA, "entries": [], "verified": {}}))
    found = _tuned.read(path)
    assert found is not None
    assert found.configs == {}


def test_every_kernel_has_a_name_of_its_own() -> None:
    assert all(name == tunable.kernel for name, tunable in _configs.TUNABLE.items())
    assert len(_configs.TUNABLE) >= 20


# Of every kernel a call that is small, in a dtype that the interpreter multiplies rightly.
HALF, FLOAT = torch.float16, torch.float32
BEHIND = "2x9x40 -> 72 scale drop fp32 stream statistics behind gelu"
CALLS = [
    ("linear_act", "triton", "gelu 2x5x24 -> 40", HALF),
    ("linear_act", "triton", "gelu 2x5x24 -> 40", FLOAT),
    ("linear_act", "triton", "silu gated 2x5x24 -> 40 saved", HALF),
    ("linear_act", "cublas", "gelu 2x5x24 -> 40", FLOAT),
    ("linear_act_backward", "triton", "gelu 2x5x24 -> 40", HALF),
    ("linear_act_backward", "triton", "gelu 2x5x24 -> 40", FLOAT),
    ("norm_linear", "triton", "ln 2x9x72 -> gelu 50 saved", HALF),
    ("norm_linear_backward", "triton", "ln 2x9x72 -> gelu 50 saved", HALF),
    ("norm_linear", "cublas", "ln 2x9x72 -> gelu 50 saved", FLOAT),
    ("linear_residual", "triton", "2x9x40 -> 72 scale drop fp32 stream statistics", HALF),
    ("linear_residual", "cublas", "2x9x40 -> 72 scale drop fp32 stream statistics", FLOAT),
    ("linear_residual_backward", "triton", "2x5x24 -> 18", HALF),
    ("linear_residual_backward", "triton", BEHIND, HALF),
    ("linear_residual_backward", "cublas", BEHIND, FLOAT),
    ("attention", "triton", "B=2 N=18 H=2 d=16 ln-qk-norm rope interleaved", HALF),
    ("attention_pool_backward", "triton", "B=2 Q=1 N=5 H=2 d=8", HALF),
    ("attention_pool_backward", "triton", "B=2 Q=1 N=5 H=2 d=8 stats", HALF),
    ("attention_pool_backward", "triton", "B=2 Q=1 N=5 H=2 d=8 stats", FLOAT),
    ("patch_embed", "triton", "2x3x8x8 /4x4 D=24 class token", HALF),
    ("patch_embed_backward", "triton", "2x3x8x8 /4x4 D=24 class token", HALF),
    ("add_layer_norm", "triton", "ln 2x5x96", FLOAT),
    ("add_layer_norm_backward", "triton", "ln 2x5x96", FLOAT),
]
# Of these only the kernel that no other call has.
NEW = {"norm_linear_backward": "linear.norm_finish"}


def run(launch: Launch) -> None:
    launch.run()


@interpreted
@pytest.mark.parametrize("call", CALLS, ids=[" ".join(map(str, call)) for call in CALLS])
def test_every_alternative_is_right(
    call: tuple[str, str, str, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, impl, label, dtype = call
    op = REGISTRY[name]
    sample = next(s for s in op.samples("tiny") if s.label == label)
    # The configs for rows that are aligned, on rows that are not, which is no matter here.
    monkeypatch.setattr(gemm, "work", lambda *a, **k: replace(work(*a, **k), aligned=True))
    arguments = sample.make("cpu", dtype)
    eager = as_tuple(op.portable(**arguments))
    exact = as_tuple(op.reference(**in_float64(arguments)))

    def made() -> tuple[Tensor, ...]:
        return as_tuple(op.launchers[impl](**arguments))

    with intercept(run, (9, 0), 3):
        with record() as asked:
            made()
        tried = 0
        for key, default, candidates, _ in asked:
            if key[0] != NEW.get(name, key[0]):
                continue
            assert len(candidates()) <= 20
            for config in dict.fromkeys(candidates()):
                if config == default:
                    continue
                with override({key: config}):
                    verdict = parity(made(), eager, exact)
                assert verdict["ok"], (key, config, verdict)
                tried += 1
    assert tried


@interpreted
def test_every_kernel_is_tried() -> None:
    """What has alternatives, and a call that the interpreter can make."""
    asked = set()
    for name, impl, label, dtype in CALLS:
        sample = next(s for s in REGISTRY[name].samples("tiny") if s.label == label)
        with intercept(lambda launch: None, (9, 0), 3), record() as questions:
            REGISTRY[name].launchers[impl](**sample.make("cpu", dtype))
        asked |= {q.key[0] for q in questions if NEW.get(name, q.key[0]) == q.key[0]}
    # One launch or two: tests/test_tune.py. What nothing interprets: tests/test_gluon.py.
    assert asked == _configs.TUNABLE.keys() - {"attention.passes", "gluon"}
