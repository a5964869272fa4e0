"""Pruning in the middle of a training, without a change of shapes: what is pruned is held at its value until the end.

At one step a controller chooses entries of the adapter's tensors and the values they get; from then on their gradients are
0 and every optimizer step leaves them there (momentum and weight decay too). So the optimizer, its state, DDP and
checkpoints go on as they are, and only at the end of training the tensors become as small as what is left.

    Holding        the base: `choose` says which entries, and which values
    PruneEntries   unstructured pruning of any adapter (`prune_entries`: U-MaM), trained on in the same run
    PruneUnits     `prune_units` (S-MaM) at the end; a second run on the smaller adapter (`start_from`) trains on
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta, Method
from mmpeft.adapters.selection.compact import check_units
from mmpeft.adapters.selection.controller import Controller, Loop, samples_of
from mmpeft.adapters.selection.criteria import check_share, criterion
from mmpeft.adapters.selection.prune_adapter import prune_entries, prune_units
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError

Held = dict[str, tuple[Tensor, Tensor]]  # tensor: (entries that are free, value of the others)


class Holding(Controller):
    """Holds entries of an adapter's trained tensors from step `at` on.

    Args:
        at: optimizer steps before the choice; None is never.

    Raises:
        ConfigError: `at` is not in the run, or there is no such adapter.
    """

    KEEPS: ClassVar[tuple[str, ...]] = ("steps", "held")

    def __init__(self, model: nn.Module, *, at: int | None, name: str) -> None:
        if at is not None and at < 1:
            raise ConfigError(f"at {at}; expected at least 1 step before the choice")
        self.model, self.at, self.name, self.steps = model, at, name, 0
        self.held: Held = {}
        found: list[Delta] = sites_of(model, Method, name)
        self.tensors = {label(d, n): p for d in found for n in d.trained if (p := d._parameters[n]) is not None}

    def choose(self) -> Held:
        """What is held from now on."""
        raise NotImplementedError

    def join(self, loop: Loop) -> None:
        super().join(loop)
        if self.at is not None and loop.total is not None and loop.total <= self.at:
            raise ConfigError(f"at {self.at}: the run has {loop.total} steps, so nothing would be chosen")

    def draw(self) -> None:
        if self.steps == self.at and not self.held:
            self.held = self.choose()
            self._impose()

    def before_step(self) -> None:
        for key, (free, _) in self.held.items():
            if (g := self.tensors[key].grad) is not None:
                g.mul_(free)

    def step(self) -> None:
        self.steps += 1
        self._impose()

    @torch.no_grad()
    def _impose(self) -> None:
        for key, (free, value) in self.held.items():
            p = self.tensors[key]
            p.copy_(p.where(free, value))


def label(d: Delta, tensor: str) -> str:
    """The name of an adapter's tensor among all of it."""
    return f"{d.site.name} {d.method.name} {tensor}"


class PruneEntries(Holding):
    """`prune_entries` at step `at`, scored on training samples; the entries left train on.

    Args:
        keep: share of the entries, over all sites.
        by: a criterion of `criteria.py`.
        samples: that the scores are summed over.
    """

    reads_samples = True

    def __init__(
        self,
        model: nn.Module,
        *,
        at: int,
        keep: float,
        by: str = "sensitivity",
        samples: int = 32,
        name: str = "default",
    ) -> None:
        super().__init__(model, at=at, name=name)
        check_share(keep)
        criterion(by)
        self.keep, self.by, self.samples = keep, by, samples

    def choose(self) -> Held:
        losses = samples_of(self.loop, self.samples)
        masks = prune_entries(self.model, losses, keep=self.keep, by=self.by, name=self.name).masks
        return {key: (masks[p] > 0, torch.zeros_like(p)) for key, p in self.tensors.items() if p in masks}


class PruneUnits(Controller):
    """`prune_units` when training ends, scored on training samples.

    Args:
        keep: share of the units, over all sites.
        by: a criterion of `criteria.py`.
        samples: that the scores are summed over.
    """

    reshapes = True
    reads_samples = True

    def __init__(
        self, model: nn.Module, *, keep: float, by: str = "sensitivity", samples: int = 32, name: str = "default"
    ) -> None:
        check_share(keep)
        criterion(by)
        check_units(sites_of(model, Method, name))
        self.model, self.keep, self.by, self.samples, self.name = model, keep, by, samples, name

    def close(self) -> None:
        prune_units(self.model, samples_of(self.loop, self.samples), keep=self.keep, by=self.by, name=self.name)
