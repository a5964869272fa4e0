"""What is kept by tensor versions (W', DoRA's norms, compute copies) follows writers that do not count the versions up."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import mmpeft
from mmpeft.adapters.compiled.model import KEPT

X = torch.linspace(-1, 1, 21).reshape(3, 7)


def net(method):
    torch.manual_seed(0)
    model = mmpeft.attach(nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)), {"0 2": method}, "a")
    return model.train()


def read(model):
    with torch.no_grad():
        return model(X)


class Silent(torch.optim.Optimizer):
    """Writes as optimizers with kernels of their own do: through the memory, past the version counter."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.detach().numpy()[...] -= 0.1 * p.grad.numpy()


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), Silent])
@pytest.mark.parametrize("method", [mmpeft.LoRA(rank=2), mmpeft.DoRA(rank=2), mmpeft.LoHa(rank=2)], ids=lambda m: m.name)
def test_a_read_after_a_silent_step_sees_it(method, optimizer):
    model = net(method)
    steps = optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        before = read(model)
        model(X).square().sum().backward()
        steps.step()
        steps.zero_grad()
        after = read(model)
        fresh = read(copy.deepcopy(model))  # a copy keeps nothing
        torch.testing.assert_close(after, fresh, rtol=1e-6, atol=1e-7)
        assert not torch.equal(before, after)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=40, vocab_size=31
    )
    model = transformers.LlamaForCausalLM(config)
    return mmpeft.attach(model, {"model.layers.*.mlp.*_proj": mmpeft.LoRA(rank=2)}, "a").train()


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_compiled_blocks_learn_under_a_fused_optimizer():
    losses = []
    for fused_blocks in (False, True):
        model = llama()
        if fused_blocks:
            mmpeft.compile(model, out=io.StringIO())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
        here = []
        for _ in range(6):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            here.append(float(loss.detach()))
        losses.append(here)
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_written_out_step_is_seen_by_the_model():
    model = llama()
    compiled = mmpeft.compile(model, out=io.StringIO())
    step = compiled.train_step(batch=2, length=5, lr=0.05)
    before = float(model(input_ids=IDS, labels=IDS).loss.detach())
    for _ in range(5):
        step(IDS, IDS)
    with torch.no_grad():
        after = float(model(input_ids=IDS, labels=IDS).loss)
        compiled.undo()
        assert after == pytest.approx(float(model(input_ids=IDS, labels=IDS).loss), rel=1e-4)
    assert after < before - 0.05


def test_a_compiled_model_is_freed_and_its_copies_have_no_report():
    model = llama()
    mmpeft.compile(model, out=io.StringIO())
    float(model(input_ids=IDS, labels=IDS).loss)
    assert copy.deepcopy(model).__dict__[KEPT] is None and pickle.loads(pickle.dumps(model)).__dict__[KEPT] is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
