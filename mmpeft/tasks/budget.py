"""A budget of wall-clock time instead of a number of steps.

How many steps fit is decided once: the first steps are timed, the number of steps is fixed from the seconds that are
left, and with it the whole learning-rate schedule. Both go into checkpoints, so a resumed run does what the first one
would have done, on whatever host.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from mmpeft.errors import ConfigError, require

_lightning: Any = require("lightning.pytorch", "train")
log = logging.getLogger(__name__)


class BudgetedSteps(_lightning.Callback):  # type: ignore[misc]
    """Stop after the number of optimizer steps that fit into `seconds`.

    The trainer itself should have no limit (`max_epochs: -1`). Until the number is known the schedule is in its warm-up.

    Args:
        seconds: wall clock from the start of `fit`, preparations (feature cache, first evaluation) included, to the last
            training step. Validation during training is not foreseen in it.
        skip: first steps, not timed (caches and memory pools are cold).
        measure: steps timed after them; the slowest fifth, when the host did something else besides, is left out.
        max_steps: at most so many, however fast the host is.

    Attributes:
        steps: the number fixed, None before; step_seconds: what a step took.

    Raises:
        ConfigError: values that are not positive.
    """

    def __init__(self, seconds: float, *, skip: int = 3, measure: int = 15, max_steps: int | None = None) -> None:
        for name, value in (("seconds", seconds), ("measure", measure), ("max_steps", max_steps)):
            if value is not None and value <= 0:
                raise ConfigError(f"BudgetedSteps: {name} must be positive, given {value}")
        if skip < 0:
            raise ConfigError(f"BudgetedSteps: skip must be 0 or more, given {skip}")
        self.seconds, self.skip, self.measure, self.max_steps = seconds, skip, measure, max_steps
        self.steps: int | None = None
        self.step_seconds: float | None = None
        self._started: float | None = None
        self._marks: list[float] = []
        self._seen = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self._started is None:
            self._started = time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._seen, self._marks = trainer.global_step, []
        if self.steps is not None:  # a resumed run keeps the number of the first
            self._apply(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.steps is not None or trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        self._marks.append(time.perf_counter())
        if len(self._marks) <= self.skip + self.measure:
            return
        assert self._started is not None
        timed = self._marks[self.skip :]
        seconds = _undisturbed([after - before for before, after in zip(timed, timed[1:], strict=False)])
        left = self.seconds - (self._marks[-1] - self._started)
        steps = trainer.global_step + max(0, int(left / seconds))
        steps = min(steps, self.max_steps) if self.max_steps is not None else steps
        self.steps, self.step_seconds = trainer.strategy.broadcast((max(steps, trainer.global_step + 1), seconds))
        self._apply(trainer, pl_module)
        if trainer.is_global_zero:
            print(
                f"{self.step_seconds:.3f} s a step, measured over {self.measure} steps: "
                f"{self.steps} steps fit into {self.seconds:.0f} s",
                flush=True,
            )

    def _apply(self, trainer: Any, pl_module: Any) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.steps
        pl_module.total_steps = self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "step_seconds": self.step_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.step_seconds = state["steps"], state["step_seconds"]


def _undisturbed(durations: list[float]) -> float:
    """The mean without the slowest fifth."""
    kept = sorted(durations)[: max(1, math.ceil(0.8 * len(durations)))]
    return sum(kept) / len(kept)
