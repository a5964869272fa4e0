"""Unstructured selective methods: a delta on chosen entries of each weight, stored as indices and values.

    SHiRA          Bhardwaj et al. 2024, arXiv 2406.13175: rank (in + out) entries a site, random or by weight
    FishMask       Sung et al. 2021, arXiv 2111.09839: the share of entries with the largest Fisher information
    PaFi           Liao et al. 2023, arXiv 2305.16742: the smallest weights; no data
    ChildTuningD   Xu et al. 2021, arXiv 2109.05687: Fisher too, at a larger share (its other form, F, is `ChildMask`)
    LTSFT          Ansell et al. 2022, arXiv 2110.07560: the entries that full fine-tuning changed most, rewound
    UBitFit        Lawton et al. 2023, arXiv 2305.16597: single bias entries

The base never moves, so masks cost no dense optimizer state. Which entries: the method's criterion (`criteria.py`).
Those that need no data are chosen when the adapter attaches, per site; the others, and shares of the whole model, by
`attach_selected`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft.adapters.attach import attach, detach
from mmpeft.adapters.example import example_of
from mmpeft.adapters.liveness import prove
from mmpeft.adapters.method import Context, Delta, Method, Tensors, wide, zeros
from mmpeft.adapters.methods.low_rank import site_seed
from mmpeft.adapters.methods.selective import BitFit
from mmpeft.adapters.plan import Plan, PlanLike, Rule, Target, resolve
from mmpeft.adapters.probe import as_call
from mmpeft.adapters.selection.criteria import DATA_FREE, Evidence, Losses, criterion, gather, top
from mmpeft.adapters.site import Site, slice_rows
from mmpeft.adapters.state import slots, state_of
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class Sparse(Method, name="sparse"):
    """`W' = W + delta` on `count` entries of each weight, or on the share `density` of them; values 0 at the start.

    Args:
        count: entries a site; None: from `density`.
        density: share of the weights; over all sites of the rule together in `attach_selected`, else of each site.
        criterion: which entries; see `criteria.py`.
        seed: of random choices.
    """

    count: int | None = None
    density: float = 0.005
    criterion: str = "random"
    seed: int = 0
    space = "any"  # matched modules: their matrices; a bias or a gain by its own name
    mixes = False

    def __post_init__(self) -> None:
        criterion(self.criterion)
        if not 0 < self.density <= 1:
            raise ConfigError(f"density {self.density}; expected 0 < density <= 1")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"count {self.count}; expected at least 1")

    def size(self, site: Site) -> int:
        """How many units (here: entries) this site has."""
        return torch.Size(site.shape).numel()

    def scores(self, evidence: Evidence) -> Tensor:
        """One score a unit."""
        return criterion(self.criterion)(evidence)

    def values(self, k: int, base: Tensor) -> Tensor:
        """The trained tensor of k units."""
        return zeros(k, like=base)

    def budget(self, site: Site) -> int:
        """Units this site gets."""
        return self.count if self.count is not None else max(1, round(self.density * self.size(site)))

    def check(self, site: Site) -> None:
        if self.budget(site) > self.size(site):
            raise ConfigError(
                f"{self.budget(site)} places at {site.name} of shape {tuple(site.shape)}; it has {self.size(site)}"
            )

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        k, free = self.budget(site), self.criterion in DATA_FREE
        if not (free or base.is_meta) and self.count is None:
            raise ConfigError(
                f"{type(self).__name__} chooses by {self.criterion}, which needs data; use attach_selected"
            )
        index = torch.full((k,), -1, device=base.device)  # until `attach_selected` or a file brings the places
        if free and not base.is_meta:
            evidence = Evidence(base.detach().to(wide(base.dtype)), generator=site_seed(self.seed, site))
            index = top({"": self.scores(evidence)}, k)[""].to(base.device)
        return Tensors({"value": self.values(k, base)}, frozen={"index": index}, facts={"placed": free})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        if not p.facts["placed"]:
            if bool((p.index < 0).any()):
                raise ConfigError(f"{p.site.name}: {type(self).__name__} has no places yet; use attach_selected")
            p.facts["placed"] = True
        return self.put(W, p)

    def put(self, W: Tensor, p: Delta) -> Tensor:
        """W with the values added at their places."""
        return W.reshape(-1).index_add(0, p.index, p.value).view(W.shape)


@dataclass(frozen=True)
class SHiRA(Sparse, name="shira"):
    """Sparse high-rank adapter (arXiv 2406.13175): as many entries as LoRA of `rank` trains, rank (in + out), at random
    places (SHiRA-Rand) or, with criterion "magnitude", the largest weights (SHiRA-WM); "gradient" and "sensitivity" are
    its Grad and SNIP."""

    rank: int = 8
    space = "matrix"

    def budget(self, site: Site) -> int:
        stacked = torch.Size(site.shape[:-2]).numel()
        return self.count if self.count is not None else stacked * self.rank * (site.shape[-1] + site.shape[-2])


@dataclass(frozen=True)
class FishMask(Sparse, name="fishmask", aliases=("fish", "fish_mask")):
    """FISH Mask (arXiv 2111.09839): the `density` of all weights with the largest diagonal Fisher information, fixed
    before training; attach it with `attach_selected`. (The survey cites a later variant for it.)"""

    criterion: str = "fisher"


@dataclass(frozen=True)
class PaFi(Sparse, name="pafi"):
    """Task-agnostic mask (arXiv 2305.16742): the `density` of weights with the smallest magnitude."""

    criterion: str = "small_magnitude"


@dataclass(frozen=True)
class ChildTuningD(Sparse, name="child-tuning-d"):
    """Child-Tuning_D (arXiv 2109.05687): the child network of the `density` of weights with the largest Fisher
    information."""

    density: float = 0.2
    criterion: str = "fisher"


@dataclass(frozen=True)
class LTSFT(Sparse, name="lt-sft", aliases=("sft", "ltsft")):
    """Lottery-ticket sparse fine-tuning (arXiv 2110.07560; SFT in the survey's tables): the entries that a first full run
    changed most, trained from the original weights. Attach with `attach_selected(model, plan, trained=...)`, the weights after that run."""

    density: float = 0.05
    criterion: str = "change"


def attach_selected(
    model: nn.Module,
    plan: PlanLike,
    losses: Losses = (),
    *,
    trained: Mapping[str, Tensor] | None = None,
    name: str = "default",
    example: Any = None,
    check: bool = True,
) -> nn.Module:
    """`attach` for plans with `Sparse` methods whose entries are chosen on data, over all sites of a rule together; other
    rules (a head in full, ...) are attached as they are.

    The adapter that results records each site's count, so that it saves and loads like any other.

    Args:
        losses: as in `criteria.gather`.
        trained: tensors by path after a full fine-tuning run, for the criterion "change".

    Raises:
        ConfigError: no rule with one `Sparse` method, or a criterion whose evidence is missing.
    """
    given = Plan.read(plan)
    losses = list(losses)
    rules: list[Rule] = []
    chosen: dict[str, Tensor] = {}
    for rule in given.rules:
        if len(rule.methods) != 1 or not isinstance(method := rule.methods[0], Sparse):
            rules.append(rule)
            continue
        targets = resolve(model, Plan((rule,)))
        evidence = gather(model, targets, losses, seed=method.seed)
        if trained is not None:
            for target in targets:
                e = evidence[target.site.name]
                e.start, e.value = e.value, _matrix(target, trained)
        scores = {site: method.scores(e) for site, e in evidence.items()}
        total = sum(s.numel() for s in scores.values())
        counts = sum(method.budget(t.site) for t in targets)
        picked = top(
            scores, max(1, round(method.density * total)) if method.count is None and not _fixed(method) else counts
        )
        for target in targets:
            site = target.site
            if site.name in picked:
                counted = replace(method, count=len(picked[site.name]))
                rules.append(Rule(exact(site), (counted,), rule.lr, rule.weight_decay))
                chosen[site.name] = picked[site.name]
    if not chosen:
        raise ConfigError("attach_selected: no rule has one of the Sparse methods (SHiRA, FishMask, PaFi, ...)")
    return attach_placed(model, rules, chosen, name=name, example=example, check=check)


def attach_placed(
    model: nn.Module,
    rules: Iterable[Rule],
    chosen: Mapping[str, Tensor],
    *,
    name: str,
    example: Any = None,
    check: bool = True,
) -> nn.Module:
    """`attach` for exact rules of `Sparse` sites, each with its places (by site name)."""
    attach(model, Plan(tuple(rules)), name, example=example, check=False)
    for delta in sparse_deltas(model, name):
        settle(delta, chosen[delta.site.name])
    probe = (example if example is not None else example_of(model)) if check else None
    try:
        if probe is not None:
            prove(model, name, as_call(probe))
    except BaseException:
        detach(model, name)
        raise
    return model


def settle(delta: Delta, index: Tensor) -> None:
    """Give a `Sparse` site its places."""
    delta.index.copy_(index)
    delta.facts["placed"] = True


def exact(site: Site) -> str:
    """The pattern that matches this site alone."""
    return f"{site.path}.{site.tensor}".lstrip(".") + (f"[{site.role}]" if site.role else "")


def _fixed(method: Sparse) -> bool:
    """Whether the method fixes a count a site rather than a share."""
    return type(method).budget is not Sparse.budget


def _matrix(target: Target, trained: Mapping[str, Tensor]) -> Tensor:
    path = f"{target.site.path}.{target.site.tensor}".lstrip(".")
    if path not in trained or target.site.layout is None:
        raise ConfigError(f"trained= has no {path!r}; pass the state_dict of the fully fine-tuned model")
    m = slice_rows(target.site.layout.to_matrix(trained[path]), target.site.rows)
    return m.to(wide(m.dtype))


def sparse_deltas(model: nn.Module, name: str) -> list[Delta]:
    """The `Sparse` sites of an adapter."""
    state_of(model).check_names([name])
    return [d for _, _, slot in slots(model) for _, d in slot.deltas((name,)) if isinstance(d.method, Sparse)]


@dataclass(frozen=True)
class UBitFit(Sparse, name="u-bitfit", aliases=("ubitfit",)):
    """BitFit pruned to single entries (Lawton et al. 2023, arXiv 2305.16597, U-BitFit): the `density` of all bias
    entries with the largest first-order importance |b g|; attach it with `attach_selected`."""

    density: float = 0.5
    criterion: str = "sensitivity"
    space = "vector"

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        return BitFit().tensors(path, module)
