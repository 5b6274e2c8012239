"""A model as a file that runs without this package: ONNX, or a program of torch.export.

What is exported is the portable implementation of every op, that is ATen's own calls, whatever the
model runs on: no kernel of ours, and no custom operator, is in the file.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.model import ViT

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; 16-bit dtypes: 2e-2
_PROTOBUF_LIMIT = 2**31 - 2**24  # of one file, and the graph needs room, too


def export(
    model: ViT,
    path: str | os.PathLike[str],
    images: Tensor | None = None,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> Path:
    """Write a model as ``.onnx`` or as ``.pt2`` (torch.export), in evaluation mode.

    The model itself stays as it is. The input of an ONNX file is called "images", its output
    "logits".

    Args:
        model: a ViT, as it came or adapted (folded, pruned, with replaced modules that export).
        path: where to; the suffix chooses the format. ONNX weights of 2 GiB and more go to a file
            ``<path>.data`` beside it.
        images: an example [B, C, H, W], or [B, H, W, C] if uint8: the shape and dtype that the file
            will take; uint8 puts the normalisation into it. Default: the config's size in the
            dtype of the weights.
        dynamic_batch: any batch size, not the example's alone.
        check: run the file on random images (ONNX: where onnxruntime is installed), with
            `dynamic_batch` one more than the example has, and hold the result against the model's.

    Returns:
        `path`.

    Raises:
        ValueError: another suffix; images that don't fit the model; a file that can't be checked,
            for onnxruntime hasn't all ops in bfloat16 and float64; a result that differs by more
            than 1e-4 relative (2e-2 for weights of 16 bits).
        ModuleNotFoundError: ONNX without ``pip install 'vitkern[export]'``.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in FORMATS.items())
        raise ValueError(f"path must end in one of {known}, got {str(path)!r}")
    if not isinstance(model, ViT):
        raise TypeError(f"model must be a vitkern.ViT, got {type(model).__name__}")
    plain = portable(model)
    config, dtype = model.config, next(plain.parameters()).dtype
    if images is None:
        images = torch.zeros(2, config.in_chans, *config.img_size, dtype=dtype)
    images = images.detach().cpu()
    if dynamic_batch and images.dim() == 4 and len(images) < 2:
        images = images.expand(2, -1, -1, -1).contiguous()  # 0 and 1 are special sizes to a tracer
    with torch.no_grad():
        plain(images)  # an error about the images names them; one from inside a tracer would not
        shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
        program = torch.export.export(plain, (images,), dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt2":
        torch.export.save(program, path)
    else:
        _save_onnx(program, images, path, dynamic_batch)
    if check:
        _check(plain, path, torch.cat([images, images[:1]]) if dynamic_batch else images)
    return path


def portable(model: ViT) -> ViT:
    """A copy on the CPU, in evaluation mode, in which every op picks its implementation anew."""
    plain = copy.deepcopy(model).cpu().eval()
    module: Any
    for module in plain.modules():
        impl = getattr(module, "impl", None)
        if isinstance(impl, str):
            module.impl = "auto"
        elif isinstance(impl, dict):
            module.impl = dict.fromkeys(impl, "auto")
        if isinstance(getattr(module, "asked", None), str):
            module.asked = ""
    return plain


def _save_onnx(program: Any, images: Tensor, path: Path, dynamic_batch: bool) -> None:
    try:
        import onnx  # noqa: F401  both are needed, and the error of torch names but one
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        text = f"ONNX needs {error.name}: pip install 'vitkern[export]'"
        raise ModuleNotFoundError(text, name=error.name) from None
    size = sum(p.numel() * p.element_size() for p in program.state_dict.values())
    written = torch.onnx.export(
        program,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},) if dynamic_batch else None,
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    written.save(path, external_data=size > _PROTOBUF_LIMIT)


def _check(plain: nn.Module, path: Path, like: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    if like.dtype == torch.uint8:
        images = torch.randint(0, 256, like.shape, dtype=torch.uint8, generator=generator)
    else:
        images = torch.randn(like.shape, generator=generator).to(like.dtype)
    with torch.no_grad():
        expected = plain(images)
        if path.suffix == ".pt2":
            got = torch.export.load(path).module()(images)
        else:
            try:
                import onnxruntime
            except ModuleNotFoundError:
                return
            try:
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                got = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            except Exception as failure:  # its errors have no class in common
                why = f"onnxruntime can't run {path} here ({failure})"
                raise ValueError(f"{why}; check=False writes it all the same") from None
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)  # a new head's are 0
    error = ((got - expected).abs().max() / largest).item()
    allowed = _TOLERANCE.get(expected.dtype, 2e-2)
    if not error <= allowed:
        raise ValueError(f"{path} differs from the model by {error:.1e}, allowed are {allowed:.0e}")
