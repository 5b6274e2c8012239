"""The steps of a fused linear layer in ATen calls; on a CPU, without a gradient, in oneDNN's.

Backward: definition and portable form in one. Products run in the dtype `product`, all else in
float32 (float64 for float64 arguments). The definition takes the dtype that it accumulates in; the
portable form that of the weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _onednn
from .activation import ACTIVATIONS, definition, fused, overwriting


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b."""
    y = _onednn.linear(x, weight, bias) if x.is_cpu else None
    return F.linear(x, weight, bias) if y is None else y


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """(act(z), z) for z = x W^T + b; the second is undefined unless `keep`."""
    if not (keep or gated) and x.is_cpu:
        y = _onednn.linear(x, weight, bias, activation or None)
        if y is not None:
            return y, y
    z = linear(x, weight, bias)
    # The product is ours alone. Where nobody needs it, writing over it saves touching as much fresh
    # memory, which on a CPU costs as much as the GELU; a compiler does that by itself.
    keep = keep or z.requires_grad or torch.compiler.is_compiling()
    return (fused if keep else overwriting)(z, activation, gated), z


def through_activation(
    dy: Tensor, z: Tensor, activation: str, gated: bool, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """(act(z), gradient of z) for the gradient `dy` of act(z), in the dtype of `dy`.

    exact: by autograd through the definition, in place of ATen's formulas.
    """
    z = z.to(dy.dtype)
    if exact:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            y = definition(leaf, activation, gated)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]
    act, backward = ACTIVATIONS[activation].fused, ACTIVATIONS[activation].backward
    if not gated:
        return act(z), backward(dy, z)
    gate, value = z.chunk(2, dim=-1)
    y = act(gate)
    return y * value, torch.cat([backward(dy * value, gate), dy * y], dim=-1)


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
