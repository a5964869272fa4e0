"""Packing: several samples in one row, each attending only to itself.

A row is described by `document_ids` [B, T] (1, 2, ... for its samples, 0 for padding) and by positions that restart at 0
with every document. transformers builds the block-diagonal causal mask (or the varlen lengths) from restarting
positions when no attention mask is given, so no [T, T] mask is ever collated. Architectures that ignore this would leak
between documents: the model proves once, on random inputs, that packed equals alone (`MultimodalLM`), and refuses if not.

Rows are chosen best-fit decreasing: the longest sample first, each into the fullest row that still has room for it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from mmpeft.errors import BadSample, ConfigError


def pack(
    lengths: Sequence[int],
    capacity: int,
    *,
    media: Sequence[int] | None = None,
    max_media: int | None = None,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Partition samples into rows of at most `capacity` tokens.

    Args:
        lengths: tokens of each sample.
        capacity: tokens a row holds.
        media, max_media: number of media of each sample, and the most a row may hold (bounds the encoder's batch).
        names: sample names for the error.

    Returns:
        Rows of sample indices; each index once. Inside a row, and among rows by their first sample, in the given order.

    Raises:
        BadSample: a sample longer than a row, or with more media than a row may hold. Samples are never cut.
        ConfigError: a capacity below 1, or `max_media` without `media`.
    """
    if capacity < 1:
        raise ConfigError(f"a row must hold at least 1 token, given {capacity}")
    if max_media is not None and media is None:
        raise ConfigError("max_media needs media, the number of media of each sample")
    counts = media if media is not None else [0] * len(lengths)
    limit = max_media if max_media is not None else sum(counts)
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        if length > capacity or count > limit:
            name = names[i] if names is not None else f"sample {i}"
            raise BadSample(
                f"{name}: {length} tokens and {count} media, a row holds {capacity} tokens and {limit} media"
            )

    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted: bisect finds the fullest row with enough room
    held: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, (lengths[i], -1))
        while at < len(rooms) and held[rooms[at][1]] + counts[i] > limit:
            at += 1
        if at == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
            held.append(0)
        else:
            room, row = rooms.pop(at)
        rows[row].append(i)
        held[row] += counts[i]
        bisect.insort(rooms, (room - lengths[i], row))
    return sorted(sorted(row) for row in rows)
