"""DoRA runs factored: the norm from rank-wide products equals that of the formed matrix, and is formed once a step."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.adapters.methods.lora import NORMS
from mmpeft.adapters.state import slots
from mmpeft.kernels import dispatch, dora


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(10, 24), (1, 3), (4, 7, 5)])
def test_norm_of_the_formed_matrix(dtype, shape, device, monkeypatch):
    monkeypatch.setattr(dora, "BLOCK_ROWS", 3)  # a half precision W goes through in several blocks
    *stack, out, into = shape
    W = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    A, B = (torch.randn(*stack, *s, dtype=wide).to(device) for s in ((2, into), (out, 2)))
    want = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=-1)
    got = dora.row_norm(W, A, B, 0.7)
    assert got.dtype == wide
    split = device == "cuda" and dtype == torch.bfloat16 and not stack  # A as two bf16 parts has 16 binary digits, not 24
    rtol = 3e-5 if split else 1e-5 if wide == torch.float32 else 1e-12
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)


def test_the_split_of_a_factor_loses_nothing_that_matters():
    """What a GPU does: two half precision products with fp32 sums instead of widening W."""
    A = torch.randn(16, 300)
    high, low = dora.split(A, torch.bfloat16)
    assert ((high.float() + low.float() - A).abs() <= 2**-16 * A.abs()).all()
    W = torch.randn(40, 300).bfloat16()
    both = W.float() @ torch.cat([high, low]).float().mT
    exact = W.double() @ A.double().mT
    got = both[:, :16] + both[:, 16:]
    assert (got - exact).norm() < 1e-5 * exact.norm() < (W.float() @ high.float().mT - exact).norm()


def build(device, method=None, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6)).double().to(device)
    x = torch.randn(3, 5, 12, dtype=torch.float64).to(device)
    mmpeft.attach(model, {"{0,2}": method or mmpeft.DoRA(rank=3, alpha=6)}, name="a", example=x)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape).to(p) if p.requires_grad else 0
    return model, x


def pieces(model):
    return [(owner, delta) for _, owner, slot in slots(model) for _, delta in slot.deltas()]


def plainly(model, x):
    """W' = m (W + s B A) / ||W + s B A||, the norm detached, with nothing factored: what both peers compute."""
    for i, (owner, d) in zip((0, 2), pieces(model), strict=True):
        W = owner._parameters["weight"] + d.method.scale * (d.B @ d.A)
        W = d.m.unsqueeze(1) * W / W.detach().norm(dim=1, keepdim=True)
        x = nn.functional.linear(x, W, owner.bias)
        x = torch.tanh(x) if i == 0 else x
    return x


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("start", ["default", "pissa"])
def test_factored_equals_the_formed_weight(backend, start, device):
    model, x = build(device, mmpeft.DoRA(rank=3, alpha=6, init_from=start))
    x.requires_grad_()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    if start == "default":
        want = plainly(model, x)
        wanted = torch.autograd.grad(want.square().sum(), inputs)
    else:
        want, wanted = nn.functional.linear(torch.tanh(nn.functional.linear(x, model[0].weight, model[0].bias)),
                                            model[2].weight, model[2].bias), None  # fmt: skip
    with dispatch.backend(backend):
        y = model(x)
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
        for a, b in zip(torch.autograd.grad(y.square().sum(), inputs), wanted or (), strict=False):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def formed(run):
    before = NORMS.formed
    run()
    return NORMS.formed - before


def test_once_a_step(device):
    model, x = build(device)
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-2))

    def accumulate():
        for _ in range(3):
            checkpoint(model, x, use_reentrant=False).square().sum().backward()
        with torch.no_grad():
            model(x)

    assert formed(accumulate) == 2  # two sites
    assert formed(accumulate) == 0
    optimizer.step()
    assert formed(accumulate) == 2
    want = plainly(model, x)
    torch.testing.assert_close(model(x), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["A", "B", "W", "copy", "pickle", "other weight"])
def test_a_change_is_seen(change, device):
    model, x = build(device)
    model(x)
    owner, delta = pieces(model)[0]
    with torch.no_grad():
        if change in ("A", "B"):
            getattr(delta, change).mul_(1.5)
        elif change == "W":
            owner._parameters["weight"].mul_(0.5)
        elif change == "other weight":
            owner._parameters["weight"] = nn.Parameter(owner._parameters["weight"] * 0.5, requires_grad=False)
    if change == "copy":
        model = copy.deepcopy(model)
    if change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for _, delta in pieces(model) if change in ("copy", "pickle") else ():
            delta.A.mul_(-2)
    torch.testing.assert_close(model(x), plainly(model, x), rtol=1e-6, atol=1e-6)


def test_inference_mode(device):
    model, x = build(device)
    with torch.inference_mode():
        a = model(x)
    torch.testing.assert_close(a.clone(), plainly(model, x))
    model(x).sum().backward()
