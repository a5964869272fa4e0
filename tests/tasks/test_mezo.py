"""MeZO: the SPSA formula, seed replay, inference memory, and learning."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.tasks import FwdLLM
from mmpeft.tasks.mezo import MeZO


def adapted():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(16, 6)
    mmpeft.attach(model, {"{0,2}": mmpeft.LoRA(rank=1)}, name="a", example=x)
    return model, x


def trained(model):
    return [p for group in mmpeft.parameter_groups(model, lr=1.0) for p in group["params"]]


def test_a_step_is_two_point_spsa():
    model, x = adapted()
    model.double()
    x = x.double()
    target, start = torch.randn(16, 3).double(), [p.detach().clone() for p in trained(model)]
    loss = lambda: (model(x) - target).square().mean()  # noqa: E731
    optimizer = MeZO(mmpeft.parameter_groups(model, lr=0.1, weight_decay=0.2), eps=1e-2, seed=7)
    optimizer.step(loss)
    generator = torch.Generator().manual_seed(7)
    z = [torch.randn(p.shape, generator=generator).double() for p in start]
    twin, sides = copy.deepcopy(model), []
    for sign in (1, -1):
        with torch.no_grad():
            for p, w, n in zip(trained(twin), start, z, strict=True):
                p.copy_(w + sign * 1e-2 * n)
            sides.append(float((twin(x) - target).square().mean()))
    g = (sides[0] - sides[1]) / 2e-2
    for p, w, n in zip(trained(model), start, z, strict=True):
        torch.testing.assert_close(p.detach(), w * (1 - 0.1 * 0.2) - 0.1 * g * n, rtol=1e-9, atol=1e-12)
    assert optimizer.trajectory[0][:2] == (7, pytest.approx(g, rel=1e-9))


def test_many_samples_point_along_the_gradient():
    model, x = adapted()
    target = torch.randn(16, 3)
    loss = lambda: (model(x) - target).square().mean()  # noqa: E731
    start = torch.cat([p.detach().flatten().clone() for p in trained(model)])
    optimizer = MeZO(mmpeft.parameter_groups(model, lr=1.0), eps=1e-3, samples=400)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), trained(model))])
    optimizer.step(loss)
    moved = start - torch.cat([p.detach().flatten() for p in trained(model)])
    assert torch.cosine_similarity(moved, exact, 0) > 0.9
    assert float(moved.norm() / exact.norm()) == pytest.approx(1, abs=0.25)


def test_nothing_is_saved_for_a_backward_and_no_gradient_is_made():
    model, x = adapted()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = MeZO(mmpeft.parameter_groups(model, lr=0.1)).step(lambda: model(x).square().mean())
    assert not saved and not loss.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_it_learns_and_a_few_numbers_replay_the_run():
    model, x = adapted()
    start = copy.deepcopy(model)
    teacher = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in trained(teacher):
            p.add_(0.5 * torch.randn(p.shape))
        target = teacher(x)
    optimizer = MeZO(mmpeft.parameter_groups(model, lr=0.5), samples=4)
    losses = [float(optimizer.step(lambda: (model(x) - target).square().mean())) for _ in range(150)]
    assert losses[-1] < 0.5 * losses[0]
    other = MeZO(mmpeft.parameter_groups(start, lr=0.01), samples=4)
    other.replay(optimizer.trajectory)
    for p, q in zip(trained(model), trained(start), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)  # a run also adds and takes off its perturbations
    resumed = MeZO(mmpeft.parameter_groups(copy.deepcopy(model), lr=0.01), samples=4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.seed == other.seed == 600 and resumed.trajectory == optimizer.trajectory


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"eps": 0.0}, {"samples": 0}, {"weight_decay": -1.0}])
def test_bad_values_are_refused(options):
    with pytest.raises(ConfigError):
        MeZO([nn.Parameter(torch.zeros(2))], **{"lr": 0.1} | options)
    with pytest.raises(ConfigError, match="closure"):
        MeZO([nn.Parameter(torch.zeros(2))]).step()


def test_fwdllm_draws_as_many_perturbations_as_the_variance_asks_for():
    model, x = adapted()
    target, start = torch.randn(16, 3), [p.detach().clone() for p in trained(model)]
    loss = lambda: (model(x) - target).square().mean()  # noqa: E731
    optimizer = FwdLLM(mmpeft.parameter_groups(model, lr=0.1), eps=1e-3, variance=0.15, least=2, most=40, seed=3)
    optimizer.step(loss)
    found = [g * optimizer.samples for _, g, _ in optimizer.trajectory]
    assert 2 < optimizer.samples < 40 and len(found) == optimizer.samples

    def spread(g):
        s = torch.tensor(g).double().square()
        return float(s.var(correction=0) / (len(s) * s.mean() ** 2))

    assert spread(found) <= 0.15 and all(spread(found[:n]) > 0.15 for n in range(2, len(found)))
    twin = MeZO(mmpeft.parameter_groups(model, lr=0.1), samples=optimizer.samples)
    with torch.no_grad():
        ended = [p.detach().clone() for p in trained(model)]
        for p, w in zip(trained(model), start, strict=True):
            p.copy_(w)
    twin.replay(optimizer.trajectory)
    assert all(torch.allclose(p, w, atol=1e-6) for p, w in zip(trained(model), ended, strict=True))
    with pytest.raises(ConfigError, match="least 1"):
        FwdLLM(mmpeft.parameter_groups(model, lr=0.1), least=1)
    with pytest.raises(ConfigError, match="closure"):
        optimizer.step()
