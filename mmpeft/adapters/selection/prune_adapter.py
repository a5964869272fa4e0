"""An adapter pruned to its most important part, as in the architecture search of Lawton et al. 2023 (arXiv 2305.16597):
start from more than the budget, score by first-order importance |w g|, keep the best share, train on.

    prune_entries   unstructured, "U-": single numbers of any adapter (U-MaM on Prefix and AdaptFormer; U-BitFit is a
                    method of its own, which stores what it keeps)
    prune_units     structured, "S-": prefix tokens, units of bottlenecks, ranks of LoRA, with real compaction (S-MaM);
                    S-BitFit, whole bias vectors, is `place` on BitFit

MaM itself (He et al. 2022) is the plan {"**.attn": Prefix(num_tokens=30), "**.mlp": AdaptFormer(size=512, scale=4.0)},
or with `PrefixTuning`, whose MLP `plain_prefixes` takes off before pruning.
The survey writes UBitFit and the like without saying that they are names of this search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta, Method
from mmpeft.adapters.selection.compact import axes_of, check_units, compact, components
from mmpeft.adapters.selection.criteria import Evidence, check_share, criterion, top
from mmpeft.adapters.state import sites_of


class EntryMask:
    """The entries of an adapter that an unstructured pruning has kept. Call it between `backward` and `step`; the rest
    stays exactly 0 (with weight decay too)."""

    def __init__(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        self.masks = dict(masks)

    @property
    def count(self) -> int:
        """Numbers kept."""
        return sum(int(m.sum()) for m in self.masks.values())

    @torch.no_grad()
    def __call__(self) -> None:
        """Take the gradients of what was pruned away, and set it to 0."""
        for p, mask in self.masks.items():
            p.mul_(mask)
            if p.grad is not None:
                p.grad.mul_(mask)


def importance(
    model: nn.Module, losses: Iterable[Callable[[], Tensor]], *, by: str = "sensitivity", name: str = "default"
) -> dict[str, dict[str, Tensor]]:
    """Scores of an adapter's own trained tensors, by site and tensor, from losses run with it active.

    Raises:
        ConfigError: no losses.
    """
    return _scores(sites_of(model, Method, name), losses, by)


def _scores(deltas: list[Delta], losses: Iterable[Callable[[], Tensor]], by: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    named = {(d.site.name, n): p for d in deltas for n in d.trained if (p := d._parameters[n]) is not None}
    params = list({id(p): p for p in named.values()}.values())
    evidence = {id(p): Evidence(p.detach()) for p in params}
    for loss in losses:
        for p, g in zip(params, torch.autograd.grad(loss(), params, allow_unused=True), strict=True):
            evidence[id(p)].add(torch.zeros_like(p) if g is None else g)
    for (site, n), p in named.items():
        found.setdefault(site, {})[n] = criterion(by)(evidence[id(p)])
    return found


def prune_entries(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    *,
    keep: float,
    by: str = "sensitivity",
    name: str = "default",
) -> EntryMask:
    """Set all but the `keep` share of an adapter's entries with the highest scores to 0; call the result every step.

    Args:
        losses: run with the adapter active, after a first training (at the start a factor of 0 has no score).
        keep: share of the entries, over all sites.
        by: a criterion of `criteria.py`.

    Raises:
        ConfigError: a share out of range, or nothing to prune.
    """
    check_share(keep)
    scores = importance(model, losses, by=by, name=name)
    named: dict[str, nn.Parameter] = {}
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for d in sites_of(model, Method, name):
        for n in d.trained:
            p = d._parameters[n]
            if id(p) not in seen:  # shared tensors count once
                seen.add(id(p))
                named[f"{d.site.name} {n}"], flat[f"{d.site.name} {n}"] = p, scores[d.site.name][n]
    kept = top(flat, max(1, round(keep * sum(s.numel() for s in flat.values()))))
    masks = {}
    for key, p in named.items():
        mask = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
        mask[kept.get(key, torch.zeros(0, dtype=torch.int64)).to(p.device)] = 1
        masks[p] = mask.view(p.shape)
    found = EntryMask(masks)
    found()
    return found


def prune_units(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    *,
    keep: float,
    by: str = "sensitivity",
    name: str = "default",
) -> dict[str, int]:
    """Keep the `keep` share of an adapter's units with the highest summed scores, and make its tensors that small;
    returns how many each site has now, 0 for a site that is gone.

    Raises:
        ConfigError: a share out of range.
        Unsupported: a site whose method has no units.
    """
    return compact(model, name, keep=unit_masks(sites_of(model, Method, name), losses, keep=keep, by=by))


def unit_masks(
    deltas: list[Delta], losses: Iterable[Callable[[], Tensor]], *, keep: float, by: str = "sensitivity"
) -> dict[str, Tensor]:
    """The units that `prune_units` keeps, of these sites: [units] bool by site."""
    check_share(keep)
    deltas = check_units(deltas)
    scores = _scores(deltas, losses, by)
    sums: dict[str, Tensor] = {}
    for d in deltas:
        axes = axes_of(d.method) or {}
        total = torch.zeros(components(d))
        for n, score in scores[d.site.name].items():
            if (axis := axes.get(n)) is not None:
                total = total + score.movedim(axis, 0).reshape(len(total), -1).sum(1).to(total)
        sums[d.site.name] = total
    kept = top(sums, max(1, round(keep * sum(len(s) for s in sums.values()))))
    masks = {site: torch.zeros(len(s), dtype=torch.bool) for site, s in sums.items()}
    for site, index in kept.items():
        masks[site][index] = True
    return masks
