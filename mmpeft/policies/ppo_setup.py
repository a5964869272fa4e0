"""What `ppo` refuses before it starts, and the adapter that it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from mmpeft.adapters import attach, trainable, use
from mmpeft.adapters.plan import PlanLike
from mmpeft.adapters.state import find_state
from mmpeft.errors import ConfigError, NameNotFound, nearest
from mmpeft.policies.envs.base import check_trained_for
from mmpeft.policies.policy import Policy, note_skill
from mmpeft.policies.ppo_rollout import Vector


def attach_adapter(
    policy: Policy, plan: PlanLike | None, adapter: str, names: Sequence[str], clone: Sequence[str]
) -> None:
    """The adapter on the policy, with the clone's normalisation, active over `over` and alone trainable."""
    state = find_state(policy)
    known = list(state.entries) if state is not None else []
    for name in (*names[:-1], *clone, *(() if plan is not None else (adapter,))):
        if name not in known:
            hint = "; plan= attaches it" if name == adapter else ""
            raise NameNotFound(f"the policy has no adapter {name!r}{nearest(name, known)}{hint}")
    if state is not None and known:
        with use(policy, list(clone) or None):
            skill = policy.current()
    else:
        skill = policy.current()
    policy.skill = policy.skill or skill
    if plan is not None:
        attach(policy, plan, adapter)
        fitted, policy.skill = policy.skill, skill
        note_skill(policy, adapter)
        policy.skill = fitted
    use(policy, list(names))
    mine = policy.current()
    if (mine.to_dict()["actions"], mine.to_dict()["states"]) != (skill.to_dict()["actions"], skill.to_dict()["states"]):
        raise ConfigError(f"adapter {adapter!r} and its clone have different normalisation: they cannot be compared")
    trainable(policy, [adapter])


def check_actions(policy: Policy, vector: Vector) -> None:
    """Refuse a vector whose actions the policy does not give."""
    skill, space, described = policy.current(), vector.single, vector.describe()
    if skill.environment is not None and described is not None:
        check_trained_for(skill.environment, described, needs=policy.reads)
    if vector.execute > policy.chunk:
        raise ConfigError(f"the vector takes {vector.execute} actions a step, the policy's chunk has {policy.chunk}")
    if vector.discrete != policy.head.discrete:
        raise ConfigError(f"a {type(policy.head).__name__} does not fit actions {space}")
    if skill.actions is None:
        count = int(getattr(space, "n", 0) or np.max(getattr(space, "nvec", 0)))
        if count != policy.action_dim:
            raise ConfigError(f"the policy has {policy.action_dim} actions, the environment {count}")
    elif space.shape is None or space.shape[-1] != skill.actions.dim:
        raise ConfigError(f"the policy has actions of {skill.actions.dim} numbers, the environment {space}")


LEAST = {
    "total_steps": 1, "num_envs": 1, "decisions": 1, "epochs": 1, "minibatches": 1, "checkpoint_every": 1,
    "value_warmup": 0, "seed": 0, "entropy": 0, "kl": 0, "min_std": 0,
}  # fmt: skip
ABOVE_ZERO = ("lr", "value_lr", "clip", "value_clip", "step_kl", "max_grad_norm", "reward_scale")


def check_numbers(o: Mapping[str, Any]) -> None:
    """Refuse numbers of `ppo` out of their range."""
    for name, least in LEAST.items():
        if o[name] < least:
            raise ConfigError(f"{name} must be at least {least}, given {o[name]!r}")
    for name in ABOVE_ZERO:
        if o[name] is not None and not o[name] > 0:
            raise ConfigError(f"{name} must be above 0, given {o[name]!r}")
    for name in ("gamma", "lam"):
        if not 0 <= o[name] <= 1:
            raise ConfigError(f"{name} must be from 0 to 1, given {o[name]!r}")
    if not isinstance(o["env"], VectorEnv) and o["num_envs"] * o["decisions"] < o["minibatches"]:
        decisions = o["num_envs"] * o["decisions"]
        raise ConfigError(f"{decisions} decisions an iteration cannot be split into {o['minibatches']} minibatches")
