"""Updates made of elementwise products.

LoHa   Yeh et al. 2023 (LyCORIS), arXiv 2309.14859, after FedPara, 2108.06098: (B1 A1) * (B2 A2), of rank up to rank^2.
HiRA   Huang et al. 2025 (ICLR): W * (B A), whose rank is up to rank(W) * rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmpeft.adapters.method import Context, Delta, Factors, Tensors, zeros
from mmpeft.adapters.methods.low_rank import LowRank, Ranked, kaiming
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class LoHa(LowRank, name="loha"):
    """`W' = W + alpha / rank * (B1 A1) * (B2 A2)`, elementwise (arXiv 2309.14859); A1, A2 [rank, in], B1, B2 [out,
    rank]; 2 rank (in + out) parameters. Start: all Kaiming-uniform but B2, which is 0.

    The product is itself a pair of rank rank^2 (row-wise and column-wise Khatri-Rao products), which runs beside
    the frozen call where rank^2 <= min(out, in); above that W' is formed, and `dropout` and rows of a batch are
    refused.
    """

    def check(self, site: Site) -> None:
        super().check(site)
        if self.dropout and self.rank**2 > min(site.shape[-2:]):
            raise ConfigError(
                f"dropout {self.dropout} at {site.name}: with rank {self.rank} the update is not low-rank "
                f"(rank^2 = {self.rank**2} > {min(site.shape[-2:])}), so no activation can be dropped; set dropout=0"
            )

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        r = self.rank
        return Tensors(
            {
                "A1": kaiming(*stack, r, into, like=base),
                "B1": kaiming(*stack, out, r, like=base),
                "A2": kaiming(*stack, r, into, like=base),
                "B2": zeros(*stack, out, r, like=base),
            }
        )

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        update: Tensor = (p.B1 @ p.A1) * (p.B2 @ p.A2)
        return W + self.scale * update

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        if self.rank**2 > min(W.shape[-2:]):
            return None
        A = p.A1.unsqueeze(-2) * p.A2.unsqueeze(-3)  # [*, r, r, in]
        B = p.B1.unsqueeze(-1) * p.B2.unsqueeze(-2)  # [*, out, r, r]
        return Factors(A.flatten(-3, -2), B.flatten(-2), self.scale)


@dataclass(frozen=True)
class HiRA(Ranked, name="hira"):
    """`W' = W * (1 + B A)`, elementwise (HiRA, ICLR 2025); A [rank, in] Kaiming-uniform, B [out, rank] 0; rank (in +
    out) parameters. The paper has no alpha.

    The update depends on W and is not low-rank, so W' is formed; after another adapter, W is that one's weight.
    """

    rank: int = 32
    mixes = False

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        *stack, out, into = base.shape
        A = kaiming(*stack, self.rank, into, like=base)
        return Tensors({"A": A, "B": zeros(*stack, out, self.rank, like=base)})

    def weight(self, W: Tensor, p: Delta) -> Tensor:
        update: Tensor = p.B @ p.A
        return W + W * update
