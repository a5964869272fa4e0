"""Where to adapt: plans made from importance scores.

    place      keep the sites of a plan that matter most: S-BitFit (Lawton et al. 2023, arXiv 2305.16597) is `place` on
               BitFit, HFT (Hui et al. 2024, arXiv 2404.18466) is a random half of `full`; any method can be placed so
    spt_plan   sensitivity-aware tuning (He et al. 2023, arXiv 2303.08566): LoRA in the matrices where more sensitive
               weights lie than it would train, the sensitive weights alone elsewhere
    cross_attention_plan   train the cross-attention of an encoder-decoder, whole (Gheini et al. 2021, arXiv 2104.08771)

All return a plan, or what `attach_selected` needs, and change nothing.
"""

from __future__ import annotations

from torch import nn

from mmpeft.adapters.method import Method
from mmpeft.adapters.methods.lora import LoRA
from mmpeft.adapters.methods.sparse import Sparse, exact
from mmpeft.adapters.plan import Plan, PlanLike, Rule, resolve
from mmpeft.adapters.selection.criteria import Losses, criterion, gather, top
from mmpeft.adapters.state import SLOT
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


# Names of the attention to the encoder: BART and its kin, BERT decoders, T5, torch's own decoder layer, Flamingo's kin.
CROSS = ("encoder_attn", "crossattention", "cross_attention", "cross_attn", "EncDecAttention", "multihead_attn")


def cross_attention_plan(
    model: nn.Module, *, norms: bool = True, embeddings: str | None = None, method: Method | None = None
) -> dict[str, Method | str]:
    """The plan that trains every cross-attention of a model and nothing else ("xattn"), or with new embeddings too
    ("{src,tgt} + xattn" of arXiv 2104.08771).

    Args:
        norms: with the norm beside each attention (`<name>_layer_norm`, or what stands before it in a T5 block).
        embeddings: pattern of the embeddings that are trained as well, those of a new language.
        method: another method for the attentions; None trains them whole.

    Raises:
        NameNotFound: the model has no cross-attention by any of the names in `CROSS`.
    """
    paths = [path for path, _ in model.named_modules() if SLOT not in path.split(".")]
    found = [path for path in paths if path.rpartition(".")[2] in CROSS]
    if not found:
        raise NameNotFound(f"no module is named {', '.join(CROSS)}; write the plan by hand")
    plan: dict[str, Method | str] = {path: method or "full" for path in found}
    for path in found if norms else ():
        parent, _, leaf = path.rpartition(".")
        beside = [f"{parent}.{leaf}_layer_norm", f"{parent}.layer_norm"]
        plan |= dict.fromkeys([norm for norm in beside if norm in paths][:1], "full")
    return plan | ({embeddings: "full"} if embeddings else {})
