"""Schedules: functions of the optimizer step, which every budget, sparsity, share and penalty here follows.

    Constant(0.1)                  the same at every step
    Ramp(0.0, 0.5, 0, 1000)        from the first value at step `begin` straight to the last at step `end`
    Cubic(1.0, 0.25, 100, 1000)    as (1 - progress)^3: AdaLoRA's budget, and most pruning since Zhu & Gupta 2017
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmpeft.errors import ConfigError

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Ramp:
    """`first` until step `begin`, then straight to `last` at step `end`.

    Raises:
        ConfigError: not 0 <= begin < end.
    """

    first: float
    last: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ConfigError(f"begin {self.begin}, end {self.end}; expected 0 <= begin < end")

    def progress(self, step: int) -> float:
        """0 before `begin`, 1 from `end` on."""
        return min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))

    def __call__(self, step: int) -> float:
        return self.first + (self.last - self.first) * self.progress(step)


@dataclass(frozen=True)
class Cubic(Ramp):
    """`first` until step `begin`, then to `last` at step `end` as (1 - progress)^3."""

    def __call__(self, step: int) -> float:
        return self.last + (self.first - self.last) * (1 - self.progress(step)) ** 3
