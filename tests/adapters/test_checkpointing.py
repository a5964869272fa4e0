"""Activation checkpointing: a recomputation repeats the active set of its own forward, or raises."""

from __future__ import annotations

import pytest
import torch
from cases import Attention, deltas, fill
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmpeft
from mmpeft.errors import ConfigError

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A called and a read site, each behind its own checkpoint."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.kwargs = None if reentrant is None else {"use_reentrant": reentrant}
        self.linear = nn.Linear(8, 8)
        self.attention = Attention()

    def forward(self, x):
        if self.kwargs is None:
            return self.attention(torch.tanh(self.linear(x)))
        x = checkpoint(lambda h: torch.tanh(self.linear(h)), x, **self.kwargs)
        return checkpoint(self.attention, x, **self.kwargs)


def build(reentrant):
    model = Net(reentrant).eval()
    for seed, name in enumerate("ab"):
        mmpeft.attach(
            model, {"linear": mmpeft.LoRA(rank=2), "attention.site[q,v]": mmpeft.LoRA(rank=2)}, name=name, check=False
        )
        fill(model, name, seed)
    return model


def copy_of(model):
    other = build(None)
    other.load_state_dict(model.state_dict())
    return other


def gradients(model, names="ab"):
    return [None if p.grad is None else p.grad.clone() for n in names for d in deltas(model, n) for p in d.parameters()]


def same(a, b):
    return all(
        (x is None) == (y is None) and (x is None or torch.allclose(x, y, atol=1e-6)) for x, y in zip(a, b, strict=True)
    )


def test_gradients_equal_those_without_checkpointing():
    model = build(False)
    other = copy_of(model)
    for names in ("a", ["a", "b"], {"a": 0.3, "b": 0.7}):
        for m in (model, other):
            m.zero_grad()
            mmpeft.use(m, names)
            m(X).square().sum().backward()
        assert same(gradients(model), gradients(other))


def test_the_recomputation_repeats_its_own_forward_whatever_is_active_now():
    model = build(False)
    other = copy_of(model)
    losses = []
    for m in (model, other):
        with mmpeft.use(m, "a"):
            first = m(X).square().sum()
        with mmpeft.use(m, "b"):
            second = m(X + 1).square().sum()
        mmpeft.use(m, None)
        m(X)
        (first + 2 * second).backward()
        losses.append((first.item(), second.item()))
    assert losses[0] == pytest.approx(losses[1])
    assert same(gradients(model), gradients(other))


def test_recomputation_after_detaching_the_state_is_fresh():
    import copy
    import pickle

    model = build(False)
    model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(copy_of(model)))):
        other(X).sum().backward()


def test_reentrant_repeats_the_one_set_or_raises():
    model = build(True)
    other = copy_of(model)
    x = X.clone().requires_grad_()
    for m in (model, other):
        with mmpeft.use(m, "a"):
            loss = m(x).square().sum()
        loss.backward()
    assert same(gradients(model, "a"), gradients(other, "a"))
    with mmpeft.use(model, "a"):
        first = model(x).sum()
    with mmpeft.use(model, "b"):
        second = model(x).sum()
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        (first + second).backward()


def test_rows_of_a_call_method_survive_recomputation():
    class Called(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.on = on
            self.mlp = nn.Linear(8, 8)

        def forward(self, x):
            return checkpoint(self.mlp, x, use_reentrant=False) if self.on else self.mlp(x)

    found = []
    for on in (True, False):
        torch.manual_seed(0)
        model = Called(on)
        for seed, name in enumerate("ab"):
            mmpeft.attach(model, {"mlp": mmpeft.Bottleneck(size=2)}, name=name, example=X)
            fill(model, name, seed)
        with mmpeft.use(model, rows=["a", None, "b"]):
            loss = model(X).square().sum()
        loss.backward()
        found.append(gradients(model))
    assert same(*found)


def test_transformers_gradient_checkpointing():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    found = []
    for on in (True, False):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        if on:
            model.gradient_checkpointing_enable()
        mmpeft.attach(model, {"model.**.{q,v}_proj": mmpeft.LoRA(rank=2)}, name="a")
        fill(model)
        model.train()
        assert model.model.is_gradient_checkpointing == on
        with mmpeft.use(model, "a"):
            loss = model(ids, labels=ids).loss
        with mmpeft.use(model, None):
            loss.backward()
        found.append(gradients(model, "a"))
    assert same(*found) and all(g is not None and g.any() for g in found[0])
