"""One frozen base, an adapter folder a task: several tasks in one batch of environments, each row under its adapter.

    policy = ByTask(["runs/coffee/adapter", "runs/push/adapter"])
    rollout(policy, env=["metaworld:coffee-pull-v3", "metaworld:push-v3"], seeds=range(50_000, 50_050))

Which adapter a row needs is told by its task, which each folder says it was trained for. To tell it by what the robot
is told instead, see `Skills`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpeft.adapters import read_metadata, use
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest
from mmpeft.policies.envs.base import check_trained_for
from mmpeft.policies.policy import KEY, Policy, load_policy


class ByTask:
    """Several adapters of one policy with the interface of one.

    Args:
        folders: saved policy adapters, each of another task.

    Attributes:
        policy: the base with every adapter. adapters: task -> name of its adapter.

    Raises:
        ConfigError: no folder, or two of one task. FileFormatError: a folder that does not say its task.
        BaseMismatch: adapters of different robots, cameras or bases.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        if not folders:
            raise ConfigError("no adapter folder given")
        self.adapters: dict[str, str] = {}
        self.environment: dict[str, Any] = {}
        policy: Policy | None = None
        for number, folder in enumerate(folders):
            where = read_metadata(folder).get(KEY, {}).get("environment") or {}
            if "name" not in where:
                raise FileFormatError(f"{str(folder)!r} does not say which task it was trained for")
            if where["name"] in self.adapters:
                raise ConfigError(f"two of the folders were trained for {where['name']}; give one adapter a task")
            self.adapters[where["name"]] = name = f"task{number}"
            self.policy = policy = load_policy(folder, policy, name=name)
            self.environment = self.environment or dict(where)
            check_trained_for(self.environment, where, needs=policy.reads)
        self.reads, self.execute, self.chunk = self.policy.reads, self.policy.execute, self.policy.chunk

    def reset(self, num_envs: int | None = None, *, seed: int = 0) -> None:
        """As `Policy.reset`."""
        self.policy.reset(num_envs, seed=seed)

    def check(self, tasks: Sequence[str]) -> None:
        """Raises NameNotFound: a task that no adapter is for."""
        for task in tasks:
            if task not in self.adapters:
                known = ", ".join(self.adapters)
                raise NameNotFound(f"no adapter is for {task!r}{nearest(task, self.adapters)}; there are {known}")

    def act(self, observation: Mapping[str, Any]) -> Any:
        """As `Policy.act`; `task` [B] names each row's. The frozen beginning of the encoder runs once for all rows."""
        tasks = [str(t) for t in observation["task"]]
        self.check(tasks)
        return self.policy.act(observation, adapters=[self.adapters[t] for t in tasks])

    def only(self, task: str) -> Any:
        """`with policy.only(task): ...` is `mmpeft.use` of that task's adapter."""
        self.check([task])
        return use(self.policy, self.adapters[task])
