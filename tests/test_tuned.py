"""Tables of measurements: which file counts, and what auto makes of an entry."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitkern.kernels import REGISTRY, _op, _tuned, layer_norm
from vitkern.kernels._op import choose, record_choices
from vitkern.kernels._triton import INTERPRET

LAYER_NORM = REGISTRY["layer_norm"]
X, WEIGHT = torch.ones(3, 5, 8), torch.ones(8)
BUCKET = "m16x8 8 -"


def entry(implementation: str, bucket: str = BUCKET, **changed: Any) -> dict[str, Any]:
    cases = {
        "a": {"run": 0, "seconds": {"triton": 2e-5, "torch": 1e-5}},
        "b": {"run": 0, "seconds": {"triton": 2e-5, "torch": 1e-5, "reference": 1e-4}},
    }
    whole = {"op": "layer_norm", "bucket": bucket, "dtype": "float32", "cases": cases}
    return {**whole, "implementation": implementation, **changed}


def write(folder: Path, *entries: dict[str, Any], name: str = "made-up-gpu", **more: Any) -> None:
    contents = {"schema": _tuned.SCHEMA, "entries": list(entries), "verified": {}, **more}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(contents))


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of tables, for a made-up GPU on which CPU tensors pass to be."""
    if not INTERPRET:
        pytest.skip("a made-up GPU beside a real one")
    monkeypatch.setattr(_tuned, "card", lambda device: "made-up-gpu")
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(_tuned, "_tables", {})
    monkeypatch.setattr(_op, "_on_gpu", lambda tensors: True)
    monkeypatch.setenv("VITKERN_SELFCHECK", "0")
    monkeypatch.delenv("VITKERN_TUNED", raising=False)
    return tmp_path / "shipped"


def decided(run: Callable[[], Any] = lambda: layer_norm(X, WEIGHT)) -> tuple[str, str]:
    with record_choices() as choices:
        run()
    return choices[0].implementation, choices[0].why


def test_an_entry_decides_and_gives_its_reason(shipped: Path) -> None:
    write(shipped, entry("torch"))
    assert decided() == ("torch", "measured on this card: torch 20 us, triton 40 us")
    assert decided(lambda: layer_norm(X, WEIGHT, impl="reference"))[1] == "asked for"


@pytest.mark.parametrize(
    "other",
    [
        entry("torch", "m16x8 8 - grad"),
        entry("torch", "m128x8 8 -"),
        entry("torch", "m2x8 8 -"),
        entry("torch", "m16x8 8 8"),
        entry("torch", "m16x16 16 -"),
        entry("torch", dtype="float16"),
        entry("torch", op="add_layer_norm"),
        entry("gone"),
    ],
)
def test_without_an_entry_the_heuristic_decides(shipped: Path, other: dict[str, Any]) -> None:
    write(shipped, other)
    unmeasured = ("triton", "CUDA tensors of a kernel dtype; not measured on this card")
    assert decided() == unmeasured


def test_buckets_round_rows_and_keep_widths(shipped: Path) -> None:
    write(shipped, entry("torch"))
    whys = {n: decided(partial(layer_norm, torch.ones(n, 8), WEIGHT))[1] for n in (8, 9, 16, 17)}
    assert {n: why.split()[0] for n, why in whys.items()} == {
        8: "as",
        9: "measured",
        16: "measured",
        17: "as",
    }


def test_the_nearest_size_counts_where_it_is_near(shipped: Path) -> None:
    write(shipped, entry("torch", "m32x8 8 -"), entry("reference", "m128x8 8 -"))

    def at(rows: int) -> tuple[str, str]:
        return decided(partial(layer_norm, torch.ones(rows, 8), WEIGHT))

    times = "measured on this card: torch 20 us, triton 40 us"
    for _ in range(2):  # found, then remembered
        assert at(8) == ("torch", f"as m32x8 8 -, {times}")
        assert [at(rows)[0] for rows in (4, 32, 128, 512, 513)] == [
            "triton",
            "torch",
            "reference",
            "reference",
            "triton",
        ]


def test_training_has_entries_of_its_own(shipped: Path) -> None:
    write(shipped, entry("triton"), entry("torch", f"{BUCKET} grad"))
    assert decided()[0] == "triton"
    assert decided(lambda: layer_norm(X, WEIGHT.clone().requires_grad_()))[0] == "torch"


def test_an_entry_wins_over_the_heuristic_but_not_over_what_can_run(shipped: Path) -> None:
    write(shipped, entry("triton"))

    def asked(**options: Any) -> str:
        return choose(LAYER_NORM, "auto", X, WEIGHT, None, **options)

    assert asked(avoid="predicted slower") == "triton"
    assert asked(unfit={"triton": "too wide"}) == "torch"
    write(shipped, entry("torch"))
    _tuned._tables.clear()
    assert asked(unfit={"torch": "too plain"}) == "triton"


def test_a_peer_is_taken_if_it_says_that_it_can_run(shipped: Path) -> None:
    write(shipped, entry("flash"))
    op = replace(LAYER_NORM, peers={"flash": LAYER_NORM.portable})

    def asked(**options: Any) -> str:
        return choose(op, "auto", X, WEIGHT, None, **options)

    assert asked(peer_unfit=lambda name: None) == "flash"
    assert asked(peer_unfit=lambda name: f"{name} is not installed") == "triton"
    assert asked() == "triton"
    assert asked(unfit={"flash": None}) == "flash"


def test_an_op_may_name_its_buckets_and_dtype(shipped: Path) -> None:
    write(shipped, entry("torch", "m4 n8 gated", dtype="bfloat16"))

    def asked(**options: Any) -> str:
        return choose(LAYER_NORM, "auto", X, WEIGHT, None, **options)

    def bucket() -> str:
        return _tuned.bucket(m=3, n=8, gated=True, scaled=False)

    assert asked(bucket=bucket, dtype=torch.bfloat16) == "torch"
    assert asked(bucket=bucket) == "triton"
    assert asked(dtype=torch.bfloat16) == "triton"


def test_names() -> None:
    assert _tuned.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert _tuned.bucket(m=12608, n=3072, k=768) == "m16384 n3072 k768"
    assert _tuned.bucket(b=3, gated=True, rms=False, n=1, m=0) == "b4 gated n1 m1"
    qkv, angles = (100, 197, 3, 12, 64), (196, 32)
    assert _tuned.bucket_of((qkv, None, angles, ())) == "m128x197x3x12x64 - 196x32 1"
    tokens, drop = (100, 197, 768), (100,)
    assert _tuned.bucket_of((tokens, tokens, drop)) == "m32768x768 m32768x768 m128"
    assert _tuned.bucket_of(((0, 8), (8,))) == "m1x8 8"
    assert _tuned.without_size("m32768x768 768 m128 grad") == ("mx768 768 m grad", 32768)
    assert _tuned.without_size("b8 n3 gated") == ("b n3 gated", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_record_names_a_call_as_the_table_does(dtype: torch.dtype) -> None:
    with record_choices() as choices:
        layer_norm(X.to(dtype), WEIGHT)
        layer_norm(X.to(dtype), WEIGHT.clone().requires_grad_())
    assert [(c.bucket, c.dtype) for c in choices] == [(BUCKET, dtype), (f"{BUCKET} grad", dtype)]


def test_a_table_is_read_once(shipped: Path) -> None:
    write(shipped, entry("torch"))
    assert decided()[0] == "torch"
    (shipped / "made-up-gpu.json").unlink()
    assert decided()[0] == "torch"


def test_cpu_tensors_ask_for_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("card", "table", "lookup"):
        monkeypatch.setattr(_tuned, name, None)
    assert layer_norm(X, WEIGHT).shape == X.shape


def test_a_users_table_wins_entry_by_entry(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(shipped, entry("torch"), entry("torch", "m1x8 8 -"))
    write(tmp_path / "own", entry("reference"))
    monkeypatch.setenv("VITKERN_TUNED", str(tmp_path / "own"))
    assert decided()[0] == "reference"
    assert decided(lambda: layer_norm(X[0, :1], WEIGHT))[0] == "torch"
    monkeypatch.setenv("VITKERN_TUNED", str(tmp_path / "nowhere"))
    _tuned._tables.clear()
    assert decided()[0] == "torch"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'schema'"),
        ('{"schema": 99}', "ValueError: schema 99, expected 1"),
        ('{"schema": 1, "entries": [{}], "verified": {}}', "KeyError: 'op'"),
        (json.dumps({"schema": 1, "entries": [entry("a", dtype="nn")], "verified": {}}), "dtype"),
        (json.dumps({"schema": 1, "entries": [entry("a", cases={})], "verified": {}}), "Value"),
        ("\udc80", "UnicodeDecodeError"),
    ],
)
def test_a_file_of_no_use_is_ignored_with_one_warning(shipped: Path, text: str, why: str) -> None:
    shipped.mkdir()
    path = shipped / "made-up-gpu.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=f"{path} is ignored: .*{why}") as seen:
        assert [decided()[0] for _ in range(2)] == ["triton", "triton"]
    assert len(seen) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_looks_up_sizes_that_are_fixed(shipped: Path, dynamic: bool) -> None:
    write(shipped, entry("torch"))

    def call(x: Tensor, avoid: str | None) -> Tensor:
        return x + 1 if choose(LAYER_NORM, "auto", x, WEIGHT, None, avoid=avoid) == "torch" else x

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)
    assert torch.equal(compiled(X, None), X if dynamic else X + 1)
    write(shipped, entry("triton"))
    _tuned._tables.clear()
    torch.compiler.reset()
    assert torch.equal(compiled(X, "a compiler fuses it"), X + 1)


def test_export_keeps_its_sizes_open(shipped: Path) -> None:
    write(shipped, entry("torch"))

    class Norm(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if choose(LAYER_NORM, "auto", x, WEIGHT, None) == "torch" else x * 2

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Norm(), (X,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(exported(torch.ones(7, 5, 8)), 2 * torch.ones(7, 5, 8))
    fixed = torch.export.export(Norm(), (X,)).module()
    assert torch.equal(fixed(X), X + 1)


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "table.json"
    _tuned.replace(path, {"n": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        _tuned.replace(path, {"n": object()})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
