"""Diff pruning (Guo et al. 2021, arXiv 2012.07463): a dense delta under learned gates, then its largest entries alone.

W' = W + z * w, z from the hard-concrete distribution with location alpha and an L0 penalty on it; the structured form
multiplies every entry's gate by one for its matrix. Twice the weights are trained meanwhile; what is stored in the end
is a `Sparse` adapter:

    mmpeft.attach(model, {"encoder.**": mmpeft.DiffPruning(structured=True)}, name="a")
    gates = mmpeft.DiffGates(model, "a")
    each step:  gates.draw(); loss = task(model) + 1e-7 * gates.penalty(); ...
    gates.count(density=0.005)           # how many entries will be left, of all sites together
    gates.harden(density=0.005)          # the adapter "a" now holds the largest 0.5 % of z * w; train on, with fixed
                                         # places. Or DiffGates(density=0.005, at=1000) in mmpeft.tasks.StepControl

Choice: a gate's noise is drawn by `draw`, not by reading the weight, so that all reads of one forward, and its
recomputation, see the same gates; without noise, and in eval, z is the distribution's median.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from mmpeft.adapters.attach import detach
from mmpeft.adapters.method import Context, Delta, Method, Tensors, zeros
from mmpeft.adapters.methods.sparse import Sparse, attach_placed, exact, sparse_deltas
from mmpeft.adapters.plan import Rule
from mmpeft.adapters.selection.criteria import check_share, top
from mmpeft.adapters.selection.hold import Held, Holding, label
from mmpeft.adapters.site import Site, own_tensors
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError

LOW, HIGH = -1.5, 1.5  # the stretched interval of the paper
OPEN = 9.0  # a location at which z is 1


@dataclass(frozen=True)
class DiffPruning(Method, name="diff-pruning", aliases=("diff_pruning", "u-diff", "s-diff")):
    """`W' = W + z * w`, w 0 at the start (arXiv 2012.07463; the survey's "U-Diff", and "S-Diff" with `structured`);
    trained: w and alpha, and one alpha a matrix with `structured`.

    Args:
        structured: multiply by a gate of the whole matrix too ("S-Diff").
        vectors: biases and the gains and biases of norms too: all numbers of the modules matched, as in the paper.
        alpha: start of the gates' locations, at which z is 0.95 (the paper starts nearer to 1, where gates have no
            gradient).
    """

    beside = ("DiffGates",)
    structured: bool = False
    alpha: float = 1.5
    vectors: bool = False
    space = "any"
    mixes = False

    def tensors(self, path: str, module: nn.Module) -> list[str]:
        return own_tensors(module) if self.vectors else super().tensors(path, module)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        shapes = {"": base.shape, **({"_group": torch.Size([1])} if self.structured else {})}
        trained = {f"alpha{n}": zeros(*shape, like=base) + self.alpha for n, shape in shapes.items()}
        noise = {f"noise{n}": zeros(*shape, like=base) for n, shape in shapes.items()}
        return Tensors({"w": zeros(*base.shape, like=base), **trained}, derived=noise)

    def update(self, p: Delta) -> Tensor:
        """z * w, with noise in training only."""
        out: Tensor = p.w
        for n in ("", "_group") if self.structured else ("",):
            location: Tensor = getattr(p, f"alpha{n}")
            out = out * gate(location + getattr(p, f"noise{n}") if p.training else location)
        return out

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return W + self.update(p)


def gate(location: Tensor) -> Tensor:
    """min(1, max(0, sigmoid(location) stretched to (LOW, HIGH)))."""
    return (torch.sigmoid(location) * (HIGH - LOW) + LOW).clamp(0, 1)


@torch.no_grad()
def draw_noise(noise: Tensor, generator: torch.Generator) -> None:
    """Fill a tensor with logistic noise."""
    noise.copy_(torch.logit(torch.rand(noise.shape, generator=generator).clamp(1e-6, 1 - 1e-6)))


def probability_open(location: Tensor) -> Tensor:
    """The chance that a gate is not 0."""
    return torch.sigmoid(location - log(-LOW / HIGH))


class DiffGates(Holding):
    """Draws, penalises and finally hardens the gates of a DiffPruning adapter.

    Args:
        density: share of the entries that are left when a training loop ends; None leaves the gates.
        at: step from which only those learn, their gates open; None is the end.

    Raises:
        ConfigError: another method in the adapter, numbers out of range, or `at` without a density.
    """

    KEEPS = ("steps", "held", "generator")

    def __init__(
        self,
        model: nn.Module,
        name: str = "default",
        *,
        seed: int = 0,
        density: float | None = None,
        at: int | None = None,
    ) -> None:
        super().__init__(model, at=at, name=name)
        if density is not None:
            check_share(density)
        elif at is not None:
            raise ConfigError(f"at {at} without a density; give the share of entries that are left")
        self.density, self.reshapes = density, density is not None
        found = sites_of(model, Method, name)
        self.deltas = [d for d in found if isinstance(d.method, DiffPruning)]
        if not self.deltas or len(self.deltas) < len(found):
            raise ConfigError(
                f"adapter {name!r} has {len(self.deltas)} DiffPruning sites of {len(found)}; expected all"
            )
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def draw(self) -> None:
        """New logistic noise for every gate; once a step, before the forward. None once the gates are open for good."""
        super().draw()
        for d in self.deltas:
            for n, p in d.named_parameters():
                if n.startswith("noise") and self.held:
                    p.zero_()
                elif n.startswith("noise"):
                    draw_noise(p, self.generator)

    def penalty(self) -> Tensor:
        """Expected number of non-zero entries of all deltas."""
        total = torch.zeros(())
        for d in self.deltas:
            open_ = probability_open(d.alpha)
            if "alpha_group" in d._parameters:
                open_ = open_ * probability_open(d.alpha_group)
            total = total.to(open_) + open_.sum()
        return total

    def count(self, density: float) -> int:
        """How many entries, of all sites together, a density leaves; known before training, on the meta device too."""
        check_share(density)
        total: int = sum(d.w.numel() for d in self.deltas)
        return max(1, round(density * total))

    def choose(self) -> Held:
        assert self.density is not None
        final, places = self._largest(self.density)
        held: Held = {}
        for d in self.deltas:
            free = torch.zeros(d.w.numel(), dtype=torch.bool, device=d.w.device)
            if d.site.name in places:
                free[places[d.site.name]] = True
            d.w.copy_(final[d.site.name])
            held[label(d, "w")] = (free.view(d.w.shape), torch.zeros_like(d.w))
            for n in [n for n in d.trained if n != "w"]:
                alpha = getattr(d, n)
                held[label(d, n)] = (torch.zeros_like(alpha, dtype=torch.bool), torch.full_like(alpha, OPEN))
        return held

    def close(self) -> None:
        if self.density is not None:
            self.harden(self.density)

    def harden(self, density: float) -> nn.Module:
        """Replace the adapter by a `Sparse` one of the same name with the `density` of all entries whose z * w is
        largest."""
        check_share(density)
        final, places = self._largest(density)
        rules = [
            Rule(exact(d.site), (Sparse(count=len(places[d.site.name])),)) for d in self.deltas if d.site.name in places
        ]
        detach(self.model, self.name)
        attach_placed(self.model, rules, places, name=self.name, check=False)
        with torch.no_grad():
            for d in sparse_deltas(self.model, self.name):
                d.value.copy_(final[d.site.name].flatten()[places[d.site.name]])
        return self.model

    def _largest(self, density: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(z * w of every site without noise, the flat places of the largest of all)."""
        with torch.no_grad():
            training = {d: d.training for d in self.deltas}
            for d in self.deltas:
                d.eval()
            final = {d.site.name: d.method.update(d).clone() for d in self.deltas if isinstance(d.method, DiffPruning)}
            for d, mode in training.items():
                d.train(mode)
        return final, top({n: t.abs() for n, t in final.items()}, self.count(density))
