"""Scores of one short answer: exact match, ANLS (document VQA), and the yes/no scores of POPE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError
from mmpeft.metrics.base import PerSampleMetric


class ExactMatch(PerSampleMetric):
    """Share of answers equal to one of the references, overall and by kind.

    Args:
        ignore_case: compare in lower case.
        ignore_period: drop one final period ("7." is "7").
    Outer space is always dropped and inner space collapsed.
    """

    name = "exact_match"

    def __init__(self, *, ignore_case: bool = True, ignore_period: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_case, self.ignore_period = ignore_case, ignore_period

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return float(self._plain(prediction) in {self._plain(r) for r in references})

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        text = text.lower() if self.ignore_case else text
        return text.removesuffix(".").rstrip() if self.ignore_period else text


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein distance of two strings or token lists, in O(len(a) len(b)) time and O(min) space."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls_score(prediction: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Largest 1 - normalised edit distance over the references, 0 where the distance reaches the threshold.

    Lower-cased and stripped as in Biten et al. 2019 (arXiv:1905.13648); two empty strings score 1.
    """
    best = 0.0
    for reference in references:
        a, b = prediction.strip().lower(), reference.strip().lower()
        longest = max(len(a), len(b))
        distance = edit_distance(a, b) / longest if longest else 0.0
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


class ANLS(PerSampleMetric):
    """Average normalised Levenshtein similarity (DocVQA, ST-VQA), overall and by kind.

    Args:
        threshold: normalised distance from which an answer scores 0.
    """

    name = "anls"

    def __init__(self, *, threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold must be in (0, 1], got {threshold}")
        self.threshold = threshold

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return anls_score(prediction, references, threshold=self.threshold)


class YesNo(PerSampleMetric):
    """Accuracy, precision, recall and F1 with "yes" as positive, and the share of predictions that say yes (POPE).

    Only the first sentence is read; it says no if it has the word "no" or "not", else yes (Li et al. 2023,
    arXiv:2305.10355, whose reading LLaVA shares). The reference is the first of the list, "yes" or "no".
    """

    name = "yes_no"
    _NO = re.compile(r"\b(?:no|not)\b")

    def says_yes(self, text: str) -> bool:
        """What a free answer says."""
        return not self._NO.search(text.split(".")[0].lower())

    def score(self, prediction: str, references: Sequence[str]) -> float:
        truth = references[0].strip().lower()
        if truth not in ("yes", "no"):
            raise ConfigError(f"yes_no needs 'yes' or 'no' as reference, got {references[0]!r}")
        return 2.0 * (truth == "yes") + self.says_yes(prediction)  # the four outcomes, told apart in `compute`

    def compute(self) -> dict[str, Tensor]:
        outcomes = torch.cat(list(self.by_kind().values())) if len(self.scores) else torch.empty(0)
        truth, said = outcomes >= 2, (outcomes % 2) == 1
        both = (truth & said).sum().float()
        precision, recall = both / said.sum(), both / truth.sum()  # NaN where nothing is positive
        return {
            "yes_no_accuracy": (truth == said).float().mean(),
            "yes_no_precision": precision,
            "yes_no_recall": recall,
            "yes_no_f1": 2 * both / (said.sum() + truth.sum()),
            "yes_no_ratio": said.float().mean(),
        }
