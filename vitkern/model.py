"""The Vision Transformer in timm's layout: the state dicts are the same.

    images [B, C, H, W] -> patch_embed -> tokens [B, N, D] -> blocks -> norm, pool, head -> [B, K]
    block:  x = x + attn(norm1(x)),  x = x + mlp(norm2(x)),  each branch scaled, dropped at random

Images to tokens: `embed.py`. Blocks and the pooling head: `block.py`. Weights: `weights.py`.

Every step is an op of ``vitkern.kernels``, and one op takes as many steps as it can: position and
prefix tokens with the projection; LayerScale, DropPath and residual with the next norm; activation
with the linear layer before it. That is done where the modules are `plain`. A module that was
replaced, wrapped (LoRA) or hooked is called, and the steps around it run one by one.

The model never asks what device it is on; an op does.
"""

import inspect
from collections.abc import Iterable
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkern.block import AttentionPool, Block
from vitkern.config import POOLS, WEIGHT_INITS, ViTConfig, check_arguments
from vitkern.embed import PatchEmbed, check_images, mirror
from vitkern.fused import Stream
from vitkern.kernels.patch_embed.reference import assemble
from vitkern.layers import NORMS, make_norm, plain
from vitkern.weights import draw_weights, fit_pos_embed, resample_pos_embed


def check_layers(layers: Iterable[int] | None, depth: int) -> list[int]:
    """Numbers of the chosen blocks from 0, all if None; an error says what is expected."""
    if layers is None:
        return list(range(depth))
    problem = f"layers must be one or more integers from {-depth} to {depth - 1}, got {layers!r}"
    try:
        given = list(layers)
        chosen = [index(layer) for layer in given]
    except TypeError:
        raise TypeError(problem) from None
    if any(isinstance(layer, bool) for layer in given):  # a mask would be read as blocks 0 and 1
        raise TypeError(problem)
    if not chosen or not all(-depth <= layer < depth for layer in chosen):
        raise ValueError(problem)
    return [layer % depth for layer in chosen]


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2020), with timm's arguments and state dict.

    Args: those of `ViTConfig`, then `device` and `dtype` of the parameters.

    Raises:
        TypeError, ValueError: an argument that is unknown, unsupported or makes no sense.
    """

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
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.num_prefix_tokens, self.num_reg_tokens = config.num_prefix_tokens, config.reg_tokens
        self.has_class_token, self.no_embed_class = config.class_token, config.no_embed_class
        self.pool_include_prefix = config.pool_include_prefix
        self.dynamic_img_size = config.dynamic_img_size
        self.grad_checkpointing = False
        reduction = max(config.patch_size)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": reduction}
            for i in range(config.depth)
        ]

        def token(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, count, dim, **dd)) if count else None

        positions = grid[0] * grid[1] + config.num_pos_prefix
        self.patch_embed = PatchEmbed(config, **dd)
        self.cls_token = token(int(config.class_token))
        self.reg_token = token(config.reg_tokens)
        self.pos_embed = token(positions if config.pos_embed == "learn" else 0)
        self.pos_drop = nn.Dropout(config.pos_drop_rate)
        norm_pre = make_norm(config, dim, recast=False, **dd) if config.pre_norm else None
        self.norm_pre = norm_pre or nn.Identity()
        rates = torch.linspace(0, config.drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(*(Block(config, rate, **dd) for rate in rates))
        after = config.norm_after_pool
        final = make_norm(config, dim, **dd) if config.final_norm else nn.Identity()
        self.norm = nn.Identity() if after else final
        self.attn_pool = AttentionPool(config, **dd) if config.global_pool == "map" else None
        self.fc_norm = final if after else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = self._head(config.num_classes, dd)
        if config.weight_init != "skip":
            self.init_weights(needs_reset=False)

    @classmethod
    def from_config(cls, config: ViTConfig, **dd: Any) -> "ViT":
        """The model of `config`; `device` and `dtype` as for the class itself."""
        return cls(**vars(config), **dd)

    def _head(self, num_classes: int, dd: dict[str, Any]) -> nn.Module:
        return nn.Linear(self.embed_dim, num_classes, **dd) if num_classes else nn.Identity()

    # The forward pass

    def embed(self, images: Tensor, flip: Tensor | None = None) -> Tensor:
        """Tokens [B, T + N, D] with positions and prefix, before the blocks."""
        tokens = [t[0] for t in (self.cls_token, self.reg_token) if t is not None]
        prefix = torch.cat(tokens) if len(tokens) > 1 else tokens[0] if tokens else None
        images = check_images(images, self.config)
        positions = self._positions(images.shape[2:])
        if plain(self.patch_embed, PatchEmbed):
            x = self.patch_embed(images, positions, prefix, flip)
        else:
            x = assemble(self.patch_embed(mirror(images, flip)), positions, prefix)
        if self.pos_embed is not None:  # as in timm: no dropout where there are no positions
            x = self.pos_drop(x)
        return self.norm_pre(x)

    def _positions(self, size: torch.Size) -> Tensor | None:
        """Positions [N, D] or [T + N, D] for an image of this height and width."""
        if self.pos_embed is None:
            return None
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size((size[0], size[1]))
            old_grid = self.config.grid_size
            pos_embed = resample_pos_embed(pos_embed, grid, old_grid, self.config.num_pos_prefix)
        return pos_embed[0]

    def forward_features(self, images: Tensor, *, flip: Tensor | None = None) -> Tensor:
        """All tokens [B, T + N, D] after the blocks and the norm that stands before the pool."""
        return self.norm(self._run_blocks(self.embed(images, flip)))

    def _run_blocks(self, x: Tensor, class_token_only: bool = False) -> Tensor:
        """All tokens after the blocks; of the last one only the first token, if that is enough."""
        save_memory = self.grad_checkpointing and self.training
        if not (save_memory or plain(self.blocks, nn.Sequential)):
            return self.blocks(x)
        stream, last = Stream(x), len(self.blocks) - 1
        block: Any
        for i, block in enumerate(self.blocks):
            if not plain(block, Block):
                function: Any = block
            elif i == last and class_token_only:
                function = block.class_token
            else:  # with the statistics that its product leaves for the next block's norm
                stream = (
                    checkpoint(block.run, stream, i < last, use_reentrant=False)
                    if save_memory
                    else block.run(stream, i < last)
                )
                continue
            x = stream.x
            stream = Stream(
                checkpoint(function, x, use_reentrant=False) if save_memory else function(x)
            )
        return stream.x

    def _class_token_problem(self) -> str | None:
        """Why the last block has to compute more than the class token."""
        if self.global_pool != "token" or self.attn_pool is not None:
            return "the pool reads all tokens"
        if not (plain(self.norm, *NORMS, nn.Identity) and plain(self.blocks, nn.Sequential)):
            return "norm or blocks was replaced, wrapped or hooked"
        last = self.blocks[-1] if len(self.blocks) else None
        if last is None or not plain(last, Block):
            return "the last block was replaced, wrapped or hooked"
        for name in ("forward_features", "forward_head", "pool", "embed"):
            if name in self.__dict__ or getattr(type(self), name) is not getattr(ViT, name):
                return f"{name} was overridden"
        return last.class_token_problem()

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, T + N, D] to features [B, D]; all tokens as they are with pool ""."""
        patches = x if self.pool_include_prefix else x[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            return self.attn_pool(patches)
        kind = self.global_pool if pool_type is None else pool_type
        if kind == "token":
            return x[:, 0]
        if kind == "avg":
            return patches.mean(1)
        if kind == "max":
            return patches.amax(1)
        if kind == "avgmax":
            return 0.5 * (patches.amax(1) + patches.mean(1))
        if kind:
            raise ValueError(f"pool_type must be one of {POOLS}, got {kind!r}")
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of tokens [B, T + N, D]; features [B, D] if `pre_logits`."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor, *, flip: Tensor | None = None) -> Tensor:
        """Classify images.

        Args:
            images: [B, C, H, W], floating point and normalised; or uint8 as [B, C, H, W] or
                [B, H, W, C] (known by its last dimension), normalised here with `mean` and `std`.
            flip: bool [B], samples to mirror left to right as they are read, or None.

        Returns:
            Logits [B, num_classes]; features [B, D] if num_classes is 0; per token with pool "".

        Raises:
            ValueError: images of another shape; the text says which is expected.
        """
        if self._class_token_problem():
            return self.forward_head(self.forward_features(images, flip=flip))
        return self.forward_head(self.norm(self._run_blocks(self.embed(images, flip), True)))

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
            ValueError: images of another shape; the text says which is expected.
            AttributeError: a chosen block whose `attn` as a whole was replaced by another class.
        """
        chosen = check_layers(layers, len(self.blocks))
        training = [module for module in self.modules() if module.training]
        maps: dict[int, Tensor] = {}
        block: Any
        try:
            for module in training:  # not by eval(): that of an adapter may merge its weights
                module.training = False
            x = self.embed(images)
            for i, block in enumerate(self.blocks):
                if i in chosen:
                    maps[i] = block.attn.maps(block.norm1(x))
                if i == max(chosen):
                    break
                x = block(x)
        finally:
            for module in training:
                module.training = True
        return torch.stack([maps[i] for i in chosen])

    # Weights

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw all weights anew, by one of timm's schemes (`weight_init`).

        needs_reset: also reset modules whose constructor already did; False in the constructor.
        """
        mode = mode or self.config.weight_init
        if mode not in WEIGHT_INITS:
            raise ValueError(f"mode must be one of {WEIGHT_INITS}, got {mode!r}")
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
        key, grid, kept = prefix + "pos_embed", self.config.grid_size, self.config.num_pos_prefix
        given = state_dict.get(key)
        if self.pos_embed is not None and given is not None and given.dim() == 3:
            old_grid = local_metadata.get("grid_size")
            state_dict[key] = fit_pos_embed(key, given, grid, old_grid, kept)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    # timm's interface for training scripts

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, and the pool if one is given; norms stay where they are.

        Raises:
            ValueError: an unknown pool, or attention pooling in a model built without it.
        """
        pool = self.global_pool if global_pool is None else global_pool
        after = not isinstance(self.fc_norm, nn.Identity)
        config = replace(self.config, num_classes=num_classes, global_pool=pool, fc_norm=after)
        if pool == "map" and self.attn_pool is None:
            raise ValueError("global_pool='map' can't be added later: build the model with it")
        like = next(self.parameters())
        head = self._head(config.num_classes, {"device": like.device, "dtype": like.dtype})
        if pool != "map":
            self.attn_pool = None
        self.config, self.head = config, head.train(self.training)
        self.num_classes, self.global_pool = config.num_classes, config.global_pool

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only the blocks' inputs and run each block again in backward."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that an optimizer should not decay."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
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
