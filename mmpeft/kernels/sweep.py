"""The MLP in two sweeps: SwiGLU with the next shrink; SwiGLU's gradient with every rank-wide product of [T, f] tensors.

Unfused, the gradient of gate and up is written, read for dS, read for dB, and the rebuilt activation is written and
read for the down projection's dA: eleven passes over a [T, f] tensor. The sweep reads dh, gate, up once and writes
dgate, dup once, five passes:

    dgate, dup           = SwiGLU backward                           written
    dS_gate, dS_up       = dgate (sB_gate), dup (sB_up)              partial over column blocks
    dB_gate, dB_up       = dgate^T S_gate, dup^T S_up                partial over row chunks, in registers meanwhile
    dA_down^T            = h^T dS_down,  h = silu(gate) up           the same; h never reaches memory

The forward does the same for S_down = h A_down^T: h is written for the GEMM and not read again for the shrink.

Under dropout S_down and dA_down read drop(h), and dh lacks the adapter's part, which the sweep adds from the tile's own
product, mask (dS_down A_down): no pass and no [T, f] tensor more than without.

A program owns `BN` columns and one chunk of rows. Partial sums go to scratch buffers that two small kernels add up in
a fixed order, so the result does not change from run to run (no atomics).
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.dropout import Dropped
from mmpeft.kernels.dropout_kernels import dropped_value, keep_mask, masking, pin, pins, row_key
from mmpeft.kernels.tritonlib import jit, tl, triton

MAX_RANK = 32  # wider ranks do not fit the registers: the caller uses the unfused form
Config = tuple[int, int, int, int]  # columns, rows a step, warps, stages


@jit
def _sweep(dh, gate_up, dgu, S, dS_down, B, A, dS_part, dW_part, factor, bias, dm_part,
           ldd, ldg, ldo, lds, ldn, ldb, lda, T, F, R, r_gate, r_up, r_down, seed, site, threshold, inverse_keep,
           ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, PIN: tl.constexpr,
           SCALE: tl.constexpr, DROP: tl.constexpr):  # fmt: skip
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
    at = c[:, None] * ldb + k[None, :]
    b_gate = tl.load(B + at, mask=inside_c[:, None] & (k < r_gate)[None, :], other=0.0)  # [BN, RP]
    at += F.to(tl.int64) * ldb + r_gate
    b_up = tl.load(B + at, mask=inside_c[:, None] & (k < r_up)[None, :], other=0.0)
    w_gate = tl.zeros((BN, RP), tl.float32)
    w_up = tl.zeros((BN, RP), tl.float32)
    w_down = tl.zeros((BN, RP), tl.float32)
    dtype = dgu.dtype.element_ty
    if DROP:
        mask_seed = tl.load(seed) + site
        pairs = (block * (BN // 2) + tl.arange(0, BN // 2))[None, :]
        at = k[None, :] * lda + (block * BN + c)[:, None]
        a_down = tl.load(A + at, mask=(k < r_down)[None, :] & inside_c[:, None], other=0.0)  # [BN, RP]
    if SCALE:
        factor += block * BN + c
        bias += block * BN + c
        f_gate = tl.load(factor, mask=inside_c, other=0.0)[None, :]
        f_up = tl.load(factor + F, mask=inside_c, other=0.0)[None, :]
        m_gate = tl.zeros((BM, BN), tl.float32)  # summed over rows once, at the end
        m_up = tl.zeros((BM, BN), tl.float32)
    for i in range(0, ROWS, BM):
        inside_r = (r < T - chunk * ROWS - i)[:, None]
        inside = inside_r & inside_c[None, :]
        s_down = tl.load(dS_down + (r[:, None] * ldn + k[None, :]), mask=inside_r & (k < r_down)[None, :], other=0.0)
        if DROP:  # [BN, BM]: split over all warps, where [BM, BN] would be whole in every warp, and spill
            low = tl.trans(tl.dot(a_down, tl.trans(s_down), input_precision="ieee").to(dtype))
        d = tl.load(dh + (r[:, None] * ldd + c[None, :]), mask=inside, other=0.0).to(tl.float32)
        z_gate = tl.load(gate_up + (r[:, None] * ldg + c[None, :]), mask=inside, other=0.0)
        z_up = tl.load(gate_up + F + (r[:, None] * ldg + c[None, :]), mask=inside, other=0.0)
        g, u = z_gate.to(tl.float32), z_up.to(tl.float32)
        if SCALE:
            z_gate, z_up = pin(z_gate, PIN), pin(z_up, PIN)  # kept as they came: half the registers of g and u
            g = g * f_gate + tl.load(bias, mask=inside_c, other=0.0)[None, :]
            u = u * f_up + tl.load(bias + F, mask=inside_c, other=0.0)[None, :]
        sig = tl.sigmoid(g)
        silu = g * sig
        h = (silu * u).to(dtype)
        if DROP:
            keep = keep_mask(row_key(mask_seed, first + i + r)[:, None], pairs, threshold)
            h = tl.where(keep, h.to(tl.float32) * inverse_keep, 0.0).to(dtype)
            d += tl.where(keep, low.to(tl.float32) * inverse_keep, 0.0)
        h = pin(h, PIN)
        w_down += tl.dot(tl.trans(h), s_down, input_precision="ieee")

        wide_up = d * silu
        if SCALE:
            m_up += wide_up * z_up.to(tl.float32)
            wide_up = wide_up * f_up
        d_up = pin(wide_up.to(dtype), PIN)
        tl.store(dgu + F + (r[:, None] * ldo + c[None, :]), d_up, mask=inside)
        s_up = tl.load(S + r_gate + (r[:, None] * lds + k[None, :]), mask=inside_r & (k < r_up)[None, :], other=0.0)
        w_up += tl.dot(tl.trans(d_up), s_up, input_precision="ieee")
        part = dS_part + (r[:, None] * R + k[None, :])
        p = tl.dot(d_up, b_up, input_precision="ieee")
        tl.store(part + r_gate, p, mask=inside_r & (k < r_up)[None, :])

        wide_gate = d * u * (sig + silu * (1 - sig))
        if SCALE:
            m_gate += wide_gate * z_gate.to(tl.float32)
            wide_gate = wide_gate * f_gate
        d_gate = pin(wide_gate.to(dtype), PIN)
        tl.store(dgu + (r[:, None] * ldo + c[None, :]), d_gate, mask=inside)
        s_gate = tl.load(S + (r[:, None] * lds + k[None, :]), mask=inside_r & (k < r_gate)[None, :], other=0.0)
        w_gate += tl.dot(tl.trans(d_gate), s_gate, input_precision="ieee")
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
    if SCALE:
        dm_part += (chunk * 2 * F + block * BN).to(tl.int64) + c
        tl.store(dm_part, tl.sum(m_gate, 0), mask=inside_c)
        tl.store(dm_part + F, tl.sum(m_up, 0), mask=inside_c)


@jit
def _finish_S(
    part, out, again, ldo, lda, T, R, r, BLOCKS: tl.constexpr, BM: tl.constexpr, RW: tl.constexpr, TWICE: tl.constexpr
):
    """Sum of the column blocks' partial products [BLOCKS, T, R]: first r columns; zeros up to R."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    k = tl.arange(0, RW)[None, :]
    inside = (rows < T) & (k < r)
    total = tl.zeros((BM, RW), tl.float32)
    for b in range(BLOCKS):
        total += tl.load(part + (b * T + rows) * R + k, mask=inside, other=0.0)
    total = total.to(out.dtype.element_ty)
    tl.store(out + rows * ldo + k, total, mask=(rows < T) & (k < R))
    if TWICE:
        tl.store(again + rows * lda + k, total, mask=(rows < T) & (k < R))


@jit
def _swiglu_shrink(gate_up, act, A, part, factor, bias, ldg, lda, ldw, T, F, R, seed, site, threshold, inverse_keep,
                   BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, PIN: tl.constexpr, SCALE: tl.constexpr,
                   DROP: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    rows = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = (block * BN + tl.arange(0, BN))[None, :]
    inside = (rows < T) & (cols < F)
    g = tl.load(gate_up + rows * ldg + cols, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + rows * ldg + F + cols, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        g = g * tl.load(factor + cols, mask=cols < F, other=0.0) + tl.load(bias + cols, mask=cols < F, other=0.0)
        u = u * tl.load(factor + F + cols, mask=cols < F, other=0.0) + tl.load(bias + F + cols, mask=cols < F, other=0.0)
    h = pin((g * tl.sigmoid(g) * u).to(act.dtype.element_ty), PIN)
    tl.store(act + rows * lda + cols, h, mask=inside)
    if DROP:
        pairs = (block * (BN // 2) + tl.arange(0, BN // 2))[None, :]
        key = row_key(tl.load(seed) + site, rows)
        h = dropped_value(h.to(tl.float32), key, pairs, threshold, inverse_keep).to(act.dtype.element_ty)
        h = pin(h, PIN)
    c = block * BN + tl.arange(0, BN)[:, None]
    k = tl.arange(0, RP)[None, :]
    a = tl.load(A + k * ldw + c, mask=(c < F) & (k < R), other=0.0)  # [BN, RP]
    tl.store(part + (block * T + rows) * R + k, tl.dot(h, a, input_precision="ieee"), mask=(rows < T) & (k < R))


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
    scales: tuple[float, float], dB_gate: Tensor, dB_up: Tensor, dA_down: Tensor, config: Config,
    *, accumulate: bool = False, scaling: tuple[Tensor, Tensor] | None = None,
    masked: tuple[Dropped, Tensor] | None = None,
) -> Tensor | None:  # fmt: skip
    """One sweep over the MLP's backward.

    Args:
        dh: [T, f], gradient of the activation. gate_up: [T, 2f]. S: [T, R], the gate|up shrink. dS_down: [T, R_down].
        B: [2f, R] = s blockdiag(B_gate, B_up), as packed. ranks: of gate, up, down, at most MAX_RANK. scales: s of
        gate, up.
        dgu: [T, 2f + R], filled with [dgate | dup | dS].
        dB_gate [f, r], dB_up [f, r], dA_down [r, f]: fp32, written, or added to with `accumulate`.
        config: one of `configs(ranks)`.
        scaling: DoRA's factor and bias [2f], fp32: gate_up is z, what the activation sees is factor * z + bias, dgu is
            filled with z's gradient, and the sum over T of (gradient of what it sees) * z [2f] is returned.
        masked: dropout of the down projection's low-rank input, and its A [>= r_down, f]: dh is then the base weight's
            part alone.
    """
    (T, F), R, (r_gate, r_up, r_down) = dh.shape, S.shape[1], ranks
    BN, BM, warps, stages = config
    RP = max(16, next_power_of_2(max(ranks)))
    blocks = triton.cdiv(F, BN)
    rows = _rows_of_a_chunk(T, blocks, BM, _processors(dh))
    chunks = triton.cdiv(T, rows)
    dS_part = torch.empty(blocks, T, R, dtype=torch.float32, device=dh.device)
    dW_part = torch.empty(chunks, 3, F, RP, dtype=torch.float32, device=dh.device)
    dm_part = None if scaling is None else torch.empty(chunks, 2 * F, dtype=torch.float32, device=dh.device)
    factor, bias = (dW_part, dW_part) if scaling is None else scaling
    dropped, A = (None, B) if masked is None else masked
    _sweep[(blocks, chunks)](
        dh, gate_up, dgu, S, dS_down, B, A, dS_part, dW_part, factor, bias, dW_part if dm_part is None else dm_part,
        dh.stride(0), gate_up.stride(0), dgu.stride(0), S.stride(0), dS_down.stride(0), B.stride(0),
        A.stride(0), T, F, R, *ranks, *masking(dropped, S), ROWS=rows, BM=BM, BN=BN, RP=RP, PIN=pins(dh),
        SCALE=scaling is not None, DROP=dropped is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    out = dgu[:, 2 * F :]
    _finish_S[(triton.cdiv(T, 32),)](
        dS_part,
        out,
        out,
        out.stride(0),
        0,
        T,
        R,
        r_gate + r_up,
        BLOCKS=blocks,
        BM=32,
        RW=next_power_of_2(R),
        TWICE=False,
    )
    _finish_dW[(triton.cdiv(F, 64), 3)](
        dW_part, dB_gate, dB_up, dA_down, *scales, F, r_gate, r_up, r_down, CHUNKS=chunks, BN=64, RP=RP, ADD=accumulate
    )
    return None if dm_part is None else dm_part.sum(0)


def configs(ranks: tuple[int, int, int]) -> list[Config]:
    """Tile shapes worth timing for these ranks; none where the sweep does not fit.

    ptxas for sm_90 spills at most 8 bytes without flags, at most 24 with DoRA's factors and none with dropout, but for the first of
    each rank (up to 328 bytes, with both flags more). The last of each fits a multiprocessor twice, or with 512 threads:
    more loads in flight from smaller tiles.
    """
    wide = max(16, next_power_of_2(max(ranks)))
    return {
        16: [(256, 32, 16, 2), (128, 32, 8, 3), (256, 16, 8, 3), (128, 16, 8, 3)],
        32: [(128, 32, 16, 2), (128, 16, 16, 3)],
    }.get(wide, [])


def swiglu_shrink(
    gate_up: Tensor, act: Tensor, A: Tensor, scaling: tuple[Tensor, Tensor] | None = None,
    dropped: Dropped | None = None,
) -> Tensor:  # fmt: skip
    """Fills act [T, f + R] with [h | S], h = silu(gate) * up, S = drop(h) A^T; returns S [T, R], contiguous. A: [R, f].

    scaling: factor and bias [2f], fp32, applied to gate_up before."""
    T, F, R = gate_up.shape[0], gate_up.shape[1] // 2, A.shape[0]
    BM, BN, RP = 32, 256, next_power_of_2(R)
    blocks = triton.cdiv(F, BN)
    part = torch.empty(blocks, T, R, dtype=torch.float32, device=act.device)
    factor, bias = (part, part) if scaling is None else scaling
    _swiglu_shrink[(blocks, triton.cdiv(T, BM))](
        gate_up, act, A, part, factor, bias, gate_up.stride(0), act.stride(0), A.stride(0), T, F, R,
        *masking(dropped, part), BM=BM, BN=BN, RP=RP, PIN=pins(act), SCALE=scaling is not None,
        DROP=dropped is not None, num_warps=8,
    )  # fmt: skip
    S = torch.empty(T, R, dtype=act.dtype, device=act.device)
    wide = act[:, F:]
    _finish_S[(triton.cdiv(T, 32),)](
        part, S, wide, S.stride(0), wide.stride(0), T, R, R, BLOCKS=blocks, BM=32, RW=RP, TWICE=True
    )
    return S


@functools.cache
def _rows_of_a_chunk(T: int, blocks: int, BM: int, processors: int) -> int:
    """Rows a program takes: as many as still fill whole waves (within 4 %) of one program a multiprocessor."""

    def filled(chunks: int) -> float:
        waves = blocks * chunks / processors
        return waves / float(triton.cdiv(blocks * chunks, processors))

    most = max(1, min(T // (4 * BM), 16 * processors // blocks))
    good = [n for n in range(1, most + 1) if filled(n) >= 0.96]
    chunks = good[0] if good else max(range(1, most + 1), key=filled)
    return int(triton.cdiv(triton.cdiv(T, chunks), BM)) * BM


def _processors(t: Tensor) -> int:
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 1
