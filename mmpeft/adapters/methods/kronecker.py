"""Updates made of Kronecker products: few numbers, yet of full rank, since rank(A (x) B) = rank A * rank B.

    KronA        Edalati et al. 2022, arXiv 2212.10650: one product, W' = W + s A (x) B. (Its KronA-B and KronA-res
                 are in `krona_adapter.py`.)
    LoKr         Yeh et al. 2023 (LyCORIS), arXiv 2309.14859: W' = W + s C (x) D with C and D themselves low-rank where
                 large.
    KAdaptation  He et al. 2023, arXiv 2203.16329: a sum of t products, W' = W + sum_j A_j (x) (u_j v_j), the A_j shared
                 by all sites. The survey says it tunes its rank dynamically; it doesn't.

A convolution's matrix view is [out, channels * prod(k)], so a factor of its columns divides channels and keeps kernels
whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, zeros
from mmpeft.adapters.methods.low_rank import Ranked, at_least, check_divides, kaiming, normal, xavier
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker product of the last two axes: [*, p, q], [*, r, s] -> [*, p r, q s]."""
    out = a[..., :, None, :, None] * b[..., None, :, None, :]
    return out.flatten(-4, -3).flatten(-2)


def factor_pair(n: int, factor: int) -> tuple[int, int]:
    """(small, large) with small * large = n: `factor` itself where it divides n, else the most square pair whose
    smaller member is at most `factor` (-1: no limit)."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = n if factor < 0 else factor
    small = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0 and d <= most)
    return small, n // small


@dataclass(frozen=True)
class KronA(Method, name="krona"):
    """`W' = W + scale * A (x) B`, A [a1, a2] Kaiming-uniform, B [out / a1, in / a2] 0 (arXiv 2212.10650).

    Args:
        a1, a2: size of A; None takes the smaller of the most square pair of factors of that side. a1 divides the
            rows, a2 the columns. Parameters: a1 a2 + out in / (a1 a2).
        scale: the paper's s.
    """

    a1: int | None = None
    a2: int | None = None
    scale: float = 1.0
    mixes = False

    def check(self, site: Site) -> None:
        for name, n, size, side in (
            ("a1", self.a1, site.shape[-2], "rows"),
            ("a2", self.a2, site.shape[-1], "columns"),
        ):
            if n is not None:
                check_divides(name, size, n, side, site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        a1, a2 = self.a1 or factor_pair(out, -1)[0], self.a2 or factor_pair(into, -1)[0]
        A = kaiming(*stack, a1, a2, like=base)
        return Tensors({"A": A, "B": zeros(*stack, out // a1, into // a2, like=base)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return W + self.scale * kron(p.A, p.B)


@dataclass(frozen=True)
class LoKr(Ranked, name="lokr"):
    """`W' = W + alpha / rank * C (x) D` (arXiv 2309.14859). Sides split as out = l k and in = m n (`factor_pair`), C is
    [l, m] and D [k, n * prod(kernel)]; D is a product of rank `rank` unless rank >= max(k, n) / 2, and so is C with
    `decompose_both`.

    Start: C 0 (its second factor random if decomposed), D Kaiming-uniform: the identity.

    Args:
        rank: inner width of the decomposed factors.
        alpha: None means `rank`.
        factor: see `factor_pair`; -1 is the most square split.
        decompose_both: decompose C too, where rank < max(l, m) / 2.
    """

    alpha: float | None = None
    factor: int = -1
    decompose_both: bool = False
    mixes = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1 and self.factor < 1:
            raise ConfigError(f"factor {self.factor}; expected -1 or at least 1")

    def check(self, site: Site) -> None:
        """Any rank works: it only decomposes the factors that are larger than twice it."""

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        taps = 1  # kernel taps, which stay with D
        if site.layout is not None and site.layout.name in ("conv", "conv_transposed"):
            taps = int(torch.Size(site.layout.shape[2:]).numel())
        (rows, k), (m, n), r = factor_pair(out, self.factor), factor_pair(into // taps, self.factor), self.rank
        tensors: dict[str, Tensor] = {}
        if self.decompose_both and r < max(rows, m) / 2:
            tensors |= {"C1": zeros(*stack, rows, r, like=base), "C2": kaiming(*stack, r, m, like=base)}
        else:
            tensors["C"] = zeros(*stack, rows, m, like=base)
        if r < max(k, n) / 2:
            tensors |= {"D1": kaiming(*stack, k, r, like=base), "D2": kaiming(*stack, r, n * taps, like=base)}
        else:
            tensors["D"] = kaiming(*stack, k, n * taps, like=base)
        return Tensors(tensors)

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        C = p.C if "C" in p._parameters else p.C1 @ p.C2
        D = p.D if "D" in p._parameters else p.D1 @ p.D2
        return W + ((self.alpha or self.rank) / self.rank) * kron(C, D)


@dataclass(frozen=True)
class KAdaptation(Ranked, name="kadaptation", aliases=("kadaption", "k adaption")):
    """`W' = W + sum_{j<t} A_j (x) (u_j v_j)`: A_j [t, t] shared by the rule's sites ("slow weights"), u_j [out / t,
    rank], v_j [rank, in / t] of each site (arXiv 2203.16329; the survey's "K Adaption" and "KAdaption"). Parameters: t^3 +
    sum over sites of rank (in + out).

    Start: A_j N(0, 0.01) (as Compacter's), u_j Xavier, v_j 0. As a low-rank pair it has rank t^2 `rank`, which runs
    beside the frozen call where that is no more than min(out, in).

    Args:
        rank: of each u_j v_j.
        t: number of products and size of the A_j; divides rows and columns.
    """

    rank: int = 1
    t: int = 4

    def __post_init__(self) -> None:
        at_least(self, rank=1, t=1)

    def check(self, site: Site) -> None:
        check_divides("t", site.shape[-2], self.t, "rows", site)
        check_divides("t", site.shape[-1], self.t, "columns", site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        (*stack, out, into), t, r = base.shape, self.t, self.rank
        u = xavier(*stack, t, out // t, r, like=base)
        v = zeros(*stack, t, r, into // t, like=base)
        key = (self.name, context.sites[0])
        if key in context.shared:
            return Tensors({"u": u, "v": v}, derived={"A": context.shared[key]})
        context.shared[key] = nn.Parameter(normal(t, t, t, std=0.01, like=base))
        return Tensors({"A": context.shared[key], "u": u, "v": v})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        return W + kron(p.A, p.u @ p.v).sum(-3)

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        if self.t**2 * self.rank > min(W.shape[-2:]):
            return None
        # A_j (x) (u_j v_j) = (A_j (x) u_j) (I (x) v_j)
        left, right = kron(p.A, p.u), kron(torch.eye(self.t, dtype=p.v.dtype, device=p.v.device), p.v)
        return Factors(right.flatten(-3, -2), left.transpose(-3, -2).flatten(-2))
