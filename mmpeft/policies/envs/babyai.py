"""BabyAI: instructions in a small language, in grid worlds whose picture alone does not say what to do.

    env = BabyAIEnv("GoToLocal", image_size=56)         # any of BabyAI's levels: "BabyAI-GoToLocal-v0" without its ends

Actions are discrete. The picture is what the agent sees, 7 x 7 cells in front of it; `state` is the direction it faces, one of four.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, NameNotFound, nearest, require
from mmpeft.policies.envs.base import Observation, RobotEnv, check_action, positive_steps, text_space
from mmpeft.policies.envs.noise import SensorNoise
from mmpeft.policies.envs.views import Noise, as_dataclass

CELLS = 7  # the agent sees so many cells in each direction


class BabyAIEnv(RobotEnv):
    """One BabyAI level.

    Args:
        task: "GoToLocal", "PutNextLocal", ... views: ("agent",), or () for no pictures. image_size: a multiple of 7.
        max_steps: None keeps the level's own limit. full_state: not available here. noise: sensor noise.

    Raises:
        NameNotFound: unknown level or view. ConfigError: a size that 7 does not divide. MissingExtra: minigrid is not
            installed.
    """

    control_hz = 8.0

    def __init__(
        self,
        task: str,
        *,
        views: Sequence[str] = ("agent",),
        image_size: int = 56,
        max_steps: int | None = None,
        full_state: bool = False,
        noise: Noise | Mapping[str, Any] | None = None,
    ) -> None:
        require("minigrid", "robot")
        levels = [i.removeprefix("BabyAI-").removesuffix("-v0") for i in gym.registry if i.startswith("BabyAI-")]
        if task not in levels:
            raise NameNotFound(
                f"BabyAI has no level {task!r}{nearest(task, levels)}; there are {len(levels)}, such as GoToLocal"
            )
        if tuple(views) not in ((), ("agent",)):
            raise NameNotFound(f"BabyAI's only view is 'agent', got {list(views)}")
        if positive_steps("image_size", image_size) % CELLS:
            raise ConfigError(f"image_size must be a multiple of {CELLS} (cells seen), got {image_size}")
        if full_state:
            raise ConfigError("BabyAI has no full_state: its expert plans on the grid itself")
        self.name, self.views, self.image_size = f"babyai:{task}", tuple(views), image_size
        limit = {} if max_steps is None else {"max_steps": positive_steps("max_steps", max_steps)}
        self.sim = cast(Any, gym.make(f"BabyAI-{task}-v0", disable_env_checker=True, **limit).unwrapped)
        self.sensor_noise = SensorNoise(as_dataclass(Noise, noise))
        self.action_space = gym.spaces.Discrete(len(self.sim.actions))
        self.action_noise_mask = np.array([True])
        spaces: dict[str, gym.Space[Any]] = {
            "state": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
            "instruction": text_space(),
        }
        if self.views:
            spaces["images"] = gym.spaces.Box(0, 255, (1, image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)
        self.last_action: int | None = None

    def begin(self, seed: int | None) -> None:
        self.take_seed(seed)
        with contextlib.redirect_stdout(io.StringIO()):  # the generator prints every layout it rejects
            self.sim.reset(seed=self.episode_seed)
        self.max_steps = int(self.sim.max_steps)
        self.text, self.last_action = str(self.sim.mission), None
        self.sensor_noise.begin(self.episode_seed)

    def advance(self, action: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        self.last_action = check_action(action, self.action_space, self.name)
        _, reward, terminated, truncated, _ = self.sim.step(self.last_action)
        return float(reward), bool(terminated), bool(truncated), {"success": bool(terminated and reward > 0)}

    def observe(self) -> Observation:
        facing = np.eye(4, dtype=np.float32)[self.sim.agent_dir]
        observation: Observation = {"state": facing, "instruction": self.text}
        if self.views:
            observation["images"] = self.pictures()
        return self.sensor_noise(observation)

    def pictures(self) -> NDArray[np.uint8]:
        return self._draw(self.image_size)[None]

    def frame(self, size: int = 256) -> NDArray[np.uint8]:
        """The agent's view, [size', size', 3] with the nearest multiple of 7 below `size`."""
        return self._draw(max(CELLS, size // CELLS * CELLS))

    def _draw(self, size: int) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] = self.sim.get_frame(highlight=False, tile_size=size // CELLS, agent_pov=True)
        return picture

    def describe(self) -> dict[str, Any]:
        options = {"views": list(self.views), "image_size": self.image_size}
        return {**super().describe(), "views": list(self.views) or None, "options": options}

    def close(self) -> None:
        self.sim.close()
