"""Google's .npz: every era of names, against JAX's formulas and against timm's own reader."""

from math import cos, sin
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitkern
from vitkern.checkpoint import load, save, understand
from vitkern.checkpoint._rules import CheckpointError

DIM, HEADS, DEPTH, PATCH, CLASSES = 32, 4, 2, 8, 5
Tree = dict[str, np.ndarray]


def tree(
    kind: str = "classic",
    *,
    pool: str = "token",
    side: int = 3,
    width: int = DIM // HEADS,
    representation: int = 0,
    classes: int = CLASSES,
) -> Tree:
    """Parameters as JAX has them; `kind` is the way in which they are named."""
    random = np.random.default_rng(0)
    classic = kind == "classic"
    found: Tree = {}

    def put(name: str, *shape: int) -> None:
        found[name] = random.normal(scale=0.3, size=shape).astype(np.float32)

    def layer(name: str, *shape: int) -> None:
        put(f"{name}/kernel", *shape)
        put(f"{name}/bias", shape[-1])

    def norm(name: str) -> None:
        put(f"{name}/scale", DIM)
        put(f"{name}/bias", DIM)

    def attention(name: str) -> None:
        for part in ("query", "key", "value"):
            put(f"{name}/{part}/kernel", DIM, HEADS, width)
            put(f"{name}/{part}/bias", HEADS, width)
        layer(f"{name}/out", HEADS, width, DIM)

    layer("embedding", PATCH, PATCH, 3, DIM)
    if pool == "token":
        put("cls", 1, 1, DIM)
    if kind != "sincos":
        positions = "Transformer/posembed_input/pos_embedding" if classic else "pos_embedding"
        put(positions, 1, side * side + (classic and pool == "token"), DIM)
    count = (1, 2, 3) if classic else (0, 1, 0)
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        norm(f"{block}/LayerNorm_0")
        attention(f"{block}/MultiHeadDotProductAttention_{count[0]}")
        norm(f"{block}/LayerNorm_{count[1]}")
        layer(f"{block}/MlpBlock_{count[2]}/Dense_0", DIM, 48)
        layer(f"{block}/MlpBlock_{count[2]}/Dense_1", 48, DIM)
    norm("Transformer/encoder_norm")
    if pool == "map":
        put("MAPHead_0/probe", 1, 1, DIM)
        attention("MAPHead_0/MultiHeadDotProductAttention_0")
        norm("MAPHead_0/LayerNorm_0")
        layer("MAPHead_0/MlpBlock_0/Dense_0", DIM, 48)
        layer("MAPHead_0/MlpBlock_0/Dense_1", 48, DIM)
    if representation:
        layer("pre_logits", DIM, representation)
    if classes:
        layer("head", representation or DIM, classes)
    if kind == "scanned":
        for name in [name for name in found if "encoderblock_0/" in name]:
            parts = [found.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(DEPTH)]
            found[name.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
    return found


def forward(params: Tree, images: Tensor, approximate: str) -> Tensor:
    """What JAX's code computes, in its own shapes and float64: attention over [D, H, d]."""
    p = {name: torch.from_numpy(value).double() for name, value in params.items()}

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), p[f"{name}/scale"], p[f"{name}/bias"], 1e-6)

    def mlp(x: Tensor, name: str) -> Tensor:
        return dense(
            F.gelu(dense(x, f"{name}/Dense_0"), approximate=approximate), f"{name}/Dense_1"
        )

    def attention(x: Tensor, context: Tensor, name: str) -> Tensor:
        q, k, v = (
            torch.einsum("bnd,dhk->bnhk", y, p[f"{name}/{part}/kernel"]) + p[f"{name}/{part}/bias"]
            for y, part in ((x, "query"), (context, "key"), (context, "value"))
        )
        weights = (torch.einsum("bqhk,bthk->bhqt", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        out = torch.einsum("bhqt,bthk->bqhk", weights, v)
        return torch.einsum("bqhk,hkd->bqd", out, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]

    kernel = p["embedding/kernel"]
    patches = images.double().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    x = torch.einsum("bcyxhw,hwcd->byxd", patches, kernel) + p["embedding/bias"]
    rows, columns = x.shape[1:3]
    x = x.flatten(1, 2)
    classic = "Transformer/posembed_input/pos_embedding"
    if "pos_embedding" in p:
        x = x + p["pos_embedding"]
    elif classic not in p:
        x = x + sincos(rows, columns)
    if "cls" in p:
        x = torch.cat([p["cls"].expand(len(x), 1, DIM), x], 1)
    if classic in p:
        x = x + p[classic]
    a, n, m = (1, 2, 3) if any("Attention_1" in name for name in p) else (0, 1, 0)
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        y = norm(x, f"{block}/LayerNorm_0")
        x = x + attention(y, y, f"{block}/MultiHeadDotProductAttention_{a}")
        x = x + mlp(norm(x, f"{block}/LayerNorm_{n}"), f"{block}/MlpBlock_{m}")
    x = norm(x, "Transformer/encoder_norm")
    if "MAPHead_0/probe" in p:
        probe = p["MAPHead_0/probe"].expand(len(x), 1, DIM)
        x = attention(probe, x, "MAPHead_0/MultiHeadDotProductAttention_0")
        x = (x + mlp(norm(x, "MAPHead_0/LayerNorm_0"), "MAPHead_0/MlpBlock_0"))[:, 0]
    else:
        x = x[:, 0] if "cls" in p else x.mean(1)
    if "pre_logits/kernel" in p:
        x = dense(x, "pre_logits").tanh()
    return dense(x, "head") if "head/kernel" in p else x


def sincos(rows: int, columns: int) -> Tensor:
    """big_vision's fixed positions [N, D], one number after the other."""
    rates = [10_000.0 ** (-i / (DIM // 4 - 1)) for i in range(DIM // 4)]
    return torch.tensor(
        [
            [wave(place * rate) for place in (x, y) for wave in (sin, cos) for rate in rates]
            for y in range(rows)
            for x in range(columns)
        ],
        dtype=torch.float64,
    )


def written(params: Tree, folder: Path, prefix: str = "") -> Path:
    path = folder / "model.npz"
    np.savez(path, **{prefix + name: value for name, value in params.items()})
    return path


def assert_same(model: vitkern.ViT, expected: Tensor, images: Tensor) -> None:
    got = model.eval()(images)
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert got.shape == expected.shape
    assert error < 1e-5, f"relative error {error:.1e}"


IMAGES = torch.randn(2, 3, 3 * PATCH, 3 * PATCH, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, dict[str, Any]] = {
    "classic": {"kind": "classic"},
    "classic, narrow heads": {"kind": "classic", "width": 4},
    "classic, representation": {"kind": "classic", "representation": 24},
    "classic, no head": {"kind": "classic", "classes": 0},
    "big_vision, class token": {"kind": "big_vision"},
    "big_vision, mean": {"kind": "big_vision", "pool": "gap"},
    "big_vision, attention pooling": {"kind": "big_vision", "pool": "map", "classes": 0},
    "big_vision, head on attention pooling": {"kind": "big_vision", "pool": "map"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_jax_function(name: str, tmp_path: Path) -> None:
    """The function of JAX's code, with its own activation and with the one of timm."""
    params = tree(**NETWORKS[name])
    path = written(params, tmp_path)
    for act, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        expected = forward(params, IMAGES, approximate)
        assert_same(load(path, act_layer=act), expected, IMAGES)


@pytest.mark.parametrize("name", NETWORKS)
def test_written_again(name: str, tmp_path: Path) -> None:
    """`save` gives the file's own names back, and every bit."""
    params = tree(**NETWORKS[name])
    save(load(written(params, tmp_path)), tmp_path / "again.npz", format="google")
    with np.load(tmp_path / "again.npz") as again:
        assert set(again.files) == set(params)
        for key, value in params.items():
            assert again[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("kind", ["classic", "big_vision", "scanned"])
@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/", "params/img/"])
def test_prefixes(kind: str, prefix: str, tmp_path: Path) -> None:
    """A prefix, and blocks stacked in one, change names alone; what stands beside is dropped."""
    params = tree(kind)
    beside: Tree = {
        "": Tree(),
        "opt/target/": {"opt/state/step": np.zeros(())},
        "params/": {"opt/0/count": np.zeros(()), "extra/measurements": np.zeros(3)},
        "params/img/": {name: np.ones(1) for name in ("params/txt/head/bias", "params/t")},
    }[prefix]
    path = written({**{prefix + key: v for key, v in params.items()}, **beside}, tmp_path)
    found = understand(path)
    expected = forward(tree("classic" if kind == "classic" else "big_vision"), IMAGES, "tanh")
    assert_same(load(path, act_layer="gelu_tanh"), expected, IMAGES)
    assert set(found.dropped) == set(beside)
    tanh = prefix == "params/img/"
    assert found.fields["act_layer"] == ("gelu_tanh" if tanh else "gelu")
    assert "act_layer" in found.assumed


def test_tower_of_a_language_model(tmp_path: Path) -> None:
    """PaliGemma's: all tokens are projected; stored in bfloat16, which NumPy has as two bytes."""
    rounded = {
        key: torch.from_numpy(value).bfloat16()
        for key, value in tree("scanned", pool="gap").items()
    }
    stored = {
        "params/img/" + key: value.view(torch.int16).numpy().view("V2")
        for key, value in rounded.items()
    }
    stored["params/llm/embedder/input_embedding"] = np.zeros((2, 2), np.float32)
    model = load(written(stored, tmp_path)).eval()
    assert (model.config.global_pool, model.config.act_layer) == ("", "gelu_tanh")
    params = {key: value.float().numpy() for key, value in rounded.items()}
    for name in [name for name in params if "encoderblock/" in name]:
        for i, layer in enumerate(params.pop(name)):
            params[name.replace("encoderblock", f"encoderblock_{i}")] = layer
    tokens = model(IMAGES)
    assert tokens.shape == (2, 9, CLASSES)  # the head is linear: their mean is the mean's logits
    expected = forward(params, IMAGES, "tanh")
    torch.testing.assert_close(tokens.mean(1).double(), expected, rtol=1e-5, atol=1e-5)


def test_old_spellings(tmp_path: Path) -> None:
    """Positions in the encoder, and attention pooling spelled out at the root."""
    params = tree("big_vision", pool="map")
    expected = forward(params, IMAGES, "tanh")
    old = {key.replace("MAPHead_0/", ""): value for key, value in params.items()}
    old["Transformer/pos_embedding"] = old.pop("pos_embedding")
    assert_same(load(written(old, tmp_path)), expected, IMAGES)


def test_nested_tree_in_memory() -> None:
    """Flax's own nesting, with arrays of NumPy."""
    params = tree("big_vision", pool="gap")
    nested: dict[str, Any] = {}
    for key, value in params.items():
        *path, last = key.split("/")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    model = load({"params": nested}, act_layer="gelu_tanh")
    assert_same(model, forward(params, IMAGES, "tanh"), IMAGES)


@pytest.mark.parametrize("size", [(3 * PATCH, 3 * PATCH), (2 * PATCH, 5 * PATCH)])
def test_fixed_positions(size: tuple[int, int], tmp_path: Path) -> None:
    """A file without positions: they are computed for the image, not resized."""
    params = tree("sincos", pool="gap")
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    model = load(written(params, tmp_path), img_size=size, act_layer="gelu_tanh")
    assert_same(model, forward(params, images, "tanh"), images)
    assert understand(written(params, tmp_path)).fields["img_size"] == (224, 224)


@pytest.mark.parametrize("kind", ["classic", "big_vision"])
@pytest.mark.parametrize("new", [2, 5, 7])
def test_positions_resized(kind: str, new: int, tmp_path: Path) -> None:
    """As both repositories resize them: scipy's zoom of order 1; a class token's stays."""
    ndimage = pytest.importorskip("scipy.ndimage")
    params = tree(kind, side=4)
    key = "pos_embedding" if kind == "big_vision" else "Transformer/posembed_input/pos_embedding"
    given = params[key][0]
    kept, grid = (given[:1], given[1:]) if kind == "classic" else (given[:0], given)
    zoomed = ndimage.zoom(grid.reshape(4, 4, DIM), (new / 4, new / 4, 1), order=1)
    expected = np.concatenate([kept, zoomed.reshape(new * new, DIM)])
    model = load(written(params, tmp_path), img_size=new * PATCH)
    np.testing.assert_allclose(model.pos_embed[0].detach().numpy(), expected, atol=1e-6)


# timm reads these files, too: the same function from the same file.


def timms(path: Path, **arguments: Any) -> Any:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    model = timm_vit.VisionTransformer(
        img_size=3 * PATCH, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS,
        mlp_ratio=1.5, **{"num_classes": CLASSES, **arguments},
    )  # fmt: skip
    with torch.no_grad():
        model.load_pretrained(str(path))
    return model.eval()


GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
MAP = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh", "num_classes": 0}
TIMM: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "classic": ("classic", "token", "", {}),
    "classic, opt/target": ("classic", "token", "opt/target/", {}),
    "big_vision": ("big_vision", "token", "params/", {"no_embed_class": True}),
    "big_vision, mean": ("big_vision", "gap", "params/", GAP),
    "scanned": ("scanned", "gap", "params/", GAP),
    "SigLIP": ("big_vision", "map", "params/img/", MAP),
}


@pytest.mark.parametrize("name", TIMM)
def test_as_timm_reads_it(name: str, tmp_path: Path) -> None:
    """Logits and gradients; then timm reads what is written here."""
    kind, pool, prefix, arguments = TIMM[name]
    classes = arguments.get("num_classes", CLASSES)
    path = written(tree(kind, pool=pool, classes=classes), tmp_path, prefix)
    theirs, ours = timms(path, **arguments), load(path).eval()
    inputs = [IMAGES.clone().requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((theirs, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)
    gradients = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        expected = parameter.grad
        error = (gradients[key].grad - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max() + 1e-5, key
    save(ours, tmp_path / "ours.npz", format="google")
    again = timms(tmp_path / "ours.npz", **arguments)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224"])
def test_hybrids(name: str, tmp_path: Path) -> None:
    """ResNet stems of the ViT paper, alone and with stages: written here, read by timm and here."""
    timm = pytest.importorskip("timm")
    small: dict[str, Any] = {"embed_dim": DIM, "depth": 1, "num_heads": 2, "num_classes": CLASSES}
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, **small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = load(model.state_dict(), num_heads=2).eval()
    path = save(ours, tmp_path / "hybrid.npz", format="google")
    with np.load(path) as file:
        assert "conv_root/kernel" in file.files
        stages = "block1/unit1/conv_proj/kernel" in file.files
        assert stages == (name == "vit_small_r26_s32_224")
        assert file["conv_root/kernel"].shape == (7, 7, 3, 64)
        # GroupNorm's parameters as the published files have them
        wide = {key: v.reshape(1, 1, 1, -1) for key, v in file.items() if "gn" in key}
        np.savez(tmp_path / "wide.npz", **{**dict(file.items()), **wide})
    again = timm.create_model(name, img_size=64, **small).eval()
    with torch.no_grad():
        again.load_pretrained(str(tmp_path / "wide.npz"))
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        for file_name in ("hybrid.npz", "wide.npz"):
            got = load(tmp_path / file_name).eval()(images)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# What doesn't fit


def without(params: Tree, part: str) -> Tree:
    return {key: value for key, value in params.items() if part not in key}


NAFLEX = {"embedding/kernel": np.zeros((PATCH * PATCH * 3, DIM), np.float32)}
GRID = {"pos_embedding": np.zeros((3, 3, DIM), np.float32)}
SHORT = {
    key: value[:1] if "MlpBlock_0/Dense_1" in key else value
    for key, value in tree("scanned").items()
}
BROKEN: dict[str, tuple[Tree, str]] = {
    "a block is missing": (without(tree(), "encoderblock_0/Layer"), "norm1"),
    "a matrix is missing": (without(tree(), "encoderblock_1/MlpBlock_3/Dense_1/k"), "fc2.weight"),
    "a third of qkv is missing": (without(tree(), "1/key/kernel"), "key/kernel"),
    "a layer is missing in a stack": (SHORT, "fc2"),
    "the patches are missing": (without(tree(), "embedding/kernel"), "no ViT"),
    "NaFlex": ({**tree("big_vision"), **NAFLEX}, "NaFlex"),
    "a grid of positions": ({**tree("big_vision"), **GRID}, "NaFlex"),
    "something more": ({**tree(), "Transformer/extra/kernel": np.zeros(3)}, "extra/kernel"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refused(name: str, tmp_path: Path) -> None:
    params, text = BROKEN[name]
    with pytest.raises(CheckpointError, match=text):
        load(written(params, tmp_path))


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "registers": ({"reg_tokens": 2}, "reg_tokens"),
    "eps": ({"norm_layer": ("layernorm", 1e-5)}, "norm_layer"),
    "norm behind the pool": ({"class_token": False, "global_pool": "avg"}, "fc_norm"),
    "mean with a class token": ({"global_pool": "avg", "fc_norm": False}, "global_pool"),
    "no square": ({"img_size": (16, 24)}, "img_size"),
    "activation": ({"act_layer": "quick_gelu"}, "act_layer"),
    "LayerScale": ({"init_values": 1e-5}, "init_values"),
    "stem": ({"embed_layer": ("conv_stem", (2, 2, 2)), "patch_size": 1}, "embed_layer"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_not_written(name: str, tmp_path: Path) -> None:
    """A network that JAX's code hasn't: the error names the argument."""
    arguments, text = UNFIT[name]
    base = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=text):
        save(vitkern.ViT(**{**base, **arguments}), tmp_path / "model.npz", format="google")
