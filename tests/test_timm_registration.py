"""vitkern's models in timm's registry: names, weights, features, and training as timm's script."""

import argparse
import importlib
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitkern
from vitkern.model.presets import PRESETS

timm = pytest.importorskip("timm")
from timm import data, loss, optim, scheduler, utils  # noqa: E402

import vitkern.timm as registered  # noqa: E402

TINY: dict[str, Any] = {"depth": 2, "img_size": 64}  # for timm's "test_vit": width 64, patch 16


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    assert ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def twins(name: str, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """timm's model and ours with its weights, none of them at a special start."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ours = timm.create_model(f"vitkern_{name}", **arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_every_preset_is_listed_with_timms_weights() -> None:
    deprecated = timm.models.get_deprecated_models()
    plain = [name for name in PRESETS if name not in deprecated]
    assert sorted(timm.list_models("vitkern_*")) == sorted(f"vitkern_{name}" for name in plain)
    assert all(timm.is_model(f"vitkern_{name}") for name in PRESETS)
    for name in plain:
        theirs = timm.models.get_arch_pretrained_cfgs(name)
        ours = timm.models.get_arch_pretrained_cfgs(f"vitkern_{name}")
        assert list(ours) == [f"vitkern_{tagged}" for tagged in theirs]  # the default first
        for mine, cfg in zip(ours.values(), theirs.values(), strict=True):
            expected = {**cfg.to_dict(), "architecture": f"vitkern_{name}"}
            assert mine.to_dict() == expected
        default = timm.get_pretrained_cfg(f"vitkern_{name}")
        assert default.tag == timm.get_pretrained_cfg(name).tag


def test_importing_again_changes_nothing_and_warns_of_nothing() -> None:
    before = timm.list_models("vitkern_*", pretrained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(registered)
    assert timm.list_models("vitkern_*", pretrained=True) == before


def test_arguments_of_timm_and_of_vitkern() -> None:
    model = timm.create_model(
        "vitkern_vit_tiny_patch16_224",
        **{**TINY, "num_classes": 5, "in_chans": 1, "global_pool": "avg", "drop_path_rate": 0.1},
        impl="reference",
        residual_dtype=torch.float32,
        device="meta",
    )
    assert isinstance(model, vitkern.ViT)
    config = model.config
    assert (config.num_classes, config.in_chans, config.global_pool) == (5, 1, "avg")
    assert (config.img_size, config.depth, config.embed_dim) == ((64, 64), 2, 192)
    assert (config.drop_path_rate, config.impl) == (0.1, "reference")
    assert config.residual_dtype == torch.float32
    cfg = data.resolve_data_config({}, model=model)
    assert (cfg["mean"], cfg["crop_pct"], cfg["interpolation"]) == ((0.5,) * 3, 0.9, "bicubic")
    with pytest.raises(TypeError, match="unknown argument 'embed_dims'; did you mean 'embed_dim'"):
        timm.create_model("vitkern_vit_tiny_patch16_224", embed_dims=3)


def test_a_tag_brings_its_classes_size_and_normalisation() -> None:
    dino = timm.create_model("vitkern_vit_base_patch16_224.dino", depth=1, device="meta")
    assert dino.num_classes == 0
    assert dino.config.mean == (0.485, 0.456, 0.406)
    grey = timm.create_model(
        "vitkern_vit_base_patch16_224.dino", depth=1, in_chans=1, device="meta"
    )
    assert grey.config.mean == pytest.approx((0.485 + 0.456 + 0.406) / 3)
    with pytest.warns(UserWarning, match="deprecated model name vitkern_vit_tiny_patch16_224_in2"):
        old = timm.create_model("vitkern_vit_tiny_patch16_224_in21k", depth=1, device="meta")
    assert old.num_classes == 21843
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("vitkern_vit_base_patch16_224.dinosaur", device="meta")


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_classes": 7}, {"img_size": 96}, {"in_chans": 1}, {"global_pool": "avg"}],
    ids=str,
)
def test_pretrained_weights_arrive_as_in_timms_model(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    source, _ = twins("test_vit", **TINY)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    arguments = {**TINY, **changes}
    models = []
    for name in ("test_vit", "vitkern_test_vit"):
        torch.manual_seed(3)
        overlay = {"file": str(tmp_path / "weights.pt"), "hf_hub_id": None, "url": ""}
        strict = {"pretrained_strict": False} if "global_pool" in changes else {}
        models.append(
            timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments, **strict
            ).eval()
        )
    theirs, ours = models
    if "num_classes" in changes:  # a new head, which each draws for itself
        assert ours.head.weight.shape[0] == 7
        ours.head.load_state_dict(theirs.head.state_dict())
    size = arguments["img_size"]
    images = torch.randn(2, arguments.get("in_chans", 3), size, size)
    assert torch.equal(ours.patch_embed.proj.weight, theirs.patch_embed.proj.weight)
    assert close(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit3_small_patch16_224", {"img_size": 32}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
        ("flexivit_small", {"img_size": 48}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 42}),
        ("vit_relpos_small_patch16_224", {"img_size": 48}),
    ],
)
def test_each_files_filter_is_timms(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    source, _ = twins(name, depth=1, **arguments)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    overlay = {"file": str(tmp_path / "weights.pt"), "hf_hub_id": None, "url": ""}
    size = 2 * arguments["img_size"]
    if "relpos" in name:
        size = arguments["img_size"]
    theirs, ours = (
        timm.create_model(
            prefix + name,
            depth=1,
            img_size=size,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
        ).eval()
        for prefix in ("", "vitkern_")
    )
    images = torch.randn(2, 3, size, size)
    assert close(ours(images), theirs(images))


def test_googles_npz_is_read_by_timms_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dim, heads, hidden, depth = 64, 2, 192, 2

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    def dense(name: str, *shape: int, bias: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {f"{name}/kernel": draw(*shape), f"{name}/bias": draw(*bias)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}/scale": draw(dim), f"{name}/bias": draw(dim)}

    arrays = {
        "cls": draw(1, 1, dim),
        "Transformer/posembed_input/pos_embedding": draw(1, 17, dim),
        **dense("embedding", 16, 16, 3, dim, bias=(dim,)),
        **norm("Transformer/encoder_norm"),
        **dense("head", dim, 1000, bias=(1000,)),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        head_dim = dim // heads
        for part in ("query", "key", "value"):
            arrays |= dense(f"{attention}/{part}", dim, heads, head_dim, bias=(heads, head_dim))
        arrays |= dense(f"{attention}/out", heads, head_dim, dim, bias=(dim,))
        arrays |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_2")
        arrays |= dense(f"{block}/MlpBlock_3/Dense_0", dim, hidden, bias=(hidden,))
        arrays |= dense(f"{block}/MlpBlock_3/Dense_1", hidden, dim, bias=(dim,))
    path = tmp_path / "vit.npz"
    np.savez(path, **arrays)
    overlay = {"file": str(path), "custom_load": True, "hf_hub_id": None, "url": ""}
    arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, **TINY}
    theirs, ours = (timm.create_model(f"{p}test_vit", **arguments).eval() for p in ("", "vitkern_"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.cls_token, torch.from_numpy(arrays["cls"]))
    assert close(ours(images), theirs(images))
    again = timm.create_model("vitkern_test_vit", checkpoint_path=str(path), **TINY).eval()
    assert torch.equal(again(images), ours(images))


@pytest.mark.parametrize("out_indices", [None, (0, 2), [-1], 2])
def test_features_only(out_indices: Any) -> None:
    arguments = {**TINY, "depth": 4, "features_only": True}
    if out_indices is not None:
        arguments["out_indices"] = out_indices
    theirs = timm.create_model("test_vit", **arguments).eval()
    ours = timm.create_model("vitkern_test_vit", **arguments).eval()
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction()
    ours.load_state_dict(theirs.state_dict())  # what isn't needed was pruned from both
    images = torch.randn(2, 3, 64, 64)
    features, expected = ours(images), theirs(images)
    assert len(features) == len(expected)
    for mine, wanted in zip(features, expected, strict=True):
        assert close(mine, wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of two photographs, one a class: from the left to train on, from the right to test."""
    datasets = pytest.importorskip("sklearn.datasets")
    image_module = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, photo in zip(("temple", "flower"), datasets.load_sample_images().images, strict=True):
        middle = photo.shape[1] // 2
        for split, part, count in (("train", photo[:, :middle], 24), ("val", photo[:, middle:], 8)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                y, x = rng.integers(0, [part.shape[0] - 96, part.shape[1] - 96])
                crop = image_module.fromarray(part[y : y + 96, x : x + 96])
                crop.save(root / split / name / f"{i}.png")
    return root


class Run:
    """What timm's train.py sets up for one model."""

    def __init__(self, folder: Path, name: str) -> None:
        utils.random_seed(0)
        self.model = timm.create_model(
            name, num_classes=2, drop_path_rate=0.1, drop_rate=0.0, **TINY
        )
        config = data.resolve_data_config({"img_size": 64}, model=self.model)
        assert config["input_size"] == (3, 64, 64)
        common = {
            "input_size": config["input_size"],
            "mean": config["mean"],
            "std": config["std"],
            "interpolation": config["interpolation"],
            "batch_size": 16,
            "num_workers": 0,
            "use_prefetcher": False,
        }
        train = data.create_dataset("", root=str(folder), split="train", is_training=True)
        valid = data.create_dataset("", root=str(folder), split="val")
        self.loader = data.create_loader(
            train,
            is_training=True,
            auto_augment="rand-m5-mstd0.5-inc1",
            re_prob=0.25,
            scale=(0.5, 1.0),
            color_jitter=0.3,
            **common,
        )
        self.valid = data.create_loader(valid, is_training=False, crop_pct=0.9, **common)
        self.mixup = data.Mixup(
            mixup_alpha=0.1, cutmix_alpha=0.5, prob=0.5, label_smoothing=0.05, num_classes=2
        )
        self.criterion = loss.SoftTargetCrossEntropy()
        self.optimizer = optim.create_optimizer_v2(
            self.model, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.75
        )
        self.scheduler, self.epochs = scheduler.create_scheduler_v2(
            self.optimizer, sched="cosine", num_epochs=12, warmup_epochs=1, warmup_lr=1e-4
        )
        self.scaler = utils.NativeScaler(device="cpu")
        self.ema = utils.ModelEmaV3(self.model, decay=0.8)

    def epoch(self, number: int) -> float:
        """Mean loss of one pass over the training images."""
        self.model.train()
        meter = utils.AverageMeter()
        for images, target in self.loader:
            images, target = self.mixup(images, target)
            value = self.criterion(self.model(images), target)
            self.optimizer.zero_grad()
            parameters = list(self.model.parameters())
            self.scaler(value, self.optimizer, clip_grad=1.0, parameters=parameters)
            self.ema.update(self.model)
            meter.update(value.item(), len(images))
        self.scheduler.step(number + 1)
        return meter.avg

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Top-1 on the validation images, in percent."""
        model.eval()
        meter = utils.AverageMeter()
        for images, target in self.valid:
            top1, _ = utils.accuracy(model(images), target, topk=(1, 2))
            meter.update(float(top1), len(images))
        return meter.avg


def test_training_as_timms_script_does_it(folder: Path, tmp_path: Path) -> None:
    run = Run(folder, "vitkern_test_vit")
    groups = {group["lr_scale"] for group in run.optimizer.param_groups}
    assert len(groups) == 4  # stem, two blocks, head
    saver = utils.CheckpointSaver(
        model=run.model,
        optimizer=run.optimizer,
        args=argparse.Namespace(model="vitkern_test_vit"),
        model_ema=run.ema,
        amp_scaler=run.scaler,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
        max_history=2,
    )
    losses = []
    for number in range(run.epochs):
        losses.append(run.epoch(number))
        saver.save_checkpoint(number, metric=run.accuracy(run.model))
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3, losses
    assert run.accuracy(run.model) > 65  # of two classes
    assert run.accuracy(run.ema.module) > 65

    # Resumed: model, optimizer and scaler are where they were, so the next step is the same.
    resumed = Run(folder, "vitkern_test_vit")
    start = timm.models.resume_checkpoint(
        resumed.model, str(tmp_path / "last.pth.tar"), resumed.optimizer, resumed.scaler
    )
    assert start == run.epochs
    images = torch.randn(4, 3, 64, 64)
    after = []
    for trained in (run, resumed):
        trained.model.eval()
        trained.optimizer.zero_grad()
        trained.model(images).square().mean().backward()
        for group in trained.optimizer.param_groups:
            group["lr"] = 1e-3 * group["lr_scale"]
        trained.optimizer.step()
        after.append(trained.model(images))
    assert torch.equal(*after)

    # The checkpoint is one of timm's own: its model loads it and gives the same logits.
    checkpoint = str(tmp_path / "last.pth.tar")
    for use_ema in (False, True):
        theirs, ours = (
            timm.create_model(f"{prefix}test_vit", num_classes=2, **TINY).eval()
            for prefix in ("", "vitkern_")
        )
        for model in (theirs, ours):
            timm.models.load_checkpoint(model, checkpoint, use_ema=use_ema)
        assert close(ours(images), theirs(images))


SCRIPT = """
import argparse, sys, timm, torch
parser = argparse.ArgumentParser()
parser.add_argument("--model")
options = parser.parse_args()
import beside
model = timm.create_model(options.model, depth=1, img_size=32, num_classes=3)
print(__name__, type(model).__module__, tuple(model(torch.randn(2, 3, 32, 32)).shape), beside.X)
"""


def test_a_script_runs_unchanged(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("X = 5")
    script = [str(tmp_path / "script.py"), "--model", "vitkern_test_vit"]
    command = [sys.executable, "-W", "error", "-m", "vitkern.timm", *script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "__main__ vitkern.timm (2, 3) 5"


@pytest.mark.parametrize("arguments", [[], ["no_such_script.py"]])
def test_no_script_is_an_error_that_says_how(arguments: list[str], capsys: Any) -> None:
    assert registered.main(arguments) == 2
    error = capsys.readouterr().err
    assert "usage: python -m vitkern.timm SCRIPT" in error
    assert all(argument in error for argument in arguments)


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'vitkern\[timm\]'"):
        runpy.run_path(str(registered.__file__))
