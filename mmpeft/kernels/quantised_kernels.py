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
def _entries(e, inside, codes, table, scale, zero, scale_table, nested, mean, offset,
             GROUP: tl.constexpr, NESTED_GROUP: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr,
             ZERO: tl.constexpr, NESTED: tl.constexpr):  # fmt: skip
    """The numbers at the flat places `e`, fp32; 0 where not inside. Groups are constants: a division by a run-time one
    costs more than all the rest."""
    EACH: tl.constexpr = 8 // BITS
    byte = tl.load(codes + e // EACH, mask=inside, other=0).to(tl.int32)
    code = (byte >> (8 - BITS * (1 + (e % EACH).to(tl.int32)))) & ((1 << BITS) - 1)
    if TABLE:
        value = tl.load(table + code, mask=inside, other=0.0)
    else:
        value = (code - offset).to(tl.float32)
    run = e // GROUP
    if NESTED:
        s = tl.load(scale_table + tl.load(scale + run, mask=inside, other=0).to(tl.int32), mask=inside, other=0.0)
        s = s * tl.load(nested + run // NESTED_GROUP, mask=inside, other=0.0) + tl.load(mean)
    else:
        s = tl.load(scale + run, mask=inside, other=0.0)
    value = value * s
    if ZERO:
        value += tl.load(zero + run, mask=inside, other=0.0)
    return tl.where(inside, value, 0.0)


@jit
def _dequantise(out, rows, columns, ldo, codes, table, scale, zero, scale_table, nested, mean, offset,
                GROUP: tl.constexpr, NESTED_GROUP: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr,
                ZERO: tl.constexpr, NESTED: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    r = (tl.program_id(0) * BM + tl.arange(0, BM))[:, None]
    c = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    inside = (r < rows) & (c < columns)
    at = r.to(tl.int64) * ldo + c
    if WIDE:  # entries are counted in 64 bits only where 32 do not do
        r = r.to(tl.int64)
    value = _entries(r * columns + c, inside, codes, table, scale, zero, scale_table, nested, mean, offset,
                     GROUP, NESTED_GROUP, BITS, TABLE, ZERO, NESTED)  # fmt: skip
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@jit
def _linear(x, part, M, N, K, xm, codes, table, scale, zero, scale_table, nested, mean, offset,
            GROUP: tl.constexpr, NESTED_GROUP: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr,
            ZERO: tl.constexpr, NESTED: tl.constexpr,
            STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for i in range(STEPS):
        k = (tl.program_id(1) * STEPS + i) * BK + tl.arange(0, BK)
        v = tl.load(x + rows[:, None] * xm + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        inside = (cols < N)[None, :] & (k < K)[:, None]
        e = cols[None, :].to(tl.int64) * K + k[:, None]
        w = _entries(e, inside, codes, table, scale, zero, scale_table, nested, mean, offset,
                     GROUP, NESTED_GROUP, BITS, TABLE, ZERO, NESTED)  # fmt: skip
        total += tl.dot(v, w.to(v.dtype), input_precision="ieee")
    at = (tl.program_id(1) * M + rows).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(part + at, total, mask=(rows < M)[:, None] & (cols < N)[None, :])


def _arguments(p: Packed) -> tuple[tuple[object, ...], dict[str, object]]:
    """The kernels' description of a packed matrix; absent tensors are stood in for by the codes, never read."""
    tensors = (p.codes, p.table, p.scale, p.zero, p.scale_table, p.nested, p.mean)
    given = [p.codes if t is None else t for t in tensors]
    flags: dict[str, object] = {
        "BITS": p.bits, "TABLE": p.table is not None, "ZERO": p.zero is not None, "NESTED": p.nested is not None,
        "GROUP": p.group, "NESTED_GROUP": p.nested_group,
    }  # fmt: skip
    return (*given, p.offset), flags


def dequantise_into(p: Packed, out: Tensor) -> None:
    """See `quantised.dequantise_into`."""
    given, flags = _arguments(p)
    rows, columns = p.shape
    wide = min(512, max(16, next_power_of_2(columns)))
    tall = 2048 // wide
    if out.numel():
        _dequantise[(triton.cdiv(rows, tall), triton.cdiv(columns, wide))](
            out, rows, columns, out.stride(0), *given, **flags, WIDE=out.numel() >= 2**31, BM=tall, BN=wide, num_warps=4
        )


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
