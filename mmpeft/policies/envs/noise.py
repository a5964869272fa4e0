"""Sensor noise, drawn from the episode's seed so that a noisy evaluation repeats."""

from __future__ import annotations

import numpy as np

from mmpeft.policies.envs.base import Observation
from mmpeft.policies.envs.views import Noise


class SensorNoise:
    """Adds `Noise` to observations; None is the identity. `begin` opens an episode."""

    def __init__(self, noise: Noise | None) -> None:
        self.noise = noise
        self.rng = np.random.default_rng(0)

    def begin(self, episode_seed: int) -> None:
        self.rng = np.random.default_rng([6, episode_seed])

    def __call__(self, observation: Observation) -> Observation:
        if self.noise is None:
            return observation
        noisy = dict(observation)
        noisy["state"] = (
            observation["state"] + self.rng.normal(0, self.noise.state, observation["state"].shape)
        ).astype(np.float32)
        if "images" in observation:
            images = observation["images"] + self.rng.normal(0, self.noise.pixels, observation["images"].shape)
            arrived = self.rng.random(len(images)) >= self.noise.drop
            noisy["images"] = np.clip(np.rint(images) * arrived[:, None, None, None], 0, 255).astype(np.uint8)
        return noisy
