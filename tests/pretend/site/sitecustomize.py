"""For every Python on the pretended card: what would call libraries of NVIDIA's that are real."""

import torch

torch.backends.cudnn.enabled = False
for backend in ("flash", "mem_efficient", "cudnn"):  # they look into their kernels
    getattr(torch.backends.cuda, f"enable_{backend}_sdp")(False)
# Compiled when it is called, by NVIDIA's compiler.
torch.Tensor.erfinv_ = lambda self: self  # type: ignore[assignment, method-assign, return-value]
