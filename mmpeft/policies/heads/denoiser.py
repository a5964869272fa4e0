"""The network that diffusion and flow matching share: a noisy chunk, a time and the features in, a chunk out.

A small transformer over the steps of the chunk, conditioned as in DiT (Peebles and Xie 2023, arXiv 2212.09748) by a
scale, shift and gate from the time at each block, and by cross-attention to the trunk's features. The gates start at
zero as published there; the output layer does not, so that every part has a gradient from the first step.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.policies.heads.blocks import Attention, sine_embedding, sine_positions

TIME_SCALE = 1000.0  # times are 0 .. 1; the sinusoids were made for step numbers


class Denoiser(nn.Module):
    """(x [B, chunk, A], time [B] in 0 .. 1, features [B, N, D]) -> [B, chunk, A]."""

    def __init__(self, *, action_dim: int, in_dim: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Linear(action_dim, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(in_dim, width)
        self.blocks = nn.ModuleList(_TimedBlock(width, heads) for _ in range(depth))
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, action_dim)

    def forward(self, x: Tensor, time: Tensor, features: Tensor) -> Tensor:
        context = self.condition(features)
        t = self.time(sine_embedding(time * TIME_SCALE, self.width).to(x.dtype)) + context.mean(1)
        h = self.enter(x) + sine_positions(x.shape[1], self.width, x.device).to(x.dtype)
        for block in self.blocks:
            h = block(h, t, context)
        out: Tensor = self.leave(self.norm(h))
        return out


class _TimedBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_cross = nn.LayerNorm(width)
        self.attn, self.cross = Attention(width, heads), Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulate = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(F.silu(t)).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.cross(self.norm_cross(x), context)
        h: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x) * (1 + scale2) + shift2)))
        out: Tensor = x + gate2 * h
        return out
