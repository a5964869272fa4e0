"""Every row of a batch under its own adapter equals a loop over the rows, kernels and reference alike."""

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.kernels import add_grouped, dispatch, grouped


def by_loop(y, x, A, B, index):
    out = y.clone()
    for b, i in enumerate(index.tolist()):
        if i < len(A):
            out[b] += x[b] @ A[i].mT @ B[i].mT
    return out


def make(N, T, n_in, out, n, r, device, dtype=torch.float32):
    g = torch.Generator().manual_seed(N + T + r)
    x, y = torch.randn(N, T, n_in, generator=g), torch.randn(N, T, out, generator=g)
    A, B = torch.randn(n, r, n_in, generator=g) / n_in**0.5, torch.randn(n, out, r, generator=g)
    index = torch.randint(0, n + 1, (N,), generator=g)
    return [t.to(device, dtype) for t in (y, x, A, B)] + [index.to(device)]


@pytest.mark.parametrize("r", [1, 3, 16, 40])
@pytest.mark.parametrize(("N", "T"), [(1, 1), (5, 1), (3, 17), (2, 70)])
def test_equals_a_loop(backend, device, N, T, r):
    y, x, A, B, index = make(N, T, 100, 130, 4, r, device)
    want = by_loop(y, x, A, B, index)
    torch.testing.assert_close(add_grouped(y, x, A, B, index), want, rtol=1e-5, atol=1e-5)


def test_only_the_base_and_rows_without_tokens(backend, device):
    y, x, A, B, _ = make(3, 4, 20, 9, 2, 3, device)
    base = torch.full((3,), 2, device=device)
    torch.testing.assert_close(add_grouped(y.clone(), x, A, B, base), y)
    assert add_grouped(y[:, :0], x[:, :0], A, B, base).shape == (3, 0, 9)


def test_two_and_four_axes_and_strided_inputs(backend, device):
    y, x, A, B, index = make(4, 6, 20, 9, 3, 2, device)
    want = by_loop(y, x, A, B, index)
    shaped = add_grouped(y.clone().view(4, 2, 3, 9), x.view(4, 2, 3, 20), A, B, index)
    torch.testing.assert_close(shaped.view(4, 6, 9), want)
    torch.testing.assert_close(add_grouped(y[:, 0].clone(), x[:, 0], A, B, index), want[:, 0])
    whole = torch.zeros(4, 6, 30, device=device)  # y is a slice of a wider tensor, x is transposed
    whole[..., 7:16] = y
    got = add_grouped(whole[..., 7:16], x.transpose(1, 2).contiguous().transpose(1, 2), A.mT.contiguous().mT, B, index)
    torch.testing.assert_close(got, want)
    assert not whole[..., :7].any() and not whole[..., 16:].any()


def test_gradients_reach_every_factor(device):
    y, x, A, B, index = (t.double().requires_grad_() if t.is_floating_point() else t for t in make(4, 3, 8, 5, 3, 2, device))
    with dispatch.backend("triton"):  # left to the reference, which autograd knows
        assert torch.autograd.gradcheck(lambda *t: add_grouped(*t, index), (y, x, A, B))


def test_one_graph_and_contract(device):
    y, x, A, B, index = make(3, 4, 20, 9, 2, 3, device)
    with dispatch.backend("triton"), torch.no_grad():
        torch.library.opcheck(torch.ops.mmpeft.add_grouped_.default, (y.clone(), x, A, B, index))
        compiled = torch.compile(lambda a, b: add_grouped(a * 1, b, A, B, index), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(y, x), by_loop(y, x, A, B, index), rtol=1e-5, atol=1e-5)


def test_wrong_shapes_are_refused():
    y, x, A, B, index = make(3, 4, 20, 9, 2, 3, "cpu")
    with pytest.raises(ConfigError, match=r"expected y \[N"):
        add_grouped(y, x, A, B, index[:2])
    with pytest.raises(ConfigError, match="index"):
        add_grouped(y, x, A[:, :2], B, index)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_engine_mixes_adapters_by_it(stacked, device, monkeypatch):
    from mmpeft.adapters import forward

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 6)).eval().to(device)
    x = torch.randn(5, 3, 12).to(device)
    for i, name in enumerate("abc"):
        mmpeft.attach(model, {"{0,2}": mmpeft.LoRA(rank=2 + i, alpha=4)}, name=name, example=x)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape).to(p) if p.requires_grad else 0
    rows, want = ["a", None, "c", "b", "a"], []
    with torch.no_grad():
        for i, name in enumerate(rows):
            with mmpeft.use(model, name):
                want.append(model(x[i : i + 1]))
        if stacked:
            mmpeft.stack(model)
        found, whole = [], grouped.add_grouped
        monkeypatch.setattr(forward, "add_grouped", lambda *a: (found.append(1), whole(*a))[1])
        with dispatch.backend("triton"), mmpeft.use(model, rows=rows):
            torch.testing.assert_close(model(x), torch.cat(want), rtol=1e-5, atol=1e-5)
    assert len(found) == 2
    if not stacked:  # mixed-task training
        with mmpeft.use(model, rows=rows):
            model(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
