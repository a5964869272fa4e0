"""Modes of an adapted model: what asks for eval for a while leaves every module as it was."""

import pytest
import torch
from cases import Attention
from torch import nn

import mmpeft
from mmpeft.adapters.freeze import evaluating, learning
from mmpeft.adapters.peft.export import export_peft


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.high(torch.relu(self.low(x)))))


def adapted():
    torch.manual_seed(0)
    model = Net()
    mmpeft.attach(model, {"low": mmpeft.LoRA(rank=2, dropout=0.5), "head": "full"}, "a", example=torch.randn(3, 6))
    with torch.no_grad():
        for p in model.low.parameters():
            p.add_(torch.randn(p.shape))
    return model


def modes(model):
    return {n: m.training for n, m in model.named_modules()}


def test_the_root_does_not_tell():
    model = adapted().train()
    assert not model.training and learning(model)
    model.eval()
    assert not learning(model)


def test_eval_for_a_while():
    model = adapted().train()
    before, x = modes(model), torch.randn(4, 6)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not learning(model) and torch.equal(model(x), model(x))
        raise ZeroDivisionError
    assert modes(model) == before and not torch.equal(model(x), model(x))
    model.eval()
    with evaluating(model):
        assert not learning(model)
    assert not learning(model)


def test_what_eval_kept_does_not_lie_there_through_training():
    model, x = Attention(), torch.randn(2, 3, 8)  # reads its weight, so that it is made and kept
    mmpeft.attach(model, {"site[q]": mmpeft.LoRA(rank=2)}, "a", example=x)
    kept = lambda: [c for m in model.modules() for c in getattr(m, "cache", {}).values()]  # noqa: E731
    model.train()
    with torch.no_grad(), evaluating(model):
        model(x)
        assert kept()
    assert not kept()


@pytest.mark.parametrize("call", [
    lambda m, folder: mmpeft.attach(m, {"high": mmpeft.LoRA(rank=2)}, "b", example=torch.randn(3, 6)),
    lambda m, folder: (mmpeft.attach(m, {"high": mmpeft.LoRA(rank=2)}, "b", check=False), mmpeft.detach(m, "b")),
    lambda m, folder: mmpeft.inspect(m, {"high": mmpeft.LoRA(rank=2)}, example=torch.randn(3, 6)),
    lambda m, folder: export_peft(m, folder, name="a", example=torch.randn(3, 6)),
])  # fmt: skip
def test_what_looks_at_a_model_wakes_and_puts_to_sleep_nothing(call, tmp_path):
    model = adapted().train()
    before = modes(model)
    call(model, tmp_path)
    assert {n: t for n, t in modes(model).items() if n in before} == before
