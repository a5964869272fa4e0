"""How many numbers an optimizer keeps beside a trained tensor, so that a plan's memory is known before it is trained.

The numbers have the tensor's own dtype (adapters: fp32). Step counts, one scalar a tensor, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

Shape = Sequence[int]


def _copies(n: int) -> Callable[[Shape], int]:
    return lambda shape: n * prod(shape)


def _factored(shape: Shape) -> int:
    """Adafactor: a matrix's second moment is kept as its row and column means."""
    return prod(shape) if len(shape) < 2 else prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


STATES: dict[str, Callable[[Shape], int]] = {
    "adamw": _copies(2),
    "adam": _copies(2),
    "ivon": _copies(2),
    "lion": _copies(1),
    "rmsprop": _copies(1),
    "adagrad": _copies(1),
    "adafactor": _factored,
    "sgd+momentum": _copies(1),
    "sgd": _copies(0),
}
