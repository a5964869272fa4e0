"""Rollouts in detail: which seeds each arm wins, how long it took, and the tasks of a multi-task policy."""

from __future__ import annotations

from typing import Any

from mmpeft.policies.rollout_result import RolloutResult
from mmpeft.report.charts import Cell, line, strip
from mmpeft.report.markup import Html, join, tag
from mmpeft.report.material import Material, named, note, table
from mmpeft.report.wording import between, count, duration, percent, significant

NAMED = 12  # seeds that are listed in words


def strips(material: Material) -> Html | None:
    """One strip an arm: a cell an episode, in the order of the seeds."""
    rollouts = _ordered(material)
    if not rollouts:
        return None
    drawn = []
    for label, rollout in rollouts.items():
        cells = [Cell(float(row["success"]), _episode(row, rollout)) for row in _sorted(rollout)]
        said = f"{count(rollout.successes)} of {count(len(cells))} solved"
        cells_drawn = strip(cells, label=f"{label}: {said}", number=material.run.colour(label))
        drawn.append(line(named(material.run, label), said, cells_drawn))
    whole = join(
        tag("div", drawn, class_="chart"),
        note("One cell an episode, by task and seed: full is solved, a stub is not. Point at a cell for its seed."),
    )
    if any(_several(rollout) for rollout in rollouts.values()):  # a cell a task says more than hundreds of episodes
        whole = tag("details", tag("summary", "every episode"), whole)
    lost = [arm.name for arm in material.run.arms if arm.name not in rollouts]
    return join(
        whole,
        note(f"No rollout.json for {', '.join(lost)}.") if lost else None,
        tag("ul", [tag("li", said) for said in _differences(rollouts)], class_="plain"),
        _lengths(material, rollouts),
    )


def tasks(material: Material) -> Html | None:
    """A table of tasks by arms, for rollouts of several tasks; the cells' shade is their success."""
    rollouts = {k: r for k, r in _ordered(material).items() if _several(r)}
    if not rollouts:
        return None
    by_task = {label: rollout.by_task() for label, rollout in rollouts.items()}
    first = next(iter(by_task.values()))
    names = sorted(
        {t for found in by_task.values() for t in found}, key=lambda t: (-first.get(t, {"success": -1})["success"], t)
    )
    drawn, rows = [], []
    for label, found in by_task.items():
        cells = [
            Cell(found[t]["success"], f"{t}: {found[t]['successes']} of {found[t]['episodes']}")
            for t in names
            if t in found
        ]
        number = material.run.colour(label)
        drawn.append(
            line(named(material.run, label), "", strip(cells, label=f"{label}: success by task", number=number))
        )
    for name in names:
        shades = [
            tag("span", _task(found.get(name)), class_="heat", style=_shade(found.get(name)))
            for found in by_task.values()
        ]
        rows.append((_short(name), *shades))
    return join(
        tag("div", drawn, class_="chart"),
        note(f"{len(names)} tasks, easiest for {next(iter(by_task))} first; the height is the share solved."),
        table(("task", *by_task), rows, numbers=range(1, 1 + len(by_task))),
    )


def _ordered(material: Material) -> dict[str, RolloutResult]:
    order = material.run.order
    return {k: r for k, r in sorted(material.run.rollouts.items(), key=lambda item: order.index(item[0])) if r.episodes}


def _sorted(rollout: RolloutResult) -> list[dict[str, Any]]:
    return sorted(rollout.episodes, key=lambda row: (row["task"], row["seed"]))


def _several(rollout: RolloutResult) -> bool:
    """Whether it played more than one task."""
    return len({row["task"] for row in rollout.episodes}) > 1


def _short(task: str) -> str:
    return task.partition(":")[2] or task


def _episode(row: dict[str, Any], rollout: RolloutResult) -> str:
    where = f"{_short(row['task'])}, seed {row['seed']}" if _several(rollout) else f"seed {row['seed']}"
    return f"{where}: {'solved' if row['success'] else 'not solved'}, {count(row['steps'])} steps"


def _differences(rollouts: dict[str, RolloutResult]) -> list[str]:
    """Which seeds every arm solves, none solves, and only one solves; for one task played on the same seeds."""
    outcomes = {k: {row["seed"]: row["success"] for row in r.episodes} for k, r in rollouts.items()}
    seeds = set(next(iter(outcomes.values())))
    if any(_several(r) for r in rollouts.values()) or any(set(found) != seeds for found in outcomes.values()):
        return []
    if len(outcomes) == 1:
        lost = sorted(s for s in seeds if not next(iter(outcomes.values()))[s])
        return [f"Not solved: {_list(lost)}."] if lost else ["Every episode was solved."]
    groups = {"Solved by none": [s for s in seeds if not any(found[s] for found in outcomes.values())]}
    for label, mine in outcomes.items():
        others = [found for k, found in outcomes.items() if k != label]
        groups[f"Solved by {label} alone"] = [s for s in seeds if mine[s] and not any(f[s] for f in others)]
    return [f"{name}: {_list(sorted(found))}." for name, found in groups.items() if found]


def _list(seeds: list[int]) -> str:
    many = f" and {len(seeds) - NAMED} more" if len(seeds) > NAMED else ""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds[:NAMED]))}{many}"


def _lengths(material: Material, rollouts: dict[str, RolloutResult]) -> Html:
    """How long episodes were, what they earned, and how fast the policy answered."""
    rows = []
    for label, rollout in rollouts.items():
        solved = [row["steps"] for row in rollout.episodes if row["success"]]
        earned = [row["return"] for row in rollout.episodes if isinstance(row.get("return"), int | float)]
        spent = [row["seconds"] for row in rollout.episodes if isinstance(row.get("seconds"), int | float)]
        rows.append((
            named(material.run, label),
            significant(sum(solved) / len(solved)) if solved else "–",
            significant(sum(earned) / len(earned)) if earned else "–",
            duration(sum(spent) / len(spent)) if spent else "–",
            f"{significant(rollout.latency['p50'])} ms" if isinstance(rollout.latency.get("p50"), float) else "–",
        ))  # fmt: skip
    head = ("arm", "steps to success (mean)", "return (mean)", "time an episode", "policy call (median)")
    return table(head, rows, numbers=(1, 2, 3, 4))


def _task(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{percent(found['success'])} ({between(*found['interval'])})"


def _shade(found: dict[str, Any] | None) -> str | None:
    return None if found is None else f"--share:{found['success']:.2f}"
