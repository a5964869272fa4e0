"""The strategies of `continual`: which adapters a task trains, which act, and what is added to its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmpeft.adapters import attach, orthogonal_penalty, trainable, use
from mmpeft.adapters.plan import PlanLike
from mmpeft.adapters.selection.criteria import Evidence, criterion
from mmpeft.adapters.switch import adapter_parameters
from mmpeft.errors import ConfigError
from mmpeft.policies.memory import Memory
from mmpeft.policies.policy import Policy, note_skill

# ---- elastic weight consolidation ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anchor:
    """An adapter after a task, by file key: its values, and how much each mattered."""

    value: dict[str, Tensor]
    fisher: dict[str, Tensor]


def anchor(policy: Policy, adapter: str, memory: Memory, *, samples: int = 200, seed: int = 0) -> Anchor:
    """The adapter now, with the diagonal of the empirical Fisher information on `memory`: the mean over samples of the
    squared gradient of one sample's loss, which for heads with a density is minus its log likelihood."""
    parameters = dict(adapter_parameters(policy, adapter))
    evidence = {k: Evidence(p.detach().clone()) for k, p in parameters.items()}
    chosen = memory.sample(samples, torch.Generator().manual_seed(seed))
    for i in range(len(chosen)):
        loss = policy(chosen.take(torch.tensor([i])).batch)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (key, p), grad in zip(parameters.items(), grads, strict=True):
            evidence[key].add(torch.zeros_like(p) if grad is None else grad)
    score = criterion("fisher")
    return Anchor({k: e.value for k, e in evidence.items()}, {k: score(e) for k, e in evidence.items()})


def ewc_penalty(policy: Policy, adapter: str, anchors: Sequence[Anchor], *, strength: float) -> Tensor:
    """strength / 2 sum over anchors and weights of F (w - w*)^2."""
    parameters = dict(adapter_parameters(policy, adapter))
    terms = [(a.fisher[k] * (p - a.value[k]).square()).sum() for a in anchors for k, p in parameters.items()]
    return 0.5 * strength * torch.stack(terms).sum()


# ---- strategies ----------------------------------------------------------------------------------------------------------


@dataclass
class Sequential:
    """One adapter for all tasks. Subclasses say what `begin` trains, what acts, and what joins the loss."""

    name: str = field(default="sequential", init=False)
    learned: list[str] = field(default_factory=list, init=False)

    def begin(self, policy: Policy, plan: PlanLike, task: str) -> None:
        """Attach and activate what the task trains."""
        if not self.learned:
            _attach(policy, plan, self.name)
        use(policy, self.name)
        trainable(policy, self.name)

    def penalty(self, policy: Policy, task: str) -> Callable[[], Tensor] | None:
        return None

    def buffer(self) -> Memory | None:
        """Earlier samples to be mixed in."""
        return None

    def end(self, policy: Policy, task: str, memory: Memory) -> None:
        """Keep what later tasks need."""
        self.learned.append(task)

    def acting(self, policy: Policy, task: str) -> AbstractContextManager[Any]:
        """The adapters that act on a task, which may not be learned yet."""
        return use(policy, self.name if self.learned else None)

    def kept(self) -> int:
        """Numbers stored beside the adapters."""
        return 0


@dataclass
class EWC(Sequential):
    """One adapter, held to what it was.

    Args:
        strength: lambda of `ewc_penalty`. samples: of which the Fisher information is taken.
    """

    strength: float = 1000.0
    samples: int = 200
    anchors: list[Anchor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.name = "ewc"
        _positive(strength=self.strength, samples=self.samples)

    def penalty(self, policy: Policy, task: str) -> Callable[[], Tensor] | None:
        if not self.anchors:
            return None
        return lambda: ewc_penalty(policy, self.name, self.anchors, strength=self.strength)

    def end(self, policy: Policy, task: str, memory: Memory) -> None:
        super().end(policy, task, memory)
        self.anchors.append(anchor(policy, self.name, memory, samples=self.samples))

    def kept(self) -> int:
        return sum(t.numel() for a in self.anchors for part in (a.value, a.fisher) for t in part.values())


@dataclass
class Replay(Sequential):
    """One adapter, and a buffer.

    Args:
        capacity: samples kept of each task. share: of a batch that comes out of the buffer, below 1.
    """

    capacity: int = 200
    share: float = 0.5
    kept_samples: list[Memory] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.name = "replay"
        _positive(capacity=self.capacity, share=self.share)

    def buffer(self) -> Memory | None:
        return Memory.joined(self.kept_samples) if self.kept_samples else None

    def end(self, policy: Policy, task: str, memory: Memory) -> None:
        super().end(policy, task, memory)
        generator = torch.Generator().manual_seed(len(self.learned))
        self.kept_samples.append(memory.sample(self.capacity, generator))

    def kept(self) -> int:
        return sum(v.numel() for m in self.kept_samples for v in m.batch.values() if isinstance(v, Tensor))


@dataclass
class Isolated(Sequential):
    """An adapter of the task's own name; a task that is not learned yet is the base's."""

    def __post_init__(self) -> None:
        self.name = "isolated"

    def begin(self, policy: Policy, plan: PlanLike, task: str) -> None:
        _attach(policy, plan, task)
        trainable(policy, task)

    def acting(self, policy: Policy, task: str) -> AbstractContextManager[Any]:
        return use(policy, task if task in self.learned else None)


@dataclass
class OLoRA(Sequential):
    """An adapter of the task's own name over the earlier ones, which all act.

    Args:
        strength: lambda of `orthogonal_penalty`.
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        self.name = "olora"
        _positive(strength=self.strength)

    def begin(self, policy: Policy, plan: PlanLike, task: str) -> None:
        _attach(policy, plan, task)
        use(policy, [*self.learned, task])
        trainable(policy, task)

    def penalty(self, policy: Policy, task: str) -> Callable[[], Tensor] | None:
        if not self.learned:
            return None
        old = list(self.learned)
        return lambda: self.strength * orthogonal_penalty(policy, task, old)

    def acting(self, policy: Policy, task: str) -> AbstractContextManager[Any]:
        return use(policy, self.learned or None)


STRATEGIES: dict[str, type[Sequential]] = {
    "sequential": Sequential, "ewc": EWC, "replay": Replay, "olora": OLoRA, "isolated": Isolated,
}  # fmt: skip


def _attach(policy: Policy, plan: PlanLike, name: str) -> None:
    attach(policy, plan, name)
    note_skill(policy, name)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name} must be above 0, given {value!r}")
