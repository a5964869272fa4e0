"""What a question-answering run achieved, in numbers, words and a picture: before, after, and without looking.

The callback answers held-out questions freely before and after training, sets the result beside the language-only
controls of `controls.py`, and writes `result.json`, `answers.json` and `answers.png` into a folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmpeft.adapters.freeze import evaluating
from mmpeft.data.samples import Sample, question_text
from mmpeft.errors import ConfigError, require
from mmpeft.metrics import load_metric
from mmpeft.tasks.controls import blanked, by_kind, majority_answers
from mmpeft.tasks.picture import answer_grid

_lightning: Any = require("lightning.pytorch", "train")


class QuestionReport(_lightning.Callback):  # type: ignore[misc]
    """Report on a `GenerationTask`; put it after `AdapterCheckpoint`, so that the adapter is safe before this starts.

    Args:
        folder: where result.json, answers.json and answers.png go.
        split: the data module's split that is asked.
        questions: asked after training, the first so many; None asks all.
        quick: asked before training and with blank images, the first so many.
        shown: questions in the picture; a few of them are printed too.
        batch_size: questions answered together.
    """

    def __init__(
        self,
        folder: str,
        *,
        split: str = "val",
        questions: int | None = None,
        quick: int = 250,
        shown: int = 12,
        batch_size: int = 100,
    ) -> None:
        if min(quick, shown, batch_size, questions or 1) < 1:
            raise ConfigError("QuestionReport: questions, quick, shown and batch_size must be at least 1")
        self.folder, self.split, self.questions = Path(folder), split, questions
        self.quick, self.shown, self.batch_size = quick, shown, batch_size
        self.before: dict[str, float] = {}
        self._started = time.perf_counter()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._started = time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero and not self.before:
            samples = self._samples(trainer, self.quick)
            answers = answer_all(pl_module, samples, batch_size=self.batch_size)
            self.before = _accuracy(samples, answers)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        samples = self._samples(trainer, self.questions)
        answers = answer_all(pl_module, samples, batch_size=self.batch_size)
        after = _accuracy(samples, answers)
        quick = samples[: self.quick]
        blind = _accuracy(quick, answer_all(pl_module, [blanked(s) for s in quick], batch_size=self.batch_size))
        common = majority_answers(trainer.datamodule.datasets["train"])
        guess = _accuracy(samples, [common.get(question_text(s), common[""]) for s in samples])
        result = {
            "seconds": round(time.perf_counter() - self._started, 1),
            "steps": trainer.global_step,
            "questions": len(samples),
            "accuracy": after,
            "accuracy_before": self.before,
            "accuracy_language_only": {k: max(guess[k], blind.get(k, 0.0)) for k in after},
            "majority_answer": guess,
            "blank_images": blind,
            "reloaded_equal": None,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        said = [{"id": s["id"], "kind": s.get("kind"), "answer": a} for s, a in zip(samples, answers, strict=True)]
        (self.folder / "answers.json").write_text(json.dumps(said, indent=0), encoding="utf-8")
        (self.folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        chosen = _spread(samples, self.shown)
        picture = answer_grid([samples[i] for i in chosen], [answers[i] for i in chosen], self.folder / "answers.png")
        print(table(result))
        for i in chosen[:5]:
            print(f"  {question_text(samples[i])}  ->  {answers[i]}   (truth: {samples[i]['answers'][0]})")
        print(f"picture {picture}, numbers {self.folder / 'result.json'}", flush=True)

    def _samples(self, trainer: Any, count: int | None) -> list[Sample]:
        dataset = trainer.datamodule.datasets[self.split]
        if dataset is None:
            raise ConfigError(f"QuestionReport: the data module has no {self.split!r} split")
        return [dataset[i] for i in range(min(len(dataset), count or len(dataset)))]

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"]


def answer_all(task: Any, samples: Sequence[Sample], *, batch_size: int) -> list[str]:
    """The task's free answers, with the processor it trains with; modes and gradients are left as they were.

    `task` needs `model`, `processor` and `max_new_tokens`.
    """
    model = task.model
    with evaluating(model), torch.no_grad():
        prompts = [task.processor.encode(s, train=False)[1] for s in samples]
        answers: list[str] = model.generate(prompts, max_new_tokens=task.max_new_tokens, batch_size=batch_size)
    return answers


def table(result: dict[str, Any]) -> str:
    """The accuracies as a table, one row a kind."""
    import io

    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    grid = Table(title=f"{result['questions']} held-out questions, answered freely, after {result['steps']} steps")
    for name in ("question kind", "before", "language only", "after"):
        grid.add_column(name, justify="left" if name == "question kind" else "right")
    for kind, value in result["accuracy"].items():
        cells = [result[key].get(kind) for key in ("accuracy_before", "accuracy_language_only")]
        grid.add_row(kind, *("" if c is None else f"{c:.3f}" for c in cells), f"{value:.3f}")
    Console(file=out, width=100, highlight=False).print(grid)
    return out.getvalue().rstrip()


def _accuracy(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, float]:
    exact = load_metric("exact_match")
    right = [bool(exact.score(a, s["answers"])) for s, a in zip(samples, answers, strict=True)]
    return by_kind(right, [s.get("kind") for s in samples])


def _spread(samples: Sequence[Sample], count: int) -> list[int]:
    """Indices of `count` samples that go round the kinds."""
    groups: dict[str | None, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.get("kind"), []).append(i)
    order = [i for row in range(len(samples)) for group in groups.values() for i in group[row : row + 1]]
    return order[:count]
