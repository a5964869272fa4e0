"""Low-rank linears that share their input (q|k|v, gate|up), as one K-extended GEMM on a packed buffer.

`PackedGroup` holds the weights of a group once, in a buffer whose spare columns and rows take the adapters' compute
copies:

    P = [[W, s blockdiag(B)],      forward   y  = [x  | S ] P[:out]^T     S  = x A^T
         [A,        0       ]]     backward  dx = [dy | dS] P[:, :in]     dS = dy sB,  dA = dS^T x,  dB = s dy^T S

so the rank term is accumulated in fp32 with the rest and costs no pass of its own. The extended form copies its
narrow operand into [. | S], the in-place form of `lowrank` re-reads its wide result; each pass takes the cheaper one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import dropout, reference
from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.dropout import Dropped
from mmpeft.kernels.lowrank import check, drop, mm_wide, seed_tensor

RANK_MULTIPLE = 16  # 32-byte rows for the rank columns: keeps every operand aligned for the tensor cores
LEADING_MULTIPLE = 64  # leading dimension of packed buffers, in elements


def round_up(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


class PackedGroup:
    """Weights of linears that share their input, laid out with room for their adapters.

    Args:
        weights: frozen [out_i, in], one dtype and device; copied once. `group.weights[i]` are views of the copy, to
        put back into
            the modules so that nothing is stored twice.
        biases: [out_i] or None, one a weight; or None for none at all.
        ranks: rank of each member's adapter, 0 for a member without one.
        scales: s of each member.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None,
        ranks: Sequence[int],
        scales: Sequence[float],
    ) -> None:
        self._measure([(w.shape[0], w.shape[1]) for w in weights], ranks, scales)
        self.buffer = weights[0].new_zeros(self.buffer_rows, self.leading)
        self._place(self.buffer)
        rows, columns = self.out_features + self.rank, self.in_features + self.rank
        self.A = self.buffer[self.out_features : rows, : self.in_features]  # [R, in]
        self.B = self.buffer[: self.out_features, self.in_features : columns]  # [out, R], times s
        self._copies()
        self.weights = list(self.W.split_with_sizes(self.outs))
        with torch.no_grad():
            for view, w in zip(self.weights, weights, strict=True):
                view.copy_(w)
        self._add_biases(biases)

    def _measure(self, shapes: Sequence[tuple[int, int]], ranks: Sequence[int], scales: Sequence[float]) -> None:
        """Sizes of the members and of the buffer."""
        if not len(shapes) == len(ranks) == len(scales) or not shapes:
            raise ConfigError(
                f"{len(shapes)} weights, {len(ranks)} ranks, {len(scales)} scales; expected as many of each"
            )
        if len({n for _, n in shapes}) != 1:
            raise ConfigError(f"a group shares its input; got weights {list(shapes)}")
        self.in_features, self.outs = shapes[0][1], [out for out, _ in shapes]
        self.out_features = sum(self.outs)
        self.ranks, self.scales = list(ranks), [float(s) for s in scales]
        self.rank = round_up(max(sum(ranks), 1), RANK_MULTIPLE)
        self.buffer_rows = self.out_features + self.rank
        self.leading = round_up(self.in_features + self.rank, LEADING_MULTIPLE)

    def _place(self, buffer: Tensor) -> None:
        """What the products read, as views of [rows, leading]."""
        self.forward_weight = buffer[: self.out_features, : self.in_features + self.rank]  # [W | sB]
        self.backward_weight = buffer[: self.out_features + self.rank, : self.in_features]  # [W ; A]
        self.W = buffer[: self.out_features, : self.in_features]

    def _copies(self) -> None:
        """Each member's part of A and B."""
        self.A_parts, self.B_parts, row, first = [], [], 0, 0
        for out, r in zip(self.outs, self.ranks, strict=True):
            self.A_parts.append(self.A[first : first + r])
            self.B_parts.append(self.B[row : row + out, first : first + r])
            row, first = row + out, first + r

    def _add_biases(self, biases: Sequence[Tensor | None] | None) -> None:
        self.bias: Tensor | None = None
        if biases is not None and any(b is not None for b in biases):
            parts = [self.A.new_zeros(out) if b is None else b for out, b in zip(self.outs, biases, strict=True)]
            self.bias = torch.cat([b.detach() for b in parts])

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.A.device

    def load(self) -> None:
        """Make the weights readable through W, `forward_weight` and `backward_weight`: here they always are."""

    @torch.no_grad()
    def refresh(self, As: Sequence[Tensor], Bs: Sequence[Tensor]) -> None:
        """Rewrite the compute copies from the masters: once after each optimizer step."""
        for r, s, a, b, A, B in zip(self.ranks, self.scales, self.A_parts, self.B_parts, As, Bs, strict=True):
            if r:
                a.copy_(A)
                b.copy_(B * s)


def lowrank_group(
    x: Tensor,
    group: PackedGroup,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    *,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
) -> list[Tensor]:
    """The group's linears on one x: list of [..., out_i], views of one tensor.

    `group.refresh(As, Bs)` must have run since the masters last changed; the masters are given here because they
    receive the gradients. With dropout, all members read the same dropped x, as one linear with all their rows would.
    """
    check(x, group.weights, As, Bs, dropout_p, seed)
    if not use_triton(x):
        biases = [None] * len(As) if group.bias is None else list(group.bias.split_with_sizes(group.outs))
        return [
            reference.lowrank_linear(x, w, b, A, B, s, dropout_p=dropout_p, seed=seed)
            for w, b, A, B, s in zip(group.weights, biases, As, Bs, group.scales, strict=True)
        ]
    y, _ = torch.ops.mmpeft.lowrank_group(
        x, group.buffer, group.bias, list(As), list(Bs), group.outs, group.scales, dropout_p, seed_tensor(seed, x)
    )
    return list(y.split_with_sizes(group.outs, -1))


def _views(P: Tensor, outs: list[int], n_in: int, As: list[Tensor]) -> tuple[int, int, Tensor, Tensor]:
    """(out, R, A [R, in], sB [out, R]) of a packed buffer."""
    out, R = sum(outs), round_up(max(sum(A.shape[0] for A in As), 1), RANK_MULTIPLE)
    return out, R, P[out : out + R, :n_in], P[:out, n_in : n_in + R]


def _extended(narrow: Tensor, R: int) -> Tensor:
    """A buffer [T, n + R] with `narrow` [T, n] copied in; its last R columns are the caller's to fill."""
    n = narrow.shape[1]
    buffer = narrow.new_empty(narrow.shape[0], round_up(n + R, LEADING_MULTIPLE))[:, : n + R]
    buffer[:, :n].copy_(narrow)
    return buffer


@torch.library.custom_op("mmpeft::lowrank_group", mutates_args=())
def _group(
    x: Tensor,
    P: Tensor,
    bias: Tensor | None,
    As: list[Tensor],
    Bs: list[Tensor],
    outs: list[int],
    scales: list[float],
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    n_in = x.shape[-1]
    flat = x.reshape(-1, n_in)
    out, R, a, b = _views(P, outs, n_in, As)
    S = dropout.shrink(flat, a, Dropped(p, seed)) if p and seed is not None else flat @ a.mT
    if n_in < out:
        wide = _extended(flat, R)
        wide[:, n_in:].copy_(S)
        y = F.linear(wide, P[:out, : n_in + R], bias)
    else:
        y = F.linear(flat, P[:out, :n_in], bias).addmm_(S, b.mT)
    return y.view(*x.shape[:-1], out), S


@_group.register_fake
def _(
    x: Tensor,
    P: Tensor,
    bias: Tensor | None,
    As: list[Tensor],
    Bs: list[Tensor],
    outs: list[int],
    scales: list[float],
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    R = round_up(max(sum(A.shape[0] for A in As), 1), RANK_MULTIPLE)
    return x.new_empty(*x.shape[:-1], sum(outs)), x.new_empty(x.numel() // x.shape[-1], R)


@torch.library.custom_op("mmpeft::lowrank_group_backward", mutates_args=())
def _group_backward(
    dy: Tensor,
    x: Tensor,
    P: Tensor,
    As: list[Tensor],
    S: Tensor,
    outs: list[int],
    scales: list[float],
    p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [..., in], dA of all members [sum r, in], dB [out * r of each, flat])."""
    n_in = x.shape[-1]
    flat, dy2 = x.reshape(-1, n_in), dy.reshape(-1, dy.shape[-1])
    out, R, a, b = _views(P, outs, n_in, As)
    dS = dy2 @ b
    dBs, row, first = [], 0, 0
    for A, o, s in zip(As, outs, scales, strict=True):
        ranks = slice(first, first + A.shape[0])
        dBs.append(mm_wide(dy2[:, row : row + o].mT, S[:, ranks]).mul(s).reshape(-1))
        row, first = row + o, ranks.stop
    dA, dB = mm_wide(dS[:, :first].mT, drop(flat, p, seed)).to(As[0].dtype), torch.cat(dBs).to(As[0].dtype)
    if not need_dx:
        return x.new_empty(0), dA, dB
    if p and seed is not None:
        dx = dy2 @ P[:out, :n_in]
        dropout.add_masked(dx, dS, a, Dropped(p, seed))
    elif out < n_in:
        wide = _extended(dy2, R)
        wide[:, out:].copy_(dS)
        dx = wide @ P[: out + R, :n_in]
    else:
        dx = (dy2 @ P[:out, :n_in]).addmm_(dS, a)
    return dx.view(x.shape), dA, dB


@_group_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    P: Tensor,
    As: list[Tensor],
    S: Tensor,
    outs: list[int],
    scales: list[float],
    p: float,
    seed: Tensor | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = sum(o * A.shape[0] for o, A in zip(outs, As, strict=True))
    dA = As[0].new_empty(sum(A.shape[0] for A in As), x.shape[-1])
    return x.new_empty(x.shape if need_dx else (0,)), dA, As[0].new_empty(total)


def _group_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, P, _, As, _, ctx.outs, ctx.scales, ctx.p, seed = inputs
    ctx.save_for_backward(x, P, output[1], seed, *As)
    ctx.mark_non_differentiable(output[1])


def _group_grad(ctx, dy: Tensor, _dS: Tensor | None):  # type: ignore[no-untyped-def]
    x, P, S, seed, *As = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, dA, dB = torch.ops.mmpeft.lowrank_group_backward(dy, x, P, As, S, ctx.outs, ctx.scales, ctx.p, seed, need_dx)
    ranks = [A.shape[0] for A in As]
    dAs = list(dA.split(ranks))
    dBs = [
        d.view(o, r)
        for d, o, r in zip(
            dB.split([o * r for o, r in zip(ctx.outs, ranks, strict=True)]), ctx.outs, ranks, strict=True
        )
    ]
    return dx if need_dx else None, None, None, dAs, dBs, None, None, None, None


_group.register_autograd(_group_grad, setup_context=_group_setup)
