"""A conversation as tensors (`Sample`), the media in it (`MediaItem`), and how a medium is read (`MediaReader`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpeft.errors import ConfigError

IGNORE = -100  # label of a token that is not supervised
MODALITIES = ("image", "audio", "state")  # modality_ids: 0 is text, i + 1 is MODALITIES[i]

Part = Mapping[str, Any]  # {"type": "image", "image": ...}


@dataclass(frozen=True)
class MediaItem:
    """One image, sound or state, ready to be batched.

    `x` is the encoder's input ([3, H, W] pixels, [T] waveform), or with `encoded` the connector's: tokens [T, d_v] that
    come from a feature cache or need no encoder. `count` is the number of LLM tokens it becomes.
    """

    modality: str
    x: Tensor
    encoded: bool
    count: int


@dataclass(frozen=True)
class Sample:
    """One conversation as tensors: ids, labels and modality_ids are [T]; media stand in the order of their placeholders."""

    id: str
    input_ids: Tensor  # int64
    labels: Tensor  # int64, IGNORE where not supervised
    modality_ids: Tensor  # uint8
    media: list[MediaItem] = field(default_factory=list)

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class MediaReader:
    """How one modality is read: raw medium -> encoder input, shape -> number of LLM tokens, width of cached tokens."""

    modality: str
    preprocess: Callable[[Any], Tensor] | None  # None: the modality has no encoder (state)
    encoder_tokens: Callable[[Any], int] | None
    connector_tokens: Callable[[int], int]
    width: int  # d_v

    def read(self, part: Part) -> MediaItem:
        """A content part to a MediaItem.

        Raises:
            ConfigError: tokens of the wrong shape. What `preprocess` raises for an unreadable medium passes through.
        """
        given = part.get("features", part["state"] if self.modality == "state" else None)
        if given is not None:
            tokens = torch.as_tensor(given)
            tokens = tokens[None] if self.modality == "state" and tokens.dim() == 1 else tokens
            if tokens.dim() != 2 or tokens.shape[1] != self.width or not tokens.is_floating_point():
                raise ConfigError(
                    f"expected float tokens [T, {self.width}], given {list(tokens.shape)} of {tokens.dtype}"
                )
            return MediaItem(self.modality, tokens, True, self.connector_tokens(tokens.shape[0]))
        assert self.preprocess is not None and self.encoder_tokens is not None
        raw = part[self.modality]
        x = self.preprocess((raw, part["sampling_rate"]) if "sampling_rate" in part else raw)
        shape = x.shape[-1] if self.modality == "audio" else tuple(x.shape)
        return MediaItem(self.modality, x, False, self.connector_tokens(self.encoder_tokens(shape)))
