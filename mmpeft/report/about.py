"""What a run was, where its time went, how to repeat it, and what this page does not show."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from mmpeft.errors import FileFormatError
from mmpeft.report.charts import bars
from mmpeft.report.markup import Html, join, tag
from mmpeft.report.material import Material, note
from mmpeft.report.run import number
from mmpeft.report.training import as_json
from mmpeft.report.wording import count, duration


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return count(value) if isinstance(value, int | float) else str(value)


def _seeds(value: Any) -> str:
    return f"{value[0]} to {value[1]}" if isinstance(value, list) and len(value) == 2 else _plain(value)


def _seconds(value: Any) -> str:
    return duration(value) if isinstance(value, int | float) else str(value)


# key of result.json -> what it is called, and how its value is said
FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "task": ("task", str),
    "demonstrations": ("demonstrations", _plain),
    "steps": ("training steps", _plain),
    "seeds": ("seeds evaluated", _seeds),
    "questions": ("questions asked", _plain),
    "reloaded_equal": ("same after loading again", _plain),
    "seconds": ("time in all", _seconds),
    "device": ("device", str),
    "date": ("date", str),
}


def facts(material: Material) -> Html | None:
    """The run in a few facts."""
    said = material.run.result
    found = [(name, words(said[key])) for key, (name, words) in FACTS.items() if _simple(said.get(key))]
    instructions = {
        row["instruction"]
        for r in material.run.rollouts.values()
        for row in r.episodes
        if isinstance(row.get("instruction"), str)
    }
    if len(instructions) == 1:
        found.insert(1, ("what the robot is told", f"“{instructions.pop()}”"))
    return (
        tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in found], class_="facts")
        if found
        else None
    )


def stages(material: Material) -> Html | None:
    """Seconds of every stage, as bars."""
    run = material.run
    path, said = run.folder / "result.json", run.result["stages"]
    if not isinstance(said, Mapping):
        raise FileFormatError(f"{path}: stages should map each stage to its seconds, but is {str(said)[:60]!r}")
    seconds = {str(k): number(v, f"{path}: stages.{k}", 0) for k, v in said.items()}
    total, whole = sum(seconds.values()), run.result.get("seconds")
    if not total:
        return None
    if isinstance(whole, int | float) and whole - total >= 0.01 * whole:
        seconds["the rest"], total = whole - total, whole
    longest = max(seconds.values())
    return join(
        bars([(name, f"{duration(s)} · {100 * s / total:.0f} %", s / longest) for name, s in seconds.items()]),
        note(f"{duration(total)} in all."),
    )


def everything(material: Material) -> Html | None:
    """result.json as it is."""
    said = material.run.result
    return tag("details", tag("summary", tag("code", "result.json")), as_json(said)) if said else None


def commands(material: Material) -> Html | None:
    """Commands that make the run, or parts of it, again."""
    run = material.run
    where = run.folder.as_posix()
    lines: list[tuple[str, str]] = []
    said = run.result.get("command")
    if isinstance(said, str):
        lines.append(("the whole run", said))
    for path in run.find("config_of_run.yaml"):
        lines.append(("train it again", _line("mmpeft", "fit", "--config", path.as_posix())))
    for label, rollout in run.rollouts.items():
        options = _rollout_options(rollout.settings, [row["seed"] for row in rollout.episodes])
        if label in run.adapters and options:
            folder = run.adapters[label][0].parent.as_posix()
            lines.append((f"evaluate {label} again", _line("mmpeft", "rollout", "--adapter", folder, *options)))
    for label, (path, _) in run.adapters.items():
        lines.append((f"what {label} holds", _line("mmpeft", "inspect", "--adapter", path.parent.as_posix())))
    lines.append(("this page", _line("mmpeft", "report", where)))
    script = "\n".join(f"# {' '.join(name.split())}\n{line}" for name, line in lines)
    return tag("pre", script, class_="commands", tabindex="0")


def left_out(material: Material) -> Html | None:
    """Files that were to be shown and are not inside the page."""
    files = material.media.left_out()
    return tag("ul", [tag("li", material.media.named(one)) for one in files], class_="plain") if files else None


def _rollout_options(settings: Mapping[str, Any], seeds: list[int]) -> list[str]:
    """What `mmpeft rollout` was given, from a rollout's settings; empty where they do not say the environment."""
    names = settings.get("env")
    if not isinstance(names, list) or not seeds:
        return []
    each = sorted(set(seeds))
    whole = each == list(range(each[0], each[-1] + 1))
    words = [word for name in names for word in ("--env", str(name))]
    words += ["--seeds", f"{each[0]}:{each[-1] + 1}" if whole else ",".join(map(str, each))]
    if settings.get("execute"):
        words += ["--execute", str(settings["execute"])]
    options = settings.get("options")
    if isinstance(options, Mapping) and options:
        words += ["--options", *(f"{key}={json.dumps(value)}" for key, value in options.items())]
    return words


def _line(*words: str) -> str:
    return shlex.join(words)


def _simple(value: Any) -> bool:
    """Whether a value fits into the list of facts."""
    return isinstance(value, str | int | float) or (isinstance(value, list) and all(isinstance(v, int) for v in value))


def dated(material: Material, names: Iterable[str] = ("result.json",)) -> str:
    """When the run ended: the time of its result, or of the youngest file that the page reads."""
    run = material.run
    paths = run.find(*names) or run.find(
        "rollout.json", "metrics.csv", "adapter.json", "*.yaml", "events.out.tfevents.*"
    )
    if not paths:
        return ""
    latest = max(path.stat().st_mtime for path in paths)
    ended = datetime.fromtimestamp(latest, UTC)
    return f"{ended.day} {ended:%B %Y, %H:%M} UTC"
