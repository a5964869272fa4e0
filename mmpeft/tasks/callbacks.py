"""Saving the adapter: the folder that is loaded, shared and merged later, beside Lightning's own checkpoints."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

from mmpeft.adapters import save
from mmpeft.errors import ConfigError, NameNotFound, nearest, require

_lightning: Any = require("lightning.pytorch", "train")
log = logging.getLogger(__name__)


class AdapterCheckpoint(_lightning.Callback):  # type: ignore[misc]
    """Write the task's adapter to `folder`: at the end of training, or whenever a validation is the best so far.

    The folder also keeps what `mmpeft generate` and `mmpeft merge` need to build the model again (where the command line
    built it), the step and the metrics.

    Args:
        folder: see `mmpeft.save`; what was there is replaced in one atomic move. None: `adapter` in the logger's
            folder.
        monitor: a logged value; None saves at the end.
        mode: whether the largest or the smallest `monitor` is the best.

    Raises:
        ConfigError: an unknown mode, or neither a folder nor a logger that has one.
        NameNotFound: `monitor` was not logged by the validation.
    """

    def __init__(
        self, folder: str | None = None, *, monitor: str | None = None, mode: Literal["max", "min"] = "max"
    ) -> None:
        if mode not in ("max", "min"):
            raise ConfigError(f"mode is 'max' or 'min', not {mode!r}")
        self.folder = None if folder is None else Path(folder)
        self.monitor, self.mode = monitor, mode
        self.best: float | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.folder is None:
            logs = trainer.log_dir
            if trainer.logger is None or logs is None:
                raise ConfigError("AdapterCheckpoint needs folder=, since this trainer has no logger with a folder")
            self.folder = Path(logs) / "adapter"

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = list(trainer.callback_metrics)
            hint = nearest(self.monitor, known)
            raise NameNotFound(f"monitor {self.monitor!r} was not logged; logged are {', '.join(known) or 'none'}{hint}")
        value = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        if not math.isnan(value) and (self.best is None or sign * value > sign * self.best):
            self.best = value
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is None or self.best is None:
            self._save(trainer, pl_module)

    def _save(self, trainer: Any, pl_module: Any) -> None:
        assert self.folder is not None
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if math.isfinite(float(v))}
        metadata: dict[str, Any] = {"step": trainer.global_step, "metrics": metrics}
        if pl_module.recipe is not None:
            metadata["model"] = pl_module.recipe
        save(pl_module.model, self.folder, pl_module.adapter, metadata=metadata)
        if trainer.is_global_zero:
            log.info("adapter %r of step %d saved to %s", pl_module.adapter, trainer.global_step, self.folder)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
