"""Positions relative within attention: what is added to the logits of each pair of patches.

"bias": a learned number for each head and each (rows, columns) from query to key (Swin, Liu et al.,
2021; BEiT, Bao et al., 2021). "mlp": a small network of logarithmic distances (after Swin V2, Liu
et al., 2022). State dicts, random numbers and results are those of timm's RelPosBias and RelPosMlp.

Called without arguments, a module returns the bias [1, H, T + N, T + N] for the grid it was made
for, T being 1 with a class token. Each `Attention` has its own as `rel_pos`; or the model has one
(`shared_rel_pos=True`) and hands its result to each block:

    bias = model.shared_rel_pos()          # once a forward pass: it is random in training
    x = block(x, bias)                     # or block.run(stream, need_stats, bias)
    module.set_window_size((rows, columns))  # for images of another size, on all of them
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkern.model.config import ViTConfig
from vitkern.model.weights import draw_normal


def make_rel_pos(config: ViTConfig, **dd: Any) -> "RelPosBias | RelPosMlp":
    """The module that `rel_pos` of the config names, for its grid."""
    sizes = (config.grid_size, config.num_heads, config.num_prefix_tokens)
    if config.rel_pos == "bias":
        return RelPosBias(*sizes, **dd)
    return RelPosMlp(*sizes, config.rel_pos_dim or 128, **dd)


def pair_index(window: tuple[int, int], class_token: bool, device: Any) -> Tensor:
    """Row of the table for each pair, [(T + N)^2]: offsets row by row, then the class token's
    three: from it, to it, and to itself.
    """
    rows, columns = window
    row = torch.arange(rows * columns, device=device) // columns
    column = torch.arange(rows * columns, device=device) % columns
    down = row[:, None] - row + rows - 1
    index = down * (2 * columns - 1) + column[:, None] - column + columns - 1
    if class_token:
        offsets = (2 * rows - 1) * (2 * columns - 1)
        index = F.pad(index, (1, 0, 1, 0))
        index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index.flatten()


class _RelPos(nn.Module):
    """A window, and the index of its pairs: buffers that are no part of a state dict."""

    relative_position_index: Tensor

    def __init__(self, window_size: tuple[int, int], num_heads: int, prefix_tokens: int) -> None:
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.prefix_tokens = prefix_tokens

    @property
    def indexed(self) -> int:
        """Tokens that have a place in the index."""
        return math.prod(self.window_size)

    def make_buffers(self, like: Tensor) -> None:
        """Room for what depends on the window."""
        index = torch.empty(self.indexed**2, dtype=torch.long, device=like.device)
        self.register_buffer("relative_position_index", index, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Fill it in, also after `to_empty`."""
        with_class = self.indexed > math.prod(self.window_size)
        index = pair_index(self.window_size, with_class, self.relative_position_index.device)
        self.relative_position_index.copy_(index)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Go over to a grid of (rows, columns) patches."""
        self.window_size = (int(window_size[0]), int(window_size[1]))
        self.make_buffers(next(self.parameters()))
        self.init_non_persistent_buffers()

    def arrange(self, table: Tensor) -> Tensor:
        """[rows, H] -> [1, H, indexed, indexed]."""
        bias = table[self.relative_position_index].view(self.indexed, self.indexed, -1)
        return bias.permute(2, 0, 1)[None]

    def extra_repr(self) -> str:
        """The grid."""
        return f"window_size={self.window_size}, prefix_tokens={self.prefix_tokens}"


class RelPosBias(_RelPos):
    """A table of biases [(2 rows - 1) (2 columns - 1) + 3 T, H]; T = prefix_tokens is 0 or 1."""

    def __init__(
        self, window_size: tuple[int, int], num_heads: int, prefix_tokens: int = 0, **dd: Any
    ) -> None:
        if prefix_tokens > 1:
            raise ValueError(f"rel_pos='bias' takes one prefix token at most, got {prefix_tokens}")
        super().__init__(window_size, num_heads, prefix_tokens)
        table = torch.empty(self.offsets(window_size) + 3 * prefix_tokens, num_heads, **dd)
        self.relative_position_bias_table = nn.Parameter(table)
        self.make_buffers(table)
        self.reset_parameters()

    @staticmethod
    def offsets(window: tuple[int, int]) -> int:
        """How many places a key may have, seen from a query."""
        return (2 * window[0] - 1) * (2 * window[1] - 1)

    @property
    def indexed(self) -> int:
        """The class token is in the table."""
        return math.prod(self.window_size) + self.prefix_tokens

    def reset_parameters(self) -> None:
        """Normal numbers."""
        draw_normal(self.relative_position_bias_table, 0.02)
        self.init_non_persistent_buffers()

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Go over to a grid of (rows, columns) patches, with a new parameter: resampled."""
        old, table = self.window_size, self.relative_position_bias_table
        if tuple(window_size) == old:
            return
        new = resize_bias_table(table.detach(), old, window_size)
        self.relative_position_bias_table = nn.Parameter(new, requires_grad=table.requires_grad)
        super().set_window_size(window_size)

    def forward(self) -> Tensor:
        """[1, H, T + N, T + N]."""
        return self.arrange(self.relative_position_bias_table).contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "relative_position_bias_table"
        given, extra = state_dict.get(key), 3 * self.prefix_tokens
        if given is not None and given.shape[0] != len(self.relative_position_bias_table):
            side = math.isqrt(max(given.shape[0] - extra, 0))
            if side**2 != given.shape[0] - extra or not side % 2:
                raise ValueError(
                    f"{key} is {list(given.shape)}, expected "
                    f"{list(self.relative_position_bias_table.shape)}, or {extra} rows and the "
                    f"square of an odd number, to resample from"
                )
            old = ((side + 1) // 2,) * 2
            state_dict[key] = resize_bias_table(given, old, self.window_size)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _DistanceMlp(nn.Module):
    """(down, right) -> a number for each head; an eighth of the hidden units drop in training."""

    def __init__(self, hidden: int, heads: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, hidden, **dd)
        self.act = nn.ReLU()
        self.drop1 = nn.Dropout(0.125)
        self.fc2 = nn.Linear(hidden, heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2] -> [..., H]."""
        return self.fc2(self.drop1(self.act(self.fc1(x))))


class RelPosMlp(_RelPos):
    """A network of log distances. Pairs with a prefix token have bias 0."""

    rel_coords_log: Tensor

    def __init__(
        self,
        window_size: tuple[int, int],
        num_heads: int,
        prefix_tokens: int = 0,
        hidden_dim: int = 128,
        **dd: Any,
    ) -> None:
        super().__init__(window_size, num_heads, prefix_tokens)
        self.mlp = _DistanceMlp(hidden_dim, num_heads, **dd)
        self.make_buffers(self.mlp.fc1.weight)
        self.reset_parameters()

    def make_buffers(self, like: Tensor) -> None:
        """Room for what depends on the window."""
        super().make_buffers(like)
        size = (2 * self.window_size[0] - 1, 2 * self.window_size[1] - 1, 2)
        coordinates = torch.empty(size, dtype=like.dtype, device=like.device)
        self.register_buffer("rel_coords_log", coordinates, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """The index, and log(1 + distance) with the sign of the direction, row by row."""
        super().init_non_persistent_buffers()
        steps = (
            torch.arange(1.0 - n, n, dtype=torch.float32, device=self.rel_coords_log.device)
            for n in self.window_size
        )
        distance = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1)
        self.rel_coords_log.copy_(distance.sign() * (1.0 + distance.abs()).log())

    def reset_parameters(self) -> None:
        """Only the buffers: linear layers reset themselves."""
        self.init_non_persistent_buffers()

    def forward(self) -> Tensor:
        """[1, H, T + N, T + N]."""
        bias = self.arrange(self.mlp(self.rel_coords_log).flatten(0, 1))
        return F.pad(bias, (self.prefix_tokens, 0) * 2).contiguous()


def resize_bias_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table [(2 rows - 1) (2 columns - 1) + extra, H] for a grid of another size.

    After BEiT: the old offsets are laid out in geometric progression, dense near 0, so that they
    span the new ones; between them it is linear. Rows of class tokens, `extra`, stay.
    """
    sizes = [(2 * a - 1, 2 * b - 1) for a, b in zip(old, new, strict=True)]
    if all(source == target for source, target in sizes):
        return table
    count = sizes[0][0] * sizes[1][0]
    if table.is_meta:  # no values; only the shape matters
        return table.new_empty(sizes[0][1] * sizes[1][1] + len(table) - count, table.shape[1])
    rows, columns = (_between(*size).to(table.device) for size in sizes)
    grid = table[:count].double().unflatten(0, (sizes[0][0], sizes[1][0]))
    grid = torch.einsum("ab,bch,dc->adh", rows, grid, columns)
    return torch.cat([grid.flatten(0, 1).to(table.dtype), table[count:]])


def _between(source: int, target: int) -> Tensor:
    """Weights [target, source], float64, of linear interpolation from old offsets to new ones."""
    low, high, ratio = 1.01, 1.5, 1.0
    while high - low > 1e-6:  # so that source // 2 steps reach target // 2; not beyond these ratios
        ratio = (low + high) / 2
        reach = (1 - ratio ** (source // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > target // 2 else (ratio, high)
    steps = torch.tensor([ratio**i for i in range(source // 2)], dtype=torch.float64).cumsum(0)
    places = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])
    wanted = torch.arange(target, dtype=torch.float64) - target // 2
    right = torch.searchsorted(places, wanted).clamp(max=source - 1)
    left = (right - 1).clamp(min=0)
    gap = (places[right] - places[left]).clamp(min=1e-9)
    share = ((wanted - places[left]) / gap).clamp(0, 1)
    row = torch.arange(target)
    weights = torch.zeros(target, source, dtype=torch.float64)
    weights.index_put_((row, left), 1 - share, accumulate=True)
    weights.index_put_((row, right), share, accumulate=True)
    return weights
