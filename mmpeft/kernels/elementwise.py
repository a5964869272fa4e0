"""Memory-bound kernels of a Llama-type block: each reads its inputs once and writes its outputs once.

    add_rmsnorm             residual add and RMSNorm in one pass, into a padded buffer ready for a K-extended GEMM
    rmsnorm_backward        norm backward and the residual gradient's add in one pass; the norm's output again, dropped
                            where the adapters read it so
    rope                    rotary embedding of q and k inside a packed qkv, and its inverse for the gradients
    swiglu_backward         the activation's gradient, and its output again, so the forward need not keep it (the
                            forward is in `sweep`, with the next shrink)

All statistics and products are fp32 inside. Buffers may have a leading dimension larger than their width.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.dropout import Dropped
from mmpeft.kernels.dropout_kernels import dropped_value, masking, row_key
from mmpeft.kernels.tritonlib import jit, tl, triton


@jit
def _add_rmsnorm(x, delta, w, x_out, n, rstd_out, factor, bias, ldd, ldn, H, eps,
                 ADD: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    v = tl.load(x + row * H + cols, mask=inside, other=0.0)
    if ADD:
        d = tl.load(delta + row * ldd + cols, mask=inside, other=0.0)
        if SCALE:
            d = d.to(tl.float32) * tl.load(factor + cols, mask=inside, other=0.0)
            d = (d + tl.load(bias + cols, mask=inside, other=0.0)).to(v.dtype)
        v = (v.to(tl.float32) + d.to(tl.float32)).to(v.dtype)  # the stream is kept in the model's dtype
        tl.store(x_out + row * H + cols, v, mask=inside)
    wide = v.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    tl.store(rstd_out + row, rstd)
    y = (wide * rstd).to(v.dtype).to(tl.float32) * tl.load(w + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(n + row * ldn + cols, y.to(v.dtype), mask=inside)


def add_rmsnorm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, n: Tensor, scaling: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Fills n [T, h] (any leading dimension) with rmsnorm(x + delta) * weight; returns (x + delta, rstd [T] fp32).

    x [T, h] contiguous; where delta is None, x itself is returned. scaling: factor and bias [h], fp32, applied to delta.
    """
    T, H = x.shape
    total = x if delta is None else torch.empty_like(x)
    rstd = torch.empty(T, dtype=torch.float32, device=x.device)
    block = next_power_of_2(H)
    factor, bias = (rstd, rstd) if scaling is None else scaling
    _add_rmsnorm[(T,)](
        x, x if delta is None else delta, weight, total, n, rstd, factor, bias,
        0 if delta is None else delta.stride(0), n.stride(0), H, eps,
        ADD=delta is not None, SCALE=scaling is not None, BLOCK=block, num_warps=_row_warps(block),
    )  # fmt: skip
    return total, rstd


@jit
def _rmsnorm_backward(dn, x, rstd, w, g, out, n, ldd, ldg, ldo, ldn, H, seed, site, threshold, inverse_keep,
                      ADD: tl.constexpr, REBUILD: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    r = tl.load(rstd + row)
    xhat = tl.load(x + row * H + cols, mask=inside, other=0.0).to(tl.float32) * r
    gain = tl.load(w + cols, mask=inside, other=0.0).to(tl.float32)
    if REBUILD:
        normed = xhat.to(x.dtype.element_ty).to(tl.float32) * gain
        if DROP:
            normed = normed.to(n.dtype.element_ty).to(tl.float32)
            key = row_key(tl.load(seed) + site, row)
            normed = dropped_value(normed, key, tl.arange(0, BLOCK // 2), threshold, inverse_keep)
        tl.store(n + row * ldn + cols, normed.to(n.dtype.element_ty), mask=inside)
    wd = tl.load(dn + row * ldd + cols, mask=inside, other=0.0).to(tl.float32) * gain
    dx = r * (wd - xhat * (tl.sum(wd * xhat, 0) / H))
    if ADD:
        dx += tl.load(g + row * ldg + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * ldo + cols, dx.to(out.dtype.element_ty), mask=inside)


def rmsnorm_backward(
    dn: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, g: Tensor | None, out: Tensor, n: Tensor | None = None,
    dropped: Dropped | None = None,
) -> None:  # fmt: skip
    """Fills out [T, h] with x's gradient through the norm plus the residual's own g; n with the norm's output, dropped."""
    T, H = x.shape
    block = next_power_of_2(H)
    _rmsnorm_backward[(T,)](
        dn, x, rstd, weight, dn if g is None else g, out, out if n is None else n,
        dn.stride(0), 0 if g is None else g.stride(0), out.stride(0), 0 if n is None else n.stride(0), H,
        *masking(dropped, rstd), ADD=g is not None, REBUILD=n is not None, DROP=dropped is not None, BLOCK=block,
        num_warps=_row_warps(block),
    )  # fmt: skip


@jit
def _rope(q, k, v, qb, qs, qh, kb, ks, kh, vb, vs, vh, out, ldo, cos, sin, factor, bias, S, period,
          HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr,
          INVERSE: tl.constexpr, COPY_V: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    b, s = t // S, t % S
    h = tl.arange(0, BH)[:, None]
    d = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + (t % period) * HALF + d)
    sn = tl.load(sin + (t % period) * HALF + d)
    if INVERSE:
        sn = -sn
    is_q = h < HQ
    inside = (h < HQ + HK) & (d < HALF)
    source_q = q + b * qb + s * qs + h * qh + d
    source_k = k + b * kb + s * ks + (h - HQ) * kh + d
    x1 = tl.load(source_q, mask=is_q & (d < HALF), other=0.0).to(tl.float32)
    x1 += tl.load(source_k, mask=inside & (h >= HQ), other=0.0).to(tl.float32)
    x2 = tl.load(source_q + HALF, mask=is_q & (d < HALF), other=0.0).to(tl.float32)
    x2 += tl.load(source_k + HALF, mask=inside & (h >= HQ), other=0.0).to(tl.float32)
    channel = h * (2 * HALF) + d
    if SCALE:
        x1 = x1 * tl.load(factor + channel, mask=inside, other=0.0) + tl.load(bias + channel, mask=inside, other=0.0)
        x2 = x2 * tl.load(factor + channel + HALF, mask=inside, other=0.0)
        x2 += tl.load(bias + channel + HALF, mask=inside, other=0.0)
    target = out + t * ldo + channel
    tl.store(target, (x1 * c - x2 * sn).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (x2 * c + x1 * sn).to(out.dtype.element_ty), mask=inside)
    if COPY_V:
        is_v = (h < HK) & (d < HALF)
        source_v = v + b * vb + s * vs + h * vh + d
        channel = (HQ + HK + h) * (2 * HALF) + d
        v1 = tl.load(source_v, mask=is_v)
        v2 = tl.load(source_v + HALF, mask=is_v)
        if SCALE:
            v1 = v1.to(tl.float32) * tl.load(factor + channel, mask=is_v) + tl.load(bias + channel, mask=is_v)
            v2 = v2.to(tl.float32) * tl.load(factor + channel + HALF, mask=is_v)
            v2 += tl.load(bias + channel + HALF, mask=is_v)
        target = out + t * ldo + channel
        tl.store(target, v1.to(out.dtype.element_ty), mask=is_v)
        tl.store(target + HALF, v2.to(out.dtype.element_ty), mask=is_v)


def rope(
    q: Tensor, k: Tensor, v: Tensor | None, out: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False,
    scaling: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Rotates q [B, S, Hq, d], k [B, S, Hk, d] into out [B * S, >= (Hq + 2 Hk) d] and copies v; unit stride along d.

    scaling: factor and bias [(Hq + 2 Hk) d], fp32, applied to q, k and v before.

    cos, sin: fp32 [S, d/2] or [B * S, d/2]. `out` may be where q and k lie. `inverse` turns the other way: the
    backward.
    """
    B, S, HQ, D = q.shape
    HK = k.shape[2]
    w = k if v is None else v
    factor, bias = (cos, cos) if scaling is None else scaling
    _rope[(B * S,)](
        q, k, w, *q.stride()[:3], *k.stride()[:3], *w.stride()[:3], out, out.stride(0), cos, sin, factor, bias, S,
        cos.shape[0], HQ=HQ, HK=HK, HALF=D // 2, BH=next_power_of_2(HQ + HK), INVERSE=inverse, COPY_V=v is not None,
        SCALE=scaling is not None, num_warps=4,
    )  # fmt: skip


@jit
def _swiglu_backward(dh, gate_up, dgu, h, factor, bias, ldd, ldg, ldo, ldh, F,
                     SCALE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < F
    d = tl.load(dh + row * ldd + cols, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate_up + row * ldg + cols, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + row * ldg + F + cols, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        g = g * tl.load(factor + cols, mask=inside, other=0.0) + tl.load(bias + cols, mask=inside, other=0.0)
        u = u * tl.load(factor + F + cols, mask=inside, other=0.0) + tl.load(bias + F + cols, mask=inside, other=0.0)
    sig = tl.sigmoid(g)
    silu = g * sig
    tl.store(dgu + row * ldo + cols, (d * u * (sig + silu * (1 - sig))).to(dgu.dtype.element_ty), mask=inside)
    tl.store(dgu + row * ldo + F + cols, (d * silu).to(dgu.dtype.element_ty), mask=inside)
    tl.store(h + row * ldh + cols, (silu * u).to(h.dtype.element_ty), mask=inside)


def swiglu_backward(
    dh: Tensor, gate_up: Tensor, dgu: Tensor, h: Tensor, scaling: tuple[Tensor, Tensor] | None = None
) -> None:
    """Fills dgu [T, 2f] with the gradient of gate_up and h [T, f] with the forward's output; h may be dh itself.

    scaling: factor and bias [2f], fp32, applied to gate_up before; dgu is then the gradient of the scaled ones.
    """
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    block = min(1024, next_power_of_2(F))
    factor, bias = (dh, dh) if scaling is None else scaling
    _swiglu_backward[(T, triton.cdiv(F, block))](
        dh, gate_up, dgu, h, factor, bias, dh.stride(0), gate_up.stride(0), dgu.stride(0), h.stride(0), F,
        SCALE=scaling is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def _row_warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 4096 else 16
