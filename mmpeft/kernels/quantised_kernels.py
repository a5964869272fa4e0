"""Triton kernels of `quantised`: decode entries of a packed matrix, to memory or straight into a matrix product."""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.quantised import Packed
from mmpeft.kernels.tritonlib import jit, tl, triton

BK, BN = 128, 32


@jit
def _entries(e, inside, codes, table, scale, zero, scale_table, nested, mean, offset, group, nested_group,
             BITS: tl.constexpr, TABLE: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr):  # fmt: skip
    """The numbers at the flat places `e`, fp32; 0 where not inside."""
    EACH: tl.constexpr = 8 // BITS
    byte = tl.load(codes + e // EACH, mask=inside, other=0).to(tl.int32)
    code = (byte >> (8 - BITS * (1 + (e % EACH).to(tl.int32)))) & ((1 << BITS) - 1)
    if TABLE:
        value = tl.load(table + code, mask=inside, other=0.0)
    else:
        value = (code - offset).to(tl.float32)
    run = e // group
    if NESTED:
        s = tl.load(scale_table + tl.load(scale + run, mask=inside, other=0).to(tl.int32), mask=inside, other=0.0)
        s = s * tl.load(nested + run // nested_group, mask=inside, other=0.0) + tl.load(mean)
    else:
        s = tl.load(scale + run, mask=inside, other=0.0)
    value = value * s
    if ZERO:
        value += tl.load(zero + run, mask=inside, other=0.0)
    return tl.where(inside, value, 0.0)


@jit
def _dequantise(out, n, codes, table, scale, zero, scale_table, nested, mean, offset, group, nested_group,
                BITS: tl.constexpr, TABLE: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < n
    value = _entries(e, inside, codes, table, scale, zero, scale_table, nested, mean, offset, group, nested_group,
                     BITS, TABLE, ZERO, NESTED)  # fmt: skip
    tl.store(out + e, value.to(out.dtype.element_ty), mask=inside)


@jit
def _linear(x, part, M, N, K, xm, codes, table, scale, zero, scale_table, nested, mean, offset, group, nested_group,
            BITS: tl.constexpr, TABLE: tl.constexpr, ZERO: tl.constexpr, NESTED: tl.constexpr,
            STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for i in range(STEPS):
        k = (tl.program_id(1) * STEPS + i) * BK + tl.arange(0, BK)
        v = tl.load(x + rows[:, None] * xm + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        inside = (cols < N)[None, :] & (k < K)[:, None]
        e = cols[None, :].to(tl.int64) * K + k[:, None]
        w = _entries(e, inside, codes, table, scale, zero, scale_table, nested, mean, offset, group, nested_group,
                     BITS, TABLE, ZERO, NESTED)  # fmt: skip
        total += tl.dot(v, w.to(v.dtype), input_precision="ieee")
    at = (tl.program_id(1) * M + rows).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(part + at, total, mask=(rows < M)[:, None] & (cols < N)[None, :])


def _arguments(p: Packed) -> tuple[tuple[object, ...], dict[str, object]]:
    """The kernels' description of a packed matrix; absent tensors are stood in for by the codes, never read."""
    tensors = (p.codes, p.table, p.scale, p.zero, p.scale_table, p.nested, p.mean)
    given = [p.codes if t is None else t for t in tensors]
    flags: dict[str, object] = {"BITS": p.bits, "TABLE": p.table is not None, "ZERO": p.zero is not None, "NESTED": p.nested is not None}
    return (*given, p.offset, p.group, p.nested_group), flags


def dequantise(p: Packed, dtype: torch.dtype) -> Tensor:
    """The dense matrix [out, in]."""
    out = torch.empty(p.shape, dtype=dtype, device=p.codes.device)
    given, flags = _arguments(p)
    if out.numel():
        _dequantise[(triton.cdiv(out.numel(), 1024),)](out, out.numel(), *given, **flags, BLOCK=1024, num_warps=4)
    return out


def linear(x: Tensor, p: Packed) -> Tensor:
    """x [M, in] times W^T -> [M, out] fp32; `in` is cut into slices whose partial sums are added in a fixed order."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (M, K), N = x.shape, p.shape[0]
    BM, steps, blocks = max(16, next_power_of_2(M)), triton.cdiv(K, BK), triton.cdiv(N, BN)
    split = min(steps, max(1, triton.cdiv(2 * _processors(x.device), blocks)))
    each = triton.cdiv(steps, split)
    part = torch.empty(split, M, N, dtype=torch.float32, device=x.device)
    given, flags = _arguments(p)
    if x.numel() and N:
        _linear[(blocks, split)](
            x, part, M, N, K, x.stride(0), *given, **flags, STEPS=each, BM=BM, BN=BN, BK=BK, num_warps=4
        )
    return part.sum(0)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
