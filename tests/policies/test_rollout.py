"""Rollouts: every seed once, the same whatever the workers, nothing lost when one dies, wrong policies refused."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest

pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")

from mmpeft.errors import BaseMismatch, ConfigError, FileFormatError, NameNotFound, Unsupported
from mmpeft.policies import ExpertPolicy, RolloutResult, make_env, rollout
from mmpeft.policies.commands import options as parse_options
from mmpeft.policies.commands import rollout as rollout_command
from mmpeft.policies.commands import seeds as parse_seeds
from mmpeft.policies.rollout_video import read_video, write_video
from mmpeft.policies.rollout_workers import WorkerDied

REACH = "metaworld:reach-v3"


def rows(result):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in result.episodes]


class Still:
    """Never moves; counts what it is shown."""

    reads = ("state", "instruction")

    def __init__(self, chunk=8, value=0.0, size=4):
        self.chunk, self.value, self.size = chunk, value, size
        self.seen, self.resets = [], []

    def reset(self, num_envs):
        self.resets.append(num_envs)

    def act(self, observation):
        self.seen.append({k: np.array(v) for k, v in observation.items()})
        return np.full((len(observation["state"]), self.chunk, self.size), self.value)


class Killer(ExpertPolicy):
    """The expert, in whose `times` first calls a simulator process is killed."""

    def __init__(self, times):
        super().__init__()
        self.calls, self.times = 0, times

    def act(self, observation):
        self.calls += 1
        if self.calls % 5 == 0 and self.times > 0:
            self.times -= 1
            workers = [p for p in multiprocessing.active_children() if p.name.startswith("Worker<")]
            os.kill(workers[0].pid, signal.SIGKILL)
        return super().act(observation)


@pytest.fixture
def gl():
    """Skips by the reason where nothing can draw."""
    from mmpeft.policies.envs.gl import why_no_gl

    if reason := why_no_gl():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def expert():
    """Rows of the expert on reach and push, in this process."""
    return rollout(ExpertPolicy(), env=[REACH, "metaworld:push-v3"], seeds=range(3), num_envs=1)


def test_expert_solves_and_rows_say_what_happened(expert):
    assert expert.success == 1.0 and expert.interval[1] == 1.0 and 0.6 < expert.interval[0] < 0.62
    assert [(r["task"], r["seed"]) for r in expert.episodes] == [
        (t, s) for t in (REACH, "metaworld:push-v3") for s in range(3)
    ]
    assert {r["instruction"] for r in expert.episodes} == {"reach the goal", "push the puck to the goal"}
    assert all(r["steps"] == r["first_success"] < 200 for r in expert.episodes)
    table = expert.by_task()
    assert table[REACH]["episodes"] == 3 and table[REACH]["steps"] < table["metaworld:push-v3"]["steps"]
    assert (
        expert.latency["calls"] == sum(r["steps"] for r in expert.episodes)
        and expert.latency["p95"] >= expert.latency["p50"]
    )
    assert "metaworld:push-v3" in str(expert)


def test_slots_in_one_process_change_nothing(expert):
    mixed = rollout(ExpertPolicy(), env=[REACH, "metaworld:push-v3"], seeds=range(3), num_envs=4, asynchronous=False)
    assert rows(mixed) == rows(expert)


def test_a_killed_worker_costs_nothing_but_time(expert, tmp_path):
    killer = Killer(times=1)
    result = rollout(killer, env=[REACH, "metaworld:push-v3"], seeds=range(3), num_envs=2, folder=tmp_path)
    assert killer.times == 0 and result.settings["restarts"] == 1
    assert rows(result) == rows(expert)
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 6


def test_a_silent_worker_is_replaced(expert):
    class Stops(Killer):
        def act(self, observation):
            self.calls += 1
            if self.calls == 4:
                workers = [p for p in multiprocessing.active_children() if p.name.startswith("Worker<")]
                os.kill(workers[1].pid, signal.SIGSTOP)
            return ExpertPolicy.act(self, observation)

    result = rollout(Stops(0), env=REACH, seeds=range(2), num_envs=2, timeout=3.0)
    assert result.settings["restarts"] == 2 and rows(result) == rows(expert)[:2]  # nobody knows who was silent


def test_workers_draw_although_this_process_has_drawn(gl):
    """A process forked from one that has drawn hangs at its first picture; the slots come from a clean server."""
    env = make_env(REACH, image_size=16)
    alone = env.reset(seed=1)[0]["images"]

    class Looks(Still):
        reads = ("images", "state")

    for asynchronous in (True, False):
        policy = Looks(chunk=4)
        options = {"max_steps": 8, "image_size": 16, "views": ("corner2",)}
        settings = {"execute": 4, "num_envs": 2, "asynchronous": asynchronous, "timeout": 60.0}
        rollout(policy, env=REACH, seeds=[1, 2], options=options, **settings)
        assert policy.seen[0]["images"].shape == (2, 1, 16, 16, 3) and len(policy.seen) == 2
        assert np.array_equal(policy.seen[0]["images"][0], alone)
        assert not np.array_equal(policy.seen[0]["images"][1], alone)
    env.close()


def test_an_episode_that_always_kills_its_worker_is_named():
    with pytest.raises(WorkerDied, match=r"reach-v3 with seed 7 .* 3 times.*-9"):
        rollout(Killer(times=9), env=REACH, seeds=[7], num_envs=1, asynchronous=True)


def test_shards_join_to_the_whole(expert):
    names = [REACH, "metaworld:push-v3"]
    parts = [rollout(ExpertPolicy(), env=names, seeds=range(3), num_envs=1, shard=(i, 2)) for i in range(2)]
    whole = RolloutResult.merged(parts)
    order = {(r["task"], r["seed"]): r for r in rows(whole)}
    assert (
        order == {(r["task"], r["seed"]): r for r in rows(expert)} and whole.latency["calls"] == expert.latency["calls"]
    )
    with pytest.raises(ConfigError, match="two of the parts"):
        RolloutResult.merged([parts[0], parts[0]])


def test_what_a_policy_is_shown():
    policy = Still()
    env = [REACH, "metaworld:push-v3"]
    result = rollout(
        policy, env=env, seeds=[5, 6, 7], execute=8, num_envs=2, asynchronous=False, options={"max_steps": 20}
    )
    assert result.success == 0.0 and {r["steps"] for r in result.episodes} == {20} and policy.resets == [2]
    assert {r["first_success"] for r in result.episodes} == {None}
    assert len(policy.seen) == 3 * 3  # 6 episodes in 2 slots; 20 steps are 8 + 8 + 4
    for call, seen in enumerate(policy.seen):
        assert seen["state"].shape == (2, 4) and "images" not in seen and "full_state" not in seen
        assert seen["first"].tolist() == [call % 3 == 0] * 2
        told = dict(zip(seen["task"].tolist(), seen["instruction"].tolist(), strict=True))
        assert all(told[t] == {"r": "reach the goal", "p": "push the puck to the goal"}[t[10]] for t in told)
    by_slot = [[s["task"][i] for s in policy.seen] for i in range(2)]
    assert by_slot == [[REACH] * 9, ["metaworld:push-v3"] * 9]  # no slot changes its simulator without need


def test_idle_slots_repeat_their_last_observation():
    policy = Still(chunk=4)
    rollout(policy, env=REACH, seeds=range(3), execute=4, num_envs=2, asynchronous=False, options={"max_steps": 8})
    last = [s["state"] for s in policy.seen[-2:]]
    assert np.array_equal(last[0][1], last[1][1]) and not np.array_equal(last[0][0], last[1][0])


@pytest.mark.parametrize(
    ("policy", "settings", "says"),
    [
        (Still(chunk=3), {"execute": 4}, "at least 4 actions"),
        (Still(size=7), {}, "action size"),
        (Still(value=np.nan), {}, "reach-v3, seed 3: actions must be finite"),
        (Still(), {"seeds": [1, 1]}, "none twice"),
        (Still(), {"seeds": [-1]}, "seeds are integers"),
        (Still(), {"seeds": [0.5]}, "seeds are integers"),
        (Still(), {"seeds": []}, "at least one seed"),
        (Still(), {"execute": 0}, "execute"),
        (Still(), {"num_envs": -2}, "num_envs"),
        (Still(), {"shard": (2, 2)}, "shard"),
        (object(), {}, "act"),
    ],
)
def test_wrong_policies_and_settings(policy, settings, says):
    with pytest.raises(ConfigError, match=says):
        rollout(policy, **{"env": REACH, "seeds": [3], "num_envs": 1, **settings})


def test_wrong_names_and_policies_of_other_worlds():
    with pytest.raises(NameNotFound, match="reach-v3"):
        rollout(Still(), env="metaworld:rech-v3", seeds=[0], num_envs=1)
    with pytest.raises(NameNotFound, match="folder"):
        rollout("no/such/folder", env=REACH, seeds=[0])
    with pytest.raises(NameNotFound, match="max_steps"):
        rollout(Still(), env=REACH, seeds=[0], num_envs=1, options={"max_step": 3})
    policy = Still()
    policy.environment = {**make_env(REACH, views=()).describe(), "state": [7]}
    with pytest.raises(BaseMismatch, match="state: trained with"):
        rollout(policy, env=REACH, seeds=[0], num_envs=1)
    assert not policy.seen
    with pytest.raises(Unsupported, match="CartPole"):
        rollout(ExpertPolicy(), env="gym:CartPole-v1", seeds=[0], num_envs=1)
    with pytest.raises(ConfigError, match="other spaces"):
        rollout(Still(), env=[REACH, "gym:CartPole-v1"], seeds=[0], num_envs=1)


def test_discrete_actions():
    class Left:
        reads = ("state",)
        value = 0

        def act(self, observation):
            return np.full((len(observation["state"]), 5), self.value)

    result = rollout(
        Left(), env="gym:CartPole-v1", seeds=range(4), execute=3, num_envs=3, asynchronous=False,
        options={"success": "episode_return >= 10"},
    )  # fmt: skip
    assert all(7 < r["steps"] < 13 for r in result.episodes) and 0 < result.success < 1
    Left.value = 2
    with pytest.raises(ConfigError, match="integers 0 to 1"):
        rollout(Left(), env="gym:CartPole-v1", seeds=[0], num_envs=1)


def test_an_interrupted_rollout_goes_on(tmp_path):
    class Stops(ExpertPolicy):
        calls = 0

        def act(self, observation):
            self.calls += 1
            if self.calls == 150:
                raise KeyboardInterrupt
            return super().act(observation)

    with pytest.raises(KeyboardInterrupt):
        rollout(Stops(), env=REACH, seeds=range(5), num_envs=1, folder=tmp_path)
    file = tmp_path / "episodes.jsonl"
    done = len(file.read_text().splitlines()) - 1
    assert 0 < done < 5
    with file.open("a") as half:
        half.write('{"task": "metaworld:rea')  # killed while it wrote
    again = ExpertPolicy()
    result = rollout(again, env=REACH, seeds=range(5), num_envs=1, folder=tmp_path)
    assert rows(result) == rows(rollout(ExpertPolicy(), env=REACH, seeds=range(5), num_envs=1))
    assert result.latency["calls"] == sum(r["steps"] for r in result.episodes[done:])
    with pytest.raises(ConfigError, match="execute"):
        rollout(Still(), env=REACH, seeds=range(5), execute=4, num_envs=1, folder=tmp_path)


def test_paired_test_and_files(expert, tmp_path):
    lost = RolloutResult([{**r, "success": r["seed"] == 0} for r in expert.episodes])
    test = expert.compare(lost)
    assert (test.only_a, test.only_b, test.episodes) == (4, 0, 6) and test.difference == pytest.approx(4 / 6)
    assert test.p_value == pytest.approx(2 * 0.5**4)
    with pytest.raises(ConfigError, match="not shared"):
        expert.compare(RolloutResult(expert.episodes[:-1]))
    expert.save(tmp_path / "result.json")
    back = RolloutResult.load(tmp_path / "result.json")
    assert back.episodes == expert.episodes and back.interval == expert.interval
    (tmp_path / "cut.json").write_text((tmp_path / "result.json").read_text()[:-40])
    with pytest.raises(FileFormatError, match="no rollout result"):
        RolloutResult.load(tmp_path / "cut.json")
    with pytest.raises(NameNotFound):
        RolloutResult.load(tmp_path / "none.json")


def test_videos_show_what_the_policy_saw(tmp_path):
    pytest.importorskip("minigrid")

    class Forward:
        def act(self, observation):
            assert observation["images"].shape[1:] == (1, 56, 56, 3)
            return np.full((len(observation["state"]), 1), 2)

    settings = {"env": "babyai:GoToLocal", "seeds": range(4), "num_envs": 1, "options": {"max_steps": 6}}
    result = rollout(Forward(), video=tmp_path / "films", video_episodes=2, **settings)
    assert len(result.videos) >= 2 and all("success" in v or "failure" in v for v in result.videos)
    pytest.importorskip("av")
    film = read_video(result.videos[-1])
    row = next(r for r in result.episodes if f"-{r['seed']}-" in result.videos[-1])
    assert len(film) == row["steps"] + 1 and film.shape[1:] == (224, 224, 3)
    one = rollout(Forward(), video=tmp_path / "all.gif", video_episodes=1, **settings)
    assert one.videos == [str(tmp_path / "all.gif")] and (tmp_path / "all.gif").read_bytes()[:3] == b"GIF"


def test_wrong_videos(tmp_path):
    frames = np.zeros((3, 10, 11, 3), np.uint8)
    for path, pictures, says in (
        ("a.avi", frames, "mp4"),
        ("a.gif", frames[:0], "frames"),
        ("a.gif", frames.astype(float), "uint8"),
        ("a.gif", frames[0], "frames"),
    ):
        with pytest.raises(ConfigError, match=says):
            write_video(tmp_path / path, pictures)
    pytest.importorskip("av")
    film = np.random.default_rng(0).integers(0, 255, (4, 1, 1, 3), np.uint8).repeat(33, 1).repeat(47, 2)
    back = read_video(write_video(tmp_path / "a.mp4", film, fps=20)).astype(int)
    assert back.shape[0] == 4 and np.abs(back.mean((1, 2)) - film.mean((1, 2))).max() < 6
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:100])
    with pytest.raises(ConfigError, match="decoded"):
        read_video(tmp_path / "cut.mp4")


def test_the_command(capsys, tmp_path):
    output, args = str(tmp_path / "r.json"), ["--expert", "--env", REACH, "--num-envs", "1"]
    assert rollout_command([*args, "--seeds", "0:2", "--output", output, "--options", "max_steps=200"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["success"] == 1.0
    assert rollout_command([*args, "--seeds", "0,1", "--against", output]) == 0
    assert "p = 1" in capsys.readouterr().out
    assert parse_options(["views=[close]", "image_size=96", "shift={light: 0.5}"]) == {
        "views": ["close"], "image_size": 96, "shift": {"light": 0.5},
    }  # fmt: skip
    assert parse_seeds("3:5") == [3, 4]
    for wrong in ("5:3", "a:b", ""):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(wrong)
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_options(["views"])
