"""`mmpeft.use(model, rows=[...])` names one adapter a sample; inside the model, batches are of other things.

An encoder's batch holds images, several a sample or none; generation reorders its prompts and repeats them for beams.
`rows_of` gives each of these its rows for as long as it runs, so that the user only ever speaks of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from mmpeft.adapters.state import find_state
from mmpeft.adapters.switch import use
from mmpeft.errors import ConfigError


@contextmanager
def rows_of(model: nn.Module, samples: Sequence[int]) -> Iterator[None]:
    """Inside, row i of a batch is under the adapter of sample `samples[i]`; nothing changes unless rows are in use.

    Raises:
        ConfigError: fewer rows in use than there are samples.
    """
    state = find_state(model)
    active = None if state is None else state.active
    if active is None or active.rows is None:
        yield
        return
    if max(samples, default=-1) >= len(active.rows):
        raise ConfigError(
            f"use(rows=) names {len(active.rows)} rows, the batch has at least {max(samples) + 1} samples"
        )
    chosen = (active.rows[i] for i in samples)
    with use(model, rows=[None if row < 0 else active.names[row] for row in chosen]):
        yield
