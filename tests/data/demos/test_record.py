"""Recording: clean labels under noise, exact replay, resuming, and files that are cut short or altered."""

import json
import shutil

import numpy as np
import pytest

from mmpeft.data.demos import DemoFolder, Episode, verify
from mmpeft.data.demos.record import ReplayMismatch, check_replay
from mmpeft.data.demos.store import read_episode, write_episode
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, Unsupported

pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")

from mmpeft.policies import collect, make_env, make_expert


def test_labels_are_the_experts_and_noise_only_moves_the_arm(recorded):
    store = DemoFolder(recorded / "push")
    env, expert = make_env("metaworld:push-v3", views=()), make_expert("metaworld:push-v3")
    assert len(store) == 2 and store.description["noise"] == 0.3
    for episode in store:
        env.begin(episode.seed)
        for action, executed, state in zip(episode["action"], episode["executed"], episode["state"], strict=True):
            assert np.array_equal(expert.act(env), action)
            assert np.array_equal(env.observe()["state"], state)
            env.advance(executed)
        moved = np.abs(episode["executed"] - episode["action"])
        assert 0.05 < moved[:, :3].mean() < 0.4 and moved[:, 3].max() == 0
        assert np.abs(episode["executed"]).max() <= 1
        first = int(np.argmax(episode["success"]))
        assert episode["success"][first] and len(episode) == first + 1 + 3  # three steps after success
        assert len(episode["snapshot"]) == len(episode) + 1


def test_without_noise_the_label_is_what_was_done(recorded):
    for episode in DemoFolder(recorded / "reach"):
        assert np.array_equal(episode["action"], episode["executed"]) and episode["success"][-1]


def test_replay_is_exact_and_a_changed_recording_is_found(recorded):
    assert verify(recorded / "push") == 2
    episode = DemoFolder(recorded / "push").read(0)
    env = make_env("metaworld:push-v3", views=())
    snapshot = episode["snapshot"].copy()
    snapshot[7, 3] += 1e-12
    with pytest.raises(ReplayMismatch, match="step 7"):
        check_replay(env, Episode(0, "", {**episode.arrays, "snapshot": snapshot}))
    with pytest.raises(ReplayMismatch, match="step 0"):
        check_replay(env, Episode(1, "", episode.arrays))


def test_a_recording_is_small(recorded):
    sizes = [p.stat().st_size for p in (recorded / "push").glob("episode-*")]
    assert sum(sizes) / len(sizes) < 80_000  # 50 episodes: under 4 MB


def test_recording_goes_on_where_it_stopped(recorded, tmp_path):
    folder = tmp_path / "push"
    shutil.copytree(recorded / "push", folder)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("episode-*")}
    more = collect("metaworld:push-v3", episodes=3, noise=0.3, folder=folder, extra_steps=3)
    assert more.recorded == [2] and DemoFolder(folder).seeds == [0, 1, 2]
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("episode-*") if p.name in before} == before
    with pytest.raises(ConfigError, match="noise: 0.3 there, 0.1 now"):
        collect("metaworld:push-v3", episodes=4, noise=0.1, folder=folder)
    with pytest.raises(ConfigError, match="env"):
        collect("metaworld:reach-v3", episodes=4, noise=0.3, folder=folder)
    with pytest.raises(ConfigError, match="seeds ran out with 1 of 4"):
        collect("metaworld:push-v3", episodes=4, noise=0.3, folder=folder, seeds=[0, 1])
    assert len(DemoFolder(folder)) == 3


def test_a_failing_expert_is_not_recorded(tmp_path):
    with pytest.raises(ConfigError, match="expert 0%"):
        collect("metaworld:push-v3", episodes=1, folder=tmp_path, seeds=[0, 1], options={"max_steps": 10})
    assert len(DemoFolder(tmp_path)) == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_files_are_named_and_the_others_still_read(recorded, tmp_path, damage):
    folder = tmp_path / "push"
    shutil.copytree(recorded / "push", folder)
    path = DemoFolder(folder).file(1)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    store = DemoFolder(folder)
    with pytest.raises(FileFormatError, match="0000000001.*record its seed again"):
        store.read(1)
    assert len(store.read(0)) > 0


def test_episodes_that_do_not_fit_are_not_written(recorded, tmp_path):
    good = DemoFolder(recorded / "reach").read(0)
    nan = good["action"].copy()
    nan[2, 1] = np.nan
    for arrays, says in (
        ({"action": nan}, "NaN"),
        ({"state": good["state"][:-1]}, "length"),
        ({"reward": good["reward"].astype(np.float64)}, "float32"),
        ({"executed": good["executed"][:, :3]}, "executed"),
        ({"pictures": good["state"]}, "unknown array"),
    ):
        with pytest.raises(FileFormatError, match=says):
            write_episode(tmp_path / "x.safetensors", Episode(0, "", {**good.arrays, **arrays}))
    with pytest.raises(FileFormatError, match="reward"):
        write_episode(
            tmp_path / "x.safetensors", Episode(0, "", {k: v for k, v in good.arrays.items() if k != "reward"})
        )
    assert not list(tmp_path.iterdir())
    write_episode(tmp_path / "x.safetensors", good)
    back = read_episode(tmp_path / "x.safetensors")
    assert back.seed == good.seed and back.instruction == "reach the goal"
    assert all(np.array_equal(back[k], v) and back[k].dtype == v.dtype for k, v in good.arrays.items())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"episodes": 0}, ConfigError),
        ({"episodes": 1.5}, ConfigError),
        ({"noise": -0.1}, ConfigError),
        ({"noise": 2.0}, ConfigError),
        ({"extra_steps": -1}, ConfigError),
        ({"env": "metaworld:rech-v3"}, NameNotFound),
        ({"env": "gym:CartPole-v1"}, Unsupported),
        ({"options": {"max_step": 4}}, NameNotFound),
    ],
)
def test_wrong_settings_write_nothing(settings, error, tmp_path):
    with pytest.raises(error):
        collect(**{"env": "metaworld:reach-v3", "folder": tmp_path / "x", "episodes": 1, **settings})
    assert not (tmp_path / "x").exists()


def test_no_folder_and_no_description(tmp_path):
    with pytest.raises(NameNotFound, match="no demos.json"):
        DemoFolder(tmp_path)
    (tmp_path / "demos.json").write_text('{"env": "metaw')
    with pytest.raises(FileFormatError, match="describes no demonstrations"):
        DemoFolder(tmp_path)
    (tmp_path / "demos.json").write_text(json.dumps({"env": "metaworld:reach-v3"}))
    with pytest.raises(FileFormatError, match="no episodes"):
        verify(tmp_path)


def test_discrete_demonstrations(tmp_path):
    pytest.importorskip("minigrid")
    found = collect("babyai:GoToLocal", episodes=4, noise=0.2, folder=tmp_path)
    store = DemoFolder(tmp_path)
    assert len(found.recorded) == 4 and verify(tmp_path) == 4
    assert all(e["action"].dtype == np.int64 and "snapshot" not in e.arrays for e in store)
    assert any((e["action"] != e["executed"]).any() for e in store)


def test_the_command(tmp_path, capsys):
    from mmpeft.policies.commands import collect as command

    args = ["--env", "metaworld:reach-v3", "--episodes", "1", "--noise", "0.1", "--seeds", "4:9"]
    assert command([*args, "--folder", str(tmp_path), "--options", "max_steps=200", "--extra-steps", "2"]) == 0
    store = DemoFolder(tmp_path)
    assert store.seeds == [4] and store.description["options"] == {"max_steps": 200}
    assert "1 episodes" in capsys.readouterr().out
