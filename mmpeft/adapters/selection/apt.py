"""APT's controller: adaptive pruning and tuning (Zhao et al. 2024, arXiv 2401.12200) of the sites of the method `APT`.

    control = mmpeft.APTController(model, sparsity=0.4, begin=50, end=500, grow_every=100)
    with control.watch():                     # around the forward and backward
        loss = task(model(x)) + mmpeft.apt_distill(hidden, teacher); loss.backward()
    optimizer.step(); control.step(); optimizer.zero_grad()       # or the callback mmpeft.tasks.StepControl

Output channels of every site are scored by how much they matter for the loss and by how many outliers they carry,
|sum H dL/dH| + sqrt(kurtosis(H)), averaged over steps; the least are masked, to a share that rises cubically. Sites whose
B matters most (sum |B dL/dB|) get more components.

Choice: the paper prunes heads, neurons and hidden dimensions by binary search under a parameter budget; here a site's own
groups are pruned to one share. Its distillation is layer by layer from the unpruned, tuned model; `apt_distill` is that
loss for a pair of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.adapters.method import Delta
from mmpeft.adapters.methods.masks import APT
from mmpeft.adapters.selection.controller import Controller
from mmpeft.adapters.selection.criteria import smooth
from mmpeft.adapters.selection.rank import Importance
from mmpeft.adapters.selection.schedules import Cubic
from mmpeft.adapters.state import sites_of, slots
from mmpeft.errors import ConfigError, Unsupported


class APTController(Controller):
    """Prunes output channels and grows ranks of every APT site of an adapter.

    Args:
        sparsity: share of every site's groups masked at the end.
        begin, end: steps between which it rises.
        group: neighbouring output channels that go together, by site path; 1 elsewhere.
        grow_every: steps between growths; 0 never.
        grow: components that the more important half of the sites get at a growth.
        beta: of the moving averages.

    Raises:
        ConfigError: there is no APT site, or numbers out of range.
        Unsupported: a site that is not a called linear layer's weight.
    """

    KEEPS = ("steps", "salience", "sensitivities")
    measure = "masked"

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        begin: int,
        end: int,
        group: dict[str, int] | None = None,
        grow_every: int = 0,
        grow: int = 1,
        beta: float = 0.85,
        name: str | None = None,
    ) -> None:
        if not 0 <= sparsity < 1 or not 0 <= begin < end or grow_every < 0 or grow < 1 or not 0 <= beta < 1:
            raise ConfigError(
                f"sparsity {sparsity}, begin {begin}, end {end}, grow_every {grow_every}, grow {grow}, beta {beta}"
            )
        mine = sites_of(model, APT, name)
        owners = {id(d): owner for _, owner, slot in slots(model) for _, d in slot.deltas()}
        self.sites: dict[str, tuple[nn.Module, Delta]] = {d.site.name: (owners[id(d)], d) for d in mine}
        for site, (owner, d) in self.sites.items():
            if not isinstance(owner, nn.Linear) or d.site.rows is not None:
                raise Unsupported(f"APT scores what a linear layer gives; {site} is of a {type(owner).__name__}")
        self.group = {site: (group or {}).get(d.site.path, 1) for site, (_, d) in self.sites.items()}
        for site, (_, d) in self.sites.items():
            if d.site.shape[0] % self.group[site]:
                raise ConfigError(f"group {self.group[site]} does not divide the {d.site.shape[0]} rows of {site}")
        self.share, self.beta = Cubic(0.0, sparsity, begin, end), beta
        self.grow_every, self.grow, self.steps = grow_every, grow, 0
        self.now: dict[str, tuple[int, Any, Any]] = {}  # calls, and sums over them of both parts of the score
        self.salience: dict[str, Tensor] = {}
        self.importance = Importance("sensitivity", beta, None, warm=True)

    @property
    def sensitivities(self) -> dict[str, Tensor]:
        """Smoothed sensitivities of each site's B."""
        return self.importance.mean

    @sensitivities.setter
    def sensitivities(self, held: dict[str, Tensor]) -> None:
        self.importance.mean = held

    @property
    def tuning(self) -> dict[str, Tensor]:
        """How much tuning matters at each site, a scalar."""
        return {site: s.sum() for site, s in self.importance.mean.items()}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within it, forwards and their backwards are scored: those of one micro-batch, or of several, since the last
        step."""

        def note(site: str, H: Tensor) -> None:
            kurtosis = outliers(H.detach())

            def backward(g: Tensor) -> None:
                product = (H.detach() * g).flatten(0, -2).sum(0).abs()
                calls, products, outside = self.now.get(site, (0, 0, 0))
                self.now[site] = (calls + 1, products + product, outside + kurtosis)

            if H.requires_grad:
                H.register_hook(backward)  # type: ignore[no-untyped-call]

        hooks = [
            owner.register_forward_hook(lambda _, __, H, site=site: note(site, H))
            for site, (owner, _) in self.sites.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self) -> float:
        """After the optimizer's step, gradients still there; returns the share masked now."""
        self.steps += 1
        share = self.share(self.steps)
        for site, (_, d) in self.sites.items():
            if site not in self.now or d.B.grad is None:
                raise ConfigError(f"{site} was not scored; run forward and backward within watch(), then step")
            # The loss of a micro-batch is a share of the step's, its outliers are not.
            calls, products, outside = self.now[site]
            salience = self.loop.mean(products + outside / calls)
            self.salience[site] = smooth(self.salience.get(site), salience, self.beta)
            self.importance.update(site, d.B)
            groups = self.salience[site].view(-1, self.group[site]).sum(1)
            gone = groups.argsort(stable=True)[: int(share * len(groups) + 1e-9)]
            keep = torch.ones_like(groups)
            keep[gone] = 0
            d.m_out.copy_(keep.repeat_interleave(self.group[site]))
        self.now = {}
        if self.grow_every and self.steps % self.grow_every == 0:
            tuning = self.tuning
            ranked = sorted(self.sites, key=lambda site: -float(tuning[site]))
            for site in ranked[: (len(ranked) + 1) // 2]:
                mask = self.sites[site][1].mask
                used = int(mask.sum())
                mask[used : used + self.grow] = 1  # B is 0 there and A random: the function stays
        return share

    def ranks(self) -> dict[str, int]:
        """Components in use at each site."""
        return {site: int(d.mask.sum()) for site, (_, d) in self.sites.items()}


def outliers(H: Tensor) -> Tensor:
    """sqrt(kurtosis) of every channel of H [..., n] over its tokens [n]."""
    x = H.flatten(0, -2).float()
    x = x - x.mean(0)
    return (x.pow(4).mean(0) / x.square().mean(0).square().clamp_min(1e-12)).sqrt().to(H.dtype)


def apt_distill(student: Tensor, teacher: Tensor, projection: Tensor | None = None) -> Tensor:
    """The paper's layer loss, the mean squared difference of hidden states [B, T, d], the student's through `projection`
    [d, d] (identity at the start) where one is trained."""
    return F.mse_loss(student if projection is None else student @ projection.mT, teacher.detach())
