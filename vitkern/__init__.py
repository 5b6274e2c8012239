"""vitkern: Vision Transformers on custom kernels."""

from vitkern import roofline
from vitkern._version import __version__
from vitkern.capture import CapturedModel, capture
from vitkern.config import ViTConfig
from vitkern.eager import EagerViT
from vitkern.explain import Explanation, explain
from vitkern.fold import fold
from vitkern.maps import attention_rollout, plot_attention, token_map
from vitkern.model import ViT, create_model
from vitkern.presets import PRESETS
from vitkern.profile import profile
from vitkern.selfcheck import selfcheck

__all__ = [
    "PRESETS",
    "CapturedModel",
    "EagerViT",
    "Explanation",
    "ViT",
    "ViTConfig",
    "__version__",
    "attention_rollout",
    "capture",
    "create_model",
    "explain",
    "fold",
    "plot_attention",
    "profile",
    "roofline",
    "selfcheck",
    "token_map",
]
