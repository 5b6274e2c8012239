"""cuDNN's attention, which PyTorch has but takes by itself on few cards and shapes."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitkern.kernels import QKNorm, Rope

from .._contest import Unfit

# What PyTorch says, on a GPU and on a CPU, where the one kernel that it may take can't.
REFUSALS = ("No available kernel", "No viable backend")


def cudnn_attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    qk_norm: QKNorm | None = None,
    rope: Rope | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` by scaled_dot_product_attention, with all backends off but cuDNN's.

    Its backward is that of the forward's backend, wherever autograd comes by.

    Raises:
        Unfit: an option that it isn't given here, or a call that cuDNN doesn't take.
    """
    options = {"qk_norm": qk_norm, "rope": rope, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
    if lacking := [name for name, value in options.items() if value is not None]:
        raise Unfit(f"cuDNN's attention is called without {lacking[0]}")
    q, k, v = qkv.transpose(1, 3).unbind(2)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    except RuntimeError as error:
        if not str(error).startswith(REFUSALS):
            raise
        reason = f"{qkv.dtype} {list(qkv.shape)} on {qkv.device.type}"
        raise Unfit(f"cuDNN's attention doesn't take {reason}") from error
    return out.transpose(1, 2).flatten(2)
