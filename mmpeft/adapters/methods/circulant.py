"""Updates with structure instead of low rank: circulant, Toeplitz, low displacement rank, sparse in the spectrum.

    C3A        Chen et al. 2025, arXiv 2407.19342: a grid of circulant blocks.
    SURM       Sehanobish et al. 2024, arXiv 2406.17740: "structured unrestricted-rank matrices" in place of BA. The
               survey calls it masking, which it isn't.
    FourierFT  Gao et al. 2024, arXiv 2405.03003: a few trained entries of the update's 2-D spectrum.

All are of full rank, so the materialised plan runs them and rows of a batch cannot differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmpeft.adapters.method import Context, Delta, Method, Tensors, zeros
from mmpeft.adapters.methods.low_rank import at_least, check_divides, check_matrix, normal, one_of, seeded_choice
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


def circulant(w: Tensor, sign: float = 1.0) -> Tensor:
    """[*, n] -> [*, n, n] with entry (i, j) = w[(i - j) mod n]; entries that wrap are times `sign` (-1:
    skew-circulant)."""
    n = w.shape[-1]
    i = torch.arange(n, device=w.device)
    difference = i[:, None] - i[None, :]
    out = w[..., difference % n]
    return out if sign == 1.0 else torch.where(difference < 0, sign * out, out)


@dataclass(frozen=True)
class C3A(Method, name="c3a"):
    """Circular convolution adapter: the update is a grid of b x b circulant blocks over `in`, each of b numbers (arXiv
    2407.19342); out in / b parameters. Entry (i, j) of a block with kernel w is w[(j - i) mod b], as in HF PEFT.

    Start: 0 (HF PEFT's default is Xavier, which is not the identity).

    Args:
        block_size: b, a common divisor of rows and columns.
    """

    block_size: int = 8
    mixes = False

    def __post_init__(self) -> None:
        at_least(self, block_size=1)

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        check_divides("block_size", site.shape[0], self.block_size, "rows", site)
        check_divides("block_size", site.shape[1], self.block_size, "columns", site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        (out, into), b = base.shape, self.block_size
        return Tensors({"w": zeros(out // b, into // b, b, like=base)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        blocks = circulant(p.w).mT  # [out / b, in / b, b, b]
        return W + blocks.transpose(1, 2).reshape(W.shape) / W.shape[1]


@dataclass(frozen=True)
class SURM(Method, name="surm"):
    """Structured unrestricted-rank update, `W' = W + scale * S` (arXiv 2406.17740) with S [out, in]

        "circulant"  S_ij = c[(i - j) mod n]                         n = max(out, in) parameters
        "toeplitz"   S_ij = t[i - j]                                 out + in - 1
        "ldr"        sum over k < rank of Z_1(g_k) Z_-1(h_k)         2 rank n, circulant times skew-circulant

    The paper's Kronecker form is `KronA`. Choice where the paper works on square matrices: n = max(out, in), and S is
    the leading [out, in] of the n x n matrix. Start: S = 0 (c, t and g 0; h N(0, 1/n)).

    Args:
        structure: as above.
        rank: displacement rank of "ldr", else unused and 1.
        scale: factor on the update.
    """

    structure: Literal["circulant", "toeplitz", "ldr"] = "circulant"
    rank: int = 1
    scale: float = 1.0
    mixes = False

    def __post_init__(self) -> None:
        one_of("structure", self.structure, ("circulant", "toeplitz", "ldr"))
        at_least(self, rank=1)
        if self.structure != "ldr" and self.rank != 1:
            raise ConfigError(f"rank {self.rank} with structure {self.structure!r}; only 'ldr' has a rank")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        n = max(out, into)
        if self.structure == "circulant":
            return Tensors({"c": zeros(*stack, n, like=base)})
        if self.structure == "toeplitz":
            return Tensors({"t": zeros(*stack, out + into - 1, like=base)})
        h = normal(*stack, self.rank, n, std=n**-0.5, like=base)
        return Tensors({"g": zeros(*stack, self.rank, n, like=base), "h": h})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        out, into = W.shape[-2:]
        if self.structure == "circulant":
            S = circulant(p.c)
        elif self.structure == "toeplitz":
            i, j = torch.arange(out, device=W.device), torch.arange(into, device=W.device)
            S = p.t[..., i[:, None] - j[None, :] + into - 1]
        else:
            S = (circulant(p.g) @ circulant(p.h, -1.0)).sum(-3)
        return W + self.scale * S[..., :out, :into]


@dataclass(frozen=True)
class FourierFT(Method, name="fourierft"):
    """`W' = W + scale * Re(IDFT2(E))`, E [out, in] zero but for `n` trained entries at random places that all sites of
    a shape share (arXiv 2405.03003); n parameters a site. Places are drawn from `seed` as HF PEFT draws them and are
    not in the file.

    Start: the coefficients are 0, so that the adapter starts as the identity; the paper draws them from N(0, 1).

    Args:
        n: trained spectral entries a site, at most out * in.
        scale: the paper's alpha (300 for language models, 150 in HF PEFT).
        seed: of the places (2024 in the paper, 777 in HF PEFT).
    """

    n: int = 1000
    scale: float = 150.0
    seed: int = 777
    mixes = False

    def __post_init__(self) -> None:
        at_least(self, n=1)

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        most = site.shape[0] * site.shape[1]
        if self.n > most:
            raise ConfigError(f"n {self.n} at {site.name} with {most} spectral entries; expected 1 to {most}")

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        generator = torch.Generator("cpu").manual_seed(self.seed)
        places = seeded_choice(base.shape[0] * base.shape[1], self.n, base, generator)
        return Tensors({"c": zeros(self.n, like=base)}, derived={"places": places})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        E = torch.zeros(W.numel(), dtype=p.c.dtype, device=W.device).index_put((p.places,), p.c).view(W.shape)
        update: Tensor = torch.fft.ifft2(E).real
        return W + self.scale * update
