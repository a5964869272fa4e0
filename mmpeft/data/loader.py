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

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.pin_memory import pin_memory as pin

from mmpeft.data.processor import Processor
from mmpeft.data.sampler import batches_per_epoch, epoch_batches
from mmpeft.data.samples import length_hint
from mmpeft.errors import BadSample, ConfigError

log = logging.getLogger(__name__)
OnBad = Literal["refuse", "skip"]
_REPLACEMENTS = 64  # samples tried in place of a batch that is wholly bad, before giving up


@dataclass
class Loaded:
    """What a worker sends back: a batch (None if all its samples were bad), and what it skipped, with the reasons."""

    batch: Any
    bad: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> Loaded:
        """Called by torch in its pinning thread."""
        return Loaded(pin(self.batch), self.bad)  # type: ignore[no-untyped-call]


class EncodedDataset(Dataset[Any]):
    """Takes (epoch, index) pairs, a batch at a time, and gives encoded samples; the bad ones are refused or left out.

    Args:
        max_length: longest sample in tokens (`len(input_ids)`); a longer one is bad, never cut.
    """

    def __init__(
        self, dataset: Any, processor: Processor, *, train: bool, on_bad: OnBad, max_length: int | None, seed: int
    ) -> None:
        self.dataset, self.processor, self.train = dataset, processor, train
        self.on_bad, self.max_length, self.seed = on_bad, max_length, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[list[Any], list[tuple[str, str]]]:
        items: list[Any] = []
        bad: list[tuple[str, str]] = []
        for key in keys:
            self._take(key, items, bad)
        if self.train and not items:  # a step without a sample would break the count of steps and hang other ranks
            epoch, last = keys[-1]
            for offset in range(1, min(_REPLACEMENTS, len(self)) + 1):
                self._take((epoch, (last + offset) % len(self)), items, bad)
                if items:
                    break
            else:
                names = "; ".join(reason for _, reason in bad[:3])
                raise BadSample(f"no usable sample among {len(bad)} in a row: {names}")
        return items, bad

    def _take(self, key: tuple[int, int], items: list[Any], bad: list[tuple[str, str]]) -> None:
        epoch, index = key
        try:
            with _seeded(self.seed, epoch, index):
                item = encode_one(self.dataset, index, self.processor, train=self.train, max_length=self.max_length)
                items.append(item)
        except BadSample as error:
            if self.on_bad == "refuse":
                raise BadSample(f"{error} [on_bad='refuse'; on_bad='skip' leaves it out and counts it]") from error
            bad.append((f"{type(self.dataset).__name__}[{index}]", str(error)))

    def collate(self, fetched: tuple[list[Any], list[tuple[str, str]]]) -> Loaded:
        items, bad = fetched
        return Loaded(self.processor.collate(items) if items else None, bad)


def encode_one(dataset: Any, index: int, processor: Processor, *, train: bool, max_length: int | None) -> Any:
    """Sample `index`, read and encoded.

    Raises:
        BadSample: naming the sample: unreadable or missing media, malformed, no supervised token, too long.
    """
    name = f"{type(dataset).__name__}[{index}]"
    try:
        sample = dataset[index]
        name = sample["id"]
        item = processor.encode(sample, train=train)
    except BadSample as error:
        raise error if str(name) in str(error) else BadSample(f"sample {name!r}: {error}") from error
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError on a broken PNG
        raise BadSample(f"sample {name!r}: {type(error).__name__}: {error}") from error
    except Exception as error:
        error.add_note(f"while encoding sample {name!r}")
        raise
    ids, labels = _tensor(item, "input_ids"), _tensor(item, "labels")
    if max_length is not None and ids is not None and ids.shape[-1] > max_length:
        raise BadSample(f"sample {name!r}: too long, {ids.shape[-1]} tokens, max_length is {max_length}")
    if train and labels is not None and labels.ndim and not bool((labels != -100).any()):
        raise BadSample(f"sample {name!r}: no supervised token")
    return item


def _tensor(item: Any, name: str) -> torch.Tensor | None:
    """`name` of an encoded sample (a mapping or an object), or of the first part of a (model sample, note) pair."""
    if isinstance(item, tuple):
        item = item[0]
    value = item.get(name) if isinstance(item, dict) else getattr(item, name, None)
    return torch.as_tensor(value) if isinstance(value, torch.Tensor | list) else None


def mix(*numbers: int) -> int:
    """A 32-bit seed out of several numbers; neighbours give unrelated seeds."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class _seeded:
    """Seeds `random` and torch's CPU generator inside, and puts both back: the main process may be the worker."""

    def __init__(self, *numbers: int) -> None:
        self.seed = mix(*numbers)

    def __enter__(self) -> None:
        self.python, self.torch = random.getstate(), torch.default_generator.get_state()
        random.seed(self.seed)
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        random.setstate(self.python)
        torch.default_generator.set_state(self.torch)


class _Keys:
    """The batch sampler torch sees: (epoch, index) pairs of the batches still to come."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)


class Progress:
    """The epoch and the batches taken of it. Stands where Lightning looks for `set_epoch`: `loader.batch_sampler.sampler`.

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
        self._torch: DataLoader[Any] = DataLoader(
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
    hint = getattr(dataset, "length_hint", None)
    lengths = []
    for index in range(len(dataset)):
        try:
            lengths.append(hint(index) if hint else length_hint(dataset[index]))
        except (BadSample, OSError):
            lengths.append(0)
    return lengths
