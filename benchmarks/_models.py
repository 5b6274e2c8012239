"""The models that are compared: vitkern.ViT, EagerViT in plain PyTorch, and timm where it is."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitkern

# A network for checking the machinery where the real ones would take minutes.
TOY = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 10,
}


@dataclass(frozen=True)
class Precision:
    """Dtype of the weights, and of autocast where that is on."""

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None = None

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Autocast, or nothing."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


FLOAT32 = Precision("float32", torch.float32)
AUTOCAST = Precision("bf16 autocast", torch.float32, torch.bfloat16)
BFLOAT16 = Precision("bf16", torch.bfloat16)


def build(name: str, timm: bool = True) -> dict[str, nn.Module]:
    """The networks of one timm name ("toy" for `TOY`), with equal weights, by implementation."""
    torch.manual_seed(0)
    if name == "toy":
        ours = vitkern.ViT(**TOY)  # type: ignore[arg-type]
    else:
        ours = vitkern.create_model(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh head is zero in places, and zeros hide mistakes
        for p in ours.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    models: dict[str, nn.Module] = {"vitkern": ours, "eager": vitkern.EagerViT(ours.config)}
    if timm and find_spec("timm") is not None:
        import timm as timm_package

        if name == "toy":
            models["timm"] = timm_package.models.VisionTransformer(**TOY)
        else:
            models["timm"] = timm_package.create_model(name)
    for model in models.values():
        model.load_state_dict(ours.state_dict())
    return models


def classes(model: nn.Module) -> tuple[int, int]:
    """(image side, number of classes) of a vitkern model."""
    config = model.config
    assert isinstance(config, vitkern.ViTConfig)
    return config.img_size[0], config.num_classes


def forward_flops(model: nn.Module) -> int:
    """FLOPs an image of a vitkern model's matrix products; training has three times these."""
    c = model.config
    assert isinstance(c, vitkern.ViTConfig)
    dim, patches = c.embed_dim, c.grid_size[0] * c.grid_size[1]
    tokens = patches + c.num_prefix_tokens
    layer = 2 * tokens * dim * (4 * dim + 2 * c.hidden_dim) + 4 * tokens**2 * dim
    embed = 2 * patches * dim * c.in_chans * c.patch_size[0] * c.patch_size[1]
    return c.depth * layer + embed + 2 * dim * c.num_classes


def batch(
    model: nn.Module, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Random images [B, 3, S, S] and labels [B] for a vitkern model."""
    side, number = classes(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(0, number, (size,), generator=generator)
    return images.to(device, dtype), labels.to(device)


def forward(model: Callable[..., Tensor], images: Tensor, precision: Precision) -> Tensor:
    """Logits, without a graph."""
    with torch.no_grad(), precision.context(images.device):
        return model(images)


def train_step(
    model: nn.Module, call: Callable[..., Tensor], images: Tensor, labels: Tensor, p: Precision
) -> None:
    """Forward, loss and backward into fresh gradients; optimizers are the same for all models."""
    model.zero_grad(set_to_none=True)
    with p.context(images.device):
        loss = F.cross_entropy(call(images).float(), labels)
    loss.backward()


def outcome(
    model: nn.Module, call: Callable[..., Tensor], images: Tensor, labels: Tensor, p: Precision
) -> list[Tensor]:
    """Logits, and all gradients of a training step as one vector."""
    logits = forward(call, images, p)
    train_step(model, call, images, labels, p)
    ordered = sorted(model.named_parameters())
    grads = [v.grad.flatten() for _, v in ordered if v.grad is not None]
    model.zero_grad(set_to_none=True)
    return [logits, torch.cat(grads)]


def exact_outcome(name: str, device: torch.device, size: int = 2) -> list[Tensor]:
    """Logits and gradients of the plain network in float64."""
    models = build(name, timm=False)
    model = models["eager"].to(device, torch.float64)
    images, labels = batch(models["vitkern"], size, device, torch.float64)
    with torch.no_grad():
        logits = model(images)
    F.cross_entropy(model(images), labels).backward()
    grads = [v.grad.flatten() for _, v in sorted(model.named_parameters()) if v.grad is not None]
    return [logits, torch.cat(grads)]
