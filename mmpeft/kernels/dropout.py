"""Dropout on the low-rank input of a group of linears: one mask an input, drawn by counter hash wherever it is needed.

The linears of a group (q|k|v, gate|up) read one dropped x, as one linear with all their rows would; a mask of each
linear's own would cost a masked copy, a shrink and two gradients' products a member. A mask is a function of a seed on
the device and a site's number (`reference.dropout_mask`), so nothing is kept, no mask is ever stored, and a captured
step draws new masks as the seed advances.

What dropout adds to a group's step, with x [T, in] read or written at w bytes an element:

    S = drop(x) A^T       `shrink`: the mask is applied on the way into the product, 0 bytes more than without
    dx += mask (dS A)     `add_masked`: the product is formed in the tile that is masked, 2 w an element (dx is read
                          again and written); the main product loses its rank columns
    dA = dS^T drop(x)     where x is rebuilt by a kernel anyway it is written dropped (`elementwise.rmsnorm_backward`);
                          else `add_masked` writes the dropped copy beside, 2 w more
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmpeft.kernels import reference
from mmpeft.kernels.dispatch import use_triton


class Dropped(NamedTuple):
    """Dropout at a group's low-rank input: probability, the step's seed (int64 [1]), and the group's number.

    The mask is `reference.dropout_mask` of seed + site; the number is the host's, so that no launch adds it.
    """

    p: float
    seed: Tensor
    site: int = 0

    def at(self, site: int) -> Dropped:
        """The group number `site` of a model."""
        return self._replace(site=self.site + site)

    def of(self, x: Tensor) -> Tensor:
        """x [T, n] dropped and scaled, the same in forward and backward."""
        if use_triton(x):
            from mmpeft.kernels import dropout_kernels

            return dropout_kernels.hash_dropout(x, self.p, self.seed, self.site)
        return reference.dropout(x, self.p, self.seed + self.site)


def shrink(x: Tensor, A: Tensor, dropped: Dropped, again: Tensor | None = None) -> Tensor:
    """S = drop(x) A^T [T, R], contiguous; written to `again` [T, R] too, where given.

    x [T, in] and A [R, in] of one dtype, unit stride along `in`.
    """
    if use_triton(x):
        from mmpeft.kernels import dropout_kernels

        return dropout_kernels.shrink(x, A, dropped, again)
    S = dropped.of(x) @ A.mT
    if again is not None:
        again.copy_(S)
    return S


def add_masked(y: Tensor, S: Tensor, A: Tensor, dropped: Dropped, x: Tensor | None = None) -> Tensor | None:
    """y [T, n] += drop(S A), in place: the gradient that comes back through the mask. S [T, R], A [R, n].

    Returns drop(x) for x [T, n], where given: the same mask, drawn once.
    """
    if use_triton(y):
        from mmpeft.kernels import dropout_kernels

        return dropout_kernels.add_masked(y, S, A, dropped, x)
    (T, n), seed = y.shape, dropped.seed + dropped.site
    keep = reference.dropout_mask(T, n, dropped.p, seed, y.device)
    scale = reference.inverse_keep(dropped.p)
    y.add_((S @ A) * keep * scale)
    return None if x is None else x * keep * scale
