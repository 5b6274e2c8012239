"""What happens to whole tokens around the blocks: some patches dropped before, one pool behind."""

import torch
from torch import Tensor, nn

from vitkern import kernels as ops
from vitkern.model.config import POOLS, ViTConfig


class PatchDropout(nn.Module):
    """In training, leave out a share of each image's patches (Liu et al., 2022: "PatchDropout").

    prob: that share; of N patches max(1, int(N * (1 - prob))) stay, in random order. They are drawn
    as timm draws them, so that one seed keeps the same patches in both.
    """

    def __init__(self, prob: float, num_prefix_tokens: int) -> None:
        super().__init__()
        self.prob, self.num_prefix_tokens = prob, num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """[B, T + N, D] -> [B, T + fewer, D]; the T prefix tokens stay in front."""
        if not self.training:
            return x
        batch, total, dim = x.shape
        patches = total - self.num_prefix_tokens
        order = torch.randn(batch, patches, device=x.device).argsort(-1)
        kept = order[:, : max(1, int(patches * (1 - self.prob)))] + self.num_prefix_tokens
        prefix = torch.arange(self.num_prefix_tokens, device=x.device).expand(batch, -1)
        kept = torch.cat([prefix, kept], 1)
        return x.gather(1, kept[:, :, None].expand(-1, -1, dim))

    def extra_repr(self) -> str:
        """The rate."""
        return f"prob={self.prob}"


class AttentionPoolPrr(nn.Module):
    """Self-attention without weights, then one token: timm's AttentionPoolPrr.

    Queries, keys and values are the tokens themselves ("Locality-Attending Vision Transformer",
    2026). The result is that of the class token, or the mean of all without one.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        if config.embed_dim % config.num_heads:
            raise ValueError(
                f"global_pool='prr' needs embed_dim to be a multiple of num_heads, got "
                f"{config.embed_dim} and {config.num_heads}"
            )
        self.num_heads, self.first = config.num_heads, config.class_token
        self.impl = config.implementations["attention_pool" if self.first else "attention"]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T + N, D] -> [B, D]."""
        heads = x.unflatten(-1, (self.num_heads, -1))[:, :, None]
        if self.first:  # nobody reads what the other queries find
            return ops.attention_pool(
                heads[:, :1, 0], heads.expand(-1, -1, 2, -1, -1), impl=self.impl
            )[:, 0]
        return ops.attention(heads.expand(-1, -1, 3, -1, -1), impl=self.impl).mean(1)


def pool_tokens(x: Tensor, kind: str, num_prefix_tokens: int, include_prefix: bool) -> Tensor:
    """Features [B, D] of tokens [B, T + N, D]; the tokens as they are with kind "".

    Raises:
        ValueError: a kind of pool that does not exist, or that needs a module.
    """
    if kind == "token":
        return x[:, 0]
    patches = x if include_prefix else x[:, num_prefix_tokens:]
    if kind == "avg":
        return patches.mean(1)
    if kind == "max":
        return patches.amax(1)
    if kind == "avgmax":
        return 0.5 * (patches.amax(1) + patches.mean(1))
    if kind:
        raise ValueError(f"pool_type must be one of {POOLS}, got {kind!r}")
    return x
