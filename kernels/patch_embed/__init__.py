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
Backward: dW = sum over tokens of dout^T x, split over tokens; sums of dout over the batch give
    dpos, dprefix and, added up over patches, dbias; all in two stages, no atomics. dimages, where
    asked for, is dout W scattered back: each pixel belongs to one patch, so nothing overlaps.
Saved for backward: the images and the weight.
Bytes: images + W + pos + out forward; images + dout + dW backward. FLOPs: 2 B N K D forward.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; the implicit product is that of
Chetlur et al., "cuDNN", 2014, whose receptive fields here do not overlap.

This folder in the order of an op file: reference.py, kernels.py, launch.py, and here samples,
costs, define(), autograd and the public function.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._launch import cdiv
from .._op import (
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
from .launch import backward_launch, launch_forward
from .reference import backward_reference, covered_pixels, geometry, portable, reference


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
    return Sample(label.strip(), args, {"pad": pad, "compute_dtype": same, "out_dtype": same})


def to_public(arguments: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments as those of `patch_embed`, which takes its compute dtype from autocast."""
    return {k: v for k, v in arguments.items() if k != "compute_dtype"}


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


PATCH_EMBED = define(
    "patch_embed",
    reference=reference,
    portable=portable,
    launcher=launch_forward,
    fake=fake,
    samples=samples,
    flops=flops,
    bytes_moved=bytes_moved,
    to_public=to_public,
)


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
        assert images is not None
        assert weight is not None
        assert pos is not None
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
    # Size by size: where sizes are left open, PyTorch 2.11's compiler finds no tuple in another.
    if pos_embed is not None and (
        pos_embed.dim() != 2
        or pos_embed.shape[1] != width
        or (pos_embed.shape[0] != tokens and pos_embed.shape[0] != g.patches)
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
            if t is not None and t.dtype != out_dtype:  # asked first: an export keeps the call
                out_dtype = torch.promote_types(out_dtype, t.dtype)
    tensors = (images, weight, bias, pos_embed, prefix, mean, std, flip)
    chosen = choose(PATCH_EMBED, impl, *tensors, dtype=compute_dtype)
    if chosen == "triton":
        if wants_grad(*tensors):
            return _PatchEmbed.apply(*tensors, pad, compute_dtype, out_dtype)
        return PATCH_EMBED.call(*tensors, pad, compute_dtype, out_dtype)
    run = PATCH_EMBED.portable if chosen == "torch" else PATCH_EMBED.reference
    return run(*tensors, pad, compute_dtype, out_dtype)
