"""Adapters whose places are chosen on data (FISH Mask, Child-Tuning_D, U-BitFit, wanda's rows, ...), from a config: before
training the task's plan is attached by a function that looks at single training samples.

    trainer:
      callbacks:
        - class_path: mmpeft.tasks.AttachSelected
          init_args: {samples: 64}                                  # how: mmpeft.fish_ird, mmpeft.place, ...

A resumed run chooses again, and then takes the places that its checkpoint holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mmpeft.adapters import attach, attach_selected
from mmpeft.adapters.plan import Plan
from mmpeft.adapters.state import find_state
from mmpeft.errors import ConfigError, require
from mmpeft.tasks.step_control import quiet, sample_batches, training_loss

_lightning: Any = require("lightning.pytorch", "train")


class AttachSelected(_lightning.Callback):  # type: ignore[misc]
    """Attach the task's plan with places chosen on training samples.

    Args:
        samples: of the data module's training set, drawn by `seed`; the same on every rank.
        how: (model, plan, losses, name=..., options) -> attaches the adapter, or gives the plan to attach:
            `attach_selected`, `fish_ird`, `place`.
        options: other arguments of it, by name.
        loss: (task, batch) -> the loss of a batch of one sample; the default is the task's own training loss.

    Raises:
        ConfigError: the trainer has no data module, the task no plan, or `how` not these options.
    """

    def __init__(
        self,
        *,
        samples: int = 64,
        how: Callable[..., Any] = attach_selected,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        loss: Callable[[Any, Any], Tensor] = training_loss,
    ) -> None:
        self.takes, given = inspect.signature(how).parameters, dict(options or {})
        if samples < 1 or set(given) - set(self.takes):
            takes = ", ".join(self.takes)
            raise ConfigError(f"samples {samples}, options {sorted(given)}; expected 1 or more, some of {takes}")
        self.samples, self.how, self.options, self.seed, self.loss = samples, how, given, seed, loss

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        state = find_state(pl_module.model)
        if stage != "fit" or state is not None and pl_module.adapter in state.entries:
            return
        if trainer.datamodule is None or pl_module.plan is None:
            raise ConfigError("AttachSelected needs a data module, whose samples choose, and a task with a plan")
        pl_module.to(trainer.strategy.root_device)
        batches = sample_batches(trainer.datamodule.train_dataloader(), self.samples, self.seed)
        losses = [quiet(self.loss, trainer, pl_module, batch) for batch in batches]
        named = {"name": pl_module.adapter} if "name" in self.takes else {}
        made = self.how(pl_module.model, pl_module.plan, losses, **named, **self.options)
        if isinstance(made, Plan):
            attach(pl_module.model, made, pl_module.adapter)
