"""The C-Abstractor (Honeybee): convolutions keep the picture's locality while the token count is chosen freely.

Learned 2-D positions are added, `depth` RegNet blocks run at the encoder's grid, adaptive average pooling brings it to
sqrt(Q) x sqrt(Q), `depth` more blocks follow, then a SiLU MLP into the LLM's width. Positions are a square table of
`position_side`, interpolated to grids of another size.

Paper: Cha et al., Honeybee, 2024.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.connectors.base import Connector, require_positive
from mmpeft.connectors.mlp import projector
from mmpeft.connectors.pixel_shuffle import check_grid, grid_of
from mmpeft.errors import ConfigError


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """[B, C, H, W] scaled by a gate per channel, computed from the channels' means."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(dim, hidden_dim, 1)
        self.up = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.up(F.silu(self.down(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class RegBlock(nn.Module):
    """RegNet-Y bottleneck with LayerNorm and SiLU: [B, C_in, H, W] -> [B, C_out, H, W]; the 3x3 is depthwise."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, out_dim, 1, bias=False)
        self.norm1 = LayerNorm2d(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1, groups=out_dim, bias=False)
        self.norm2 = LayerNorm2d(out_dim)
        self.excite = SqueezeExcite(out_dim, max(1, round(in_dim / 4)))
        self.conv3 = nn.Conv2d(out_dim, out_dim, 1, bias=False)
        self.norm3 = LayerNorm2d(out_dim)
        self.shortcut: nn.Module = nn.Identity()
        if in_dim != out_dim:
            self.shortcut = nn.Sequential(nn.Conv2d(in_dim, out_dim, 1, bias=False), LayerNorm2d(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.excite(F.silu(self.norm2(self.conv2(y))))
        return F.silu(self.norm3(self.conv3(y)) + self.shortcut(x))


def reg_stage(depth: int, in_dim: int, out_dim: int) -> nn.Sequential:
    """`depth` RegNet blocks at one resolution."""
    return nn.Sequential(*(RegBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(depth)))


class CAbstractor(Connector):
    """[B, H*W, d_v] -> [B, num_queries, d_l]; num_queries is a square (144, 256, 576 in the paper).

    Padded tokens of a masked grid count as zeros; a sample without one valid token gives no valid output.

    Args:
        num_queries: Q.
        hidden_dim: channels of the blocks.
        depth: RegNet blocks before and after the pooling.
        mlp_depth: Linears at the end.
        position_side: side of the learned position table (24: CLIP ViT-L/14 at 336).
        grid: (height, width) when the tokens are not square.
        output_norm: end with a LayerNorm; see `Connector.set_output_std`.

    Raises:
        ConfigError: num_queries not a square, a size not positive, or (num_tokens, forward) tokens that are no grid.
    """

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        num_queries: int = 144,
        hidden_dim: int = 1024,
        depth: int = 3,
        mlp_depth: int = 2,
        position_side: int = 24,
        grid: tuple[int, int] | None = None,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        sizes = {"num_queries": num_queries, "hidden_dim": hidden_dim, "depth": depth, "mlp_depth": mlp_depth}
        require_positive(self, **sizes, position_side=position_side)
        self.side = math.isqrt(num_queries)
        if self.side**2 != num_queries:
            near = round(math.sqrt(num_queries)) ** 2
            raise ConfigError(f"CAbstractor: num_queries must be a square, given {num_queries} (nearest: {near})")
        self.num_queries = num_queries
        self.hidden_dim = hidden_dim
        self.depth = depth
        self.mlp_depth = mlp_depth
        self.position_side = position_side
        self.grid = check_grid(self, grid)
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.before = reg_stage(self.depth, in_dim, self.hidden_dim)
        self.after = reg_stage(self.depth, self.hidden_dim, self.hidden_dim)
        self.layers = projector(self.hidden_dim, out_dim, out_dim, depth=self.mlp_depth, activation="silu")
        self.positions = nn.Parameter(torch.empty(self.position_side**2, in_dim))  # row-major, as the tokens
        nn.init.trunc_normal_(self.positions, std=0.02)

    def num_tokens(self, t: int) -> int:
        grid_of(self, t, self.grid)
        return self.num_queries

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        height, width = grid_of(self, tokens.shape[1], self.grid)
        positions = self.positions.to(tokens.dtype).T.reshape(-1, self.position_side, self.position_side)
        if (height, width) != positions.shape[1:]:
            positions = F.interpolate(positions[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        x = tokens.transpose(1, 2).reshape(len(tokens), -1, height, width) + positions  # [B, d_v, H, W]
        x = F.adaptive_avg_pool2d(self.before(x), (self.side, self.side))
        out = self.layers(self.after(x).flatten(2).transpose(1, 2))
        valid = None if mask is None else mask.any(1, keepdim=True).expand(-1, self.num_queries)
        return out, valid
