"""ReLoRA (Lialin et al. 2023, arXiv 2307.05695): high-rank training through low-rank updates.

Every so often the pair is added to the weight and starts again, most of the optimizer's memory of it is dropped, and
the learning rate climbs back from 0 in a few steps: the rank of the sum grows by the pair's at each restart.

    mmpeft.attach(model, {"model.layers.**": mmpeft.ReLoRA(rank=16, stages=8)})
    factor = mmpeft.Jagged(every=500, warmup=50, total=4000)          # for LambdaLR
    every 500 steps:  mmpeft.restart(model, optimizer)                # or Restarts, in any training loop

As in PeriodicLoRA, what is added stays in the adapter and the base keeps its bits; what differs is the regime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.methods.lora_noise import PeriodicLoRA, Unloads, unload
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class ReLoRA(PeriodicLoRA, name="relora"):
    """`W' = W + alpha / rank * (B A + sum_k B_k A_k)`, the pairs k those of earlier restarts (arXiv 2307.05695); rank
    (in + out) trained parameters. `restart` ends a stage."""

    beside = ("Restarts", "restart")


@torch.no_grad()
def restart(model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: float = 0.01, name: str | None = None) -> int:
    """End a stage of every ReLoRA site: B A joins the weight, B is 0 and A drawn anew, and of each of the optimizer's
    moments of the two only the `keep` share of entries with the largest magnitude stays (the paper prunes 99 %).

    Returns:
        The number of stages done.

    Raises:
        ConfigError: there is no ReLoRA, its stages are used up, or `keep` is no share.
    """
    if not 0 <= keep <= 1:
        raise ConfigError(f"keep {keep}; expected 0 <= keep <= 1")
    deltas: list[Delta] = sites_of(model, ReLoRA, name)
    done = unload(model, name=name)
    for p in (t for d in deltas for t in (d.A, d.B)):
        for moment in optimizer.state.get(p, {}).values():
            if isinstance(moment, Tensor) and moment.shape == p.shape:
                gone = moment.abs().flatten().argsort(descending=True, stable=True)[round(keep * p.numel()) :]
                moment.view(-1)[gone] = 0
    return done


@dataclass(frozen=True)
class Jagged:
    """The learning rate's factor at each step: a cosine from 1 to `final` over `total` steps, and within `warmup` steps
    after every restart a straight climb back to it from 0.

    Args:
        every: steps between restarts.
        warmup: steps of the climb, also at the start; fewer than `every`.
        total: steps of the cosine.
        final: factor at the end.
    """

    every: int
    warmup: int
    total: int
    final: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.every or self.total < 1 or not 0 <= self.final <= 1:
            raise ConfigError(f"{self}: expected 0 <= warmup < every, total >= 1 and 0 <= final <= 1")

    def ramp(self, step: int) -> float:
        """The climb alone: 0 < ramp <= 1."""
        return min(1.0, (step % self.every + 1) / (self.warmup + 1))

    def __call__(self, step: int) -> float:
        cosine = (1 + math.cos(math.pi * min(1.0, step / self.total))) / 2
        return (self.final + (1 - self.final) * cosine) * self.ramp(step)


class Restarts(Unloads):
    """`restart` after every so many optimizer steps; the learning rate then climbs back in a few steps, under the loop's
    own schedule as the envelope.

    Args:
        every: steps between restarts.
        warmup: steps of the climb, also at the start; fewer than `every`.
        keep: as in `restart`.
        seed: of the new A of each stage.

    Raises:
        ConfigError: as `Unloads`, or numbers out of range.
    """

    kind = ReLoRA

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        warmup: int = 10,
        keep: float = 0.01,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if not 0 <= keep <= 1:
            raise ConfigError(f"keep {keep}; expected 0 <= keep <= 1")
        super().__init__(model, every=every, seed=seed, name=name)
        self.jagged, self.keep = Jagged(every, warmup, total=1), keep

    def before_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= self.jagged.ramp(self.steps)  # the scheduler sets it anew for the next step

    def end_stage(self) -> None:
        restart(self.model, self.optimizer, keep=self.keep, name=self.name)
