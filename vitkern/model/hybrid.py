"""Backbones: what may stand before the patch projection (`embed_layer`), and makes a feature map.

    ("resnetv2", (3, 4, 9))      ResNet of the ViT paper, blocks of each stage   / 16, 1024 wide
    ("resnetv2", ())             its stem alone                                  / 4, 64 wide
    ("conv_stem", (4, 2, 2))     three convolutions, MobileCLIP's                / 16, D wide
    ("timm", ("resnet26d", 4))   a stage of a model of timm's                    / 32, 2048 wide

Models of timm that have one, by its name for them, at patch size 1 unless said otherwise:

    vit_tiny_r_s16_p8       resnetv2 (), patch_size 8     vit_small_r26_s32   resnetv2 (2, 2, 2, 2)
    vit_base_r26_s32        resnetv2 (2, 2, 2, 2)         vit_base_r50_s16    resnetv2 (3, 4, 9)
    vit_large_r50_s32       resnetv2 (3, 4, 6, 3)         vit_base_mci        conv_stem (4, 2, 2)
    vit_small_resnet26d     timm (resnet26d, 4)           vit_base_resnet26d  timm (resnet26d, 4)
    vit_small_resnet50d_s16 timm (resnet50d, 3)           vit_base_resnet50d  timm (resnet50d, 4)

PyTorch's convolutions; no kernel of ours. State dicts are timm's, key for key.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkern.model.config import ViTConfig, backbone_stride


def make_backbone(config: ViTConfig, **dd: Any) -> tuple[nn.Module, int]:
    """The backbone that `config.embed_layer` names, and the channels of its feature map.

    Raises:
        ValueError: a ResNet of more than four stages, widths that don't divide, a stage of timm's
            model of another stride than `config.stride` counts on.
        ModuleNotFoundError: timm is needed and isn't installed; the text says how to get it.
    """
    kind, values = config.embed_layer
    if kind == "conv_stem":
        return ConvStem(config.in_chans, config.embed_dim, values, **dd), config.embed_dim
    if kind == "timm":
        return _timm_features(config, *values, **dd)
    if len(values) > 4:
        raise ValueError(f"embed_layer: a ResNet has at most four stages, got {values}")
    if not values:
        return Stem(config.in_chans, 64, **dd), 64
    return ResNetV2(config.in_chans, values, **dd), 128 * 2 ** len(values)


def _timm_features(config: ViTConfig, name: str, stage: int, **dd: Any) -> tuple[nn.Module, int]:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"embed_layer={config.embed_layer!r} needs timm: pip install 'vitkern[timm]'"
        ) from error
    given = {key: value for key, value in dd.items() if value is not None}
    chosen: dict[str, Any] = {"features_only": True, "out_indices": [stage]}
    model = timm.create_model(name, in_chans=config.in_chans, **chosen, **given)
    stride, expected = model.feature_info.reduction()[-1], backbone_stride(config.embed_layer)
    if stride != expected:
        raise ValueError(
            f"embed_layer={config.embed_layer!r}: stage {stage} must have a stride of {expected}, "
            f"as in timm's ResNets, got {stride}"
        )
    return model, model.feature_info.channels()[-1]


class StdConv2d(nn.Conv2d):
    """Convolution without bias, its weight standardised for each output channel, padded as "SAME".

    w' = (w - mean) / sqrt(var + 1e-8) over all but the output channel; ceil(size / stride) outputs,
    of whose padding an odd pixel goes to the end.
    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", 2019.
    """

    def __init__(self, width_in: int, width: int, size: int, stride: int = 1, **dd: Any) -> None:
        super().__init__(width_in, width, size, stride=stride, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, ceil(H / stride), ceil(W / stride)]."""
        # By timm's very operation: dozens of such layers make much of another one's rounding.
        flat = self.weight.flatten(1)[None]
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-8)
        size, stride = self.kernel_size[0], self.stride[0]
        x, padding = _same(x, size, stride, 0.0)
        return F.conv2d(x, weight.view_as(self.weight), None, stride, padding)


class StemPool(nn.Module):
    """The largest of 3 x 3 at every second place, padded as "SAME"."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""
        x, padding = _same(x, 3, 2, -float("inf"))
        return F.max_pool2d(x, 3, 2, padding)


def _same(x: Tensor, size: int, stride: int, value: float) -> tuple[Tensor, tuple[int, int]]:
    """(x, padding): padded on both sides by the operation that follows, if that will do, or here.

    Padding x beforehand writes it to memory once more.
    """
    top, left = (max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[2:])
    if top % 2 == left % 2 == 0:
        return x, (top // 2, left // 2)
    sides = (left // 2, left - left // 2, top // 2, top - top // 2)
    return F.pad(x, sides, value=value), (0, 0)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of 32 groups, with ReLU behind it unless `relu` is False."""

    def __init__(self, width: int, relu: bool = True, **dd: Any) -> None:
        super().__init__(32, width, **dd)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = super().forward(x)
        return F.relu(x, inplace=True) if self.relu else x


class Stem(nn.Sequential):
    """7 x 7 convolution, norm and pool: a quarter of the height and width."""

    def __init__(self, in_chans: int, width: int, **dd: Any) -> None:
        super().__init__()
        self.conv = StdConv2d(in_chans, width, 7, 2, **dd)
        self.norm = GroupNorm(width, **dd)
        self.pool = StemPool()


class Downsample(nn.Sequential):
    """The shortcut past a block that changes width or size."""

    def __init__(self, width_in: int, width: int, stride: int, **dd: Any) -> None:
        super().__init__()
        self.conv = StdConv2d(width_in, width, 1, stride, **dd)
        self.norm = GroupNorm(width, relu=False, **dd)


class Bottleneck(nn.Module):
    """x = relu(shortcut(x) + norm3(conv3(relu(norm2(conv2(relu(norm1(conv1(x)))))))))."""

    def __init__(self, width_in: int, width: int, stride: int, first: bool, **dd: Any) -> None:
        super().__init__()
        narrow = width // 4
        self.downsample = Downsample(width_in, width, stride, **dd) if first else None
        self.conv1 = StdConv2d(width_in, narrow, 1, **dd)
        self.norm1 = GroupNorm(narrow, **dd)
        self.conv2 = StdConv2d(narrow, narrow, 3, stride, **dd)
        self.norm2 = GroupNorm(narrow, **dd)
        self.conv3 = StdConv2d(narrow, width, 1, **dd)
        self.norm3 = GroupNorm(width, relu=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        x = self.norm3(self.conv3(x))
        return F.relu(x + shortcut, inplace=True)


class Stage(nn.Module):
    """Blocks of one width; the first changes width and size."""

    def __init__(self, width_in: int, width: int, stride: int, depth: int, **dd: Any) -> None:
        super().__init__()
        self.grad_checkpointing = False
        blocks = [Bottleneck(width_in, width, stride, True, **dd)]
        blocks += [Bottleneck(width, width, 1, False, **dd) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, ceil(H / stride), ceil(W / stride)]."""
        if not (self.grad_checkpointing and self.training):
            return self.blocks(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class ResNetV2(nn.Module):
    """ResNet with weight standardisation and GroupNorm, its blocks not pre-activated.

    Source: Kolesnikov et al., "Big Transfer", 2020, as Dosovitskiy et al., 2021, put it before a
    ViT. Starts as timm's does in such a model: the last norm of a block at 0, so that the block is
    its shortcut.
    """

    def __init__(self, in_chans: int, depths: tuple[int, ...], **dd: Any) -> None:
        super().__init__()
        self.stem = Stem(in_chans, 64, **dd)
        widths = [64, *(256 * 2**i for i in range(len(depths)))]
        self.stages = nn.Sequential(
            *(
                Stage(widths[i], widths[i + 1], 1 if i == 0 else 2, depth, **dd)
                for i, depth in enumerate(depths)
            )
        )
        self._draw_convolutions()

    def _draw_convolutions(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def init_weights(self) -> None:
        """Draw all weights anew."""
        self._draw_convolutions()
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the blocks' inputs."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        """Feature map [B, 128 * 2^stages, H / 2^(stages + 1), W / 2^(stages + 1)]."""
        return self.stages(self.stem(images))


class ConvNormAct(nn.Module):
    """Convolution as wide as its stride; BatchNorm and GELU unless it is the last."""

    def __init__(self, width_in: int, width: int, stride: int, last: bool, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, stride, stride, bias=last, **dd)
        self.bn = nn.Identity() if last else nn.BatchNorm2d(width, **dd)
        self.act = nn.Identity() if last else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H // stride, W // stride]."""
        return self.act(self.bn(self.conv(x)))


class ConvStem(nn.Sequential):
    """Three convolutions that don't overlap, a quarter of `width` wide and at last all of it.

    Source: Vasu et al., "MobileCLIP: Fast Image-Text Models through Multi-Modal Reinforced
    Training", 2024.
    """

    def __init__(self, in_chans: int, width: int, strides: tuple[int, ...], **dd: Any) -> None:
        if width % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 with a conv_stem, got {width}")
        widths = (in_chans, *[width // 4] * (len(strides) - 1), width)
        last = len(strides) - 1
        super().__init__(
            *(
                ConvNormAct(widths[i], widths[i + 1], stride, i == last, **dd)
                for i, stride in enumerate(strides)
            )
        )
