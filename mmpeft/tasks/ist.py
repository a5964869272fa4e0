"""IST under Lightning: a few layers of the task's adapter train at a time.

trainer = lightning.Trainer(callbacks=[LayerSampling(active=4)])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmpeft.adapters.selection.layers import LayerSampler
from mmpeft.errors import ConfigError, require

_lightning: Any = require("lightning.pytorch", "train")


def generation_loss(task: Any, batch: Any) -> Tensor:
    """Mean loss of a `GenerationTask`'s batch."""
    output = task.model(batch["inputs"])
    mean: Tensor = output.loss_sum / max(1, output.num_supervised)
    return mean


class LayerSampling(_lightning.Callback):  # type: ignore[misc]
    """Draw the layers that train anew every optimizer step, and update their importance every `every` steps on the
    batch at hand.

    Args:
        active, suppressed, trials, factor, lr, seed: as in `LayerSampler`.
        every: steps between updates.
        loss: (task, batch) -> scalar loss; the default is a `GenerationTask`'s.
        adapter: name; None is the task's own.
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
        loss: Callable[[Any, Any], Tensor] = generation_loss,
        adapter: str | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every {every}; expected at least 1")
        self.options: dict[str, Any] = {
            "active": active, "suppressed": suppressed, "trials": trials, "factor": factor, "lr": lr, "seed": seed,
        }  # fmt: skip
        self.every, self.loss, self.adapter = every, loss, adapter
        self.sampler: LayerSampler | None = None
        self._restored: Tensor | None = None
        self._seen = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.sampler = LayerSampler(pl_module.model, name=self.adapter or pl_module.adapter, **self.options)
        if self._restored is not None:
            self.sampler.importance.copy_(self._restored)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.sampler is not None
        step = trainer.global_step
        if step == self._seen:  # another micro-batch of the same optimizer step
            return
        self._seen = step
        if step and step % self.every == 0:
            training = pl_module.training
            pl_module.eval()
            self.sampler.update(lambda: self.loss(pl_module, batch))
            pl_module.train(training)
        self.sampler.draw()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.sampler is not None
        self.sampler.release()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.sampler is None else {"importance": self.sampler.importance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state.get("importance")
