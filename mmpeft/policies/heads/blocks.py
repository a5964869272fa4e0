"""A small transformer, shared by the trunk and by the heads that decode with attention.

Pre-norm blocks of self-attention, optional cross-attention to a context, and a feed-forward. Attention goes through
`F.scaled_dot_product_attention` and projections are plain Linears (`q_proj`, `k_proj`, `v_proj`, `out_proj`, `fc1`,
`fc2`), so that adapter plans written for any transformer find them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError


class Attention(nn.Module):
    """Multi-head attention of x [B, T, D] to a context [B, S, C] (None: to itself).

    `mask` [B, S] bool hides context tokens; a row whose context is all hidden gets zeros. `causal` hides later tokens.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"{heads} heads do not divide width {dim}")
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(context_dim or dim, dim)
        self.v_proj = nn.Linear(context_dim or dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            proj(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, t in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        allowed = None if mask is None else mask[:, None, None, :]
        if causal:
            lower = torch.ones(x.shape[1], source.shape[1], dtype=torch.bool, device=x.device).tril()
            allowed = lower if allowed is None else allowed & lower
        none = None
        if mask is not None:
            none = ~mask.any(1)  # their softmax would be over nothing: let it see all, and drop the answer
            allowed = allowed | none[:, None, None, None]  # type: ignore[operator]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        out: Tensor = self.out_proj(found.transpose(1, 2).flatten(2))
        return out if none is None else out.masked_fill(none[:, None, None], 0.0)


class Block(nn.Module):
    """Pre-norm transformer block; with `context_dim`, cross-attention after the self-attention."""

    def __init__(
        self, dim: int, heads: int, *, context_dim: int | None = None, ratio: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.cross = None if context_dim is None else Attention(dim, heads, context_dim)
        self.norm_cross = None if context_dim is None else nn.LayerNorm(dim)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None,
        context_mask: Tensor | None = None, causal: bool = False,
    ) -> Tensor:  # fmt: skip
        x = x + self.dropout(self.attn(self.norm1(x), mask=mask, causal=causal))
        if self.cross is not None and self.norm_cross is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x), context, context_mask))
        h: Tensor = self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return x + h


def sine_positions(count: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal positions [count, dim]."""
    return sine_embedding(torch.arange(count, device=device), dim)


def sine_embedding(t: Tensor, dim: int, longest: float = 10_000.0) -> Tensor:
    """Numbers [B] to sinusoids [B, dim] of wavelengths from 2 pi to `longest` times that (Vaswani et al. 2017)."""
    half = dim // 2
    rates = torch.exp(-math.log(longest) * torch.arange(half, device=t.device) / max(1, half))
    angles = t.float().unsqueeze(-1) * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, dim - 2 * half))
