"""The fused low-rank linear, y = x W^T + b + s (x A^T) B^T, a drop-in for three launches.

A rank-16 update is 1 to 2 % of a linear's FLOPs but, as three launches, 25 to 250 % of its time: the wide tensors x,
y and dy are read and written again for it. Here y = x W^T, then y += S (sB)^T by one GEMM with beta = 1: two extra
launches, on any W as it lies in memory. `packed.lowrank_group` goes further for weights that may be laid out anew.

W is frozen and never gets a gradient; A and B are masters of any dtype, cast to x's dtype (never the activations to
theirs). Dropout masks are redrawn in the backward, not kept. The operator is a `torch.library` one, so torch.compile
sees one node and CUDA graphs capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import reference
from mmpeft.kernels.dispatch import use_triton


def mm_wide(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result where the operands are half precision (the sums are fp32 inside in any case)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Inverted dropout of x [T, n] by the counter hash; x itself where there is none."""
    if not p or seed is None:
        return x
    if use_triton(x):
        from mmpeft.kernels.elementwise import hash_dropout

        return hash_dropout(x, p, seed)
    return reference.dropout(x, p, seed)


def lowrank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """x W^T + b + scale * (dropout(x) A^T) B^T.

    Args:
        x: [..., in], any strides. weight: [out, in], frozen. bias: [out] or None.
        A: [r, in]; B: [out, r]; any rank from 1, any float dtype (fp32 masters are meant).
        dropout_p: on the low-rank input only. seed: integer or int64 tensor of one element; needed when dropout_p > 0.

    Returns:
        [..., out] in x's dtype (autocast's dtype under autocast).

    Raises:
        ConfigError: shapes that do not fit, a weight that requires a gradient, dropout without a seed.
    """
    check(x, [weight], [A], [B], dropout_p, seed)
    x, weight, bias = to_autocast(x, weight, bias)
    if not use_triton(x):
        return reference.lowrank_linear(x, weight, bias, A, B, scale, dropout_p=dropout_p, seed=seed)
    y: Tensor = torch.ops.mmpeft.lowrank_linear(x, weight, bias, A, B, scale, dropout_p, seed_tensor(seed, x))[0]
    return y


def check(
    x: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    p: float,
    seed: Tensor | int | None,
) -> None:
    """Refuses what does not fit, before any work (raises ConfigError)."""
    for w, A, B in zip(weights, As, Bs, strict=True):
        if w.requires_grad:
            raise ConfigError(
                "the weight requires a gradient; a low-rank site's base is frozen (requires_grad_(False))"
            )
        if A.shape != (B.shape[-1], w.shape[1]) or B.shape[0] != w.shape[0] or x.shape[-1] != w.shape[1]:
            raise ConfigError(
                f"x {tuple(x.shape)}, weight {tuple(w.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}; "
                f"expected x [..., {w.shape[1]}], A [r, {w.shape[1]}], B [{w.shape[0]}, r]"
            )
    if not 0 <= p < 1:
        raise ConfigError(f"dropout_p {p}; expected 0 <= dropout_p < 1")
    if p and seed is None:
        raise ConfigError("dropout_p > 0 needs a seed: the mask is redrawn from it in the backward")


def seed_tensor(seed: Tensor | int | None, x: Tensor) -> Tensor | None:
    """The seed as a tensor on x's device."""
    return None if seed is None else torch.as_tensor(seed, dtype=torch.int64, device=x.device)


def to_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What F.linear would run in under autocast; operators of our own are not on torch's list."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


@torch.library.custom_op("mmpeft::lowrank_linear", mutates_args=())
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    S = drop(flat, p, seed) @ A.to(x.dtype).mT  # [T, r]
    y = F.linear(flat, weight, bias).addmm_(S, (B * scale).to(x.dtype).mT)
    return y.view(*x.shape[:-1], weight.shape[0]), S


@_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, A.shape[0])


@torch.library.custom_op("mmpeft::lowrank_linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    flat, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    a, b = A.to(x.dtype), (B * scale).to(x.dtype)
    dS = dy2 @ b  # [T, r], the scale included
    dB = mm_wide(dy2.mT, S).mul(scale).to(B.dtype)
    dA = mm_wide(dS.mT, drop(flat, p, seed)).to(A.dtype)
    if not need_dx:
        return x.new_empty(0), dA, dB
    dx = dy2 @ weight
    dx = dx.addmm_(dS, a) if not p else dx.add_(drop(dS @ a, p, seed))
    return dx.view(x.shape), dA, dB


@_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    S: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if need_dx else (0,)), A.new_empty(A.shape), B.new_empty(B.shape)


def _linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, A, B, ctx.scale, ctx.p, seed = inputs
    ctx.save_for_backward(x, weight, A, B, output[1], seed)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])


def _linear_grad(ctx, dy: Tensor, _dS: Tensor | None):  # type: ignore[no-untyped-def]
    x, weight, A, B, S, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, dA, dB = torch.ops.mmpeft.lowrank_linear_backward(dy, x, weight, A, B, S, ctx.scale, ctx.p, seed, need[0])
    dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.has_bias and need[2] else None
    return dx if need[0] else None, None, dbias, dA, dB, None, None, None


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)
