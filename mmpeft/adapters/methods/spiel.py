"""SpIEL: a sparse delta of fixed size whose places move (Ansell et al. 2024, arXiv 2401.16405).

Every so often the entries that changed least since the last move are dropped and as many are grown elsewhere:

    SpIEL      -AG: where the accumulated gradient of the dense weight is largest; needs a few dense gradients
    SpIELMA    -MA: where the optimizer's own estimate is largest; `SM3` keeps one number a row and one a column, and
               min(row, column) bounds what an entry would have accumulated. Nothing dense is differentiated.
    SpIELMoves    both on a schedule, in any training loop
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Tensors
from mmpeft.adapters.methods.sparse import Sparse
from mmpeft.adapters.plan import Target
from mmpeft.adapters.selection.controller import Controller, Loop, Loss
from mmpeft.adapters.selection.criteria import Evidence, Losses, criterion, gather
from mmpeft.adapters.selection.schedules import Ramp
from mmpeft.adapters.selection.sm3 import SM3
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class Moving(Sparse):
    """A sparse delta that remembers its values at the last move, to tell which changed least."""

    density: float = 0.01

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        made = super().init(site, base, context)
        return replace(made, frozen={**made.frozen, "before": made.trained["value"].clone()})


@dataclass(frozen=True)
class SpIEL(Moving, name="spiel", aliases=("spiel-ag",)):
    """SpIEL-AG (arXiv 2401.16405): a sparse delta of fixed size whose places move. It starts at random; every so often
    `spiel_step` drops the entries that changed least since the last time (their values go back to 0) and grows as many
    where the accumulated gradient of the dense weight is largest, at value 0."""

    beside = ("SpIELMoves", "spiel_step")


@dataclass(frozen=True)
class SpIELMA(Moving, name="spiel-ma", aliases=("spielma",)):
    """SpIEL-MA (arXiv 2401.16405): a sparse delta of fixed size whose places move to where the momenta that `SM3`
    approximates by rows and columns are largest; `spiel_ma_step` moves them."""

    beside = ("SpIELMoves", "spiel_ma_step")


@torch.no_grad()
def spiel_step(
    model: nn.Module,
    losses: Losses,
    share: float,
    *,
    name: str = "default",
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Move the `share` of every SpIEL site's entries; returns how many moved.

    Args:
        losses: as in `criteria.gather`, run with the adapter active: their gradients say where to grow.
        share: of the entries, 0 to 1; the paper anneals it to 0.
        optimizer: its state of the moved entries is set to 0.
    """
    deltas: list[Delta] = sites_of(model, SpIEL, name)
    evidence = _dense(model, deltas, losses)
    return sum(_move(d, criterion("gradient")(evidence[d.site.name]), share, optimizer) for d in deltas)


@torch.no_grad()
def spiel_ma_step(model: nn.Module, optimizer: SM3, share: float, *, name: str = "default") -> int:
    """Move the `share` of every SpIEL-MA site's entries to where `optimizer` estimates the largest momenta; returns how
    many moved.

    Raises:
        ConfigError: the optimizer has made no step with a site yet.
    """
    deltas: list[Delta] = sites_of(model, SpIELMA, name)
    return sum(_move(d, optimizer.estimate(d.value), share, optimizer) for d in deltas)


class SpIELMoves(Controller):
    """Moves the places of every SpIEL and SpIEL-MA site of an adapter every so many steps, by a share that falls linearly
    to 0.

    Args:
        share: of the entries that the first move moves.
        every: steps between moves.
        end: step from which no more are made.
        batches: steps before a move whose batches give the dense gradients of SpIEL sites, by one more forward and
            backward each.

    Raises:
        ConfigError: no such site, numbers out of range, or SpIEL-MA without `SM3` in the loop.
    """

    KEEPS = ("steps", "dense")

    def __init__(
        self, model: nn.Module, *, share: float, every: int, end: int, batches: int = 1, name: str = "default"
    ) -> None:
        if not 0 < share <= 1 or not 1 <= every < end or not 1 <= batches <= every:
            raise ConfigError(
                f"share {share}, every {every}, end {end}, batches {batches}; expected share in (0, 1], "
                "1 <= every < end and batches 1 to every"
            )
        self.model, self.every, self.end, self.batches = model, every, end, batches
        self.share = Ramp(share, 0.0, 0, end)
        self.deltas: list[Delta] = sites_of(model, Moving, name)
        self.looking = [d for d in self.deltas if not isinstance(d.method, SpIELMA)]
        self.steps, self.dense = 0, dict[str, Tensor]()

    def join(self, loop: Loop) -> None:
        super().join(loop)
        if len(self.looking) < len(self.deltas) and not isinstance(loop.optimizer, SM3):
            raise ConfigError(f"SpIEL-MA reads the momenta of SM3; the optimizer is {type(loop.optimizer).__name__}")

    def look(self, loss: Loss) -> None:
        left = -(self.steps + 1) % self.every  # steps from this one to the last before a move
        if self.looking and left < self.batches and self.steps + 1 + left < self.end:
            for site, e in _dense(self.model, self.looking, [loss]).items():
                assert e.g is not None
                self.dense[site] = self.dense.get(site, 0) + e.g

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        if self.steps % self.every or self.steps >= self.end:
            return
        optimizer, share = self.loop.optimizer, self.share(self.steps)
        for d in self.deltas:
            if isinstance(d.method, SpIELMA):
                assert isinstance(optimizer, SM3)
                _move(d, optimizer.estimate(d.value), share, optimizer)
            else:
                _move(d, self.loop.mean(self.dense[d.site.name]).abs(), share, optimizer)
        self.dense = {}


def _dense(model: nn.Module, deltas: list[Delta], losses: Losses) -> dict[str, Evidence]:
    """The evidence of the dense weights under sparse sites."""
    modules = dict(model.named_modules())
    return gather(model, [Target(0, d.method, d.site, modules[d.site.path]) for d in deltas], losses)


def _move(d: Delta, dense: Tensor, share: float, optimizer: torch.optim.Optimizer | None) -> int:
    """Move a share of one site's entries to the largest scores of the dense matrix [*, out, in]."""
    if not 0 <= share <= 1:
        raise ConfigError(f"share {share}; expected 0 <= share <= 1")
    n = min(round(share * len(d.index)), dense.numel() - len(d.index))  # a dense site has few places left to go to
    drop = (d.value - d.before).abs().argsort()[:n]
    score = dense.flatten().clone()
    score[d.index] = -1  # what is trained already is no candidate, the dropped included
    grow = score.argsort(descending=True, stable=True)[:n]
    d.index[drop] = grow.to(d.index)
    d.value[drop] = 0
    known = optimizer is not None and d.value in optimizer.state
    if optimizer is not None and known:
        for t in optimizer.state[d.value].values():
            if isinstance(t, Tensor) and t.shape == d.value.shape:
                t[drop] = 0
    else:  # keep files canonical where no state would be mixed up
        order = d.index.argsort()
        d.index.copy_(d.index[order])
        d.value.copy_(d.value[order])
    d.before.copy_(d.value)
    return n
