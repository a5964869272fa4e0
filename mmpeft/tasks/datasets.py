"""Two labelled data sets that need no download: real handwritten digits, and the docstrings of installed libraries.

They are `LabelledDataset`s as the readers of `mmpeft.data` are (`ImageFolder`, `Table`): samples {"id", "input", "label"}.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Sequence
from typing import Any

from mmpeft.data.classification import LabelledDataset, Labels
from mmpeft.data.digits import load_digits
from mmpeft.errors import ConfigError, NameNotFound, nearest

SPLITS = ("train", "test")


class DigitLabels(LabelledDataset):
    """scikit-learn's 1,797 handwritten digits as a classification data set; the split is that of `DigitsVQA`.

    Args:
        split: "train" (1,297 images) or "test" (500).
        size: only the first so many.
        regression: the digit is a number to predict instead of one of ten classes.
    """

    def __init__(self, split: str = "train", *, size: int | None = None, regression: bool = False) -> None:
        _check_split(split)
        self.split = split
        self.images, by_digit = load_digits(split)
        digit_of = {i: digit for digit, indices in enumerate(by_digit) for i in indices}
        values = [digit_of[i] for i in range(len(self.images))][:size]
        classes = None if regression else [str(digit) for digit in range(10)]
        super().__init__("image", Labels(values, classes=classes, regression=regression, where="digits"))

    def read(self, index: int) -> tuple[str, Any]:
        return f"digit/{self.split}/{index}", self.images[index]


LIBRARIES = ("numpy", "scipy.stats", "sklearn", "skimage", "torch", "transformers")
_MODULES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.polynomial"),
    "scipy.stats": ("scipy.stats",),
    "sklearn": ("sklearn.metrics", "sklearn.linear_model", "sklearn.ensemble", "sklearn.preprocessing", "sklearn.datasets"),
    "skimage": ("skimage.filters", "skimage.transform", "skimage.measure", "skimage.morphology", "skimage.feature"),
    "torch": ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.distributions"),
    "transformers": ("transformers.utils", "transformers.generation", "transformers.trainer_utils", "transformers"),
}


class Docstrings(LabelledDataset):
    """A text task made of real sentences that every installation has: which library does a docstring describe?

    The first sentence of each public function's and class's docstring, as written, with names of libraries taken out;
    the label is the library. Split by the name of the function, a fifth is held out.

    Args:
        split: "train" or "test".
        libraries: the classes; a subset of `LIBRARIES`.
        per_library: at most so many sentences a class.

    Raises:
        NameNotFound: unknown split or library.
        ConfigError: fewer than two libraries, or one of which nothing is installed.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        libraries: Sequence[str] = ("numpy", "scipy.stats", "sklearn", "skimage", "torch"),
        per_library: int = 150,
    ) -> None:
        _check_split(split)
        for library in libraries:
            if library not in _MODULES:
                hint = nearest(library, _MODULES)
                raise NameNotFound(f"unknown library {library!r}; libraries are {', '.join(_MODULES)}{hint}")
        if len(libraries) < 2:
            raise ConfigError("Docstrings needs two libraries or more to tell apart")
        rows: list[tuple[str, str, str]] = []
        for library in libraries:
            found = _sentences(library)
            if not found:
                raise ConfigError(f"nothing of {library!r} is installed, so it has no docstrings")
            chosen = random.Random(library).sample(sorted(found), min(per_library, len(found)))
            held = set(chosen[: len(chosen) // 5])
            rows += [(name, found[name], library) for name in chosen if (name in held) == (split == "test")]
        random.Random(split).shuffle(rows)
        self.rows = rows
        labels = Labels([row[2] for row in rows], classes=list(libraries), regression=False, where="docstrings")
        super().__init__("text", labels)

    def read(self, index: int) -> tuple[str, Any]:
        return self.rows[index][:2]


def _sentences(library: str) -> dict[str, str]:
    """Function or class name -> the first sentence of its docstring."""
    found: dict[str, str] = {}
    for path in _MODULES[library]:
        try:
            module = importlib.import_module(path)
        except ImportError:
            continue
        for name in sorted(getattr(module, "__all__", None) or dir(module)):
            value = None if name.startswith("_") else getattr(module, name, None)
            if not (inspect.isclass(value) or callable(value)):
                continue
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            sentence = re.split(r"(?<=[a-z)`])\. ", text)[0]
            sentence = re.sub(r"(?i)\b(numpy|np|scipy|sklearn|scikit-learn|skimage|torch|pytorch)\b\.?", "", sentence)
            if 20 <= len(sentence) <= 200 and "(" not in sentence[: len(name) + 2]:
                found.setdefault(f"{library}.{name}", sentence)
    seen: set[str] = set()
    return {n: s for n, s in found.items() if not (s in seen or seen.add(s))}  # type: ignore[func-returns-value]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise NameNotFound(f"unknown split {split!r}; splits are {', '.join(SPLITS)}{nearest(split, SPLITS)}")
