"""Transfer and forgetting against numbers worked out by hand."""

import numpy as np
import pytest

from mmpeft.errors import ConfigError
from mmpeft.metrics.continual import (
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_score,
    summary,
)

R = [[0.9, 0.3, 0.1], [0.5, 0.8, 0.3], [0.6, 0.4, 0.7]]
BEFORE = [0.1, 0.1, 0.2]


def test_by_hand():
    assert average_score(R) == pytest.approx((0.6 + 0.4 + 0.7) / 3)
    assert learning_score(R) == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert backward_transfer(R) == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)
    assert forgetting(R) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)
    assert forward_transfer(R, BEFORE) == pytest.approx(((0.3 - 0.1) + (0.3 - 0.2)) / 2)
    assert summary(R, BEFORE)["forward_transfer"] == forward_transfer(R, BEFORE)


def test_a_task_that_later_ones_improve_forgets_from_its_best():
    rising = [[0.2, 0.0, 0.0], [0.6, 0.5, 0.0], [0.5, 0.5, 0.5]]
    assert backward_transfer(rising) == pytest.approx((0.3 + 0.0) / 2)
    assert forgetting(rising) == pytest.approx((0.1 + 0.0) / 2)


def test_scores_before_a_task_is_learned_are_not_its_best():
    falling = [[0.5, 0.9], [0.5, 0.4]]  # task 1 was better before it was learned: that is transfer, not forgetting
    assert forgetting(falling) == 0 and forward_transfer(falling, [0, 0.1]) == pytest.approx(0.8)


@pytest.mark.parametrize("bad", [[[0.1, 0.2]], [0.1], [[0.1, np.nan], [0.0, 0.1]], [[0.5]]])
def test_refusals(bad):
    with pytest.raises(ConfigError, match="finite scores"):
        forgetting(bad)
    with pytest.raises(ConfigError, match="2 scores from before"):
        forward_transfer([[1, 1], [1, 1]], [0.1])
