"""Charts put values where they belong, keep names apart, and are well-formed SVG."""

import math
import random
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.report.charts import COLOURS, Cell, Mark, bars, colour, dot_axis, dot_row, strip, swatch
from mmpeft.report.curves import FEW, Line, apart, curves, linear, logarithmic, smoothed, thinned, vertical


def shapes(markup, name):
    return [e.attrib for e in ElementTree.fromstring(markup).iter() if e.tag == name]


def test_dots_stand_at_their_share_with_their_interval():
    row = dot_row("a < b", "92 %", [Mark("a", 0.92, (0.81, 0.97), 0), Mark("b", 0.5, None, 1)])
    assert shapes(row, "circle")[0]["cx"] == "92.00%"
    assert {"81.00%", "97.00%"} <= {line["x1"] for line in shapes(row, "line")}
    assert [s["x"] for s in shapes(row, "svg") if s.get("class") == "anchor"] == [
        "50.00%"
    ]  # the second mark: a diamond
    assert "a 92" in shapes(row, "svg")[0]["aria-label"] and "a &lt; b" in row
    assert len(shapes(dot_axis(), "text")) == 5


def test_a_strip_wraps_and_failures_differ_in_shape():
    cells = [Cell(float(i % 3 == 0), f"seed {i}") for i in range(113)]
    drawn = strip(cells, label="39 of 113", number=7)
    assert len(shapes(drawn, "rect")) == 2 * 113 and shapes(drawn, "svg")[0]["height"] == "78"
    full, stub = ([r for r in shapes(drawn, "rect") if r["class"] == kind] for kind in ("full", "stub"))
    assert len(full) == 38 and len(stub) == 75
    assert {r["height"] for r in full} == {"22"} and {r["height"] for r in stub} == {"4"}
    assert shapes(drawn, "svg")[0]["class"] == f"strip {colour(7)}" == f"strip c{7 % COLOURS} again"
    assert strip([], label="none", number=0).startswith("<svg")
    assert max(float(r["x"].rstrip("%")) + float(r["width"].rstrip("%")) for r in shapes(drawn, "rect")) < 100


def test_bars_are_as_long_as_their_share():
    drawn = bars([("collect", "20 s", 0.25), ("fit", "80 s", 1.0)])
    assert [r["width"] for r in shapes(drawn, "rect")] == ["25.00%", "100.00%"]
    assert shapes(swatch(1, 2), "svg")[0]["class"] == "swatch c1"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_linear_scales_cover_their_values_with_round_ticks(low, span, wanted):
    span = max(span, 1e-5 * abs(low))  # below that, the ticks themselves are rounded
    scale = linear(low, low + span, wanted)
    step = scale.ticks[1] - scale.ticks[0]
    assert scale.low <= low + 1e-3 * span and scale.high >= low + span - 1e-3 * span
    assert 2 <= len(scale.ticks) <= 2 * wanted + 4
    mantissa = step / 10 ** math.floor(math.log10(step * (1 + 1e-6)))
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


def test_scales():
    assert linear(0, 997, 4, tight=True).ticks == (0, 200, 400, 600, 800)
    assert linear(3, 805, 4, tight=True).ticks == (200, 400, 600, 800)
    flat = linear(3.0, 3.0, 4)  # one value has room above and below
    assert flat.low < 3 < flat.high
    decades = logarithmic(2e-6, 0.9)
    assert decades.ticks == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert logarithmic(0.02, 0.3).ticks == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert len(logarithmic(1e-14, 1.0).ticks) <= 7
    assert decades(2e-6 / 1.05) == pytest.approx(0) and decades(0.9 * 1.05) == pytest.approx(1)


def test_log_only_for_what_crowds_at_the_bottom():
    falling = [0.5 * math.exp(-i / 20) + 0.005 for i in range(200)]
    cosine = [1e-3 * (1e-4 + (1 + math.cos(math.pi * i / 200)) / 2) for i in range(200)]
    assert vertical([falling], [falling]).log
    assert not vertical([cosine], [cosine]).log  # as far apart, but spread over the height
    assert not vertical([[0.0, *falling]], [[0.0, *falling]]).log  # zero has no logarithm


def test_one_outlier_does_not_flatten_a_curve():
    values = [1.0 + 0.1 * math.sin(i) for i in range(500)]
    raw = [*values[:250], 1e6, *values[250:]]
    assert vertical([raw], [values]).high < 3


def test_a_centred_mean_does_not_lag():
    line = [(float(i), 2.0 * i + (7 if i % 2 else -7)) for i in range(500)]
    for step, value in smoothed(line)[20:-20]:
        assert abs(value - 2 * step) < 1
    assert smoothed(line[:FEW]) == line[:FEW]
    steady = [(float(i), float(i)) for i in range(500)]
    assert smoothed(steady) == steady  # nothing to smooth


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=3000))
def test_thinned_lines_keep_their_extremes_and_order(values):
    points = list(enumerate(values))
    kept = thinned(points)
    assert len(kept) <= max(400, 1) and kept == sorted(kept)
    assert {min(values), max(values)} <= {v for _, v in kept} and set(kept) <= set(points)


@given(st.lists(st.floats(0, 210), max_size=14))
def test_names_keep_apart_and_inside(heights):
    moved = apart(sorted(heights), 15, 210)
    assert all(b - a >= 15 - 1e-9 for a, b in zip(moved, moved[1:], strict=False))
    assert all(-1e-9 <= y <= 210 + 1e-9 for y in moved)


def test_curves_draw_every_line_and_name_it():
    noise = random.Random(0)
    lines = [
        Line("adapted", 0, [(i, math.exp(-i / 50) * noise.uniform(0.5, 1.5)) for i in range(300)]),
        Line("a very long name <b>", 1, [(0, 0.5), (300, 0.25)]),
        Line("empty", 2, []),
    ]
    drawn = curves(lines, label="loss")
    assert [p["class"] for p in shapes(drawn, "path")] == ["raw c0", "c0", "c1"]
    assert len(shapes(drawn, "circle")) == 2  # only a line of few points gets dots
    names = [e for e in ElementTree.fromstring(drawn).iter("text") if e.get("class", "").startswith("end")]
    assert len(names) == 2 and "a very long name &lt;b&gt;: 0.25 at the end" in drawn
    numbers = [float(x) for p in shapes(drawn, "path") for x in p["d"].replace("M", " ").replace("L", " ").split()]
    assert min(numbers) >= -1000 and max(numbers) <= 2000  # clipped close to the plot, whatever the values


def test_a_curve_of_one_point_or_of_equal_values():
    for points in ([(5, 0.3)], [(0, 0.3), (10, 0.3)], [(0, 0.0), (1, 0.0)]):
        assert "nan" not in curves([Line("a", 0, points)], label="x")
