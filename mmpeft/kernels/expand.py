"""What reads a product [z | S] of a forward that keeps nothing, and adds S B^T to z on the way.

At batch 1 a decoder block is a row of launches of a few microseconds each, so a low-rank term with a launch of its own
costs as much as the linear it belongs to. Here it has none: one product gives z and S (`product`), and whatever reads z next
(RoPE, SwiGLU, the residual's add and norm) adds S B^T in fp32 before its own work. DoRA's factors and biases are applied there too.

Each function runs the Triton kernel or the same maths in plain torch.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.kernels import reference
from mmpeft.kernels.dispatch import next_power_of_2, use_triton
from mmpeft.kernels.product import Product, padded_rank, rank_term, sample_tile
from mmpeft.kernels.tritonlib import jit, tl, triton
from mmpeft.kernels.tuning import launch_shape


@jit
def _add_rmsnorm(x, z, B, factor, bias, w, x_out, n, ldz, ldb, ldn, H, eps, index, count, stride, S,
                 FACTOR: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
                 GROUPED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    k = tl.arange(0, RP)
    inside = cols < H
    rank = R
    if GROUPED:
        adapter = tl.load(index + row // S)
        B += tl.where(adapter < count, adapter, 0) * stride
        rank = tl.where(adapter < count, R, 0)
    d = tl.load(z + row * ldz + cols, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, R, RP):
        here = first + k < rank
        s = tl.load(z + row * ldz + H + first + k, mask=here, other=0.0).to(tl.float32)
        b = tl.load(B + cols[:, None] * ldb + first + k[None, :], mask=inside[:, None] & here[None, :], other=0.0)
        d += tl.sum(b.to(tl.float32) * s[None, :], 1)
    if FACTOR:
        d = d * tl.load(factor + cols, mask=inside, other=0.0)
    if BIAS:
        d += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(x + row * H + cols, mask=inside, other=0.0)
    v = (v.to(tl.float32) + d).to(v.dtype)  # the stream is kept in the model's dtype
    tl.store(x_out + row * H + cols, v, mask=inside)
    wide = v.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    y = (wide * rstd).to(v.dtype).to(tl.float32) * tl.load(w + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(n + row * ldn + cols, y.to(v.dtype), mask=inside)


@jit
def _add_rmsnorm_tile(x, z, B, factor, bias, w, x_out, n, ldz, ldb, ldn, T, H, eps, index, count, stride, S,
                      FACTOR: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
                      BM: tl.constexpr, GROUPED: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    rank = R
    if GROUPED:  # the tile's rows are one sample's, up to T
        sample, rows, T = sample_tile(S, BM)
        adapter = tl.load(index + sample)
        B += tl.where(adapter < count, adapter, 0) * stride
        rank = tl.where(adapter < count, R, 0)
    here = cols < H
    inside = (rows < T)[:, None] & here[None, :]
    d = tl.load(z + rows[:, None] * ldz + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    for first in range(0, R, RP):
        d += rank_term(z + H, ldz, first, rank - first, B, ldb, rows, cols, T, H, RP)
    if FACTOR:
        d = d * tl.load(factor + cols, mask=here, other=0.0)[None, :]
    if BIAS:
        d += tl.load(bias + cols, mask=here, other=0.0).to(tl.float32)[None, :]
    v = tl.load(x + rows[:, None] * H + cols[None, :], mask=inside, other=0.0)
    v = (v.to(tl.float32) + d).to(v.dtype)
    tl.store(x_out + rows[:, None] * H + cols[None, :], v, mask=inside)
    wide = v.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / H + eps)
    gain = tl.load(w + cols, mask=here, other=0.0).to(tl.float32)
    y = (wide * rstd[:, None]).to(v.dtype).to(tl.float32) * gain[None, :]
    tl.store(n + rows[:, None] * ldn + cols[None, :], y.to(v.dtype), mask=inside)


# (rows a program, warps): one row a program fills the device at batch 1, sixteen read B sixteen times less often
NORM_SHAPES = [(1, 8), (1, 4), (1, 16), (16, 8), (16, 16)]


def add_rmsnorm(x: Tensor, branch: Product, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + y, rmsnorm of it times weight): each [T, h]; y is the branch's output."""
    if not use_triton(x):
        return reference.add_rmsnorm(x, branch.finished().to(x.dtype), weight, eps)
    (T, H), z = x.shape, branch.z
    total, n = torch.empty_like(x), torch.empty_like(x)
    R, block, more, flags = z.shape[1] - H, next_power_of_2(H), branch.adapter_arguments(), branch.flags()
    strides = (z.stride(0), branch.B.stride(-2), n.stride(0))

    def run(shape: tuple[int, int]) -> None:
        rows, warps = shape
        tensors = (x, z, branch.B, *branch.channel_arguments(), weight, total, n)
        if rows == 1:
            _add_rmsnorm[(T,)](*tensors, *strides, H, eps, *more, R=R, RP=16, BLOCK=block, num_warps=warps, **flags)
        else:
            _add_rmsnorm_tile[(branch.tiles(rows),)](
                *tensors, *strides, T, H, eps, *more, R=R, RP=16, BLOCK=block, BM=rows, num_warps=warps, **flags
            )

    run(launch_shape("add_rmsnorm_expand", (T, H, R, branch.run_length, x.dtype), NORM_SHAPES, run, x))
    return total, n


@jit
def _rope(z, B, factor, bias, cos, sin, ldz, ldb, T, OUT, period, q_first, k_first, v_first, q_rank, k_rank, v_rank,
          index, count, stride, S,
          HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, BM: tl.constexpr, RP: tl.constexpr,
          FACTOR: tl.constexpr, BIAS: tl.constexpr, GROUPED: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, HP)
    first = tl.where(head < HQ, q_first, tl.where(head < HQ + HK, k_first, v_first))
    r = tl.where(head < HQ, q_rank, tl.where(head < HQ + HK, k_rank, v_rank))
    if GROUPED:  # the tile's rows are one sample's, up to T; B's columns begin with each member
        sample, rows, T = sample_tile(S, BM)
        adapter = tl.load(index + sample)
        B += tl.where(adapter < count, adapter, 0) * stride - first
        r = tl.where(adapter < count, r, 0)
    lower = head * 2 * HALF + d
    upper = lower + HALF
    half = d < HALF
    inside = (rows < T)[:, None] & half[None, :]
    at = rows[:, None] * ldz
    x1 = tl.load(z + at + lower[None, :], mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(z + at + upper[None, :], mask=inside, other=0.0).to(tl.float32)
    x1 += rank_term(z + OUT, ldz, first, r, B, ldb, rows, lower, T, OUT, RP)
    x2 += rank_term(z + OUT, ldz, first, r, B, ldb, rows, upper, T, OUT, RP)
    if FACTOR:
        x1 = x1 * tl.load(factor + lower, mask=half, other=0.0)[None, :]
        x2 = x2 * tl.load(factor + upper, mask=half, other=0.0)[None, :]
    if BIAS:
        x1 += tl.load(bias + lower, mask=half, other=0.0).to(tl.float32)[None, :]
        x2 += tl.load(bias + upper, mask=half, other=0.0).to(tl.float32)[None, :]
    turns = inside & (head < HQ + HK)  # v is not rotated
    place = (rows % period)[:, None] * HALF + d[None, :]
    c = tl.load(cos + place, mask=turns, other=1.0)
    s = tl.load(sin + place, mask=turns, other=0.0)
    tl.store(z + at + lower[None, :], (x1 * c - x2 * s).to(z.dtype.element_ty), mask=inside)
    tl.store(z + at + upper[None, :], (x2 * c + x1 * s).to(z.dtype.element_ty), mask=inside)


ROPE_SHAPES = [(16, 2), (16, 1), (16, 4), (64, 4)]  # (rows a program, warps)


def rope(qkv: Product, heads: int, kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """[q | k | v] [T, (Hq + 2 Hk) d] of the group's product, q and k rotated: in z's own memory. cos, sin: [S, d/2] or
    [T, d/2], fp32."""
    z, out = qkv.z, qkv.out
    T, half = z.shape[0], cos.shape[1]
    if not use_triton(z):
        y, turned = qkv.finished().to(z.dtype), 2 * half * (heads + kv_heads)
        tables = (t.repeat(T // t.shape[0], 1) for t in (cos, sin))
        z[:, :turned] = reference.rope(y[:, :turned].reshape(T, -1, 2 * half), *tables).flatten(1)
        z[:, turned:out] = y[:, turned:]
        return z[:, :out]
    ranks = qkv.ranks
    firsts = [0, ranks[0], ranks[0] + ranks[1]]

    def run(shape: tuple[int, int], z: Tensor) -> None:
        rows, warps = shape
        _rope[(qkv.tiles(rows), heads + 2 * kv_heads)](
            z, qkv.B, *qkv.channel_arguments(), cos, sin, z.stride(0), qkv.B.stride(-2), T, out, cos.shape[0], *firsts, *ranks,
            *qkv.adapter_arguments(), HQ=heads, HK=kv_heads, HALF=half, HP=max(16, next_power_of_2(half)), BM=rows,
            RP=padded_rank(ranks), num_warps=warps, **qkv.flags(),
        )  # fmt: skip

    key = (T, heads, kv_heads, half, tuple(ranks), qkv.run_length, z.dtype)
    run(launch_shape("rope_expand", key, ROPE_SHAPES, lambda shape: run(shape, torch.empty_like(z)), z), z)
    return z[:, :out]


@jit
def _swiglu(z, B, factor, bias, act, ldz, ldb, lda, T, F, u_first, g_rank, u_rank, index, count, stride, S,
            BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr,
            GROUPED: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    here = cols < F
    up = B + F.to(tl.int64) * ldb
    if GROUPED:  # the tile's rows are one sample's, up to T
        sample, rows, T = sample_tile(S, BM)
        adapter = tl.load(index + sample)
        B += tl.where(adapter < count, adapter, 0) * stride
        up = B + F.to(tl.int64) * ldb - u_first
        g_rank = tl.where(adapter < count, g_rank, 0)
        u_rank = tl.where(adapter < count, u_rank, 0)
    inside = (rows < T)[:, None] & here[None, :]
    at = rows[:, None] * ldz + cols[None, :]
    g = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(z + at + F, mask=inside, other=0.0).to(tl.float32)
    g += rank_term(z + 2 * F, ldz, 0, g_rank, B, ldb, rows, cols, T, F, RP)
    u += rank_term(z + 2 * F, ldz, u_first, u_rank, up, ldb, rows, cols, T, F, RP)
    if FACTOR:
        g = g * tl.load(factor + cols, mask=here, other=0.0)[None, :]
        u = u * tl.load(factor + F + cols, mask=here, other=0.0)[None, :]
    if BIAS:
        g += tl.load(bias + cols, mask=here, other=0.0).to(tl.float32)[None, :]
        u += tl.load(bias + F + cols, mask=here, other=0.0).to(tl.float32)[None, :]
    h = (g * tl.sigmoid(g) * u).to(act.dtype.element_ty)
    tl.store(act + rows[:, None] * lda + cols[None, :], h, mask=inside)


SWIGLU_SHAPES = [(128, 4), (64, 2), (64, 4), (128, 8), (256, 8)]  # (columns a program, warps)


def swiglu(gate_up: Product) -> Tensor:
    """silu(gate) * up [T, f] of the group's product."""
    z, f = gate_up.z, gate_up.out // 2
    if not use_triton(z):
        gate, up = gate_up.finished().to(z.dtype).split(f, 1)
        h: Tensor = F.silu(gate) * up
        return h
    act, (g_rank, u_rank) = z.new_empty(z.shape[0], f), gate_up.ranks

    def run(shape: tuple[int, int]) -> None:
        cols, warps = shape
        _swiglu[(gate_up.tiles(16), triton.cdiv(f, cols))](
            z, gate_up.B, *gate_up.channel_arguments(), act, z.stride(0), gate_up.B.stride(-2), act.stride(0), z.shape[0], f,
            g_rank, g_rank, u_rank, *gate_up.adapter_arguments(), BM=16, BN=cols, RP=padded_rank(gate_up.ranks),
            num_warps=warps, **gate_up.flags(),
        )  # fmt: skip

    key = (z.shape[0], f, g_rank, u_rank, gate_up.run_length, z.dtype)
    run(launch_shape("swiglu_expand", key, SWIGLU_SHAPES, run, z))
    return act
