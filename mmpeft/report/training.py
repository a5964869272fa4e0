"""What a run trained, with what configuration, and how it learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmpeft.adapters import Rule
from mmpeft.adapters.store import TENSORS
from mmpeft.errors import FileFormatError, MmpeftError
from mmpeft.report.curves import Line, curves, smoothed
from mmpeft.report.logs import Series
from mmpeft.report.markup import Html, join, tag
from mmpeft.report.material import Material, named, note, table
from mmpeft.report.wording import count, significant, size

PANELS = 8  # charts that are open; the others are folded away
FIRST = ("loss", "val_loss", "val_", "rollout_", "test_")  # beginnings of the metrics that come first, in this order
MEASURED = ("val_", "rollout_", "test_")
LONGEST = 40_000  # characters of a configuration


def tiles(material: Material) -> Html | None:
    """The last values of what was measured beside the training loss, in large figures; of a run with one log only."""
    if len({series.label for series in material.logs.series}) != 1:
        return None
    measured = sorted(
        (s for s in material.logs.series if s.metric.startswith(MEASURED) and s.points), key=lambda s: s.metric
    )
    cards = [
        tag("li", tag("span", s.metric, class_="what"), tag("span", significant(s.points[-1][1]), class_="figure"),
            tag("span", f"at step {count(s.points[-1][0])}", class_="detail"))
        for s in measured[:4]
    ]  # fmt: skip
    return tag("ul", cards, class_="tiles") if cards else None


def learning(material: Material) -> Html | None:
    """A chart a metric, a line a log; what was logged once stands in the table of last values."""
    logs = material.logs
    metrics: dict[str, list[Series]] = {}
    for series in sorted(logs.series, key=lambda s: (_rank(s.metric), s.metric)):
        metrics.setdefault(series.metric, []).append(series)
    if not metrics and not logs.unread:
        return None
    drawn = [
        _panel(material, metric, found) for metric, found in metrics.items() if max(len(s.points) for s in found) > 1
    ]
    folded = tag("details", tag("summary", f"{len(drawn) - PANELS} more"), tag("div", drawn[PANELS:], class_="panels"))
    broken = sum(s.broken for s in logs.series)
    return join(
        tag("div", drawn[:PANELS], class_="panels"),
        note(
            "Over training steps. Faint: every logged value; strong: the mean of the 25th part of them around each. "
            "Values that fall by powers of ten stand on a logarithmic axis."
        )
        if drawn
        else None,
        folded if len(drawn) > PANELS else None,
        note(f"{count(broken)} logged values were not finite and are left out.") if broken else None,
        [tag("p", said, class_="warning") for said in logs.unread],
        _last(material, metrics),
    )


def _panel(material: Material, metric: str, found: list[Series]) -> Html:
    order = sorted(found, key=lambda s: material.run.colour(s.label))
    drawing = curves(
        [Line(s.label, material.run.colour(s.label), s.points) for s in order],
        label=f"{metric} over steps: "
        + "; ".join(f"{s.label} ends at {significant(_end(s))}" for s in order if s.points),
    )
    return tag("figure", tag("figcaption", metric), drawing)


def _last(material: Material, metrics: Mapping[str, list[Series]]) -> Html | None:
    labels = sorted({s.label for found in metrics.values() for s in found}, key=material.run.colour)
    rows = []
    for metric, found in metrics.items():
        ends = {s.label: _end(s) for s in found if s.points}
        rows.append((metric, *(significant(ends[label]) if label in ends else "–" for label in labels)))
    if not rows:
        return None
    head = ("metric", *labels)
    return tag("details", tag("summary", "last values"), table(head, rows, numbers=range(1, len(head))))


def _end(series: Series) -> float:
    """The value a chart's line ends at."""
    return smoothed(series.points)[-1][1] if series.points else float("nan")


def _rank(metric: str) -> int:
    return next(
        (i for i, start in enumerate(FIRST) if metric == start or (start.endswith("_") and metric.startswith(start))),
        len(FIRST),
    )


def plans(material: Material) -> Html | None:
    """The plan of every arm, its parameters and bytes, and what its adapter's file says of its base."""
    run = material.run
    rows: list[tuple[Any, ...]] = []
    for label in [name for name in run.order if name in run.plans or name in run.adapters]:
        if label in run.plans:
            lines = [
                (row["pattern"], str(row["method"]), _sites(row.get("sites")), count(row.get("trainable")), size(row.get("bytes")))
                for row in run.plans[label]
            ]  # fmt: skip
        else:
            path, description = run.adapters[label]
            lines = [(rule.match, _method(rule), "–", "–", "–") for rule in _rules(path, description)]
        rows += [
            (named(run, label) if i == 0 else "", tag("code", pattern), *rest)
            for i, (pattern, *rest) in enumerate(lines)
        ]
        total = [sum(row.get(key) or 0 for row in run.plans.get(label, ())) for key in ("trainable", "bytes")]
        if label in run.plans and len(run.plans[label]) > 1:
            rows.append(("", "all", "", "", tag("b", count(total[0])), tag("b", size(total[1]))))
    if not rows:
        return None
    head = ("arm", "pattern", "method", "sites", "trainable", "bytes")
    return join(table(head, rows, numbers=(3, 4, 5)), _files(material))


def _files(material: Material) -> Html | None:
    run, rows = material.run, []
    for label in sorted(run.adapters, key=run.colour):
        path, description = run.adapters[label]
        base, versions = (_mapping(description.get(key)) for key in ("base", "versions"))
        numbers, length = _weigh(path.parent / TENSORS)
        rows.append((
            named(run, label), tag("code", run.relative(path.parent)), count(numbers), size(length), str(base.get("name", "–")),
            ", ".join(f"{k} {v}" for k, v in versions.items()) or "–",
        ))  # fmt: skip
    head = ("saved adapter", "folder", "parameters", "file", "base model", "made with")
    return join(tag("h3", "Saved adapters"), table(head, rows, numbers=(2, 3))) if rows else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _weigh(path: Path) -> tuple[int | None, int | None]:
    """Numbers and bytes in a tensor file, from its header."""
    if not path.is_file():
        return None, None
    total = 0
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():
                one = 1
                for side in file.get_slice(key).get_shape():
                    one *= side
                total += one
    except (SafetensorError, ValueError, OSError) as error:
        raise FileFormatError(f"{path} is no whole safetensors file ({error})") from error
    return total, path.stat().st_size


def _rules(path: Path, description: Mapping[str, Any]) -> list[Rule]:
    rules = description.get("plan")
    try:
        return [Rule.read(rule) for rule in rules or ()]
    except (MmpeftError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: its plan cannot be read ({error})") from error


def _method(rule: Rule) -> str:
    lr = "" if rule.lr is None else f", lr {rule.lr:g}"
    return (", ".join(str(m) for m in rule.methods) or "frozen") + lr


def _sites(said: Any) -> str:
    return count(said) if isinstance(said, int | float) else count(len(said)) if isinstance(said, list) else "–"


def configs(material: Material) -> Html | None:
    """The YAML files the run was made with."""
    run, shown = material.run, []
    for path in run.find("config_of_run.yaml", "config.yaml", "hparams.yaml"):
        try:
            said = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise FileFormatError(f"{path} is no text file ({error})") from error
        if said.strip() in ("", "{}"):
            continue
        more = f"\n… and {count(len(said) - LONGEST)} characters more" if len(said) > LONGEST else ""
        body = tag("pre", said[:LONGEST], more, tabindex="0")
        shown.append(tag("details", tag("summary", tag("code", run.relative(path))), body))
    return join(shown) if shown else None


def as_json(value: Any) -> Html:
    """A value as indented JSON."""
    return tag("pre", json.dumps(value, indent=1, ensure_ascii=False, default=str), tabindex="0")
