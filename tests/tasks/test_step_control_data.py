"""What looks at data: ranks learned on a validation split, IVON's samples, places chosen before training; and checkpoints of
an adapter that the run has reshaped."""

from __future__ import annotations

import copy

import pytest
import torch

import mmpeft
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound
from mmpeft.tasks import IVON, AttachSelected, StepControl
from mmpeft.tasks.ivon import PosteriorSamples
from tests.tasks.test_step_control import (
    BLOCKS,
    LORA,
    Regress,
    X,
    Y,
    deltas,
    host,
    loader,
    parsed,
    step_control,
    task,
    tensors,
)

lightning = pytest.importorskip("lightning")


class Points(lightning.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:10] + 0.1, Y[:10]), 4)


class Validated(Regress):
    def validation_step(self, batch, index):
        pass


class Save(lightning.Callback):
    """The checkpoint of the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def resumed(make_trainer, tmp_path, make_task, make_callback, **options):
    """Tensors after two epochs in one run and in two; the callbacks."""
    found = []
    for ckpt, extra in ((None, [Save(tmp_path / "half.ckpt")]), (tmp_path / "half.ckpt", [])):
        lit, callback = make_task(), make_callback()
        torch.manual_seed(len(found))
        trainer = make_trainer(max_epochs=2, callbacks=[callback, *extra], **options)
        trainer.fit(lit, datamodule=Points(), ckpt_path=ckpt)
        found.append((lit, callback))
    (whole, callback), (again, other) = found
    for key, t in tensors(whole.model).items():
        assert torch.equal(t, tensors(again.model)[key]), key
    return whole, callback, other


# --- AutoLoRA


def test_autolora_learns_its_ranks_beside_a_task_and_leaves_the_lora_to_train(make_trainer, tmp_path):
    start = host()
    torch.manual_seed(3)
    mmpeft.attach(start, {BLOCKS: mmpeft.AutoLoRA(rank=4)}, check=False)
    make = lambda: step_control("AutoLoRARanks", lr=0.3, inner_lr=0.01)  # noqa: E731
    logits = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            logits.append(torch.stack([d.logits.detach().clone() for d in deltas(module.model)]))

    def model():
        torch.manual_seed(1)
        adam = lambda groups: torch.optim.Adam(groups, lr=0.02)  # noqa: E731
        return Validated(copy.deepcopy(start), lr=0.02, schedule="constant", warmup=0, optimizer=adam)

    lit, callback, other = resumed(make_trainer, tmp_path, model, make, limit_val_batches=1)
    torch.testing.assert_close(callback.state_dict(), other.state_dict(), rtol=0, atol=0)
    found = {d.site.name: d.method.rank for d in deltas(lit.model)}
    assert all(isinstance(d.method, mmpeft.LoRA) and not bool(d.B.any()) for d in deltas(lit.model))
    assert found and all(1 <= rank < 4 for rank in found.values())
    lit = model()
    make_trainer(max_epochs=1, callbacks=[make(), Watch()]).fit(lit, datamodule=Points())
    plain = copy.deepcopy(start).train()
    search, batches = mmpeft.AutoLoRASearch(plain, lr=0.3, inner_lr=0.01), list(Points().val_dataloader())
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(plain, lr=0.02))
    for i, (x, y) in enumerate(loader()):
        u, v = batches[i % 3]
        plain.eval()
        search.step(lambda x=x, y=y: loss(plain, x, y), lambda u=u, v=v: loss(plain, u, v))
        plain.train()
        optimizer.zero_grad()
        loss(plain, x, y).backward()
        optimizer.step()
        torch.testing.assert_close(torch.stack([d.logits for d in deltas(plain)]), logits[i], rtol=1e-3, atol=1e-5)
    with pytest.raises(ConfigError, match="validation data"):
        make_trainer(max_epochs=1, callbacks=[make()]).fit(model(), loader())


def loss(model, x, y):
    return (model(x) - y).square().sum() / len(x)


# --- IVON


def ivon(groups):
    return IVON(groups, lr=0.05, data_size=24, hess_init=0.5, weight_decay=0.1, seed=5)


def test_ivon_under_a_task_is_its_plain_loop_and_resumes_its_samples(make_trainer, tmp_path):
    start = host()
    torch.manual_seed(3)
    mmpeft.attach(start, LORA, check=False)
    make = lambda: parsed(  # noqa: E731
        {"class_path": "mmpeft.tasks.StepControl", "init_args": {"controller": "mmpeft.tasks.PosteriorSamples"}}
    )
    lit, *_ = resumed(make_trainer, tmp_path, lambda: task(None, ivon, copy.deepcopy(start)), make)
    plain = copy.deepcopy(start).train()
    optimizer = ivon(mmpeft.parameter_groups(plain, lr=0.02))
    for _ in range(2):
        for x, y in loader():
            with optimizer.sampled():
                loss(plain, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    for key, t in tensors(plain).items():
        torch.testing.assert_close(tensors(lit.model)[key], t, rtol=1e-4, atol=1e-6, msg=key)
    with pytest.raises(ConfigError, match="optimizer is Adam"):
        make_trainer(max_epochs=1, callbacks=[StepControl(PosteriorSamples)]).fit(task(LORA), loader())


def test_ivon_takes_the_mean_over_micro_batches(make_trainer):
    start = host()
    torch.manual_seed(3)
    mmpeft.attach(start, LORA, check=False)
    lit = task(None, ivon, copy.deepcopy(start))
    make_trainer(max_epochs=1, callbacks=[StepControl(PosteriorSamples)], accumulate_grad_batches=2).fit(lit, loader(4))
    plain = copy.deepcopy(start).train()
    optimizer = ivon(mmpeft.parameter_groups(plain, lr=0.02))
    batches = list(loader(4))
    for pair in zip(batches[::2], batches[1::2], strict=True):
        for x, y in pair:
            with optimizer.sampled():
                loss(plain, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, t in tensors(plain).items():
        torch.testing.assert_close(tensors(lit.model)[key], t, rtol=1e-4, atol=1e-6, msg=key)


# --- places chosen on data

FISH = {"layers.{0,2}": mmpeft.FishMask(density=0.1), "layers.4": "full"}


def selected(**options):
    return parsed({"class_path": "mmpeft.tasks.AttachSelected", "init_args": options})


def test_a_fish_mask_is_chosen_on_the_task_s_data_and_resumes(make_trainer, tmp_path):
    lit, callback, _ = resumed(make_trainer, tmp_path, lambda: task(FISH), lambda: selected(samples=5, seed=2))
    places = {d.site.name: d.index.tolist() for d in deltas(lit.model) if isinstance(d.method, mmpeft.FishMask)}
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))[:5].tolist()
    plain = host()
    losses = [lambda i=i: loss(plain, X[i : i + 1], Y[i : i + 1]) for i in order]
    mmpeft.attach_selected(plain, FISH, losses)
    assert places == {d.site.name: d.index.tolist() for d in deltas(plain) if isinstance(d.method, mmpeft.FishMask)}
    assert sum(map(len, places.values())) == round(0.1 * (6 * 8 + 8 * 8))
    assert {d.site.name for d in deltas(lit.model)} == {*places, "layers.4.weight", "layers.4.bias"}


def test_other_ways_to_choose(make_trainer):
    lit = task({"layers.{0,2}": mmpeft.FishMask(density=0.1)})
    callback = selected(samples=6, how="mmpeft.fish_ird", options={"rounds": 2})
    make_trainer(max_epochs=1, callbacks=[callback]).fit(lit, datamodule=Points())
    assert sum(d.value.numel() for d in deltas(lit.model)) == round(0.1 * (6 * 8 + 8 * 8))
    lit = task({BLOCKS: mmpeft.BitFit()})
    callback = selected(samples=6, how="mmpeft.place", options={"share": 0.34})
    make_trainer(max_epochs=1, callbacks=[callback]).fit(lit, datamodule=Points())
    assert len(deltas(lit.model)) == 1


def test_what_cannot_choose_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="data module"):
        make_trainer(max_epochs=1, callbacks=[selected()]).fit(task(FISH), loader())
    with pytest.raises(ConfigError, match="roundz"):
        AttachSelected(how=mmpeft.fish_ird, options={"roundz": 2})
    with pytest.raises(ConfigError, match="Sparse methods"):
        make_trainer(max_epochs=1, callbacks=[selected()]).fit(task(LORA), datamodule=Points())


# --- checkpoints of a reshaped adapter


def test_a_checkpoint_of_a_pruned_adapter_is_read_as_it_is_and_another_plan_is_refused(make_trainer, tmp_path):
    plan = {BLOCKS: mmpeft.LoRA(rank=4)}
    lit = task(plan)
    trainer = make_trainer(max_epochs=1, callbacks=[step_control("PruneUnits", keep=0.5, samples=8)])
    trainer.fit(lit, loader())
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    again = task(plan)
    make_trainer(max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "pruned.ckpt")
    sizes = {d.site.name: d.method.rank for d in deltas(again.model)}
    assert sizes == {d.site.name: d.method.rank for d in deltas(lit.model)} and sum(sizes.values()) == 6
    assert any(not torch.equal(t, tensors(again.model)[key]) for key, t in tensors(lit.model).items())
    for other in ({BLOCKS: mmpeft.LoRA(rank=3)}, {"layers.0": mmpeft.LoRA(rank=4)}):
        with pytest.raises(FileFormatError, match="does not fit this plan"):
            make_trainer(max_epochs=2).fit(task(other), loader(), ckpt_path=tmp_path / "pruned.ckpt")


def test_the_adapter_that_a_controller_names_must_be_there(make_trainer):
    with pytest.raises(NameNotFound, match="pets"):
        callback = step_control("PruneUnits", keep=0.5, name="pets")
        make_trainer(max_epochs=1, callbacks=[callback]).fit(task(LORA), loader())
