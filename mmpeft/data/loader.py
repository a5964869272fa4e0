"""A resumable batch loader around torch's `DataLoader`: encodes and collates in workers, skips or refuses bad samples.

Lightning checkpoints a loader that has `state_dict` and `load_state_dict`; the state here is the epoch and the number
of batches taken. What else a resumed run needs to be bit-equal is handled in place:

- the batches come from `sampler.epoch_batches`, a pure function of seed and epoch;
- augmentation is seeded per (seed, epoch, sample), whatever the number of workers;
- when training, torch's generator is seeded before each batch from (seed, epoch, position, rank), so dropout repeats on
  every rank although the checkpoint is written by one; torch's DataLoader is given a generator of its own,
  since it would draw a number from the global one each time it starts.

It is no `DataLoader` subclass and has no `sampler`: Lightning then leaves it alone, where it would put in a
`DistributedSampler`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from mmpeft.data.encoding import EncodedDataset, OnBad, mix
from mmpeft.data.processor import Processor
from mmpeft.data.sampler import batches_per_epoch, epoch_batches
from mmpeft.data.samples import length_hint
from mmpeft.errors import BadSample, ConfigError

log = logging.getLogger(__name__)


class _Keys:
    """The batch sampler torch sees: (epoch, index) pairs of the batches still to come."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class Progress:
    """The epoch and the batches taken of it; Lightning looks for `set_epoch` at `loader.batch_sampler.sampler`.

    It knows nothing of the loader: in a reference cycle, torch's persistent workers take 5 s each to shut down.
    """

    def __init__(self) -> None:
        self.epoch = self.position = self.start = 0

    @property
    def sampler(self) -> Progress:
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the head of `epoch`, unless a restored state is somewhere in it."""
        if epoch != self.epoch:
            self.epoch, self.position, self.start = epoch, 0, 0


class _Workers(_MultiProcessingDataLoaderIter):
    """Torch's workers, whose death while they are shut down loses nothing: every batch that was wanted is there.

    Seen on a GPU: forked workers aborted on their way out, and the exception ended a training that was complete.
    """

    def _shutdown_workers(self) -> None:
        try:
            super()._shutdown_workers()
        except RuntimeError as error:  # of torch's handler for dead children; its `finally` has cleaned up by now
            log.warning("a worker process died while it was shut down: %s", error)


class _Torch(DataLoader[Any]):
    """A DataLoader with such workers."""

    def _get_iterator(self) -> _BaseDataLoaderIter:
        return super()._get_iterator() if self.num_workers == 0 else _Workers(self)


class Loader:
    """Batches of one split, for one rank. `len` is the number of batches of a whole epoch.

    Args:
        dataset: map-style, of samples that `processor` can encode.
        train: labels are wanted, and torch is reseeded before each batch.
        shuffle: another order each epoch.
        bucket: batch samples of like length (`dataset.length_hint(i)` where it has one).
        workers: processes that read and encode; 0 is this one.

    Attributes:
        batch_sampler: the epoch and the position in it.
        bad: sample -> reason, for every sample skipped so far (`on_bad="skip"`).
    """

    def __init__(
        self,
        dataset: Any,
        processor: Processor,
        *,
        batch_size: int,
        train: bool,
        shuffle: bool = False,
        bucket: bool = False,
        seed: int = 0,
        on_bad: OnBad = "refuse",
        max_length: int | None = None,
        workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.dataset, self.train, self.shuffle, self.seed = dataset, train, shuffle, seed
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.bad: dict[str, str] = {}
        self.lengths = _lengths(dataset) if bucket else None
        self._plan(0)  # refuses a bad size before training starts
        encoded = EncodedDataset(dataset, processor, train=train, on_bad=on_bad, max_length=max_length, seed=seed)
        self._keys = _Keys()
        self._torch = _Torch(
            encoded,
            batch_sampler=self._keys,
            collate_fn=encoded.collate,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(mix(seed, rank)),
        )
        self.batch_sampler = Progress()

    def __len__(self) -> int:
        return batches_per_epoch(len(self.dataset), self.batch_size, world=self.world)

    def __iter__(self) -> Iterator[Any]:
        # a generator: nothing happens before the first `next`, by which time Lightning has told the epoch
        at = self.batch_sampler
        epoch, at.position, at.start = at.epoch, at.start, 0
        self._keys.batches = [[(epoch, i) for i in batch] for batch in self._plan(epoch)[at.position :]]
        for loaded in self._torch:
            self._report(loaded.bad)
            at.position += 1  # before the yield: a checkpoint after this batch counts it
            if loaded.batch is None:
                continue
            if self.train:
                torch.manual_seed(mix(self.seed, epoch, at.position, self.rank))
            yield loaded.batch
        if self.train and at.epoch == epoch:  # without Lightning, the next `for` is the next epoch
            at.set_epoch(epoch + 1)

    def single(self, index: int) -> Any:
        """Sample `index` of the dataset as a batch of its own, read here and now, as epoch 0 has it. A bad one that is
        skipped gives way to the next good one in training, and is None otherwise. What has been taken of the epoch stays
        as it is."""
        encoded: Any = self._torch.dataset
        loaded = encoded.collate(encoded.__getitems__([(0, index)]))
        self._report(loaded.bad)
        return loaded.batch

    @property
    def _iterator(self) -> Any:
        """Torch's running iterator: Lightning shuts its workers down through this name."""
        return self._torch._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._torch._iterator = value

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches taken, and what gives them their meaning."""
        at = self.batch_sampler
        done = at.position >= len(self)
        state = {"epoch": at.epoch + 1, "position": 0} if done else {"epoch": at.epoch, "position": at.position}
        return {**state, **self._meaning()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a run stopped.

        Raises:
            ConfigError: in the middle of an epoch, with another dataset size, batch size, seed or number of ranks.
        """
        changed = {k: (state[k], now) for k, now in self._meaning().items() if state[k] != now}
        if changed and state["position"]:
            words = ", ".join(f"{k} was {was} and is {now}" for k, (was, now) in changed.items())
            raise ConfigError(
                f"cannot resume in the middle of epoch {state['epoch']}: {words}. "
                "Restore the setting, or resume from a checkpoint made at the end of an epoch"
            )
        at = self.batch_sampler
        at.epoch, at.position, at.start = state["epoch"], state["position"], state["position"]

    def _meaning(self) -> dict[str, int]:
        return {"size": len(self.dataset), "batch_size": self.batch_size, "seed": self.seed, "world": self.world}

    def _plan(self, epoch: int) -> list[list[int]]:
        return epoch_batches(
            len(self.dataset),
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            epoch=epoch,
            lengths=self.lengths,
            rank=self.rank,
            world=self.world,
        )

    def _report(self, bad: list[tuple[str, str]]) -> None:
        for name, reason in bad:
            if name not in self.bad:
                self.bad[name] = reason
                log.warning("skipped bad sample %d: %s", len(self.bad), reason)


def _lengths(dataset: Any) -> list[int]:
    """Estimated lengths; a sample that cannot be read counts 0 and is dealt with when its turn comes."""
    if isinstance(dataset, Subset):
        whole = _hint_of(dataset.dataset)
        return [_guarded(whole, index) for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [length for part in dataset.datasets for length in _lengths(part)]
    hint = _hint_of(dataset)
    return [_guarded(hint, index) for index in range(len(dataset))]


def _hint_of(dataset: Any) -> Callable[[int], int]:
    """The data set's own estimate, which opens no media, or one from its samples."""
    own: Callable[[int], int] | None = getattr(dataset, "length_hint", None)
    return own if own is not None else lambda index: length_hint(dataset[index])


def _guarded(hint: Callable[[int], int], index: int) -> int:
    try:
        return hint(index)
    except (BadSample, OSError):
        return 0
