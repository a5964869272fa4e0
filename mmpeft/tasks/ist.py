"""IST under Lightning: a few layers of the task's adapter train at a time.

trainer = lightning.Trainer(callbacks=[LayerSampling(active=4)])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from mmpeft.adapters.selection.layers import LayerSampler
from mmpeft.errors import ConfigError
from mmpeft.tasks.step_control import StepControl, training_loss


class LayerSampling(StepControl):
    """Draw the layers that train anew every optimizer step, and update their importance every `every` steps on the
    batch at hand. (Under DDP, layers without a gradient need the strategy `ddp_find_unused_parameters_true`.)

    Args:
        active, suppressed, trials, factor, lr, every, seed: as in `LayerSampler`.
        loss: (task, batch) -> scalar loss; the default is the task's training loss.
        adapter: name; None is every adapter of the model.
    """

    def __init__(
        self,
        active: int,
        *,
        every: int = 10,
        suppressed: int | None = None,
        trials: int = 3,
        factor: float = 0.25,
        lr: float = 10.0,
        seed: int = 0,
        loss: Callable[[Any, Any], Tensor] = training_loss,
        adapter: str | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every {every}; expected at least 1")
        make = partial(
            LayerSampler, active=active, suppressed=suppressed, trials=trials, factor=factor, lr=lr, every=every,
            seed=seed, name=adapter,
        )  # fmt: skip
        super().__init__(make, loss=loss)
