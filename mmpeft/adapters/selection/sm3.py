"""SM3 (Anil et al. 2019, arXiv 1901.11150): Adagrad whose squares are kept by rows and columns, for dense parameters and
for the sparse deltas of an adapter.

    optimizer = mmpeft.SM3(mmpeft.parameter_groups(model, lr=1e-2), model=model)

A matrix [o, i] keeps o + i numbers instead of o i. The values of a `Sparse` site are entries of its weight, so their
rows and columns are those of the weight; `estimate` then bounds what any entry of it would have accumulated.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass

import torch
from torch import Tensor, nn

from mmpeft.adapters.selection.optimizer import Preconditioned, check_betas
from mmpeft.adapters.state import slots
from mmpeft.errors import ConfigError


@dataclass(eq=False, repr=False)
class SM3(Preconditioned):
    """SM3-II: v = min(row, column) + g^2; w -= lr g / sqrt(v); then row and column are the largest v in them.

    Args:
        params: parameters or groups (`lr` and `weight_decay` of each are used).
        model: where the places of sparse deltas are found; None: every parameter is dense.
        beta: above 0, v is the average beta min(row, column) + (1 - beta) g^2 instead of a sum.
        momentum: of the preconditioned update.
        eps: added to v.

    Raises:
        ConfigError: values out of range.
    """

    lr: InitVar[float] = 0.1
    _: KW_ONLY
    model: nn.Module | None = None
    beta: float = 0.0
    momentum: float = 0.0
    eps: float = 1e-30

    def check(self) -> None:
        check_betas(self.beta, self.momentum)
        found = [d for _, _, s in slots(self.model) for _, d in s.deltas()] if self.model is not None else []
        self.sparse = {d._parameters["value"]: d for d in found if {"index", "value"} <= set(d._parameters)}

    def update(self, p: Tensor, g: Tensor) -> Tensor:
        (rows, columns), places = self._cover(p), self._places(p)
        state = self.state[p]
        if not state:
            state["row"], state["column"] = p.new_zeros(rows), p.new_zeros(columns)
        at = [state["row"][places[0]], state["column"][places[1]]]
        before = torch.minimum(*(a.view(p.shape) for a in at))
        v = before * (self.beta or 1.0) + (1 - self.beta) * g.square()
        for name, place in zip(("row", "column"), places, strict=True):
            state[name].scatter_reduce_(0, place, v.flatten(), "amax", include_self=False)
        update = g * (v + self.eps).rsqrt()
        if self.momentum:
            held = state.setdefault("momentum", torch.zeros_like(p))
            update = held.lerp_(update, 1 - self.momentum)
        return update

    def _cover(self, p: Tensor) -> tuple[int, int]:
        """Rows and columns of the matrix that p is, or has entries of; a vector is one column of rows."""
        shape = self.sparse[p].site.shape if p in self.sparse else p.shape
        columns = shape[-1] if len(shape) > 1 else 1
        return torch.Size(shape).numel() // columns, columns

    def _places(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """(row, column) of each number of p."""
        if p in self.sparse and p.ndim > 1:
            raise ConfigError(f"SM3 knows single entries; {self.sparse[p].site.name} trains whole rows or columns")
        flat = self.sparse[p].index if p in self.sparse else torch.arange(p.numel(), device=p.device)
        columns = self._cover(p)[1]
        return flat // columns, flat % columns

    def estimate(self, p: Tensor) -> Tensor:
        """min(row, column) for every entry of the matrix [rows, columns], in use or not.

        Raises:
            ConfigError: no step was made with it.
        """
        if p not in self.state:
            raise ConfigError("SM3.estimate: no step was made with this parameter yet")
        return torch.minimum(self.state[p]["row"].unsqueeze(1), self.state[p]["column"])
