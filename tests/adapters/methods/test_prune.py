"""LoRAPrune's importance and schedule, AdapterDrop, LoRA Dropout, PeriodicLoRA, O-LoRA."""

from __future__ import annotations

import pytest
import torch
from cases import close, deltas, fill
from torch import nn

import mmpeft
from mmpeft.adapters.methods import lora_noise, lora_prune
from mmpeft.adapters.selection import rank
from mmpeft.errors import ConfigError, NameNotFound


def small(method, filled=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    mmpeft.attach(model, {"{0,2}": method}, name="a", example=torch.randn(3, 6))
    if filled:
        fill(model)
    return model


def backward(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    model.zero_grad()
    (model(torch.randn(7, 6, generator=g)) - torch.randn(7, 4, generator=g)).square().mean().backward()


@pytest.mark.parametrize(("axis", "group"), [("rows", 2), ("columns", 1)])
def test_importance_is_the_papers_estimate(axis, group):
    model = small(lora_prune.LoRAPrune(rank=2, alpha=4, axis=axis, group=group))
    pruner = lora_prune.LoRAPruner(model, sparsity=0.5, begin=0, end=4)
    backward(model)
    for d in deltas(model):
        W = model[int(d.site.path)]._parameters["weight"]
        moved = 2 * (d.B - d.B.grad) @ (d.A - d.A.grad) - 2 * d.B @ d.A  # one step of LoRA's SGD, in W
        entries = (moved * (W + 2 * d.B @ d.A)).square()
        expected = entries.sum(1 if axis == "rows" else 0).view(-1, group).sum(1)
        assert close(pruner.importance(d.site.name) / expected.max(), expected / expected.max(), 1e-5)


def test_pruning_follows_the_schedule_and_takes_the_least_groups(tmp_path):
    model, x = small(lora_prune.LoRAPrune(rank=2, group=2)), torch.randn(3, 6)
    pruner = lora_prune.LoRAPruner(model, sparsity=0.5, begin=1, end=5, beta=0.5)
    for t in range(1, 7):
        backward(model, t)
        share = pruner.step()
        assert share == pytest.approx(0.5 - 0.5 * (1 - min(1, max(0, (t - 1) / 4))) ** 3)
        for d in deltas(model):
            gone = d.mask.view(-1, 2).eq(0)
            n = len(gone)
            assert gone[:, 0].equal(gone[:, 1]) and int(gone[:, 0].sum()) == int(share * n + 1e-9)
            scores = pruner.scores[d.site.name]
            kept, out = scores[~gone[:, 0]], scores[gone[:, 0]]
            assert not len(out) or out.max() <= kept.min()
    assert (model[0].weight[deltas(model)[0].mask == 0] == 0).all()
    y = model(x)
    assert mmpeft.merge(model, check=x) < 1e-5
    mmpeft.unmerge(model)
    mmpeft.save(model, tmp_path)
    other = small(lora_prune.LoRAPrune(rank=2, group=2))
    mmpeft.detach(other)
    mmpeft.load(other, tmp_path)
    assert close(other(x), y, 1e-6)


def test_tied_sites_share_one_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    plan = {"0": lora_prune.LoRAPrune(rank=2), "2": lora_prune.LoRAPrune(rank=2, axis="columns")}
    mmpeft.attach(model, plan, name="a", example=torch.randn(3, 6))
    fill(model)
    pruner = lora_prune.LoRAPruner(model, sparsity=0.5, begin=0, end=1, tied=[["0.weight", "2.weight"]])
    backward(model)
    pruner.step()
    rows, columns = (d.mask for d in deltas(model))
    assert torch.equal(rows, columns) and rows.sum() == 4
    scores = pruner.scores["0.weight"] + pruner.scores["2.weight"]
    assert scores[rows == 0].max() <= scores[rows == 1].min()


def test_adapterdrop_leaves_out_low_layers_for_a_while():
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])})
    forward, x = model["blocks"], torch.randn(4, 6)
    model.forward = lambda x: forward(x)
    base = forward(x).detach()
    mmpeft.attach(model, {"blocks.*": mmpeft.LoRA(rank=2)}, name="a", example=x)
    fill(model)
    full = forward(x).detach()
    W = [m._parameters["weight"] for m in forward]
    with torch.no_grad():
        for n in (1, 2):
            with lora_prune.drop_below(model, n) as gone:
                assert gone == [f"blocks.{i}.weight" for i in range(n)]
                assert all(forward[i].weight is W[i] for i in range(n))
                y = forward(x)
            expected = x
            for i, m in enumerate(forward):
                expected = nn.functional.linear(expected, W[i] if i < n else m.weight, m.bias)
            assert close(y, expected, 1e-6) and not close(y, full, 1e-3) and not close(y, base, 1e-3)
    assert torch.equal(forward(x), full)
    with pytest.raises(ConfigError, match="below 0"), lora_prune.drop_below(model, 0):
        pass


def test_lora_dropout_drops_dimensions_in_training_only():
    model, x = small(lora_noise.LoRADropout(rank=2, alpha=6, p=0.5)), torch.randn(3, 6)
    controller = rank.RankController(model, lora_noise.Masks(seed=1))
    d, W = deltas(model)[0], model[0]._parameters["weight"]
    evaluated = model(x)
    assert close(model[0].weight, W + 3 * d.B @ d.A, 1e-6)
    model.train()
    seen = []
    for t in range(200):
        controller.step(t)
        seen.append(torch.cat([d.m_in, d.m_out]))
        expected = W + 3 * torch.diag(d.m_out) @ d.B @ d.A @ torch.diag(d.m_in)
        assert close(model[0].weight, expected, 1e-6)
    seen = torch.stack(seen)
    assert set(seen.unique().tolist()) == {0.0, 1.0} and (seen.mean(0) - 0.5).abs().max() < 0.15
    y = model(x)
    assert torch.equal(model(x), y), "all reads between two steps see the same masks"
    model.eval()
    mean = lora_noise.mask_ensemble(model, lambda: model(x), samples=4, seed=2)
    assert torch.equal(model(x), evaluated) and not close(mean, evaluated, 1e-3)
    by_hand = 0
    for i in range(4):
        lora_noise.Masks(2).step(controller.sites, i)
        by_hand = by_hand + model.train()(x).detach() / 4
    assert close(mean, by_hand, 1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.4])
def test_unloading_changes_nothing_at_once_and_adds_up_rank(momentum, tmp_path):
    model, x = small(lora_noise.PeriodicLoRA(rank=1, stages=2)), torch.randn(3, 6)
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.1))
    W = model[0]._parameters["weight"]
    for stage in (1, 2):
        backward(model)
        optimizer.step()
        y = model(x)
        assert lora_noise.unload(model, optimizer, momentum=momentum) == stage
        assert close(model(x), y, 1e-6) and not optimizer.state
    backward(model, 1)
    optimizer.step()
    backward(model, 2)
    optimizer.step()
    assert torch.linalg.matrix_rank(model[0].weight - W, rtol=1e-4) == 3
    y = model(x)
    mmpeft.save(model, tmp_path)
    other = small(lora_noise.PeriodicLoRA(rank=1, stages=2), filled=False)
    mmpeft.detach(other)
    mmpeft.load(other, tmp_path)
    assert close(other(x), y, 1e-6)
    with pytest.raises(ConfigError, match="used its 2 stages"):
        lora_noise.unload(model)


def test_orthogonal_penalty_pushes_a_new_task_out_of_the_old_subspaces():
    model = small(mmpeft.LoRA(rank=2))
    mmpeft.attach(model, {"{0,2}": mmpeft.LoRA(rank=2)}, name="b", example=torch.randn(3, 6))
    pairs = list(zip(deltas(model, "a"), deltas(model, "b"), strict=True))
    expected = sum(float((p.A.detach() @ q.A.detach().T).square().sum()) for p, q in pairs)
    assert float(lora_noise.orthogonal_penalty(model, "b", ["a"]).detach()) == pytest.approx(expected, rel=1e-6)
    optimizer = torch.optim.SGD([q.A for _, q in pairs], lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        penalty = lora_noise.orthogonal_penalty(model, "b", ["a"])
        penalty.backward()
        optimizer.step()
    assert penalty < 1e-3 * expected and all(p.A.grad is None for p, _ in pairs)
    assert all(q.A.detach().norm() > 0.1 for _, q in pairs)


@pytest.mark.parametrize("method", [mmpeft.VeRA(rank=2), mmpeft.LoRAFA(rank=2), mmpeft.KronA()], ids=lambda m: m.name)
def test_orthogonal_penalty_wants_a_trained_input_subspace(method):
    model = small(mmpeft.LoRA(rank=2))
    mmpeft.attach(model, {"{0,2}": method}, name="b", example=torch.randn(3, 6))
    with pytest.raises(ConfigError, match=f"trained in 'b'; not so in lora and {method.name}"):
        lora_noise.orthogonal_penalty(model, "b", ["a"])


PRUNE = {"sparsity": 0.5, "begin": 0, "end": 2}


def pruner(**options):
    return lora_prune.LoRAPruner(small(lora_prune.LoRAPrune(rank=2)), **PRUNE | options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lora_prune.LoRAPruner(small(mmpeft.LoRA(rank=2)), **PRUNE), ConfigError, "no LoRAPrune"),
        (lambda: pruner(sparsity=1), ConfigError, "sparsity 1"),
        (lambda: pruner(tied=[["0.weigth"]]), NameNotFound, "nearest: 0.weight"),
        (lambda: pruner(tied=[["0.weight", "2.weight"]]), ConfigError, "0.weight 8, 2.weight 6"),
        (lambda: pruner().step(), ConfigError, "no gradient"),
        (lambda: small(lora_prune.LoRAPrune(rank=2, group=3)), ConfigError, "group 3"),
        (lambda: lora_prune.LoRAPrune(axis="heads"), ConfigError, "rows, columns"),
        (lambda: lora_noise.LoRADropout(p=1.0), ConfigError, "p 1.0"),
        (lambda: lora_noise.PeriodicLoRA(stages=0), ConfigError, "stages 0"),
        (lambda: lora_noise.unload(small(mmpeft.LoRA(rank=2))), ConfigError, "no PeriodicLoRA"),
        (lambda: lora_noise.mask_ensemble(small(mmpeft.LoRA(rank=2)), None), ConfigError, "0 LoRADropout"),
        (lambda: lora_noise.orthogonal_penalty(small(mmpeft.LoRA(rank=2)), "b", ["a"]), NameNotFound, "no adapter 'b'"),
    ],
)  # fmt: skip
def test_bad_use_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
