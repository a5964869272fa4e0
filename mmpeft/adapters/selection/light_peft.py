"""Light-PEFT (Gu et al. 2024, arXiv 2406.03792): after a short first training, prune the foundation model's channels and
the adapters on it at once, and go on with what is left.

    plan = {"**.o_proj": mmpeft.StructuredMask(group=head), "**.down_proj": mmpeft.StructuredMask()}
    mmpeft.attach(model, plan, name="masks"); mmpeft.attach(model, lora, name="lora")
    mmpeft.use(model, ["masks", "lora"]); mmpeft.trainable(model, ["masks", "lora"])
    first steps: loss + 1e-4 * mmpeft.mask_l1(model, name="masks")
    mmpeft.prune_masks(model, keep=0.6, name="masks")                 # masked early pruning of the model
    mmpeft.prune_modules(model, batches, keep=0.5, name="lora")       # whole adapter sites, by how much they change
    mmpeft.prune_units(model, losses, keep=0.5, name="lora")          # ranks, by first-order Taylor

A pruned channel has mask 0; `structures` and `cut` take it out of a baked model. The order of the last two is the
paper's: modules, then ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta, Method
from mmpeft.adapters.methods.masks import StructuredMask
from mmpeft.adapters.probe import as_call
from mmpeft.adapters.selection.compact import drop_sites
from mmpeft.adapters.selection.criteria import check_share, top
from mmpeft.adapters.state import sites_of, slots
from mmpeft.errors import Unsupported


@torch.no_grad()
def prune_masks(model: nn.Module, *, keep: float, per_site: bool = False, name: str = "default") -> dict[str, int]:
    """Harden StructuredMask sites: the `keep` share of groups with the largest |m| get 1, the others 0, and nothing of
    them trains any more. Returns the groups left, by site.

    Args:
        keep: share of the groups, over all sites of the same group width (heads compete with heads).
        per_site: of each site instead.
    """
    check_share(keep)
    deltas: list[Delta] = sites_of(model, StructuredMask, name)
    kinds: dict[Any, dict[str, Delta]] = {}
    for d in deltas:
        assert isinstance(d.method, StructuredMask)
        kinds.setdefault(d.site.name if per_site else d.method.group, {})[d.site.name] = d
    for mine in kinds.values():
        scores = {site: d.m.abs() for site, d in mine.items()}
        kept = top(scores, max(1, round(keep * sum(len(s) for s in scores.values()))))
        for site, d in mine.items():
            d.m.zero_()
            d.m[kept.get(site, torch.zeros(0, dtype=torch.int64))] = 1
            d.m.requires_grad_(False)
    return {d.site.name: int(d.m.sum()) for d in deltas}


@torch.no_grad()
def module_ratios(model: nn.Module, batches: Iterable[Any], *, name: str = "default") -> dict[str, float]:
    """How much each weight site of an adapter changes what its layer gives: ||x (W' - W)^T|| / ||x W^T|| over batches.

    Args:
        batches: inputs as in `attach(example=)`.

    Raises:
        Unsupported: a site that is not the weight of a linear layer.
    """
    owners = {id(d): owner for _, owner, slot in slots(model) for _, d in slot.deltas((name,))}
    sums: dict[str, list[float]] = {}
    hooks = []
    for d in sites_of(model, Method, name):
        owner = owners[id(d)]
        if not isinstance(owner, nn.Linear) or d.site.tensor != "weight" or d.site.rows is not None:
            raise Unsupported(f"module_ratios reads linear layers; {d.site.name} is the {d.site.kind} of another")
        W = owner._parameters["weight"]
        assert W is not None
        change = d.method.weight(W.to(torch.promote_types(W.dtype, torch.float32)), d) - W

        def note(_: nn.Module, args: Any, site: str = d.site.name, W: Tensor = W, change: Tensor = change) -> None:
            x = args[0].to(change.dtype)
            total = sums.setdefault(site, [0.0, 0.0])
            total[0] += float((x @ change.mT).square().sum())
            total[1] += float((x @ W.to(change.dtype).mT).square().sum())

        hooks.append(owner.register_forward_pre_hook(note))
    try:
        for batch in batches:
            args, kwargs = as_call(batch)
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {site: (a / max(b, 1e-30)) ** 0.5 for site, (a, b) in sums.items()}


def prune_modules(model: nn.Module, batches: Iterable[Any], *, keep: float, name: str = "default") -> list[str]:
    """Take the adapter off the sites that change their layer least, down to the `keep` share; returns the sites gone."""
    check_share(keep)
    ratios = module_ratios(model, batches, name=name)
    best = sorted(ratios, key=lambda site: -ratios[site])[: max(1, round(keep * len(ratios)))]
    if len(best) == len(ratios):
        return []
    return drop_sites(model, lambda site: site.name not in best, name)
