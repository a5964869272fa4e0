"""Action chunking with transformers (ACT, Zhao et al. 2023, arXiv 2304.13705): a conditional VAE around an L1 chunk.

In training an encoder reads the demonstrated chunk with the features and puts its style into a latent z, so that the
decoder need not average over styles; the KL term (weight 10) keeps z near a unit Gaussian. Predicting uses z = 0, the
mean style: deterministic, by design of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.policies.heads.base import Head, valid_mean
from mmpeft.policies.heads.blocks import Block, sine_positions


class ACTHead(Head):
    """CVAE chunk head.

    Args:
        latent: size of z (32 in the paper).
        kl_weight: of the KL term (10 in the paper).
        width, heads: of both transformers.
        encoder_depth, decoder_depth: their blocks (the paper: 4 and, by a slip of its code, 1).
    """

    def __init__(
        self, *, latent: int = 32, kl_weight: float = 10.0, width: int = 128, heads: int = 4, encoder_depth: int = 2,
        decoder_depth: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        if latent < 1 or kl_weight < 0:
            raise ConfigError(f"latent is at least 1 and kl_weight not negative, given {latent} and {kl_weight}")
        self.latent, self.kl_weight, self.width, self.heads = latent, kl_weight, width, heads
        self.encoder_depth, self.decoder_depth = encoder_depth, decoder_depth

    def _build(self) -> None:
        width = self.width
        self.read_action = nn.Linear(self.action_dim, width)
        self.read_features = nn.Linear(self.in_dim, width)
        self.style_token = nn.Parameter(torch.zeros(1, width).normal_(std=0.02))
        self.encoder = nn.ModuleList(Block(width, self.heads) for _ in range(self.encoder_depth))
        self.to_style = nn.Linear(width, 2 * self.latent)
        self.from_style = nn.Linear(self.latent, width)
        self.queries = nn.Parameter(torch.zeros(self.chunk, width).normal_(std=0.02))
        self.decoder = nn.ModuleList(Block(width, self.heads, context_dim=width) for _ in range(self.decoder_depth))
        self.norm, self.to_actions = nn.LayerNorm(width), nn.Linear(width, self.action_dim)

    def style(self, features: Tensor, actions: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, latent] of q(z | features, chunk); `valid` [B, chunk] hides padded steps."""
        steps = self.read_action(actions) + sine_positions(self.chunk, self.width, actions.device).to(actions.dtype)
        context = self.read_features(features)
        x = torch.cat([self.style_token.expand(len(actions), -1, -1), context, steps], 1)
        seen = torch.cat([valid.new_ones(len(valid), 1 + context.shape[1]), valid], 1)
        for block in self.encoder:
            x = block(x, mask=seen)
        mean, log_var = self.to_style(x[:, 0]).chunk(2, -1)
        return mean, log_var

    def decode(self, features: Tensor, z: Tensor) -> Tensor:
        """Features [B, N, D] and z [B, latent] to the chunk [B, chunk, A]."""
        context = torch.cat([self.from_style(z).unsqueeze(1), self.read_features(features)], 1)
        x = self.queries.expand(len(features), -1, -1)
        for block in self.decoder:
            x = block(x, context)
        actions: Tensor = self.to_actions(self.norm(x))
        return actions

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        mean, log_var = self.style(features, actions, mask.any(-1))
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(-1).mean()
        return valid_mean((self.decode(features, z) - actions).abs(), mask) + self.kl_weight * kl

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        features = self._features(features)
        return self.decode(features, features.new_zeros(len(features), self.latent))
