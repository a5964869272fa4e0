"""What the optimizers of this project share: groups with lr and weight decay, and one loop over the gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError


class Preconditioned(torch.optim.Optimizer):
    """`w <- (1 - lr weight_decay) w - lr update(w, g)`; a subclass gives `update` and keeps what it needs in `state`.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used, as `mmpeft.parameter_groups` makes them).

    Raises:
        ConfigError: lr or weight_decay out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float) -> None:
        if not lr > 0 or weight_decay < 0:
            raise ConfigError(f"lr {lr}, weight_decay {weight_decay}; expected > 0, >= 0")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @abstractmethod
    def update(self, p: Tensor, g: Tensor) -> Tensor:
        """The direction of one parameter, of its shape."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients that are there, or that `closure` makes; returns what it returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = self.update(p, p.grad)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
        return loss


def check_betas(*betas: float) -> None:
    """Refuse averages whose weight of the past is not in [0, 1)."""
    if not all(0 <= b < 1 for b in betas):
        raise ConfigError(f"betas {betas}; expected each in [0, 1)")


def adam(state: dict[str, Any], g: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's direction for a gradient; its moments live in `state`, whose "step" the caller has counted."""
    m, v = (state.setdefault(n, torch.zeros_like(g)) for n in ("exp_avg", "exp_avg_sq"))
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    step = state["step"]
    out: Tensor = (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
    return out
