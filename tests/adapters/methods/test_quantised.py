"""Methods on a quantised grid: LoftQ, SVDQuant's split, QA-LoRA, PEQA, LR-QAT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, fill
from quantise_kit import net
from torch import nn

import mmpeft
from mmpeft.adapters.methods import quantised
from mmpeft.adapters.storage.integer import Int
from mmpeft.adapters.storage.packed_weight import PackedWeight
from mmpeft.adapters.storage.quantise import split
from mmpeft.errors import ConfigError


def test_loftq_alternates_and_beats_plain_rounding(tmp_path):
    model, x = net(), torch.randn(3, 16)
    W = model.up.weight.detach().clone()
    Q, product = None, torch.zeros_like(W)
    for _ in range(3):  # the definition, written out
        Q = PackedWeight.of(W - product, Int(4, 8)).dense()
        U, S, Vh = torch.linalg.svd(W - Q)
        product = U[:, :3] @ torch.diag(S[:3]) @ Vh[:3]
    mmpeft.loftq(model, {"up": mmpeft.LoRA(rank=3, alpha=6), "head": "full"}, Int(4, 8), "a", steps=3)
    assert close(model.up._parameters["weight"].dense(), Q, 1e-6) and close(model.up.weight, Q + product, 1e-5)
    plain = PackedWeight.of(W, Int(4, 8)).dense()
    assert (model.up.weight - W).norm() < 0.9 * (plain - W).norm()
    y = model(x)
    mmpeft.save(model, tmp_path)
    other = net()
    mmpeft.loftq(other, {"up": mmpeft.LoRA(rank=3, alpha=6)}, Int(4, 8), "b", steps=3)
    mmpeft.detach(other)
    mmpeft.load(other, tmp_path)
    assert close(other(x), y, 1e-6)


def test_svdquants_split_takes_the_leading_part_out_first():
    torch.manual_seed(0)
    W = torch.randn(24, 16) + 20 * torch.outer(torch.randn(24), torch.randn(16))
    Q, A, B = split(W, 2, Int(4, 8), start="svd")
    U, S, Vh = torch.linalg.svd(W)
    lead = U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]
    assert close(B @ A, lead, 1e-5) and close(Q.dense(), PackedWeight.of(W - lead, Int(4, 8)).dense(), 1e-4)
    assert (Q.dense() + B @ A - W).norm() < 0.2 * (PackedWeight.of(W, Int(4, 8)).dense() - W).norm()


def test_qalora_merges_into_the_zeros_without_touching_integers():
    model, x = net(), torch.randn(3, 16)
    mmpeft.quantise(model, "up", Int(4, 8, affine=True))
    mmpeft.attach(model, {"up": quantised.QALoRA(rank=2, alpha=6, group=8)}, name="a", example=x)
    fill(model)
    d, W = deltas(model)[0], model.up._parameters["weight"]
    pooled = model.norm(x).view(3, 2, 8).mean(-1)  # the paper's form: the adapter sees the mean of each group
    expected = F.linear(model.norm(x), W.dense(), model.up.bias) + 3 * pooled @ d.A.T @ d.B.T
    assert close(model.up(model.norm(x)), expected, 1e-5)
    y, codes, scale = model(x), W.packed["codes"].clone(), W.packed["scale"].clone()
    assert quantised.merge_qalora(model, "a") == ["up.weight"]
    assert isinstance(model.up.weight, PackedWeight) and close(model(x), y, 1e-5)
    assert torch.equal(model.up.weight.packed["codes"], codes) and torch.equal(model.up.weight.packed["scale"], scale)


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("group", [None, 8])
def test_peqa_trains_scales_of_fixed_integers(group, affine, tmp_path):
    model, x = net(), torch.randn(3, 16)
    with torch.no_grad():
        model.up.weight.add_(0.2)  # far from symmetric
    mmpeft.quantise(model, "up", Int(4, group, affine))
    base = model(x)
    groups = 1 if group is None else 2
    assert mmpeft.inspect(net(), {"up": quantised.PEQA(group=group)}).trainable == 24 * groups
    mmpeft.attach(model, {"up": quantised.PEQA(group=group)}, name="a", example=x)
    assert close(model(x), base, 1e-6)
    fill(model, size=0.01)
    W, d = model.up._parameters["weight"], deltas(model)[0]
    integers, s = W.scheme.integers(W.packed, W.shape), W.packed["scale"]
    # The paper's formula: integers and zero points, here -zero / s in units of the grid, stay, scales move.
    z = -W.packed["zero"] / s if affine else torch.zeros_like(s)
    assert close(W.dense(), (s.unsqueeze(-1) * (integers - z.unsqueeze(-1))).reshape(24, 16), 1e-6)
    expected = ((s + d.ds).unsqueeze(-1) * (integers - z.unsqueeze(-1))).reshape(24, 16)
    assert close(model.up.weight, expected, 1e-6) and not close(expected, W.dense(), 1e-2)
    G = torch.randn(24, 16)
    (found,) = torch.autograd.grad((model.up.weight * G).sum(), d.ds)
    assert close(found, (G.view(24, groups, -1) * (integers - z.unsqueeze(-1))).sum(-1), 1e-3)
    y = model(x)
    mmpeft.save(model, tmp_path)
    mmpeft.detach(model)
    mmpeft.load(model, tmp_path)
    assert close(model(x), y, 1e-6)
    with pytest.raises(ConfigError, match="the base is dense"):
        mmpeft.attach(net(), {"up": quantised.PEQA(group=group)}, example=x)


@pytest.mark.parametrize("affine", [False, True])
def test_peqa_on_rows_of_equal_numbers(affine):
    """They have no scale: codes are 0 whatever it is, and the numbers' own size stands for it."""
    model, x = net(), torch.randn(3, 16)
    with torch.no_grad():
        model.up.weight[0], model.up.weight[1] = -0.4, 0
    mmpeft.quantise(model, "up", Int(4, affine=affine))
    mmpeft.attach(model, {"up": quantised.PEQA()}, name="a", example=x)
    with torch.no_grad():
        deltas(model)[0].ds.fill_(0.1)
    expected = -0.5 if affine else -0.4 * (1 + 0.1 / (0.4 / 7))  # one step of 0.4 below zero; seven steps of 0.4 / 7
    assert close(model.up.weight[0], torch.full((16,), expected), 1e-5) and not model.up.weight[1].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lrqat_is_fake_quantisation_with_a_straight_through_gradient(bits):
    model, x = net().double(), torch.randn(3, 16).double()
    mmpeft.attach(model, {"up": quantised.LRQAT(rank=2, alpha=4, bits=bits)}, name="a", example=x)
    W, d = model.up._parameters["weight"], deltas(model)[0]
    assert mmpeft.inspect(net(), {"up": quantised.LRQAT(rank=2)}).trainable == 2 * (16 + 24) + 24
    s0 = W.abs().amax(1) / (2 ** (bits - 1) - 1)
    assert close(model.up.weight, (W / s0[:, None]).round() * s0[:, None], 1e-12)
    fill(model, size=0.5)
    half = 2 ** (bits - 1)
    unrounded = W / s0[:, None] + 2 * d.B @ d.A
    grid = unrounded.round().clamp(-half, half - 1)
    assert close(model.up.weight.detach(), d.s[:, None] * grid, 1e-12)
    inside = (unrounded > -half) & (unrounded < half - 1)
    G = torch.randn(24, 16).double()
    gA, gB, gs = torch.autograd.grad((model.up.weight * G).sum(), [d.A, d.B, d.s])
    M = G * d.s[:, None] * inside
    assert close(gA, 2 * d.B.T @ M, 1e-9) and close(gB, 2 * M @ d.A.T, 1e-9) and close(gs, (G * grid).sum(1), 1e-9)
    packed = d.method.integers(W, d)
    assert close(packed.dense(), model.up.weight, 1e-5) and packed.scheme.bits == bits


def test_lrqat_learns_a_low_bit_weight():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(128, 16)
    with torch.no_grad():
        target = model(x)
    mmpeft.attach(model, {"0": quantised.LRQAT(rank=4, bits=2)}, name="a", example=x)
    optimizer = torch.optim.Adam(mmpeft.parameter_groups(model, lr=0.02))
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert min(losses) < 0.65 * losses[0]
