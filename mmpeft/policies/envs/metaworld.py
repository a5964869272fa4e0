"""Metaworld's 50 manipulation tasks, with `reset(seed)` that decides the episode and pictures drawn on demand.

    env = MetaworldEnv("push-v3", views=("close",), image_size=96)
    observation, info = env.reset(seed=50_000)

Three things the library (3.1) does otherwise: it ignores the seed of `reset`; it hides the goal from the full state
and, if told not to, keeps clipping the goal to zero by a cached space; its renderer draws every model of a process
with one context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, NameNotFound, nearest, require
from mmpeft.policies.envs.base import Array, Observation, RobotEnv, check_action, positive_steps, text_space
from mmpeft.policies.envs.noise import SensorNoise
from mmpeft.policies.envs.renderer import Renderer
from mmpeft.policies.envs.sentences import SENTENCES, Wording, sentence
from mmpeft.policies.envs.views import Noise, Shift, View, as_dataclass, as_views, digest

HORIZON = 500  # the library's own; its simulator refuses to go on after it
#: how many of the simulator's 39 numbers `state` holds. The robot's own 4 are hand x, y, z in metres and the gripper's
#: opening, 0 closed to 1 open; all of them say where every object and the goal is, which only a simulator knows.
STATES = {"proprioception": 4, "full": 39}


class MetaworldEnv(RobotEnv):
    """One Metaworld task.

    Args:
        task: "push-v3", ... (50). views: pictures an observation holds: names of `views.VIEWS`, cameras, or `View`s;
            () for none.
        image_size: side of the pictures in pixels. max_steps: at most 500.
        state: "proprioception", or "full" for policies that need no eyes (see `STATES`).
        full_state: observations also hold the 39 numbers that the scripted expert reads.
        instruction: "canonical", or "train" or "heldout" to draw a paraphrase by the episode's seed.
        shift: other looks (camera, light, colours). noise: sensor noise.

    Raises:
        NameNotFound: unknown task, view or camera. ConfigError: an option out of range.
        MissingExtra: metaworld is not installed. NoGL: at the first picture, where no OpenGL library works.
    """

    control_hz = 80.0

    def __init__(
        self,
        task: str,
        *,
        views: Sequence[str | View | Mapping[str, Any]] | str = ("corner2",),
        image_size: int = 96,
        max_steps: int = HORIZON,
        state: Literal["proprioception", "full"] = "proprioception",
        full_state: bool = False,
        instruction: Wording = "canonical",
        shift: Shift | Mapping[str, Any] | None = None,
        noise: Noise | Mapping[str, Any] | None = None,
    ) -> None:
        if task not in SENTENCES:
            raise NameNotFound(
                f"Metaworld has no task {task!r}{nearest(task, SENTENCES)}; there are {', '.join(SENTENCES)}"
            )
        if positive_steps("max_steps", max_steps) > HORIZON:
            raise ConfigError(f"Metaworld's episodes have at most {HORIZON} steps, got max_steps {max_steps}")
        positive_steps("image_size", image_size)
        if state not in STATES:
            raise NameNotFound(f"no state {state!r}{nearest(str(state), STATES)}; there are {', '.join(STATES)}")
        self.state, self.state_size = state, STATES[state]
        sentence(task, instruction, 0)
        self.task, self.name = task, f"metaworld:{task}"
        self.image_size, self.max_steps, self.full_state, self.wording = (
            image_size,
            int(max_steps),
            full_state,
            instruction,
        )
        self.look = as_dataclass(Shift, shift)
        self.sim = _simulator(task)
        self.cameras = [self.sim.model.camera(i).name for i in range(self.sim.model.ncam)]
        self.views = as_views(views, self.cameras)
        self.renderer = Renderer(self.sim.model)
        self.sensor_noise = SensorNoise(as_dataclass(Noise, noise))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.action_noise_mask = np.array([True, True, True, False])  # a noisy gripper drops what it holds
        self.observation_space = gym.spaces.Dict(self._spaces())
        self.full = np.zeros(39)
        self._steps = 0

    def _spaces(self) -> dict[str, gym.Space[Any]]:
        size = self.image_size
        spaces: dict[str, gym.Space[Any]] = {
            "state": gym.spaces.Box(-np.inf, np.inf, (self.state_size,), np.float32),
            "instruction": text_space(),
        }
        if self.views:
            spaces["images"] = gym.spaces.Box(0, 255, (len(self.views), size, size, 3), np.uint8)
        if self.full_state:
            spaces["full_state"] = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
        return spaces

    def begin(self, seed: int | None) -> None:
        self.take_seed(seed)
        self.sim.seed(self.episode_seed)
        self.full, _ = self.sim.reset()
        self._steps = 0
        self.text = sentence(self.task, self.wording, self.episode_seed)
        self.renderer.shift(self.look, self.episode_seed)
        self.sensor_noise.begin(self.episode_seed)

    def advance(self, action: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        action = check_action(action, self.action_space, f"{self.name}, step {self._steps}")
        self.full, reward, _, _, info = self.sim.step(action)
        self._steps += 1
        return float(reward), False, self._steps >= self.max_steps, {"success": bool(info["success"])}

    def observe(self) -> Observation:
        observation: Observation = {"state": self.full[: self.state_size].astype(np.float32), "instruction": self.text}
        if self.views:
            observation["images"] = self.pictures()
        if self.full_state:
            observation["full_state"] = self.full.copy()
        return self.sensor_noise(observation)

    def pictures(self) -> NDArray[np.uint8]:
        return np.stack([self.renderer.draw(self.sim.data, v, self.image_size) for v in self.views])

    def frame(self, size: int = 256) -> NDArray[np.uint8]:
        """A picture of the first view (corner2 if there is none), [size, size, 3]."""
        return self.renderer.draw(self.sim.data, self.views[0] if self.views else View("corner2"), size)

    def snapshot(self) -> Array:
        mujoco, kind = _state_kind()
        state = np.empty(mujoco.mj_stateSize(self.sim.model, kind))
        mujoco.mj_getState(self.sim.model, self.sim.data, state, kind)
        return state

    def restore(self, state: Array) -> None:
        """Put the simulator into a stored state, for pictures; rewards and the expert's own history do not come back.

        Raises:
            ConfigError: a state of another size.
        """
        mujoco, kind = _state_kind()
        size = mujoco.mj_stateSize(self.sim.model, kind)
        if np.shape(state) != (size,):
            raise ConfigError(f"{self.name} has a state of {size} numbers, got shape {np.shape(state)}")
        mujoco.mj_setState(self.sim.model, self.sim.data, np.asarray(state, np.float64), kind)

    def describe(self) -> dict[str, Any]:
        """As the base class says, with the views; `looks` names what decides a pixel, the shift included."""
        looks = digest(*self.views, self.look, self.image_size) if self.views else None
        options = {"views": [dataclasses.asdict(v) for v in self.views], "image_size": self.image_size}
        options |= {"state": self.state} if self.state != "proprioception" else {}
        views = digest(*self.views) if self.views else None
        return {**super().describe(), "views": views, "looks": looks, "options": options}

    def close(self) -> None:
        self.renderer.close()


def _simulator(task: str) -> Any:
    """The library's environment, fully observable, drawing its placements from `seed()`."""
    require("packaging", "robot", "Gymnasium's MuJoCo part needs it and does not declare it")
    sim = require("metaworld.env_dict", "robot").ALL_V3_ENVIRONMENTS[task]()
    sim._partially_observable = False
    sim.__dict__.pop(
        "sawyer_observation_space", None
    )  # cached with a goal range of 0, to which the goal would be clipped
    sim._freeze_rand_vec, sim.seeded_rand_vec, sim._set_task_called = False, True, True
    return sim


def _state_kind() -> tuple[Any, int]:
    """MuJoCo, and the parts of its state that decide what happens next: forces from outside are never applied here."""
    mujoco = require("mujoco", "robot")
    kinds = mujoco.mjtState
    parts = (
        kinds.mjSTATE_FULLPHYSICS,
        kinds.mjSTATE_CTRL,
        kinds.mjSTATE_MOCAP_POS,
        kinds.mjSTATE_MOCAP_QUAT,
        kinds.mjSTATE_WARMSTART,
    )
    return mujoco, sum(int(p) for p in parts)
