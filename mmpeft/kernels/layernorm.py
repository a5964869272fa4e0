"""Memory-bound kernels of a ViT-type block: each reads its inputs once and writes its outputs once.

    add_layernorm           residual add and LayerNorm in one pass, into a padded buffer ready for a K-extended GEMM
    layernorm_backward      norm backward and the residual gradient's add in one pass, and the norm's output again
    gelu, gelu_backward     exact, tanh or quick GELU; the backward gives the output again, so the forward need not keep it

All statistics and products are fp32 inside. Buffers may have a leading dimension larger than their width.
"""

# Triton kernels are typed by their launch, not by annotations.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.kernels.dispatch import next_power_of_2
from mmpeft.kernels.tritonlib import jit, tl, triton


@jit
def _add_layernorm(x, delta, w, bias, x_out, n, mean_out, rstd_out, ldx, ldd, ldn, H, eps,
                   ADD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    v = tl.load(x + row * ldx + cols, mask=inside, other=0.0)
    if ADD:
        d = tl.load(delta + row * ldd + cols, mask=inside, other=0.0)
        v = (v.to(tl.float32) + d.to(tl.float32)).to(v.dtype)
        tl.store(x_out + row * H + cols, v, mask=inside)
    wide = v.to(tl.float32)
    mean = tl.sum(wide, 0) / H
    centred = tl.where(inside, wide - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / H + eps)
    tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)
    y = centred * rstd * tl.load(w + cols, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(n + row * ldn + cols, y.to(v.dtype), mask=inside)


def add_layernorm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills n [T, h] with layernorm(x + delta) * weight + bias; returns (x + delta, mean [T], rstd [T]) fp32."""
    T, H = x.shape
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=x.device) for _ in range(2))
    block = next_power_of_2(H)
    _add_layernorm[(T,)](
        x, x if delta is None else delta, weight, bias, total, n, mean, rstd, x.stride(0),
        0 if delta is None else delta.stride(0), n.stride(0), H, eps,
        ADD=delta is not None, BLOCK=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return total, mean, rstd


@jit
def _layernorm_backward(dn, x, mean, rstd, w, bias, g, out, n, ldd, ldx, ldg, ldo, ldn, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    r = tl.load(rstd + row)
    v = tl.load(x + row * ldx + cols, mask=inside, other=0.0).to(tl.float32)
    xhat = tl.where(inside, (v - tl.load(mean + row)) * r, 0.0)
    gain = tl.load(w + cols, mask=inside, other=0.0).to(tl.float32)
    normed = xhat * gain + tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(n + row * ldn + cols, normed.to(n.dtype.element_ty), mask=inside)
    wd = tl.load(dn + row * ldd + cols, mask=inside, other=0.0).to(tl.float32) * gain
    dx = r * (wd - tl.sum(wd, 0) / H - xhat * (tl.sum(wd * xhat, 0) / H))
    dx += tl.load(g + row * ldg + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * ldo + cols, dx.to(out.dtype.element_ty), mask=inside)


def layernorm_backward(
    dn: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, g: Tensor, out: Tensor, n: Tensor
) -> None:
    """Fills out [T, h] with x's gradient through the norm plus the residual's own g, and n [T, h] with its output."""
    T, H = x.shape
    block = next_power_of_2(H)
    _layernorm_backward[(T,)](
        dn, x, mean, rstd, weight, bias, g, out, n,
        dn.stride(0), x.stride(0), g.stride(0), out.stride(0), n.stride(0), H,
        BLOCK=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip


KINDS = {"none": 0, "tanh": 1, "quick": 2}


@jit
def _phi(v, KIND: tl.constexpr):
    """(what multiplies v in GELU, its derivative by v)."""
    if KIND == 2:
        s = tl.sigmoid(1.702 * v)
        return s, 1.702 * s * (1 - s)
    if KIND == 1:
        inner = 0.7978845608028654 * (v + 0.044715 * v * v * v)
        t = 2 * tl.sigmoid(2 * inner) - 1
        return 0.5 * (1 + t), 0.5 * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * v * v)
    # exact: the normal distribution's tail within 1.5e-7 (Abramowitz and Stegun 7.1.26), since it is made of the exponential that
    # the derivative needs anyway; erf would be as much work again, and these kernels then compute rather than copy
    bell = tl.exp(-0.5 * v * v)
    root = tl.rsqrt(1 + 0.3275911 * 0.7071067811865476 * tl.abs(v))
    t = root * root  # fewer instructions than a division
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * poly * bell
    return tl.where(v < 0, tail, 1 - tail), 0.3989422804014327 * bell


@jit
def _gelu(u, out, ldu, ldo, F, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(u + row * ldu + cols, mask=cols < F, other=0.0).to(tl.float32)
    phi, _ = _phi(v, KIND)
    tl.store(out + row * ldo + cols, (v * phi).to(out.dtype.element_ty), mask=cols < F)


@jit
def _gelu_backward(dg, u, du, g, ldd, ldu, ldo, ldg, F, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(u + row * ldu + cols, mask=cols < F, other=0.0).to(tl.float32)
    d = tl.load(dg + row * ldd + cols, mask=cols < F, other=0.0).to(tl.float32)
    phi, slope = _phi(v, KIND)
    tl.store(du + row * ldo + cols, (d * (phi + v * slope)).to(du.dtype.element_ty), mask=cols < F)
    tl.store(g + row * ldg + cols, (v * phi).to(g.dtype.element_ty), mask=cols < F)


def gelu(u: Tensor, out: Tensor, kind: str) -> None:
    """Fills out [T, f] with gelu(u [T, f])."""
    block = min(1024, next_power_of_2(u.shape[1]))
    _gelu[(u.shape[0], triton.cdiv(u.shape[1], block))](
        u, out, u.stride(0), out.stride(0), u.shape[1], KIND=KINDS[kind], BLOCK=block, num_warps=4
    )


def gelu_backward(dg: Tensor, u: Tensor, du: Tensor, g: Tensor, kind: str) -> None:
    """Fills du [T, f] with u's gradient and g [T, f] with the forward's output; g may be dg itself."""
    block = min(1024, next_power_of_2(u.shape[1]))
    _gelu_backward[(u.shape[0], triton.cdiv(u.shape[1], block))](
        dg, u, du, g, dg.stride(0), u.stride(0), du.stride(0), g.stride(0), u.shape[1],
        KIND=KINDS[kind], BLOCK=block, num_warps=4,
    )  # fmt: skip
