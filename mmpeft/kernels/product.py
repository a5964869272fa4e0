"""A group's product [z | S] whose rank term S B^T is still to be added, and what a kernel needs to read it.

A group's rows [W ; A] lie one under the other (`packed.PackedGroup.backward_weight`), so one product gives z = x W^T and
S = x A^T. Who reads z next adds S B^T, the factor and the bias on the way: `expand` for RoPE, SwiGLU and the residual's add and
norm, `rope_attention` for attention.

With an adapter of its own for every sample (`Product.by_sample`), S comes of one grouped shrink a group, which writes into the
same columns, and a reader's tile holds tokens of one sample, so that it finds its one B in the stack by an index on the
device. A group's B then has no blocks: each output row keeps its own member's columns.

`Product` gives the launches their arguments, `sample_tile` and `rank_term` are the parts that the kernels share.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft.kernels import grouped
from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.group import Group
from mmpeft.kernels.grouped import Stack
from mmpeft.kernels.packed import LEADING_MULTIPLE, round_up
from mmpeft.kernels.tritonlib import jit, tl, triton


class Product(NamedTuple):
    """A group's output that is not finished: y = factor * (z + S B^T) + bias.

    z: [T, out + R], S in its last R columns. B: [out, R], times s, block-diagonal over members. ranks: of the members.
    factor, bias: [out] or None; fp32, a bias alone in the weights' dtype.
    chosen: int64 [N], the adapter of each of N equal runs of rows; then B is [n, out, r], each row its own member's, of the
    members' rows `outs`; n or more is the base.
    """

    z: Tensor
    B: Tensor
    ranks: list[int]
    factor: Tensor | None
    bias: Tensor | None
    chosen: Tensor | None = None
    outs: Sequence[int] = ()

    @staticmethod
    def of(x: Tensor, group: Group) -> Product:
        """The group's product with x [T, in]: one GEMM."""
        p = group.packed
        p.load()
        factor, bias = (None, p.bias) if group.scaling is None else group.scaling
        return Product(torch.mm(x, p.backward_weight.mT), p.B, p.ranks, factor, bias)

    @staticmethod
    def by_sample(x: Tensor, group: Group, stack: Stack, index: Tensor) -> Product:
        """The group's product with x [T, in], each of `index`'s [N] runs of T / N rows under its own adapter: one GEMM
        and one shrink. The weights are the group's, its own adapter is left out."""
        p, out, R = group.packed, group.packed.out_features, sum(stack.ranks)
        p.load()
        z = x.new_empty(x.shape[0], round_up(out + R, LEADING_MULTIPLE))[:, : out + R]
        with grouped.beside(x) as other:
            if R:
                with other:
                    grouped.shrink(x, stack.A, index, z[:, out:])
            torch.mm(x, p.W.mT, out=z[:, :out])
        return Product(z, stack.B, stack.ranks, None, p.bias, index, p.outs)

    @property
    def out(self) -> int:
        """Columns of y."""
        return self.B.shape[-2]

    def finished(self) -> Tensor:
        """y [T, out], of z's dtype or wider: the reference."""
        out = self.out
        wide = torch.promote_types(self.z.dtype, torch.float32)
        y = self.z[:, :out].to(wide)
        if self.chosen is None:
            y = y + self.z[:, out:].to(wide) @ self.B.to(wide).mT
        else:
            y = y + self._by_sample(self.z[:, out:].to(wide), self.chosen)
        y = y if self.factor is None else y * self.factor
        return y if self.bias is None else y + self.bias

    def _by_sample(self, S: Tensor, index: Tensor) -> Tensor:
        """S B^T [T, out], each sample by its own B; of the base zeros."""
        count = self.B.shape[0]
        B = self.B.to(S.dtype)[index.clamp_max(count - 1)] * (index < count)[:, None, None]  # [N, out, r]
        S = S.view(len(index), S.shape[0] // len(index), S.shape[1])
        terms = [
            s @ b[..., :r].mT
            for s, b, r in zip(S.split(self.ranks, 2), B.split(list(self.outs), 1), self.ranks, strict=True)
        ]
        return torch.cat(terms, 2).flatten(0, 1)

    @property
    def run_length(self) -> int:
        """Rows of one adapter's run; 1 without an index."""
        return 1 if self.chosen is None else self.z.shape[0] // len(self.chosen)

    def tiles(self, rows: int) -> int:
        """Tiles of so many rows; with an index none holds two samples."""
        if self.chosen is None:
            return int(triton.cdiv(self.z.shape[0], rows))
        return len(self.chosen) * int(triton.cdiv(self.run_length, rows))

    def channel_arguments(self) -> tuple[Tensor, Tensor]:
        """(factor, bias) as the kernels take them: anything where there is none."""
        return self.z if self.factor is None else self.factor, self.z if self.bias is None else self.bias

    def adapter_arguments(self) -> tuple[Tensor, int, int, int]:
        """(index, adapters, elements between their B, rows of a run) as the kernels take them; anything without an index."""
        if self.chosen is None:
            return self.z, 1, 1, 1
        return self.chosen, self.B.shape[0], self.B.stride(0), self.run_length

    def flags(self) -> dict[str, bool]:
        """Which of factor, bias and index there are, as the kernels' constants."""
        return {"FACTOR": self.factor is not None, "BIAS": self.bias is not None, "GROUPED": self.chosen is not None}


def padded_rank(ranks: Sequence[int]) -> int:
    """Rank columns of a tile: the tensor cores take at least 16."""
    return max(16, next_power_of_2(max(1, *ranks)))


@jit
def sample_tile(S, BM: tl.constexpr):
    """(sample, its rows of this program's tile, the first row after the sample): no tile holds two samples of S rows."""
    tiles = tl.cdiv(S, BM)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    return sample, sample * S + tl.program_id(0) % tiles * BM + tl.arange(0, BM), (sample + 1) * S


@jit
def rank_term(z, lds, first, r, B, ldb, rows, cols, T, end, RP: tl.constexpr):
    """S B^T at rows and columns of the output, from a member's rank columns [first, first + r)."""
    k = tl.arange(0, RP)
    s = tl.load(z + rows[:, None] * lds + first + k[None, :], mask=(rows < T)[:, None] & (k < r)[None, :], other=0.0)
    b = tl.load(B + cols[None, :] * ldb + first + k[:, None], mask=(cols < end)[None, :] & (k < r)[:, None], other=0.0)
    return tl.dot(s, b, input_precision="ieee")
