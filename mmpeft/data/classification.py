"""Labelled inputs for classification and regression: folders of images, tables of images, sounds or texts.

A sample is `{"id", "input", "label"}`: the input undecoded (a path, a text), the label a class number or a float. A
data set says what a head needs to know: `modality`, `classes` (None for regression), `num_outputs`.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmpeft.data.files import PathLike, existing, read_table
from mmpeft.data.samples import check_keys, located
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MODALITIES = ("image", "audio", "text")


class Labels:
    """Raw labels as targets.

    Args:
        values: one a sample.
        classes: class names in order; default the labels that occur, sorted (as numbers, if all are whole numbers).
        regression: the labels are numbers to predict.
        where: names the place in messages.

    Raises:
        NameNotFound: a label that is no class, with the nearest. FileFormatError: no label, or no finite number.
        ConfigError: fewer than two classes.
    """

    def __init__(self, values: Sequence[Any], *, classes: Sequence[str] | None, regression: bool, where: str) -> None:
        for row, value in enumerate(values):
            if value is None or value == "":
                raise FileFormatError(f"{where}, row {row}: no label")
        self.classes: list[str] | None = None
        self.targets: list[int] | list[float]
        if regression:
            if classes is not None:
                raise ConfigError("regression has no classes: leave classes out")
            self.targets = [_number(value, f"{where}, row {row}") for row, value in enumerate(values)]
            return
        names = [str(value) for value in values]
        self.classes = list(classes) if classes is not None else _ordered(set(names))
        if len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise ConfigError(f"{where}: classification needs two or more distinct classes, got {self.classes}")
        number = {name: i for i, name in enumerate(self.classes)}
        for row, name in enumerate(names):
            if name not in number:
                hint = nearest(name, number)
                raise NameNotFound(f"{where}, row {row}: {name!r} is none of the {len(number)} classes{hint}")
        self.targets = [number[name] for name in names]


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{where}: {value!r} is no number") from error
    if not math.isfinite(number):
        raise FileFormatError(f"{where}: {value!r} is not finite")
    return number


def _ordered(names: set[str]) -> list[str]:
    whole = all(name.lstrip("-").isdigit() for name in names)
    return sorted(names, key=int) if whole else sorted(names)


class LabelledDataset(Dataset[dict[str, Any]]):
    """Base of the labelled readers; subclasses give `read`.

    Attributes:
        modality: "image", "audio" or "text"; classes: names in order, None for regression; targets: [N].
    """

    def __init__(self, modality: str, labels: Labels) -> None:
        check_keys([modality], known=MODALITIES, where="modality")
        self.modality, self.classes, self.targets = modality, labels.classes, labels.targets

    @property
    def num_outputs(self) -> int:
        """Width of a head: the number of classes, or 1."""
        return len(self.classes) if self.classes is not None else 1

    def read(self, index: int) -> tuple[str, Any]:
        """(id, input) of a sample, the input undecoded."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        id, value = self.read(index)
        return {"id": id, "input": value, "label": self.targets[index]}

    def length_hint(self, index: int) -> int:
        """Characters of a text; other inputs are not opened for it."""
        return len(self.read(index)[1]) if self.modality == "text" else 0

    def class_counts(self) -> dict[str, int]:
        """Samples of each class."""
        if self.classes is None:
            raise ConfigError("a regression data set has no classes to count")
        counts = Counter(self.targets)
        return {name: counts[i] for i, name in enumerate(self.classes)}


class ImageFolder(LabelledDataset):
    """Images in one folder a class: `root/cat/1.jpg`, `root/dog/2.png`; deeper folders belong to the class above them.

    Args:
        root: the folder.
        classes: folder names in order; default all, sorted. Give the training set's to other splits.

    Raises:
        NameNotFound: no such folder, or a class without one. ConfigError: a class without images, fewer than two
        classes.
    """

    def __init__(self, root: PathLike, *, classes: list[str] | None = None) -> None:
        self.root = existing(root, folder=True)
        folders = _ordered({p.name for p in self.root.iterdir() if p.is_dir() and not p.name.startswith(".")})
        chosen = classes if classes is not None else folders
        self.paths: list[Path] = []
        for name in chosen:
            if name not in folders:
                raise NameNotFound(
                    f"{self.root} has no folder {name!r}; it has {', '.join(folders)}{nearest(name, folders)}"
                )
            found = sorted(p for p in (self.root / name).rglob("*") if p.suffix.lower() in IMAGES)
            if not found:
                raise ConfigError(f"{self.root / name} has no images ({', '.join(IMAGES)})")
            self.paths += found
        values = [path.relative_to(self.root).parts[0] for path in self.paths]
        super().__init__("image", Labels(values, classes=chosen, regression=False, where=str(self.root)))

    def read(self, index: int) -> tuple[str, Any]:
        path = self.paths[index]
        return str(path.relative_to(self.root)), str(path)


class Table(LabelledDataset):
    """Inputs and labels in a .csv, .tsv, .json or .jsonl table: texts themselves, or the names of image or sound files.

    Args:
        path: the table.
        modality: "image", "audio" or "text".
        input: column of the input, or several text columns, joined by `joiner` ("</s></s>" for RoBERTa's pairs).
        target: column of the label.
        regression: the label is a number to predict.
        classes: class names in order; default the labels that occur. Give the training set's to other splits.
        root: folder that relative file names start from; default the table's own.

    Raises:
        NameNotFound: missing file, folder or column, or a label that is no class, with the nearest.
        FileFormatError: unreadable table, empty input or label.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        modality: str,
        input: str | list[str] | None = None,
        target: str = "label",
        regression: bool = False,
        classes: list[str] | None = None,
        root: PathLike | None = None,
        joiner: str = " ",
    ) -> None:
        rows = read_table(path)
        columns = [input] if isinstance(input, str) else input or [modality]
        if len(columns) > 1 and modality != "text":
            raise ConfigError(f"several input columns are for texts, not for {modality}")
        given = list(rows[0])
        check_keys(given, known=given, required=[*columns, target], where=str(path))
        values = [row.get(target) for row in rows]
        super().__init__(modality, Labels(values, classes=classes, regression=regression, where=f"{path}, {target!r}"))
        for number, row in enumerate(rows):
            empty = [c for c in columns if not isinstance(row.get(c), str) or not row[c].strip()]
            if empty:
                raise FileFormatError(f"{path}, row {number}: column {empty[0]!r} is empty or no text")
        self.name = Path(path).name
        folder = existing(root, folder=True) if root is not None else os.path.dirname(os.path.abspath(path))
        joined = [joiner.join(row[c].strip() for c in columns) for row in rows]
        self.inputs = joined if modality == "text" else [located(folder, name) for name in joined]

    def read(self, index: int) -> tuple[str, Any]:
        return f"{self.name}, row {index}", self.inputs[index]
