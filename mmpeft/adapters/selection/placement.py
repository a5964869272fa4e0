"""Where to adapt: plans made from importance scores.

    place      keep the sites of a plan that matter most: S-BitFit (Lawton et al. 2023, arXiv 2305.16597) is `place` on
               BitFit, HFT (Hui et al. 2024, arXiv 2404.18466) is a random half of `full`; any method can be placed so
    spt_plan   sensitivity-aware tuning (He et al. 2023, arXiv 2303.08566): LoRA in the matrices where more sensitive
               weights lie than it would train, the sensitive weights alone elsewhere

Both return a plan, or what `attach_selected` needs, and change nothing.
"""

from __future__ import annotations

from torch import nn

from mmpeft.adapters.methods.lora import LoRA
from mmpeft.adapters.methods.sparse import Sparse, exact
from mmpeft.adapters.plan import Plan, PlanLike, Rule, resolve
from mmpeft.adapters.selection.criteria import Losses, criterion, gather, top
from mmpeft.errors import ConfigError, NameNotFound


def place(
    model: nn.Module, plan: PlanLike, losses: Losses = (), *, by: str = "sensitivity", share: float = 0.5, seed: int = 0
) -> Plan:
    """The plan's own methods on the `share` of its sites (at least one) with the largest mean score.

    Args:
        losses: as in `criteria.gather`.
        by: a criterion of `criteria.py`.
        share: of the sites, over all rules.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share {share}; expected 0 < share <= 1")
    given = Plan.read(plan)
    targets = resolve(model, given)
    evidence = gather(model, targets, losses, seed=seed)
    score = criterion(by)
    scored = [(float(score(evidence[t.site.name]).mean()), -i, t) for i, t in enumerate(targets)]
    best = sorted(scored, key=lambda s: s[:2], reverse=True)[: max(1, round(share * len(targets)))]
    rules = []
    for _, _, target in sorted(best, key=lambda s: -s[1]):
        rule = given.rules[target.rule]
        rules.append(Rule(exact(target.site), (target.method,), rule.lr, rule.weight_decay))
    return Plan(tuple(rules))


def spt_plan(
    model: nn.Module, pattern: str, losses: Losses, *, density: float, lora: LoRA, by: str = "sensitivity"
) -> dict[str, Plan]:
    """Two plans over the sites of `pattern`: "lora" (for `attach`) and "sparse" (for `attach_selected` with the same
    losses); either may be missing. A site gets LoRA when more of the `density` most sensitive weights lie in it than
    LoRA trains there.

    Args:
        losses: as in `criteria.gather`.
        density: the budget, as a share of all weights.
        by: the sensitivity; the paper's is the squared gradient ("fisher").
    """
    targets = resolve(model, Plan((Rule(pattern, (lora,)),)))
    if not targets:
        raise NameNotFound(f"pattern {pattern!r} matches no weight")
    evidence = gather(model, targets, losses)
    score = criterion(by)
    scores = {name: score(e) for name, e in evidence.items()}
    best = top(scores, max(1, round(density * sum(s.numel() for s in scores.values()))))
    rules: dict[str, list[Rule]] = {}
    for target in targets:
        count = len(best.get(target.site.name, ()))
        if count > lora.rank * (target.site.shape[-1] + target.site.shape[-2]):
            rules.setdefault("lora", []).append(Rule(exact(target.site), (lora,)))
        elif count:
            rules.setdefault("sparse", []).append(Rule(exact(target.site), (Sparse(count=count, criterion=by),)))
    return {kind: Plan(tuple(found)) for kind, found in rules.items()}
