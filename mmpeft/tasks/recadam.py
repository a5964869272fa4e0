"""RecAdam (Chen et al. 2020, arXiv 2004.12651): Adam whose objective moves from the pretraining's to the task's.

    optimizer = RecAdam(mmpeft.parameter_groups(model, lr=2e-5), k=0.1, t0=250)

The pretraining's objective is the quadratic pull towards the values the optimizer starts from, and it is annealed away:
w <- w - lr (lambda adam + (1 - lambda) gamma (w - w0)), lambda = 1 / (1 + exp(-k (t - t0))).
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, InitVar, dataclass

from torch import Tensor

from mmpeft.adapters.selection.optimizer import Adaptive
from mmpeft.errors import ConfigError


@dataclass(eq=False, repr=False)
class RecAdam(Adaptive):
    """Adam, decoupled from an annealed pull towards the start.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used).
        k: how sharply the objective shifts.
        t0: step at which both have half.
        gamma: strength of the pull (5000 in the paper, with lr 2e-5).
        betas, eps: of Adam.

    Raises:
        ConfigError: values out of range.
    """

    lr: InitVar[float] = 2e-5
    _: KW_ONLY
    k: float = 0.1
    t0: float = 250
    gamma: float = 5000.0

    def check(self) -> None:
        super().check()
        if not self.k > 0 or self.t0 < 0 or self.gamma < 0:
            raise ConfigError(f"k {self.k}, t0 {self.t0}, gamma {self.gamma}; expected > 0, >= 0, >= 0")

    def update(self, p: Tensor, g: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state |= {"step": 0, "start": p.detach().clone()}
        state["step"] += 1
        task = 1 / (1 + math.exp(-self.k * (state["step"] - self.t0)))
        pull: Tensor = self.gamma * (p - state["start"])
        return task * self.adam(state, g) + (1 - task) * pull
