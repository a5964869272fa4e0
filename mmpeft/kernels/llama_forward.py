"""A Llama-type decoder's forward without gradients: nothing kept, and no launch of its own for any low-rank term.

Nine launches a block, as without adapters, which stay unmerged: each GEMM gives its rank columns besides (`expand`).

    [z | S] GEMM qkv -> RoPE -> attention -> [z | S] GEMM o -> add+norm -> [z | S] GEMM gate|up -> SwiGLU
    -> [z | S] GEMM down -> add+norm, the next block's
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft.kernels import attention, expand, fused_ops
from mmpeft.kernels.expand import Product
from mmpeft.kernels.llama_block import Block, Layout


@torch.no_grad()
def states(x: Tensor, blocks: Sequence[Block], final_norm: Tensor, layout: Layout) -> Tensor:
    """Embeddings x [T, h] -> the final norm's output [T, h]."""
    n = torch.empty_like(x)
    fused_ops.add_rmsnorm(x, None, blocks[0].norm1, layout.eps, n)
    for block, norm in zip(blocks, [*(b.norm1 for b in blocks[1:]), final_norm], strict=True):
        qkv = expand.rope(Product.of(n, block.qkv), layout.heads, layout.kv_heads, *layout.tables)
        o, _ = attention.forward(*layout.split(qkv), layout.scale, documents=layout.documents, keep=False)
        x, n = expand.add_rmsnorm(x, Product.of(o.reshape(x.shape[0], -1), block.o), block.norm2, layout.eps)
        act = expand.swiglu(Product.of(n, block.gate_up))
        x, n = expand.add_rmsnorm(x, Product.of(act, block.down), norm, layout.eps)
    return n
