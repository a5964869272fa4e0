"""What policy gradients need of a head: a density over the executed actions of a chunk.

    density = density_of(policy.head)
    parameters = density.parameters(policy.head, features, execute)
    drawn = density.sample(parameters, generator)
    log_probability, entropy = density.log_prob(parameters, drawn), density.entropy(parameters)

Heads that have one in closed form are here: `GaussianHead`, `BinnedHead` and `DiscreteHead`. The others (regression,
diffusion, flow, ...) only give samples or points, and are refused by name. Every number of the chunk is independent of
the others given the features, so logarithms and entropies are sums over them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Distribution, Normal, kl_divergence

from mmpeft.errors import Unsupported
from mmpeft.policies.heads import BinnedHead, DiscreteHead, GaussianHead, Head

Parameters = dict[str, Tensor]


class Density:
    """Base class. `parameters` are tensors [B, ...], so that a batch of them is indexed like any other."""

    def parameters(self, head: Any, features: Tensor, execute: int) -> Parameters:
        """Of the first `execute` actions of each chunk; features [B, N, D]."""
        raise NotImplementedError

    def distribution(self, parameters: Parameters) -> Distribution:
        """Independent distributions of every number, [B, execute] or [B, execute, A]."""
        raise NotImplementedError

    def sample(self, parameters: Parameters, generator: torch.Generator | None = None) -> Tensor:
        """What was drawn, in the head's own terms (normalised numbers, bins, action indices)."""
        raise NotImplementedError

    def decode(self, head: Any, drawn: Tensor) -> Tensor:
        """Normalised actions [B, execute, A], or indices [B, execute]."""
        return drawn

    def log_prob(self, parameters: Parameters, drawn: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B], summed over the chunk's numbers; valid [A] leaves padded dimensions out."""
        return _summed(self.distribution(parameters).log_prob(drawn), valid)

    def entropy(self, parameters: Parameters, valid: Tensor | None = None) -> Tensor:
        """[B], in nats."""
        return _summed(self.distribution(parameters).entropy(), valid)

    def kl(self, parameters: Parameters, other: Parameters, valid: Tensor | None = None) -> Tensor:
        """KL(parameters || other) [B], in nats."""
        return _summed(kl_divergence(self.distribution(parameters), self.distribution(other)), valid)


class GaussianDensity(Density):
    """One normal distribution a number; standard deviations are not below `floor`, so that a sharp clone explores."""

    def __init__(self, floor: float = 0.0) -> None:
        self.floor = floor

    def parameters(self, head: GaussianHead, features: Tensor, execute: int) -> Parameters:
        mean, std, _ = head.density(features)  # [B, 1, chunk, A]
        return {"mean": mean[:, 0, :execute], "std": std[:, 0, :execute].clamp_min(self.floor)}

    def distribution(self, parameters: Parameters) -> Distribution:
        return Normal(parameters["mean"], parameters["std"], validate_args=False)

    def sample(self, parameters: Parameters, generator: torch.Generator | None = None) -> Tensor:
        mean = parameters["mean"]
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + parameters["std"] * noise


class CategoricalDensity(Density):
    """One choice a number."""

    def __init__(self, floor: float = 0.0) -> None:
        if floor:
            raise Unsupported(f"min_std={floor} is for a GaussianHead; a categorical head explores by its own entropy")

    def distribution(self, parameters: Parameters) -> Distribution:
        return Categorical(logits=parameters["logits"], validate_args=False)

    def sample(self, parameters: Parameters, generator: torch.Generator | None = None) -> Tensor:
        p = F.softmax(parameters["logits"].float(), -1)
        return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


class DiscreteDensity(CategoricalDensity):
    def parameters(self, head: DiscreteHead, features: Tensor, execute: int) -> Parameters:
        return {"logits": head.to_logits(features)[:, :execute]}  # [B, execute, number of actions]


class BinnedDensity(CategoricalDensity):
    def parameters(self, head: BinnedHead, features: Tensor, execute: int) -> Parameters:
        return {"logits": head.logits(features)[:, :execute]}  # [B, execute, A, bins]

    def decode(self, head: BinnedHead, drawn: Tensor) -> Tensor:
        return head.decode(drawn)


DENSITIES: dict[type[Head], type[GaussianDensity] | type[CategoricalDensity]] = {
    GaussianHead: GaussianDensity,
    BinnedHead: BinnedDensity,
    DiscreteHead: DiscreteDensity,
}


def density_of(head: Head, *, floor: float = 0.0) -> Density:
    """The density of a head.

    Args:
        floor: least standard deviation of a Gaussian, in normalised units.

    Raises:
        Unsupported: a head without a density in closed form, or a floor for one that has no deviation.
    """
    for kind, density in DENSITIES.items():
        if isinstance(head, kind):
            return density(floor)
    names = ", ".join(k.__name__ for k in DENSITIES)
    raise Unsupported(
        f"a {type(head).__name__} has no density that PPO could raise or lower; these heads have: {names}"
    )


def _summed(per_number: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None and per_number.ndim == 3:
        per_number = per_number * valid.to(per_number.dtype)
    return per_number.flatten(1).sum(1)
