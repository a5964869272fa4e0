"""How samples become tensors: the `Processor` protocol, and the processor of conversations for a `MultimodalLM`.

Both methods run in the loader's workers, so decoding and preprocessing are off the training process. A task with
other needs gives the data module a processor of its own (`LightningModule.processor`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from mmpeft.data.samples import Sample
from mmpeft.errors import ConfigError
from mmpeft.multimodal.sample import IGNORE
from mmpeft.multimodal.sample import Sample as Encoded


class Processor(Protocol):
    """What a task gives the loader. Neither method may touch the accelerator."""

    def encode(self, sample: Any, *, train: bool) -> Any:
        """One sample to tensors; raises `BadSample` (or `OSError`, for a file) if it cannot."""
        ...

    def collate(self, items: list[Any]) -> Any:
        """Encoded samples to a batch."""
        ...


class Prompts:
    """Encoded prompts, ready for `model.generate(list(prompts))`.

    Deliberately no list: Lightning walks into lists to move tensors, and `generate` moves what it needs by itself.
    """

    def __init__(self, samples: Sequence[Encoded]) -> None:
        self._samples = list(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Encoded]:
        return iter(self._samples)

    def __getitem__(self, index: int) -> Encoded:
        return self._samples[index]


class ConversationProcessor:
    """Encodes conversations with a `MultimodalLM` (anything with its `encode` and `collate`).

    A training batch is `{"inputs": model batch, "ids": [str]}`. An evaluation batch also has `"samples"`, the samples
    as the dataset gave them (images undecoded, `kind` and `answers`), and `"prompts"`, the conversations encoded up to
    where the last answer begins; its `"inputs"` hold the answers too, where there are any, for the loss.

    Args:
        row_length: pack the samples of a training batch into rows of this many tokens, each attending to itself alone;
            None pads them.
    """

    def __init__(self, model: Any, *, row_length: int | None = None) -> None:
        if row_length is not None and row_length < 1:
            raise ConfigError(f"row_length must be at least 1 or None, got {row_length}")
        self.model, self.row_length = model, row_length

    def encode(self, sample: Sample, *, train: bool) -> tuple[Any, Any, Any]:
        """(encoded, prompt, sample): of a training sample only the first, and its id."""
        conversation = {"id": sample["id"], "messages": sample["messages"]}
        answered = train or sample["messages"][-1]["role"] == "assistant"
        encoded = self.model.encode(conversation, answer=answered)
        if train:
            return encoded, None, sample["id"]
        prompt = prompt_of(encoded) if answered else encoded
        return encoded, prompt if prompt is not None else self.model.encode(conversation, answer=False), sample

    def collate(self, items: list[tuple[Any, Any, Any]]) -> dict[str, Any]:
        encoded, prompts, samples = map(list, zip(*items, strict=True))
        if isinstance(samples[0], str):
            options = {} if self.row_length is None else {"row_length": self.row_length}
            return {"inputs": self.model.collate(encoded, **options), "ids": samples}
        inputs = self.model.collate(encoded)
        ids = [sample["id"] for sample in samples]
        return {"inputs": inputs, "ids": ids, "samples": samples, "prompts": Prompts(prompts)}


def prompt_of(encoded: Encoded) -> Encoded | None:
    """An encoded conversation cut where its last answer begins, so that media are decoded once for loss and generation.

    Its ids are what `encode(..., answer=False)` gives (`ConversationEncoder.encode` promises it). None if media follow
    that point, or nothing is supervised.
    """
    supervised = (encoded.labels != IGNORE).nonzero().flatten().tolist()
    if not supervised:
        return None
    start = supervised[-1]
    while start > 0 and encoded.labels[start - 1] != IGNORE:
        start -= 1
    if int((encoded.modality_ids[:start] != 0).sum()) != sum(item.count for item in encoded.media):
        return None
    labels = encoded.labels[:start]
    return dataclasses.replace(
        encoded,
        input_ids=encoded.input_ids[:start],
        labels=labels.new_full(labels.shape, IGNORE),
        modality_ids=encoded.modality_ids[:start],
    )
