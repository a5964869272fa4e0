"""Which samples make which batch: shuffled, bucketed by length, shared out over ranks, and the same after a restart.

The batches of an epoch are a pure function of (seed, epoch, size, batch size, world size): there is no sampler state
beyond the epoch and the position in it, so a killed run takes up exactly where it stopped.

Batches are of equal size to within one sample (100 samples at batch size 32 make four of 25, not three of 32 and a rest
of 4); every rank has the same number of batches and no sample comes twice or is left out. That is what evaluation
needs to be exact under DDP, and what keeps ranks from waiting for one another for ever.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from mmpeft.errors import ConfigError

BUCKET_BATCHES = 32  # steps that are sorted together: enough to match lengths, few enough to stay random


def epoch_batches(
    size: int,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    epoch: int = 0,
    lengths: Sequence[int] | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[list[int]]:
    """The batches (lists of sample indices) of one rank in one epoch.

    Args:
        lengths: estimated length of each sample; samples of like length then share a batch (and a step over the ranks),
            and the order of the batches is shuffled again.

    Raises:
        ConfigError: batch_size below 1, or fewer samples than ranks.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    if size < max(world, 1):
        raise ConfigError(f"a dataset of {size} samples cannot feed {world} rank(s): each needs at least one")
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(size))
    if shuffle:
        rng.shuffle(order)
    count = batches_per_epoch(size, batch_size, world=world)
    if lengths is not None:
        order = _sort_in_buckets(order, lengths, bucket=-(-size // count) * BUCKET_BATCHES if shuffle else size)
    cuts = [size * i // count for i in range(count + 1)]
    batches = [order[a:b][rank::world] for a, b in itertools.pairwise(cuts)]
    if shuffle and lengths is not None:
        rng.shuffle(batches)
    return batches


def batches_per_epoch(size: int, batch_size: int, *, world: int = 1) -> int:
    """Steps of an epoch: what keeps a rank's batch within `batch_size`, fewer only if a rank would get no sample."""
    count = -(-size // (batch_size * world))
    while count > 1 and size // count < world:
        count -= 1
    return count


def _sort_in_buckets(order: list[int], lengths: Sequence[int], *, bucket: int) -> list[int]:
    """`order` cut into buckets, each sorted by length (stable, so equal lengths stay shuffled)."""
    parts = (order[i : i + bucket] for i in range(0, len(order), bucket))
    return [index for part in parts for index in sorted(part, key=lengths.__getitem__)]
