"""A sample of the grid of method x kind of site (`grid.py`; `make grid` runs all of it): every method at the place it is made
for and at three more, every kind of site met by several methods, in train, eval and eval without gradients."""

from __future__ import annotations

import zlib

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")

import grid  # noqa: E402

from mmpeft.adapters import catalogue  # noqa: E402
from mmpeft.adapters.method import Factors  # noqa: E402

METHODS = {c.__name__: c for c in catalogue.methods() if c.__name__ not in grid.NOT_HERE}
SITES = {site.name: site for site in grid.KINDS}
MORE = 3  # sites beside its home
HOME = {"weight": "linear-3d", "call": "vit-attention", "tokens": "llm"}  # where a kind of method works
OWN_HOME = {
    "LayerNormTuning": "norm-layernorm", "VPT": "vit-blocks", "PEDRO": "llm-layers", "HeadScaling": "linear-3d",
    "LoFiT": "linear-3d", "ITI": "linear-3d", "KronAB": "vit-mlp", "KronARes": "vit-mlp", "ConvAdapter": "conv2d",
    "AttnScaleLite": "linear-3d", "BOFT": "mha", "Gated": "linear-3d",
}  # fmt: skip


def sample(name: str) -> list[str]:
    """The method's home, and three more kinds of site: one after the other in the order of the methods, so that all are met."""
    home = OWN_HOME.get(name, HOME[METHODS[name].kind])
    start = MORE * list(METHODS).index(name)
    more = [grid.KINDS[(start + i) % len(grid.KINDS)].name for i in range(MORE)]
    return list(dict.fromkeys([home, *more]))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_holds_what_it_promises_at_its_place_and_others(name, monkeypatch):
    """In float32 and one of the other precisions."""
    other = (torch.float64, torch.bfloat16)[zlib.crc32(name.encode()) % 2]
    monkeypatch.setattr(grid, "DTYPES", {d: grid.DTYPES[d] for d in (torch.float32, other)})
    cells = dict(zip(sample(name), [grid.cell(METHODS[name], SITES[s]) for s in sample(name)], strict=True))
    assert {site: c.failed for site, c in cells.items() if c.failed} == {}
    home = next(iter(cells.values()))
    assert not home.refused, home.refused


def test_the_sample_meets_every_kind_of_site_and_method():
    met = {site for name in METHODS for site in sample(name)}
    assert met == set(SITES)
    assert {c.kind for c in METHODS.values()} == {"weight", "call", "tokens"}


def test_what_trains_nothing_is_still_held_to_its_effect():
    """RepE and ITI: refused nowhere for want of a gradient."""
    for name in grid.STEERS:
        cell = grid.cell(METHODS[name], SITES["linear-3d"])
        assert not cell.refused and not cell.failed


def test_a_broken_method_fails_its_cell(monkeypatch):
    """The cell is a check: an effect that is not there, a start that is not the base, a gradient that is lost."""
    lora = METHODS["LoRA"]
    factors = lora.factors
    breaks = {
        "start": lambda self, W, p: Factors(p.A, p.B + 0.1, 1.0),
        "modes": lambda self, W, p: Factors(p.A, p.B, 2.0 if p.training else 1.0),
        "effect in no-grad": lambda self, W, p: Factors(p.A, p.B, 1.0 if torch.is_grad_enabled() else 0.0),
    }
    for expected, broken in breaks.items():
        monkeypatch.setattr(lora, "factors", broken)
        found = grid.cell(lora, SITES["linear-3d"])
        assert any(expected in line for line in found.failed) or (found.refused and expected.startswith("effect"))
        monkeypatch.setattr(lora, "factors", factors)
