"""How a weight's gradient is shared among the multiprocessors."""

import itertools

import pytest
import torch

from vitkern.kernels._launch import SplitConfig, cdiv, split

H100, A100 = 132, 108
SQUARE = SplitConfig(64, 128, 128, 8, 3)


def tiles_of(config: SplitConfig, features: int, width: int) -> int:
    return cdiv(features, config.block_n) * cdiv(width, config.block_k)


def busy(rows: int, tiles: int, config: SplitConfig, processors: int, parts: int) -> float:
    """Of the multiprocessors' time, the part in which they multiply."""
    steps = cdiv(cdiv(rows, parts), config.block_m)
    # Programs that share a multiprocessor take as long as one after the other.
    most = cdiv(tiles * parts, processors) * steps
    return tiles * cdiv(rows, config.block_m) / processors / most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_in_one_part(dtype: torch.dtype) -> None:
    for rows, tiles in itertools.product((1, 63, 64, 257, 1000, 12_608, 50_432), (1, 9, 144, 400)):
        for config in (SQUARE, SplitConfig(32, 64, 64, 8, 2, programs=2)):
            parts, steps = split(rows, tiles, config, H100, dtype)
            assert parts * steps * config.block_m >= rows
            assert (parts - 1) * steps * config.block_m < rows
            assert parts == 1 or steps >= 4


def test_without_tokens_there_is_no_part() -> None:
    assert split(0, 9, SQUARE, H100, torch.bfloat16) == (0, 0)


@pytest.mark.parametrize("processors", [H100, A100])
@pytest.mark.parametrize(("width", "tokens"), [(384, 197), (768, 197), (1024, 197), (1280, 257)])
def test_the_multiprocessors_of_a_card_are_busy(width: int, tokens: int, processors: int) -> None:
    """Of a ViT's layers at batch 256 nearly all of the time; and never less than unsplit."""
    for batch, (n, k) in itertools.product((1, 16, 64, 256), ((3, 1), (1, 1), (4, 1), (1, 4))):
        rows, tiles = batch * tokens, tiles_of(SQUARE, n * width, k * width)
        parts, _ = split(rows, tiles, SQUARE, processors, torch.bfloat16)
        share = busy(rows, tiles, SQUARE, processors, parts)
        assert share >= busy(rows, tiles, SQUARE, processors, 1) - 1e-9
        if batch == 256:
            assert share > 0.88, (n, k, parts)


def test_a_config_may_ask_for_one_wave() -> None:
    config = SplitConfig(64, 128, 128, 8, 3, programs=2)
    assert split(50_432, 36, config, H100, torch.bfloat16)[0] == 2 * H100 // 36
    assert split(50_432, 144, config, H100, torch.bfloat16)[0] == 1


def test_parts_are_worth_what_they_cost() -> None:
    """A part is written and read in float32: where hardly any time is unused there is but one."""
    tiles = tiles_of(SQUARE, 4096, 1024)  # L/16's fc1: 256 of 264 programs
    assert split(50_432, tiles, SQUARE, H100, torch.bfloat16)[0] == 1
