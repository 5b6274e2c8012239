"""The FlashAttention packages, by stand-ins with the real signatures: nothing here needs a GPU."""

import importlib
import inspect
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vitkern.kernels.attention import flash
from vitkern.kernels.attention.flash import NAMES, describe, pick, problem, run, version
from vitkern.kernels.attention.reference import Options, reference

DISTRIBUTIONS = {
    "flash4": ("flash_attn_4", "4.0.0b36"),
    "flash3": ("flash_attn_3", "3.0.0"),
    "flash2": ("flash_attn", "2.8.3"),
}
# As those versions declare them.
FLASH2 = """dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False"""
FLASH3 = """window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, sm_margin=0, return_attn_probs=False"""
FLASH4 = """softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None"""
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
DESCALE = "causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None"
SIGNATURES = {
    "flash2": {
        "flash_attn_qkvpacked_func": f"qkv, {FLASH2}",
        "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {FLASH2}",
        "flash_attn_func": f"q, k, v, {FLASH2}",
        "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {FLASH2}, block_table=None",
    },
    "flash3": {
        "flash_attn_qkvpacked_func": """qkv, softmax_scale=None, causal=False, q_descale=None,
            k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
            deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False""",
        "flash_attn_func": f"q, k, v, softmax_scale=None, {DESCALE}, {FLASH3}",
        "flash_attn_varlen_func": f"""q, k, v, {LENGTHS}, seqused_q=None, seqused_k=None,
            softmax_scale=None, {DESCALE}, {FLASH3}""",
    },
    "flash4": {
        "flash_attn_func": f"""q, k, v, qv=None, gather_kv_indices=None, {FLASH4},
            aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
            block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False,
            gather_bwd_token_chunk=None""",
        "flash_attn_varlen_func": f"""q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None,
            max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, seqused_q=None,
            seqused_k=None, gather_kv_indices=None, page_table=None, {FLASH4},
            block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
            scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
            gather_bwd_recompute_p=False, gather_bwd_token_chunk=None""",
    },
}
MODULES = {"flash4": "flash_attn.cute", "flash3": "flash_attn_interface", "flash2": "flash_attn"}
SCALE = 0.3

Call = tuple[str, dict[str, Any]]


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attention on [B, N, H, d] or [N, H, d]."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(-3, -2)


def compute(arguments: dict[str, Any]) -> Tensor:
    """What the packages compute, from the arguments of any of their functions."""
    given = arguments
    q, k, v = given["qkv"].unbind(-3) if "qkv" in given else (given[x] for x in "qkv")
    assert q.shape == k.shape == v.shape
    scale = given["softmax_scale"]
    ends = given.get("cu_seqlens", given.get("cu_seqlens_q"))
    if ends is None:
        assert q.dim() == 4
        return attend(q, k, v, scale=scale)
    assert q.dim() == 3
    assert given.get("cu_seqlens_k", ends) is ends
    lengths = ends.diff().tolist()
    for name in ("max_seqlen", "max_seqlen_q", "max_seqlen_k"):
        assert given.get(name, max(lengths)) == max(lengths)
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*piece, scale=scale) for piece in pieces])


def stand_in(name: str, calls: list[Call], as_tuple: bool) -> ModuleType:
    """A module like that of the package `name`, which writes down what it is called with."""

    def make(function: str, signature: inspect.Signature) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)  # a TypeError for an unknown argument
            calls.append((function, dict(bound.arguments)))
            out = compute(bound.arguments)
            return (out, None) if as_tuple else out

        return called

    module = ModuleType(MODULES[name])
    for function, parameters in SIGNATURES[name].items():
        one_line = " ".join(parameters.split())
        signature = inspect.signature(eval(f"lambda {one_line}: None"))
        setattr(module, function, make(function, signature))
    return module


class Packages:
    """Installs stand-ins: the metadata of their distributions, and modules."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.calls: list[Call] = []

        def only_ours(name: str) -> str:
            for found in metadata.Distribution.discover(name=name, path=[str(folder)]):
                return found.version
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", only_ours)

    def install(self, *names: str, as_tuple: bool | None = None) -> None:
        for name in names:
            distribution, number = DISTRIBUTIONS[name]
            info = self.folder / f"{distribution}-{number}.dist-info"
            info.mkdir()
            text = f"Metadata-Version: 2.4\nName: {distribution}\nVersion: {number}\n"
            (info / "METADATA").write_text(text)
            in_tuple = name == "flash4" if as_tuple is None else as_tuple
            module = stand_in(name, self.calls, in_tuple)
            self.monkeypatch.setitem(sys.modules, MODULES[name], module)
        flash.look_up.cache_clear()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Packages]:
    flash.look_up.cache_clear()
    yield Packages(tmp_path, monkeypatch)
    flash.look_up.cache_clear()


def dense(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Options]:
    return torch.randn(2, 7, 3, 2, 16, dtype=dtype), Options()


def lengths() -> tuple[Tensor, Options]:
    ends = torch.tensor([0, 5, 5, 11, 12], dtype=torch.int32)
    return torch.randn(12, 3, 2, 16).double(), Options(cu_seqlens=ends, max_seqlen=6)


def normed(
    options: Options, bias: bool = True, rms: bool = False, dtype: torch.dtype = torch.float64
) -> Options:
    def vector(wanted: bool) -> Tensor | None:
        return torch.randn(16, dtype=dtype, requires_grad=True) if wanted else None

    norms = (vector(True), vector(bias), vector(True), vector(bias))
    return Options(*norms, *options[4:])._replace(eps=1e-6, rms=rms)


def rotated(options: Options, tokens: int, interleaved: bool) -> Options:
    angles = torch.randn(tokens, 8)
    return options._replace(sin=angles.sin(), cos=angles.cos(), interleaved=interleaved)


def expected(qkv: Tensor, options: Options) -> Tensor:
    return reference(qkv, *options, SCALE, False)[0]


@pytest.mark.parametrize(
    "names", [c for n in range(4) for c in itertools.combinations(NAMES, n)], ids="+".join
)
def test_installed_packages_are_found_alone_and_together(
    packages: Packages, names: tuple[str, ...]
) -> None:
    packages.install(*names)
    for name in NAMES:
        assert version(name) == (DISTRIBUTIONS[name][1] if name in names else None)


def test_flash_attn_4_alone_is_no_flash_attn_2(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.install("flash4", "flash2")
    for name in ("flash_attn.cute", "flash_attn"):  # from now on whatever the files say
        monkeypatch.delitem(sys.modules, name)
    shutil.rmtree(tmp_path / "flash_attn-2.8.3.dist-info")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert __import__("flash_attn").__file__ is None  # it can be imported and is nothing
    assert version("flash4") == "4.0.0b36"
    assert version("flash2") is None
    assert problem("flash2", *dense()) == "flash-attn is not installed"
    assert flash.load("flash4") == "flash_attn.cute"


def test_nothing_is_imported_before_the_first_call(packages: Packages) -> None:
    packages.install("flash2")
    loaded: list[str] = []
    packages.monkeypatch.setattr(importlib, "import_module", loaded.append)
    problem("flash", *dense())
    pick(*dense())
    describe("flash2", *dense())
    assert loaded == []
    run("flash2", *dense(), SCALE)
    assert loaded == ["flash_attn"]


@pytest.mark.parametrize("name", NAMES)
def test_dense_calls(packages: Packages, name: str) -> None:
    packages.install(name)
    qkv, options = dense()
    out = run(name, qkv, options, SCALE)
    torch.testing.assert_close(out, expected(qkv, options))
    assert out.is_contiguous()
    ((function, given),) = packages.calls
    if name == "flash4":
        assert function == "flash_attn_func"
        for x, view in zip("qkv", qkv.unbind(-3), strict=True):
            assert given.pop(x).data_ptr() == view.data_ptr()
    else:
        assert function == "flash_attn_qkvpacked_func"
        assert given.pop("qkv") is qkv
    assert given == {"softmax_scale": SCALE, "deterministic": False}


@pytest.mark.parametrize("name", NAMES)
def test_sequences_of_varying_length(packages: Packages, name: str) -> None:
    packages.install(name)
    qkv, options = lengths()
    out = run(name, qkv, options, SCALE)
    torch.testing.assert_close(out, expected(qkv, options))
    assert out.is_contiguous()
    ((function, given),) = packages.calls
    if name == "flash2":
        assert function == "flash_attn_varlen_qkvpacked_func"
        assert given["qkv"] is qkv
    else:
        assert function == "flash_attn_varlen_func"
        assert given["v"].data_ptr() == qkv[:, 2].data_ptr()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [dense, lengths])
@pytest.mark.parametrize("norm", ["", "ln", "rms"])
@pytest.mark.parametrize("rope", ["", "halves", "interleaved"])
def test_norm_and_rotation(
    packages: Packages, name: str, make: Callable[[], tuple[Tensor, Options]], norm: str, rope: str
) -> None:
    packages.install(name)
    qkv, options = make()
    if norm:
        options = normed(options, bias=norm == "ln", rms=norm == "rms")
    if rope:  # dense: the first two tokens stay as they are
        tokens = 5 if make is dense else qkv.shape[0]
        options = rotated(options, tokens, rope == "interleaved")
    qkv.requires_grad_()
    wanted = [t for t in (qkv, *options[:4]) if t is not None]
    out, wished = run(name, qkv, options, SCALE), expected(qkv, options)
    torch.testing.assert_close(out, wished)
    dout = torch.randn_like(out)
    grads, wishes = (torch.autograd.grad(o, wanted, dout) for o in (out, wished))
    torch.testing.assert_close(grads, wishes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_log_sum_exp_that_some_versions_add_is_dropped(
    packages: Packages, name: str, as_tuple: bool
) -> None:
    packages.install(name, as_tuple=as_tuple)
    for qkv, options in (dense(), lengths()):
        torch.testing.assert_close(run(name, qkv, options, SCALE), expected(qkv, options))


def test_norms_in_float32_leave_the_dtype(packages: Packages) -> None:
    packages.install("flash2")
    qkv, options = dense(torch.bfloat16)
    options = rotated(normed(options, dtype=torch.float32), 7, False)
    assert run("flash2", qkv, options, SCALE).dtype == torch.bfloat16
    given = packages.calls[0][1]
    assert given["q"].dtype == given["k"].dtype == given["v"].dtype == torch.bfloat16


def test_dropout_and_determinism_are_passed_on(
    packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages.install(*NAMES)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    run("flash2", *dense(), SCALE, 0.25)
    run("flash2", *lengths(), SCALE, 0.25)
    for _, given in packages.calls:
        assert given["dropout_p"] == 0.25
    for name in NAMES:
        run(name, *dense(), SCALE)
        assert "dropout_p" not in packages.calls[-1][1]
    assert all(given["deterministic"] for _, given in packages.calls)


@pytest.mark.parametrize("layout", ["strided", "odd stride", "odd start", "expanded"])
def test_heads_that_start_between_16_bytes_are_copied(packages: Packages, layout: str) -> None:
    packages.install("flash2")
    shape = (2, 7, 3, 2, 16)
    qkv = {
        "strided": torch.randn(*shape, 2)[..., 0],
        "odd stride": torch.randn(*shape[:-1], 17)[..., :16],
        "odd start": torch.randn(2 * 7 * 3 * 2 * 16 + 1)[1:].view(shape),
        "expanded": torch.randn(1, *shape[1:]).expand(shape),
    }[layout].requires_grad_()
    torch.testing.assert_close(run("flash2", qkv, Options(), SCALE), expected(qkv, Options()))
    given = packages.calls[0][1]["qkv"]
    assert given.is_contiguous()
    assert given.data_ptr() % 16 == 0


def test_evenly_strided_heads_are_not_copied(packages: Packages) -> None:
    packages.install("flash2")
    qkv = torch.randn(2, 9, 3, 4, 24)[:, 1:8, :, 1:3, :16]
    run("flash2", qkv, Options(), SCALE)
    assert packages.calls[0][1]["qkv"] is qkv


def test_compiles_in_one_piece(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    packages.install("flash2")

    def plain(qkv: Tensor, *, softmax_scale: float, deterministic: bool) -> Tensor:
        return attend(*qkv.unbind(-3), scale=softmax_scale)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_qkvpacked_func", plain)

    def call(qkv: Tensor) -> Tensor:
        assert problem("flash", qkv, Options()) is not None
        return run("flash2", qkv, Options(), SCALE)

    qkv, options = dense()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv), expected(qkv, options))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """CUDA tensors without a GPU, of a compute capability to be set."""

    def is_now(major: int, minor: int) -> None:
        monkeypatch.setattr(flash, "capability", lambda device: (major, minor))

    is_now(9, 0)
    with FakeTensorMode():
        yield is_now


def cuda(
    head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, grad: bool = False, **shape: int
) -> Tensor:
    sizes = (shape.get("batch", 2), shape.get("tokens", 7), 3, 2, head_dim)
    return torch.empty(sizes, dtype=dtype, device="cuda", requires_grad=grad)


ALL_OF_THEM: list[tuple[Callable[[], tuple[Any, ...]], str]] = [
    (lambda: (torch.empty(2, 7, 3, 2, 64), Options()), "needs CUDA tensors, these are on cpu"),
    (lambda: (cuda(dtype=torch.float32), Options()), "takes float16 and bfloat16, not float32"),
    (lambda: (cuda(), Options(key_mask=torch.empty(2, 7))), "takes no key mask"),
    (
        lambda: (cuda(batch=0), Options()),
        "takes no empty tensor, and this is [0, 7, 3, 2, 64]",
    ),
    (
        lambda: (cuda(tokens=0), Options()),
        "takes no empty tensor, and this is [2, 0, 3, 2, 64]",
    ),
    (lambda: (cuda(batch=65536), Options()), "takes 65,535 images at most, not 65,536"),
    (
        lambda: (cuda()[0], Options(cu_seqlens=torch.empty(65537))),
        "takes 65,535 images at most, not 65,536",
    ),
]


@pytest.mark.parametrize(("make", "text"), ALL_OF_THEM, ids=lambda x: x if type(x) is str else "")
def test_what_none_of_them_takes(
    packages: Packages, gpu: Any, make: Callable[[], tuple[Any, ...]], text: str
) -> None:
    packages.install(*NAMES)
    for name in ("flash", *NAMES):  # one reason is said once
        assert problem(name, *make()) == f"FlashAttention {text}"
    assert pick(*make()) is None


LIMITS = [
    # name, capability, head_dim, gradient ("d" for deterministic), dropout, problem
    ("flash4", (8, 0), 64, "", 0.0, None),
    ("flash4", (8, 0), 64, "g", 0.0, "flash-attn-4 has no backward pass on sm_80"),
    ("flash4", (9, 0), 64, "g", 0.0, None),
    ("flash4", (9, 0), 256, "", 0.0, None),
    ("flash4", (10, 0), 128, "d", 0.0, None),
    (
        "flash4", (10, 0), 192, "", 0.0,
        "flash-attn-4 has no forward pass on sm_100 for heads of 192, above 128",
    ),
    ("flash4", (12, 0), 64, "g", 0.0, None),
    ("flash4", (12, 0), 64, "d", 0.0, "flash-attn-4 has no deterministic backward pass on sm_120"),
    ("flash4", (9, 0), 64, "", 0.1, "flash-attn-4 has no dropout"),
    ("flash4", (9, 0), 36, "", 0.0, "flash-attn-4 takes heads of a multiple of 8, not 36"),
    ("flash4", (7, 5), 64, "", 0.0, "flash-attn-4 has no forward pass on sm_75"),
    ("flash3", (9, 0), 256, "g", 0.0, None),
    (
        "flash3", (9, 0), 256, "d", 0.0,
        "flash-attn-3 has no deterministic backward pass on sm_90 for heads of 256, above 192",
    ),
    ("flash3", (8, 0), 64, "", 0.0, "flash-attn-3 has no forward pass on sm_80"),
    ("flash3", (10, 0), 64, "", 0.0, "flash-attn-3 has no forward pass on sm_100"),
    ("flash3", (9, 0), 64, "", 0.1, "flash-attn-3 has no dropout"),
    ("flash3", (9, 0), 36, "", 0.0, "flash-attn-3 takes heads of a multiple of 8, not 36"),
    ("flash2", (8, 9), 256, "d", 0.0, None),
    ("flash2", (12, 0), 64, "g", 0.5, None),
    ("flash2", (8, 0), 36, "g", 0.0, None),
    ("flash2", (7, 5), 64, "", 0.0, "flash-attn has no forward pass on sm_75"),
    ("flash2", (8, 9), 256, "g", 0.1, "flash-attn has no dropout for heads of 256, above 192"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "capability", "head_dim", "grad", "dropout_p", "text"), LIMITS)
def test_limits_of_each(
    packages: Packages,
    gpu: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    head_dim: int,
    grad: str,
    dropout_p: float,
    text: str | None,
) -> None:
    packages.install(name)
    gpu(*capability)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: grad == "d")
    qkv = cuda(head_dim, grad=bool(grad))
    assert problem(name, qkv, Options(), dropout_p) == text
    assert pick(qkv, Options(), dropout_p) == (name if text is None else None)
    with torch.no_grad():  # no gradient is asked for, whatever a tensor says
        forward = problem(name, qkv, Options(), dropout_p)
    assert forward is None or "backward" not in forward


def test_a_gradient_for_a_norm_needs_a_backward_pass_too(packages: Packages, gpu: Any) -> None:
    packages.install("flash4")
    gpu(8, 0)
    assert problem("flash4", cuda(), Options()) is None
    assert "no backward" in problem("flash4", cuda(), normed(Options()))


def test_flash_is_the_newest_that_takes_the_call(packages: Packages, gpu: Any) -> None:
    packages.install(*NAMES)
    assert pick(cuda(), Options()) == "flash4"
    assert pick(cuda(256, grad=True), Options()) == "flash3"
    assert pick(cuda(), Options(), 0.1) == "flash2"
    assert problem("flash", cuda(), Options(), 0.1) is None
    assert describe("flash", cuda(), Options()) == "flash-attn-4 4.0.0b36"
    assert describe("flash", cuda(), Options(), 0.1) == "flash-attn 2.8.3"
    assert describe("flash3", cuda(), Options()) == "flash-attn-3 3.0.0"
    gpu(8, 0)
    assert pick(cuda(grad=True), Options()) == "flash2"


def test_flash_runs_the_one_it_picked(packages: Packages) -> None:
    packages.install("flash4", "flash2")
    packages.monkeypatch.setattr(flash, "pick", lambda *_: "flash2")
    qkv, options = dense()
    torch.testing.assert_close(run("flash", qkv, options, SCALE), expected(qkv, options))
    assert packages.calls[0][0] == "flash_attn_qkvpacked_func"


def test_flash_without_any_says_what_is_missing(packages: Packages) -> None:
    text = (
        "flash-attn-4 is not installed; flash-attn-3 is not installed; flash-attn is not installed"
    )
    assert problem("flash", *dense()) == text
    assert pick(*dense()) is None
    with pytest.raises(ValueError, match=text):
        run("flash", *dense(), SCALE)
    packages.install("flash2")
    assert problem("flash", *dense()) == (
        "flash-attn-4 is not installed; flash-attn-3 is not installed; "
        "FlashAttention needs CUDA tensors, these are on cpu"
    )
