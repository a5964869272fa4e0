"""Metaworld: seeds decide episodes, pictures are right and change nothing, sentences, shifts, noise, wrong input."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from mmpeft.errors import BaseMismatch, ConfigError, NameNotFound

pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")

from mmpeft.policies import make_env
from mmpeft.policies.envs.base import check_trained_for
from mmpeft.policies.envs.sentences import SAME_SCENE, SENTENCES, TRAIN, VISION_TASKS, sentence
from mmpeft.policies.envs.views import Shift, View, as_views, shrink
from mmpeft.policies.experts import make_expert

PLAY = """
import hashlib
from mmpeft.policies import make_env, make_expert
env = make_env("metaworld:push-v3", views={views}, image_size=24, full_state=True)
expert = make_expert("metaworld:push-v3")
digest = hashlib.sha256()
observation, _ = env.reset(seed=11)
for _ in range(12):
    digest.update(observation["full_state"].tobytes() + observation.get("images", observation["state"]).tobytes())
    observation, *_ = env.step(expert.act(env))
print(digest.hexdigest())
"""


def play(env, expert, steps):
    states = [env.full.copy()]
    for _ in range(steps):
        env.advance(expert.act(env))
        states.append(env.full.copy())
    return np.stack(states)


def test_a_seed_is_the_same_episode_in_another_process(gl):
    """States and pixels agree, although this process has drawn other models before."""
    other = make_env("metaworld:hammer-v3", image_size=24)
    other.reset(seed=3)
    env, expert = make_env("metaworld:push-v3", image_size=24, full_state=True), make_expert("metaworld:push-v3")
    env.reset(seed=4)
    env.step(np.ones(4))
    digest = hashlib.sha256()
    observation, info = env.reset(seed=11)
    assert info["seed"] == 11
    for _ in range(12):
        digest.update(observation["full_state"].tobytes() + observation["images"].tobytes())
        observation, *_ = env.step(expert.act(env))
    code = PLAY.format(views='("corner2",)')
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split()[-1] == digest.hexdigest()
    env.close()
    other.close()


@pytest.mark.parametrize("task", ["reach-v3", "door-lock-v3", "stick-pull-v3", "shelf-place-v3"])
def test_seeds_decide_episodes_whatever_came_before(task):
    env, fresh = (make_env(f"metaworld:{task}", views=()) for _ in range(2))
    expert = make_expert(f"metaworld:{task}")
    env.begin(1)
    first = play(env, expert, 40)
    fresh.begin(2)
    assert not np.array_equal(first[0], play(fresh, expert, 25)[0])
    fresh.begin(1)
    assert np.array_equal(first, play(fresh, expert, 40))


def test_without_a_seed_episodes_follow_from_the_last_one():
    env = make_env("metaworld:reach-v3", views=())
    env.reset(seed=5)
    one = [env.reset()[1]["seed"] for _ in range(3)]
    env.reset(seed=5)
    assert one == [env.reset()[1]["seed"] for _ in range(3)] and len(set(one)) == 3


def test_the_goal_is_not_clipped_from_the_full_state():
    env = make_env("metaworld:push-v3", views=(), full_state=True)
    observation, _ = env.reset(seed=0)
    assert observation["full_state"].shape == (39,) and observation["full_state"][-2] > 0.5
    after, *_ = env.step(np.zeros(4))
    assert np.allclose(after["full_state"][-3:], observation["full_state"][-3:])
    assert env.observation_space.contains(after)
    assert np.allclose(after["state"], after["full_state"][:4])


def test_two_models_in_one_process_draw_what_each_draws_alone(gl):
    alone = {}
    for task in ("push-v3", "hammer-v3"):
        env = make_env(f"metaworld:{task}", image_size=40)
        alone[task] = env.reset(seed=0)[0]["images"]
        env.close()
    pair = {task: make_env(f"metaworld:{task}", image_size=40) for task in alone}
    for _ in range(2):
        for task, env in pair.items():
            assert np.array_equal(env.reset(seed=0)[0]["images"], alone[task])
    assert (np.abs(alone["push-v3"].astype(int) - alone["hammer-v3"]) > 16).mean() > 0.05
    pair["hammer-v3"].close()
    assert np.array_equal(pair["push-v3"].reset(seed=0)[0]["images"], alone["push-v3"])
    pair["push-v3"].close()


def test_looking_changes_nothing(gl):
    seen, unseen = make_env("metaworld:push-v3", image_size=24), make_env("metaworld:push-v3", views=())
    expert = make_expert("metaworld:push-v3")
    seen.begin(6)
    unseen.begin(6)
    for _ in range(15):
        seen.observe()
        for env in (seen, unseen):
            env.advance(expert.act(env))
        assert np.array_equal(seen.snapshot(), unseen.snapshot())
    seen.close()


def test_a_stored_state_gives_the_same_pixels(gl):
    env, expert = make_env("metaworld:push-v3", image_size=32), make_expert("metaworld:push-v3")
    env.begin(6)
    play(env, expert, 20)
    state, picture = env.snapshot(), env.pictures()
    play(env, expert, 20)
    assert not np.array_equal(env.pictures(), picture)
    env.restore(state)
    assert np.array_equal(env.pictures(), picture)
    with pytest.raises(ConfigError, match="state of"):
        env.restore(state[:-1])
    env.close()


@pytest.mark.parametrize("camera", ["corner2", "corner", "corner3"])
def test_pictures_are_upright(gl, camera):
    """The blue finger moves up in the picture when the hand moves up."""
    env = make_env("metaworld:push-v3", views=(camera,), image_size=160)
    env.reset(seed=0)

    def height():
        r, g, b = env.pictures()[0].astype(int).transpose(2, 0, 1)
        blue = (b > 100) & (g > 100) & (r < 0.6 * b)
        assert blue.sum() > 3
        return np.nonzero(blue)[0].mean()

    low = height()
    for _ in range(25):
        env.advance([0, 0, 1, -1])
    assert height() < low - 2
    env.close()


def test_views_sizes_and_crops(gl):
    whole = View("corner2")
    part = View("corner2", crop=(0.5, 0.25, 0.5), supersample=2)
    env = make_env("metaworld:reach-v3", views=(whole, part, "gripperPOV"), image_size=48)
    images = env.reset(seed=0)[0]["images"]
    assert images.shape == (3, 48, 48, 3)
    large = env.renderer.draw(env.sim.data, whole, 192)
    cut = shrink(np.ascontiguousarray(large[48:144, 96:192]), 2).astype(int)
    assert np.abs(cut - images[1]).mean() < 3
    assert env.describe()["images"] == [3, 48, 48, 3]
    env.close()


def test_shrink_averages():
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    expected = picture.reshape(2, 2, 3, 2, 3).mean((1, 3))
    assert np.abs(shrink(picture, 2) - expected).max() <= 0.5


def test_shift_changes_looks_alone(gl):
    def images(seed, shift):
        env = make_env("metaworld:push-v3", image_size=32, shift=shift)
        env.begin(seed)
        found = env.pictures(), env.snapshot()
        env.close()
        return found

    plain, state = images(1, None)
    assert np.array_equal(images(1, Shift())[0], plain)
    shifted, same = images(1, {"camera": 0.05, "light": 0.4, "colour": 0.4})
    assert np.abs(shifted.astype(int) - plain).mean() > 3 and np.array_equal(state, same)
    env = make_env("metaworld:push-v3", image_size=32, shift=Shift(light=0.5, colour=0.5, seed=3))
    looks = []
    for seed in (1, 2, 1):
        env.begin(seed)
        looks.append(env.sim.model.mat_rgba.copy())
    assert np.array_equal(looks[0], looks[1])  # one other world
    env.renderer.shift(Shift(colour=0.5), 1)
    first = env.sim.model.mat_rgba.copy()
    env.renderer.shift(Shift(colour=0.5), 2)
    assert not np.array_equal(first, env.sim.model.mat_rgba)  # a new one each episode
    env.renderer.shift(None, 1)
    assert not np.array_equal(first, env.sim.model.mat_rgba)
    env.close()


def test_noise_repeats_and_spares_the_simulator(gl):
    noisy = make_env("metaworld:push-v3", image_size=24, noise={"pixels": 20.0, "state": 0.01})
    clean = make_env("metaworld:push-v3", image_size=24)
    a, b, c = noisy.reset(seed=2)[0], noisy.reset(seed=2)[0], clean.reset(seed=2)[0]
    assert np.array_equal(a["images"], b["images"]) and np.array_equal(a["state"], b["state"])
    assert 5 < np.abs(a["images"].astype(int) - c["images"]).mean() < 30 and not np.array_equal(a["state"], c["state"])
    assert np.array_equal(noisy.pictures(), c["images"]) and a["state"].dtype == np.float32
    dark = make_env("metaworld:push-v3", image_size=24, noise={"drop": 1.0})
    assert dark.reset(seed=2)[0]["images"].max() == 0
    for env in (noisy, clean, dark):
        env.close()


def test_sentences():
    assert len(SENTENCES) == 50 and len(VISION_TASKS) == len(set(VISION_TASKS) & set(SENTENCES)) == 24
    every = [s for five in SENTENCES.values() for s in five]
    assert len(every) == len(set(every)) == 250 and all(s == s.strip() and len(s) > 8 for s in every)
    assert {t for group in SAME_SCENE for t in group} <= set(SENTENCES)
    drawn = {w: {sentence("push-v3", w, seed) for seed in range(60)} for w in ("canonical", "train", "heldout")}
    five = SENTENCES["push-v3"]
    assert drawn == {"canonical": {five[0]}, "train": set(five[:TRAIN]), "heldout": set(five[TRAIN:])}
    env = make_env("metaworld:push-v3", views=(), instruction="heldout")
    assert env.reset(seed=4)[0]["instruction"] == sentence("push-v3", "heldout", 4)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"view": ()}, NameNotFound, "views"),
        ({"views": ("cornr2",)}, NameNotFound, "corner2"),
        ({"views": ({"camera": "corner2", "crp": (0, 0, 1)},)}, NameNotFound, "crop"),
        ({"views": ({"crop": (0.5, 0.5, 0.6)},)}, ConfigError, "within 0..1"),
        ({"views": ({"supersample": 9},)}, ConfigError, "supersample"),
        ({"image_size": 0}, ConfigError, "image_size"),
        ({"max_steps": 501}, ConfigError, "500"),
        ({"instruction": "held_out"}, ConfigError, "heldout"),
        ({"shift": {"camra": 1}}, NameNotFound, "camera"),
        ({"shift": {"light": 2.0}}, ConfigError, "0 to 1"),
        ({"noise": {"drop": 1.5}}, ConfigError, "0..1"),
        ({"noise": 3}, ConfigError, "mapping"),
    ],
)
def test_wrong_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        make_env("metaworld:push-v3", **options)


@pytest.mark.parametrize("name", ["metaworld:psh-v3", "metawrld:push-v3", "metaworld:", "push-v3", 3])
def test_wrong_names_are_refused(name):
    with pytest.raises(NameNotFound):
        make_env(name)


@pytest.mark.parametrize(
    ("action", "says"), [([0.0] * 3, "shape"), ([0, 0, np.nan, 0], "finite"), ([[0] * 4], "shape")]
)
def test_wrong_actions_are_refused(action, says):
    env = make_env("metaworld:push-v3", views=())
    env.reset(seed=0)
    with pytest.raises(ConfigError, match=says):
        env.step(np.asarray(action))


def test_a_policy_of_other_cameras_or_actions_is_refused():
    here = make_env("metaworld:push-v3", views=("close",), image_size=24).describe()
    same = make_env("metaworld:reach-v3", views=("close",), image_size=24, shift={"light": 0.5}).describe()
    check_trained_for(same, here)  # another task under another light is what a policy is tried on
    for other, says in (
        (make_env("metaworld:push-v3", views=("corner2",), image_size=24).describe(), "views"),
        (make_env("metaworld:push-v3", views=("close",), image_size=32).describe(), "images"),
        ({**here, "action": [7]}, "action"),
    ):
        with pytest.raises(BaseMismatch, match=says):
            check_trained_for(other, here)
    blind = make_env("metaworld:push-v3", views=()).describe()
    check_trained_for({**here, "views": "x"}, blind, needs=("state", "instruction"))
    with pytest.raises(BaseMismatch, match="images"):
        check_trained_for(here, blind, needs=("images",))
    assert as_views("close", ["corner2"])[0].supersample == 2
