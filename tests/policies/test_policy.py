"""A policy end to end: acting, the adapter's folder, switching adapters, merging, history, refusals."""

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.errors import BadSample, BaseMismatch, ConfigError, FileFormatError
from mmpeft.policies import heads
from mmpeft.policies.instructions import noisy_words
from mmpeft.policies.policy import load_policy, note_skill, save_policy
from mmpeft.policies.trunks import MLPTrunk, TransformerTrunk

from .policy_kit import SIDE, Demos, Words, eyes, make_policy, observation

PLAN = {"trunk": "full", "head": "full", "encoder": "full"}


def fitted(policy, scale=1.0, **options):
    data = Demos()
    policy.fit(data.stacked("action") * scale, data.stacked("state") if policy.state_dim else None, **options)
    return policy


def shake(policy, seed=0, size=0.05):
    """Random adapter weights."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in mmpeft.adapters.switch.adapter_parameters(policy):
            p.add_(size * torch.randn(p.shape, generator=g))


def adapted(policy=None, plan=PLAN, name="default", seed=0, scale=1.0):
    policy = fitted(policy or make_policy(), scale)
    mmpeft.attach(policy, plan, name)
    note_skill(policy, name)
    shake(policy, seed)
    return policy


def test_act_gives_the_environments_units():
    policy = fitted(make_policy())
    chunk = policy.act(observation())
    assert chunk.shape == (3, 5, 3) and chunk.dtype == np.float32
    with torch.no_grad():
        features = policy.features(policy.observe(observation()))
        z = policy.head.predict(features).double()
    s = policy.skill.actions.statistics
    expected = z.numpy() * np.array(s.std) + np.array(s.mean)
    np.testing.assert_allclose(chunk, expected, rtol=1e-5, atol=1e-5)


def test_overfits_what_it_is_shown():
    """Actions that are a function of the state, learned through trunk and head alone, in the environment's units."""
    policy, data = fitted(make_policy(encoder=None, trunk=MLPTrunk(width=64, side=32))), Demos(episodes=2)
    items = [data[i] for i in range(len(data))]
    batch = {
        "state": torch.stack([i["state"] for i in items])[:, None], "action": torch.stack([i["action"] for i in items]),
        "action_mask": torch.stack([i["action_mask"] for i in items]),
    }  # fmt: skip
    mmpeft.attach(policy, {"trunk": "full", "head": "full"})
    optimizer = torch.optim.Adam([p for g in mmpeft.parameter_groups(policy, lr=1.0) for p in g["params"]], lr=3e-3)
    for _ in range(400):
        optimizer.zero_grad()
        loss = policy(batch)
        loss.backward()
        optimizer.step()
    error = (policy.predict(batch) - batch["action"]).abs()[batch["action_mask"]].mean()
    assert error < 0.05 * batch["action"].std()


@pytest.mark.parametrize(
    "trunk", [lambda: MLPTrunk(width=16, channels=3, side=8), lambda: TransformerTrunk(width=16, depth=1, heads=2)]
)
@pytest.mark.parametrize("senses", ["images", "state", "instruction", "all"])
def test_reads_what_it_is_given_and_nothing_else(trunk, senses):
    options = {"encoder": None} if senses in ("state", "instruction") else {}
    options |= {"state_dim": 0} if senses in ("images", "instruction") else {}
    options |= {"instruction": Words()} if senses in ("instruction", "all") else {}
    policy = fitted(make_policy(trunk=trunk(), **options))
    assert set(policy.reads) == ({"images", "state", "instruction"} if senses == "all" else {senses})
    now = observation()
    first = policy.act({k: v for k, v in now.items() if k in policy.reads})
    for key in ("images", "state", "instruction"):
        other = dict(now)
        other[key] = now[key][::-1].copy() if key != "instruction" else np.array(["stop", "stop", "go on"])
        changed = not np.allclose(policy.act({k: v for k, v in other.items()}), first)
        assert changed == (key in policy.reads)


def test_the_folder_is_enough(tmp_path):
    policy = adapted(
        make_policy(encoder=eyes()),
        {"trunk": "full", "head": "full", "encoder.backbone.blocks.2.*": mmpeft.adapters.ConvAdapter(size=2)},
    )
    before = policy.act(observation())
    save_policy(policy, tmp_path / "a", metadata={"note": 1})
    with torch.random.fork_rng():
        torch.manual_seed(0)  # "random:" weights are drawn anew when the recipe is made
        other = load_policy(tmp_path / "a", make_policy(encoder=eyes()))
    np.testing.assert_array_equal(other.act(observation()), before)
    assert mmpeft.read_metadata(tmp_path / "a")["note"] == 1
    assert not other.training


def test_the_recipe_rebuilds_the_policy(tmp_path):
    """A blind policy has no random base beside what is trained, so the folder alone gives the very actions."""
    policy = adapted(
        make_policy(encoder=None, history=2, head=heads.MixtureHead(modes=2)), {"trunk": "full", "head": "full"}
    )
    policy.reset(3, seed=4)
    before = [policy.act(observation(seed=s)) for s in range(3)]
    save_policy(policy, tmp_path)
    other = load_policy(tmp_path)
    other.reset(3, seed=4)
    for s in range(3):
        np.testing.assert_array_equal(other.act(observation(seed=s)), before[s])
    assert other.environment is None and other.execute == 2


def test_fast_keeps_its_vocabulary(tmp_path):
    make = lambda: make_policy(  # noqa: E731
        encoder=None, head=heads.FASTHead(vocabulary=256, width=16, depth=1, heads=2), actions="quantile"
    )
    policy = adapted(make(), {"trunk": "full", "head": "full"})
    save_policy(policy, tmp_path)
    other = load_policy(tmp_path)
    np.testing.assert_array_equal(other.act(observation()), policy.act(observation()))


def test_switching_adapters_switches_the_units():
    policy = adapted(make_policy(), PLAN, "a", 1)
    a = policy.act(observation())
    fitted(policy, 100.0)
    mmpeft.attach(policy, PLAN, "b")
    note_skill(policy, "b")
    b = policy.act(observation())
    assert np.abs(b).mean() > 20 * np.abs(a).mean()
    mmpeft.use(policy, "a")
    np.testing.assert_array_equal(policy.act(observation()), a)
    mmpeft.use(policy, "b")
    np.testing.assert_array_equal(policy.act(observation()), b)


@pytest.mark.parametrize("encoder", [None, "split"])
def test_every_row_its_own_adapter(encoder):
    plan = {"trunk": "full", "head": "full"} | (
        {"encoder.backbone.blocks.2.*": mmpeft.adapters.ConvAdapter(size=2)} if encoder else {}
    )
    policy = adapted(make_policy(encoder=eyes() if encoder else None), plan, "a", 1)
    fitted(policy, 3.0)
    mmpeft.attach(policy, plan, "b")
    note_skill(policy, "b")
    mixed = policy.act(observation(), adapters=["b", "a", "b"])
    for i, name in enumerate(["b", "a", "b"]):
        with mmpeft.use(policy, name):
            np.testing.assert_allclose(mixed[i], policy.act(observation())[i], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="expected 3 adapters"):
        policy.act(observation(), adapters=["a", "b"])
    with pytest.raises(LookupError, match="'c'"):
        policy.act(observation(), adapters=["a", "b", "c"])


def test_merged_and_unmerged_give_equal_actions():
    plan = {"trunk": "full", "head": "full", "encoder.backbone.blocks.2.*.conv_pw": mmpeft.LoRA(rank=2)}
    policy = adapted(make_policy(encoder=eyes()), plan)
    before = policy.act(observation())
    mmpeft.merge(policy)
    np.testing.assert_allclose(policy.act(observation()), before, rtol=1e-5, atol=1e-5)
    mmpeft.unmerge(policy)
    np.testing.assert_array_equal(policy.act(observation()), before)


def test_a_robot_with_fewer_dimensions():
    policy, data = make_policy(state_dim=6, action_dim=5), Demos()
    with pytest.raises(ConfigError, match="5 dimensions of actions, the demonstrations 3.*pad=True"):
        policy.fit(data.stacked("action"), data.stacked("state"))
    policy.fit(data.stacked("action"), data.stacked("state"), pad=True)
    assert policy.act(observation()).shape == (3, 5, 3)
    batch = {
        "images": torch.zeros(3, 1, 1, SIDE, SIDE, 3, dtype=torch.uint8),
        "state": torch.randn(3, 1, 4),
        "action": torch.randn(3, 5, 3),
    }
    policy(batch).backward()
    grad = policy.head.to_actions.linear.weight.grad.view(5, 5, -1).abs().sum((0, 2))
    assert (grad[:3] > 0).all() and (grad[3:] == 0).all()


def test_history_sees_its_own_rows_past():
    policy = fitted(make_policy(encoder=None, history=3))
    a, b, c = (observation(seed=s) for s in range(3))
    policy.reset(3)
    policy.act(a)
    second = policy.act({**b, "first": np.array([False, True, False])})
    batch = {
        "state": torch.from_numpy(np.stack([a["state"], a["state"], b["state"]], 1)),
        "seen": torch.tensor([[False, True, True]] * 3),
    }  # fmt: skip
    batch["state"][1] = torch.from_numpy(b["state"][1])  # this row has just begun
    batch["seen"][1] = torch.tensor([False, False, True])
    np.testing.assert_allclose(second, policy.predict(batch).detach().numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(BadSample, match="remembers 3 environments, given 2"):
        policy.act({k: v[:2] for k, v in c.items()})
    alone = policy.predict({"state": torch.zeros(3, 3, 4), "seen": batch["seen"]})
    junk = policy.predict(
        {"state": torch.where(batch["seen"][..., None], 0.0, 99.0).expand(-1, -1, 4), "seen": batch["seen"]}
    )
    torch.testing.assert_close(alone, junk)  # unseen frames are not read


@pytest.mark.parametrize(
    ("options", "what"),
    [({"action_dim": 4}, "action_dim 3 .here 4"), ({"chunk": 4}, "chunk 5 .here 4"), ({"image_size": 40}, "image_size"),
     ({"views": 2}, "views 1 .here 2"), ({"state_dim": 5}, "state_dim 4 .here 5")],
)  # fmt: skip
def test_an_adapter_of_another_robot_or_camera_is_refused(tmp_path, options, what):
    save_policy(adapted(), tmp_path)
    with pytest.raises(BaseMismatch, match=what):
        load_policy(tmp_path, make_policy(**options))


def test_metadata_that_is_not_there(tmp_path):
    policy = adapted()
    mmpeft.save(policy, tmp_path / "full")
    entry = mmpeft.adapters.state.state_of(policy).entries["default"]
    del entry.metadata["policy"]["actions"]["statistics"]["std"]
    mmpeft.save(policy, tmp_path / "a")
    with pytest.raises(FileFormatError, match=r"actions normalisation lacks statistics\.std"):
        load_policy(tmp_path / "a", make_policy())
    entry.metadata = {"note": 1}
    mmpeft.save(policy, tmp_path / "b")
    with pytest.raises(FileFormatError, match="no 'policy'"):
        load_policy(tmp_path / "b")
    mmpeft.load(other := make_policy(), tmp_path / "b", check=False)
    with pytest.raises(FileFormatError, match="carries no 'policy' metadata"):
        other.act(observation())


def test_bad_observations():
    policy = fitted(make_policy())
    good = observation()
    for change, message in [
        ({"images": good["images"].astype(np.float32)}, "uint8"), ({"images": np.repeat(good["images"], 2, 1)}, "views|B, 1"),
        ({"images": good["images"][:, :, :20]}, "pictures of"), ({"state": good["state"][:, :3]}, "state of 4"),
        ({"state": np.full((3, 4), np.nan, np.float32)}, "NaN"), ({"state": None}, "lacks state"),
    ]:  # fmt: skip
        given = {k: v for k, v in {**good, **change}.items() if v is not None}
        with pytest.raises(BadSample, match=message):
            policy.act(given)
    with pytest.raises(ConfigError, match="no normalisation yet"):
        make_policy().act(good)


def test_nan_actions_never_reach_the_robot():
    policy = fitted(make_policy())
    with torch.no_grad():
        policy.head.to_actions.linear.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"NaN or infinite actions in rows \[0, 1, 2\]"):
        policy.act(observation())


@pytest.mark.parametrize(
    "options",
    [
        {"chunk": 0},
        {"execute": 9},
        {"action_dim": 0},
        {"state_dim": -1},
        {"history": 0},
        {"readouts": 2},
        {"readouts": 5},
        {"word_noise": -0.1},
        {"word_noise": float("nan")},
    ],
)
def test_sizes_out_of_range(options):
    with pytest.raises(ConfigError):
        make_policy(**options)


def test_words_are_noisy_in_training_alone():
    policy = adapted(make_policy(encoder=None, instruction=Words(), word_noise=1.0), {"trunk": "full", "head": "full"})
    batch = {"state": torch.zeros(2, 1, 4), "instruction": ["push it", "pull it"]}
    policy.eval()
    clean = policy.features(batch)
    assert torch.equal(policy.features(batch), clean)
    policy.train()
    first, second = policy.features(batch), policy.features(batch)
    assert not torch.allclose(first, clean) and not torch.allclose(first, second)


def test_noise_on_words_is_as_long_as_said():
    torch.manual_seed(0)
    vectors = torch.randn(4000, 300)
    length = (noisy_words(vectors, 0.8) - vectors).norm(dim=1)
    assert length.mean() == pytest.approx(0.4, abs=0.01) and 0.75 < length.max() < 0.95 and length.min() < 0.01


def test_a_policy_that_senses_nothing():
    with pytest.raises(ConfigError, match="senses nothing"):
        make_policy(encoder=None, state_dim=0)
