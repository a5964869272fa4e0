"""ReLoRA's restarts under Lightning.

trainer = lightning.Trainer(callbacks=[ReLoRARestart(every=500, warmup=50)])
"""

from __future__ import annotations

from typing import Any

from mmpeft.adapters.methods.relora import Jagged, restart
from mmpeft.errors import require

_lightning: Any = require("lightning.pytorch", "train")


class ReLoRARestart(_lightning.Callback):  # type: ignore[misc]
    """Restart the task's ReLoRA adapter every so many optimizer steps, with a short climb of the learning rate after
    each; the task's own schedule is the envelope.

    Args:
        every: optimizer steps between restarts.
        warmup: steps of the climb.
        keep: share of the optimizer's moments that survives.
        adapter: name; None is every adapter of the model.
    """

    def __init__(self, every: int, *, warmup: int = 10, keep: float = 0.01, adapter: str | None = None) -> None:
        self.jagged = Jagged(every, warmup, total=1)
        self.every, self.keep, self.adapter = every, keep, adapter
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._seen = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        ramp = self.jagged.ramp(trainer.global_step)
        for group in optimizer.param_groups:
            group["lr"] *= ramp  # the scheduler sets it anew for the next step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        if self._seen % self.every == 0:
            restart(pl_module.model, trainer.optimizers[0], keep=self.keep, name=self.adapter)
