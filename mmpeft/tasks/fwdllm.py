"""FwdLLM (Xu et al. 2024, arXiv 2308.13894): training an adapter on devices that only run forwards, with as many
perturbations as it takes.

    optimizer = FwdLLM(mmpeft.parameter_groups(model, lr=1e-2), variance=0.5, most=32)
    loss = optimizer.step(lambda: task(model(x)))

A perturbation z gives the directional gradient g z. Perturbations are added until the spread of their g z around the mean
is small enough against it, so that early steps, whose gradients agree, are cheap and late ones are not. As in `MeZO`, whose
passes and replay these are, z is drawn again from its seed and never stored.

Choice: the paper compares gradients of many clients and picks directions near the last one; here one process draws
independent directions, and the variance is that of the scalar |g| times the shared |z|^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from statistics import fmean, pvariance

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.tasks.mezo import MeZO


@dataclass(eq=False, repr=False)
class FwdLLM(MeZO):
    """MeZO whose number of perturbations a step follows the variance of the estimate.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used).
        eps, seed: as in `MeZO`.
        variance: perturbations are drawn until var(g^2) / (n mean(g^2)^2) is at most this.
        least, most: bounds of their number.

    Raises:
        ConfigError: values out of range.
    """

    _: KW_ONLY
    samples: int = field(default=1, init=False)
    variance: float = 0.5
    least: int = 2
    most: int = 32

    def check(self) -> None:
        super().check()
        if not self.variance > 0 or not 2 <= self.least <= self.most:
            raise ConfigError(
                f"variance {self.variance}, least {self.least}, most {self.most}; expected > 0 and 2 <= least <= most"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the mean of the losses it saw. `samples` is then the number of perturbations it took."""
        if closure is None:
            raise ConfigError("FwdLLM.step needs a closure that returns the loss")
        found: list[tuple[int, float]] = []
        seen: list[Tensor] = []
        while len(found) < self.most and not self._settled([g for _, g in found]):
            seed, g, losses = self.probe(closure)
            found.append((seed, g))
            seen += losses
        self.samples = len(found)
        self.apply(found)
        return torch.stack(seen).mean()

    def _settled(self, gradients: list[float]) -> bool:
        """Whether the squared directional gradients, whose mean is the squared gradient, are known well enough."""
        if len(gradients) < self.least:
            return False
        squares = [g * g for g in gradients]
        mean = fmean(squares)
        return mean == 0 or pvariance(squares) / (len(squares) * mean**2) <= self.variance
