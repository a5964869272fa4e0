"""A small adapted model and one backward of it, for the tests of rank and compaction."""

from __future__ import annotations

import torch
from cases import fill
from torch import nn

import mmpeft


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 5)).eval()


def adapted(method, *, filled: bool = True, match="{0,2,4}") -> nn.Module:
    model = small()
    mmpeft.attach(model, {match: method}, name="a", example=torch.randn(3, 6))
    if filled:
        fill(model)
    return model


def backward(model, seed=0, penalty=None):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(7, 6, generator=g), torch.randn(7, 5, generator=g)
    loss = (model(x) - y).square().mean()
    model.zero_grad()
    (loss if penalty is None else loss + penalty()).backward()
