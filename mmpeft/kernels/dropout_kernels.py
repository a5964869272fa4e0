"""Triton kernels of `dropout`: the mask as other kernels draw it, and a group's products with the mask in them.

Integer operations an element: xor, multiply, shift, three-input xor and multiply give a 32-bit word, two more the bits
of its even column, and each column has a comparison: 9 for two columns, 4.5 an element; a row's key is 10 for all the
columns a thread has of it (8 as a rule, so 1.3 more). One 32-bit word an element and two finalisers nested took 19.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.dropout import Dropped
from mmpeft.kernels.reference import inverse_keep, keep_threshold
from mmpeft.kernels.tritonlib import jit, tl, triton


@jit
def mix32(h):
    """The 32-bit finaliser of reference._mix32, on uint32."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@jit
def row_key(seed, rows):
    """The key of each row, uint32, from the seed (int64) and the rows' numbers."""
    return mix32(rows.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B1)


@jit
def keep_mask(key, pairs, threshold):
    """reference.dropout_mask: [..., 2 n] of bool from keys and the numbers [..., n] of n pairs of columns, broadcast.

    `threshold`: keep_threshold(p) << 16, uint32.
    """
    h = (key ^ pairs.to(tl.uint32)) * 0x7FEB352D
    h = h ^ (h >> 15) ^ (key * 0x9E3779B1)
    h = h * 0x846CA68B
    return tl.interleave((h << 16) ^ h, h) >= threshold.to(tl.uint32)


@jit
def dropped_value(v, key, pairs, threshold, inverse_keep):
    """v [..., 2 n] with the mask, scaled; see `keep_mask`."""
    return tl.where(keep_mask(key, pairs, threshold), v * inverse_keep, 0.0)


def masking(dropped: Dropped | None, placeholder: Tensor) -> tuple[Tensor, int, int, float]:
    """(seed, site, threshold, 1 / keep) as kernels take them; placeholders where nothing is dropped."""
    if dropped is None:
        return placeholder, 0, 0, 1.0
    return dropped.seed, dropped.site, keep_threshold(dropped.p) << 16, inverse_keep(dropped.p)


@jit
def _hash_dropout(x, y, seed, site, T, N, ldx, ldy, threshold, inverse_keep, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    pairs = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
    inside = (rows < T)[:, None] & (cols < N)[None, :]
    v = tl.load(x + rows[:, None] * ldx + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    v = dropped_value(v, row_key(tl.load(seed) + site, rows)[:, None], pairs[None, :], threshold, inverse_keep)
    tl.store(y + rows[:, None] * ldy + cols[None, :], v.to(y.dtype.element_ty), mask=inside)


def hash_dropout(x: Tensor, p: float, seed: Tensor, site: int = 0) -> Tensor:
    """Inverted dropout of x [T, n] by the mask of seed + site (seed: int64 tensor of one element on x's device)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    BM, BN = 8, 256
    if x.numel():
        _hash_dropout[(triton.cdiv(x.shape[0], BM), triton.cdiv(x.shape[1], BN))](
            x, y, seed, site, *x.shape, x.stride(0), y.stride(0), keep_threshold(p) << 16, inverse_keep(p), BM, BN
        )
    return y


@jit
def pin(x, PIN: tl.constexpr):
    """x, in the layout it was computed in. Without this the compiler moves the arithmetic into the layout of the matrix
    product's operand, where every warp holds the whole tile, and spills.
    """
    if PIN:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


def pins(t: Tensor) -> bool:
    """Whether `pin` applies to tensors like t: pairs of 16 bits on a GPU."""
    return t.is_cuda and t.element_size() == 2


@jit
def _shrink(x, A, S, again, seed, site, T, R, ldx, lda, ldw, threshold, inverse_keep, N: tl.constexpr,
            BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr, PIN: tl.constexpr, TWICE: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    key = row_key(tl.load(seed) + site, rows)[:, None]
    k = tl.arange(0, RP)
    total = tl.zeros((BM, RP), tl.float32)
    for first in range(0, N, BK):
        cols = first + tl.arange(0, BK)
        inside = (rows < T)[:, None] & (cols < N)[None, :]
        v = tl.load(x + rows[:, None] * ldx + cols[None, :], mask=inside, other=0.0)
        a = tl.load(A + k[None, :] * ldw + cols[:, None], mask=(cols < N)[:, None] & (k < R)[None, :], other=0.0)
        pairs = (first // 2 + tl.arange(0, BK // 2))[None, :]
        v = dropped_value(v.to(tl.float32), key, pairs, threshold, inverse_keep).to(x.dtype.element_ty)
        total += tl.dot(pin(v, PIN), a, input_precision="ieee")
    inside = (rows < T)[:, None] & (k < R)[None, :]
    tl.store(S + rows[:, None] * R + k[None, :], total.to(S.dtype.element_ty), mask=inside)
    if TWICE:
        tl.store(again + rows[:, None] * lda + k[None, :], total.to(S.dtype.element_ty), mask=inside)


def shrink(x: Tensor, A: Tensor, dropped: Dropped, again: Tensor | None = None) -> Tensor:
    """See `dropout.shrink`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (T, N), R = x.shape, A.shape[0]
    S = torch.empty(T, R, dtype=x.dtype, device=x.device)
    BM, BK, RP = 32, 128, max(16, next_power_of_2(R))
    if T:
        twice = S if again is None else again
        _shrink[(triton.cdiv(T, BM),)](
            x, A, S, twice, dropped.seed, dropped.site, T, R, x.stride(0), twice.stride(0), A.stride(0),
            *masking(dropped, S)[2:], N=N, BM=BM, BK=BK if RP <= 64 else 64, RP=RP, PIN=pins(x),
            TWICE=again is not None, num_warps=4, num_stages=3,
        )  # fmt: skip
    return S


@jit
def _add_masked(y, S, A, x, copy, seed, site, T, N, R, ldy, lds, ldw, ldx, ldc, threshold, inverse_keep,
                BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, COPY: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    pairs = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
    k = tl.arange(0, RP)
    inside = (rows < T)[:, None] & (cols < N)[None, :]
    s = tl.load(S + rows[:, None] * lds + k[None, :], mask=(rows < T)[:, None] & (k < R)[None, :], other=0.0)
    a = tl.load(A + k[:, None] * ldw + cols[None, :], mask=(k < R)[:, None] & (cols < N)[None, :], other=0.0)
    keep = keep_mask(row_key(tl.load(seed) + site, rows)[:, None], pairs[None, :], threshold)
    low = tl.where(keep, tl.dot(s, a, input_precision="ieee") * inverse_keep, 0.0)
    at = y + rows[:, None] * ldy + cols[None, :]
    low += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, low.to(y.dtype.element_ty), mask=inside)
    if COPY:
        v = tl.load(x + rows[:, None] * ldx + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.where(keep, v * inverse_keep, 0.0)
        tl.store(copy + rows[:, None] * ldc + cols[None, :], v.to(copy.dtype.element_ty), mask=inside)


def add_masked(y: Tensor, S: Tensor, A: Tensor, dropped: Dropped, x: Tensor | None = None) -> Tensor | None:
    """See `dropout.add_masked`."""
    (T, N), R = y.shape, A.shape[0]
    copy = None if x is None else torch.empty(T, N, dtype=x.dtype, device=x.device)
    BM, BN = 32, 128
    if T:
        read, write = (y, y) if x is None or copy is None else (x, copy)
        _add_masked[(triton.cdiv(T, BM), triton.cdiv(N, BN))](
            y, S, A, read, write, dropped.seed, dropped.site, T, N, R, y.stride(0), S.stride(0), A.stride(0),
            read.stride(0), write.stride(0), *masking(dropped, y)[2:], BM=BM, BN=BN, RP=max(16, next_power_of_2(R)),
            COPY=x is not None, num_warps=4,
        )  # fmt: skip
    return copy
