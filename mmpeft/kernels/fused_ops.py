"""What the written-out blocks call: each function runs the Triton kernel, or the same maths in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.kernels import reference
from mmpeft.kernels.dispatch import use_triton


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def add_rmsnorm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, n: Tensor) -> tuple[Tensor, Tensor]:
    """Fills n [T, h] with rmsnorm(x + delta) * weight; returns (x + delta [T, h], rstd [T])."""
    if use_triton(x):
        from mmpeft.kernels import elementwise

        return elementwise.add_rmsnorm(x, delta, weight, eps, n)
    total, normed = reference.add_rmsnorm(x, delta, weight, eps)
    n.copy_(normed)
    return total, torch.rsqrt(_wide(total).square().mean(-1) + eps)


def rmsnorm_backward(
    dn: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, g: Tensor | None, out: Tensor, n: Tensor | None
) -> None:
    """Fills out [T, h] with x's gradient through the norm plus g, and n [T, h], where given, with the norm's output."""
    if use_triton(x):
        from mmpeft.kernels import elementwise

        return elementwise.rmsnorm_backward(dn, x, rstd, weight, g, out, n)
    xhat = _wide(x) * rstd[:, None]
    wd = _wide(dn) * _wide(weight)
    dx = rstd[:, None] * (wd - xhat * (wd * xhat).mean(-1, keepdim=True))
    if n is not None:
        n.copy_(xhat.to(x.dtype) * weight)
    out.copy_(dx if g is None else dx + g)


def rope(
    q: Tensor, k: Tensor, v: Tensor | None, out: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False
) -> None:
    """Rotates q [B, S, Hq, d] and k [B, S, Hk, d] into out [B * S, >= (Hq + 2 Hk) d], copies v; cos, sin [S, d/2]."""
    if use_triton(q):
        from mmpeft.kernels import elementwise

        return elementwise.rope(q, k, v, out, cos, sin, inverse=inverse)
    T = q.shape[0] * q.shape[1]
    cos, sin = (t.repeat(T // t.shape[0], 1) for t in (cos, -sin if inverse else sin))
    parts = [reference.rope(t.reshape(T, *t.shape[2:]), cos, sin).flatten(1) for t in (q, k)]
    parts += [] if v is None else [v.reshape(T, -1)]
    rotated = torch.cat(parts, 1)
    out[:, : rotated.shape[1]].copy_(rotated)


def swiglu_shrink(gate_up: Tensor, act: Tensor, A: Tensor) -> Tensor:
    """Fills act [T, f + R] with [h | S], h = silu(gate) * up, S = h A^T; returns S [T, R], contiguous. A: [R, f]."""
    if use_triton(gate_up):
        from mmpeft.kernels import sweep

        return sweep.swiglu_shrink(gate_up, act, A)
    f = A.shape[1]
    act[:, :f].copy_(reference.swiglu(gate_up))
    S = act[:, :f] @ A.mT
    act[:, f:].copy_(S)
    return S


def swiglu_backward(dh: Tensor, gate_up: Tensor, dgu: Tensor, h: Tensor) -> None:
    """Fills dgu [T, 2f] with gate_up's gradient and h [T, f] with the forward's output (h may be dh)."""
    if use_triton(dh):
        from mmpeft.kernels import elementwise

        return elementwise.swiglu_backward(dh, gate_up, dgu, h)
    gate, up = _wide(gate_up).chunk(2, -1)
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


def gelu(u: Tensor, out: Tensor, tanh: bool) -> None:
    """Fills out [T, f] with gelu(u [T, f]), exact or by tanh."""
    if use_triton(u):
        from mmpeft.kernels import layernorm

        return layernorm.gelu(u, out, tanh)
    out.copy_(F.gelu(u, approximate=_APPROXIMATE[tanh]))


def gelu_backward(dg: Tensor, u: Tensor, du: Tensor, g: Tensor, tanh: bool) -> None:
    """Fills du [T, f] with u's gradient and g [T, f] with the forward's output (g may be dg)."""
    if use_triton(u):
        from mmpeft.kernels import layernorm

        return layernorm.gelu_backward(dg, u, du, g, tanh)
    du.copy_(torch.ops.aten.gelu_backward(dg.contiguous(), u.contiguous(), approximate=_APPROXIMATE[tanh]))
    g.copy_(F.gelu(u, approximate=_APPROXIMATE[tanh]))


_APPROXIMATE = {False: "none", True: "tanh"}
