"""Flamingo's gated cross-attention: the LLM itself at gate 0, the last image only, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmpeft.connectors import GatedCrossAttention, GatedCrossAttentionBlock
from mmpeft.connectors.cross_attention import last_media, see_last_media
from mmpeft.errors import ConfigError


@pytest.fixture(scope="module")
def llm() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def blocks(every: int = 2, gates: float = 0.0) -> GatedCrossAttention:
    torch.manual_seed(1)
    module = GatedCrossAttention(num_layers=4, dim=16, media_dim=10, every=every, heads=2, head_dim=4)
    with torch.no_grad():
        for block in module.blocks.values():
            block.attention_gate.fill_(gates)
            block.ffn_gate.fill_(gates)
    return module


def test_gates_at_zero_are_the_base_model_bit_for_bit(llm: nn.Module) -> None:
    ids, media = torch.randint(0, 50, (3, 7)), torch.randn(3, 2, 5, 10)
    base = llm(ids).logits
    with blocks().conditioned(llm.model.layers, media):
        assert torch.equal(llm(ids).logits, base)
    with blocks(gates=0.5).conditioned(llm.model.layers, media):
        assert (llm(ids).logits - base).abs().max() > 1e-3
    assert torch.equal(llm(ids).logits, base)  # and nothing stays
    with pytest.raises(ZeroDivisionError), blocks(gates=0.5).conditioned(llm.model.layers, media):
        raise ZeroDivisionError
    assert torch.equal(llm(ids).logits, base)


def test_gates_get_a_gradient_at_zero_and_everything_does_when_open(llm: nn.Module) -> None:
    ids, media = torch.randint(0, 50, (3, 7)), torch.randn(3, 1, 5, 10, requires_grad=True)
    closed, opened = blocks(), blocks(every=1, gates=0.3)
    assert list(opened.blocks) == ["0", "1", "2", "3"] and list(closed.blocks) == ["1", "3"]
    with closed.conditioned(llm.model.layers, media):
        llm(ids).logits.square().mean().backward()
    for block in closed.blocks.values():
        assert block.attention_gate.grad.abs() > 0 and block.ffn_gate.grad.abs() > 0
    with opened.conditioned(llm.model.layers, media):
        llm(ids).logits.square().mean().backward()
    assert all((p.grad != 0).any() for p in opened.parameters()) and (media.grad != 0).any()
    llm.zero_grad()


def test_text_sees_only_the_last_medium_before_it() -> None:
    is_media = torch.tensor([[0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    index = last_media(is_media)
    assert index.tolist() == [[0, 1, 1, 1, 2, 2]]
    assert see_last_media(index, 2, 2).long().tolist()[0] == [[0, 0, 0, 0], *[[1, 1, 0, 0]] * 3, *[[0, 0, 1, 1]] * 2]
    torch.manual_seed(2)
    module = blocks(every=1, gates=0.7)
    block = module.blocks["0"]
    x, media = torch.randn(1, 6, 16), torch.randn(1, 2, 3, 10)
    mask = see_last_media(index, 3, 2)
    out = block(x, media.flatten(1, 2), mask)
    other = media.clone()
    other[:, 1] += 1.0
    changed = (block(x, other.flatten(1, 2), mask) - out).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False, False, False, False, True, True]


def test_media_before_any_text_see_nothing_and_padding_is_ignored(llm: nn.Module) -> None:
    module = blocks(every=1, gates=0.7)
    ids, media = torch.randint(0, 50, (2, 6)), torch.randn(2, 2, 3, 10)
    index = last_media(torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]], dtype=torch.bool))
    valid = torch.ones(2, 2, 3, dtype=torch.bool)
    valid[1, 1] = False  # the second sample has one medium
    with module.conditioned(llm.model.layers, media, media_mask=valid, media_index=index):
        out = llm(ids).logits
    changed = media.clone()
    changed[1, 1] = 100.0
    with module.conditioned(llm.model.layers, changed, media_mask=valid, media_index=index):
        assert torch.equal(llm(ids).logits, out)


def test_decoding_with_a_cache_equals_the_whole_sequence(llm: nn.Module) -> None:
    module = blocks(every=1, gates=0.7)
    ids, media = torch.randint(0, 50, (2, 8)), torch.randn(2, 2, 3, 10)
    is_media = torch.zeros(2, 8, dtype=torch.bool)
    is_media[:, [0, 3]] = True
    with module.conditioned(llm.model.layers, media, media_index=last_media(is_media)):
        whole = llm(ids).logits
    with module.conditioned(llm.model.layers, media, media_index=last_media(is_media)[:, :5]):
        step = llm(ids[:, :5], use_cache=True)
        logits = [step.logits]
        for i in range(5, 8):
            step = llm(ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, atol=1e-5, rtol=1e-5)


def test_bad_input(llm: nn.Module) -> None:
    with pytest.raises(ConfigError, match="nearest: 4"):
        GatedCrossAttention(num_layers=4, dim=16, media_dim=10, every=5)
    with (
        pytest.raises(ConfigError, match="4 layers, given 3"),
        blocks().conditioned(llm.model.layers[:3], torch.randn(1, 1, 2, 10)),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"\[B, M, T, d_v\]"),
        blocks().conditioned(llm.model.layers, torch.randn(1, 2, 10)),
    ):
        pass
    with pytest.raises(ConfigError, match="heads"):
        GatedCrossAttentionBlock(dim=4, media_dim=4, heads=0)


def test_mixed_dtypes() -> None:
    """fp32 blocks inside a bf16 LLM keep its dtype."""
    block = GatedCrossAttentionBlock(dim=16, media_dim=10, heads=2, head_dim=4)
    x = torch.randn(2, 3, 16).bfloat16()
    out = block(x, torch.randn(2, 4, 10).bfloat16())
    assert out.dtype == torch.bfloat16 and torch.equal(out, x)
