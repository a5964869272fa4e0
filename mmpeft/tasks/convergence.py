"""Stop when training has stopped paying: an adaptive plateau of the training loss itself, no validation needed.

    stop = Plateau(window=50)
    for ...: if stop(loss): break                       # or ConvergenceStop() as a Lightning callback

The mean loss of the last `window` steps is compared with that of the window before. A gain counts as progress only when
it is above `tolerance` of the loss and above `noise` standard errors of the difference, so the threshold adapts to how
noisy the loss is; after `patience` windows without progress training stops.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from statistics import fmean, variance
from typing import Any

from mmpeft.errors import ConfigError, require

_lightning: Any = require("lightning.pytorch", "train")
log = logging.getLogger(__name__)


class Plateau:
    """Called with the loss of every step; True once it no longer falls.

    Args:
        window: steps that are averaged, at least 2.
        tolerance: share of the loss that a window must gain.
        noise: standard errors that it must gain.
        patience: windows in a row without such a gain.
    """

    def __init__(self, *, window: int = 50, tolerance: float = 0.01, noise: float = 1.0, patience: int = 2) -> None:
        if window < 2 or patience < 1 or tolerance < 0 or noise < 0:
            raise ConfigError(
                f"window {window}, patience {patience}, tolerance {tolerance}, noise {noise}; "
                "expected at least 2, 1, 0 and 0"
            )
        self.window, self.tolerance, self.noise, self.patience = window, tolerance, noise, patience
        self.recent: list[float] = []
        self.best: tuple[float, float] | None = None  # mean and its squared standard error
        self.idle = 0

    def __call__(self, loss: float) -> bool:
        """Count one step.

        Raises:
            ConfigError: a loss that is not finite.
        """
        loss = float(loss)
        if not math.isfinite(loss):
            raise ConfigError(f"the loss is {loss}: training has diverged, which is no convergence")
        self.recent.append(loss)
        if len(self.recent) < self.window:
            return False
        mean, error = fmean(self.recent), variance(self.recent) / self.window
        self.recent = []
        if self.best is None:
            self.best = (mean, error)
            return False
        needed = max(self.tolerance * abs(self.best[0]), self.noise * math.sqrt(error + self.best[1]))
        if self.best[0] - mean > needed:
            self.best, self.idle = (mean, error), 0
        else:
            self.idle += 1
        return self.idle >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"recent": list(self.recent), "best": self.best, "idle": self.idle}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict()`."""
        self.recent, self.idle = list(state["recent"]), int(state["idle"])
        self.best = None if state["best"] is None else tuple(state["best"])


class ConvergenceStop(_lightning.Callback):  # type: ignore[misc]
    """End `fit` at a plateau of the training loss; takes the options of `Plateau`."""

    def __init__(self, *, window: int = 50, tolerance: float = 0.01, noise: float = 1.0, patience: int = 2) -> None:
        self.plateau = Plateau(window=window, tolerance=tolerance, noise=noise, patience=patience)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if self.plateau(trainer.strategy.reduce(loss.detach().float(), reduce_op="mean")):
            log.info("stopped at step %d: the loss no longer falls", trainer.global_step)
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return self.plateau.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plateau.load_state_dict(state)
