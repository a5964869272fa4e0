"""The adapter engine on a multimodal model: plans over its parts, files, generation, and one adapter a sample."""

import pytest
import torch

import mmpeft

from .kit import ask, build_model, conversations, image, text

PLAN = {"connectors.image": "full", "connectors.audio": "full", "connectors.state": "full", "llm.**.{q,v}_proj": None}


def adapt(model, *names, seed=0):
    """Attach adapters with random (not zero) values."""
    for i, name in enumerate(names):
        mmpeft.attach(model, PLAN | {"llm.**.{q,v}_proj": mmpeft.LoRA(rank=3)}, name=name)
        fill(model, name, seed + i)
    return model


def fill(model, name, seed):
    generator = torch.Generator().manual_seed(seed)
    mmpeft.trainable(model, name)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_example_inputs_reach_every_part(model):
    (batch,) = model.example_inputs()
    assert set(batch["media"]) == {"image", "audio", "state"} and batch["input_ids"].shape[0] == 2
    assert model(batch).num_supervised > 2


def test_identity_at_init_then_training_touches_the_adapter_alone(tokenizer):
    model = build_model("llama", tokenizer)
    batch = model.collate([model.encode(c) for c in conversations()])
    base = {n: p.detach().clone() for n, p in model.state_dict().items()}
    before = model(batch).loss_sum.detach()
    mmpeft.attach(model, PLAN | {"llm.**.{q,v}_proj": mmpeft.LoRA(rank=3)})
    torch.testing.assert_close(model(batch).loss_sum.detach(), before, rtol=1e-6, atol=1e-6)
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-2))
    for _ in range(5):
        optimizer.zero_grad()
        output = model(batch)
        mmpeft.multimodal.global_mean(output.loss_sum, output.num_supervised).backward()
        optimizer.step()
    assert output.loss_sum < 0.9 * before
    with mmpeft.use(model, None):
        assert torch.equal(model(batch).loss_sum.detach(), before)
    after = model.state_dict()
    assert all(torch.equal(after[n], value) for n, value in base.items())


def test_saved_adapter_answers_the_same_in_a_fresh_model(tokenizer, tmp_path):
    model = adapt(build_model("llama", tokenizer), "digits")
    mmpeft.use(model, "digits")
    answers = model.generate(conversations(), max_new_tokens=8)
    with mmpeft.use(model, None):
        assert model.generate(conversations(), max_new_tokens=8) != answers
    mmpeft.save(model, tmp_path / "digits", name="digits")
    fresh = build_model("llama", tokenizer)
    mmpeft.load(fresh, tmp_path / "digits")
    assert fresh.generate(conversations(), max_new_tokens=8) == answers


def lora_everywhere(tokenizer):
    """Two LoRA adapters, in the image encoder and in the language model."""
    model = build_model("llama", tokenizer, audio=None, state=None)
    for name in ("a", "b"):
        mmpeft.attach(
            model,
            {"llm.**.{q,v,down}_proj": mmpeft.LoRA(rank=3), "encoders.image.backbone": mmpeft.LoRA(rank=2)},
            name=name,
        )
        fill(model, name, ord(name))
    return model


QUESTIONS = [
    ask(image(1), image(2), text("Which?"), name="0"), ask(text("It is 7, not 12."), name="1"),
    ask(image(3), text("And this one?"), answer="12", name="2"),
]  # fmt: skip
ROWS = ["a", None, "b"]


def test_rows_name_samples_whatever_their_number_of_images(tokenizer):
    model = lora_everywhere(tokenizer)
    encoded = [model.encode(q) for q in QUESTIONS]
    batch = model.collate(encoded)
    with mmpeft.use(model, rows=ROWS):
        together = model.hidden(batch)
    for i, (name, sample) in enumerate(zip(ROWS, encoded, strict=True)):
        with mmpeft.use(model, name):
            alone = model.hidden(model.collate([sample]))[0]
        torch.testing.assert_close(together[i, : len(sample)], alone, rtol=1e-4, atol=1e-5)
    with mmpeft.use(model, rows=ROWS[:1]), pytest.raises(mmpeft.errors.ConfigError, match="1 rows"):
        model(batch)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_rows_with_their_samples(tokenizer, beams):
    model = lora_everywhere(tokenizer)
    options = {"max_new_tokens": 8, "num_beams": beams}
    expected = []
    for name, question in zip(ROWS, QUESTIONS, strict=True):
        with mmpeft.use(model, name):
            expected += model.generate([question], **options)
    assert len(set(expected)) == 3
    with mmpeft.use(model, rows=ROWS):
        assert model.generate(QUESTIONS, **options) == expected
        assert model.generate(QUESTIONS, batch_size=2, **options) == expected
