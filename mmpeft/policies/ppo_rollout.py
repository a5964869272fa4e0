"""Experience for reinforcement learning: environments that take chunks, vectors in any autoreset mode, and advantages.

    vector = Vector(make_vector("metaworld:push-v3", num_envs=8, execute=4, gamma=0.99))
    observation = vector.reset(seed=0)
    moment = vector.step(actions)                        # actions [N, execute, A]
    advantage = gae(reward, value, next_value, terminated, ended, discount, lam=0.95)

Choices made here:

- One decision is a chunk of `execute` actions: its reward is their discounted sum, and what comes after is discounted
  by gamma to the number of actions that were really carried out (a semi-Markov decision process). With execute=1 it is
  the usual step.
- Gymnasium's vectors begin the next episode in one of three ways, and the transition at the seam differs in each.
  `Vector` gives one account of all three: the true successor of an ended episode, and whether a transition was one.
- An episode that ends because time is up (`truncated`) is worth what its last state is worth; one that ends for good
  (`terminated`) is worth nothing more. Both stop the sum of advantages.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from mmpeft.errors import ConfigError, nearest
from mmpeft.policies.envs import make_env, split_name, worker_context

Array = NDArray[Any]
Reward = Literal["env", "success"]


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    discount: Tensor,
    *,
    lam: float,
) -> Tensor:
    """Generalised advantage estimates [T, N] (Schulman et al. 2016, arXiv 1506.02438).

    Args:
        reward, value: [T, N], of each decision and of the state it was made in.
        next_value: [T, N], of the state that followed, of the last state of its episode where one ended.
        terminated: [T, N] bool, nothing follows. ended: [T, N] bool, terminated or truncated.
        discount: [T, N], gamma to the number of actions of the decision. lam: lambda, a decision.
    """
    delta = reward + discount * next_value * ~terminated - value
    advantage, running = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        running = delta[t] + discount[t] * lam * ~ended[t] * running
        advantage[t] = running
    return advantage


class Decisions(gym.Env[dict[str, Any], Any]):
    """An environment of `make_env` whose step carries out a chunk of actions; the instruction is told by `info`.

    Args:
        name, options: of `make_env`. execute: actions a step. gamma: discount of an action, within the chunk too.
        reward: "env" gives the environment's own; "success" gives 1 with the first success, which ends the episode.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self, name: str, *, options: Mapping[str, Any] | None = None, execute: int = 1, gamma: float = 0.99,
        reward: Reward = "env",
    ) -> None:  # fmt: skip
        if reward not in get_args(Reward):
            raise ConfigError(f"reward is 'env' or 'success', given {reward!r}{nearest(str(reward), get_args(Reward))}")
        if execute < 1 or not 0 <= gamma <= 1:
            raise ConfigError(f"execute is at least 1 and gamma from 0 to 1, given {execute} and {gamma}")
        self.env, self.execute, self.gamma, self.reward = make_env(name, **dict(options or {})), execute, gamma, reward
        whole = self.env.observation_space
        assert isinstance(whole, gym.spaces.Dict)
        told = {k: s for k, s in whole.spaces.items() if not isinstance(s, gym.spaces.Text)}
        self.observation_space = gym.spaces.Dict(told)
        self.action_space = batch_space(self.env.action_space, execute)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        observation, _ = self.env.reset(seed=seed)
        return observation, {"instruction": str(observation.pop("instruction"))}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        total, steps, success = 0.0, 0, False
        for one in action:
            reward, terminated, truncated, info = self.env.advance(one)
            success = success or bool(info["success"])
            if self.reward == "success":
                reward, terminated = float(success), success or terminated
            total += self.gamma**steps * reward
            steps += 1
            if terminated or truncated:
                break
        observation = self.env.observe()
        del observation["instruction"]
        return observation, total, terminated, truncated and not terminated, {"steps": steps, "success": success}

    def describe(self) -> dict[str, Any]:
        """As of the environment."""
        return self.env.describe()

    def close(self) -> None:
        self.env.close()


def make_vector(
    env: str | Sequence[str], *, num_envs: int, asynchronous: bool = False, **options: Any
) -> SyncVectorEnv | AsyncVectorEnv:
    """`num_envs` slots of `Decisions` (its options are `options`), dealt out over the named environments in turn."""
    names = [env] if isinstance(env, str) else list(env)
    for name in names:
        split_name(name)
    if num_envs < max(1, len(names)):
        raise ConfigError(f"num_envs must be at least 1 and at least the {len(names)} environments, given {num_envs}")
    make = [functools.partial(Decisions, names[i % len(names)], **options) for i in range(num_envs)]
    if asynchronous:
        start = worker_context().get_start_method()
        return AsyncVectorEnv(make, context=start, autoreset_mode=AutoresetMode.DISABLED)
    return SyncVectorEnv(make, autoreset_mode=AutoresetMode.DISABLED)


@dataclass
class Moment:
    """What one step of a vector of N environments was.

    Attributes:
        observation: to decide upon next. successor: the true next observation of every row: where an episode ended,
            its last. first: [N] rows of `observation` that begin an episode.
        reward, terminated, truncated, steps, success: [N] of the decision (success NaN where nothing tells it).
        valid: [N] False where the step only began the next episode and the action was ignored.
    """

    observation: dict[str, Any]
    successor: dict[str, Any]
    first: Array
    reward: Array
    terminated: Array
    truncated: Array
    valid: Array
    steps: Array
    success: Array


class Vector:
    """A Gymnasium vector environment in any autoreset mode, with one account of what happened.

    Args:
        env: observations are a dict with the keys of `mmpeft.policies` or a Box, which is the state; the instruction is
            in the observation, or in `info` when an episode begins.

    Attributes:
        execute: actions of a chunk that one step takes, from the action space: [k, A] and k numbers are k, [A] and one
            number are 1.

    Raises:
        ConfigError: no vector environment, or actions that are neither a Box nor discrete.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env, VectorEnv):
            raise ConfigError(f"expected a name or a gymnasium.vector.VectorEnv, given a {type(env).__name__}")
        space = env.single_action_space
        box = isinstance(space, gym.spaces.Box) and len(space.shape) in (1, 2)
        if not box and not isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
            raise ConfigError(f"actions are a Box [A] or [k, A], or discrete; this vector has {space}")
        self.env, self.num_envs, self.discrete = env, env.num_envs, not box
        self.chunked = len(space.shape or ()) == (2 if box else 1)
        self.execute = int(space.shape[0]) if self.chunked and space.shape else 1
        self.single = space
        self.mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        if not isinstance(self.mode, AutoresetMode):
            raise ConfigError(
                f"unknown autoreset mode {self.mode!r}; known: {', '.join(m.name for m in AutoresetMode)}"
            )
        self.waiting = np.zeros(self.num_envs, bool)  # NEXT_STEP: rows whose next step begins an episode
        self.told = np.full(self.num_envs, "", object)

    def reset(self, seed: int) -> dict[str, Any]:
        """Begin an episode in every row, of seeds seed, seed + 1, ..."""
        seeds: Any = [(seed + i) % 2**31 for i in range(self.num_envs)]  # Gymnasium's annotation knows one number only
        observation, info = self.env.reset(seed=seeds)
        self.waiting = np.zeros(self.num_envs, bool)
        return self._observation(observation, info)

    def step(self, actions: Array) -> Moment:
        """One decision a row: actions [N, execute, A], of discrete ones [N, execute]."""
        given = actions if self.chunked else actions[:, 0]
        if not self.discrete:
            box: Any = self.single
            given = np.clip(given, box.low, box.high).astype(box.dtype)
        observation, reward, terminated, truncated, info = self.env.step(given)
        valid, first = ~self.waiting, self.waiting
        ended = (terminated | truncated) & valid
        found = self._observation(observation, info)
        successor = found
        steps, success = _of(info, "steps", 1.0, self.num_envs), _of(info, "success", np.nan, self.num_envs)
        if self.mode == AutoresetMode.NEXT_STEP:
            self.waiting = ended.copy()
        elif ended.any():
            first = ended
            if self.mode == AutoresetMode.SAME_STEP:
                successor = _replaced(found, {int(i): _row(info["final_obs"], int(i)) for i in np.flatnonzero(ended)})
            else:
                again, info = self.env.reset(options={"reset_mask": ended.copy()})
                found = self._observation(again, info)
        return Moment(
            found, successor, first, np.asarray(reward, np.float64), terminated & valid,
            truncated & ~terminated & valid, valid, steps * valid, success,
        )  # fmt: skip

    def describe(self) -> dict[str, Any] | None:
        """`describe()` of the first environment, if it has one."""
        env: Any = self.env
        try:
            found: dict[str, Any] = env.call("describe")[0]
        except AttributeError:
            return None
        return found

    def close(self) -> None:
        self.env.close()

    def _observation(self, observation: Any, info: Mapping[str, Any]) -> dict[str, Any]:
        found = {k: np.array(v) for k, v in _as_dict(observation).items()}
        if "instruction" in info:
            new = info.get("_instruction", np.ones(self.num_envs, bool))
            self.told = np.where(new, np.asarray(info["instruction"], object), self.told)
        found.setdefault("instruction", self.told.astype(str))
        return found


def _as_dict(observation: Any) -> dict[str, Any]:
    return dict(observation) if isinstance(observation, Mapping) else {"state": observation}


def _row(final: Any, i: int) -> dict[str, Any]:
    """Row i of `final_obs`: a dict of arrays, or an array of observations."""
    if isinstance(final, Mapping):
        return {k: v[i] for k, v in final.items() if not k.startswith("_")}
    return _as_dict(final[i])


def _replaced(batch: Mapping[str, Any], rows: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """A batched observation with some rows replaced."""
    found = {k: np.array(v) for k, v in batch.items()}
    for i, row in rows.items():
        for key, value in row.items():
            found[key][i] = value
    return found


def _of(info: Mapping[str, Any], key: str, default: float, rows: int) -> Array:
    """[N] of a number in a vector's info; of rows that ended and began anew, from their `final_info`."""
    found = np.full(rows, default, np.float64)
    for place, there in ((info, None), (info.get("final_info", {}), info.get("_final_info"))):
        if key in place:
            mask = np.asarray(place.get(f"_{key}", np.ones(rows, bool))) & (True if there is None else there)
            found = np.where(mask, np.asarray(place[key], np.float64), found)
    return found
