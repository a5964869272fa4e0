"""A number of steps fixed once, from the measured speed, and kept by whoever resumes."""

import time

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mmpeft.errors import ConfigError
from mmpeft.tasks import BudgetedSteps

from .kit import data_of, task_of


@pytest.fixture
def clock(monkeypatch):
    """perf_counter that a step advances by `clock.step` seconds."""

    class Clock:
        now, step = 100.0, 0.5

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)
    return Clock


class Timed(BudgetedSteps):
    """The callback, with the clock running on before it looks."""

    def __init__(self, clock, seconds, **options):
        super().__init__(seconds, **options)
        self.clock = clock

    def on_train_batch_end(self, *args):
        self.clock.now += self.clock.step
        super().on_train_batch_end(*args)


def fit(tokenizer, make_trainer, callback, *more, **options):
    task = task_of(tokenizer, warmup=2)
    trainer = make_trainer(max_epochs=-1, callbacks=[callback, *more], limit_val_batches=0, **options)
    torch.manual_seed(0)
    trainer.fit(task, datamodule=data_of())
    return task, trainer


def test_steps_that_fit_are_made_and_reported(tokenizer, make_trainer, clock, capsys):
    budget = Timed(clock, 10.0, skip=1, measure=4)
    task, trainer = fit(tokenizer, make_trainer, budget)
    # known after 6 steps (3 s); 7 s are left at half a second each
    assert budget.step_seconds == pytest.approx(0.5) and budget.steps == 20
    assert trainer.global_step == 20 and task.total_steps == 20
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.01, rel=0.1)
    assert "20 steps fit into 10 s" in capsys.readouterr().out


def test_a_fast_host_stops_at_the_cap_and_a_slow_one_still_ends(tokenizer, make_trainer, clock):
    fast = Timed(clock, 1000.0, skip=0, measure=3, max_steps=9)
    assert fit(tokenizer, make_trainer, fast)[1].global_step == 9
    late = Timed(clock, 1.0, skip=0, measure=3)  # the budget is spent before it is known
    assert fit(tokenizer, make_trainer, late)[1].global_step == 5


def test_a_resumed_run_keeps_the_number_on_another_host(tokenizer, make_trainer, clock, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    fit(tokenizer, make_trainer, Timed(clock, 6.0, skip=0, measure=3), keep, enable_checkpointing=True)
    clock.step = 50.0
    again = Timed(clock, 6.0, skip=0, measure=3)
    task = task_of(tokenizer, warmup=2)
    trainer = make_trainer(max_epochs=-1, callbacks=[again], limit_val_batches=0)
    trainer.fit(task, datamodule=data_of(), ckpt_path=tmp_path / "step=8.ckpt")
    assert again.steps == 12 and trainer.global_step == 12 and task.total_steps == 12


@pytest.mark.parametrize("options", [{"seconds": 0}, {"seconds": 5, "measure": 0}, {"seconds": 5, "skip": -1}])
def test_bad_numbers_are_refused(options):
    with pytest.raises(ConfigError, match="BudgetedSteps"):
        BudgetedSteps(**options)


def test_the_slowest_fifth_of_the_measured_steps_counts_nothing(tokenizer, make_trainer, clock):
    """Somebody else's burst of work in the first seconds does not cost the run its steps."""

    class Disturbed(Timed):
        def on_train_batch_end(self, trainer, *more):
            self.clock.now += 3.0 * (trainer.global_step == 4)
            super().on_train_batch_end(trainer, *more)

    budget = Disturbed(clock, 13.0, skip=1, measure=5)
    fit(tokenizer, make_trainer, budget)
    # known after 7 steps (3.5 s and the burst of 3); 6.5 s are left at half a second each
    assert budget.step_seconds == pytest.approx(0.5) and budget.steps == 20
