"""Batches of an epoch: each sample once over all ranks, equal steps a rank, bucketed by length, the same each time."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.data.sampler import batches_per_epoch, epoch_batches
from mmpeft.errors import ConfigError


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 300),
    batch=st.integers(1, 40),
    world=st.integers(1, 5),
    shuffle=st.booleans(),
    bucket=st.booleans(),
)
def test_every_sample_once_over_the_ranks(size, batch, world, shuffle, bucket):
    if size < world:
        with pytest.raises(ConfigError, match="cannot feed"):
            epoch_batches(size, batch, shuffle=shuffle, world=world)
        return
    lengths = [(7 * i) % 31 for i in range(size)] if bucket else None
    ranks = [epoch_batches(size, batch, shuffle=shuffle, lengths=lengths, rank=r, world=world) for r in range(world)]
    assert sorted(itertools.chain(*itertools.chain(*ranks))) == list(range(size))
    assert {len(r) for r in ranks} == {batches_per_epoch(size, batch, world=world)}
    sizes = [len(b) for r in ranks for b in r]
    assert min(sizes) >= 1 and max(sizes) <= max(batch, 2)  # 2: one sample a rank did not divide
    whole = [sum(len(b) for b in step) for step in zip(*ranks, strict=True)]
    assert max(whole) - min(whole) <= 1


def test_number_of_steps_is_the_usual_one():
    assert [batches_per_epoch(100, b) for b in (1, 32, 33, 100, 1000)] == [100, 4, 4, 1, 1]
    assert batches_per_epoch(103, 8, world=4) == 4
    assert [len(b) for b in epoch_batches(100, 32, shuffle=False)] == [25] * 4


def test_order_depends_on_seed_and_epoch_only():
    def run(**options):
        return epoch_batches(57, 8, shuffle=True, **options)

    assert run(seed=1, epoch=2) == run(seed=1, epoch=2)
    assert run(seed=1, epoch=2) != run(seed=1, epoch=3) != run(seed=2, epoch=3)
    assert epoch_batches(9, 4, shuffle=False, epoch=5) == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]


def test_buckets_pad_little_and_stay_random():
    import random

    rng = random.Random(0)
    lengths = [rng.randint(5, 500) for _ in range(5000)]

    def padded(batches):
        return sum(max(lengths[i] for i in b) * len(b) for b in batches) / sum(lengths)

    bucketed = epoch_batches(5000, 32, shuffle=True, lengths=lengths)
    plain = epoch_batches(5000, 32, shuffle=True)
    assert padded(plain) > 1.8 and padded(bucketed) < 1.08
    means = [sum(lengths[i] for i in b) / len(b) for b in bucketed]
    rising = sum(a < b for a, b in itertools.pairwise(means)) / (len(means) - 1)
    assert 0.35 < rising < 0.65  # the batches come in no order of length
    first = [set(epoch_batches(5000, 32, shuffle=True, lengths=lengths, epoch=e)[0]) for e in (0, 1)]
    assert first[0] != first[1]


def test_ranks_of_a_step_have_like_lengths():
    lengths = list(range(400))
    ranks = [epoch_batches(400, 10, shuffle=True, lengths=lengths, rank=r, world=2) for r in range(2)]
    for a, b in zip(*ranks, strict=True):
        assert abs(sum(a) / len(a) - sum(b) / len(b)) < 5


def test_bad_batch_size():
    with pytest.raises(ConfigError, match="batch_size"):
        epoch_batches(5, 0, shuffle=False)
