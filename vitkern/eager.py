"""EagerViT: the same network in PyTorch's own modules and functions, without a kernel of ours.

The baseline that benchmarks and demo compare with: nn.Conv2d, nn.LayerNorm, nn.Linear, nn.GELU and
F.scaled_dot_product_attention, a step a line. State dicts fit `ViT` both ways. It covers the
networks of the paper and of DeiT III: LayerScale, DropPath, token or average pooling.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkern.model.config import ViTConfig
from vitkern.model.layers import DropPath, LayerScale

# Fields that may differ from their defaults; everything else is not built here.
_FREE = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "qkv_bias", "proj_bias", "init_values", "class_token"),
    *("no_embed_class", "reg_tokens", "final_norm", "fc_norm", "pool_include_prefix"),
    *("drop_path_rate", "weight_init", "fix_init", "mean", "std", "impl"),
)


class _Attention(nn.Module):
    def __init__(self, config: ViTConfig, dd: dict[str, Any]) -> None:
        super().__init__()
        dim, self.num_heads = config.embed_dim, config.num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: ViTConfig, dd: dict[str, Any]) -> None:
        super().__init__()
        dim, hidden, bias = config.embed_dim, config.hidden_dim, config.proj_bias
        self.fc1 = nn.Linear(dim, hidden, bias=bias, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, config: ViTConfig, drop_path: float, dd: dict[str, Any]) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.init_values
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = _Attention(config, dd)
        self.ls1 = LayerScale(dim, scale, **dd) if scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = _Mlp(config, dd)
        self.ls2 = LayerScale(dim, scale, **dd) if scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class EagerViT(nn.Module):
    """The network of `config` in plain PyTorch; its weights come by ``load_state_dict``.

    Takes float images [B, C, H, W], or uint8 ones that torch operations normalise; returns logits.

    Raises:
        ValueError: a field of the config that this network doesn't have.
    """

    mean: Tensor
    std: Tensor
    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None

    def __init__(
        self,
        config: ViTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        default = vars(ViTConfig())
        for name, value in vars(config).items():
            if name not in _FREE and value != default[name]:
                raise ValueError(f"EagerViT has no {name}={value!r}")
        if config.global_pool not in ("token", "avg"):
            raise ValueError(f"EagerViT has no global_pool={config.global_pool!r}")
        super().__init__()
        self.config = config
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dim, rows, columns = config.embed_dim, *config.grid_size
        self.patch_embed = nn.Module()
        patch = config.patch_size
        self.patch_embed.proj = nn.Conv2d(config.in_chans, dim, patch, stride=patch, **dd)
        tokens = {"cls_token": int(config.class_token), "reg_token": config.reg_tokens}
        for name, count in tokens.items():
            token = nn.Parameter(torch.zeros(1, count, dim, **dd)) if count else None
            self.register_parameter(name, token)
        length = rows * columns + (0 if config.no_embed_class else config.num_prefix_tokens)
        self.pos_embed = nn.Parameter(torch.randn(1, length, dim, **dd) * 0.02)
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*(_Block(config, rate, dd) for rate in rates))
        final = nn.LayerNorm(dim, eps=1e-6, **dd) if config.final_norm else nn.Identity()
        self.norm = nn.Identity() if config.norm_after_pool else final
        self.fc_norm = final if config.norm_after_pool else nn.Identity()
        classes = config.num_classes
        self.head = nn.Linear(dim, classes, **dd) if classes else nn.Identity()
        for name in ("mean", "std"):
            channels = torch.tensor(getattr(config, name), device=device).expand(config.in_chans)
            self.register_buffer(name, channels.reshape(-1, 1, 1).clone(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        proj: Any = self.patch_embed.proj
        if images.dtype == torch.uint8:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
            images = images.to(proj.weight.dtype)
        x = proj(images).flatten(2).transpose(1, 2)
        tokens = (self.cls_token, self.reg_token)
        prefix = [t.expand(len(x), -1, -1) for t in tokens if t is not None]
        if self.config.no_embed_class:
            x = torch.cat([*prefix, x + self.pos_embed], 1)
        else:
            x = torch.cat([*prefix, x], 1) + self.pos_embed
        x = self.norm(self.blocks(x))
        if self.config.global_pool == "token":
            x = x[:, 0]
        else:
            first = 0 if self.config.pool_include_prefix else self.config.num_prefix_tokens
            x = x[:, first:].mean(1)
        return self.head(self.fc_norm(x))
