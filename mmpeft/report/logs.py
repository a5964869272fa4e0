"""Logged metrics of a run: Lightning's metrics.csv and TensorBoard event files, as one kind of series."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.errors import FileFormatError, MissingExtra, require
from mmpeft.report.run import Run

EVENTS = "events.out.tfevents.*"
NO_METRIC = frozenset({"step", "epoch", "hp_metric"})  # the axis, and what Lightning logs on its own


@dataclass(frozen=True)
class Series:
    """One metric of one log: (step, value), in the order it was logged; `broken` values were not finite."""

    label: str
    metric: str
    points: tuple[tuple[float, float], ...]
    broken: int = 0


@dataclass(frozen=True)
class Logs:
    """All series of a run, and what could not be read and why (an extra that is not installed)."""

    series: tuple[Series, ...]
    unread: tuple[str, ...]


def read_logs(run: Run) -> Logs:
    """Every metrics.csv and every folder with event files.

    Raises:
        FileFormatError: a CSV file without a header or with a value that is no number; the line is named.
    """
    tables = run.find("metrics.csv")
    written = {path.parent for path in tables}
    events = {path.parent: path for path in run.find(EVENTS) if path.parent not in written}
    sources = [*tables, *events.values()]
    series: list[Series] = []
    unread = []
    for path in tables:
        series += _series(run.label(path, sources), read_csv(path))
    for folder, path in events.items():
        try:
            series += _series(run.label(path, sources), read_events(folder))
        except MissingExtra as error:
            unread.append(f"{run.relative(path)}: {error}")
    return Logs(tuple(series), tuple(unread))


def read_csv(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Metric -> (step, value) of a file that Lightning's CSVLogger wrote.

    A last line that is cut short belongs to a run that was stopped, or still goes on: what it holds is left out.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise FileFormatError(f"{path} is no CSV file ({type(error).__name__}: {error})") from error
    if not rows or len(set(rows[0])) != len(rows[0]):
        raise FileFormatError(f"{path} has no header with one name a column")
    header, found = rows[0], dict[str, list[tuple[float, float]]]()
    for number, row in enumerate(rows[1:]):
        last = number == len(rows) - 2
        if len(row) != len(header):
            if last or not row:
                continue
            raise FileFormatError(f"{path}, line {number + 2}: {len(row)} values for {len(header)} columns")
        try:
            values = {name: float(cell) for name, cell in zip(header, row, strict=True) if cell}
        except ValueError as error:
            if last:
                continue
            raise FileFormatError(f"{path}, line {number + 2}: {error}") from error
        step = values.get("step", float(number))
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    return found


def read_events(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Metric -> (step, value) of a folder with TensorBoard event files.

    Raises:
        MissingExtra: TensorBoard is not installed.
    """
    reader: Any = require(
        "tensorboard.backend.event_processing.event_accumulator", "train", "event files are read with TensorBoard"
    )
    events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def _series(label: str, found: dict[str, list[tuple[float, float]]]) -> list[Series]:
    made = []
    for metric, points in found.items():
        if metric not in NO_METRIC:
            good = tuple((s, v) for s, v in points if math.isfinite(s) and math.isfinite(v))
            made.append(Series(label, metric, good, len(points) - len(good)))
    return made
