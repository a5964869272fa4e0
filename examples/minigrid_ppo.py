"""Discrete PPO: a clone that half knows its way through MiniGrid, improved by practice on a LoRA adapter.

    python examples/minigrid_ppo.py                                    # a few minutes on one core

The agent sees 7 x 7 cells as symbols (147 numbers). It is cloned from a few episodes of a shortest-path walker, baked into
the base, and PPO trains LoRA on trunk and head with MiniGrid's own reward, which is larger the sooner the goal is reached.
Clone and result are evaluated on the same fresh seeds, greedily, and compared by the exact McNemar test.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmpeft
from mmpeft.policies import DiscreteHead, Memory, MLPTrunk, Policy, as_base, clone, make_env, ppo, rollout
from mmpeft.policies.ppo_loop import PPOResult
from mmpeft.policies.ppo_trial import before_and_after, print_row
from mmpeft.policies.rollout_result import RolloutResult

PLAN = {"trunk.{state,mlp}.**": mmpeft.LoRA(rank=8), "head.**": mmpeft.LoRA(rank=4)}
ACTIONS = 3  # left, right, forward: the others do nothing in an empty room
LEFT, RIGHT, FORWARD = range(ACTIONS)


def walk(env: Any, seed: int) -> tuple[list[Any], list[int]]:
    """States and actions of a walker that knows where the green goal is: it turns to the nearer axis and goes."""
    env.begin(seed)
    sim, states, actions = env.sim.unwrapped, [], []
    for _ in range(60):
        goal = next((i, j) for i in range(sim.width) for j in range(sim.height) if _is_goal(sim.grid.get(i, j)))
        gap = np.array(goal) - np.array(sim.agent_pos)
        want = int(gap[0] < 0) * 2 if gap[0] else 1 + int(gap[1] < 0) * 2  # 0 right, 1 down, 2 left, 3 up
        turn = (want - sim.agent_dir) % 4
        action = FORWARD if turn == 0 else LEFT if turn == 3 else RIGHT
        states.append(env.observe()["state"])
        actions.append(action)
        if env.advance(action)[1]:
            break
    return states, actions


def _is_goal(cell: Any) -> bool:
    return cell is not None and cell.type == "goal"


def weak_clone(name: str, options: dict[str, Any], *, episodes: int, steps: int, seed: int) -> Policy:
    """A policy whose base was cloned from a few walks in a few steps."""
    env = make_env(name, **options)
    walks = [walk(env, s) for s in range(episodes)]
    states = torch.from_numpy(np.concatenate([np.stack(s) for s, _ in walks]))
    actions = torch.tensor([a for _, each in walks for a in each])
    torch.manual_seed(seed)
    policy = Policy(
        trunk=MLPTrunk(width=64, side=64), head=DiscreteHead(), action_dim=int(env.action_space.n), state_dim=147, chunk=1,
        states="identity",
    )  # fmt: skip
    policy.fit(actions, states, environment=env.describe())
    mmpeft.attach(policy, {"trunk": "full", "head": "full"}, "clone")
    batch = {"state": states[:, None], "action": actions[:, None], "action_mask": torch.ones(len(actions), 1) > 0}
    clone(policy, Memory(batch), steps=steps, batch_size=64, seed=seed)
    return as_base(policy)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="MiniGrid-Empty-Random-6x6-v0")
    parser.add_argument("--walks", type=int, default=4)
    parser.add_argument("--clone-steps", type=int, default=60)
    parser.add_argument("--total-steps", type=int, default=40_000)
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--episodes", type=int, default=100, help="of the evaluation, seeds 70000 and on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/ppo")
    parser.add_argument("--output", help="JSON of the result; the curve lies beside it")
    given = parser.parse_args(argv)
    began, name = time.perf_counter(), f"gym:minigrid:{given.level}"
    options: dict[str, Any] = {"views": (), "state": "image", "success": "reward > 0", "max_steps": given.max_steps}
    policy = weak_clone(name, options, episodes=given.walks, steps=given.clone_steps, seed=given.seed)

    def evaluate() -> RolloutResult:
        return rollout(policy, env=name, seeds=range(70_000, 70_000 + given.episodes), options=options, num_envs=1)

    def practise() -> PPOResult:
        return ppo(
            policy, env=name, options=options, plan=PLAN, total_steps=given.total_steps, num_envs=16, decisions=64,
            epochs=4, minibatches=8, lr=1e-3, entropy=0.01, value_warmup=1, seed=given.seed,
            folder=Path(given.folder) / given.level, report=print_row,
        )  # fmt: skip

    return before_and_after(evaluate, practise, arguments=vars(given), began=began, output=given.output)


if __name__ == "__main__":
    main()
