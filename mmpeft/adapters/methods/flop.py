"""FLOP (Wang et al. 2020, arXiv 1910.04732): structured pruning of a weight in a factored form, W = P G Q with a
diagonal G under hard-concrete gates.

    mmpeft.attach(model, {"encoder.**": mmpeft.FLOP()}, name="a")
    gates = mmpeft.FLOPGates(model, sparsity=0.5, steps=2000)
    each step:  gates.draw(); loss = task(model) + gates.penalty(); ...; optimizer.step(); gates.step()
                                     # or the callback mmpeft.tasks.StepControl
    mmpeft.compact(model)            # P, Q and G of what is left; nothing of the base weight is used any more

The penalty is the paper's augmented Lagrangian, l1 (s - t) + l2 (s - t)^2 with s the expected share of components that
are closed and t a target that rises linearly; l1 and l2 are numbers that ascend, not parameters of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Tensors, wide, zeros
from mmpeft.adapters.methods.diff_pruning import draw_noise, gate, probability_open
from mmpeft.adapters.methods.dynamic_rank import Elastic
from mmpeft.adapters.selection.controller import Controller
from mmpeft.adapters.selection.schedules import Ramp
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class FLOP(Elastic, name="flop"):
    """`W' = P diag(z) Q`, P [out, rank] and Q [rank, in] from the SVD of W, each with the root of the singular values, z
    hard-concrete gates (arXiv 1910.04732); rank (in + out + 1) parameters. The base weight takes no part.

    Args:
        rank: components at the start; 0 is all, min(out, in), which starts at W up to the gates.
        location: start of the gates' locations, at which z is 0.95.
    """

    beside = ("FLOPGates",)
    rank: int = 0
    location: float = 1.5
    identity_at_init = False
    mixes = False
    AXES = {"P": -1, "Q": -2, "alpha": -1, "noise": -1}

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha is not None or self.dropout:
            raise ConfigError(f"{self}: rank is 0 (all) or more; FLOP has no alpha and no dropout")

    def check(self, site: Site) -> None:
        if self.rank:
            super().check(site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        r = self.rank or min(base.shape[-2:])
        U, s, V = torch.linalg.svd(base.detach().to(wide(base.dtype)), full_matrices=False)
        root = s[..., :r].sqrt()
        P, Q = U[..., :r] * root.unsqueeze(-2), root.unsqueeze(-1) * V[..., :r, :]
        gates = {n: zeros(*base.shape[:-2], r, like=base) for n in ("alpha", "noise")}
        trained = {"P": P.contiguous(), "Q": Q.contiguous(), "alpha": gates["alpha"] + self.location}
        return Tensors(trained, derived={"noise": gates["noise"]})

    def z(self, p: Delta) -> Tensor:
        """The gates [*, rank]: with noise in training, their median else."""
        return gate(p.alpha + p.noise if p.training else p.alpha)

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        out: Tensor = (p.P * self.z(p).unsqueeze(-2)) @ p.Q
        return out

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        return None  # W' does not contain W

    def kept(self, p: Delta) -> Tensor:
        return gate(p.alpha) > 0


class FLOPGates(Controller):
    """Draws the gates of every FLOP site and drives the share of closed ones to a target.

    Args:
        sparsity: share of components closed at the end, over all sites.
        steps: over which the target rises from 0.
        lr: of the two multipliers, which ascend.

    Raises:
        ConfigError: there is no FLOP site, or numbers out of range.
    """

    KEEPS = ("steps", "l1", "l2", "generator")
    measure = "closed"

    def __init__(
        self, model: nn.Module, *, sparsity: float, steps: int, lr: float = 0.1, seed: int = 0, name: str | None = None
    ) -> None:
        if not 0 < sparsity < 1 or steps < 1 or not lr > 0:
            raise ConfigError(f"sparsity {sparsity}, steps {steps}, lr {lr}; expected in (0, 1), >= 1, > 0")
        self.deltas: list[Delta] = sites_of(model, FLOP, name)
        self.target, self.lr, self.steps = Ramp(0.0, sparsity, 0, steps), lr, 0
        self.l1, self.l2 = 0.0, 0.0
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> None:
        """New noise for every gate; once a step, before the forward."""
        for d in self.deltas:
            draw_noise(d.noise, self.generator)

    def closed(self) -> Tensor:
        """Expected share of components that are closed."""
        return 1 - torch.cat([probability_open(d.alpha).flatten() for d in self.deltas]).mean()

    def penalty(self) -> Tensor:
        """l1 (s - t) + l2 (s - t)^2, to be added to the loss."""
        gap = self.closed() - self.target(self.steps)
        return self.l1 * gap + self.l2 * gap.square()

    def step(self) -> float:
        """After the optimizer's step: the multipliers ascend. Returns the expected share closed."""
        self.steps += 1
        share = float(self.closed().detach())
        gap = share - self.target(self.steps)
        self.l1 += self.lr * gap
        self.l2 += self.lr * gap**2
        return share
