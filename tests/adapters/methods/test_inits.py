"""How methods start and what their defaults are, against the table of `inits.py`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import deltas
from inits import CHOICES, DEFAULTS, IN, OUT, STARTS, std
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters import catalogue
from mmpeft.adapters.storage.integer import Int


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(IN, IN), nn.Linear(IN, OUT)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, IN)

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(IN, OUT))
    mmpeft.quantise(model, "0", Int(4))
    return model


def place(method: mmpeft.Method) -> tuple[nn.Module, str]:
    """A model without a forward worth calling, and where the method goes."""
    special = {
        mmpeft.LayerNormTuning: lambda: (nn.Sequential(nn.LayerNorm(IN)), "0"),
        mmpeft.PEDRO: lambda: (nn.ModuleDict({"layers": nn.ModuleList([Layer()])}), "layers.0"),
        mmpeft.VPT: lambda: (nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(IN, IN)])}), "blocks"),
        mmpeft.PromptTuning: lambda: (nn.ModuleDict({"llm": Decoder()}), "llm"),
        mmpeft.PEQA: lambda: (quantised(), "0"),
    }
    if type(method) in special:
        return special[type(method)]()
    return nn.Sequential(nn.Linear(IN, OUT if method.kind == "weight" else IN)), "0"


def started(method: mmpeft.Method) -> tuple[Tensor, dict[str, Tensor]]:
    """(the base weight, the tensors of its site and those that only its bias' site has)."""
    torch.manual_seed(0)
    model, match = place(method)
    W = next(model.parameters())
    W = (W.dense() if isinstance(method, mmpeft.PEQA) else W).detach().clone()
    mmpeft.attach(model, {match: method}, name="a", check=False)
    found = deltas(model)
    matrix = next((d for d in found if "bias" not in d.site.tensor), found[0])
    tensors = {n: t.detach() for d in (*found, matrix) for n, t in d._parameters.items()}
    return W, tensors


@pytest.mark.parametrize("start", STARTS, ids=lambda s: str(s.method))
def test_every_tensor_starts_as_the_paper_says(start):
    W, tensors = started(start.method)
    assert set(tensors) == set(start.tensors)
    for name, check in start.tensors.items():
        assert check(tensors[name], W, tensors), f"{name}: {tensors[name].float().std():.4g} {tensors[name].flatten()[:4]}"


def test_every_method_is_in_the_table():
    assert {type(s.method) for s in STARTS} == set(catalogue.methods())


@pytest.mark.parametrize("cls", catalogue.methods(), ids=lambda c: c.__name__)
def test_every_field_has_its_default(cls):
    """What is neither a number, a word nor a switch that is on is None or off: read off elsewhere, or not used."""
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    numbers = {n: v for n, v in fields.items() if type(v) in (int, float)}
    assert numbers == DEFAULTS.get(cls.__name__, {})
    others = {n: v for n, v in fields.items() if n not in numbers and v is not None and v is not False}
    assert others == CHOICES.get(cls.__name__, {})


def test_the_checks_tell_distributions_apart():
    """Else a wrong start would pass: a factor of 1.5, a normal for a uniform, zeros for anything."""
    torch.manual_seed(0)
    W, normal = torch.zeros(2, 2), torch.randn(500)
    assert std(1.0)(normal, W, {}) and not std(1.5)(normal, W, {}) and not std(0.7)(normal, W, {})
    assert not std(1.0)(torch.zeros(500), W, {}) and not std(1.0)(normal.abs(), W, {})


def test_loraplus_trains_b_sixteen_times_as_fast():
    model = nn.Sequential(nn.Linear(IN, OUT))
    mmpeft.attach(model, {"0": mmpeft.LoRAPlus()}, example=torch.randn(2, IN))
    rates = {tuple(p.shape): g["lr"] for g in mmpeft.parameter_groups(model, lr=1.0) for p in g["params"]}
    assert rates == {(8, IN): 1.0, (OUT, 8): 16.0}
