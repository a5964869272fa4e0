"""Videos of episodes: the same seed of several arms stands side by side, playable, with how it ended."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mmpeft.report.markup import Html, tag
from mmpeft.report.material import Material, named
from mmpeft.report.run import VIDEOS
from mmpeft.report.wording import count

# seed-50003-success.mp4, or with the task in place of "seed", as `mmpeft rollout --video` names them
_NAME = re.compile(r"(?:^|(?P<task>.*)-)(?P<seed>\d+)-(?P<outcome>success|failure)$")


@dataclass(frozen=True)
class Film:
    """A video: `about` is what those side by side have in common, `turn` its place among its arm's like ends."""

    path: Path
    arm: str
    task: str
    seed: int | None
    outcome: str
    turn: int

    @property
    def about(self) -> str:
        """The task, the seed, or both."""
        return " · ".join(part for part in (self.task, "" if self.seed is None else f"seed {self.seed}") if part)


def videos(material: Material) -> Html | None:
    """Every video of the run; seeds that several arms were filmed on come first."""
    films = find(material)
    together = Counter(film.about for film in films)
    order = {
        about: i for i, about in enumerate(sorted(together, key=lambda about: (-together[about], _first(films, about))))
    }
    groups: list[list[Film]] = [[] for _ in order]
    for film in sorted(films, key=lambda f: material.run.colour(f.arm)):
        groups[order[film.about]].append(film)
    drawn = [
        tag(
            "div",
            tag("h3", group[0].about),
            tag("div", [_card(material, film) for film in group], class_="films"),
            class_="group several" if len(group) > 1 else "group",
        )
        for group in groups
    ]
    return tag("div", drawn, class_="groups") if drawn else None


def find(material: Material) -> list[Film]:
    """The videos in folders called `videos`, at the top of the run, and wherever a name says seed and outcome."""
    run, found, turns = material.run, list[Film](), Counter[tuple[str, str]]()
    for path in run.find(*(f"*{ending}" for ending in VIDEOS)):
        name = _NAME.match(path.stem)
        if name is None and path.parent.name != "videos" and path.parent != run.folder:
            continue  # a data set's, perhaps
        above = [part for part in path.relative_to(run.folder).parent.parts if part != "videos"]
        arm = "/".join(above) or run.folder.resolve().name
        task, seed, outcome = (
            (path.stem, None, "") if name is None else (name["task"], int(name["seed"]), name["outcome"])
        )
        found.append(Film(path, arm, "" if task in (None, "seed") else task, seed, outcome, turns[arm, outcome]))
        turns[arm, outcome] += 1
    return found


def _card(material: Material, film: Film) -> Html:
    said = ", ".join(part for part in (film.outcome, _steps(material, film)) if part)
    caption = tag("figcaption", named(material.run, film.arm), tag("span", said, class_=film.outcome or None))
    alt = f"Video: {film.arm}, {film.about}" + (f", {film.outcome}" if film.outcome else "")
    return tag("figure", material.media.show(film.path, alt=alt, turn=film.turn), caption)


def _steps(material: Material, film: Film) -> str:
    """How long the filmed episode was, where the arm's rollout has one of that seed (and task) only."""
    rollout = material.run.rollouts.get(film.arm)
    rows = [r for r in rollout.episodes if r["seed"] == film.seed] if rollout else []
    if len({r["task"] for r in rows}) > 1:
        rows = [r for r in rows if r["task"].partition(":")[2].replace("/", "-") == film.task]
    return f"{count(rows[0]['steps'])} steps" if len(rows) == 1 else ""


def _first(films: list[Film], about: str) -> tuple[str, int]:
    return next((f.task, -1 if f.seed is None else f.seed) for f in films if f.about == about)
