"""Honest error bars of a success rate, and the test whether A beats B on the same episodes; plain Python, no torchmetrics.

The interval is Wilson's (1927): unlike the normal one it stays within 0..1 and is usable at 50 of 50. Two policies (or
models) run on the same seeds are compared episode by episode, by the exact McNemar test: only the episodes on which they
differ tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist

from mmpeft.errors import ConfigError


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
