"""How good a model that never sees the image would be: what any score on a question data set must be read beside.

Two controls, of which the higher counts: the majority answer of the training set for the exact text of a question, and
the trained model itself with every image blank and every sound silent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmpeft.data.samples import Sample, question_text
from mmpeft.encoders.image_preprocess import load_image

GREY = 127


def majority_answers(dataset: Any) -> dict[str, str]:
    """Exact question text -> its most frequent first answer in `dataset`; "" -> the most frequent of all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(len(dataset)):
        sample = dataset[index]
        answer = sample["answers"][0]
        counts[question_text(sample)][answer] += 1
        counts[""][answer] += 1
    return {question: counter.most_common(1)[0][0] for question, counter in counts.items()}


def blanked(sample: Sample) -> Sample:
    """The sample with every image mid-grey, every sound silent and every cached token zero, all of the same size."""
    messages = []
    for message in sample["messages"]:
        content = message["content"]
        parts = content if isinstance(content, str) else [_blank(part) for part in content]
        messages.append({**message, "content": parts})
    return {**sample, "messages": messages}


def _blank(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    if "features" in part:
        return {**part, "features": torch.zeros_like(part["features"])}
    if part["type"] == "image":
        return {**part, "image": _grey(part["image"])}
    wave = part["audio"]
    return {**part, "audio": torch.zeros_like(wave) if isinstance(wave, torch.Tensor) else np.zeros_like(wave)}


def _grey(image: Any) -> Any:
    """A mid-grey image in the form of `image`: a tensor, an array, or (for paths too) a PIL image."""
    if isinstance(image, torch.Tensor):
        return torch.full_like(image, GREY / 255 if image.is_floating_point() else GREY)
    if isinstance(image, np.ndarray):
        return np.full_like(image, GREY / 255 if np.issubdtype(image.dtype, np.floating) else GREY)
    from PIL import Image

    return Image.new("RGB", load_image(image).size, (GREY, GREY, GREY))


def by_kind(right: Sequence[bool], kinds: Sequence[str | None]) -> dict[str, float]:
    """Share of right answers by kind, in the order in which kinds first appear, and over "all"."""
    groups: dict[str, list[bool]] = {}
    for ok, kind in zip(right, kinds, strict=True):
        groups.setdefault(kind or "all", []).append(ok)
    groups["all"] = list(right)
    return {kind: sum(oks) / max(1, len(oks)) for kind, oks in groups.items()}
