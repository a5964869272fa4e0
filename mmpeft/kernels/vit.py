"""A stack of pre-norm ViT blocks (ViT, SigLIP, CLIP, DINOv2), frozen or with low-rank adapters, written out.

    forward   add+norm -> [n | S] GEMM qkv -> attention -> proj (+ S B^T) -> add+norm -> [n | S] GEMM fc1 -> GELU -> fc2
    backward  the same upside down; every dX is one GEMM on [dY | dS]; A's and B's gradients go straight into the flat
              fp32 buffer

A block keeps, a token, 20 h bytes in half precision (x, q, k, v, the attention's o, x_mid and fc1's output at f = 4h) and
the rank-wide products; norm and GELU outputs are rebuilt by the backward kernels that need them. Where no gradient can
flow (a frozen tower over pixels) nothing is kept. Linears without an adapter have no rank columns (`plain.Plain`).

Where a kernel allows (`vit_sweep`: no dropout, ranks up to 32), GELU goes with fc2's shrink in one pass, and its gradient
with fc1's dS and dB and fc2's dA. Each block's gradient is written where fc2's backward below reads it, attention's where
qkv's does.

The stack runs whole (one autograd node) or block by block (`OneBlock`, for callers that look at what is between the
blocks); both read the same weights and masters. `fuse_vit` finds the parts in a model. Limits: frozen norms, biases and
layer scales, no mask, no drop path. Layout of the low-rank path: `packed.PackedGroup`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import attention, fused_ops, recorded, vit_sweep
from mmpeft.kernels.adamw import Refresher, Slot
from mmpeft.kernels.dispatch import use_triton
from mmpeft.kernels.group import Dropped, Group, Masters, linear
from mmpeft.kernels.plain import Plain
from mmpeft.kernels.sweep import Config

Linears = Group | Plain
Pending = tuple[Tensor, Tensor | None]  # a branch's output [B * T, h], and its layer scale [h]: not added yet


@dataclass
class Norm:
    """A LayerNorm's frozen gain, bias and epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass
class VitBlock:
    """One block. qkv: members q, k, v, or one for all three. scale1, scale2: layer scales [h] of the two branches."""

    norm1: Norm
    qkv: Linears
    proj: Linears
    norm2: Norm
    fc1: Linears
    fc2: Linears
    scale1: Tensor | None = None
    scale2: Tensor | None = None

    def groups(self) -> tuple[Linears, Linears, Linears, Linears]:
        """The four groups in flat order."""
        return self.qkv, self.proj, self.fc1, self.fc2


@dataclass
class VitTape:
    """What a forward over blocks `first`, `first` + 1, ... keeps for its backward."""

    blocks: list[tuple[Any, ...]]
    gradient: Tensor | None  # of the output
    shape: tuple[int, int]
    dropped: Dropped | None
    first: int


@dataclass
class FusedVit(Masters):
    """x [B, T, h] -> the stack's output [B, T, h].

    Args:
        heads: count. gelu: "none" (exact), "tanh" or "quick". dropout: on every adapter's input, in `record`.
        copies: (part of a group's bias, the model's own bias it was copied from).
    """

    blocks: list[VitBlock]
    heads: int
    scale: float
    gelu: str = "none"
    dropout: float = 0.0
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}; expected 0 <= dropout < 1")
        self.seed = torch.zeros(1, dtype=torch.int64, device=self.blocks[0].norm1.weight.device)
        self.masters: list[Tensor] = []
        self.slots: list[Slot] = []
        self.starts, self.firsts = [0], [0]  # where each block's part of the flat buffer, of the masters, begins
        for block in self.blocks:
            numel = 0  # a block's groups count from its own start: it may run alone
            for group in block.groups():
                for master, slot in group.slots(numel):
                    self.masters.append(master)
                    self.slots.append(slot)
                    numel += slot.numel
            self.starts.append(self.starts[-1] + numel)
            self.firsts.append(len(self.masters))
        self.numel = self.starts[-1]
        self._refresher = Refresher(self.slots)
        self.refresh()

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        fc1 = self.blocks[0].fc1
        return (fc1.W if isinstance(fc1, Plain) else fc1.packed.buffer).dtype

    @torch.no_grad()
    def recopy(self) -> None:
        """The groups' biases from the model's own again, where those are copies."""
        for mine, own in self.copies:
            mine.copy_(own)

    def states(self, x: Tensor) -> Tensor:
        """The output, differentiable in x and the masters; without gradients nothing is kept."""
        return self._states(x, self, 0, len(self.blocks))

    def block_states(self, x: Tensor, index: int) -> Tensor:
        """One block's output, likewise."""
        return self._states(x, OneBlock(self, index), index, index + 1)

    def _states(self, x: Tensor, part: FusedVit | OneBlock, first: int, last: int) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or any(m.requires_grad for m in part.masters)):
            return recorded.run(part, x)
        with torch.no_grad():
            return self._forward(x, first, last, None, self._drop())

    @torch.no_grad()
    def record(self, x: Tensor, first: int = 0, last: int | None = None) -> tuple[Tensor, VitTape]:
        """x [B, T, h] through blocks `first` to `last` (exclusive; None: all) -> (output, tape)."""
        dropped, saved = self._drop(), list[tuple[Any, ...]]()
        y = self._forward(x, first, len(self.blocks) if last is None else last, saved, dropped)
        return y, VitTape(saved, None, (x.shape[0], x.shape[1]), dropped, first)

    def _drop(self) -> Dropped | None:
        """This pass's dropout; the next pass draws other masks."""
        if not self.dropout:
            return None
        dropped = Dropped(self.dropout, self.seed.clone())
        self.seed.add_(32 * len(self.blocks))
        return dropped

    def _forward(
        self, x: Tensor, first: int, last: int, saved: list[tuple[Any, ...]] | None, dropped: Dropped | None
    ) -> Tensor:
        B, T, h = x.shape
        x, pending = x.reshape(B * T, h).contiguous(), None
        if saved is not None:  # tuned now, while memory is still free
            self._tile(self.blocks[first], B * T)
        for i in range(first, last):
            x, pending, kept = self._block(self.blocks[i], x, pending, (B, T), _sites(dropped, i), saved is not None)
            if saved is not None:
                saved.append(kept)
            del kept
        assert pending is not None
        return _add(x, pending).view(B, T, h)

    def _block(
        self, block: VitBlock, x: Tensor, pending: Pending | None, shape: tuple[int, int],
        sites: tuple[Dropped | None, ...], keep: bool,
    ) -> tuple[Tensor, Pending, tuple[Any, ...]]:  # fmt: skip
        rows, h = x.shape
        n = block.qkv.wide(rows, h)
        x, mean1, rstd1 = _norm(x, pending, block.norm1, n[:, :h])
        qkv, S_qkv = block.qkv.forward(n, sites[0])
        o, kept = attention.forward(*self._heads(qkv, shape), self.scale, causal=False, keep=keep)
        o = o.reshape(rows, h)
        delta, S_o = _narrow(block.proj, o, sites[1])
        n = block.fc1.wide(rows, h)
        x_mid, mean2, rstd2 = _norm(x, (delta, block.scale1), block.norm2, n[:, :h])
        if not keep and isinstance(block.fc1, Plain) and isinstance(block.fc2, Plain):
            delta, _ = block.fc2.forward(block.fc1.gelu(n, self.gelu))
            return x_mid, (delta, block.scale2), ()
        u, S_1 = block.fc1.forward(n, sites[2])
        f = u.shape[1]
        g = block.fc2.wide(rows, f)
        if isinstance(block.fc2, Group) and sites[3] is None and use_triton(u) and vit_sweep.shrinks(block.fc2.packed.rank):
            S_2: Tensor | None = vit_sweep.gelu_shrink(u, g, block.fc2.packed.A, self.gelu)
            block.fc2.packed.load()
            delta = linear(g, block.fc2.packed.forward_weight, block.fc2.bias)
        else:
            fused_ops.gelu(u, g[:, :f], self.gelu)
            delta, S_2 = block.fc2.forward(g, sites[3])
        saved = (x, mean1, rstd1, S_qkv, qkv, o, kept, S_o, x_mid, mean2, rstd2, S_1, u, S_2)
        return x_mid, (delta, block.scale2), saved

    @torch.no_grad()
    def backward(self, tape: VitTape, flat: Tensor, *, accumulate: bool = False, need_dx: bool = False) -> Tensor | None:
        """Writes (or adds) the gradients of the masters of the tape's blocks into flat; returns x's [B, T, h] if asked.
        The tape is consumed."""
        if not tape.blocks or tape.gradient is None:
            raise ConfigError(
                "this tape's backward has run: its tensors were freed on the way (retain_graph is not supported)"
            )
        gradient, tape.gradient = tape.gradient, None
        begin, last = self.starts[tape.first], tape.first + len(tape.blocks) - 1
        g, wide = _room(self.blocks[last], gradient)
        if self.blocks[last].scale2 is None:
            g.copy_(gradient)  # of every other block, the norm's backward writes it here
        else:
            g = gradient
        del gradient
        for i in range(last, tape.first - 1, -1):
            mine = flat[self.starts[i] - begin : self.starts[i + 1] - begin]
            sites = _sites(tape.dropped, i)
            below = self.blocks[i - 1] if i > tape.first else None
            g, wide = self._block_backward(
                self.blocks[i], below, g, wide, tape.blocks.pop(), mine, accumulate, tape.shape, sites,
                need_dx or below is not None,
            )  # fmt: skip
        return g.reshape(*tape.shape, -1) if need_dx else None

    def _block_backward(
        self, block: VitBlock, below: VitBlock | None, g: Tensor, wide: Tensor, saved: tuple[Any, ...], flat: Tensor,
        accumulate: bool, shape: tuple[int, int], sites: tuple[Dropped | None, ...], need_dx: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The output's gradient g, in fc2's `wide` (`_room`) -> that of x, in the room of the block `below` likewise."""
        x, mean1, rstd1, S_qkv, qkv, o, kept, S_o, x_mid, mean2, rstd2, S_1, u, S_2 = saved
        del saved
        (rows, h), f, acc = x.shape, u.shape[1], accumulate

        if block.scale2 is not None:
            torch.mul(g, block.scale2, out=wide[:, :h])
        dg = block.fc2.backward(wide, S_2, flat, acc, sites[3])
        du = block.fc1.wide(rows, f)
        if self._swept(block, dg, u, du, wide, S_1, flat, acc, sites[3]):
            dn = block.fc1.backward_x(du, sites[2]) if isinstance(block.fc1, Group) else du @ block.fc1.W
        else:
            fused_ops.gelu_backward(dg, u, du[:, :f], dg, self.gelu)  # dg now holds the activation itself
            block.fc2.backward_A(wide, dg, flat, acc, sites[3])
            dn = block.fc1.backward(du, S_1, flat, acc, sites[2])
        del u, dg, wide

        n, dmid = torch.empty_like(x), block.proj.wide(rows, h)
        g_mid = dmid[:, :h] if block.scale1 is None else torch.empty_like(x)
        _norm_backward(dn, x_mid, mean2, rstd2, block.norm2, g, g_mid, n)
        block.fc1.backward_A(du, n, flat, acc, sites[2])
        del du, x_mid, g

        if block.scale1 is not None:
            torch.mul(g_mid, block.scale1, out=dmid[:, :h])
        do = block.proj.backward(dmid, S_o, flat, acc, sites[1])
        block.proj.backward_A(dmid, o, flat, acc, sites[1])
        q, k, v = self._heads(qkv, shape)
        o4 = o.view(*shape, self.heads, -1)
        dqkv = block.qkv.wide(rows, 3 * h)
        grads = self._heads(dqkv[:, : 3 * h], shape)
        attention.backward(do.view_as(o4), q, k, v, o4, kept, self.scale, causal=False, out=grads)
        del do, grads, q, k, v, o4, o, kept, qkv

        out, wide = (g_mid, x) if below is None else _room(below, x)
        if need_dx:
            out = torch.empty_like(x) if below is None else out
            dn = block.qkv.backward(dqkv, S_qkv, flat, acc, sites[0])
            _norm_backward(dn, x, mean1, rstd1, block.norm1, g_mid, out, n)
        elif isinstance(block.qkv, Group):  # nothing trains below: only the norm's output is wanted, for dA
            block.qkv.backward_B(dqkv, S_qkv, flat, acc)
            _norm(x, None, block.norm1, n)
        block.qkv.backward_A(dqkv, n, flat, acc, sites[0])
        return out, wide

    def _swept(
        self, block: VitBlock, dg: Tensor, u: Tensor, du: Tensor, wide: Tensor, S: Tensor | None, flat: Tensor,
        accumulate: bool, dropped: Dropped | None,
    ) -> bool:  # fmt: skip
        """du <- [du | dS], and the gradients of fc1's B and fc2's A in one sweep; False where that is not faster."""
        (rows, f), (r_up, r_down) = u.shape, (_rank(block.fc1), _rank(block.fc2))
        config = None if dropped is not None else self._tile(block, rows)
        if config is None:
            return False
        up = down = None
        if isinstance(block.fc1, Group) and S is not None and r_up:
            p, start = block.fc1.packed, block.fc1.B_starts[0]
            up = vit_sweep.Up(S, p.B, flat[start : start + f * r_up], r_up, p.scales[0])
        if isinstance(block.fc2, Group) and r_down:
            start = block.fc2.A_start
            dS = wide[:, block.fc2.packed.out_features :]
            down = vit_sweep.Down(dS, flat[start : start + f * r_down], r_down)
        vit_sweep.mlp_backward(dg, u, du, self.gelu, up, down, config, accumulate=accumulate)
        return True

    def _tile(self, block: VitBlock, rows: int) -> Config | None:
        """The tile shape of the MLP's backward sweep for so many rows, timed the first time; None where it is not used."""
        W = block.fc1.W if isinstance(block.fc1, Plain) else block.fc1.packed.W
        if not use_triton(W) or (isinstance(block.fc1, Group) and not _rank(block.fc1)):
            return None
        ranks = _rank(block.fc1), _rank(block.fc2)
        return vit_sweep.plan(rows, W.shape[0], *ranks, self.gelu, W.dtype, W.device)

    def _heads(self, qkv: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(*shape, 3, self.heads, -1).unbind(2)
        return q, k, v


class OneBlock:
    """Block `index` of a stack alone, as an autograd node: its masters, and its part of the flat buffer."""

    def __init__(self, stack: FusedVit, index: int) -> None:
        self.stack, self.index = stack, index
        mine = slice(stack.firsts[index], stack.firsts[index + 1])
        self.masters, self.slots = stack.masters[mine], stack.slots[mine]
        self.numel = stack.starts[index + 1] - stack.starts[index]

    def record(self, x: Tensor) -> tuple[Tensor, VitTape]:
        """As of the stack."""
        return self.stack.record(x, self.index, self.index + 1)

    def backward(self, tape: VitTape, flat: Tensor, *, accumulate: bool = False, need_dx: bool = False) -> Tensor | None:
        """As of the stack; flat [numel] of this block."""
        return self.stack.backward(tape, flat, accumulate=accumulate, need_dx=need_dx)


def _narrow(group: Linears, x: Tensor, dropped: Dropped | None) -> tuple[Tensor, Tensor | None]:
    """The group's product of an x that is not in a wide buffer."""
    if isinstance(group, Plain):
        return group.forward(x)
    S, p = group.shrink(x, dropped), group.packed
    return linear(x, p.W, p.bias).addmm_(S, p.B.mT), S


def _add(x: Tensor, pending: Pending) -> Tensor:
    delta, scale = pending
    return x + delta if scale is None else torch.addcmul(x, delta, scale)


def _room(block: VitBlock, like: Tensor) -> tuple[Tensor, Tensor]:
    """(where the gradient of a block's output is written [B * T, h], the wide buffer that fc2's backward reads): the first
    is a part of the second, unless a layer scale lies between them."""
    h = like.shape[-1]
    wide = block.fc2.wide(like.numel() // h, h)
    return (wide[:, :h] if block.scale2 is None else like.new_empty(wide.shape[0], h)), wide


def _rank(group: Linears) -> int:
    """Of the adapter on a single linear; 0 without."""
    return group.packed.ranks[0] if isinstance(group, Group) else 0


def _norm(x: Tensor, pending: Pending | None, norm: Norm, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    delta = None if pending is None else pending[0]
    if pending is not None and pending[1] is not None:  # one pass more than without a layer scale
        x, delta = _add(x, pending), None
    return fused_ops.add_layernorm(x, delta, norm.weight, norm.bias, norm.eps, n)


def _norm_backward(
    dn: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, g: Tensor, out: Tensor, n: Tensor
) -> None:
    fused_ops.layernorm_backward(dn, x, mean, rstd, norm.weight, norm.bias, g, out, n)


def _sites(dropped: Dropped | None, block: int) -> tuple[Dropped | None, ...]:
    """Dropout of a block's four groups."""
    return tuple(None if dropped is None else dropped.at(4 * block + i) for i in range(4))
