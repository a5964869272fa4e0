"""PPO of adapters: it learns toy problems, the clone keeps every bit, seams between episodes are accounted for, a killed
run goes on as if it had not been."""

import copy
import csv

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import mmpeft
from mmpeft.adapters.fingerprint import base_tensors
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, Unsupported
from mmpeft.policies.heads import BinnedHead, DiscreteHead, GaussianHead, RegressionHead
from mmpeft.policies.policy import load_policy, note_skill
from mmpeft.policies.ppo_density import density_of
from mmpeft.policies.ppo_loop import policy_loss, ppo, value_loss
from mmpeft.policies.ppo_rollout import Vector, gae
from mmpeft.policies.ppo_walk import Actor, Walk

from .policy_kit import SIDE, eyes, make_policy
from .ppo_kit import Counter, TwoStates, cloned, vector

PLAN = {"trunk.mlp.*": mmpeft.LoRA(rank=4), "head.**": mmpeft.LoRA(rank=1)}
FAST = {"decisions": 16, "lr": 2e-2, "gamma": 0.9, "minibatches": 2, "anneal": False}


# ---- the maths ---------------------------------------------------------------------------------------------------------


def test_gae_is_the_weighted_mean_of_n_step_advantages():
    g = torch.Generator().manual_seed(0)
    T, N, gamma, lam = 7, 3, 0.9, 0.8
    reward, value, after = (torch.randn(T, N, generator=g, dtype=torch.float64) for _ in range(3))
    terminated = torch.rand(T, N, generator=g) < 0.2
    ended = terminated | (torch.rand(T, N, generator=g) < 0.2)
    after[:-1] = torch.where(ended[:-1], after[:-1], value[1:])  # what follows within an episode is the next row
    discount = gamma ** torch.randint(1, 4, (T, N), generator=g).double()
    found = gae(reward, value, after, terminated, ended, discount, lam=lam)
    for n in range(N):
        for t in range(T):
            # (1 - lam) sum_k lam^(k-1) A^(k), the last one with all the weight that is left
            total, weight, returns, factor = 0.0, 1.0, 0.0, 1.0
            for k in range(t, T):
                returns = returns + factor * reward[k, n]
                factor = factor * discount[k, n]
                bootstrap = 0.0 if terminated[k, n] else factor * after[k, n]
                last = bool(ended[k, n]) or k == T - 1
                share = weight if last else weight * (1 - lam)
                total = total + share * (returns + bootstrap - value[t, n])
                weight = weight * lam
                if last:
                    break
            assert abs(float(found[t, n] - total)) < 1e-10, (t, n)


def test_policy_loss_by_hand():
    old = torch.zeros(4)
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5])  # r = 1.6487, 0.6065
    loss, kl, clipped = policy_loss(log_prob, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=0.2)
    up, down = float(np.exp(0.5)), float(np.exp(-0.5))
    assert abs(float(loss) - (-1.2 + up - down + 0.8) / 4) < 1e-6
    assert abs(float(kl) - (2 * (up - 1.5) + 2 * (down - 0.5)) / 4) < 1e-6
    assert float(clipped) == 1.0


def test_value_loss_by_hand():
    value, old, target = torch.tensor([3.0, 0.5]), torch.tensor([0.0, 0.0]), torch.tensor([4.0, 1.0])
    assert abs(float(value_loss(value, old, target, clip=None)) - (1 + 0.25) / 4) < 1e-7
    assert abs(float(value_loss(value, old, target, clip=0.2)) - (3.8**2 + 0.8**2) / 4) < 1e-6


@pytest.mark.parametrize("head", [GaussianHead(), BinnedHead(bins=5), DiscreteHead()], ids=lambda h: type(h).__name__)
def test_densities_agree_with_the_heads_own_loss_and_with_samples(head):
    torch.manual_seed(0)
    head.build(in_dim=6, action_dim=3, chunk=4)
    features, density = torch.randn(5, 1, 6), density_of(head)
    parameters = density.parameters(head, features, 4)
    drawn = density.sample(parameters, torch.Generator().manual_seed(1))
    given = density.decode(head, drawn)
    nll = -density.log_prob(parameters, drawn).mean()
    # losses are means over steps (of a BinnedHead over dimensions too), log_prob is a sum over the chunk
    scale = {GaussianHead: 4, DiscreteHead: 4, BinnedHead: 12}[type(head)]
    torch.testing.assert_close(nll, head.loss(features, given) * scale, rtol=1e-5, atol=1e-5)
    other = density.parameters(head, features + 0.3, 4)
    many = {k: v.repeat_interleave(4000, 0) for k, v in parameters.items()}
    more = {k: v.repeat_interleave(4000, 0) for k, v in other.items()}
    drawn = density.sample(many, torch.Generator().manual_seed(2))
    estimate = density.log_prob(many, drawn)
    torch.testing.assert_close(-estimate.view(5, -1).mean(1), density.entropy(parameters), rtol=0.03, atol=0.1)
    gap = (estimate - density.log_prob(more, drawn)).view(5, -1).mean(1)
    torch.testing.assert_close(gap, density.kl(parameters, other), rtol=0.1, atol=0.05)


def test_padded_dimensions_and_later_actions_do_not_count():
    torch.manual_seed(0)
    head = GaussianHead().build(in_dim=6, action_dim=3, chunk=4)
    density, features = density_of(head, floor=0.5), torch.randn(5, 1, 6)
    two = density.parameters(head, features, 2)
    assert two["mean"].shape == (5, 2, 3) and float(two["std"].detach().min()) >= 0.5
    drawn = density.sample(two)
    valid = torch.tensor([True, False, True])
    changed = drawn.clone()
    changed[:, :, 1] += 9
    torch.testing.assert_close(density.log_prob(two, drawn, valid), density.log_prob(two, changed, valid))


# ---- seams between episodes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
def test_every_autoreset_mode_gives_the_same_transitions(mode):
    from gymnasium.vector import SyncVectorEnv

    env = Vector(SyncVectorEnv([lambda: Counter(3), lambda: Counter(2)], autoreset_mode=mode))
    observation = env.reset(seed=0)
    assert list(observation["instruction"]) == ["count to 3", "count to 2"]
    rows = {0: [], 1: []}
    for _ in range(12):
        moment = env.step(np.zeros((2, 1), np.int64))
        for i in range(2):
            if moment.valid[i]:
                before, after = float(observation["state"][i, 0]), float(moment.successor["state"][i, 0])
                rows[i].append(
                    (before, after, moment.reward[i], moment.truncated[i], moment.success[i], moment.steps[i])
                )
            else:
                assert moment.steps[i] == 0 and not moment.truncated[i]
            assert moment.first[i] == (moment.observation["state"][i, 0] == 0)
        observation = moment.observation
    for i, length in ((0, 3), (1, 2)):
        want = [(t, t + 1, t + 1, t + 1 == length, t + 1 > 1, 1.0) for t in range(length)] * 6
        assert rows[i] == want[: len(rows[i])] and len(rows[i]) >= 8


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
def test_time_limits_bootstrap_from_the_last_state_and_ends_do_not(mode):
    """With lambda 0 a return is r + gamma V(next); here V is the state's number and r the next one's."""

    def walk(make):
        policy = cloned(state_dim=1)
        mmpeft.attach(policy, PLAN, "ppo")
        note_skill(policy, "ppo")
        actor = Actor(policy, density_of(policy.head), ("ppo",), (), 1)
        found = Walk(Vector(vector(make, 2, mode)), actor, gamma=0.5, generator=torch.Generator().manual_seed(0))
        found.begin(0)
        return found.collect(lambda reads: reads[:, -1], 11, lam=0.0)

    cut, story = walk(lambda: Counter(3))
    state = cut.batch["state"].flatten()
    torch.testing.assert_close(cut.returns, (state + 1) + 0.5 * (state + 1))  # of state 2 too, where time is up
    assert len(state) == (
        2 * 9 if mode == AutoresetMode.NEXT_STEP else 2 * 11
    )  # every fourth step only begins an episode
    assert story["length"] == 3 and story["return"] == 6 and story["success"] == 1 and story["steps"] == len(state)
    ends, _ = walk(lambda: Counter(3, final=True))
    state = ends.batch["state"].flatten()
    torch.testing.assert_close(ends.returns, (state + 1) + 0.5 * (state + 1) * (state < 2))


# ---- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "gaussian"])
def test_an_adapter_learns_and_the_clone_keeps_every_bit(discrete):
    policy = cloned(discrete)
    before = {k: v.clone() for k, v in base_tensors(policy).items()}
    observation = {"state": np.array([[1, 0], [0, 1]], np.float32)}
    first = policy.act(observation)
    result = ppo(policy, env=vector(lambda: TwoStates(discrete)), plan=PLAN, total_steps=3200, **FAST)
    act = policy.act(observation)[:, 0]
    if discrete:
        assert act.tolist() == [0, 1]
        assert result.curve[0]["success"] <= 1.0 and result.curve[-1]["return"] > 4.5
    else:
        assert np.abs(act[:, 0] - [-1, 1]).max() < 0.5, act
    assert result.curve[-1]["return"] > result.curve[0]["return"] + 1
    after = base_tensors(policy)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    with mmpeft.use(policy, None):
        np.testing.assert_array_equal(policy.act(observation), first)
    assert mmpeft.trainable_names(policy) == ["ppo"]


def test_kl_holds_the_policy_near_the_clone():
    far = {}
    for weight in (0.0, 5.0):
        policy = cloned()
        run = ppo(policy, env=vector(TwoStates), plan=PLAN, total_steps=1500, kl=weight, **FAST)
        far[weight] = run.curve[-1]["kl"]
    assert far[5.0] < 0.05 < 0.1 < far[0.0], far


def test_the_first_iteration_only_trains_the_critic():
    policy = cloned()
    run = ppo(policy, env=vector(TwoStates), plan=PLAN, total_steps=100, value_warmup=1, **FAST)
    assert len(run.curve) == 1 and np.isnan(run.curve[0]["policy_loss"])
    observation = {"state": np.eye(2, dtype=np.float32)}
    with mmpeft.use(policy, None):
        base = policy.act(observation)
    np.testing.assert_array_equal(policy.act(observation), base)


def test_over_a_clone_that_is_an_adapter_itself():
    policy = cloned()
    mmpeft.attach(policy, {"trunk": "full", "head": "full"}, "clone")
    note_skill(policy, "clone")
    kept = {k: v.clone() for k, v in mmpeft.adapters.store.adapter_tensors(policy, "clone").items()}
    run = ppo(policy, env=vector(TwoStates), plan=PLAN, over="clone", total_steps=2500, **FAST)
    assert mmpeft.active(policy) == ("clone", "ppo") and run.actor.reference == ("clone",)
    assert run.curve[-1]["return"] > 4
    now = mmpeft.adapters.store.adapter_tensors(policy, "clone")
    assert all(torch.equal(kept[k], now[k]) for k in kept)


def test_chunks_are_one_decision():
    policy = cloned(False, state_dim=4, action_dim=1, chunk=3)
    policy.execute = 2
    options = {"views": (), "success": "reward >= -0.1", "max_steps": 7}
    policy = cloned(False, state_dim=3, action_dim=1, chunk=3)
    run = ppo(
        policy, env="gym:Pendulum-v1", plan=PLAN, total_steps=60, options=options, num_envs=2, execute=2, decisions=16,
        minibatches=2,
    )  # fmt: skip
    # episodes of 7 actions are decisions of 2, 2, 2 and 1
    assert run.steps == 2 * 16 * 7 / 4 * 2 and run.curve[0]["length"] == 7


class Seen(TwoStates):
    """TwoStates with a picture, bright in state 1, for policies with eyes."""

    def __init__(self):
        super().__init__()
        picture = gym.spaces.Box(0, 255, (1, SIDE, SIDE, 3), np.uint8)
        self.observation_space = gym.spaces.Dict({"state": self.observation_space, "images": picture})

    def _see(self):
        state = super()._see()
        return {"state": state, "images": np.full((1, SIDE, SIDE, 3), 40 + 170 * self.place, np.uint8)}


def test_pictures_go_through_a_frozen_prefix_once_and_history_is_kept():
    policy = make_policy(
        encoder=eyes(), head=DiscreteHead(), action_dim=2, state_dim=2, chunk=2, execute=1, history=2,
    )  # fmt: skip
    policy.fit(np.zeros(9), np.random.default_rng(0).normal(size=(9, 2)))
    plan = {"trunk.mlp.*": mmpeft.LoRA(rank=2), "encoder.backbone.blocks.2.**.conv_pw": mmpeft.LoRA(rank=2)}
    rows = []
    for mode in AutoresetMode:
        one = copy.deepcopy(policy)
        vec = vector(Seen, 2, mode)
        run = ppo(one, env=vec, plan=plan, total_steps=1, decisions=8, minibatches=2, epochs=1, value_warmup=0)
        walk = Walk(Vector(vec), run.actor, gamma=0.9, generator=torch.Generator().manual_seed(0))
        walk.begin(3)
        found, _ = walk.collect(run.critic, 7, lam=0.9)
        assert "images" not in found.batch and found.batch["prefix"].shape[1:4] == (2, 1, found.batch["prefix"].shape[3])
        with run.actor.practised(), torch.no_grad():
            parameters = run.actor.parameters(found.batch)
        again = run.actor.density.log_prob(parameters, found.drawn)
        torch.testing.assert_close(again, found.log_prob, rtol=1e-4, atol=1e-4)
        begins = ~found.batch["seen"][:, 0]
        assert 3 <= int(begins.sum()) <= 4  # two rows, episodes of 5: the first frame of each has no past
        rows.append(len(found))
    assert rows[0] in (12, 13) and set(rows[1:]) == {14}


# ---- stopping and going on ------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_exactly(tmp_path):
    def run(folder, stop=None):
        def report(row):
            if stop is not None and row["iteration"] == stop:
                raise Killed

        policy = cloned()
        given = FAST | {"anneal": True}
        found = ppo(
            policy, env=vector(TwoStates), plan=PLAN, total_steps=216 * 4, folder=folder, checkpoint_every=2,
            report=report, **given,
        )  # fmt: skip
        return policy, found

    whole_policy, whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", stop=3)
    policy, found = run(tmp_path / "cut")
    left = [{k: v for k, v in r.items() if k != "seconds"} for r in found.curve]
    want = [{k: v for k, v in r.items() if k != "seconds"} for r in whole.curve]
    np.testing.assert_equal(left, want)
    a, b = (dict(mmpeft.adapters.switch.adapter_parameters(p, "ppo")) for p in (policy, whole_policy))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with (tmp_path / "cut" / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["return"]) for r in rows] == [r["return"] for r in found.curve]
    fresh = load_policy(tmp_path / "cut", cloned())  # the folder is an adapter's
    observation = {"state": np.eye(2, dtype=np.float32)}
    np.testing.assert_array_equal(fresh.act(observation), policy.act(observation))
    with pytest.raises(ConfigError, match="clip 0.2 .here 0.3."):
        ppo(cloned(), env=vector(TwoStates), plan=PLAN, total_steps=864, folder=tmp_path / "cut", clip=0.3,
            checkpoint_every=2, **FAST | {"anneal": True})  # fmt: skip
    (tmp_path / "cut" / "ppo.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(FileFormatError, match="no checkpoint"):
        run(tmp_path / "cut")


# ---- wrong input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"clip": -0.1}, "clip must be above 0"),
        ({"gamma": 1.5}, "gamma must be from 0 to 1"),
        ({"env": "gym:Pendulum-v1", "num_envs": 2, "decisions": 2}, "cannot be split into 8 minibatches"),
        ({"env": 7}, "env is a name, several"),
        ({"env": vector(lambda: TwoStates(False))}, "DiscreteHead does not fit"),
    ],
)
def test_numbers_and_environments_are_refused_before_work(given, match):
    with pytest.raises(ConfigError, match=match):
        ppo(cloned(), **{"env": vector(TwoStates), "plan": PLAN, "total_steps": 100} | given)


def test_heads_and_adapters_are_refused_before_work():
    toy = {"env": vector(TwoStates), "total_steps": 100}
    with pytest.raises(Unsupported, match="RegressionHead has no density"):
        ppo(make_policy(encoder=None, head=RegressionHead()), plan=PLAN, **toy)
    with pytest.raises(Unsupported, match="min_std"):
        ppo(cloned(), plan=PLAN, min_std=0.1, **toy)
    with pytest.raises(NameNotFound, match="no adapter 'ppo'; plan= attaches it"):
        ppo(cloned(), **toy)
    with pytest.raises(NameNotFound, match="no adapter 'clone'"):
        ppo(cloned(), plan=PLAN, over="clone", **toy)
    unfitted = cloned()
    unfitted.skill = None
    with pytest.raises(ConfigError, match="no normalisation"):
        ppo(unfitted, plan=PLAN, **toy)
    small = cloned(action_dim=3)
    for _ in range(2):  # nothing is left attached
        with pytest.raises(ConfigError, match="3 actions, the environment 2"):
            ppo(small, plan=PLAN, **toy)
    with pytest.raises(NameNotFound, match="an environment is named"):
        ppo(small, env="gmy:CartPole-v1", plan=PLAN, total_steps=100)
    with pytest.raises(ConfigError, match="takes 5 actions a step|execute"):
        ppo(cloned(), env="gym:CartPole-v1", plan=PLAN, total_steps=100, execute=5, num_envs=1)
