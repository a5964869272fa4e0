"""Pruning in the middle of a run: what is pruned is held, the run goes on, and the adapter is small at its end."""

from __future__ import annotations

import copy

import pytest
import torch

import mmpeft
from mmpeft.errors import ConfigError, Unsupported
from mmpeft.tasks import AdapterCheckpoint
from tests.tasks.test_step_control import BLOCKS, LORA, X, deltas, host, loader, step_control, task, tensors

lightning = pytest.importorskip("lightning")

LIGHT = {"layers.{0,4}": mmpeft.LoRA(rank=4), "layers.2": mmpeft.StructuredMask(group=2)}
ROWS = {
    "LightPEFT": (LIGHT, {"at": 4, "masks": 0.5, "modules": 0.5, "units": 0.5, "samples": 8, "weight": 1e-3}),
    "PruneEntries": (LORA, {"at": 4, "keep": 0.3, "samples": 8}),
    "DiffGates": ({BLOCKS: mmpeft.DiffPruning()}, {"at": 4, "density": 0.1, "weight": 1e-4}),
    "PruneUnits": (LORA, {"keep": 0.5, "samples": 8}),
    "Once": ({BLOCKS: mmpeft.LoRA(rank=2)}, {"of": "mmpeft.prune_channels", "options": {"keep": 0.5}}),
    "RankController": (
        {BLOCKS: mmpeft.SoRA(rank=3)},
        {"policy": {"class_path": "mmpeft.Proximal", "init_args": {"threshold": 0.08}}, "shrink": True},
    ),
}  # fmt: skip


class Watch(lightning.Callback):
    """Saves the checkpoint of the first epoch, and notes the last output and what is 0 step by step."""

    def __init__(self, path=None):
        self.path, self.zeros, self.y = path, [], None

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0 and self.path is not None:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, module, *_):
        self.zeros.append(sum(int((t == 0).sum()) for t in tensors(module.model).values()))
        with torch.no_grad():
            self.y = module.eval().model(X)
        module.train()


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)


def start(name):
    model = host()
    torch.manual_seed(7)
    mmpeft.attach(model, ROWS[name][0], check=False)
    return model


def fit(make_trainer, name, model, *, save=None, ckpt=None, callbacks=(), epochs=2):
    lit, watch = task(None, adamw, copy.deepcopy(model)), Watch(save)
    options = copy.deepcopy(ROWS[name][1])
    made = [step_control(name, options.pop("weight", 1.0), **options), watch, *callbacks]
    make_trainer(max_epochs=epochs, callbacks=made).fit(lit, loader(), ckpt_path=ckpt)
    return lit, watch


@pytest.mark.parametrize("name", ROWS)
def test_a_resumed_run_ends_where_the_whole_run_does(make_trainer, tmp_path, name):
    model, half = start(name), tmp_path / "half.ckpt"
    whole, watch = fit(make_trainer, name, model, save=half)
    resumed, _ = fit(make_trainer, name, model, ckpt=half)
    assert tensors(whole.model).keys() == tensors(resumed.model).keys()
    for key, t in tensors(whole.model).items():
        assert torch.equal(t, tensors(resumed.model)[key]), key
    if name not in ("PruneUnits", "Once"):  # which are not held before
        torch.testing.assert_close(whole.model.eval()(X), watch.y, msg="what is taken out at the end changes nothing")


@pytest.mark.parametrize("name", ROWS)
def test_what_is_left_is_saved_small_and_trains_on(make_trainer, tmp_path, name):
    lit, _ = fit(make_trainer, name, start(name), callbacks=[AdapterCheckpoint(str(tmp_path / "a"))])
    y, before = lit.model.eval()(X), sum(t.numel() for t in tensors(start(name)).values())
    other = host()
    mmpeft.load(other, tmp_path / "a")
    again = task(None, adamw, other)
    torch.testing.assert_close(again.model.eval()(X), y)
    if name != "PruneEntries":  # whose entries are single numbers of whole tensors
        assert sum(t.numel() for t in tensors(again.model).values()) < before
    make_trainer(max_epochs=1).fit(again, loader())
    assert not torch.allclose(again.model.eval()(X), y)


def test_light_peft_keeps_half_of_masks_modules_and_ranks(make_trainer):
    lit, watch = fit(make_trainer, "LightPEFT", start("LightPEFT"))
    mask, lora = sorted(deltas(lit.model), key=lambda d: d.method.name, reverse=True)
    assert sorted(mask.m.tolist()) == [0, 0, 1, 1]
    assert lora.A.shape[0] == 2 and bool(lora.A.all()) and bool(lora.B.all())
    assert watch.zeros[3] == 0 and len(set(watch.zeros[4:])) == 1 and watch.zeros[4] > 0


def test_pruned_entries_stay_0_under_weight_decay_and_momentum(make_trainer):
    lit, watch = fit(make_trainer, "PruneEntries", start("PruneEntries"))
    numbers = sum(t.numel() for t in tensors(lit.model).values())
    assert watch.zeros[4:] == [numbers - round(0.3 * numbers)] * 8


def test_hardened_gates_leave_the_largest_entries_and_train_them_without_noise(make_trainer):
    lit, _ = fit(make_trainer, "DiffGates", start("DiffGates"))
    sizes = [d.value.numel() for d in deltas(lit.model)]
    assert all(isinstance(d.method, mmpeft.Sparse) for d in deltas(lit.model))
    assert sum(sizes) == round(0.1 * sum(p.numel() for n, p in host().named_parameters() if n.endswith("weight")))


@pytest.mark.parametrize(
    "plan, make, error, message",
    [
        (LORA, lambda: step_control("PruneEntries", at=6, keep=0.5), ConfigError, "the run has 6 steps"),
        (LORA, lambda: step_control("PruneEntries", at=0, keep=0.5), ConfigError, "at 0"),
        (LORA, lambda: step_control("LightPEFT", at=2, masks=0.5), ConfigError, "no site of StructuredMask"),
        (LIGHT, lambda: step_control("LightPEFT", at=2, masks=1.5), ConfigError, "keep 1.5"),
        (
            {"layers.0": mmpeft.DoRA(rank=2), "layers.2": mmpeft.StructuredMask()},
            lambda: step_control("LightPEFT", at=2, masks=0.5), Unsupported, "layers.0.weight has dora",
        ),
        ({BLOCKS: mmpeft.DiffPruning()}, lambda: step_control("DiffGates", at=2), ConfigError, "without a density"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_the_first_step(make_trainer, plan, make, error, message):
    with pytest.raises(error, match=message):
        make_trainer(max_epochs=1, callbacks=[make()]).fit(task(plan), loader())


def test_an_adapter_is_not_saved_before_it_is_made_small(make_trainer, tmp_path):
    callbacks = [AdapterCheckpoint(str(tmp_path)), step_control("PruneUnits", keep=0.5)]
    with pytest.raises(ConfigError, match="before AdapterCheckpoint"):
        make_trainer(max_epochs=1, callbacks=callbacks).fit(task(LORA), loader())
