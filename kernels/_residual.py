"""What ops that end a branch share: its addition to the stream, in PyTorch, and the checks."""

import torch
from torch import Tensor

from ._op import check_floating, check_shape


def check_residual(
    op: str,
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
) -> None:
    """The arguments of a residual addition fit each other."""
    check_floating(
        op, residual=residual, branch=branch, layer_scale=layer_scale, drop_scale=drop_scale
    )
    check_shape(op, "residual", residual, "B", "N", "D")
    check_shape(op, "branch", branch, *residual.shape)
    check_shape(op, "layer_scale", layer_scale, residual.shape[2])
    check_shape(op, "drop_scale", drop_scale, residual.shape[0])


def add_branch(
    residual: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    ours: bool = False,
) -> Tensor:
    """residual + branch * layer_scale * drop_scale, in ATen calls and the residual's dtype.

    ours: nobody else has the branch, so it may be written over, which on a CPU saves fresh memory.
    """
    one_dtype = branch.dtype == residual.dtype
    if ours and one_dtype and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        if layer_scale is not None:
            branch.mul_(layer_scale)
        if drop_scale is not None:
            branch.mul_(drop_scale[:, None, None])
        return branch.add_(residual)
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop_scale is not None:
        branch = branch * drop_scale.to(branch.dtype)[:, None, None]
    stream = residual + branch
    return stream if stream.dtype is residual.dtype else stream.to(residual.dtype)
