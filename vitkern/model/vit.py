"""The Vision Transformer in timm's layout: the state dicts are the same.

    images [B, C, H, W] -> patch_embed -> tokens [B, N, D] -> blocks -> norm, pool, head -> [B, K]
    block:  x = x + attn(norm1(x)),  x = x + mlp(norm2(x)),  each branch scaled, dropped at random

Images to tokens: `embed.py`. Blocks: `block.py`. Around them: `tokens.py`. Between them:
`intermediates.py`. Weights: `weights.py`. A model changed after it was built: `surgery.py`.

Every step is an op of ``vitkern.kernels``, and one op takes as many steps as it can: position and
prefix tokens with the projection; LayerScale, DropPath and residual with the next norm; activation
with the linear layer before it. That is done where the modules are `plain`. A module that was
replaced, wrapped (LoRA) or hooked is called, and the steps around it run one by one.

The model never asks what device it is on; an op does.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkern.hub import Pretrained
from vitkern.kernels.patch_embed.reference import assemble
from vitkern.model import intermediates, surgery
from vitkern.model.block import Block, make_block
from vitkern.model.branches import AttentionPool
from vitkern.model.config import WEIGHT_INITS, ViTConfig, check_arguments
from vitkern.model.embed import HybridEmbed, PatchEmbed, check_images, make_patch_embed, mirror
from vitkern.model.fused import Stream
from vitkern.model.intermediates import refuse_masks
from vitkern.model.layers import NORMS, make_norm, plain
from vitkern.model.rel_pos import make_rel_pos
from vitkern.model.surgery import fit_weights
from vitkern.model.tokens import AttentionPoolPrr, PatchDropout, pool_tokens
from vitkern.model.weights import draw_normal, draw_weights, resample_pos_embed


class ViT(Pretrained, nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2020), with timm's arguments and state dict.

    Args: those of `ViTConfig`, then `device` and `dtype` of the parameters.

    Raises:
        TypeError, ValueError: an argument that is unknown, unsupported or makes no sense.
    """

    head: nn.Module
    head_dist: nn.Module  # of the distillation token, if there is one

    def __init__(
        self,
        *args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(kwargs)
        config = ViTConfig(*args, **kwargs)
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        dim, grid = config.embed_dim, config.grid_size
        self.config = config
        self.num_classes, self.in_chans = config.num_classes, config.in_chans
        self.global_pool = config.global_pool
        self.num_features = self.embed_dim = dim
        self.head_hidden_size = config.representation_size or dim
        self.num_prefix_tokens, self.num_reg_tokens = config.num_prefix_tokens, config.reg_tokens
        self.has_class_token, self.no_embed_class = config.class_token, config.no_embed_class
        self.pool_include_prefix = config.pool_include_prefix or config.global_pool == "prr"
        self.dynamic_img_size = config.dynamic_img_size
        self.grad_checkpointing = self.distilled_training = False
        reduction = max(config.stride)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": reduction}
            for i in range(config.depth)
        ]

        def token(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, count, dim, **dd)) if count else None

        positions = grid[0] * grid[1] + config.num_pos_prefix
        self.patch_embed = make_patch_embed(config, **dd)
        self.shared_rel_pos = make_rel_pos(config, **dd) if config.shared_rel_pos else None
        self.cls_token = token(int(config.class_token))
        self.reg_token = token(config.reg_tokens)
        self.pos_embed = token(positions if config.pos_embed == "learn" else 0)
        self.dist_token = token(int(config.distilled))
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        share = config.patch_drop_rate
        self.patch_drop = PatchDropout(share, self.num_prefix_tokens) if share else nn.Identity()
        norm_pre = make_norm(config, dim, recast=False, **dd) if config.pre_norm else None
        self.norm_pre = norm_pre or nn.Identity()
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*(make_block(config, i, r, **dd) for i, r in enumerate(rates)))
        after = config.norm_after_pool
        final = make_norm(config, dim, **dd) if config.final_norm else nn.Identity()
        self.norm = nn.Identity() if after else final
        self.attn_pool: nn.Module | None = None
        if config.global_pool == "map":
            self.attn_pool = AttentionPool(config, **dd)
        elif config.global_pool == "prr":
            self.attn_pool = AttentionPoolPrr(config)
        self.fc_norm = final if after else nn.Identity()
        self.pre_logits: nn.Module = nn.Identity()
        if config.representation_size:
            fc = nn.Linear(dim, config.representation_size, **dd)
            self.pre_logits = nn.Sequential(OrderedDict(fc=fc, act=nn.Tanh()))
        self.head_drop = nn.Dropout(config.drop_rate)
        surgery.make_heads(self, **dd)
        if config.weight_init != "skip":
            self.init_weights(needs_reset=False)

    @classmethod
    def from_config(cls, config: ViTConfig, **dd: Any) -> "ViT":
        """The model of `config`; `device` and `dtype` as for the class itself."""
        return cls(**vars(config), **dd)

    # The forward pass

    def embed(self, images: Tensor, flip: Tensor | None = None) -> Tensor:
        """Tokens [B, T + N, D] with positions and prefix, before the blocks."""
        given = (self.cls_token, self.dist_token, self.reg_token)
        tokens = [token[0] for token in given if token is not None]
        prefix = torch.cat(tokens) if len(tokens) > 1 else tokens[0] if tokens else None
        images = check_images(images, self.config)
        positions = self._positions(images.shape[2:])
        if plain(self.patch_embed, PatchEmbed, HybridEmbed):
            x = self.patch_embed(images, positions, prefix, flip)
        else:
            x = assemble(self.patch_embed(mirror(images, flip)), positions, prefix)
        if self.pos_embed is not None:  # as in timm: no dropout where there are no positions
            x = self.pos_drop(x)
        return self.norm_pre(self.patch_drop(x))

    def _positions(self, size: torch.Size) -> Tensor | None:
        """Positions [N, D] or [T + N, D] for an image of this height and width."""
        if self.pos_embed is None:
            return None
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid = self.config.grid_of(*size)
            kept, mode = self.config.num_pos_prefix, self.config.pos_resample
            pos_embed = resample_pos_embed(pos_embed, grid, self.config.grid_size, kept, mode)
        return pos_embed[0]

    def forward_features(
        self,
        images: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        flip: Tensor | None = None,
    ) -> Tensor:
        """All tokens [B, T + N, D] after the blocks and the norm that stands before the pool."""
        refuse_masks(attn_mask, is_causal)
        return self.norm(self._run_blocks(self.embed(images, flip)))

    def _run_blocks(self, x: Tensor, class_token_only: bool = False) -> Tensor:
        """All tokens after the blocks; of the last one only the first token, if that is enough."""
        save_memory, bias = self.grad_checkpointing and self.training, self.attn_bias()
        if not (save_memory or bias is not None or plain(self.blocks, nn.Sequential)):
            return self.blocks(x)
        stream, last = Stream(x), len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            stream = self.step(block, stream, i < last, bias, class_token_only and i == last)
        return stream.x

    def attn_bias(self) -> Tensor | None:
        """What all blocks add to the logits of attention, [1, H, T + N, T + N]; None for nothing.

        Once a forward pass: in training it is random.
        """
        return None if self.shared_rel_pos is None else self.shared_rel_pos()

    def step(
        self,
        block: Any,
        stream: Stream,
        need_stats: bool = False,
        attn_bias: Tensor | None = None,
        class_token_only: bool = False,
    ) -> Stream:
        """The stream after one block.

        need_stats: with the statistics that its last product leaves for the next block's norm.
        """
        function: Any = block
        extra = () if attn_bias is None else (attn_bias,)
        start: tuple[Any, ...] = (stream.x,)
        if plain(block, Block):
            function = block.class_token if class_token_only else block.run
            start = start if class_token_only else (stream, need_stats)
        if self.grad_checkpointing and self.training:
            after = checkpoint(function, *start, *extra, use_reentrant=False)
        else:
            after = function(*start, *extra)
        return after if isinstance(after, Stream) else Stream(after)

    def _class_token_problem(self) -> str | None:
        """Why the last block has to compute more than the class token."""
        if self.global_pool != "token" or self.attn_pool is not None:
            return "the pool reads all tokens"
        if self.config.distilled:
            return "a second head reads the distillation token"
        if not (plain(self.norm, *NORMS, nn.Identity) and plain(self.blocks, nn.Sequential)):
            return "norm or blocks was replaced, wrapped or hooked"
        last = self.blocks[-1] if len(self.blocks) else None
        if last is None or not plain(last, Block):
            return "the last block was replaced, wrapped or hooked"
        return self.overridden() or last.class_token_problem()

    def overridden(self, *more: str) -> str | None:
        """That a subclass or the model itself has another way for a step of forward, or for `more`;
        None if not.
        """
        for name in ("forward_features", "forward_head", "pool", "embed", "step", *more):
            if name in self.__dict__ or getattr(type(self), name) is not getattr(ViT, name):
                return f"{name} was overridden"
        return None

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, T + N, D] to features [B, D]; all tokens as they are with pool ""."""
        if self.attn_pool is not None:
            return self.attn_pool(x if self.pool_include_prefix else x[:, self.num_prefix_tokens :])
        kind = self.global_pool if pool_type is None else pool_type
        return pool_tokens(x, kind, self.num_prefix_tokens, self.pool_include_prefix)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of tokens [B, T + N, D]; what the head reads if `pre_logits`.

        A distilled model returns the mean of both heads, or in training, if `distilled_training`,
        the pair: that of the class token, that of the distillation token.
        """
        if not self.config.distilled:
            x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
            return x if pre_logits else self.head(x)
        own, dist = (self.head_drop(self.pre_logits(self.fc_norm(x[:, i]))) for i in (0, 1))
        if not pre_logits:
            own, dist = self.head(own), self.head_dist(dist)
            if self.distilled_training and self.training:
                return own, dist  # type: ignore[return-value]
        return (own + dist) / 2

    def forward(
        self,
        images: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        flip: Tensor | None = None,
    ) -> Tensor:
        """Classify images.

        Args:
            images: [B, C, H, W], floating point and normalised; or uint8 as [B, C, H, W] or
                [B, H, W, C] (known by its last dimension), normalised here with `mean` and `std`.
            attn_mask, is_causal: timm's; only None and False are supported.
            flip: bool [B], samples to mirror left to right as they are read, or None.

        Returns:
            Logits [B, num_classes]; features [B, D] if num_classes is 0; per token with pool "";
            a pair in distilled training (see `forward_head`).

        Raises:
            ValueError: images of another shape; the text says which is expected.
        """
        if self._class_token_problem():
            x = self.forward_features(images, attn_mask, is_causal, flip=flip)
            return self.forward_head(x)
        refuse_masks(attn_mask, is_causal)
        return self.forward_head(self.norm(self._run_blocks(self.embed(images, flip), True)))

    # Between the blocks

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Iterable[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """The tokens after the blocks asked for, and those that `forward_features` returns.

        Args:
            x: images, as for `forward`.
            indices: the last n blocks, or their numbers, negative ones from the end; all if None.
            return_prefix_tokens: each intermediate as (patches, prefix tokens [B, T, D]).
            norm: apply the final norm to the intermediates.
            stop_early: run no block behind the last one asked for.
            output_fmt: "NCHW" for patches [B, D, rows, columns], "NLC" for [B, N, D].
            intermediates_only: return the intermediates alone.
            output_dict: return a dictionary of "image_features", "image_intermediates" and, if
                asked for, "image_intermediates_prefix".
            attn_mask, is_causal: only None and False are supported.

        Returns:
            (features [B, T + N, D], intermediates in the order of the blocks), or as said above.

        Raises:
            TypeError, ValueError: naming the argument; images of another shape.
        """
        refuse_masks(attn_mask, is_causal)
        return intermediates.forward_intermediates(
            self,
            x,
            indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
            output_dict=output_dict,
        )

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Iterable[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list[Any]:
        """The intermediates of `forward_intermediates` alone, for `n` blocks, in DINO's manner.

        reshape: patches as [B, D, rows, columns] instead of [B, N, D].
        """
        refuse_masks(attn_mask, False)
        found: list[Any] = intermediates.forward_intermediates(
            self,
            x,
            n,
            name="n",
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=True,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            output_dict=False,
        )
        return found

    @torch.no_grad()
    def attention_maps(self, images: Tensor, layers: Iterable[int] | None = None) -> Tensor:
        """How much every token of the chosen blocks attends to every other.

        As in evaluation, whatever the model's mode: dropout would only blur the maps. They are
        computed by the op's definition and all kept in memory; blocks after the last one asked for
        don't run. The model, its mode and the random numbers stay as they are, but hooks on `norm1`
        and inside `attn` fire once more in a chosen block.

        Args:
            images: as for `forward`.
            layers: numbers of the blocks, negative ones counted from the last; all if None.

        Returns:
            float32 [L, B, H, T + N, T + N], in the order of `layers`: the softmax of queries
            (second to last dimension) over keys (last), with class and register tokens first.

        Raises:
            TypeError, ValueError: layers that aren't integers, that don't exist, or none.
            ValueError: images of another shape; blocks of a kind that has no such maps.
            AttributeError: a chosen block whose `attn` as a whole was replaced by another class.
        """
        return intermediates.attention_maps(self, images, layers)

    # Weights

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw all weights anew, by one of timm's schemes (`weight_init`).

        After the same seed they are timm's own in float32, but for a network with a "conv_stem".

        needs_reset: also reset modules whose constructor already did; False in the constructor.
        """
        mode = mode or self.config.weight_init
        if mode not in WEIGHT_INITS:
            raise ValueError(f"mode must be one of {WEIGHT_INITS}, got {mode!r}")
        if self.dist_token is not None:
            draw_normal(self.dist_token, 0.02)
        draw_weights(self, mode, needs_reset)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # The grid, so that positions of a rectangular image can be resampled by whoever loads them.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata["grid_size"] = self.config.grid_size

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        fit_weights(self, state_dict, prefix, local_metadata.get("grid_size"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    # timm's interface for training scripts

    def get_classifier(self) -> Any:
        """The head; a distilled model's pair of heads."""
        return (self.head, self.head_dist) if self.config.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, and the pool if one is given; norms stay where they are.

        Raises:
            ValueError: an unknown pool, another one than "token" in a distilled model, or attention
                pooling ("map", "prr") in a model built without it.
        """
        surgery.reset_classifier(self, num_classes, global_pool)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images, and cut patches, of another size; weights are resampled, the config follows.

        The patch projection is resized as in FlexiViT (`weights.resample_patch_embed`), positions
        by `pos_resample`. Resampled parameters are new ones: make an optimizer after this.

        Args:
            img_size, patch_size: one integer or (height, width); None to leave it.

        Raises:
            TypeError, ValueError: naming the argument; or a `patch_embed` that can't be resampled.
        """
        surgery.set_input_size(self, img_size, patch_size)

    def prune_intermediate_layers(
        self, indices: int | Iterable[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` doesn't need for the blocks `indices`.

        Args:
            indices: the last n blocks, or their numbers, negative ones from the end.
            prune_norm: remove the final norm.
            prune_head: remove pool and head, and the norm between them.

        Returns:
            Numbers of the blocks asked for, from 0.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        return surgery.prune(self, indices, prune_norm, prune_head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the blocks' inputs and run each block again in backward."""
        self.grad_checkpointing = enable
        if isinstance(self.patch_embed, HybridEmbed):
            self.patch_embed.set_grad_checkpointing(enable)

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, a distilled model returns both heads' logits."""
        self.distilled_training = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimizer should not decay."""
        dist = {"dist_token"} if self.config.distilled else set()
        return {"pos_embed", "cls_token", "reg_token"} | dist

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        dist = "|dist_token" if self.config.distilled else ""
        return {
            "stem": rf"^cls_token|reg_token|pos_embed|patch_embed|norm_pre{dist}",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _signature() -> inspect.Signature:
    """ViT's own, for help() and editors: the config's fields, then device and dtype."""
    own = inspect.signature(ViT.__init__).parameters
    parameters = [own["self"], *inspect.signature(ViTConfig).parameters.values()]
    return inspect.Signature([*parameters, own["device"], own["dtype"]])


ViT.__init__.__signature__ = _signature()  # type: ignore[attr-defined]


def create_model(name: str, pretrained: bool = False, **overrides: Any) -> ViT:
    """The model that timm calls `name`, with any argument of `ViT` replaced.

    Raises:
        ValueError: unknown name; weights asked for (they come by ``load_state_dict``).
        TypeError: unknown argument.
    """
    dd = {key: overrides.pop(key) for key in ("device", "dtype") if key in overrides}
    config = ViTConfig.from_name(name, pretrained=pretrained, **overrides)
    return ViT.from_config(config, **dd)
