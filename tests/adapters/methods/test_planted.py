"""Methods whose places data choose, or whose base is quantised, learn a planted task too: data made by the same model with
random values in the trained tensors, the head frozen. (All others: `test_common.py` and `test_kinds.py`.)"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import deltas, fill, losses_on
from torch import nn

import mmpeft
from mmpeft.adapters import catalogue
from mmpeft.adapters.methods.sparse import Sparse
from mmpeft.adapters.selection.criteria import DATA_FREE
from mmpeft.adapters.storage.integer import Int

CHOSEN = {  # a share that is more than a number or two of this model
    "FishMask": mmpeft.FishMask(density=0.3),
    "ChildTuningD": mmpeft.ChildTuningD(),
    "LTSFT": mmpeft.LTSFT(density=0.3),
    "UBitFit": mmpeft.UBitFit(),
    "SecondOrderMask": mmpeft.SecondOrderMask(density=0.3),
    "SHPEFT": mmpeft.SHPEFT(density=0.3),
    "FAR": mmpeft.FAR(),
    "NEFT": mmpeft.NEFT(density=0.3),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).eval()


def learns(model: nn.Module, size: float, lr: float = 0.03) -> tuple[float, float]:
    """Mean squared error before and after, on the outputs of a copy whose trained tensors are random."""
    teacher, x = copy.deepcopy(model), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    fill(teacher, "a", 5, size)
    with torch.no_grad():
        target = teacher(x)
    losses = losses_on(model, x, target, lr=lr, steps=200)
    return losses[0], min(losses[-5:])


def test_every_method_that_needs_data_is_here():
    needy = {
        c.__name__
        for c in catalogue.methods()
        if issubclass(c, Sparse) and c.criterion not in DATA_FREE and not c.__name__.startswith("SpIEL")
    }
    assert needy == set(CHOSEN)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_places_that_data_chose_learn(name):
    model = net()
    x, y = torch.randn(24, 8, generator=torch.Generator().manual_seed(2)), torch.arange(24) % 5
    primed = copy.deepcopy(model)
    optimizer = torch.optim.Adam(primed.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(primed(x), y).backward()
        optimizer.step()
    made = [lambda i=i: F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    mmpeft.attach_selected(model, {"0": CHOSEN[name]}, made, trained=primed.state_dict(), name="a", example=x)
    head = model[2].weight.detach().clone()
    first, last = learns(model, 0.6)
    assert first > 1e-3 and last < 0.25 * first, f"{first:.4f} -> {last:.4f}"
    (delta,) = deltas(model)
    assert type(delta.method) is type(CHOSEN[name]) and torch.equal(model[2].weight, head)


@pytest.mark.parametrize("group", [None, 4])
def test_peqa_learns_the_scales_of_fixed_integers(group):
    model = net()
    mmpeft.quantise(model, "0", Int(4, group))
    codes = model[0]._parameters["weight"].packed["codes"].clone()
    mmpeft.attach(model, {"0": mmpeft.PEQA(group=group)}, name="a", example=torch.randn(2, 8))
    first, last = learns(model, 0.05, lr=0.003)
    assert first > 1e-3 and last < 0.25 * first, f"{first:.4f} -> {last:.4f}"
    assert torch.equal(model[0]._parameters["weight"].packed["codes"], codes)
