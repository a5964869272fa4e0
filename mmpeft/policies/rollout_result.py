"""What a rollout found: one row an episode, success with its interval, and the paired test between two policies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft.data.demos.store import atomic_write
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound
from mmpeft.metrics.intervals import mcnemar_exact, wilson_interval


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same episodes: A minus B, and the exact McNemar p-value that they are equally good."""

    difference: float
    p_value: float
    only_a: int
    only_b: int
    episodes: int


@dataclass
class RolloutResult:
    """Episodes of a policy.

    Attributes:
        episodes: rows with `task`, `seed`, `success`, `first_success` (step or None), `steps`, `return`,
            `instruction`, `seconds`.
        latency: milliseconds of a policy call: `p50`, `p95`, `mean`, and `calls`, `per_step` (mean, over the executed
            actions of all slots). videos: files written. settings: what was rolled out, as JSON.
    """

    episodes: list[dict[str, Any]]
    latency: dict[str, float] = field(default_factory=dict)
    videos: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def successes(self) -> int:
        return sum(bool(row["success"]) for row in self.episodes)

    @property
    def success(self) -> float:
        """Share of episodes with a success; nan without episodes."""
        return self.successes / len(self.episodes) if self.episodes else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `success`, over all episodes."""
        return wilson_interval(self.successes, len(self.episodes))

    def by_task(self) -> dict[str, dict[str, Any]]:
        """task -> successes, episodes, success, interval, mean steps; in the order of first appearance by name."""
        table: dict[str, dict[str, Any]] = {}
        for task in sorted({row["task"] for row in self.episodes}):
            rows = [row for row in self.episodes if row["task"] == task]
            won = sum(bool(row["success"]) for row in rows)
            table[task] = {
                "successes": won,
                "episodes": len(rows),
                "success": won / len(rows),
                "interval": wilson_interval(won, len(rows)),
                "steps": float(np.mean([row["steps"] for row in rows])),
            }
        return table

    def compare(self, other: RolloutResult) -> Comparison:
        """This policy (A) against another (B), episode by episode.

        Raises:
            ConfigError: not the same tasks and seeds on both sides; the first missing ones are named.
        """
        mine, theirs = ({(r["task"], r["seed"]): bool(r["success"]) for r in x.episodes} for x in (self, other))
        if set(mine) != set(theirs) or not mine:
            odd = sorted(set(mine) ^ set(theirs))[:3]
            raise ConfigError(
                f"a paired test needs the same episodes on both sides ({len(mine)} and {len(theirs)}); "
                f"not shared: {odd}"
            )
        only_a = sum(won and not theirs[k] for k, won in mine.items())
        only_b = sum(theirs[k] and not won for k, won in mine.items())
        return Comparison((only_a - only_b) / len(mine), mcnemar_exact(only_a, only_b), only_a, only_b, len(mine))

    @classmethod
    def merged(cls, parts: Sequence[RolloutResult]) -> RolloutResult:
        """One result of shards (processes, ranks, machines) of a rollout.

        Raises:
            ConfigError: no parts, or an episode that is in two of them.
        """
        if not parts:
            raise ConfigError("nothing to merge")
        rows = sorted((row for part in parts for row in part.episodes), key=lambda r: (r["task"], r["seed"]))
        for a, b in zip(rows, rows[1:], strict=False):
            if (a["task"], a["seed"]) == (b["task"], b["seed"]):
                raise ConfigError(f"{a['task']} with seed {a['seed']} is in two of the parts")
        calls = sum(p.latency.get("calls", 0) for p in parts)
        latency = {
            k: sum(p.latency[k] * p.latency["calls"] for p in parts if p.latency.get("calls")) / calls
            for k in ("p50", "p95", "mean", "per_step")
            if calls
        }
        return cls(rows, latency | {"calls": calls}, [v for p in parts for v in p.videos], parts[0].settings)

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        summary = {
            "success": self.success if self.episodes else None,
            "interval": self.interval,
            "tasks": self.by_task(),
        }
        body = {
            **summary,
            "latency": self.latency,
            "videos": self.videos,
            "settings": self.settings,
            "episodes": self.episodes,
        }
        atomic_write(Path(path), json.dumps(body, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> RolloutResult:
        """Read what `save` wrote.

        Raises:
            NameNotFound: no such file. FileFormatError: no JSON of a rollout.
        """
        found = Path(path)
        if not found.is_file():
            raise NameNotFound(f"no file {found}")
        try:
            body = json.loads(found.read_text(encoding="utf-8"))
            rows = [_row(r) for r in body["episodes"]]
            return cls(rows, dict(body["latency"]), list(body["videos"]), dict(body["settings"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{found} is no rollout result ({type(error).__name__}: {error})") from error

    def __str__(self) -> str:
        low, high = self.interval
        lines = [f"{'success':>9}  {'95 % interval':<14} {'episodes':>8}  task"]
        rows = self.by_task().items()
        for name, row in rows if len(rows) > 1 else ():
            lines.append(_line(row["success"], row["interval"], row["episodes"], name))
        lines.append(
            _line(self.success, (low, high), len(self.episodes), "all" if len(rows) != 1 else next(iter(rows))[0])
        )
        return "\n".join(lines)


def _line(rate: float, interval: tuple[float, float], episodes: int, name: str) -> str:
    return f"{rate:9.3f}  {interval[0]:.3f} - {interval[1]:.3f}  {episodes:8d}  {name}"


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "task": str(row["task"]), "seed": int(row["seed"]), "success": bool(row["success"])}
