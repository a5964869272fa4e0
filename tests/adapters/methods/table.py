"""One row a method: a configuration that fits the small sites below, what it defines in one line of float64, how many
numbers it trains. The tests of this folder run over these rows, which the `rows_*.py` files hold, family by family, at the
places below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Attention, DirectRead, Experts, Host, _hf_conv1d, deltas
from row_kit import Row
from rows_core import CORE_ROWS, VECTORS
from rows_kin import KIN_ROWS
from rows_new import NEW_ROWS
from rows_orthogonal import ORTHOGONAL_ROWS
from rows_rank import RANK_ROWS
from rows_sparse import SPARSE_ROWS
from rows_structured import STRUCTURED_ROWS
from torch import Tensor, nn

import mmpeft

OUT, INTO = 24, 16  # of the linear site: both sides divide by 4 and 8, neither is a power of the other

ROWS: dict[str, Row] = {
    **STRUCTURED_ROWS,
    **ORTHOGONAL_ROWS,
    **KIN_ROWS,
    **SPARSE_ROWS,
    **CORE_ROWS,
    **RANK_ROWS,
    **NEW_ROWS,
}
ALL = {**ROWS, **VECTORS}


@dataclass(frozen=True)
class Place:
    """A host with a matrix site whose sides fit every row's block sizes."""

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Tensor]
    match: str = "site"
    factored: bool = False
    refuses: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return self.name


def _conv1d() -> nn.Module:
    site = _hf_conv1d()
    site.__init__(OUT, INTO)
    return Host(site, INTO)


PLACES = [
    Place("linear", lambda: Host(nn.Linear(INTO, OUT), INTO), lambda: torch.randn(3, 5, INTO), factored=True),
    Place("narrow", lambda: Host(nn.Linear(OUT, INTO), OUT), lambda: torch.randn(3, OUT), factored=True),
    Place("hf-conv1d", _conv1d, lambda: torch.randn(3, 5, INTO), factored=True),
    Place("conv2d", lambda: Host(nn.Conv2d(4, 24, 2, stride=2, padding=1)), lambda: torch.randn(3, 4, 7, 5)),
    Place("convt2d", lambda: Host(nn.ConvTranspose2d(4, 24, 2, stride=2)), lambda: torch.randn(3, 4, 5, 3)),
    Place(
        "embedding",
        lambda: Host(nn.Embedding(16, 24)),
        lambda: torch.randint(0, 16, (3, 7)),
        refuses=frozenset({"ssf", "attn-scale-lite"}),
    ),
    Place("mha", lambda: _Wide(), lambda: torch.randn(3, 5, 16), "inner.site[q,v]"),
    Place("read", lambda: _Read(), lambda: torch.randn(3, 5, 16), "inner.qkv[k]"),
    Place("experts", lambda: Host(Experts(True), 6), lambda: torch.randn(5, 6)),
]


class _Wide(nn.Module):
    """Self-attention of width 16, so that [q] and [v] are 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.inner.site = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.inner.site(x, x, x, need_weights=False)[0]


class _Read(nn.Module):
    """A fused projection whose weight is read past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DirectRead()
        self.inner.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def grid() -> list[tuple[str, Place]]:
    """(row, place) pairs that make sense together; experts have sides of 8, 6 and 4, so they get their own test."""
    matrices = [(name, place) for place in PLACES[:-1] for name in ROWS if name not in place.refuses]
    return matrices + [(name, place) for place in PLACES[:3] for name in VECTORS]


def build(name: str, place: Place, adapter: str = "a", **kwargs: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """(adapted model, input, base output)."""
    torch.manual_seed(0)
    model, x = place.make().eval(), place.data()
    with torch.no_grad():
        base = model(x).clone()
    mmpeft.attach(model, {match_of(name, place): ALL[name].method}, name=adapter, example=x, **kwargs)
    return model, x, base


def match_of(name: str, place: Place) -> str:
    """The pattern of a row at a place: its matrix, or the module of the row's vector."""
    path = ALL[name].tensor
    return path.rpartition(".")[0] if path else place.match


def weight_delta(model: nn.Module, adapter: str = "a", tensor: str = "") -> Any:
    """The delta on the first matrix, or on a vector by its path."""
    found = deltas(model, adapter)
    if tensor:
        return next(d for d in found if f"{d.site.path}.{d.site.tensor}" == tensor)
    return next(d for d in found if "bias" not in d.site.tensor)
