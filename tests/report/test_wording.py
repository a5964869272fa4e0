"""Numbers are said with the digits and units that a reader expects."""

import math

import pytest

from mmpeft.report.wording import between, count, duration, p_value, percent, significant, size

CASES = [
    (percent(0.92, of=50), "92 %"), (percent(0.925, of=1000), "92.5 %"), (percent(None), "–"), (percent(math.nan), "–"),
    (between(0.811, 0.968), "81 to 97 %"), (between(math.nan, 1.0), "–"),
    (count(12_000), "12 000"), (count(1_240_000), "1.24 M"), (count(150_000), "150 k"), (count(999_999), "1 M"),
    (count(99_999), "99 999"), (count(3_000_000_000), "3 G"), (count(0), "0"), (count(2.5), "2.5"), (count(None), "–"),
    (count(-150_000), "-150 k"), (count(math.inf), "–"),
    (significant(0.012345), "0.0123"), (significant(1234.5), "1234" if round(1234.5) == 1234 else "1235"), (significant(0), "0"),
    (significant(5e-4), "5e-4"), (significant(1.25e7), "1.25e7"), (significant(100.0), "100"), (significant(-0.5), "-0.5"),
    (size(999), "999 bytes"), (size(4_960_000), "4.96 MB"), (size(24e9), "24 GB"), (size(999_900), "1 MB"), (size(5e12), "5000 GB"), (size(None), "–"),
    (duration(8.44), "8.4 s"), (duration(59.97), "1 min 00 s"), (duration(800), "13 min 20 s"), (duration(7500), "2 h 05 min"),
    (duration(3599.7), "1 h 00 min"), (duration(-1), "–"),
    (p_value(1e-9), "p < .001"), (p_value(0.032), "p = .032"), (p_value(0.41), "p = .41"), (p_value(1.0), "p = 1.00"), (p_value(None), "–"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "expected"), CASES, ids=[c[1] for c in CASES])
def test_words(said, expected):
    assert said.replace("\u00a0", " ").replace("\u2009", " ") == expected
