"""IVON: its update by the formula, the exact posterior on a quadratic, and a LoRA that learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.tasks.ivon import IVON


def test_one_step_by_the_formula():
    w = nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64))
    optimizer = IVON([w], lr=0.1, data_size=50, hess_init=0.3, betas=(0.8, 0.9), weight_decay=0.02, seed=4)
    m, a = w.detach().clone(), torch.tensor([3.0, 0.7], dtype=torch.float64)
    e = torch.randn(2, generator=torch.Generator().manual_seed(4)).double()
    with optimizer.sampled():
        drawn = w.detach().clone()
        (0.5 * a * w.square()).sum().backward()
    assert torch.equal(w.detach(), m)
    sd = (50 * (0.3 + 0.02)) ** -0.5
    torch.testing.assert_close(drawn, m + sd * e)
    optimizer.step()
    g, h_hat = a * drawn, a * drawn * e / sd
    h = 0.9 * 0.3 + 0.1 * h_hat + 0.5 * 0.01 * (0.3 - h_hat) ** 2 / (0.3 + 0.02)
    torch.testing.assert_close(w.detach(), m - 0.1 * (g + 0.02 * m) / (h + 0.02))
    torch.testing.assert_close(optimizer.spread(w), (50 * (h + 0.02)) ** -0.5)


def test_on_a_quadratic_it_finds_the_exact_posterior():
    """Loss a (w - c)^2 / 2 a sample: the posterior has precision N (a + decay) and mean a c / (a + decay)."""
    a, c = torch.tensor([4.0, 0.25]), torch.tensor([1.0, -1.0])
    w = nn.Parameter(torch.zeros(2))
    optimizer = IVON([w], lr=0.05, data_size=100, betas=(0.9, 0.998), weight_decay=0.1)
    tail = []
    for t in range(3000):
        with optimizer.sampled():
            (0.5 * a * (w - c).square()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if t >= 1500:
            tail.append(torch.stack([w.detach().clone(), optimizer.spread(w)]))
    mean, spread = torch.stack(tail).mean(0)
    torch.testing.assert_close(mean, a * c / (a + 0.1), atol=0.03, rtol=0.03)
    torch.testing.assert_close(spread, (100 * (a + 0.1)).rsqrt(), atol=0.0, rtol=0.12)


def test_a_lora_learns_and_samples_spread_around_it():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(64, 6)
    labels = (x @ torch.randn(6, 3)).argmax(1)
    mmpeft.attach(model, {"{0,2}": mmpeft.LoRA(rank=3)}, name="a", example=x)
    optimizer = IVON(mmpeft.parameter_groups(model, lr=0.3), data_size=64, hess_init=0.5)
    losses = []
    for _ in range(200):
        for _ in range(2):  # two samples a step
            with optimizer.sampled():
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(nn.functional.cross_entropy(model(x), labels).detach()))
    assert losses[-1] < 0.5 * losses[0]
    y = model(x).detach()
    with torch.no_grad(), optimizer.sampled():
        assert not torch.allclose(model(x), y)
    assert torch.equal(model(x).detach(), y)


def test_bad_use_is_refused():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="betas"):
        IVON([w], data_size=10, betas=(0.9, 1.0))
    optimizer = IVON([w], data_size=10)
    w.sum().backward()
    with pytest.raises(ConfigError, match="outside"):
        optimizer.step()
    with pytest.raises(ConfigError, match="inside"), optimizer.sampled(), optimizer.sampled():
        pass
