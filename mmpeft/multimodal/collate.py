"""Samples to a batch of tensors: padded on the right, padded on the left for generation, or packed.

A `Batch` is a plain dict, so Lightning, pin_memory and workers move it as they are. Choices made here:

- What the loss needs is found here, on the host, where labels are known: which hidden states predict a supervised token
  (`target_positions`), and which tokens. The model never searches for them on the accelerator.
- Media of a modality form one flat batch over all samples, `[sum of images, ...]`. Only media that cannot share a tensor
  (another size, cached beside raw) form another group. Where each of their tokens goes is fixed here as well.
- Right-padded rows need no mask in a causal model: nothing valid looks to the right. Left-padded rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from mmpeft.errors import ConfigError, nearest
from mmpeft.multimodal.packing import pack
from mmpeft.multimodal.sample import IGNORE, MODALITIES, MediaItem, Sample


class MediaGroup(TypedDict):
    """n media of one modality that share a tensor."""

    x: Tensor  # [n, 3, H, W] pixels, [n, T] waveforms, or with `encoded` tokens [n, T, d_v]
    mask: Tensor | None  # [n, T] bool for waveforms and tokens of unequal length
    encoded: bool  # x is what the connector reads; no encoder runs
    positions: Tensor  # [sum of counts] int64: where their LLM tokens go in the batch flattened to [B * T]
    counts: list[int]  # [n] LLM tokens of each
    samples: list[int]  # [n] the sample each belongs to


class Batch(TypedDict):
    """B rows of T tokens from S samples (S = B unless packed), N supervised tokens."""

    input_ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, not shifted, IGNORE where not supervised
    attention_mask: Tensor  # [B, T] bool, False on padding
    position_ids: Tensor  # [B, T] int64, from 0 in every document
    document_ids: Tensor  # [B, T] int64: 1, 2, ... within a row, 0 on padding
    modality_ids: Tensor  # [B, T] uint8: 0 text, i + 1 MODALITIES[i]
    target_positions: Tensor  # [N] int64 into [B * T]: the states that predict a supervised token
    target_ids: Tensor  # [N] int64: that token
    target_samples: Tensor  # [N] int64: its sample
    media: dict[str, list[MediaGroup]]
    layout: str  # "right", "left" or "packed"
    sample_ids: list[str]  # [S]


PADDINGS = ("right", "left")


def collate(
    samples: Sequence[Sample],
    *,
    padding: str = "right",
    row_length: int | None = None,
    max_media: int | None = None,
) -> Batch:
    """Samples to a Batch.

    Args:
        padding: "right" for training, "left" for generation.
        row_length: pack the samples into rows of this many tokens instead (see packing.py); every row is padded to it,
            so that shapes stay the same from batch to batch.
        max_media: with row_length, the most media a row may hold.

    Raises:
        ConfigError: no samples, an unknown padding, or left padding together with packing.
        BadSample: a sample that does not fit a packed row.
    """
    if not samples:
        raise ConfigError("a batch needs at least one sample")
    if padding not in PADDINGS:
        raise ConfigError(f"unknown padding {padding!r}; valid: {', '.join(PADDINGS)}{nearest(padding, PADDINGS)}")
    if row_length is None:
        rows, length = [[i] for i in range(len(samples))], max(len(s) for s in samples)
    elif padding == "left":
        raise ConfigError("packed rows are padded on the right: generation takes samples one a row")
    else:
        media_counts = [len(s.media) for s in samples]
        names = [s.id for s in samples]
        rows = pack([len(s) for s in samples], row_length, media=media_counts, max_media=max_media, names=names)
        length = row_length

    shape = len(rows), length
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    document_ids = torch.zeros(shape, dtype=torch.int64)
    modality_ids = torch.zeros(shape, dtype=torch.uint8)
    offsets = [0] * len(samples)  # where each sample begins in [B * T]
    targets: list[tuple[Tensor, Tensor, Tensor]] = []
    for row, members in enumerate(rows):
        at = length - len(samples[members[0]]) if padding == "left" else 0
        for document, i in enumerate(members, start=1):
            sample = samples[i]
            span = slice(at, at + len(sample))
            input_ids[row, span], labels[row, span] = sample.input_ids, sample.labels
            modality_ids[row, span], document_ids[row, span] = sample.modality_ids, document
            position_ids[row, span] = torch.arange(len(sample))
            offsets[i] = row * length + at
            where = (sample.labels[1:] != IGNORE).nonzero().squeeze(1)
            targets.append((where + offsets[i], sample.labels[1:][where], torch.full_like(where, i)))
            at += len(sample)
        if padding == "right" and at < length:  # the padding is a document of its own, whose positions restart too
            position_ids[row, at:] = torch.arange(length - at)
    positions, ids, owners = (torch.cat(parts) for parts in zip(*targets, strict=True))
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=document_ids > 0,
        position_ids=position_ids,
        document_ids=document_ids,
        modality_ids=modality_ids,
        target_positions=positions,
        target_ids=ids,
        target_samples=owners,
        media=_media(samples, offsets),
        layout="packed" if row_length is not None else padding,
        sample_ids=[s.id for s in samples],
    )


def _media(samples: Sequence[Sample], offsets: Sequence[int]) -> dict[str, list[MediaGroup]]:
    """Group the media of all samples by what can share a tensor, in the order of samples and placeholders."""
    groups: dict[str, dict[tuple[Any, ...], list[tuple[MediaItem, int, Tensor]]]] = {}
    for i, (sample, offset) in enumerate(zip(samples, offsets, strict=True)):
        for number, modality in enumerate(MODALITIES, start=1):
            items = [item for item in sample.media if item.modality == modality]
            placeholders = (sample.modality_ids == number).nonzero().squeeze(1) + offset
            for item, positions in zip(items, torch.split(placeholders, [item.count for item in items]), strict=True):
                key = (item.encoded, item.x.dtype, _shape_key(item))
                groups.setdefault(modality, {}).setdefault(key, []).append((item, i, positions))
    return {m: [_group(members) for members in keyed.values()] for m, keyed in groups.items()}


def _shape_key(item: MediaItem) -> tuple[int, ...]:
    """The part of a medium's shape that must agree within a group; time axes are padded instead."""
    return tuple(item.x.shape[1:]) if item.encoded or item.modality == "audio" else tuple(item.x.shape)


def _group(members: Sequence[tuple[MediaItem, int, Tensor]]) -> MediaGroup:
    tensors = [item.x for item, _, _ in members]
    lengths = torch.tensor([x.shape[0] for x in tensors])
    padded = bool((lengths != lengths[0]).any())
    return MediaGroup(
        x=torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True) if padded else torch.stack(tensors),
        mask=torch.arange(int(lengths.max())) < lengths[:, None] if padded else None,
        encoded=members[0][0].encoded,
        positions=torch.cat([positions for _, _, positions in members]),
        counts=[item.count for item, _, _ in members],
        samples=[i for _, i, _ in members],
    )
