"""The ViT MLP's sweeps equal autograd in float64, whichever of fc1 and fc2 is adapted; the stack uses them."""

import pytest
import torch
from torch import nn

from mmpeft.kernels import dispatch, vit_sweep

pytestmark = pytest.mark.skipif(not dispatch.triton_installed(), reason="no Triton on this platform")


def gelu(u, kind):
    return u * torch.sigmoid(1.702 * u) if kind == "quick" else nn.functional.gelu(u, approximate=kind)


def padded(r):
    return -(-r // 16) * 16


def errors(device, T, F, r_up, r_down, kind, config, accumulate=False):
    """Largest relative error of du, dS, dB, dA against autograd; what lies beside them must stay."""
    torch.manual_seed(T + F)
    R_up, R_down = padded(r_up), padded(r_down)
    dg, u, S, dS_down, B = (
        torch.randn(*s, device=device) for s in ((T, F), (T, F), (T, R_up), (T, R_down + 5), (F, R_up + 3))
    )
    B = B[:, :R_up]
    B[:, r_up:] = 0
    buffer = torch.full((T, F + R_up + 4), 9.0, device=device)
    wide = buffer[:, : F + R_up]
    dB, dA = torch.randn(F * r_up, device=device), torch.randn(r_down * F, device=device)
    start = (dB.double(), dA.double()) if accumulate else (0.0, 0.0)
    v = u.double().requires_grad_()
    act = gelu(v, kind)
    (du,) = torch.autograd.grad(act, v, dg.double())
    want = {"du": du}
    up = down = None
    if r_up:
        up = vit_sweep.Up(S, B, dB, r_up, 0.5)
        want["dS"] = du @ B.double()
        want["dB"] = (0.5 * du.T @ S[:, :r_up].double()).flatten() + start[0]
    if r_down:
        down = vit_sweep.Down(dS_down, dA, r_down)
        want["dA"] = (dS_down[:, :r_down].double().T @ act.detach()).flatten() + start[1]
    vit_sweep.mlp_backward(dg, u, wide, kind, up, down, config, accumulate=accumulate)
    assert (buffer[:, F + R_up :] == 9).all()
    got = {"du": wide[:, :F], "dS": wide[:, F:], "dB": dB, "dA": dA}
    return {name: float((got[name].double() - w).norm() / w.norm()) for name, w in want.items()}


@pytest.mark.parametrize("kind", ["none", "tanh", "quick"])
@pytest.mark.parametrize(
    ("T", "F", "r_up", "r_down"), [(70, 300, 1, 3), (35, 129, 20, 16), (33, 64, 16, 0), (41, 70, 0, 3), (9, 40, 0, 0)]
)
def test_backward_in_one_sweep(device, kind, T, F, r_up, r_down):
    with dispatch.backend("triton"):
        for i, config in enumerate(vit_sweep.configs(r_up, r_down)):
            found = errors(device, T, F, r_up, r_down, kind, config, accumulate=bool(i % 2))
            assert max(found.values()) < 1e-5, found


def test_a_wrong_slope_is_seen(device, monkeypatch):
    """Another GELU's kernel differs by far more than the tolerance: the comparison can fail."""
    monkeypatch.setitem(vit_sweep.KINDS, "none", vit_sweep.KINDS["quick"])
    with dispatch.backend("triton"):
        found = errors(device, 70, 300, 3, 3, "none", vit_sweep.configs(3, 3)[0])
    assert min(found.values()) > 1e-3, found


def test_ranks_that_do_not_fit():
    assert vit_sweep.configs(33, 1) == [] and not vit_sweep.shrinks(48)
    assert vit_sweep.configs(1, 20) and vit_sweep.shrinks(32)


@pytest.mark.parametrize("kind", ["none", "tanh", "quick"])
@pytest.mark.parametrize(("T", "F", "R"), [(1, 40, 16), (37, 300, 16), (5, 257, 32)])
def test_gelu_and_shrink(device, kind, T, F, R):
    u, A = torch.randn(T, F, device=device) * 2, torch.randn(R, F + 3, device=device)[:, :F]
    buffer = torch.full((T, F + R + 4), 9.0, device=device)
    with dispatch.backend("triton"):
        S = vit_sweep.gelu_shrink(u, buffer[:, : F + R], A, kind)
    want = gelu(u.double(), kind)
    torch.testing.assert_close(buffer[:, :F].double(), want, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(S.double(), want @ A.double().T, rtol=1e-4, atol=1e-4)
    assert torch.equal(S, buffer[:, F : F + R]) and (buffer[:, F + R :] == 9).all()


MIXED = {  # every mixture of adapted and plain fc1, fc2, from block to block
    "blocks.0.mlp.fc1": 3, "blocks.1.mlp.fc1": 20, "blocks.1.mlp.fc2": 1, "blocks.2.mlp.fc2": 16, "blocks.3.attn.proj": 2,
}  # fmt: skip


@pytest.mark.parametrize("scales", [None, 0.7])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_stack_of_mixed_blocks(device, monkeypatch, scales, wrong):
    """Output and gradients equal timm's own autograd, with and without layer scales; a sweep that loses dB does not."""
    import io

    import mmpeft

    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24, num_heads=3, num_classes=5, init_values=scales
    ).to(device)
    mmpeft.attach(model, {k: mmpeft.LoRA(rank=r, alpha=2 * r) for k, r in MIXED.items()}, check=False)
    for p in model.parameters():
        p.data = 0.2 * torch.randn_like(p) + (1.0 if p.ndim == 1 else 0.0)
    x = torch.randn(3, 3, 32, 32, device=device, requires_grad=True)
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
    want = torch.autograd.grad(model(x).square().sum(), inputs)
    sweep, calls = vit_sweep.mlp_backward, []

    def counted(*args, **options):
        sweep(*args, **options)
        calls.append(args[4])
        if wrong and args[4] is not None:
            args[4].dB.zero_()

    monkeypatch.setattr(vit_sweep, "mlp_backward", counted)
    with dispatch.backend("triton"):
        compiled = mmpeft.compile(model, towers=False, out=io.StringIO())
        got = torch.autograd.grad(model(x).square().sum(), inputs)
    assert compiled.stacks and len(calls) == 4 and sum(up is not None for up in calls) == 2
    far = [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    assert sum(f > 5e-4 for f in far) == (2 if wrong else 0), far
