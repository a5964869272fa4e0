"""MLP with pixel shuffle: r x r neighbouring patches become one token of r*r*d_v channels, then an MLP (Q = T / r^2).

InternVL: r = 2, LayerNorm(4 d_v), Linear, GELU, Linear (the defaults). nanoVLM: r = 4, one bias-free Linear from
N(0, .02): `PixelShuffleMLP(factor=4, depth=1, bias=False, init_std=0.02, input_norm=False)`, 11.8 M at 768 -> 960.
Channels of one output token are ordered (row in block, column in block, channel), rows and columns never swapped.
Tokens must fill a whole grid: square unless `grid=(height, width)` says otherwise; a class token must be dropped first.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from mmpeft.connectors.base import Connector, require_positive
from mmpeft.connectors.mlp import activation_module, first_reader, projector
from mmpeft.errors import ConfigError


def space_to_depth(tokens: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Row-major grid tokens [B, H*W, D] -> [B, (H/r)*(W/r), r*r*D], channel order (row, column, D)."""
    rows, columns = height // factor, width // factor
    x = tokens.reshape(len(tokens), rows, factor, columns, factor, -1)
    return x.transpose(2, 3).reshape(len(tokens), rows * columns, -1)


def grid_of(owner: object, t: int, grid: tuple[int, int] | None, factor: int = 1) -> tuple[int, int]:
    """(height, width) of `t` tokens, each divisible by `factor`.

    Raises:
        ConfigError: `t` is not that grid; the message names the nearest valid count.
    """
    require_positive(owner, t=t)
    name = type(owner).__name__
    if grid is not None:
        if t != grid[0] * grid[1]:
            raise ConfigError(f"{name} expects {grid[0]} x {grid[1]} = {grid[0] * grid[1]} tokens, given {t}")
        return grid
    side = round(t**0.5)
    if side * side == t and side % factor == 0:
        return side, side
    near = max(factor, round(math.sqrt(t) / factor) * factor)
    multiple = f" whose side is a multiple of {factor}" if factor > 1 else ""
    hint = ""
    if side * side == t:
        divisors = ", ".join(str(d) for d in range(2, side + 1) if side % d == 0)
        hint = f"; the grid is {side} x {side}: factor could be {divisors or 1}"
    elif round((t - 1) ** 0.5) ** 2 == t - 1:
        hint = "; does the encoder keep its class token? Drop it"
    raise ConfigError(
        f"{name} expects a square grid of tokens{multiple}, given {t} tokens (nearest: {near * near}){hint}, "
        f"or pass grid=(height, width)"
    )


def check_grid(owner: object, grid: tuple[int, int] | None, factor: int = 1) -> tuple[int, int] | None:
    """The grid as a tuple of two positive multiples of `factor`, or None; raises ConfigError otherwise."""
    if grid is None:
        return None
    if len(grid) != 2:
        raise ConfigError(f"{type(owner).__name__}: grid must be (height, width), given {grid!r}")
    require_positive(owner, grid_height=grid[0], grid_width=grid[1])
    if grid[0] % factor or grid[1] % factor:
        near = tuple(max(factor, round(g / factor) * factor) for g in grid)
        raise ConfigError(f"{type(owner).__name__}: grid {tuple(grid)} is not divisible by {factor} (nearest: {near})")
    return grid[0], grid[1]


class PixelShuffleMLP(Connector):
    """[B, H*W, d_v] -> [B, H*W / factor^2, d_l].

    An output token is valid when any of its patches is.

    Args:
        factor: r, side of the block of patches that becomes one token.
        depth: number of Linears.
        hidden_dim: width between them; None = out_dim.
        activation: "gelu", "relu" or "silu".
        bias: biases on the Linears.
        init_std: None = PyTorch's default; else N(0, init_std).
        input_norm: LayerNorm over the r*r*d_v channels first (InternVL).
        grid: (height, width) when the tokens are not square.
        output_norm: end with a LayerNorm; see `Connector.set_output_std`.

    Raises:
        ConfigError: sizes not positive, or (num_tokens, forward) a token count that is no such grid.
    """

    layers: nn.Sequential

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        factor: int = 2,
        depth: int = 2,
        hidden_dim: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        init_std: float | None = None,
        input_norm: bool = True,
        grid: tuple[int, int] | None = None,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        require_positive(self, factor=factor, depth=depth, hidden_dim=hidden_dim)
        activation_module(activation)
        self.factor = factor
        self.depth = depth
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.bias = bias
        self.init_std = init_std
        self.input_norm = input_norm
        self.grid = check_grid(self, grid, factor)
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        stacked = self.factor**2 * in_dim
        layers = projector(
            stacked,
            self.hidden_dim or out_dim,
            out_dim,
            depth=self.depth,
            activation=self.activation,
            bias=self.bias,
            init_std=self.init_std,
        )
        self.layers = nn.Sequential(nn.LayerNorm(stacked), *layers) if self.input_norm else layers

    def num_tokens(self, t: int) -> int:
        height, width = grid_of(self, t, self.grid, self.factor)
        return height * width // self.factor**2

    def channel_readers(self) -> list[nn.Linear | nn.LayerNorm]:
        return first_reader(self.layers)

    def first_view(self, tokens: Tensor) -> Tensor:
        return space_to_depth(tokens, *grid_of(self, tokens.shape[1], self.grid, self.factor), self.factor)

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        grid = grid_of(self, tokens.shape[1], self.grid, self.factor)
        out = self.layers(space_to_depth(tokens, *grid, self.factor))
        valid = None if mask is None else space_to_depth(mask.unsqueeze(-1), *grid, self.factor).any(-1)
        return out, valid
