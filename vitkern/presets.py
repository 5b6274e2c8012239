"""PRESETS: the arguments of ViTs by timm's names."""

from typing import Any

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
}
_VARIANTS = """
tiny_patch16_224 tiny_patch16_384
small_patch8_224 small_patch16_224 small_patch16_384 small_patch32_224 small_patch32_384
base_patch8_224 base_patch16_224 base_patch16_384 base_patch32_224 base_patch32_384
large_patch14_224 large_patch16_224 large_patch16_384 large_patch32_224 large_patch32_384
huge_patch14_224 giant_patch14_224 gigantic_patch14_224
"""
# timm's default weights of these were trained without a classifier that it kept.
_HEADLESS = ("small_patch8_224", "large_patch32_224", "huge_patch14_224")


def _preset(variant: str) -> dict[str, Any]:
    size, patch, image = variant.split("_")
    headless = {"num_classes": 0} if variant in _HEADLESS else {}
    patch_size = int(patch.removeprefix("patch"))
    return {"img_size": int(image), "patch_size": patch_size, **_SIZES[size], **headless}


PRESETS: dict[str, dict[str, Any]] = {f"vit_{v}": _preset(v) for v in _VARIANTS.split()}
