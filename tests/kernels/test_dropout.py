"""Dropout: the mask's statistics, one mask in every kernel, gradients of the masked maths in float64."""

import math

import pytest
import torch

from mmpeft.kernels import dispatch, dropout, fused_ops, reference
from mmpeft.kernels.dropout import Dropped
from mmpeft.kernels.group import Group
from mmpeft.kernels.packed import PackedGroup

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SHAPES = [(1, 8, 1), (7, 37, 3), (33, 300, 16), (40, 259, 20)]  # odd sizes, ranks 1, 3, 16, 20


def drawn(device, p=0.3, seed=2**33 + 7, site=5):
    return Dropped(p, torch.tensor([seed], device=device), site)


def dense(d, rows, cols):
    """The mask with its scale, float64."""
    keep = reference.dropout_mask(rows, cols, d.p, d.seed + d.site, d.seed.device)
    return keep.double() * reference.inverse_keep(d.p)


def packed(device, T, N, R):
    """x, A padded to a multiple of 16 ranks as groups hold it, S-like [T, R]; each with a leading dimension of its own."""
    torch.manual_seed(T)
    wide = -(-R // 16) * 16
    A = torch.zeros(wide, N + 9, device=device)[:, :N]
    A[:R] = torch.randn(R, N, device=device)
    x, S = torch.randn(T, N + 3, device=device)[:, :N], torch.randn(T, wide + 5, device=device)[:, :wide]
    return x, A, S


@pytest.mark.parametrize("T,N,R", SHAPES)
def test_shrink_and_its_gradient_see_one_mask(backend, device, T, N, R):
    x, A, S = packed(device, T, N, R)
    d = drawn(device)
    again = torch.full((T, A.shape[0] + 2), 9.0, device=device)
    got = dropout.shrink(x, A, d, again[:, :-2])
    wide = x.double().requires_grad_()
    want = (wide * dense(d, T, N)) @ A.double().mT
    torch.testing.assert_close(got.double(), want.detach(), **CLOSE)
    assert got.is_contiguous() and torch.equal(again[:, :-2], got) and (again[:, -2:] == 9).all()
    want.backward(S.double())
    y = torch.randn(T, N + 6, device=device)
    before = y.clone()
    copy = dropout.add_masked(y[:, :N], S, A, d, x)
    torch.testing.assert_close((y - before)[:, :N].double(), wide.grad, **CLOSE)
    assert torch.equal(y[:, N:], before[:, N:])
    torch.testing.assert_close(copy, d.of(x))
    torch.testing.assert_close(copy.double(), x.double() * dense(d, T, N), **CLOSE)
    assert dropout.add_masked(y[:, :N], S, A, d) is None


@pytest.mark.parametrize("dropped", [True, False])
@pytest.mark.parametrize("T,N", [(1, 50), (7, 129)])
def test_the_rebuilt_norm_output_is_dropped(backend, device, T, N, dropped):
    x, w, dn = (torch.randn(*s, device=device) for s in ((T, N), (N,), (T, N)))
    d, n, again = drawn(device), torch.empty(T, N, device=device), torch.empty(T, N, device=device)
    out, same = torch.empty_like(x), torch.empty_like(x)
    _, rstd = fused_ops.add_rmsnorm(x, None, w, 1e-5, n)
    fused_ops.rmsnorm_backward(dn, x, rstd, w, None, out, again, d if dropped else None)
    fused_ops.rmsnorm_backward(dn, x, rstd, w, None, same, None)
    torch.testing.assert_close(again.double(), n.double() * (dense(d, T, N) if dropped else 1), **CLOSE)
    torch.testing.assert_close(out, same)


@pytest.mark.parametrize("T,F,R", [(1, 8, 1), (7, 37, 3), (33, 1030, 20)])
def test_swiglu_drops_what_its_shrink_reads_alone(backend, device, T, F, R):
    _, A, _ = packed(device, T, F, R)
    gate_up, d = torch.randn(T, 2 * F, device=device), drawn(device)
    act = torch.empty(T, F + A.shape[0], device=device)
    S = fused_ops.swiglu_shrink(gate_up, act, A, None, d)
    h = reference.swiglu(gate_up.double())
    torch.testing.assert_close(act[:, :F].double(), h, **CLOSE)
    torch.testing.assert_close(S.double(), (h * dense(d, T, F)) @ A.double().mT, **CLOSE)
    assert torch.equal(act[:, F:], S)


def mlp(device, T, F, ranks):
    """An MLP's backward as the sweep is given it, and its gradients by autograd on the masked maths in float64."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter has no bf16 product
    torch.manual_seed(1)
    r_gate, r_up, r_down = ranks
    R, R_down = (max(16, -(-n // 16) * 16) for n in (r_gate + r_up, r_down))

    def make(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    gate_up, base, S, dS = make(T, 2 * F), make(T, F), make(T, R), make(T, R_down)
    B, A = make(2 * F, R), make(R_down, F)
    d = drawn(device)
    wide = gate_up.double().requires_grad_()
    h, A64 = reference.swiglu(wide), A[:r_down].double().requires_grad_()
    low = (h * dense(d, T, F)) @ A64.mT
    dgu, dA = torch.autograd.grad([h, low], [wide, A64], [base.double(), dS[:, :r_down].double()])
    dB_gate = dgu[:, :F].mT @ S[:, :r_gate].double()
    dB_up = dgu[:, F:].mT @ S[:, r_gate : r_gate + r_up].double()
    return (base, gate_up, S, dS, B, A, d), (dgu, dB_gate, dB_up, dA)


@pytest.mark.parametrize("T,F,ranks", [(70, 37, (3, 5, 1)), (5, 300, (16, 16, 16)), (130, 260, (20, 1, 20))])
def test_the_sweep_adds_the_masked_part_itself(device, T, F, ranks):
    pytest.importorskip("triton")
    from mmpeft.kernels import sweep

    (base, gate_up, S, dS, B, A, d), want = mlp(device, T, F, ranks)
    tight = 1e-5 if base.dtype == torch.float32 else 8e-3

    def errors(config, dropped):
        dgu = base.new_empty(T, 2 * F + S.shape[1])
        out = [torch.empty(*w.shape, device=device) for w in want[1:]]
        sweep.mlp_backward(
            base,
            gate_up,
            dgu,
            S,
            dS,
            B,
            ranks,
            (1.0, 1.0),
            *out,
            config,
            masked=None if dropped is None else (dropped, A),
        )
        return [float((g - w).norm() / w.norm()) for g, w in zip([dgu[:, : 2 * F].double(), *out], want, strict=True)]

    for config in sweep.configs(ranks):
        assert max(errors(config, d)) < tight
    for wrong in (None, d.at(1)):  # no mask, and another one: far outside
        assert min(errors(sweep.configs(ranks)[0], wrong)[i] for i in (0, 3)) > 0.05


@pytest.mark.parametrize("ranks", [(3, 0, 1), (16, 20, 4)])
def test_a_group_equals_autograd_with_one_mask(backend, device, ranks):
    torch.manual_seed(2)
    outs, N, T = (10, 7, 40), 24, 11
    Ws = [torch.randn(o, N, device=device) for o in outs]
    pairs = [
        (torch.randn(r, N, device=device), torch.randn(o, r, device=device)) for r, o in zip(ranks, outs, strict=True)
    ]
    scales = [0.7, 1.0, 2.0]
    group = Group(PackedGroup(Ws, None, ranks, scales), [pair if pair[0].numel() else None for pair in pairs])
    group.packed.refresh(*zip(*pairs, strict=True))
    flat = torch.full((sum(slot.numel for _, slot in group.slots(0)),), 2.0, device=device)
    d, x, dy = drawn(device), torch.randn(T, N, device=device), torch.randn(T, sum(outs), device=device)
    wide = group.wide(T, N)
    wide[:, :N] = x
    y, S = group.forward(wide, d)
    back = group.wide(T, sum(outs))
    back[:, : sum(outs)] = dy
    dx = group.backward(back, S, flat, True, d)
    group.backward_A(back, x, flat, True, d)

    x64 = x.double().requires_grad_()
    leaves = [t.double().requires_grad_() for i in (0, 1) for pair in pairs for t in [pair[i]]]
    As, Bs = leaves[:3], leaves[3:]
    read = x64 * dense(d, T, N)
    want = torch.cat(
        [x64 @ W.double().mT + s * (read @ A.mT) @ B.mT for W, A, B, s in zip(Ws, As, Bs, scales, strict=True)], 1
    )
    expected = torch.autograd.grad(want, [x64, *(t for t in leaves if t.numel())], dy.double())
    torch.testing.assert_close(y.double(), want.detach(), **CLOSE)
    torch.testing.assert_close(dx.double(), expected[0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(flat.double() - 2, torch.cat([g.flatten() for g in expected[1:]]), rtol=1e-4, atol=1e-3)


def z(a, b, variance):
    """Standardised mean product of two arrays of centred draws: a standard normal where they are independent."""
    return abs(float((a * b).sum() / math.sqrt(a.numel()) / variance))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_pairs_of_entries_are_independent(p):
    """Products over every lag, over the halves of a word, over xor-related columns, rows and seeds: none above 5 sigma of some
    200 (a fair mask fails once in 10^4)."""
    rows = cols = 1024
    q = reference.keep_threshold(p) / 65536
    variance, found = q * (1 - q), {}
    for seed in (0, 3):
        d, e = ((~reference.dropout_mask(rows, cols, p, s)).double() - q for s in (seed, seed + 1))
        found[seed, "rate"] = abs(float(d.sum())) / math.sqrt(d.numel() * variance)
        found[seed, "seeds"] = z(d, e, variance)
        found[seed, "word"] = z(d[:, 0::2], d[:, 1::2], variance)
        index = torch.arange(cols)
        for bit in range(10):
            found[seed, "xor", bit] = z(d, d[:, index ^ (1 << bit)], variance) / math.sqrt(2)  # each product twice
            found[seed, "xor rows", bit] = z(d, d[index ^ (1 << bit)], variance) / math.sqrt(2)
        for lag in (*range(1, 34), 64, 128, 256, 512):
            found[seed, "columns", lag] = z(d[:, lag:], d[:, :-lag], variance)
            found[seed, "rows", lag] = z(d[lag:], d[:-lag], variance)
    assert max(found.values()) < 5, max(found, key=found.get)


def test_no_two_rows_are_rearrangements_of_each_other():
    """Rows whose keys differ in low bits alone meet the same counters; the key in the second round keeps them apart."""
    cols = 4096
    key = reference._mix32(torch.arange(2**18))
    near = next(
        (i, j) for i, j in zip(*[iter(key.argsort().tolist())] * 2, strict=False) if (key[i] ^ key[j]) < cols // 2
    )
    shift = int(key[near[0]] ^ key[near[1]])
    masks = [row_of(n, cols) for n in near]
    moved = masks[1].view(-1, 2)[torch.arange(cols // 2) ^ shift].flatten()
    assert (masks[0] == moved).double().mean() < 0.6


def row_of(n, cols):
    """Row n of the mask of seed 0 at p = .5, without those before it."""
    seed = torch.tensor(n) * pow(0x9E3779B1, -1, 2**32)
    return reference.dropout_mask(1, cols, 0.5, seed % 2**32)[0]


def test_the_probability_is_that_of_the_scale():
    """p is rounded to 1/65536, and the scale is the inverse of what stays: the mean is kept exactly."""
    for p in (0.0, 1e-9, 0.05, 0.3, 0.99999999):
        keep = 1 - reference.keep_threshold(p) / 65536
        assert keep * reference.inverse_keep(p) == 1 and abs(keep - (1 - p)) <= 2**-16
    assert reference.dropout_mask(50, 51, 0.0, 3).all()


def test_the_mask_is_the_same_in_the_interpreter_and_in_plain_torch(device):
    pytest.importorskip("triton")
    x = torch.randn(37, 301, device=device)
    for site, p in ((0, 0.3), (1, 0.001), (16, 0.9)):
        d = drawn(device, p, site=site)
        with dispatch.backend("triton"):
            ours = d.of(x)
        with dispatch.backend("reference"):
            assert torch.equal(ours == 0, d.of(x) == 0)
            torch.testing.assert_close(ours, d.of(x))
