"""Adapters pruned to their most important part, and layers that train by importance (IST)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, fill
from test_choose import data, net
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError, NameNotFound, Unsupported


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 2, 3
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (2, 3)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


MAM = {"*.attn": mmpeft.Prefix(num_tokens=4), "*.mlp": mmpeft.AdaptFormer(size=5, scale=4.0)}


def mam(filled=True):
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(3, 4, 6)
    mmpeft.attach(model, MAM, name="a", example=x)
    if filled:
        fill(model, size=0.3)
    return model, x


def batches(model, x):
    return [lambda s=s: (model(x) * torch.randn(x.shape, generator=torch.Generator().manual_seed(s))).sum() for s in (1, 2)]


def test_u_mam_keeps_single_entries_by_first_order_importance():
    model, x = mam()
    params = [d._parameters[n] for d in deltas(model) for n in d.trained]
    grads = [torch.autograd.grad(loss(), params) for loss in batches(model, x)]
    scores = [sum((p.detach() * g[i]).abs() for g in grads) for i, p in enumerate(params)]
    values = [p.detach().clone() for p in params]
    n = round(0.25 * sum(p.numel() for p in params))
    least = torch.cat([s.flatten() for s in scores]).topk(n).values.min()
    mask = mmpeft.prune_entries(model, batches(model, x), keep=0.25, name="a")
    assert mask.count == n
    for p, s, before in zip(params, scores, values, strict=True):
        assert close(p, before * (s >= least), 1e-7)
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=0.1, weight_decay=0.1))
    for loss in batches(model, x):
        optimizer.zero_grad()
        loss().backward()
        mask()
        optimizer.step()
    assert all(bool((p[m == 0] == 0).all()) and not close(p, b, 1e-4) for p, m, b in zip(
        params, mask.masks.values(), [b * m for b, m in zip(values, mask.masks.values(), strict=True)], strict=True
    ) if bool(m.any()))  # fmt: skip


def test_s_mam_takes_whole_tokens_and_units_out_for_good(tmp_path):
    model, x = mam()
    found = {(d.site.path, n): d._parameters[n] for d in deltas(model) for n in d.trained}
    grads = [torch.autograd.grad(loss(), list(found.values())) for loss in batches(model, x)]
    s = {k: sum((p.detach() * g[i]).abs() for g in grads) for i, (k, p) in enumerate(found.items())}
    units = {}
    for i in "01":
        units[f"{i}.attn"] = s[f"{i}.attn", "K"].sum(1) + s[f"{i}.attn", "V"].sum(1)
        down, up = s[f"{i}.mlp", "down_weight"].sum(1) + s[f"{i}.mlp", "down_bias"], s[f"{i}.mlp", "up_weight"].sum(0)
        units[f"{i}.mlp"] = down + up
    least = torch.cat(list(units.values())).topk(9).values.min()
    kept = {p: (u >= least).nonzero().flatten() for p, u in units.items()}
    K = {p: found[p, "K"].detach().clone() for p in ("0.attn", "1.attn")}
    counts = mmpeft.prune_units(model, batches(model, x), keep=0.5, name="a")
    assert {n.rpartition(".")[0]: c for n, c in counts.items()} == {p: len(i) for p, i in kept.items()}
    for d in deltas(model):
        index = kept[d.site.path]
        if isinstance(d.method, mmpeft.Prefix):
            assert d.method.num_tokens == len(index) and torch.equal(d.K, K[d.site.path][index])
        else:
            assert d.method.size == len(index) == d.down_weight.shape[0] == d.up_weight.shape[1]
    y = model(x).detach()
    mmpeft.save(model, tmp_path, name="a")
    other, _ = mam()
    mmpeft.detach(other)
    mmpeft.load(other, tmp_path, check=False)
    assert close(other(x), y, 1e-6)


def test_s_bitfit_is_whole_bias_vectors_by_importance():
    model, (x, y) = net(), data()
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), [model[0].bias, model[2].bias])
    scores = [float((b * g).abs().mean().detach()) for b, g in zip((model[0].bias, model[2].bias), grads, strict=True)]
    plan = mmpeft.place(model, {"{0,2}": mmpeft.BitFit()}, [lambda: F.cross_entropy(model(x), y)], share=0.5)
    assert [r.match for r in plan.rules] == [("0.bias", "2.bias")[scores.index(max(scores))]]
    mmpeft.attach(model, plan, name="a", example=x)
    assert mmpeft.inspect(model).trainable == (9, 3)[scores.index(max(scores))]


def test_pruning_refuses_what_has_no_units_and_shares_out_of_range():
    model, x = mam()
    with pytest.raises(ConfigError, match="keep 0"):
        mmpeft.prune_units(model, batches(model, x), keep=0, name="a")
    model = net()
    mmpeft.attach(model, {"0": mmpeft.KronA()}, name="a", example=torch.randn(3, 6))
    with pytest.raises(Unsupported, match="krona at 0.weight has no units"):
        mmpeft.prune_units(model, [lambda: model(torch.randn(3, 6)).sum()], keep=0.5, name="a")


# --- layers
# ------------------------------------------------------------------------------------------------------------


def layered(method=None):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))})
    model.forward = lambda x: model["layers"](x)
    x = torch.randn(5, 6)
    mmpeft.attach(model, {"layers.*.0": method or mmpeft.LoRA(rank=2)}, name="a", example=x)
    fill(model)
    return model, x


def test_ist_trains_the_drawn_layers_only_and_learns_from_suppressions():
    model, x = layered()
    sampler = mmpeft.LayerSampler(model, active=2, suppressed=1, trials=2, lr=5.0, name="a")
    target = torch.zeros(5, 6)
    loss = lambda: (model(x) - target).square().mean()  # noqa: E731
    chosen = sampler.draw()
    assert len(chosen) == 2
    loss().backward()
    with_gradient = {int(d.site.path.split(".")[1]) for d in deltas(model) if d.A.grad is not None}
    assert with_gradient == set(chosen)
    # The update by hand: the same draws, suppressed one by one.
    twin = torch.Generator()
    twin.set_state(sampler.generator.get_state())
    picks = [torch.multinomial(torch.full((4,), 0.5), 1, generator=twin).tolist() for _ in range(2)]
    full, whole = loss().item(), [d.B.detach().clone() for d in deltas(model)]
    rewards = []
    for pick in picks:
        with sampler.suppress(pick), torch.no_grad():
            d = deltas(model)[pick[0]]
            W = model["layers"][pick[0]][0]._parameters["weight"]
            assert close(model["layers"][pick[0]][0].weight, W + 0.25 * whole[pick[0]] @ d.A, 1e-6)
            rewards.append(math.exp(-loss().item()))
    assert loss().item() == full, "suppression ends with its block"
    expected = torch.zeros(4)
    for pick, reward in zip(picks, rewards, strict=True):
        expected[pick] -= 5.0 * (reward - sum(rewards) / 2) * 0.25
    assert close(sampler.update(loss), expected, 1e-6)
    sampler.release()
    assert all(d.A.requires_grad for d in deltas(model))


def test_ist_finds_the_layer_that_matters():
    model, x = layered()
    with torch.no_grad():
        target = model(x)  # every suppression hurts, that of the strongest layer most
        for i, d in enumerate(deltas(model)):
            d.B.mul_(3.0 if i == 2 else 0.02)
        target = model(x)
    sampler = mmpeft.LayerSampler(model, active=1, suppressed=1, trials=4, lr=20.0, factor=0.0, name="a")
    for _ in range(60):
        sampler.update(lambda: (model(x) - target).square().mean())
    assert sampler.importance.argmax() == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mmpeft.LayerSampler(layered()[0], active=5, name="a"), ConfigError, "4 layers, active 5"),
        (lambda: mmpeft.LayerSampler(layered()[0], active=1, trials=1, name="a"), ConfigError, "trials 1"),
        (lambda: mmpeft.LayerSampler(layered()[0], active=1, name="b"), NameNotFound, "no adapter 'b'"),
    ],
)
def test_ist_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
