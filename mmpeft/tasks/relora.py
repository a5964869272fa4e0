"""ReLoRA's restarts under Lightning.

trainer = lightning.Trainer(callbacks=[ReLoRARestart(every=500, warmup=50)])
"""

from __future__ import annotations

from functools import partial

from mmpeft.adapters.methods.relora import Jagged, Restarts
from mmpeft.tasks.step_control import StepControl


class ReLoRARestart(StepControl):
    """Restart the task's ReLoRA adapter every so many optimizer steps, with a short climb of the learning rate after
    each; the task's own schedule is the envelope.

    Args:
        every: optimizer steps between restarts.
        warmup: steps of the climb.
        keep: share of the optimizer's moments that survives.
        adapter: name; None is every adapter of the model.
        seed: of the new start of each stage.
    """

    def __init__(
        self, every: int, *, warmup: int = 10, keep: float = 0.01, adapter: str | None = None, seed: int = 0
    ) -> None:
        Jagged(every, warmup, total=1)  # its checks, before a model is loaded
        super().__init__(partial(Restarts, every=every, warmup=warmup, keep=keep, seed=seed, name=adapter))
