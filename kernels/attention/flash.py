"""The FlashAttention packages as implementations of attention, each where it is installed.

Which are there is asked of the installed distributions: flash-attn-4 brings `flash_attn.cute`, but
no `flash_attn/__init__.py`, so that importing `flash_attn` proves nothing. A package is imported
when it is first called.

Norm and rotation of queries and keys are ATen's, before the call. Without them, packages with an
entry for packed qkv get the very tensor, and its gradient comes back packed.

Source: Dao, "FlashAttention-2", 2023; Shah et al., "FlashAttention-3", 2024; FlashAttention-4:
flash_attn/cute of https://github.com/Dao-AILab/flash-attention.
"""

import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._launch import capability
from .._op import dtype_name, wants_grad
from .reference import Options, prepare

MAX_BATCH = 65535  # all of them lay images along an axis of the grid that ends there


@dataclass(frozen=True)
class Package:
    """A distribution, its module, and the largest head that it takes.

    forward, backward, deterministic: by major compute capability; deterministic is a backward, too.
    dropout: with dropout; 0 if it has none.
    multiple: what a head's size must be a multiple of.
    """

    distribution: str
    module: str
    forward: Mapping[int, int]
    backward: Mapping[int, int]
    deterministic: Mapping[int, int]
    dropout: int = 0
    multiple: int = 8


AMPERE_AND_UP = dict.fromkeys(range(8, 13), 256)

# Newest first, as read in the sources of 4.0.0b36, of 3.0.0 and of 2.8.3.
PACKAGES = {
    # sm_90: its own tests leave out the backward above 192. Elsewhere: sm_100 asks for 128 at most
    # (or 256, by kernels that lack parts); sm_8x and sm_12x ask for nothing, but 128 is what fits
    # into the 99 KiB of shared memory that the smaller cards have.
    "flash4": Package(
        "flash-attn-4",
        "flash_attn.cute",
        forward={8: 128, 9: 256, 10: 128, 11: 128, 12: 128},
        backward={9: 192, 10: 128, 11: 128, 12: 128},
        deterministic={9: 192, 10: 128, 11: 128},
    ),
    # Kernels for sm_8x are in some builds only.
    "flash3": Package(
        "flash-attn-3",
        "flash_attn_interface",
        forward={9: 256},
        backward={9: 256},
        deterministic={9: 192},
    ),
    # It pads heads by itself. Above 192, dropout has no backward on cards with little shared
    # memory (sm_86, sm_89, sm_120), and says so by gradients that are never written.
    "flash2": Package(
        "flash-attn",
        "flash_attn",
        forward=AMPERE_AND_UP,
        backward=AMPERE_AND_UP,
        deterministic=AMPERE_AND_UP,
        dropout=192,
        multiple=1,
    ),
}
NAMES = tuple(PACKAGES)


@functools.cache
def look_up(distribution: str) -> str | None:
    """Installed version of a distribution; None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@torch.compiler.assume_constant_result
def version(name: str) -> str | None:
    """Installed version of the package `name`; None if it isn't installed."""
    return look_up(PACKAGES[name].distribution)  # apart, as dynamo looks through a cache


@torch.compiler.assume_constant_result
def load(name: str) -> str:
    """Import the package `name`, and return the name of its module, which is a constant that dynamo
    can hold; a module is not.
    """
    importlib.import_module(PACKAGES[name].module)
    return PACKAGES[name].module


def problem(name: str, qkv: Tensor, options: Options, dropout_p: float = 0.0) -> str | None:
    """Why the package `name`, or for "flash" every one, can't take this call; None if it can."""
    if name == "flash":
        problems = [problem(one, qkv, options, dropout_p) for one in NAMES]
        if None in problems:
            return None
        return "; ".join(dict.fromkeys(filter(None, problems)))
    package = PACKAGES[name]
    if version(name) is None:
        return f"{package.distribution} is not installed"
    if not qkv.is_cuda:
        return f"FlashAttention needs CUDA tensors, these are on {qkv.device.type}"
    if qkv.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes float16 and bfloat16, not {dtype_name(qkv.dtype)}"
    if options.key_mask is not None:
        return "FlashAttention takes no key mask"
    if qkv.numel() == 0:
        return f"FlashAttention takes no empty tensor, and this is {list(qkv.shape)}"
    images = qkv.shape[0] if options.cu_seqlens is None else options.cu_seqlens.numel() - 1
    if images > MAX_BATCH:
        return f"FlashAttention takes {MAX_BATCH:,} images at most, not {images:,}"
    return device_problem(package, qkv, options, dropout_p)


def device_problem(package: Package, qkv: Tensor, options: Options, dropout_p: float) -> str | None:
    """Why `package` has no kernel for these heads on this GPU; None where it has one."""
    head_dim = qkv.shape[-1]
    if head_dim % package.multiple:
        return f"{package.distribution} takes heads of a multiple of 8, not {head_dim}"
    major, minor = capability(qkv.device)
    if not wants_grad(qkv, *options[:6]):
        kind, largest = "forward pass", package.forward
    elif torch.are_deterministic_algorithms_enabled():
        kind, largest = "deterministic backward pass", package.deterministic
    else:
        kind, largest = "backward pass", package.backward
    limits = [(f"{kind} on sm_{major}{minor}", largest.get(major, 0))]
    if dropout_p:
        limits.insert(0, ("dropout", package.dropout))
    for what, limit in limits:
        if limit == 0:
            return f"{package.distribution} has no {what}"
        if head_dim > limit:
            return f"{package.distribution} has no {what} for heads of {head_dim}, above {limit}"
    return None


def pick(qkv: Tensor, options: Options, dropout_p: float = 0.0) -> str | None:
    """Name of the newest package that takes this call; None if none does."""
    for name in NAMES:
        if problem(name, qkv, options, dropout_p) is None:
            return name
    return None


def resolve(name: str, qkv: Tensor, options: Options, dropout_p: float) -> str:
    """`name`, or for "flash" that of the package which it stands for in this call.

    Raises:
        ValueError: no package takes the call.
    """
    if name != "flash":
        return name
    found = pick(qkv, options, dropout_p)
    if found is None:
        raise ValueError(f"attention: {problem(name, qkv, options, dropout_p)}")
    return found


def describe(name: str, qkv: Tensor, options: Options, dropout_p: float = 0.0) -> str:
    """What runs this call, such as "flash-attn 2.8.3"."""
    name = resolve(name, qkv, options, dropout_p)
    return f"{PACKAGES[name].distribution} {version(name)}"


def run(name: str, qkv: Tensor, options: Options, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Attention by the package `name`, or the newest that takes the call; differentiable.

    Args:
        name: one of `NAMES`, for which `problem` gave None; or "flash".
        qkv: [B, N, 3, H, d], or [total, 3, H, d] with `options.cu_seqlens`.
        options: all but a key mask.
        scale, dropout_p: as in `attention`. Gradients are the same bits in every run if
            ``torch.use_deterministic_algorithms`` asks for that.

    Returns:
        [B, N, H*d] or [total, H*d], contiguous.

    Raises:
        ValueError: "flash", and no package takes the call.
    """
    name = resolve(name, qkv, options, dropout_p)
    extra: dict[str, Any] = {
        "softmax_scale": scale,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if dropout_p:  # only one package knows the word
        extra["dropout_p"] = dropout_p
    module = sys.modules[load(name)]
    qkv, ends = aligned(qkv), options.cu_seqlens
    kind = "flash_attn" if ends is None else "flash_attn_varlen"
    plain = options.q_weight is None and options.sin is None
    whole = getattr(module, f"{kind}_qkvpacked_func", None) if plain else None
    if whole is not None:
        if ends is not None:
            extra |= {"cu_seqlens": ends, "max_seqlen": options.max_seqlen}
        out = whole(qkv, **extra)
    else:
        q, k, v = qkv.unbind(-3)
        if not plain:
            q, k = prepare(q.transpose(-3, -2), k.transpose(-3, -2), options, None)
            q, k = q.transpose(-3, -2), k.transpose(-3, -2)
        if ends is not None:
            extra |= {"cu_seqlens_q": ends, "max_seqlen_q": options.max_seqlen}
            extra |= {"cu_seqlens_k": ends, "max_seqlen_k": options.max_seqlen}
        out = getattr(module, f"{kind}_func")(q, k, v, **extra)
    out = out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp unasked
    return out.flatten(-2).contiguous()


def aligned(qkv: Tensor) -> Tensor:
    """`qkv` itself where each head is dense and starts on 16 bytes, as the packages load it;
    a copy otherwise.
    """
    *steps, last = qkv.stride()
    # A compiler can't trace the offset; it aligns what it hands to an operator itself.
    start = 0 if torch.compiler.is_compiling() else qkv.storage_offset()
    if last == 1 and 0 not in steps and all(n % 8 == 0 for n in (start, *steps)):
        return qkv
    return qkv.clone(memory_format=torch.contiguous_format)
