"""One slot of a rollout's vector environment: it plays the episodes it is told to, a chunk of actions a step.

    slot = Slot(EpisodeList(("metaworld:push-v3",), ((0, 7), (0, 8))), options={}, execute=8)
    slot.reset(seed=1)            # episode number 1 of the list: push-v3 with seed 8
    slot.step(chunk)              # 8 actions, one picture at the end

It runs in a worker process. A chunk a step means one message and one picture where eight would be; the end of an
episode stops a chunk midway. The end is told by `info["record"]`, never by `terminated`: Gymnasium's autoreset would
start an episode of its own choice, and this slot waits for the next number instead, repeating its last observation
without moving the simulator.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from mmpeft.errors import ConfigError
from mmpeft.policies.envs import make_env
from mmpeft.policies.envs.base import Observation, RobotEnv


@dataclass(frozen=True)
class EpisodeList:
    """What a rollout plays: environments, and (index of the environment, seed) for each episode."""

    envs: tuple[str, ...]
    episodes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Filming:
    """Pictures for videos: None of `size` takes the first view of each observation (nothing is drawn twice), else every
    `every` actions a picture of `size` pixels is drawn."""

    size: int | None = None
    every: int = 4


@dataclass
class Record:
    """A finished episode as it travels back: its row, and the pictures [T, H, W, 3] if it was filmed."""

    number: int
    row: dict[str, Any]
    frames: NDArray[np.uint8] | None
    frames_per_second: float


class Slot(gym.Env[Observation, Any]):
    """Plays episodes of an `EpisodeList`.

    Args:
        plan: the episodes. options: of `make_env`, the same for every environment.
        execute: actions of a chunk that are carried out before the next observation.
        stop_on_success: an episode ends with its first success.

    Raises:
        ConfigError: environments whose observation or action spaces differ.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        plan: EpisodeList,
        *,
        options: dict[str, Any],
        execute: int = 1,
        stop_on_success: bool = True,
        filming: Filming | None = None,
        first_env: int = 0,
    ) -> None:
        self.plan, self.options, self.execute = plan, options, execute
        self.stop_on_success, self.filming = stop_on_success, filming
        self.env: RobotEnv | None = None
        self.env = self._switch(first_env)
        self.observation_space, self.single = _without_text(self.env.observation_space), self.env.action_space
        self.action_space = batch_space(self.single, execute)
        self.number = -1
        self.playing, self.success = False, False
        self.last: Observation = {}
        self.frames: list[NDArray[np.uint8]] = []
        self.instruction = ""
        self.steps, self.reward, self.began = 0, 0.0, 0.0
        self.first_success: int | None = None

    def _switch(self, index: int) -> RobotEnv:
        """The environment number `index` of the plan; the one before is closed, its OpenGL context with it."""
        name = self.plan.envs[index]
        if self.env is not None:
            if self.env.name == name:
                return self.env
            self.env.close()
        env = make_env(name, **self.options)
        if self.env is not None:
            mine, theirs = (
                (_without_text(env.observation_space), env.action_space),
                (self.observation_space, self.single),
            )
            if mine != theirs:
                raise ConfigError(
                    f"{name} has other spaces than {self.plan.envs[0]} ({mine} against {theirs}); "
                    "roll them out one after the other"
                )
        return env

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin episode number `seed` of the plan; its true seed comes from there."""
        if seed is None or not 0 <= seed < len(self.plan.episodes):
            raise ConfigError(f"a slot is reset with an episode number below {len(self.plan.episodes)}, got {seed!r}")
        index, episode_seed = self.plan.episodes[seed]
        self.number, self.playing = seed, True
        self.env = self._switch(index)
        self.began = time.perf_counter()
        observation, info = self.env.reset(seed=episode_seed)
        self.steps, self.reward, self.success, self.first_success = 0, 0.0, False, None
        self.instruction = str(observation.pop("instruction"))
        self.last = observation
        self.frames = []
        self._film(observation)
        return observation, {"instruction": self.instruction}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if not self.playing:
            return self.last, 0.0, False, False, {}
        assert self.env is not None
        total, done = 0.0, False
        for one in action:
            reward, terminated, truncated, info = self.env.advance(one)
            self.steps += 1
            total += reward
            if bool(info["success"]):
                self.success = True
                self.first_success = self.first_success or self.steps
            if self.filming and self.filming.size and self.steps % self.filming.every == 0:
                self._film(None)
            done = terminated or truncated or (self.success and self.stop_on_success)
            if done:
                break
        self.reward += total
        self.last = self.env.observe()
        self.last.pop("instruction")
        if self.filming and (not self.filming.size or done):
            self._film(self.last)
        if not done:
            return self.last, total, False, False, {}
        self.playing = False
        return self.last, total, False, False, {"record": self._record()}

    def _film(self, observation: Observation | None) -> None:
        if not self.filming:
            return
        assert self.env is not None
        if self.filming.size:
            self.frames.append(self.env.frame(self.filming.size))
        elif observation is not None and "images" in observation:
            self.frames.append(np.array(observation["images"][0]))

    def _record(self) -> Record:
        assert self.env is not None
        row = {
            "task": self.env.name,
            "seed": self.plan.episodes[self.number][1],
            "success": self.success,
            "first_success": self.first_success,
            "steps": self.steps,
            "return": round(self.reward, 6),
            "instruction": self.instruction,
            "seconds": round(time.perf_counter() - self.began, 3),
        }
        every = self.filming.every if self.filming and self.filming.size else self.execute
        frames = np.stack(self.frames) if self.frames else None
        return Record(self.number, row, frames, self.env.control_hz / every)

    def describe(self) -> dict[str, Any]:
        """`describe()` of the present environment."""
        assert self.env is not None
        return self.env.describe()

    def close(self) -> None:
        if self.env is not None:
            self.env.close()


def _without_text(space: gym.Space[Any]) -> gym.spaces.Dict:
    """The space of what travels every step: the instruction is told once an episode."""
    assert isinstance(space, gym.spaces.Dict)
    return gym.spaces.Dict({k: s for k, s in space.spaces.items() if not isinstance(s, gym.spaces.Text)})
