"""Attention over few tokens equals softmax attention under float64 autograd, on views and into views of wide buffers."""

import math

import pytest
import torch

from mmpeft.errors import ConfigError
from mmpeft.kernels import attention, dispatch, short_attention

pytestmark = pytest.mark.skipif(not dispatch.triton_installed(), reason="no Triton on this platform")

FORWARD = short_attention.Tile(32, 16, 4, 1)  # small enough that a few tokens need several tiles


def plain(q, k, v, scale):
    """softmax(q k^T) v for [B, S, H, D]."""
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v), scores.logsumexp(-1)


def problem(device, B, S, H, D, dtype=torch.float32, seed=0):
    """q, k, v as views of one qkv, do, and a poisoned wide buffer [B * S, 3 H D + 5]."""
    torch.manual_seed(seed + S)
    qkv, do = (torch.randn(*s, device=device).to(dtype) for s in ((B, S, 3, H, D), (B, S, H, D)))
    return (*qkv.unbind(2), do, torch.full((B * S, 3 * H * D + 5), float("nan"), dtype=dtype, device=device))


def columns(wide, like):
    h = like.shape[2] * like.shape[3]
    return tuple(wide[:, i * h : (i + 1) * h].view(like.shape) for i in range(3))


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(("rows", "keys"), [(32, 16), (128, 16), (32, 64)])  # 64 keys: the other form of two products
@pytest.mark.parametrize(("B", "S", "H", "D"), [
    (2, 1, 2, 16), (3, 5, 2, 64), (2, 17, 3, 32), (2, 37, 2, 16), (2, 37, 2, 64), (2, 70, 1, 24), (1, 70, 2, 64),
])  # fmt: skip
def test_forward_and_backward(device, B, S, H, D, rows, keys):
    """Several tiles of queries, or all in one, against several of keys; the columns beside dq, dk, dv stay."""
    q, k, v, do, wide = problem(device, B, S, H, D)
    scale = 0.7 * D**-0.5
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    want, lse = plain(*exact, scale)
    grads = torch.autograd.grad(want, exact, do.double())
    tile = short_attention.Tile(rows, keys, 4, 1)
    with dispatch.backend("triton"):
        o, kept = short_attention.forward(q, k, v, scale, tile=FORWARD)
        out = short_attention.backward(do, q, k, v, o, kept, scale, out=columns(wide, q), tile=tile)
    assert o.is_contiguous() and error(o, want.detach()) < 1e-5
    torch.testing.assert_close(kept.double(), lse.detach() / math.log(2), atol=1e-4, rtol=0)
    if S == 1:  # the softmax of one score is 1 whatever it is
        assert max(float(g.abs().max()) for g in out[:2]) < 1e-4 and error(out[2], grads[2]) < 1e-5
    else:
        assert max(error(g, w) for g, w in zip(out, grads, strict=True)) < 1e-4
    assert wide[:, -5:].isnan().all()
    assert not wide[:, :-5].isnan().any()


def test_scores_far_below_zero(device):
    """exp2(0 - lse) overflows for the keys that are not there: they must not reach dq."""
    q, k, v, do, _ = problem(device, 1, 21, 1, 16)
    q, k = torch.full_like(q, 8) + 0.1 * q, torch.full_like(k, -8) + 0.1 * k
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    want, lse = plain(*exact, 1.0)
    assert lse.max() < -500
    grads = torch.autograd.grad(want, exact, do.double())
    with dispatch.backend("triton"):
        o, kept = short_attention.forward(q, k, v, 1.0, tile=FORWARD)
        out = short_attention.backward(do, q, k, v, o, kept, 1.0, tile=FORWARD)
    assert error(o, want.detach()) < 1e-3
    assert max(error(g, w) for g, w in zip(out, grads, strict=True)) < 1e-3


@pytest.mark.parametrize("rows", [32, 64])
def test_half_precision_is_as_good_as_rounding_allows(device, rows):
    """float16: P, dS and the results are rounded, sums are not; a second tile of queries costs one rounding of dk, dv."""
    q, k, v, do, wide = problem(device, 2, 61, 2, 32, torch.float16)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    want, _ = plain(*exact, 32**-0.5)
    grads = torch.autograd.grad(want, exact, do.double())
    with dispatch.backend("triton"):
        o, kept = short_attention.forward(q, k, v, 32**-0.5, tile=FORWARD)
        out = short_attention.backward(
            do, q, k, v, o, kept, 32**-0.5, out=columns(wide, q), tile=short_attention.Tile(rows, 16, 4, 1)
        )
    assert error(o, want.detach()) < 5e-4
    assert max(error(g, w) for g, w in zip(out, grads, strict=True)) < 8e-4


def test_other_layouts_are_copied(device):
    """Heads before tokens, in and out; without `keep` the same output and no log-sum-exp."""
    q, k, v, do, _ = problem(device, 2, 19, 2, 16)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, do)]
    places = [torch.full_like(t, float("nan")) for t in turned[:3]]
    with dispatch.backend("triton"):
        o, lse = short_attention.forward(q, k, v, 0.3, tile=FORWARD)
        want = short_attention.backward(do, q, k, v, o, lse, 0.3, tile=FORWARD)
        o2, none = short_attention.forward(*turned[:3], 0.3, keep=False, tile=FORWARD)
        got = short_attention.backward(turned[3], *turned[:3], o, lse, 0.3, out=tuple(places), tile=FORWARD)
    assert none is None and torch.equal(o, o2)
    assert all(g is p and torch.equal(g, w) for g, p, w in zip(got, places, want, strict=True))


def test_places_that_do_not_fit_are_refused(device):
    q, k, v, do, _ = problem(device, 1, 4, 2, 16)
    lse = torch.zeros(1, 2, 4, device=device)
    for bad in (torch.empty_like(q[:, :3]), q.double()):
        with pytest.raises(ConfigError, match="out"):
            short_attention.backward(do, q, k, v, do, lse, 1.0, out=(bad, q, k), tile=FORWARD)


def test_shapes_offered():
    """A ViT's head sizes have shapes in both directions, however few tokens; long sequences and large heads have none."""
    for D in (16, 32, 64, 72, 80, 96, 128):
        for S in (1, 50, 64, 65, 128, 129, 197, 257):
            assert short_attention.fits(S, D, torch.bfloat16) and short_attention.forward_tiles(S, D)
            assert all(t.queries * 3 >= S for t in short_attention.backward_tiles(S, D))
    assert not short_attention.fits(577, 64, torch.float16)
    assert not short_attention.fits(197, 256, torch.float16)
    assert not short_attention.fits(197, 64, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reference is what runs without a GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_go_into_the_caller_s_buffer(device, causal):
    """`attention.backward(out=...)` fills the places whoever computed the gradients."""
    q, k, v, do, wide = problem(device, 2, 11, 2, 16)
    o, kept = attention.forward(q, k, v, 0.3, causal=causal)
    want = attention.backward(do, q, k, v, o, kept, 0.3, causal=causal)
    out = columns(wide, q)
    got = attention.backward(do, q, k, v, o, kept, 0.3, causal=causal, out=out)
    assert all(g is p and torch.equal(g, w) for g, p, w in zip(got, out, want, strict=True))
    assert wide[:, -5:].isnan().all()


def library(q, k, v, scale, causal):
    """What cuDNN's forward gives for [B, H, S, D]: o laid out as [B, S, H, D], and its sums as natural logarithms."""
    o, lse = plain(*(t.transpose(1, 2) for t in (q, k, v)), scale)
    return o.contiguous(), (lse.unsqueeze(-1), None, None)


@pytest.mark.parametrize("kind", attention.SHORT)
def test_attention_runs_it(device, monkeypatch, kind):
    """Chosen, it serves `attention.forward` and `backward` alike, or the backward after the library's forward."""
    monkeypatch.setattr(attention, "_kind", lambda *_: kind)
    if device == "cpu":
        monkeypatch.setitem(attention._FORWARD, "cudnn", library)
    q, k, v, do, wide = problem(device, 2, 23, 2, 16)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    want, _ = plain(*exact, 0.3)
    grads = torch.autograd.grad(want, exact, do.double())
    with dispatch.backend("triton"):
        if q.is_cuda:
            q, k, v, do, wide = (t.bfloat16() for t in (q, k, v, do, wide))
        o, kept = attention.forward(q, k, v, 0.3, causal=False)
        out = attention.backward(do, q, k, v, o, kept, 0.3, causal=False, out=columns(wide, q))
    assert error(o, want.detach()) < 2e-2
    assert max(error(g, w) for g, w in zip(out, grads, strict=True)) < 2e-2
