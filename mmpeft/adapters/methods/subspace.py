"""Training in a random subspace of the weights: intrinsic dimension (Aghajanyan et al. 2021, arXiv 2012.13255).

    DID    theta = theta_0 + P(t): one trained vector t for all sites of a rule, each site's update a fixed random
           projection of it
    SAID   theta_l = theta_0l + lambda_l P(t)_l: structure-aware, with one trained number a site

P is the Fastfood transform S H G Pi H B (Le et al. 2013, arXiv 1408.3060), drawn for each site from the seed and the
site's name: random signs B, Hadamard H, a permutation Pi, Gaussians G, Hadamard again, and a scale S that keeps the
norm of t. It costs n log n a forward for n weights and holds 13 bytes a weight, once per adapter and not in its file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Method, Tensors, wide, zeros
from mmpeft.adapters.methods.low_rank import at_least, seeded_choice, seeded_normal, site_seed
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


def hadamard(x: Tensor) -> Tensor:
    """Unnormalised Walsh-Hadamard transform of [n], n a power of two."""
    n, h = x.shape[-1], 1
    while h < n:
        a, b = x.view(-1, 2, h).unbind(1)
        x = torch.stack([a + b, a - b], 1).view(-1)
        h *= 2
    return x


def fastfood(t: Tensor, signs: Tensor, order: Tensor, gauss: Tensor, size: int) -> Tensor:
    """Project t [d] to [size] with vectors of length n, a power of two with n >= max(d, size); keeps the norm on
    average."""
    n = gauss.shape[0]
    x = hadamard(torch.nn.functional.pad(t, (0, n - t.shape[0])) * signs)
    x = hadamard(gauss * x[order])
    return x[:size] / (size * gauss.square().sum()).sqrt()


@dataclass(frozen=True)
class DID(Method, name="did", aliases=("intrinsic-did",)):
    """Direct intrinsic dimension: `dimension` trained numbers in all, 0 at the start (arXiv 2012.13255).

    Args:
        dimension: d, the size of the subspace.
        seed: of the projections.
    """

    dimension: int = 1000
    seed: int = 0
    mixes = False

    def __post_init__(self) -> None:
        at_least(self, dimension=1)

    def size(self, sites: int) -> int:
        """Length of the shared vector."""
        return self.dimension

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        size = self.size(len(context.sites))
        n = 1 << (max(base.numel(), size) - 1).bit_length()
        generator = site_seed(self.seed, site)
        signs = seeded_normal(n, like=base, generator=generator).sign().to(torch.int8)
        order = seeded_choice(n, n, base, generator)
        derived = {"signs": signs, "order": order, "gauss": seeded_normal(n, like=base, generator=generator)}
        key = (self.name, context.sites[0])
        if key in context.shared:
            return Tensors({}, derived={"t": context.shared[key], **derived})
        context.shared[key] = nn.Parameter(zeros(size, like=base))
        return Tensors({"t": context.shared[key]}, derived=derived)

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return W + fastfood(p.t, p.signs, p.order, p.gauss, W.numel()).view(W.shape)


@dataclass(frozen=True)
class SAID(DID, name="said", aliases=("intrinsic-said",)):
    """Structure-aware intrinsic dimension (arXiv 2012.13255): `dimension` trained numbers in all, of which one a site
    is its own scale lambda, 1 at the start."""

    def size(self, sites: int) -> int:
        if self.dimension <= sites:
            raise ConfigError(
                f"dimension {self.dimension}: {sites} go to the scales of {sites} sites; expected more than that"
            )
        return self.dimension - sites

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        made = super().init(site, base, context)
        lam = torch.ones(1, dtype=wide(base.dtype), device=base.device)
        return Tensors({**made.trained, "lam": lam}, derived=made.derived)

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        update = fastfood(p.t, p.signs, p.order, p.gauss, W.numel()).view(W.shape)
        return torch.addcmul(W, p.lam, update)
