"""The end of a block: the MLP's branch joins the residual stream.

    stream = residual + branch * layer_scale * drop_scale      (in the residual's dtype)

Forward:  residual, branch [B, N, D], layer_scale [D], drop_scale [B] -> stream [B, N, D].
Backward: d_residual = d,  d_branch = d * layer_scale * drop_scale,
    d_layer_scale = sum over rows of d * drop_scale * branch.
Bytes: residual + branch + stream. It belongs in the epilogue of the product before it, where the
branch is never written at all; until that kernel exists this op is made of ATen calls.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ._op import (
    Arg,
    Sample,
    accumulate_dtype,
    choose,
    define,
    total_bytes,
)
from ._residual import add_branch, check_residual


def reference(
    residual: Tensor, branch: Tensor, layer_scale: Tensor | None, drop_scale: Tensor | None
) -> Tensor:
    """The definition, accumulated in float32 (float64 for float64 arguments)."""
    acc = accumulate_dtype(residual, branch, layer_scale, drop_scale)
    stream = add_branch(residual.to(acc), branch.to(acc), layer_scale, drop_scale)
    return stream.to(residual.dtype).contiguous()


def portable(
    residual: Tensor, branch: Tensor, layer_scale: Tensor | None, drop_scale: Tensor | None
) -> Tensor:
    """ATen: products and a sum."""
    return add_branch(residual, branch, layer_scale, drop_scale).contiguous()


def fake(
    residual: Tensor, branch: Tensor, layer_scale: Tensor | None, drop_scale: Tensor | None
) -> Tensor:
    """Shape, dtype and strides of the output."""
    return residual.new_empty(residual.shape)


def samples(size: str) -> Iterable[Sample]:
    """Odd shapes; or the blocks of ViT-B and L, batch 128."""
    shapes = ((2, 5, 33), (0, 3, 8)) if size == "tiny" else ((128, 197, 768), (128, 197, 1024))
    for shape in shapes:
        for scaled in (False, True):
            args = {
                "residual": Arg(shape),
                "branch": Arg(shape),
                "layer_scale": Arg(shape[2:]) if scaled else None,
                "drop_scale": Arg(shape[:1]) if scaled else None,
            }
            yield Sample("x".join(map(str, shape)) + " scaled" * scaled, args)


def flops(residual: Tensor, **_: Any) -> int:
    """A sum and up to two products an element."""
    return 3 * residual.numel()


def bytes_moved(
    residual: Tensor, branch: Tensor, layer_scale: Tensor | None, drop_scale: Tensor | None
) -> int:
    """Two streams in, one out."""
    return total_bytes(residual, branch, residual, layer_scale, drop_scale)


RESIDUAL_ADD = define(
    "residual_add",
    reference=reference,
    portable=portable,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
)


def residual_add(
    residual: Tensor,
    branch: Tensor,
    *,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add a branch to the residual stream.

    Args:
        residual: the stream [B, N, D].
        branch: what attention or MLP returned [B, N, D]; its dtype may differ.
        layer_scale: LayerScale gamma [D], or None.
        drop_scale: DropPath factor a sample [B] (0 or 1 / keep probability), or None.
        impl: "auto", "torch" or "reference".

    Returns:
        The new stream [B, N, D] in the residual's dtype.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: a shape other than above, tensors on several devices, an unknown `impl`.
    """
    check_residual("residual_add", residual, branch, layer_scale, drop_scale)
    chosen = choose(RESIDUAL_ADD, impl, residual, branch, layer_scale, drop_scale)
    run = RESIDUAL_ADD.portable if chosen == "torch" else RESIDUAL_ADD.reference
    return run(residual, branch, layer_scale, drop_scale)
