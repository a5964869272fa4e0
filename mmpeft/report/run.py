"""What lies in a run's folder, read once and checked: results, rollouts, adapters, plans, answers, configs, videos.

Only names that mmpeft writes are looked for, a few folders deep, so a feature cache beside them costs nothing. Each
file is read when a section first asks for it; one that cannot be read is an error that names it, never a gap.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpeft.errors import ConfigError, FileFormatError, NameNotFound
from mmpeft.metrics.intervals import wilson_interval
from mmpeft.policies.rollout_result import RolloutResult

DEPTH = 4  # folders below the run's own that are looked into
REFERENCE = "adapted"  # the arm the others are tested against, where the results do not say
SAYS_NOTHING = frozenset({"adapter", "logs"})  # folder names that tell nothing about what is in them
VERSION = "version_"  # what a Lightning logger's folder begins with
VIDEOS = (".mp4", ".webm", ".gif")


@dataclass(frozen=True)
class Arm:
    """One policy of a comparison. `p_value`, `only_reference` and `only_this` are its paired test against the
    reference arm; None for the reference itself and where the episodes are not the same."""

    name: str
    success: float
    interval: tuple[float, float]
    episodes: int | None
    p_value: float | None
    only_reference: int | None
    only_this: int | None


class Run:
    """A run's folder.

    Raises:
        NameNotFound: no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "is a file, not the folder of a run" if self.folder.exists() else "does not exist"
            raise NameNotFound(f"nothing to report: {str(self.folder)!r} {what}")
        self.files = tuple(_walk(self.folder))

    def find(self, *names: str) -> list[Path]:
        """Files with one of these names (`*` stands for anything)."""
        return [path for path in self.files if any(fnmatchcase(path.name, name) for name in names)]

    def relative(self, path: Path) -> str:
        """The path from the run's folder, with slashes."""
        return path.relative_to(self.folder).as_posix()

    def label(self, path: Path, among: Iterable[Path]) -> str:
        """A short name of the folder a file lies in: `adapted` of adapted/adapter/adapter.json, and of
        adapted/version_0/metrics.csv where adapted has no other version; unique among files of one kind."""
        others = [other for other in among if other != path]
        for name in (self._short, lambda p: self.relative(p.parent)):
            if name(path) not in map(name, others):
                return name(path)
        return self.relative(path)

    def _short(self, path: Path) -> str:
        parts = _telling(path.relative_to(self.folder))
        plain = tuple(part for part in parts if not part.startswith(VERSION))
        return "/".join(parts if len(self._versions.get(plain, ())) > 1 else plain) or self.folder.resolve().name

    @cached_property
    def _versions(self) -> dict[tuple[str, ...], set[str]]:
        """Folder -> the versions of a logger below it that hold something."""
        found: dict[tuple[str, ...], set[str]] = {}
        for path in self.find("metrics.csv", "events.out.tfevents.*", "adapter.json", "plan.json", "rollout.json"):
            parts = _telling(path.relative_to(self.folder))
            versions = [part for part in parts if part.startswith(VERSION)]
            plain = tuple(part for part in parts if not part.startswith(VERSION))
            found.setdefault(plain, set()).update(versions)
        return found

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json at the top of the folder; empty where there is none, or where it holds one rollout."""
        path = self.folder / "result.json"
        found = read_json(path, dict) if path in self.files else {}
        return {} if _is_rollout(found) else dict(found)

    @cached_property
    def rollouts(self) -> dict[str, RolloutResult]:
        """Label -> every rollout.json, and every result.json that `mmpeft rollout --output` wrote."""
        paths = self.find("rollout.json")
        paths += [p for p in self.find("result.json") if _is_rollout(read_json(p, dict))]
        return {self.label(path, paths): _rollout(path) for path in paths}

    @cached_property
    def adapters(self) -> dict[str, tuple[Path, dict[str, Any]]]:
        """Label -> path and content of every adapter.json."""
        paths = self.find("adapter.json")
        return {self.label(path, paths): (path, read_json(path, dict)) for path in paths}

    @cached_property
    def plans(self) -> dict[str, list[dict[str, Any]]]:
        """Label -> rows of every plan.json."""
        paths = self.find("plan.json")
        return {self.label(path, paths): _plan(path) for path in paths}

    @cached_property
    def answers(self) -> list[dict[str, Any]]:
        """Rows `id`, `kind`, `answer` of answers.json."""
        path = self.folder / "answers.json"
        rows = read_json(path, list) if path in self.files else []
        for row in rows:
            if not isinstance(row, dict) or "answer" not in row:
                raise FileFormatError(f"{path}: expected rows with id, kind and answer, found {str(row)[:60]!r}")
        return list(rows)

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms, the reference first: what result.json says, else what the rollouts say.

        Raises:
            FileFormatError: shares outside 0..1, or intervals and tests of another form; the field is named.
        """
        if isinstance(self.result.get("success"), Mapping):
            return self._said_arms()
        names = sorted(self.rollouts, key=lambda n: n != REFERENCE)
        reference = self.rollouts[names[0]] if names else None
        found = []
        for name in names:
            mine = self.rollouts[name]
            test = None
            if reference is not None and mine is not reference:
                try:
                    test = reference.compare(mine)
                except ConfigError:  # other episodes: no paired test, and the table says so
                    test = None
            paired = (test.p_value, test.only_a, test.only_b) if test else (None, None, None)
            found.append(Arm(name, mine.success, mine.interval, len(mine.episodes), *paired))
        return [arm for arm in found if arm.episodes]

    def _said_arms(self) -> list[Arm]:
        path, said = self.folder / "result.json", self.result
        success = dict(said["success"])
        tests, pairs, intervals = (_mapping(said, key, path) for key in ("p_value", "pairs", "intervals"))
        untested = [name for name in (REFERENCE, *success) if name in success and tests.get(name) is None]
        reference = next(iter([*untested, *success]), None)
        found = []
        for name in sorted(success, key=lambda n: n != reference):
            rate = number(success[name], f"{path}: success.{name}", 0, 1)
            episodes = len(self.rollouts[name].episodes) if name in self.rollouts else None
            if name in intervals:
                low, high = (number(x, f"{path}: intervals.{name}", 0, 1) for x in _pair(intervals, name, path))
            elif episodes:
                low, high = wilson_interval(round(rate * episodes), episodes)
            else:
                low, high = math.nan, math.nan
            p = tests.get(name)
            p = None if p is None else number(p, f"{path}: p_value.{name}", 0, 1)
            a, b = (int(number(x, f"{path}: pairs.{name}", 0)) for x in _pair(pairs, name, path)) if (
                name in pairs and pairs[name] is not None and name != reference
            ) else (None, None)  # fmt: skip
            found.append(Arm(name, rate, (low, high), episodes, p, a, b))
        return found

    @cached_property
    def order(self) -> list[str]:
        """Every label in the order of its colour: the arms first, then what else was logged or saved."""
        labels = [arm.name for arm in self.arms] + [*self.rollouts, *self.plans, *self.adapters]
        return list(dict.fromkeys(labels))

    def colour(self, label: str) -> int:
        """The number of a label's colour; labels that are new get the next one."""
        if label not in self.order:
            self.order.append(label)
        return self.order.index(label)


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file whose outermost value is a dict or a list.

    Raises:
        FileFormatError: unreadable, cut short, no JSON, or another kind of value.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is no JSON file ({type(error).__name__}: {error})") from error
    if not isinstance(found, kind):
        raise FileFormatError(f"{path} should hold a JSON {kind.__name__}, but holds a {type(found).__name__}")
    return found


def number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number between two bounds.

    Raises:
        FileFormatError: anything else; `where` names the field.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        bounds = f" from {low:g} to {high:g}" if math.isfinite(high) else f" of at least {low:g}" if low == 0 else ""
        raise FileFormatError(f"{where} should be a number{bounds}, but is {str(value)[:60]!r}")
    return float(value)


def _telling(path: Path) -> tuple[str, ...]:
    """The folders above a file without those whose name says nothing."""
    return tuple(part for part in path.parent.parts if part not in SAYS_NOTHING)


def _walk(folder: Path) -> Iterable[Path]:
    for where, folders, names in os.walk(folder):
        here = Path(where)
        deep = len(here.relative_to(folder).parts)
        folders[:] = [] if deep == DEPTH else sorted(f for f in folders if not f.startswith("."))
        yield from (here / name for name in sorted(names))


def _is_rollout(found: Mapping[str, Any]) -> bool:
    return isinstance(found.get("episodes"), list)


def _rollout(path: Path) -> RolloutResult:
    found = RolloutResult.load(path)
    for row in found.episodes:
        number(row.get("steps"), f"{path}: steps of seed {row['seed']}", 0)
    return found


def _plan(path: Path) -> list[dict[str, Any]]:
    rows = read_json(path, list)
    for row in rows:
        if not isinstance(row, dict) or "pattern" not in row or "method" not in row:
            raise FileFormatError(
                f"{path}: expected rows with pattern, method, sites, trainable and bytes, found {str(row)[:60]!r}"
            )
        for key in ("trainable", "bytes"):
            if row.get(key) is not None:
                number(row[key], f"{path}: {key} of {row['pattern']!r}", 0)
    return list(rows)


def _mapping(said: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    found = said.get(key) or {}
    if not isinstance(found, Mapping):
        raise FileFormatError(f"{path}: {key} should map each arm to its value, but is {str(found)[:60]!r}")
    return found


def _pair(said: Mapping[str, Any], name: str, path: Path) -> Sequence[Any]:
    found = said[name]
    if not isinstance(found, list) or len(found) != 2:
        raise FileFormatError(f"{path}: the value of {name!r} should be a pair of numbers, but is {str(found)[:60]!r}")
    return found
