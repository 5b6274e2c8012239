"""The rivals: equal to ours where they are installed, and harmless where they are not.

Packages that need a GPU are stood in for by modules with their signatures, as read in their
sources, and their functions' definitions in PyTorch: what is tested is what they are given.
"""

import importlib
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkern
from benchmarks._cases import require_grads
from benchmarks._contest import Absent, Unfit
from benchmarks._models import AUTOCAST, BFLOAT16, FLOAT32, TOY
from benchmarks.peers import _packages, networks, ops
from benchmarks.peers.networks import RIVALS, Network
from tests.error_budget import as_tuple
from vitkern import kernels
from vitkern.kernels import REGISTRY
from vitkern.kernels._triton import INTERPRET, tl

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# Other sizes in everything, an eps of its own, widths that are no powers of two.
ODD = {
    "img_size": 21,
    "patch_size": 7,
    "embed_dim": 40,
    "depth": 3,
    "num_heads": 5,
    "mlp_ratio": 3.3,
    "num_classes": 7,
}
TRAINED = ("eager", "timm", "torchvision", "hf", "vit-pytorch")
RUNTIMES = ("onnxruntime", "openvino")


def make(**config: Any) -> vitkern.ViT:
    torch.manual_seed(0)
    model = vitkern.ViT(**config)
    with torch.no_grad():
        for p in model.parameters():  # a fresh network has zeros, which hide mistakes
            p.add_(torch.randn_like(p) * 0.05)
    return model


def pixels(model: vitkern.ViT) -> Tensor:
    return torch.randn(3, model.config.in_chans, *model.config.img_size)


def build(name: str, ours: vitkern.ViT) -> Network:
    try:
        return RIVALS[name].build(ours, FLOAT32, CPU)
    except Absent as reason:
        pytest.skip(str(reason))


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance


def assert_same_function(network: Network, ours: vitkern.ViT) -> None:
    """Logits, and gradients with respect to the images."""
    results = []
    for call in (network.call, ours):
        torch.manual_seed(1)
        images = pixels(ours).requires_grad_()
        logits = call(images)
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        results.append((logits, *torch.autograd.grad(logits, images, direction)))
    for actual, expected in zip(*results, strict=True):
        assert_equal(actual, expected)


@pytest.mark.parametrize("config", [TOY, ODD], ids=["toy", "odd"])
@pytest.mark.parametrize("name", TRAINED)
def test_networks_that_train_are_ours(name, config):
    ours = make(**config).eval()
    network = build(name, ours)
    assert not network.module.training
    assert_same_function(network, ours)
    count = sum(p.numel() for p in network.module.parameters())
    assert count == sum(p.numel() for p in ours.parameters())


LAYER_NORM = partial(nn.LayerNorm, eps=1e-3)  # far enough from any default to show
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "eager": [{"qkv_bias": False}, {"init_values": 0.1}, {"reg_tokens": 2}, {"num_classes": 0}],
    "timm": [
        {"norm_layer": LAYER_NORM, "act_layer": "quick_gelu", "img_size": (24, 32)},
        {"norm_layer": "rmsnorm", "mlp_layer": "swiglu_packed", "init_values": 0.1},
        {"mlp_layer": "swiglu", "qk_norm": True, "reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg", "act_layer": "gelu_tanh", "in_chans": 1},
        {"pre_norm": True, "pos_embed": "none", "num_classes": 0},
    ],
    "torchvision": [{"norm_layer": LAYER_NORM}],
    "hf": [
        {"norm_layer": LAYER_NORM, "qkv_bias": False, "img_size": (24, 32), "in_chans": 1},
        {"act_layer": "gelu_tanh", "patch_size": (4, 8), "num_classes": 0},
        {"act_layer": "quick_gelu"},
        {"act_layer": "silu"},
    ],
    "vit-pytorch": [
        {"norm_layer": LAYER_NORM, "qkv_bias": False, "img_size": (24, 32), "in_chans": 1},
        {"patch_size": (4, 8)},
    ],
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in OPTIONS for options in OPTIONS[name]]
)
def test_options_that_a_library_has_are_carried_over(name, options):
    ours = make(**{**TOY, **options}).eval()
    assert_same_function(build(name, ours), ours)


def test_weights_have_the_dtype_asked_for_and_are_copies():
    ours = make(**TOY)
    for name in TRAINED:
        try:
            network = RIVALS[name].build(ours, BFLOAT16, CPU)
        except Absent:
            continue
        assert network.module.training  # as ours
        assert {p.dtype for p in network.module.parameters()} == {torch.bfloat16}
        assert network.call(pixels(ours).bfloat16()).dtype == torch.bfloat16
    own = {p.data_ptr() for p in ours.parameters()}
    network = build("eager", ours)
    assert own.isdisjoint(p.data_ptr() for p in network.module.parameters())


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("torchvision", {"init_values": 0.1}, "torchvision has no init_values=0.1"),
        ("torchvision", {"img_size": (16, 32)}, r"torchvision has no img_size=\(16, 32\)"),
        ("torchvision", {"num_classes": 0}, "torchvision has no num_classes=0"),
        ("torchvision", {"norm_layer": "rmsnorm"}, "torchvision has no norm_layer='rmsnorm'"),
        ("hf", {"reg_tokens": 4}, "transformers has no reg_tokens=4"),
        ("hf", {"global_pool": "avg"}, "transformers has no global_pool='avg'"),
        ("vit-pytorch", {"qk_norm": True}, "vit-pytorch has no qk_norm=True"),
        ("vit-pytorch", {"num_heads": 1}, "num_heads=1"),
        ("vit-pytorch", {"img_size": 33}, r"img_size=\(33, 33\)"),
        ("eager", {"mlp_layer": "swiglu"}, "EagerViT has no mlp_layer='swiglu'"),
        ("onnxruntime", {"mlp_layer": "swiglu"}, "EagerViT has no mlp_layer='swiglu'"),
    ],
)
def test_what_a_library_has_no_option_for_is_named(name, options, text):
    if RIVALS[name].absent():
        pytest.skip(RIVALS[name].absent())
    with pytest.raises(Unfit, match=text):
        RIVALS[name].build(make(**{**TOY, **options}), FLOAT32, CPU)


@pytest.mark.parametrize(
    ("options", "precision", "device", "text"),
    [
        ({}, AUTOCAST, CPU, "needs a CUDA GPU"),
        ({}, FLOAT32, CUDA, "not in float32"),
        ({"qkv_bias": False}, AUTOCAST, CUDA, "no qkv_bias=False"),
        ({"init_values": 1.0}, AUTOCAST, CUDA, "no init_values=1.0"),
        ({"act_layer": "gelu_tanh"}, AUTOCAST, CUDA, "no act_layer='gelu_tanh'"),
        ({"depth": 1}, AUTOCAST, CUDA, "no depth=1"),
    ],
)
def test_what_flash_attns_vit_cannot_do(options, precision, device, text, monkeypatch):
    monkeypatch.setattr(_packages, "problem", lambda *_: None)
    with pytest.raises(Unfit, match=text):
        RIVALS["flash-attn ViT"].build(make(**{**TOY, **options}), precision, device)


def test_weights_under_the_names_of_transformers_4():
    state = make(**{**TOY, "depth": 1}).state_dict()
    prefix = "vit.encoder.layer.{}."
    block = networks._pairs(networks._HF_BLOCKS[prefix])
    renamed = networks._renamed(state, networks._HF, block, prefix)
    layers = {
        "attention.attention.query": "attn.qkv",
        "attention.attention.key": "attn.qkv",
        "attention.attention.value": "attn.qkv",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }
    expected = {f"vit.encoder.layer.0.{t}.{kind}" for t in layers for kind in ("weight", "bias")}
    inner = {name for name in renamed if ".layer." in name}
    assert inner == expected
    assert len(renamed) == len(state) + 2 * 2  # a qkv is three
    thirds = [renamed[f"vit.encoder.layer.0.attention.attention.{t}.weight"] for t in
              ("query", "key", "value")]  # fmt: skip
    assert torch.equal(torch.cat(thirds), state["blocks.0.attn.qkv.weight"])
    assert torch.equal(renamed["classifier.bias"], state["head.bias"])


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtimes_are_ours(name):
    ours = make(**{**ODD, "depth": 1}).eval()
    network = build(name, ours)
    assert network.module is None
    images = pixels(ours)
    for scale in (1, 2):  # what was exported holds for other values
        with torch.no_grad():
            assert_equal(network.call(images * scale), ours(images * scale))
    with pytest.raises(Unfit, match="forward pass only"):
        network.call(images.requires_grad_())


def test_a_runtime_exports_once_a_batch():
    exported = []

    def export(images: Tensor) -> Any:
        exported.append(len(images))
        return lambda again: again.sum() + len(images)

    call = networks._by_batch(export)
    for size in (1, 4, 1, 4):
        assert call(torch.ones(size, 3)) == 4 * size
    assert exported == [1, 4]


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(
    ("precision", "device"), [(BFLOAT16, CPU), (AUTOCAST, CPU), (FLOAT32, CUDA)]
)
def test_runtimes_are_for_the_cpu_in_float32(name, precision, device):
    if RIVALS[name].absent():
        pytest.skip(RIVALS[name].absent())
    with pytest.raises(Unfit, match="on the CPU in float32 only"):
        RIVALS[name].build(make(**TOY), precision, device)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """torch.compile without its code generator; the options that it was called with."""
    calls: list[dict[str, Any]] = []
    real = torch.compile

    def compile(module, *, mode, **options):
        calls.append({"mode": mode, **options})
        return real(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile)
    networks.forget()
    yield calls
    networks.forget()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("timm compile max-autotune", "max-autotune"),
        ("vitkern compile", "default"),
    ],
)
def test_compiled_networks_are_ours(name, mode, compiled):
    ours = make(**{**TOY, "depth": 1}).eval()
    network = build(name, ours)
    assert compiled == [{"mode": mode, "fullgraph": True, "dynamic": False}]
    assert RIVALS[name].compiled
    assert network.module is not ours
    assert_same_function(network, ours)


@torch._dynamo.config.patch(recompile_limit=1)
def test_past_the_limit_dynamo_says_so_and_forgetting_helps(compiled):
    def run(batch: int) -> None:
        ours = make(**{**TOY, "depth": 1}).eval()
        build("timm compile", ours).call(pixels(ours)[:batch])

    run(3)
    assert compiled == [{"mode": "default", "fullgraph": True, "dynamic": False}]
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # it doesn't go on eagerly
        run(2)
    networks.forget()
    run(2)


PACKAGES = sorted({d for rival in RIVALS.values() for d, _ in rival.requires})


@pytest.mark.parametrize("hidden", PACKAGES)
def test_a_network_whose_package_is_missing_is_absent(hidden, monkeypatch):
    found = _packages.versions
    monkeypatch.setattr(
        _packages,
        "versions",
        lambda names: {n: None if n == hidden else found([n])[n] for n in names},
    )
    for name, rival in RIVALS.items():
        if hidden not in [distribution for distribution, _ in rival.requires]:
            continue
        assert networks.absent()[name].endswith("is not installed")
        with pytest.raises(Absent, match="is not installed"):
            rival.build(make(**TOY), FLOAT32, CPU)
    assert "eager" not in networks.absent()
    assert_same_function(RIVALS["eager"].build(make(**TOY), FLOAT32, CPU), make(**TOY))


def test_a_package_whose_module_is_gone_is_absent_and_says_which(monkeypatch):
    monkeypatch.setattr(_packages, "versions", lambda names: dict.fromkeys(names, "9.9"))
    monkeypatch.setitem(sys.modules, "vit_pytorch", None)
    assert networks.absent()["vit-pytorch"] == "vit-pytorch 9.9 has no vit_pytorch.vit"


def test_a_package_that_does_not_load_is_absent_and_says_why(tmp_path, monkeypatch):
    folder = install(tmp_path, "broken_vit", "1.2", {"broken_vit": "raise OSError('no libcuda')"})
    monkeypatch.syspath_prepend(folder)
    assert _packages.problem("broken_vit", "broken_vit") is None
    with pytest.raises(Absent, match=r"broken_vit 1\.2 doesn't load: broken_vit: no libcuda"):
        _packages.load("broken_vit", "broken_vit")


def test_asking_what_is_there_imports_nothing():
    heavy = ["timm", "torchvision", "transformers", "vit_pytorch", "onnxruntime", "openvino"]
    heavy += ["liger_kernel", "flash_attn", "xformers", "apex", "transformer_engine", "quack"]
    code = (
        "import sys\n"
        "from benchmarks.peers import networks, ops\n"
        "assert isinstance(networks.absent() | ops.absent(), dict)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def install(folder: Path, distribution: str, version: str, modules: dict[str, str]) -> Path:
    """A distribution in `folder`, with modules by their dotted names."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )
    for name, source in modules.items():
        path = folder.joinpath(*name.split("."))
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text(source)
    return folder


BOOBY_TRAP = "raise AssertionError('imported')"


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing that ops.py remembers of packages outlives the test."""
    ops._get.cache_clear()
    ops._engine_module.cache_clear()
    yield
    ops._get.cache_clear()
    ops._engine_module.cache_clear()


def test_apex_of_pypi_is_not_nvidias(tmp_path, monkeypatch, fresh):
    monkeypatch.syspath_prepend(install(tmp_path, "apex", "0.9.10", {"apex": BOOBY_TRAP}))
    reason = "apex 0.9.10 has no apex.normalization.fused_layer_norm"
    assert ops.absent()["apex"] == reason
    with pytest.raises(Absent, match=reason):
        ops.OPS["layer_norm"]["apex"].call(x=torch.ones(2, 8))


def test_nvidias_apex_is_found_by_its_modules_and_extensions(tmp_path, monkeypatch, fresh):
    modules = {
        "apex": BOOBY_TRAP,
        "apex.normalization": BOOBY_TRAP,
        "apex.normalization.fused_layer_norm": BOOBY_TRAP,
    }
    monkeypatch.syspath_prepend(install(tmp_path, "apex", "0.1", modules))
    assert ops.OPS["layer_norm"]["apex"].absent() == "apex 0.1 has no fused_layer_norm_cuda"
    (tmp_path / "fused_layer_norm_cuda.py").write_text(BOOBY_TRAP)
    importlib.invalidate_caches()
    assert ops.OPS["layer_norm"]["apex"].absent() is None
    assert ops.OPS["linear_act"]["apex"].absent() == "apex 0.1 has no apex.fused_dense.fused_dense"
    assert "apex" not in ops.absent()  # one of its ops is there
    assert "apex" not in sys.modules


def test_flash_attn_4_is_not_flash_attn_2(tmp_path, monkeypatch, fresh):
    monkeypatch.syspath_prepend(
        install(tmp_path, "flash-attn-4", "4.0.0", {"flash_attn.cute": BOOBY_TRAP})
    )
    if _packages.version("flash-attn") is None:
        assert networks.absent()["flash-attn ViT"] == "flash-attn is not installed"
        assert ops.absent()["flash-attn"] == "flash-attn is not installed"


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in ops.OPS for name in ops.OPS[op]])
def test_a_peer_takes_what_the_public_function_takes(op, name):
    assert REGISTRY[op].backward_of is None
    theirs = inspect.signature(ops.OPS[op][name].call)
    ours = inspect.signature(getattr(kernels, op))
    wanted = [p for p in ours.parameters.values() if p.name != "impl"]
    assert [(p.name, p.default) for p in theirs.parameters.values()] == [
        (p.name, p.default) for p in wanted
    ]
    assert theirs.return_annotation == ours.return_annotation


class Standing:
    """Modules in the place of packages that aren't here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(_packages, "versions", lambda names: dict.fromkeys(names, "0.0"))
        monkeypatch.setattr(_packages, "problem", lambda *_: None)

    def __call__(self, module: str, **contents: Any) -> None:
        made = types.ModuleType(module)
        vars(made).update(contents)
        self.monkeypatch.setitem(sys.modules, module, made)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, fresh: None) -> Standing:
    return Standing(monkeypatch)


def compare(op: str, peer: str, grads: bool = True, **call: Any) -> None:
    """Results and gradients of a peer against those of the definition."""
    found = []
    for function in (ops.OPS[op][peer].call, partial(getattr(kernels, op), impl="reference")):
        arguments = require_grads(call) if grads else call
        outputs = as_tuple(function(**arguments))
        generator = torch.Generator().manual_seed(0)
        wanted = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
        directions = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
        made = torch.autograd.grad(outputs, wanted, directions) if grads else ()
        found.append((*outputs, *made))
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        assert_equal(
            actual.double(), expected.double(), 1e-2 if actual.dtype.itemsize < 4 else 1e-5
        )


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def unfit(op: str, peer: str, text: str, **call: Any) -> None:
    with pytest.raises(Unfit, match=text):
        ops.OPS[op][peer].call(**call)


def test_xformers_attention(stand_in):
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert attn_bias is None
        if query.shape[-1] % 8:
            raise NotImplementedError("No operator found for\n a page of reasons")
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, scale=scale).transpose(1, 2)

    stand_in("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    compare("attention", "xformers", qkv=draw(2, 5, 3, 2, 8))
    compare("attention", "xformers", qkv=draw(2, 5, 3, 2, 8), scale=0.2)
    compare("attention_pool", "xformers", q=draw(2, 1, 2, 8), kv=draw(2, 5, 2, 2, 8), scale=0.2)
    refuse = partial(unfit, "attention", "xformers")
    refuse("xformers: No operator found for$", qkv=draw(2, 5, 3, 2, 12))
    refuse("empty", qkv=draw(0, 5, 3, 2, 8))
    refuse("no key_mask", qkv=draw(2, 5, 3, 2, 8), key_mask=torch.ones(2, 5).bool())
    refuse("no cu_seqlens", qkv=draw(5, 3, 2, 8), cu_seqlens=torch.tensor([0, 5]))
    rope = kernels.Rope(draw(5, 4), draw(5, 4), False)
    refuse("no rope", qkv=draw(2, 5, 3, 2, 8), rope=rope)


def test_apex(stand_in):
    class FusedDenseFunc(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input, weight, bias):
            assert input.dim() == 2
            ctx.save_for_backward(input, weight)
            return input @ weight.T + bias

        @staticmethod
        def backward(ctx, grad):
            input, weight = ctx.saved_tensors
            return grad @ weight, grad.T @ input, grad.sum(0)

    stand_in(
        "apex.normalization.fused_layer_norm",
        fused_layer_norm=lambda x, shape, eps: F.layer_norm(x, shape, None, None, eps),
        fused_layer_norm_affine=lambda x, w, b, shape, eps: F.layer_norm(x, shape, w, b, eps),
        fused_rms_norm=lambda x, shape, eps: F.rms_norm(x, shape, None, eps),
        fused_rms_norm_affine=lambda x, w, shape, eps: F.rms_norm(x, shape, w, eps),
    )
    stand_in("apex.fused_dense.fused_dense", FusedDenseFunc=FusedDenseFunc)
    x, w, b = draw(2, 5, 12), draw(12), draw(12)
    for rms in (False, True):
        compare("layer_norm", "apex", x=x, eps=0.1, rms=rms)
        compare("layer_norm", "apex", x=x, weight=w, bias=None if rms else b, eps=0.1, rms=rms)
        norm = {"norm_weight": w, "norm_bias": None if rms else b, "eps": 0.1, "rms": rms}
        linear = {"x": x, "weight": draw(16, 12), "bias": draw(16)}
        compare("norm_linear", "apex", **linear, **norm)
        compare("norm_linear", "apex", **linear, **norm, activation="silu", gated=True)
        compare("linear_act", "apex", **linear, activation="gelu", gated=rms)
    unfit("layer_norm", "apex", "can't do without bias", x=x, weight=w)
    unfit("layer_norm", "apex", "no bias here", x=x, weight=w, bias=b, rms=True)
    unfit("layer_norm", "apex", "not float32 and bfloat16", x=x, weight=w.bfloat16(), bias=b)
    unfit("layer_norm", "apex", "returns float32", x=x, out_dtype=torch.bfloat16)
    unfit("linear_act", "apex", "can't do without bias", x=x, weight=draw(16, 12))


def test_transformer_engine(stand_in):
    built = []

    class Norm(nn.Module):
        def __init__(self, rms, width, *, eps, device, dtype):
            super().__init__()
            built.append((rms, width, eps))
            self.rms, self.eps = rms, eps
            self.weight = nn.Parameter(torch.full((width,), torch.nan, dtype=dtype))
            if not rms:
                self.bias = nn.Parameter(torch.full((width,), torch.nan, dtype=dtype))

        def forward(self, x):
            if self.rms:
                return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    class LayerNormLinear(nn.Module):
        def __init__(self, width, features, eps, bias, normalization, params_dtype, device):
            super().__init__()
            rms = normalization == "RMSNorm"
            assert rms or normalization == "LayerNorm"
            built.append((rms, width, features, eps, bias))
            self.rms, self.eps = rms, eps
            self.layer_norm_weight = nn.Parameter(torch.full((width,), torch.nan))
            self.register_parameter(
                "layer_norm_bias", None if rms else nn.Parameter(torch.full((width,), torch.nan))
            )
            self.weight = nn.Parameter(torch.full((features, width), torch.nan))
            self.register_parameter(
                "bias", nn.Parameter(torch.full((features,), torch.nan)) if bias else None
            )

        def forward(self, x):
            norm = (self.layer_norm_weight, self.layer_norm_bias)
            if self.rms:
                x = F.rms_norm(x, x.shape[-1:], norm[0], self.eps)
            else:
                x = F.layer_norm(x, x.shape[-1:], *norm, self.eps)
            return F.linear(x, self.weight, self.bias)

    stand_in(
        "transformer_engine.pytorch",
        LayerNorm=partial(Norm, False),
        RMSNorm=partial(Norm, True),
        LayerNormLinear=LayerNormLinear,
    )
    name = "transformer engine"
    x, w, b = draw(2, 5, 12), draw(12), draw(12)
    for _ in range(2):
        compare("layer_norm", name, x=x, weight=w, bias=b, eps=0.1)
        compare("layer_norm", name, x=x, weight=w, eps=0.1, rms=True)
        linear = {"x": x, "weight": draw(16, 12), "norm_weight": w, "eps": 0.1}
        compare("norm_linear", name, **linear, norm_bias=b, bias=draw(16))
        compare("norm_linear", name, **linear, rms=True)
    assert built == [  # once each
        (False, 12, 0.1), (True, 12, 0.1), (False, 12, 16, 0.1, True), (True, 12, 16, 0.1, False)
    ]  # fmt: skip
    refuse = partial(unfit, "norm_linear", name)
    refuse("no activation='gelu'", **linear, activation="gelu")
    refuse("can't do without norm_bias", **linear)
    refuse("can't do without norm_weight", x=x, weight=draw(16, 12))
    refuse("not bfloat16 and float32", **{**linear, "x": x.bfloat16()}, norm_bias=b)
    unfit("layer_norm", name, "can't do without weight", x=x)


def test_flash_attns_norm(stand_in):
    def layer_norm_fn(
        x, weight, bias, residual=None, eps=1e-6, rowscale=None, prenorm=False,
        is_rms_norm=False, out_dtype=None,
    ):  # fmt: skip
        stream = x.float()
        if rowscale is not None:
            assert rowscale.shape == x.shape[:-1]
            stream = stream * rowscale[..., None]
        if residual is not None:
            stream = stream + residual.float()
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        if is_rms_norm:
            y = F.rms_norm(stream, x.shape[-1:], weight, eps)
        else:
            y = F.layer_norm(stream, x.shape[-1:], weight, bias, eps)
        y = y.to(out_dtype or x.dtype)
        return (y, stream.to((x if residual is None else residual).dtype)) if prenorm else y

    stand_in("flash_attn.ops.triton.layer_norm", layer_norm_fn=layer_norm_fn)
    x, w, b = draw(2, 5, 12), draw(12), draw(12)
    compare("layer_norm", "flash-attn", x=x, weight=w, bias=b, eps=0.1)
    compare("layer_norm", "flash-attn", x=x, weight=w, rms=True, eps=0.1, out_dtype=torch.bfloat16)
    both = {"residual": draw(2, 5, 12), "weight": w, "bias": b, "eps": 0.1}
    compare("add_layer_norm", "flash-attn", **both, branch=x)
    drop = {"drop_scale": torch.tensor([0.0, 2.0])}
    compare("add_layer_norm", "flash-attn", **both, branch=x.bfloat16(), **drop)
    compare("add_layer_norm", "flash-attn", **{**both, "bias": None}, branch=x, rms=True)
    refuse = partial(unfit, "add_layer_norm", "flash-attn", **both, branch=x)
    refuse("no layer_scale", layer_scale=w)
    unfit("layer_norm", "flash-attn", "can't do without weight", x=x)


def test_quack(stand_in):
    activations = {
        "gelu_erf": F.gelu,
        "gelu_tanh_approx": partial(F.gelu, approximate="tanh"),
        "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
        "relu": F.relu,
        "silu": F.silu,
    }
    gates = {"swiglu": "silu", "geglu": "gelu_tanh_approx", "reglu": "relu"}

    def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, eps=1e-6, prenorm=False):
        stream = x.float() if residual is None else x.float() + residual.float()
        scale = None if weight is None else weight.float()
        y = F.rms_norm(stream, x.shape[-1:], scale, eps)
        y = (y if bias is None else y + bias).to(out_dtype or x.dtype)
        return (y, stream.to(residual.dtype)) if prenorm else y

    def layernorm_fwd(x, weight, bias=None, eps=1e-6):
        assert x.dim() == 2
        assert weight.dtype == torch.float32
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)

    def gemm_act(A, B, bias=None, activation=None, store_preact=True, concat_layout=None):
        assert A.dim() == B.dim() == 2
        assert not store_preact
        z = A @ B if bias is None else A @ B + bias
        if activation not in gates:
            assert concat_layout is None
            return None, activations[activation](z)
        # "B" and "bias" hold [gate; value]; without it they would alternate.
        assert concat_layout == (("B",) if bias is None else ("B", "bias"))
        gate, value = z.chunk(2, -1)
        return None, activations[gates[activation]](gate) * value

    def gemm_add(A, B, C, bias=None, out_dtype=None):
        assert A.dim() == B.dim() == C.dim() == 2
        z = A.float() @ B.float() + C.float()
        return (z if bias is None else z + bias.float()).to(out_dtype)

    stand_in("quack.rmsnorm", rmsnorm=rmsnorm, layernorm_fwd=layernorm_fwd)
    stand_in("quack.linear", linear_func=F.linear)
    stand_in("quack.gemm_interface", gemm_act=gemm_act, gemm_add=gemm_add)
    x, w, b = draw(2, 5, 16), draw(16), draw(16)
    compare("layer_norm", "quack", x=x, weight=w, eps=0.1, rms=True)
    compare("layer_norm", "quack", grads=False, x=x, weight=w, bias=b, eps=0.1)
    half = torch.bfloat16
    low = {"x": x.to(half), "weight": draw(32, 16, dtype=half), "bias": draw(32, dtype=half)}
    for activation, gated in ops._QUACK_ACTIVATIONS:
        for bias in (low["bias"], None):
            call = {**low, "bias": bias, "activation": activation, "gated": gated}
            compare("linear_act", "quack", grads=False, **call)
    norm = {"norm_weight": w.to(half), "eps": 0.1}
    compare("norm_linear", "quack", **low, **norm, rms=True)
    compare("norm_linear", "quack", grads=False, **low, **norm, activation="gelu")
    stream = {"residual": draw(2, 5, 32), "x": low["x"], "weight": low["weight"]}
    stream["residual"] = stream["residual"].to(half)
    compare("linear_residual", "quack", grads=False, **stream, bias=low["bias"])
    both = {"residual": draw(2, 5, 16), "branch": x, "weight": w, "eps": 0.1}
    compare("add_layer_norm", "quack", **both, rms=True)

    refuse = partial(unfit, "linear_act", "quack")
    refuse("no activation='gelu' with gated=True", **low, gated=True)
    refuse("no gradient", **require_grads(low))
    refuse("not in float32", x=x, weight=draw(32, 16))
    refuse("F=12", x=low["x"], weight=draw(12, 16, dtype=half))
    unfit("layer_norm", "quack", "no gradient", **require_grads({"x": x, "weight": w}))
    unfit("add_layer_norm", "quack", "no LayerNorm", **both)
    unfit("linear_residual", "quack", "no layer_scale", **stream, bias=None, layer_scale=draw(32))


def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


def _rsqrt(x):
    return 1 / tl.sqrt(x)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    """Liger's kernels in Triton's interpreter, which has no libdevice and takes floats as they are,
    where a compiler makes tensors of them.
    """
    if ops.OPS["layer_norm"]["liger"].absent() or not INTERPRET:
        pytest.skip("liger-kernel is not installed, or nothing is interpreted")
    triton = importlib.import_module("triton")

    class Number(float):
        def to(self, dtype):
            return self

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def number(value):
                return Number(value) if type(value) is float else value

            run = self.kernel[grid]
            return lambda *args, **options: run(
                *map(number, args), **{k: number(v) for k, v in options.items()}
            )

    instead = {"tanh": triton.jit(_tanh), "rsqrt": triton.jit(_rsqrt)}
    for file in ("layer_norm", "rms_norm", "fused_add_rms_norm", "geglu", "swiglu"):
        module = importlib.import_module(f"liger_kernel.ops.{file}")
        for name, value in list(vars(module).items()):
            if name in instead:
                monkeypatch.setattr(module, name, instead[name])
            elif name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Kernel(value))


def test_liger(liger):
    x, w, b = draw(3, 17, 33), draw(33), draw(33)
    compare("layer_norm", "liger", x=x, weight=w, bias=b, eps=0.1)
    compare("layer_norm", "liger", x=x, weight=w, eps=0.1, rms=True)
    compare("layer_norm", "liger", x=x, eps=0.1, rms=True)
    both = {"residual": draw(3, 17, 33), "branch": x, "weight": w, "eps": 0.1}
    compare("add_layer_norm", "liger", **both, rms=True)
    linear = {"x": x, "weight": draw(24, 33), "bias": draw(24), "gated": True}
    compare("linear_act", "liger", **linear, activation="silu")
    compare("linear_act", "liger", **linear, activation="gelu_tanh")
    unfit("linear_act", "liger", "no gelu with gated=True", **linear, activation="gelu")
    unfit("add_layer_norm", "liger", "no LayerNorm", **both)
    unfit("add_layer_norm", "liger", "no layer_scale", **both, rms=True, layer_scale=w)
    unfit("layer_norm", "liger", "can't do without bias", x=x, weight=w)


def test_op_peers_want_gpu_tensors(stand_in, monkeypatch):
    monkeypatch.setattr(ops, "INTERPRET", False)
    x, w = draw(2, 8), draw(8)
    for peer in ops.OPS["layer_norm"]:
        unfit("layer_norm", peer, "needs CUDA tensors, these are on cpu", x=x, weight=w, rms=True)
