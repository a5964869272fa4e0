"""Attention over few tokens without a mask (a ViT's 197), forward and backward, on views and into views.

The general kernels are made for long sequences: their backward is three launches (delta, the products, fp32 dq to half
precision), and it writes dq, dk, dv where it likes, so that each is copied once more. Here a program owns one head of
one sample:

    forward    a tile of queries against the keys, a tile at a time: running maximum and sum
    backward   a tile of queries held (q, do, delta = rowsum(do o), dq in registers), the keys a tile at a time:
               P = exp2(q k^T - lse), dv = P^T do, dS = P (do v^T - delta), dk = dS^T q, dq += dS k

Where one tile of queries covers the sequence, dv and dk of a tile of keys are whole when they are made. Else the next
tile of queries reads what the one before wrote and adds to it (one rounding more): half the registers, so two programs
share a multiprocessor, and one multiplies while the other takes exponentials. Programs share nothing, no atomics: the
result does not change from run to run.

Tensors are [B, S, H, D] whose tokens are rows of one stride and whose heads lie side by side: views of qkv
[B, S, 3, H, D], or of columns of a wide buffer; others are copied. P and dS are rounded to the tensors' dtype for the
products, everything is summed in fp32.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import tuning
from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.tritonlib import jit, tl, triton

Grads = tuple[Tensor, Tensor, Tensor]
MAX_TOKENS = 320


class Tile(NamedTuple):
    """Shape of a kernel: queries and keys a tile, warps, stages; the registers a thread is held to, if any."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@jit
def _forward(q, k, v, o, lse, ldq, ldk, ldv, ldo, scale, H, S, KEEP: tl.constexpr, KEYS: tl.constexpr,
             D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    tiles = tl.cdiv(S, BM)
    pair = tl.program_id(0) // tiles
    first, col = (pair // H).to(tl.int64) * S, (pair % H) * D
    q += first * ldq + col
    k += first * ldk + col
    v += first * ldv + col
    o += first * ldo + col
    rows = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    c = tl.arange(0, DP)[None, :]
    inside = (rows[:, None] < S) & (c < D)
    qt = tl.load(q + (rows[:, None] * ldq + c), mask=inside, other=0.0)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    n = tl.arange(0, BN)
    for j in range(0, KEYS, BN):
        there = (n[:, None] < S - j) & (c < D)
        kt = tl.load(k + (j * ldk + (n[:, None] * ldk + c)), mask=there, other=0.0)
        vt = tl.load(v + (j * ldv + (n[:, None] * ldv + c)), mask=there, other=0.0)
        s = tl.dot(qt, tl.trans(kt), input_precision="ieee")
        s = tl.where(n[None, :] < S - j, s, float("-inf"))
        above = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - above[:, None])
        shrink = tl.exp2(top - above)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(qt.dtype), vt, acc * shrink[:, None], input_precision="ieee")
        top = above
    tl.store(o + (rows[:, None] * ldo + c), (acc / total[:, None]).to(qt.dtype), mask=inside)
    if KEEP:
        tl.store(lse + pair.to(tl.int64) * S + rows, top + tl.log2(total), mask=rows < S)


@jit
def _turned(a, b, TURN: tl.constexpr):
    """a^T b for a [queries, keys], b [queries, D]; TURN: as (b^T a)^T, for fewer keys than a product has rows (64)."""
    if TURN:
        return tl.trans(tl.dot(tl.trans(b), a, input_precision="ieee"))
    else:
        return tl.dot(tl.trans(a), b, input_precision="ieee")


@jit
def _put(to, x, there, i, ADD: tl.constexpr):
    """Stores a tile, or adds it to what earlier queries (i > 0) left."""
    if ADD:
        if i > 0:
            x += tl.load(to, mask=there, other=0.0).to(tl.float32)
    tl.store(to, x.to(to.dtype.element_ty), mask=there)


@jit
def _backward(do, q, k, v, o, lse, dq, dk, dv, lddo, ldq, ldk, ldv, ldo, lddq, lddk, lddv, scale, scale2, H, S,
              QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr, TURN: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0)
    first, col = (pair // H).to(tl.int64) * S, (pair % H) * D
    do += first * lddo + col
    q += first * ldq + col
    k += first * ldk + col
    v += first * ldv + col
    o += first * ldo + col
    dq += first * lddq + col
    dk += first * lddk + col
    dv += first * lddv + col
    lse += pair.to(tl.int64) * S
    dtype = q.dtype.element_ty
    c = tl.arange(0, DP)[None, :]
    n = tl.arange(0, BN)
    for i in range(0, QUERIES, BM):
        rows = i + tl.arange(0, BM)
        inside = (rows[:, None] < S) & (c < D)
        dot = tl.load(do + (rows[:, None] * lddo + c), mask=inside, other=0.0)
        ot = tl.load(o + (rows[:, None] * ldo + c), mask=inside, other=0.0)
        delta = tl.sum(dot.to(tl.float32) * ot.to(tl.float32), 1)
        qt = tl.load(q + (rows[:, None] * ldq + c), mask=inside, other=0.0)
        top = tl.load(lse + rows, mask=rows < S, other=float("inf"))  # absent queries: P = exp2(-inf)
        acc = tl.zeros((BM, DP), tl.float32)
        for j in range(0, KEYS, BN):
            there = (n[:, None] < S - j) & (c < D)
            kt = tl.load(k + (j * ldk + (n[:, None] * ldk + c)), mask=there, other=0.0)
            vt = tl.load(v + (j * ldv + (n[:, None] * ldv + c)), mask=there, other=0.0)
            s = tl.dot(qt, tl.trans(kt), input_precision="ieee")
            p = tl.exp2(s * scale2 - top[:, None])
            p = tl.where(n[None, :] < S - j, p, 0.0)  # absent keys score 0, which may be far above lse
            to = dv + (j * lddv + (n[:, None] * lddv + c))
            _put(to, _turned(p.to(dtype), dot, TURN), there, i, QUERIES > BM)
            dp = tl.dot(dot, tl.trans(vt), input_precision="ieee")
            ds = (p * (dp - delta[:, None])).to(dtype)
            to = dk + (j * lddk + (n[:, None] * lddk + c))
            _put(to, _turned(ds, qt, TURN) * scale, there, i, QUERIES > BM)
            acc = tl.dot(ds, kt, acc, input_precision="ieee")
        tl.store(dq + (rows[:, None] * lddq + c), (acc * scale).to(dtype), mask=inside)
        if QUERIES > BM:
            tl.debug_barrier()  # other threads may read what this one wrote of dk and dv


def fits(S: int, D: int, dtype: torch.dtype) -> bool:
    """Whether there are kernels for S tokens and heads of size D, as many of keys as of queries."""
    return dtype in (torch.bfloat16, torch.float16) and 0 < S <= MAX_TOKENS and bool(backward_tiles(S, D))


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, keep: bool = True, tile: Tile | None = None
) -> tuple[Tensor, Tensor | None]:
    """q, k, v [B, S, H, D] -> (o [B, S, H, D] contiguous, base-2 log-sum-exp of the scores [B, H, S] fp32 if `keep`).

    scale > 0. tile: one of `forward_tiles`; None: the fastest here.
    """
    B, S, H, D = q.shape
    BM, BN, warps, stages, registers = tile or forward_plan(B, S, H, D, q.dtype, q.device)
    q, k, v = (t if _in_rows(t) else t.contiguous() for t in (q, k, v))
    o = torch.empty(B, S, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, S, dtype=torch.float32, device=q.device) if keep else None
    _forward[(B * H * triton.cdiv(S, BM),)](
        q, k, v, o, o if lse is None else lse, q.stride(1), k.stride(1),
        v.stride(1), o.stride(1), scale / math.log(2), H, S, KEEP=keep, KEYS=_round_up(S, BN), D=D, DP=_padded(D), BM=BM,
        BN=BN, num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, *, out: Grads | None = None,
    tile: Tile | None = None,
) -> Grads:  # fmt: skip
    """Gradients of q, k, v, each [B, S, H, D]: written into `out`, views of any buffer, or new.

    lse: as `forward` gave it. tile: one of `backward_tiles`; None: the fastest here.

    Raises:
        ConfigError: `out` of another shape or dtype than q.
    """
    B, S, H, D = q.shape
    BM, BN, warps, stages, registers = tile or backward_plan(B, S, H, D, q.dtype, q.device)
    do, q, k, v, o = (t if _in_rows(t) else t.contiguous() for t in (do, q, k, v, o))
    if out is None:
        dq, dk, dv = torch.empty(3, B, S, H, D, dtype=q.dtype, device=q.device).unbind(0)
        out = dq, dk, dv
    if any(d.shape != q.shape or d.dtype != q.dtype for d in out):
        raise ConfigError(f"out: {[(*d.shape, d.dtype) for d in out]}; expected three of {(*q.shape, q.dtype)}")
    dq, dk, dv = (d if _in_rows(d) else torch.empty_like(o) for d in out)
    _backward[(B * H,)](
        do, q, k, v, o, lse, dq, dk, dv, do.stride(1), q.stride(1), k.stride(1), v.stride(1), o.stride(1),
        dq.stride(1), dk.stride(1), dv.stride(1), scale, scale / math.log(2), H, S, QUERIES=_round_up(S, BM),
        KEYS=_round_up(S, BN), D=D, DP=_padded(D), BM=BM, BN=BN, TURN=BN < 64, num_warps=warps, num_stages=stages,
        maxnreg=registers,
    )  # fmt: skip
    for d, made in zip(out, (dq, dk, dv), strict=True):
        if d is not made:
            d.copy_(made)
    return out


def _in_rows(t: Tensor) -> bool:
    """Whether t [B, S, H, D] lies in rows of one stride, heads side by side."""
    (_, S, _, D), (batch, token, head, one) = t.shape, t.stride()
    return one == 1 and head == D and batch == S * token


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _padded(D: int) -> int:
    return max(16, next_power_of_2(D))


# By padded head size. Warp-group products throughout, but for tiles of 32 keys under heads of 64. None spills (ptxas,
# sm_90), but for 24 or 32 bytes in the one that is held to 128 registers.
_WIDE = [Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)]
_FORWARDS = {128: _WIDE} | dict.fromkeys(
    (16, 32, 64), [*_WIDE, Tile(128, 64, 4, 2), Tile(64, 128, 4, 2), Tile(128, 128, 8, 1)]
)
_FEW = [Tile(256, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(128, 32, 4, 2)]
_BACKWARDS = {
    16: _FEW, 32: _FEW, 64: [*_FEW, Tile(128, 32, 8, 2, 128), Tile(64, 32, 4, 2)],
    128: [Tile(128, 32, 8, 2), Tile(128, 64, 8, 2), Tile(64, 32, 4, 2)],
}  # fmt: skip


def forward_tiles(S: int, D: int) -> list[Tile]:
    """Shapes of the forward worth timing for S tokens and heads of D; none where D is too large."""
    return [t for t in _FORWARDS.get(_padded(D), []) if t.queries < 2 * max(S, 64)]


def backward_tiles(S: int, D: int) -> list[Tile]:
    """Likewise of the backward: at most three tiles of queries (each adds a rounding to dk and dv), of 256 one."""
    tiles = [t for t in _BACKWARDS.get(_padded(D), []) if t.queries < 2 * max(S, 64)]
    return [t for t in tiles if S <= t.queries * (1 if t.queries == 256 else 3)]


@functools.cache
def forward_plan(B: int, S: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The fastest shape of the forward at this size, timed once a device; off the GPU the first."""

    @functools.cache  # made only if something is timed
    def data() -> list[Tensor]:
        return list(torch.randn(B, S, 3, H, D, dtype=dtype, device=device).unbind(2))

    def run(tile: Tile) -> None:
        q, k, v = data()
        forward(q, k, v, D**-0.5, tile=tile)

    return _fastest("short_attention_forward", (B, S, H, D, dtype), forward_tiles(S, D), run, device)


@functools.cache
def backward_plan(B: int, S: int, H: int, D: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Likewise of the backward."""

    @functools.cache
    def data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Grads]:
        q, k, v = torch.randn(B, S, 3, H, D, dtype=dtype, device=device).unbind(2)
        o, lse = forward(q, k, v, D**-0.5, tile=forward_tiles(S, D)[0])
        assert lse is not None
        dq, dk, dv = torch.empty(B, S, 3, H, D, dtype=dtype, device=device).unbind(2)
        return q, k, v, o, lse, (dq, dk, dv)

    def run(tile: Tile) -> None:
        q, k, v, o, lse, out = data()
        backward(o, q, k, v, o, lse, D**-0.5, out=out, tile=tile)

    return _fastest("short_attention_backward", (B, S, H, D, dtype), backward_tiles(S, D), run, device)


def _fastest(
    op: str, key: tuple[object, ...], tiles: list[Tile], run: Callable[[Tile], None], device: torch.device
) -> Tile:
    if device.type != "cuda":
        return tiles[0]
    names = {" ".join(map(str, t)): t for t in tiles}
    candidates = {name: functools.partial(run, t) for name, t in names.items()}
    timer = tuning.device_milliseconds
    return names[tuning.choose(op, key, candidates, device, otherwise=next(iter(names)), timer=timer)]
