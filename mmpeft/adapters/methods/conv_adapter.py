"""ConvAdapter: a bottleneck with a small depthwise convolution inside, for maps and for the tokens of a picture.

    y + scale * up(act(depthwise(act(down(y)))))

A 1x1 bottleneck re-weights channels; what a policy often misses in frozen features is where things are, to a pixel or
two, and that takes a neighbourhood. Residual adapters in convolutional towers (Rebuffi et al. 2017, arXiv 1705.08045;
"Lossless adaptation" of Sharma et al. 2023, arXiv 2304.06600) and Convpass for ViTs (Jie and Deng 2022, arXiv
2207.07039) are of this kind; the depthwise kernel keeps it as small as the plain bottleneck. `up` starts at zero, so it
starts as the identity.

On tokens [B, T, C] the picture's grid has to be known: `grid`, or a square, after `prefix` leading tokens (class,
registers), which pass through the kernel's centre alone, as if each were a picture of one pixel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Tensors
from mmpeft.adapters.methods.bottleneck import ACTIVATIONS, Bottleneck
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class ConvAdapter(Bottleneck, name="conv_adapter"):
    """Serial bottleneck with a depthwise `kernel` x `kernel` convolution between its two projections, of the kind of
    Conv-Adapter (arXiv 2208.07463).

    Args:
        size, reduction, activation, scale, dropout, dim, bias: as in `Bottleneck`; `bias` is the kernel's too.
        kernel: side of the convolution; odd, so that the map keeps its size.
        grid: (rows, columns) of the tokens of a picture; None: a square.
        prefix: leading tokens that have no place on the grid.

    Raises:
        ConfigError: a value out of range; at the call, a tensor that is neither a map nor the tokens of such a grid.
    """

    reduction: int = 4
    kernel: int = 3
    grid: tuple[int, int] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"kernel {self.kernel}; expected an odd number (nearest: {max(1, self.kernel + 1)})")
        if self.prefix < 0:
            raise ConfigError(f"prefix {self.prefix}; expected 0 or more leading tokens")
        if self.grid is not None:
            if len(self.grid) != 2 or min(self.grid) < 1:
                raise ConfigError(f"grid {self.grid}; expected (rows, columns)")
            object.__setattr__(self, "grid", (int(self.grid[0]), int(self.grid[1])))  # YAML and JSON give a list

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        tensors = dict(super().init(site, base, context).trained)
        inner = tensors["down_weight"].shape[0]
        like = tensors["down_weight"]
        conv = nn.Conv2d(inner, inner, self.kernel, groups=inner, dtype=like.dtype, device=like.device)
        bias = {"conv_bias": torch.zeros(inner, dtype=like.dtype, device=like.device)} if self.bias else {}
        return Tensors(tensors | {"conv_weight": conv.weight.detach(), **bias})

    def update(self, x: Tensor, p: Delta) -> Tensor:
        """[B, C, h, w] or [B, T, C] -> the same shape, in x's dtype."""
        width = p.down_weight.shape[1]
        down, conv, up = (t.to(x.dtype) for t in (p.down_weight, p.conv_weight, p.up_weight))
        down_bias, up_bias = self.biases(p, x.dtype)
        conv_bias = p.conv_bias.to(x.dtype) if self.bias else None
        act = ACTIVATIONS[self.activation]
        if x.ndim == 4 and x.shape[1] == width:
            h = act(F.conv2d(x, down[:, :, None, None], down_bias))
            h = act(F.conv2d(h, conv, conv_bias, padding=self.kernel // 2, groups=conv.shape[0]))
            h = F.dropout(h, self.dropout, p.training)
            return self.scale * F.conv2d(h, up[:, :, None, None], up_bias)
        rows, columns = self._grid(x, p, width)
        h = act(F.linear(x, down, down_bias))  # [B, T, inner]
        lead, cells = h[:, : self.prefix], h[:, self.prefix :]
        cells = cells.transpose(1, 2).reshape(len(x), -1, rows, columns)
        cells = F.conv2d(cells, conv, conv_bias, padding=self.kernel // 2, groups=conv.shape[0])
        lead = lead * conv[:, 0, self.kernel // 2, self.kernel // 2]
        lead = lead if conv_bias is None else lead + conv_bias
        h = F.dropout(act(torch.cat([lead, cells.flatten(2).transpose(1, 2)], dim=1)), self.dropout, p.training)
        return self.scale * F.linear(h, up, up_bias)

    def _grid(self, x: Tensor, p: Delta, width: int) -> tuple[int, int]:
        """(rows, columns) of the tokens of `x`."""
        if x.ndim != 3 or x.shape[-1] != width:
            raise ConfigError(
                f"{p.site.path}: a tensor of shape {tuple(x.shape)} is neither a map [B, {width}, h, w] nor tokens "
                f"[B, T, {width}]"
            )
        cells = x.shape[1] - self.prefix
        rows, columns = self.grid or (isqrt(max(cells, 0)),) * 2
        if rows * columns != cells or cells < 1:
            raise ConfigError(
                f"{p.site.path}: {x.shape[1]} tokens are not {self.prefix} leading ones and a "
                f"{f'{rows} x {columns}' if self.grid else 'square'} grid; set prefix= and grid="
            )
        return rows, columns

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return super().flops(site, tensors) + 2 * tensors["conv_weight"].numel()
