"""The arms of a comparison: their success with intervals, and what the paired tests say, in plain words."""

from __future__ import annotations

import math

from mmpeft.report.charts import Mark, dot_axis, dot_row
from mmpeft.report.markup import Html, join, tag
from mmpeft.report.material import Material, named, note, table
from mmpeft.report.run import Arm
from mmpeft.report.wording import between, count, p_value, percent

SIGNIFICANT = 0.05


def tiles(material: Material) -> Html | None:
    """The arms in large figures: success, interval, and the test against the first."""
    arms = material.run.arms
    if not arms:
        return None
    cards = []
    for arm in arms[:6]:
        against = None
        if arm.p_value is not None:
            tie = ", a tie" if arm.p_value >= SIGNIFICANT else ""
            against = tag("span", f"{arms[0].name} against it: {p_value(arm.p_value)}{tie}", class_="detail")
        cards.append(
            tag(
                "li",
                tag("span", named(material.run, arm.name), class_="what"),
                tag("span", percent(arm.success, of=arm.episodes), class_="figure"),
                tag("span", _interval(arm), class_="detail"),
                against,
            )
        )
    return tag("ul", cards, class_="tiles")


def chart(material: Material) -> Html | None:
    """Success of every arm with its 95 % interval."""
    arms = material.run.arms
    if not arms:
        return None
    rows = []
    for arm in arms:
        mark = Mark(arm.name, arm.success, arm.interval if _known(arm) else None, material.run.colour(arm.name))
        said = f"{percent(arm.success, of=arm.episodes)}" + (f" ({_share(arm)})" if _known(arm) else "")
        rows.append(dot_row(named(material.run, arm.name), said, [mark]))
    episodes = {arm.episodes for arm in arms if arm.episodes}
    many = f" of {count(episodes.pop())} episodes" if len(episodes) == 1 else ""
    return join(
        tag("div", rows, dot_axis(), class_="chart"),
        note(f"Share{many} that succeeded; the line is Wilson's 95 % interval."),
        _disagreements(material),
    )


def tests(material: Material) -> Html | None:
    """The paired test of the reference against each other arm."""
    arms = material.run.arms
    if len(arms) < 2:
        return None
    first, others = arms[0], arms[1:]
    rows = [
        (named(material.run, arm.name), count(arm.only_reference), count(arm.only_this), p_value(arm.p_value), tag("span", _verdict(first, arm), class_="prose"))
        for arm in others
    ]  # fmt: skip
    head = (f"{first.name} against", f"only {first.name} solved", "only the other solved", "p", "which means")
    return join(
        table(head, rows, numbers=(1, 2, 3)),
        note(
            "Both arms play the same episodes, so only the episodes that one of them solved and the other did not tell "
            "them apart (exact McNemar test, two-sided)."
        ),
    )


def _verdict(first: Arm, other: Arm) -> str:
    if other.p_value is None:
        return "no paired test: not the same episodes, or none was recorded"
    if other.p_value >= SIGNIFICANT:
        return "a tie: these episodes show no difference between the two"
    better, worse = (first, other) if first.success >= other.success else (other, first)
    odds = "1 in 1000" if other.p_value < 0.001 else f"{max(1, round(1000 * other.p_value))} in 1000"
    under = "fewer than " if other.p_value < 0.001 else "about "
    return f"{better.name} is better than {worse.name}; chance alone would do this in {under}{odds} repetitions"


def _known(arm: Arm) -> bool:
    return all(math.isfinite(x) for x in arm.interval)


def _share(arm: Arm) -> str:
    return between(*arm.interval, of=arm.episodes)


def _interval(arm: Arm) -> str:
    many = f"of {count(arm.episodes)} episodes" if arm.episodes else ""
    sure = f"95 % interval {_share(arm)}" if _known(arm) else ""
    return ", ".join(part for part in (many, sure) if part)


def _disagreements(material: Material) -> Html | None:
    """Where result.json and an arm's own rollout do not say the same."""
    run = material.run
    odd = [
        f"{arm.name}: result.json says {percent(arm.success, of=1000)}, its rollout.json {percent(run.rollouts[arm.name].success, of=1000)}"
        for arm in run.arms
        if arm.name in run.rollouts and abs(run.rollouts[arm.name].success - arm.success) > 5e-4
    ]  # fmt: skip
    return tag("p", "The files disagree. ", "; ".join(odd), class_="warning") if odd else None
