"""One batch of environments, each row under an adapter of its own: the base's frozen part runs once for all of them.

Trunk and head of an adapter are its own weights, so they run a group at a time; the expensive part, the frozen prefix
of the encoder, is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmpeft.adapters import use
from mmpeft.adapters.state import state_of
from mmpeft.errors import ConfigError

if TYPE_CHECKING:
    from mmpeft.policies.policy import Policy


def predict_by_row(
    policy: Policy, observation: Mapping[str, Any], adapters: Sequence[str], generator: torch.Generator | None
) -> Tensor:
    """Actions [B, chunk, A], row i under `adapters[i]`, equal to what that adapter alone would give for the row.

    Raises:
        ConfigError: not one adapter a row, or adapters of robots with different action sizes.
        NameNotFound: an adapter that the policy does not have.
    """
    state_of(policy).check_names(list(adapters))
    with use(policy, adapters[0]):
        batch = policy.observe(observation)
    rows = next(len(v) for v in batch.values())
    if len(adapters) != rows:
        raise ConfigError(f"expected {rows} adapters, one a row, given {len(adapters)}")
    if "images" in batch and getattr(policy.encoder, "split", None) is not None:
        images = batch.pop("images")
        start = policy.encoder.prefix(policy.encoder.pixels(images.flatten(0, 2)))
        batch["prefix"] = start.unflatten(0, tuple(images.shape[:3]))
    out: list[Tensor | None] = [None] * rows
    for name in dict.fromkeys(adapters):
        index = [i for i, a in enumerate(adapters) if a == name]
        part = {k: v[index] if isinstance(v, Tensor) else [v[i] for i in index] for k, v in batch.items()}
        with use(policy, name):
            actions = policy.predict(part, generator=generator)
        for i, row in zip(index, actions, strict=True):
            out[i] = row
    found = [r for r in out if r is not None]
    if len({tuple(r.shape) for r in found}) != 1:
        names = ", ".join(dict.fromkeys(adapters))
        raise ConfigError(f"adapters {names} have actions of different sizes; act for each alone")
    return torch.stack(found)
