"""Chunks carried out: receding horizon asks as often as it says, temporal ensembling averages as ACT's formula does."""

import numpy as np
import pytest

from mmpeft.errors import ConfigError
from mmpeft.policies.chunking import ChunkExecutor, ensemble


class Counter:
    """Chunk t says 100 t + step."""

    execute = 3

    def __init__(self):
        self.asked = 0

    def act(self, observation):
        self.asked += 1
        t = observation["t"]
        return np.full((2, 6, 1), 100.0 * t) + np.arange(6)[None, :, None]


def run(steps, **options):
    policy = Counter()
    executor = ChunkExecutor(policy, **options)
    out = [executor.step({"t": t} if executor.wants_observation else None)[0, 0] for t in range(steps)]
    return policy.asked, out


def test_receding_horizon():
    assert run(7) == (3, [0, 1, 2, 300, 301, 302, 600])  # the policy's own execute
    assert run(4, execute=1) == (4, [0, 100, 200, 300])
    assert run(7, execute=6) == (2, [0, 1, 2, 3, 4, 5, 600])


def test_temporal_ensemble():
    m = 0.3
    asked, out = run(9, temporal_ensemble=m)
    assert asked == 9
    for now, value in enumerate(out):
        made = [t for t in range(now + 1) if now - t < 6]  # chunks that still say something, oldest first
        weights = np.exp(-m * np.arange(len(made)))
        assert value == pytest.approx(
            sum(w * (100 * t + now - t) for w, t in zip(weights, made, strict=True)) / weights.sum()
        )
    equal = ensemble([np.full((2, 4, 3), 7.0)] * 3, 5.0)
    assert equal.shape == (2, 3) and np.allclose(equal, 7, rtol=1e-14)


def test_refusals():
    with pytest.raises(ConfigError, match="execute is 1"):
        ChunkExecutor(Counter(), execute=2, temporal_ensemble=0.1)
    with pytest.raises(ConfigError, match="at least 1"):
        ChunkExecutor(Counter(), execute=0)
    with pytest.raises(ConfigError, match="needs an observation"):
        ChunkExecutor(Counter()).step()
    with pytest.raises(ConfigError, match="execute=7"):
        ChunkExecutor(Counter(), execute=7).step({"t": 0})
