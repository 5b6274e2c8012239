"""vitkern: Vision Transformers on custom kernels."""

from vitkern import roofline
from vitkern._version import __version__
from vitkern.accelerate import accelerate, restore
from vitkern.capture import CapturedModel, capture
from vitkern.checkpoint import CheckpointError, load, save
from vitkern.convert import ConvertError, convert
from vitkern.eager import EagerViT
from vitkern.explain import Explanation, explain
from vitkern.export import export
from vitkern.fold import fold
from vitkern.inspect import inspect
from vitkern.maps import attention_rollout, plot_attention, token_map
from vitkern.model import ViT, create_model
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS
from vitkern.profile import profile
from vitkern.selfcheck import selfcheck

__all__ = [
    "PRESETS",
    "CapturedModel",
    "CheckpointError",
    "ConvertError",
    "EagerViT",
    "Explanation",
    "ViT",
    "ViTConfig",
    "__version__",
    "accelerate",
    "attention_rollout",
    "capture",
    "convert",
    "create_model",
    "explain",
    "export",
    "fold",
    "inspect",
    "load",
    "plot_attention",
    "profile",
    "restore",
    "roofline",
    "save",
    "selfcheck",
    "token_map",
]
