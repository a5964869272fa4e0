"""FISH with iterative range decreasing (IRD; Dong et al. 2024, arXiv 2403.08484): the samples that choose the mask and
the entries that may be in it shrink together. It is what the survey cites for FISH Mask.

Round by round, samples are ranked by their squared gradients on the entries still in range, the best share of them
stays, and of the entries those stay whose Fisher information over these samples is largest; after the last round as
many are left as the mask has.

Choice: the paper searches the ranges by trial fine-tunings; here every round shrinks both by a fixed factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.methods.sparse import FishMask, attach_placed, exact
from mmpeft.adapters.plan import Plan, PlanLike, Rule, resolve
from mmpeft.adapters.selection.criteria import Evidence, gather, top
from mmpeft.errors import ConfigError


def fish_ird(
    model: nn.Module,
    plan: PlanLike,
    losses: Sequence[Callable[[], Tensor]],
    *,
    rounds: int = 3,
    keep: float = 0.5,
    name: str = "default",
    example: Any = None,
) -> list[int]:
    """Attach a FishMask adapter whose places are chosen by IRD; returns the numbers of the samples that chose last.

    Args:
        plan: one rule of `FishMask(density=...)`.
        losses: minus the log likelihood of one sample each.
        rounds: of shrinking.
        keep: share of the samples that a round keeps, at least one.

    Raises:
        ConfigError: another plan, no samples, or values out of range.
    """
    rules = Plan.read(plan).rules
    if len(rules) != 1 or len(rules[0].methods) != 1 or not isinstance(method := rules[0].methods[0], FishMask):
        raise ConfigError("fish_ird takes a plan of one FishMask rule")
    if not losses or rounds < 1 or not 0 < keep < 1:
        raise ConfigError(f"{len(losses)} samples, rounds {rounds}, keep {keep}; expected >= 1, >= 1, between 0 and 1")
    targets = {t.site.name: t for t in resolve(model, Plan(rules))}
    samples, inside = list(range(len(losses))), {n: torch.ones(t.site.shape) for n, t in targets.items()}
    total = sum(m.numel() for m in inside.values())
    for turn in range(1, rounds + 1):
        squares = {i: _squares(gather(model, targets.values(), [losses[i]])) for i in samples}
        weight = {i: sum(float((g * inside[n]).sum()) for n, g in squares[i].items()) for i in samples}
        samples = sorted(samples, key=lambda i: -weight[i])[: max(1, round(keep * len(samples)))]
        fisher = {n: sum((squares[i][n] for i in samples), torch.zeros_like(m)) for n, m in inside.items()}
        left = {n: f.where(inside[n] > 0, -1) for n, f in fisher.items()}  # what left the range stays out
        places = top(left, max(1, round(method.density ** (turn / rounds) * total)))
        inside = {n: torch.zeros_like(m) for n, m in inside.items()}
        for n, index in places.items():
            inside[n].view(-1)[index] = 1
    rule = rules[0]
    made = [
        Rule(exact(targets[n].site), (replace(method, count=len(index)),), rule.lr, rule.weight_decay)
        for n, index in places.items()
    ]
    attach_placed(model, made, places, name=name, example=example)
    return sorted(samples)


def _squares(evidence: Mapping[str, Evidence]) -> dict[str, Tensor]:
    """The squared gradient of the one sample that was gathered, by site."""
    return {n: e.g2 for n, e in evidence.items() if e.g2 is not None}
