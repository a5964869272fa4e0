"""Fusions: each has an effect, a missing vector is never read, and a row that has none gets what is promised."""

import pytest
import torch

from mmpeft.errors import ConfigError, NameNotFound
from mmpeft.policies.fusion import FUSIONS, make_fusion
from mmpeft.policies.heads.blocks import Attention, Block

B, N, W, T, S = 3, 7, 8, 2, 5


def build(name):
    torch.manual_seed(0)
    fusion = make_fusion(name, W, S, T)
    with torch.no_grad():
        for p in fusion.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return fusion


@pytest.mark.parametrize("name", FUSIONS)
def test_effect_and_gradient(name):
    fusion, tokens, vectors = build(name), torch.randn(B, N, W), torch.randn(B, T, S)
    out = fusion(tokens, vectors)
    assert out.shape == (B, N + T * (name == "token"), W)
    out.square().sum().backward()
    assert all(p.grad is not None for n, p in fusion.named_parameters() if n != "missing")
    assert not torch.allclose(out, fusion(tokens, vectors + 1))
    torch.testing.assert_close(out[1:2], fusion(tokens[1:2], vectors[1:2]))  # rows do not meet


@pytest.mark.parametrize("name", FUSIONS)
def test_missing_vectors_are_never_read(name):
    fusion, tokens, vectors = build(name), torch.randn(B, N, W), torch.randn(B, T, S)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    first = fusion(tokens, vectors, mask)
    poisoned = torch.where(mask[..., None], vectors, float("nan"))
    assert torch.equal(fusion(tokens, poisoned, mask), first)
    torch.testing.assert_close(first[0], fusion(tokens, vectors)[0])
    assert torch.equal(first[2, :N], tokens[2])  # nothing known: the tokens as they were
    if name == "token":
        torch.testing.assert_close(first[2, N:], fusion.missing + fusion.place)


@pytest.mark.parametrize("name", ["film", "cross"])
def test_starts_as_the_identity(name):
    tokens = torch.randn(B, N, W)
    assert torch.equal(make_fusion(name, W, S, T)(tokens, torch.randn(B, T, S)), tokens)


def test_refusals():
    with pytest.raises(NameNotFound, match="nearest: film"):
        make_fusion("filn", W, S, T)
    with pytest.raises(ConfigError, match=r"\[B, 2, 5\]"):
        make_fusion("film", W, S, T)(torch.zeros(B, N, W), torch.zeros(B, T, 4))
    with pytest.raises(ConfigError, match="divide"):
        Attention(9, 2)


def test_attention_equals_torchs_own():
    torch.manual_seed(0)
    ours, theirs = Attention(W, 2), torch.nn.MultiheadAttention(W, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        theirs.out_proj.bias.copy_(ours.out_proj.bias)
    x, mask = torch.randn(B, N, W), torch.rand(B, N) > 0.4
    mask[:, 0] = True
    torch.testing.assert_close(ours(x, mask=mask), theirs(x, x, x, key_padding_mask=~mask)[0])
    causal = torch.ones(N, N, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x, causal=True), theirs(x, x, x, attn_mask=causal)[0])


def test_a_causal_block_does_not_look_ahead():
    block = Block(W, 2, context_dim=4)
    x, context = torch.randn(B, N, W), torch.randn(B, 3, 4)
    changed = x.clone()
    changed[:, 4:] += 1
    a, b = (block(t, context, causal=True) for t in (x, changed))
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])
