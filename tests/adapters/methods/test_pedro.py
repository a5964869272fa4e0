"""PEDRO: gains made of the prompt, at once and while generating."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import close, deltas, fill, losses_on
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError, NameNotFound

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}


class Layer(nn.Module):
    """A layer of width 6 with the three targets, one after another."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.up_proj = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x):
        return x + self.up_proj(torch.tanh(self.v_proj(torch.tanh(self.q_proj(x)))))


def small():
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()).double().eval(), torch.randn(3, 5, 6).double()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 40, (3, 7))


def gains(d, pooled):
    return (1 + F.gelu(pooled @ d.D.T) @ d.U.T).split([6, 4, 6], -1)


@pytest.mark.parametrize("masked", [True, False])
def test_the_definition(masked):
    model, x = small()
    base = model(x).detach()
    mmpeft.attach(model, {"*": mmpeft.PEDRO(rank=2)}, name="a", example=x)
    assert mmpeft.inspect(model).trainable == 2 * 2 * (6 + 16) and close(model(x), base, 1e-12)
    fill(model, size=0.5)
    makers = [d for d in deltas(model) if d.trained]
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    h = x
    for layer, d in zip(model, makers, strict=True):
        if masked:
            pooled = torch.stack([row[m].mean(0) for row, m in zip(h, mask, strict=True)]).unsqueeze(1)
        else:
            pooled = torch.stack([h[:, : t + 1].mean(1) for t in range(5)], 1)
        q, v, up = gains(d, pooled)
        with mmpeft.use(model, None):
            inner = v * layer.v_proj(torch.tanh(q * layer.q_proj(h)))
            h = h + up * layer.up_proj(torch.tanh(inner))
    if masked:
        with mmpeft.prompt_mask(model, mask):
            assert close(model(x), h, 1e-12)
    else:
        assert close(model(x), h, 1e-12) and not close(h, base, 1e-2)
        assert close(model(x[:, :3]), h[:, :3], 1e-12), "without a mask nothing later is seen"


def test_generation_with_a_cache_keeps_the_prompts_gains():
    model, ids = llama()
    mmpeft.attach(model, {"model.layers.*": mmpeft.PEDRO(rank=3)}, name="a", example={"input_ids": ids})
    assert mmpeft.inspect(model).trainable == 2 * 3 * (16 + 16 + 8 + 24)
    fill(model, size=0.5)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, :4] = True
    with torch.no_grad():
        with mmpeft.prompt_mask(model, mask):
            whole = model(ids).logits
        with mmpeft.prompt_mask(model, mask[:, :4]):
            out = model(ids[:, :4], use_cache=True)
        steps = [out.logits]
        for t in range(4, 7):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert close(torch.cat(steps, 1), whole, 1e-6) and not close(model(ids).logits, whole, 1e-4)
    copy.deepcopy(model)


def test_it_learns_saves_and_refuses(tmp_path):
    model, x = small()
    mmpeft.attach(model, {"*": mmpeft.PEDRO(rank=2)}, name="a", example=x)
    teacher = copy.deepcopy(model)
    fill(teacher, size=0.7, seed=3)
    target = teacher(x).detach()
    losses = losses_on(model, x, target, lr=0.03, steps=200)
    assert losses[0] > 1e-3 and losses[-1] < 0.25 * losses[0]
    y = model(x).detach()
    mmpeft.save(model, tmp_path, name="a")
    other, _ = small()
    mmpeft.load(other, tmp_path, check=False)
    assert close(other(x), y, 1e-12)
    with pytest.raises(ConfigError, match="a prompt mask of"), mmpeft.prompt_mask(model, torch.ones(3, 4).bool()):
        model(x)
    with pytest.raises(NameNotFound, match="has no 'up'.*up_proj"):
        mmpeft.attach(small()[0], {"*": mmpeft.PEDRO(targets=("q_proj", "up"))}, example=x)
    with pytest.raises(ConfigError, match="no site of PEDRO"), mmpeft.prompt_mask(small()[0], torch.ones(1, 1).bool()):
        pass
    with pytest.raises(ConfigError, match="relu"):
        mmpeft.PEDRO(activation="rational")
