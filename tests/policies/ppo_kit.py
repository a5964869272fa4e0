"""Toy environments and cloned policies for the tests of reinforcement and continual learning."""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from mmpeft.policies.heads import DiscreteHead, GaussianHead
from mmpeft.policies.policy import Policy
from mmpeft.policies.trunks import MLPTrunk


class TwoStates(gym.Env):
    """State 0 or 1, shown one-hot; the right action (the state's number, or for numbers -1 and 1) gives 1, and the states
    take turns at random. Episodes of `length` steps end by time, or for good (`final`)."""

    def __init__(self, discrete=True, length=5, final=False):
        self.observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2) if discrete else gym.spaces.Box(-3, 3, (1,), np.float32)
        self.discrete, self.length, self.final = discrete, length, final

    def _see(self):
        self.place = int(self.np_random.integers(2))
        return np.eye(2, dtype=np.float32)[self.place]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._see(), {}

    def step(self, action):
        self.t += 1
        right = float(action == self.place) if self.discrete else -abs(float(action[0]) - (2 * self.place - 1))
        over = self.t == self.length
        info = {"success": right > (0.5 if self.discrete else -0.3)}
        return self._see(), right, over and self.final, over and not self.final, info


class Counter(gym.Env):
    """Counts its steps: state [t], reward t; ends at `length`, by time or for good."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length, final=False):
        self.length, self.final = length, final

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {"instruction": f"count to {self.length}"}

    def step(self, action):
        self.t += 1
        over = self.t == self.length
        return (
            np.array([self.t], np.float32),
            float(self.t),
            over and self.final,
            over and not self.final,
            {"success": self.t > 1},
        )


def vector(make, count=16, mode=AutoresetMode.NEXT_STEP):
    return SyncVectorEnv([make] * count, autoreset_mode=mode)


def cloned(discrete=True, *, state_dim=2, action_dim=None, chunk=1, **head):
    """A policy whose base knows nothing yet: near-uniform choices, or means near 0 with a wide deviation."""
    torch.manual_seed(0)
    policy = Policy(
        trunk=MLPTrunk(width=16, side=8), head=DiscreteHead(**head) if discrete else GaussianHead(**head),
        action_dim=action_dim or (2 if discrete else 1), state_dim=state_dim, chunk=chunk, actions="identity",
        states="identity",
    )  # fmt: skip
    steps = np.random.default_rng(0).normal(size=(20, state_dim))
    policy.fit(np.zeros((20, 1)) if discrete else np.random.default_rng(1).normal(size=(20, policy.action_dim)), steps)
    return policy
