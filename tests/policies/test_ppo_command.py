"""`mmpeft ppo` from a saved clone: a copy trained further is whole, an adapter over it is rolled out over it."""

import csv
import json

import pytest
import yaml

from mmpeft.cli import main
from mmpeft.policies import DiscreteHead, MLPTrunk, Policy, make_env, save_policy
from mmpeft.policies.policy import note_skill

ENV = "gym:CartPole-v1"
OPTIONS = ["views=[]", "max_steps=40", "success=episode_return > 15"]
SMALL = ["--total-steps", "200", "--num-envs", "4", "--decisions", "25", "--minibatches", "2"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    import numpy as np
    import torch

    import mmpeft

    torch.manual_seed(0)
    policy = Policy(trunk=MLPTrunk(width=16, side=8), head=DiscreteHead(), action_dim=2, state_dim=4, chunk=1)
    where = make_env(ENV, views=()).describe()
    policy.fit(np.zeros(9), np.random.default_rng(0).normal(size=(9, 4)), environment=where)
    mmpeft.attach(policy, {"trunk": "full", "head": "full"}, "clone")
    note_skill(policy, "clone")
    return str(save_policy(policy, tmp_path_factory.mktemp("clone"), "clone"))


def ppo(clone, folder, *more):
    return main(["ppo", "--adapter", clone, "--env", ENV, "--folder", str(folder), *SMALL, "--options", *OPTIONS, *more])


def rollout(adapter, output, *more):
    args = ["--adapter", str(adapter), "--env", ENV, "--seeds", "0:3", "--num-envs", "1", "--output", str(output)]
    assert main(["rollout", *args, *more, "--options", *OPTIONS]) == 0
    return json.loads(output.read_text())


def test_a_copy_of_the_clone_is_trained_further_and_is_whole(clone, tmp_path, capsys):
    assert ppo(clone, tmp_path / "ppo") == 0
    assert "adapter 'ppo' in" in capsys.readouterr().out
    with (tmp_path / "ppo" / "curve.csv").open() as file:
        assert float(list(csv.DictReader(file))[-1]["steps"]) >= 200
    assert len(rollout(tmp_path / "ppo", tmp_path / "result.json")["episodes"]) == 3


def test_an_adapter_over_the_clone(clone, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump([{"match": "trunk.mlp.*", "method": {"LoRA": {"rank": 2}}}]))
    assert ppo(clone, tmp_path / "lora", "--plan", str(plan)) == 0
    assert len(rollout(tmp_path / "lora", tmp_path / "result.json", "--over", clone)["episodes"]) == 3
    assert main(["rollout", "--expert", "--env", ENV, "--over", clone]) == 2
    assert "--over is for one --adapter" in capsys.readouterr().err


def test_wrong_numbers_are_told(clone, tmp_path, capsys):
    assert ppo(clone, tmp_path, "--clip", "-1") == 2
    assert "clip must be above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ppo", "--adapter", clone, "--env", ENV, "--folder", str(tmp_path)])
    assert "--total-steps" in capsys.readouterr().err
