"""SayCan (Ahn et al. 2022, arXiv 2204.01691): what a language model would say next, times what the robot can do now.

    planner = SayCan(load_llm("package:smollm2-135m-instruct"), {"reach": "go to the cup", "grasp": "take the cup"},
                     affordance={"reach": can_reach, "grasp": lambda observation: grasp_ppo.value(observation)[0]})
    planner.choose("bring me the cup", history=["reach"], observation=observation).skill     # "grasp"
    done = planner.run(policy, env, "bring me the cup", seed=0)                  # each skill is its adapter, by mmpeft.use

Skills are named adapters of one policy, each with the sentence that the language model knows it by (those of
`policies.Skills` fit). The model writes nothing: every skill's sentence is scored as the continuation of a prompt with
the instruction and what was done so far, and the product with the skill's affordance, a chance of success from its
critic or any function, decides. "done" is one more sentence, and ends the plan.

A sentence is scored (`sentence_scores`) with the line's end, so that "take the cup" does not win over "take the cup from
the table" by being its beginning; `length` says whether its tokens' log likelihoods are added, as in the paper, or averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmpeft.adapters import use
from mmpeft.adapters.state import state_of
from mmpeft.errors import ConfigError, NameNotFound, nearest
from mmpeft.policies.sentence_scores import Length, Scorer, check_length

Affordance = Callable[[Any], float]
DONE = "done"


@dataclass(frozen=True)
class Choice:
    """One step of a plan: by skill (and "done") what the language model gives it, what the robot gives it, the product."""

    skill: str
    said: dict[str, float]  # softmax over the skills' scores
    can: dict[str, float]
    score: dict[str, float]


@dataclass
class Plan:
    """What was chosen, and how it ended: "done", "max_skills", "nothing possible", or in an environment "terminated" and
    "truncated"."""

    choices: list[Choice] = field(default_factory=list)
    ended: str = ""
    success: bool = False
    steps: int = 0

    @property
    def skills(self) -> list[str]:
        """Without the final "done"."""
        return [c.skill for c in self.choices if c.skill != DONE]


class SayCan:
    """A planner over named skills.

    Args:
        llm: see `Scorer`. skills: adapter name -> the sentence the language model knows it by.
        affordance: skill -> function of the observation, its chance of success from 0 to 1 (skills left out: 1); None: the
            language model alone ("say").
        done: its sentence. done_affordance: "done" has no critic; below 1 it asks for more certainty that all is done.
        length: "sum" or "mean", see above. temperature: of the softmax over scores.
        examples: (instruction, sentences) shown before, which is how a small model learns the form of a plan.
        max_skills: a plan is cut after so many.

    Raises:
        ConfigError: no skills, a skill called "done", equal sentences, numbers out of range.
        NameNotFound: an affordance for no skill.
    """

    def __init__(
        self, llm: Any, skills: Mapping[str, str], *, affordance: Mapping[str, Affordance] | None = None,
        done: str = "done", done_affordance: float = 1.0, length: Length = "sum", temperature: float = 1.0,
        examples: Sequence[tuple[str, Sequence[str]]] = (), max_skills: int = 10,
    ) -> None:  # fmt: skip
        if not skills or DONE in skills:
            raise ConfigError(f"give at least one skill, and none called {DONE!r}; given {list(skills)}")
        said = [*skills.values(), done]
        if len(set(said)) != len(said) or not all(s.strip() for s in said):
            raise ConfigError(f"every skill needs a sentence of its own, given {said}")
        unknown = [n for n in affordance or {} if n not in skills]
        if unknown:
            raise NameNotFound(f"an affordance for {unknown[0]!r}, which is no skill{nearest(unknown[0], skills)}")
        if max_skills < 1 or not temperature > 0 or not 0 < done_affordance <= 1:
            raise ConfigError(
                f"max_skills is at least 1, temperature above 0, done_affordance above 0 and at most 1; given {max_skills}, "
                f"{temperature}, {done_affordance}"
            )
        self.scorer, self.length, self.temperature = Scorer(llm), check_length(length), temperature
        self.sentences = {**skills, DONE: done}
        self.affordance, self.done_affordance = dict(affordance or {}), done_affordance
        self.examples, self.max_skills = [(i, list(s)) for i, s in examples], max_skills

    def prompt(self, instruction: str, history: Sequence[str] = ()) -> str:
        """What the language model reads; `history` are skills. It ends after the next step's number."""
        told = [_list(i, [*s, self.sentences[DONE]]) for i, s in self.examples]
        steps = [self.sentences[s] for s in history]
        return "\n".join([*told, _list(instruction, steps) + f"{len(steps) + 1}."])

    def choose(self, instruction: str, *, history: Sequence[str] = (), observation: Any = None) -> Choice:
        """The next skill, or "done".

        Raises:
            NameNotFound: a skill in `history` that is none. ConfigError: an affordance outside 0 to 1.
        """
        for name in history:
            if name not in self.sentences:
                raise NameNotFound(f"no skill {name!r}{nearest(name, self.sentences)}")
        total, tokens = self.scorer(self.prompt(instruction, history), [f" {s}.\n" for s in self.sentences.values()])
        score = total / tokens if self.length == "mean" else total
        said = dict(zip(self.sentences, (score / self.temperature).softmax(0).tolist(), strict=True))
        can = {name: self._can(name, observation) for name in self.sentences}
        product = {name: said[name] * can[name] for name in said}
        return Choice(max(product, key=product.__getitem__), said, can, product)

    def _can(self, name: str, observation: Any) -> float:
        if name == DONE:
            return self.done_affordance
        value = float(self.affordance[name](observation)) if name in self.affordance else 1.0
        if math.isnan(value) or not -0.05 <= value <= 1.05:  # a critic may be a little beyond what is possible
            raise ConfigError(f"the affordance of {name!r} is a chance from 0 to 1, given {value}")
        return min(1.0, max(0.0, value))

    def plan(self, instruction: str, observation: Any = None) -> Plan:
        """Choose until "done", as if every skill succeeded and left the observation as it is."""
        plan = Plan()
        while self._next(plan, instruction, observation):
            pass
        return plan

    def _next(self, plan: Plan, instruction: str, observation: Any) -> bool:
        """Add a choice; False where the plan has ended."""
        choice = self.choose(instruction, history=plan.skills, observation=observation)
        if not any(v for n, v in choice.can.items() if n != DONE) and choice.skill != DONE:
            plan.ended = "nothing possible"
            return False
        plan.choices.append(choice)
        plan.ended = "done" if choice.skill == DONE else "max_skills" if len(plan.skills) >= self.max_skills else ""
        return not plan.ended

    def run(
        self, policy: Any, env: Any, instruction: str, *, seed: int, skill_steps: int = 100,
        finished: Callable[[str, Any], bool] | None = None,
    ) -> Plan:  # fmt: skip
        """Plan and act: each chosen skill's adapter carries out up to `skill_steps` actions, then the next is chosen from what
        is seen.

        Args:
            policy: a `Policy` with an adapter for each skill; its active adapters are what they were afterwards.
            env: a Gymnasium environment with dict observations, such as `make_env` gives. An affordance is given its
                observation with a leading batch axis of 1.
            finished: (skill, observation) -> whether it may stop before its steps are used up.

        Raises:
            NameNotFound: a skill without an adapter. ConfigError: skill_steps below 1.
        """
        state_of(policy).check_names([n for n in self.sentences if n != DONE])
        if skill_steps < 1:
            raise ConfigError(f"skill_steps is at least 1, given {skill_steps}")
        observation, _ = env.reset(seed=seed)
        plan = Plan()
        while True:
            going = self._next(plan, instruction, _batched(observation))
            if plan.ended in ("done", "nothing possible"):
                return plan
            over, observation = self._carry_out(plan, policy, env, observation, skill_steps, finished)
            if over or not going:
                plan.ended = over or plan.ended
                return plan

    def _carry_out(
        self, plan: Plan, policy: Any, env: Any, observation: Any, steps: int, finished: Callable[[str, Any], bool] | None
    ) -> tuple[str, Any]:  # fmt: skip
        """The last choice of the plan; how the episode ended ('' if it goes on), and what is seen then."""
        skill, first, left = plan.choices[-1].skill, True, steps
        with use(policy, skill):
            policy.reset(1)
            while left > 0:
                seen = _batched({**observation, "instruction": self.sentences[skill]}) | {"first": np.array([first])}
                chunk = np.asarray(policy.act(seen))[0]
                for action in chunk[: min(left, getattr(policy, "execute", None) or len(chunk))]:
                    observation, _, terminated, truncated, info = env.step(action)
                    plan.steps += 1
                    left -= 1
                    plan.success = plan.success or bool(info.get("success", False))
                    if terminated or truncated:
                        return ("terminated" if terminated else "truncated"), observation
                first = False
                if finished is not None and finished(skill, observation):
                    break
        return "", observation


def _list(instruction: str, steps: Sequence[str]) -> str:
    lines = [f"Instruction: {instruction}", "Plan:", *(f"{i + 1}. {s}." for i, s in enumerate(steps))]
    return "\n".join(lines) + "\n"


def _batched(observation: Any) -> Any:
    """With a leading axis of 1."""
    if isinstance(observation, Mapping):
        return {k: np.asarray(v)[None] for k, v in observation.items()}
    return None if observation is None else np.asarray(observation)[None]
