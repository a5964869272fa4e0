"""Skills: named adapters over one policy, chosen row by row by what the robot is told.

    skills = Skills(policy, {"grasp": ["grasp the cup", "take the cup"], "push": ["push the puck"]})
    chunk = skills.act(observation)                     # each row under the adapter of its instruction

An instruction that is listed goes to its skill; any other to the skill of the nearest listed sentence, by the policy's own
sentence vectors, if it is near enough. Adding a skill is attaching an adapter: the others keep every bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmpeft.adapters.state import state_of
from mmpeft.errors import ConfigError, NameNotFound, nearest
from mmpeft.policies.policy import Policy


class Skills:
    """A router with the interface of a policy.

    Args:
        policy: with an adapter for each skill.
        sentences: skill -> the sentences (or task names) that call it.
        near: the smallest cosine between a new sentence and a known one; below it, the instruction is refused.

    Raises:
        NameNotFound: a skill without an adapter; at `act`, an instruction near to no known one.
        ConfigError: one sentence for two skills, or no skill.
    """

    def __init__(self, policy: Policy, sentences: Mapping[str, Sequence[str]], *, near: float = 0.6) -> None:
        if not sentences or not any(sentences.values()):
            raise ConfigError("no skill: give sentences={adapter: [sentence, ...]}")
        state_of(policy).check_names(list(sentences))
        self.policy, self.near = policy, near
        self.known: dict[str, str] = {}
        for skill, said in sentences.items():
            for sentence in said:
                if self.known.setdefault(sentence, skill) != skill:
                    raise ConfigError(f"{sentence!r} calls both {self.known[sentence]!r} and {skill!r}")
        self.execute = policy.execute
        self.reads = tuple(dict.fromkeys([*policy.reads, "instruction"]))

    def reset(self, num_envs: int | None = None, *, seed: int = 0) -> None:
        self.policy.reset(num_envs, seed=seed)

    def route(self, instructions: Sequence[str]) -> list[str]:
        """The skill of each instruction."""
        return [self.known[s] if s in self.known else self._nearest(s) for s in map(str, instructions)]

    def act(self, observation: Mapping[str, Any]) -> Any:
        """As `Policy.act`."""
        return self.policy.act(observation, adapters=self.route(observation["instruction"]))

    @torch.no_grad()
    def _nearest(self, sentence: str) -> str:
        names = list(self.known)
        if self.policy.instruction is None:
            raise NameNotFound(
                f"no skill is called by {sentence!r}{nearest(sentence, names)}, and the policy has no instruction encoder that "
                f"could tell what it is near to"
            )
        vectors = torch.nn.functional.normalize(self.policy.instruction([sentence, *names]), dim=-1)
        cosine = vectors[1:] @ vectors[0]
        best = int(cosine.argmax())
        if float(cosine[best]) < self.near:
            raise NameNotFound(
                f"no skill is called by {sentence!r}: the nearest known sentence is {names[best]!r} with a cosine of "
                f"{float(cosine[best]):.2f}, below {self.near}"
            )
        return self.known[names[best]]
