"""Any Gymnasium environment, and BabyAI, through the same observation."""

import numpy as np
import pytest

from mmpeft.errors import ConfigError, MissingExtra, NameNotFound
from mmpeft.policies import make_env, make_expert

gym = pytest.importorskip("gymnasium")


class Line(gym.Env):
    """A point on a line that draws a grey picture; its success is in `info`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    observation_space = gym.spaces.Dict(
        {"robot": gym.spaces.Dict({"x": gym.spaces.Box(-9, 9, (2,))}), "goal": gym.spaces.Box(-9, 9, (3,))}
    )
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def _now(self):
        return {"robot": {"x": self.x.astype(np.float32)}, "goal": np.zeros(3, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.normal(size=2)
        return self._now(), {}

    def step(self, action):
        self.x = self.x + action
        return self._now(), float(-abs(self.x).sum()), False, False, {"is_success": abs(self.x[0]) > 2}

    def render(self):
        return np.full((30, 50, 3), 120, np.uint8)


class Dark(Line):
    """The same without pictures."""

    metadata = {"render_modes": ["human"]}


@pytest.fixture(scope="module", autouse=True)
def registered():
    gym.register("Line-v0", Line, max_episode_steps=5)
    gym.register("Dark-v0", Dark, max_episode_steps=5)
    yield
    del gym.registry["Line-v0"], gym.registry["Dark-v0"]


def test_dict_observations_pictures_and_limits():
    env = make_env("gym:Line-v0", state="robot/x", instruction="move", image_size=20, full_state=True)
    observation, info = env.reset(seed=4)
    assert env.observation_space.contains(observation)
    assert observation["images"].shape == (1, 20, 20, 3) and (observation["images"] == 120).all()
    assert observation["state"].shape == (2,) and observation["full_state"].shape == (5,)
    assert info["instruction"] == "move" and env.max_steps == 5 and env.control_hz == 15
    assert np.array_equal(env.reset(seed=4)[0]["state"], observation["state"])
    ended = [env.step([1.0, 0.0])[2:] for _ in range(5)]
    assert ended[-1][1] and not ended[-2][1] and ended[-1][2]["success"]


@pytest.mark.parametrize(
    ("success", "won"),
    [("is_success", True), ("reward > -100", True), ("episode_return >= 1e3", False), ("absent", False)],
)
def test_success_in_words(success, won):
    env = make_env("gym:Line-v0", views=(), success=success, max_steps=8)
    env.reset(seed=0)
    for _ in range(6):
        info = env.step([1.0, 0.0])[4]
    assert info["success"] is won


@pytest.mark.parametrize(
    ("task", "options", "error", "says"),
    [
        ("Dark-v0", {}, ConfigError, "draws no pictures"),
        ("Lin-v0", {}, NameNotFound, "Line-v0"),
        ("no_such_package:Line-v0", {}, MissingExtra, "no_such_package"),
        ("Line-v0", {"state": "robot/y"}, NameNotFound, "'y'"),
        ("Line-v0", {"success": "reward is 3"}, ConfigError, "reward >= 0.5"),
        ("Line-v0", {"views": ("corner",)}, NameNotFound, "render"),
        ("Line-v0", {"max_steps": 0}, ConfigError, "max_steps"),
    ],
)
def test_wrong_gym_input(task, options, error, says):
    with pytest.raises(error, match=says):
        make_env(f"gym:{task}", **options)


def test_discrete_actions_of_a_classic():
    env = make_env("gym:CartPole-v1", views=(), success="episode_return >= 3")
    env.reset(seed=0)
    described = env.describe()
    assert (described["action"], described["discrete"], described["state"], described["images"]) == (2, True, [4], None)
    for bad in (2, -1, [0, 1]):
        with pytest.raises(ConfigError, match="0 to 1"):
            env.step(bad)
    assert [env.step(1)[4]["success"] for _ in range(3)] == [False, False, True]


def test_babyai_planner_solves_what_the_sentence_says(capsys):
    pytest.importorskip("minigrid")
    env, expert = make_env("babyai:GoToLocal", image_size=28), make_expert("babyai:GoToLocal")
    sentences = set()
    for seed in range(8):
        observation, _ = env.reset(seed=seed)
        assert env.observation_space.contains(observation) and observation["state"].sum() == 1
        sentences.add(observation["instruction"])
        expert.reset(env)
        done = False
        while not done:
            _, _, terminated, truncated, info = env.step(expert.act(env))
            done = terminated or truncated
        assert info["success"]
    assert len(sentences) > 3 and capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="multiple of 7"):
        make_env("babyai:GoToLocal", image_size=30)
    with pytest.raises(NameNotFound, match="GoToLocal"):
        make_env("babyai:GoTLocal")
