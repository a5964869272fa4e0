"""Rank controllers under Lightning: the policies of `mmpeft.adapters.selection.rank_policies` as a callback.

trainer = lightning.Trainer(callbacks=[RankControl(mmpeft.Budget(target=4, total_steps=1000))])
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from mmpeft.adapters.selection.compact import compact
from mmpeft.adapters.selection.rank import Policy, RankController
from mmpeft.errors import require

_lightning: Any = require("lightning.pytorch", "train")
log = logging.getLogger(__name__)


class RankControl(_lightning.Callback):  # type: ignore[misc]
    """Run a policy on the task's adapter: after every optimizer step, and its penalty's gradient before it.

    The penalty is added to the gradients once an optimizer step, whatever is accumulated. (A task that corrects for
    unequal micro-batches does so after this, by the same small factor on the penalty.)

    Args:
        policy: `Budget`, `Proximal`, `Sampled`, `Growth`, ...
        adapter: name; None is every adapter of the model.
        shrink: `compact` the adapter when training ends, so that what is saved is as small as what is in use.
    """

    def __init__(self, policy: Policy, *, adapter: str | None = None, shrink: bool = False) -> None:
        self.policy, self.adapter, self.shrink = policy, adapter, shrink
        self.controller: RankController | None = None
        self._restored: dict[str, Any] | None = None
        self._seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.controller = RankController(pl_module.model, self.policy, name=self.adapter)
        if self._restored is not None:
            self.controller.load_state_dict(self._restored)
        self._seen = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        assert self.controller is not None
        with torch.enable_grad():
            penalty = self.controller.penalty()
        if not penalty.requires_grad:
            return
        params = [p for d in self.controller.sites.values() for p in d.parameters() if p.requires_grad]
        for p, g in zip(params, torch.autograd.grad(penalty, params, allow_unused=True), strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert self.controller is not None
        if trainer.global_step != self._seen:  # the gradients of the step are there until the next one clears them
            self._seen = trainer.global_step
            used = self.controller.step(trainer.global_step)
            pl_module.log("rank", float(used))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.controller is not None
        if self.shrink:
            log.info("ranks after training: %s", compact(pl_module.model, self.adapter))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.controller is None else self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state or None
