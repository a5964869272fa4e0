"""A whole Llama-type training step with low-rank adapters, forward and backward written out, at the fused minimum of memory.

A block is ten forward launches and about twenty-five backward ones, and keeps, a token, 4h + 2(2a + 2kv) + 4f bytes and the
rank-wide products: residual stream x and x_mid, rotated q, k, v and the attention's o, gate and up. Norm outputs and the SwiGLU
output are rebuilt by the backward kernels that need them. Layout of the low-rank path: `lowrank.PackedGroup`.

    forward   add+norm -> [n | S] GEMM qkv -> RoPE -> attention -> o (+ S B^T) -> add+norm -> [n | S] GEMM gate|up
              -> SwiGLU -> [h | S] GEMM down
    backward  the same upside down; every dX is one GEMM on [dY | dS]; A's and B's gradients go straight into the flat fp32 buffer

`FusedLlama` is built from parts, so it knows no library; `fuse.from_model` finds the parts in a transformers model.
Limits: causal attention over whole rows (right padding is fine, packed documents are not), frozen norms, biases and head, no dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import attention, fused_ops, sweep
from mmpeft.kernels.adamw import FlatAdamW, Slot
from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.lowrank import LEADING_MULTIPLE, PackedGroup, mm_wide, round_up
from mmpeft.kernels.xent import head_loss


@dataclass
class Group:
    """Linears that share an input: their packed weights, and where their gradients lie in the flat buffer."""

    packed: PackedGroup
    masters: list[tuple[Tensor, Tensor] | None]  # (A [r, in], B [out, r]) of each member
    A_start: int = 0  # all members' A, one after another: [sum r, in]
    B_starts: list[int] = field(default_factory=list)

    def wide(self, T: int, n: int) -> Tensor:
        """An uninitialised [T, n + R] buffer for [x | S] or [dy | dS]."""
        R = self.packed.rank
        return self.packed.buffer.new_empty(T, round_up(n + R, LEADING_MULTIPLE))[:, : n + R]

    def slots(self, start: int) -> Iterator[tuple[Tensor, Slot]]:
        """(master, slot) in flat order, from `start` on: the A of every member, then the B."""
        p, at, self.A_start = self.packed, start, start
        pairs = [m for m in self.masters if m is not None]
        parts = [(a, b, s) for m, a, b, s in zip(self.masters, p.A_parts, p.B_parts, p.scales, strict=True) if m]
        for (A, _), (a, _, _) in zip(pairs, parts, strict=True):
            yield A, Slot(tuple(A.shape), a)
            at += A.numel()
        self.B_starts = []
        for (_, B), (_, b, s) in zip(pairs, parts, strict=True):
            self.B_starts.append(at)
            yield B, Slot(tuple(B.shape), b, s)
            at += B.numel()

    def forward(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """wide [T, in + R] with x in its first columns -> (y [T, out], S [T, R])."""
        n = self.packed.in_features
        S = wide[:, :n] @ self.packed.A.mT
        wide[:, n:].copy_(S)
        return _linear(wide, self.packed.forward_weight, self.packed.bias), S

    def backward(self, wide: Tensor, S: Tensor, flat: Tensor, accumulate: bool, need_dx: bool = True) -> Tensor | None:
        """wide [T, out + R] with dy in its first columns (dS is filled in) -> dx [T, in]; writes dB."""
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
        return wide @ p.backward_weight if need_dx else None

    def backward_A(self, wide: Tensor, x: Tensor, flat: Tensor, accumulate: bool) -> None:
        """Writes dA = dS^T x of all members, from `wide` as `backward` left it."""
        p, r = self.packed, sum(self.packed.ranks)
        if r:
            dA = flat[self.A_start : self.A_start + r * p.in_features].view(r, p.in_features)
            product_into(dA, wide[:, p.out_features : p.out_features + r].mT, x, 1.0, accumulate)


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
    gradient: Tensor  # of the final norm's output
    rows: Tensor | None
    shape: tuple[int, int]


@dataclass
class FusedLlama:
    """embedding -> blocks -> norm -> head -> cross-entropy.

    Args:
        embedding: [V, h]; head: [V, h]; final_norm: [h]. eps: of every norm.
        inv_freq: [d/2], fp32, with `rope_scale` on cos and sin. heads, kv_heads: counts. scale: of q k^T.
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
    chunk_rows: int = 1024

    def __post_init__(self) -> None:
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        self.masters: list[Tensor] = []
        self.slots: list[Slot] = []
        start = 0
        for group in (g for block in self.blocks for g in block.groups()):
            for master, slot in group.slots(start):
                self.masters.append(master)
                self.slots.append(slot)
                start += slot.numel
        self.numel = start
        if not start:
            raise ConfigError("no adapter on any linear of the blocks: nothing to train")
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite the compute copies from the masters; `FlatAdamW.step` does it by itself."""
        for master, slot in zip(self.masters, self.slots, strict=True):
            slot.copy.copy_(master * slot.scale)

    def optimizer(self, **options: Any) -> FlatAdamW:
        """A one-launch AdamW over all adapters (options of `FlatAdamW`)."""
        return FlatAdamW(self.masters, self.slots, **options)

    def loss(
        self, ids: Tensor | None, labels: Tensor, *, inputs: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy of the next token, differentiable in the masters (call `refresh` after changing them).

        Args:
            ids: int64 [B, S], or None with `inputs` [B, S, h] (embeddings, which may need a gradient).
            labels: int64 [B, S], -100 where unsupervised; shifted here.
            rows: int64 indices into [B * S]: the positions the head runs on (those that predict a supervised token); None for all.
        """
        x = F.embedding(ids, self.embedding) if inputs is None else inputs
        return _Loss.apply(self, x, labels, rows, *self.masters)

    @torch.no_grad()
    def forward(self, x: Tensor, labels: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tape]:
        """x [B, S, h], labels [B, S] -> (mean loss, tape)."""
        saved: list[tuple[Any, ...]] = []
        n, last, rstd = self.hidden(x, saved)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)
        if rows is not None:
            n, targets = n[rows], targets[rows]
        scale = 1.0 / (targets != -100).sum().clamp_min(1).to(torch.float32).reshape(1)
        loss, gradient = head_loss(n, self.head, targets, scale, chunk_rows=self.chunk_rows)
        return loss, Tape(saved, (last, rstd), gradient, rows, (x.shape[0], x.shape[1]))

    @torch.no_grad()
    def hidden(self, x: Tensor, saved: list[tuple[Any, ...]] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, h] -> (final norm's output [T, h], its input, its rstd); appends to `saved` what the backward needs."""
        B, S, h = x.shape
        x, delta = x.reshape(B * S, h), None
        tables = self._cos_sin(S)
        if saved is not None:  # tuned now, while memory is still free
            self._sweep_config(self.blocks[0], B * S)
        for block in self.blocks:
            x, delta, kept = self._block(block, x, delta, (B, S), tables)
            if saved is not None:
                saved.append(kept)
        n = torch.empty_like(x)
        return (n, *fused_ops.add_rmsnorm(x, delta, self.final_norm, self.eps, n))

    def _block(
        self, block: Block, x: Tensor, delta: Tensor | None, shape: tuple[int, int], tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        T, h = x.shape
        n = block.qkv.wide(T, h)
        x, rstd1 = fused_ops.add_rmsnorm(x, delta, block.norm1, self.eps, n[:, :h])
        qkv, S_qkv = block.qkv.forward(n)
        q, k, v = self._heads(qkv, shape)
        fused_ops.rope(q, k, None, qkv, *tables)
        o, kept = attention.forward(q, k, v, self.scale)
        o = o.reshape(T, -1)
        S_o = o @ block.o.packed.A.mT
        delta = _linear(o, block.o.packed.W, block.o.packed.bias).addmm_(S_o, block.o.packed.B.mT)
        n = block.gate_up.wide(T, h)
        x_mid, rstd2 = fused_ops.add_rmsnorm(x, delta, block.norm2, self.eps, n[:, :h])
        gate_up, S_gu = block.gate_up.forward(n)
        del n
        f = gate_up.shape[1] // 2
        act = block.down.wide(T, f)
        S_d = fused_ops.swiglu_shrink(gate_up, act, block.down.packed.A)
        delta = _linear(act, block.down.packed.forward_weight, block.down.packed.bias)
        return x_mid, delta, (x, rstd1, S_qkv, qkv, o, kept, S_o, x_mid, rstd2, S_gu, gate_up, S_d)

    @torch.no_grad()
    def backward(self, tape: Tape, flat: Tensor, *, accumulate: bool = False, need_dx: bool = False) -> Tensor | None:
        """Writes (or adds) the masters' gradients into flat [numel] fp32; returns the inputs' gradient [B, S, h] if asked.

        The tape is consumed block by block, so its memory falls as the backward goes.
        """
        if not tape.blocks:
            raise ConfigError(
                "this tape's backward has run: its tensors were freed on the way (retain_graph is not supported)"
            )
        x, rstd = tape.final
        T, h = x.shape
        dn = tape.gradient
        if tape.rows is not None:
            dn = torch.zeros_like(x).index_add_(0, tape.rows, dn)
        tables = self._cos_sin(tape.shape[1])
        g = self.blocks[-1].down.wide(T, h)
        fused_ops.rmsnorm_backward(dn, x, rstd, self.final_norm, None, g[:, :h], None)
        del x, dn
        tape.final = tape.gradient = None  # type: ignore[assignment]
        for i in range(len(self.blocks) - 1, -1, -1):
            below = self.blocks[i - 1].down if i else self.blocks[i].down
            g = self._block_backward(
                self.blocks[i], below, g, tape.blocks.pop(), flat, accumulate, tape.shape, tables, need_dx or i > 0
            )
        return g[:, :h].reshape(*tape.shape, h) if need_dx else None

    def _block_backward(
        self, block: Block, below: Group, g: Tensor, saved: tuple[Any, ...], flat: Tensor, accumulate: bool,
        shape: tuple[int, int], tables: tuple[Tensor, Tensor], need_dx: bool,
    ) -> Tensor:  # fmt: skip
        x, rstd1, S_qkv, qkv, o, kept, S_o, x_mid, rstd2, S_gu, gate_up, S_d = saved
        del saved
        (T, h), f, acc = x.shape, gate_up.shape[1] // 2, accumulate

        dact = block.down.backward(g, S_d, flat, acc)
        dgu = block.gate_up.wide(T, 2 * f)
        self._mlp_backward(block, dact, gate_up, dgu, S_gu, g, flat, acc)
        del gate_up, dact, S_d

        dn = dgu @ block.gate_up.packed.backward_weight
        n, g_mid = torch.empty_like(x), block.o.wide(T, h)
        fused_ops.rmsnorm_backward(dn, x_mid, rstd2, block.norm2, g[:, :h], g_mid[:, :h], n)
        block.gate_up.backward_A(dgu, n, flat, acc)
        del dgu, x_mid, g, S_gu

        do = block.o.backward(g_mid, S_o, flat, acc)
        block.o.backward_A(g_mid, o, flat, acc)
        q, k, v = self._heads(qkv, shape)
        o4 = o.view(*shape, self.heads, -1)
        dq, dk, dv = attention.backward(do.view_as(o4), q, k, v, o4, kept, self.scale)
        dqkv = block.qkv.wide(T, qkv.shape[1])
        fused_ops.rope(dq, dk, dv, dqkv, *tables, inverse=True)
        del do, dq, dk, dv, q, k, v, o4, o, kept, qkv

        dn = block.qkv.backward(dqkv, S_qkv, flat, acc, need_dx)
        if dn is None:  # nothing trains below: only the norm's output is wanted, for dA
            fused_ops.add_rmsnorm(x, None, block.norm1, self.eps, n)
            g = g_mid
        else:
            g = below.wide(T, h)
            fused_ops.rmsnorm_backward(dn, x, rstd1, block.norm1, g_mid[:, :h], g[:, :h], n)
        block.qkv.backward_A(dqkv, n, flat, acc)
        return g

    def _mlp_backward(
        self, block: Block, dact: Tensor, gate_up: Tensor, dgu: Tensor, S: Tensor, g: Tensor, flat: Tensor, accumulate: bool
    ) -> None:  # fmt: skip
        """dgu <- [dgate | dup | dS], and the gradients of B_gate, B_up and A_down: in one sweep where that is faster.

        g: [T, h + R], as the down projection's backward left it; dact's memory is free afterwards.
        """
        gu, down, f = block.gate_up, block.down, dact.shape[1]
        config = self._sweep_config(block, dact.shape[0])
        if config is None:
            fused_ops.swiglu_backward(dact, gate_up, dgu[:, : 2 * f], dact)  # dact now holds the activation itself
            down.backward_A(g, dact, flat, accumulate)
            gu.backward(dgu, S, flat, accumulate, need_dx=False)
            return
        dA = flat[down.A_start : down.A_start + down.packed.ranks[0] * f]
        starts = iter(gu.B_starts)
        dB_gate, dB_up = (flat[next(starts) :] if r else dA for r in gu.packed.ranks)
        sweep.mlp_backward(
            dact, gate_up, dgu, S, g[:, down.packed.out_features :], gu.packed.B, (*gu.packed.ranks, *down.packed.ranks),
            (gu.packed.scales[0], gu.packed.scales[1]), dB_gate, dB_up, dA, config, accumulate=accumulate,
        )  # fmt: skip

    def _sweep_config(self, block: Block, T: int) -> sweep.Config | None:
        gu, down = block.gate_up.packed, block.down.packed
        if not use_triton(gu.buffer):
            return None
        ranks = (gu.ranks[0], gu.ranks[1], down.ranks[0])
        return sweep.plan(T, down.in_features, gu.rank, ranks, gu.buffer.dtype, gu.buffer.device)

    def _heads(self, qkv: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(*shape, self.heads + 2 * self.kv_heads, -1)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
        return q, k, v

    def _cos_sin(self, S: int) -> tuple[Tensor, Tensor]:
        """cos and sin of every position: two [S, d/2], fp32."""
        if S not in self._tables:
            angles = torch.arange(S, device=self.inv_freq.device, dtype=torch.float32)[:, None] * self.inv_freq.float()
            self._tables[S] = (angles.cos() * self.rope_scale, angles.sin() * self.rope_scale)
        return self._tables[S]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    """Whether this torch's addmm writes an fp32 result of half-precision factors in place (one launch instead of three)."""
    a = torch.ones(16, 16, dtype=dtype, device="cuda")
    out = torch.ones(16, 16, device="cuda")
    try:
        torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, beta=1.0, alpha=0.5, out=out)
    except (AttributeError, RuntimeError):
        return False
    return bool((out == 9).all())


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model: FusedLlama, x: Tensor, labels: Tensor, rows: Tensor | None, *masters: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        loss, ctx.tape = model.forward(x, labels, rows)
        ctx.model, ctx.dtype = model, masters[0].dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def, override]
        model, tape = ctx.model, ctx.tape
        if tape.blocks:
            tape.gradient.mul_(grad)
        flat = model.blocks[0].norm1.new_empty(model.numel, dtype=ctx.dtype)
        dx = model.backward(tape, flat, need_dx=ctx.needs_input_grad[1])
        parts = flat.split([s.numel for s in model.slots])
        return None, dx, None, None, *(g.view(s.shape) for g, s in zip(parts, model.slots, strict=True))


class TrainStep:
    """Forward, backward and optimizer at one batch shape, as one CUDA graph where there is a GPU.

    step = TrainStep(model, model.optimizer(lr=1e-4), batch=8, length=1024); loss = step(ids, labels)

    The loss is a device tensor that the next call overwrites; nothing here waits for the device.
    """

    def __init__(
        self, model: FusedLlama, optimizer: FlatAdamW, *, batch: int, length: int, rows: int | None = None
    ) -> None:
        device = model.embedding.device
        self.model, self.optimizer = model, optimizer
        self.ids, self.labels = (torch.zeros(batch, length, dtype=torch.int64, device=device) for _ in range(2))
        self.rows = None if rows is None else torch.zeros(rows, dtype=torch.int64, device=device)
        self._graph: Any = None

    def __call__(self, ids: Tensor, labels: Tensor, rows: Tensor | None = None) -> Tensor:
        """One update on ids, labels [B, S]; the mean loss before it. `rows`: supervised positions, as many as announced."""
        self.ids.copy_(ids, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        if self.rows is not None and rows is not None:
            self.rows.copy_(rows, non_blocking=True)
        if not self.ids.is_cuda:
            return self._run()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._loss

    def _run(self) -> Tensor:
        loss, tape = self.model.forward(F.embedding(self.ids, self.model.embedding), self.labels, self.rows)
        self.model.backward(tape, self.optimizer.grad)
        self.optimizer.step()
        return loss

    def _capture(self) -> None:
        state = [t.clone() for t in self._state()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()  # compiles the kernels and picks the attention; undone below
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for t, before in zip(self._state(), state, strict=True):
            t.copy_(before)
        self.optimizer.refresh()
        del state, t, before
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._run()

    def _state(self) -> Sequence[Tensor]:
        o = self.optimizer
        return o.flat, o.m, o.v, o.steps
