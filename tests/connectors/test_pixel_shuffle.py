"""Pixel shuffle against an explicit loop, the order of height and width, and token counts that are no grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmpeft.connectors import CAbstractor, PixelShuffleMLP
from mmpeft.connectors.pixel_shuffle import space_to_depth
from mmpeft.errors import ConfigError


def by_loop(tokens: Tensor, height: int, width: int, r: int) -> Tensor:
    out = []
    for top in range(0, height, r):
        for left in range(0, width, r):
            block = [tokens[:, (top + i) * width + left + j] for i in range(r) for j in range(r)]
            out.append(torch.cat(block, dim=-1))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize(("height", "width", "r"), [(4, 4, 2), (6, 9, 3), (2, 8, 2), (8, 4, 4), (3, 5, 1)])
def test_equal_to_the_loop(height: int, width: int, r: int) -> None:
    x = torch.randn(2, height * width, 5)
    assert torch.equal(space_to_depth(x, height, width, r), by_loop(x, height, width, r))


def test_height_and_width_keep_their_places() -> None:
    """On a 2 x 6 grid with r = 2, output token k holds columns 2k and 2k + 1 of both rows."""
    index = torch.arange(12.0).reshape(1, 12, 1)
    assert space_to_depth(index, 2, 6, 2).tolist() == [[[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]]


def test_non_square_grid_and_mask() -> None:
    connector = PixelShuffleMLP(in_dim=5, out_dim=7, grid=(2, 6))
    assert connector.num_tokens(12) == 3
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[:, [4, 5, 10, 11]] = False  # the last block
    mask[:, 0] = False  # part of the first
    out, valid = connector(torch.randn(1, 12, 5), mask)
    assert out.shape == (1, 3, 7) and valid.tolist() == [[True, True, False]]


def test_token_counts_that_are_no_grid() -> None:
    connector = PixelShuffleMLP(in_dim=5, out_dim=7, factor=2)
    assert connector.num_tokens(256) == 64
    with pytest.raises(ConfigError, match=r"given 257 tokens \(nearest: 256\).*class token"):
        connector.num_tokens(257)
    with pytest.raises(
        ConfigError, match=r"given 729 tokens \(nearest: (676|784)\).*27 x 27: factor could be 3, 9, 27"
    ):
        connector.num_tokens(729)
    with pytest.raises(ConfigError, match=r"given 200 tokens \(nearest: 196\)"):
        connector(torch.randn(1, 200, 5))
    with pytest.raises(ConfigError, match=r"2 x 6 = 12 tokens, given 16"):
        PixelShuffleMLP(grid=(2, 6)).num_tokens(16)
    with pytest.raises(ConfigError, match=r"\(2, 7\) is not divisible by 2 \(nearest: \(2, 8\)\)"):
        PixelShuffleMLP(grid=(2, 7))
    with pytest.raises(ConfigError, match=r"given 10 tokens \(nearest: 9\)"):
        CAbstractor().num_tokens(10)
    with pytest.raises(ConfigError, match=r"square, given 140 \(nearest: 144\)"):
        CAbstractor(num_queries=140)
