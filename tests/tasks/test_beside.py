"""A method that is something else without what runs beside the optimizer says so: in the plan's table, and in training."""

from __future__ import annotations

import logging

import lightning
import pytest
from torch import nn

import mmpeft
from mmpeft.adapters.method import REGISTRY
from mmpeft.adapters.selection.controller import Controller
from mmpeft.tasks import StepControl

from .test_step_control import Host, Points, Regress

BESIDE = {
    "RosePruner": (mmpeft.RoseLoRA(rank=2), lambda m: mmpeft.RosePruner(m, begin=0, end=4)),
    "Masks": (mmpeft.LoRADropout(rank=2), lambda m: mmpeft.RankController(m, mmpeft.Masks())),
    "draw_mixout": (mmpeft.Mixout(p=0.5), lambda m: mmpeft.Draws(m, of=mmpeft.draw_mixout)),
}


def fitted(method, callbacks):
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(Regress(Host(), {"layers.{0,2}": method}), datamodule=Points())


@pytest.mark.parametrize("name", BESIDE)
def test_training_without_it_is_named(name, caplog):
    method, make = BESIDE[name]
    with caplog.at_level(logging.WARNING, "mmpeft"):
        fitted(method, [StepControl(make)])
        assert "beside the optimizer" not in caplog.text
        fitted(method, [])
    assert f"nothing runs beside the optimizer for {type(method).__name__}: {name}" in caplog.text
    page = str(mmpeft.inspect(Host(), {"layers.{0,2}": method}))
    assert f"wants something beside the optimizer, or trains as it starts: {type(method).__name__}: {name}" in page


def test_a_plan_of_plain_methods_wants_nothing():
    page = str(mmpeft.inspect(nn.Linear(4, 4), {".": mmpeft.LoRA(rank=2)}))
    assert "beside the optimizer" not in page


def test_every_name_is_something_that_exists():
    """A controller, a rank policy or a function, at the front door."""
    named = {n: cls for cls in REGISTRY.values() for n in cls.beside}
    assert len(named) > 10
    for name, cls in named.items():
        there = getattr(mmpeft, name, None)
        assert there is not None, f"{cls.__name__} wants {name}"
        if isinstance(there, type) and not issubclass(there, Controller):
            assert cls in (there.__dict__.get("method", cls), getattr(there, "method", cls)) or callable(there)
