"""Actions as tokens: uniform bins (RT-2, Brohan et al. 2023, arXiv 2307.15818; OpenVLA, Kim et al. 2024, 2406.09246),
and actions that are discrete to begin with.

Every number gets its own classifier over its bins and nothing else, so decoding is constrained by construction: no
logit exists for a token that is no bin. All numbers are decoded in parallel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpeft.errors import BadSample, ConfigError
from mmpeft.policies.heads.base import Head, step_mean, valid_mean


def to_bins(x: Tensor, bins: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Numbers to indices 0 .. bins-1 of equal bins over [low, high]; what lies outside goes into the outermost bin."""
    return ((x - low) / (high - low) * bins).floor().clamp(0, bins - 1).long()


def from_bins(index: Tensor, bins: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Indices to the centres of their bins: half a bin at most from any number inside [low, high]."""
    return low + (index.float() + 0.5) * ((high - low) / bins)


class BinnedHead(Head):
    """A classifier over `bins` for each number of the chunk.

    Args:
        bins: 256 in RT-2 and OpenVLA.
        low, high: the binned range, in normalised units; "quantile" or "min_max" normalisation fits [-1, 1].
        expectation: give the mean over bins by probability instead of the likeliest bin.
        depth: residual blocks before the output.
    """

    def __init__(
        self, *, bins: int = 256, low: float = -1.0, high: float = 1.0, expectation: bool = False, depth: int = 0
    ) -> None:
        super().__init__()
        if bins < 2 or not low < high:
            raise ConfigError(f"need at least 2 bins over a range low < high, given {bins} over [{low}, {high}]")
        self.bins, self.low, self.high, self.expectation, self.depth = bins, low, high, expectation, depth

    def _build(self) -> None:
        self.to_logits = self.to_chunk(self.action_dim * self.bins, depth=self.depth)

    def encode(self, actions: Tensor) -> Tensor:
        """[..., A] -> token ids [..., A], 0 .. bins-1."""
        return to_bins(actions, self.bins, self.low, self.high)

    def decode(self, tokens: Tensor) -> Tensor:
        """Token ids [..., A] -> [..., A].

        Raises:
            BadSample: an id that is no bin.
        """
        if bool(((tokens < 0) | (tokens >= self.bins)).any()):
            raise BadSample(f"action tokens are 0 .. {self.bins - 1}, given {int(tokens.min())} .. {int(tokens.max())}")
        return from_bins(tokens, self.bins, self.low, self.high)

    def logits(self, features: Tensor) -> Tensor:
        """[B, N, D] -> [B, chunk, A, bins]."""
        logits: Tensor = self.to_logits(features).unflatten(-1, (self.action_dim, self.bins))
        return logits

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        logits = self.logits(features)
        nll = F.cross_entropy(logits.flatten(0, 2), self.encode(actions).flatten(), reduction="none")
        return valid_mean(nll.view_as(actions), mask)

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        logits = self.logits(self._features(features))
        if self.expectation:
            centres = from_bins(torch.arange(self.bins, device=logits.device), self.bins, self.low, self.high)
            return logits.softmax(-1) @ centres.to(logits.dtype)
        return self.decode(logits.argmax(-1)).to(logits.dtype)


class DiscreteHead(Head):
    """One of `action_dim` actions at each step (BabyAI, Atari); actions and predictions are indices [B, chunk].

    Args:
        sample: draw by probability instead of taking the likeliest.
        depth: residual blocks before the output.
    """

    discrete = True

    def __init__(self, *, sample: bool = False, depth: int = 0) -> None:
        super().__init__()
        self.sample, self.depth = sample, depth

    def _build(self) -> None:
        self.to_logits = self.to_chunk(self.action_dim, depth=self.depth)

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        if actions.is_floating_point() or bool(((actions < 0) | (actions >= self.action_dim)).any()):
            raise ConfigError(f"discrete actions are whole numbers 0 .. {self.action_dim - 1}, given {actions.dtype}")
        nll = F.cross_entropy(self.to_logits(features).flatten(0, 1), actions.flatten().long(), reduction="none")
        return step_mean(nll.view_as(actions), mask)

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        features = self._features(features)
        logits = self.to_logits(features)
        if not self.sample:
            index: Tensor = logits.argmax(-1)
            return index
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
        return drawn.view(logits.shape[:2])
