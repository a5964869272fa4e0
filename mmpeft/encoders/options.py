"""The options of `load_encoder`, by modality, so that one that does not apply is refused instead of ignored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mmpeft.errors import ConfigError

Resize = Literal["library", "squash", "pad"]


def as_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype, or its name as YAML gives it ("bfloat16").

    Raises:
        ConfigError: there is no such dtype.
    """
    value = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if value is not None and isinstance(value, torch.dtype) or given is None:
        return value
    raise ConfigError(f"dtype is such as 'bfloat16' or 'float32', not {given!r}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every encoder takes.

    Args:
        layer: the tap, -1 the last (final norm included), -2 the second to last, or counted from 0.
        weights: a .safetensors file loaded in place of the source's own weights.
        dtype: of the backbone, such as torch.bfloat16; None keeps the checkpoint's for the hub's `hf:` models, else fp32.
        revision: commit or tag of a hub repository.
    """

    layer: int = -1
    weights: str | None = None
    dtype: torch.dtype | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Image encoders.

    Args:
        image_size: side in pixels; None is the size of the pretraining.
        pool: (rows, columns) of an adaptive average pooling of the map.
        drop_class_token: leave out class, distillation and register tokens.
        resize: "library" as in pretraining (may crop the borders), "squash" to a square, "pad" to a square with bars.
    """

    image_size: int | None = None
    pool: tuple[int, int] | None = None
    drop_class_token: bool = True
    resize: Resize = "library"

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"image_size is a number of pixels, not {self.image_size}")
        if self.pool is not None:
            if len(self.pool) != 2:
                raise ConfigError(f"pool is (rows, columns), not {self.pool!r}")
            object.__setattr__(self, "pool", (int(self.pool[0]), int(self.pool[1])))  # YAML gives a list
        if self.resize not in ("library", "squash", "pad"):
            raise ConfigError(f"resize is 'library', 'squash' or 'pad', not {self.resize!r}")


@dataclass(frozen=True, kw_only=True)
class AudioOptions(Options):
    """Audio encoders.

    Args:
        full_window: pad every clip to Whisper's 30 s window as in its pretraining, instead of encoding its own length.
    """

    full_window: bool = False


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Text encoders.

    Args:
        max_length: cut token ids at this many; None is the model's own limit.
    """

    max_length: int | None = None


OPTIONS: dict[Literal["image", "audio", "text"], type[Options]] = {
    "image": ImageOptions,
    "audio": AudioOptions,
    "text": TextOptions,
}
