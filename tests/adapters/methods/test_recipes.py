"""What a published recipe adds to a method: T-Few's losses beside (IA)3, and one-off drop after full tuning."""

from __future__ import annotations

import pytest
import torch
from cases import close, deltas, fill
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError


def choices():
    """Log-probabilities of the tokens of three choices of different lengths, for four examples."""
    g = torch.Generator().manual_seed(0)
    log_probs = torch.rand(4, 3, 5, generator=g, dtype=torch.float64).log()
    mask = torch.arange(5) < torch.tensor([[2, 5, 3], [1, 1, 4], [5, 2, 2], [3, 3, 1]]).unsqueeze(-1)
    return log_probs.masked_fill(~mask, -torch.inf), mask, torch.tensor([0, 2, 1, 0])


def test_t_few_losses_are_the_papers_sums():
    log_probs, mask, answer = choices()
    unlikelihood, length = mmpeft.t_few_losses(log_probs, mask, answer)
    by_hand = [0.0, 0.0]
    for p, m, right in zip(log_probs.exp(), mask, answer.tolist(), strict=True):
        wrong = [p[n][m[n]] for n in range(3) if n != right]
        by_hand[0] -= sum(float((1 - q).log().sum()) for q in wrong) / sum(len(q) for q in wrong) / 4
        scores = torch.stack([p[n][m[n]].log().mean() for n in range(3)]).exp()
        by_hand[1] -= float((scores[right] / scores.sum()).log()) / 4
    assert float(unlikelihood) == pytest.approx(by_hand[0]) and float(length) == pytest.approx(by_hand[1])


def test_t_few_losses_have_finite_gradients_for_certain_tokens_and_padding():
    log_probs, mask, answer = choices()
    log_probs = torch.where(mask, log_probs, -1.0).float()
    log_probs[:, :, 0] = 0  # p is 1
    log_probs.requires_grad_()
    losses = mmpeft.t_few_losses(log_probs, mask, answer)
    grad = torch.autograd.grad(sum(losses), log_probs)[0]
    assert all(bool(loss.isfinite()) for loss in losses) and bool(grad.isfinite().all())
    assert not bool(grad[~mask].any()) and bool(grad[mask].any())


def test_t_few_losses_with_ia3_teach_the_right_choice():
    """Two tokens a choice; the model scores them from its input, and only (IA)3's gains learn."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 7))
    x, answer = torch.randn(12, 6), torch.arange(12) % 3
    tokens = torch.tensor([[0, 1], [2, 3], [4, 5]])
    mmpeft.attach(model, {"{0,2}": mmpeft.IA3()}, example=x)
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.05))
    found = []
    for _ in range(150):
        log_probs = model(x).log_softmax(-1)[:, tokens]
        unlikelihood, length = mmpeft.t_few_losses(log_probs, torch.ones(12, 3, 2, dtype=torch.bool), answer)
        loss = unlikelihood + length
        found.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = float((log_probs.mean(-1).argmax(-1) == answer).float().mean())
    assert found[-1] < 0.7 * found[0] and right > 0.9


def test_t_few_losses_refuse_what_does_not_fit():
    log_probs, mask, answer = choices()
    with pytest.raises(ConfigError, match="expected"):
        mmpeft.t_few_losses(log_probs[0], mask, answer)
    with pytest.raises(ConfigError, match="no token"):
        mmpeft.t_few_losses(log_probs, torch.zeros_like(mask), answer)


def test_one_off_drop_keeps_the_largest_changes_of_the_whole_model():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)), torch.randn(3, 6)
    mmpeft.attach(model, {"{0,2}": "full"}, name="a", example=x)
    fill(model, "a")
    values = {d.site.name: d.value.detach().clone() for d in deltas(model)}
    bases = {d.site.name: model.get_submodule(d.site.path)._parameters[d.site.tensor].clone() for d in deltas(model)}
    changes = {n: (values[n] - bases[n]).abs() for n in values}
    total = sum(c.numel() for c in changes.values())
    least = torch.cat([c.flatten() for c in changes.values()]).sort(descending=True).values[round(0.25 * total) - 1]
    assert mmpeft.one_off_drop(model, 0.25, name="a") == round(0.25 * total)
    for d in deltas(model):
        n = d.site.name
        assert torch.equal(d.value, torch.where(changes[n] >= least, values[n], bases[n]))
    y = model(x)
    assert mmpeft.one_off_drop(model, 1.0, name="a") == total and close(model(x), y, 0)
    with pytest.raises(ConfigError, match="expected 0 < keep"):
        mmpeft.one_off_drop(model, 0.0, name="a")
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=2)}, name="b", example=x)
    with pytest.raises(ConfigError, match="in full"):
        mmpeft.one_off_drop(model, 0.5, name="b")
