"""Generation: KV cache equal to no cache, batch equal to alone, stopping, order, options refused."""

import pytest
import torch

from mmpeft.errors import ConfigError
from mmpeft.multimodal.generation import Options, generate_ids

from .kit import ask, build_model, conversations, image, text

ARCHITECTURES = ["llama", "qwen2", "gpt2", "gemma2", "opt", "bloom"]


@torch.no_grad()
def greedy_without_cache(model, sample, steps):
    """The plain loop: the whole sequence again for every token."""
    embeds, ids = model.embed(model.collate([sample])), []
    for _ in range(steps):
        token = model.llm(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()
        ids.append(int(token))
        if ids[-1] in model.conversations.stop_ids:
            break
        embeds = torch.cat([embeds, model.llm.get_input_embeddings()(token[None, None])], dim=1)
    return ids


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_left_padded_batch_with_cache_equals_each_alone_without(kind, tokenizer):
    model = build_model(kind, tokenizer)
    prompts = [model.encode(c, answer=False) for c in conversations()]
    assert len({len(p) for p in prompts}) > 2
    ids = generate_ids(model, model.collate(prompts, padding="left"), Options(max_new_tokens=12))
    texts = model.generate(conversations(), max_new_tokens=12)
    for row, prompt, answer in zip(ids.tolist(), prompts, texts, strict=True):
        expected = greedy_without_cache(model, prompt, 12)
        assert row[: len(expected)] == expected and len(expected) >= 3
        assert set(row[len(expected) :]) <= {model.conversations.stop_ids[0]}
        assert answer == model.tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_texts_keep_the_order_whatever_the_batch_size(model):
    expected = model.generate(conversations(), max_new_tokens=6)
    assert len(set(expected)) > 1
    assert model.generate(conversations(), max_new_tokens=6, batch_size=2) == expected
    assert model.generate(conversations()[::-1], max_new_tokens=6, batch_size=1) == expected[::-1]
    prompts = [model.encode(c, answer=False) for c in conversations()]
    assert model.generate(prompts, max_new_tokens=6) == expected
    assert model.chat(conversations()[1]["messages"], max_new_tokens=6) == expected[1]
    assert model.generate([]) == []


def test_the_image_decides_the_answer(model):
    answers = {model.chat(ask(image(i), text("?")), max_new_tokens=8) for i in range(4)}
    assert len(answers) > 1


def test_generation_stops_at_the_end_of_turn(tokenizer):
    """A head that always prefers the end of turn after the second token."""
    model = build_model("llama", tokenizer, llm_changes={"tie_word_embeddings": False})
    stop = model.conversations.stop_ids[0]
    assert model.tokenizer.decode([stop]) == "<|im_end|>"
    calls = []

    def prefer_stop(module, args, logits):
        calls.append(1)
        logits[..., stop] = 1e4 if len(calls) >= 3 else -1e4
        return logits

    handle = model.llm.lm_head.register_forward_hook(prefer_stop)
    ids = generate_ids(
        model,
        model.collate([model.encode(conversations()[0], answer=False)], padding="left"),
        Options(max_new_tokens=9),
    )
    handle.remove()
    assert len(calls) == 3 and ids.shape == (1, 3) and int(ids[0, -1]) == stop


def test_modes_and_default_settings_of_the_checkpoint_are_left_alone(tokenizer):
    model = build_model("llama", tokenizer)
    expected = model.generate(conversations()[:2], max_new_tokens=8)
    settings = model.llm.generation_config
    settings.repetition_penalty, settings.do_sample, settings.temperature, settings.top_k = 5.0, True, 3.0, 2
    model.train()
    modes = [m.training for m in model.modules()]
    assert model.generate(conversations()[:2], max_new_tokens=8) == expected  # a checkpoint's defaults do not leak in
    assert [m.training for m in model.modules()] == modes
    assert not any(m.training for m in model.encoders["image"].backbone.modules())


def test_sampling_and_beams(model):
    one = conversations()[0]
    torch.manual_seed(3)
    first = model.generate([one] * 4, max_new_tokens=6, temperature=2.0, top_k=50, top_p=0.9)
    torch.manual_seed(3)
    assert model.generate([one] * 4, max_new_tokens=6, temperature=2.0, top_k=50, top_p=0.9) == first
    assert len(set(first)) > 1
    greedy, beams = (model.generate([one], max_new_tokens=6, num_beams=n)[0] for n in (1, 4))
    assert log_probability(model, one, beams) >= log_probability(model, one, greedy) - 1e-4


@torch.no_grad()
def log_probability(model, conversation, answer):
    turns = [conversation["messages"][0], {"role": "assistant", "content": answer}]
    output = model(model.collate([model.encode(turns)]))
    return -output.loss_sum.item() / output.num_supervised


@pytest.mark.parametrize(
    "options,message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"top_k": 5}, "give a temperature"),
        ({"num_beams": 0}, "num_beams"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 400}, "do not fit the model's 256 positions"),
    ],
)
def test_wrong_options_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        model.generate(conversations()[:1], **options)


def test_right_padded_batch_is_refused(model):
    with pytest.raises(ConfigError, match="padding='left'"):
        generate_ids(model, model.collate([model.encode(conversations()[0])]), Options())
