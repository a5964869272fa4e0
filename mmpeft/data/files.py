"""Annotation files: JSON, JSON lines, CSV and TSV, read with errors that say where the fault is."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft.errors import FileFormatError, NameNotFound, nearest

PathLike = str | os.PathLike[str]


def existing(path: PathLike, *, folder: bool = False) -> Path:
    """`path`, refused if there is no such file (or folder), with the nearest name beside it.

    Raises:
        NameNotFound: nothing there, or a folder where a file is wanted and the other way round.
    """
    found = Path(path).expanduser()
    if found.is_dir() if folder else found.is_file():
        return found
    kind = "folder" if folder else "file"
    siblings = [p.name for p in found.parent.iterdir()] if found.parent.is_dir() else []
    hint = nearest(found.name, siblings) if siblings else f"; its folder {found.parent} does not exist either"
    raise NameNotFound(f"no {kind} {found}{hint}")


def read_json(path: PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        NameNotFound: no such file. FileFormatError: no JSON; the line and column are named.
    """
    found = existing(path)
    try:
        return json.loads(found.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{found} is not JSON: {error}") from error


class JsonLinesFile:
    """A JSON-lines file held as one block of bytes and parsed a line at a time.

    Worker processes then share one buffer, where each would copy millions of Python objects as it counts references.

    Raises:
        NameNotFound: no such file. FileFormatError: naming the first line that is no JSON object, or an empty file.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = existing(path)
        self._bytes = self.path.read_bytes()
        spans, start = [], 0
        for number, line in enumerate(self._bytes.split(b"\n"), 1):
            if line.strip():
                self._parse(line, number)
                spans.append((start, len(line), number))
            start += len(line) + 1
        if not spans:
            raise FileFormatError(f"{self.path} has no lines")
        self._spans = np.array(spans, dtype=np.int64)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FileFormatError(f"{self.path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise FileFormatError(f"{self.path}, line {number}: expected a JSON object, got {type(record).__name__}")
        return record

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, length, number = self._spans[index]
        return self._parse(self._bytes[start : start + length], int(number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """'file.jsonl, line 7' for a message."""
        return f"{self.path.name}, line {self._spans[index][2]}"


def read_table(path: PathLike) -> list[dict[str, Any]]:
    """Rows of a .csv, .tsv, .json (a list of objects) or .jsonl file.

    Raises:
        NameNotFound: no such file. FileFormatError: another ending, a row of another length, or no rows.
    """
    found = existing(path)
    ending = found.suffix.lower()
    if ending not in _TABLES:
        raise FileFormatError(f"{found}: cannot read a table from {ending!r}; readable are {', '.join(_TABLES)}")
    rows: list[dict[str, Any]] = _TABLES[ending](found)
    if not rows:
        raise FileFormatError(f"{found} has no rows")
    return rows


def _read_separated(path: Path, *, delimiter: str) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise FileFormatError(f"{path}, line {reader.line_num}: expected {columns} columns")
            rows.append(dict(row))
    return rows


def _read_list(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FileFormatError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    return rows


_TABLES: dict[str, Any] = {
    ".csv": lambda path: _read_separated(path, delimiter=","),
    ".tsv": lambda path: _read_separated(path, delimiter="\t"),
    ".json": _read_list,
    ".jsonl": lambda path: [*JsonLinesFile(path)],
}
