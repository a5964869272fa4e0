"""The C-Former (X-LLM): CIF shortens speech to about one vector a text token, a BERT reads those, a Linear ends it.

Frame weights come from a width-3 convolution, a Linear and a sigmoid. `num_tokens` must be known before the sound is
heard (placeholders), so a clip of t frames gets ceil(t / frames_per_token) tokens: the weights are scaled to that sum,
and what is learned is where the boundaries fall. `weigh` gives the unscaled weights, from which `cif.fire` and
`cif.quantity_loss` make the freely firing form that speech recognition trains.

Positions are sinusoidal: no longest clip, and nothing to load.

Papers: Chen et al., X-LLM, 2023; Dong and Xu, CIF, 2020.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.connectors.base import Connector, require_heads, require_positive
from mmpeft.connectors.cif import integrate, scale_weights
from mmpeft.connectors.qformer import Attention, FeedForward
from mmpeft.errors import ConfigError


def sinusoids(length: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoidal positions [length, dim] in the dtype and on the device of `like`."""
    position = torch.arange(length, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angles = position * rate
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim].to(like.dtype)


class EncoderLayer(nn.Module):
    """One BERT layer: x [B, Q, D] -> [B, Q, D]."""

    def __init__(self, width: int, heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        self.ffn = FeedForward(width, hidden_dim, dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.ffn(self.attention(x, x, mask))
        return out


class CFormer(Connector):
    """[B, T, d_a] -> [B, ceil(T / frames_per_token), d_l].

    Args:
        frames_per_token: input frames an output token stands for (12 of 50 a second: .24 s, about a sub-word).
        width, depth, heads, hidden_dim: of the BERT (768, 12, 12, 3072: bert-base).
        dropout: in the weight predictor and the BERT, in training.
        output_norm: end with a LayerNorm; see `Connector.set_output_std`.

    Raises:
        ConfigError: a size that is not positive, heads that do not divide width, a dropout outside [0, 1).
    """

    def __init__(
        self,
        *,
        in_dim: int | None = None,
        out_dim: int | None = None,
        frames_per_token: int = 12,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden_dim: int = 3072,
        dropout: float = 0.1,
        output_norm: bool = False,
    ) -> None:
        super().__init__(in_dim=in_dim, out_dim=out_dim, output_norm=output_norm)
        sizes = {"frames_per_token": frames_per_token, "width": width, "depth": depth, "heads": heads}
        require_positive(self, **sizes, hidden_dim=hidden_dim)
        require_heads(self, width, heads)
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"CFormer: dropout must be in [0, 1), given {dropout}")
        self.frames_per_token = frames_per_token
        self.width = width
        self.depth = depth
        self.heads = heads
        self.hidden_dim = hidden_dim
        self.dropout = dropout
        self._build_if_given(in_dim, out_dim)

    def _build(self, in_dim: int, out_dim: int) -> None:
        self.weight_conv = nn.Conv1d(in_dim, in_dim, kernel_size=3, padding=1)
        self.weight_dropout = nn.Dropout(self.dropout)
        self.weight_linear = nn.Linear(in_dim, 1)
        self.expand = nn.Linear(in_dim, self.width)
        self.norm = nn.LayerNorm(self.width)
        self.layers = nn.ModuleList(
            EncoderLayer(self.width, self.heads, self.hidden_dim, self.dropout) for _ in range(self.depth)
        )
        self.project = nn.Linear(self.width, out_dim)
        for module in (self.weight_conv, self.weight_linear):
            nn.init.xavier_uniform_(module.weight)

    def num_tokens(self, t: int) -> int:
        require_positive(self, t=t)
        return -(-t // self.frames_per_token)

    def weigh(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Unscaled CIF weights in (0, 1) of frames [B, T, d_a] -> [B, T], fp32, zero where `mask` says padding."""
        tokens = self._receive(tokens, mask)
        hidden = self.weight_dropout(self.weight_conv(tokens.transpose(1, 2)).transpose(1, 2))
        weights: Tensor = self.weight_linear(hidden).squeeze(-1).float().sigmoid()
        return weights if mask is None else weights.masked_fill(~mask, 0.0)

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        b, t, _ = tokens.shape
        lengths = torch.full((b,), t, device=tokens.device) if mask is None else mask.sum(1)
        counts = (lengths + self.frames_per_token - 1) // self.frames_per_token
        q = self.num_tokens(t)
        x = integrate(tokens, scale_weights(self.weigh(tokens, mask), counts), q)
        valid = None if mask is None else torch.arange(q, device=tokens.device) < counts.unsqueeze(1)
        x = self.expand(x)
        x = self.norm(x + sinusoids(q, self.width, x))
        for layer in self.layers:
            x = layer(x, valid)
        return self.project(F.relu(x)), valid
