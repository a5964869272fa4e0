"""Structured masks over a frozen weight, and LoRA with them: what pruning while tuning trains.

    StructuredMask   one trained number a group of rows or columns; the masks of Light-PEFT's early pruning
                     (Gu et al. 2024, arXiv 2406.03792)
    APT              Zhao et al. 2024, arXiv 2401.12200: LoRA between masks of inputs and outputs, its rank growing where
                     tuning matters. Not the adaptive prefix of the same letters.

A mask of zeros takes its channels out of the function; the base keeps them. `LightPEFT` and `APTController` of the
selection folder decide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.adapters.method import Context, Delta, Factors, Method, Tensors, zeros
from mmpeft.adapters.methods.dynamic_rank import Elastic
from mmpeft.adapters.methods.low_rank import at_least, check_divides, check_matrix, normal, one_of
from mmpeft.adapters.site import Site
from mmpeft.adapters.state import sites_of
from mmpeft.errors import ConfigError


@dataclass(frozen=True)
class StructuredMask(Method, name="structured-mask"):
    """`W' = W diag(m)` over columns, or `diag(m) W` over rows, one trained m a group, 1 at the start; as many parameters
    as groups (arXiv 2406.03792: the columns of the attention's output projection by head, and of the feed-forward's
    second layer).

    Args:
        axis: "columns" (input channels) or "rows".
        group: neighbouring channels with one number: the width of a head.
    """

    axis: Literal["rows", "columns"] = "columns"
    group: int = 1

    def __post_init__(self) -> None:
        at_least(self, group=1)
        one_of("axis", self.axis, ("rows", "columns"))

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        check_divides("group", site.shape[0 if self.axis == "rows" else 1], self.group, self.axis, site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        n = base.shape[0 if self.axis == "rows" else 1] // self.group
        return Tensors({"m": 1 + zeros(n, like=base)})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        m = p.m.repeat_interleave(self.group)
        return Factors(row=m) if self.axis == "rows" else Factors(col=m)


def mask_l1(model: nn.Module, *, name: str = "default") -> Tensor:
    """Sum of |m| over an adapter's StructuredMask sites, for the loss."""
    total: Tensor = torch.stack([d.m.abs().sum() for d in sites_of(model, StructuredMask, name)]).sum()
    return total


@dataclass(frozen=True)
class APT(Elastic, name="apt"):
    """`W' = diag(m_out) (W + scale * B diag(mask) A) diag(m_in)` (arXiv 2401.12200): LoRA in `start` of `rank`
    components, A N(0, 1 / rank), B 0; the masks of channels are 1 at the start. rank (in + out) parameters, of which
    those in use learn. An `APTController` prunes the channels and grows the rank.

    Args:
        rank: the most components a site may have.
        start: components at the start.
        alpha: None is a scale of 1 (the paper's is 2).
    """

    beside = ("APTController",)
    start: int = 8
    AXES = {"A": -2, "B": -1, "mask": -1, "m_in": None, "m_out": None}

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, start=1)
        if self.start > self.rank:
            raise ConfigError(f"start {self.start}; expected 1 to rank, which is {self.rank}")

    def check(self, site: Site) -> None:
        check_matrix(self, site)
        super().check(site)

    def init(self, site: Site, base: Tensor | None, context: Context) -> Tensors:
        assert base is not None
        out, into = base.shape
        A = normal(self.rank, into, std=1 / self.rank, like=base)
        mask = zeros(self.rank, like=base)
        mask[: self.start] = 1
        ones = {n: 1 + zeros(size, like=base) for n, size in (("m_in", into), ("m_out", out))}
        return Tensors({"A": A, "B": zeros(out, self.rank, like=base)}, frozen={"mask": mask, **ones})

    def factors(self, W: Tensor, p: Delta) -> Factors | None:
        # Columns of W are masked by `col`; A has to be masked itself, since the factored pair comes after it.
        return Factors(p.A * p.m_in, p.B * p.mask, self.scale, row=p.m_out, col=p.m_in)

    def kept(self, p: Delta) -> Tensor:
        kept: Tensor = p.mask != 0
        return kept

    def resized(self, rank: int) -> Elastic:
        alpha = None if self.alpha is None else self.alpha * rank / self.rank
        return replace(self, rank=rank, start=min(self.start, rank), alpha=alpha)
