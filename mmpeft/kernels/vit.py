"""A stack of pre-norm ViT blocks (ViT, SigLIP) with low-rank adapters, written out, at the fused minimum of memory.

    forward   add+norm -> [n | S] GEMM qkv -> attention -> proj (+ S B^T) -> add+norm -> [n | S] GEMM fc1 -> GELU -> fc2
    backward  the same upside down; every dX is one GEMM on [dY | dS]; A's and B's gradients go straight into the flat
              fp32 buffer

A block keeps, a token, 20 h bytes in half precision (x, q, k, v, the attention's o, x_mid and fc1's output at f = 4h) and
the rank-wide products; norm and GELU outputs are rebuilt by the backward kernels that need them. `fuse_vit` finds the
parts in a model. Limits: frozen norms and biases, no mask, no drop path. Layout of the low-rank path:
`packed.PackedGroup`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.kernels import attention, fused_ops, recorded
from mmpeft.kernels.group import Dropped, Group, Masters, linear


@dataclass
class Norm:
    """A LayerNorm's frozen gain, bias and epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass
class VitBlock:
    """One block. qkv: members q, k, v, or one for all three."""

    norm1: Norm
    qkv: Group
    proj: Group
    norm2: Norm
    fc1: Group
    fc2: Group

    def groups(self) -> tuple[Group, Group, Group, Group]:
        """The four groups in flat order."""
        return self.qkv, self.proj, self.fc1, self.fc2


@dataclass
class VitTape:
    """What a forward keeps for its backward."""

    blocks: list[tuple[Any, ...]]
    gradient: Tensor | None  # of the output
    shape: tuple[int, int]
    dropped: Dropped | None


@dataclass
class FusedVit(Masters):
    """x [B, T, h] -> the stack's output [B, T, h].

    Args:
        heads: count. tanh: GELU by tanh instead of exact. dropout: on every adapter's input, in `record`.
    """

    blocks: list[VitBlock]
    heads: int
    scale: float
    tanh: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout {self.dropout}; expected 0 <= dropout < 1")
        self.seed = torch.zeros(1, dtype=torch.int64, device=self.blocks[0].qkv.packed.buffer.device)
        self.collect(g for block in self.blocks for g in block.groups())

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.blocks[0].qkv.packed.buffer.dtype

    def states(self, x: Tensor) -> Tensor:
        """The output, differentiable in x and the masters; without gradients nothing is kept."""
        if not torch.is_grad_enabled():
            return self.record(x)[0] if self.dropout else self._forward(x, None, None)
        return recorded.run(self, x)

    @torch.no_grad()
    def record(self, x: Tensor) -> tuple[Tensor, VitTape]:
        """x [B, T, h] -> (output, tape)."""
        dropped = Dropped(self.dropout, self.seed.clone()) if self.dropout else None
        self.seed.add_(32 * len(self.blocks))
        saved: list[tuple[Any, ...]] = []
        y = self._forward(x, saved, dropped)
        return y, VitTape(saved, None, (x.shape[0], x.shape[1]), dropped)

    @torch.no_grad()
    def _forward(self, x: Tensor, saved: list[tuple[Any, ...]] | None, dropped: Dropped | None) -> Tensor:
        B, T, h = x.shape
        x, delta = x.reshape(B * T, h).contiguous(), None
        for i, block in enumerate(self.blocks):
            x, delta, kept = self._block(block, x, delta, (B, T), _sites(dropped, i))
            if saved is not None:
                saved.append(kept)
        assert delta is not None
        return (x + delta).view(B, T, h)

    def _block(
        self, block: VitBlock, x: Tensor, delta: Tensor | None, shape: tuple[int, int], sites: tuple[Dropped | None, ...]
    ) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        rows, h = x.shape
        n = block.qkv.wide(rows, h)
        x, mean1, rstd1 = _norm(x, delta, block.norm1, n[:, :h])
        qkv, S_qkv = block.qkv.forward(n, sites[0])
        o, kept = attention.forward(*self._heads(qkv, shape), self.scale, causal=False)
        o = o.reshape(rows, h)
        S_o = block.proj.shrink(o, sites[1])
        delta = linear(o, block.proj.packed.W, block.proj.packed.bias).addmm_(S_o, block.proj.packed.B.mT)
        n = block.fc1.wide(rows, h)
        x_mid, mean2, rstd2 = _norm(x, delta, block.norm2, n[:, :h])
        u, S_1 = block.fc1.forward(n, sites[2])
        f = u.shape[1]
        g = block.fc2.wide(rows, f)
        fused_ops.gelu(u, g[:, :f], self.tanh)
        delta, S_2 = block.fc2.forward(g, sites[3])
        return x_mid, delta, (x, mean1, rstd1, S_qkv, qkv, o, kept, S_o, x_mid, mean2, rstd2, S_1, u, S_2)

    @torch.no_grad()
    def backward(self, tape: VitTape, flat: Tensor, *, accumulate: bool = False, need_dx: bool = False) -> Tensor | None:
        """Writes (or adds) the masters' gradients into flat [numel]; returns x's [B, T, h] if asked. The tape is
        consumed."""
        if not tape.blocks or tape.gradient is None:
            raise ConfigError(
                "this tape's backward has run: its tensors were freed on the way (retain_graph is not supported)"
            )
        g, tape.gradient = tape.gradient, None
        for i in range(len(self.blocks) - 1, -1, -1):
            sites = _sites(tape.dropped, i)
            g = self._block_backward(self.blocks[i], g, tape.blocks.pop(), flat, accumulate, tape.shape, sites)
        return g.reshape(*tape.shape, -1) if need_dx else None

    def _block_backward(
        self, block: VitBlock, g: Tensor, saved: tuple[Any, ...], flat: Tensor, accumulate: bool, shape: tuple[int, int],
        sites: tuple[Dropped | None, ...],
    ) -> Tensor:  # fmt: skip
        x, mean1, rstd1, S_qkv, qkv, o, kept, S_o, x_mid, mean2, rstd2, S_1, u, S_2 = saved
        del saved
        (rows, h), f, acc = x.shape, u.shape[1], accumulate

        wide = block.fc2.wide(rows, h)
        wide[:, :h].copy_(g)
        dg = block.fc2.backward(wide, S_2, flat, acc, sites[3])
        du = block.fc1.wide(rows, f)
        fused_ops.gelu_backward(dg, u, du[:, :f], dg, self.tanh)  # dg now holds the activation itself
        block.fc2.backward_A(wide, dg, flat, acc, sites[3])
        del u, dg, wide

        dn = block.fc1.backward(du, S_1, flat, acc, sites[2])
        n, g_mid = torch.empty_like(x), block.proj.wide(rows, h)
        _norm_backward(dn, x_mid, mean2, rstd2, block.norm2, g, g_mid[:, :h], n)
        block.fc1.backward_A(du, n, flat, acc, sites[2])
        del du, x_mid, g

        do = block.proj.backward(g_mid, S_o, flat, acc, sites[1])
        block.proj.backward_A(g_mid, o, flat, acc, sites[1])
        q, k, v = self._heads(qkv, shape)
        o4 = o.view(*shape, self.heads, -1)
        grads = attention.backward(do.view_as(o4), q, k, v, o4, kept, self.scale, causal=False)
        dqkv = block.qkv.wide(rows, 3 * h)
        for i, d in enumerate(grads):
            dqkv[:, i * h : (i + 1) * h].copy_(d.reshape(rows, h))
        del do, grads, q, k, v, o4, o, kept, qkv

        dn, out = block.qkv.backward(dqkv, S_qkv, flat, acc, sites[0]), torch.empty_like(x)
        _norm_backward(dn, x, mean1, rstd1, block.norm1, g_mid[:, :h], out, n)
        block.qkv.backward_A(dqkv, n, flat, acc, sites[0])
        return out

    def _heads(self, qkv: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(*shape, 3, self.heads, -1).unbind(2)
        return q, k, v


def _norm(x: Tensor, delta: Tensor | None, norm: Norm, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fused_ops.add_layernorm(x, delta, norm.weight, norm.bias, norm.eps, n)


def _norm_backward(
    dn: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, norm: Norm, g: Tensor, out: Tensor, n: Tensor
) -> None:
    fused_ops.layernorm_backward(dn, x, mean, rstd, norm.weight, norm.bias, g, out, n)


def _sites(dropped: Dropped | None, block: int) -> tuple[Dropped | None, ...]:
    """Dropout of a block's four groups."""
    return tuple(None if dropped is None else dropped.at(4 * block + i) for i in range(4))
