"""LoRAShear (Chen et al. 2023, arXiv 2310.18356): structured pruning that lets go of a structure bit by bit while LoRA
picks up what it knew.

    found = mmpeft.structures(model, example)
    plan, tied = mmpeft.shear_plan(found, rank=8)
    mmpeft.attach(model, plan, name="shear")
    shear = mmpeft.LHSPG(model, sparsity=0.5, begin=100, end=900, periods=5, tied=tied)
    every step:  loss.backward(); optimizer.step(); shear.step(); optimizer.zero_grad()
    kept = mmpeft.kept_groups(model, found); mmpeft.detach(model, bake=True); mmpeft.cut(model, found, kept)

LHSPG, the half-space projected gradient on LoRA: in every period the least salient groups still whole become redundant
and shrink to 0 over its steps; one whose new weights no longer point where the old ones did is dropped at once. Then the
knowledge is recovered by further training, data chosen where the loss grew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.lora_prune import LoRAPrune, LoRAPruner
from mmpeft.adapters.selection.criteria import smooth
from mmpeft.adapters.selection.structures import Structure
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError


class LHSPG(LoRAPruner):
    """Progressive structured sparsity on a LoRAPrune adapter.

    Args:
        sparsity: final share of groups at 0 at every site (or tied sites).
        begin, end: steps between which the periods lie.
        periods: in each, an equal share of the groups becomes redundant and is 0 at its end.
        epsilon: a redundant group is dropped when <new, old> < epsilon ||old||^2.
        beta: of the saliences' moving average.
        tied, name: as in `LoRAPruner`.

    Raises:
        ConfigError: as `LoRAPruner`, or fewer steps than periods.
    """

    KEEPS = ("steps", "scores", "left", "redundant", "before")
    measure = "gone"

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        begin: int,
        end: int,
        periods: int = 5,
        epsilon: float = 0.0,
        beta: float = 0.9,
        tied: Sequence[Sequence[str]] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(model, sparsity=sparsity, begin=begin, end=end, beta=beta, tied=tied, name=name)
        if periods < 1 or end - begin < periods or not 0 <= epsilon < 1:
            raise ConfigError(
                f"periods {periods} in {end - begin} steps, epsilon {epsilon}; expected >= 1 step each, in [0, 1)"
            )
        self.periods, self.epsilon = periods, epsilon
        firsts = [(name, self.sites[name][1].mask.device) for name, *_ in self.groups]
        self.left = [torch.ones(self._count(name), device=at) for name, at in firsts]  # 1 whole, 0 gone
        self.redundant = [torch.zeros_like(left, dtype=torch.bool) for left in self.left]
        self.before: list[Tensor | None] = [None] * len(self.groups)

    @torch.no_grad()
    def step(self) -> float:
        """After the optimizer's step, gradients still there; returns the share of groups that are gone."""
        self.steps += 1
        length = (self.share.end - self.share.begin) / self.periods
        inside = self.share.begin < self.steps <= self.share.end
        period = min(self.periods, int((self.steps - 1 - self.share.begin) / length) + 1) if inside else 0
        ends = self.share.begin + round(period * length)
        for i, group in enumerate(self.groups):
            for name in group:
                self.scores[name] = smooth(self.scores.get(name), self.importance(name), self.beta)
            if not inside:
                continue
            total = torch.stack([self.scores[name] for name in group]).sum(0)
            wanted = int(self.share.last * len(total) * period / self.periods + 1e-9)
            more = wanted - int(self.redundant[i].sum())
            if more > 0:
                order = total.where(~self.redundant[i], torch.inf).argsort(stable=True)
                self.redundant[i][order[:more]] = True
                self.before[i] = None
            self._shrink(i, group, ends)
            for name in group:
                _, d = self.sites[name]
                assert isinstance(d.method, LoRAPrune)
                d.mask.copy_(self.left[i].repeat_interleave(d.method.group))
        return float(torch.cat([left == 0 for left in self.left]).float().mean())

    def _shrink(self, i: int, group: Sequence[str], ends: int) -> None:
        """Let the redundant groups go by one step, straight to 0 at step `ends`."""
        weights = torch.cat([self._groups(name) for name in group], 1)  # [groups, numbers]
        steps = ends - self.steps + 1
        shrunk = self.left[i] * (1 - 1 / steps)
        new = torch.where(self.redundant[i], shrunk, self.left[i])
        old = self.before[i]
        if old is not None:
            trial = weights * new.unsqueeze(1)
            turned = (trial * old).sum(1) < self.epsilon * old.square().sum(1)
            new = new.where(~(turned & self.redundant[i]), 0)
        self.left[i] = new
        self.before[i] = weights * new.unsqueeze(1)

    def _groups(self, name: str) -> Tensor:
        """A site's effective weight without its mask, one row a group."""
        owner, d = self.sites[name]
        assert isinstance(d.method, LoRAPrune)
        W = self.stored(name) + d.method.scale * d.B @ d.A
        rows: Tensor = (W if d.method.axis == "rows" else W.mT).reshape(self._count(name), -1)
        return rows


def shear_plan(
    found: Sequence[Structure], *, rank: int = 8, alpha: float | None = None
) -> tuple[dict[str, LoRAPrune], list[list[str]]]:
    """(plan, tied) for structures: LoRAPrune on the columns of every consumer and the rows of its producers, tied by
    structure. A layer that is both, or that holds several producers in one weight, is adapted as a consumer alone."""
    consumers = {s.consumer for s in found}
    plan: dict[str, LoRAPrune] = {}
    tied = []
    for s in found:
        plan[f"{s.consumer}.weight"] = LoRAPrune(rank=rank, alpha=alpha, axis="columns", group=s.width)
        names = [f"{s.consumer}.weight"]
        paths = [r.path for r in s.producers]
        for r in s.producers:
            if r.path not in consumers and paths.count(r.path) == 1:
                plan[f"{r.path}.weight"] = LoRAPrune(rank=rank, alpha=alpha, group=r.width)
                names.append(f"{r.path}.weight")
        tied.append(names)
    return plan, tied


def kept_groups(model: nn.Module, found: Sequence[Structure], *, name: str | None = None) -> Mapping[str, list[int]]:
    """The groups of each structure whose mask is not 0, by consumer: what `cut` keeps."""
    masks = {d.site.path: d for d in sites_of(model, LoRAPrune, name)}
    kept = {}
    for s in found:
        if s.consumer not in masks:
            raise ConfigError(f"{s.consumer} has no LoRAPrune adapter")
        kept[s.consumer] = masks[s.consumer].mask.view(s.groups, -1).amax(1).nonzero().flatten().tolist()
    return kept
