"""Metrics by name, for YAML and for tasks: `load_metric("vqa", variant="lmms")`.

Two families, by how they are updated:

- text: `update(predictions: list[str], references: list[list[str]], kinds: list[str | None] | None)`, `compute() ->
  dict`
- tensor: torchmetrics' own, `update(predictions, targets)`, `compute() -> Tensor`
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from mmpeft.errors import ConfigError, NameNotFound, nearest, require


@dataclass(frozen=True)
class Entry:
    """Where a metric lives, how it is updated, and what it is."""

    path: str  # "module:Class"
    family: str  # "text", "tensor" or "episodes"
    summary: str
    higher_is_better: bool = True


_OWN = "mmpeft.metrics."
METRICS: dict[str, Entry] = {
    "exact_match": Entry(_OWN + "matching:ExactMatch", "text", "share of answers equal to a reference, by kind"),
    "vqa": Entry(_OWN + "vqa:VQAAccuracy", "text", "VQA accuracy; variant = official, lmms or evalai"),
    "anls": Entry(_OWN + "matching:ANLS", "text", "average normalised Levenshtein similarity"),
    "yes_no": Entry(_OWN + "matching:YesNo", "text", "accuracy, precision, recall, F1, yes ratio (POPE)"),
    "cider": Entry(_OWN + "cider:CIDEr", "text", "CIDEr-D, 0 to 10"),
    "bleu": Entry(_OWN + "captions:CaptionBLEU", "text", "BLEU-1 to BLEU-4 of captions"),
    "rouge_l": Entry(_OWN + "captions:CocoRougeL", "text", "ROUGE-L of captions, as COCO computes it"),
    "rouge_l_google": Entry(_OWN + "captions:RougeL", "text", "ROUGE-L of summaries, as rouge_score computes it"),
    "wer": Entry(_OWN + "speech:WER", "text", "word error rate", higher_is_better=False),
    "success_rate": Entry(_OWN + "success:SuccessRate", "episodes", "success rate with Wilson interval"),
    "accuracy": Entry("torchmetrics:Accuracy", "tensor", "classification accuracy"),
    "f1": Entry("torchmetrics:F1Score", "tensor", "F1"),
    "matthews": Entry("torchmetrics:MatthewsCorrCoef", "tensor", "Matthews correlation"),
    "auroc": Entry("torchmetrics:AUROC", "tensor", "area under the ROC curve"),
    "pearson": Entry("torchmetrics:PearsonCorrCoef", "tensor", "Pearson correlation"),
    "spearman": Entry("torchmetrics:SpearmanCorrCoef", "tensor", "Spearman rank correlation"),
    "mse": Entry("torchmetrics:MeanSquaredError", "tensor", "mean squared error", higher_is_better=False),
    "mae": Entry("torchmetrics:MeanAbsoluteError", "tensor", "mean absolute error", higher_is_better=False),
    "r2": Entry("torchmetrics:R2Score", "tensor", "coefficient of determination"),
}


def metric_entry(name: str) -> Entry:
    """The registry's entry.

    Raises:
        NameNotFound: with the nearest names.
    """
    if name not in METRICS:
        raise NameNotFound(f"unknown metric {name!r}; metrics are {', '.join(METRICS)}{nearest(name, METRICS)}")
    return METRICS[name]


def load_metric(name: str, **options: Any) -> Any:
    """A metric by name, with the options of its class.

    Raises:
        NameNotFound: unknown name. ConfigError: options its class does not take. MissingExtra: no torchmetrics.
    """
    module, attribute = metric_entry(name).path.split(":")
    require("torchmetrics", "train")
    factory = getattr(importlib.import_module(module), attribute)
    # torchmetrics' classification classes choose a subclass in __new__, whose signature is the public one
    maker = factory.__new__ if factory.__new__ is not object.__new__ and name in _CHOOSES else factory.__init__
    known = [p for p in inspect.signature(maker).parameters if p not in ("self", "cls", "kwargs")]
    for option in options:
        if option not in known and option not in _METRIC_OPTIONS:
            raise ConfigError(
                f"metric {name!r} has no option {option!r}; it takes {', '.join(known)}{nearest(option, known)}"
            )
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metric {name!r} with {options}: {error}") from error


_CHOOSES = ("accuracy", "f1", "matthews", "auroc")
_METRIC_OPTIONS = ("compute_on_cpu", "dist_sync_on_step", "sync_on_compute", "compute_with_cache")
