"""Adapting the 24-task policy with 10 demonstrations: to another world's looks, and to two tasks it never saw.

    python -m benchmarks.metaworld_multitask --only conv  # first: makes the policy of each training seed
    python -m benchmarks.metaworld_adaptation
    python -m benchmarks.metaworld_adaptation --table

The new is learned by an adapter over the 24-task policy's own, so that "off" is that policy. Four ways: `lora`, `conv` (with
LoRA in the trunk), `full` (the policy's own weights go on training, and the encoder's stages with them), `scratch` (a new
policy from the 10 demonstrations). Each is scored on the new, and on the old 24 tasks with what it learned switched on.
Switched off, an adapter leaves the 24-task policy (each row checks that, bit by bit), whose scores are rows of their own,
`untouched`; full fine-tuning overwrites it, so its old is the one switched on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.metaworld_multitask import FLOW
from benchmarks.metaworld_program import program
from benchmarks.metaworld_rows import (
    BLOCKS,
    RESULTS,
    RUNS,
    Row,
    clone,
    counts,
    evaluate,
    pooled,
    rules,
    scores,
    sizes,
    train,
)  # fmt: skip
from mmpeft.policies.envs.sentences import VISION_TASKS

OUT = RESULTS / "metaworld_adaptation.jsonl"
LOOKS = (("camera", 0.08), ("light", 0.4), ("colour", 0.4), ("seed", 5))  # one other world, all three together
NEW: dict[str, tuple[tuple[str, ...], tuple[tuple[str, float], ...]]] = {
    "shifted": (("push-v3", "pick-place-v3", "coffee-pull-v3", "reach-v3"), LOOKS),
    "sweep-into": (("sweep-into-v3",), ()),
    "dial-turn": (("dial-turn-v3",), ()),
}
ARMS = ("untouched", "lora", "conv", "full", "scratch")
OLD_EPISODES = 5  # a task


def plan_of(arm: str) -> dict[str, Any]:
    """What the new adapter trains; `scratch` starts from nothing and is a policy of its own."""
    import mmpeft

    trunk: dict[str, Any] = {
        "trunk.connector.{project,narrow.*}": mmpeft.LoRA(rank=16, alpha=16), "trunk.mlp.*": mmpeft.LoRA(rank=16, alpha=16),
        "trunk.state": mmpeft.LoRA(rank=4, alpha=4), "trunk.text": mmpeft.LoRA(rank=16, alpha=16),
        "head.denoiser.condition": mmpeft.LoRA(rank=16, alpha=16),
        "head.denoiser.blocks.*.{fc1,fc2,modulate}": mmpeft.LoRA(rank=16, alpha=16),
        "head.denoiser.blocks.*.{attn,cross}.*_proj": mmpeft.LoRA(rank=16, alpha=16),
    }  # fmt: skip
    return {
        "lora": trunk | {f"{BLOCKS}.{{3,4}}.*.{{conv_pw,conv_pwl}}": mmpeft.LoRA(rank=16, alpha=16)},
        "conv": trunk | {f"{BLOCKS}.{{3,4}}.*": mmpeft.ConvAdapter(size=16)},
        "full": {f"{BLOCKS}.{{3,4}}": {"train": "full", "lr": 3e-4}},
    }[arm]


def rows() -> list[Row]:
    common: dict[str, Any] = {"view": "corner2", "size": 128, "demonstrations": 10, "steps": 1500, "width": 1024, "max_steps": 500}
    common |= FLOW
    found = []
    for seed in (1, 2, 3):
        found.append(Row(f"old/untouched/s{seed}", VISION_TASKS, "untouched", seed, episodes=OLD_EPISODES, **common))
        for new, (tasks, looks) in NEW.items():
            episodes = 20 if new == "shifted" else 50
            for arm in ARMS:
                copies = 0 if arm == "scratch" else 8
                found.append(
                    Row(f"{new}/{arm}/s{seed}", tasks, arm, seed, episodes=episodes, copies=copies, shift=looks, **common)
                )
    return found


def adapt(row: Row) -> dict[str, Any]:
    """One way to learn the new, from the 24-task policy of the same training seed."""
    if row.arm == "scratch":
        return clone(row)
    import mmpeft
    from mmpeft.policies import load_policy

    policy = load_policy(RUNS / "adapters" / f"24_conv_s{row.seed}", name="old")
    policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if row.arm == "untouched":
        return scores(evaluate(row, policy))
    before, policy.skill = fingerprint(policy), policy.current()  # the statistics stay those of the 24 tasks
    mmpeft.attach(policy, rules(plan_of(row.arm)), "new")
    mmpeft.use(policy, ["old", "new"])
    mmpeft.trainable(policy, ["old", "new"] if row.arm == "full" else ["new"])
    training = train(row, policy, None, adapter="new")
    old = dataclasses.replace(
        row, tasks=VISION_TASKS if row.episodes > 1 else row.tasks, shift=(), episodes=min(OLD_EPISODES, row.episodes)
    )
    found = scores(evaluate(row, policy)) | training | sizes(policy)
    found["old_on"] = counts(evaluate(old, policy))
    if row.arm != "full":
        with mmpeft.use(policy, "old"):
            found["off_is_bit_identical"] = bool(torch.equal(before, fingerprint(policy)))
    return found


def fingerprint(policy: Any) -> torch.Tensor:
    """Actions on a fixed observation, on the CPU where the sums have one order."""
    device = next(policy.parameters()).device
    policy.cpu().eval()
    try:
        g = torch.Generator().manual_seed(0)
        side = policy.image_size
        observation = {
            "images": torch.randint(256, (4, 1, *side, 3), generator=g).to(torch.uint8).numpy(),
            "state": torch.rand(4, 4, generator=g).numpy(), "instruction": ["push the puck to the goal"] * 4,
        }  # fmt: skip
        policy.reset(4)
        return torch.from_numpy(policy.act(observation))
    finally:
        policy.to(device)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: success on the new and on the old, and what a skill weighs."""
    by_name = {x["name"]: x for x in lines}
    out = [
        "| new | arm | success on the new | old, switched on | old, switched off | kept + new | MB a skill |",
        "|---" * 7 + "|",
    ]
    for new in NEW:
        for arm in ARMS:
            found = [x for x in lines if x["name"].startswith(f"{new}/{arm}/")]
            if not found:
                continue
            untouched = [by_name[n] for n in (f"old/untouched/s{x['seed']}" for x in found) if n in by_name]
            safe = arm == "untouched" or all(x.get("off_is_bit_identical") for x in found)
            off = wins(x["by_task"].values() for x in untouched) if safe and arm not in ("full", "scratch") else None
            on = off if arm == "untouched" else wins([x["old_on"]] for x in found if "old_on" in x)
            kept, success = on if arm == "full" else off, wins(x["by_task"].values() for x in found)
            both = None if kept is None or success is None else (success + kept) / 2
            said = ["-" if v is None else f"{v:.2f}" for v in (on, off, both)]
            megabytes = f"{found[0]['bytes'] / 1e6:.2f}" if "bytes" in found[0] else "-"
            out.append(f"| {new} | {arm} | {pooled(found)} | {' | '.join(said)} | {megabytes} |")
    return "\n".join(out)


def wins(counts: Iterable[Iterable[Sequence[int]]]) -> float | None:
    """Successes over episodes of all (successes, episodes); None where there are none."""
    pairs = [pair for some in counts for pair in some]
    return sum(w for w, _ in pairs) / sum(n for _, n in pairs) if pairs else None


if __name__ == "__main__":
    program(__doc__, rows(), OUT, work=adapt, table=table)
