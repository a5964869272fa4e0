"""Pruning the base under LoRA, and leaving out adapters by layer.

    LoRAPrune     Zhang et al. 2024, arXiv 2305.18403: structured masks on W + B A, scored by LoRA's gradients alone
    drop_below    Rueckle et al. 2021, arXiv 2010.11918 (AdapterDrop): no adapter in the first n layers, for a while;
                  `drop_sites(model, lambda site: layer_of(site) < n)` of `compact.py` does it for good
    AdapterDrop   trains for that: n drawn anew in every step

The mask of a LoRAPrune site is in its adapter, so the base stays whole and `use(model, None)` is unpruned. Channels
that are pruned are zero; cutting them out of the network's other layers is not done here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Tensors, zeros
from mmpeft.adapters.methods.low_rank import LowRank, check_divides, check_matrix, one_of
from mmpeft.adapters.selection.controller import Controller
from mmpeft.adapters.selection.criteria import Evidence, criterion, smooth
from mmpeft.adapters.selection.schedules import Cubic
from mmpeft.adapters.site import Site, slice_rows
from mmpeft.adapters.state import slots, state_of
from mmpeft.errors import ConfigError, NameNotFound, nearest


@dataclass(frozen=True)
class LoRAPrune(LowRank, name="loraprune", aliases=("lora-prune",)):
    """`W' = (W + alpha / rank * B A) * M`, M a mask of whole rows or columns (arXiv 2305.18403), 1 at the start; rank
    (in + out) parameters. A `LoRAPruner` sets the mask.

    Args:
        axis: "rows" (output units) or "columns" (input units).
        group: neighbouring rows or columns that go together: a head's width for attention.
    """

    beside = ("LoRAPruner",)
    axis: Literal["rows", "columns"] = "rows"
    group: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("axis", self.axis, ("rows", "columns"))

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        super().check(site)
        check_divides("group", site.shape[0 if self.axis == "rows" else 1], self.group, self.axis, site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        mask = torch.ones_like(zeros(base.shape[0 if self.axis == "rows" else 1], like=base))
        return Tensors(self.pair(base), frozen={"mask": mask})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        if self.axis == "rows":
            return Factors(p.A, p.B, self.scale, row=p.mask)
        return Factors(p.A * p.mask, p.B, self.scale, col=p.mask)


class LoRAPruner(Controller):
    """Iterative pruning: after each optimizer step (gradients still there) importances are averaged, and the least
    important groups of each site are masked, to a share that rises cubically to `sparsity` between two steps.

    An entry's importance is (G (W + s B A))^2 with G = s (dB A + B dA - dB dA), what a step of LoRA would change of W;
    a group's is the sum over its entries.

    Args:
        sparsity: final share of groups masked at every site.
        begin, end: steps between which it rises.
        beta: of the moving average.
        tied: lists of site names whose groups go together (q, k, v rows and the output projection's columns of a
            layer); their scores are added.

    Raises:
        ConfigError: no LoRAPrune site, values out of range, or tied sites with different numbers of groups.
        NameNotFound: a tied name that is no LoRAPrune site.
    """

    KEEPS: ClassVar[tuple[str, ...]] = ("steps", "scores")
    measure = "masked"

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        begin: int,
        end: int,
        beta: float = 0.9,
        tied: Sequence[Sequence[str]] = (),
        name: str | None = None,
    ) -> None:
        if not 0 < sparsity < 1 or not 0 <= beta < 1:
            raise ConfigError(f"sparsity {sparsity}, beta {beta}; expected sparsity in (0, 1), 0 <= beta < 1")
        names = None if name is None else (name,)
        found = [(owner, d) for _, owner, s in slots(model) for _, d in s.deltas(names)]
        self.sites = {d.site.name: (owner, d) for owner, d in found if isinstance(d.method, LoRAPrune)}
        if not self.sites:
            raise ConfigError("LoRAPruner: the model has no LoRAPrune adapter")
        for site in (site for group in tied for site in group):
            if site not in self.sites:
                raise NameNotFound(f"tied site {site!r} is no LoRAPrune site{nearest(site, self.sites)}")
        alone = [[n] for n in self.sites if all(n not in group for group in tied)]
        self.groups = [*(list(group) for group in tied), *alone]
        for group in self.groups:
            if len({self._count(n) for n in group}) > 1:
                counts = ", ".join(f"{n} {self._count(n)}" for n in group)
                raise ConfigError(f"tied sites have different numbers of groups: {counts}")
        self.share, self.beta, self.steps = Cubic(0.0, sparsity, begin, end), beta, 0
        self.scores: dict[str, Tensor] = {}

    def _count(self, name: str) -> int:
        _, d = self.sites[name]
        assert isinstance(d.method, LoRAPrune)
        return int(d.mask.numel()) // d.method.group

    def importance(self, name: str) -> Tensor:
        """This step's scores of a site's groups [groups]."""
        _, d = self.sites[name]
        assert isinstance(d.method, LoRAPrune)
        if d.A.grad is None or d.B.grad is None:
            raise ConfigError(f"{name} has no gradient; call step after backward and before zero_grad")
        W = self.stored(name)
        G = d.B.grad @ d.A + d.B @ d.A.grad - d.B.grad @ d.A.grad
        scale = d.method.scale
        change = Evidence(W + scale * d.B @ d.A)
        change.add(scale * G)
        entries = criterion("taylor")(change)
        units = entries.sum(1 if d.method.axis == "rows" else 0)
        return units.view(-1, d.method.group).sum(1)

    def stored(self, name: str) -> Tensor:
        """A site's base weight [out, in], in the adapter's dtype."""
        owner, d = self.sites[name]
        stored = owner._parameters[d.site.tensor]
        assert stored is not None and d.site.layout is not None
        return slice_rows(d.site.layout.to_matrix(stored.detach()), d.site.rows).to(d.A.dtype)

    @torch.no_grad()
    def step(self) -> float:
        """Update scores and masks; returns the share masked now."""
        self.steps += 1
        share = self.share(self.steps)
        for group in self.groups:
            for name in group:
                self.scores[name] = smooth(self.scores.get(name), self.importance(name), self.beta)
            total = torch.stack([self.scores[name] for name in group]).sum(0)
            gone = total.argsort(stable=True)[: int(share * len(total) + 1e-9)]
            keep = torch.ones_like(total)
            keep[gone] = 0
            for name in group:
                _, d = self.sites[name]
                assert isinstance(d.method, LoRAPrune)
                d.mask.copy_(keep.repeat_interleave(d.method.group))
        return share


def layer_of(site: Site) -> int | None:
    """Number of the layer a site is in: the first number in its path; None where there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site.path)
    return None if found is None else int(found[1])


@contextmanager
def drop_below(model: nn.Module, n: int, *, name: str | None = None) -> Iterator[list[str]]:
    """Within it, adapter `name` (None: every one) is not there in layers 0..n-1. Yields the sites left out.
    AdapterDrop trains with n drawn anew for each batch; with activation checkpointing, run the backward inside.

    Raises:
        ConfigError: no site would be left out, or adapters are merged or stacked.
    """
    state = state_of(model)
    if state.merged or state.indexed:
        raise ConfigError("drop_below: adapters are merged or stacked, so none can be left out")
    names = tuple(state.entries) if name is None else (name,)
    state.check_names(names)
    taken: list[tuple[nn.Module, dict[str, nn.Module | None]]] = []
    gone = []
    for _, _, slot in slots(model):
        below = [d for _, d in slot.deltas(names) if (layer := layer_of(d.site)) is not None and layer < n]
        if below:
            gone += [d.site.name for d in below]
            taken.append((slot, dict(slot._modules)))
    if not gone:
        raise ConfigError(f"drop_below({n}): no site is in a numbered layer below {n}")
    try:
        for slot, _ in taken:
            for adapter in names:
                slot._modules.pop(adapter, None)
            slot.cache = {}  # type: ignore[assignment]
        yield gone
    finally:
        for slot, before in taken:
            slot._modules.clear()
            slot._modules.update(before)
            slot.cache = {}  # type: ignore[assignment]


class AdapterDrop(Controller):
    """AdapterDrop's training: in every step the adapter is not there in the first n layers, n drawn from 0 to `most`, so
    that any number of them can be left out afterwards.

    Args:
        most: layers left out at most, fewer than the adapter has.
        name: as in `drop_below`.

    Raises:
        ConfigError: `most` is out of range.
    """

    KEEPS = ("steps",)
    measure = "dropped"

    def __init__(self, model: nn.Module, *, most: int, seed: int = 0, name: str | None = None) -> None:
        names = None if name is None else (name,)
        layers = {layer_of(d.site) for _, _, s in slots(model) for _, d in s.deltas(names)} - {None}
        if not 1 <= most < len(layers):
            raise ConfigError(f"most {most} of {len(layers)} layers; expected 1 or more, and not all")
        self.model, self.most, self.seed, self.name, self.steps, self.n = model, most, seed, name, 0, 0
        self.layers = sorted(n for n in layers if n is not None)

    def draw(self) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
        self.n = int(torch.randint(self.most + 1, (), generator=generator))

    def watch(self) -> AbstractContextManager[Any]:
        return drop_below(self.model, self.layers[self.n], name=self.name) if self.n else nullcontext()

    def step(self) -> float:
        self.steps += 1
        return float(self.n)
