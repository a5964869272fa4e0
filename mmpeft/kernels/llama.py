"""A whole Llama-type training step with low-rank adapters, written out, at the fused minimum of memory.

A block is ten forward launches and about twenty-five backward ones, and keeps, a token, 4h + 2(2a + 2kv) + 4f bytes
and the rank-wide products: residual stream x and x_mid, rotated q, k, v and the attention's o, gate and up. Norm
outputs and the SwiGLU output are rebuilt by the backward kernels that need them. Layout of the low-rank path:
`packed.PackedGroup`.

    forward   add+norm -> [n | S] GEMM qkv -> RoPE -> attention -> o (+ S B^T) -> add+norm -> [n | S] GEMM gate|up
              -> SwiGLU -> [h | S] GEMM down
    backward  the same upside down; every dX is one GEMM on [dY | dS]; A's and B's gradients go straight into the flat
    fp32 buffer

`FusedLlama` is built from parts, so it knows no library; `fuse.from_model` finds the parts in a transformers model.
Limits: causal attention over whole rows (right padding is fine, packed documents are not), frozen norms, biases and
head. Dropout is right but takes the long way (each masked copy is materialised, and the sweep is not used).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import attention, fused_ops, recorded, sweep
from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.group import Dropped, Group, Masters, linear
from mmpeft.kernels.xent import head_loss

Sites = tuple[Dropped | None, Dropped | None, Dropped | None, Dropped | None]  # of qkv, o, gate_up, down


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


@dataclass
class Tape:
    """What a forward keeps for its backward."""

    blocks: list[tuple[Any, ...]]
    final: tuple[Tensor, Tensor]
    gradient: Tensor | None  # of the final norm's output
    rows: Tensor | None
    shape: tuple[int, int]
    dropped: Dropped | None


@dataclass
class FusedLlama(Masters):
    """embedding -> blocks -> norm -> head -> cross-entropy.

    Args:
        embedding: [V, h]; head: [V, h]; final_norm: [h]. eps: of every norm.
        inv_freq: [d/2], fp32, with `rope_scale` on cos and sin. heads, kv_heads: counts. scale: of q k^T.
        dropout: on every adapter's input, in `forward` and `loss`; masks are a function of `self.seed`, which each
            forward advances, and are redrawn in the backward.
    """

    embedding: Tensor
    blocks: list[Block]
    final_norm: Tensor
    head: Tensor
    eps: float
    inv_freq: Tensor
    heads: int
    kv_heads: int
    scale: float
    rope_scale: float = 1.0
    dropout: float = 0.0
    chunk_rows: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}; expected 0 <= dropout < 1")
        self.seed = torch.zeros(1, dtype=torch.int64, device=self.embedding.device)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.collect(g for block in self.blocks for g in block.groups())

    def loss(
        self, ids: Tensor | None, labels: Tensor, *, inputs: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy of the next token, differentiable in the masters (call `refresh` after changing them).

        Args:
            ids: int64 [B, S], or None with `inputs` [B, S, h] (embeddings, which may need a gradient).
            labels: int64 [B, S], -100 where unsupervised; shifted here.
            rows: int64 indices into [B * S] of the positions the head runs on (those before a supervised token).
        """
        if (ids is None) == (inputs is None):
            raise ConfigError("give either ids or inputs (embeddings)")
        x = inputs if inputs is not None else F.embedding(cast(Tensor, ids), self.embedding)
        return recorded.loss(self, x, labels, rows)

    def states(self, x: Tensor) -> Tensor:
        """Embeddings x [B, S, h] -> the last hidden states [B, S, h], final norm included, differentiable in x and the
        masters; without gradients nothing is kept."""
        if not torch.is_grad_enabled():
            return self.record(x)[0] if self.dropout else self.hidden(x)[0].view(x.shape)
        return recorded.run(self, x)

    @torch.no_grad()
    def record(self, x: Tensor) -> tuple[Tensor, Tape]:
        """Embeddings x [B, S, h] -> (last hidden states [B, S, h], tape)."""
        saved: list[tuple[Any, ...]] = []
        dropped = self.draw()
        n, last, rstd = self.hidden(x, saved, dropped)
        return n.view(x.shape), Tape(saved, (last, rstd), None, None, (x.shape[0], x.shape[1]), dropped)

    def draw(self) -> Dropped | None:
        """This forward's dropout masks."""
        dropped = Dropped(self.dropout, self.seed.clone()) if self.dropout else None
        self.seed.add_(32 * len(self.blocks))
        return dropped

    @torch.no_grad()
    def forward(self, x: Tensor, labels: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tape]:
        """x [B, S, h], labels [B, S] -> (mean loss, tape)."""
        saved: list[tuple[Any, ...]] = []
        dropped = self.draw()
        n, last, rstd = self.hidden(x, saved, dropped)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
        if rows is not None:
            n, targets = n[rows], targets[rows]
        scale = 1.0 / (targets != -100).sum().clamp_min(1).to(torch.float32).reshape(1)
        loss, gradient = head_loss(n, self.head, targets, scale, chunk_rows=self.chunk_rows)
        return loss, Tape(saved, (last, rstd), gradient, rows, (x.shape[0], x.shape[1]), dropped)

    @torch.no_grad()
    def hidden(
        self, x: Tensor, saved: list[tuple[Any, ...]] | None = None, dropped: Dropped | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, h] -> (final norm's output [T, h], its input, its rstd); appends to `saved` for the backward."""
        B, S, h = x.shape
        x, delta = x.reshape(B * S, h).contiguous(), None
        tables = self._cos_sin(S)
        if saved is not None:  # tuned now, while memory is still free
            self._sweep_config(self.blocks[0], B * S)
        for i, block in enumerate(self.blocks):
            x, delta, kept = self._block(block, x, delta, (B, S), tables, _sites(dropped, i))
            if saved is not None:
                saved.append(kept)
        n = torch.empty_like(x)
        return (n, *fused_ops.add_rmsnorm(x, delta, self.final_norm, self.eps, n))

    def _block(
        self,
        block: Block,
        x: Tensor,
        delta: Tensor | None,
        shape: tuple[int, int],
        tables: tuple[Tensor, Tensor],
        sites: Sites,
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        T, h = x.shape
        n = block.qkv.wide(T, h)
        x, rstd1 = fused_ops.add_rmsnorm(x, delta, block.norm1, self.eps, n[:, :h])
        qkv, S_qkv = block.qkv.forward(n, sites[0])
        q, k, v = self._heads(qkv, shape)
        fused_ops.rope(q, k, None, qkv, *tables)
        o, kept = attention.forward(q, k, v, self.scale)
        o = o.reshape(T, -1)
        S_o = block.o.shrink(o, sites[1])
        delta = linear(o, block.o.packed.W, block.o.packed.bias).addmm_(S_o, block.o.packed.B.mT)
        n = block.gate_up.wide(T, h)
        x_mid, rstd2 = fused_ops.add_rmsnorm(x, delta, block.norm2, self.eps, n[:, :h])
        gate_up, S_gu = block.gate_up.forward(n, sites[2])
        del n
        f = gate_up.shape[1] // 2
        act = block.down.wide(T, f)
        S_d = fused_ops.swiglu_shrink(gate_up, act, block.down.packed.A)
        if sites[3] is not None:
            S_d = block.down.shrink(act[:, :f], sites[3])
            act[:, f:].copy_(S_d)
        delta = linear(act, block.down.packed.forward_weight, block.down.packed.bias)
        return x_mid, delta, (x, rstd1, S_qkv, qkv, o, kept, S_o, x_mid, rstd2, S_gu, gate_up, S_d)

    @torch.no_grad()
    def backward(self, tape: Tape, flat: Tensor, *, accumulate: bool = False, need_dx: bool = False) -> Tensor | None:
        """Writes (or adds) the masters' gradients into flat [numel], fp32; returns the inputs' [B, S, h] if asked.

        The tape is consumed block by block, so its memory falls as the backward goes.
        """
        if not tape.blocks:
            raise ConfigError(
                "this tape's backward has run: its tensors were freed on the way (retain_graph is not supported)"
            )
        x, rstd = tape.final
        T, h = x.shape
        dn = cast(Tensor, tape.gradient)
        if tape.rows is not None:
            dn = torch.zeros_like(x).index_add_(0, tape.rows, dn)
        tables = self._cos_sin(tape.shape[1])
        g = self.blocks[-1].down.wide(T, h)
        fused_ops.rmsnorm_backward(dn, x, rstd, self.final_norm, None, g[:, :h], None)
        del x, dn
        tape.final, tape.gradient = None, None  # type: ignore[assignment]
        for i in range(len(self.blocks) - 1, -1, -1):
            below = self.blocks[i - 1].down if i else self.blocks[i].down
            g = self._block_backward(
                self.blocks[i], below, g, tape.blocks.pop(), flat, accumulate, tape.shape, tables, need_dx or i > 0,
                _sites(tape.dropped, i),
            )  # fmt: skip
        return g[:, :h].reshape(*tape.shape, h) if need_dx else None

    def _block_backward(
        self, block: Block, below: Group, g: Tensor, saved: tuple[Any, ...], flat: Tensor, accumulate: bool,
        shape: tuple[int, int], tables: tuple[Tensor, Tensor], need_dx: bool, sites: Sites,
    ) -> Tensor:  # fmt: skip
        x, rstd1, S_qkv, qkv, o, kept, S_o, x_mid, rstd2, S_gu, gate_up, S_d = saved
        del saved
        (T, h), f, acc = x.shape, gate_up.shape[1] // 2, accumulate

        dact = block.down.backward(g, S_d, flat, acc, sites[3])
        dgu = block.gate_up.wide(T, 2 * f)
        self._mlp_backward(block, dact, gate_up, dgu, S_gu, g, flat, acc, sites[3])
        del gate_up, dact, S_d

        dn = block.gate_up.backward_x(dgu, sites[2])
        n, g_mid = torch.empty_like(x), block.o.wide(T, h)
        fused_ops.rmsnorm_backward(dn, x_mid, rstd2, block.norm2, g[:, :h], g_mid[:, :h], n)
        block.gate_up.backward_A(dgu, n, flat, acc, sites[2])
        del dgu, x_mid, g, S_gu

        do = block.o.backward(g_mid, S_o, flat, acc, sites[1])
        block.o.backward_A(g_mid, o, flat, acc, sites[1])
        q, k, v = self._heads(qkv, shape)
        o4 = o.view(*shape, self.heads, -1)
        dq, dk, dv = attention.backward(do.view_as(o4), q, k, v, o4, kept, self.scale)
        dqkv = block.qkv.wide(T, qkv.shape[1])
        fused_ops.rope(dq, dk, dv, dqkv, *tables, inverse=True)
        del do, dq, dk, dv, q, k, v, o4, o, kept, qkv

        if need_dx:
            dn, g = block.qkv.backward(dqkv, S_qkv, flat, acc, sites[0]), below.wide(T, h)
            fused_ops.rmsnorm_backward(dn, x, rstd1, block.norm1, g_mid[:, :h], g[:, :h], n)
        else:  # nothing trains below: only the norm's output is wanted, for dA
            block.qkv.backward_B(dqkv, S_qkv, flat, acc)
            fused_ops.add_rmsnorm(x, None, block.norm1, self.eps, n)
            g = g_mid
        block.qkv.backward_A(dqkv, n, flat, acc, sites[0])
        return g

    def _mlp_backward(
        self, block: Block, dact: Tensor, gate_up: Tensor, dgu: Tensor, S: Tensor, g: Tensor, flat: Tensor,
        accumulate: bool, dropped: Dropped | None,
    ) -> None:  # fmt: skip
        """dgu <- [dgate | dup | dS], and the gradients of B_gate, B_up and A_down: in one sweep where that is faster.

        g: [T, h + R], as the down projection's backward left it; dact's memory is free afterwards.
        """
        gu, down, f = block.gate_up, block.down, dact.shape[1]
        config = None if dropped else self._sweep_config(block, dact.shape[0])
        if config is None:
            fused_ops.swiglu_backward(dact, gate_up, dgu[:, : 2 * f], dact)  # dact now holds the activation itself
            down.backward_A(g, dact, flat, accumulate, dropped)
            gu.backward_B(dgu, S, flat, accumulate)
            return
        dA = flat[down.A_start : down.A_start + down.packed.ranks[0] * f]
        starts = iter(gu.B_starts)
        dB_gate, dB_up = (flat[next(starts) :] if r else dA for r in gu.packed.ranks)
        sweep.mlp_backward(
            dact, gate_up, dgu, S, g[:, down.packed.out_features :], gu.packed.B, self._ranks(block),
            (gu.packed.scales[0], gu.packed.scales[1]), dB_gate, dB_up, dA, config, accumulate=accumulate,
        )  # fmt: skip

    def _ranks(self, block: Block) -> tuple[int, int, int]:
        (gate, up), (down,) = block.gate_up.packed.ranks, block.down.packed.ranks
        return gate, up, down

    def _sweep_config(self, block: Block, T: int) -> sweep.Config | None:
        gu, down = block.gate_up.packed, block.down.packed
        if not use_triton(gu.buffer):
            return None
        return sweep.plan(T, down.in_features, gu.rank, self._ranks(block), gu.buffer.dtype, gu.buffer.device)

    def _heads(self, qkv: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(*shape, self.heads + 2 * self.kv_heads, -1)
        q, k, v = heads.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], 2)
        return q, k, v

    def _cos_sin(self, S: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every position: two [S, d/2], fp32."""
        if S not in self._tables:
            angles = torch.arange(S, device=self.inv_freq.device, dtype=torch.float32)[:, None] * self.inv_freq.float()
            self._tables[S] = (angles.cos() * self.rope_scale, angles.sin() * self.rope_scale)
        return self._tables[S]


def _sites(dropped: Dropped | None, block: int) -> Sites:
    """Dropout of a block's four groups."""
    if dropped is None:
        return None, None, None, None
    qkv, o, gate_up, down = (dropped.at(4 * block + i) for i in range(4))
    return qkv, o, gate_up, down
