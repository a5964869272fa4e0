"""Low-rank updates with block structure.

GraLoRA  Jung et al. 2025, arXiv 2505.20355: the matrix in k x k blocks, each with its own pair of rank rank / k.
MiSS     Kang and Yin 2024, arXiv 2409.15371 (formerly Bone): one shard [out, rank] repeated along the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.adapters.method import Context, Delta, Factors, Tensors, zeros
from mmpeft.adapters.methods.low_rank import (
    LowRank,
    Ranked,
    at_least,
    check_divides,
    check_dropout,
    check_matrix,
    kaiming,
)
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class GraLoRA(LowRank, name="gralora"):
    """Granular LoRA (arXiv 2505.20355): block (j, n) of the k x k blocks of W gets `alpha / (rank + hybrid_rank) * B_jn
    A_nj`, where A_n [rank, in / k] and B_j [out / k, rank] are cut in k parts of rank / k; rank (in + out) parameters,
    rank up to k rank in all. `hybrid_rank` adds a plain LoRA of that rank.

    Args:
        rank: split evenly over the k blocks of a row; a multiple of k.
        k: blocks a side; divides rows and columns.
        hybrid_rank: rank of the plain LoRA beside the blocks.
    """

    rank: int = 32
    k: int = 2
    hybrid_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, k=1, hybrid_rank=0)
        if self.rank % self.k:
            raise ConfigError(f"rank {self.rank} is not a multiple of k {self.k}")

    @property
    def scale(self) -> float:
        """alpha / (rank + hybrid_rank); alpha None means a scale of 1."""
        return 1.0 if self.alpha is None else float(self.alpha / (self.rank + self.hybrid_rank))

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        check_divides("k", site.shape[0], self.k, "rows", site)
        check_divides("k", site.shape[1], self.k, "columns", site)
        super().check(site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        out, into = base.shape
        tensors = {
            "A": kaiming(self.k, self.rank, into // self.k, like=base),
            "B": zeros(self.k, out // self.k, self.rank, like=base),
        }
        if self.hybrid_rank:
            hybrid = {"A_hybrid": kaiming(self.hybrid_rank, into, like=base)}
            tensors |= {**hybrid, "B_hybrid": zeros(out, self.hybrid_rank, like=base)}
        return Tensors(tensors)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        k = self.k
        eye = torch.eye(k, dtype=p.A.dtype, device=p.A.device)
        A = torch.einsum("nm,njsi->jnsmi", eye, p.A.unflatten(1, (k, -1)))  # row (j, n, s) reads block n of the input
        B = torch.einsum("jm,jons->mojns", eye, p.B.unflatten(2, (k, -1)))  # and feeds block j of the output
        A, B = A.reshape(k * self.rank, -1), B.reshape(-1, k * self.rank)
        if self.hybrid_rank:
            A, B = torch.cat([A, p.A_hybrid]), torch.cat([B, p.B_hybrid], 1)
        return Factors(A, B, self.scale)


@dataclass(frozen=True)
class MiSS(Ranked, name="miss", aliases=("bone",)):
    """Matrix shard sharing, `W'_ij = W_ij + D_i(j mod rank)`: the shard D [out, rank], 0 at the start, repeated along
    the input (arXiv 2409.15371). As a pair, B is D and A a row of identity blocks. rank out parameters.

    With `bat` (the paper's block affine form), the update depends on W: in blocks of rank x rank, block (i, j) gets
    W_ij D_i + D_i, D [out / rank, rank, rank]. As many parameters.

    Args:
        rank: width of the shard, at most min(out, in); with `bat` it divides both.
        dropout: on the adapter's input, in training; not with `bat`, whose W' is formed.
        bat: the block affine form.
    """

    rank: int = 64
    dropout: float = 0.0
    bat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self.dropout)
        if self.bat and self.dropout:
            raise ConfigError(f"dropout {self.dropout} with bat=True; its update depends on W, so no input is dropped")

    def check(self, site: Site) -> None:
        super().check(site)
        if self.bat:
            check_divides("rank", site.shape[-2], self.rank, "rows", site)
            check_divides("rank", site.shape[-1], self.rank, "columns", site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        (*stack, out, _), r = base.shape, self.rank
        return Tensors(
            {"D": zeros(*stack, out // r, r, r, like=base) if self.bat else zeros(*stack, out, r, like=base)}
        )

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        if not self.bat:
            return super().weight(W, p)
        (*stack, out, in_), r = W.shape, self.rank
        blocks = W.reshape(*stack, out // r, r, in_ // r, r).transpose(-3, -2)
        turned: Tensor = blocks @ p.D.unsqueeze(-3) + p.D.unsqueeze(-3)  # [*, out / r, in / r, r, r]
        return W + turned.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        if self.bat:
            return None
        into, r = W.shape[-1], self.rank
        tiled = torch.eye(r, dtype=p.D.dtype, device=p.D.device).repeat(1, -(-into // r))[:, :into]
        return Factors(tiled.expand(*W.shape[:-2], r, into), p.D)
