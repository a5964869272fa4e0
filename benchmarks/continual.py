"""Skills learned one after another: what each strategy keeps, on state-based Metaworld tasks.

    python benchmarks/continual.py --output benchmarks/results/continual_metaworld.json      # ten minutes on one core

A base is cloned on two tasks, frozen, and three more are learned in turn with LoRA on trunk and head by behaviour cloning.
After each, every task is played on fixed seeds. The task is told by its instruction, which a frozen random table turns
into a vector (no language model: nothing is read off the words), so that one adapter could hold all tasks; isolated
adapters are chosen by the task's name. Tasks, rate and the strength of EWC were chosen after one
run in which tasks were not learned at all (EWC of strength 1000 among the reasons); nothing else was tuned.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmpeft
from mmpeft.data.demos import Demonstrations
from mmpeft.policies import GaussianHead, Memory, MLPTrunk, Policy, as_base, clone, collect, make_env, rollout
from mmpeft.policies.continual import learn_continually
from mmpeft.policies.continual_strategies import EWC, STRATEGIES
from mmpeft.policies.parts import Part

BASE = ("door-open-v3", "push-v3")
TASKS = ("button-press-v3", "window-close-v3", "drawer-open-v3")
OPTIONS: dict[str, Any] = {"state": "full", "max_steps": 200}
PLAN = {"trunk.{state,text,mlp}.**": mmpeft.LoRA(rank=16), "head.**": mmpeft.LoRA(rank=8)}


class SentenceTable(Part):
    """A frozen random vector for each sentence."""

    def __init__(self, *, dim: int = 32) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, sentences: list[str]) -> Tensor:
        seeds = [int.from_bytes(hashlib.sha256(s.encode()).digest()[:4], "big") for s in sentences]
        known = {s: torch.randn(self.dim, generator=torch.Generator().manual_seed(s)) for s in set(seeds)}
        return torch.stack([known[s] for s in seeds])


def make_policy(data: dict[str, Demonstrations], steps: int, seed: int) -> Policy:
    """A policy whose base was cloned on the base tasks; statistics are of all tasks, known beforehand."""
    torch.manual_seed(seed)
    policy = Policy(
        trunk=MLPTrunk(width=256, side=128), head=GaussianHead(min_std=0.1), instruction=SentenceTable(), action_dim=4,
        state_dim=39, chunk=8, execute=8,
    )  # fmt: skip
    env = make_env(f"metaworld:{BASE[0]}", views=(), **OPTIONS)
    stacked = [torch.cat([d.stacked(key) for d in data.values()]) for key in ("action", "state")]
    policy.fit(*stacked, chunks=torch.zeros(1, 8, 4), environment=env.describe())
    mmpeft.attach(policy, {"trunk": "full", "head": "full"}, "base")
    clone(policy, Memory.joined([Memory.of(data[t], policy) for t in BASE]), steps=steps, seed=seed)
    return as_base(policy)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", type=int, default=15)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--episodes", type=int, default=20, help="a task and evaluation, seeds 60000 and on")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--ewc-strength", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="runs/continual")
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--output")
    given = parser.parse_args(argv)
    began, data = time.perf_counter(), dict[str, Demonstrations]()
    for task in (*BASE, *TASKS):
        folder = Path(given.folder) / task
        collect(f"metaworld:{task}", folder=folder, episodes=given.demos, options=OPTIONS, check=False)
        data[task] = Demonstrations(folder, chunk=8, episodes=given.demos)

    def evaluate(policy: Policy, task: str) -> float:
        seeds = range(60_000, 60_000 + given.episodes)
        options = {**OPTIONS, "views": ()}
        return rollout(policy, env=f"metaworld:{task}", seeds=seeds, options=options, num_envs=1).success

    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"), "device": f"CPU, 1 thread, {platform.machine()}",
        "torch": torch.__version__, "base": BASE, "tasks": TASKS, "arguments": vars(given), "strategies": {},
    }  # fmt: skip
    base = make_policy(data, given.steps, given.seed)
    before_base = [evaluate(base, t) for t in BASE]
    for name in given.strategies:
        policy, start = copy.deepcopy(base), time.perf_counter()
        strategy = EWC(strength=given.ewc_strength) if name == "ewc" else STRATEGIES[name]()
        found = learn_continually(
            policy, {t: Memory.of(data[t], policy) for t in TASKS}, plan=PLAN, strategy=strategy, evaluate=evaluate,
            steps=given.steps, lr=given.lr, seed=given.seed,
        )  # fmt: skip
        with strategy.acting(policy, BASE[0]):  # of isolated adapters none is the base task's
            after_base = [evaluate(policy, t) for t in BASE]
        row = {
            "matrix": found.matrix.tolist(), "before": found.before.tolist(), **found.summary(), "base": before_base,
            "base_after": after_base, "trained": found.trained, "kept": found.kept,
            "seconds": round(time.perf_counter() - start),
        }  # fmt: skip
        result["strategies"][name] = row
        said = " ".join(f"{k} {v:.3f}" for k, v in found.summary().items())
        print(f"{name:<11}{said}  base {np.mean(before_base):.2f} -> {np.mean(after_base):.2f}\n{found.matrix}", flush=True)
        result["seconds"] = round(time.perf_counter() - began)
        if given.output:
            Path(given.output).parent.mkdir(parents=True, exist_ok=True)
            Path(given.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
