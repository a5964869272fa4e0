"""The walk behind every `use` sees what a walk over all modules sees."""

import copy

import pytest
from torch import nn

import mmpeft
from mmpeft.adapters.state import _states, slots
from mmpeft.errors import ConfigError


def tower():
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), shared), "b": nn.ModuleList([shared, nn.Linear(4, 4)])})


def same(model):
    return set(_states(model)) == {id(slot.state) for _, _, slot in slots(model)}


def test_every_state_is_found_wherever_it_lies():
    model = tower()
    assert same(model) and not _states(model)
    mmpeft.attach(model, {"b.1": mmpeft.LoRA(rank=2)}, check=False)
    assert same(model) and len(_states(model)) == 1
    clone = copy.deepcopy(model)
    assert same(clone) and not set(_states(clone)) & set(_states(model))
    mmpeft.detach(model)
    assert not _states(model) and same(clone)


def test_a_part_that_was_adapted_apart_is_seen_as_soon_as_it_is_put_in():
    model = tower()
    mmpeft.attach(model, {"b.1": mmpeft.LoRA(rank=2)}, check=False)
    mmpeft.use(model, None)
    other = nn.Sequential(nn.Linear(4, 4))
    mmpeft.attach(other, {"0": mmpeft.LoRA(rank=2)}, check=False)
    model["a"] = other
    assert same(model) and len(_states(model)) == 2
    with pytest.raises(ConfigError, match="adapted apart"):
        mmpeft.use(model, None)

