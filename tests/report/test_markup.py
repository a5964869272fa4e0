"""Nothing that a run says becomes markup, and whatever it says can be written as UTF-8."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.report.markup import Html, join, tag, text

HOSTILE = "<script>alert(1)</script>\"'&--><![CDATA[ </style> ]]>"


class Reader(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.seen, self.said = [], ""
        self.feed(source)
        self.close()

    def handle_starttag(self, name, attributes):
        self.seen.append((name, dict(attributes)))

    def handle_data(self, data):
        self.said += data


@given(st.text())
def test_any_text_comes_back_as_text(said):
    page = Reader(tag("p", said, title=said))
    assert [name for name, _ in page.seen] == ["p"]
    assert text(page.said).encode() == text(said).encode()  # what the reader shows, escaped again
    assert "\n" in said or "\r" in said or text(page.seen[0][1]["title"]) == text(said)


def test_hostile_text_is_shown_not_run():
    page = Reader(tag("div", [tag("b", HOSTILE), HOSTILE], aria_label=HOSTILE))
    assert [name for name, _ in page.seen] == ["div", "b"]
    assert page.said == HOSTILE * 2 and page.seen[0][1]["aria-label"] == HOSTILE


@pytest.mark.parametrize("bad", ["\x00", "\x1b[31m", "\ud800", "\x85", "\u202e", "\u2066", "\uffff"])
def test_what_html_cannot_hold_or_turns_text_around_is_replaced(bad):
    assert "\ufffd" in text(f"a{bad}b")
    text(f"a{bad}b").encode("utf-8")


def test_attributes_and_children():
    made = tag("circle", tag("title", "x"), None, [], cx=12.5, cy=3.0, r=2, class_="c0", aria_label=None)
    assert made == '<circle cx="12.5" cy="3" r="2" class="c0"><title>x</title></circle>'
    assert tag("meta", name="viewport", content="a") == '<meta name="viewport" content="a">'
    assert join(Html("<b>"), "<b>") == "<b>&lt;b&gt;"
