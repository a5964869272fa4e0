"""Continual learning: skills learned one after another, and what is left of the earlier ones.

    found = learn_continually(policy, {"reach": memory, "push": other}, plan={"{trunk,head}.**": mmpeft.LoRA(rank=8)},
                              strategy="ewc", evaluate=lambda policy, task: rollout(policy, env=..., ...).success, steps=1000)
    found.matrix, found.summary()                       # success after each task on each task; forgetting, transfer, ...

The strategies differ in which adapters a task trains, which act, and what is added to its loss:

    sequential   one adapter, trained on: the floor
    ewc          the same, held to earlier values where earlier tasks' Fisher information is large
                 (Kirkpatrick et al. 2017, arXiv 1612.00796)
    replay       the same, a share of each batch out of a buffer of earlier samples (experience replay)
    olora        an adapter a task over the frozen earlier ones, in orthogonal input subspaces; all of them act
                 (O-LoRA, Wang et al. 2023, arXiv 2310.14152)
    isolated     an adapter a task, and only it acts: nothing can be forgotten, nothing is shared, and the task must be
                 named at test time

The base is frozen in all of them. Normalisation belongs to the policy (`policy.fit` before the first task): statistics that
change with each task would be forgetting of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmpeft.adapters.plan import Plan, PlanLike, resolve
from mmpeft.adapters.state import find_state
from mmpeft.adapters.switch import adapter_parameters
from mmpeft.errors import ConfigError, NameNotFound, nearest
from mmpeft.policies.cloning import clone
from mmpeft.policies.continual_strategies import STRATEGIES, OLoRA, Sequential
from mmpeft.policies.memory import Memory
from mmpeft.policies.policy import Policy


@dataclass
class ContinualResult:
    """How it went.

    Attributes:
        tasks: T names in the order of learning. before: [T] scores of the base.
        matrix: [T, T], row i the scores on every task after tasks 0 .. i were learned.
        trained, kept: numbers in adapters, and stored beside them (buffers, Fisher information), after the last task.
    """

    tasks: list[str]
    before: NDArray[np.float64]
    matrix: NDArray[np.float64]
    trained: int
    kept: int

    def summary(self) -> dict[str, float]:
        """See `mmpeft.metrics.continual`."""
        from mmpeft.metrics.continual import summary

        return summary(self.matrix, self.before)


def learn_continually(
    policy: Policy, tasks: Mapping[str, Memory], *, plan: PlanLike, evaluate: Callable[[Policy, str], float],
    strategy: str | Sequential = "isolated", steps: int = 1000, batch_size: int = 256, lr: float = 1e-3,
    weight_decay: float = 0.0, seed: int = 0, report: Callable[[str, Sequence[float]], Any] | None = None,
) -> ContinualResult:  # fmt: skip
    """Learn the tasks in their order, and score all of them before the first and after each.

    Args:
        policy: fitted; its base is what it can before. Adapters are attached to it.
        tasks: name -> samples, at least two. plan: of every adapter.
        evaluate: (policy, task) -> score; higher is better. It acts with the strategy's adapters for that task.
        strategy: a name of `STRATEGIES`, or one with its own numbers, fresh.
        steps, batch_size, lr, weight_decay, seed: see `clone`.
        report: called with each learned task and its row of scores.

    Raises:
        NameNotFound: an unknown strategy. ConfigError: fewer than two tasks, a used strategy, names that adapters already
            have, O-LoRA with a plan that has no LoRA.
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise NameNotFound(
                f"no strategy {strategy!r}{nearest(strategy, STRATEGIES)}; there are {', '.join(STRATEGIES)}"
            )
        strategy = STRATEGIES[strategy]()
    if len(tasks) < 2 or strategy.learned:
        raise ConfigError(
            f"give at least two tasks and a fresh strategy; given {list(tasks)}, {strategy.learned} learned"
        )
    plan, names = Plan.read(plan), [*tasks, strategy.name]
    known = find_state(policy)
    taken = [n for n in names if known is not None and n in known.entries]
    if taken or strategy.name in tasks:
        raise ConfigError(f"the names {taken or [strategy.name]} are taken; detach those adapters or rename the tasks")
    if isinstance(strategy, OLoRA) and not any(hasattr(t.method, "rank") for t in resolve(policy, plan)):
        raise ConfigError("O-LoRA keeps the subspaces of low-rank adapters apart; the plan has none")
    policy.current()

    def scores() -> list[float]:
        found = []
        for task in tasks:
            with strategy.acting(policy, task) if find_state(policy) is not None else nullcontext():
                found.append(float(evaluate(policy, task)))
        return found

    before, rows = scores(), []
    for number, (task, memory) in enumerate(tasks.items()):
        strategy.begin(policy, plan, task)
        clone(
            policy, memory, steps=steps, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed + number,
            replay=strategy.buffer(), replay_share=getattr(strategy, "share", 0.5), penalty=strategy.penalty(policy, task),
        )  # fmt: skip
        strategy.end(policy, task, memory)
        rows.append(scores())
        if report is not None:
            report(task, rows[-1])
    trained = sum(p.numel() for n in names for p in _parameters(policy, n))
    return ContinualResult(list(tasks), np.array(before), np.array(rows), trained, strategy.kept())


def _parameters(policy: Policy, name: str) -> list[Tensor]:
    state = find_state(policy)
    return [p for _, p in adapter_parameters(policy, name)] if state is not None and name in state.entries else []
