"""Trunks: what they read and never read, both readout layouts, a frozen language model with LoRA, instructions."""

import pytest
import torch

import mmpeft
from mmpeft.encoders.packages import PACKAGES
from mmpeft.errors import BadSample, ConfigError, MissingExtra
from mmpeft.policies.heads import RegressionHead
from mmpeft.policies.instructions import InstructionEncoder
from mmpeft.policies.trunks import MLPTrunk, Observed, Sizes, TransformerTrunk
from mmpeft.policies.trunks_llm import LLMTrunk
from tests.multimodal.kit import build_llm, build_tokenizer

from .policy_kit import Demos, make_policy, observation

SIZES = Sizes(maps=((5, 3, 2), (7, 2, 2)), views=2, state=4, text=6, history=3)
SENTENCES = ["push", "pull the large red handle", "reach it"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def trunks(tokenizer):
    torch.manual_seed(0)
    return {
        "mlp": (MLPTrunk(width=16, channels=2, side=8), 1),
        "transformer": (TransformerTrunk(width=16, depth=2, heads=2), 5),
        "transformer, film and cross": (TransformerTrunk(width=16, depth=1, heads=2, state="cross", text="film"), 5),
        "llm": (LLMTrunk(build_llm("llama", tokenizer)), 5),
    }


NAMES = ["mlp", "transformer", "transformer, film and cross", "llm"]


def sensed(rows=3, seed=0, **changes):
    g = torch.Generator().manual_seed(seed)
    lead = (rows, SIZES.history, SIZES.views)
    given = {
        "maps": [torch.randn(*lead, *shape, generator=g) for shape in SIZES.maps],
        "state": torch.randn(rows, 3, 4, generator=g), "text": torch.randn(rows, 6, generator=g), "instruction": SENTENCES[:rows],
    }  # fmt: skip
    return Observed(**given | changes)


def build(name, tokenizer):
    trunk, readouts = trunks(tokenizer)[name]
    trunk.build(SIZES, readouts=readouts).eval()
    with torch.no_grad():
        for n, p in trunk.named_parameters():
            if not n.startswith("llm"):
                p.add_(0.1 * torch.randn(p.shape))  # fusions start as the identity
    return trunk, readouts


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_meet(name, tokenizer):
    """A row alone gives what it gives in a batch, whatever the length of the other sentences."""
    trunk, readouts = build(name, tokenizer)
    whole = trunk(sensed())
    assert whole.shape == (3, readouts, trunk.dim)
    for i in range(3):
        o = sensed()
        alone = Observed(
            [m[i : i + 1] for m in o.maps], o.state[i : i + 1], o.text[i : i + 1], instruction=[SENTENCES[i]]
        )
        torch.testing.assert_close(trunk(alone)[0], whole[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_unseen_and_missing_are_never_read(name, tokenizer):
    trunk, _ = build(name, tokenizer)
    seen = torch.tensor([[True, True, True], [False, True, True], [False, False, True]])
    there = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
    first = trunk(sensed(seen=seen, state_mask=there))
    o = sensed()
    hide = seen[:, :, None, None, None, None]
    changed = Observed(
        [torch.where(hide, m, 9.0) for m in o.maps], torch.where((seen & there)[..., None], o.state, float("nan")), o.text,
        there, seen, SENTENCES,
    )  # fmt: skip
    torch.testing.assert_close(trunk(changed), first, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trunk(sensed()), first)


@pytest.mark.parametrize("name", NAMES)
def test_every_sense_has_an_effect(name, tokenizer):
    trunk, _ = build(name, tokenizer)
    first, other = trunk(sensed()), sensed(seed=1)
    for key in ("maps", "state"):
        assert not torch.allclose(trunk(sensed(**{key: getattr(other, key)})), first, atol=1e-4)
    words = {"instruction": ["stop"] * 3} if name == "llm" else {"text": other.text}
    assert not torch.allclose(trunk(sensed(**words)), first, atol=1e-4)


def test_llm_trunk_with_lora_learns_and_keeps_its_base(tokenizer):
    policy = make_policy(trunk=LLMTrunk(build_llm("llama", tokenizer)), head=RegressionHead(), readouts=5)
    policy.fit(Demos().stacked("action"), Demos().stacked("state"))
    plan = {"trunk.llm.**.{q,v}_proj": mmpeft.LoRA(rank=2), "trunk.senses": "full", "head": "full"}
    frozen = policy.trunk.llm.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    mmpeft.attach(policy, plan)
    batch = {k: v for k, v in policy.observe(observation()).items()} | {"action": torch.randn(3, 5, 3) + 5}
    optimizer = torch.optim.Adam([p for g in mmpeft.parameter_groups(policy, lr=1.0) for p in g["params"]], lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = policy(batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(policy.trunk.llm.state_dict()["model.layers.0.self_attn.q_proj.weight"], frozen)
    assert policy.reads == ("images", "state", "instruction") and policy.act(observation()).shape == (3, 5, 3)


def test_refusals(tokenizer):
    llm = LLMTrunk(build_llm("llama", tokenizer), max_words=3).build(SIZES, readouts=2)
    with pytest.raises(BadSample, match="1 to 3 tokens"):
        llm(sensed(instruction=["a very long instruction indeed"] * 3))
    with pytest.raises(BadSample, match="has 0"):
        llm(sensed(instruction=["", "a", "b"]))
    with pytest.raises(BadSample, match="reads an instruction"):
        llm(sensed(instruction=None))
    with pytest.raises(ConfigError, match="readouts"):
        MLPTrunk().build(SIZES, readouts=5)
    with pytest.raises(ConfigError, match="built for"):
        llm.build(SIZES, readouts=3)
    with pytest.raises(ConfigError, match="divide"):
        TransformerTrunk(width=10, heads=4)


def test_sentences_once(monkeypatch):
    """MiniLM out of its package: unit vectors, like sentences near each other, each encoded once."""
    try:
        PACKAGES["minilm-l6"].path()
    except MissingExtra as error:
        pytest.skip(str(error))
    ears = InstructionEncoder("package:minilm-l6")
    given = [
        "push the puck to the goal",
        "shove the puck onto the target",
        "open the window",
        "push the puck to the goal",
    ]
    vectors = ears(given)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert torch.equal(vectors[0], vectors[3])
    torch.testing.assert_close(
        ears._encode(given[:1], torch.device("cpu"))[0], vectors[0], rtol=1e-4, atol=1e-5
    )  # padding is not read
    monkeypatch.setattr(ears, "_encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(ears(given[:2]), vectors[:2])
