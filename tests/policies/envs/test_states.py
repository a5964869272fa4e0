"""States for policies without eyes: Metaworld's whole state, MiniGrid's symbols."""

import numpy as np
import pytest

from mmpeft.errors import BaseMismatch, NameNotFound
from mmpeft.policies import make_env
from mmpeft.policies.envs.base import check_trained_for


def test_metaworld_full_state_is_what_the_expert_sees():
    pytest.importorskip("metaworld", reason="metaworld is not installed (pip install 'mmpeft[robot]')")
    env = make_env("metaworld:reach-v3", views=(), state="full", full_state=True)
    observation, _ = env.reset(seed=3)
    assert observation["state"].shape == (39,) == env.observation_space["state"].shape
    np.testing.assert_array_equal(observation["state"], observation["full_state"].astype(np.float32))
    about = env.describe()
    assert about["state"] == [39] and about["options"]["state"] == "full"
    plain = make_env("metaworld:reach-v3", views=())
    assert plain.reset(seed=3)[0]["state"].tolist() == observation["state"][:4].tolist()
    assert "state" not in plain.describe()["options"]
    with pytest.raises(BaseMismatch, match="state: trained with"):
        check_trained_for(about, plain.describe(), needs=("state",))
    with pytest.raises(NameNotFound, match="nearest: full"):
        make_env("metaworld:reach-v3", views=(), state="ful")


def test_minigrid_symbols():
    pytest.importorskip("minigrid", reason="minigrid is not installed (pip install 'mmpeft[robot]')")
    env = make_env("gym:minigrid:MiniGrid-Empty-5x5-v0", views=(), state="image", success="reward > 0")
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation["state"].reshape(7, 7, 3), env.sim.unwrapped.gen_obs()["image"])
