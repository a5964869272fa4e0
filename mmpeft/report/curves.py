"""Learning curves as inline SVG: the raw values faint, a centred mean over them, each line named at its end.

The lines live in a drawing that stretches with the page (strokes keep their width); ticks and names stand outside it at
percentages, so their text keeps its size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mmpeft.report.charts import colour
from mmpeft.report.markup import Html, tag
from mmpeft.report.wording import count, significant

HEIGHT = 210  # pixels of the plot; a CSS variable holds the same number
FEW = 24  # points up to which every one gets a dot and nothing is smoothed
QUIET = 4.0  # times its range that a line may go up and down and still be drawn as it is
DRAWN = 400  # points of a raw line; longer ones show the extremes of each stretch
SPREAD = 20.0  # highest over lowest value from which a positive quantity may be drawn on a log scale
CROWDED = 0.15  # it is, where more than half of its values would lie below this height of a linear one
BETWEEN = (2**0.5, 10**0.5, 50**0.5)  # where the nearest round step changes from 1 to 2, to 5, to 10
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line: its name, the number of its colour, and (step, value) in order."""

    name: str
    colour: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Scale:
    """A map of values to 0..1 over [low, high], linear or logarithmic, with its tick marks."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return (value - low) / (high - low)


def curves(lines: Sequence[Line], *, label: str) -> Html:
    """A chart of lines that share both axes; lines without points are left out.

    Args:
        label: what it shows, for who cannot see it.
    """
    lines = [line for line in lines if line.points]
    smooth = [smoothed(line.points) for line in lines]
    steps = [s for line in lines for s, _ in line.points]
    across = linear(min(0, *steps), max(steps), 4, tight=True)
    up = vertical([[v for _, v in line.points] for line in lines], [[v for _, v in s] for s in smooth])
    drawn = []
    for line, mean in zip(lines, smooth, strict=True):
        raw = _path(thinned(line.points), across, up)
        kind = colour(line.colour)
        if mean != list(line.points):
            drawn.append(tag("path", d=raw, class_=f"raw {kind}"))
        drawn.append(tag("path", d=_path(thinned(mean), across, up), class_=kind))
    plot = tag(
        "svg", drawn, class_="lines", viewBox="0 0 1000 1000", preserveAspectRatio="none", width="100%", height="100%"
    )
    dots = [
        tag("circle", tag("title", f"{line.name}, step {count(s)}: {significant(v)}"), r=3, class_=colour(line.colour),
            cx=f"{100 * across(s):.2f}%", cy=f"{100 - 100 * up(v):.2f}%")
        for line in lines if len(line.points) <= FEW for s, v in line.points
    ]  # fmt: skip
    drawing = tag(
        "svg", _axes(across, up), plot, dots, _names(lines, smooth, up), role="img", aria_label=label, class_="curves"
    )
    return tag("div", drawing, class_="plot")


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The centred mean over a 25th of the points, which lags behind nothing; at the ends over the half that is there."""
    heights = [value for _, value in points]
    path = sum(abs(b - a) for a, b in pairwise(heights))
    if len(points) <= FEW or path <= QUIET * (max(heights) - min(heights)):
        return list(points)
    half = max(1, len(points) // 50)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for i, (step, _) in enumerate(points):
        first, last = max(0, i - half), min(len(points), i + half + 1)
        found.append((step, (sums[last] - sums[first]) / (last - first)))
    return found


def thinned(points: Sequence[Point], most: int = DRAWN) -> list[Point]:
    """At most so many points: of each stretch its lowest and its highest, in their order."""
    if len(points) <= most:
        return list(points)
    stretches, found = most // 2, list[Point]()
    for i in range(stretches):
        part = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        heights = [value for _, value in part]
        found += [part[j] for j in sorted({heights.index(min(heights)), heights.index(max(heights))})]
    return found


def vertical(raw: Sequence[Sequence[float]], smooth: Sequence[Sequence[float]]) -> Scale:
    """The scale of the values: all of the means, and all of the raw values but the outermost hundredth each side."""
    means = [v for line in smooth for v in line]
    noisy = sorted(v for line in raw for v in line)
    cut = len(noisy) // 100
    low, high = min(min(means), noisy[cut]), max(max(means), noisy[-1 - cut])
    crowded = noisy[len(noisy) // 2] < low + CROWDED * (high - low)
    if low > 0 and high / low >= SPREAD and crowded:
        return logarithmic(low, high)
    return linear(low, high, 4)


def linear(low: float, high: float, wanted: int, *, tight: bool = False) -> Scale:
    """A linear scale with about so many ticks at 1, 2 or 5 times a power of ten; `tight` ends at the values."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * (1, 2, 5, 10)[bisect_right(BETWEEN, rough / power)]
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    if not tight:
        return Scale(ticks[0], ticks[-1], False, ticks)
    room = 1e-9 * (high - low)
    return Scale(low, high, False, tuple(t for t in ticks if low - room <= t <= high + room))


def logarithmic(low: float, high: float) -> Scale:
    """A log scale with ticks at powers of ten, also at 2 and 5 times them where there would be fewer than three."""
    tens = [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [t for t in tens if low <= t <= high]
    if len(ticks) < 3:
        ticks = [t for ten in tens for t in (ten, 2 * ten, 5 * ten) if low <= t <= high]
    else:
        ticks = ticks[:: -(-len(ticks) // 6)]
    return Scale(low / 1.05, high * 1.05, True, tuple(ticks))


def _path(points: Sequence[Point], across: Scale, up: Scale) -> str:
    corners = [f"{1000 * across(x):.0f} {1000 - 1000 * min(2, max(-1, up(y))):.0f}" for x, y in points]
    return "M" + "L".join(corners)


def _axes(across: Scale, up: Scale) -> list[Html]:
    made = []
    for value in up.ticks:
        y = f"{100 - 100 * up(value):.2f}%"
        made.append(tag("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        made.append(tag("text", significant(value), x="0", y=y, dx=-8, dy=4, text_anchor="end"))
    for value in across.ticks:
        x = f"{100 * across(value):.2f}%"
        made.append(tag("text", count(value), x=x, y="100%", dy=18, text_anchor="middle"))
    return made


def _names(lines: Sequence[Line], smooth: Sequence[Sequence[Point]], up: Scale) -> list[Html]:
    """The names at the right end of the lines, kept apart from each other."""
    wanted = sorted((HEIGHT * (1 - min(1, max(0, up(s[-1][1])))), i) for i, s in enumerate(smooth))
    heights = apart([y for y, _ in wanted], 15, HEIGHT)
    made = []
    for y, (_, i) in zip(heights, wanted, strict=True):
        name = lines[i].name
        short = name if len(name) <= 14 else f"{name[:13]}…"
        title = tag("title", f"{name}: {significant(smooth[i][-1][1])} at the end")
        made.append(tag("text", title, short, x="100%", y=y, dx=7, dy=4, class_=f"end {colour(lines[i].colour)}"))
    return made


def apart(sorted_heights: Sequence[float], gap: float, highest: float) -> list[float]:
    """Heights moved as little as needed to be `gap` apart and, where there is room, within 0..highest."""
    found = list(sorted_heights)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + gap)
    for i in range(len(found) - 1, -1, -1):
        found[i] = min(found[i], highest - gap * (len(found) - 1 - i))
    return found
