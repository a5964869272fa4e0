"""Sparse deltas of whole rows or columns, chosen by the sum of their entries' scores.

SparseRows   RoCoFT's rows or columns by any criterion, among them the paper's "wanda" (Kowsher et al. 2024)
FAR          Vucetic et al. 2022, arXiv 2205.01541: the nodes that a priming epoch changed most
NEFT         Xu et al. 2024, arXiv 2403.11621: the neurons that a full probe run turned most
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmpeft.adapters.method import Delta, zeros
from mmpeft.adapters.methods.low_rank import check_matrix, one_of
from mmpeft.adapters.methods.selective import Order, ordered
from mmpeft.adapters.methods.sparse import Sparse
from mmpeft.adapters.selection.criteria import Evidence
from mmpeft.adapters.site import Site
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class SparseRows(Sparse, name="sparse-rows"):
    """`W' = W + delta` on whole rows (output units) or columns of each weight, chosen by the sum of their entries'
    scores (RoCoFT, arXiv 2410.10075, with any criterion). One matrix a site.

    Args:
        axis: "rows" or "columns".
        order: the "largest" scores of each site, the "smallest", or half of each ("mixed").
    """

    density: float = 0.05
    axis: Literal["rows", "columns"] = "rows"
    order: Order = "largest"
    space = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("axis", self.axis, ("rows", "columns"))
        one_of("order", self.order, ("largest", "smallest", "mixed"))

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        super().check(site)

    def size(self, site: Site) -> int:
        return site.shape[0 if self.axis == "rows" else 1]

    def scores(self, evidence: Evidence) -> Tensor:
        return ordered(super().scores(evidence).sum(1 if self.axis == "rows" else 0), self.order)

    def values(self, k: int, base: Tensor) -> Tensor:
        return zeros(k, base.shape[1], like=base) if self.axis == "rows" else zeros(base.shape[0], k, like=base)

    def put(self, W: Tensor, p: Delta) -> Tensor:
        return W.index_add(0 if self.axis == "rows" else 1, p.index, p.value)


@dataclass(frozen=True)
class FAR(SparseRows, name="far"):
    """Freeze and reconfigure (Vucetic et al. 2022, arXiv 2205.01541): the nodes of the feed-forward layers whose
    weights a priming epoch changed most, by L1 norm, learn on. The paper permutes them into a sub-layer of their own;
    the function is the same. Attach with `attach_selected(model, plan, trained=...)`, the weights after the priming
    epoch."""

    density: float = 0.4
    criterion: str = "change"


@dataclass(frozen=True)
class NEFT(SparseRows, name="neft"):
    """Neuron-level fine-tuning (Xu et al. 2024, arXiv 2403.11621): the rows that a full probe run turned most, by the
    cosine between a row before and after. Attach with `attach_selected(model, plan, trained=...)`."""

    criterion: str = "change"

    def scores(self, evidence: Evidence) -> Tensor:
        if evidence.start is None:
            raise ConfigError("NEFT compares rows with their start: pass trained=")
        return -torch.nn.functional.cosine_similarity(
            evidence.value, evidence.start, dim=1 if self.axis == "rows" else 0
        )
