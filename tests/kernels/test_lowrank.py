"""lowrank_linear and lowrank_group equal the three-launch form, in value and gradient, at every shape of a site."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmpeft.errors import ConfigError
from mmpeft.kernels import (
    PackedGroup,
    Update,
    dispatch,
    dropout_mask,
    fused_rows,
    lowrank_group,
    lowrank_linear,
    lowrank_updates,
    reference,
)


def site(rank, n_in=24, n_out=10, *, bias=True, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device)

    A, B = make(rank, n_in).requires_grad_(), make(n_out, rank).requires_grad_()
    return make(n_out, n_in), make(n_out) if bias else None, A, B


def gradients(loss, *inputs):
    return torch.autograd.grad(loss.square().sum(), inputs)


@pytest.mark.parametrize("rank", [1, 3, 16, 100])
@pytest.mark.parametrize("shape", [(1, 24), (2, 5, 24), (3, 1, 7, 24)])
def test_equals_reference(backend, device, rank, shape):
    W, b, A, B = site(rank, bias=rank != 3, device=device)
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    y, y0 = lowrank_linear(x, W, b, A, B, 0.7), reference.lowrank_linear(x, W, b, A, B, 0.7)
    assert y.shape == (*shape[:-1], 10)
    torch.testing.assert_close(y, y0, rtol=1e-12, atol=1e-11)
    for got, want in zip(gradients(y, x, A, B), gradients(y0, x, A, B), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)


def test_gradcheck(backend, device):
    W, b, A, B = site(3, n_in=7, n_out=5, device=device)
    x = torch.randn(2, 3, 7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: lowrank_linear(t[0], W, b, *t[1:], 0.5), (x, A, B))


def several(device, dropout):
    """Two adapters on all rows and one on the middle ones, as a fused qkv has them."""
    W, b, A, B = site(3, device=device)
    _, _, C, D = site(5, device=device, seed=1)
    _, _, E, G = site(2, n_out=4, device=device, seed=2)
    updates = [Update(A, B, 0.7, 0, dropout), Update(C, D, 2.0, 0, 0.0), Update(E, G, 1.0, 3, dropout)]
    return W, b, updates


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scaled", [False, True])
def test_several_updates_and_a_row_factor(device, dropout, scaled):
    W, b, updates = several(device, dropout)
    b = b.requires_grad_()
    row = torch.rand(10, dtype=torch.float64, device=device, requires_grad=True) if scaled else None
    x = torch.randn(2, 5, 24, dtype=torch.float64, device=device, requires_grad=True)
    seed = torch.tensor(7, device=device)
    inputs = [x, b, *(t for u in updates for t in (u.A, u.B)), *([row] if scaled else [])]
    want = reference.lowrank_updates(x, W, b, updates, row=row, seed=seed)
    wanted = gradients(want, *inputs)
    with dispatch.backend("triton"):
        y = lowrank_updates(x, W, b, updates, row=row, seed=seed)
        torch.testing.assert_close(y, want, rtol=1e-6 if dropout else 1e-12, atol=1e-6 if dropout else 1e-11)
        for got, expected in zip(gradients(y, *inputs), wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4 if dropout else 1e-10, atol=1e-4 if dropout else 1e-9)


@pytest.mark.parametrize(("T", "N"), [(1, 1), (7, 130), (300, 40)])
def test_row_factor_kernels(backend, device, T, N):
    z, dy = (torch.randn(T, N, device=device) for _ in range(2))
    row, bias = torch.rand(N, device=device), torch.randn(N, device=device)
    torch.testing.assert_close(fused_rows.scale(z, row, bias), z * row + bias)
    torch.testing.assert_close(fused_rows.scale(z, row, None), z * row)
    dz, drow = fused_rows.scale_backward(dy, z, row)
    torch.testing.assert_close(dz, dy * row)
    torch.testing.assert_close(drow, (dy.double() * z.double()).sum(0).float(), rtol=1e-5, atol=1e-5)


def test_bias_gradient_only_where_asked(device):
    W, b, A, B = site(2, device=device)
    x = torch.randn(4, 24, dtype=torch.float64, device=device)
    with dispatch.backend("triton"):
        y = lowrank_linear(x, W, b.requires_grad_(), A, B, 1.0)
    torch.testing.assert_close(gradients(y, b)[0], 2 * y.sum(0))


def test_non_contiguous_double_use_and_accumulation(backend, device):
    W, b, A, B = site(3, device=device)
    base = torch.randn(24, 6, 2, dtype=torch.float64, device=device, requires_grad=True)
    x = base.permute(2, 1, 0)
    y = lowrank_linear(x, W, b, A, B, 0.7) + lowrank_linear(x * 2, W, b, A, B, 0.7)
    y0 = reference.lowrank_linear(x, W, b, A, B, 0.7) + reference.lowrank_linear(x * 2, W, b, A, B, 0.7)
    for got, want in zip(gradients(y, base, A, B), gradients(y0, base, A, B), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)


def test_checkpoint_reentry(backend, device):
    W, b, A, B = site(4, device=device)
    x = torch.randn(5, 24, dtype=torch.float64, device=device, requires_grad=True)
    seed = torch.tensor(3, device=device)

    def run(x):
        return lowrank_linear(x, W, b, A, B, 0.7, dropout_p=0.3, seed=seed)

    for got, want in zip(
        gradients(checkpoint(run, x, use_reentrant=False), x, A, B), gradients(run(x), x, A, B), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_dropout_mask_is_redrawn_in_the_backward(device):
    torch.manual_seed(0)
    W, b, A, B = site(3, n_in=6, n_out=4, device=device)
    x = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    seed = torch.tensor(11, device=device)

    def op(x, A, B):
        return torch.ops.mmpeft.lowrank_linear(x, W, b, [A], [B], None, [0], [0.7], [0.4], seed)[0]

    with dispatch.backend("reference"):  # float64 masks; the Triton mask is compared with it below
        assert torch.autograd.gradcheck(op, (x, A, B))
        torch.testing.assert_close(op(x, A, B), reference.lowrank_linear(x, W, b, A, B, 0.7, dropout_p=0.4, seed=seed))


def test_dropout_statistics_and_independence():
    p, rows, cols = 0.05, 600, 500
    masks = [dropout_mask(rows, cols, p, seed) for seed in (0, 1, 2**40 + 5)]
    sigma = (p * (1 - p) / (rows * cols)) ** 0.5
    for mask in masks:
        assert abs((~mask).double().mean() - p) < 4 * sigma
        assert abs((~mask).double().mean(0).std() - (p * (1 - p) / rows) ** 0.5) < 2e-3  # columns are independent draws
    both = (~masks[0] & ~masks[1]).double().mean()  # another seed is another mask
    assert abs(both - p * p) < 4 * (p * p / (rows * cols)) ** 0.5


def test_triton_dropout_is_the_same_mask(device):
    from mmpeft.kernels.dropout_kernels import hash_dropout

    x = torch.randn(37, 300, device=device)
    for seed in (0, 7, 2**33 + 1):
        seed = torch.tensor(seed, device=device)
        torch.testing.assert_close(hash_dropout(x, 0.3, seed), reference.dropout(x, 0.3, seed))


def members(device, ranks=(3, 1, 0)):
    sites = [
        site(max(r, 1), n_out=n, bias=n != 7, device=device, seed=n) for r, n in zip(ranks, (10, 7, 40), strict=True)
    ]
    As = [A.detach()[:r].requires_grad_() for (_, _, A, _), r in zip(sites, ranks, strict=True)]
    Bs = [B.detach()[:, :r].requires_grad_() for (_, _, _, B), r in zip(sites, ranks, strict=True)]
    group = PackedGroup([s[0] for s in sites], [s[1] for s in sites], ranks, [0.7, 2.0, 1.0])
    group.refresh(As, Bs)
    return sites, group, As, Bs


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("wide", [True, False])  # out > in and out < in take different forms in each pass
def test_group_equals_its_members(device, dropout, wide):
    sites, group, As, Bs = members(device)
    if not wide:
        sites, As, Bs = sites[:2], As[:2], Bs[:2]
        group = PackedGroup([s[0] for s in sites], [s[1] for s in sites], [3, 1], [0.7, 2.0])
        group.refresh(As, Bs)
    x = torch.randn(2, 5, 24, dtype=torch.float64, device=device, requires_grad=True)
    seed = torch.tensor(5, device=device)
    outs, scales = group.outs, group.scales
    with dispatch.backend("reference"):
        y0 = torch.cat(lowrank_group(x, group, As, Bs, dropout_p=dropout, seed=seed), -1)
        y, _ = torch.ops.mmpeft.lowrank_group(x, group.buffer, group.bias, As, Bs, outs, scales, dropout, seed)
        torch.testing.assert_close(y, y0, rtol=1e-12, atol=1e-11)
        inputs = [x] + [t for t in As + Bs if t.numel()]
        for got, want in zip(gradients(y, *inputs), gradients(y0, *inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-9)


def test_stale_compute_copies_are_noticed(device):
    _, group, As, Bs = members(device)
    x = torch.randn(3, 24, dtype=torch.float64, device=device, requires_grad=True)
    with dispatch.backend("triton"):
        y = torch.cat(lowrank_group(x, group, As, Bs), -1)
    group.refresh(As, Bs)  # between forward and backward: the backward would use other weights than the forward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_packing_keeps_the_weights_bit_for_bit():
    sites, group, _, _ = members("cpu")
    for (W, *_), view in zip(sites, group.weights, strict=True):
        assert torch.equal(W, view)


def test_bf16_error_is_that_of_plain_bf16(device):
    """Relative error against float64 at most 1.2 times that of the same maths in plain bf16 torch."""
    W, b, A, B = site(16, n_in=128, n_out=96, device=device)
    x = torch.randn(64, 128, dtype=torch.float64, device=device)
    exact = reference.lowrank_linear(x, W, b, A, B, 0.7)

    def half(t):
        return t.to(torch.bfloat16)

    plain = half(x) @ half(W).mT + half(b) + 0.7 * ((half(x) @ half(A).mT) @ half(B).mT)
    with dispatch.backend("triton"):
        ours = lowrank_linear(half(x), half(W), half(b), A.float(), B.float(), 0.7)

    def error(y):
        return float(((y - exact).norm() / exact.norm()).detach())

    assert ours.dtype == torch.bfloat16 and error(ours) <= 1.2 * error(plain) < 1e-2


def test_compiles_to_one_graph(device):
    W, b, A, B = site(3, device=device)

    class Two(nn.Module):
        def forward(self, x):
            return lowrank_linear(
                torch.tanh(lowrank_linear(x, W, b, A, B, 0.7)), W.mT.contiguous(), None, B.mT, A.mT, 0.7
            )

    x = torch.randn(5, 24, dtype=torch.float64, device=device, requires_grad=True)
    with dispatch.backend("triton"):
        compiled = torch.compile(Two(), fullgraph=True, backend="aot_eager")
        for got, want in zip(gradients(compiled(x), x, A, B), gradients(Two()(x), x, A, B), strict=True):
            torch.testing.assert_close(got, want)


def test_operator_contracts(device):
    W, b, A, B = site(3, device=device)
    x = torch.randn(2, 5, 24, dtype=torch.float64, device=device, requires_grad=True)
    C, D = (t.detach().clone().requires_grad_() for t in (A[:2], B[3:7, :2]))
    row = torch.rand(10, dtype=torch.float64, device=device, requires_grad=True)
    seed = torch.tensor(3, device=device)
    op = torch.ops.mmpeft.lowrank_linear.default
    torch.library.opcheck(op, (x, W, b, [A], [B], None, [0], [0.7], [0.0], None))
    torch.library.opcheck(op, (x, W, b, [A, C], [B, D], row, [0, 3], [0.7, 2.0], [0.0, 0.3], seed))
    torch.library.opcheck(op, (x, W, None, [], [], row, [], [], [], None))
    _, group, As, Bs = members(device, (3, 1, 2))
    args = (x, group.buffer, group.bias, As, Bs, group.outs, group.scales, 0.0, None)
    torch.library.opcheck(torch.ops.mmpeft.lowrank_group.default, args)


def test_wrong_inputs_are_refused():
    W, b, A, B = site(3)
    x = torch.randn(5, 24, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"expected x \[\.\.\., 24\]"):
        lowrank_linear(x[:, :23], W, b, A, B, 1.0)
    with pytest.raises(ConfigError, match="needs a seed"):
        lowrank_linear(x, W, b, A, B, 1.0, dropout_p=0.1)
    with pytest.raises(ConfigError, match="expected 0 <= dropout_p < 1"):
        lowrank_linear(x, W, b, A, B, 1.0, dropout_p=1.0, seed=1)
    with pytest.raises(ConfigError, match="frozen"):
        lowrank_linear(x, W.clone().requires_grad_(), b, A, B, 1.0)
    with pytest.raises(ConfigError, match="shares its input"):
        PackedGroup([W, W[:, :5]], None, [1, 1], [1.0, 1.0])
    with pytest.raises(ConfigError, match="'auto', 'triton' or 'reference'"), dispatch.backend("cuda"):
        pass
