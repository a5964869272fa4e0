"""Flow matching over action chunks (Lipman et al. 2023, arXiv 2210.02747; pi0, Black et al. 2024, arXiv 2410.24164).

Time runs from noise (0) to actions (1), as in the papers: x_t = (1 - t) noise + t action, and the network learns the
velocity action - noise. Predicting integrates it by Euler steps. Times are drawn from a Beta that favours the noisy end
(pi0), where the choice between modes is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.policies.heads.base import Head, valid_mean
from mmpeft.policies.heads.denoiser import Denoiser


class FlowHead(Head):
    """Rectified flow of the chunk.

    Args:
        predict_steps: Euler steps of a prediction.
        beta: (a, b) of the Beta distribution of 1 - t in training; (1, 1) is uniform, pi0 has (1.5, 1).
        width, depth, heads: of the denoiser.
    """

    def __init__(
        self, *, predict_steps: int = 10, beta: tuple[float, float] = (1.5, 1.0), width: int = 128, depth: int = 2,
        heads: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        if predict_steps < 1 or len(beta) != 2 or min(beta) <= 0:
            raise ConfigError(f"predict_steps is 1 or more and beta a positive pair, given {predict_steps} and {beta}")
        self.predict_steps, self.beta = predict_steps, (float(beta[0]), float(beta[1]))
        self.width, self.depth, self.heads = width, depth, heads

    def _build(self) -> None:
        self.denoiser = Denoiser(
            action_dim=self.action_dim, in_dim=self.in_dim, width=self.width, depth=self.depth, heads=self.heads
        )

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        # neither copied from the host nor checked there: a CUDA graph can hold it
        a, b = (torch.full((), v, device=actions.device) for v in self.beta)
        t = (1 - torch.distributions.Beta(a, b, validate_args=False).sample((len(actions),))).to(actions.dtype)
        noise = torch.randn_like(actions)
        x = torch.lerp(noise, actions, t[:, None, None])
        return valid_mean((self.denoiser(x, t, features) - (actions - noise)).square(), mask)

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        features = self._features(features)
        shape = (len(features), self.chunk, self.action_dim)
        x = torch.randn(shape, generator=generator, device=features.device, dtype=features.dtype)
        for k in range(self.predict_steps):
            t = torch.full((len(x),), k / self.predict_steps, device=x.device, dtype=x.dtype)
            x = x + self.denoiser(x, t, features) / self.predict_steps
        return x
