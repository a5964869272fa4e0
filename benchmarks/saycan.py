"""SayCan with a small language model: instructions in a kitchen of words, with and without affordances.

    python benchmarks/saycan.py --output benchmarks/results/saycan_smollm2.json          # SmolLM2-135M-Instruct, CPU

The kitchen is symbolic: one hand, four objects, ten skills. Affordances are its rules (what is near can be taken, what is
held can be given), .9 where a skill is possible and .01 where it is not. Two instructions with their plans are shown as
examples; twelve others are planned step by step and count if every step is right and the plan ends. "say" is the
language model alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmpeft.encoders import load_llm
from mmpeft.policies.saycan import DONE, SayCan

OBJECTS = ("cup", "sponge", "apple", "can")
SKILLS = {f"find_{o}": f"find the {o}" for o in OBJECTS} | {f"take_{o}": f"pick up the {o}" for o in OBJECTS}
SKILLS |= {"give": "bring it to the person", "bin": "throw it in the bin"}
EXAMPLES = (
    ("Bring me the sponge.", ["find the sponge", "pick up the sponge", "bring it to the person"]),
    ("Throw away the cup.", ["find the cup", "pick up the cup", "throw it in the bin"]),
)


def steps(thing: str, end: str) -> list[str]:
    return [f"find_{thing}", f"take_{thing}", end]


CASES: dict[str, list[str]] = {
    "Bring me the apple.": steps("apple", "give"),
    "Bring me the can, please.": steps("can", "give"),
    "Throw away the apple.": steps("apple", "bin"),
    "Throw the can in the bin.": steps("can", "bin"),
    "I would like to eat an apple.": steps("apple", "give"),
    "The sponge is broken, please throw it away.": steps("sponge", "bin"),
    "Could you hand me the cup?": steps("cup", "give"),
    "Get rid of the sponge.": steps("sponge", "bin"),
    "I spilled something, I need the sponge.": steps("sponge", "give"),
    "The apple is rotten.": steps("apple", "bin"),
    "Bring me the cup and throw away the can.": [*steps("cup", "give"), *steps("can", "bin")],
    "Throw away the apple, then bring me the sponge.": [*steps("apple", "bin"), *steps("sponge", "give")],
}


class Kitchen:
    """Where the hand is, and what it holds."""

    def __init__(self) -> None:
        self.near: str | None = None
        self.held: str | None = None

    def can(self, skill: str) -> float:
        verb, _, thing = skill.partition("_")
        possible = {
            "find": self.held is None and self.near != thing, "take": self.held is None and self.near == thing,
            "give": self.held is not None, "bin": self.held is not None,
        }  # fmt: skip
        return 0.9 if possible[verb] else 0.01

    def do(self, skill: str) -> None:
        """What is not possible changes nothing."""
        verb, _, thing = skill.partition("_")
        if self.can(skill) < 0.5:
            return
        if verb == "find":
            self.near = thing
        elif verb == "take":
            self.held = thing
        else:
            self.near = self.held = None


def plan(planner: SayCan, instruction: str, most: int = 8) -> list[str]:
    kitchen, done = Kitchen(), list[str]()
    while len(done) < most:
        skill = planner.choose(instruction, history=done, observation=kitchen).skill
        done.append(skill)
        if skill == DONE:
            break
        kitchen.do(skill)
    return done


def right(found: Sequence[str], want: Sequence[str]) -> bool:
    return list(found) == [*want, DONE]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="package:smollm2-135m-instruct")
    parser.add_argument("--output")
    given = parser.parse_args(argv)
    llm, rules = load_llm(given.llm, dtype=torch.float32), {n: lambda k, n=n: k.can(n) for n in SKILLS}
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"), "device": f"CPU, {platform.machine()}", "llm": given.llm,
        "cases": len(CASES), "arms": {},
    }  # fmt: skip
    for can in (False, True):
        for length in ("sum", "mean"):
            began, calls, plans = time.perf_counter(), 0, {}
            planner = SayCan(llm, SKILLS, affordance=rules if can else None, length=length, examples=EXAMPLES)
            for instruction, want in CASES.items():
                plans[instruction] = found = plan(planner, instruction)
                calls += len(found)
                print("yes" if right(found, want) else "no ", instruction, found, flush=True)
            arm = f"{'saycan' if can else 'say'}_{length}"
            correct = sum(right(p, CASES[i]) for i, p in plans.items())
            seconds = (time.perf_counter() - began) / calls
            result["arms"][arm] = {"correct": correct, "seconds_a_choice": round(seconds, 3), "plans": plans}
            print(f"{arm}: {correct} of {len(CASES)}, {seconds:.2f} s a choice", flush=True)
    if given.output:
        Path(given.output).parent.mkdir(parents=True, exist_ok=True)
        Path(given.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
