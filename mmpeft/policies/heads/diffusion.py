"""Diffusion over action chunks (Diffusion Policy, Chi et al. 2023, arXiv 2303.04137): trained as DDPM, sampled by DDIM.

The forward process is x_k = sqrt(abar_k) x_0 + sqrt(1 - abar_k) e with the squared-cosine abar of Nichol and Dhariwal
(2021, arXiv 2102.09672); the network predicts e, and DDIM (Song et al. 2021, 2010.02502) jumps over steps, so training
on 100 and predicting with 10 use the same network. x_0 is clipped to `clip` at every jump, as in the paper, which keeps
the first, nearly blind guesses bounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.policies.heads.base import Head, valid_mean
from mmpeft.policies.heads.denoiser import Denoiser


def cosine_abar(steps: int, offset: float = 0.008, most: float = 0.999) -> Tensor:
    """abar_0 .. abar_{steps-1} [steps], float64: products of 1 - beta with the squared-cosine betas, cut at `most`."""
    f = [math.cos((k / steps + offset) / (1 + offset) * math.pi / 2) ** 2 for k in range(steps + 1)]
    betas = torch.tensor([min(1 - f[k + 1] / f[k], most) for k in range(steps)], dtype=torch.float64)
    return torch.cumprod(1 - betas, 0)


def ddim_step(x: Tensor, noise: Tensor, abar: Tensor, before: Tensor, clip: float) -> Tensor:
    """One deterministic DDIM jump from level `abar` to the cleaner level `before`, given the predicted noise."""
    clean = ((x - (1 - abar).sqrt() * noise) / abar.sqrt()).clamp(-clip, clip)
    again = (x - abar.sqrt() * clean) / (1 - abar).sqrt()  # the noise that agrees with the clipped guess
    return before.sqrt() * clean + (1 - before).sqrt() * again


class DiffusionHead(Head):
    """Denoising diffusion of the chunk.

    Args:
        train_steps: levels of noise in training.
        predict_steps: DDIM steps of a prediction, at most `train_steps`.
        clip: bound on the predicted chunk, in normalised units.
        width, depth, heads: of the denoiser.
    """

    abar: Tensor

    def __init__(
        self, *, train_steps: int = 100, predict_steps: int = 10, clip: float = 3.0, width: int = 128, depth: int = 2,
        heads: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= predict_steps <= train_steps or clip <= 0:
            raise ConfigError(
                f"need 1 <= predict_steps <= train_steps and clip > 0, given {predict_steps}, {train_steps} and {clip}"
            )
        self.train_steps, self.predict_steps, self.clip = train_steps, predict_steps, clip
        self.width, self.depth, self.heads = width, depth, heads
        self.register_buffer("abar", cosine_abar(train_steps).float(), persistent=False)

    def _build(self) -> None:
        self.denoiser = Denoiser(
            action_dim=self.action_dim, in_dim=self.in_dim, width=self.width, depth=self.depth, heads=self.heads
        )

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        level = torch.randint(self.train_steps, (len(actions),), device=actions.device)
        noise = torch.randn_like(actions)
        abar = self.abar[level, None, None].to(actions.dtype)
        guess = self.denoiser(abar.sqrt() * actions + (1 - abar).sqrt() * noise, self._time(level), features)
        return valid_mean((guess - noise).square(), mask)

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        features = self._features(features)
        shape = (len(features), self.chunk, self.action_dim)
        x = torch.randn(shape, generator=generator, device=features.device, dtype=features.dtype)
        levels = torch.linspace(self.train_steps - 1, 0, self.predict_steps).round().long().tolist()
        for k, following in zip(levels, [*levels[1:], -1], strict=True):
            level = torch.full((len(x),), k, device=x.device)
            before = self.abar[following] if following >= 0 else self.abar.new_ones(())
            x = ddim_step(x, self.denoiser(x, self._time(level), features), self.abar[k], before, self.clip)
        return x

    def _time(self, level: Tensor) -> Tensor:
        return level.float() / self.train_steps
