"""Each memory-bound kernel equals its plain-torch reference at odd sizes and leaves its buffers' padding alone."""

import pytest
import torch

from mmpeft.kernels import dispatch, fused_ops, reference
from mmpeft.kernels.adamw import FlatAdamW, Slot
from mmpeft.kernels.xent import head_loss, softmax_gradient_

CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def padded(rows, cols, device, extra=5):
    buffer = torch.full((rows, cols + extra), 9.0, device=device)
    return buffer, buffer[:, :cols]


@pytest.mark.parametrize("T,H", [(1, 50), (7, 64), (5, 129)])
@pytest.mark.parametrize("residual", [True, False])
def test_add_rmsnorm_and_backward(backend, device, T, H, residual):
    x, w, dn, g = (torch.randn(*s, device=device) for s in ((T, H), (H,), (T, H), (T, H)))
    delta = torch.randn(T, H, device=device) if residual else None
    buffer, n = padded(T, H, device)
    total, rstd = fused_ops.add_rmsnorm(x, delta, w, 1e-5, n)
    wide = (x if delta is None else x + delta).double().requires_grad_()
    _, want = reference.add_rmsnorm(wide, None, w.double(), 1e-5)
    torch.testing.assert_close(total.double(), wide.detach(), **CLOSE)
    torch.testing.assert_close(n.double(), want.detach(), **CLOSE)
    assert (buffer[:, H:] == 9).all()

    want.backward(dn.double())
    out_buffer, out = padded(T, H, device)
    again = torch.empty(T, H, device=device)
    fused_ops.rmsnorm_backward(dn, total, rstd, w, g if residual else None, out, again)
    torch.testing.assert_close(out.double(), wide.grad + (g if residual else 0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, n, **CLOSE)
    assert (out_buffer[:, H:] == 9).all()


@pytest.mark.parametrize("B,S,HQ,HK,D", [(1, 1, 1, 1, 8), (2, 5, 3, 1, 8), (2, 3, 4, 2, 16)])
def test_rope_turns_and_turns_back(backend, device, B, S, HQ, HK, D):
    qkv = torch.randn(B * S, (HQ + 2 * HK) * D, device=device)
    angles = torch.randn(S, D // 2, device=device)
    heads = qkv.view(B, S, -1, D)
    q, k, v = heads.split([HQ, HK, HK], 2)
    want = reference.rope(
        heads[:, :, : HQ + HK].reshape(B * S, -1, D), angles.cos().repeat(B, 1), angles.sin().repeat(B, 1)
    )
    buffer, out = padded(B * S, qkv.shape[1], device)
    fused_ops.rope(q, k, v, out, angles.cos(), angles.sin())
    torch.testing.assert_close(out[:, : (HQ + HK) * D], want.flatten(1), **CLOSE)
    assert torch.equal(out[:, (HQ + HK) * D :], v.reshape(B * S, -1)) and (buffer[:, qkv.shape[1] :] == 9).all()
    turned = out.clone().view(B, S, -1, D)
    q, k, _ = turned.split([HQ, HK, HK], 2)
    fused_ops.rope(q, k, None, turned.view(B * S, -1), angles.cos(), angles.sin(), inverse=True)  # in place
    torch.testing.assert_close(turned.view(B * S, -1), qkv, **CLOSE)


@pytest.mark.parametrize("T,F,R", [(1, 8, 16), (7, 37, 16), (33, 1030, 48)])
def test_swiglu_with_the_next_shrink(backend, device, T, F, R):
    gate_up, A = torch.randn(T, 2 * F, device=device), torch.randn(R, F, device=device)
    buffer, act = padded(T, F + R, device)
    S = fused_ops.swiglu_shrink(gate_up, act, A)
    want = reference.swiglu(gate_up.double())
    torch.testing.assert_close(act[:, :F].double(), want, **CLOSE)
    torch.testing.assert_close(S.double(), want @ A.double().mT, rtol=1e-4, atol=1e-4)
    assert torch.equal(act[:, F:], S) and S.is_contiguous() and (buffer[:, F + R :] == 9).all()


@pytest.mark.parametrize("T,F", [(1, 8), (7, 37), (3, 1030)])
def test_swiglu_backward(backend, device, T, F):
    gate_up = torch.randn(T, 2 * F, device=device)
    dh = torch.randn(T, F, device=device)
    wide = gate_up.double().requires_grad_()
    want = reference.swiglu(wide)
    want.backward(dh.double())
    _, dgu = padded(T, 2 * F, device)
    fused_ops.swiglu_backward(dh, gate_up, dgu, dh)  # the gradient's memory takes the rebuilt activation
    torch.testing.assert_close(dgu.double(), wide.grad, **CLOSE)
    torch.testing.assert_close(dh.double(), want.detach(), **CLOSE)


@pytest.mark.parametrize(
    "T,F,ranks", [(70, 37, (3, 5, 2)), (5, 300, (16, 16, 16)), (130, 260, (0, 17, 20)), (3, 8, (1, 32, 0))]
)
def test_mlp_backward_in_one_sweep(device, T, F, ranks):
    """Equals SwiGLU's backward and its four products, adds to what is there, and does not change from run to run."""
    pytest.importorskip("triton")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter has no bf16 product
    from mmpeft.kernels import sweep

    torch.manual_seed(0)
    r_gate, r_up, r_down = ranks
    R, R_down = (max(16, -(-n // 16) * 16) for n in (r_gate + r_up, r_down))

    def make(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    gate_up, dh, S, g = make(T, 2 * F), make(T, F), make(T, R), make(T, 9 + R_down)
    packed = torch.zeros(2 * F, R + 7, device=device, dtype=dtype)
    B = packed[:, 7:]
    B[:F, :r_gate], B[F:, r_gate : r_gate + r_up] = make(F, r_gate), make(F, r_up)
    wide = gate_up.double().requires_grad_()
    h = reference.swiglu(wide)
    (want,) = torch.autograd.grad(h, wide, dh.double())
    S64, dS64 = S.double(), g[:, 9 : 9 + r_down].double()
    expected = [
        1 + 0.5 * want[:, :F].mT @ S64[:, :r_gate],
        1 + 2.0 * want[:, F:].mT @ S64[:, r_gate : r_gate + r_up],
        1 + dS64.mT @ h.detach(),
    ]
    tight = 1e-5 if dtype == torch.float32 else 6e-3
    for config in sweep.configs(ranks):
        runs = []
        for _ in range(2):
            buffer = torch.full((T, 2 * F + R + 4), 9.0, device=device, dtype=dtype)
            dgu = buffer[:, : 2 * F + R]
            out = [torch.ones(*e.shape, device=device) for e in expected]
            sweep.mlp_backward(dh, gate_up, dgu, S, g[:, 9:], B, ranks, (0.5, 2.0), *out, config, accumulate=True)
            runs.append([buffer, *out])
        for got, exact in zip(
            [dgu[:, : 2 * F], dgu[:, 2 * F :], *out], [want, want @ B.double(), *expected], strict=True
        ):
            assert (got.double() - exact).norm() <= tight * exact.norm()
        assert (buffer[:, -4:] == 9).all()
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_chunks_fill_whole_waves():
    from mmpeft.kernels.sweep import _rows_of_a_chunk

    for T, F in ((8192, 8960), (8192, 2560), (4096, 11008), (100, 64), (1, 8)):
        blocks = -(-F // 256)
        rows = _rows_of_a_chunk(T, blocks, 32, 132)
        programs = blocks * -(-T // rows)
        assert rows % 32 == 0 and rows > 0
        if T > 1000:
            assert programs / (-(-programs // 132) * 132) > 0.9


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("V", [7, 4100])
def test_head_loss(backend, device, ignored, V):
    hidden, weight = torch.randn(10, 6, device=device), torch.randn(V, 6, device=device)
    labels = torch.randint(0, V, (10,), device=device)
    labels[{"none": [], "some": [0, 3, 9], "all": slice(None)}[ignored]] = -100
    scale = torch.tensor([0.25], device=device)
    loss, gradient = head_loss(hidden, weight, labels, scale, chunk_rows=4)
    wide = hidden.double().requires_grad_()
    want = reference.cross_entropy(wide @ weight.double().mT, labels) * 0.25
    want.backward()
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_cross_entropy_of_huge_and_minus_infinite_logits(backend, device):
    logits = torch.tensor([[1e4, -1e4, float("-inf"), 0.0], [3.0, 3.0, 3.0, float("-inf")]], device=device)
    losses = softmax_gradient_(logits, torch.tensor([0, 1], device=device), torch.ones(1, device=device))
    torch.testing.assert_close(losses, torch.tensor([1.0, 3.0], device=device).log())
    torch.testing.assert_close(logits[1], torch.tensor([1 / 3, 1 / 3 - 1, 1 / 3, 0.0], device=device))


def test_adamw_equals_torch_and_rewrites_the_copies(backend, device):
    torch.manual_seed(1)
    buffer = torch.zeros(40, 70, device=device)
    masters = [torch.nn.Parameter(torch.randn(*s, device=device)) for s in ((3, 50), (30, 3), (1, 1100))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in masters]
    wide = torch.zeros(1, 1100, device=device)
    slots = [
        Slot((3, 50), buffer[30:33, :50], weight_decay=0.1),
        Slot((30, 3), buffer[:30, 50:53], scale=2.0, lr_ratio=3.0),
        Slot((1, 1100), wide),
    ]
    ours = FlatAdamW(masters, slots, lr=0.01)
    groups = [
        {"params": [theirs[0]], "weight_decay": 0.1},
        {"params": [theirs[1]], "lr": 0.03},
        {"params": [theirs[2]]},
    ]
    torch_adamw = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    for _ in range(3):
        for g, p in zip(ours.grads, theirs, strict=True):
            p.grad = torch.randn(p.shape, device=device)
            g.copy_(p.grad)
        ours.step()
        torch_adamw.step()
    for a, b in zip(masters, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(buffer[:30, 50:53], 2 * masters[1].detach())
    torch.testing.assert_close(wide, masters[2].detach())
    assert buffer[:, 53:].abs().sum() == 0 and buffer[33:].abs().sum() == 0


def test_the_log_says_once_which_reference_runs(caplog):
    dispatch._say_once.cache_clear()
    with caplog.at_level("INFO", "mmpeft.kernels"):
        assert not dispatch.use_triton(torch.zeros(1)) and not dispatch.use_triton(torch.zeros(1))
    assert len([r for r in caplog.records if "plain-torch references run on cpu" in r.message]) == 1
