"""Success rates: Wilson's interval at published values, McNemar's exact test, the metric by task."""

import math
from math import comb

import pytest
import torch

from mmpeft.errors import ConfigError
from mmpeft.metrics import load_metric
from mmpeft.metrics.intervals import mcnemar_exact, paired_test, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_at_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation():
    """The bounds are where |p_hat - p| = z sqrt(p (1 - p) / n)."""
    for k, n, level, z in ((42, 50, 0.95, 1.959964), (3, 7, 0.99, 2.575829)):
        for bound in wilson_interval(k, n, level=level):
            assert abs(k / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(50, 50)[1] == 1.0 and wilson_interval(50, 50)[0] > 0.92


def test_wilson_covers():
    """True coverage of the 95 % interval at n = 50 stays near 95 % (the normal interval falls to .65 at p = .02)."""
    for p in (0.02, 0.1, 0.5, 0.84):
        covered = sum(
            comb(50, k) * p**k * (1 - p) ** (50 - k)
            for k in range(51)
            if wilson_interval(k, 50)[0] <= p <= wilson_interval(k, 50)[1]
        )
        assert 0.90 < covered < 0.99


def test_mcnemar_is_the_binomial_test():
    for b, c in ((1, 9), (0, 5), (7, 7), (30, 12)):
        exact = sum(comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c) * 2
        assert mcnemar_exact(b, c) == mcnemar_exact(c, b) == pytest.approx(min(1, exact))
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(1, 9) == pytest.approx(0.021484375)
    assert 0 < mcnemar_exact(900, 1100) < 1e-4  # large counts do not overflow


def test_paired_test():
    a = [True, True, True, False, False, True]
    b = [True, False, False, False, True, False]
    difference, p = paired_test(a, b)
    assert difference == pytest.approx((4 - 2) / 6) and p == mcnemar_exact(3, 1)
    with pytest.raises(ConfigError, match="same episodes"):
        paired_test(a, b[:3])
    with pytest.raises(ConfigError):
        wilson_interval(3, 2)
    with pytest.raises(ConfigError):
        wilson_interval(1, 2, level=95)
    with pytest.raises(ConfigError):
        mcnemar_exact(-1, 2)


def test_metric_by_task():
    metric = load_metric("success_rate")
    metric.update([True, False, True], ["push", "push", "reach"])
    metric.update(torch.tensor([True, True]), ["reach", "reach"])
    low, high = wilson_interval(4, 5)
    assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(
        {
            "success_rate": 0.8,
            "success_rate/push": 0.5,
            "success_rate/reach": 1.0,
            "success_rate_low": low,
            "success_rate_high": high,
            "episodes": 5,
        }
    )
    with pytest.raises(ConfigError):
        load_metric("success_rate", level=95)
