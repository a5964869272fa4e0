"""Success rate of episodes as a metric, overall and by task, with its Wilson interval (`intervals.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpeft.metrics.base import PerSampleMetric
from mmpeft.metrics.intervals import wilson_interval


class SuccessRate(PerSampleMetric):
    """Success rate of episodes with its Wilson interval, overall and by kind (the task).

    `update(successes, kinds=...)` takes booleans; there are no references.
    """

    name = "success_rate"

    def __init__(self, *, level: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        wilson_interval(0, 1, level=level)
        self.level = level

    def score(self, prediction: Any, references: Sequence[str]) -> float:
        return float(bool(prediction))

    def update(  # type: ignore[override]
        self, successes: Sequence[bool] | Tensor, kinds: Sequence[str | None] | None = None
    ) -> None:
        """Add episodes."""
        given = list(successes)
        super().update(given, [["-"]] * len(given), kinds)

    def compute(self) -> dict[str, Tensor]:
        """`success_rate`, `success_rate_low`, `success_rate_high`, `episodes`, and the rate by task."""
        rates = super().compute()
        groups = self.by_kind()
        scores = torch.cat(list(groups.values())) if groups else torch.empty(0)
        low, high = wilson_interval(int(scores.sum()), len(scores), level=self.level)
        bounds = {f"{self.name}_low": low, f"{self.name}_high": high, "episodes": float(len(scores))}
        return {**rates, **{name: torch.tensor(value) for name, value in bounds.items()}}
