"""The fused low-rank linear, y = row (x W^T + sum_i s_i (x A_i^T) B_i^T) + b, on any W as it lies in memory.

A rank-16 update is 1 to 2 % of a linear's FLOPs but, as three launches, 25 to 250 % of its time: the wide tensors x,
y and dy are read and written again for it. Here y = x W^T, then y += S (sB)^T by one GEMM with beta = 1. Several
updates (adapters side by side, the q and v rows of a fused qkv) share one shrink and add into their own rows of y;
DoRA's row factor is one more sweep. `packed.lowrank_group` goes further for weights that may be laid out anew.

W is frozen and never gets a gradient; A and B are masters of any dtype, cast to x's dtype (never the activations to
theirs). Dropout masks are redrawn in the backward, not kept. The operator is a `torch.library` one, so torch.compile
sees one node and CUDA graphs capture it; it has no second derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import fused_rows, reference, tuning
from mmpeft.kernels.dispatch import forced, next_power_of_2, use_triton


class Update(NamedTuple):
    """scale * B A, added to the rows of W from `start` on. A [r, in]; B [rows, r]; dropout on its input."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    start: int = 0
    dropout: float = 0.0


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
        from mmpeft.kernels.dropout_kernels import hash_dropout

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
    if B.shape[:1] != weight.shape[:1]:
        raise ConfigError(f"B {tuple(B.shape)} has not the rows of the weight {tuple(weight.shape)}: {_EXPECTED}")
    return lowrank_updates(x, weight, bias, [Update(A, B, scale, 0, dropout_p)], seed=seed)


_EXPECTED = "expected x [..., in], weight [out, in], A [r, in], B [out, r]"


def lowrank_updates(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    *,
    row: Tensor | None = None,
    seed: Tensor | int | None = None,
) -> Tensor:
    """row * (x W^T + the updates' sum) + b: several low-rank updates of one frozen linear.

    Args:
        x: [..., in], any strides. weight: [out, in], frozen, any strides. bias, row: [out] or None.
        seed: of the dropout masks, integer or int64 tensor of one element; update i draws from seed + i.

    Returns:
        [..., out] in x's dtype (autocast's dtype under autocast).

    Raises:
        ConfigError: shapes that do not fit, a weight that requires a gradient, dropout without a seed.
    """
    for u in updates:
        part = weight[u.start : u.start + u.B.shape[0]]
        check(x, [part], [u.A], [u.B], u.dropout, seed)
    if row is not None and row.shape != weight.shape[:1]:
        raise ConfigError(f"row {tuple(row.shape)}; expected one factor a row of the weight {tuple(weight.shape)}")
    x, weight, bias = to_autocast(x, weight, bias)
    if not use_triton(x):
        return reference.lowrank_updates(x, weight, bias, updates, row=row, seed=seed)
    As, Bs = [u.A for u in updates], [u.B for u in updates]
    starts, scales, ps = [u.start for u in updates], [float(u.scale) for u in updates], [u.dropout for u in updates]
    y: Tensor = torch.ops.mmpeft.lowrank_linear(
        x, weight, bias, As, Bs, row, starts, scales, ps, seed_tensor(seed, x)
    )[0]
    return y


def worth_fusing(x: Tensor, weight: Tensor, updates: Sequence[Update], row: Tensor | None = None) -> bool:
    """Whether `lowrank_updates` is to run here instead of torch's own operators one by one.

    Half precision on a GPU with the kernels, where it is faster at this size (timed once a device, `tuning`); inside a
    compiled graph it is taken unseen. `dispatch.backend("triton")` forces it anywhere, "reference" forbids it. A weight
    that trains and transforms of torch.func (the operator has no batching rule) are left to torch.
    """
    if weight.requires_grad or not x.numel() or not x.is_floating_point() or in_transform():
        return False
    if forced() != "auto":
        return forced() == "triton"
    if not use_triton(x):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.compiler.is_compiling():
        return True
    rows = min(next_power_of_2(x.numel() // x.shape[-1]), 8192)
    ranks, dropout = sum(u.A.shape[0] for u in updates), any(u.dropout for u in updates)
    kind = (rows, *weight.shape, ranks, len(updates), row is not None, dropout, dtype, torch.is_grad_enabled())
    return _fastest(kind, x.device) == "fused"


def in_transform() -> bool:
    """Inside vmap, grad or jvp of torch.func."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


@functools.cache
def _fastest(kind: tuple[int, int, int, int, int, bool, bool, torch.dtype, bool], device: torch.device) -> str:
    T, out, n_in, R, n, scaled, dropout, dtype, grad = kind

    @functools.cache  # made only if something is timed
    def data() -> tuple[Tensor, Tensor, list[Update], Tensor | None, Tensor]:
        make = functools.partial(torch.randn, device=device)
        ranks = [R // n + (i < R % n) for i in range(n)]
        pairs = [(make(r, n_in).requires_grad_(), make(out, r).requires_grad_()) for r in ranks]
        updates = [Update(A, B, 0.1, 0, 0.1 if dropout else 0.0) for A, B in pairs]
        row = make(out).requires_grad_() if scaled else None
        x = make(T, n_in, dtype=dtype).requires_grad_()
        return x, make(out, n_in, dtype=dtype), updates, row, make(T, out, dtype=dtype)

    def run(fused: bool) -> None:
        with torch.inference_mode(False), torch.set_grad_enabled(grad), torch.autocast(device.type, enabled=False):
            x, weight, updates, row, dy = data()
            if fused:
                seed = torch.randint(2**31, (1,), device=device) if dropout else None
                y = lowrank_updates(x, weight, None, updates, row=row, seed=seed)
            else:
                y = F.linear(x, weight)
                for u in updates:
                    inner = F.dropout(x, u.dropout) if u.dropout else x
                    y = y + F.linear(F.linear(inner, u.A.to(dtype)), (u.B * u.scale).to(dtype))
                y = y if row is None else y * row.to(dtype)
            if grad:
                leaves = [t for u in updates for t in (u.A, u.B)] + ([] if row is None else [row])
                torch.autograd.grad(y, [x, *leaves], dy)

    candidates = {name: functools.partial(run, name == "fused") for name in ("fused", "torch")}
    return tuning.choose("lowrank_linear", kind, candidates, device, otherwise="fused")


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


class _Plan(NamedTuple):
    """Where the updates lie: rows of y and columns of S of each, and whether one shrink serves all."""

    rows: list[slice]
    ranks: list[slice]
    shared: bool


def _plan(As: list[Tensor], Bs: list[Tensor], starts: list[int], ps: list[float]) -> _Plan:
    edges = [0]
    for A in As:
        edges.append(edges[-1] + A.shape[0])
    rows = [slice(s, s + B.shape[0]) for s, B in zip(starts, Bs, strict=True)]
    return _Plan(rows, [slice(*e) for e in zip(edges, edges[1:], strict=False)], not any(ps))


def _stack(As: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All A below each other [R, in], in the compute dtype."""
    return As[0].to(dtype) if len(As) == 1 else torch.cat(As).to(dtype)


def _member(seed: Tensor | None, i: int) -> Tensor | None:
    return None if seed is None else seed + i


@torch.library.custom_op("mmpeft::lowrank_linear", mutates_args=())
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, As: list[Tensor], Bs: list[Tensor], row: Tensor | None,
    starts: list[int], scales: list[float], ps: list[float], seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [..., out], S [T, R], and with a row factor what it multiplied [T, out])."""
    flat = x.reshape(-1, x.shape[-1])
    plan = _plan(As, Bs, starts, ps)
    if not As:
        S = x.new_empty(len(flat), 0)
    elif plan.shared:
        S = flat @ _stack(As, x.dtype).mT
    else:
        parts = [drop(flat, p, _member(seed, i)) @ A.to(x.dtype).mT for i, (A, p) in enumerate(zip(As, ps, strict=True))]
        S = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    y = F.linear(flat, weight, bias if row is None else None)
    for B, scale, rows, ranks in zip(Bs, scales, plan.rows, plan.ranks, strict=True):
        y[:, rows].addmm_(S[:, ranks], (B * scale).to(x.dtype).mT)
    z = x.new_empty(0)
    if row is not None:
        z, y = y, fused_rows.scale(y, row, bias)
    return y.view(*x.shape[:-1], weight.shape[0]), S, z


@_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, As: list[Tensor], Bs: list[Tensor], row: Tensor | None,
    starts: list[int], scales: list[float], ps: list[float], seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T, out = x.numel() // x.shape[-1], weight.shape[0]
    z = x.new_empty(0) if row is None else x.new_empty(T, out)
    return x.new_empty(*x.shape[:-1], out), x.new_empty(T, sum(A.shape[0] for A in As)), z


@torch.library.custom_op("mmpeft::lowrank_linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, As: list[Tensor], Bs: list[Tensor], row: Tensor | None, S: Tensor,
    z: Tensor, starts: list[int], scales: list[float], ps: list[float], seed: Tensor | None, need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dA of all updates [R, in], dB of each [rows * r] end to end, drow, dbias); empty where not asked for."""
    flat, dy2 = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dbias = dy2.sum(0) if need_dbias else x.new_empty(0)
    drow = x.new_empty(0)
    if row is not None:
        dy2, drow = fused_rows.scale_backward(dy2, z, row)
    plan = _plan(As, Bs, starts, ps)
    dSs = [dy2[:, r] @ (B * s).to(x.dtype) for r, B, s in zip(plan.rows, Bs, scales, strict=True)]
    dBs = [
        mm_wide(dy2[:, rows].mT, S[:, ranks]).mul(s).to(B.dtype).reshape(-1)
        for B, s, rows, ranks in zip(Bs, scales, plan.rows, plan.ranks, strict=True)
    ]
    dS = torch.cat(dSs, 1) if len(dSs) > 1 else dSs[0] if dSs else S
    dx = dy2 @ weight if need_dx else x.new_empty(0)
    if not As:
        dA, dB = x.new_empty(0), x.new_empty(0)  # an operator's results may not be one tensor
    elif plan.shared:
        dA, dB = mm_wide(dS.mT, flat).to(As[0].dtype), torch.cat(dBs)
        if need_dx:
            dx.addmm_(dS, _stack(As, x.dtype))
    else:
        seeds = [_member(seed, i) for i in range(len(As))]
        dAs = [mm_wide(d.mT, drop(flat, p, s)).to(A.dtype) for d, p, s, A in zip(dSs, ps, seeds, As, strict=True)]
        dA, dB = torch.cat(dAs), torch.cat(dBs)
        for d, p, s, A in zip(dSs, ps, seeds, As, strict=True) if need_dx else ():
            dx.add_(drop(d @ A.to(x.dtype), p, s))
    return dx.view(x.shape) if need_dx else dx, dA, dB, drow, dbias


@_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, As: list[Tensor], Bs: list[Tensor], row: Tensor | None, S: Tensor,
    z: Tensor, starts: list[int], scales: list[float], ps: list[float], seed: Tensor | None, need_dx: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    none = x.new_empty(0)
    dA = As[0].new_empty(sum(A.shape[0] for A in As), x.shape[-1]) if As else none
    dB = Bs[0].new_empty(sum(B.numel() for B in Bs)) if Bs else x.new_empty(0)
    dx = x.new_empty(x.shape) if need_dx else x.new_empty(0)
    drow = x.new_empty(0) if row is None else row.new_empty(row.shape)
    return dx, dA, dB, drow, dy.new_empty(dy.shape[-1]) if need_dbias else x.new_empty(0)


def _linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, As, Bs, row, ctx.starts, ctx.scales, ctx.ps, seed = inputs
    ctx.n = len(As)
    ctx.save_for_backward(x, weight, row, output[1], output[2], seed, *As, *Bs)
    ctx.mark_non_differentiable(output[1], output[2])


def _linear_grad(ctx, dy: Tensor, _dS: Tensor | None, _dz: Tensor | None):  # type: ignore[no-untyped-def]
    x, weight, row, S, z, seed, *rest = ctx.saved_tensors
    As, Bs = rest[: ctx.n], rest[ctx.n :]
    need_dx, need_bias, need_row = (ctx.needs_input_grad[i] for i in (0, 2, 5))
    dx, dA, dB, drow, dbias = torch.ops.mmpeft.lowrank_linear_backward(
        dy, x, weight, As, Bs, row, S, z, ctx.starts, ctx.scales, ctx.ps, seed, need_dx, need_bias
    )
    dAs = list(dA.split([A.shape[0] for A in As])) if As else []
    dBs = [d.view(B.shape) for d, B in zip(dB.split([B.numel() for B in Bs]), Bs, strict=True)] if Bs else []
    none: tuple[object, ...] = (None, None, None, None)
    if not As:  # torch takes an empty list of numbers for one of tensors
        none = ([], [], [], None)
    return dx if need_dx else None, None, dbias if need_bias else None, dAs, dBs, drow if need_row else None, *none


_linear.register_autograd(_linear_grad, setup_context=_linear_setup)
