"""Any environment that Gymnasium knows, with pixels or state, as `{images, state, instruction}`.

    env = GymEnv("gym_pusht:gym_pusht/PushT-v0", success="is_success", instruction="push the T onto its mark")
    env = GymEnv("gymnasium_robotics:FrankaKitchen-v1", state="observation", success="episode_return >= 1")
    env = GymEnv("Pendulum-v1", views=(), success="reward >= -0.1")

What the package cannot know is said in words: which part of a dict observation is the state, what counts as success,
what the robot is told.
"""

from __future__ import annotations

import contextlib
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, MissingExtra, NameNotFound, nearest, require
from mmpeft.policies.envs.base import Observation, RobotEnv, check_action, positive_steps, text_space
from mmpeft.policies.envs.gl import choose_gl
from mmpeft.policies.envs.noise import SensorNoise
from mmpeft.policies.envs.views import Noise, as_dataclass

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


class GymEnv(RobotEnv):
    """One environment of Gymnasium's registry.

    Args:
        task: its id, "Pendulum-v1"; "module:id" imports a module first, as in Gymnasium.
        views: ("render",) draws with the environment's own `rgb_array` mode, () draws nothing.
        image_size: pictures are resized to this side. max_steps: None keeps the environment's own limit.
        state: key of a dict observation that is the proprioception ("a/b" goes deeper); None takes a flat observation
            whole.
        instruction: what the robot is told. success: a key of `info`, or a comparison of `reward` or `episode_return`
            with a number.
        full_state: observations also hold the whole flat observation. noise: sensor noise. kwargs: of `gym.make`.

    Raises:
        NameNotFound: no such id, or no such key in the observation. ConfigError: pictures of an environment that draws
            none, an action space that is neither a Box nor Discrete, or a `success` that cannot be read.
    """

    def __init__(
        self,
        task: str,
        *,
        views: Sequence[str] = ("render",),
        image_size: int = 96,
        max_steps: int | None = None,
        state: str | None = None,
        instruction: str = "",
        success: str = "is_success",
        full_state: bool = False,
        noise: Noise | Mapping[str, Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.text = f"gym:{task}", instruction
        self.views, self.image_size = tuple(views), positive_steps("image_size", image_size)
        self.key, self.success, self.full_state = state, _success(success), full_state
        if self.views not in ((), ("render",)):
            raise NameNotFound(f"the only view of a gym environment is 'render', got {list(views)}")
        spec = _spec(task)
        draws = "rgb_array" in self._modes(spec)
        if self.views and not draws:
            raise ConfigError(f"{task} draws no pictures (its render modes: {self._modes(spec)}); use views=()")
        made = {**(kwargs or {}), "render_mode": "rgb_array"} if draws else dict(kwargs or {})
        limit = {} if max_steps is None else {"max_episode_steps": positive_steps("max_steps", max_steps)}
        self.sim: gym.Env[Any, Any] = gym.make(spec, disable_env_checker=True, **made, **limit)
        self.max_steps = int(max_steps or (self.sim.spec.max_episode_steps if self.sim.spec else 0) or 1000)
        self.control_hz = float(self.sim.metadata.get("render_fps") or 30)
        if not isinstance(self.sim.action_space, gym.spaces.Box | gym.spaces.Discrete):
            raise ConfigError(f"{task} has actions {self.sim.action_space}; Box and Discrete are supported")
        self.action_space = self.sim.action_space
        self.action_noise_mask = np.ones(self.action_space.shape or (1,), bool)
        self.sensor_noise = SensorNoise(as_dataclass(Noise, noise))
        self.observation_space = gym.spaces.Dict(self._spaces())
        self._raw: Any = None
        self._return = 0.0

    @staticmethod
    def _modes(spec: Any) -> list[str]:
        entry = (
            spec.entry_point if callable(spec.entry_point) else gym.envs.registration.load_env_creator(spec.entry_point)
        )
        return list(getattr(entry, "metadata", {}).get("render_modes", []))

    def _spaces(self) -> dict[str, gym.Space[Any]]:
        raw = self.sim.observation_space
        state = self._part(raw)
        spaces: dict[str, gym.Space[Any]] = {
            "state": gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(state),), np.float32),
            "instruction": text_space(),
        }
        self._state_space = state
        if self.views:
            spaces["images"] = gym.spaces.Box(0, 255, (1, self.image_size, self.image_size, 3), np.uint8)
        if self.full_state:
            spaces["full_state"] = gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(raw),), np.float64)
        return spaces

    def _part(self, value: Any) -> Any:
        """The part of an observation (or of its space) that `state` names."""
        for step in self.key.split("/") if self.key else ():
            keys = list(
                value.spaces if isinstance(value, gym.spaces.Dict) else value if isinstance(value, dict) else ()
            )
            if step not in keys:
                raise NameNotFound(
                    f"{self.name}: no {step!r} in the observation ({', '.join(keys)}){nearest(step, keys)}"
                )
            value = value[step]
        return value

    def begin(self, seed: int | None) -> None:
        self.take_seed(seed)
        self._raw, _ = self.sim.reset(seed=self.episode_seed)
        self._return = 0.0
        self.sensor_noise.begin(self.episode_seed)

    def advance(self, action: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        action = check_action(action, self.action_space, self.name)
        self._raw, reward, terminated, truncated, info = self.sim.step(action)
        self._return += float(reward)
        won = self.success(info, float(reward), self._return)
        return float(reward), bool(terminated), bool(truncated), {"success": won}

    def observe(self) -> Observation:
        flat = gym.spaces.flatten(self._state_space, self._part(self._raw))
        observation: Observation = {"state": np.asarray(flat, np.float32), "instruction": self.text}
        if self.views:
            observation["images"] = self.pictures()
        if self.full_state:
            observation["full_state"] = np.asarray(
                gym.spaces.flatten(self.sim.observation_space, self._raw), np.float64
            )
        return self.sensor_noise(observation)

    def pictures(self) -> NDArray[np.uint8]:
        return self.frame(self.image_size)[None]

    def frame(self, size: int = 256) -> NDArray[np.uint8]:
        image = require("PIL.Image", "vision")
        if "mujoco" in sys.modules:  # Gymnasium's MuJoCo renderer would take the back end that needs a screen
            with contextlib.suppress(MissingExtra):  # what draws without OpenGL draws all the same
                choose_gl()
        picture = image.fromarray(np.asarray(self.sim.render(), np.uint8))
        return np.asarray(
            picture.resize((size, size), image.Resampling.BOX if size < picture.width else image.Resampling.BICUBIC)
        )

    def describe(self) -> dict[str, Any]:
        options = {"views": list(self.views), "image_size": self.image_size, "state": self.key}
        return {**super().describe(), "views": list(self.views) or None, "options": options}

    def close(self) -> None:
        self.sim.close()


def _spec(task: str) -> Any:
    module, colon, name = task.rpartition(":")
    if colon:
        require(module, "robot", f"{name} is registered by the package {module}, which mmpeft does not bring")
    try:
        return gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        raise NameNotFound(f"Gymnasium knows no {name!r} ({error}){nearest(name, gym.registry)}") from error


def _success(said: str) -> Callable[[Mapping[str, Any], float, float], bool]:
    """(info, reward, episode return) -> success."""
    comparison = re.fullmatch(r"(reward|episode_return)\s*(>=|<=|>|<)\s*(-?[\d.]+(?:e-?\d+)?)", said.strip())
    if comparison:
        what, sign, number = comparison.groups()
        return lambda info, reward, total: _COMPARE[sign](reward if what == "reward" else total, float(number))
    if not re.fullmatch(r"\w+", said):
        raise ConfigError(f"success is a key of info, or 'reward >= 0.5' or 'episode_return > 10'; got {said!r}")
    return lambda info, reward, total: bool(info.get(said, False))
