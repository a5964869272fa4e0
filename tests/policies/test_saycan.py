"""SayCan: scores equal brute force, what was read is not read again, affordances decide, plans end, skills are adapters."""

import numpy as np
import pytest
import torch

import mmpeft
from mmpeft.errors import ConfigError, NameNotFound, Unsupported
from mmpeft.policies.policy import note_skill
from mmpeft.policies.saycan import SayCan
from mmpeft.policies.sentence_scores import Scorer, score_sentences

from ..multimodal.kit import build_llm, build_model, build_tokenizer
from .ppo_kit import TwoStates, cloned

SENTENCES = [" take the larger image.\n", " no", " is this the first one? yes.\n", " 7"]
SKILLS = {"left": "go to the first image", "right": "go to the second one"}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def llm(tokenizer):
    return build_llm("llama", tokenizer)


def brute(llm, prompt, sentence):
    """One forward of the whole text for one sentence, token by token."""
    start = llm.tokenizer(prompt)["input_ids"]
    rest = llm.tokenizer(sentence, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = llm.model(torch.tensor([start + rest])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(start) - 1 + i, token]) for i, token in enumerate(rest)), len(rest)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_scores_equal_one_forward_for_each_sentence(kind, tokenizer):
    llm = build_llm(kind, tokenizer)
    prompt = "Which digit is this?\n1."
    want = [brute(llm, prompt, s) for s in SENTENCES]
    assert len({n for _, n in want}) > 2  # sentences of different lengths in one batch
    for size in (1, 3, 32):
        total, tokens = Scorer(llm, batch_size=size)(prompt, SENTENCES)
        assert tokens.tolist() == [n for _, n in want]
        np.testing.assert_allclose(total, [v for v, _ in want], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        score_sentences(llm, prompt, SENTENCES, length="mean"), [v / n for v, n in want], rtol=1e-5, atol=1e-4
    )


def test_a_multimodal_model_is_a_planner_too(tokenizer):
    model = build_model("llama", tokenizer)
    total, _ = Scorer(model)("Which digit?", SENTENCES)
    alone = type("LLM", (), {"model": model.llm, "tokenizer": tokenizer})
    np.testing.assert_allclose(total, [brute(alone, "Which digit?", s)[0] for s in SENTENCES], rtol=1e-5, atol=1e-4)


def test_a_prompt_is_read_once_and_only_its_end_when_it_grows(llm):
    read = []
    handle = llm.model.register_forward_pre_hook(
        lambda m, a, k: read.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    try:
        scorer, first = Scorer(llm), "Which digit is this? It is 7.\n1."
        longer, other = first + " no.\n2.", "You are a helpful tester.\n1."
        lengths = {p: len(llm.tokenizer(p)["input_ids"]) for p in (first, longer, other)}
        width = max(len(llm.tokenizer(s, add_special_tokens=False)["input_ids"]) for s in SENTENCES) - 1
        scorer(first, SENTENCES)
        assert read == [(1, lengths[first]), (4, width)]
        scorer(first, SENTENCES)
        assert read[2:] == [(4, width)]  # not again
        found, _ = scorer(longer, SENTENCES)
        assert read[3][1] < lengths[longer] - lengths[first] + 3  # a token may join others at the seam
        back, _ = scorer(other, SENTENCES)
        again, _ = scorer(first, SENTENCES)  # shorter, and something else in between
    finally:
        handle.remove()
    for prompt, got in ((longer, found), (other, back), (first, again)):
        np.testing.assert_allclose(got, [brute(llm, prompt, s)[0] for s in SENTENCES], rtol=1e-5, atol=1e-4)


def test_the_product_decides(llm):
    seen = []
    planner = SayCan(llm, SKILLS, affordance={"left": lambda o: seen.append(o) or 0.25})
    choice = planner.choose("the larger one", observation="here")
    assert seen == ["here"] and choice.can == {"left": 0.25, "right": 1.0, "done": 1.0}
    sentences = [f" {s}.\n" for s in (*SKILLS.values(), "done")]
    prompt = "Instruction: the larger one\nPlan:\n1."
    assert planner.prompt("the larger one") == prompt
    said = torch.tensor([brute(llm, prompt, s)[0] for s in sentences]).softmax(0)
    np.testing.assert_allclose(list(choice.said.values()), said, rtol=1e-4)
    np.testing.assert_allclose(list(choice.score.values()), said * torch.tensor([0.25, 1, 1]), rtol=1e-4)
    assert choice.skill == max(choice.score, key=choice.score.get)
    for only in SKILLS:
        can = {n: (lambda o, n=n, only=only: float(n == only)) for n in SKILLS}
        sure = SayCan(llm, SKILLS, affordance=can, done_affordance=1e-9, temperature=50.0)
        assert sure.choose("the larger one").skill == only
    assert "1. go to the first image.\n2. done.\n" in SayCan(
        llm, SKILLS, examples=[("a", ["go to the first image"])]
    ).prompt("b")


class Word:
    """A language model that says what it is told: the given sentences one after another."""

    def __init__(self, *script):
        self.script = script

    def __call__(self, prompt, sentences):
        want = self.script[min(prompt.count("\n") - 2, len(self.script) - 1)]
        found = torch.tensor([0.0 if s == f" {want}.\n" else -5.0 for s in sentences], dtype=torch.float64)
        return found, torch.ones(len(sentences))


def planner(llm, *script, **options):
    made = SayCan(llm, SKILLS, **options)
    made.scorer = Word(*script)
    return made


def test_plans_end(llm):
    first, second = SKILLS.values()
    plan = planner(llm, first, second, "done").plan("do both")
    assert plan.skills == ["left", "right"] and plan.ended == "done" and len(plan.choices) == 3
    plan = planner(llm, first, max_skills=4).plan("go on")
    assert plan.skills == ["left"] * 4 and plan.ended == "max_skills"
    nothing = {n: lambda o: 0.0 for n in SKILLS}
    plan = planner(llm, first, affordance=nothing).plan("do it")
    assert plan.skills == [] and plan.ended == "done"  # all that is left to say


def learned():
    """Skills 0 and 1: adapters that always take that action."""
    policy = cloned()
    for action, name in enumerate(SKILLS):
        mmpeft.attach(policy, {"head": "full"}, name)
        note_skill(policy, name)
        bias = next(p for k, p in mmpeft.adapters.switch.adapter_parameters(policy, name) if p.shape == (2,))
        with torch.no_grad():
            bias[action] = 50.0
    return policy


class Told(TwoStates):
    """TwoStates with dict observations; records its actions."""

    def __init__(self, length):
        super().__init__(length=length)
        self.taken = []

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed)
        return {"state": observation, "instruction": ""}, info

    def step(self, action):
        self.taken.append(int(action))
        observation, *rest = super().step(action)
        return {"state": observation, "instruction": ""}, *rest


def test_each_skill_acts_with_its_adapter_and_is_chosen_from_what_is_seen(llm):
    first, second = SKILLS.values()
    policy, env, seen = learned(), Told(length=99), []
    mmpeft.use(policy, "left")
    can = {"left": lambda o: seen.append(o["state"].shape) or 1.0}
    plan = planner(llm, first, second, first, "done", affordance=can).run(policy, env, "all", seed=0, skill_steps=3)
    assert plan.skills == ["left", "right", "left"] and plan.ended == "done" and plan.steps == 9
    assert env.taken == [0, 0, 0, 1, 1, 1, 0, 0, 0] and set(seen) == {(1, 2)} and plan.success
    assert mmpeft.active(policy) == ("left",)
    env = Told(length=4)
    plan = planner(llm, second).run(policy, env, "all", seed=0, skill_steps=3)
    assert plan.ended == "truncated" and env.taken == [1] * 4
    env = Told(length=99)
    plan = planner(llm, first, second, "done").run(
        policy, env, "all", seed=0, skill_steps=9, finished=lambda skill, o: skill == "left"
    )
    assert env.taken == [0] + [1] * 9
    plan = planner(llm, first, max_skills=2).run(policy, Told(99), "all", seed=0, skill_steps=3)
    assert plan.steps == 6 and plan.ended == "max_skills"


@pytest.mark.parametrize(
    ("skills", "given", "error", "match"),
    [
        ({}, {}, ConfigError, "at least one skill"),
        ({"done": "x"}, {}, ConfigError, "none called 'done'"),
        ({"a": "go", "b": "go"}, {}, ConfigError, "sentence of its own"),
        ({"a": "done"}, {}, ConfigError, "sentence of its own"),
        (SKILLS, {"affordance": {"rigth": lambda o: 1}}, NameNotFound, "nearest: right"),
        (SKILLS, {"length": "maen"}, ConfigError, "nearest: mean"),
        (SKILLS, {"max_skills": 0}, ConfigError, "max_skills"),
        (SKILLS, {"done_affordance": 2.0}, ConfigError, "done_affordance"),
    ],
)
def test_refusals(llm, skills, given, error, match):
    with pytest.raises(error, match=match):
        SayCan(llm, skills, **given)


def test_refusals_while_planning(llm, tokenizer):
    with pytest.raises(NameNotFound, match="nearest: left"):
        SayCan(llm, SKILLS).choose("go", history=["lft"])
    with pytest.raises(ConfigError, match="chance from 0 to 1, given 7"):
        SayCan(llm, SKILLS, affordance={"left": lambda o: 7.0}).choose("go")
    with pytest.raises(ConfigError, match="positions"):
        Scorer(llm)("no " * 300, ["yes"])
    with pytest.raises(ConfigError, match="without tokens"):
        Scorer(llm)("no", [""])
    with pytest.raises(ConfigError, match="language model with its tokenizer"):
        Scorer(object())
    with pytest.raises(Unsupported, match="Mamba"):
        Scorer(build_llm("mamba", tokenizer))("no", SENTENCES)
    policy = learned()
    mmpeft.detach(policy, "right")
    with pytest.raises(NameNotFound, match="right"):
        SayCan(llm, SKILLS).run(policy, Told(9), "go", seed=0)
