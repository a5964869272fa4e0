"""Stopping at a plateau: when it stops, what noise does not do, and the callback."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from mmpeft.errors import ConfigError

lightning = pytest.importorskip("lightning")
from mmpeft.tasks.convergence import ConvergenceStop, Plateau  # noqa: E402


def run(losses, **options):
    stop = Plateau(**{"window": 10} | options)
    return next((i + 1 for i, loss in enumerate(losses) if stop(loss)), None)


def test_it_stops_after_patience_windows_without_progress():
    falling = [1 - 0.01 * i for i in range(50)]
    assert run(falling) is None
    assert run(falling + [0.5] * 100) == 80  # progress in window 6 ends it; 7 and 8 bring nothing
    assert run(falling + [0.5] * 100, patience=4) == 100
    assert run([1.0] * 100) == 30


def test_the_threshold_follows_the_noise():
    rng = random.Random(0)
    noisy = [1 + rng.gauss(0, 0.3) for _ in range(2000)]
    slow = [math.exp(-i / 400) + rng.gauss(0, 0.02) for i in range(400)]
    assert run(noisy, window=50, tolerance=0.0) < 400
    assert run(slow, window=50) is None
    # a gain below the noise of the windows is no progress, the same gain without noise is
    assert run([1 - 0.0005 * i for i in range(100)], tolerance=0.0) is None
    assert run([1 - 0.0005 * i + (0.3 if i % 2 else -0.3) for i in range(100)], tolerance=0.0) == 30


def test_state_goes_on():
    losses = [1 - 0.01 * i for i in range(50)] + [0.5] * 100
    stop = Plateau(window=10)
    for loss in losses[:57]:
        assert not stop(loss)
    other = Plateau(window=10)
    other.load_state_dict(stop.state_dict())
    assert [other(loss) for loss in losses[57:80]].index(True) == 22


@pytest.mark.parametrize("options", [{"window": 1}, {"patience": 0}, {"tolerance": -1.0}, {"noise": -1.0}])
def test_bad_values_are_refused(options):
    with pytest.raises(ConfigError):
        Plateau(**options)


def test_divergence_is_not_convergence():
    with pytest.raises(ConfigError, match="diverged"):
        Plateau()(float("nan"))


def test_the_callback_ends_fit(make_trainer):
    class Constant(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, index):
            return self.w.square() * 0 + 1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = make_trainer(max_epochs=1, callbacks=[ConvergenceStop(window=4)])
    trainer.fit(Constant(), torch.utils.data.DataLoader(torch.zeros(100, 1)))
    assert trainer.global_step == 12
