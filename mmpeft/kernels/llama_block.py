"""One Llama-type decoder block with low-rank adapters, forward and backward, written out at the fused minimum of memory.

Ten forward launches and about twenty-five backward ones; kept, a token: 4h + 2(2a + 2kv) + 4f bytes and the rank-wide
products: residual stream x and x_mid, rotated q, k, v and the attention's o, gate and up. Norm outputs and the SwiGLU
output are rebuilt by the backward kernels that need them. Layout of the low-rank path: `packed.PackedGroup`.

    forward   add+norm -> [n | S] GEMM qkv -> RoPE -> attention -> o (+ S B^T) -> add+norm -> [n | S] GEMM gate|up
              -> SwiGLU -> [h | S] GEMM down
    backward  the same upside down; every dX is one GEMM on [dY | dS]; A's and B's gradients go straight into the flat
    fp32 buffer

DoRA (`magnitude`): products give z, and what reads it applies the factors: RoPE, SwiGLU and the next add+norm. Kept is z
(of q|k|v in place of the rotated ones, of o and down besides); every dy becomes dz before LoRA's own backward runs on it.

Dropout (`dropout`): every shrink masks its input as it reads it, SwiGLU's among them. In the backward, the adapters' part
of dx is masked and added to the base weight's (in the MLP's sweep for down), and the rebuilt norm outputs are written
dropped. More traffic than without: 16h bytes a token, 4h each for the dx of qkv and gate|up and 8h for that of o, whose
input is copied dropped besides.

Packed documents change two things: RoPE reads cos and sin by token instead of by place in the row (the same kernel on
tables [T, d/2]), and attention gets the documents (`attention.forward`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mmpeft.kernels import attention, fused_ops, sweep, sweep_plan
from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.documents import Documents
from mmpeft.kernels.group import Dropped, Group, linear
from mmpeft.kernels.magnitude import Scaling

Sites = tuple[Dropped | None, Dropped | None, Dropped | None, Dropped | None]  # of qkv, o, gate_up, down
Tape = tuple[Any, ...]  # what a block's forward keeps for its backward


class Layout(NamedTuple):
    """What every block needs to know of the model and of a batch of T = B * S rows.

    shape: (B, S). tables: cos and sin, [S, d/2], or [T, d/2] for documents. scale: of q k^T. eps: of every norm.
    """

    shape: tuple[int, int]
    tables: tuple[Tensor, Tensor]
    heads: int
    kv_heads: int
    scale: float
    eps: float
    documents: Documents | None = None

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, Hq, d], k and v [B, S, Hk, d] as views of qkv [T, (Hq + 2 Hk) d]."""
        heads = qkv.view(*self.shape, self.heads + 2 * self.kv_heads, -1)
        q, k, v = heads.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], 2)
        return q, k, v


@dataclass
class Block:
    """One decoder block."""

    norm1: Tensor
    qkv: Group
    o: Group
    norm2: Tensor
    gate_up: Group
    down: Group

    def groups(self) -> tuple[Group, Group, Group, Group]:
        """The four groups in flat order."""
        return self.qkv, self.o, self.gate_up, self.down

    def forward(
        self, x: Tensor, delta: Tensor | None, before: Scaling | None, layout: Layout, sites: Sites
    ) -> tuple[Tensor, Tensor, Tape]:
        """The stream x + delta [T, h] -> (x_mid, the MLP's output, tape): the next block's x and delta, to which it applies
        `self.down.scaling` as this one applies `before`."""
        T, h = x.shape
        n = self.qkv.wide(T, h)
        x, rstd1 = fused_ops.add_rmsnorm(x, delta, self.norm1, layout.eps, n[:, :h], before)
        qkv, S_qkv = self.qkv.forward(n, sites[0])
        q, k, v = self._rotated(qkv, layout)
        o, kept = attention.forward(q, k, v, layout.scale, documents=layout.documents)
        o = o.reshape(T, -1)
        S_o = self.o.shrink(o, sites[1])
        self.o.packed.load()
        delta = linear(o, self.o.packed.W, self.o.bias).addmm_(S_o, self.o.packed.B.mT)
        z_o = delta if self.o.magnitude else None
        n = self.gate_up.wide(T, h)
        x_mid, rstd2 = fused_ops.add_rmsnorm(x, delta, self.norm2, layout.eps, n[:, :h], self.o.scaling)
        gate_up, S_gu = self.gate_up.forward(n, sites[2])
        del n
        f = gate_up.shape[1] // 2
        act = self.down.wide(T, f)
        S_d = fused_ops.swiglu_shrink(gate_up, act, self.down.packed.A, self.gate_up.scaling, sites[3])
        self.down.packed.load()
        delta = linear(act, self.down.packed.forward_weight, self.down.bias)
        z_d = delta if self.down.magnitude else None
        return x_mid, delta, (x, rstd1, S_qkv, qkv, o, kept, S_o, z_o, x_mid, rstd2, S_gu, gate_up, S_d, z_d)

    def _rotated(self, qkv: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v with RoPE: in place, or for DoRA in a tensor of their own, so that qkv stays z."""
        q, k, v = layout.split(qkv)
        scaling = self.qkv.scaling
        if scaling is None:
            fused_ops.rope(q, k, None, qkv, *layout.tables)
            return q, k, v
        y = torch.empty_like(qkv)
        fused_ops.rope(q, k, v, y, *layout.tables, scaling=scaling)
        return layout.split(y)

    @staticmethod
    def _of_z(group: Group, dy: Tensor, z: Tensor | None, flat: Tensor, accumulate: bool) -> Tensor:
        """dy [T, h + R] of a group's output -> dz in a buffer like it; dy itself without magnitudes."""
        if group.magnitude is None or z is None:
            return dy
        T, h = z.shape
        dz = group.wide(T, h)
        group.magnitude.backward(dy[:, :h], z, dz[:, :h], flat, accumulate)
        return dz

    def backward(
        self, below: Group, g: Tensor, saved: Tape, flat: Tensor, accumulate: bool, layout: Layout, need_dx: bool,
        sites: Sites,
    ) -> Tensor:  # fmt: skip
        """The outputs' gradient g [T, h + R] of this down projection -> that of x, in the buffer of `below`'s.

        The masters' gradients go into flat, or are added to it.
        """
        x, rstd1, S_qkv, qkv, o, kept, S_o, z_o, x_mid, rstd2, S_gu, gate_up, S_d, z_d = saved
        del saved
        (T, h), f, acc = x.shape, gate_up.shape[1] // 2, accumulate

        dz = self._of_z(self.down, g, z_d, flat, acc)
        self.down.backward_B(dz, S_d, flat, acc)
        dgu = self.gate_up.wide(T, 2 * f)
        self._mlp_backward(gate_up, dgu, S_gu, dz, flat, acc, sites[3])
        del gate_up, S_d, dz, z_d

        dn = self.gate_up.backward_x(dgu, sites[2])
        n, g_mid = torch.empty_like(x), self.o.wide(T, h)
        fused_ops.rmsnorm_backward(dn, x_mid, rstd2, self.norm2, g[:, :h], g_mid[:, :h], n, sites[2])
        self.gate_up.backward_A(dgu, n, flat, acc)
        del dgu, x_mid, g, S_gu

        dz = self._of_z(self.o, g_mid, z_o, flat, acc)
        self.o.backward_B(dz, S_o, flat, acc)
        if sites[1] is None:
            do, read = self.o.backward_x(dz, None), o
        else:
            do = self.o.backward_W(dz)
            read = cast(Tensor, self.o.add_masked(do, dz, sites[1], o))
        self.o.backward_A(dz, read, flat, acc)
        q, k, v = layout.split(qkv) if self.qkv.magnitude is None else self._rotated(qkv, layout)
        o4 = o.view(*layout.shape, layout.heads, -1)
        dq, dk, dv = attention.backward(do.view_as(o4), q, k, v, o4, kept, layout.scale, documents=layout.documents)
        dqkv = self.qkv.wide(T, qkv.shape[1])
        fused_ops.rope(dq, dk, dv, dqkv, *layout.tables, inverse=True)
        if self.qkv.magnitude is not None:
            dy = dqkv[:, : qkv.shape[1]]
            self.qkv.magnitude.backward(dy, qkv, dy, flat, acc)
        del do, dq, dk, dv, q, k, v, o4, o, read, kept, qkv, dz, z_o

        if need_dx:
            dn, g = self.qkv.backward(dqkv, S_qkv, flat, acc, sites[0]), below.wide(T, h)
            fused_ops.rmsnorm_backward(dn, x, rstd1, self.norm1, g_mid[:, :h], g[:, :h], n, sites[0])
            self.qkv.backward_A(dqkv, n, flat, acc)
            return g
        self.qkv.backward_B(dqkv, S_qkv, flat, acc)  # nothing trains below: only the norm's output is wanted, for dA
        fused_ops.add_rmsnorm(x, None, self.norm1, layout.eps, n)
        self.qkv.backward_A(dqkv, n, flat, acc, sites[0])
        return g_mid

    def _mlp_backward(
        self, gate_up: Tensor, dgu: Tensor, S: Tensor, g: Tensor, flat: Tensor, accumulate: bool, dropped: Dropped | None,
    ) -> None:  # fmt: skip
        """dgu <- [dgate | dup | dS], and the gradients of B_gate, B_up and A_down: in one sweep where that is faster.

        g: the down projection's [dy | dS], [T, h + R]; the gradient of its input is made here.
        """
        gu, down, f = self.gate_up, self.down, gate_up.shape[1] // 2
        config = self.sweep_config(gate_up.shape[0], dropped is not None)
        if config is None:
            dact, dy = down.backward_x(g, dropped), dgu[:, : 2 * f]
            fused_ops.swiglu_backward(dact, gate_up, dy, dact, gu.scaling)  # dact now holds the activation itself
            if gu.magnitude is not None:
                gu.magnitude.backward(dy, gate_up, dy, flat, accumulate)
            down.backward_A(g, dact, flat, accumulate, dropped)
            gu.backward_B(dgu, S, flat, accumulate)
            return
        dact = down.backward_x(g, None) if dropped is None else down.backward_W(g)  # the sweep adds the masked part
        dA = flat[down.A_start : down.A_start + down.packed.ranks[0] * f]
        starts = iter(gu.B_starts)
        dB_gate, dB_up = (flat[next(starts) :] if r else dA for r in gu.packed.ranks)
        total = sweep.mlp_backward(
            dact, gate_up, dgu, S, g[:, down.packed.out_features :], gu.packed.B, self._ranks(),
            (gu.packed.scales[0], gu.packed.scales[1]), dB_gate, dB_up, dA, config, accumulate=accumulate,
            scaling=gu.scaling, masked=None if dropped is None else (dropped, down.packed.A),
        )  # fmt: skip
        if gu.magnitude is not None and total is not None:
            gu.magnitude.store(total, flat, accumulate)

    def _ranks(self) -> tuple[int, int, int]:
        (gate, up), (down,) = self.gate_up.packed.ranks, self.down.packed.ranks
        return gate, up, down

    def sweep_config(self, T: int, dropped: bool = False) -> sweep.Config | None:
        """The tile shape of the MLP's backward sweep for T rows, timed the first time; None where it is not used."""
        gu, down = self.gate_up.packed, self.down.packed
        if not use_triton(gu.A):
            return None
        scaled = self.gate_up.magnitude is not None
        return sweep_plan.plan(T, down.in_features, gu.rank, self._ranks(), gu.dtype, gu.device, scaled, dropped)
