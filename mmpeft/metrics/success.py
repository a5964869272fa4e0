"""Success rates with honest error bars, and the test whether one policy (or model) beats another on the same episodes.

The interval is Wilson's (1927): unlike the normal one it stays within 0..1 and is usable at 50 of 50. Two policies run
on the
same seeds are compared episode by episode, by the exact McNemar test: only the episodes on which they differ tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.metrics.base import PerSampleMetric


def wilson_interval(successes: int, trials: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Raises:
        ConfigError: successes outside 0..trials, or a level outside (0, 1). No trials give (0, 1).
    """
    if not 0 <= successes <= trials or not 0 < level < 1:
        raise ConfigError(f"need 0 <= successes <= trials and 0 < level < 1, got {successes} of {trials} at {level}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value that A and B succeed equally often, from the episodes that only one of them solved."""
    if only_a < 0 or only_b < 0:
        raise ConfigError(f"counts must not be negative, got {only_a} and {only_b}")
    trials = only_a + only_b
    term = tail = 1  # C(trials, 0), and the sum of C(trials, i) up to the smaller count
    for i in range(min(only_a, only_b)):
        term = term * (trials - i) // (i + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**trials))


def paired_test(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float]:
    """Difference of the success rates of A and B on the same episodes, and its McNemar p-value.

    Raises:
        ConfigError: not the same number of episodes, or none.
    """
    if len(a) != len(b) or not len(a):
        raise ConfigError(f"a paired test needs the same episodes on both sides, got {len(a)} and {len(b)}")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    return (only_a - only_b) / len(a), mcnemar_exact(only_a, only_b)


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
