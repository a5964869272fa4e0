"""Real compaction: components of a low-rank adapter that are out of use leave its tensors, its file and its plan.

    mmpeft.compact(model)                         what AdaLoRA, SoRA, IncreLoRA, DyLoRA no longer use
    mmpeft.prune_channels(model, keep=0.5)        LoRA: the components with the smallest ||b_j|| ||a_j||, over all sites
    mmpeft.drop_sites(model, lambda site: ...)    whole sites (AdapterDrop's fixed form)
    mmpeft.compact(model, keep=masks)             also units of a bottleneck and tokens of a prefix (S-MaM)
    mmpeft.plain_prefixes(model)                  a prefix without the MLP that made it (PrefixTuning, eTT)

The outputs stay what they were with those components at zero. Tensors are new, so an optimizer must be made again. The
adapter's plan gets one exact rule for each changed site (`edit.py`), which is how its file loads with the smaller ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Delta, Method, Tensors
from mmpeft.adapters.methods.bottleneck import AdaptFormer, Bottleneck
from mmpeft.adapters.methods.dynamic_rank import Elastic
from mmpeft.adapters.methods.lora import DoRA, LoRA, LoRAPlus
from mmpeft.adapters.methods.low_rank import LowRank
from mmpeft.adapters.methods.prefix import Prefix, Prefixed
from mmpeft.adapters.methods.selective import BitFit, Full, LayerNormTuning
from mmpeft.adapters.selection.criteria import top
from mmpeft.adapters.selection.edit import editing, one_adapter
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError, Unsupported

_PAIR: dict[str, int | None] = {"A": -2, "B": -1}
_BOTTLENECK: dict[str, int | None] = {"down_weight": 0, "down_bias": 0, "up_weight": 1, "up_bias": None}
_AXES: dict[type[Method], dict[str, int | None]] = {
    LoRA: _PAIR,
    LoRAPlus: _PAIR,
    DoRA: {**_PAIR, "m": None},
    Bottleneck: _BOTTLENECK,
    AdaptFormer: _BOTTLENECK,
    Prefix: {"K": 0, "V": 0},
}
_FIELD: dict[type[Method], str] = {Bottleneck: "size", AdaptFormer: "size", Prefix: "num_tokens"}  # else "rank"


def compact(model: nn.Module, name: str | None = None, *, keep: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Take unused components out of adapter `name` (default: the only one).

    Args:
        keep: site name -> [rank] bool, what stays; default what the methods say is in use (sites of other methods stay
            as they are).

    Returns:
        Site name -> rank now, 0 for a site that is gone, for the sites that were looked at.

    Raises:
        ConfigError: nothing would be left, or a mask has the wrong length.
        Unsupported: stacks of experts, whose ranks may differ, and methods without components.
    """
    name = one_adapter(model, name)
    with editing(model, name) as sites:
        todo = [(place, mask) for place in sites if (mask := _mask(place.delta, keep)) is not None]
        if not todo:
            raise ConfigError(f"adapter {name!r} has no site with components to take out")
        if len(todo) == len(sites) and not any(bool(mask.any()) for _, mask in todo):
            raise ConfigError(f"no component of adapter {name!r} is in use; detach it instead")
        for place, mask in todo:
            if bool(mask.any()):
                place.put(_smaller(place.delta, mask))
            else:
                place.drop()
    return {place.delta.site.name: int(mask.sum()) for place, mask in todo}


def prune_channels(
    model: nn.Module, name: str | None = None, *, keep: float | int, per_site: bool = False
) -> dict[str, int]:
    """Channel-wise pruning of LoRA-type adapters: components j with the smallest ||b_j|| ||a_j|| leave (DoRA too; its
    magnitudes stay).

    Args:
        keep: a number of components (int) or a share of them (float), of all sites together.
        per_site: of each site instead.
    """
    name = one_adapter(model, name)
    found = [d for _, _, slot in slots(model) for _, d in slot.deltas((name,)) if _has_pair(d)]
    if not found:
        raise ConfigError(f"adapter {name!r} has no site with a pair A, B")
    scores = {d.site.name: d.B.detach().norm(dim=-2) * d.A.detach().norm(dim=-1) for d in found}
    groups = [{n: s} for n, s in scores.items()] if per_site else [scores]
    masks: dict[str, Tensor] = {}
    for group in groups:
        n = sum(s.numel() for s in group.values())
        kept = top(group, keep if isinstance(keep, int) else max(1, round(keep * n)))
        for site, s in group.items():
            masks[site] = torch.zeros(s.shape, dtype=torch.bool, device=s.device)
            masks[site].view(-1)[kept.get(site, torch.zeros(0, dtype=torch.int64)).to(s.device)] = True
    return compact(model, name, keep=masks)


def drop_sites(model: nn.Module, drop: Callable[[Site], bool], name: str | None = None) -> list[str]:
    """Take the adapter off every site for which `drop(site)` holds; returns their names.

    Raises:
        ConfigError: no site, or all of them.
    """
    name = one_adapter(model, name)
    with editing(model, name) as sites:
        gone = [place for place in sites if drop(place.delta.site)]
        if not gone or len(gone) == len(sites):
            raise ConfigError(
                f"{len(gone)} of {len(sites)} sites of adapter {name!r} would go; expected some, and not all"
            )
        for place in gone:
            place.drop()
    return [place.delta.site.name for place in gone]


@torch.no_grad()
def plain_prefixes(model: nn.Module, name: str | None = None) -> list[str]:
    """Replace what generates prefixes (`PrefixTuning`, `ETT`) by the keys and values that it makes now, as `Prefix`;
    returns the names of the sites.

    Raises:
        ConfigError: the adapter has no such site.
    """
    name = one_adapter(model, name)
    with editing(model, name) as sites:
        made = [place for place in sites if isinstance(place.delta.method, Prefixed)]
        made = [place for place in made if not isinstance(place.delta.method, Prefix)]
        if not made:
            raise ConfigError(f"adapter {name!r} has no generated prefix; `PrefixTuning` and `ETT` make some")
        for place in made:
            d = place.delta
            K, V = d.method.prefix(d)  # type: ignore[attr-defined]
            tensors = Tensors({"K": K.clone(), "V": V.clone()}, facts={"kv": d.facts["kv"]})
            method = Prefix(num_tokens=len(K), num_heads=d.method.num_heads)  # type: ignore[attr-defined]
            place.put(Delta(method, d.site, tensors, d.rule).train(d.training))
    return [place.delta.site.name for place in made]


def _has_pair(delta: Delta) -> bool:
    return {"A", "B"} <= set(delta._parameters) and axes_of(delta.method) is not None


def check_units(deltas: Iterable[Delta]) -> list[Delta]:
    """The sites that have units; what trains base tensors as they are (a head in full, biases, norms) is passed over.

    Raises:
        Unsupported: a site of another method without units, or none that has any.
    """
    found = [d for d in deltas if not isinstance(d.method, Full | BitFit | LayerNormTuning)]
    for d in found:
        if axes_of(d.method) is None or set(d._parameters) - set(axes_of(d.method) or ()):
            raise Unsupported(f"{d.method.name} at {d.site.name} has no units that could be pruned")
    if not found:
        raise Unsupported("the adapter has no site with units that could be pruned")
    return found


def axes_of(method: Method) -> dict[str, int | None] | None:
    """Where each tensor's rank axis is; None for methods without components."""
    if isinstance(method, Elastic):
        return method.AXES
    if type(method) in _AXES:
        return _AXES[type(method)]
    cls = type(method)
    plain = isinstance(method, LowRank) and cls.init is LowRank.init and cls.factors is LowRank.factors
    return _PAIR if plain else None


def _mask(delta: Delta, keep: Mapping[str, Tensor] | None) -> Tensor | None:
    if keep is not None:
        if delta.site.name not in keep:
            return None
        mask = keep[delta.site.name].bool()
    elif isinstance(delta.method, Elastic):
        mask = delta.method.kept(delta)
    else:
        return None
    if axes_of(delta.method) is None or set(delta._parameters) - set(axes_of(delta.method) or ()):
        raise Unsupported(f"{delta.method.name} at {delta.site.name} has no components that could be taken out")
    if mask.ndim != 1:
        raise Unsupported(f"{delta.site.name} is a stack of experts, whose ranks would differ")
    if len(mask) != components(delta):
        raise ConfigError(f"a mask of {len(mask)} at {delta.site.name} of rank {components(delta)}")
    return mask


def components(delta: Delta) -> int:
    """How many components (ranks, units, tokens) a site has."""
    axes = axes_of(delta.method) or {}
    return next((int(p.shape[axes[n]]) for n, p in delta._parameters.items() if axes.get(n) is not None), 0)  # type: ignore[union-attr, index]


def _smaller(delta: Delta, mask: Tensor) -> Delta:
    """The site with the components of `mask` only."""
    axes = axes_of(delta.method)
    assert axes is not None
    index = mask.nonzero().squeeze(-1)
    method = _resized(delta.method, len(index))
    cut: dict[str, Tensor] = {}
    for n, p in delta._parameters.items():
        axis = axes[n]
        assert p is not None
        cut[n] = p.detach().clone() if axis is None else p.detach().index_select(axis, index.to(p.device))
    for n in {"size", "draw"} & set(cut):
        cut[n].fill_(len(index))
    trained = {n: t for n, t in cut.items() if n in delta.trained}
    frozen = {n: t for n, t in cut.items() if n in delta.saved and n not in delta.trained}
    derived = {n: t for n, t in cut.items() if n not in delta.saved}
    made = Delta(method, delta.site, Tensors(trained, frozen, derived, delta.facts), delta.rule)
    for n in trained:
        flag = delta._parameters[n].requires_grad  # type: ignore[union-attr]
        made._parameters[n].requires_grad_(flag)  # type: ignore[union-attr]
    return made.train(delta.training)


def _resized(method: Method, rank: int) -> Method:
    if isinstance(method, Elastic):
        return method.resized(rank)
    field = _FIELD.get(type(method))
    if field is not None:
        return replace(method, **{field: rank})  # type: ignore[type-var]
    old: int = method.rank  # type: ignore[attr-defined]
    changes: dict[str, Any] = {"rank": rank}
    known = {f.name for f in fields(method)}  # type: ignore[arg-type]
    if getattr(method, "alpha", None) is not None:
        power = 0.5 if getattr(method, "rslora", False) else 1.0
        changes["alpha"] = method.alpha * (rank / old) ** power  # type: ignore[attr-defined]
    elif getattr(method, "rslora", False):
        changes["alpha"] = (old * rank) ** 0.5  # sqrt(old) was the scale
    if "init_from" in known:
        changes["init_from"] = "default"  # the values are the file's; PiSSA's frozen pair would not match
    return replace(method, **changes)  # type: ignore[type-var]
