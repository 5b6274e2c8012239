"""The backward steps of a fused linear layer in ATen calls: definition and portable form in one.

Products run in the dtype `product`, all else in float32 (float64 for float64 arguments). The
definition takes the dtype that it accumulates in; the portable form that of the weight.
"""

import torch
from torch import Tensor

from .activation import definition, fused


def through_activation(
    dy: Tensor, z: Tensor, activation: str, gated: bool, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(act(z), gradient of z) for the gradient `dy` of act(z), in the dtype of `dy`."""
    act = definition if exact else fused
    with torch.enable_grad():
        leaf = z.detach().to(dy.dtype).requires_grad_()
        y = act(leaf, activation, gated)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def weight_grad(dz: Tensor, a: Tensor, product: torch.dtype) -> tuple[Tensor, Tensor]:
    """(dz^T a, sum of dz over tokens) for dz [..., N] and a [..., K], in the dtype of `dz`.

    Both of `dz` as rounded to `product`, which is how eager hands it to a linear layer.
    """
    rows = dz.reshape(-1, dz.shape[-1]).to(product)
    columns = a.reshape(-1, a.shape[-1]).to(product)
    return (rows.t() @ columns).to(dz.dtype), rows.sum(0, dtype=dz.dtype)


def norm_input_grad(
    d_a: Tensor, x_hat: Tensor, spread: Tensor, norm_weight: Tensor | None, rms: bool
) -> Tensor:
    """Gradient of a norm's input from that of its output, in the dtype of `d_a`."""
    g = d_a if norm_weight is None else d_a * norm_weight.to(d_a.dtype)
    x_hat = x_hat.to(d_a.dtype)
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if not rms:
        dx = dx - g.mean(-1, keepdim=True)
    return dx * spread.to(d_a.dtype).reshape(*d_a.shape[:-1], 1)


def chunk_statistics(x: Tensor, chunk: int) -> Tensor:
    """[2, C, M]: mean and sum of squared differences of each chunk of columns of `x` [..., D]."""
    rows = x.reshape(-1, x.shape[-1])
    pairs = [
        (part.mean(1), (part - part.mean(1, keepdim=True)).square().sum(1))
        for part in rows.split(chunk, dim=1)
    ]
    return torch.stack([torch.stack(column) for column in zip(*pairs, strict=True)])
