"""Small parts of a ViT: norms, activations, LayerScale, DropPath; and when an op may fuse them."""

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vitkern import kernels as ops
from vitkern.kernels._op import autocast_dtype
from vitkern.model.config import ViTConfig

M = TypeVar("M", bound=nn.Module)


def plain(module: nn.Module, *classes: type[M]) -> TypeGuard[M]:
    """Whether calling `module` does just what its class says, so that a fused op may stand in.

    Twenty times a block: no call in here, not even PyTorch's own for the last line.
    """
    if type(module) not in classes:
        return False
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None  # module.compile()
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def parameter(module: nn.Module, name: str) -> Any:
    """``module.<name>``, without a microsecond in nn.Module's look-up."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def plain_linear(layer: nn.Module) -> bool:
    """Whether a fused op may stand in for a linear layer: no quantised or distributed weight."""
    return plain(layer, nn.Linear) and type(parameter(layer, "weight")) in (nn.Parameter, Tensor)


def idle(dropout: nn.Module) -> bool:
    """Whether this dropout passes its input on as it is."""
    if not plain(dropout, nn.Dropout, nn.Identity):
        return False
    return not (dropout.training and type(dropout) is nn.Dropout and dropout.p)


class _Norm:
    """What the two norms add to PyTorch's: the op, and the dtype of its result.

    feeds_product: a linear layer follows, so under autocast the result has its dtype at once.
    recast: the residual stream has a dtype of its own (`residual_dtype`), and it ends here.
    feeds_sum: the result joins the residual stream, in the dtype of PyTorch's own norm.
    """

    weight: Any
    bias: Any
    like: Any
    eps: Any
    rms = False
    feeds_product = False
    recast = False
    feeds_sum = False
    impl = "auto"

    def out_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype to return for `x`."""
        if self.feeds_sum:
            return own_norm_dtype(x)
        product = autocast_dtype(x.device) if self.feeds_product else None
        if product or not self.recast:
            return product or x.dtype
        own: torch.dtype = (self.like if self.weight is None else self.weight).dtype
        return own

    def drop_affine(self: Any) -> None:
        """Keep the normalisation alone: weight and bias were folded into the layer that follows."""
        # An empty buffer goes wherever to() and half() take the model, and tells `recast` where.
        self.register_buffer("like", self.weight.detach().new_empty(0), persistent=False)
        self.elementwise_affine, self.weight, self.bias = False, None, None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., D] over the last dimension."""
        options: dict[str, Any] = {"out_dtype": self.out_dtype(x), "impl": self.impl}
        return ops.layer_norm(x, self.weight, self.bias, self.eps, rms=self.rms, **options)


def own_norm_dtype(x: Tensor) -> torch.dtype:
    """Of what PyTorch's norms return: under autocast they widen on a GPU, and don't on a CPU."""
    widened = x.is_cuda and autocast_dtype(x.device) is not None
    return torch.promote_types(x.dtype, torch.float32) if widened else x.dtype


class LayerNorm(_Norm, nn.LayerNorm):
    """LayerNorm over the last dimension, by the op `layer_norm`."""

    def __init__(self, dim: int, eps: float = 1e-6, **dd: Any) -> None:
        super().__init__(dim, eps, **dd)


class RmsNorm(_Norm, nn.RMSNorm):
    """RMSNorm over the last dimension, by the op `layer_norm`."""

    rms = True
    bias = None

    def __init__(self, dim: int, eps: float = 1e-6, **dd: Any) -> None:
        super().__init__(dim, eps, **dd)


NORMS: tuple[type[Any], ...] = (LayerNorm, RmsNorm)


def make_norm(
    config: ViTConfig, dim: int, *, product: bool = False, recast: bool = True, **dd: Any
) -> LayerNorm | RmsNorm:
    """The norm that the config names, `dim` wide."""
    kind, eps = config.norm_layer
    norm = (RmsNorm if kind == "rmsnorm" else LayerNorm)(dim, eps, **dd)
    norm.feeds_product = product
    norm.recast = recast and config.residual_dtype is not None
    norm.impl = config.implementations["layer_norm"]
    return norm


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def activation_name(act: nn.Module) -> str | None:
    """The name by which `linear_act` knows this module; None where it has to be called."""
    if plain(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    for name in ("quick_gelu", "relu", "silu"):
        if plain(act, ACTIVATIONS[name]):  # type: ignore[arg-type]
            return name
    return None


class LayerScale(nn.Module):
    """A learned gain [D] on a residual branch."""

    def __init__(self, dim: int, init_values: float = 1e-5, **dd: Any) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((dim,), init_values, **dd))

    def reset_parameters(self) -> None:
        """All gains start at `init_values`."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] times the gain."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a sample's whole branch and scale up the rest.

    subset: compute the branch for a random subset of the batch only (Oquab et al., "DINOv2", 2023).
    Of B samples k = round(B * (1 - drop_prob)), one at least, are kept and scaled by B / k. So
    every sample is kept with probability k / B and the expectation is the same, but the number of
    those kept is fixed, and where B * drop_prob is below 1/2 none is dropped.
    """

    def __init__(self, drop_prob: float = 0.0, subset: bool = False) -> None:
        super().__init__()
        self.drop_prob, self.subset = drop_prob, subset

    @property
    def active(self) -> bool:
        """Whether it drops anything now."""
        return self.training and self.drop_prob > 0

    def choose(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """(numbers of the samples kept, or None for all; their factors)."""
        batch = x.shape[0]
        count = max(1, round(batch * (1 - self.drop_prob)))
        if count >= batch:
            return None, x.new_ones(batch)
        index = torch.randperm(batch, device=x.device)[:count]
        return index, x.new_full((count,), batch / count)

    def on_subset(self, stream: Any, half: Callable[..., Any], problem: str | None) -> Any:
        """The stream after `half` of a block on the samples kept, those left out as they were."""
        index, factor = self.choose(stream.x)
        if index is None:
            return half(stream, False, problem, factor)
        part = type(stream)(stream.x.index_select(0, index))
        after = half(part, False, problem, factor).x
        return type(stream)(stream.x.index_copy(0, index, after))

    def factor(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Factor a sample [B], 0 or 1 / keep, in the dtype of `x` or `dtype`; None to drop nothing.

        Drawn as timm draws it, so that one seed drops the same samples in both.
        """
        if not self.active:
            return None
        keep = 1 - self.drop_prob
        kept = x.new_empty(x.shape[0], dtype=dtype).bernoulli_(keep)
        return kept / keep if keep > 0 else kept

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] with samples dropped."""
        factor = self.factor(x)
        return x if factor is None else x * factor.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        """The rate."""
        return f"drop_prob={self.drop_prob:.3f}" + ", subset=True" * self.subset


def kept(drop_path: Any) -> bool:
    """Whether this DropPath leaves samples out of the branch, in place of multiplying it by 0."""
    return plain(drop_path, DropPath) and drop_path.subset and drop_path.active


def make_drop_path(config: ViTConfig, rate: float) -> DropPath | nn.Identity:
    """Stochastic depth of one branch."""
    return DropPath(rate, config.drop_path_mode == "subset") if rate > 0 else nn.Identity()


def branch_scales(
    branch: Tensor, ls: nn.Module, drop_path: nn.Module
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(branch, layer_scale, drop_scale): the last two for a fused op, the branch after the rest."""
    gamma, dtype = None, branch.dtype
    if plain(ls, LayerScale) and plain(drop_path, DropPath, nn.Identity):
        gamma = ls.gamma
        if gamma.dtype != dtype:  # DropPath would see their product
            dtype = torch.promote_types(dtype, gamma.dtype)
    else:
        branch = ls(branch)
    if plain(drop_path, DropPath):
        return branch, gamma, drop_path.factor(branch, dtype)
    return drop_path(branch), gamma, None
