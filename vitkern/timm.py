"""vitkern's models in timm's registry, and timm's scripts run with them.

`import vitkern.timm` registers every preset as `vitkern_<name>`:

    timm.create_model("vitkern_vit_base_patch16_224", pretrained=True, num_classes=10)

takes what timm's entry of that name takes (tags, `img_size`, `in_chans`, `drop_path_rate`,
`features_only`, ...) and vitkern's own arguments (`impl`, `residual_dtype`, ...). With
`pretrained=True` the weights are timm's own, found, read and fitted by timm. A script that calls
`timm.create_model` runs as it is, in one process or under torchrun:

    python -m vitkern.timm train.py --model vitkern_vit_base_patch16_224 DATA ...
    torchrun --nproc-per-node=8 -m vitkern.timm train.py --model vitkern_vit_base_patch16_224 ...
"""

import functools
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    from timm import models as _timm
    from timm.models import vision_transformer as _plain
    from timm.models import vision_transformer_hybrid as _hybrid
    from timm.models import vision_transformer_relpos as _relpos
except ImportError as error:
    raise ImportError(f"vitkern.timm needs timm: pip install 'vitkern[timm]' ({error})") from error

from vitkern import model as _model
from vitkern.model.config import ViTConfig
from vitkern.model.presets import PRESETS

PREFIX = "vitkern_"
default_cfgs: dict[str, Any] = {}  # timm reads a module's weights from here when it registers


class ViT(_model.ViT):
    """`vitkern.ViT` with the one method that timm's model has for a file format."""

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Weights from one of Google's .npz files, by timm's reader."""
        _plain.VisionTransformer.load_pretrained(self, checkpoint_path, prefix)


def _filter(name: str) -> Callable[..., Any] | None:
    """timm's function that fits a file's state dict to the model `name`."""
    if "relpos" in name:
        return getattr(_relpos, "checkpoint_filter_fn", None)  # timm 1.0.15 needs none
    if "embed_layer" in PRESETS[name]:
        return _hybrid.checkpoint_filter_fn
    if name.startswith("deit"):
        return functools.partial(_plain.checkpoint_filter_fn, adapt_layer_scale=True)
    if "flexi" in name:
        linear = {"interpolation": "bilinear", "antialias": False}
        return functools.partial(_plain.checkpoint_filter_fn, **linear)
    if "radio" in name:
        corners = name in ("vit_base_patch16_radio_v3", "vit_huge_patch16_radio_v3")
        linear = {"interpolation": "bilinear", "antialias": False, "align_corners": corners}
        return functools.partial(_plain.checkpoint_filter_fn, **linear)
    return _plain.checkpoint_filter_fn


def _create(
    name: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """The model of a preset, with what timm's cfg says of its weights: size, classes, mean, std."""
    cfg = _timm.resolve_pretrained_cfg(PREFIX + name, pretrained_cfg, pretrained_cfg_overlay)
    channels = arguments.setdefault("in_chans", cfg.input_size[0])
    for key, value in (("mean", cfg.mean), ("std", cfg.std)):
        fits = len(value) == channels
        arguments.setdefault(key, tuple(value) if fits else sum(value) / len(value))
    feature_cfg = {"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}
    strict = arguments.pop("pretrained_strict", True)
    own = {k: v for k, v in PRESETS[name].items() if k not in ("img_size", "num_classes")}
    arguments = {**own, **arguments}  # timm adds the cfg's size and number of classes
    if "siglip" in name and arguments["global_pool"] != "map":
        strict = False  # the file has an attention pool
    return _timm.build_model_with_cfg(
        ViT,
        PREFIX + name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_filter_fn=_filter(name),
        pretrained_strict=strict,
        feature_cfg=feature_cfg,
        **arguments,
    )


def _entrypoint(name: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, **arguments: Any) -> Any:
        return _create(name, pretrained, **arguments)

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = f"vitkern's {name}."
    return create


def _cfgs(name: str) -> dict[str, Any]:
    """timm's cfgs of a model by our name and tag, its default first and marked as such."""
    found: dict[str, Any] = _timm.get_arch_pretrained_cfgs(name)
    if not found:  # a timm that is older than the preset
        config = ViTConfig.from_name(name)
        mean, std = (v if isinstance(v, tuple) else (v,) * 3 for v in (config.mean, config.std))
        size, classes = (config.in_chans, *config.img_size), config.num_classes
        cfg = _timm.PretrainedCfg(input_size=size, fixed_input_size=True, mean=mean, std=std)
        found = {name: replace(cfg, num_classes=classes)}
    return {PREFIX + key + "*" * ("." in key): cfg for key, cfg in found.items()}


def register() -> None:
    """Put every preset into timm's registry; those that are there already are left alone."""
    here, deprecated = sys.modules[__name__], _timm.get_deprecated_models()
    names = [name for name in PRESETS if not _timm.is_model(PREFIX + name)]
    for name in names:
        if name not in deprecated:
            default_cfgs.update(_timm.generate_default_cfgs(_cfgs(name)))
            function = _entrypoint(name)
            setattr(here, function.__name__, function)
            _timm.register_model(function)
    _timm.register_model_deprecations(
        __name__,
        {PREFIX + name: PREFIX + deprecated[name] for name in names if name in deprecated},
    )


def main(arguments: list[str]) -> int:
    """Run `arguments[0]`, a script, as Python does, with vitkern's models registered."""
    if not arguments or not Path(arguments[0]).is_file():
        problem = f"no file {arguments[0]!r}; " if arguments else ""
        usage = "usage: python -m vitkern.timm SCRIPT [ARGUMENT ...]"
        print(f"error: {problem}{usage}", file=sys.stderr)
        return 2
    sys.argv = list(arguments)
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    from vitkern import timm as registered  # under the name by which everyone imports it

    sys.exit(registered.main(sys.argv[1:]))

register()
