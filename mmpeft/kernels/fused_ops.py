"""What the written-out blocks call: each function runs the Triton kernel, or the same maths in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.kernels import reference
from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.dropout import Dropped


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


Scaling = tuple[Tensor, Tensor]  # factor and bias of every channel, fp32 or wider (`magnitude.Scaling`)


def _scaled(z: Tensor, scaling: Scaling | None) -> Tensor:
    return z if scaling is None else (z * scaling[0] + scaling[1]).to(z.dtype)


def add_rmsnorm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, n: Tensor, scaling: Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """Fills n [T, h] with rmsnorm(x + delta) * weight; returns (x + delta [T, h], rstd [T]). `scaling` of delta."""
    if use_triton(x):
        from mmpeft.kernels import elementwise

        return elementwise.add_rmsnorm(x, delta, weight, eps, n, scaling)
    delta = delta if delta is None else _scaled(delta, scaling)
    total, normed = reference.add_rmsnorm(x, delta, weight, eps)
    n.copy_(normed)
    return total, torch.rsqrt(_wide(total).square().mean(-1) + eps)


def rmsnorm_backward(
    dn: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, g: Tensor | None, out: Tensor, n: Tensor | None,
    dropped: Dropped | None = None,
) -> None:  # fmt: skip
    """Fills out [T, h] with x's gradient through the norm plus g, and n [T, h], where given, with the norm's output as the
    adapters read it (dropped)."""
    if use_triton(x):
        from mmpeft.kernels import elementwise

        return elementwise.rmsnorm_backward(dn, x, rstd, weight, g, out, n, dropped)
    xhat = _wide(x) * rstd[:, None]
    wd = _wide(dn) * _wide(weight)
    dx = rstd[:, None] * (wd - xhat * (wd * xhat).mean(-1, keepdim=True))
    if n is not None:
        normed = xhat.to(x.dtype) * weight
        n.copy_(normed if dropped is None else dropped.of(normed))
    out.copy_(dx if g is None else dx + g)


def rope(
    q: Tensor, k: Tensor, v: Tensor | None, out: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False,
    scaling: Scaling | None = None,
) -> None:  # fmt: skip
    """Rotates q [B, S, Hq, d] and k [B, S, Hk, d] into out [B * S, >= (Hq + 2 Hk) d], copies v; cos, sin [S, d/2] or
    [B * S, d/2]. `scaling` of q, k and v, applied before (then v is given)."""
    if use_triton(q):
        from mmpeft.kernels import elementwise

        return elementwise.rope(q, k, v, out, cos, sin, inverse=inverse, scaling=scaling)
    if scaling is not None and v is not None:
        whole = _scaled(torch.cat([q, k, v], 2).flatten(2), scaling)
        q, k, v = whole.view(*q.shape[:2], -1, q.shape[3]).split_with_sizes([q.shape[2], k.shape[2], v.shape[2]], 2)
    T = q.shape[0] * q.shape[1]
    cos, sin = (t.repeat(T // t.shape[0], 1) for t in (cos, -sin if inverse else sin))
    parts = [reference.rope(t.reshape(T, *t.shape[2:]), cos, sin).flatten(1) for t in (q, k)]
    parts += [] if v is None else [v.reshape(T, -1)]
    rotated = torch.cat(parts, 1)
    out[:, : rotated.shape[1]].copy_(rotated)


def swiglu_shrink(
    gate_up: Tensor, act: Tensor, A: Tensor, scaling: Scaling | None = None, dropped: Dropped | None = None
) -> Tensor:
    """Fills act [T, f + R] with [h | S], h = silu(gate) * up, S = drop(h) A^T; returns S [T, R], contiguous. A: [R, f].
    `scaling` of gate_up."""
    if use_triton(gate_up):
        from mmpeft.kernels import sweep

        return sweep.swiglu_shrink(gate_up, act, A, scaling, dropped)
    f = A.shape[1]
    act[:, :f].copy_(reference.swiglu(_scaled(gate_up, scaling)))
    S = (act[:, :f] if dropped is None else dropped.of(act[:, :f])) @ A.mT
    act[:, f:].copy_(S)
    return S


def swiglu_backward(dh: Tensor, gate_up: Tensor, dgu: Tensor, h: Tensor, scaling: Scaling | None = None) -> None:
    """Fills dgu [T, 2f] with gate_up's gradient and h [T, f] with the forward's output (h may be dh). With `scaling` of
    gate_up, the gradient is that of the scaled ones."""
    if use_triton(dh):
        from mmpeft.kernels import elementwise

        return elementwise.swiglu_backward(dh, gate_up, dgu, h, scaling)
    gate, up = _wide(_scaled(gate_up, scaling)).chunk(2, -1)
    sig = torch.sigmoid(gate)
    silu, d = gate * sig, _wide(dh)
    dgu.copy_(torch.cat([d * up * (sig + silu * (1 - sig)), d * silu], -1))
    h.copy_(silu * up)


def add_layernorm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, n: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills n [T, h] with layernorm(x + delta) * weight + bias; returns (x + delta [T, h], mean [T], rstd [T])."""
    if use_triton(x):
        from mmpeft.kernels import layernorm

        return layernorm.add_layernorm(x, delta, weight, bias, eps, n)
    total = x if delta is None else x + delta
    if total.dtype.itemsize >= 4 and total.dtype == weight.dtype:
        normed, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
        n.copy_(normed)
        return total, mean[:, 0], rstd[:, 0]
    wide = _wide(total)
    mean = wide.mean(-1)
    rstd = torch.rsqrt((wide - mean[:, None]).square().mean(-1) + eps)
    n.copy_((wide - mean[:, None]) * rstd[:, None] * weight + bias)
    return total, mean, rstd


def layernorm_backward(
    dn: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, g: Tensor, out: Tensor, n: Tensor
) -> None:
    """Fills out [T, h] with x's gradient through the norm plus g, and n [T, h] with the norm's output."""
    if use_triton(x):
        from mmpeft.kernels import layernorm

        return layernorm.layernorm_backward(dn, x, mean, rstd, weight, bias, g, out, n)
    xhat = (_wide(x) - mean[:, None]) * rstd[:, None]
    wd = _wide(dn) * _wide(weight)
    dx = rstd[:, None] * (wd - wd.mean(-1, keepdim=True) - xhat * (wd * xhat).mean(-1, keepdim=True)) + g
    n.copy_(xhat * weight + bias)
    out.copy_(dx)


def gelu(u: Tensor, out: Tensor, kind: str) -> None:
    """Fills out [T, f] with gelu(u [T, f]); kind "none" (exact), "tanh" or "quick" (u sigmoid(1.702 u))."""
    if use_triton(u):
        from mmpeft.kernels import layernorm

        return layernorm.gelu(u, out, kind)
    out.copy_(gelu_of(u, kind))


def gelu_of(u: Tensor, kind: str) -> Tensor:
    """gelu(u) as plain torch computes it."""
    return u * torch.sigmoid(1.702 * u) if kind == "quick" else F.gelu(u, approximate=kind)


def gelu_backward(dg: Tensor, u: Tensor, du: Tensor, g: Tensor, kind: str) -> None:
    """Fills du [T, f] with u's gradient and g [T, f] with the forward's output (g may be dg)."""
    if use_triton(u):
        from mmpeft.kernels import layernorm

        return layernorm.gelu_backward(dg, u, du, g, kind)
    if kind == "quick":
        s = torch.sigmoid(1.702 * u)
        du.copy_(dg * (s + 1.702 * u * s * (1 - s)))
    else:
        du.copy_(torch.ops.aten.gelu_backward(dg.contiguous(), u.contiguous(), approximate=kind))
    g.copy_(gelu_of(u, kind))
