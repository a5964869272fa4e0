"""DoRA's norm without its matrix: row norms of W + s B A from rank-wide products, once for every change of a factor.

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>      row by row (arXiv 2402.09353, section 4.3)

||W||^2 is formed once for a base, W A^T once an optimizer step; `RowNorms` keeps both by the tensors' versions, so
that gradient accumulation, checkpointing's second forward and validation cost nothing. Sums are fp32 or wider. A half
precision W is not widened as a whole: on a GPU A is split into the sum of two half precision matrices, whose product
with W has fp32 sums, elsewhere W goes through in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmpeft.kernels.lowrank import mm_wide

BLOCK_ROWS = 4096  # rows of W widened at a time


def row_square(W: Tensor) -> Tensor:
    """Squared row norms of W [*, out, in] -> [*, out], fp32 or wider."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    return torch.cat([w.to(dtype).square().sum(-1) for w in torch.split(W, BLOCK_ROWS, -2)], -1)


def row_norm(W: Tensor, A: Tensor, B: Tensor, scale: float, square: Tensor | None = None) -> Tensor:
    """Row norms of W + scale * B A. W [*, out, in], A [*, r, in], B [*, out, r] -> [*, out], in the factors' dtype.

    `square`: `row_square(W)`, where it is known.
    """
    square = row_square(W) if square is None else square
    cross = (_product(W, A) * B).sum(-1)
    pair = (B @ (A @ A.mT) * B).sum(-1)
    total = square.to(A.dtype) + 2 * scale * cross + scale**2 * pair
    return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()


def _product(W: Tensor, A: Tensor) -> Tensor:
    """W A^T [*, out, r] in A's dtype."""
    if W.dtype == A.dtype:
        return W @ A.mT
    if W.is_cuda and W.ndim == 2 and W.dtype in (torch.bfloat16, torch.float16):
        high, low = split(A, W.dtype)
        both = mm_wide(W, torch.cat([high, low]).mT)
        return (both[:, : len(A)] + both[:, len(A) :]).to(A.dtype)
    return torch.cat([w.to(A.dtype) @ A.mT for w in torch.split(W, BLOCK_ROWS, -2)], -2)


def split(A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(high, low) in a half precision `dtype` with high + low = A to twice its digits."""
    high = A.to(dtype)
    return high, (A - high.to(A.dtype)).to(dtype)


class RowNorms:
    """Norms by the module that owns the factors, kept until a factor or W changes."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, tuple[list[Any], Tensor]] = WeakKeyDictionary()
        self._squares: WeakKeyDictionary[nn.Module, tuple[list[Any], Tensor]] = WeakKeyDictionary()
        self.formed = 0  # norms formed so far, for who counts

    @torch.no_grad()
    def of(self, owner: nn.Module, W: Tensor, A: Tensor, B: Tensor, scale: float, sources: Sequence[Tensor]) -> Tensor:
        """`row_norm(W, A, B, scale)`; A and B are made of `sources` (the parameters) and nothing else."""
        if torch.compiler.is_compiling() or not all(map(_is_known, (W, *sources))):
            return row_norm(W, A, B, scale)

        def form() -> Tensor:
            self.formed += 1
            square = _kept(self._squares, owner, [W], lambda: row_square(W), None)
            return row_norm(W, A, B, scale, square)

        return _kept(self._kept, owner, [W, *sources], form, scale)


def _kept(
    kept: WeakKeyDictionary[nn.Module, tuple[list[Any], Tensor]],
    owner: nn.Module,
    sources: list[Tensor],
    form: Callable[[], Tensor],
    more: object,
) -> Tensor:
    """The value made of `sources` as they are now."""
    found = kept.get(owner)
    key = [more, *((t._base if t._is_view() else t, t.storage_offset(), t.shape, t._version) for t in sources)]
    if found is not None and len(found[0]) == len(key) and all(map(_same, found[0], key)):
        return found[1]
    with torch.inference_mode(False):
        value = form()
    kept[owner] = (key, value)
    return value


def _same(a: Any, b: Any) -> bool:
    return a[0] is b[0] and a[1:] == b[1:] if isinstance(a, tuple) else a == b


def _is_known(t: Tensor) -> bool:
    """Whether a change of t shows in its version: no inference tensor, no subclass (packed, sharded) around others."""
    return type(t) in (Tensor, nn.Parameter) and not t.is_inference() and not t.is_meta
