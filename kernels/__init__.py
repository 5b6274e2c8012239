"""vitkern.kernels: one op, one file. Importing it touches neither a GPU nor its driver."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package vitkern.kernels: install vitkern (`pip install -e .`) "
        "and import vitkern.kernels"
    )

from ._op import REGISTRY
from .add_layer_norm import add_layer_norm
from .attention import QKNorm, Rope, attention, attention_pool, axial_rope
from .layer_norm import layer_norm
from .linear_act import linear_act
from .linear_residual import linear_residual
from .norm_linear import norm_linear
from .patch_embed import patch_embed
from .residual_add import residual_add

__all__ = [
    "REGISTRY",
    "QKNorm",
    "Rope",
    "add_layer_norm",
    "attention",
    "attention_pool",
    "axial_rope",
    "layer_norm",
    "linear_act",
    "linear_residual",
    "norm_linear",
    "patch_embed",
    "residual_add",
]
