"""Laplace-LoRA against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from cases import close, deltas, fill
from torch import nn

import mmpeft
from mmpeft.adapters.selection.laplace import Laplace
from mmpeft.errors import ConfigError


def linear_in_its_numbers():
    """LoRA-FA is linear in B: Bayesian linear regression has the exact answer."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 3)).double(), torch.randn(20, 5).double()
    mmpeft.attach(model, {"0": mmpeft.LoRAFA(rank=2)}, name="a", example=x)
    fill(model)
    d = deltas(model)[0]
    features = x @ d.A.T  # [B, 2]
    J = torch.einsum("br,co->bcor", features, torch.eye(3).double()).reshape(20, 3, 6)
    return model, x, d, J.detach()


def test_regression_is_exact():
    model, x, d, J = linear_in_its_numbers()
    prior, noise = 0.7, 0.3
    y = model(x).detach() + 0.1
    posterior = Laplace(model, model, structure="full", likelihood="regression", prior_precision=prior, noise=noise)
    posterior.fit([(x[:12], y[:12]), (x[12:], y[12:])])
    flat = J.flatten(0, 1)
    precision = flat.T @ flat / noise**2 + prior * torch.eye(6).double()
    mean, covariance = posterior.predict(x[:4])
    assert close(mean, model(x[:4]).detach(), 1e-12)
    assert close(covariance, J[:4] @ torch.linalg.inv(precision) @ J[:4].mT, 1e-10)
    residual = (model(x) - y).detach()
    likelihood = torch.distributions.Normal(torch.zeros(()).double(), noise).log_prob(residual).sum()
    theta = d.B.detach().flatten()
    prior_density = 0.5 * (6 * math.log(prior / (2 * math.pi)) - prior * theta @ theta)
    expected = likelihood + prior_density + 0.5 * (6 * math.log(2 * math.pi) - torch.logdet(precision))
    assert posterior.log_evidence() == pytest.approx(float(expected), rel=1e-9)
    best = posterior.tune_prior()
    assert all(posterior.log_evidence(best) >= posterior.log_evidence(best * k) for k in (0.5, 2))


def test_classification_uses_the_gauss_newton_matrix():
    model, x, d, J = linear_in_its_numbers()
    labels = torch.arange(20) % 3
    p = model(x).detach().softmax(-1)
    L = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    H = (J.mT @ L @ J).sum(0)
    whole = Laplace(model, model, structure="full", prior_precision=0.5)
    whole.fit([(x, labels)])
    found = whole.vectors[0] @ torch.diag(whole.values[0]) @ whole.vectors[0].T
    assert close(found, H, 1e-10)
    assert whole.log_likelihood == pytest.approx(float(p.log()[torch.arange(20), labels].sum()), rel=1e-10)
    diagonal = Laplace(model, model, structure="diag", prior_precision=0.5)
    diagonal.fit([(x, labels)])
    assert close(diagonal.values[0], H.diagonal(), 1e-10)
    _, covariance = diagonal.predict(x[:2])
    assert close(covariance, J[:2] / (H.diagonal() + 0.5) @ J[:2].mT, 1e-10)


def test_blocks_are_tensors_and_uncertainty_grows_away_from_the_data():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(30, 4)
    labels = (x[:, 0] > 0).long()
    mmpeft.attach(model, {"{0,2}": mmpeft.LoRA(rank=1)}, name="a", example=x)
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.1))
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    model.eval()
    posterior = Laplace(model, model)
    posterior.fit([(x, labels)])
    assert [len(v) for v in posterior.values] == [4, 6, 6, 2]
    posterior.tune_prior()
    near, far = posterior.predict(x)[1], posterior.predict(20 * x)[1]
    assert far.diagonal(dim1=1, dim2=2).mean() > near.diagonal(dim1=1, dim2=2).mean()
    p, plain = posterior.probabilities(x), model(x).detach().softmax(-1)
    assert close(p.sum(1), torch.ones(30).double(), 1e-9)
    assert p.max(1).values.mean() < plain.max(1).values.mean(), "averaging over weights is less sure"
    last = Laplace(model, model, only=lambda site: site.path == "2")
    last.fit([(x, labels)])
    assert [len(v) for v in last.values] == [6, 2]


def test_bad_use_is_refused():
    model, x, *_ = linear_in_its_numbers()
    for options, message in (
        ({"structure": "kron"}, "full, blocks, diag"),
        ({"prior_precision": 0.0}, "prior_precision"),
        ({"only": lambda site: False}, "no trainable"),
    ):
        with pytest.raises(ConfigError, match=message):
            Laplace(model, model, **options)
    with pytest.raises(ConfigError, match="fit"):
        Laplace(model, model).predict(x)
    with pytest.raises(ConfigError, match="no batches"):
        Laplace(model, model).fit([])
