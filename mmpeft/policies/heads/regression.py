"""Regression of the whole chunk at once, the default head (OpenVLA-OFT, Kim et al. 2025, arXiv 2502.19645).

Parallel decoding with an L1 loss is as good as diffusion on most demonstrations of one teacher and costs one forward.
It gives the median (L2: the mean) of what demonstrators did, so where they did two things it does neither.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmpeft.errors import ConfigError, nearest
from mmpeft.policies.heads.base import Head, valid_mean

NORMS = {"l1": lambda d: d.abs(), "l2": lambda d: d.square()}


class RegressionHead(Head):
    """The chunk in one forward.

    Args:
        norm: "l1" or "l2" distance to the demonstrated actions.
        depth: residual blocks before the output.
    """

    def __init__(self, *, norm: Literal["l1", "l2"] = "l1", depth: int = 0) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ConfigError(f"norm is 'l1' or 'l2', not {norm!r}{nearest(norm, NORMS)}")
        self.norm, self.depth = norm, depth

    def _build(self) -> None:
        self.to_actions = self.to_chunk(self.action_dim, depth=self.depth)

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        return valid_mean(NORMS[self.norm](self.to_actions(features) - actions), mask)

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        features = self._features(features)
        actions: Tensor = self.to_actions(features)
        return actions
