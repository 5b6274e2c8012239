"""CLIP's vision towers: OpenAI's and OpenCLIP's names, trunks of timm's, and what is refused."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitkern
from vitkern.checkpoint import load, save, understand
from vitkern.checkpoint._rules import CheckpointError

WIDTH, DEPTH, PATCH, OUT = 128, 2, 8, 24


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Residual(nn.Module):
    """A block with PyTorch's own attention, which splits heads by itself."""

    def __init__(self, heads: int, act: nn.Module, eps: float, scale: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH, eps), nn.LayerNorm(WIDTH, eps)
        self.attn = nn.MultiheadAttention(WIDTH, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(WIDTH, 192), "act": act, "c_proj": nn.Linear(192, WIDTH)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls_1, self.ls_2 = (Scale() if scale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.ls_1(self.attn(y, y, y, need_weights=False)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Tower(nn.Module):
    """The network of Radford et al., 2021, with OpenCLIP's options, under the names of both."""

    def __init__(
        self,
        *,
        heads: int = 2,
        act: nn.Module | None = None,
        eps: float = 1e-5,
        scale: bool = False,
        ln_pre: bool = True,
        average: bool = False,
        norm_last: bool = False,
        size: tuple[int, int] = (3, 3),
    ) -> None:
        super().__init__()
        self.average, self.norm_last = average, norm_last
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(WIDTH))
        self.positional_embedding = nn.Parameter(torch.empty(1 + size[0] * size[1], WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH, eps) if ln_pre else nn.Identity()
        self.transformer = nn.Module()
        blocks = (Residual(heads, act or nn.GELU(), eps, scale) for _ in range(DEPTH))
        self.transformer.resblocks = nn.Sequential(*blocks)
        self.ln_post = nn.LayerNorm(WIDTH, eps)
        self.proj = nn.Parameter(torch.empty(WIDTH, OUT))
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, WIDTH), x], 1)
        x = self.transformer.resblocks(self.ln_pre(x + self.positional_embedding))
        x = x if self.norm_last else self.ln_post(x)
        x = x[:, 1:].mean(1) if self.average else x[:, 0]
        return (self.ln_post(x) if self.norm_last else x) @ self.proj


class Clip(nn.Module):
    """What stands around a tower; the text model's names are much like the tower's."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(Residual(2, nn.GELU(), 1e-5, False))
        self.token_embedding = nn.Embedding(7, WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(5, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(WIDTH, OUT))
        self.logit_scale = nn.Parameter(torch.zeros(()))


def random_images(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, rows * PATCH, columns * PATCH, generator=generator)


IMAGES = random_images(3, 3)


def assert_same(ours: vitkern.ViT, theirs: Any, images: Tensor = IMAGES) -> None:
    """Outputs, and gradients of the images."""
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    outputs = [m.eval()(x) for m, x in zip((ours, theirs), inputs, strict=True)]
    for pair in (outputs, torch.autograd.grad([o.square().sum() for o in outputs], inputs)):
        error = (pair[0] - pair[1]).abs().max() / pair[1].abs().max()
        assert error < 2e-6, f"relative error {error:.1e}"


def assert_written_again(ours: vitkern.ViT, theirs: dict[str, Tensor], path: Path) -> None:
    """Under the same names, with every bit."""
    again = torch.load(save(ours, path, format="clip"), weights_only=True)
    assert set(again) == set(theirs)
    for key, value in theirs.items():
        assert torch.equal(again[key], value), key


TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # what the tower is, what OpenCLIP's config says of it, what the model says beside
    "plain": ({}, {}, {}),
    "eps": ({"eps": 1e-3}, {"norm_kwargs": {"eps": 1e-3}}, {}),
    "QuickGELU": ({"act": QuickGELU()}, {}, {"quick_gelu": True}),
    "tanh": ({"act": nn.GELU("tanh")}, {"act_kwargs": {"approximate": "tanh"}}, {}),
    "narrow heads": ({"heads": 8}, {"head_width": 16}, {}),
    "LayerScale": ({"scale": True}, {"ls_init_value": 1e-4}, {}),
    "average": ({"average": True}, {"pool_type": "avg"}, {}),
    "average, then norm": (
        {"average": True, "norm_last": True, "ln_pre": False},
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {},
    ),
    "no first norm": ({"ln_pre": False}, {"no_ln_pre": True}, {}),
    "no square": ({"size": (2, 4)}, {"image_size": [2 * PATCH, 4 * PATCH]}, {}),
}


@pytest.mark.parametrize("name", TOWERS)
def test_openclip_folder(name: str, tmp_path: Path) -> None:
    """A folder of the hub: all that its config says, and back."""
    arguments, vision, model = TOWERS[name]
    tower = Tower(**arguments)
    state = Clip(tower).state_dict()
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    images = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"model_cfg": {"vision_cfg": vision, **model}, "preprocess_cfg": images}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    ours = load(tmp_path)
    assert_same(ours, tower, random_images(*arguments.get("size", (3, 3))))
    assert (ours.config.mean, ours.config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert "act_layer" not in understand(tmp_path).assumed
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    assert_written_again(ours, visual, tmp_path / "again.pt")
    # and a folder of ours, whose config tells everything again
    again = load(save(ours, tmp_path / "ours", format="clip"))
    expected = {key: v for key, v in vars(ours.config).items() if key != "init_values"}
    assert {key: v for key, v in vars(again.config).items() if key != "init_values"} == expected
    assert bool(again.config.init_values) == bool(ours.config.init_values)


def test_openai_archive() -> None:
    """State dict of OpenAI's TorchScript: half precision, and three numbers that give it away."""
    tower = Tower(act=QuickGELU()).half()
    state = Clip(tower).half().state_dict()
    numbers = ("input_resolution", "context_length", "vocab_size")
    state.update({name: torch.tensor(24) for name in numbers})
    found = understand(state)
    assert found.fields["act_layer"] == "quick_gelu"
    assert set(numbers) < set(found.dropped)
    assert {"transformer.resblocks.0.ln_1.weight", "logit_scale"} < set(found.dropped)
    assert_same(load(state), tower.float())


def test_activation_is_assumed_where_nothing_tells_it() -> None:
    tower = Tower(act=QuickGELU())
    found = understand(tower.state_dict())
    assert found.fields["act_layer"] == "gelu"
    assert "act_layer" in found.assumed
    assert_same(load(tower.state_dict(), act_layer="quick_gelu"), tower)
    named = {"arch": "ViT-B-32-quickgelu", "state_dict": Clip(tower).state_dict()}
    assert_same(load(named), tower)


@pytest.mark.parametrize("prefix", ["", "visual.", "module.visual."])
def test_a_tower_alone_or_within(prefix: str) -> None:
    """The tower's own state dict, within a CLIP, and within one that was trained in parallel."""
    tower = Tower()
    found = understand({prefix + key: value for key, value in tower.state_dict().items()})
    assert found.format.name == "clip"
    assert not found.dropped
    assert_same(load(found.source), tower)


@pytest.mark.parametrize("width", [1280, 1408, 1664])
def test_heads_of_openclips_larger_towers(width: int) -> None:
    """H, g and bigG have 16 heads each, of which only their width tells."""
    with torch.device("meta"):
        state = {
            key: value.new_empty([width if n == WIDTH else n for n in value.shape])
            for key, value in Tower().state_dict().items()
        }
        state["transformer.resblocks.0.attn.in_proj_weight"] = torch.empty(3 * width, width)
        for i in range(DEPTH):
            block = f"transformer.resblocks.{i}.attn."
            state[block + "in_proj_weight"] = torch.empty(3 * width, width)
            state[block + "in_proj_bias"] = torch.empty(3 * width)
    assert understand(state).fields["num_heads"] == 16


def test_images_of_another_size() -> None:
    """Positions are resized as OpenCLIP and timm do it."""
    tower = Tower()
    ours = load(tower.state_dict(), img_size=5 * PATCH)
    kept, grid = tower.positional_embedding[:1], tower.positional_embedding[1:]
    resized = nn.functional.interpolate(
        grid.T.reshape(1, WIDTH, 3, 3), size=(5, 5), mode="bicubic", antialias=True
    )
    tower.positional_embedding = nn.Parameter(torch.cat([kept, resized.flatten(2)[0].T]))
    assert_same(ours, tower, random_images(5, 5))


def test_timm_reads_what_is_written(tmp_path: Path) -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    tower = Tower(act=QuickGELU())
    ours = load(tower.state_dict(), act_layer="quick_gelu")
    written = torch.load(save(ours, tmp_path / "clip.pt", format="clip"), weights_only=True)
    theirs = timm_vit.VisionTransformer(
        img_size=3 * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=2,
        mlp_ratio=1.5, num_classes=OUT, pre_norm=True, act_layer="quick_gelu",
        norm_layer=lambda width, **kwargs: nn.LayerNorm(width, eps=1e-5),
    )  # fmt: skip
    theirs.load_state_dict(timm_vit.checkpoint_filter_fn(written, theirs))
    assert_same(ours, theirs)


# OpenCLIP itself, where it is installed


def test_openclips_own_tower(tmp_path: Path) -> None:
    transformer = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    tower = transformer.VisionTransformer(
        image_size=3 * PATCH, patch_size=PATCH, width=WIDTH, layers=DEPTH, heads=2, mlp_ratio=1.5,
        output_dim=OUT, ls_init_value=0.3, act_layer=QuickGELU,
    )  # fmt: skip
    ours = load(tower.state_dict(), act_layer="quick_gelu")
    assert_same(ours, tower)
    path = save(ours, tmp_path / "again.pt", format="clip")
    written = torch.load(path, weights_only=True)
    tower.load_state_dict({key.removeprefix("visual."): v for key, v in written.items()})


def test_openclips_own_siglip() -> None:
    open_clip = pytest.importorskip("open_clip.timm_model")
    torch.manual_seed(0)
    name = "vit_base_patch32_siglip_256"
    tower = open_clip.TimmModel(name, 768, image_size=256, pool="map", proj="none")
    state = {"visual." + key: value for key, value in tower.state_dict().items()}
    vision = {"timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    ours = load({"model_cfg": {"vision_cfg": vision}, "state_dict": state})
    images = torch.randn(1, 3, 256, 256)
    assert_same(ours, tower, images)


# Trunks of timm's


def trunk(**arguments: Any) -> Any:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = timm_vit.VisionTransformer(
        img_size=3 * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=2,
        **{"num_classes": 0, **arguments},
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def within(model: nn.Module, **more: Tensor) -> dict[str, Tensor]:
    state = {"visual.trunk." + key: value for key, value in model.state_dict().items()}
    text = {"text.transformer.resblocks.0.ln_1.weight": torch.ones(3), "logit_bias": torch.ones(())}
    return {**state, **text, **{key.replace("__", "."): value for key, value in more.items()}}


def test_trunk_with_a_projection() -> None:
    """A linear layer behind the trunk is the head."""
    model, projection = trunk(), torch.randn(OUT, WIDTH)
    state = within(model, visual__head__proj__weight=projection)
    found = understand(state)
    assert found.format.name == "clip-trunk"
    assert set(found.dropped) == {"text.transformer.resblocks.0.ln_1.weight", "logit_bias"}
    head = nn.Linear(WIDTH, OUT, bias=False)
    head.weight.data = projection
    assert_same(load(state, num_heads=2), nn.Sequential(model, head))


def test_trunk_of_siglip() -> None:
    model = trunk(class_token=False, global_pool="map", act_layer="gelu_tanh")
    assert_same(load(within(model), num_heads=2, act_layer="gelu_tanh"), model)


# What doesn't fit

REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "ResNet": (
        {
            "visual.conv1.weight": torch.ones(8, 3, 3, 3),
            "visual.layer1.0.conv1.weight": torch.ones(8, 8, 1, 1),
            "visual.attnpool.c_proj.weight": torch.ones(8, 8),
        },
        "ResNet",
    ),
    "CoCa": (
        {**Clip(Tower()).state_dict(), "visual.attn_pool.query": torch.ones(4, WIDTH)},
        "CoCa",
    ),
    "custom blocks": (
        {
            **Clip(Tower()).state_dict(),
            "visual.transformer.resblocks.0.attn.logit_scale": torch.ones(2, 1, 1),
        },
        "custom attention",
    ),
    "EVA": ({"visual.blocks.0.attn.q_proj.weight": torch.ones(4, 4)}, "EVA-CLIP"),
    "ConvNeXt": (
        {"visual.trunk.stages.0.blocks.0.norm.weight": torch.ones(4)},
        "no Vision Transformer",
    ),
    "a block is missing": (
        {k: v for k, v in Tower().state_dict().items() if "resblocks.0." not in k},
        "blocks",
    ),
    "something more": ({**Tower().state_dict(), "extra.weight": torch.ones(2)}, "extra.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    state, text = REFUSED[name]
    with pytest.raises(CheckpointError, match=text):
        load(state)


def test_trunk_with_an_mlp_behind_it() -> None:
    state = within(trunk(), visual__head__mlp__fc1__weight=torch.ones(OUT, WIDTH))
    with pytest.raises(CheckpointError, match="no linear layer"):
        load(state)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_read_and_not_run(tmp_path: Path) -> None:
    """OpenAI publishes code and weights in one file, of which nothing is executed."""
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(CheckpointError, match=r"no ViT that vitkern knows: .*\b(weight|bias)\b"):
        load(tmp_path / "ViT-B-32.pt")


UNFIT: dict[str, dict[str, Any]] = {
    "global_pool": {"global_pool": "map"},
    "reg_tokens": {"reg_tokens": 1},
    "no_embed_class": {"no_embed_class": True},
    "num_classes": {"num_classes": 0},
    "act_layer": {"act_layer": "relu"},
    "norm_layer": {"norm_layer": "rmsnorm"},
    "mlp_layer": {"mlp_layer": "swiglu"},
}


@pytest.mark.parametrize("name", UNFIT)
def test_not_written(name: str, tmp_path: Path) -> None:
    """A network that CLIP hasn't: the error names the argument."""
    base = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = vitkern.ViT(**{**base, "pre_norm": True, **UNFIT[name]})
    with pytest.raises(ValueError, match=name):
        save(model, tmp_path / "model.pt", format="clip")


def test_a_head_with_a_bias_is_not_written(tmp_path: Path) -> None:
    model = load(Tower().state_dict())
    nn.init.ones_(model.head.bias)
    with pytest.raises(ValueError, match=r"head\.bias"):
        save(model, tmp_path / "model.pt", format="clip")
