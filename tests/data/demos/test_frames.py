"""Rendered pictures equal what the policy sees live; samples hold chunks that end with their episode."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")

from mmpeft.data.demos import Demonstrations, FrameCache
from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.policies import collect, make_env


def test_rendered_pictures_equal_the_live_ones(recorded, gl):
    views, shift = ("close", "corner2"), {"light": 0.3, "colour": 0.3}
    cache = FrameCache(recorded / "reach", views=views, image_size=24, shift=shift)
    episode = cache.store.read(1)
    env = make_env("metaworld:reach-v3", views=views, image_size=24, shift=shift)
    observation, _ = env.reset(seed=1)
    for step in range(6):
        assert np.array_equal(cache[1][step], observation["images"])
        observation, *_ = env.step(episode["executed"][step])
    assert len(cache[1]) == len(episode)
    cache.close()
    env.close()


def test_pictures_are_drawn_once_and_again_if_damaged(recorded, gl):
    options = {"views": ("corner2",), "image_size": 16}
    cache = FrameCache(recorded / "button", **options)
    assert cache.fill() > 0 and cache.fill() == 0.0
    first = np.array(cache[0])
    file = cache.folder / f"{0:010d}.npy"
    stamp = file.stat().st_mtime_ns
    assert np.array_equal(cache[0], first) and file.stat().st_mtime_ns == stamp
    file.write_bytes(file.read_bytes()[:500])
    assert np.array_equal(cache[0], first)
    other = FrameCache(recorded / "button", views=("corner3",), image_size=16)
    assert other.folder != cache.folder
    cache.close()


def test_workers_render_the_same(recorded, gl, tmp_path):
    here = FrameCache(recorded / "reach", views=("corner2",), image_size=8)
    shutil.copytree(recorded / "reach", tmp_path / "reach", ignore=shutil.ignore_patterns("frames"))
    there = FrameCache(tmp_path / "reach", views=("corner2",), image_size=8)
    assert there.fill(workers=2) > 0 and here.fill() > 0
    assert all(np.array_equal(here[seed], there[seed]) for seed in (0, 1))
    here.close()


def test_samples(recorded, gl):
    data = Demonstrations(
        [recorded / "reach", recorded / "button"], chunk=5, views=("corner2",), image_size=16
    ).render()
    lengths = [len(e) for _, e in data.episodes]
    assert len(data) == sum(lengths) and len(lengths) == 3
    for i in (0, lengths[0] - 2, len(data) - 1):
        number, step = data.index[i]
        episode, sample = data.episodes[number][1], data[i]
        real = min(5, len(episode) - step)
        assert sample["action_mask"].tolist() == [True] * real + [False] * (5 - real)
        assert np.array_equal(sample["action"][:real], episode["action"][step : step + 5])
        assert (sample["action"][real:] == sample["action"][real - 1]).all()
        assert sample["images"].dtype == torch.uint8 and sample["images"].shape == (1, 16, 16, 3)
        assert np.array_equal(sample["images"], data.pictures(number)[step])
        assert sample["state"].shape == (4,) and sample["step"] == step
    blind = data.without_pictures()
    assert set(data[0]) - set(blind[0]) == {"images"} and torch.equal(blind[3]["action"], data[3]["action"])
    assert [data[0]["task"], data[len(data) - 1]["task"]] == ["metaworld:reach-v3", "metaworld:coffee-button-v3"]
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=7, shuffle=True)))
    assert batch["action"].shape == (7, 5, 4) and len(batch["instruction"]) == 7
    assert data.stacked("state").shape == (len(data), 4)
    live = make_env("metaworld:reach-v3", views=("corner2",), image_size=16).describe()
    assert data.describe() == live


def test_blind_samples_draw_nothing(recorded):
    data = Demonstrations(recorded / "push", chunk=4, episodes=1, every=3, wording="heldout")
    assert "images" not in data[0] and [t for _, t in data.index[:3]] == [0, 3, 6]
    assert data[0]["instruction"] != "push the puck to the goal"
    assert data.describe()["state"] == [4] and data.describe().get("images") is None


def test_without_simulator_states_actions_are_replayed(tmp_path):
    pytest.importorskip("minigrid")
    collect("babyai:GoToLocal", episodes=2, folder=tmp_path)
    data = Demonstrations(tmp_path, views=("agent",), image_size=28, chunk=3)
    env = make_env("babyai:GoToLocal", image_size=28)
    observation, _ = env.reset(seed=1)
    for step, action in enumerate(data.episodes[1][1]["executed"]):
        assert np.array_equal(data.pictures(1)[step], observation["images"])
        observation, *_ = env.step(action)
    assert data[0]["action"].dtype == torch.int64 and data[0]["instruction"] == data.episodes[0][1].instruction


def test_wrong_datasets(recorded, tmp_path):
    for settings, error, says in (
        ({"chunk": 0}, ConfigError, "chunk"),
        ({"episodes": 3}, ConfigError, "has 2 episodes, 3"),
        ({"views": ("cornr2",)}, NameNotFound, "corner2"),
        ({"wording": "held"}, ConfigError, "heldout"),
    ):
        with pytest.raises(error, match=says):
            data = Demonstrations(recorded / "push", **settings)
            data[0]
    with pytest.raises(NameNotFound, match="no demonstrations"):
        Demonstrations(tmp_path)
    with pytest.raises(ConfigError, match="without views"):
        Demonstrations(recorded / "push").pictures(0)
