"""Bringing other senses into a trunk's tokens: proprioception (or any vectors over time) by token, FiLM or attention.

Each takes tokens [B, N, W], vectors [B, T, S] and a mask [B, T] that is False where a vector is missing (no sensor, no
history yet). Missing vectors are never read, not even a NaN, and each fusion has something defined for a row that has
none: a learned token, the identity, no attention.

    TokenFusion   appends one token a time step (PaLM-E, OpenVLA-OFT)
    FiLMFusion    scales and shifts every token (Perez et al. 2018, arXiv 1709.07871); starts as the identity
    CrossFusion   gated cross-attention (Flamingo, Alayrac et al. 2022, arXiv 2204.14198); starts as the identity
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError, NameNotFound, nearest
from mmpeft.policies.heads.blocks import Attention


class Fusion(nn.Module):
    """Base class.

    Args:
        width: W of the tokens. size: S of the vectors. steps: T.
    """

    def __init__(self, width: int, size: int, steps: int) -> None:
        super().__init__()
        if min(width, size, steps) < 1:
            raise ConfigError(f"a fusion needs positive sizes, given width={width}, size={size}, steps={steps}")
        self.width, self.size, self.steps = width, size, steps

    def forward(self, tokens: Tensor, vectors: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, W], [B, T, S], [B, T] -> [B, N', W].

        Raises:
            ConfigError: vectors of another size.
        """
        if tuple(vectors.shape[1:]) != (self.steps, self.size):
            raise ConfigError(f"expected vectors [B, {self.steps}, {self.size}], given {list(vectors.shape)}")
        if mask is None:
            mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
        vectors = torch.where(mask.unsqueeze(-1), vectors, 0).to(tokens.dtype)
        return self.fuse(tokens, vectors, mask)

    def fuse(self, tokens: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


class TokenFusion(Fusion):
    """[B, N, W] -> [B, N + T, W]; a missing vector is one learned token."""

    def __init__(self, width: int, size: int, steps: int) -> None:
        super().__init__(width, size, steps)
        self.project = nn.Linear(size, width)
        self.place = nn.Parameter(torch.randn(steps, width) * 0.02)
        self.missing = nn.Parameter(torch.randn(width) * 0.02)

    def fuse(self, tokens: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
        own = torch.where(mask.unsqueeze(-1), self.project(vectors), self.missing) + self.place
        return torch.cat([tokens, own], 1)


class FiLMFusion(Fusion):
    """[B, N, W] -> the same, scaled and shifted by a two-layer net of the vectors and their mask."""

    def __init__(self, width: int, size: int, steps: int) -> None:
        super().__init__(width, size, steps)
        self.hidden = nn.Linear(steps * (size + 1), width)
        self.out = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def fuse(self, tokens: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
        known = torch.cat([vectors, mask.unsqueeze(-1).to(vectors.dtype)], -1).flatten(1)
        scale, shift = self.out(torch.relu(self.hidden(known))).unsqueeze(1).chunk(2, -1)
        some = mask.any(1)[:, None, None]
        return torch.where(some, tokens * (1 + scale) + shift, tokens)


class CrossFusion(Fusion):
    """[B, N, W] -> the same, plus tanh(gate) times attention to the vectors."""

    def __init__(self, width: int, size: int, steps: int) -> None:
        super().__init__(width, size, steps)
        self.project = nn.Linear(size, width)
        self.place = nn.Parameter(torch.randn(steps, width) * 0.02)
        self.norm, self.attn = nn.LayerNorm(width), Attention(width, _heads(width))
        self.gate = nn.Parameter(torch.zeros(1))

    def fuse(self, tokens: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
        seen = self.attn(self.norm(tokens), self.project(vectors) + self.place, mask)
        gated: Tensor = torch.tanh(self.gate) * seen
        return tokens + gated


FusionName = Literal["token", "film", "cross"]
FUSIONS: dict[str, Callable[[int, int, int], Fusion]] = {"token": TokenFusion, "film": FiLMFusion, "cross": CrossFusion}


def make_fusion(name: str, width: int, size: int, steps: int) -> Fusion:
    """Raises NameNotFound for an unknown name."""
    if name not in FUSIONS:
        raise NameNotFound(f"unknown fusion {name!r}; valid: {', '.join(FUSIONS)}{nearest(name, FUSIONS)}")
    return FUSIONS[name](width, size, steps)


def _heads(width: int) -> int:
    return next(h for h in (4, 2, 1) if width % h == 0)
