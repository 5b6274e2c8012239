"""vitkern.kernels: one op, one file. Importing it touches neither a GPU nor its driver."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package vitkern.kernels: install vitkern (`pip install -e .`) "
        "and import vitkern.kernels"
    )

from ._op import REGISTRY
from .layer_norm import layer_norm

__all__ = ["REGISTRY", "layer_norm"]
