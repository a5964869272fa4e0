"""The sections of a page, as a table: what each is called, which files it reads, and the function that draws it.

A section appears where all of its files exist and its function finds something in them; `result.json` is shared, so a
section may also name the keys that it needs there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mmpeft.report import about, answers, comparison, episodes, films, training
from mmpeft.report.logs import EVENTS
from mmpeft.report.markup import Html
from mmpeft.report.material import Material
from mmpeft.report.run import VIDEOS

ANY_ROLLOUT = ("rollout.json", "result.json")


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        reads: file names, at least one of which must lie in the folder. keys: of result.json, all needed.
        draw: gives the section's content, or None where the files hold nothing for it.
        alone: whether it makes a page worth writing; a list of commands does not.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    draw: Callable[[Material], Html | None]
    keys: tuple[str, ...] = ()
    alone: bool = True

    def content(self, material: Material) -> Html | None:
        """What it draws, or None where it does not appear."""
        run = material.run
        if not run.find(*self.reads) or any(key not in run.result for key in self.keys):
            return None
        return self.draw(material)


SECTIONS = (
    Section("success", "Success, side by side", ANY_ROLLOUT, comparison.chart),
    Section("tests", "Is the difference real?", ANY_ROLLOUT, comparison.tests),
    Section("episodes", "Episode by episode", ANY_ROLLOUT, episodes.strips),
    Section("tasks", "Task by task", ANY_ROLLOUT, episodes.tasks),
    Section("videos", "What it looks like", tuple(f"*{ending}" for ending in VIDEOS), films.videos),
    Section("accuracy", "Accuracy by kind of question", ("result.json",), answers.accuracy, ("accuracy",)),
    Section("answers", "Some answers", ("answers.png", "answers.json"), answers.samples),
    Section("curves", "Learning curves", ("metrics.csv", EVENTS), training.learning),
    Section("plan", "What was trained", ("plan.json", "adapter.json"), training.plans),
    Section("time", "Where the time went", ("result.json",), about.stages, ("stages",)),
    Section("config", "Configuration", ("config_of_run.yaml", "config.yaml", "hparams.yaml"), training.configs, (), False),
    Section("numbers", "Numbers in full", ("result.json",), about.everything),
    Section("repeat", "How to repeat it", ("*",), about.commands, (), False),
    Section("missing", "Not in this page", ("*",), about.left_out, (), False),
)  # fmt: skip
