"""Skills: routed by sentence, row by row; a new skill leaves the old ones bit-identical."""

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.policies.policy import note_skill
from mmpeft.policies.skills import Skills

from .policy_kit import Demos, Words, make_policy, observation

PLAN = {"trunk": "full", "head": "full"}


def learned(policy, name, scale):
    policy.fit(Demos().stacked("action") * scale, Demos().stacked("state"))
    mmpeft.attach(policy, PLAN, name)
    note_skill(policy, name)
    with torch.no_grad():
        for p in (p for g in mmpeft.parameter_groups(policy, lr=1.0, name=name) for p in g["params"]):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))


def test_each_row_by_its_sentence_and_old_skills_stay():
    policy = make_policy(encoder=None, instruction=Words())
    learned(policy, "push", 1.0)
    before = policy.act(observation())
    learned(policy, "pull_it", 10.0)
    skills = Skills(policy, {"push": ["push it"], "pull_it": ["pull it", "tug at it"]})
    assert skills.route(observation()["instruction"]) == ["push", "pull_it", "push"]
    chunk = skills.act(observation())
    np.testing.assert_allclose(chunk[[0, 2]], before[[0, 2]], rtol=1e-5, atol=1e-5)
    assert np.abs(chunk[1]).mean() > 3 * np.abs(chunk[0]).mean()
    with mmpeft.use(policy, "push"):
        np.testing.assert_array_equal(policy.act(observation()), before)  # bit for bit


def test_a_new_sentence_goes_to_the_nearest_or_is_refused():
    policy = make_policy(encoder=None, instruction=Words())
    learned(policy, "push", 1.0)
    learned(policy, "stop", 1.0)
    skills = Skills(policy, {"push": ["push it now"], "stop": ["zzz"]}, near=0.9)
    assert skills.route(["push it  now"]) == ["push"]
    with pytest.raises(NameNotFound, match="below 0.9"):
        skills.route(["QQQ"])
    deaf = make_policy(encoder=None)
    learned(deaf, "push", 1.0)
    with pytest.raises(NameNotFound, match="no instruction encoder"):
        Skills(deaf, {"push": ["push it now"]}).route(["push it"])


def test_refusals():
    policy = make_policy(encoder=None)
    learned(policy, "push", 1.0)
    with pytest.raises(NameNotFound, match="grasp"):
        Skills(policy, {"grasp": ["take it"]})
    with pytest.raises(ConfigError, match="no skill"):
        Skills(policy, {})
    learned(policy, "pull_it", 1.0)
    with pytest.raises(ConfigError, match="calls both"):
        Skills(policy, {"push": ["go"], "pull_it": ["go"]})
