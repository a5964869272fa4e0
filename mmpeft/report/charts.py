"""Charts of shares and outcomes, as inline SVG: dots with intervals, bars, a strip of episodes, a strip of tasks.

Every chart is a pure function of its data. Coordinates along the page are percentages, so one drawing fits any width and
its text keeps its size; names and numbers are HTML beside it, so they wrap, can be selected and are read aloud.
Colours are classes (`c0` .. `c5`, and these `again`; see style.css); a shape or a word always says the same thing as a colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmpeft.report.markup import Html, tag
from mmpeft.report.wording import NBSP, percent

COLOURS = 6
PER_ROW = 50  # cells of a strip before it wraps


@dataclass(frozen=True)
class Mark:
    """A share with its interval (None: not known), drawn in a colour; `name` is what it says aloud."""

    name: str
    value: float
    interval: tuple[float, float] | None
    colour: int


@dataclass(frozen=True)
class Cell:
    """One episode or task of a strip: how full it is (0 to 1), and what it says when pointed at."""

    share: float
    title: str


def colour(number: int) -> str:
    """The classes of a colour; the colours return after six, then hollow, dashed or pale."""
    return f"c{number % COLOURS}" + (" again" if number % (2 * COLOURS) >= COLOURS else "")


def swatch(number: int, shape: int = 0) -> Html:
    """A small mark of a colour (and shape), for legends and table heads."""
    return tag("svg", _shape(shape, 50, 7), class_=f"swatch {colour(number)}", aria_hidden="true")


def line(name: str | Html, said: str | Html, *drawing: Html) -> Html:
    """One line of a chart: a name at the left and numbers at the right, over a drawing."""
    over = tag("div", tag("span", name, class_="name"), tag("span", said, class_="said"), class_="over")
    return tag("div", over, *drawing, class_="row")


def dot_row(name: str | Html, said: str | Html, marks: Sequence[Mark]) -> Html:
    """One line of a dot chart: name and numbers above, the marks with their intervals on an axis from 0 to 100 %."""
    drawn = [tag("line", class_="track", x1="0", x2="100%", y1=11, y2=11)]
    drawn += [tag("line", class_="grid", x1=f"{x}%", x2=f"{x}%", y1=0, y2=22) for x in (0, 25, 50, 75, 100)]
    for mark in marks:
        if mark.interval is not None:
            low, high = (f"{100 * x:.2f}%" for x in mark.interval)
            ends = [tag("line", x1=x, x2=x, y1=6, y2=16) for x in (low, high)]
            body = tag("line", x1=low, x2=high, y1=11, y2=11)
            drawn.append(tag("g", body, ends, class_=f"interval {colour(mark.colour)}"))
    for shape, mark in enumerate(marks):
        said_aloud = tag("title", f"{mark.name}: {percent(mark.value)}")
        drawn.append(tag("g", said_aloud, _shape(shape, 100 * mark.value, 11), class_=colour(mark.colour)))
    aloud = "; ".join(f"{m.name} {percent(m.value)}" for m in marks)
    return line(name, said, tag("svg", drawn, class_="dots", role="img", aria_label=aloud))


def dot_axis() -> Html:
    """The axis under the lines of a dot chart."""
    anchors = {0: "start", 100: "end"}
    marks = [
        tag("text", f"{x}{NBSP}%", x=f"{x}%", y=12, text_anchor=anchors.get(x, "middle")) for x in (0, 25, 50, 75, 100)
    ]
    return tag("svg", marks, class_="axis", aria_hidden="true")


def bars(rows: Sequence[tuple[str, str, float]]) -> Html:
    """Bars of (name, number in words, share of the longest), one a line."""
    lines = []
    for name, said, share in rows:
        bar = tag("rect", x="0", y=2, height=8, rx=2, width=f"{max(0.3, 100 * share):.2f}%")
        lines.append(line(name, said, tag("svg", bar, class_="bar c0", aria_hidden="true")))
    return tag("div", lines, class_="bars")


def strip(cells: Sequence[Cell], *, label: str, number: int) -> Html:
    """Cells side by side, wrapping at 50: full where the share is 1, a low stub where it is 0."""
    rows = [cells[i : i + PER_ROW] for i in range(0, len(cells), PER_ROW)]
    width = 100 / min(len(cells), PER_ROW) if cells else 100
    drawn = []
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            tall = 4 + 18 * cell.share
            place = {"x": f"{(x + 0.07) * width:.3f}%", "width": f"{0.86 * width:.3f}%"}
            drawn.append(
                tag(
                    "g",
                    tag("title", cell.title),
                    tag("rect", class_="cell", y=26 * y, height=22, **place),
                    tag("rect", class_="full" if cell.share else "stub", y=26 * y + 22 - tall, height=tall, **place),
                )
            )
    return tag("svg", drawn, class_=f"strip {colour(number)}", height=26 * len(rows), role="img", aria_label=label)


def _shape(number: int, x: float, y: float) -> Html:
    """Circle, diamond, square, by turns, centred at x percent."""
    at = f"{x:.2f}%"
    if number % 3 == 0:
        return tag("circle", cx=at, cy=y, r=5.5)
    square = {"width": 9, "height": 9, "x": -4.5, "y": -4.5}
    turn = " rotate(45)" if number % 3 == 1 else ""
    # a nested drawing carries the percentage, which a transform cannot
    return tag(
        "svg", tag("rect", **square, transform=f"translate(0 {y}){turn}"), x=at, y=0, class_="anchor", width=1, height=1
    )
