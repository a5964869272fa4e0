"""RoPE, low-rank terms and attention in one launch equal the three of them in plain torch."""

import pytest
import torch

from mmpeft.kernels import dispatch, rope_attention
from mmpeft.kernels.group import Group
from mmpeft.kernels.grouped import Stack
from mmpeft.kernels.llama_block import Layout
from mmpeft.kernels.packed import PackedGroup
from mmpeft.kernels.product import Product


def case(device, *, B=2, S=7, heads=4, kv=2, d=16, ranks=(3, 0, 5), bias=True, wide=24, stacked=0, dtype=torch.float32):
    """(a maker of the same unfinished product, its layout)."""
    g = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype)

    outs = [heads * d, kv * d, kv * d]
    packed = PackedGroup(
        [make(o, wide) for o in outs], [make(o) for o in outs] if bias else None, list(ranks), [0.7] * 3
    )
    pairs = [(make(r, wide).float(), make(o, r).float()) for r, o in zip(ranks, outs, strict=True)]
    packed.refresh([a for a, _ in pairs], [b for _, b in pairs])
    group, x = Group(packed, pairs), make(B * S, wide)
    angles = torch.randn(S, d // 2, generator=g).to(device)
    layout = Layout((B, S), (angles.cos(), angles.sin()), heads, kv, d**-0.5, 1e-6)
    stack, index = None, None
    if stacked:
        r = sum(ranks)
        stack = Stack(make(stacked, r, wide), make(stacked, sum(outs), max(ranks)), list(ranks))
        index = torch.tensor([stacked, 0], device=device)[:B]  # the base, and the first
    return (lambda: Product.of(x, group) if stack is None else Product.by_sample(x, group, stack, index)), layout


def both(product, layout, shape, monkeypatch):
    monkeypatch.setattr(rope_attention, "SHAPES", [shape])
    with dispatch.backend("reference"):
        want = rope_attention.attend(product(), layout)
    with dispatch.backend("triton"):
        got = rope_attention.attend(product(), layout)
    return got, want


needs_triton = pytest.mark.skipif(not dispatch.triton_installed(), reason="no Triton on this platform")


@needs_triton
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"S": 1},
        {"S": 70, "B": 1, "ranks": (2, 2, 2)},
        {"S": 37, "heads": 3, "kv": 1, "d": 20, "bias": False},
        {"S": 33, "kv": 4, "d": 64, "ranks": (0, 20, 0)},
    ],
    ids=str,
)
@torch.no_grad()
def test_equals_the_separate_launches(sizes, device, monkeypatch):
    product, layout = case(device, **sizes)
    for shape in rope_attention.SHAPES if sizes.get("S") == 70 else [(32, 64, 4), (16, 32, 4)]:
        got, want = both(product, layout, shape, monkeypatch)
        assert want.norm() > 1
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@needs_triton
@torch.no_grad()
def test_magnitudes_scale_before_the_bias(device, monkeypatch):
    plain, layout = case(device, ranks=(2, 3, 4))
    factor = torch.rand(4 * 16 + 2 * 2 * 16, device=device) + 0.5
    got, want = both(lambda: plain()._replace(factor=factor), layout, (16, 32, 4), monkeypatch)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (want - both(plain, layout, (16, 32, 4), monkeypatch)[1]).norm() > 0.1


@needs_triton
@torch.no_grad()
def test_an_adapter_a_sample(device, monkeypatch):
    product, layout = case(device, S=35, ranks=(2, 3, 4), stacked=2)
    got, want = both(product, layout, (16, 32, 4), monkeypatch)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    first, second = want.split(35)
    assert (first - second).norm() > 1


@needs_triton
@torch.no_grad()
def test_several_adapters_in_one_sample(device):
    """Runs of rows shorter than a sample: a tile of keys would need more than one B."""
    product, layout = case(device, B=1, S=24, ranks=(2, 3, 4), stacked=2)
    S = torch.randn(24, 9, device=device)

    def parted(index):
        y = product()
        z = y.z.clone()
        z[:, y.out :] = S
        return y._replace(z=z, chosen=torch.tensor(index, device=device))

    with dispatch.backend("reference"):
        want, other = (rope_attention.attend(parted(index), layout) for index in ([1, 0], [1, 1]))
    with dispatch.backend("triton"):
        got = rope_attention.attend(parted([1, 0]), layout)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert (want - other).norm() > 0.1


@needs_triton
@pytest.mark.parametrize("shape", [s for s in rope_attention.WIDE_SHAPES if s != rope_attention.SEPARATE], ids=str)
@torch.no_grad()
def test_wide_heads(shape, device, monkeypatch):
    product, layout = case(device, B=1, S=35, heads=2, kv=1, d=128)
    monkeypatch.setattr(rope_attention, "WIDE_SHAPES", [shape])
    got, want = both(product, layout, shape, monkeypatch)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@needs_triton
@torch.no_grad()
def test_nothing_is_seen_before_its_time(device, monkeypatch):
    """Another last token leaves every earlier output as it was, bit for bit."""
    product, layout = case(device, B=1, S=40)
    monkeypatch.setattr(rope_attention, "SHAPES", [(16, 32, 4)])
    changed = product()
    changed.z[-1] += 3
    with dispatch.backend("triton"):
        a, b = rope_attention.attend(product(), layout), rope_attention.attend(changed, layout)
    assert torch.equal(a[:-1], b[:-1]) and not torch.equal(a[-1], b[-1])


@needs_triton
@torch.no_grad()
def test_long_samples_keep_the_library(device, monkeypatch):
    product, layout = case(device, B=1, S=12)
    monkeypatch.setattr(rope_attention, "MAX_TOKENS", 11)
    monkeypatch.setattr(rope_attention, "_rope_attention", None)  # would fail if it were launched
    with dispatch.backend("triton"):
        assert rope_attention.attend(product(), layout).shape == (12, 64)
