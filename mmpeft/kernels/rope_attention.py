"""RoPE, the low-rank terms of q, k and v, and causal attention in one launch, for a forward that keeps nothing and is short.

At batch 1 a decoder block is a row of launches of a few microseconds each. RoPE, attention and what attention's library
does besides were three of them; here a program owns a tile of queries of one head of one sample, finishes q, and finishes each
tile of keys and values as it comes:

    q, k  = rope(factor (z + S B^T) + bias)     rounded to z's dtype, as the separate launches leave them
    v     = factor (z + S B^T) + bias
    o     = softmax(scale q k^T, causal) v      running maximum and sum, in fp32

Keys are finished once for every tile of queries that sees them and once for every head that shares them: for a few hundred
tokens that is cheaper than a pass through memory. Which way is taken is timed once a size and device.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmpeft.kernels import attention, expand
from mmpeft.kernels.dispatch import next_power_of_2, use_triton
from mmpeft.kernels.llama_block import Layout
from mmpeft.kernels.product import Product, padded_rank
from mmpeft.kernels.tritonlib import jit, tl, triton
from mmpeft.kernels.tuning import launch_shape

MAX_TOKENS = 1024  # of a sample; beyond, the work on keys is no longer small
SEPARATE = (0, 0, 0)  # RoPE and attention as launches of their own
# (queries, keys, warps)
SHAPES = [(32, 64, 4), SEPARATE, (16, 64, 4), (32, 64, 8), (16, 32, 4), (16, 128, 8), (32, 128, 8), (64, 64, 8)]
# of heads wider than 64, where more keys at a time do not fit the registers
WIDE_SHAPES = [(16, 32, 8), SEPARATE, (32, 32, 8), (64, 32, 8), (16, 32, 4)]


@jit
def _factors(B, ldb, cols, first, r, inside, RP: tl.constexpr):
    """B^T [RP, cols] of a member's rank columns [first, first + r)."""
    k = tl.arange(0, RP)
    return tl.load(B + cols[None, :] * ldb + first + k[:, None], mask=inside[None, :] & (k < r)[:, None], other=0.0)


@jit
def _finished(z, ldz, rows, here, cols, inside, s, b, factor, bias, FACTOR: tl.constexpr, BIAS: tl.constexpr):
    """factor (z + S B^T) + bias at rows and columns, fp32."""
    y = tl.load(z + rows[:, None] * ldz + cols[None, :], mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
    y += tl.dot(s, b, input_precision="ieee")
    if FACTOR:
        y = y * tl.load(factor + cols, mask=inside, other=0.0)[None, :]
    if BIAS:
        y += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    return y


@jit
def _shrunk(z, ldz, rows, here, OUT, first, r, RP: tl.constexpr):
    """S [rows, RP] of a member."""
    k = tl.arange(0, RP)
    at = z + rows[:, None] * ldz + OUT + first + k[None, :]
    return tl.load(at, mask=here[:, None] & (k < r)[None, :], other=0.0)


@jit
def _turns(cos, sin, rows, here, period, half, HALF: tl.constexpr, d):
    place = (rows % period)[:, None] * HALF + d[None, :]
    inside = here[:, None] & half[None, :]
    return tl.load(cos + place, mask=inside, other=1.0), tl.load(sin + place, mask=inside, other=0.0)


@jit
def _rope_attention(z, B, factor, bias, cos, sin, o, ldz, ldb, ldo, OUT, S, period, scale, q_first, k_first, v_first,
                    q_rank, k_rank, v_rank, index, count, stride, RUN,
                    HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, RP: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr,
                    GROUPED: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(S, BM)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the last have the most to do, and begin first
    head = tl.program_id(1)
    group = head // (HQ // HK)
    start = sample * S
    dtype = z.dtype.element_ty
    Bq, Bk, Bv = B, B, B
    if GROUPED:  # B's columns begin with each member
        adapter = tl.load(index + start // RUN)
        B += tl.where(adapter < count, adapter, 0) * stride
        Bq, Bk, Bv = B - q_first, B - k_first, B - v_first
        q_rank = tl.where(adapter < count, q_rank, 0)
        k_rank = tl.where(adapter < count, k_rank, 0)
        v_rank = tl.where(adapter < count, v_rank, 0)

    d = tl.arange(0, HP)
    e = tl.arange(0, DP)
    half = d < HALF
    whole = e < 2 * HALF
    q_cols = head * 2 * HALF + d
    k_cols = (HQ + group) * 2 * HALF + d
    v_cols = (HQ + HK + group) * 2 * HALF + e

    mine = tile * BM + tl.arange(0, BM)
    at, asked = start + mine, mine < S
    sq = _shrunk(z, ldz, at, asked, OUT, q_first, q_rank, RP)
    a1 = _factors(Bq, ldb, q_cols, q_first, q_rank, half, RP)
    a2 = _factors(Bq, ldb, q_cols + HALF, q_first, q_rank, half, RP)
    u1 = _finished(z, ldz, at, asked, q_cols, half, sq, a1, factor, bias, FACTOR, BIAS)
    u2 = _finished(z, ldz, at, asked, q_cols + HALF, half, sq, a2, factor, bias, FACTOR, BIAS)
    cq, nq = _turns(cos, sin, at, asked, period, half, HALF, d)
    q1, q2 = (u1 * cq - u2 * nq).to(dtype), (u2 * cq + u1 * nq).to(dtype)

    b1 = _factors(Bk, ldb, k_cols, k_first, k_rank, half, RP)
    b2 = _factors(Bk, ldb, k_cols + HALF, k_first, k_rank, half, RP)
    bv = _factors(Bv, ldb, v_cols, v_first, v_rank, whole, RP)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    first = 0
    while first < tl.minimum((tile + 1) * BM, S):
        theirs = first + tl.arange(0, BN)
        rows, here = start + theirs, theirs < S
        s = _shrunk(z, ldz, rows, here, OUT, k_first, k_rank, RP)
        x1 = _finished(z, ldz, rows, here, k_cols, half, s, b1, factor, bias, FACTOR, BIAS)
        x2 = _finished(z, ldz, rows, here, k_cols + HALF, half, s, b2, factor, bias, FACTOR, BIAS)
        c, n = _turns(cos, sin, rows, here, period, half, HALF, d)
        k1, k2 = (x1 * c - x2 * n).to(dtype), (x2 * c + x1 * n).to(dtype)
        qk = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        qk = tl.dot(q2, tl.trans(k2), qk, input_precision="ieee") * scale
        qk = tl.where((theirs[None, :] <= mine[:, None]) & here[None, :], qk, float("-inf"))
        above = tl.maximum(top, tl.max(qk, 1))
        p = tl.exp2(qk - above[:, None])
        shrink = tl.exp2(top - above)
        total = total * shrink + tl.sum(p, 1)
        sv = _shrunk(z, ldz, rows, here, OUT, v_first, v_rank, RP)
        v = _finished(z, ldz, rows, here, v_cols, whole, sv, bv, factor, bias, FACTOR, BIAS).to(dtype)
        acc = tl.dot(p.to(dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = above
        first += BN
    to = o + at[:, None] * ldo + (head * 2 * HALF + e)[None, :]
    tl.store(to, (acc / total[:, None]).to(dtype), mask=asked[:, None] & whole[None, :])


def attend(qkv: Product, layout: Layout) -> Tensor:
    """The group's product [z | S] of q, k and v to attention's output o [T, Hq d]; z is used up."""
    (_, S), z, half = layout.shape, qkv.z, layout.tables[0].shape[1]
    parted = qkv.chosen is not None and qkv.run_length % S != 0  # one sample's tokens under several adapters
    if not use_triton(z) or layout.documents is not None or S > MAX_TOKENS or parted:
        return _separate(qkv, layout)
    shapes = SHAPES if half <= 32 else WIDE_SHAPES
    extras = (qkv.factor is not None, qkv.bias is not None)
    key = (*layout.shape, layout.heads, layout.kv_heads, half, tuple(qkv.ranks), qkv.run_length, *extras, z.dtype)

    def timed(shape: tuple[int, ...]) -> None:
        _run(qkv if shape != SEPARATE else qkv._replace(z=torch.empty_like(z)), layout, shape)

    def result(shape: tuple[int, ...]) -> Tensor:
        return _run(qkv._replace(z=z.clone()), layout, shape)

    return _run(qkv, layout, launch_shape("rope_attention", key, shapes, timed, z, proof=(SEPARATE, result)))


def _run(qkv: Product, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    if shape == SEPARATE:
        return _separate(qkv, layout)
    (samples, S), z, (cos, sin), (BM, BN, warps) = layout.shape, qkv.z, layout.tables, shape
    half, (q_rank, k_rank, v_rank) = cos.shape[1], qkv.ranks
    o = z.new_empty(z.shape[0], layout.heads * 2 * half)
    _rope_attention[(samples * triton.cdiv(S, BM), layout.heads)](
        z, qkv.B, *qkv.channel_arguments(), cos, sin, o, z.stride(0), qkv.B.stride(-2), o.stride(0), qkv.out, S, cos.shape[0],
        layout.scale * math.log2(math.e), 0, q_rank, q_rank + k_rank, q_rank, k_rank, v_rank, *qkv.adapter_arguments(),
        HQ=layout.heads, HK=layout.kv_heads, HALF=half, HP=max(16, next_power_of_2(half)),
        DP=max(16, next_power_of_2(2 * half)), BM=BM, BN=BN, RP=padded_rank(qkv.ranks), num_warps=warps,
        num_stages=2, **qkv.flags(),
    )  # fmt: skip
    return o


def _separate(qkv: Product, layout: Layout) -> Tensor:
    turned = expand.rope(qkv, layout.heads, layout.kv_heads, *layout.tables)
    o, _ = attention.forward(*layout.split(turned), layout.scale, documents=layout.documents, keep=False)
    return o.reshape(turned.shape[0], -1)
