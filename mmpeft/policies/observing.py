"""Observations to arrays of one layout, and the short memory of policies that look back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import BadSample

Array = NDArray[Any]


def batched_images(images: Any, views: int) -> Array:
    """Pictures of an observation as uint8 [B, V, H, W, 3].

    Args:
        images: [B, V, H, W, 3], or [B, H, W, 3] of one view, or a dict of such, one a view, in the order of training.

    Raises:
        BadSample: no bytes of such a shape, or another number of views.
    """
    if isinstance(images, Mapping):
        images = np.stack([np.asarray(v) for v in images.values()], axis=1)
    array = np.asarray(images)
    if array.ndim == 4:
        array = array[:, None]
    if array.dtype != np.uint8 or array.ndim != 5 or array.shape[-1] != 3 or array.shape[1] != views:
        raise BadSample(f"expected pictures uint8 [B, {views}, H, W, 3], given {array.dtype} {list(array.shape)}")
    return array


class History:
    """The last `steps` observations of each row of a batch of environments.

    A row that begins an episode (`first`) forgets; frames before its beginning are copies of its first, marked unseen.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.frames: dict[str, Array] = {}
        self.seen: Array | None = None  # [B, T] bool

    def push(self, now: Mapping[str, Array], first: Any = None) -> dict[str, Array]:
        """Arrays [B, ...] of this moment to [B, T, ...], with `seen` [B, T] where T > 1.

        Raises:
            BadSample: another number of rows than before.
        """
        if self.steps == 1 or not now:
            return {k: np.ascontiguousarray(v[:, None]) for k, v in now.items()}
        rows = len(next(iter(now.values())))
        if self.seen is None:
            fresh = np.ones(rows, dtype=bool)
            self.frames = {k: np.repeat(v[:, None], self.steps, axis=1) for k, v in now.items()}
            self.seen = np.zeros((rows, self.steps), dtype=bool)
        else:
            if len(self.seen) != rows:
                known = len(self.seen)
                raise BadSample(f"the policy remembers {known} environments, given {rows}; reset() between rollouts")
            fresh = np.zeros(rows, dtype=bool) if first is None else np.asarray(first, dtype=bool)
            for key, value in now.items():
                past = np.concatenate([self.frames[key][:, 1:], value[:, None]], axis=1)
                past[fresh] = np.repeat(value[fresh][:, None], self.steps, axis=1)
                self.frames[key] = past
        self.seen = np.concatenate([self.seen[:, 1:], np.ones((rows, 1), dtype=bool)], axis=1)
        self.seen[fresh, :-1] = False
        return {**self.frames, "seen": self.seen}
