"""Images straight to the token tensor: patchify, project, add positions, prepend the prefix tokens.

    x[b, n, k]      = normalised pixel k = (c, p, q) of patch n
    out[b, T + n]   = W x[b, n] + bias + pos[n]         W [D, C, P, Q] as [D, K], K = C P Q
    out[b, t]       = prefix[t] + pos[t]                class and register tokens, t < T

`pos_embed` has T + N rows, or N where the prefix gets no position ("no_embed_class").
Normalising: (value / 255 - mean[c]) / std[c] for uint8, (value - mean[c]) / std[c] for floats, only
where mean and std are given. Padding is zero after normalising, as eager code pads floats.

Forward:  images [B, C, H, W] by strides (NCHW, NHWC or any view), uint8 or floating point
          -> out [B, T + N, D]. One launch: an implicit product whose left side is gathered from the
    image and normalised in registers, never written unfolded. uint8 costs 1 byte a value.
    A horizontal flip of chosen samples is a sign in the address arithmetic.
Backward: dW = sum over tokens of dout^T x, split over tokens; sums of dout over the batch give dpos,
    dprefix and, added up over patches, dbias; all in two stages, no atomics. dimages, where asked
    for, is dout W scattered back: each pixel belongs to one patch, so nothing overlaps.
Saved for backward: the images and the weight.
Bytes: images + W + pos + out forward; images + dout + dW backward. FLOPs: 2 B N K D forward.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; the implicit product is that of
Chetlur et al., "cuDNN", 2014, whose receptive fields here do not overlap.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import capability, cdiv, dot_precision, launch, sm_count
from ._op import (
    Arg,
    Sample,
    accumulate_dtype,
    autocast_dtype,
    check_floating,
    check_shape,
    choose,
    define,
    dtype_name,
    same,
    total_bytes,
    wants_grad,
)
from ._reduce import column_sum
from ._triton import jit, tl


class Geometry(NamedTuple):
    """Sizes of one call: grid of patches, their number, and the length K of one."""

    grid_h: int
    grid_w: int
    patches: int
    length: int


def geometry(images: Tensor, weight: Tensor, pad: bool) -> Geometry:
    """Patches that fit into the images; with `pad` also those that reach over the lower right."""
    height, width = images.shape[2:]
    patch_h, patch_w = weight.shape[2:]
    grid_h = cdiv(height, patch_h) if pad else height // patch_h
    grid_w = cdiv(width, patch_w) if pad else width // patch_w
    return Geometry(grid_h, grid_w, grid_h * grid_w, weight[0].numel())


def patchify(
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    pad: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Normalised patches [B, N, K] in `dtype`, each in the order (c, p, q)."""
    x = images.to(dtype)
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None and std is not None:
        x = (x - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    g = geometry(images, weight, pad)
    height, width = g.grid_h * weight.shape[2], g.grid_w * weight.shape[3]
    if pad:
        x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
    x = x[:, :, :height, :width].reshape(
        x.shape[0], x.shape[1], g.grid_h, weight.shape[2], g.grid_w, weight.shape[3]
    )
    return x.permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], g.patches, g.length)


def assemble(patches: Tensor, pos_embed: Tensor | None, prefix: Tensor | None) -> Tensor:
    """Prefix tokens and positions around the projected patches [B, N, D]."""
    if prefix is None:
        return patches if pos_embed is None else patches + pos_embed
    rows = prefix.expand(patches.shape[0], -1, -1)
    if pos_embed is not None and pos_embed.shape[0] == patches.shape[1]:
        return torch.cat([rows, patches + pos_embed], dim=1)
    tokens = torch.cat([rows, patches], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed


def reference(
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
    """The definition, accumulated in float32 (float64 where the weight is float64)."""
    acc = accumulate_dtype(weight)
    x = patchify(images, weight, mean, std, flip, pad, acc)
    y = x @ weight.flatten(1).to(acc).t()
    if bias is not None:
        y = y + bias.to(acc)
    pos_embed, prefix = (None if t is None else t.to(acc) for t in (pos_embed, prefix))
    return assemble(y, pos_embed, prefix).to(out_dtype).contiguous()


def portable(
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
    """ATen: unfold, then one product; on CPUs that is faster than the convolution."""
    acc = accumulate_dtype(weight)
    normalised = mean is not None or images.dtype == torch.uint8
    x = patchify(images, weight, mean, std, flip, pad, acc if normalised else compute_dtype)
    y = F.linear(
        x.to(compute_dtype),
        weight.flatten(1).to(compute_dtype),
        None if bias is None else bias.to(compute_dtype),
    )
    pos_embed, prefix = (None if t is None else t.to(out_dtype) for t in (pos_embed, prefix))
    return assemble(y.to(out_dtype), pos_embed, prefix).contiguous()


@jit
def _gather(
    images,
    mean,
    std,
    flipped,  # [BLOCK_M] whether the row's sample is flipped, or None
    base,  # [BLOCK_M] offset of the row's image
    top,  # [BLOCK_M] first image row of the patch
    left,  # [BLOCK_M] first image column of the patch
    valid,  # [BLOCK_M]
    k,  # [BLOCK_K]
    H,
    W,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Normalised patch values [BLOCK_M, BLOCK_K] as DTYPE."""
    if CHANNELS_LAST:  # k = (p, q, c): neighbours in k are neighbours in memory
        c, p, q = k % C, k // (Q * C), (k // C) % Q
    else:  # k = (c, p, q)
        c, p, q = k // (P * Q), (k // Q) % P, k % Q
    mask = valid[:, None]
    if not EVEN_K:
        mask = mask & (k < C * P * Q)[None, :]
    if PADDED:
        mask = mask & (top[:, None] + p[None, :] < H) & (left[:, None] + q[None, :] < W)
    if flipped is not None:
        column = left[:, None] + q[None, :]
        column = tl.where(flipped[:, None], W - 1 - column, column).to(tl.int64)
        row = base + top.to(tl.int64) * stride_h
        within = c.to(tl.int64) * stride_c + p.to(tl.int64) * stride_h
        offsets = row[:, None] + within[None, :] + column * stride_w
    else:
        row = base + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
        if CHANNELS_LAST:
            # The launcher has checked stride_c == 1 and stride_w == C: one run of Q * C values.
            within = p.to(tl.int64) * stride_h + k % (Q * C)
        else:
            within = c.to(tl.int64) * stride_c + p.to(tl.int64) * stride_h
            within += q.to(tl.int64) * stride_w
        offsets = row[:, None] + within[None, :]
    x = tl.load(images + offsets, mask=mask, other=0)
    if mean is not None:
        in_range = c < C
        gain = 1.0 / tl.load(std + c, mask=in_range, other=1.0).to(tl.float32)
        shift = tl.load(mean + c, mask=in_range, other=0.0).to(tl.float32) * gain
        if BYTES:
            gain = gain / 255.0
        x = tl.where(mask, x.to(tl.float32) * gain[None, :] - shift[None, :], 0.0)
    return x.to(DTYPE)


@jit
def _forward_kernel(
    images,  # [B, C, H, W] by strides
    weight,  # [D, KP] in the compute dtype, zero beyond K
    bias,  # [D] or None
    pos,  # [N or T + N, D] or None
    prefix,  # [T, D] or None
    mean,  # [C] or None
    std,  # [C] or None
    flip,  # [B] uint8 or None
    out,  # [B, T + N, D] contiguous
    B,
    H,
    W,
    GRID_W,
    N,
    T,
    D,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    KP: tl.constexpr,
    POS_PREFIX: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDED: tl.constexpr,
    BYTES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Column tiles of one row tile are neighbours, so the gathered images come from L2 after the
    # first of them.
    tiles_n = tl.cdiv(D, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    d = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d_mask = d < D
    tiles_patch = tl.cdiv(B * N, BLOCK_M)

    if tile_m < tiles_patch:
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = m < B * N
        b, n = m // N, m % N
        base = b.to(tl.int64) * stride_b
        top, left = (n // GRID_W) * P, (n % GRID_W) * Q
        flipped = None
        if flip is not None:
            flipped = tl.load(flip + b, mask=valid, other=0) != 0
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for start in range(0, KP, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = _gather(
                images,
                mean,
                std,
                flipped,
                base,
                top,
                left,
                valid,
                k,
                H,
                W,
                stride_c,
                stride_h,
                stride_w,
                C,
                P,
                Q,
                CHANNELS_LAST,
                PADDED,
                (C * P * Q) % BLOCK_K == 0,
                BYTES,
                weight.dtype.element_ty,
            )
            w_mask = d_mask[None, :]
            if KP % BLOCK_K != 0:
                w_mask = w_mask & (k < KP)[:, None]
            w = tl.load(weight + d[None, :].to(tl.int64) * KP + k[:, None], mask=w_mask, other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if bias is not None:
            acc += tl.load(bias + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        mask = valid[:, None] & d_mask[None, :]
        if pos is not None:
            row = n + T if POS_PREFIX else n
            places = row[:, None] * D + d[None, :]
            acc += tl.load(pos + places, mask=mask, other=0.0).to(tl.float32)
        token = b.to(tl.int64) * (T + N) + T + n
        tl.store(
            out + token[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=mask
        )
    elif prefix is not None:
        # The last row tiles write the class and register tokens.
        r = (tile_m - tiles_patch) * BLOCK_M + tl.arange(0, BLOCK_M)
        b, t = r // T, r % T
        mask = (r < B * T)[:, None] & d_mask[None, :]
        places = t[:, None] * D + d[None, :]
        y = tl.load(prefix + places, mask=mask, other=0.0).to(tl.float32)
        if POS_PREFIX:
            y += tl.load(pos + places, mask=mask, other=0.0).to(tl.float32)
        token = b.to(tl.int64) * (T + N) + t
        tl.store(out + token[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)


@jit
def _weight_grad_kernel(
    grad,  # [B, T + N, D] by strides
    images,  # [B, C, H, W] by strides
    mean,  # [C] or None
    std,  # [C] or None
    flip,  # [B] uint8 or None
    partial,  # [SPLITS, D, C, P, Q] float32
    B,
    H,
    W,
    GRID_W,
    N,
    T,
    D,
    tokens_per_split,
    grad_b,
    grad_n,
    grad_d,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDED: tl.constexpr,
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = C * P * Q
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_d = tl.cdiv(D, BLOCK_N)
    split = tl.program_id(0) // (tiles_d * tiles_k)
    tile = tl.program_id(0) % (tiles_d * tiles_k)
    d = (tile // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tile % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    d_mask = d < D
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, B * N)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        valid = m < last
        b, n = m // N, m % N
        base = b.to(tl.int64) * stride_b
        top, left = (n // GRID_W) * P, (n % GRID_W) * Q
        flipped = None
        if flip is not None:
            flipped = tl.load(flip + b, mask=valid, other=0) != 0
        x = _gather(
            images,
            mean,
            std,
            flipped,
            base,
            top,
            left,
            valid,
            k,
            H,
            W,
            stride_c,
            stride_h,
            stride_w,
            C,
            P,
            Q,
            CHANNELS_LAST,
            PADDED,
            K % BLOCK_K == 0,
            BYTES,
            DTYPE,
        )
        token = b.to(tl.int64) * grad_b + (n + T).to(tl.int64) * grad_n
        places = token[:, None] + d[None, :].to(tl.int64) * grad_d
        dy = tl.load(grad + places, mask=valid[:, None] & d_mask[None, :], other=0.0).to(DTYPE)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    if CHANNELS_LAST:  # back to the parameter's order (c, p, q)
        place = (k % C) * (P * Q) + k // C
    else:
        place = k
    rows = (split.to(tl.int64) * D + d)[:, None] * K
    tl.store(partial + rows + place[None, :], acc, mask=d_mask[:, None] & (k < K)[None, :])


@jit
def _image_grad_kernel(
    grad,  # [B, T + N, D] by strides
    weight,  # [D, KP] in the compute dtype, zero beyond K
    std,  # [C] or None
    flip,  # [B] uint8 or None
    d_images,  # [B, C, H, W] by strides
    B,
    H,
    W,
    GRID_W,
    N,
    T,
    D,
    grad_b,
    grad_n,
    grad_d,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    KP: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    K: tl.constexpr = C * P * Q
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    m = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = m < B * N
    b, n = m // N, m % N
    token = b.to(tl.int64) * grad_b + (n + T).to(tl.int64) * grad_n
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        d_mask = d < D
        places = token[:, None] + d[None, :].to(tl.int64) * grad_d
        dy = tl.load(grad + places, mask=valid[:, None] & d_mask[None, :], other=0.0)
        rows = d[:, None].to(tl.int64) * KP + k[None, :]
        w = tl.load(weight + rows, mask=d_mask[:, None] & (k < KP)[None, :], other=0.0)
        acc = tl.dot(dy.to(w.dtype), w, acc, input_precision=PRECISION)
    c, p, q = k // (P * Q), (k // Q) % P, k % Q
    if std is not None:
        acc *= (1.0 / tl.load(std + c, mask=c < C, other=1.0).to(tl.float32))[None, :]
    row = ((n // GRID_W) * P)[:, None] + p[None, :]
    column = ((n % GRID_W) * Q)[:, None] + q[None, :]
    mask = valid[:, None] & (k < K)[None, :]
    if PADDED:
        mask = mask & (row < H) & (column < W)
    if flip is not None:
        flipped = tl.load(flip + b, mask=valid, other=0) != 0
        column = tl.where(flipped[:, None], W - 1 - column, column)
    pixel = (b.to(tl.int64) * stride_b)[:, None] + (c.to(tl.int64) * stride_c)[None, :]
    pixel += row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    tl.store(d_images + pixel, acc.to(d_images.dtype.element_ty), mask=mask)


@jit
def _token_grad_kernel(
    grad,  # [B, L, D] by strides
    partial,  # [SPLITS, L, D] float32
    B,
    L,
    D,
    batch_per_split,
    grad_b,
    grad_n,
    grad_d,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(L * D, BLOCK)
    split = tl.program_id(0) // tiles
    e = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = e < L * D
    first = split * batch_per_split
    place = (e // D).to(tl.int64) * grad_n + (e % D).to(tl.int64) * grad_d
    place += first.to(tl.int64) * grad_b
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(first, tl.minimum(first + batch_per_split, B)):
        total += tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        place += grad_b
    tl.store(partial + split.to(tl.int64) * L * D + e, total, mask=mask)


@dataclass(frozen=True)
class TileConfig:
    """Tile of a product: rows, columns and depth of one step; warps; software-pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def fit(block: int, size: int) -> int:
    """`block`, or the power of two from 16 (the least `tl.dot` takes) that already covers `size`."""
    while block > 16 and block >= 2 * size:
        block //= 2
    return block


def forward_config(
    tokens: int, width: int, dtype: torch.dtype, target: tuple[int, int], sms: int
) -> TileConfig:
    """Tiles of the projection [tokens, K] x [K, width]."""
    if dtype == torch.float32:  # FMA units or TF32: small tiles, the operands are twice as wide
        return TileConfig(64, fit(64, width), 32, 4, 3)
    if cdiv(tokens, 128) * cdiv(width, 128) < 2 * sms:  # few images: more, smaller programs
        return TileConfig(64, fit(64, width), 64, 4, 4)
    if target >= (9, 0):  # one warpgroup a 64-row half; 2 x 48 KiB a stage keeps wgmma fed
        return TileConfig(128, fit(128, width), 64, 8, 4)
    return TileConfig(128, fit(128, width), 32, 8, 4)


def weight_grad_config(length: int, width: int, dtype: torch.dtype) -> TileConfig:
    """Tiles of [width, tokens] x [tokens, K]; block_m is the step over tokens."""
    if dtype == torch.float32:
        return TileConfig(32, fit(64, width), fit(64, length), 4, 2)
    return TileConfig(64, fit(128, width), fit(128, length), 8, 3)


def image_grad_config(length: int, dtype: torch.dtype) -> TileConfig:
    """Tiles of [tokens, D] x [D, K]; block_n is the step over D."""
    if dtype == torch.float32:
        return TileConfig(64, 32, fit(64, length), 4, 2)
    return TileConfig(128, 64, fit(64, length), 4, 3)


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
    matrix[:, length:] = 0
    matrix[:, :length].view(source.shape).copy_(source)
    return matrix


def is_channels_last(images: Tensor) -> bool:
    """Whether rows of pixels lie densely as [W, C] in memory."""
    channels = images.shape[1]
    return channels > 1 and images.stride(1) == 1 and images.stride(3) == channels


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
    config = forward_config(
        batch * g.patches,
        width,
        compute_dtype,
        capability(images.device),
        sm_count(images.device),
    )
    tiles_m = cdiv(batch * g.patches, config.block_m) + cdiv(batch * prefix_tokens, config.block_m)
    launch(
        _forward_kernel,
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


def dense(t: Tensor | None) -> Tensor | None:
    """A small argument as the kernels read it; parameters are dense already."""
    return None if t is None else t.contiguous()


def flip_bytes(flip: Tensor | None) -> Tensor | None:
    """Booleans as bytes, which is how they lie in memory."""
    return None if flip is None else flip.contiguous().view(torch.uint8)


def fake(
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
    """Shape, dtype and strides of the output."""
    tokens = geometry(images, weight, pad).patches + (0 if prefix is None else prefix.shape[0])
    return weight.new_empty((images.shape[0], tokens, weight.shape[0]), dtype=out_dtype)


def samples(size: str) -> Iterable[Sample]:
    """Odd grids, patches and layouts; or the paper's models at 224 px, batch 128."""
    if size == "tiny":
        yield _sample(2, 3, (8, 8), (4, 4), 24, "class token")
        yield _sample(2, 3, (9, 14), (4, 3), 20, "pad nhwc uint8", prefix=3)
        yield _sample(3, 1, (4, 6), (2, 2), 17, "no_embed_class flip", prefix=2)
        yield _sample(2, 3, (7, 9), (3, 4), 33, "cut off flip nhwc uint8", prefix=0)
        yield _sample(1, 3, (28, 14), (14, 14), 40, "uint8")
        yield _sample(0, 3, (8, 8), (4, 4), 16, "no images")
    else:
        for width, patch, kind in (
            (192, 16, ""),
            (768, 16, ""),
            (768, 16, "uint8"),
            (768, 16, "nhwc uint8"),
            (768, 32, ""),
            (1024, 16, ""),
            (1280, 14, ""),
            (1280, 14, "nhwc uint8"),
        ):
            yield _sample(128, 3, (224, 224), (patch, patch), width, kind)


def _sample(
    batch: int,
    channels: int,
    image: tuple[int, int],
    patch: tuple[int, int],
    width: int,
    kind: str,
    prefix: int = 1,
) -> Sample:
    pad, flip = "pad" in kind, "flip" in kind
    rows = [cdiv(s, p) if pad else s // p for s, p in zip(image, patch, strict=True)]
    pos = rows[0] * rows[1] + (0 if "no_embed_class" in kind else prefix)
    as_bytes = "uint8" in kind
    length = channels * patch[0] * patch[1]
    pixels = Arg(
        (batch, channels, *image),
        dtype=torch.uint8 if as_bytes else None,
        channels_last="nhwc" in kind,
    )
    moment = Arg((channels,), dtype=torch.float32, scale=0.01, offset=0.5) if as_bytes else None
    args = {
        "images": pixels,
        "weight": Arg((width, channels, *patch), scale=length**-0.5),
        "bias": Arg((width,)),
        "pos_embed": Arg((pos, width)),
        "prefix": Arg((prefix, width)) if prefix else None,
        "mean": moment,
        "std": moment,
        "flip": Arg((batch,), dtype=torch.bool) if flip else None,
    }
    label = f"{batch}x{channels}x{image[0]}x{image[1]} /{patch[0]}x{patch[1]} D={width} {kind}"
    return Sample(
        label.strip(), args, {"pad": pad, "compute_dtype": same, "out_dtype": same}
    )


def flops(images: Tensor, weight: Tensor, pad: bool, **_: Any) -> int:
    """The product over all patches."""
    return 2 * images.shape[0] * geometry(images, weight, pad).patches * weight.numel()


def bytes_moved(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    pad: bool,
    out_dtype: torch.dtype,
    **_: Any,
) -> int:
    """The pixels that lie in patches and the parameters in, the tokens out."""
    g = geometry(images, weight, pad)
    tokens = g.patches + (0 if prefix is None else prefix.shape[0])
    out = images.shape[0] * tokens * weight.shape[0] * out_dtype.itemsize
    parameters = total_bytes(weight, bias, pos_embed, prefix, mean, std, flip)
    return covered_pixels(images, weight, pad) * images.element_size() + parameters + out


def covered_pixels(images: Tensor, weight: Tensor, pad: bool) -> int:
    """Pixel values inside some patch."""
    g = geometry(images, weight, pad)
    height = min(images.shape[2], g.grid_h * weight.shape[2])
    width = min(images.shape[3], g.grid_w * weight.shape[3])
    return images.shape[0] * images.shape[1] * height * width


PATCH_EMBED = define(
    "patch_embed",
    reference=reference,
    portable=portable,
    launcher=launch_forward,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
)


def backward_reference(
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
    """(d_images, d_weight, d_bias [D], d_tokens [T + N, D]); empty where not needed.

    d_tokens is the gradient summed over the batch: its rows are those of dprefix and dpos. d_bias and
    d_tokens are float32, d_weight has the dtype of the weight.
    """
    acc = accumulate_dtype(grad, weight)
    tokens = grad.to(acc).sum(0)
    dy = grad.to(acc)[:, prefix_tokens:]
    d_images = d_weight = d_bias = d_tokens = weight.new_empty(0)
    if need_images:
        d_images = _unpatchify(dy @ weight.flatten(1).to(acc), images, weight, std, flip, pad)
    if need_weight:
        x = patchify(images, weight, mean, std, flip, pad, acc)
        d_weight = torch.einsum("bnd,bnk->dk", dy, x).view(weight.shape).to(weight.dtype)
    if need_tokens:
        d_bias, d_tokens = tokens[prefix_tokens:].sum(0), tokens
    return (
        d_images if need_images else weight.new_empty(0),
        d_weight.contiguous() if need_weight else weight.new_empty(0),
        d_bias if need_tokens else grad.new_empty(0, dtype=acc),
        d_tokens if need_tokens else grad.new_empty(0, dtype=acc),
    )


def _unpatchify(
    x: Tensor, images: Tensor, weight: Tensor, std: Tensor | None, flip: Tensor | None, pad: bool
) -> Tensor:
    """Gradient of the images from the gradient [B, N, K] of normalised patches."""
    g, (channels, patch_h, patch_w) = geometry(images, weight, pad), weight.shape[1:]
    x = x.view(x.shape[0], g.grid_h, g.grid_w, channels, patch_h, patch_w)
    x = x.permute(0, 3, 1, 4, 2, 5).reshape(
        x.shape[0], channels, g.grid_h * patch_h, g.grid_w * patch_w
    )
    height, width = images.shape[2:]
    x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))  # crops where negative
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    if std is not None:
        x = x / std.to(x.dtype)[:, None, None]
    return torch.empty_like(images).copy_(x)


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
    config = weight_grad_config(g.length, width, compute_dtype)
    tokens = batch * g.patches
    tiles = cdiv(width, config.block_n) * cdiv(g.length, config.block_k)
    # One wave of two programs a multiprocessor, each with at least four steps to do.
    splits = max(1, min(2 * sm_count(images.device) // tiles, tokens // (4 * config.block_m)))
    tokens_per_split = cdiv(cdiv(tokens, splits), config.block_m) * config.block_m
    splits = cdiv(tokens, tokens_per_split) if tokens else 0
    partial = torch.empty(splits, *weight.shape, dtype=torch.float32, device=weight.device)
    launch(
        _weight_grad_kernel,
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
        tokens_per_split,
        *grad.stride(),
        *images.stride(),
        C=channels,
        P=patch_h,
        Q=patch_w,
        CHANNELS_LAST=is_channels_last(images),
        PADDED=pad,
        BYTES=images.dtype == torch.uint8,
        DTYPE=TRITON_DTYPES[compute_dtype],
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
    config = image_grad_config(g.length, compute_dtype)
    matrix = weight_matrix(weight, compute_dtype, channels_last=False)
    complete = covered_pixels(images, weight, pad) == images.numel()
    d_images = torch.empty_like(images) if complete else torch.zeros_like(images)
    launch(
        _image_grad_kernel,
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
    block = 1024
    tiles = cdiv(tokens * width, block)
    # Eight programs a multiprocessor keep enough loads in flight for a plain sum.
    splits = max(1, min(8 * sm_count(grad.device) // max(1, tiles), batch))
    batch_per_split = cdiv(batch, splits)
    splits = cdiv(batch, batch_per_split) if batch else 0
    partial = torch.empty(splits, tokens, width, dtype=torch.float32, device=grad.device)
    launch(
        _token_grad_kernel,
        (splits * tiles,),
        grad,
        partial,
        batch,
        tokens,
        width,
        batch_per_split,
        *grad.stride(),
        BLOCK=block,
    )
    return column_sum(partial, torch.float32)


def backward_fake(
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
    """Shapes, dtypes and strides of the outputs."""
    acc = accumulate_dtype(grad, weight)
    return (
        torch.empty_like(images) if need_images else weight.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        grad.new_empty(grad.shape[2] if need_tokens else 0, dtype=acc),
        grad.new_empty(grad.shape[1:] if need_tokens else (0,), dtype=acc),
    )


def backward_samples(size: str) -> Iterable[Sample]:
    """The forward's samples with a gradient; the images' own where they are floating point."""
    for sample in samples(size):
        args = sample.args
        images, weight, pos, prefix = (
            args[name] for name in ("images", "weight", "pos_embed", "prefix")
        )
        assert images is not None and weight is not None and pos is not None
        tokens = 0 if prefix is None else prefix.shape[0]
        rows = pos.shape[0] + (tokens if "no_embed_class" in sample.label else 0)
        grad = Arg((images.shape[0], rows, weight.shape[0]))
        kept = {name: args[name] for name in ("images", "weight", "mean", "std", "flip")}
        yield Sample(
            sample.label,
            {"grad": grad, **kept},
            {
                "prefix_tokens": tokens,
                "pad": sample.options["pad"],
                "compute_dtype": same,
                # Training a ViT never asks for the images' gradient: not in the timed grid.
                "need_images": size == "tiny" and images.dtype != torch.uint8,
                "need_weight": True,
                "need_tokens": True,
            },
        )


def backward_flops(
    images: Tensor, weight: Tensor, pad: bool, need_images: bool, need_weight: bool, **_: Any
) -> int:
    """One product a gradient."""
    return flops(images, weight, pad) * (need_images + need_weight)


def backward_bytes_moved(
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    flip: Tensor | None,
    pad: bool,
    need_images: bool,
    need_weight: bool,
    need_tokens: bool,
    **_: Any,
) -> int:
    """Gradient and images in; the gradients that are needed out."""
    pixels = covered_pixels(images, weight, pad) * images.element_size()
    moved = total_bytes(grad, std, flip)
    if need_images:
        moved += total_bytes(images, weight)
    if need_weight:
        moved += pixels + total_bytes(weight, mean)
    if need_tokens:
        moved += 4 * (grad.shape[1] + 1) * grad.shape[2]
    return moved


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

PATCH_EMBED_BACKWARD = define(
    "patch_embed_backward",
    reference=backward_reference,
    launcher=backward_launch,
    fake=backward_fake,
    samples=backward_samples,
    flops=backward_flops,
    bytes_moved=backward_bytes_moved,
    backward_of="patch_embed",
)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, images, weight, bias, pos_embed, prefix, mean, std, flip, pad, compute_dtype, out_dtype
    ):
        ctx.save_for_backward(images, weight, mean, std, flip)
        ctx.pad, ctx.compute_dtype = pad, compute_dtype
        ctx.prefix_tokens = 0 if prefix is None else prefix.shape[0]
        ctx.pos_tokens = 0 if pos_embed is None else pos_embed.shape[0]
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, pos_embed, prefix)]
        return PATCH_EMBED.call(
            images, weight, bias, pos_embed, prefix, mean, std, flip, pad, compute_dtype, out_dtype
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        images, weight, mean, std, flip = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        d_images, d_weight, d_bias, d_tokens = PATCH_EMBED_BACKWARD.call(
            grad,
            images,
            weight,
            mean,
            std,
            flip,
            ctx.prefix_tokens,
            ctx.pad,
            ctx.compute_dtype,
            needs[0],
            needs[1],
            any(needs[2:]),
        )
        bias_dtype, pos_dtype, prefix_dtype = ctx.dtypes
        return (
            d_images if needs[0] else None,
            d_weight if needs[1] else None,
            d_bias.to(bias_dtype) if needs[2] else None,
            d_tokens[d_tokens.shape[0] - ctx.pos_tokens :].to(pos_dtype) if needs[3] else None,
            d_tokens[: ctx.prefix_tokens].to(prefix_dtype) if needs[4] else None,
            *(None,) * 6,
        )


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    flip: Tensor | None = None,
    pad: bool = False,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Images to tokens: patchify, project, add positions, prepend class and register tokens.

    Under autocast the product runs in autocast's dtype.

    Args:
        images: [B, C, H, W] with any strides (NHWC data: a permuted view), uint8 or floating point;
            floats are rounded to the dtype of the product as they are read.
        weight: projection [D, C, P, Q], the weight of the equivalent convolution.
        bias: [D], or None.
        pos_embed: positions [T + N, D], or [N, D] where the prefix tokens get none, or None.
        prefix: class and register tokens [T, D], or None.
        mean, std: per-channel constants [C], float32, of pixel values scaled to 0..1 (uint8; then
            required) or as they are (floats; then optional). No gradient.
        flip: bool [B], samples to mirror horizontally, or None.
        pad: pad bottom and right with zeros to whole patches; otherwise what is over is cut off.
        out_dtype: dtype of the tokens; if None what eager PyTorch would return, which under
            autocast is the dtype of the positions.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        Tokens [B, T + N, D], contiguous, with N = (H / P) * (W / Q) patches in row-major order.

    Raises:
        TypeError: a dtype other than above.
        ValueError: a shape other than above, tensors on several devices, an `impl` that can't run.
    """
    name = "patch_embed"
    check_floating(
        name, weight=weight, bias=bias, pos_embed=pos_embed, prefix=prefix, mean=mean, std=std
    )
    check_shape(name, "weight", weight, "D", "C", "P", "Q")
    width, channels, patch_h, patch_w = weight.shape
    check_shape(name, "images", images, "B", channels, "H", "W")
    if images.device != weight.device:
        raise ValueError(f"{name}: images are on {images.device} and weight on {weight.device}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(
            f"{name}: images must be uint8 or floating point, got {dtype_name(images.dtype)}"
        )
    if (mean is None) != (std is None) or (images.dtype == torch.uint8 and mean is None):
        raise ValueError(f"{name}: mean and std go together, and uint8 images need them")
    check_shape(name, "bias", bias, width)
    check_shape(name, "mean", mean, channels)
    check_shape(name, "std", std, channels)
    g = geometry(images, weight, pad)
    if g.patches == 0:
        raise ValueError(
            f"{name}: images must hold at least one patch of {patch_h} x {patch_w}, "
            f"got {list(images.shape)}"
        )
    check_shape(name, "prefix", prefix, "T", width)
    tokens = g.patches + (0 if prefix is None else prefix.shape[0])
    if pos_embed is not None and tuple(pos_embed.shape) not in (
        (tokens, width),
        (g.patches, width),
    ):
        raise ValueError(
            f"{name}: pos_embed must be [{tokens}, {width}] (or [{g.patches}, {width}] without "
            f"rows for the prefix), got {list(pos_embed.shape)}"
        )
    if flip is not None:
        if flip.dtype != torch.bool:
            raise TypeError(f"{name}: flip must be bool, got {dtype_name(flip.dtype)}")
        check_shape(name, "flip", flip, images.shape[0])
    compute_dtype = weight.dtype
    if weight.dtype != torch.float64:
        compute_dtype = autocast_dtype(images.device) or weight.dtype
    if out_dtype is None:
        out_dtype = compute_dtype
        for t in (pos_embed, prefix):
            out_dtype = out_dtype if t is None else torch.promote_types(out_dtype, t.dtype)
    tensors = (images, weight, bias, pos_embed, prefix, mean, std, flip)
    chosen = choose(PATCH_EMBED, impl, *tensors)
    if chosen == "triton":
        if wants_grad(*tensors):
            return _PatchEmbed.apply(*tensors, pad, compute_dtype, out_dtype)
        return PATCH_EMBED.call(*tensors, pad, compute_dtype, out_dtype)
    run = portable if chosen == "torch" else reference
    return run(*tensors, pad, compute_dtype, out_dtype)
