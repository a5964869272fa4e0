"""Demonstrations as one batch in memory: what fits there needs no loader.

    memory = Memory.of(Demonstrations("demos/push", views=("close",)), policy, copies=8, device="cuda")

A hundred thousand pictures of 128 pixels are 6 GB as bytes, and 2 GB a copy as the half-precision maps that a frozen
encoder's beginning makes of them: a GPU holds either, and a training step then reads its samples where it runs. A frozen
beginning allows no augmentation after the fact, so `copies` of each picture are kept, the first as it is, the others
moved (see `samples`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmpeft.encoders.base import is_frozen
from mmpeft.errors import ConfigError
from mmpeft.policies.policy import Policy
from mmpeft.policies.samples import PolicyProcessor, PolicySamples, augmented_prefix

log = logging.getLogger("mmpeft")


@dataclass
class Memory:
    """Samples as one batch of `Policy.forward`: tensors and lists with a leading axis of their number.

    copies: of each picture in `prefix`, along its second axis [N, copies, T, V, C, h, w]; 0: there is no such axis.
    """

    batch: dict[str, Any]
    copies: int = 0

    def __post_init__(self) -> None:
        sizes = {k: len(v) for k, v in self.batch.items()}
        if len(set(sizes.values())) != 1 or not min(sizes.values()):
            raise ConfigError(f"a memory holds as many of each, and at least one; given {sizes}")

    @classmethod
    def of(
        cls, demonstrations: Any, policy: Policy, *, copies: int = 0, shift: int = 5, seed: int = 0,
        device: torch.device | str | None = None,
    ) -> Self:  # fmt: skip
        """Every step of demonstrations, checked as `ControlData` checks it.

        Args:
            copies: 0 keeps pictures as bytes; else so many of each go through the frozen prefix, of which all but the
                first are moved by up to `shift` pixels, as `seed` draws it.
            device: where the tensors are kept; default the CPU.

        Raises:
            ConfigError: copies of an encoder that is not split or not frozen before its split. BadSample: a step that
                does not fit the policy.
        """
        if copies < 0 or shift < 0:
            raise ConfigError(f"copies and shift are not negative, given {copies} and {shift}")
        sees = "images" in policy.reads
        copies = copies if sees else 0
        if copies:
            policy.encoder.check_prefix()
        samples = PolicySamples(demonstrations, policy, look=not copies)
        states = policy.current().states if policy.state_dim else None
        actions = policy.current().actions
        processor = PolicyProcessor(
            action_dim=policy.action_dim if actions is None else actions.dim, state_dim=states.dim if states else 0,
            chunk=policy.chunk, discrete=policy.head.discrete,
        )  # fmt: skip
        batch = processor.collate([processor.encode(samples[i], train=False) for i in range(len(samples))])
        memory = cls({k: v for k, v in batch.items() if k != "ids"}).to(device or "cpu")
        if copies:
            memory.batch["prefix"] = _prefixes(samples, policy, copies, shift, seed, torch.device(device or "cpu"))
            memory.copies = copies
        return memory

    @classmethod
    def joined(cls, parts: Sequence[Memory]) -> Self:
        """One after another.

        Raises:
            ConfigError: some hold copies of their pictures that others do not.
        """
        if len({p.copies for p in parts}) > 1:
            raise ConfigError(f"memories with different copies cannot be joined: {[p.copies for p in parts]}")
        keys = parts[0].batch if parts else {}
        return cls({k: join([p.batch[k] for p in parts]) for k in keys}, parts[0].copies if parts else 0)

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    @property
    def device(self) -> torch.device:
        """Of the tensors; the CPU if there are none."""
        found = (v.device for v in self.batch.values() if isinstance(v, Tensor))
        return next(found, torch.device("cpu"))

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors there."""
        return type(self)({k: _moved(v, device) for k, v in self.batch.items()}, self.copies)

    def take(self, index: Tensor, copy: Tensor | None = None) -> Self:
        """The samples at `index` [n], with copy `copy` [n] of their pictures, by default the first."""
        found = {k: take(v, index) for k, v in self.batch.items() if k != "prefix" or not self.copies}
        if self.copies:
            found["prefix"] = self.batch["prefix"][index, 0 if copy is None else copy]
        return type(self)(found)

    def sample(self, count: int, generator: torch.Generator) -> Self:
        """`count` of them at random; all, if there are not more."""
        return self.take(torch.randperm(len(self), generator=generator)[:count].to(self.device))


def prepared(memory: Memory, policy: Policy) -> Memory:
    """What a training step needs and no more, on the policy's device: states and actions normalised (`normalised: True` is
    for the caller to say), the mask per number, and the vectors of the sentences where nothing in their encoder trains."""
    device = next(policy.parameters()).device
    batch, skill = dict(memory.to(device).batch), policy.current()
    if "state" in batch:
        assert skill.states is not None
        batch["state"] = skill.states.encode(batch["state"])
    if not policy.head.discrete:
        assert skill.actions is not None
        batch["action_mask"] = batch["action_mask"].unsqueeze(-1) & skill.actions.valid.to(device)
        batch["action"] = skill.actions.encode(batch["action"])
    if "instruction" in batch and policy.instruction is not None and is_frozen(policy.instruction):
        known = sorted(set(batch["instruction"]))
        place = {sentence: i for i, sentence in enumerate(known)}
        codes = torch.tensor([place[s] for s in batch["instruction"]], device=device)
        batch["text"] = policy.instruction(known).to(device)[codes]
        if not policy.trunk.reads_text:
            del batch["instruction"]
    return Memory(batch, memory.copies)


def _prefixes(
    samples: PolicySamples, policy: Policy, copies: int, shift: int, seed: int, device: torch.device
) -> Tensor:
    """[N, copies, T, V, C, h, w] fp16."""
    demonstrations, found, place = samples.demonstrations, None, next(policy.encoder.parameters()).device
    of_episode: dict[int, list[tuple[int, list[int]]]] = {}  # number -> its samples and the steps they look at
    began, reading = time.perf_counter(), 0.0
    for i, (number, step) in enumerate(demonstrations.index):
        of_episode.setdefault(number, []).append((i, samples.steps(step)))
    for number, wanted in of_episode.items():
        opened = time.perf_counter()
        pictures = torch.from_numpy(np.array(demonstrations.pictures(number))).to(place)
        reading += time.perf_counter() - opened
        maps = augmented_prefix(policy.encoder, pictures, copies=copies, shift=shift, seed=seed * 1_000_003 + number)
        if found is None:
            lead = (len(samples), copies, policy.history)
            found = torch.empty(*lead, *maps.shape[2:], dtype=maps.dtype, device=device)
        rows = torch.tensor([i for i, _ in wanted], device=device)
        steps = torch.tensor([s for _, s in wanted], device=maps.device)  # [n, T]
        found[rows] = maps[steps].transpose(1, 2).to(device)
    assert found is not None
    seconds = time.perf_counter() - began
    log.info("%d episodes through the frozen prefix in %.1f s, %.1f of them to read pictures", len(of_episode), seconds, reading)
    return found


def take(value: Any, index: Tensor) -> Any:
    """Rows of a tensor, a list, or a dict of them."""
    if isinstance(value, dict):
        return {k: take(v, index) for k, v in value.items()}
    return value[index] if isinstance(value, Tensor) else [value[i] for i in index.tolist()]


def join(parts: Sequence[Any]) -> Any:
    """Tensors, lists, or dicts of them, one after another."""
    first = parts[0]
    if isinstance(first, dict):
        return {k: join([p[k] for p in parts]) for k in first}
    return torch.cat(list(parts)) if isinstance(first, Tensor) else [x for p in parts for x in p]


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value
