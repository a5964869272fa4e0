"""The control without pretraining: a small convolutional net with the interface of `TappedEncoder`, trained whole.

Five convolutions to a map of stride 8, GroupNorm and ReLU after each. A claim about pretrained features needs it: in a
zoomed view, with fifty demonstrations, it is as good as any adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.policies.parts import Part
from mmpeft.policies.prefix import as_pixels


class ScratchEncoder(Part):
    """Pictures to one map of stride 8.

    Args:
        channels: of its convolutions; the first three halve the map.
    """

    split: None = None

    def __init__(self, *, channels: Sequence[int] = (32, 64, 96, 96, 96)) -> None:
        super().__init__()
        if len(channels) < 3 or min(channels) < 1:
            raise ConfigError(f"channels names at least three positive widths, given {list(channels)}")
        widths = [3, *channels]
        layers: list[nn.Module] = []
        for i, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(into, out, 3, 2 if i < 3 else 1, 1), nn.GroupNorm(1, out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def pixels(self, images: Any) -> Tensor:
        """Bytes [N, H, W, 3] to pixels [N, 3, H, W] in -1 .. 1."""
        return as_pixels(images, next(self.parameters()).device) * 2 - 1

    def shapes(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(C, h, w) of the map."""
        with torch.no_grad():
            found = self(torch.zeros(1, 3, height, width, device=next(self.parameters()).device))
        return [tuple(m.shape[1:]) for m in found]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Pixels [N, 3, H, W] to [map [N, C, h, w]]."""
        return [self.layers(pixels)]
