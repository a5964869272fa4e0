"""Bottleneck adapters whose two projections are sums of Kronecker products (parameterised hypercomplex multiplication,
PHM).

    PHMAdapter   Zhang et al. 2021 (2102.08597), as in Mahabadi et al.: W = sum_{j<n} A_j (x) B_j
    Compacter    Mahabadi et al. 2021, arXiv 2106.04647: W = sum_{j<n} A_j (x) (s_j t_j), B_j a product of rank `rank`,
                 and the A_j shared by all layers. (The survey calls its factors a sparsity prior; they are low-rank.)

The plan says where: after attention and feed-forward is Compacter, after the feed-forward alone Compacter++. The call,
the channel axis and the activation are the plain bottleneck's. Start: the second projection is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Tensors, zeros
from mmpeft.adapters.methods.bottleneck import Activation, Bottleneck, Projections
from mmpeft.adapters.methods.kronecker import kron
from mmpeft.adapters.methods.low_rank import at_least, normal, xavier
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class PHMAdapter(Bottleneck, name="phm"):
    """Bottleneck with `down` and `up` = sum_j A_j (x) B_j: A_j [n, n], B_j [out / n, in / n]; 2 (n^3 + m d / n) + m + d
    parameters a site, or n^3 once for all sites with `share`.

    Args:
        size, reduction, activation, scale, dropout, dim, bias: as in `Bottleneck`; n divides both widths.
        n: number of products and size of the A_j.
        share: one set of A_j for all projections of the adapter.
    """

    reduction: int = 16
    activation: Activation = "gelu"
    n: int = 4
    share: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, n=1)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        plain = super().init(site, base, context).trained
        tensors: dict[str, Tensor] = {}
        derived: dict[str, Tensor] = {}
        for part in ("down", "up"):
            out, into = plain[f"{part}_weight"].shape
            if out % self.n or into % self.n:
                raise ConfigError(
                    f"n {self.n} at {site.path} does not divide the widths {into} and {out} of its {part} projection"
                )
            like = plain[f"{part}_weight"]
            if self.bias:
                tensors[f"{part}_bias"] = plain[f"{part}_bias"]
            tensors |= {f"{part}_{name}": t for name, t in self.factor(out, into, part == "up", like).items()}
            key = (self.name, self.n) if self.share else (self.name, site.path, part)
            if key in context.shared:
                derived[f"{part}_A"] = context.shared[key]
            else:
                context.shared[key] = nn.Parameter(normal(self.n, self.n, self.n, std=0.01, like=like))
                tensors[f"{part}_A"] = context.shared[key]
        return Tensors(tensors, derived=derived)

    def factor(self, out: int, into: int, zero: bool, like: Tensor) -> dict[str, Tensor]:
        """The tensors of the B_j [n, out / n, in / n]."""
        shape = (self.n, out // self.n, into // self.n)
        return {"B": zeros(*shape, like=like) if zero else xavier(*shape, like=like)}

    def blocks(self, p: Delta, part: str) -> Tensor:
        """The B_j of one projection, [n, out / n, in / n]."""
        return cast(Tensor, p._parameters[f"{part}_B"])

    def update(self, x: Tensor, p: Delta) -> Tensor:
        weights: dict[str, Any] = {"site": p.site, "training": p.training}
        for part in ("down", "up"):
            A = cast(Tensor, p._parameters[f"{part}_A"])
            weights[f"{part}_weight"] = kron(A, self.blocks(p, part)).sum(0)
            if self.bias:
                weights[f"{part}_bias"] = p._parameters[f"{part}_bias"]
        return super().update(x, cast(Delta, Projections(**weights)))

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 4 * self.n * tensors["down_B"].numel()  # W is formed: 2 m d of each projection


@dataclass(frozen=True)
class Compacter(PHMAdapter, name="compacter", aliases=("compactor", "compacter++")):
    """Compacter (arXiv 2106.04647; the survey's "Compactor"): B_j = s_j t_j with s_j [out / n, rank], t_j [rank, in / n]
    Xavier, A_j N(0, 0.01) and shared. Parameters a site: 2 rank (m + d) + m + d, and n^3 once. (RoBERTa-base, both
    places: 57,088; Compacter++, after the feed-forward alone: 28,576.)

    Args:
        rank: of the B_j.
    """

    reduction: int = 32
    share: bool = True
    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, rank=1)

    def factor(self, out: int, into: int, zero: bool, like: Tensor) -> dict[str, Tensor]:
        s = xavier(self.n, out // self.n, self.rank, like=like)
        t = (self.n, self.rank, into // self.n)
        return {"s": s, "t": zeros(*t, like=like) if zero else xavier(*t, like=like)}

    def blocks(self, p: Delta, part: str) -> Tensor:
        return torch.matmul(*(cast(Tensor, p._parameters[f"{part}_{name}"]) for name in ("s", "t")))

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 4 * tensors["down_s"].numel() * tensors["down_t"].numel() // self.rank**2
