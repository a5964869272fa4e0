"""The frozen prefix, cached: every image and sound of the datasets goes through its frozen encoder once.

`CachedProcessor` is the data module's processor of a `GenerationTask` with a feature cache: it replaces each medium of a
conversation by its tokens {"features": [T, d_v]} out of a `FeatureCache`, keyed by content. A medium that is not there
(one that a reader makes anew each time) is encoded by the model as usual.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mmpeft.data.processor import ConversationProcessor
from mmpeft.data.samples import Sample, media_parts
from mmpeft.encoders.cache import FeatureCache, content_id
from mmpeft.errors import BadSample, ConfigError
from mmpeft.multimodal import MultimodalLM

CALIBRATION_TOKENS = 32_768  # enough for a mean and a deviation of each channel


def media_of(model: MultimodalLM, dataset: Any) -> dict[str, dict[str, Any]]:
    """Modality -> content id -> medium, of every medium of a data set that the model has an encoder for.

    Samples that cannot be read are left to the loader, which refuses or skips them by name.
    """
    found: dict[str, dict[str, Any]] = {modality: {} for modality in model.encoders}
    for index in range(len(dataset)):
        try:
            for part in media_parts(dataset[index]):
                if part["type"] in found and part["type"] in part:
                    raw = part[part["type"]]
                    found[part["type"]].setdefault(content_id(raw), raw)
        except (BadSample, OSError):
            continue
    return found


def fill_caches(model: MultimodalLM, media: Iterable[Mapping[str, Mapping[str, Any]]], folder: str) -> dict[str, FeatureCache]:
    """Encode every medium that is not on disk yet.

    Args:
        media: of each data set, from `media_of`.

    Returns:
        A cache for each modality of the model.

    Raises:
        ConfigError: the model has no encoder, or one whose tokens change in training.
    """
    if not len(model.encoders):
        raise ConfigError("feature_cache: the model has no encoder whose features could be cached")
    caches = {}
    with torch.random.fork_rng(devices=[]):  # a run with a cache starts from the same random numbers as one without
        for modality, encoder in model.encoders.items():
            caches[modality] = FeatureCache(encoder, Path(folder))  # type: ignore[arg-type]
            everything = {key: raw for found in media for key, raw in found[modality].items()}
            caches[modality].fill(list(everything.items()))
    return caches


def calibrate_connectors(
    model: MultimodalLM, caches: Mapping[str, FeatureCache], train: Mapping[str, Mapping[str, Any]]
) -> None:
    """Start each connector from standardised channels, measured on the training media; see `Connector.calibrate`."""
    for modality, cache in caches.items():
        tokens: list[torch.Tensor] = []
        count = 0
        for key in train[modality]:
            if tokens and count >= CALIBRATION_TOKENS:
                break
            tokens.append(cache[key])  # [T, d_v]
            count += len(tokens[-1])
        mask = pad_sequence([torch.ones(len(t), dtype=torch.bool) for t in tokens], batch_first=True)
        padded = pad_sequence(tokens, batch_first=True)
        model.connectors[modality].calibrate(padded, None if bool(mask.all()) else mask)  # type: ignore[operator]


class CachedProcessor(ConversationProcessor):
    """Conversations whose media are replaced by their cached tokens."""

    def __init__(
        self, model: MultimodalLM, caches: Mapping[str, FeatureCache], *, row_length: int | None = None
    ) -> None:
        super().__init__(model, row_length=row_length)
        self.caches = dict(caches)

    def encode(self, sample: Sample, *, train: bool) -> tuple[Any, Any, Any]:
        encoded, prompt, given = super().encode({**sample, "messages": self._messages(sample)}, train=train)
        return encoded, prompt, given if train else sample

    def _messages(self, sample: Sample) -> list[dict[str, Any]]:
        return [
            {**m, "content": m["content"] if isinstance(m["content"], str) else [self._part(p) for p in m["content"]]}
            for m in sample["messages"]
        ]

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        cache = self.caches.get(part["type"])
        if cache is None or part["type"] not in part:
            return part
        key = content_id(part[part["type"]])
        return {"type": part["type"], "features": cache[key]} if key in cache else part
