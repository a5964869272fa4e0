"""Where to adapt: plans made from importance scores.

    place      keep the sites of a plan that matter most: S-BitFit (Lawton et al. 2023, arXiv 2305.16597) is `place` on
               BitFit, HFT (Hui et al. 2024, arXiv 2404.18466) is a random half of `full`; any method can be placed so
    spt_plan   sensitivity-aware tuning (He et al. 2023, arXiv 2303.08566): a structured method (LoRA, an adapter) where
               as many sensitive weights lie as it would train, the sensitive weights alone elsewhere
    cross_attention_plan   train the cross-attention of an encoder-decoder, whole (Gheini et al. 2021, arXiv 2104.08771)

All return a plan, or what `attach_selected` needs, and change nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmpeft.adapters.inspect import tensors_of
from mmpeft.adapters.method import Method
from mmpeft.adapters.methods.sparse import Sparse, exact
from mmpeft.adapters.plan import Plan, PlanLike, Rule, Target, resolve
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
    model: nn.Module,
    pattern: str,
    losses: Losses,
    *,
    density: float,
    method: Method,
    by: str = "fisher",
    alpha: float = 1.0,
) -> dict[str, Plan]:
    """Two plans over the sites of `pattern`: "structured" (for `attach`) and "sparse" (for `attach_selected` with the
    same losses, which takes the rules of both as one adapter too); either may be missing. A site gets `method` when at least as many of the `density` most sensitive
    weights lie in it as `method` trains there.

    With a weight method (`LoRA`: SPT-LoRA) a site is a weight; with a call method (`Bottleneck`: SPT-Adapter, which the
    paper puts behind single linear layers) it is the module that the adapter is put around, with all matrices in it.

    Args:
        losses: as in `criteria.gather`; the authors take 8 batches, each one loss.
        density: the budget, as a share of all weights.
        method: the structured part.
        by: the sensitivity; the paper's is the squared gradient, "fisher".
        alpha: a site needs 1 / alpha of what `method` trains (1 in the paper, 5 and 10 in the authors' code).

    Raises:
        NameNotFound: the pattern matches nothing that `method` adapts.
        ConfigError: a token method, a module without matrices or inside another site, or alpha not above 0.
    """
    if not alpha > 0:
        raise ConfigError(f"alpha {alpha}; expected a positive number")
    targets = resolve(model, Plan((Rule(pattern, (method,)),)))
    inside = {t.site.name: _matrices(model, t) for t in targets}
    weights = [w for found in inside.values() for w in found]
    names = [w.site.name for w in weights]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{twice[0]} lies in two sites of {pattern!r}; name one of the modules around it")
    evidence = gather(model, weights, losses)
    score = criterion(by)
    scores = {name: score(e) for name, e in evidence.items()}
    best = top(scores, max(1, round(density * sum(s.numel() for s in scores.values()))))
    rules: dict[str, list[Rule]] = {}
    shared: dict[Any, Any] = {}
    for target in targets:
        trained = sum(t.numel() for t in tensors_of(model, target, targets, shared).trained.values())
        counts = {w: len(best.get(w.site.name, ())) for w in inside[target.site.name]}
        if alpha * sum(counts.values()) >= trained:
            match = exact(target.site) if method.kind == "weight" else target.site.path
            rules.setdefault("structured", []).append(Rule(match, (method,)))
            continue
        for w, count in counts.items():
            if count:
                rules.setdefault("sparse", []).append(Rule(exact(w.site), (Sparse(count=count, criterion=by),)))
    return {kind: Plan(tuple(found)) for kind, found in rules.items()}


def _matrices(model: nn.Module, target: Target) -> list[Target]:
    """The weights whose sensitivity a site stands for: itself, or every matrix in the module that is called."""
    path, entries = target.site.path, Sparse()
    if target.method.kind == "weight":
        return [target]
    if target.method.kind != "call":
        raise ConfigError(
            f"{type(target.method).__name__} adds tokens; SPT weighs a method against the weights of its site"
        )
    below = [(p, m) for p, m in model.named_modules() if p == path or p.startswith(path + ".") or not path]
    owners = [p for p, m in below if p and SLOT not in p.split(".") and entries.tensors(p, m)]
    if not owners:
        raise ConfigError(f"{path} has no matrix whose sensitivity could be measured")
    return resolve(model, Plan((Rule(" ".join(owners), (entries,)),)))


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
