"""Laplace-LoRA against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from cases import close, deltas, fill
from torch import nn

import mmpeft
from mmpeft.adapters.selection import kfac
from mmpeft.adapters.selection.laplace import Laplace
from mmpeft.errors import ConfigError, Unsupported


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
    posterior = Laplace(model, model, structure="blocks")
    posterior.fit([(x, labels)])
    assert [len(v) for v in posterior.values] == [4, 6, 6, 2]
    posterior.tune_prior()
    near, far = posterior.predict(x)[1], posterior.predict(20 * x)[1]
    assert far.diagonal(dim1=1, dim2=2).mean() > near.diagonal(dim1=1, dim2=2).mean()
    p, plain = posterior.probabilities(x), model(x).detach().softmax(-1)
    assert close(p.sum(1), torch.ones(30).double(), 1e-9)
    assert p.max(1).values.mean() < plain.max(1).values.mean(), "averaging over weights is less sure"
    for structure in ("blocks", "kron"):
        last = Laplace(model, model, only=lambda site: site.path == "2", structure=structure)
        last.fit([(x, labels)])
        assert [len(v) for v in last.values] == [6, 2]


# --- Kronecker factors
# --------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Two layers around a mean over tokens, the first with roles: [B, T, 6] -> [B, 3]."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(6, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(torch.tanh(q * v + k).mean(1))


def tokens(plan, shape=(7, 5, 6)):
    torch.manual_seed(0)
    model, x = Tokens().double().eval(), torch.randn(shape).double()
    mmpeft.attach(model, plan, name="a", example=x)
    fill(model)
    return model, x, torch.arange(len(x)) % 3


PLANS = [
    {"{qkv,head}": mmpeft.LoRA(rank=2, alpha=3)},
    {"qkv[q,v]": mmpeft.LoRA(rank=2, alpha=3), "head": mmpeft.LoRAPlus(rank=1, rslora=True, alpha=2)},
    {"qkv": mmpeft.LoRA(rank=2, init_from="pissa"), "head": mmpeft.LoRAFA(rank=2, alpha=1)},
]


@pytest.mark.parametrize("plan", PLANS, ids=["whole", "roles", "kin"])
def test_sides_of_the_matrices_make_autograds_jacobian(plan):
    model, x, _ = tokens(plan)
    posterior = Laplace(model, model)
    f, expected = posterior.jacobian(x)
    y, seen = posterior._called(x)
    found = kfac.jacobians(posterior.matrices, y, seen)
    assert close(y.detach(), f, 1e-12)
    assert close(torch.cat([J.flatten(2) for J in found], 2), expected, 1e-10)


def test_sides_in_a_transformer_with_transposed_and_fused_weights():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=20)
    torch.manual_seed(0)
    model, ids = transformers.GPT2Model(config).double().eval(), torch.randint(0, 31, (3, 7))
    plan = {"h.*.attn.c_attn[q,v]": mmpeft.LoRA(rank=2, alpha=3), "h.*.mlp.c_fc": mmpeft.LoRA(rank=3)}
    mmpeft.attach(model, plan, name="a", example={"input_ids": ids})
    fill(model)
    posterior = Laplace(model, lambda batch: model(batch).last_hidden_state[:, -1, :4])
    _, expected = posterior.jacobian(ids)
    found = kfac.jacobians(posterior.matrices, *posterior._called(ids))
    assert close(torch.cat([J.flatten(2) for J in found], 2), expected, 1e-9)
    posterior.fit([(ids, torch.tensor([0, 1, 2]))])
    assert close(posterior.probabilities(ids, samples=50).sum(1), torch.ones(3).double(), 1e-9)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_whole_kronecker_factors_by_their_definition(likelihood):
    """(sum over samples and outputs of u u^T) (x) (sum over samples of v v^T) / samples, everything dense."""
    model, x, d, J = linear_in_its_numbers()
    targets = torch.arange(20) % 3 if likelihood == "classification" else model(x).detach() + 0.1
    posterior = Laplace(model, model, kron_rank=None, likelihood=likelihood, prior_precision=0.6, noise=0.5)
    posterior.fit([(x[:9], targets[:9]), (x[9:], targets[9:])])
    p = model(x).detach().softmax(-1)
    L = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    S = L.sum(0) if likelihood == "classification" else 20 * torch.eye(3).double() / 0.5**2
    features = (x @ d.A.T).detach()
    H = torch.kron(S, features.T @ features) / 20
    precision = H + 0.6 * torch.eye(6).double()
    _, covariance = posterior.predict(x[:4])
    assert close(covariance, J[:4] @ torch.linalg.inv(precision) @ J[:4].mT, 1e-10)
    theta = d.B.detach().flatten()
    expected = posterior.log_likelihood - 0.5 * (0.6 * theta @ theta + torch.logdet(precision) - 6 * math.log(0.6))
    assert posterior.log_evidence() == pytest.approx(float(expected), rel=1e-10)
    best = posterior.tune_prior()
    assert all(posterior.log_evidence(best) >= posterior.log_evidence(best * k) for k in (0.5, 2))
    assert close(posterior.probabilities(x).sum(1), torch.ones(20).double(), 1e-9)


@pytest.mark.parametrize("plan", PLANS, ids=["whole", "roles", "kin"])
def test_low_rank_factors_of_full_rank_are_the_dense_ones(plan):
    model, x, y = tokens(plan)
    batches = [(x[:3], y[:3]), (x[3:5], y[3:5]), (x[5:], y[5:])]
    dense, low = (Laplace(model, model, kron_rank=k, prior_precision=0.3) for k in (None, 12))
    for posterior in (dense, low):
        posterior.fit(batches)
    assert close(low.predict(x)[1], dense.predict(x)[1], 1e-8)
    assert low.log_evidence() == pytest.approx(dense.log_evidence(), rel=1e-8)
    assert low.tune_prior() == dense.tune_prior()
    assert close(low.probabilities(x, samples=50), dense.probabilities(x, samples=50), 1e-7)
    low.fit(batches)  # a second fit starts anew
    assert low.log_evidence() == pytest.approx(dense.log_evidence(), rel=1e-8)


def test_a_small_rank_is_enough_where_inputs_have_no_more_and_the_leading_part_where_they_do():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 3)).double().eval()
    plane = torch.randn(4, 30).double()
    x, y = torch.randn(40, 4).double() @ plane, torch.arange(40) % 3
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=2)}, name="a", example=x)
    fill(model)
    dense, exact, cut = (Laplace(model, model, kron_rank=k, prior_precision=0.2) for k in (None, 4, 2))
    for posterior in (dense, exact, cut):
        posterior.fit([(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)])
    probe = torch.randn(5, 30).double()
    assert close(exact.predict(probe)[1], dense.predict(probe)[1], 1e-8)
    full, part = (p.predict(x)[1].diagonal(dim1=1, dim2=2) for p in (dense, cut))
    assert bool((part >= full - 1e-12).all()) and float(part.sum()) > 1.01 * float(
        full.sum()
    )  # less data seen, less sure
    # One batch of 40 is cut once, and by Eckart and Young its best two directions are those of the inputs.
    once = Laplace(model, model, kron_rank=2)
    once.fit([(x, y)])
    A = next(m for m in once.matrices if m.name == "A")
    assert close(A.columns.eigen()[0].sort().values, torch.linalg.svdvals(x).square()[:2].flip(0), 1e-8)


def test_one_sample_and_one_output_have_a_kronecker_product_exactly():
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 1)).double().eval(), torch.randn(1, 9).double()
    mmpeft.attach(model, {"{0,2}": mmpeft.LoRA(rank=1, alpha=2)}, name="a", example=torch.randn(2, 9).double())
    fill(model)
    options = {"likelihood": "regression", "prior_precision": 0.3}
    kron, exact = Laplace(model, model, kron_rank=1, **options), Laplace(model, model, structure="blocks", **options)
    for posterior in (kron, exact):
        posterior.fit([(x, torch.zeros(1, 1))])
    probe = torch.randn(4, 9).double()
    assert close(kron.predict(probe)[1], exact.predict(probe)[1], 1e-10)
    assert kron.log_evidence() == pytest.approx(exact.log_evidence(), rel=1e-10)


def test_the_papers_width_and_rank_fit():
    """4096 wide, rank 8: exact blocks of 32,768 numbers would be 8 GiB each; here a root of 4096 x 10."""
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(4096, 4096), nn.Tanh(), nn.Linear(4096, 2)).eval(), torch.randn(4, 3, 4096)
    mmpeft.attach(model, {"0": mmpeft.LoRA(rank=8)}, name="a", example=x)
    fill(model, size=0.02)
    forward = lambda batch: model(batch).mean(1)  # noqa: E731
    with pytest.raises(ConfigError, match="32768 numbers.*structure='kron'"):
        Laplace(model, forward, structure="blocks")
    posterior = Laplace(model, forward, name="a")
    posterior.fit([(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([1, 0]))])
    assert [tuple(m.values.shape) for m in posterior.matrices] == [(8, 10), (10, 8)]
    assert posterior.tune_prior() > 0
    p = posterior.probabilities(x, samples=100)
    assert p.shape == (4, 2) and bool(torch.isfinite(p).all())


def test_what_has_no_kronecker_factors_is_refused():
    model, x, y = tokens({"qkv": mmpeft.DoRA(rank=2)})
    with pytest.raises(Unsupported, match="qkv.weight: A of DoRA has no Kronecker factors.*'blocks'"):
        Laplace(model, model)
    model, x, y = tokens({"head": mmpeft.LoRA(rank=2), "head.bias": mmpeft.BitFit()})
    with pytest.raises(Unsupported, match="head.bias: delta of BitFit"):
        Laplace(model, model)
    Laplace(model, model, only=lambda site: site.tensor == "weight").fit([(x, y)])
    with pytest.raises(ConfigError, match="10 rows of inputs for 2 samples"):
        flat = Laplace(model, lambda b: model(b.flatten(0, 1)[:, None]).unflatten(0, (2, 5)).sum(1), name="a",
                       only=lambda site: site.tensor == "weight")  # fmt: skip
        flat.fit([(x[:2], y[:2])])
        flat.predict(x[:2])
    model, x, y = tokens({"head": mmpeft.LoRA(rank=2)})
    with mmpeft.use(model, {"a": 0.5}), pytest.raises(ConfigError, match="head.weight.A: the gradient is not that of"):
        Laplace(model, model).fit([(x, y)])
    with pytest.raises(ConfigError, match="never called"):
        Laplace(model, lambda b: b.mean(1) @ model.head.weight.new_ones(6, 3)).fit([(x, y)])


def test_bad_use_is_refused():
    model, x, *_ = linear_in_its_numbers()
    for options, message in (
        ({"structure": "kfac"}, "kron, full, blocks, diag"),
        ({"kron_rank": 0}, "kron_rank 0"),
        ({"prior_precision": 0.0}, "prior_precision"),
        ({"only": lambda site: False}, "no trainable"),
    ):
        with pytest.raises(ConfigError, match=message):
            Laplace(model, model, **options)
    with pytest.raises(ConfigError, match="fit"):
        Laplace(model, model).predict(x)
    with pytest.raises(ConfigError, match="no batches"):
        Laplace(model, model).fit([])
