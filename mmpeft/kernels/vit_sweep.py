"""A ViT block's MLP in two sweeps: GELU with the next shrink; GELU's gradient with every rank-wide product of [T, f] tensors.

Unfused, fc1's output gradient is written, read for dS, read for dB, and the rebuilt activation is written and read for
fc2's dA: seven passes over a [T, f] tensor. The sweep makes three (reads dg and u, writes du):

    du     = dg gelu'(u)                        written, into the wide buffer [du | dS]
    dS     = du (sB)                            fc1: partial over column blocks
    dB     = s du^T S                           fc1: partial over row chunks, in registers meanwhile
    dA^T   = gelu(u)^T dS_2                     fc2: the same; the activation never reaches memory

Either side may have no adapter: its products are left out. Layout of programs and partial sums: `sweep`.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.kernels import tuning
from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.dropout_kernels import pin, pins
from mmpeft.kernels.layernorm import KINDS, _phi, gelu_backward
from mmpeft.kernels.sweep import MAX_RANK, Config, _finish_S, _processors, _put, _rows_of_a_chunk
from mmpeft.kernels.tritonlib import jit, tl, triton


@dataclass
class Up:
    """fc1's side. S: [T, R], the shrink of the forward. B: [f, R] = s B, as packed. dB: fp32, f * rank numbers."""

    S: Tensor
    B: Tensor
    dB: Tensor
    rank: int
    scale: float


@dataclass
class Down:
    """fc2's side. dS: [T, >= rank]. dA: fp32, rank * f numbers."""

    dS: Tensor
    dA: Tensor
    rank: int


@jit
def _sweep(dg, u, du, S, B, dS_down, dS_part, dW_part, ldd, ldu, ldo, lds, ldb, ldn, T, F, R, r_up, r_down,
           KIND: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, RP: tl.constexpr, PIN: tl.constexpr):  # fmt: skip
    block, chunk = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BN)
    k = tl.arange(0, RP)
    r = tl.arange(0, BM)
    inside_c = c < F - block * BN
    first = (chunk * ROWS).to(tl.int64)
    dg += first * ldd + block * BN
    u += first * ldu + block * BN
    du += first * ldo + block * BN
    dtype = du.dtype.element_ty
    if UP:
        S += first * lds
        dS_part += (block.to(tl.int64) * T + first) * R
        at = (block * BN + c).to(tl.int64)[:, None] * ldb + k[None, :]
        b = tl.load(B + at, mask=inside_c[:, None] & (k < r_up)[None, :], other=0.0)  # [BN, RP]
        w_up = tl.zeros((BN, RP), tl.float32)
    if DOWN:
        dS_down += first * ldn
        w_down = tl.zeros((BN, RP), tl.float32)
    for i in range(0, ROWS, BM):
        inside_r = (r < T - chunk * ROWS - i)[:, None]
        inside = inside_r & inside_c[None, :]
        d = tl.load(dg + (r[:, None] * ldd + c[None, :]), mask=inside, other=0.0).to(tl.float32)
        v = tl.load(u + (r[:, None] * ldu + c[None, :]), mask=inside, other=0.0).to(tl.float32)
        phi, slope = _phi(v, KIND)
        if DOWN:
            h = pin((v * phi).to(dtype), PIN)
            s_down = tl.load(
                dS_down + (r[:, None] * ldn + k[None, :]), mask=inside_r & (k < r_down)[None, :], other=0.0
            )
            w_down += tl.dot(tl.trans(h), s_down, input_precision="ieee")
            dS_down += BM * ldn
        y = pin((d * (phi + v * slope)).to(dtype), PIN)
        tl.store(du + (r[:, None] * ldo + c[None, :]), y, mask=inside)
        if UP:
            s = tl.load(S + (r[:, None] * lds + k[None, :]), mask=inside_r & (k < r_up)[None, :], other=0.0)
            w_up += tl.dot(tl.trans(y), s, input_precision="ieee")
            p = tl.dot(y, b, input_precision="ieee")
            tl.store(dS_part + (r[:, None] * R + k[None, :]), p, mask=inside_r & (k < r_up)[None, :])
            S += BM * lds
            dS_part += BM * R
        dg += BM * ldd
        u += BM * ldu
        du += BM * ldo
    out = dW_part + (chunk * 2 * F + block * BN).to(tl.int64) * RP + (c[:, None] * RP + k[None, :])
    if UP:
        tl.store(out, w_up, mask=inside_c[:, None])
    if DOWN:
        tl.store(out + F * RP, w_down, mask=inside_c[:, None])


@jit
def _finish_dW(part, dB, dA, scale, F, r_up, r_down, SIDE: tl.constexpr, CHUNKS: tl.constexpr, BN: tl.constexpr,
               RP: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    side = tl.program_id(1) + SIDE
    cols = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    k = tl.arange(0, RP)[None, :]
    total = tl.zeros((BN, RP), tl.float32)
    for c in range(CHUNKS):
        total += tl.load(part + ((c * 2 + side) * F + cols) * RP + k, mask=cols < F, other=0.0)
    if side == 0:
        _put(dB + cols * r_up + k, total * scale, (cols < F) & (k < r_up), ADD)
    else:
        _put(dA + k * F + cols, total, (cols < F) & (k < r_down), ADD)


def mlp_backward(
    dg: Tensor, u: Tensor, wide: Tensor, kind: str, up: Up | None, down: Down | None, config: Config,
    *, accumulate: bool = False,
) -> None:  # fmt: skip
    """One sweep over the MLP's backward, without dropout.

    Args:
        dg: [T, f], gradient of the activation. u: [T, f], what GELU saw. wide: [T, f + R], filled with [du | dS]
            ([T, f] with du where `up` is None). kind: of GELU, as `fused_ops.gelu`.
        up, down: where the products go: written, or added to with `accumulate`. None: no adapter on that side.
        config: one of `configs(rank of up, rank of down)`.
    """
    (T, F), (BN, BM, warps, stages) = u.shape, config
    R = 0 if up is None else up.S.shape[1]
    r_up, r_down = 0 if up is None else up.rank, 0 if down is None else down.rank
    RP = max(16, next_power_of_2(max(r_up, r_down, 1)))
    blocks = triton.cdiv(F, BN)
    rows = _rows_of_a_chunk(T, blocks, BM, _processors(u))
    chunks = triton.cdiv(T, rows)
    dS_part = torch.empty(blocks if up else 0, T, R, dtype=torch.float32, device=u.device)
    dW_part = torch.empty(chunks if up or down else 0, 2, F, RP, dtype=torch.float32, device=u.device)
    S, B = (u, u) if up is None else (up.S, up.B)
    dS_down = u if down is None else down.dS
    _sweep[(blocks, chunks)](
        dg, u, wide, S, B, dS_down, dS_part, dW_part, dg.stride(0), u.stride(0), wide.stride(0), S.stride(0), B.stride(0),
        dS_down.stride(0), T, F, R, r_up, r_down, KIND=KINDS[kind], UP=up is not None, DOWN=down is not None, ROWS=rows,
        BM=BM, BN=BN, RP=RP, PIN=pins(u), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if up is not None:
        out = wide[:, F:]
        _finish_S[(triton.cdiv(T, 32),)](
            dS_part, out, out, out.stride(0), 0, T, R, r_up, BLOCKS=blocks, BM=32, RW=next_power_of_2(R), TWICE=False
        )
    if up is not None or down is not None:
        dB, dA = u if up is None else up.dB, u if down is None else down.dA
        _finish_dW[(triton.cdiv(F, 64), 1 if up is None or down is None else 2)](
            dW_part, dB, dA, 1.0 if up is None else up.scale, F, r_up, r_down, SIDE=int(up is None), CHUNKS=chunks,
            BN=64, RP=RP, ADD=accumulate,
        )  # fmt: skip


def configs(r_up: int, r_down: int) -> list[Config]:
    """Tile shapes worth timing for these ranks (0: no adapter); none where the sweep does not fit. None of them spills
    (ptxas, sm_90, exact GELU)."""
    wide = max(16, next_power_of_2(max(r_up, r_down, 1)))
    return {
        16: [(256, 32, 16, 2), (128, 32, 8, 3), (256, 16, 8, 3), (128, 16, 8, 3), (128, 64, 8, 2)],
        32: [(128, 32, 16, 2), (128, 32, 8, 2), (128, 16, 8, 3)],
    }.get(wide, [])


@jit
def _gelu_shrink(u, act, A, part, ldu, lda, ldw, T, F, R, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 RP: tl.constexpr, PIN: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    rows = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    cols = (block * BN + tl.arange(0, BN))[None, :]
    inside = (rows < T) & (cols < F)
    v = tl.load(u + rows * ldu + cols, mask=inside, other=0.0).to(tl.float32)
    phi, _ = _phi(v, KIND)
    h = pin((v * phi).to(act.dtype.element_ty), PIN)
    tl.store(act + rows * lda + cols, h, mask=inside)
    c = block * BN + tl.arange(0, BN)[:, None]
    k = tl.arange(0, RP)[None, :]
    a = tl.load(A + k * ldw + c, mask=(c < F) & (k < R), other=0.0)  # [BN, RP]
    tl.store(part + (block * T + rows) * R + k, tl.dot(h, a, input_precision="ieee"), mask=(rows < T) & (k < R))


def gelu_shrink(u: Tensor, act: Tensor, A: Tensor, kind: str) -> Tensor:
    """Fills act [T, f + R] with [g | S], g = gelu(u), S = g A^T; returns S [T, R], contiguous. A: [R, f], R <= MAX_RANK."""
    (T, F), R = u.shape, A.shape[0]
    BM, BN, RP = 32, 256, next_power_of_2(R)
    blocks = triton.cdiv(F, BN)
    part = torch.empty(blocks, T, R, dtype=torch.float32, device=u.device)
    _gelu_shrink[(blocks, triton.cdiv(T, BM))](
        u, act, A, part, u.stride(0), act.stride(0), A.stride(0), T, F, R,
        KIND=KINDS[kind], BM=BM, BN=BN, RP=RP, PIN=pins(act), num_warps=8,
    )  # fmt: skip
    S, wide = torch.empty(T, R, dtype=act.dtype, device=u.device), act[:, F:]
    _finish_S[(triton.cdiv(T, 32),)](
        part, S, wide, S.stride(0), wide.stride(0), T, R, R, BLOCKS=blocks, BM=32, RW=RP, TWICE=True
    )
    return S


def shrinks(rank: int) -> bool:
    """Whether `gelu_shrink` takes this (padded) rank."""
    return rank <= MAX_RANK


@functools.cache
def plan(T: int, F: int, r_up: int, r_down: int, kind: str, dtype: torch.dtype, device: torch.device) -> Config | None:
    """The fastest tile shape for `mlp_backward` at this size and device, or None where the unfused kernels are faster.

    Timed once a size and device, on random data (`tuning`). Off the GPU (in the interpreter) the first shape is taken.
    """
    choices = configs(r_up, r_down)
    if not choices or device.type != "cuda":
        return choices[0] if choices else None
    if dtype not in (torch.bfloat16, torch.float16):  # tiles of twice the bytes do not fit shared memory
        return None

    @functools.cache  # made only if something is timed
    def data() -> tuple[Tensor, Tensor, Tensor, Up | None, Down | None]:
        make = functools.partial(torch.randn, dtype=dtype, device=device)
        R_up, R_down = (16 * -(-r // 16) for r in (r_up, r_down))
        up = Up(make(T, R_up), make(F, R_up), torch.empty(F * r_up, device=device), r_up, 1.0) if r_up else None
        down = Down(make(T, R_down), torch.empty(F * r_down, device=device), r_down) if r_down else None
        return make(T, F), make(T, F), make(T, F + R_up), up, down

    def unfused() -> None:
        dg, u, wide, up, down = data()
        gelu_backward(dg, u, wide[:, :F], dg, kind)
        if up is not None:
            torch.mm(wide[:, :F], up.B, out=wide[:, F:])
            torch.mm(wide[:, :F].mT, up.S, out_dtype=torch.float32)
        if down is not None:
            torch.mm(down.dS.mT, dg, out_dtype=torch.float32)

    def swept(config: Config) -> None:
        dg, u, wide, up, down = data()
        mlp_backward(dg, u, wide, kind, up, down, config)

    names = {str(c): c for c in choices}
    candidates: dict[str, Callable[[], None]] = {"unfused": unfused}
    candidates |= {name: functools.partial(swept, c) for name, c in names.items()}
    best = tuning.choose("vit_mlp_backward", (T, F, r_up, r_down, kind, dtype), candidates, device, otherwise="unfused")
    return names.get(best)
