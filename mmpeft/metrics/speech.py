"""Word error rate, after the normalisation that published numbers use.

Whisper's English normaliser (Radford et al. 2022, arXiv:2212.04356, appendix C) is the norm for English: it spells out
contractions, writes numbers as digits, drops fillers and punctuation. It comes with transformers; the table of British
spellings it also maps is a file beside Whisper's checkpoints and is used when given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchmetrics.text import WordErrorRate

from mmpeft.errors import NameNotFound, nearest, require
from mmpeft.metrics.base import check_lengths


def _plain(spelling: Mapping[str, str]) -> Callable[[str], str]:
    return lambda text: " ".join(text.split())


def _basic(spelling: Mapping[str, str]) -> Callable[[str], str]:
    words = "".join
    return lambda text: " ".join(words(c if c.isalnum() or c == "'" else " " for c in text.lower()).split())


def _whisper(spelling: Mapping[str, str]) -> Callable[[str], str]:
    module = require("transformers.models.whisper.english_normalizer", "text", "it has Whisper's English normaliser")
    normalizer: Callable[[str], str] = module.EnglishTextNormalizer(dict(spelling))
    return normalizer


NORMALIZERS = {"none": _plain, "basic": _basic, "whisper": _whisper}


class WER(WordErrorRate):
    """Word error rate: substitutions, insertions and deletions over reference words, 0 and up, over the whole corpus.

    Args:
        normalizer: "whisper" (English), "basic" (lower case, letters and digits only; any language), "none".
        spelling: British to American spellings for "whisper"; the contents of a checkpoint's normalizer.json.

    Raises:
        NameNotFound: unknown normalizer. MissingExtra: "whisper" without transformers.
    """

    def __init__(
        self, normalizer: str = "whisper", *, spelling: Mapping[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if normalizer not in NORMALIZERS:
            names = ", ".join(NORMALIZERS)
            raise NameNotFound(
                f"unknown normalizer {normalizer!r}; it is one of {names}{nearest(normalizer, NORMALIZERS)}"
            )
        self.normalize = NORMALIZERS[normalizer](spelling or {})

    def update(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        kinds: Sequence[str | None] | None = None,
    ) -> None:
        """Add transcripts; of the references the first counts, kinds are not used."""
        check_lengths(predictions, references, kinds)
        said = [self.normalize(text) for text in predictions]
        super().update(said, [self.normalize(texts[0]) for texts in references])

    def compute(self) -> dict[str, Any]:  # type: ignore[override]
        """`{"wer": errors / words}`; NaN without reference words."""
        return {"wer": super().compute()}
