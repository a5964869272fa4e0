"""What the optimizers of this project share: options as fields, groups with lr and weight decay, one loop of steps.

    @dataclass(eq=False, repr=False)
    class Mine(Preconditioned):
        _: KW_ONLY
        damping: float = 1e-3                       # an option; lr and weight_decay are there already
        def check(self) -> None: ...                # refuse what is out of range
        def update(self, p, g): return g / self.damping

`lr` and `weight_decay` are kept in the parameter groups alone, where schedulers change them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError


@dataclass(eq=False, repr=False)
class Grouped(torch.optim.Optimizer):
    """An optimizer whose groups have `lr` and `weight_decay`, and whose other options are its fields.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used, as `mmpeft.parameter_groups` makes them).

    Raises:
        ConfigError: values out of range.
    """

    params: InitVar[Iterable[Any]]
    lr: InitVar[float] = 1e-3
    _: KW_ONLY
    weight_decay: InitVar[float] = 0.0

    def __post_init__(self, params: Iterable[Any], lr: float, weight_decay: float) -> None:
        if not lr > 0 or weight_decay < 0:
            raise ConfigError(f"lr {lr}, weight_decay {weight_decay}; expected > 0, >= 0")
        self.check()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def check(self) -> None:
        """Refuse options that are out of range."""


@dataclass(eq=False, repr=False)
class Preconditioned(Grouped):
    """`w <- (1 - lr weight_decay) w - lr update(w, g)`; a subclass gives `update` and keeps what it needs in `state`."""

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


@dataclass(eq=False, repr=False)
class Adaptive(Preconditioned):
    """One whose direction is made with Adam's.

    Args:
        betas: of Adam's averages.
        eps: added to the root of the second.
    """

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def check(self) -> None:
        check_betas(*self.betas)
        if not self.eps > 0:
            raise ConfigError(f"eps {self.eps}; expected > 0")

    def adam(self, state: dict[str, Any], g: Tensor) -> Tensor:
        """Adam's direction for a gradient; its moments live in `state`, whose "step" the caller has counted."""
        m, v = (state.setdefault(n, torch.zeros_like(g)) for n in ("exp_avg", "exp_avg_sq"))
        m.lerp_(g, 1 - self.betas[0])
        v.mul_(self.betas[1]).addcmul_(g, g, value=1 - self.betas[1])
        step = state["step"]
        out: Tensor = (m / (1 - self.betas[0] ** step)) / ((v / (1 - self.betas[1] ** step)).sqrt() + self.eps)
        return out


def check_betas(*betas: float) -> None:
    """Refuse averages whose weight of the past is not in [0, 1)."""
    if not all(0 <= b < 1 for b in betas):
        raise ConfigError(f"betas {betas}; expected each in [0, 1)")
