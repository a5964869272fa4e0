"""A question-answering run: accuracy by kind of question before, without looking, and after training; and its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mmpeft.errors import FileFormatError
from mmpeft.metrics.intervals import wilson_interval
from mmpeft.report.charts import Mark, dot_axis, dot_row, swatch
from mmpeft.report.markup import Html, join, tag
from mmpeft.report.material import Material, note, table
from mmpeft.report.run import number
from mmpeft.report.wording import count, percent

# key of result.json, and what it is called; the first is what the run is about
MEASURED = (
    ("accuracy", "after training"),
    ("accuracy_language_only", "without looking"),
    ("accuracy_before", "before training"),
)
OVERALL = "all"
SHOWN = 60  # answers in the page


def tiles(material: Material) -> Html | None:
    """The overall accuracies in large figures."""
    found = _accuracies(material)
    overall = [(i, name, values[OVERALL]) for i, (name, values) in enumerate(found) if OVERALL in values]
    if not overall:
        return None
    questions = material.run.result.get("questions")
    of = f"of {count(questions)} questions" if isinstance(questions, int) else None
    return tag(
        "ul",
        [
            tag("li", tag("span", tag("span", swatch(i, i), name, class_="label"), class_="what"),
                tag("span", percent(value), class_="figure"), tag("span", of, class_="detail") if i == 0 else None)
            for i, name, value in overall
        ],
        class_="tiles",
    )  # fmt: skip


def accuracy(material: Material) -> Html | None:
    """A line of marks a kind: after training (with its interval), without looking, before."""
    found = _accuracies(material)
    if not found:
        return None
    asked = Counter(str(row.get("kind")) for row in material.run.answers)
    rows = []
    for kind in found[0][1]:
        total = len(material.run.answers) if kind == OVERALL else asked.get(kind, 0)
        marks = []
        for i, (name, values) in enumerate(found):
            if kind in values:
                right = round(values[kind] * total)
                # the interval belongs to the first alone: the controls may have been asked fewer questions
                interval = wilson_interval(right, total) if i == 0 and total else None
                marks.append(Mark(name, values[kind], interval, i))
        said = " · ".join(percent(mark.value) for mark in marks)
        label = f"{kind} ({count(total)} questions)" if total else kind
        rows.append(dot_row(label, said, marks))
    legend = tag(
        "p", [tag("span", swatch(i, i), name, class_="label") for i, (name, _) in enumerate(found)], class_="legend"
    )
    known = " The line is Wilson's 95 % interval." if asked else ""
    return join(legend, tag("div", rows, dot_axis(), class_="chart"), note(f"Share answered exactly right.{known}"))


def samples(material: Material) -> Html | None:
    """The picture of answered questions, and the first answers in words."""
    run, shown = material.run, None
    picture = run.folder / "answers.png"
    if picture in run.files:
        shown = material.media.show(picture, alt="Questions with their images, the model's answers and the truth")
    rows = [
        (count(i + 1), str(row.get("kind") or "–"), str(row["answer"])) for i, row in enumerate(run.answers[:SHOWN])
    ]
    listed = None
    if rows:
        more = (
            f"the first {len(rows)} of {count(len(run.answers))} answers" if len(run.answers) > SHOWN else "all answers"
        )
        listed = tag("details", tag("summary", more), table(("question", "kind", "answer"), rows))
    return join(tag("figure", shown, class_="picture") if shown else None, listed) if shown or listed else None


def _accuracies(material: Material) -> list[tuple[str, dict[str, float]]]:
    """(name, kind -> accuracy) of what result.json holds, `all` first."""
    run, found = material.run, []
    for key, name in MEASURED:
        values = run.result.get(key)
        if values is None:
            continue
        path = run.folder / "result.json"
        if not isinstance(values, Mapping):
            raise FileFormatError(f"{path}: {key} should map kinds to accuracies, but is {str(values)[:60]!r}")
        checked = {str(k): number(v, f"{path}: {key}.{k}", 0, 1) for k, v in values.items()}
        found.append((name, dict(sorted(checked.items(), key=lambda item: item[0] != OVERALL))))
    return found
