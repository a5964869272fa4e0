"""Behaviour cloning under Lightning: it learns, its folder acts, it resumes bit-equal, bad demonstrations are refused."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import mmpeft
from mmpeft.errors import BadSample, ConfigError
from mmpeft.policies import heads
from mmpeft.policies.policy import load_policy
from mmpeft.policies.trunks import MLPTrunk
from mmpeft.tasks.callbacks import AdapterCheckpoint
from mmpeft.tasks.control import ControlData, ControlTask, Evaluate, chunks_of
from tests.policies.policy_kit import Demos, eyes, make_policy, observation

PLAN = {"trunk": "full", "head": "full"}


def blind(**options):
    return make_policy(encoder=None, trunk=MLPTrunk(width=32, side=16), **options)


def test_learns_and_its_folder_acts(make_trainer, tmp_path):
    """The held-out error falls far below the spread of the actions, and the folder alone repeats the very actions."""
    task = ControlTask(blind(), PLAN, lr=1e-2, warmup=5)
    data = ControlData(Demos(episodes=16), Demos(episodes=2, first=50), batch_size=32)
    trainer = make_trainer(max_epochs=25, callbacks=[AdapterCheckpoint(str(tmp_path / "push"))])
    trainer.fit(task, data)
    assert float(trainer.callback_metrics["val_error"]) < 0.15 * Demos().stacked("action").std()
    about = mmpeft.read_metadata(tmp_path / "push")["policy"]
    assert about["environment"]["name"] == "toy" and about["actions"]["statistics"]["count"] == sum(range(12, 28))
    policy = load_policy(tmp_path / "push")
    np.testing.assert_array_equal(policy.act(observation()), task.model.act(observation()))


@pytest.mark.parametrize("cached", [False, True])
def test_adapters_inside_the_encoder(make_trainer, tmp_path, cached):
    """Trained with pictures or out of the cached prefix; the base keeps every bit, the adapters change."""
    policy = make_policy(encoder=eyes())
    base = {k: v.clone() for k, v in policy.state_dict().items()}
    plan = PLAN | {"encoder.backbone.blocks.2.*": mmpeft.adapters.ConvAdapter(size=2)}
    task = ControlTask(policy, plan, warmup=0)
    data = ControlData(Demos(episodes=2), batch_size=8, cache=str(tmp_path) if cached else None, copies=2)
    make_trainer(max_steps=3).fit(task, data)
    after = {k: v for k, v in policy.state_dict().items() if "mmpeft" not in k}
    assert all(torch.equal(after[k], v) for k, v in base.items() if k in after) and set(base) <= set(policy.state_dict())
    ups = [p for n, p in mmpeft.adapters.switch.adapter_parameters(policy) if "up_weight" in n]
    assert ups and all(p.abs().sum() > 0 for p in ups)
    assert (len(list(tmp_path.glob("*.npy"))) == 2) == cached


@pytest.mark.parametrize(
    "head",
    [
        lambda: heads.FASTHead(vocabulary=256, width=16, depth=1, heads=2),
        lambda: heads.FlowHead(width=16, depth=1, heads=2),
        lambda: heads.MixtureHead(modes=2),
    ],
)
def test_any_head(make_trainer, head, tmp_path):
    """Heads with a vocabulary, with noise, with modes: they train, validate, and their folder acts alike."""
    task = ControlTask(blind(head=head(), actions="quantile"), PLAN, warmup=0)
    trainer = make_trainer(max_steps=4, limit_val_batches=1, callbacks=[AdapterCheckpoint(str(tmp_path))])
    trainer.fit(task, ControlData(Demos(), Demos(episodes=1), batch_size=16))
    assert np.isfinite(float(trainer.callback_metrics["val_error"]))
    other = load_policy(tmp_path)
    for policy in (task.model, other):
        policy.reset(3, seed=1)
    np.testing.assert_array_equal(other.act(observation()), task.model.act(observation()))


def test_discrete_actions(make_trainer):
    task = ControlTask(blind(head=heads.DiscreteHead()), PLAN, lr=2e-2, warmup=5)
    trainer = make_trainer(max_epochs=12)
    data = ControlData(Demos(16, discrete=True), Demos(2, discrete=True, first=50), batch_size=32)
    trainer.fit(task, data)
    assert float(trainer.callback_metrics["val_error"]) < 0.2  # two thirds are wrong by chance
    chunk = task.model.act(observation())
    assert chunk.shape == (3, 5) and chunk.dtype == np.int64


def test_resumed_equals_uninterrupted(make_trainer, tmp_path):
    """A checkpoint from the middle, its statistics included: the resumed run ends with the very weights."""

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)

    def run(demos, path=None, **options):
        task = ControlTask(blind(), PLAN)
        make_trainer(max_epochs=4, **options).fit(task, ControlData(demos, batch_size=16), ckpt_path=path)
        return task.model

    whole = run(Demos(), callbacks=[save], enable_checkpointing=True)
    resumed = run(Demos(), tmp_path / "step=6.ckpt")
    np.testing.assert_array_equal(resumed.act(observation()), whole.act(observation()))
    other = run(Demos(first=7), tmp_path / "step=6.ckpt")
    assert other.current().actions.statistics == whole.current().actions.statistics


def test_rollout_hook(make_trainer):
    seen = []

    def rollout(policy):
        assert not policy.training
        seen.append(policy.act(observation()).mean())
        return {"success": len(seen) / 10}

    task = ControlTask(blind(), PLAN, rollout=rollout, rollout_every=2)
    trainer = make_trainer(max_epochs=5)
    trainer.fit(task, ControlData(Demos(), batch_size=32))
    assert [r["success"] for r in task.successes] == [0.1, 0.2, 0.3]  # after epochs 2 and 4, and at the end
    assert float(trainer.callback_metrics["rollout_success"]) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="rollout_every"):
        ControlTask(blind(), PLAN, rollout_every=1)


def test_evaluate_asks_for_the_seeds_it_names(monkeypatch):
    import mmpeft.policies

    asked = {}

    class Result:
        success, interval = 0.5, (0.2, 0.8)

    monkeypatch.setattr(mmpeft.policies, "rollout", lambda policy, **given: asked.update(given) or Result(), raising=False)
    found = Evaluate("metaworld:push-v3", first_seed=100, episodes=3, options={"views": ["close"]})(blind())
    assert found == {"success": 0.5, "low": 0.2, "high": 0.8}
    assert list(asked["seeds"]) == [100, 101, 102] and asked["options"] == {"views": ["close"]}
    with pytest.raises(ConfigError, match="episodes"):
        Evaluate("metaworld:push-v3", episodes=0)


def test_bad_demonstrations_are_refused_by_name(make_trainer):
    demos = Demos()
    demos.episodes[1][1].action[4] = np.nan
    with pytest.raises(BadSample, match="not finite"):
        make_trainer(max_steps=1).fit(ControlTask(blind(), PLAN), ControlData(demos))
    with pytest.raises(ConfigError, match="3 dimensions of actions, the demonstrations 2"):
        make_trainer(max_steps=1).fit(ControlTask(blind(), PLAN), ControlData(Demos(dims=2)))
    with pytest.raises(BadSample, match=r"toy seed \d+ step \d+: actions have shape \[4, 3\]"):
        make_trainer(max_steps=1).fit(ControlTask(blind(), PLAN), ControlData(Demos(chunk=4)))
    with pytest.raises(ConfigError, match="no episode is as long"):
        chunks_of(Demos(steps=2, episodes=1), 5)


def test_an_adapter_is_continued(make_trainer, tmp_path):
    """start_from: the statistics are the adapter's own, not those of the new demonstrations."""
    task = ControlTask(blind(), PLAN)
    make_trainer(max_steps=2, callbacks=[AdapterCheckpoint(str(tmp_path))]).fit(task, ControlData(Demos()))
    torch.manual_seed(0)
    more = ControlTask(blind(), start_from=str(tmp_path), lr=1e-2)
    make_trainer(max_steps=2).fit(more, ControlData(Demos(episodes=2, steps=30)))
    assert more.model.current().actions.statistics == task.model.current().actions.statistics
    assert not np.array_equal(more.model.act(observation()), task.model.act(observation()))


def test_an_adapter_without_a_folder_lies_beside_the_logs(make_trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="push", version="")
    make_trainer(max_steps=2, logger=logger, callbacks=[AdapterCheckpoint()]).fit(
        ControlTask(blind(), PLAN), ControlData(Demos(), batch_size=16)
    )
    assert load_policy(tmp_path / "push" / "adapter").act(observation()).shape == (3, 5, 3)
    with pytest.raises(ConfigError, match="needs folder="):
        make_trainer(max_steps=2, logger=False, callbacks=[AdapterCheckpoint()]).fit(
            ControlTask(blind(), PLAN), ControlData(Demos(), batch_size=16)
        )
    with pytest.raises(ConfigError, match="renderers"):
        ControlData(Demos(), renderers=-1)


@pytest.mark.parametrize("seeing", [False, True])
def test_lightnings_context_for_new_tensors_is_not_meant_for_a_model_that_exists(make_trainer, monkeypatch, seeing):
    """On a GPU, Lightning calls `configure_model` where every new tensor is made on the GPU; here on "meta"."""
    policy = make_policy(encoder=eyes()) if seeing else blind()
    task, trainer = ControlTask(policy, PLAN), make_trainer(max_steps=2)
    monkeypatch.setattr(trainer.strategy, "tensor_init_context", lambda **_: torch.device("meta"))
    trainer.fit(task, ControlData(Demos(episodes=4), batch_size=8))
    assert trainer.global_step == 2 and {p.device.type for p in policy.parameters()} == {"cpu"}
