"""BLEU and ROUGE-L of captions, without Java.

- `CaptionBLEU` is torchmetrics' corpus BLEU on COCO's tokens, BLEU-1 to BLEU-4 at once. Equal to COCO's evaluation:
  clipped counts, and of the references the length closest to the candidate's, the shorter on a tie.
- `CocoRougeL` is ROUGE-L as COCO computes it: the best precision and the best recall over the references, perhaps of
  two different ones, combined with beta = 1.2.
- `RougeL` is torchmetrics' ROUGE-L (Google's rouge_score without stemming): the best F1 of a single reference. It is
  what summarisation papers report; the two numbers are not comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.text import rouge_score
from torchmetrics.text import BLEUScore

from mmpeft.metrics.base import PerSampleMetric, check_lengths
from mmpeft.metrics.ptb import tokenize


class CaptionBLEU(BLEUScore):
    """BLEU-1 .. BLEU-4 (Papineni et al. 2002), 0 to 1, over the whole corpus, no smoothing."""

    full_state_update = False  # its states are sums; torchmetrics would count every batch twice

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(n_gram=4, **kwargs)

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        kinds: Sequence[str | None] | None = None,
    ) -> None:
        """Add captions; kinds are not used."""
        check_lengths(predictions, references, kinds)
        candidates = [" ".join(tokenize(p)) for p in predictions]
        # torchmetrics takes the first of equally close lengths: the shorter has to come first
        given = [sorted((" ".join(tokenize(r)) for r in texts), key=lambda t: len(t.split())) for texts in references]
        super().update(candidates, given)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """`{"bleu_1": ..., "bleu_4": ...}`."""
        precision = self.numerator / self.denominator.clamp_min(1)
        brevity = torch.exp(torch.clamp(1 - self.target_len / self.preds_len.clamp_min(1), max=0.0))
        empty = self.preds_len == 0
        return {
            f"bleu_{n}": torch.where(empty, 0.0, brevity * precision[:n].log().mean().exp()).squeeze()
            for n in range(1, self.n_gram + 1)
        }


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence of two token lists."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


class CocoRougeL(PerSampleMetric):
    """ROUGE-L (Lin 2004) as in COCO's caption evaluation, mean over images."""

    name = "rouge_l"
    beta = 1.2

    def score(self, prediction: str, references: Sequence[str]) -> float:
        candidate = tokenize(prediction)
        precision = recall = 0.0
        for reference in map(tokenize, references):
            common = longest_common_subsequence(candidate, reference)
            precision = max(precision, common / len(candidate) if candidate else 0.0)
            recall = max(recall, common / len(reference) if reference else 0.0)
        if not precision or not recall:
            return 0.0
        return (1 + self.beta**2) * precision * recall / (recall + self.beta**2 * precision)


class RougeL(PerSampleMetric):
    """ROUGE-L of Google's rouge_score without stemming (torchmetrics' own), best reference, mean over samples.

    torchmetrics' class is not used: it gathers one tensor a sample, so ranks with unequal numbers of samples would wait
    for one another for ever.
    """

    name = "rouge_l_google"

    def score(self, prediction: str, references: Sequence[str]) -> float:
        scores = rouge_score(prediction, [list(references)], rouge_keys="rougeL", accumulate="best")
        return float(scores["rougeL_fmeasure"])
