"""The learning-rate schedule as a function of the step."""

import math

import pytest

from mmpeft.errors import ConfigError
from mmpeft.tasks.schedule import check_schedule, lr_factor, warmup_steps


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [7, 40, 301])
def test_warms_up_to_one_and_falls_to_the_final_share(schedule, total):
    factors = [lr_factor(s, total, warmup=0.1, schedule=schedule, final=0.02) for s in range(total)]
    warm = math.ceil(0.1 * total)
    assert factors[0] == pytest.approx(1 / warm)  # the first step is not wasted on a rate of zero
    assert factors[warm - 1] == max(factors) == 1.0
    assert all(a >= b for a, b in zip(factors[warm:], factors[warm + 1 :], strict=False))
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.02)


def test_cosine_is_half_way_at_the_middle():
    assert lr_factor(50, 101, warmup=0, final=0.0) == pytest.approx(0.5)
    assert lr_factor(25, 101, warmup=0, final=0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_warmup_from_one_on_is_a_number_of_steps():
    assert warmup_steps(5, 1000) == 5 and warmup_steps(0.005, 1000) == 5
    assert lr_factor(3, 100, warmup=8) == 0.5


def test_steps_past_the_end_stay_at_the_final_share():
    assert lr_factor(500, 100, final=0.01) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("values", "words"),
    [((0.1, "cosin", 0.1), "nearest: cosine"), ((-0.1, "cosine", 0.1), "warmup"), ((0.1, "cosine", 1.5), "between 0 and 1")],
)
def test_wrong_values_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        check_schedule(*values)
