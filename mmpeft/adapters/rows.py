"""Rows of a batch: taking them apart and putting them together again, for calls whose adapters differ by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmpeft.adapters.state import Active, State
from mmpeft.errors import ConfigError


class only_rows:
    """Within it, the batch consists of some rows of the active set's batch."""

    def __init__(self, state: State, active: Active) -> None:
        self.state, self.before, self.active = state, state.override, active

    def __enter__(self) -> None:
        self.state.override = self.active

    def __exit__(self, *_: object) -> None:
        self.state.override = self.before


def take_rows(value: Any, index: list[int], batch: int) -> Any:
    """The rows `index` of every tensor whose first axis is the batch; other values as they are."""
    if isinstance(value, Tensor):
        return value[index] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {k: take_rows(v, index, batch) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(take_rows(v, index, batch) for v in value)
    return value


def split_rows(value: Any, n: int) -> list[Any]:
    """A call's output as one value per row."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == n:
        return list(value)
    if isinstance(value, tuple):
        columns = [split_rows(v, n) if v is not None else [None] * n for v in value]
        return [tuple(c[i] for c in columns) for i in range(n)]
    raise ConfigError(f"rows= needs calls that return tensors with the batch of {n} first; got {type(value).__name__}")


def join_rows(rows: list[Any]) -> Any:
    """Undo `split_rows`."""
    first = rows[0]
    if isinstance(first, tuple):
        return tuple(join_rows([r[i] for r in rows]) for i in range(len(first)))
    return None if first is None else torch.stack(rows)
