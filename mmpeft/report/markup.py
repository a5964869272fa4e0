"""HTML and SVG elements as a function: text is escaped unless it is `Html`, so nothing a run says can become markup.

tag("p", "a < b", class_="note")           # <p class="note">a &lt; b</p>
tag("ul", [tag("li", x) for x in rows])    # children may be nested sequences; None is nothing
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

VOID = frozenset({"meta", "img", "br"})
# What XML and HTML have no character for: controls and halves of surrogate pairs (JSON can carry both).
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Marks that turn the direction of the text around them, so that a name can look like another one.
_TURNING = re.compile(r"[\u202a-\u202e\u2066-\u2069]")

Child: TypeAlias = "Html | str | None | Iterable[Child]"


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(said: object) -> Html:
    """Any value as escaped text; characters that HTML cannot hold become the replacement character."""
    return Html(escape(_TURNING.sub("\ufffd", _UNPRINTABLE.sub("\ufffd", str(said)))))


def join(*children: Child) -> Html:
    """Children after one another: `Html` as it is, other strings escaped, sequences flattened, None left out."""
    return Html("".join(_pieces(children)))


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Html:
    """One element. `class_` and `aria_label` are the attributes class and aria-label; None leaves an attribute out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>" if name in VOID else f"<{name}{said}>{join(*children)}</{name}>")


def _pieces(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str):
            yield text(child)
        elif child is not None:
            yield from _pieces(child)


def _number(value: str | float) -> str:
    """Coordinates with two digits after the point: a page of curves is a third smaller."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
