"""Behaviour cloning from memory: small demonstrations, a plain loop, and room for what continual learning adds.

    memory = Memory.of(Demonstrations("demos/push", chunk=4), policy)
    mmpeft.attach(policy, {"trunk": "full", "head": "full"}, "push")
    losses = clone(policy, memory, steps=1500)

Thousands of steps of states or cached maps fit in memory, and a step of the loop is then a few milliseconds: a trainer
around it would cost more than the training. `mmpeft.tasks.ControlTask` is the same loss with loaders, precision,
checkpoints and several devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from mmpeft.adapters import detach, parameter_groups
from mmpeft.errors import ConfigError
from mmpeft.policies.policy import Policy
from mmpeft.policies.samples import PolicyProcessor, PolicySamples


@dataclass
class Memory:
    """Samples as one batch of `Policy.forward`: tensors and lists with a leading axis of their number."""

    batch: dict[str, Any]

    def __post_init__(self) -> None:
        sizes = {k: len(v) for k, v in self.batch.items()}
        if len(set(sizes.values())) != 1 or not min(sizes.values()):
            raise ConfigError(f"a memory holds as many of each, and at least one; given {sizes}")

    @classmethod
    def of(cls, demonstrations: Any, policy: Policy) -> Self:
        """Every step of demonstrations, checked as `ControlData` checks it; pictures are kept as bytes."""
        samples = PolicySamples(demonstrations, policy)
        states = policy.current().states if policy.state_dim else None
        actions = policy.current().actions
        processor = PolicyProcessor(
            action_dim=policy.action_dim if actions is None else actions.dim, state_dim=states.dim if states else 0,
            chunk=policy.chunk, discrete=policy.head.discrete,
        )  # fmt: skip
        batch = processor.collate([processor.encode(samples[i], train=False) for i in range(len(samples))])
        return cls({k: v for k, v in batch.items() if k != "ids"})

    @classmethod
    def joined(cls, parts: Sequence[Memory]) -> Self:
        """One after another."""
        keys = parts[0].batch if parts else {}
        return cls({k: join([p.batch[k] for p in parts]) for k in keys})

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def take(self, index: Tensor) -> Self:
        """The samples at `index`."""
        return type(self)({k: take(v, index) for k, v in self.batch.items()})

    def sample(self, count: int, generator: torch.Generator) -> Self:
        """`count` of them at random; all, if there are not more."""
        return self.take(torch.randperm(len(self), generator=generator)[:count])


def clone(
    policy: Policy, memory: Memory, *, steps: int, adapter: str | None = None, batch_size: int = 256, lr: float = 1e-3,
    weight_decay: float = 1e-4, seed: int = 0, replay: Memory | None = None, replay_share: float = 0.5,
    penalty: Callable[[], Tensor] | None = None,
) -> list[float]:  # fmt: skip
    """Train what is trainable of the active adapters on `memory`; the loss of each step.

    Args:
        adapter: whose parameters; None: everything trainable. lr falls to 0 along a cosine.
        replay: a memory of earlier tasks, of which each batch holds a share of `replay_share`.
        penalty: a scalar that is added to the loss.

    Raises:
        ConfigError: numbers out of range, nothing trainable, or a loss that is not finite (the weights keep the last
            finite step).
    """
    if min(steps, batch_size) < 1 or not lr > 0 or not 0 < replay_share < 1:
        raise ConfigError(
            f"steps and batch_size are at least 1, lr is above 0, replay_share within (0, 1); given {steps}, "
            f"{batch_size}, {lr}, {replay_share}"
        )
    generator = torch.Generator().manual_seed(seed)
    groups = parameter_groups(policy, lr=lr, weight_decay=weight_decay, name=adapter)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    old = 0 if replay is None else max(1, min(batch_size - 1, round(replay_share * batch_size)))
    losses = []
    for step in range(steps):
        part = memory.take(torch.randint(len(memory), (batch_size - old,), generator=generator))
        if replay is not None:
            part = Memory.joined([part, replay.take(torch.randint(len(replay), (old,), generator=generator))])
        loss = policy(part.batch)
        total = loss if penalty is None else loss + penalty()
        if not bool(torch.isfinite(total)):
            raise ConfigError(f"the loss is {float(total.detach())} at step {step}; take a smaller lr than {lr}")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def as_base(policy: Policy) -> Policy:
    """Write the active adapters into the base, which is then the clone: what later adapters are trained over, and what
    `mmpeft.use(policy, None)` gives. Its normalisation stays; an adapter saved over it is loaded over it.

    Raises:
        ConfigError: no adapter. Unsupported: adapters that change calls, which no weight can hold.
    """
    skill = policy.current()
    detach(policy, bake=True)
    policy.skill = skill
    return policy


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
