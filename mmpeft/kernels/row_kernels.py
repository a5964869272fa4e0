"""Triton kernels of `fused_rows`: the factor of every output channel, and its gradients, in one sweep each."""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.kernels.tritonlib import jit, tl, triton

BM, BN, STEPS = 16, 128, 8  # rows a step, columns a program, steps a program


@jit
def _scale(z, row, bias, y, T, N, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    r = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (r < T)[:, None] & (c < N)[None, :]
    at = r[:, None] * N + c[None, :]
    v = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    v = v * tl.load(row + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        v += tl.load(bias + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@jit
def _scale_backward(dy, z, row, dz, part, T, N, ldy, ldz, ldo, STEPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    factor = tl.load(row + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BN,), tl.float32)
    for i in range(STEPS):
        r = ((tl.program_id(0) * STEPS + i) * BM + tl.arange(0, BM)).to(tl.int64)
        inside = (r < T)[:, None] & (c < N)[None, :]
        d = tl.load(dy + r[:, None] * ldy + c[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(d * tl.load(z + r[:, None] * ldz + c[None, :], mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(dz + r[:, None] * ldo + c[None, :], (d * factor).to(dz.dtype.element_ty), mask=inside)
    tl.store(part + tl.program_id(0).to(tl.int64) * N + c, total, mask=c < N)


def scale(z: Tensor, row: Tensor, bias: Tensor | None) -> Tensor:
    """See `fused_rows.scale`."""
    y = torch.empty_like(z)
    T, N = z.shape
    if z.numel():
        _scale[(triton.cdiv(T, BM), triton.cdiv(N, BN))](
            z, row, row if bias is None else bias, y, T, N, BIAS=bias is not None, BM=BM, BN=BN
        )
    return y


def scale_backward(dy: Tensor, z: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """See `fused_rows.scale_backward`."""
    dy = dy.contiguous()
    dz = torch.empty_like(dy)
    return dz, scale_backward_into(dy, z, row, dz).to(row.dtype)


def scale_backward_into(dy: Tensor, z: Tensor, row: Tensor, dz: Tensor) -> Tensor:
    """See `fused_rows.scale_backward_into`."""
    T, N = z.shape
    chunks = triton.cdiv(max(T, 1), BM * STEPS)
    part = torch.zeros(chunks, N, dtype=torch.float32, device=z.device)
    if z.numel():
        _scale_backward[(chunks, triton.cdiv(N, BN))](
            dy, z, row, dz, part, T, N, dy.stride(0), z.stride(0), dz.stride(0), STEPS=STEPS, BM=BM, BN=BN
        )
    return part.sum(0)
