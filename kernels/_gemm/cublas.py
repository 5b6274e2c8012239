"""The implementations named "cublas": PyTorch's product, our kernels around it.

An epilogue of ours saves a pass over memory, but only a product as fast as the vendor's can keep
what that saves. So this is the rival in between: cuBLAS for the product, one kernel of
``pointwise.py`` for all that stands before it, and one for all that stands behind it.

The norm's weight and bias are applied to the rows, not folded into the layer's weight. For training
the fold would spare a pass of 2 D bytes a token (x_hat is written for backward in any case), and it
costs 4 F D: less than that from 2 F tokens on. But it rounds the weight once more, and rounds x_hat
where eager rounds x_hat * g + h. Against float64, in float16, that made 1.2 times eager's error on
ordinary data, 5.8 times where h cancels the mean of 8 outlier channels, and 13.9 times with g near
1e-4, whose products with a weight are subnormal: the rule is 2 (measured on a CPU).

Gradients of weights leave the product in float32 where PyTorch can ask cuBLAS for it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import pointwise
from .launch import CHUNK, Norm, Partial, as_matrix, finish, norm_finish

# Whether `torch.mm` takes an `out_dtype`, on CUDA tensors.
WIDE_SUMS = "dtype" in torch.ops.aten.mm.overloads()


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    eps: float,
    rms: bool,
    normalised: bool,
    activation: str,
    gated: bool,
    need_saved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``norm_linear.reference``; `stats` are not read, since the kernel sees whole rows."""
    norm = Norm(norm_weight, norm_bias, None, eps, rms)
    a, x_hat, spread = pointwise.normalise(x, norm, normalised, need_saved, weight.dtype)
    y, z = _linear_act(a, weight, bias, activation, gated, need_saved)
    nothing = weight.new_empty(0)
    return (
        y.view(*x.shape[:-1], y.shape[1]),
        z.view(*x.shape[:-1], z.shape[1]) if need_saved and activation else nothing,
        weight.new_empty(0) if x_hat is None else x_hat.view(x.shape),
        weight.new_empty(0, dtype=torch.float32) if spread is None else spread,
    )


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool, need_pre: bool
) -> tuple[Tensor, Tensor]:
    """As ``linear_act.reference``."""
    y, z = _linear_act(as_matrix(x), weight, bias, activation, gated, need_pre)
    leading = x.shape[:-1]
    whole = z.view(*leading, z.shape[1]) if need_pre else weight.new_empty(0)
    return y.view(*leading, y.shape[1]), whole


def _linear_act(
    a: Tensor, weight: Tensor, bias: Tensor | None, activation: str, gated: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y, z) of a [M, D]; z is overwritten unless it is to `keep`."""
    z = F.linear(a, weight, bias)
    return (pointwise.act(z, activation, gated, keep) if activation else z), z


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    need_stats: bool,
) -> tuple[Tensor, Tensor]:
    """As ``linear_residual.reference``.

    The product adds the bias: before the branch is rounded, and without a pass of its own.
    """
    branch = F.linear(as_matrix(x), weight, bias)
    stream = residual.new_empty(residual.shape)
    batch, tokens, width = residual.shape
    shape = (2, -(-width // CHUNK), batch * tokens) if need_stats else (0,)
    stats = residual.new_empty(shape, dtype=torch.float32)
    given = (residual, branch, layer_scale, drop_scale)
    pointwise.add(*given, stream, stats if need_stats else None)
    return stream, stats


def norm_linear_backward(
    dy: Tensor,
    z: Tensor | None,
    x_hat: Tensor,
    spread: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    d_stream: Tensor | None,
    activation: str,
    gated: bool,
    rms: bool,
    x_dtype: torch.dtype,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``norm_linear.backward_reference``."""
    if z is None:
        dz, _, sums = pointwise.scale(dy, weight.dtype, need_params=need_params)
    else:
        dz, _, sums = pointwise.slope(dy, z, activation, gated, sums=need_params)
    d_a = torch.mm(dz, weight) if need_x else None
    partial = None
    if need_params:
        d_weight = product(dz.t(), as_matrix(x_hat), torch.float32)
        partial = Partial(d_weight[None], pointwise.total(sums, torch.float32)[None])
    dx = weight.new_empty(x_hat.shape if need_x else 0, dtype=x_dtype)
    norm = Norm(norm_weight, norm_bias, None, 0.0, rms)
    d_weight, d_bias, d_norm = norm_finish(
        partial, weight, norm, x_hat, spread, d_a, d_stream, dx if need_x else None, param_dtype
    )
    return dx, d_norm, d_weight, d_bias


def linear_act_backward(
    dy: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``linear_act.backward_reference``."""
    dz, _, sums = pointwise.slope(dy, z, activation, gated, sums=need_params)
    dx = torch.mm(dz, weight).view(x.shape) if need_x else x.new_empty(0)
    d_weight, d_bias = (weight.new_empty(0, dtype=param_dtype) for _ in range(2))
    if need_params:
        d_weight = product(dz.t(), as_matrix(x), param_dtype)
        d_bias = pointwise.total(sums, param_dtype)
    return dx, d_weight, d_bias


def linear_residual_backward(
    d_stream: Tensor,
    x: Tensor | None,
    pre: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    activation: str,
    gated: bool,
    param_dtype: torch.dtype,
    need_x: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``linear_residual.backward_reference``."""
    g, scaled, sums = pointwise.scale(
        d_stream, weight.dtype, drop_scale, layer_scale, need_x, need_params
    )
    given = x if pre is None else pre
    assert given is not None
    hidden = x
    dx = weight.new_empty(0)
    if need_x:
        dx = torch.mm(scaled, weight)
        if pre is not None:
            dx, hidden, _ = pointwise.slope(dx, pre, activation, gated, hidden=need_params)
        dx = dx.view(given.shape)
    elif need_params and pre is not None:
        hidden = pointwise.act(as_matrix(pre), activation, gated, keep=True)
    d_scale = (weight if layer_scale is None else layer_scale).new_empty(0)
    d_weight, d_bias = (weight.new_empty(0, dtype=param_dtype) for _ in range(2))
    if need_params:
        assert hidden is not None
        a = as_matrix(hidden)
        if layer_scale is None:
            d_weight = product(g.t(), a, param_dtype)
            d_bias = pointwise.total(sums, param_dtype)
        else:
            whole = product(g.t(), a, torch.float32)
            partial = Partial(whole[None], pointwise.total(sums, torch.float32)[None])
            results = finish(partial, weight, bias, layer_scale, param_dtype)
            d_weight, d_bias, of_scale = results
            d_scale = d_scale if of_scale is None else of_scale
    return dx, d_weight, d_bias, d_scale


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b as `dtype`: float32 as the product's own sums, where PyTorch can return them."""
    if WIDE_SUMS and a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
