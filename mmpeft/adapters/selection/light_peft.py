"""Light-PEFT (Gu et al. 2024, arXiv 2406.03792): after a short first training, prune the foundation model's channels and
the adapters on it at once, and go on with what is left.

    plan = {"**.o_proj": mmpeft.StructuredMask(group=head), "**.down_proj": mmpeft.StructuredMask()}
    mmpeft.attach(model, plan, name="masks"); mmpeft.attach(model, lora, name="lora")
    mmpeft.use(model, ["masks", "lora"]); mmpeft.trainable(model, ["masks", "lora"])
    first steps: loss + 1e-4 * mmpeft.mask_l1(model, name="masks")
    mmpeft.prune_masks(model, keep=0.6, name="masks")                 # masked early pruning of the model
    mmpeft.prune_modules(model, batches, keep=0.5, name="lora")       # whole adapter sites, by how much they change
    mmpeft.prune_units(model, losses, keep=0.5, name="lora")          # ranks, by first-order Taylor

or, all of it beside one training of one adapter, `LightPEFT` in `mmpeft.tasks.StepControl`.

A pruned channel has mask 0; `structures` and `cut` take it out of a baked model. The order of the last two is the
paper's: modules, then ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.methods.masks import StructuredMask, mask_l1
from mmpeft.adapters.methods.selective import BitFit, Full, LayerNormTuning
from mmpeft.adapters.probe import as_call
from mmpeft.adapters.selection.compact import axes_of, compact, drop_sites
from mmpeft.adapters.selection.controller import samples_of
from mmpeft.adapters.selection.criteria import check_share, top
from mmpeft.adapters.selection.hold import Held, Holding, label
from mmpeft.adapters.selection.prune_adapter import unit_masks
from mmpeft.adapters.state import sites_of, slots, state_of
from mmpeft.errors import ConfigError, Unsupported


@torch.no_grad()
def prune_masks(model: nn.Module, *, keep: float, per_site: bool = False, name: str = "default") -> dict[str, int]:
    """Harden StructuredMask sites: the `keep` share of groups with the largest |m| get 1, the others 0, and nothing of
    them trains any more. Returns the groups left, by site.

    Args:
        keep: share of the groups, over all sites of the same group width (heads compete with heads).
        per_site: of each site instead.
    """
    deltas: list[Delta] = sites_of(model, StructuredMask, name)
    hard = hard_masks(deltas, keep=keep, per_site=per_site)
    for d in deltas:
        d.m.copy_(hard[d.site.name])
        d.m.requires_grad_(False)
    return {d.site.name: int(d.m.sum()) for d in deltas}


@torch.no_grad()
def hard_masks(deltas: list[Delta], *, keep: float, per_site: bool = False) -> dict[str, Tensor]:
    """The masks of 0 and 1 that `prune_masks` sets, by site [groups]."""
    check_share(keep)
    kinds: dict[Any, dict[str, Delta]] = {}
    for d in deltas:
        assert isinstance(d.method, StructuredMask)
        kinds.setdefault(d.site.name if per_site else d.method.group, {})[d.site.name] = d
    hard = {d.site.name: torch.zeros_like(d.m) for d in deltas}
    for mine in kinds.values():
        scores = {site: d.m.abs() for site, d in mine.items()}
        for site, kept in top(scores, max(1, round(keep * sum(len(s) for s in scores.values())))).items():
            hard[site][kept] = 1
    return hard


@torch.no_grad()
def module_ratios(model: nn.Module, batches: Iterable[Any], *, name: str = "default") -> dict[str, float]:
    """How much each weight site of an adapter changes what its layer gives: ||x (W' - W)^T|| / ||x W^T|| over batches.
    Masks of channels are no such sites, nor is what trains base tensors as they are (a head in full, biases, norms).

    Args:
        batches: inputs as in `attach(example=)`, or functions that run the model on one.

    Raises:
        Unsupported: a site that is not the weight of a linear layer.
    """
    sums: dict[str, list[float]] = {}
    hooks = []
    for d, owner, W in _unmasked(model, name):
        change = d.method.weight(W.to(torch.promote_types(W.dtype, torch.float32)), d) - W

        def note(_: nn.Module, args: Any, site: str = d.site.name, W: Tensor = W, change: Tensor = change) -> None:
            x = args[0].to(change.dtype)
            total = sums.setdefault(site, [0.0, 0.0])
            total[0] += float((x @ change.mT).square().sum())
            total[1] += float((x @ W.to(change.dtype).mT).square().sum())

        hooks.append(owner.register_forward_pre_hook(note))
    try:
        for batch in batches:
            if callable(batch):
                batch()
            else:
                args, kwargs = as_call(batch)
                model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {site: (a / max(b, 1e-30)) ** 0.5 for site, (a, b) in sums.items()}


def _unmasked(model: nn.Module, name: str) -> list[tuple[Delta, nn.Linear, Tensor]]:
    """(site, layer, its weight) of an adapter's sites but for masks and what is trained whole.

    Raises:
        Unsupported: a site that is not the weight of a linear layer.
    """
    state_of(model).check_names([name])
    found: list[tuple[Delta, nn.Linear, Tensor]] = []
    for _, owner, slot in slots(model):
        for _, d in slot.deltas((name,)):
            if isinstance(d.method, StructuredMask | Full | BitFit | LayerNormTuning):  # a mask, or trained as it is
                continue
            if not isinstance(owner, nn.Linear) or d.site.tensor != "weight" or d.site.rows is not None:
                raise Unsupported(f"module_ratios reads the weights of linear layers, whole; {d.site.name} is none")
            W = owner._parameters["weight"]
            assert W is not None
            found.append((d, owner, W))
    return found


def prune_modules(model: nn.Module, batches: Iterable[Any], *, keep: float, name: str = "default") -> list[str]:
    """Take the adapter off the sites that change their layer least, down to the `keep` share; returns the sites gone."""
    gone = weak_modules(model, batches, keep=keep, name=name)
    return drop_sites(model, lambda site: site.name in gone, name) if gone else []


def weak_modules(model: nn.Module, batches: Iterable[Any], *, keep: float, name: str = "default") -> list[str]:
    """The sites that `prune_modules` drops."""
    check_share(keep)
    ratios = module_ratios(model, batches, name=name)
    return sorted(ratios, key=lambda site: -ratios[site])[max(1, round(keep * len(ratios))) :]


class LightPEFT(Holding):
    """The whole recipe beside one training, of one adapter with masks and an additive method (LoRA and its kin) on other
    sites: before step `at` the masks' L1 norm is the penalty; then masks, modules and ranks are chosen as by the
    functions above, on training samples, and held; the end of training takes modules and ranks out.

    Args:
        at: steps of the early training.
        masks, modules, units: shares that are kept.
        samples: training samples that modules and ranks are scored on.
        per_site: as in `prune_masks`.

    Raises:
        ConfigError: shares out of range, no masks, a site with a mask and another method, or `at` is not in the run.
        Unsupported: a method that is no addition with units, or a site that is not of a linear layer.
    """

    KEEPS = ("steps", "held", "gone", "units")
    reshapes = True
    reads_samples = True

    def __init__(
        self,
        model: nn.Module,
        *,
        at: int,
        masks: float,
        modules: float = 1.0,
        units: float = 1.0,
        samples: int = 32,
        per_site: bool = False,
        name: str = "default",
    ) -> None:
        super().__init__(model, at=at, name=name)
        for share in (masks, modules, units):
            check_share(share)
        self.shares, self.samples, self.per_site = (masks, modules, units), samples, per_site
        self.masks: list[Delta] = sites_of(model, StructuredMask, name)
        weights = _unmasked(model, name)
        self.adapters = [d for d, *_ in weights]
        if both := {d.site.name for d in self.masks} & {d.site.name for d in self.adapters}:
            raise ConfigError(f"{min(both)} has a mask and another method; LightPEFT takes them on different sites")
        for d, _, W in weights:
            if axes_of(d.method) is None or not _nothing_at_zero(d, W):
                raise Unsupported(f"LightPEFT prunes additions with units; {d.site.name} has {d.method.name}")
        self.gone: list[str] = []
        self.units: dict[str, Tensor] = {}

    def penalty(self) -> Tensor | None:
        return None if self.held else mask_l1(self.model, name=self.name)

    @torch.no_grad()
    def choose(self) -> Held:
        losses = samples_of(self.loop, self.samples)
        masks, modules, units = self.shares
        held: Held = {}
        for d, m in zip(self.masks, hard_masks(self.masks, keep=masks, per_site=self.per_site).values(), strict=True):
            held[label(d, "m")] = (torch.zeros_like(m, dtype=torch.bool), m)
            d.m.copy_(m)  # what is next is scored under the masks
        self.gone = weak_modules(self.model, losses, keep=modules, name=self.name) if self.adapters else []
        left = [d for d in self.adapters if d.site.name not in self.gone]
        for d in [d for d in self.adapters if d.site.name in self.gone]:
            for n in d.trained:
                held[label(d, n)] = (torch.zeros_like(getattr(d, n), dtype=torch.bool), torch.zeros_like(getattr(d, n)))
                getattr(d, n).zero_()
        with torch.enable_grad():
            self.units = unit_masks(left, losses, keep=units) if left else {}
        for d in left:
            for n, axis in (axes_of(d.method) or {}).items():
                if axis is not None and n in d.trained:
                    p, shape = getattr(d, n), [1] * getattr(d, n).ndim
                    shape[axis] = -1
                    free = self.units[d.site.name].to(p.device).view(shape).expand_as(p)
                    held[label(d, n)] = (free.contiguous(), torch.zeros_like(p))
        return held

    def close(self) -> None:
        if self.gone:
            drop_sites(self.model, lambda site: site.name in self.gone, self.name)
        if any(not bool(mask.all()) for mask in self.units.values()):
            compact(self.model, self.name, keep=self.units)


@torch.no_grad()
def _nothing_at_zero(d: Delta, W: Tensor) -> bool:
    """Whether the site is the identity with all that it trains at 0."""
    trial = copy.deepcopy(d)
    for n in trial.trained:
        getattr(trial, n).zero_()
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    return bool(torch.equal(trial.method.weight(W, trial), W))
