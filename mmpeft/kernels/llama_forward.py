"""A Llama-type decoder's forward without gradients: nothing kept, and no launch of its own for any low-rank term.

Nine launches a block, as without adapters, which stay unmerged: each GEMM gives its rank columns besides (`product`), and
what reads it adds their term (`expand`). Eight where samples are short: RoPE is a part of attention then (`rope_attention`).

    [z | S] GEMM qkv -> RoPE -> attention -> [z | S] GEMM o -> add+norm -> [z | S] GEMM gate|up -> SwiGLU
    -> [z | S] GEMM down -> add+norm, the next block's

With an adapter of its own for every sample of the batch, S is a launch beside each GEMM: thirteen a block, whatever the number
of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft.kernels import expand, fused_ops, rope_attention
from mmpeft.kernels.group import Group
from mmpeft.kernels.grouped import Stack
from mmpeft.kernels.llama_block import Block, Layout
from mmpeft.kernels.product import Product


@dataclass(eq=False)
class Stacks:
    """Many adapters of one decoder side by side: for every block the stacks of q|k|v, o, gate|up and down."""

    blocks: list[tuple[Stack, Stack, Stack, Stack]]


@torch.no_grad()
def states(
    x: Tensor,
    blocks: Sequence[Block],
    final_norm: Tensor,
    layout: Layout,
    index: Tensor | None = None,
    stacks: Stacks | None = None,
) -> Tensor:
    """Embeddings x [T, h] -> the final norm's output [T, h].

    With `stacks`, equal runs of rows use adapters of those, by `index` (int64 [N], the base from their number on), in
    place of the blocks' own.
    """
    n = torch.empty_like(x)
    fused_ops.add_rmsnorm(x, None, blocks[0].norm1, layout.eps, n)
    for i, (block, norm) in enumerate(zip(blocks, [*(b.norm1 for b in blocks[1:]), final_norm], strict=True)):
        of_qkv, of_o, of_gate_up, of_down = (None,) * 4 if stacks is None else stacks.blocks[i]
        o = rope_attention.attend(_product(n, block.qkv, of_qkv, index), layout)
        branch = _product(o, block.o, of_o, index)
        x, n = expand.add_rmsnorm(x, branch, block.norm2, layout.eps)
        act = expand.swiglu(_product(n, block.gate_up, of_gate_up, index))
        x, n = expand.add_rmsnorm(x, _product(act, block.down, of_down, index), norm, layout.eps)
    return n


def _product(x: Tensor, group: Group, stack: Stack | None, index: Tensor | None) -> Product:
    return Product.of(x, group) if stack is None or index is None else Product.by_sample(x, group, stack, index)
