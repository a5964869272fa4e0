"""Rank policies as a Lightning callback: the same as the plain loop, also with accumulation and after a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapters.methods import dynamic_rank
from mmpeft.adapters.selection import rank, rank_policies
from mmpeft.adapters.state import slots
from mmpeft.tasks import AdapterTask

lightning = pytest.importorskip("lightning")


class Regress(AdapterTask):
    def training_step(self, batch, index):
        x, y = batch
        return self.shared_loss((self.model(x) - y).square().sum(), y.numel())


class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(24, 6, generator=g), torch.randn(24, 4, generator=g)

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


PLAN = {"{0,2}": dynamic_rank.AdaLoRA(rank=3)}


def policy():
    return rank_policies.Budget(1, 12, warmup=1, final=3, orthogonal=0.2)


def task():
    torch.manual_seed(1)
    sgd = lambda groups: torch.optim.SGD(groups, lr=0.05)  # noqa: E731
    return Regress(host(), PLAN, lr=0.05, schedule="constant", warmup=0, optimizer=sgd)


def deltas(model):
    return [d for _, _, s in slots(model) for _, d in s.deltas()]


def loader(batch_size=8):
    return torch.utils.data.DataLoader(Pairs(), batch_size)


def test_the_callback_is_the_plain_loop(make_trainer):
    from mmpeft.tasks.rank import RankControl

    lit = task()
    lit.configure_model()
    model = copy.deepcopy(lit.model)
    callback = RankControl(policy())
    make_trainer(max_epochs=4, callbacks=[callback]).fit(lit, loader())

    controller = rank.RankController(model.train(), policy())
    optimizer = torch.optim.SGD(mmpeft.parameter_groups(model, lr=0.05))
    for _ in range(4):
        for x, y in loader():
            optimizer.zero_grad()
            ((model(x) - y).square().mean() + controller.penalty()).backward()
            optimizer.step()
            controller.step()
    assert callback.controller.ranks() == controller.ranks() and sum(controller.ranks().values()) == 2
    for mine, theirs in zip(deltas(model), deltas(lit.model), strict=True):
        for n in ("P", "lam", "Q", "mask"):
            torch.testing.assert_close(getattr(mine, n), getattr(theirs, n), rtol=1e-4, atol=1e-6)


def test_steps_are_the_optimizers_and_the_adapter_shrinks_at_the_end(make_trainer, tmp_path):
    from mmpeft.tasks.rank import RankControl

    lit = task()
    callback = RankControl(policy(), shrink=True)
    make_trainer(max_epochs=12, callbacks=[callback], accumulate_grad_batches=3).fit(lit, loader())
    assert callback.controller.steps == 12
    assert sum(d.P.shape[1] for d in deltas(lit.model)) == 2
    y = lit.model(Pairs().x)
    mmpeft.save(lit.model, tmp_path)
    other = host()
    mmpeft.load(other, tmp_path)
    torch.testing.assert_close(other(Pairs().x), y)


def test_a_resumed_run_ends_where_the_whole_run_does(make_trainer, tmp_path):
    from mmpeft.tasks.rank import RankControl

    whole, first, second = task(), task(), task()
    whole.configure_model()
    first.model = copy.deepcopy(whole.model)
    make_trainer(max_epochs=4, callbacks=[RankControl(policy())]).fit(whole, loader())
    trainer = make_trainer(max_epochs=2, callbacks=[RankControl(policy())])
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = RankControl(policy())
    make_trainer(max_epochs=4, callbacks=[resumed]).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.controller.steps == 12
    for mine, theirs in zip(deltas(whole.model), deltas(second.model), strict=True):
        for n in ("P", "lam", "Q", "mask"):
            torch.testing.assert_close(getattr(mine, n), getattr(theirs, n), rtol=1e-4, atol=1e-6)
