"""Modules of other libraries, known by home and name: none of those libraries is imported.

The home of a class is its package, so "timm.RmsNorm" is found in whichever file of timm it lies.
"""

import inspect

from torch import nn

from vitkern.model import arguments

# What an activation computes.
ACTIVATIONS = {
    **{name: kind for name, kind in arguments.ACTIVATIONS.items() if "." in name},
    "timm.Swish": "silu",
    "open_clip.QuickGELU": "quick_gelu",
    "transformers.GELUActivation": "gelu",
    "transformers.QuickGELUActivation": "quick_gelu",
    "transformers.SiLUActivation": "silu",
    # The tanh formula, written out, as a call, and with its terms in another order.
    "transformers.NewGELUActivation": "gelu_tanh",
    "transformers.GELUTanh": "gelu_tanh",
    "transformers.PytorchGELUTanh": "gelu_tanh",
    "transformers.FastGELUActivation": "gelu_tanh",
}
# Whether a norm is an RMSNorm. Some compute in float32 by themselves, as all of ours do.
NORMS = {
    "torch.LayerNorm": False,
    "timm.LayerNorm": False,
    "timm.LayerNormFp32": False,
    "open_clip.LayerNorm": False,
    "open_clip.LayerNormFp32": False,
    "vitkern.LayerNorm": False,
    "torch.RMSNorm": True,
    "timm.RmsNorm": True,
    "timm.RmsNormFp32": True,
    "vitkern.RmsNorm": True,
}
# Where one name means several classes, of a package or a class of it: the home that counts.
_HOMES: dict[str, tuple[str, ...]] = {
    "torch": ("torch.nn.modules.",),  # and not torch.ao's of the same names
    "timm.Block": ("timm.models.vision_transformer.",),
    "timm.Attention": ("timm.layers.attention.", "timm.models.vision_transformer."),
    "vit_pytorch": ("vit_pytorch.vit.",),
}
LINEARS = ("torch.Linear", "torch.NonDynamicallyQuantizableLinear")
DROPOUTS = ("torch.Dropout", "torch.Identity")


def class_name(module: object, cls: type | None = None) -> str:
    """Package and name, "timm.RmsNorm"; the whole path where that is ambiguous."""
    cls = cls or type(module)
    package, name = cls.__module__.partition(".")[0], cls.__name__
    homes = _HOMES.get(f"{package}.{name}", _HOMES.get(package))
    if homes is not None and not f"{cls.__module__}.".startswith(homes):
        return f"{cls.__module__}.{name}"
    return f"{package}.{name}"


def activation_of(module: nn.Module) -> str | None:
    """Our name for what this activation computes; None if it is none that we know."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(class_name(module))


def norm_of(module: nn.Module) -> tuple[str, float] | None:
    """(kind, eps) of a norm over the last dimension, as `norm_layer` has it; None for others."""
    rms = NORMS.get(class_name(module))
    shape, eps = getattr(module, "normalized_shape", ()), getattr(module, "eps", None)
    if rms is None or len(shape) != 1 or eps is None or getattr(module, "weight", None) is None:
        return None
    return ("rmsnorm" if rms else "layernorm", float(eps))


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance runs its class's forward, and no other that was put upon it."""
    return "forward" not in module.__dict__ or _own(module, "forward")


def replaced_method(module: nn.Module) -> str | None:
    """The first method of its class in whose place an instance has another; None if it has none."""
    for name in module.__dict__:
        if inspect.isfunction(getattr(type(module), name, None)) and not _own(module, name):
            return name
    return None


def _own(module: nn.Module, name: str) -> bool:
    """Whether what an instance has by this name is its class's own method, bound.

    transformers 4 leaves such a forward behind after it recorded outputs.
    """
    value = module.__dict__[name]
    own = getattr(value, "__func__", None) is getattr(type(module), name)
    return own and value.__self__ is module
