"""Densities over the chunk in closed form: one Gaussian, and a mixture of them (robomimic, Mandlekar et al. 2021,
arXiv 2108.03298).

A mixture component is a whole chunk: its weight is drawn once and all steps follow one mode, where a mixture at each
step would change its mind from step to step. Standard deviations have a floor, without which the likelihood of a
deterministic teacher is unbounded.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.policies.heads.base import Head

LOG_2PI = 1.8378770664093453


def gaussian_nll(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """-log N(x; mean, std), number by number."""
    return 0.5 * (((x - mean) / std).square() + LOG_2PI) + std.log()


def mixture_nll(x: Tensor, mean: Tensor, std: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """-log of a mixture over whole chunks [B]: x, mask [B, C, A]; mean, std [B, K, C, A]; logits [B, K]."""
    per_mode = (gaussian_nll(x[:, None], mean, std) * mask[:, None]).sum((-1, -2))  # [B, K]
    return -torch.logsumexp(logits.log_softmax(-1) - per_mode, dim=-1)


class MixtureHead(Head):
    """A mixture of Gaussians over the chunk.

    Args:
        modes: components K.
        min_std: floor of the standard deviations, in normalised units.
        predict_mode: "draw" a component by its weight and give its mean, take the mean of the "likeliest", or "sample"
            with the noise.
        depth: residual blocks before the outputs.
    """

    def __init__(
        self, *, modes: int = 5, min_std: float = 1e-2, predict_mode: Literal["draw", "likeliest", "sample"] = "draw",
        depth: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if modes < 1 or min_std <= 0:
            raise ConfigError(f"modes is at least 1 and min_std positive, given {modes} and {min_std}")
        if predict_mode not in ("draw", "likeliest", "sample"):
            raise ConfigError(f"predict_mode is 'draw', 'likeliest' or 'sample', not {predict_mode!r}")
        self.modes, self.min_std, self.predict_mode, self.depth = modes, min_std, predict_mode, depth

    def _build(self) -> None:
        self.to_moments = self.to_chunk(self.modes * 2 * self.action_dim, depth=self.depth)
        self.to_weights = nn.Linear(self.in_dim, self.modes) if self.modes > 1 else None

    def density(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and standard deviations [B, K, chunk, A] and the components' logits [B, K]."""
        moments = self.to_moments(features).unflatten(-1, (self.modes, 2, self.action_dim))  # [B, C, K, 2, A]
        mean, raw = moments.movedim(2, 1).unbind(3)
        logits = features.new_zeros(len(features), 1) if self.to_weights is None else self.to_weights(features.mean(1))
        return mean, F.softplus(raw) + self.min_std, logits

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        valid = mask.to(actions.dtype)
        nll = mixture_nll(actions, *self.density(features), valid)  # [B], summed over steps and dimensions
        return nll.sum() / valid.amax(-1).sum().clamp_min(1)

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        mean, std, logits = self.density(self._features(features))
        if self.predict_mode == "likeliest":
            mode = logits.argmax(-1)
        else:
            mode = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        rows = torch.arange(len(mean), device=mean.device)
        out = mean[rows, mode]
        if self.predict_mode == "sample":
            noise = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
            out = out + std[rows, mode] * noise
        return out


class GaussianHead(MixtureHead):
    """One Gaussian a number; predicts its mean, or a sample (`predict_mode="sample"`)."""

    def __init__(
        self, *, min_std: float = 1e-2, predict_mode: Literal["likeliest", "sample"] = "likeliest", depth: int = 0
    ) -> None:
        if predict_mode not in ("likeliest", "sample"):
            raise ConfigError(f"predict_mode is 'likeliest' or 'sample', not {predict_mode!r}")
        super().__init__(modes=1, min_std=min_std, predict_mode=predict_mode, depth=depth)
