"""vitkern: Vision Transformers on custom kernels."""

from vitkern._version import __version__
from vitkern.config import PRESETS, ViTConfig
from vitkern.eager import EagerViT
from vitkern.explain import Explanation, explain
from vitkern.model import ViT, create_model

__all__ = [
    "PRESETS",
    "EagerViT",
    "Explanation",
    "ViT",
    "ViTConfig",
    "__version__",
    "create_model",
    "explain",
]
