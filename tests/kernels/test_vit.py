"""The written-out ViT blocks equal autograd through timm's, kernels and references alike, and `compile` uses them."""

import io

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.kernels import dispatch, fused_ops
from mmpeft.kernels.plain import Plain

timm = pytest.importorskip("timm")
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
PLANS = {
    "all": {"blocks.*.{attn,mlp}.{qkv,proj,fc1,fc2}": mmpeft.LoRA(rank=3, alpha=6)},
    "qv": {"blocks.*.attn.qkv[q,v]": mmpeft.LoRA(rank=2), "blocks.1.mlp.fc2": mmpeft.LoRA(rank=2)},
}


@pytest.mark.parametrize(("T", "H"), [(1, 50), (7, 64), (5, 129)])
@pytest.mark.parametrize("residual", [True, False])
def test_add_layernorm_and_backward(backend, device, T, H, residual):
    x, w, b, dn, g = (torch.randn(*s, device=device) for s in ((T, H), (H,), (H,), (T, H), (T, H)))
    delta = torch.randn(T, H, device=device) if residual else None
    buffer = torch.full((T, H + 5), 9.0, device=device)
    total, mean, rstd = fused_ops.add_layernorm(x, delta, w, b, 1e-6, buffer[:, :H])
    wide = (x if delta is None else x + delta).double().requires_grad_()
    want = nn.functional.layer_norm(wide, (H,), w.double(), b.double(), 1e-6)
    torch.testing.assert_close(total.double(), wide.detach(), **CLOSE)
    torch.testing.assert_close(buffer[:, :H].double(), want.detach(), **CLOSE)
    want.backward(dn.double())
    out, again = torch.full((T, H + 3), 9.0, device=device), torch.empty(T, H, device=device)
    fused_ops.layernorm_backward(dn, total, mean, rstd, w, b, g, out[:, :H], again)
    torch.testing.assert_close(out[:, :H].double(), wide.grad + g, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, buffer[:, :H], **CLOSE)
    assert (buffer[:, H:] == 9).all() and (out[:, H:] == 9).all()


@pytest.mark.parametrize("kind", ["none", "tanh", "quick"])
@pytest.mark.parametrize(("T", "F"), [(1, 8), (7, 37), (3, 1030)])
def test_gelu_and_backward(backend, device, kind, T, F):
    u, dg = torch.randn(T, F, device=device) * 3, torch.randn(T, F, device=device)
    wide = u.double().requires_grad_()
    want = wide * torch.sigmoid(1.702 * wide) if kind == "quick" else nn.functional.gelu(wide, approximate=kind)
    want.backward(dg.double())
    out = torch.full((T, F + 4), 9.0, device=device)
    fused_ops.gelu(u, out[:, :F], kind)
    torch.testing.assert_close(out[:, :F].double(), want.detach(), **CLOSE)
    du = torch.full((T, F + 2), 9.0, device=device)
    fused_ops.gelu_backward(dg, u, du[:, :F], dg, kind)
    torch.testing.assert_close(du[:, :F].double(), wide.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dg.double(), want.detach(), **CLOSE)
    assert (out[:, F:] == 9).all() and (du[:, F:] == 9).all()


@pytest.mark.parametrize("kind", ["none", "tanh", "quick"])
@pytest.mark.parametrize("bias", [True, False])
def test_plain_linears(backend, device, kind, bias):
    x = torch.randn(5, 12, device=device)
    weights = [torch.randn(n, 12, device=device) for n in (8, 4)]
    biases = [torch.randn(n, device=device) if bias else None for n in (8, 4)]
    plain = Plain(weights, biases)
    want = torch.cat([nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], 1)
    torch.testing.assert_close(plain.forward(x)[0], want, **CLOSE)
    torch.testing.assert_close(plain.gelu(x, kind), fused_ops.gelu_of(want, kind), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.backward(want, None, x, False), want @ torch.cat(weights), **CLOSE)
    assert Plain(weights[:1], biases[:1]).W is weights[0]  # one linear is used where it lies


def vit(plan, device, names=("a",), **more):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=5, **more)
    for p in model.parameters():
        p.data = 0.2 * torch.randn_like(p) + (1.0 if p.ndim == 1 else 0.0)
    x = torch.randn(3, 3, 32, 32).to(device)
    model = model.to(device)
    for name in names:
        mmpeft.attach(model, plan, name=name, check=False)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=generator).to(p)
    mmpeft.use(model, names[0])
    return model, x


def quiet(model):
    return mmpeft.compile(model, towers=False, out=io.StringIO())


def run(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y.detach(), [g for g in torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) if g is not None]


def same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-4)
    assert len(one[1]) > 4
    for a, b in zip(one[1], other[1], strict=True):
        assert (a - b).norm() <= 5e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("plan", PLANS)
def test_output_and_every_gradient(backend, device, plan):
    model, x = vit(PLANS[plan], device)
    with dispatch.backend("reference"):
        want = run(model, x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compiled = quiet(model)
    assert "on   blocks blocks" in str(compiled) and "2 fused ViT blocks" in str(compiled)
    same(run(model, x), want)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want[0], rtol=1e-4, atol=1e-4)
    assert compiled.stacks[0].calls == {"fused": 2, "own": 0}
    compiled.undo()
    with dispatch.backend("reference"):
        same(run(model, x), want)
    assert all(torch.equal(v, before[k]) and v.is_contiguous() for k, v in model.state_dict().items())


def test_switch_base_dropout_and_training(device):
    model, x = vit({k: mmpeft.LoRA(rank=3, dropout=0.3) for k in PLANS["all"]}, device, names="ab")
    with torch.no_grad():
        wanted = {}
        for use in ("a", "b", None):
            mmpeft.use(model, use)
            wanted[use] = model.eval()(x)
        mmpeft.use(model, "a")
        compiled = quiet(model)
        for use in ("b", None, "a"):
            mmpeft.use(model, use)
            torch.testing.assert_close(model(x), wanted[use], rtol=1e-4, atol=1e-4)
        assert compiled.stacks[0].calls == {"fused": 2, "own": 1}
    model.train()
    first = run(model, x)
    assert not torch.allclose(first[0], wanted["a"], atol=1e-3) and not torch.equal(run(model, x)[0], first[0])
    model.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    curve = []
    for _ in range(3):
        loss = model(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    assert curve[2] < curve[1] < curve[0]
    compiled.undo()
    with torch.no_grad():
        assert float(model(x).square().sum()) < curve[2]


def test_a_broken_backward_is_seen(device, monkeypatch):
    model, x = vit(PLANS["all"], device)
    want = run(model, x)
    whole = fused_ops.layernorm_backward
    monkeypatch.setattr(fused_ops, "layernorm_backward", lambda dn, x, m, r, w, b, g, out, n: whole(
        dn, x, m, r, w, b, torch.zeros_like(g), out, n))  # fmt: skip
    quiet(model)
    got = run(model, x)
    assert (got[1][0] - want[1][0]).norm() > 0.1 * want[1][0].norm()


@pytest.mark.parametrize(
    ("plan", "more", "why"),
    [
        (PLANS["all"], {"qk_norm": True}, "a parameter that a plain ViT block has not"),
        ({"blocks.*.attn.qkv": mmpeft.DoRA(rank=2)}, {}, "dora is not a plain"),
        ({"blocks.*.norm1": "full", "blocks.*.attn.qkv": mmpeft.LoRA(rank=2)}, {}, "full is not a plain"),
    ],
)
def test_what_does_not_fit_runs_as_before(plan, more, why, device):
    model, x = vit(plan, device, **more)
    want = run(model, x)
    compiled = quiet(model)
    assert why in str(compiled) and not compiled.stacks
    same(run(model, x), want)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("change", ["scaled", "gelu"])
def test_a_function_that_differs_is_refused(change, device):
    model, x = vit(PLANS["all"], device)
    if change == "scaled":
        model.blocks[1].ls2 = Twice()  # no parameter tells: only the comparison sees it
    else:
        model.blocks[1].mlp.act = nn.GELU(approximate="tanh")
    want = run(model, x)
    report = str(quiet(model))
    assert {"scaled": "differ from the stack's own", "gelu": "blocks that differ in"}[change] in report
    same(run(model, x), want)
