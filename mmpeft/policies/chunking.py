"""Carrying out chunks: how many actions before the policy is asked again, and what to do with chunks that overlap.

    executor = ChunkExecutor(policy, execute=4)
    while running:
        action = executor.step(observe() if executor.wants_observation else None)      # [B, A]

Receding horizon: of a chunk of `chunk` actions the first `execute` are carried out. Temporal ensembling (ACT, arXiv
2304.13705) asks at every step and averages what all chunks so far say about it, with weights exp(-m age), age counted
from the oldest. It is off by default: it costs `execute` times the predictions, and was measured to hurt (LeRobot's 500
episodes on Aloha: 87.6 % without, 70.8 % with m = 0.01).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError

Array = NDArray[Any]


def ensemble(chunks: Sequence[Array], m: float) -> Array:
    """The action for now [B, A] from past chunks [B, C, A], oldest first, the last made now.

    Chunk i of n was made n-1-i steps ago, so its say about now is its step n-1-i; its weight is exp(-m i).
    """
    n = len(chunks)
    said = np.stack([chunk[:, n - 1 - i] for i, chunk in enumerate(chunks)])  # [n, B, A]
    weights = np.exp(-m * np.arange(n))
    result: Array = np.tensordot(weights / weights.sum(), said.astype(np.float64), 1).astype(chunks[0].dtype)
    return result


class ChunkExecutor:
    """Single actions out of a policy's chunks, for a batch of environments in step with each other.

    Args:
        policy: any object with `act(observation) -> chunk [B, C, A]`.
        execute: actions before the next prediction; None: the policy's own `execute`, else the whole chunk.
        temporal_ensemble: the m above; None: off. It predicts at every step, so `execute` must be 1 or None.

    Raises:
        ConfigError: values out of range; at `step`, a chunk shorter than `execute`.
    """

    def __init__(self, policy: Any, *, execute: int | None = None, temporal_ensemble: float | None = None) -> None:
        if execute is not None and execute < 1:
            raise ConfigError(f"execute must be at least 1, given {execute}")
        if temporal_ensemble is not None and execute not in (None, 1):
            raise ConfigError(f"temporal ensembling predicts at every step, so execute is 1, not {execute}")
        own = getattr(policy, "execute", None)
        self.policy, self.m = policy, temporal_ensemble
        self.execute: int | None = 1 if temporal_ensemble is not None else execute or own
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new episode begins in every row."""
        self._queue: deque[Array] = deque()
        self._chunks: list[Array] = []

    @property
    def wants_observation(self) -> bool:
        """Whether the next `step` predicts; between, nothing needs to be rendered."""
        return not self._queue

    def step(self, observation: Mapping[str, Any] | None = None) -> Array:
        """The next action [B, A] of every row."""
        if not self._queue:
            if observation is None:
                raise ConfigError("the chunk is used up: this step needs an observation (see wants_observation)")
            chunk = np.asarray(self.policy.act(observation))
            if chunk.ndim < 2 or chunk.shape[1] < (self.execute or 1):
                raise ConfigError(f"execute={self.execute} of a chunk [B, C, ...], given {list(chunk.shape)}")
            if self.m is not None:
                self._chunks = [*self._chunks, chunk][-chunk.shape[1] :]
                self._queue.append(ensemble(self._chunks, self.m))
            else:
                self._queue.extend(chunk[:, i] for i in range(self.execute or chunk.shape[1]))
        return self._queue.popleft()
