"""DoRA inside written-out blocks: y = g z + b with z = x (W + s B A)^T and g = m / ||W + s B A||, norm detached.

Where the factor is applied, counted in bytes a token and block (bf16, q|k|v of width a + 2kv, f of the MLP):

- Folded into the weights ([g W | g s B] formed in a ring before each product, forward and backward): nothing a token, but
  4 passes over W forward and backward, 10.4 GB a step at 1.5B (3.5 ms), and dm = sum_t dy z / ||.|| still needs z.
- A pass of its own after each product: 4 bytes an output channel forward and 6 backward: 23,040 channels at 1.5B are
  18 ms at 8,192 tokens.
- Chosen: in the kernel that reads z anyway. RoPE scales q, k and v, SwiGLU scales gate and up, the next add+norm scales
  what o and down add to the stream: nothing read or written more in the forward. In the backward the MLP's sweep writes
  dz = g dy in place of dy and sums dy z by column in registers. That leaves one pass dz, dm over q|k|v, o and down
  (6 bytes a channel: 5,120 channels, 2.3 ms at 1.5B) and RoPE again (4 bytes a channel of q|k|v, .6 ms), since z is kept
  instead of the rotated y. Kept more: z of o and down, 4h bytes a token.

Everything after dz (dS, dx, dA, dB) is LoRA's, on the same packed buffers. The norm comes from rank-wide products on the
compute copies, so that it is the norm of the matrix that is multiplied by, once after every optimizer step:

    ||W + s B A||^2 = ||W||^2 + sum_r sB ([W | sB] [2 A^T ; A A^T])      row by row (arXiv 2402.09353, section 4.3)
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft.kernels import fused_rows
from mmpeft.kernels.dispatch import next_power_of_2, use_triton
from mmpeft.kernels.dora import row_square
from mmpeft.kernels.lowrank import mm_wide
from mmpeft.kernels.packed import PackedGroup
from mmpeft.kernels.tritonlib import jit, tl, triton

WIDEST = 128  # ranks of a group, padded, up to which the kernel forms the norms


class Scaling(NamedTuple):
    """What a kernel applies to z [T, out] as it reads it: factor * z + bias; both [out], contiguous, fp32 or wider."""

    factor: Tensor
    bias: Tensor


class Magnitude:
    """Row factors of a packed group.

    Args:
        packed: the group's weights and compute copies.
        has: whether a member has a magnitude m [out_i]; one without keeps the factor 1.
    """

    def __init__(self, packed: PackedGroup, has: Sequence[bool]) -> None:
        wide = torch.promote_types(packed.dtype, torch.float32)
        new = packed.A.new_zeros(3, packed.out_features, dtype=wide)
        self.scaling = Scaling(new[0].fill_(1), new[1] if packed.bias is None else packed.bias.to(wide))
        self.inverse_norm, self.has = new[2], list(has)
        ends = torch.tensor(packed.outs).cumsum(0).tolist()
        self.rows = [(end - out, end) for out, end, h in zip(packed.outs, ends, has, strict=True) if h]
        self.square: Tensor | None = None
        self.start = 0  # of the members' m in the flat buffer, one after another

    @torch.no_grad()
    def form(self, packed: PackedGroup, ms: Sequence[Tensor], *, squares: bool = False) -> None:
        """Factors and norms of the compute copies as they are now; `squares`: the base has changed too."""
        packed.load()
        if squares or self.square is None:
            self.square = row_square(packed.W).contiguous()
        A, B, (factor, _), n = packed.A, packed.B, self.scaling, packed.in_features
        right = A.new_empty(n + packed.rank, packed.rank)  # [2 A^T ; A A^T], for the two products as one with [W | sB]
        torch.mul(A.mT, 2.0, out=right[:n])
        torch.mm(A, A.mT, out=right[n:])
        cross = mm_wide(packed.forward_weight, right).to(factor.dtype)
        if use_triton(B) and packed.rank <= WIDEST and factor.dtype == torch.float32:
            for (begin, end), m in zip(self.rows, ms, strict=True):
                _norms[(triton.cdiv(end - begin, 32),)](
                    cross[begin:end], B[begin:end], self.square[begin:end], m, factor[begin:end],
                    self.inverse_norm[begin:end], B.stride(0), end - begin, packed.rank,
                    BM=32, RP=next_power_of_2(packed.rank), num_warps=4,
                )  # fmt: skip
            return
        inverse = (self.square + (cross * B).sum(-1)).clamp_min(torch.finfo(factor.dtype).tiny).rsqrt()
        for (begin, end), m in zip(self.rows, ms, strict=True):
            self.inverse_norm[begin:end] = inverse[begin:end]
            torch.mul(m, inverse[begin:end], out=factor[begin:end])

    def backward(self, dy: Tensor, z: Tensor, dz: Tensor, flat: Tensor, accumulate: bool) -> None:
        """dz <- factor * dy (dz may be dy), and m's gradient into flat; all [T, out], any leading dimension."""
        self.store(fused_rows.scale_backward_into(dy, z, self.scaling.factor, dz), flat, accumulate)

    def store(self, total: Tensor, flat: Tensor, accumulate: bool) -> None:
        """m's gradient = total / norm into flat, where total [out] is the sum of dy z over tokens."""
        at = self.start
        for begin, end in _joined(self.rows):
            place = flat[at : at + end - begin]
            if accumulate:
                place.addcmul_(total[begin:end], self.inverse_norm[begin:end])
            else:
                torch.mul(total[begin:end], self.inverse_norm[begin:end], out=place)
            at += end - begin


def _joined(rows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that touch, as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in rows:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


@jit
def _norms(cross, B, square, m, factor, inverse, ldb, N, R, BM: tl.constexpr, RP: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, RP)
    inside = (rows < N)[:, None] & (k < R)[None, :]
    b = tl.load(B + rows.to(tl.int64)[:, None] * ldb + k[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cross + rows[:, None] * R + k[None, :], mask=inside, other=0.0)
    total = tl.load(square + rows, mask=rows < N, other=1.0) + tl.sum(b * c, 1)
    inv = 1.0 / tl.sqrt(tl.maximum(total, 1e-37))
    tl.store(inverse + rows, inv, mask=rows < N)
    tl.store(factor + rows, tl.load(m + rows, mask=rows < N, other=0.0) * inv, mask=rows < N)
