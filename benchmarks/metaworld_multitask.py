"""One policy, told in words what to do, for the 24 Metaworld tasks that cannot be done blind.

    python -m benchmarks.metaworld_multitask              # 50 demonstrations a task, plain camera, three training seeds
    python -m benchmarks.metaworld_multitask --only s1 --budget 240    # what fits into four minutes of training
    python -m benchmarks.metaworld_multitask --table

Arms: `conv` (adapters in the vision tower), `frozen`, `blind`; and of `conv` once more with the instructions of the tasks
shuffled at evaluation, which says whether the words are read at all. Held-out seeds, held-out wordings of the instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.metaworld_program import program
from benchmarks.metaworld_rows import (
    RESULTS,
    RUNS,
    WHOLE,
    Row,
    env_of,
    evaluate,
    make_policy,
    paired,
    plans,
    pooled,
    scores,
    simulators,
    sizes,
    train,
)  # fmt: skip
from mmpeft.policies.envs.sentences import VISION_TASKS, sentence

OUT = RESULTS / "metaworld_multitask.jsonl"
CLONES = ("conv", "frozen", "blind")


def rows() -> list[Row]:
    return [
        Row(
            f"24/{arm}/s{seed}", VISION_TASKS, arm, seed=seed, taps="mid", view="corner2", size=128, steps=24_000, batch=256,
            width=1024, episodes=20, max_steps=400, copies=8,
        )
        for seed in (1, 2, 3) for arm in CLONES
    ]  # fmt: skip


def clone(row: Row) -> dict[str, Any]:
    """Train one policy on all tasks; play each with a held-out wording, and the seeing one with another task's words."""
    from mmpeft.policies import save_policy

    policy = make_policy(row)
    training = train(row, policy, WHOLE | plans(row.taps)[row.arm], cached=False)
    save_policy(policy, RUNS / "adapters" / row.name.replace("/", "_"))
    found = scores(evaluate(row, policy, instruction="heldout")) | training | sizes(policy)
    return found | ({"shuffled": shuffled(row, policy)} if row.arm == "conv" else {})


class Misled:
    """A policy that hears `words[task]` whatever it is told."""

    def __init__(self, policy: Any, words: Mapping[str, str]) -> None:
        self.policy, self.words, self.chunk, self.execute = policy, words, policy.chunk, policy.execute

    def reset(self, *given: Any, **options: Any) -> None:
        self.policy.reset(*given, **options)

    def act(self, observation: Mapping[str, Any]) -> Any:
        # a slot that has not begun has no task yet
        return self.policy.act({**observation, "instruction": [self.words.get(t, "") for t in observation["task"]]})


def shuffled(row: Row, policy: Any) -> list[int]:
    """Successes and episodes when each task is told the next task's sentence."""
    from mmpeft.policies import rollout

    others = (*row.tasks[1:], row.tasks[0])
    words = {env_of(task): sentence(other, "canonical", 0) for task, other in zip(row.tasks, others, strict=True)}
    seeds = range(row.first, row.first + max(1, row.episodes // 4))
    options = {**row.look, "max_steps": row.max_steps}
    found = rollout(Misled(policy, words), env=list(words), seeds=seeds, options=options, **simulators())
    return [found.successes, len(found.episodes)]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: pooled success of each arm, the paired test of `conv` against the others, success by task."""
    of = {arm: [x for x in lines if x["arm"] == arm] for arm in CLONES}
    out = ["| arm | success, all tasks and training seeds | by training seed | conv against it |", "|---|---|---|---|"]
    for arm, found in of.items():
        a, b, p = paired(of["conv"], found) if arm != "conv" else (0, 0, 1.0)
        test = f"{a}:{b} p={p:.2g}" if arm != "conv" else ""
        by_seed = ", ".join(f"{x['success']:.2f}" for x in found)
        out.append(f"| {arm} | {pooled(found)} | {by_seed} | {test} |")
    wrong = [x["shuffled"] for x in of["conv"] if "shuffled" in x]
    if wrong:
        out.append(f"| conv, another task's words | {sum(w for w, _ in wrong)}/{sum(n for _, n in wrong)} | | |")
    out += ["", "| task | " + " | ".join(CLONES) + " |", "|---" * (len(CLONES) + 1) + "|"]
    for task in VISION_TASKS:
        counts = [[x["by_task"].get(env_of(task), [0, 0]) for x in of[arm]] for arm in CLONES]
        said = [f"{sum(w for w, _ in c)}/{sum(n for _, n in c)}" for c in counts]
        out.append(f"| {task} | " + " | ".join(said) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    program(__doc__, rows(), OUT, work=clone, table=table)
