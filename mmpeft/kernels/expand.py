"""What reads a product [z | S] of a forward that keeps nothing, and adds S B^T to z on the way.

At batch 1 a decoder block is a row of launches of a few microseconds each, so a low-rank term with a launch of its own
costs as much as the linear it belongs to. Here it has none: a group's rows [W ; A] lie one under the other
(`packed.PackedGroup.backward_weight`), so one product gives z = x W^T and S = x A^T, and whatever reads z next
(RoPE, SwiGLU, the residual's add and norm) adds S B^T in fp32 before its own work. DoRA's factors and biases are applied there too.

With an adapter of its own for every sample (`Product.by_sample`), S comes of one grouped shrink a group, which writes into the
same columns, and a reader's tile holds tokens of one sample, so that it finds its one B in the stack by an index on the
device. A group's B then has no blocks: each output row keeps its own member's columns.

Each function runs the Triton kernel or the same maths in plain torch.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.kernels import grouped, reference, tuning
from mmpeft.kernels.dispatch import next_power_of_2, use_triton
from mmpeft.kernels.group import Group
from mmpeft.kernels.grouped import Stack
from mmpeft.kernels.packed import LEADING_MULTIPLE, round_up
from mmpeft.kernels.tritonlib import jit, tl, triton


class Product(NamedTuple):
    """A group's output that is not finished: y = factor * (z + S B^T) + bias.

    z: [T, out + R], S in its last R columns. B: [out, R], times s, block-diagonal over members. ranks: of the members.
    factor, bias: [out] or None; fp32, a bias alone in the weights' dtype.
    chosen: int64 [N], the adapter of each of N equal runs of rows; then B is [n, out, r], each row its own member's, of the
    members' rows `outs`; n or more is the base.
    """

    z: Tensor
    B: Tensor
    ranks: list[int]
    factor: Tensor | None
    bias: Tensor | None
    chosen: Tensor | None = None
    outs: Sequence[int] = ()

    @staticmethod
    def of(x: Tensor, group: Group) -> Product:
        """The group's product with x [T, in]: one GEMM."""
        p = group.packed
        p.load()
        factor, bias = (None, p.bias) if group.scaling is None else group.scaling
        return Product(torch.mm(x, p.backward_weight.mT), p.B, p.ranks, factor, bias)

    @staticmethod
    def by_sample(x: Tensor, group: Group, stack: Stack, index: Tensor) -> Product:
        """The group's product with x [T, in], each of `index`'s [N] runs of T / N rows under its own adapter: one GEMM
        and one shrink. The weights are the group's, its own adapter is left out."""
        p, out, R = group.packed, group.packed.out_features, sum(stack.ranks)
        p.load()
        z = x.new_empty(x.shape[0], round_up(out + R, LEADING_MULTIPLE))[:, : out + R]
        with grouped.beside(x) as other:
            if R:
                with other:
                    grouped.shrink(x, stack.A, index, z[:, out:])
            torch.mm(x, p.W.mT, out=z[:, :out])
        return Product(z, stack.B, stack.ranks, None, p.bias, index, p.outs)

    @property
    def out(self) -> int:
        """Columns of y."""
        return self.B.shape[-2]

    def finished(self) -> Tensor:
        """y [T, out], of z's dtype or wider: the reference."""
        out = self.out
        wide = torch.promote_types(self.z.dtype, torch.float32)
        y = self.z[:, :out].to(wide)
        if self.chosen is None:
            y = y + self.z[:, out:].to(wide) @ self.B.to(wide).mT
        else:
            y = y + self._by_sample(self.z[:, out:].to(wide), self.chosen)
        y = y if self.factor is None else y * self.factor
        return y if self.bias is None else y + self.bias

    def _by_sample(self, S: Tensor, index: Tensor) -> Tensor:
        """S B^T [T, out], each sample by its own B; of the base zeros."""
        count = self.B.shape[0]
        B = self.B.to(S.dtype)[index.clamp_max(count - 1)] * (index < count)[:, None, None]  # [N, out, r]
        S = S.view(len(index), S.shape[0] // len(index), S.shape[1])
        terms = [
            s @ b[..., :r].mT
            for s, b, r in zip(S.split(self.ranks, 2), B.split(list(self.outs), 1), self.ranks, strict=True)
        ]
        return torch.cat(terms, 2).flatten(0, 1)


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
def _sample_tile(S, BM: tl.constexpr):
    """(sample, its rows of this program's tile, the first row after the sample): no tile holds two samples of S rows."""
    tiles = tl.cdiv(S, BM)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    return sample, sample * S + tl.program_id(0) % tiles * BM + tl.arange(0, BM), (sample + 1) * S


@jit
def _add_rmsnorm_tile(x, z, B, factor, bias, w, x_out, n, ldz, ldb, ldn, T, H, eps, index, count, stride, S,
                      FACTOR: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
                      BM: tl.constexpr, GROUPED: tl.constexpr):  # fmt: skip
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    rank = R
    if GROUPED:  # the tile's rows are one sample's, up to T
        sample, rows, T = _sample_tile(S, BM)
        adapter = tl.load(index + sample)
        B += tl.where(adapter < count, adapter, 0) * stride
        rank = tl.where(adapter < count, R, 0)
    here = cols < H
    inside = (rows < T)[:, None] & here[None, :]
    d = tl.load(z + rows[:, None] * ldz + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    for first in range(0, R, RP):
        d += _rank_term(z + H, ldz, first, rank - first, B, ldb, rows, cols, T, H, RP)
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
    R, block, more = z.shape[1] - H, next_power_of_2(H), _adapters(branch)
    flags = {"FACTOR": branch.factor is not None, "BIAS": branch.bias is not None, "GROUPED": branch.chosen is not None}

    def run(shape: tuple[int, int]) -> None:
        rows, warps = shape
        tensors = (x, z, branch.B, *_places(branch), weight, total, n, z.stride(0), branch.B.stride(-2), n.stride(0))
        if rows == 1:
            _add_rmsnorm[(T,)](*tensors, H, eps, *more, R=R, RP=16, BLOCK=block, num_warps=warps, **flags)
        else:
            _add_rmsnorm_tile[(_tiles(branch, rows),)](
                *tensors, T, H, eps, *more, R=R, RP=16, BLOCK=block, BM=rows, num_warps=warps, **flags
            )

    run(_shape("add_rmsnorm_expand", (T, H, R, more[3], x.dtype), NORM_SHAPES, run, x))
    return total, n


_known: dict[tuple[object, ...], tuple[int, ...]] = {}


def _shape(
    op: str, key: tuple[object, ...], shapes: Sequence[tuple[int, ...]], run: Callable[[Any], object], like: Tensor, *,
    proof: tuple[tuple[int, ...], Callable[[Any], Tensor]] | None = None,
) -> Any:  # fmt: skip
    """The launch shape that is fastest on this device, timed the first time; off the GPU the first. `run` may be repeated.
    proof: see `tuning.choose`."""
    if not like.is_cuda:
        return shapes[0]
    asked = (op, like.device, *key)
    if asked not in _known:
        named = {str(s): s for s in shapes}
        candidates = {name: functools.partial(run, s) for name, s in named.items()}
        timer, otherwise = tuning.device_milliseconds, str(shapes[0] if proof is None else proof[0])
        proved = None if proof is None else (str(proof[0]), lambda name, of=proof[1]: [of(named[name])])
        best = tuning.choose(op, key, candidates, like.device, otherwise=otherwise, timer=timer, proof=proved)
        if torch.cuda.is_current_stream_capturing():
            return named[best]  # not timed, so not kept
        _known[asked] = named[best]
    return _known[asked]


@jit
def _rank_term(z, lds, first, r, B, ldb, rows, cols, T, end, RP: tl.constexpr):
    """S B^T at rows and columns of the output, from a member's rank columns [first, first + r)."""
    k = tl.arange(0, RP)
    s = tl.load(z + rows[:, None] * lds + first + k[None, :], mask=(rows < T)[:, None] & (k < r)[None, :], other=0.0)
    b = tl.load(B + cols[None, :] * ldb + first + k[:, None], mask=(cols < end)[None, :] & (k < r)[:, None], other=0.0)
    return tl.dot(s, b, input_precision="ieee")


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
        sample, rows, T = _sample_tile(S, BM)
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
    x1 += _rank_term(z + OUT, ldz, first, r, B, ldb, rows, lower, T, OUT, RP)
    x2 += _rank_term(z + OUT, ldz, first, r, B, ldb, rows, upper, T, OUT, RP)
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
    more = _adapters(qkv)

    def run(shape: tuple[int, int], z: Tensor) -> None:
        rows, warps = shape
        _rope[(_tiles(qkv, rows), heads + 2 * kv_heads)](
            z, qkv.B, *_places(qkv), cos, sin, z.stride(0), qkv.B.stride(-2), T, out, cos.shape[0], *firsts, *ranks, *more,
            HQ=heads, HK=kv_heads, HALF=half, HP=max(16, next_power_of_2(half)), BM=rows, RP=_padded(ranks),
            FACTOR=qkv.factor is not None, BIAS=qkv.bias is not None, GROUPED=qkv.chosen is not None, num_warps=warps,
        )  # fmt: skip

    key = (T, heads, kv_heads, half, tuple(ranks), more[3], z.dtype)
    run(_shape("rope_expand", key, ROPE_SHAPES, lambda shape: run(shape, torch.empty_like(z)), z), z)
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
        sample, rows, T = _sample_tile(S, BM)
        adapter = tl.load(index + sample)
        B += tl.where(adapter < count, adapter, 0) * stride
        up = B + F.to(tl.int64) * ldb - u_first
        g_rank = tl.where(adapter < count, g_rank, 0)
        u_rank = tl.where(adapter < count, u_rank, 0)
    inside = (rows < T)[:, None] & here[None, :]
    at = rows[:, None] * ldz + cols[None, :]
    g = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(z + at + F, mask=inside, other=0.0).to(tl.float32)
    g += _rank_term(z + 2 * F, ldz, 0, g_rank, B, ldb, rows, cols, T, F, RP)
    u += _rank_term(z + 2 * F, ldz, u_first, u_rank, up, ldb, rows, cols, T, F, RP)
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
    act, (g_rank, u_rank), more = z.new_empty(z.shape[0], f), gate_up.ranks, _adapters(gate_up)

    def run(shape: tuple[int, int]) -> None:
        cols, warps = shape
        _swiglu[(_tiles(gate_up, 16), triton.cdiv(f, cols))](
            z, gate_up.B, *_places(gate_up), act, z.stride(0), gate_up.B.stride(-2), act.stride(0), z.shape[0], f, g_rank,
            g_rank, u_rank, *more, BM=16, BN=cols, RP=_padded([g_rank, u_rank]), FACTOR=gate_up.factor is not None,
            BIAS=gate_up.bias is not None, GROUPED=gate_up.chosen is not None, num_warps=warps,
        )  # fmt: skip

    run(_shape("swiglu_expand", (z.shape[0], f, g_rank, u_rank, more[3], z.dtype), SWIGLU_SHAPES, run, z))
    return act


def _places(product: Product) -> tuple[Tensor, Tensor]:
    """factor and bias as the kernels take them: anything where there is none."""
    return tuple(product.z if t is None else t for t in (product.factor, product.bias))  # type: ignore[return-value]


def _adapters(product: Product) -> tuple[Tensor, int, int, int]:
    """(index, adapters, elements between their B, tokens a sample) as the kernels take them; anything without an index."""
    if product.chosen is None:
        return product.z, 1, 1, 1
    return product.chosen, product.B.shape[0], product.B.stride(0), product.z.shape[0] // len(product.chosen)


def _tiles(product: Product, rows: int) -> int:
    """Tiles of so many rows; with an index none holds two samples."""
    if product.chosen is None:
        return int(triton.cdiv(product.z.shape[0], rows))
    samples = len(product.chosen)
    return samples * int(triton.cdiv(product.z.shape[0] // samples, rows))


def _padded(ranks: list[int]) -> int:
    """Rank columns of a tile: the tensor cores take at least 16."""
    return max(16, next_power_of_2(max(1, *ranks)))
