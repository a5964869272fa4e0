"""The learning-rate schedule: a linear warm-up, then a decay to a share of the peak. A pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

from mmpeft.errors import ConfigError, nearest

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` below 1 is a share of `total`, from 1 on a number of steps."""
    return int(warmup) if warmup >= 1 else math.ceil(warmup * total)


def lr_factor(step: int, total: int, *, warmup: float = 0.05, schedule: Schedule = "cosine", final: float = 0.01) -> float:
    """What the peak learning rate is multiplied by at optimizer step `step` (counted from 0) out of `total`.

    The first step of a warm-up of w steps has 1/w, so no step is wasted on a rate of zero; the last step of training has
    (nearly) `final`.
    """
    warm = warmup_steps(warmup, total)
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, total - 1 - warm))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[schedule]
    return shape if schedule == "constant" else final + (1 - final) * shape


def check_schedule(warmup: float, schedule: str, final: float) -> None:
    """Refuse values that make no schedule.

    Raises:
        ConfigError: an unknown name, a negative warm-up, a final share outside 0 .. 1.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}; valid: {', '.join(SCHEDULES)}{nearest(schedule, SCHEDULES)}")
    if warmup < 0:
        raise ConfigError(f"warmup is a share of training below 1 or a number of steps, not {warmup}")
    if not 0 <= final <= 1:
        raise ConfigError(f"final_lr is a share of the peak between 0 and 1, not {final}")
