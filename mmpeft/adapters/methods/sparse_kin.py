"""Sparse deltas with an importance of their own.

    SecondOrderMask   Fu et al. 2023, arXiv 2211.15583, "SAM": the entries with the largest gain of the second-order
                      approximation of the loss. Not sharpness-aware minimisation, nor segment anything.
    SHPEFT            "SH-PEFT" of the survey: hybrid importance, of the task and of the weights themselves
    DnA               Jiang et al. 2022 (ECCV, "DnA"): W = U V + S; the low-rank part stays, the sparse one is trained

What is stored, trained and saved is a `Sparse` delta; `attach_selected` chooses where the criterion needs data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmpeft.adapters.method import check_rank
from mmpeft.adapters.methods.low_rank import at_least, one_of
from mmpeft.adapters.methods.sparse import Sparse
from mmpeft.adapters.selection.criteria import Evidence, criterion
from mmpeft.adapters.site import Site


@dataclass(frozen=True)
class SecondOrderMask(Sparse, name="second-order-mask", aliases=("sam",)):
    """Second-order approximation mask, the paper's SAM (arXiv 2211.15583): the `density` of weights with the largest
    g_i^2 / h_i, the most that the loss g d + h d^2 / 2 can fall by moving one weight; attach with `attach_selected`.

    Choice: h is the diagonal Fisher information of the same samples. With h the same everywhere, as the paper's own runs
    take it, the order is that of |g|: criterion "gradient".
    """

    criterion: str = "second_order"


@dataclass(frozen=True)
class SHPEFT(Sparse, name="sh-peft", aliases=("shpeft",)):
    """Hybrid importance (the survey's "SH-PEFT"): each weight's task importance and its magnitude, both over their mean
    in the matrix, added (`norm` "l1") or as the root of the sum of squares ("l2"); the top share trains. Attach with
    `attach_selected`.

    Choice: the survey's source could not be read; that the parts are put on one scale by their means is ours.

    Args:
        criterion: the task's part: "gradient", or "change" after a first run.
        norm: how the parts are joined.
    """

    density: float = 1e-4
    criterion: str = "gradient"
    norm: Literal["l1", "l2"] = "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("norm", self.norm, ("l1", "l2"))

    def scores(self, evidence: Evidence) -> Tensor:
        parts = [criterion(self.criterion)(evidence), evidence.value.abs()]
        task, own = (p / p.mean().clamp_min(torch.finfo(p.dtype).tiny) for p in parts)
        return task + own if self.norm == "l1" else torch.hypot(task, own)


@dataclass(frozen=True)
class DnA(Sparse, name="dna"):
    """Decomposition and alignment (Jiang et al., ECCV 2022): W = U V + S + E with U V of rank `rank`, S the `density` of
    entries that are largest in the rest, E what neither holds; U V and E are frozen, S is trained (first aligned on
    unlabelled target data, then on the task). W' = U V + S' + E is W plus a delta on the places of S.

    The decomposition alternates: U V is the best low-rank part of W - S, S the largest entries of W - U V (GreBsmo's
    objective, by SVD).

    Args:
        rank: of the frozen part.
        iterations: of the decomposition.
    """

    density: float = 0.05
    criterion: str = "magnitude"
    rank: int = 8
    iterations: int = 5
    space = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, rank=1, iterations=1)

    def check(self, site: Site) -> None:
        check_rank(self.rank, site)
        super().check(site)

    def scores(self, evidence: Evidence) -> Tensor:
        W = evidence.value
        k = self.count if self.count is not None else max(1, round(self.density * W.numel()))
        S = torch.zeros_like(W)
        for _ in range(self.iterations):
            U, s, V = torch.linalg.svd(W - S, full_matrices=False)
            rest = W - (U[..., : self.rank] * s[..., None, : self.rank]) @ V[..., : self.rank, :]
            keep = rest.abs().flatten().topk(k).indices
            S = W.new_zeros(W.numel()).index_copy(0, keep, rest.flatten()[keep]).view(W.shape)
        return super().scores(replace(evidence, value=rest))
