"""A weak clone of a Metaworld task, improved by practice: PPO on a LoRA adapter, the clone frozen beneath it.

    python examples/metaworld_ppo.py                                    # half an hour on one core, no GPU, no pictures
    python examples/metaworld_ppo.py --task pick-place-v3 --max-steps 200 --total-steps 300000

A state policy (the simulator's 39 numbers) is cloned from a few demonstrations of the scripted expert, too few to do the
task reliably, and baked into the base. PPO then trains LoRA on trunk and head with the task's own dense
reward. Both are evaluated greedily on the same fresh seeds and compared by the exact McNemar test. `--output`
holds the numbers, the curve lies beside it as CSV, and `runs/ppo/<task>` is the adapter; run again, it goes on there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import mmpeft
from mmpeft.data.demos import Demonstrations
from mmpeft.policies import GaussianHead, Memory, MLPTrunk, Policy, as_base, clone, collect, make_env, ppo, rollout
from mmpeft.policies.ppo_loop import PPOResult
from mmpeft.policies.ppo_trial import before_and_after, print_row
from mmpeft.policies.rollout_result import RolloutResult

PLAN = {"trunk.{state,mlp}.**": mmpeft.LoRA(rank=16), "head.**": mmpeft.LoRA(rank=4)}


def weak_clone(task: str, folder: Path, *, demos: int, steps: int, options: dict[str, Any], seed: int) -> Policy:
    """A policy whose base was cloned from `demos` demonstrations in `steps` steps."""
    collect(task, folder=folder, episodes=demos, options=options, check=False)
    data = Demonstrations(folder, chunk=4, episodes=demos)
    torch.manual_seed(seed)
    policy = Policy(
        trunk=MLPTrunk(width=256, side=128), head=GaussianHead(min_std=0.05), action_dim=4, state_dim=39, chunk=4,
        execute=4,
    )  # fmt: skip
    policy.fit(
        data.stacked("action"), data.stacked("state"), environment=make_env(task, views=(), **options).describe()
    )
    mmpeft.attach(policy, {"trunk": "full", "head": "full"}, "clone")
    clone(policy, Memory.of(data, policy), steps=steps, seed=seed)
    return as_base(policy)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="reach-v3")
    parser.add_argument("--demos", type=int, default=8)
    parser.add_argument("--clone-steps", type=int, default=400)
    parser.add_argument("--total-steps", type=int, default=150_000, help="actions in all environments together")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--decisions", type=int, default=50, help="of each environment in an iteration")
    parser.add_argument("--execute", type=int, default=2, help="actions of a chunk before the next look, in training")
    parser.add_argument("--max-steps", type=int, default=100, help="of an episode, in training and evaluation")
    parser.add_argument("--min-std", type=float, default=0.5, help="exploration, in standard deviations of the actions")
    parser.add_argument(
        "--reward", default="env", choices=("env", "success"), help="dense, or 1 for success and no more"
    )
    parser.add_argument("--gamma", type=float, default=0.97, help="of an action")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--episodes", type=int, default=100, help="of the evaluation, seeds 70000 and on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/ppo")
    parser.add_argument("--output", help="JSON of the result; the curve lies beside it")
    given = parser.parse_args(argv)
    began, task = time.perf_counter(), f"metaworld:{given.task}"
    options: dict[str, Any] = {"state": "full", "max_steps": given.max_steps}
    folder = Path(given.folder)
    policy = weak_clone(
        task,
        folder / "demos" / given.task,
        demos=given.demos,
        steps=given.clone_steps,
        options=options,
        seed=given.seed,
    )

    def evaluate() -> RolloutResult:
        seeds = range(70_000, 70_000 + given.episodes)
        return rollout(policy, env=task, seeds=seeds, options={**options, "views": ()}, num_envs=1)

    def practise() -> PPOResult:
        return ppo(
            policy, env=task, options=options, plan=PLAN, total_steps=given.total_steps, reward=given.reward,
            reward_scale=0.02 if given.reward == "env" else 1.0, num_envs=given.num_envs, execute=given.execute,
            decisions=given.decisions, gamma=given.gamma, lr=given.lr, epochs=10, minibatches=16, kl=0.01, step_kl=0.05,
            min_std=given.min_std, value_warmup=2, seed=given.seed, folder=folder / given.task, report=print_row,
        )  # fmt: skip

    return before_and_after(evaluate, practise, arguments=vars(given), began=began, output=given.output)


if __name__ == "__main__":
    main()
