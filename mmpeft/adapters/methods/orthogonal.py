"""Orthogonal fine-tuning: the weight times a trained rotation or reflection, which keeps the angles between its rows.

    OFT   Qiu et al. 2023, arXiv 2306.07280: block-diagonal rotation by the Cayley transform.
    BOFT  Liu et al. 2024, arXiv 2311.06243: a product of m butterfly factors, which reaches every pair of inputs.
    HRA   Yuan et al. 2024, arXiv 2405.17484: a product of Householder reflections.

The papers write a layer's weight as [in, out] and multiply from the left, so the input is what turns: here, [out, in]
from the right. A convolution's matrix is [out, channels * kernel], and all of its columns turn together, exactly (HF
PEFT unfolds and folds the image instead, which counts overlapping pixels several times, so its kernels above 1 differ
from any weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, wide, zeros
from mmpeft.adapters.methods.low_rank import Ranked, at_least, check_divides, kaiming, one_of
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


def skew(v: Tensor, b: int) -> Tensor:
    """[*, b (b - 1) / 2], the upper triangle by rows -> skew-symmetric [*, b, b]."""
    i, j = torch.triu_indices(b, b, 1, device=v.device)
    upper = v.new_zeros(*v.shape[:-1], b * b).index_copy(-1, i * b + j, v).view(*v.shape[:-1], b, b)
    return upper - upper.mT


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1, a rotation for skew-symmetric Q [*, b, b]."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    R: Tensor = torch.linalg.solve(eye - Q, eye + Q, left=False)
    return R


def neumann(Q: Tensor, terms: int) -> Tensor:
    """`cayley` without its inverse: (I + Q)(I + Q + ... + Q^(terms - 2)), `terms` powers of Q (OFTv2, arXiv 2506.19847).
    Close to a rotation while Q is small."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    series = eye.expand_as(Q)
    for _ in range(terms - 2):
        series = eye + Q @ series
    return series + Q @ series


@dataclass(frozen=True)
class OFT(Method, name="oft"):
    """`W' = W R`, R block-diagonal of b x b rotations (I + Q)(I - Q)^-1 with Q skew-symmetric, 0 at the start (arXiv
    2306.07280); n / b * b (b - 1) / 2 parameters, or b (b - 1) / 2 with `share`, n the rotated side.

    Args:
        block_size: b; divides the rotated side.
        share: one block for all.
        eps: COFT, the constrained form: every Q is kept in a ball of Frobenius radius eps / sqrt(blocks); None: free.
        side: "in" as in the paper; "out" is `W' = R W`, what an embedding needs (its columns are vocabulary).
        neumann: number of terms of a Neumann series in place of the inverse (OFTv2, arXiv 2506.19847; HF PEFT's default
            is 5), at least 2; None: exact.
    """

    block_size: int = 32
    share: bool = False
    eps: float | None = None
    side: Literal["in", "out"] = "in"
    neumann: int | None = None
    mixes = False

    def __post_init__(self) -> None:
        at_least(self, block_size=2)
        one_of("side", self.side, ("in", "out"))
        if self.eps is not None and self.eps <= 0:
            raise ConfigError(f"eps {self.eps}; expected a positive radius, or None")
        if self.neumann is not None and self.neumann < 2:
            raise ConfigError(f"neumann {self.neumann}; expected at least 2 terms, or None")

    def check(self, site: Site) -> None:
        size, side = (site.shape[-1], "columns") if self.side == "in" else (site.shape[-2], "rows")
        check_divides("block_size", size, self.block_size, side, site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        (*stack, out, into), b = base.shape, self.block_size
        blocks = 1 if self.share else (into if self.side == "in" else out) // b
        return Tensors({"Q": zeros(*stack, blocks, b * (b - 1) // 2, like=base)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        Q = skew(p.Q, self.block_size)
        if self.eps is not None:
            radius = self.eps / Q.shape[-3] ** 0.5
            norm = torch.linalg.matrix_norm(Q, keepdim=True)
            Q = Q * (radius / norm.clamp_min(torch.finfo(Q.dtype).tiny)).clamp_max(1)
        R = cayley(Q) if self.neumann is None else neumann(Q, self.neumann)
        return turn(W, R) if self.side == "in" else turn(W.mT, R.mT).mT


def turn(W: Tensor, R: Tensor) -> Tensor:
    """W diag(R_1, ..., R_n): W [*, out, n b], R [*, n or 1, b, b]."""
    b = R.shape[-1]
    blocks = W.reshape(*W.shape[:-1], -1, b).transpose(-2, -3)  # [*, n, out, b]
    turned: Tensor = blocks @ R
    return turned.transpose(-2, -3).flatten(-2)


@dataclass(frozen=True)
class BOFT(Method, name="boft"):
    """`W' = diag(s) W R_1 ... R_m`, each R_j an OFT rotation between butterfly permutations (arXiv 2311.06243): factor
    j pairs up halves of blocks that are 2^(j-1) blocks apart, so m = 1 + log2(in / b) of them mix every input with
    every other. m in (b - 1) / 2 parameters, and out for `scale` (HF PEFT stores whole b x b blocks, twice as many).

    Args:
        block_size: b, divides `in`; even where m > 1.
        m: number of factors; b 2^(m - 1) divides `in`.
        scale: train the output gains s too (from 1), as the authors' code does.
    """

    block_size: int = 8
    m: int = 2
    scale: bool = True
    mixes = False

    def __post_init__(self) -> None:
        at_least(self, block_size=2, m=1)
        if self.m > 1 and self.block_size % 2:
            raise ConfigError(f"block_size {self.block_size} with {self.m} butterfly factors; expected an even size")

    def check(self, site: Site) -> None:
        span = self.block_size * 2 ** (self.m - 1)
        check_divides(
            f"block_size {self.block_size} over {self.m} factors spans", site.shape[-1], span, "columns", site
        )

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        (*stack, out, into), b = base.shape, self.block_size
        tensors = {"Q": zeros(*stack, self.m, into // b, b * (b - 1) // 2, like=base)}
        if self.scale:
            tensors["s"] = torch.ones(*stack, out, dtype=wide(base.dtype), device=base.device)
        return Tensors(tensors)

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        R = cayley(skew(p.Q, self.block_size))  # [*, m, n, b, b]
        for j in range(self.m):
            order = butterfly(W.shape[-1], self.block_size, j, W.device)
            W = turn(W[..., order], R[..., j, :, :, :])[..., order.argsort()]
        return W * p.s.unsqueeze(-1) if self.scale else W


def butterfly(n: int, b: int, j: int, device: torch.device) -> Tensor:
    """Order of the n columns in which factor j's blocks are contiguous: every span of b 2^j columns is cut in chunks of
    b / 2, and a block holds one chunk of the span's first half beside the same of its second (j = 0: nothing moves)."""
    if j == 0:
        return torch.arange(n, device=device)
    chunks = torch.arange(n, device=device).view(-1, 2, 2**j, b // 2)  # [spans, halves, chunks of a half, b / 2]
    return chunks.transpose(1, 2).reshape(-1)


@dataclass(frozen=True)
class HRA(Ranked, name="hra"):
    """Householder reflection adaptation, `W' = W H_1 ... H_r` with H_i = I - 2 u_i u_i^T / ||u_i||^2 (arXiv
    2405.17484); rank in parameters. Start: reflections in equal pairs, which undo each other, so the rank is even.

    The product is I - U T U^T with T upper triangular (the compact WY form), so the call runs beside the frozen one
    with the pair A = U^T and B = -W U T, whose second factor depends on W.

    Args:
        rank: r, even.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % 2:
            raise ConfigError(
                f"rank {self.rank}; HRA starts from pairs of equal reflections, so an even rank is expected"
            )

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, _, into = base.shape
        half = kaiming(*stack, self.rank // 2, into, like=base)
        return Tensors({"u": half.repeat_interleave(2, -2)})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        U = torch.nn.functional.normalize(p.u, dim=-1)  # rows u_i / ||u_i||
        # H_1 ... H_r = I - U^T T U with T^-1 = I / 2 + the strict upper triangle of U U^T
        half = torch.eye(self.rank, dtype=U.dtype, device=U.device) / 2
        inverse = (U @ U.mT).triu(1) + half
        B = torch.linalg.solve_triangular(inverse, W.to(U.dtype) @ U.mT, upper=True, left=False)
        # The gain of 1 says that the update depends on W, so that a second adapter on this site sees W', not W.
        return Factors(U, -B, row=torch.ones(W.shape[:-1], dtype=U.dtype, device=U.device))
