"""The vector environment of a rollout: Gymnasium's, with workers that may die.

Workers come from a fork server, a process that has imported the simulator but never drawn anything: a worker forked
from a process that has drawn hangs at its first picture, and one that starts from nothing pays the imports again. A
worker that is killed, or does
not answer in time, is told apart from one that raises: the first is replaced, the second's error is the user's to see.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from mmpeft.errors import MmpeftError
from mmpeft.policies.envs import worker_context
from mmpeft.policies.rollout_slot import EpisodeList, Record, Slot

#: what a dead or silent worker shows itself by
_DEAD = (EOFError, ConnectionError, BrokenPipeError, multiprocessing.TimeoutError)


class WorkerDied(MmpeftError, RuntimeError):
    """A simulator process was killed, crashed or hung; `slots` says which."""

    def __init__(self, message: str, slots: list[int]) -> None:
        super().__init__(message)
        self.slots = slots


def _worker_slot(plan: EpisodeList, options: dict[str, Any], kwargs: dict[str, Any]) -> Slot:
    # each worker is one core's worth of drawing; software OpenGL would start a thread a core in every one of them
    os.environ.setdefault("LP_NUM_THREADS", "1")
    return Slot(plan, options=options, **kwargs)


class Workers:
    """`num_envs` slots, each in a process of its own (or all in this one).

    Args:
        plan, options, kwargs: of `Slot`. asynchronous: worker processes. timeout: seconds a step or reset may take.
    """

    def __init__(
        self,
        plan: EpisodeList,
        options: dict[str, Any],
        kwargs: dict[str, Any],
        *,
        num_envs: int,
        asynchronous: bool,
        timeout: float,
    ) -> None:
        self.num_envs, self.timeout = num_envs, timeout
        firsts = [i % len(plan.envs) for i in range(num_envs)]
        make = [functools.partial(_worker_slot, plan, options, {**kwargs, "first_env": i}) for i in firsts]
        self.vector: Any
        if asynchronous:
            self.vector = self._guard(
                lambda: AsyncVectorEnv(
                    make, context=worker_context().get_start_method(), autoreset_mode=AutoresetMode.DISABLED
                )
            )
        else:
            in_process = [functools.partial(Slot, plan, options=options, **{**kwargs, "first_env": i}) for i in firsts]
            self.vector = SyncVectorEnv(in_process, autoreset_mode=AutoresetMode.DISABLED)

    def describe(self) -> dict[str, Any]:
        """`describe()` of the first slot's environment."""
        found: dict[str, Any] = self._guard(lambda: self.vector.call("describe"))[0]
        return found

    def action_space(self) -> Any:
        """The space of one action, not of a chunk."""
        return self._guard(lambda: self.vector.get_attr("single"))[0]

    def reset(self, numbers: dict[int, int]) -> tuple[dict[str, Any], list[str | None]]:
        """Begin episode `numbers[slot]` in those slots; the batched observation, and the new instructions by slot.

        Raises:
            WorkerDied: a worker is gone or silent.
        """
        mask = np.array([i in numbers for i in range(self.num_envs)])
        seeds = [numbers.get(i) for i in range(self.num_envs)]
        observation, info = self._guard(lambda: self._wait("reset", seed=seeds, options={"reset_mask": mask}))
        told = info.get("instruction", np.full(self.num_envs, None))
        return observation, [str(told[i]) if mask[i] else None for i in range(self.num_envs)]

    def step(self, actions: NDArray[Any]) -> tuple[dict[str, Any], list[Record]]:
        """One chunk in every slot; the observation and the episodes that ended.

        Raises:
            WorkerDied: a worker is gone or silent.
        """
        observation, _, _, _, info = self._guard(lambda: self._wait("step", actions))
        return observation, [r for r in info.get("record", ()) if isinstance(r, Record)]

    def _wait(self, call: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.vector, SyncVectorEnv):
            return getattr(self.vector, call)(*args, **kwargs)
        getattr(self.vector, f"{call}_async")(*args, **kwargs)
        return getattr(self.vector, f"{call}_wait")(timeout=self.timeout)

    def _guard(self, call: Any) -> Any:
        try:
            return call()
        except _DEAD as error:
            processes = getattr(getattr(self, "vector", None), "processes", [])
            for process in processes:
                process.join(timeout=0.2)  # a worker that was just killed may not be reaped yet
            gone = [i for i, p in enumerate(processes) if not p.is_alive()]
            codes = {i: processes[i].exitcode for i in gone}
            said = f"simulator workers {codes} (slot: exit code) died" if gone else f"no answer within {self.timeout} s"
            raise WorkerDied(f"{said} ({type(error).__name__})", gone) from error

    def close(self) -> None:
        """End the workers, the dead and the silent ones too."""
        if isinstance(self.vector, SyncVectorEnv):
            self.vector.close()
            return
        for process in self.vector.processes:
            process.terminate()
        for process in self.vector.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self.vector.parent_pipes:
            if pipe is not None:
                pipe.close()
        self.vector.closed = True  # Gymnasium's own close would talk to the dead
