"""Demonstrations in memory: the same samples as a loader gives, and a training from them."""

from functools import partial

import pytest
import torch

import mmpeft
from mmpeft.errors import ConfigError
from mmpeft.policies.cloning import clone
from mmpeft.policies.heads import ACTHead, DiffusionHead, FlowHead, MixtureHead, RegressionHead
from mmpeft.policies.memory import Memory, prepared
from mmpeft.policies.policy import note_skill
from mmpeft.policies.samples import PolicySamples
from mmpeft.tasks.control import measure

from .policy_kit import SIDE, Demos, Words, eyes, make_policy

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def sees(**options):
    demos = Demos(episodes=3)
    policy = make_policy(encoder=eyes(), **options)
    measure(policy, demos)
    return demos, policy


@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_its_copies_are_those_of_the_cache(tmp_path, history, place):
    demos, policy = sees(history=history)
    cached = PolicySamples(demos, policy, cache=tmp_path, copies=3, shift=2, seed=5)
    memory = Memory.of(demos, policy.to(place), copies=3, shift=2, seed=5, device=place)
    assert len(memory) == len(cached) and memory.device.type == place and "images" not in memory.batch
    index = torch.tensor([0, 4, len(cached) - 1])
    for copy in (None, torch.tensor([2, 0, 1])):
        part = memory.take(index.to(place), None if copy is None else copy.to(place)).batch
        for row, i in enumerate(index.tolist()):
            sample = cached[i]
            assert torch.equal(part["state"][row].cpu(), sample["state"])
            mine, its = part["prefix"][row].cpu(), sample["prefix"][:, 0 if copy is None else copy[row]]
            assert mine.shape == its.shape and torch.allclose(mine.float(), its.float(), atol=2e-2 if place == "cuda" else 0)
    assert not torch.equal(memory.batch["prefix"][:, 0], memory.batch["prefix"][:, 1])


def test_pictures_without_copies():
    demos, policy = sees()
    memory = Memory.of(demos, policy)
    assert memory.batch["images"].dtype == torch.uint8 and memory.batch["images"].shape[1:] == (1, 1, SIDE, SIDE, 3)
    assert memory.copies == 0 and torch.equal(memory.batch["images"][2], PolicySamples(demos, policy)[2]["images"])


def test_prepared_once_gives_the_same_loss():
    demos, policy = sees(instruction=Words().requires_grad_(False))
    memory = Memory.of(demos, policy, copies=2)
    ready = prepared(memory, policy)
    assert "instruction" not in ready.batch and ready.batch["text"].shape == (len(memory), 6)
    index = torch.arange(0, len(memory), 3)
    own, its = policy(memory.take(index).batch), policy({**ready.take(index).batch, "normalised": True})
    assert own > 0 and torch.allclose(own, its, rtol=1e-5)


def test_sentences_stay_where_their_encoder_trains():
    demos, policy = sees(instruction=Words())
    ready = prepared(Memory.of(demos, policy), policy)
    assert "text" not in ready.batch and len(ready.batch["instruction"]) == len(ready)


SMALL = {"width": 16, "heads": 2}
HEADS = {
    "l1": RegressionHead, "mixture": MixtureHead, "act": partial(ACTHead, latent=4, kl_weight=0.1, **SMALL),
    "flow": partial(FlowHead, depth=1, **SMALL), "diffusion": partial(DiffusionHead, depth=1, **SMALL),
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "head"),
    [("cpu", "l1"), ("cpu", "flow"), *(pytest.param("cuda", h, marks=PLACES[1].marks) for h in HEADS)],  # as CUDA graphs
)
def test_cloning_from_copies_learns(place, head):
    demos, policy = sees(instruction=Words().requires_grad_(False), head=HEADS[head](), word_noise=0.1)
    policy.to(place)
    plan = {"trunk": "full", "head": "full", "encoder.backbone.blocks.2.*": mmpeft.ConvAdapter(size=4)}
    mmpeft.attach(policy, plan)
    note_skill(policy, "default")
    memory = Memory.of(demos, policy, copies=2, device=place)
    before = {k: v.detach().clone() for k, v in policy.named_parameters() if v.requires_grad}
    losses = clone(
        policy, memory, steps=300, batch_size=16, lr=3e-3, clip=1.0, warmup=10, graph=place == "cuda", seed=3
    )
    assert len(losses) == 300 and sum(losses[-30:]) < 0.6 * sum(losses[:30])
    assert all(not torch.equal(v, before[k]) for k, v in policy.named_parameters() if v.requires_grad)
    with torch.no_grad():  # what was trained is what acts
        batch = memory.take(torch.arange(len(memory), device=place)).batch
        assert float(policy(batch)) < 0.6 * sum(losses[:30]) / 30


def moved(**options):
    """The largest change of a weight in one step of lr 1e-2; Adam's is lr where the gradient is far above its eps."""
    demos, policy = sees()
    mmpeft.attach(policy, {"trunk": "full", "head": "full"})
    before = [p.detach().clone() for p in policy.parameters() if p.requires_grad]
    clone(policy, Memory.of(demos, policy, copies=1), steps=1, batch_size=8, lr=1e-2, weight_decay=0.0, **options)
    after = [p.detach() for p in policy.parameters() if p.requires_grad]
    return max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))


def test_clipping_and_warmup():
    assert moved() == pytest.approx(1e-2, rel=1e-3)
    assert moved(warmup=10) == pytest.approx(1e-3, rel=1e-3)
    assert moved(clip=1e3) == pytest.approx(1e-2, rel=1e-3)
    assert 0 < moved(clip=1e-10) < 1e-4  # no gradient is above 1e-10 then, a hundredth of Adam's eps


def test_as_many_steps_as_fit():
    demos, policy = sees()
    mmpeft.attach(policy, {"trunk": "full", "head": "full"})
    assert 49 <= len(clone(policy, Memory.of(demos, policy, copies=1), steps=100_000, batch_size=4, seconds=1e-3)) <= 60


def test_a_loss_that_is_not_finite_leaves_the_last_finite_weights():
    demos, policy = sees()
    mmpeft.attach(policy, {"trunk": "full", "head": "full"})
    memory = Memory.of(demos, policy, copies=1)
    memory.batch["action"].fill_(float("inf"))
    before = {k: v.detach().clone() for k, v in policy.named_parameters()}
    with pytest.raises(ConfigError, match="smaller lr"):
        clone(policy, memory, steps=3, batch_size=4)
    assert all(torch.equal(v, before[k]) for k, v in policy.named_parameters())


def test_what_is_refused():
    demos, policy = sees()
    with pytest.raises(ConfigError, match="not negative"):
        Memory.of(demos, policy, copies=-1)
    with pytest.raises(ConfigError, match="split"):
        Memory.of(demos, make_policy(encoder=eyes(split=None)), copies=2)
    mmpeft.attach(policy, {"trunk": "full", "head": "full"})
    memory = Memory.of(demos, policy, copies=2)
    with pytest.raises(ConfigError, match="CUDA graph"):
        clone(policy, memory, steps=1, graph=True)
    with pytest.raises(ConfigError, match="clip and seconds"):
        clone(policy, memory, steps=1, clip=0.0)
    with pytest.raises(ConfigError, match="different copies"):
        Memory.joined([memory, Memory.of(demos, policy, copies=1)])
