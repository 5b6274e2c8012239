"""Launch configs of patch_embed with their reasons, and the launchers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._configs import tunable, variants
from .._launch import (
    SplitConfig,
    TileConfig,
    capability,
    cdiv,
    dot_precision,
    fit,
    launch,
    precision_of,
    sm_count,
    split,
)
from .._op import dtype_name
from .._reduce import column_sum
from .._triton import tl
from .kernels import forward_kernel, image_grad_kernel, token_grad_kernel, weight_grad_kernel
from .reference import covered_pixels, geometry


def forward_config(
    tokens: int,
    width: int,
    dtype: torch.dtype,
    as_bytes: bool,
    target: tuple[int, int],
    sms: int,
) -> TileConfig:
    """Tiles of the projection [tokens, K] x [K, width]."""
    # Bytes pass through registers on their way to the product: small tiles of them, or they spill.
    if dtype == torch.float32:  # FMA units or TF32; the operands are twice as wide
        if as_bytes:
            return TileConfig(64, fit(32, width), 16, 8, 3)
        return TileConfig(64, fit(64, width), 32, 8, 3)
    if cdiv(tokens, 128) * cdiv(width, 128) < 2 * sms:  # few images: more, smaller programs
        return TileConfig(64, fit(64, width), 32 if as_bytes else 64, 4, 4)
    if target >= (9, 0):  # a warpgroup for each 64 rows, four stages of 32 KiB to keep both fed
        return TileConfig(128, fit(128, width), 64, 8, 4)
    return TileConfig(128, fit(128, width), 32, 8, 4)


def forward_candidates(
    width: int, dtype: torch.dtype, as_bytes: bool, target: tuple[int, int]
) -> list[TileConfig]:
    """Alternatives; for bytes the small ones only."""
    if dtype == torch.float32:
        columns = fit(32 if as_bytes else 64, width)
        return [TileConfig(64, columns, 16, warps, stages) for warps in (4, 8) for stages in (2, 3)]
    small = TileConfig(64, fit(64, width), 32, 4, 3)
    found = variants(small, {}, {"num_stages": 4}, {"block_k": 64}, {"block_k": 64, "num_warps": 8})
    tall = TileConfig(128, fit(64, width), 32, 8, 3)
    found += variants(tall, {}, {"num_stages": 4}, {"block_k": 64})
    if width >= 128:
        square = TileConfig(128, 128, 32, 8, 3)
        found += variants(square, {}, {"num_stages": 4})
        if target >= (9, 0):
            found += variants(square, {"block_k": 64}, {"block_k": 64, "num_stages": 4})
    return found


def weight_grad_config(length: int, width: int, dtype: torch.dtype) -> SplitConfig:
    """Tiles of [width, tokens] x [tokens, K]; block_m is the step over tokens."""
    if dtype == torch.float32:
        return SplitConfig(32, fit(64, width), fit(64, length), 8, 2)
    return SplitConfig(64, fit(128, width), fit(128, length), 8, 3)


def weight_grad_candidates(length: int, width: int, dtype: torch.dtype) -> list[SplitConfig]:
    """Other splits, and steps over fewer tokens."""
    default = weight_grad_config(length, width, dtype)
    found = variants(default, {"programs": 1}, {"programs": 4}, {"num_stages": 2})
    if dtype == torch.float32:
        return found
    found += variants(default, {"block_m": 32}, {"block_m": 32, "num_stages": 4})
    if default.block_k == 128:
        found += variants(default, {"block_k": 64}, {"block_k": 64, "num_warps": 4, "programs": 4})
    return found


def image_grad_config(length: int, dtype: torch.dtype) -> TileConfig:
    """Tiles of [tokens, D] x [D, K]; block_n is the step over D."""
    if dtype == torch.float32:
        return TileConfig(64, 32, fit(64, length), 8, 2)
    return TileConfig(64, 64, fit(64, length), 8, 3)  # scattered addresses: larger tiles spill


def image_grad_candidates(length: int, dtype: torch.dtype) -> list[TileConfig]:
    """Other numbers of warps and stages, and steps over fewer channels."""
    default = image_grad_config(length, dtype)
    return variants(
        default, {"num_stages": 3}, {"num_stages": 4}, {"num_warps": 4}, {"block_n": 32}
    )


@dataclass(frozen=True)
class SumConfig:
    """block: values of the tokens of a batch that a program adds up over a part of the images.

    programs: into how many a multiprocessor the work is split.
    """

    block: int
    num_warps: int
    programs: int


# Eight values a thread, eight programs a multiprocessor: enough loads in flight for a plain sum.
TOKEN_GRAD_CONFIG = SumConfig(1024, 4, 8)


def token_grad_candidates() -> list[SumConfig]:
    """More and fewer loads in flight, and partial sums for the second stage."""
    return variants(
        TOKEN_GRAD_CONFIG,
        {"programs": 4},
        {"programs": 16},
        {"block": 512},
        {"block": 2048, "num_warps": 8, "programs": 4},
        {"block": 2048, "programs": 4},
    )


FORWARD = tunable("patch_embed.forward", TileConfig)
WEIGHT_GRAD = tunable("patch_embed.weight_grad", SplitConfig)
IMAGE_GRAD = tunable("patch_embed.image_grad", TileConfig)
TOKEN_GRAD = tunable("patch_embed.token_grad", SumConfig)


def weight_matrix(weight: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """The projection as [D, KP] in `dtype`, K in the order of the gather.

    KP is K rounded up to 16 (588 -> 592): rows then start on 16 bytes and loads stay wide. A dense
    weight of the right kind is viewed; otherwise this one copy also casts, pads and reorders.
    """
    source = weight.permute(0, 2, 3, 1) if channels_last else weight
    width, length = weight.shape[0], weight[0].numel()
    padded = cdiv(length, 16) * 16
    if source.dtype == dtype and padded == length and source.is_contiguous():
        return source.view(width, length)
    matrix = torch.empty(width, padded, dtype=dtype, device=weight.device)
    matrix[:, length:].zero_()
    matrix[:, :length].view(source.shape).copy_(source)
    return matrix


def is_channels_last(images: Tensor) -> bool:
    """Whether rows of pixels lie densely as [W, C] in memory."""
    channels = images.shape[1]
    return channels > 1 and images.stride(1) == 1 and images.stride(3) == channels


def dense(t: Tensor | None) -> Tensor | None:
    """A small argument as the kernels read it; parameters are dense already."""
    return None if t is None else t.contiguous()


def flip_bytes(flip: Tensor | None) -> Tensor | None:
    """Booleans as bytes, which is how they lie in memory."""
    return None if flip is None else flip.contiguous().view(torch.uint8)


def launch_forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    pad: bool,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """One launch; before it at most one small copy of the weight (see weight_matrix)."""
    batch, channels, height, image_width = images.shape
    width, _, patch_h, patch_w = weight.shape
    g = geometry(images, weight, pad)
    prefix_tokens = 0 if prefix is None else prefix.shape[0]
    out = weight.new_empty((batch, prefix_tokens + g.patches, width), dtype=out_dtype)
    channels_last = is_channels_last(images)
    matrix = weight_matrix(weight, compute_dtype, channels_last)
    as_bytes, target = images.dtype == torch.uint8, capability(images.device)
    config = FORWARD.pick(
        forward_config(
            batch * g.patches, width, compute_dtype, as_bytes, target, sm_count(images.device)
        ),
        images.device,
        compute_dtype,
        lambda: forward_candidates(width, compute_dtype, as_bytes, target),
        lambda: {
            "m": batch * g.patches,
            "n": width,
            "k": g.length,
            "patch": patch_w,
            "bytes": as_bytes,
            "cast": images.dtype not in (torch.uint8, compute_dtype),
            "nhwc": channels_last,
            "wide": out_dtype == torch.float32,
            "precision": precision_of(compute_dtype),
        },
    )
    tiles_m = cdiv(batch * g.patches, config.block_m) + cdiv(batch * prefix_tokens, config.block_m)
    launch(
        forward_kernel,
        (tiles_m * cdiv(width, config.block_n),),
        images,
        matrix,
        dense(bias),
        dense(pos_embed),
        dense(prefix),
        dense(mean),
        dense(std),
        flip_bytes(flip),
        out,
        batch,
        height,
        image_width,
        g.grid_w,
        g.patches,
        prefix_tokens,
        width,
        *images.stride(),
        C=channels,
        P=patch_h,
        Q=patch_w,
        KP=matrix.shape[1],
        POS_PREFIX=prefix is not None and pos_embed is not None and len(pos_embed) > g.patches,
        CHANNELS_LAST=channels_last,
        PADDED=pad,
        BYTES=images.dtype == torch.uint8,
        PRECISION=dot_precision(compute_dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def backward_launch(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    prefix_tokens: int,
    pad: bool,
    compute_dtype: torch.dtype,
    need_images: bool,
    need_weight: bool,
    need_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A kernel and a second stage for each gradient that is needed."""
    nothing = weight.new_empty(0)
    no_sums = grad.new_empty(0, dtype=torch.float32)
    d_images = (
        _launch_image_grad(grad, images, weight, std, flip, prefix_tokens, pad, compute_dtype)
        if need_images
        else nothing
    )
    d_weight = (
        _launch_weight_grad(
            grad, images, weight, mean, std, flip, prefix_tokens, pad, compute_dtype
        )
        if need_weight
        else weight.new_empty(0)
    )
    if not need_tokens:
        return d_images, d_weight, no_sums, grad.new_empty(0, dtype=torch.float32)
    d_tokens = _launch_token_grad(grad)
    return d_images, d_weight, column_sum(d_tokens[prefix_tokens:], torch.float32), d_tokens


def _launch_weight_grad(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    prefix_tokens: int,
    pad: bool,
    compute_dtype: torch.dtype,
) -> Tensor:
    batch, channels, height, image_width = images.shape
    width, _, patch_h, patch_w = weight.shape
    g = geometry(images, weight, pad)
    tokens = batch * g.patches
    config = WEIGHT_GRAD.pick(
        weight_grad_config(g.length, width, compute_dtype),
        images.device,
        compute_dtype,
        lambda: weight_grad_candidates(g.length, width, compute_dtype),
        lambda: {
            "m": tokens,
            "n": width,
            "k": g.length,
            "patch": patch_w,
            "bytes": images.dtype == torch.uint8,
            "cast": images.dtype not in (torch.uint8, compute_dtype),
            "wide": grad.dtype != compute_dtype,
            "nhwc": is_channels_last(images),
            "precision": precision_of(compute_dtype),
        },
    )
    tiles = cdiv(width, config.block_n) * cdiv(g.length, config.block_k)
    splits, steps = split(tokens, tiles, config, sm_count(images.device), compute_dtype)
    partial = torch.empty(splits, *weight.shape, dtype=torch.float32, device=weight.device)
    launch(
        weight_grad_kernel,
        (splits * tiles,),
        grad,
        images,
        dense(mean),
        dense(std),
        flip_bytes(flip),
        partial,
        batch,
        height,
        image_width,
        g.grid_w,
        g.patches,
        prefix_tokens,
        width,
        steps,
        *grad.stride(),
        *images.stride(),
        C=channels,
        P=patch_h,
        Q=patch_w,
        CHANNELS_LAST=is_channels_last(images),
        PADDED=pad,
        BYTES=images.dtype == torch.uint8,
        DTYPE=getattr(tl, dtype_name(compute_dtype)),
        PRECISION=dot_precision(compute_dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return column_sum(partial, weight.dtype)


def _launch_image_grad(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    std: Tensor | None,
    flip: Tensor | None,
    prefix_tokens: int,
    pad: bool,
    compute_dtype: torch.dtype,
) -> Tensor:
    batch, channels, height, image_width = images.shape
    width, _, patch_h, patch_w = weight.shape
    g = geometry(images, weight, pad)
    config = IMAGE_GRAD.pick(
        image_grad_config(g.length, compute_dtype),
        images.device,
        compute_dtype,
        lambda: image_grad_candidates(g.length, compute_dtype),
        lambda: {
            "m": batch * g.patches,
            "n": width,
            "k": g.length,
            "patch": patch_w,
            "wide": grad.dtype != compute_dtype,
            "nhwc": is_channels_last(images),
            "precision": precision_of(compute_dtype),
        },
    )
    matrix = weight_matrix(weight, compute_dtype, channels_last=False)
    complete = covered_pixels(images, weight, pad) == images.numel()
    d_images = torch.empty_like(images) if complete else torch.zeros_like(images)
    launch(
        image_grad_kernel,
        (cdiv(batch * g.patches, config.block_m) * cdiv(g.length, config.block_k),),
        grad,
        matrix,
        dense(std),
        flip_bytes(flip),
        d_images,
        batch,
        height,
        image_width,
        g.grid_w,
        g.patches,
        prefix_tokens,
        width,
        *grad.stride(),
        *d_images.stride(),
        C=channels,
        P=patch_h,
        Q=patch_w,
        KP=matrix.shape[1],
        PADDED=pad,
        PRECISION=dot_precision(compute_dtype),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return d_images


def _launch_token_grad(grad: Tensor) -> Tensor:
    """Sum of `grad` [B, L, D] over the batch, float32 [L, D]."""
    batch, tokens, width = grad.shape
    config = TOKEN_GRAD.pick(
        TOKEN_GRAD_CONFIG,
        grad.device,
        grad.dtype,
        token_grad_candidates,
        lambda: {
            "b": batch,
            "n": tokens,
            "d": width,
        },
    )
    tiles = cdiv(tokens * width, config.block)
    splits = max(1, min(config.programs * sm_count(grad.device) // max(1, tiles), batch))
    batch_per_split = cdiv(batch, splits)
    splits = cdiv(batch, batch_per_split) if batch else 0
    partial = torch.empty(splits, tokens, width, dtype=torch.float32, device=grad.device)
    launch(
        token_grad_kernel,
        (splits * tiles,),
        grad,
        partial,
        batch,
        tokens,
        width,
        batch_per_split,
        *grad.stride(),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return column_sum(partial, torch.float32)
