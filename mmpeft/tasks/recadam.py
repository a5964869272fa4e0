"""RecAdam (Chen et al. 2020, arXiv 2004.12651): Adam whose objective moves from the pretraining's to the task's.

    optimizer = RecAdam(mmpeft.parameter_groups(model, lr=2e-5), k=0.1, t0=250)

The pretraining's objective is the quadratic pull towards the values the optimizer starts from, and it is annealed away:
w <- w - lr (lambda adam + (1 - lambda) gamma (w - w0)), lambda = 1 / (1 + exp(-k (t - t0))).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from mmpeft.adapters.selection.optimizer import Preconditioned, adam, check_betas
from mmpeft.errors import ConfigError


class RecAdam(Preconditioned):
    """Adam, decoupled from an annealed pull towards the start.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used).
        k: how sharply the objective shifts.
        t0: step at which both have half.
        gamma: strength of the pull (5000 in the paper, with lr 2e-5).

    Raises:
        ConfigError: values out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-5,
        *,
        k: float = 0.1,
        t0: float = 250,
        gamma: float = 5000.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not k > 0 or t0 < 0 or gamma < 0 or not eps > 0:
            raise ConfigError(f"k {k}, t0 {t0}, gamma {gamma}, eps {eps}; expected > 0, >= 0, >= 0, > 0")
        check_betas(*betas)
        super().__init__(params, lr, weight_decay)
        self.k, self.t0, self.gamma, self.betas, self.eps = k, t0, gamma, betas, eps

    def update(self, p: Tensor, g: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state |= {"step": 0, "start": p.detach().clone()}
        state["step"] += 1
        task = 1 / (1 + math.exp(-self.k * (state["step"] - self.t0)))
        pull: Tensor = self.gamma * (p - state["start"])
        return task * adam(state, g, self.betas, self.eps) + (1 - task) * pull
