"""What every section draws from: the run, its logs and the page's media; and two pieces of layout that several use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmpeft.report.charts import swatch
from mmpeft.report.logs import Logs
from mmpeft.report.markup import Child, Html, tag
from mmpeft.report.media import Media
from mmpeft.report.run import Run


@dataclass(frozen=True)
class Material:
    """The run, its logs, and the files that this drawing of the page may hold."""

    run: Run
    logs: Logs
    media: Media


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], *, numbers: Sequence[int] = ()) -> Html:
    """A table in a box of its own that scrolls sideways; the columns `numbers` are set to the right."""

    def kind(i: int) -> str | None:
        return "number" if i in numbers else None

    titles = tag("tr", [tag("th", name, scope="col", class_=kind(i)) for i, name in enumerate(head)])
    lines = [
        tag("tr", [tag("th" if i == 0 else "td", cell, scope="row" if i == 0 else None, class_=kind(i))
                   for i, cell in enumerate(row)])
        for row in rows
    ]  # fmt: skip
    whole = tag("table", tag("thead", titles), tag("tbody", lines))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=f"Table: {', '.join(head)}")


def named(run: Run, label: str) -> Html:
    """A label with the mark of its colour."""
    return tag("span", swatch(run.colour(label)), label, class_="label")


def note(*said: Child) -> Html:
    """A remark under a chart or table."""
    return tag("p", *said, class_="note")
