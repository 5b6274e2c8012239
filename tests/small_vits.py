"""Small ViTs whose weights all matter, for tests of checkpoints."""

import warnings

import pytest
import torch

from vitkern.checkpoint import load
from vitkern.model import ViT

TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


def tiny(**changes):
    """A small model with weights that all matter."""
    torch.manual_seed(0)
    model = ViT(**{**TINY, "num_classes": 5, **changes})
    return stir(model)


@torch.no_grad()
def stir(model):
    """Every parameter moved, also those that start at 0 or 1."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def quietly(*args, **kwargs):
    """`load` without a warning, which becomes an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(*args, **kwargs).eval()


def assert_same(ours, theirs, images, within=1e-6):
    """Equal logits and gradients, relative to the largest."""
    expected, found = theirs(images), ours(images)
    assert expected.abs().max() > 0.01
    assert (found - expected).abs().max() <= within * expected.abs().max()
    probe = torch.randn_like(expected)
    wanted = dict(zip(*gradients(theirs, expected, probe), strict=True))
    largest = max(grad.abs().max() for grad in wanted.values())
    for name, grad in zip(*gradients(ours, found, probe), strict=True):
        if name in wanted:  # some are 0 but for rounding, those of the keys' biases, say
            allowed = 1e-5 * wanted[name].abs().max() + 1e-7 * largest
            assert (grad - wanted[name]).abs().max() <= allowed, name


def gradients(model, output, probe):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return names, torch.autograd.grad((output * probe).sum(), parameters)


def theirs(**changes):
    """A model of timm's, stirred."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    return stir(timm.VisionTransformer(**{**TINY, "num_classes": 5, **changes}))
