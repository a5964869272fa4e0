"""Continual learning: what each strategy promises, on two tasks that contradict each other."""

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.adapters.fingerprint import base_tensors
from mmpeft.adapters.store import adapter_tensors
from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.policies.cloning import clone
from mmpeft.policies.continual import learn_continually
from mmpeft.policies.continual_strategies import EWC, OLoRA, Replay, anchor, ewc_penalty
from mmpeft.policies.memory import Memory
from mmpeft.policies.policy import note_skill

from .ppo_kit import cloned

PLAN = {"{trunk.mlp.*,trunk.state}": mmpeft.LoRA(rank=4), "head.to_moments.linear": mmpeft.LoRA(rank=2)}


def make_policy():
    return cloned(False, state_dim=3, action_dim=1, min_std=0.1)


def memory(sign, n=256, seed=0):
    """Actions are sign * the first number; the other two say which task it is."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    state = torch.stack([x, torch.full_like(x, sign > 0), torch.full_like(x, sign < 0)], 1)
    return Memory({"state": state[:, None], "action": sign * x[:, None, None], "action_mask": torch.ones(n, 1) > 0})


TASKS = {"with": memory(1.0), "against": memory(-1.0, seed=1)}
HELD_OUT = {"with": memory(1.0, seed=2), "against": memory(-1.0, seed=3)}


@torch.no_grad()
def score(policy, task):
    """Share of actions on the right side."""
    batch = HELD_OUT[task].batch
    return float((policy.predict(batch) * batch["action"] > 0).float().mean())


def learn(strategy, policy=None, **given):
    given = {"steps": 80, "lr": 1e-2, "batch_size": 64} | given
    return learn_continually(policy or make_policy(), TASKS, plan=PLAN, strategy=strategy, evaluate=score, **given)


def test_the_strategies_forget_as_they_should():
    strategies = {"sequential": "sequential", "isolated": "isolated", "replay": "replay", "ewc": EWC(strength=1e4)}
    found = {name: learn(s) for name, s in strategies.items()}
    for name, result in found.items():
        assert result.matrix[0, 0] > 0.9, (name, result.matrix)
    last = {name: result.matrix[-1, 0] for name, result in found.items()}
    assert last["sequential"] < 0.6 and last["isolated"] == found["isolated"].matrix[0, 0]
    assert last["replay"] > 0.9 and found["replay"].matrix[-1, 1] > 0.9
    assert last["ewc"] > 0.9, last
    assert found["isolated"].summary()["forgetting"] == 0 < found["sequential"].summary()["forgetting"]
    assert found["isolated"].trained == 2 * found["sequential"].trained
    assert found["replay"].kept == 2 * 200 * (3 + 1 + 1) and found["ewc"].kept == 4 * found["ewc"].trained


def test_an_isolated_adapter_and_the_base_keep_every_bit():
    policy = make_policy()
    before = {k: v.clone() for k, v in base_tensors(policy).items()}
    kept = {}
    learn("isolated", policy, report=lambda task, row: kept.setdefault(
        task, {k: v.clone() for k, v in adapter_tensors(policy, task).items()}))  # fmt: skip
    assert all(torch.equal(v, adapter_tensors(policy, "with")[k]) for k, v in kept["with"].items())
    assert all(torch.equal(before[k], v) for k, v in base_tensors(policy).items())


def test_olora_keeps_its_subspaces_apart_and_its_earlier_adapters():
    overlap, kept = {}, {}
    for strength in (1e-9, 5.0):
        policy = make_policy()
        learn(OLoRA(strength=strength), policy, report=lambda task, row, p=policy, s=strength: kept.setdefault(
            (s, task), {k: v.clone() for k, v in adapter_tensors(p, task).items()}))  # fmt: skip
        overlap[strength] = float(mmpeft.adapters.orthogonal_penalty(policy, "against", ["with"]).detach())
        now = adapter_tensors(policy, "with")
        assert all(torch.equal(v, now[k]) for k, v in kept[strength, "with"].items())
        assert mmpeft.active(policy) == ("with", "against")
    assert overlap[5.0] < 0.05 * overlap[1e-9], overlap


def test_fisher_is_the_mean_squared_gradient_of_single_samples():
    policy = make_policy()
    mmpeft.attach(policy, PLAN, "a")
    note_skill(policy, "a")
    clone(policy, TASKS["with"], steps=5, lr=1e-2, batch_size=32)
    few = TASKS["with"].take(torch.arange(7))
    found = anchor(policy, "a", few, samples=7)
    parameters = dict(mmpeft.adapters.switch.adapter_parameters(policy, "a"))
    squares = {k: torch.zeros_like(p) for k, p in parameters.items()}
    for i in range(7):
        loss = policy(few.take(torch.tensor([i])).batch)
        for (k, _), g in zip(parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True):
            squares[k] += g.square() / 7
    for k in squares:
        torch.testing.assert_close(found.fisher[k], squares[k])
    assert float(ewc_penalty(policy, "a", [found], strength=2.0).detach()) == 0
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.5)
    want = sum(float(f.sum()) * 0.25 for f in squares.values())
    assert float(ewc_penalty(policy, "a", [found], strength=2.0).detach()) == pytest.approx(want, rel=1e-4)
    assert float(ewc_penalty(policy, "a", [found, found], strength=2.0).detach()) == pytest.approx(2 * want, rel=1e-4)


def test_memory():
    whole = Memory({"x": torch.arange(6), "instruction": list("abcdef")})
    part = whole.take(torch.tensor([4, 1]))
    assert part.batch["x"].tolist() == [4, 1] and part.batch["instruction"] == ["e", "b"]
    both = Memory.joined([part, whole])
    assert len(both) == 8 and both.batch["instruction"][:3] == ["e", "b", "a"]
    assert sorted(whole.sample(9, torch.Generator()).batch["x"].tolist()) == list(range(6))
    with pytest.raises(ConfigError, match="as many of each"):
        Memory({"x": torch.arange(3), "y": [1]})


def test_refusals():
    with pytest.raises(NameNotFound, match="nearest: replay"):
        learn("reply")
    with pytest.raises(ConfigError, match="at least two tasks"):
        learn_continually(make_policy(), {"a": TASKS["with"]}, plan=PLAN, evaluate=score)
    with pytest.raises(ConfigError, match="subspaces"):
        learn_continually(make_policy(), TASKS, plan={"head": "full"}, evaluate=score, strategy="olora")
    policy = make_policy()
    mmpeft.attach(policy, PLAN, "against")
    with pytest.raises(ConfigError, match="'against'.* taken"):
        learn("isolated", policy)
    with pytest.raises(ConfigError, match="share"):
        Replay(share=0)
    with pytest.raises(ConfigError, match="replay_share within"):
        learn(Replay(share=1.0))
    with pytest.raises(ConfigError, match="loss is nan"):
        mmpeft.detach(policy)
        mmpeft.attach(policy, PLAN, "a")
        note_skill(policy, "a")
        clone(policy, Memory({**TASKS["with"].batch, "state": TASKS["with"].batch["state"] * np.nan}), steps=2)
