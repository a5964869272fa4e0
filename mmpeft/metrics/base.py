"""Bases of the text metrics, as `torchmetrics.Metric`: they work in Lightning and give the same over ranks as on one.

All text metrics share one call, `update(predictions, references, kinds=None)`, with a list of references a prediction,
and
`compute() -> {name: scalar tensor}`. Two bases:

- `PerSampleMetric`: a score a sample; the mean overall and by kind (`"exact_match"`, `"exact_match/odd_even"`).
- `CorpusMetric`: keeps the texts, for a score that needs all of them (document frequencies in CIDEr).

Text does not travel between ranks, tensors do: kinds and texts are kept as UTF-8 bytes, so that torchmetrics gathers
them like any other state, and no rank has to know beforehand which kinds another will meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from mmpeft.errors import ConfigError

KIND_BYTES = 64  # longest kind


def check_lengths(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str | None] | None
) -> list[str]:
    """Refuse unequal lists, a bare string where a list belongs, and a prediction without reference; gives the kinds.

    Raises:
        ConfigError: saying which.
    """
    if isinstance(predictions, str) or isinstance(references, str):
        raise ConfigError("predictions must be a list of strings and references a list of lists of strings")
    lengths = {"predictions": len(predictions), "references": len(references)}
    if kinds is not None:
        lengths["kinds"] = len(kinds)
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"update needs one entry a sample in each list, got {lengths}")
    for i, answers in enumerate(references):
        if isinstance(answers, str) or not answers or not all(isinstance(a, str) for a in answers):
            raise ConfigError(f"references[{i}] must be a non-empty list of strings, got {answers!r:.80}")
    return [kind or "" for kind in kinds] if kinds is not None else [""] * len(predictions)


class PerSampleMetric(Metric):
    """Mean of a score per sample, overall and by kind. Subclasses give `name` and `score`."""

    name: ClassVar[str]
    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    kinds: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scores", [], dist_reduce_fx="cat")  # [N] float64
        self.add_state("kinds", [], dist_reduce_fx="cat")  # [N, KIND_BYTES] uint8

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """The score of one prediction."""
        raise NotImplementedError

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        kinds: Sequence[str | None] | None = None,
    ) -> None:
        """Add samples.

        Raises:
            ConfigError: lists of unequal length, no reference, a kind longer than 64 bytes.
        """
        names = check_lengths(predictions, references, kinds)
        if not names:
            return
        scores = [self.score(p, r) for p, r in zip(predictions, references, strict=True)]
        self.scores.append(torch.tensor(scores, dtype=torch.float64, device=self.device))
        self.kinds.append(torch.stack([_kind_bytes(kind) for kind in names]).to(self.device))

    def by_kind(self) -> dict[str, Tensor]:
        """kind -> scores [n] so far on this rank, "" for samples without one; in `compute`, of all ranks."""
        if not len(self.scores):
            return {}
        scores, kinds = _cat(self.scores), _cat(self.kinds)
        found, index = torch.unique(kinds, dim=0, return_inverse=True)
        return {_kind_name(row): scores[index == i] for i, row in enumerate(found)}

    def compute(self) -> dict[str, Tensor]:
        """`{name: mean, "name/kind": mean of that kind, ...}`; NaN before any update."""
        groups = self.by_kind()
        every = torch.cat(list(groups.values())) if groups else torch.tensor([], dtype=torch.float64)
        named = {f"{self.name}/{kind}": scores.mean().float() for kind, scores in groups.items() if kind}
        return {self.name: every.mean().float(), **named}


class CorpusMetric(Metric):
    """Keeps predictions and references for a score over the whole corpus. Subclasses give `corpus_score`."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    predictions: list[Tensor]
    prediction_lengths: list[Tensor]
    references: list[Tensor]
    reference_lengths: list[Tensor]
    reference_counts: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("predictions", "prediction_lengths", "references", "reference_lengths", "reference_counts"):
            self.add_state(state, [], dist_reduce_fx="cat")  # UTF-8 bytes, and bytes a text, and references a sample

    def corpus_score(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """The scores of a corpus."""
        raise NotImplementedError

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        kinds: Sequence[str | None] | None = None,
    ) -> None:
        """Add samples; kinds are accepted and not used, a corpus score has no breakdown.

        Raises:
            ConfigError: lists of unequal length, or no reference.
        """
        if not check_lengths(predictions, references, kinds):
            return
        flat = [text for texts in references for text in texts]
        states = (
            (self.predictions, self.prediction_lengths, list(predictions)),
            (self.references, self.reference_lengths, flat),
        )
        for texts, lengths, given in states:
            encoded = [text.encode() for text in given]
            joined = torch.frombuffer(
                bytearray(b"".join(encoded) or b" "), dtype=torch.uint8
            )  # frombuffer needs a byte
            lengths.append(torch.tensor([len(e) for e in encoded] or [0], device=self.device))
            texts.append(joined[: sum(map(len, encoded))].to(self.device))
        self.reference_counts.append(torch.tensor([len(texts) for texts in references], device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """`corpus_score` of everything added, on all ranks."""
        if not len(self.reference_counts):
            return {name: torch.tensor(float("nan")) for name in self.corpus_score(["a"], [["a"]])}
        predictions = _texts(self.predictions, self.prediction_lengths)
        flat = iter(_texts(self.references, self.reference_lengths))
        references = [[next(flat) for _ in range(n)] for n in _cat(self.reference_counts).tolist()]
        return {name: torch.tensor(score) for name, score in self.corpus_score(predictions, references).items()}


def _cat(state: list[Tensor] | Tensor) -> Tensor:
    """A list state; after a gather over ranks it is a tensor already."""
    return state if isinstance(state, Tensor) else torch.cat(state)


def _texts(encoded: list[Tensor] | Tensor, lengths: list[Tensor] | Tensor) -> list[str]:
    joined = bytes(_cat(encoded).cpu().numpy())
    texts, at = [], 0
    for length in _cat(lengths).tolist():
        texts.append(joined[at : at + length].decode())
        at += length
    return texts


def _kind_bytes(kind: str) -> Tensor:
    encoded = kind.encode()
    if len(encoded) > KIND_BYTES:
        raise ConfigError(f"a kind may have at most {KIND_BYTES} bytes, {kind!r} has {len(encoded)}")
    return torch.tensor(list(encoded.ljust(KIND_BYTES, b"\0")), dtype=torch.uint8)


def _kind_name(row: Tensor) -> str:
    return bytes(row.cpu().numpy()).rstrip(b"\0").decode()
