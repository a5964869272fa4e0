"""Linears that share an input, inside a written-out block: products on `[x | S]`, gradients into the flat buffer.

Under dropout the rank term reads another x than the weight does, one for the whole group (`dropout`): its gradient is
masked before it is added, so the products backward are on dy and on dS apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import dropout
from mmpeft.kernels.adamw import FlatAdamW, Refresher, Slot
from mmpeft.kernels.dropout import Dropped as Dropped
from mmpeft.kernels.lowrank import mm_wide
from mmpeft.kernels.magnitude import Magnitude, Scaling
from mmpeft.kernels.packed import LEADING_MULTIPLE, PackedGroup, round_up


@dataclass
class Group:
    """Linears that share an input: their packed weights, and where their gradients lie in the flat buffer.

    With magnitudes (DoRA), products give z, without the bias; who reads z applies `scaling`, and gives gradients of z.
    """

    packed: PackedGroup
    masters: list[tuple[Tensor, Tensor] | None]  # (A [r, in], B [out, r]) of each member
    A_start: int = 0  # all members' A, one after another: [sum r, in]
    B_starts: list[int] = field(default_factory=list)
    magnitudes: list[Tensor | None] = field(default_factory=list)  # m [out] of each member; empty: none has one
    magnitude: Magnitude | None = None

    def __post_init__(self) -> None:
        if any(m is not None for m in self.magnitudes):
            self.magnitude = Magnitude(self.packed, [m is not None for m in self.magnitudes])

    @property
    def bias(self) -> Tensor | None:
        """What the products add."""
        return self.packed.bias if self.magnitude is None else None

    @property
    def scaling(self) -> Scaling | None:
        """What the reader of z applies."""
        return None if self.magnitude is None else self.magnitude.scaling

    def wide(self, T: int, n: int) -> Tensor:
        """An uninitialised [T, n + R] buffer for [x | S] or [dy | dS]."""
        R = self.packed.rank
        return self.packed.A.new_empty(T, round_up(n + R, LEADING_MULTIPLE))[:, : n + R]

    def slots(self, start: int) -> Iterator[tuple[Tensor, Slot]]:
        """(master, slot) in flat order, from `start` on: the A of every member, then the B, then the m."""
        p, at, self.A_start = self.packed, start, start
        pairs = [m for m in self.masters if m is not None]
        parts = [(a, b, s) for m, a, b, s in zip(self.masters, p.A_parts, p.B_parts, p.scales, strict=True) if m]
        for (A, _), (a, _, _) in zip(pairs, parts, strict=True):
            yield A, Slot((A.shape[0], A.shape[1]), a)
            at += A.numel()
        self.B_starts = []
        for (_, B), (_, b, s) in zip(pairs, parts, strict=True):
            self.B_starts.append(at)
            yield B, Slot((B.shape[0], B.shape[1]), b, s)
            at += B.numel()
        if self.magnitude is not None:
            self.magnitude.start = at
            for m in self.magnitudes:
                if m is not None:  # its compute copy is never read: the factors are made of m itself
                    yield m, Slot((1, m.shape[0]), p.A.new_empty(1, m.shape[0]))

    def shrink(self, x: Tensor, dropped: Dropped | None) -> Tensor:
        """S = drop(x) A^T [T, R]."""
        return x @ self.packed.A.mT if dropped is None else dropout.shrink(x, self.packed.A, dropped)

    def forward(self, wide: Tensor, dropped: Dropped | None = None) -> tuple[Tensor, Tensor]:
        """wide [T, in + R] with x in its first columns -> (y [T, out], S [T, R])."""
        n = self.packed.in_features
        if dropped is None:
            S = self.shrink(wide[:, :n], None)
            wide[:, n:].copy_(S)
        else:
            S = dropout.shrink(wide[:, :n], self.packed.A, dropped, wide[:, n:])
        self.packed.load()
        return linear(wide, self.packed.forward_weight, self.bias), S

    def backward(
        self, wide: Tensor, S: Tensor, flat: Tensor, accumulate: bool, dropped: Dropped | None = None
    ) -> Tensor:
        """wide [T, out + R] with dy in its first columns (dS is filled in) -> dx [T, in]; writes dB."""
        self.backward_B(wide, S, flat, accumulate)
        return self.backward_x(wide, dropped)

    def backward_x(self, wide: Tensor, dropped: Dropped | None) -> Tensor:
        """dx [T, in] from [dy | dS]: one GEMM; under dropout the rank term is masked first, so it is added apart."""
        if dropped is None:
            self.packed.load()
            return wide @ self.packed.backward_weight
        dx = self.backward_W(wide)
        self.add_masked(dx, wide, dropped)
        return dx

    def backward_W(self, wide: Tensor) -> Tensor:
        """The base weight's part of dx, dy W [T, in], from [dy | dS]."""
        self.packed.load()
        return wide[:, : self.packed.out_features] @ self.packed.W

    def add_masked(self, dx: Tensor, wide: Tensor, dropped: Dropped, x: Tensor | None = None) -> Tensor | None:
        """Adds the adapters' part of dx, drop(dS A), in place; returns drop(x) where x [T, in] is given."""
        return dropout.add_masked(dx, wide[:, self.packed.out_features :], self.packed.A, dropped, x)

    def backward_B(self, wide: Tensor, S: Tensor, flat: Tensor, accumulate: bool) -> None:
        """Fills dS into the last columns of `wide` and writes dB."""
        p, row, first = self.packed, 0, 0
        dy = wide[:, : p.out_features]
        torch.mm(dy, p.B, out=wide[:, p.out_features :])
        starts = iter(self.B_starts)
        for out, r, s in zip(p.outs, p.ranks, p.scales, strict=True):
            if r:
                start = next(starts)
                dB = flat[start : start + out * r].view(out, r)
                product_into(dB, dy[:, row : row + out].mT, S[:, first : first + r], s, accumulate)
            row, first = row + out, first + r

    def backward_A(
        self, wide: Tensor, x: Tensor, flat: Tensor, accumulate: bool, dropped: Dropped | None = None
    ) -> None:
        """Writes dA = dS^T drop(x) of all members, from `wide` as `backward` left it; no `dropped`: x is drop(x)."""
        p, r = self.packed, sum(self.packed.ranks)
        if r:
            dA = flat[self.A_start : self.A_start + r * p.in_features].view(r, p.in_features)
            dS = wide[:, p.out_features : p.out_features + r]
            product_into(dA, dS.mT, x if dropped is None else dropped.of(x), 1.0, accumulate)


class Masters:
    """The adapters of written-out blocks: their masters and compute copies in flat order, shared by every kind of block."""

    masters: list[Tensor]
    slots: list[Slot]
    numel: int
    scaled: Sequence[tuple[Group, slice]] = ()  # groups with magnitudes, and where theirs are among the masters

    def collect(self, groups: Iterable[Group]) -> None:
        """Lay the groups' adapters end to end, and write their compute copies."""
        self.masters, self.slots, self.numel = [], [], 0
        scaled: list[tuple[Group, slice]] = []
        for group in groups:
            for master, slot in group.slots(self.numel):
                self.masters.append(master)
                self.slots.append(slot)
                self.numel += slot.numel
            if isinstance(group, Group) and group.magnitude is not None:
                scaled.append((group, slice(len(self.masters) - sum(group.magnitude.has), len(self.masters))))
        self.scaled = scaled
        self._refresher = Refresher(self.slots)
        if not self.numel:
            raise ConfigError("no adapter on any linear of the blocks: nothing to train")
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite the compute copies from the masters; `FlatAdamW.step` does it by itself."""
        self._refresher(self.masters)
        self.rescale()

    def rescale(self, *, squares: bool = False) -> None:
        """DoRA's norms and factors of the compute copies; `squares`: the base has changed too. Nothing without DoRA."""
        for group, where in self.scaled:
            assert group.magnitude is not None
            group.magnitude.form(group.packed, self.masters[where], squares=squares)

    def optimizer(self, **options: Any) -> FlatAdamW:
        """A one-launch AdamW over all adapters (options of `FlatAdamW`)."""
        return FlatAdamW(self.masters, self.slots, after=self.rescale if self.scaled else None, **options)

    def check(self, masters: Sequence[Tensor]) -> None:
        """Refuse masters that differ in number or shape from the present ones."""
        if [m.shape for m in masters] != [m.shape for m in self.masters]:
            raise ConfigError(f"{len(masters)} masters that differ in shape from the {len(self.masters)} of these blocks")

    def rebind(self, masters: Sequence[Tensor]) -> None:
        """Put other masters, once `check`ed, in place of the present ones: another adapter on the same weights."""
        self.masters = list(masters)
        self.refresh()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.mT) if bias is None else torch.addmm(bias, x, weight.mT)


def product_into(out: Tensor, a: Tensor, b: Tensor, alpha: float, accumulate: bool) -> None:
    """out = alpha a @ b (+ out); a, b of the model's dtype, out fp32 or theirs."""
    if a.is_cuda and out.dtype != a.dtype and _addmm_widens(a.dtype):
        beta = 1.0 if accumulate else 0.0
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        product = mm_wide(a, b).mul_(alpha)
        out.add_(product) if accumulate else out.copy_(product)


@functools.cache
def _addmm_widens(dtype: torch.dtype) -> bool:
    """Whether this torch's addmm writes an fp32 result of half-precision factors: one launch instead of three."""
    a = torch.ones(16, 16, dtype=dtype, device="cuda")
    out = torch.ones(16, 16, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, beta=1.0, alpha=0.5, out=out)
    except (AttributeError, RuntimeError):
        return False
    return bool((out == 9).all())
