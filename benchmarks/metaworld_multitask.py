"""One policy, told in words what to do, for the 24 Metaworld tasks that cannot be done blind.

    python -m benchmarks.metaworld_multitask              # 50 demonstrations a task, plain camera, three training seeds
    python -m benchmarks.metaworld_multitask --only s1 --budget 240    # what fits into four minutes of training
    python -m benchmarks.metaworld_multitask --train      # train and save; the same without it then plays what was saved
    python -m benchmarks.metaworld_multitask --table

Arms: `conv` (adapters in the vision tower), `frozen`, `blind`, each with a flow-matching head, a look every four steps and
noise on the words in training; `conv-l1`, plain regression of whole chunks, for what that is worth. Held-out seeds, each
task's first sentence; and of the seeing arms some episodes with held-out wordings, and some with the sentence of another
task, which says whether the words are read at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.metaworld_program import arguments, chosen, finish
from benchmarks.metaworld_rows import (
    RESULTS,
    RUNS,
    Row,
    counts,
    env_of,
    evaluate,
    paired,
    pooled,
    scores,
    simulators,
    trained,
)
from mmpeft.policies.envs.sentences import VISION_TASKS, sentence

OUT = RESULTS / "metaworld_multitask.jsonl"
FLOW: dict[str, Any] = {"head": "flow", "execute": 4, "word_noise": 1}
CLONES: dict[str, dict[str, Any]] = {
    "conv": {"arm": "conv", **FLOW}, "frozen": {"arm": "frozen", **FLOW}, "blind": {"arm": "blind", **FLOW},
    "conv-l1": {"arm": "conv", "head": "l1", "execute": 8},
}  # fmt: skip


def rows() -> list[Row]:
    return [
        Row(
            f"24/{name}/s{seed}", VISION_TASKS, seed=seed, taps="mid", view="corner2", size=128, steps=24_000, batch=256,
            width=1024, episodes=20, max_steps=500, copies=8, **given,
        )
        for seed in (1, 2, 3) for name, given in CLONES.items()
    ]  # fmt: skip


def clone(row: Row) -> dict[str, Any]:
    """Train one policy on all tasks, or take up the one that was; play each task with its first sentence, and where it
    sees, a quarter as often with a held-out wording and with another task's sentence."""
    policy, training = trained(row)
    policy.execute = row.execute
    found = scores(evaluate(row, policy, instruction="canonical")) | training
    if row.arm != "blind":
        few = dataclasses.replace(row, episodes=max(1, row.episodes // 4))
        found["heldout"] = counts(evaluate(few, policy, instruction="heldout"))
        found["shuffled"] = counts(shuffled(few, policy))
    return found


def only_train(row: Row) -> dict[str, Any]:
    """Train and save."""
    return trained(row)[1]


class Misled:
    """A policy that hears `words[task]` whatever it is told."""

    def __init__(self, policy: Any, words: Mapping[str, str]) -> None:
        self.policy, self.words, self.chunk, self.execute = policy, words, policy.chunk, policy.execute

    def reset(self, *given: Any, **options: Any) -> None:
        self.policy.reset(*given, **options)

    def act(self, observation: Mapping[str, Any]) -> Any:
        # a slot that has not begun has no task yet
        return self.policy.act({**observation, "instruction": [self.words.get(t, "") for t in observation["task"]]})


def shuffled(row: Row, policy: Any) -> Any:
    """`RolloutResult` when each task is told the next task's sentence."""
    from mmpeft.policies import rollout

    others = (*row.tasks[1:], row.tasks[0])
    words = {env_of(task): sentence(other, "canonical", 0) for task, other in zip(row.tasks, others, strict=True)}
    seeds = range(row.first, row.first + row.episodes)
    options = {**row.look, "max_steps": row.max_steps}
    return rollout(Misled(policy, words), env=list(words), seeds=seeds, options=options, **simulators())


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: pooled success of each arm, the paired test of `conv` against the others, success by task."""
    of = {name: [x for x in lines if x["name"].split("/")[1] == name] for name in CLONES}
    out = ["| arm | success, all tasks and training seeds | by training seed | conv against it |", "|---|---|---|---|"]
    for arm, found in of.items():
        a, b, p = paired(of["conv"], found) if arm != "conv" else (0, 0, 1.0)
        test = f"{a}:{b} p={p:.2g}" if arm != "conv" else ""
        by_seed = ", ".join(f"{x['success']:.2f}" for x in found)
        out.append(f"| {arm} | {pooled(found)} | {by_seed} | {test} |")
    for key, said in (("heldout", "held-out wording"), ("shuffled", "another task's sentence")):
        for name, found in of.items():
            given = [x[key] for x in found if key in x]
            if given:
                out.append(f"| {name}, {said} | {sum(w for w, _ in given)}/{sum(n for _, n in given)} | | |")
    out += ["", "| task | " + " | ".join(CLONES) + " |", "|---" * (len(CLONES) + 1) + "|"]
    for task in VISION_TASKS:
        counts = [[x["by_task"].get(env_of(task), [0, 0]) for x in of[arm]] for arm in CLONES]
        said = [f"{sum(w for w, _ in c)}/{sum(n for _, n in c)}" for c in counts]
        out.append(f"| {task} | " + " | ".join(said) + " |")
    return "\n".join(out)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--train", action="store_true", help="only train and save the policies")
    given = parser.parse_args()
    if given.train:
        finish(chosen(rows(), given), given, RUNS / "trained.jsonl", work=only_train, table=lambda lines: "")
    else:
        finish(chosen(rows(), given), given, given.out or OUT, work=clone, table=table)


if __name__ == "__main__":
    main()
