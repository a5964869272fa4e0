"""What is left of earlier tasks, and what they help later ones, out of a success matrix.

    R[i, j]: score on task j after learning tasks 0 .. i; T tasks learned one after another give T rows.

Names and definitions are those of GEM (Lopez-Paz & Ranzato 2017, arXiv 1706.08840) and of Chaudhry et al. (2018, arXiv
1801.10112). `summary` gives them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError

Matrix = NDArray[np.float64]


def average_score(R: Any) -> float:
    """Mean over tasks after the last one was learned: mean_j R[T-1, j]. GEM's ACC."""
    return float(_matrix(R)[-1].mean())


def learning_score(R: Any) -> float:
    """Mean of each task right after it was learned, mean_i R[i, i]: what plasticity is left."""
    return float(np.diag(_matrix(R)).mean())


def backward_transfer(R: Any) -> float:
    """Mean over all but the last task of R[T-1, j] - R[j, j]: negative where later tasks took away. GEM's BWT.

    Raises:
        ConfigError: fewer than two tasks.
    """
    m = _matrix(R, least=2)
    return float((m[-1] - np.diag(m))[:-1].mean())


def forgetting(R: Any) -> float:
    """Mean over all but the last task of its best score before the end minus its last, max_{i<T-1} R[i, j] - R[T-1, j], over
    rows since it was learned (Chaudhry et al. 2018).

    Raises:
        ConfigError: fewer than two tasks.
    """
    m = _matrix(R, least=2)
    best = [m[j:-1, j].max() for j in range(len(m) - 1)]
    return float((np.array(best) - m[-1, :-1]).mean())


def forward_transfer(R: Any, before: Any) -> float:
    """Mean over all but the first task of R[j-1, j] - before[j]: what earlier tasks give before it is learned. GEM's FWT.

    Args:
        before: [T], the score of the model before the first task.

    Raises:
        ConfigError: fewer than two tasks, or another number of scores.
    """
    m, b = _matrix(R, least=2), np.asarray(before, np.float64)
    if b.shape != (len(m),):
        raise ConfigError(f"expected {len(m)} scores from before the first task, given shape {list(b.shape)}")
    return float((np.diag(m, 1) - b[1:]).mean())


def summary(R: Any, before: Any) -> dict[str, float]:
    """{"average", "learning", "backward_transfer", "forgetting", "forward_transfer"}."""
    return {
        "average": average_score(R), "learning": learning_score(R), "backward_transfer": backward_transfer(R),
        "forgetting": forgetting(R), "forward_transfer": forward_transfer(R, before),
    }  # fmt: skip


def _matrix(R: Any, *, least: int = 1) -> Matrix:
    m: Matrix = np.asarray(R, np.float64)
    if m.ndim != 2 or m.shape[0] != m.shape[1] or len(m) < least or not np.isfinite(m).all():
        raise ConfigError(f"expected finite scores [T, T] of at least {least} tasks, given {list(m.shape)}")
    return m
