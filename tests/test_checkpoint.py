"""Checkpoints: containers, detection, inference of the architecture, errors; timm's and Meta's."""

import torch

from vitkern.checkpoint import FORMATS, load, understand
from vitkern.model import ViT

TINY = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


def test_the_formats_have_names_of_their_own():
    names = [one.name for one in FORMATS]
    assert len(set(names)) == len(names)
    assert all(one.title for one in FORMATS)


def test_our_own_state_dict_gives_the_same_logits():
    torch.manual_seed(0)
    model = ViT(**TINY, num_classes=5)
    found = understand(model.state_dict(), num_heads=2)
    assert found.format.name == "timm"
    assert found.config == model.config
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(load(model.state_dict(), num_heads=2)(images), model(images))
