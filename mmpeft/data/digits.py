"""Visual question answering and captioning on real handwritten digits, without a download.

scikit-learn carries 1,797 digits of 8 x 8 pixels (the test part of UCI's Optical Recognition of Handwritten Digits).
They are split once, by image, into 1,297 for training ("fit" and "validation" are parts of them) and 500 held out;
questions are drawn over one or two of them:

    which_digit    "Which digit is this?"                      0 .. 9            chance .100
    odd_even       "Is this digit odd or even?"                odd, even         chance .500
    larger_than    "Is this digit larger than 3?"              yes, no           chance .500
    larger_of_two  "Which image shows the larger digit ...?"   first, second     chance .500
    sum            "What is the sum of the two digits?"        0 .. 18           chance .053

Every exact question text (paraphrase and N included) goes through all its answers equally often, so a model that does
not look at the image stays at chance; the digits behind an answer are drawn uniformly among those that give it.
The images stay 8 x 8: the encoder's own preprocessing enlarges them.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmpeft.data.samples import ConversationDataset, Sample, positive, question_answer
from mmpeft.errors import ConfigError, NameNotFound, nearest, require

#: split -> its images in the fixed order; a recipe is chosen with "fit" and "validation", and "test" is asked once
SPLITS = {"train": slice(0, 1297), "test": slice(1297, 1797), "fit": slice(0, 1000), "validation": slice(1000, 1297)}
_SPLIT_SEED = 1797  # the split by image never depends on the user's seed, or one run's test images could train another
_NAMED = ("a zero", "a one", "a two", "a three", "a four", "a five", "a six", "a seven", "an eight", "a nine")


@dataclass(frozen=True)
class Kind:
    """A question kind: its paraphrases, how many images it shows, the values of N, and the answer to digits and N."""

    templates: tuple[str, ...]
    images: int
    answer: Callable[..., str]  # (digit[, digit], n) -> answer
    values: tuple[int, ...] = (0,)  # what {n} in a template takes

    @functools.cached_property
    def texts(self) -> tuple[tuple[str, int], ...]:
        """Every exact question text with its N."""
        return tuple(dict.fromkeys((t.format(n=n), n) for n in self.values for t in self.templates))

    @functools.cache  # noqa: B019 - the few kinds live as long as the process
    def digits_by_answer(self, n: int) -> dict[str, list[tuple[int, ...]]]:
        """answer -> the digit tuples that give it; ties (no answer) are left out."""
        table: dict[str, list[tuple[int, ...]]] = {}
        for digits in itertools.product(range(10), repeat=self.images):
            answer = self.answer(*digits, n)
            if answer:
                table.setdefault(answer, []).append(digits)
        return table


QUESTIONS: dict[str, Kind] = {
    "which_digit": Kind(
        ("Which digit is this?", "What digit is shown here?", "Name the digit in the image."), 1, lambda d, n: str(d)
    ),
    "odd_even": Kind(
        ("Is this digit odd or even?", "Odd or even?", "Is the digit shown even or odd?"),
        1,
        lambda d, n: "odd" if d % 2 else "even",
    ),
    "larger_than": Kind(
        ("Is this digit larger than {n}?", "Is the digit shown greater than {n}?", "Is it more than {n}?"),
        1,
        lambda d, n: "yes" if d > n else "no",
        values=tuple(range(1, 9)),
    ),
    "larger_of_two": Kind(
        (
            "Which image shows the larger digit, first or second?",
            "Which digit is larger, the first or the second?",
            "Which is greater, first or second?",
        ),
        2,
        lambda a, b, n: "first" if a > b else "second" if b > a else "",
    ),
    "sum": Kind(
        ("What is the sum of the two digits?", "Add the two digits.", "What do the digits add up to?"),
        2,
        lambda a, b, n: str(a + b),
    ),
}

CAPTIONS: dict[str, Kind] = {
    "caption_one": Kind(
        ("Describe the image.", "Write a caption.", "What does the picture show?"), 1, lambda d, n: _NAMED[d]
    ),
    "caption_two": Kind(
        ("Describe the images.", "Write a caption for both.", "What do the pictures show?"),
        2,
        lambda a, b, n: f"{_NAMED[a]} next to {_NAMED[b]}",
    ),
}


class DigitQuestions(ConversationDataset):
    """Map-style dataset of questions over handwritten digits; picklable, and the same for the same arguments.

    Args:
        split: "train" (1,297 images) or "test" (the 500 others); or, where a recipe is to be chosen, "fit" (the first
            1,000 of the training images) and "validation" (the 297 others of them).
        kinds: names out of the class's `table`; default all of them.
        size: number of questions, shared out equally among the kinds (the first kinds take the remainder).
        seed: draws the questions; the split by image does not depend on it.

    Raises:
        NameNotFound: unknown split or kind.
        ConfigError: size smaller than the number of kinds, or a kind named twice.
        MissingExtra: scikit-learn is not installed.
    """

    table: dict[str, Kind] = QUESTIONS

    def __init__(
        self, split: str = "train", kinds: Sequence[str] | None = None, size: int = 10_000, seed: int = 0
    ) -> None:
        if split not in SPLITS:
            raise NameNotFound(f"unknown split {split!r}; splits are {', '.join(SPLITS)}{nearest(split, SPLITS)}")
        self.kinds = tuple(kinds) if kinds is not None else tuple(self.table)
        for kind in self.kinds:
            if kind not in self.table:
                names = ", ".join(self.table)
                raise NameNotFound(f"unknown question kind {kind!r}; kinds are {names}{nearest(kind, self.table)}")
        if len(set(self.kinds)) != len(self.kinds) or not self.kinds:
            raise ConfigError(f"kinds must be distinct and at least one, got {list(self.kinds)}")
        if positive("size", size) < len(self.kinds):
            raise ConfigError(f"size {size} is smaller than the number of kinds {len(self.kinds)}")
        self.split, self.seed = split, seed
        self.images, by_digit = load_digits(split)
        share, rest = divmod(size, len(self.kinds))
        # (kind, question text, answer, image indices), in an order that mixes the kinds
        self.records = [
            record
            for i, kind in enumerate(self.kinds)
            for record in _draw(
                kind, self.table[kind], by_digit, share + (i < rest), random.Random(f"{split}/{kind}/{seed}")
            )
        ]
        random.Random(f"{split}/{seed}").shuffle(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        kind, question, answer, shown = self.records[index]
        images = [self.images[i] for i in shown]
        id = f"digits/{self.split}/{self.seed}/{index}"
        return question_answer(id, question, answer, images=images, kind=kind)


class DigitsVQA(DigitQuestions):
    """Questions and short answers over one or two digits, of the kinds in the table at the top."""

    table = QUESTIONS


class DigitsCaptions(DigitQuestions):
    """Captions of one or two digits: "a seven", "a seven next to a two" (kinds `caption_one`, `caption_two`)."""

    table = CAPTIONS


def _draw(
    name: str, kind: Kind, by_digit: list[list[int]], size: int, rng: random.Random
) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """`size` records in which every question text goes round its answers, so that each is balanced on its own.

    A text's answers are shuffled anew each round: what is left over when `size` does not divide favours no answer.
    """
    texts = list(kind.texts)
    rng.shuffle(texts)
    rounds: dict[str, list[str]] = {text: [] for text, _ in texts}
    records = []
    for text, n in itertools.islice(itertools.cycle(texts), size):
        table = kind.digits_by_answer(n)
        if not rounds[text]:
            rounds[text] = rng.sample(sorted(table), len(table))
        answer = rounds[text].pop()
        digits = rng.choice(table[answer])
        records.append((name, text, answer, tuple(rng.choice(by_digit[d]) for d in digits)))
    return records


@functools.lru_cache(maxsize=1)
def _all_digits() -> tuple[Any, Any]:
    bunch = require("sklearn.datasets", "digits", "the handwritten digits come with scikit-learn").load_digits()
    return bunch.images, bunch.target  # [1797, 8, 8] float in 0 .. 16, [1797]


def load_digits(split: str) -> tuple[list[Any], list[list[int]]]:
    """The images of a split and where each digit is.

    Returns:
        images: list of 8 x 8 RGB `PIL.Image`; by_digit: for each digit 0 .. 9 the indices into `images` that show it.
    """
    from PIL import Image

    pixels, labels = _all_digits()
    order = list(range(len(labels)))
    random.Random(_SPLIT_SEED).shuffle(order)
    chosen = order[SPLITS[split]]
    grey = (pixels * (255.0 / 16.0)).round().astype("uint8")
    images = [Image.fromarray(grey[i]).convert("RGB") for i in chosen]
    by_digit: list[list[int]] = [[] for _ in range(10)]
    for position, i in enumerate(chosen):
        by_digit[int(labels[i])].append(position)
    return images, by_digit
