"""FacT: the updates of all sites as one tensor, factored so that the wide factors are shared (Jie and Deng 2023, arXiv
2212.03145).

Every adapted matrix is cut into d x d blocks (a ViT's four attention matrices are one each, its MLP four and four), and
block (a, b) of site l gets

    FacT-TT    s U S_lab V                  S_lab [r, r] its own
    FacT-TK    s U (sum_k c_labk P_k) V     c_lab [r] its own, the core P [r, r, r] shared

with U [d, r] and V [r, d] shared by all sites: 2 d r + blocks r^2, and 2 d r + blocks r + r^3 parameters. The shared
factors belong to the first site of the rule and appear once in the file. Two rules have their own:
attention in one and feed-forward in another is EFFT's grouping (Chen et al. 2023).

Choice: d is the greatest common divisor of all sides at the rule's sites (the model's width in a transformer). Start:
as the authors' code, U (their FacTv, the output side) 0, everything else Xavier-uniform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Tensors, zeros
from mmpeft.adapters.methods.low_rank import LowRank, check_matrix, xavier
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class FacTTT(LowRank, name="fact-tt", aliases=("fact",)):
    """FacT in tensor-train form, each block `s U S V` (arXiv 2212.03145); s = alpha / rank.

    Args:
        rank: r, 1 to d.
        alpha: None means `rank`, s = 1 (the paper searches s in 0.01 to 100).
        dropout: on the adapter's input, in training.
    """

    rank: int = 16

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        super().check(site)

    def shared(self, d: int, base: Tensor) -> dict[str, Tensor]:
        """The factors that all sites share."""
        return {"U": zeros(d, self.rank, like=base), "V": xavier(self.rank, d, like=base)}

    def own(self, blocks: tuple[int, int], base: Tensor) -> dict[str, Tensor]:
        """One site's own tensors, for its grid of d x d blocks."""
        return {"S": xavier(*blocks, self.rank, self.rank, like=base)}

    def blocks(self, p: Delta) -> Tensor:
        """S of every block: [rows of blocks, columns of blocks, r, r]."""
        S: Tensor = p.S
        return S

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        d = gcd(*(side for s in context.sites for side in s.shape))
        if d < self.rank:
            raise ConfigError(
                f"{self.name} of rank {self.rank}: the sides of the rule's sites share only the divisor {d}"
            )
        own = self.own((base.shape[0] // d, base.shape[1] // d), base)
        key = (self.name, context.sites[0])
        if key in context.shared:
            return Tensors(own, derived=context.shared[key])
        context.shared[key] = {n: nn.Parameter(t) for n, t in self.shared(d, base).items()}
        return Tensors({**context.shared[key], **own})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        S = self.blocks(p)
        columns, r = S.shape[1:3]
        eye = torch.eye(columns, dtype=S.dtype, device=S.device)
        A = torch.einsum("bc,rd->brcd", eye, p.V)  # each column of blocks reads its own d inputs
        B = torch.einsum("dr,abrs->adbs", p.U, S)
        return Factors(A.reshape(columns * r, -1), B.reshape(-1, columns * r), self.scale)

    def flops(self, site: Site, tensors: Mapping[str, Tensor]) -> int:
        return 2 * self.rank * sum(site.shape)


@dataclass(frozen=True)
class FacTTK(FacTTT, name="fact-tk"):
    """FacT in Tucker form, each block `s U (sum_k c_k P_k) V` (arXiv 2212.03145); fields as in `FacTTT`."""

    rank: int = 16

    def shared(self, d: int, base: Tensor) -> dict[str, Tensor]:
        return {**super().shared(d, base), "P": xavier(self.rank, self.rank, self.rank, like=base)}

    def own(self, blocks: tuple[int, int], base: Tensor) -> dict[str, Tensor]:
        return {"c": xavier(*blocks, self.rank, like=base)}

    def blocks(self, p: Delta) -> Tensor:
        return torch.einsum("abk,krs->abrs", p.c, p.P)
