"""Triton kernels of `grouped`: shrink by the row's own A into fp32 partial sums, expand by its B into y.

A tile is rows of one sample, so its program loads one adapter number and then one A (or B) straight from the stack, in
whatever float type it is stored, rounded to x's type on the way. `shrink` writes S itself, in one pass over `in`, for
readers that expand on their own.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.tritonlib import jit, tl, triton

BK = 64


@jit
def _shrink_tile(x, xt, rows, here, A, ar, k, R, K, first,
                 STEPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr):  # fmt: skip
    """x A^T [BM, RP] at rows and ranks k, over STEPS blocks of `in` from the one numbered `first`."""
    total = tl.zeros((BM, RP), tl.float32)
    for i in range(STEPS):
        cols = (first + i) * BK + tl.arange(0, BK)
        v = tl.load(x + rows[:, None] * xt + cols[None, :], mask=here[:, None] & (cols < K)[None, :], other=0.0)
        a = tl.load(A + k[None, :] * ar + cols[:, None], mask=(k < R)[None, :] & (cols < K)[:, None], other=0.0)
        total += tl.dot(v, a.to(v.dtype), input_precision="ieee")
    return total


@jit
def _shrink(x, A, index, part, T, K, R, n, xb, xt, an, ar, TILES,
            STEPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr):  # fmt: skip
    b, tile, split = tl.program_id(0) // TILES, tl.program_id(0) % TILES, tl.program_id(1)
    adapter = tl.load(index + b)
    rows = tile * BM + tl.arange(0, BM)
    k = tl.arange(0, RP)
    if adapter < n:
        x += b.to(tl.int64) * xb
        A += adapter.to(tl.int64) * an
        total = _shrink_tile(x, xt, rows, rows < T, A, ar, k, R, K, split * STEPS, STEPS, BM, BK, RP)
        at = (split * tl.num_programs(0) * BM + tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
        tl.store(part + at[:, None] * RP + k[None, :], total)


@jit
def _expand(y, B, index, part, T, N, R, n, yb, yt, bn, bo, TILES,
            SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr):  # fmt: skip
    b, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    adapter = tl.load(index + b)
    rows = tile * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, RP)
    if adapter < n:
        s = tl.zeros((BM, RP), tl.float32)
        for i in range(SPLIT):
            at = (i * tl.num_programs(0) * BM + tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
            s += tl.load(part + at[:, None] * RP + k[None, :])
        B += adapter.to(tl.int64) * bn
        w = tl.load(B + cols[None, :] * bo + k[:, None], mask=(cols < N)[None, :] & (k < R)[:, None], other=0.0)
        y += b.to(tl.int64) * yb
        inside = (rows < T)[:, None] & (cols < N)[None, :]
        here = y + rows[:, None] * yt + cols[None, :]
        dtype = y.dtype.element_ty
        update = tl.dot(s.to(dtype), w.to(dtype), input_precision="ieee")
        tl.store(here, (tl.load(here, mask=inside, other=0.0).to(tl.float32) + update).to(dtype), mask=inside)


def add_grouped(y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor) -> None:
    """y [N, T, out] += the updates of x [N, T, in], in place; last axes of unit stride."""
    (samples, T, K), (n, R, _), out = x.shape, A.shape, y.shape[-1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    A = A if A.stride(-1) == 1 else A.contiguous()
    B = B if B.stride(-1) == 1 else B.contiguous()
    target = y if y.stride(-1) == 1 else y.contiguous()
    BM, RP = (16 if T <= 16 else 64), max(16, next_power_of_2(R))
    tiles, steps = triton.cdiv(T, BM), triton.cdiv(K, BK)
    split = min(steps, max(1, triton.cdiv(2 * _processors(x.device), samples * tiles)))
    each = triton.cdiv(steps, split)
    part = torch.empty(split, samples * tiles * BM, RP, dtype=torch.float32, device=x.device)
    _shrink[(samples * tiles, split)](
        x, A, index, part, T, K, R, n, x.stride(0), x.stride(1), A.stride(0), A.stride(1), tiles,
        STEPS=each, BM=BM, BK=BK, RP=RP, num_warps=4,
    )  # fmt: skip
    BN = 128
    _expand[(samples * tiles, triton.cdiv(out, BN))](
        target, B, index, part, T, out, R, n, target.stride(0), target.stride(1), B.stride(0), B.stride(1), tiles,
        SPLIT=split, BM=BM, BN=BN, RP=RP, num_warps=4,
    )  # fmt: skip
    if target is not y:
        y.copy_(target)


@jit
def _shrink_rows(x, A, index, out, S, K, R, n, ldx, lda, stride, ldo,
                 STEPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(S, BM)
    sample, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    adapter = tl.load(index + sample)
    place = tile * BM + tl.arange(0, BM)
    rows = sample * S + place
    k = tl.program_id(1) * RP + tl.arange(0, RP)
    total = tl.zeros((BM, RP), tl.float32)
    if adapter < n:
        total = _shrink_tile(x, ldx, rows, place < S, A + adapter * stride, lda, k, R, K, 0, STEPS, BM, BK, RP)
    mask = (place < S)[:, None] & (k < R)[None, :]
    tl.store(out + rows[:, None] * ldo + k[None, :], total.to(out.dtype.element_ty), mask=mask)


@jit
def _shrink_one(x, A, index, out, K, R, n, ldx, lda, stride, ldo, STEPS: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    adapter = tl.load(index + sample)
    k = tl.program_id(1) * RP + tl.arange(0, RP)
    total = tl.zeros((RP, BK), tl.float32)
    if adapter < n:
        A += adapter * stride
        for i in range(STEPS):
            cols = i * BK + tl.arange(0, BK)
            v = tl.load(x + sample * ldx + cols, mask=cols < K, other=0.0).to(tl.float32)
            a = tl.load(A + k[:, None] * lda + cols[None, :], mask=(k < R)[:, None] & (cols < K)[None, :], other=0.0)
            total += a.to(tl.float32) * v[None, :]
    tl.store(out + sample * ldo + k, tl.sum(total, 1).to(out.dtype.element_ty), mask=k < R)


def shrink(x: Tensor, A: Tensor, index: Tensor, out: Tensor) -> None:
    """out [T, R] = x [T, in] by each run of rows' own A [n, R, in], T / N rows each; last axes of unit stride.

    One token a sample is a product of vectors: programs of 8 ranks each, which read A in long rows, fill the device.
    """
    (T, K), (n, R, _), N = x.shape, A.shape, len(index)
    S = T // N
    places = (S, K, R, n, x.stride(0), A.stride(1), A.stride(0), out.stride(0))
    if S == 1:
        BK, RP = min(1024, next_power_of_2(K)), 8
        _shrink_one[(N, triton.cdiv(R, RP))](
            x, A, index, out, *places[1:], STEPS=triton.cdiv(K, BK), BK=BK, RP=RP, num_warps=4
        )
        return
    BM, BK, RP = 16 if S <= 16 else 32, 256 // x.element_size(), min(64, max(16, next_power_of_2(R)))
    _shrink_rows[(N * triton.cdiv(S, BM), triton.cdiv(R, RP))](
        x, A, index, out, *places, STEPS=triton.cdiv(K, BK), BM=BM, BK=BK, RP=RP, num_warps=4
    )


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
