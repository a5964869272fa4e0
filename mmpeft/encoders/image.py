"""Pictures to tokens: what all image backbones share; each library's part is in `image_<library>.py`.

Every tower answers one question, `features`: pixels to its prefix tokens (class, registers) and its map [B, d_v, h, w].
The rest is common: prefix tokens are dropped or kept in front, the map is pooled to a fixed grid or not, and rows of
the map become tokens in reading order. Convolutional backbones have a map and no prefix, so they need no case of their own.

The grid (h, w) of a picture size is not computed from formulas, one per architecture, that could disagree with the
network: a copy of the network on the meta device, without storage, is run once per size and its answer remembered.
It needs no device, so dataloader workers can ask for `num_tokens` too.

`layer` counts the library's own taps: the blocks of a transformer, the stages of a convolutional net (timm's
`out_indices`). The last one is the library's final output, final norm included; earlier ones are as the block left them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.encoders.base import Encoder, resolve_layer
from mmpeft.encoders.image_preprocess import ImagePreprocess
from mmpeft.errors import ConfigError


class ImageEncoder(Encoder):
    """A vision backbone as tokens [B, T, d_v], T = prefix (if kept) + grid or pool cells.

    Args:
        backbone: the library's module.
        layer: which tap, -1 the last, -2 the second to last, or a stage or block counted from 0.
        image_size: side in pixels of the square pictures that `preprocess` makes.
        pool: (rows, columns) of an adaptive average pooling of the map, or None for the map's own grid.
        drop_class_token: leave out class, distillation and register tokens.

    Raises:
        ConfigError: a layer that is not there, a picture size the backbone refuses, a pool larger than the map.
    """

    modality = "image"

    def __init__(
        self, backbone: nn.Module, *, name: str, preprocess: ImagePreprocess, image_size: int, num_layers: int,
        layer: int = -1, pool: tuple[int, int] | None = None, drop_class_token: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(backbone, name=name, dim=0, preprocess=preprocess)
        self.index = resolve_layer(name, layer, num_layers)
        self.last = self.index == num_layers - 1
        self.image_size = image_size
        self.pool = pool
        self.drop_class_token = drop_class_token
        self.prepare(num_layers)
        self.__dict__["_twin"] = _meta_copy(self.backbone)  # not a submodule: it follows no .to() and has no weights
        self._grids: dict[tuple[int, int], tuple[int, int, int]] = {}
        _, rows, columns = self._probe(image_size, image_size)
        if pool is not None and (pool[0] > rows or pool[1] > columns or min(pool) < 1):
            raise ConfigError(f"pool={pool} does not fit the {rows} x {columns} map of {name!r} at {image_size} pixels")

    @abstractmethod
    def features(self, backbone: nn.Module, pixels: Tensor) -> tuple[Tensor | None, Tensor]:
        """Pixels [B, 3, H, W] to prefix tokens [B, P, d_v] (or None) and the map [B, d_v, h, w] of the chosen layer."""

    def prepare(self, num_layers: int) -> None:
        """Remove what no tap needs, where the library can."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        """Pixels [B, 3, H, W] to tokens [B, T, d_v]; every token is valid, so the mask is None."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ConfigError(f"{self.name!r} reads pixels [B, 3, H, W], not {list(x.shape)}")
        prefix, grid = self.features(self.backbone, x.to(next(self.backbone.parameters()).dtype))
        if self.pool is not None:
            grid = F.adaptive_avg_pool2d(grid, self.pool)
        tokens = grid.flatten(2).transpose(1, 2)
        if prefix is not None and not self.drop_class_token:
            tokens = torch.cat([prefix, tokens], dim=1)
        return tokens, None

    def num_tokens(self, shape: Any) -> int:
        """Tokens for pixels of shape (C, H, W) or (H, W)."""
        height, width = int(shape[-2]), int(shape[-1])
        prefix, rows, columns = self._probe(height, width)
        if self.pool is not None:
            rows, columns = self.pool
        return rows * columns + (0 if self.drop_class_token else prefix)

    def config(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__, "layer": self.index, "pool": self.pool, "image_size": self.image_size,
            "drop_class_token": self.drop_class_token, "preprocess": repr(self.preprocess),
        }  # fmt: skip

    def _probe(self, height: int, width: int) -> tuple[int, int, int]:
        """(prefix tokens, rows, columns) for one picture size, from the copy on the meta device."""
        if (height, width) not in self._grids:
            twin: nn.Module = self.__dict__["_twin"]
            pixels = torch.empty(1, 3, height, width, device="meta", dtype=next(twin.parameters()).dtype)
            try:
                with torch.no_grad():
                    prefix, grid = self.features(twin, pixels)
            except Exception as error:  # the library's own words for a size it cannot take
                raise ConfigError(
                    f"{self.name!r} cannot take pictures of {height} x {width} pixels "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                    f"it was loaded for {self.image_size} x {self.image_size}, other sizes need image_size="
                ) from error
            self.dim = grid.shape[1]
            self._grids[height, width] = (0 if prefix is None else prefix.shape[1], grid.shape[2], grid.shape[3])
        return self._grids[height, width]


def _meta_copy(module: nn.Module) -> nn.Module:
    """The same structure with every tensor on the meta device: shapes without storage."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, memo)
