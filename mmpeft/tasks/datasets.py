"""Labelled data sets of `ClassificationTask`: map-style, of samples {"id", "input", "label"}.

`input` is what the encoder's `preprocess` takes (a path, a PIL image, a waveform, a text); `label` is a class name, a class
number, or for regression a number. `LabelledLines` reads one's own files, the others need no download.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpeft.data.digits import load_digits
from mmpeft.errors import BadSample, ConfigError, NameNotFound, nearest

SPLITS = ("train", "test")
Sample = dict[str, Any]


class LabelledLines:
    """JSON lines {"image" | "audio" | "text": ..., "label": ...}; paths are relative to the file's folder.

    Args:
        path: of the file.
        modality: the key that is the input; None takes the one that the first line has.

    Raises:
        NameNotFound: no such file, or a line without the key.
        BadSample: a line that is no JSON object; names the line.
    """

    def __init__(self, path: str, *, modality: str | None = None) -> None:
        file = Path(path)
        if not file.is_file():
            raise NameNotFound(f"no file {path!r}")
        self.folder, self.name = file.parent, file.name
        self.rows = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["label"], row.keys()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BadSample(f"{path}, line {number}: expected an object with a label, got {line[:60]!r}") from error
            self.rows.append((number, row))
        if not self.rows:
            raise BadSample(f"{path} holds no sample")
        known = ("image", "audio", "text")
        self.modality = modality or next((k for k in known if k in self.rows[0][1]), "")
        for number, row in self.rows:
            if self.modality not in row:
                raise NameNotFound(f"{path}, line {number}: no key {self.modality!r}; it has {', '.join(row)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        number, row = self.rows[index]
        value = row[self.modality]
        path = value if self.modality == "text" else self.folder / value
        return {"id": f"{self.name}:{number}", "input": path, "label": row["label"]}


class DigitLabels:
    """scikit-learn's 1,797 handwritten digits as a classification data set; the split is that of `DigitsVQA`.

    Args:
        split: "train" (1,297 images) or "test" (500).
        size: only the first so many.
    """

    def __init__(self, split: str = "train", *, size: int | None = None) -> None:
        _check_split(split)
        self.split = split
        self.images, by_digit = load_digits(split)
        digit_of = {i: digit for digit, indices in enumerate(by_digit) for i in indices}
        self.labels = [digit_of[i] for i in range(len(self.images))][:size]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {"id": f"digit/{self.split}/{index}", "input": self.images[index], "label": self.labels[index]}


LIBRARIES = ("numpy", "scipy.stats", "sklearn", "skimage", "torch", "transformers")
_MODULES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.polynomial"),
    "scipy.stats": ("scipy.stats",),
    "sklearn": ("sklearn.metrics", "sklearn.linear_model", "sklearn.ensemble", "sklearn.preprocessing", "sklearn.datasets"),
    "skimage": ("skimage.filters", "skimage.transform", "skimage.measure", "skimage.morphology", "skimage.feature"),
    "torch": ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.distributions"),
    "transformers": ("transformers.utils", "transformers.generation", "transformers.trainer_utils", "transformers"),
}


class Docstrings:
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
        self.rows: list[Sample] = []
        for library in libraries:
            found = _sentences(library)
            if not found:
                raise ConfigError(f"nothing of {library!r} is installed, so it has no docstrings")
            chosen = random.Random(library).sample(sorted(found), min(per_library, len(found)))
            held = set(chosen[: len(chosen) // 5])
            for name in chosen:
                if (name in held) == (split == "test"):
                    self.rows.append({"id": name, "input": found[name], "label": library})
        random.Random(split).shuffle(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.rows[index]


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
