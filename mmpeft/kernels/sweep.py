"""The MLP's backward in one sweep: SwiGLU's gradient and every rank-wide product that touches a [T, f] tensor.

Unfused, the gradient of gate and up is written, read for dS, read for dB, and the rebuilt activation is written and read for the
down projection's dA: eleven passes over a [T, f] tensor. The sweep reads dh, gate, up once and writes dgate, dup once, five passes:

    dgate, dup           = SwiGLU backward                           written
    dS_gate, dS_up       = dgate (sB_gate), dup (sB_up)              partial over column blocks
    dB_gate, dB_up       = dgate^T S_gate, dup^T S_up                partial over row chunks, in registers meanwhile
    dA_down^T            = h^T dS_down,  h = silu(gate) up           the same; h never reaches memory

A program owns `BN` columns and one chunk of rows. Partial sums go to scratch buffers that two small kernels add up in a fixed order,
so the result does not change from run to run (no atomics).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import jit, next_power_of_2, tl, triton

MAX_RANK = 32  # wider ranks do not fit the registers: the caller uses the unfused form


@jit
def _sweep(dh, gate_up, dgu, S, dS_down, B, dS_part, dW_part, ldd, ldg, ldo, lds, ldn, ldb, T, F, R, r_gate, r_up, r_down,
           ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr):  # fmt: skip
    block, chunk = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BN)
    k = tl.arange(0, RP)
    r = tl.arange(0, BM)
    inside_c = c < F - block * BN
    first = (chunk * ROWS).to(tl.int64)
    dh += first * ldd + block * BN
    gate_up += first * ldg + block * BN
    dgu += first * ldo + block * BN
    S += first * lds
    dS_down += first * ldn
    B += (block * BN).to(tl.int64) * ldb
    dS_part += (block.to(tl.int64) * T + first) * R
    w_gate = tl.zeros((BN, RP), tl.float32)
    w_up = tl.zeros((BN, RP), tl.float32)
    w_down = tl.zeros((BN, RP), tl.float32)
    dtype = dgu.dtype.element_ty
    for i in range(0, ROWS, BM):
        inside_r = (r < T - chunk * ROWS - i)[:, None]
        inside = inside_r & inside_c[None, :]
        d = tl.load(dh + (r[:, None] * ldd + c[None, :]), mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gate_up + (r[:, None] * ldg + c[None, :]), mask=inside, other=0.0).to(tl.float32)
        u = tl.load(gate_up + F + (r[:, None] * ldg + c[None, :]), mask=inside, other=0.0).to(tl.float32)
        s_down = tl.load(dS_down + (r[:, None] * ldn + k[None, :]), mask=inside_r & (k < r_down)[None, :], other=0.0)
        sig = tl.sigmoid(g)
        silu = g * sig
        h = (silu * u).to(dtype)
        w_down += tl.dot(tl.trans(h), s_down, input_precision="ieee")

        d_up = (d * silu).to(dtype)
        tl.store(dgu + F + (r[:, None] * ldo + c[None, :]), d_up, mask=inside)
        s_up = tl.load(S + r_gate + (r[:, None] * lds + k[None, :]), mask=inside_r & (k < r_up)[None, :], other=0.0)
        w_up += tl.dot(tl.trans(d_up), s_up, input_precision="ieee")
        b = B + (F.to(tl.int64) * ldb + r_gate) + (c[:, None] * ldb + k[None, :])
        b_up = tl.load(b, mask=inside_c[:, None] & (k < r_up)[None, :], other=0.0)  # [BN, RP]
        part = dS_part + (r[:, None] * R + k[None, :])
        p = tl.dot(d_up, b_up, input_precision="ieee")
        tl.store(part + r_gate, p, mask=inside_r & (k < r_up)[None, :])

        d_gate = (d * u * (sig + silu * (1 - sig))).to(dtype)
        tl.store(dgu + (r[:, None] * ldo + c[None, :]), d_gate, mask=inside)
        s_gate = tl.load(S + (r[:, None] * lds + k[None, :]), mask=inside_r & (k < r_gate)[None, :], other=0.0)
        w_gate += tl.dot(tl.trans(d_gate), s_gate, input_precision="ieee")
        b = B + (c[:, None] * ldb + k[None, :])
        b_gate = tl.load(b, mask=inside_c[:, None] & (k < r_gate)[None, :], other=0.0)
        p = tl.dot(d_gate, b_gate, input_precision="ieee")
        tl.store(part, p, mask=inside_r & (k < r_gate)[None, :])

        dh += BM * ldd
        gate_up += BM * ldg
        dgu += BM * ldo
        S += BM * lds
        dS_down += BM * ldn
        dS_part += BM * R
    out = dW_part + (chunk * 3 * F + block * BN).to(tl.int64) * RP + (c[:, None] * RP + k[None, :])
    tl.store(out, w_gate, mask=inside_c[:, None])
    tl.store(out + F * RP, w_up, mask=inside_c[:, None])
    tl.store(out + 2 * F * RP, w_down, mask=inside_c[:, None])


@jit
def _finish_dS(part, out, ldo, T, R, r, BLOCKS: tl.constexpr, BM: tl.constexpr, RW: tl.constexpr):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    k = tl.arange(0, RW)[None, :]
    inside = (rows < T) & (k < r)
    total = tl.zeros((BM, RW), tl.float32)
    for b in range(BLOCKS):
        total += tl.load(part + (b * T + rows) * R + k, mask=inside, other=0.0)
    tl.store(out + rows * ldo + k, total.to(out.dtype.element_ty), mask=(rows < T) & (k < R))


@jit
def _finish_dW(part, gate, up, down, s_gate, s_up, F, r_gate, r_up, r_down,
               CHUNKS: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    kind = tl.program_id(1)
    cols = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    k = tl.arange(0, RP)[None, :]
    total = tl.zeros((BN, RP), tl.float32)
    for c in range(CHUNKS):
        total += tl.load(part + ((c * 3 + kind) * F + cols) * RP + k, mask=cols < F, other=0.0)
    if kind == 0:
        _put(gate + cols * r_gate + k, total * s_gate, (cols < F) & (k < r_gate), ADD)
    elif kind == 1:
        _put(up + cols * r_up + k, total * s_up, (cols < F) & (k < r_up), ADD)
    else:
        _put(down + k * F + cols, total, (cols < F) & (k < r_down), ADD)


@jit
def _put(at, value, mask, ADD: tl.constexpr):
    if ADD:
        value += tl.load(at, mask=mask, other=0.0)
    tl.store(at, value, mask=mask)


def mlp_backward(
    dh: Tensor, gate_up: Tensor, dgu: Tensor, S: Tensor, dS_down: Tensor, B: Tensor, ranks: tuple[int, int, int],
    scales: tuple[float, float], dB_gate: Tensor, dB_up: Tensor, dA_down: Tensor, *, accumulate: bool = False,
) -> None:  # fmt: skip
    """One sweep over the MLP's backward.

    Args:
        dh: [T, f], gradient of the activation. gate_up: [T, 2f]. S: [T, R], the gate|up shrink. dS_down: [T, R_down].
        B: [2f, R] = s blockdiag(B_gate, B_up), as packed. ranks: of gate, up, down, at most MAX_RANK. scales: s of gate, up.
        dgu: [T, 2f + R], filled with [dgate | dup | dS].
        dB_gate [f, r], dB_up [f, r], dA_down [r, f]: fp32, written, or added to with `accumulate`.
    """
    (T, F), R = dh.shape, S.shape[1]
    r_gate, r_up, r_down = ranks
    RP = max(16, next_power_of_2(max(ranks)))
    BN, BM, warps, stages = _CONFIG[RP]
    blocks = triton.cdiv(F, BN)
    slots = 2 * _processors(dh)
    rows = max(64, triton.cdiv(triton.cdiv(T, max(1, slots // blocks)), 64) * 64)
    chunks = triton.cdiv(T, rows)
    dS_part = torch.empty(blocks, T, R, dtype=torch.float32, device=dh.device)
    dW_part = torch.empty(chunks, 3, F, RP, dtype=torch.float32, device=dh.device)
    _sweep[(blocks, chunks)](
        dh, gate_up, dgu, S, dS_down, B, dS_part, dW_part,
        dh.stride(0), gate_up.stride(0), dgu.stride(0), S.stride(0), dS_down.stride(0), B.stride(0), T, F, R, *ranks,
        ROWS=rows, BM=BM, BN=BN, RP=RP, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _finish_dS[(triton.cdiv(T, 32),)](
        dS_part, dgu[:, 2 * F :], dgu.stride(0), T, R, r_gate + r_up, BLOCKS=blocks, BM=32, RW=next_power_of_2(R)
    )
    _finish_dW[(triton.cdiv(F, 64), 3)](
        dW_part, dB_gate, dB_up, dA_down, *scales, F, r_gate, r_up, r_down, CHUNKS=chunks, BN=64, RP=RP, ADD=accumulate
    )


# padded rank -> (columns, rows a step, warps, stages)
_CONFIG = {16: (256, 32, 8, 2), 32: (128, 32, 8, 2)}


def _processors(t: Tensor) -> int:
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 1
