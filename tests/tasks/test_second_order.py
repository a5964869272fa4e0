"""GaLore, Natural GaLore, AdaFish and RecAdam: one step against its formula, memory, resuming, and learning through a task."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.tasks import AdaFish, GaLore, NaturalGaLore, RecAdam


def close(a, b, tolerance=1e-10):
    return float((a - b).abs().max()) <= tolerance


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
def test_galore_is_adam_in_the_gradients_top_subspace(shape):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape).double())
    expected = w.detach().clone()
    optimizer = GaLore([w], lr=0.1, rank=2, update_every=2, scale=0.5, weight_decay=0.3)
    m = v = 0
    for t in range(1, 6):
        G = torch.randn(shape).double()
        if t % 2 == 1:  # a new subspace every second step
            U, _, V = torch.linalg.svd(G)
            P = U[:, :2] if shape[0] < shape[1] else V[:2].T
        R = P.T @ G if shape[0] < shape[1] else G @ P
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R**2
        N = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        update = P @ N if shape[0] < shape[1] else N @ P.T
        expected = expected * (1 - 0.1 * 0.3) - 0.1 * 0.5 * update
        w.grad = G
        optimizer.step()
        assert close(w.detach(), expected, 1e-8), t
    assert optimizer.state[w]["exp_avg"].numel() == 2 * 9, "moments have rank x the larger side"


def test_galore_is_adamw_on_what_is_no_matrix_or_too_small():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(3, 8))]
    theirs = copy.deepcopy(ours)
    a, b = GaLore(ours, lr=0.02, rank=3, weight_decay=0.1), torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert all(close(p.detach(), q.detach(), 1e-6) for p, q in zip(ours, theirs, strict=True))


def test_natural_galore_inverts_the_fisher_information_of_its_window():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 6).double())
    optimizer = NaturalGaLore([w], lr=0.1, rank=2, update_every=4, window=3, damping=0.5)
    history, natural, plain = [], [], optimizer.precondition
    optimizer.precondition = lambda state, R: natural.append(plain(state, R)) or natural[-1]
    for t in range(6):
        w.grad = torch.randn(4, 6).double()
        optimizer.step()
        if t % 4 == 0:
            history = []
        g = (optimizer.state[w]["P"].T @ w.grad).flatten()
        history = [g, *history][:3]
        fisher = 0.5 * torch.eye(12).double() + sum(torch.outer(h, h) for h in history)
        assert close(natural[-1].flatten(), torch.linalg.inv(fisher) @ g, 1e-9), t


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(2, 7), (7, 2), (5,)], ids=str)
def test_adafish_preconditions_the_smaller_side(shape, power):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape).double())
    expected = w.detach().clone()
    optimizer = AdaFish([w], lr=0.1, betas=(0.8, 0.6), damping=0.05, power=power, weight_decay=0.2)
    m = F = 0
    for t in range(1, 4):
        G = torch.randn(shape).double()
        side = G.view(1, -1) if G.ndim == 1 else (G if shape[0] < shape[1] else G.T)
        m, F = 0.8 * m + 0.2 * side, 0.6 * F + 0.4 * side @ side.T / side.shape[1]
        damped = F / (1 - 0.6**t) + 0.05 * torch.eye(len(side)).double()
        if power == 0.5:
            values, vectors = torch.linalg.eigh(damped)
            damped = vectors @ torch.diag(values.sqrt()) @ vectors.T
        update = torch.linalg.inv(damped) @ (m / (1 - 0.8**t))
        update = update.view(shape) if G.ndim == 1 or shape[0] < shape[1] else update.T
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * update
        w.grad = G
        optimizer.step()
        assert close(w.detach(), expected, 1e-9), t


def test_recadam_anneals_its_pull_towards_the_start():
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(4, 3).double())
    start = w.detach().clone()
    expected, m, v = start.clone(), 0, 0
    optimizer = RecAdam([w], lr=0.1, k=0.7, t0=2, gamma=0.5)
    for t in range(1, 6):
        g = torch.randn(4, 3).double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        adam = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        task = 1 / (1 + math.exp(-0.7 * (t - 2)))
        expected = expected - 0.1 * (task * adam + (1 - task) * 0.5 * (expected - start))
        w.grad = g
        optimizer.step()
        assert close(w.detach(), expected, 1e-10), t
    with pytest.raises(ConfigError, match="k 0"):
        RecAdam([w], k=0)


MAKE = {
    "galore": lambda groups: GaLore(groups, rank=2, update_every=10, scale=1.0),
    "natural": lambda groups: NaturalGaLore(groups, rank=2, update_every=10, scale=1.0),
    "recadam": lambda groups: RecAdam(groups, gamma=1.0, t0=20),
    "adafish": lambda groups: AdaFish(groups),
}


@pytest.mark.parametrize("name", MAKE)
def test_they_train_an_adapter_by_its_groups_and_resume(name):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval(), torch.randn(32, 6)
    method = "full" if "a" != name[0] else mmpeft.LoRA(rank=2)
    mmpeft.attach(model, {"{0,2}": method}, name="a", example=x)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for p in mmpeft.parameter_groups(teacher, lr=1.0)[0]["params"]:
            p.add_(0.4 * torch.randn_like(p))
        target = teacher(x)
    optimizer = MAKE[name](mmpeft.parameter_groups(model, lr=0.02))
    assert optimizer.param_groups[0]["lr"] == 0.02

    def step(model, optimizer):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = [step(model, optimizer) for _ in range(120)]
    assert min(losses[-5:]) < 0.3 * losses[0]
    other = copy.deepcopy(model)
    again = MAKE[name](mmpeft.parameter_groups(other, lr=0.02))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [step(model, optimizer) for _ in range(12)] == pytest.approx([step(other, again) for _ in range(12)], rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: GaLore(p, rank=0), "rank 0"),
        (lambda p: GaLore(p, lr=0), "lr 0"),
        (lambda p: GaLore(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: NaturalGaLore(p, window=0), "window 0"),
        (lambda p: AdaFish(p, power=2.0), "power 2.0"),
        (lambda p: AdaFish(p, damping=0.0), "damping 0.0"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make([nn.Parameter(torch.randn(3, 4))])


@pytest.mark.parametrize("name", ["GaLore", "NaturalGaLore", "RecAdam", "AdaFish", "MeZO", "FwdLLM"])
def test_yaml_gives_a_task_the_optimizer_with_its_options(name):
    jsonargparse = pytest.importorskip("jsonargparse")
    from mmpeft.tasks import AdapterTask

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AdapterTask, "task", skip={"model", "plan"})
    options = {"weight_decay": 0.25} | ({"eps": 0.5} if name != "AdaFish" else {"betas": [0.5, 0.25]})
    choice = {"class_path": f"mmpeft.tasks.{name}", "init_args": options}
    make = parser.instantiate(parser.parse_object({"task": {"optimizer": choice}}), instantiate_groups=False).task.optimizer
    made = make([{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.125}])
    assert type(made).__name__ == name and made.param_groups[0]["lr"] == 0.125
    assert made.param_groups[0]["weight_decay"] == 0.25
    assert tuple(made.betas) == (0.5, 0.25) if name == "AdaFish" else made.eps == 0.5
    assert made == made and len({made, copy.deepcopy(made)}) == 2, "an optimizer is itself alone, not its options"
    with pytest.raises(jsonargparse.ArgumentError, match="epsi"):
        parser.parse_object({"task": {"optimizer": choice | {"init_args": {"epsi": 1.0}}}})


def test_through_a_lightning_task():
    lightning = pytest.importorskip("lightning")
    from mmpeft.tasks import AdapterTask

    class Regress(AdapterTask):
        def training_step(self, batch, index):
            x, y = batch
            return self.shared_loss((self.model(x) - y).square().sum(), y.numel())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    x, y = torch.randn(24, 6), torch.randn(24, 4)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    before = (model(x) - y).square().mean().item()
    task = Regress(model, {"{0,2}": "full"}, lr=0.02, optimizer=lambda groups: GaLore(groups, rank=2, scale=1.0))
    trainer = lightning.Trainer(
        max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data)
    assert isinstance(trainer.optimizers[0], GaLore)
    assert (model(x) - y).square().mean().item() < 0.9 * before
