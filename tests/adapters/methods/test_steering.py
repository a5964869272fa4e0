"""Steering by computed directions, and mixtures of frozen adapters by masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, losses_on
from torch import nn

import mmpeft
from mmpeft.adapters.methods import steering
from mmpeft.errors import ConfigError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(torch.tanh(self.q(x)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).eval()


def pairs(n=20):
    """Inputs whose last token differs along one direction; everything else is noise."""
    torch.manual_seed(1)
    negative, direction = torch.randn(n, 3, 8) * 0.3, torch.randn(8)
    positive = negative + 0.05 * torch.randn(n, 3, 8)
    positive[:, -1] += direction
    return positive, negative


@pytest.mark.parametrize("by", ["pca", "mean"])
def test_repe_reads_a_direction_and_adds_it(by, tmp_path):
    model, (positive, negative) = net(), pairs()
    mmpeft.attach(model, {"*": mmpeft.RepE(dim=8)}, name="a", example=negative)
    with torch.no_grad():
        base = model(negative)
        with mmpeft.use(model, None):
            assert torch.equal(model(negative), base), "nothing is steered before the fit"
            p, n = model[0](positive)[:, -1], model[0](negative)[:, -1]
    mmpeft.fit_repe(model, [positive[:12], positive[12:]], [negative[:12], negative[12:]], name="a", by=by)
    first, second = deltas(model)
    d = p - n
    # The covariance of the differences taken with both signs, an eigenvalue problem the fit doesn't solve.
    expected = torch.linalg.eigh(d.T @ d).eigenvectors[:, -1] if by == "pca" else F.normalize(d.mean(0), dim=0)
    assert close(first.v, expected * torch.sign(expected @ d.mean(0)), 1e-4)
    assert float(first.v.norm()) == pytest.approx(1)
    mmpeft.set_strength(model, -1.5, name="a")
    with torch.no_grad(), mmpeft.use(model, None):
        h = model[0](negative) - 1.5 * first.v
        expected = model[1](h) - 1.5 * second.v
    with torch.no_grad():
        assert close(model(negative), expected)
        mmpeft.save(model, tmp_path, name="a")
        other = net()
        mmpeft.load(other, tmp_path, check=False)
        assert close(other(negative), expected)
    assert [p for p in model.parameters() if p.requires_grad] == []


def test_iti_finds_the_heads_that_tell_and_shifts_them_by_their_spread():
    model, (positive, negative) = net(), pairs()
    with torch.no_grad():  # only head 2 of the first block sees its input; the others see none
        for block in model:
            block.q.weight[:4] = 0
            block.q.weight[6:] = 0
        model[1].q.weight.zero_()
    mmpeft.attach(model, {"*.out": mmpeft.ITI()}, name="a", example=negative)
    (best,) = mmpeft.fit_iti(model, [positive], [negative], 1, name="a")
    assert best[:2] == ("0.out", 2) and best[2] > 0.8
    first, second = deltas(model)
    assert not second.v.any() and not first.v[[0, 1, 3]].any()
    with torch.no_grad():
        z = {
            s: torch.tanh(F.linear(x[:, -1], model[0].q.weight, model[0].q.bias))[:, 4:6]
            for s, x in (("p", positive), ("n", negative))
        }
        theta = F.normalize(z["p"].mean(0) - z["n"].mean(0), dim=0)
        sigma = (torch.cat([z["p"], z["n"]]) @ theta).std()
        assert close(first.v[2], sigma * theta)
        mmpeft.set_strength(model, 3.0, name="a")
        heads = torch.tanh(model[0].q(negative))
        heads[..., 4:6] += 3 * sigma * theta
        expected = negative + F.linear(heads, model[0].out.weight, model[0].out.bias)
        assert close(model[0](negative), expected)
    with pytest.raises(ConfigError, match="1 to 8"):
        mmpeft.fit_iti(model, [positive], [negative], 9, name="a")


def probed(positive, negative):
    """A model that passes its input on: head h of the site sees channels 2 h and 2 h + 1 of the last token."""
    model = nn.Sequential(Block())
    with torch.no_grad():
        model[0].q.weight.copy_(0.1 * torch.eye(8))
        model[0].q.bias.zero_()
    mmpeft.attach(model, {"*.out": mmpeft.ITI()}, name="a", example=negative)
    heads = [torch.tanh(0.1 * x[:, -1]).double().unflatten(-1, (4, 2)) for x in (positive, negative)]
    return model, heads


def test_logistic_probes_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    positive, negative = torch.randn(30, 3, 5).double() + 0.4, 3 * torch.randn(50, 3, 5).double()
    positive[:, 2] += 20  # separable: without the penalty there is no minimum
    w, b = steering.logistic_probes(positive, negative)
    x, y = torch.cat([positive, negative]), [1] * 30 + [0] * 50
    for h in range(3):
        theirs = linear_model.LogisticRegression(max_iter=10_000, tol=1e-10).fit(x[:, h].numpy(), y)
        assert close(w[h], torch.tensor(theirs.coef_[0]), 1e-4) and close(
            b[h], torch.tensor(theirs.intercept_[0]), 1e-4
        )
        p = torch.sigmoid(x[:, h] @ w[h] + b[h]) - torch.tensor(y)
        assert float((p @ x[:, h] + w[h]).abs().max()) < 1e-6 and abs(float(p.sum())) < 1e-6  # its gradient


@pytest.mark.parametrize("sizes", [(40, 40), (40, 25)])
def test_iti_scores_its_probes_on_held_out_inputs(sizes):
    """The split, the probes of the one part and their hits on the other, written out."""
    torch.manual_seed(3)
    positive, negative = (torch.randn(n, 2, 8) for n in sizes)
    positive[:, -1, 4:6] += 2.0  # head 2 tells something, the others nothing
    model, (p, n) = probed(positive, negative)
    found = mmpeft.fit_iti(model, [positive], [negative], 4, name="a", held_out=0.25, seed=5)
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(len(z), generator=generator) for z in (p, n)]
    orders = [orders[0]] * 2 if sizes[0] == sizes[1] else orders  # pairs stay together
    few = [round(0.25 * len(z)) for z in (p, n)]
    w, b = steering.logistic_probes(p[orders[0][few[0] :]], n[orders[1][few[1] :]])
    right = ((p[orders[0][: few[0]]] * w).sum(-1) + b > 0).sum(0) + ((n[orders[1][: few[1]]] * w).sum(-1) + b <= 0).sum(
        0
    )
    accuracy = (right / sum(few)).tolist()
    assert {h: a for _, h, a in found} == pytest.approx(dict(enumerate(accuracy)))
    assert [a for *_, a in found] == pytest.approx(sorted(accuracy, reverse=True)) and found[0][:2] == ("0.out", 2)


@pytest.mark.parametrize("direction", ["mean", "probe"])
def test_iti_takes_given_held_out_inputs_and_either_direction(direction):
    torch.manual_seed(4)
    positive, negative, more, less = (torch.randn(n, 2, 8) for n in (30, 20, 8, 12))
    for x in (positive, more):
        x[:, -1, 2:4] += torch.tensor([1.5, 0.5])
    model, (p, n) = probed(positive, negative)
    held = [torch.tanh(0.1 * x[:, -1]).double().unflatten(-1, (4, 2)) for x in (more, less)]
    options = {"name": "a", "held_out": ([more], [less[:5], less[5:]]), "direction": direction}
    ((site, head, accuracy),) = mmpeft.fit_iti(model, [positive], [negative[:7], negative[7:]], 1, **options)
    w, b = steering.logistic_probes(p, n)
    right = ((held[0] * w).sum(-1) + b > 0).sum(0) + ((held[1] * w).sum(-1) + b <= 0).sum(0)
    assert (site, head) == ("0.out", 1) and accuracy == pytest.approx(float(right[1]) / 20)
    p, n = torch.cat([p, held[0]])[:, 1], torch.cat([n, held[1]])[:, 1]
    theta = F.normalize(p.mean(0) - n.mean(0) if direction == "mean" else w[1], dim=0)
    (d,) = deltas(model)
    assert close(d.v[1].double(), (torch.cat([p, n]) @ theta).std() * theta, 1e-6) and not d.v[[0, 2, 3]].any()


def test_bad_splits_of_iti_are_refused():
    positive, negative = pairs(2)
    model, _ = probed(positive, negative)
    for options, message in (
        ({"held_out": 0.0}, "between 0 and 1"),
        ({"held_out": 0.9}, "0.9 of 2 inputs leaves none"),
        ({"direction": "pca"}, "mean, probe"),
    ):
        with pytest.raises(ConfigError, match=message):
            mmpeft.fit_iti(model, [positive], [negative], 1, name="a", **options)


@pytest.mark.parametrize("hard", [None, 3])
def test_x_peft_mixes_a_frozen_bank_and_trains_masks_alone(hard, tmp_path):
    model, x = net(), torch.randn(4, 3, 8)
    mmpeft.attach(model, {"*.out": mmpeft.XPEFT(adapters=12, size=4, hard=hard, std=0.3)}, name="a", example=x)
    d = deltas(model)[0]
    assert sum(d._parameters[n].numel() for n in d.trained) == 2 * 12
    with torch.no_grad():
        d.a.copy_(torch.randn(12))
        d.b.copy_(torch.randn(12))
        a, b = d.a.softmax(-1), d.b.softmax(-1)
        if hard:
            a, b = (torch.zeros(12).index_fill(0, t.topk(3).indices, 1 / 3) for t in (d.a, d.b))
        with mmpeft.use(model, None):
            y = model[0].out(x)
        down, up = sum(w * t for w, t in zip(a, d.down, strict=True)), sum(w * t for w, t in zip(b, d.up, strict=True))
        assert close(model[0].out(x), y + F.linear(F.gelu(F.linear(y, down, d.down_bias)), up))
    target = torch.randn(4, 3, 8)
    losses = losses_on(model, x, target, lr=0.3, steps=40)
    assert min(losses) < losses[0] - 0.01
    mmpeft.save(model, tmp_path, name="a")
    other = net()
    mmpeft.load(other, tmp_path, check=False)
    with torch.no_grad():
        assert close(other(x), model(x)), "the bank follows from the seed"
