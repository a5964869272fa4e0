"""Scripted experts: what demonstrations are recorded from, and the ceiling that a cloned policy is compared with.

    expert = make_expert("metaworld:push-v3")
    expert.reset(env);  action = expert.act(env)
    rollout(ExpertPolicy(), env="metaworld:push-v3", seeds=range(20))

An expert sees the simulator itself, not pictures. Metaworld ships one a task (mean success .985), BabyAI a planner
that solves every level.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmpeft.errors import NameNotFound, Unsupported, nearest, require
from mmpeft.policies.envs import split_name
from mmpeft.policies.envs.sentences import SENTENCES


class Expert(Protocol):
    """Acts on the environment's inside."""

    def reset(self, env: Any) -> None:
        """Begin an episode of `env`, which was just reset."""

    def act(self, env: Any) -> Any:
        """The action for the present moment, within the action space."""


class MetaworldExpert:
    """Metaworld's own script of a task, clipped to the action space."""

    def __init__(self, task: str) -> None:
        if task not in SENTENCES:
            raise NameNotFound(f"Metaworld has no task {task!r}{nearest(task, SENTENCES)}")
        policies = require("metaworld.policies", "robot")
        self.script: Any = policies.ENV_POLICY_MAP[task]()

    def reset(self, env: Any) -> None:
        """Nothing: the scripts keep no memory."""

    def act(self, env: Any) -> NDArray[np.float32]:
        return self.from_state(env.full)

    def from_state(self, full: NDArray[np.float64]) -> NDArray[np.float32]:
        """The action for the 39 numbers of `full_state`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the scripts ask for more than the action space has and say so each time
            action: NDArray[np.float32] = np.clip(self.script.get_action(full), -1, 1).astype(np.float32)
        return action


class BabyAIExpert:
    """BabyAI's planner, which replans when the environment does something else than it asked for."""

    def __init__(self, task: str) -> None:
        del task  # one planner for all levels
        self.module = require("minigrid.utils.baby_ai_bot", "robot")
        self.bot: Any = None

    def reset(self, env: Any) -> None:
        self.bot = self.module.BabyAIBot(env.sim.unwrapped)

    def act(self, env: Any) -> int:
        return int(self.bot.replan(env.last_action))


EXPERTS: dict[str, Callable[[str], Expert]] = {"metaworld": MetaworldExpert, "babyai": BabyAIExpert}


def make_expert(env: str) -> Expert:
    """The scripted expert of an environment.

    Raises:
        NameNotFound: unknown family or task. Unsupported: the family ships no expert.
    """
    family, task = split_name(env)
    if family not in EXPERTS:
        raise Unsupported(f"{env} ships no expert; demonstrations can be recorded from {', '.join(EXPERTS)}")
    return EXPERTS[family](task)


class ExpertPolicy:
    """Metaworld's scripts as a policy for `rollout`: one row a slot, any mixture of tasks, chunks of one action."""

    reads = ("full_state",)

    def __init__(self) -> None:
        self._by_task: dict[str, MetaworldExpert] = {}

    def act(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        """[B, 1, 4] from `full_state` [B, 39] and `task` [B].

        Raises:
            Unsupported: a task of another family (its expert needs the simulator itself).
        """
        actions = []
        for name, full in zip(observation["task"], observation["full_state"], strict=True):
            if name not in self._by_task:
                family, task = split_name(str(name))
                if family != "metaworld":
                    raise Unsupported(f"ExpertPolicy plays metaworld tasks, got {name}")
                self._by_task[name] = MetaworldExpert(task)
            actions.append(self._by_task[name].from_state(full))
        return np.stack(actions)[:, None]
