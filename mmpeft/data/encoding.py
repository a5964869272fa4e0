"""What a loader's worker does: read a sample, encode it with the task's processor, and say by name if it is bad.

A bad sample is a missing or corrupt file, a malformed conversation, one with nothing supervised, or one that is longer
than allowed. It is refused, or skipped and reported with the batch; nothing is ever cut short. Any other error is a
fault of the program or the settings and goes through, with the sample's name added.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from torch.utils.data._utils.pin_memory import pin_memory as pin

from mmpeft.data.processor import Processor
from mmpeft.errors import BadSample

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
            with seeded(self.seed, epoch, index):
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


class seeded:
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
