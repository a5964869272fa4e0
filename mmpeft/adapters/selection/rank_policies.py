"""The published ways to change a rank over the steps, each a policy for `RankController`.

Budget    AdaLoRA     triplets of all sites compete for a budget that falls cubically
Proximal  SoRA        gates are soft-thresholded
Sampled   DyLoRA      the next step's rank is drawn
Growth    IncreLoRA   the most important sites get one more triplet until the budget is full
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.dynamic_rank import AdaLoRA, DyLoRA, Elastic, IncreLoRA, SoRA
from mmpeft.adapters.selection.criteria import top
from mmpeft.adapters.selection.rank import Importance, Sites
from mmpeft.adapters.selection.schedules import Cubic, Schedule
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError


class Plain:
    """A policy that adds nothing to the loss and keeps nothing beside the adapter's own tensors."""

    def begin(self, sites: Sites) -> None:
        """Nothing to prepare."""

    def penalty(self, sites: Sites) -> Tensor | None:
        """Nothing."""
        return None

    def state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class Triplets:
    """What the policies over triplets (p, lam, q) share: their importance, and the penalty that keeps P and Q
    orthonormal."""

    importance: Importance
    orthogonal: float

    def watch(self, sites: Sites) -> None:
        """Count this step's gradients of every triplet."""
        for name, d in sites.items():
            for n in ("P", "lam", "Q"):
                self.importance.update(f"{name} {n}", getattr(d, n))

    def penalty(self, sites: Sites) -> Tensor | None:
        """orthogonal * sum ||P^T P - I||^2 + ||Q Q^T - I||^2."""
        return self.orthogonal * orthogonality(sites) if self.orthogonal else None

    def state(self) -> dict[str, Any]:
        """The averages."""
        return self.importance.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """From `state()`."""
        self.importance.restore(state)


@dataclass
class Budget(Triplets):
    """AdaLoRA's policy (arXiv 2303.10512, algorithm 1): every `interval` steps all triplets are ranked by importance
    and lam of those outside the budget is set to 0. The budget falls from all triplets to `target` a site on average,
    cubically between steps `warmup` and `total_steps - final`; after that the choice stands.

    A triplet's importance is that of its lam plus the means over its column of P and its row of Q.

    Args:
        target: average rank a site at the end.
        orthogonal: weight gamma of sum ||P^T P - I||^2 + ||Q Q^T - I||^2.
    """

    target: int
    total_steps: int
    warmup: int = 0
    final: int = 0
    interval: int = 1
    orthogonal: float = 0.1
    criterion: str = "sensitivity"
    beta1: float = 0.85
    beta2: float | None = 0.85
    method: type[Elastic] = field(default=AdaLoRA, init=False)

    def __post_init__(self) -> None:
        if self.target < 1 or self.interval < 1 or self.orthogonal < 0:
            raise ConfigError(f"{self}: target and interval are at least 1, orthogonal at least 0")
        if self.total_steps - self.final <= self.warmup:
            raise ConfigError(
                f"total_steps {self.total_steps} leaves no step between warmup {self.warmup} and final {self.final}"
            )
        self.importance = Importance(self.criterion, self.beta1, self.beta2)
        self.schedule: Schedule | None = None

    def begin(self, sites: Sites) -> None:
        ranks = [d.lam.numel() for d in sites.values()]
        if self.target * len(ranks) > sum(ranks):
            raise ConfigError(f"target {self.target} a site is more than the {sum(ranks) / len(ranks):g} there are")
        self.schedule = Cubic(sum(ranks), self.target * len(ranks), self.warmup, self.total_steps - self.final)

    def budget(self, step: int) -> int:
        """Triplets of all sites that may be in use at `step`."""
        assert self.schedule is not None
        return int(self.schedule(step) + 1e-9)

    def step(self, sites: Sites, step: int) -> None:
        end = self.total_steps - self.final
        if step <= end:
            self.watch(sites)
        if step == end or self.warmup < step < end and step % self.interval == 0:
            kept = top(triplet_scores(self.importance, sites), self.budget(step))
            for name, d in sites.items():
                d.mask.zero_()
                d.mask.view(-1)[kept.get(name, torch.zeros(0, dtype=torch.int64)).to(d.mask.device)] = 1
                d.lam.mul_(d.mask)
        elif step > end:
            for d in sites.values():
                d.lam.mul_(d.mask)


def triplet_scores(importance: Importance, sites: Sites) -> dict[str, Tensor]:
    """Importance of each triplet (p, lam, q), [*, rank] a site."""
    return {
        name: importance(f"{name} lam") + importance(f"{name} P").mean(-2) + importance(f"{name} Q").mean(-1)
        for name in sites
    }


def orthogonality(sites: Sites) -> Tensor:
    """sum over sites of ||P^T P - I||^2 + ||Q Q^T - I||^2 (Frobenius)."""
    total = torch.zeros(())
    for d in sites.values():
        eye = torch.eye(d.P.shape[-1], dtype=d.P.dtype, device=d.P.device)
        here = (d.P.mT @ d.P - eye).square().sum() + (d.Q @ d.Q.mT - eye).square().sum()
        total = total.to(here) + here
    return total


@dataclass
class Proximal(Plain):
    """SoRA's policy (arXiv 2311.11696, equation 6): after the optimizer's step, g <- sign(g) max(|g| - threshold, 0).

    Args:
        threshold: learning rate times the paper's xi; a number or a schedule.
    """

    threshold: float | Schedule
    method: type[Elastic] = field(default=SoRA, init=False)

    def __post_init__(self) -> None:
        if not callable(self.threshold) and not self.threshold > 0:
            raise ConfigError(f"threshold {self.threshold}; expected a positive number or a schedule")

    def step(self, sites: Sites, step: int) -> None:
        threshold = self.threshold(step) if callable(self.threshold) else self.threshold
        for d in sites.values():
            d.g.copy_(nn.functional.softshrink(d.g, threshold))


@dataclass
class Sampled(Plain):
    """DyLoRA's policy: the rank of the next step is drawn uniformly from min_rank..rank of the sites, one for all of
    them. The draw depends on seed and step alone, so a resumed run repeats it."""

    seed: int = 0
    method: type[Elastic] = field(default=DyLoRA, init=False)

    def begin(self, sites: Sites) -> None:
        self.step(sites, 0)

    def step(self, sites: Sites, step: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        u = float(torch.rand((), generator=generator))
        for d in sites.values():
            m = d.method
            assert isinstance(m, DyLoRA)
            d.draw.fill_(m.min_rank + int(u * (m.rank - m.min_rank + 1)))

    def state(self) -> dict[str, Any]:
        return {"draw": self.seed}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seed = int(state["draw"])


def set_rank(model: nn.Module, rank: int, *, name: str | None = None) -> None:
    """Evaluate every DyLoRA site at `rank` from now on.

    Raises:
        ConfigError: outside min_rank..rank of a site, or there is no DyLoRA.
    """
    found = [d for _, _, s in slots(model) for _, d in s.deltas(None if name is None else (name,))]
    mine = [d for d in found if isinstance(d.method, DyLoRA)]
    for d in mine:
        assert isinstance(d.method, DyLoRA)
        if not d.method.min_rank <= rank <= d.method.rank:
            raise ConfigError(f"rank {rank} at {d.site.name}; expected {d.method.min_rank} to {d.method.rank}")
    if not mine:
        raise ConfigError("set_rank: no DyLoRA is attached")
    with torch.no_grad():
        for d in mine:
            d.size.fill_(rank)


@dataclass
class Growth(Triplets):
    """IncreLoRA's policy (arXiv 2308.12043): every `interval` steps after `warmup` the `sites` with the highest mean
    importance of their triplets in use get one more, until `target` a site on average are in use.

    Args:
        target: average rank a site at the end.
        at_once: sites that grow at one time.
        orthogonal: as in `Budget`.
    """

    target: int
    interval: int = 10
    at_once: int = 1
    warmup: int = 0
    orthogonal: float = 0.1
    criterion: str = "sensitivity"
    beta1: float = 0.85
    beta2: float | None = 0.85
    method: type[Elastic] = field(default=IncreLoRA, init=False)

    def __post_init__(self) -> None:
        if min(self.target, self.interval, self.at_once) < 1:
            raise ConfigError(f"{self}: target, interval and at_once are at least 1")
        self.importance = Importance(self.criterion, self.beta1, self.beta2)

    def begin(self, sites: Sites) -> None:
        room = sum(d.mask.shape[-1] for d in sites.values())
        if self.target * len(sites) > room:
            raise ConfigError(f"target {self.target} a site is more than the room of {room / len(sites):g} a site")
        if stacked := [name for name, d in sites.items() if d.mask.ndim > 1]:
            raise ConfigError(f"Growth counts triplets of matrices; {stacked[0]} is a stack of experts")

    def step(self, sites: Sites, step: int) -> None:
        self.watch(sites)
        used = {name: int(d.mask.sum()) for name, d in sites.items()}
        left = self.target * len(sites) - sum(used.values())
        if step <= self.warmup or step % self.interval or left <= 0:
            return
        scores = triplet_scores(self.importance, sites)
        means = {name: float((scores[name] * d.mask).sum() / d.mask.sum()) for name, d in sites.items()}
        order = [n for n in sorted(means, key=lambda n: -means[n]) if used[n] < sites[n].mask.shape[-1]]
        for name in order[: min(self.at_once, left)]:
            sites[name].mask[used[name]] = 1  # its lam still has the value it was held at
