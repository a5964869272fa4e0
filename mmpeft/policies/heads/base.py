"""The interface of an action head: features of any trunk in, a chunk of actions out, and a loss between.

    head = L1Head().build(in_dim=256, action_dim=4, chunk=8)
    loss = head.loss(features, actions, mask)          # features [B, N, D], actions [B, chunk, A], mask bool
    actions = head.predict(features)                   # [B, chunk, A]

Choices that hold for every head:

- Actions are normalised (`policies.normalise`); a head knows no units.
- Features are N readout tokens: N = 1 for a trunk that gives a vector, N = chunk for one that reads every step of the
  chunk out in parallel (OpenVLA-OFT). `ToChunk` makes the per-step vectors of both.
- The mask is True where an action is real: [B, chunk] beyond an episode's end, or [B, chunk, A] for robots with fewer
  dimensions. What it hides is never read, not even a NaN.
- `loss` is the mean over valid steps, so that `loss * number of valid steps` adds up over micro-batches and ranks.
- Sizes may come late (`build`), as with connectors: a head in a YAML file knows neither the trunk nor the robot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmpeft.errors import ConfigError
from mmpeft.policies.parts import Part


class Head(Part):
    """Base class of the action heads; subclasses write `_build`, `_loss` and `predict`.

    Attributes:
        in_dim, action_dim, chunk: D, A (of a discrete head the number of actions), steps of a chunk; 0 until `build`.
        readouts: N, the feature tokens it reads: 1 or chunk.
        discrete: whether actions are class indices [B, chunk] instead of vectors.
    """

    discrete: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.in_dim = self.action_dim = self.chunk = self.readouts = 0

    def build(self, *, in_dim: int, action_dim: int, chunk: int, readouts: int = 1) -> Self:
        """Create the parameters; calling it again with the same sizes does nothing.

        Raises:
            ConfigError: a size that is not a positive integer, other sizes than before, readouts neither 1 nor chunk.
        """
        sizes = {"in_dim": in_dim, "action_dim": action_dim, "chunk": chunk, "readouts": readouts}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{type(self).__name__}: {name} must be a positive integer, given {value!r}")
            known = getattr(self, name)
            if known and known != value:
                raise ConfigError(f"{type(self).__name__} was built with {name}={known}, not {value}")
        if readouts not in (1, chunk):
            raise ConfigError(f"{type(self).__name__}: readouts is 1 or chunk={chunk}, given {readouts}")
        if not self.in_dim:
            self.in_dim, self.action_dim, self.chunk, self.readouts = in_dim, action_dim, chunk, readouts
            self._build()
        return self

    def _build(self) -> None:
        raise NotImplementedError

    def loss(self, features: Tensor, actions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean loss over the valid steps, a scalar.

        Args:
            features: [B, N, D] (or [B, D], which is N = 1).
            actions: [B, chunk, A], normalised; of a discrete head [B, chunk], class indices.
            mask: bool [B, chunk] or [B, chunk, A], True = valid; None = all.

        Raises:
            ConfigError: shapes that do not fit, or nothing valid to learn from.
        """
        features = self._features(features)
        shape = (features.shape[0], self.chunk) + (() if self.discrete else (self.action_dim,))
        if tuple(actions.shape) != shape:
            raise ConfigError(f"{type(self).__name__} expects actions {list(shape)}, given {list(actions.shape)}")
        valid = self._mask(mask, actions)
        return self._loss(features, torch.where(valid, actions, 0), valid)

    def _loss(self, features: Tensor, actions: Tensor, mask: Tensor) -> Tensor:
        """The same with everything checked: `mask` has the shape of `actions`, which are zero where it is False."""
        raise NotImplementedError

    def predict(self, features: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Actions [B, chunk, A] (discrete: [B, chunk]); heads that draw take their numbers from `generator`."""
        raise NotImplementedError

    def fit(self, chunks: Tensor) -> None:
        """Learn what is not learned by gradients (a vocabulary, a codebook) from normalised chunks [N, chunk, A]."""

    def facts(self) -> dict[str, Any]:
        """What `fit` learned, as JSON data: it is kept in the adapter's metadata."""
        return {}

    def facts_differ(self, facts: Mapping[str, Any]) -> bool:
        """Whether these are other facts than the head works with now."""
        return False

    def set_facts(self, facts: Mapping[str, Any]) -> None:
        """Take up what `facts` gave; raises FileFormatError if something is missing."""

    def to_chunk(self, out: int, *, depth: int = 0) -> ToChunk:
        """A `ToChunk` for this head's features."""
        return ToChunk(self.in_dim, out, chunk=self.chunk, readouts=self.readouts, depth=depth)

    def _features(self, features: Tensor) -> Tensor:
        if not self.in_dim:
            raise ConfigError(f"{type(self).__name__} has no parameters yet: call build(in_dim=, action_dim=, chunk=)")
        if features.ndim == 2:
            features = features.unsqueeze(1)
        if features.ndim != 3 or tuple(features.shape[1:]) != (self.readouts, self.in_dim):
            raise ConfigError(
                f"{type(self).__name__} expects features [B, {self.readouts}, {self.in_dim}], "
                f"given {list(features.shape)}"
            )
        return features

    def _mask(self, mask: Tensor | None, actions: Tensor) -> Tensor:
        if mask is None:
            return torch.ones_like(actions, dtype=torch.bool)
        if mask.dtype != torch.bool or mask.shape not in (actions.shape, actions.shape[:2]):
            raise ConfigError(
                f"{type(self).__name__} expects a bool mask {list(actions.shape[:2])} or {list(actions.shape)}, "
                f"given {mask.dtype} {list(mask.shape)}"
            )
        return mask if mask.shape == actions.shape else mask.unsqueeze(-1).expand_as(actions)

    def extra_repr(self) -> str:
        return f"in_dim={self.in_dim}, action_dim={self.action_dim}, chunk={self.chunk}" if self.in_dim else "not built"


class ToChunk(nn.Module):
    """Features [B, N, D] to one vector a step [B, chunk, out]: all steps from one token (N = 1), or token by token.

    Args:
        depth: residual blocks (LayerNorm, Linear, ReLU) before the output, as in OpenVLA-OFT's head; 0 is linear.
    """

    def __init__(self, in_dim: int, out: int, *, chunk: int, readouts: int, depth: int = 0) -> None:
        super().__init__()
        self.chunk, self.out = chunk, out
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, in_dim), nn.ReLU()) for _ in range(depth)
        )
        self.linear = nn.Linear(in_dim, out if readouts == chunk else chunk * out)

    def forward(self, features: Tensor) -> Tensor:
        for block in self.blocks:
            features = features + block(features)
        out: Tensor = self.linear(features)
        return out.view(features.shape[0], self.chunk, self.out)


def valid_mean(per_number: Tensor, mask: Tensor) -> Tensor:
    """Mean of [B, chunk, A] over valid dimensions of each step, then over valid steps; zero if there are none."""
    mask = mask.to(per_number.dtype)
    steps = (per_number * mask).sum(-1) / mask.sum(-1).clamp_min(1)  # [B, chunk]
    return step_mean(steps, mask.amax(-1))


def step_mean(per_step: Tensor, valid: Tensor) -> Tensor:
    """Mean of [B, chunk] over valid steps."""
    valid = valid.to(per_step.dtype)
    return (per_step * valid).sum() / valid.sum().clamp_min(1)
