"""VQA accuracy (Antol et al. 2015, arXiv:1505.00468) in the three variants in use, which differ on the same
predictions.

The score of an answer that k of n people gave is the mean, over leaving each of them out, of min(matches / 3, 1). In
closed form, with f(x) = min(x / 3, 1):  (k f(k - 1) + (n - k) f(k)) / n,  for ten answers 0, .3, .6, .9, 1 at k = 0, 1,
2, 3, 4 and more.

What varies is which texts count as equal:

- `official`: the authors' script. Where all references are identical, texts are compared as they are (line breaks and
  outer space aside), case included; elsewhere both sides are normalised.
- `lmms`: lmms-eval since 2025-08. Always normalised.
- `evalai`: the challenge server and the TextVQA scripts. Lower-cased first, without commas, question marks, and with
  possessive 's set apart, on both sides, then normalised.

The normalisation has accidents that scores depend on, kept here: one comma inside a number makes every mark of the text
vanish instead of becoming a space, and only the first 32 periods are removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mmpeft.errors import NameNotFound, nearest
from mmpeft.metrics.base import PerSampleMetric

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_DIGITS.split())}
# the script means "not between digits"; its look-behind is mistyped and tests nothing
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # re.UNICODE, passed where the count goes
_COMMA = {"official": re.compile(r"\d,\d"), "lmms": re.compile(r"\d,+\d"), "evalai": re.compile(r"\d,+\d")}

#: contractions that are written out from the form without the apostrophe
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
#: contractions that are written out from either form that lacks one of the two apostrophes
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _TWO_APOSTROPHES.split():
        stem, first, last = word.split("'")
        table |= {f"{stem}{first}'{last}": word, f"{stem}'{first}{last}": word}
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def soft_score(matches: int, answers: int) -> float:
    """Leave-one-out score of an answer that `matches` of `answers` people gave, in closed form."""

    def credit(k: int) -> float:
        return min(k / 3, 1.0)

    return (matches * credit(matches - 1) + (answers - matches) * credit(matches)) / answers


def normalize(text: str, *, variant: str = "official") -> str:
    """Punctuation, number words, articles and contractions as the scripts treat them."""
    joined = _COMMA[variant].search(text) is not None
    out = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text  # of the original text, whatever was replaced meanwhile
        out = out.replace(mark, "" if beside_space or joined else " ")
    out = _PERIOD.sub("", out, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _official(prediction: str, references: Sequence[str]) -> tuple[str, list[str]]:
    prediction, lines = _one_line(prediction), [_one_line(r) for r in references]
    if len(set(lines)) == 1:
        return prediction, lines
    return normalize(prediction), [normalize(line) for line in lines]


def _lmms(prediction: str, references: Sequence[str]) -> tuple[str, list[str]]:
    return normalize(_one_line(prediction), variant="lmms"), [
        normalize(_one_line(r), variant="lmms") for r in references
    ]


def _evalai_one(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize(_one_line(text), variant="evalai")


def _evalai(prediction: str, references: Sequence[str]) -> tuple[str, list[str]]:
    return _evalai_one(prediction), [_evalai_one(r) for r in references]


VARIANTS: dict[str, Callable[[str, Sequence[str]], tuple[str, list[str]]]] = {
    "official": _official,
    "lmms": _lmms,
    "evalai": _evalai,
}


def vqa_score(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """VQA accuracy of one answer against its (usually ten) references.

    Raises:
        NameNotFound: unknown variant.
    """
    if variant not in VARIANTS:
        raise NameNotFound(
            f"unknown variant {variant!r}; variants are {', '.join(VARIANTS)}{nearest(variant, VARIANTS)}"
        )
    answer, given = VARIANTS[variant](prediction, references)
    return soft_score(given.count(answer), len(given))


class VQAAccuracy(PerSampleMetric):
    """Mean VQA accuracy, overall and by kind (the answer type, in VQA v2). The variant is in the name: `vqa_official`.

    Args:
        variant: "official", "lmms" or "evalai".
    """

    def __init__(self, variant: str = "official", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if variant not in VARIANTS:
            raise NameNotFound(
                f"unknown variant {variant!r}; variants are {', '.join(VARIANTS)}{nearest(variant, VARIANTS)}"
            )
        self.variant = variant
        self.name = f"vqa_{variant}"  # type: ignore[misc]

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return vqa_score(prediction, references, variant=self.variant)
