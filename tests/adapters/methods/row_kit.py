"""A row of `table.py`, and the formulas that rows of several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.adapters.method import Method


@dataclass(frozen=True)
class Row:
    method: Method
    define: Callable[[Tensor, dict[str, Tensor]], Tensor]  # (W, the site's tensors) -> W', independently of the method
    count: Callable[[int, int], int]  # (out, in) -> trained numbers at one linear site
    gap: float = 2e-6  # how far the start is from the identity
    factored: bool = False
    stacks: bool = True  # adapts expert stacks too
    lr: float = 0.03
    size: float = 0.3  # spread of the random tensors that tests fill in
    tensor: str = ""  # of vector methods: the vector of the linear place that they adapt, by its path in the model


def outer(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("o,i->oi", a, b)


def block(parts: list[Tensor]) -> Tensor:
    return torch.block_diag(*parts)


def scattered(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W plus the values at their flat places."""
    return W + torch.sparse_coo_tensor(p["index"][None], p["value"], (W.numel(),)).to_dense().view(W.shape)
