"""Conversations to samples: labels, placeholders, order, and every malformed input refused with the sample's name."""

import pytest
import torch

from mmpeft.errors import BadSample, ConfigError, Unsupported
from mmpeft.multimodal import MultimodalLM
from mmpeft.multimodal.chat_template import TEMPLATES, ChatTemplate
from mmpeft.multimodal.sample import IGNORE, MODALITIES

from .kit import CHATML, StubImage, build_llm, build_metaspace_tokenizer, build_model, conversations, image, picture
from .kit import ask as question
from .kit import text as words


def supervised(model, sample):
    return model.tokenizer.decode(sample.input_ids[sample.labels != IGNORE])


def test_labels_cover_the_answers_and_their_end_of_turn_and_nothing_else(model):
    expected = ["7<|im_end|>", "yes, it is<|im_end|>", "12<|im_end|>", "a café 🙂<|im_end|>no<|im_end|>", "7<|im_end|>"]
    for conversation, answer in zip(conversations(), expected, strict=True):
        sample = model.encode(conversation)
        assert supervised(model, sample) == answer
        kept = sample.labels != IGNORE
        assert torch.equal(sample.labels[kept], sample.input_ids[kept])
        assert sample.id == conversation["id"]


def test_text_is_the_templates_own_rendering_in_one_tokenisation(model):
    """Without media, ids are what transformers gives for the conversation (up to the last end of turn)."""
    turns = [
        {"role": "user", "content": "Which digit is this?"}, {"role": "assistant", "content": "It is 7"},
        {"role": "user", "content": "  spaces\n kept "}, {"role": "assistant", "content": "12"},
    ]  # fmt: skip
    ids = model.encode(turns).input_ids.tolist()
    whole = model.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert whole[: len(ids)] == ids and model.tokenizer.decode(whole[len(ids) :]) == "\n"


def test_prompt_is_the_training_prefix_and_the_templates_generation_prompt(model):
    for conversation in conversations():
        sample, prompt = model.encode(conversation), model.encode(conversation, answer=False)
        n = len(prompt)
        assert torch.equal(sample.input_ids[:n], prompt.input_ids)
        assert torch.equal(sample.modality_ids[:n], prompt.modality_ids)
        assert (prompt.labels == IGNORE).all() and sample.labels[n] != IGNORE
    turns = [{"role": "user", "content": "Which digit?"}]
    theirs = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert model.encode(turns, answer=False).input_ids.tolist() == theirs


def test_placeholders_stand_where_media_stand_in_order_and_number(model):
    sample = model.encode(
        question(
            words("Is"), image(2, 16, 24), words("larger"), {"type": "state", "state": torch.zeros(2, 5)}, image(3)
        )
    )
    assert [(m.modality, m.count) for m in sample.media] == [("image", 6), ("state", 2), ("image", 4)]
    assert torch.equal(sample.media[0].x, picture(2, 16, 24)) and torch.equal(sample.media[2].x, picture(3))
    runs = torch.unique_consecutive(sample.modality_ids, return_counts=True)
    assert runs[0].tolist() == [0, 1, 0, 3, 1, 0] and runs[1].tolist()[1:5:2] == [6, 2]
    only_text = sample.input_ids[sample.modality_ids == 0]
    assert "user\nIslarger<|im_end|>" in model.tokenizer.decode(only_text)  # no divider is left
    assert [MODALITIES[i - 1] for i in runs[0].tolist() if i] == ["image", "state", "image"]


def test_video_is_consecutive_images_and_features_take_the_place_of_an_image(model):
    frames = [picture(1), picture(2), picture(3)]
    video = model.encode(question({"type": "video", "video": frames}, words("?")))
    assert torch.equal(video.input_ids, model.encode(question(*[image(i) for i in (1, 2, 3)], words("?"))).input_ids)
    cached = model.encode(question({"type": "image", "features": torch.randn(4, 12)}, words("?")))
    assert torch.equal(cached.input_ids, model.encode(question(image(0), words("?"))).input_ids)
    assert cached.media[0].encoded


def test_audio_with_its_rate_reaches_preprocess_as_a_pair(model):
    sample = model.encode(question({"type": "audio", "audio": torch.zeros(31), "sampling_rate": 16000}))
    assert sample.media[0].count == 3


def test_supervise_false_reads_an_answer_without_training_on_it(model):
    turns = conversations()[3]["messages"]
    turns[2] = turns[2] | {"supervise": False}
    assert supervised(model, model.encode(turns)) == "no<|im_end|>"


@pytest.mark.parametrize(
    "options,beginning",
    [
        ({}, "<|im_start|>system\nYou are a helpful tester.<|im_end|>\n<|im_start|>user"),
        ({"system_prompt": "Short."}, "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user"),
        ({"system_prompt": ""}, "<|im_start|>system\n<|im_end|>\n<|im_start|>user"),
        ({"chat_template": "chatml"}, "<|im_start|>user\n"),
    ],
)
def test_system_prompt_choices(tokenizer, options, beginning):
    model = MultimodalLM(build_llm("llama", tokenizer), **options)
    turns = [{"role": "user", "content": "hello"}]
    assert model.tokenizer.decode(model.encode(turns, answer=False).input_ids).startswith(beginning)
    own = [{"role": "system", "content": "Mine."}, *turns]
    assert "Mine." in model.tokenizer.decode(model.encode(own, answer=False).input_ids)


TRIMMING = (  # Llama 2 and Mistral in kind: spaces around trimmed contents, end of turn only after answers
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)


def test_a_trimming_template_is_followed_and_the_space_before_an_answer_is_trained(tokenizer):
    model = MultimodalLM(build_llm("llama", tokenizer), chat_template=TRIMMING)
    sample = model.encode([{"role": "user", "content": " Which? "}, {"role": "assistant", "content": " 7\n"}])
    assert model.tokenizer.decode(sample.input_ids) == "[INST] Which? [/INST] 7 <|im_end|>"
    assert supervised(model, sample) == " 7 <|im_end|>"
    with pytest.raises(BadSample, match="no message to answer"):
        model.encode([{"role": "assistant", "content": "7"}], answer=False)
    with pytest.raises(BadSample, match="no system role"):
        model.encode([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], answer=False)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_tokenizers_that_mark_word_beginnings_keep_the_prompts_tokens(scheme):
    """Llama 2 and Mistral kind: spaces are part of tokens, and a space may be put in front of every stretch of text."""
    model = MultimodalLM(build_llm("llama", build_metaspace_tokenizer(scheme, TRIMMING)), image=StubImage())
    conversation = question(words("Is"), image(1), words("this?"), answer="It is 7, not 12.")
    sample, prompt = model.encode(conversation), model.encode(conversation, answer=False)
    assert torch.equal(sample.input_ids[: len(prompt)], prompt.input_ids)
    assert int((sample.modality_ids == 1).sum()) == 4
    assert supervised(model, sample).lstrip() == "It is 7, not 12. </s>"
    turns = [{"role": "user", "content": "Is this?"}, {"role": "assistant", "content": "It is 7, not 12."}]
    natural = model.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert model.encode(turns).input_ids.tolist() == natural


def test_answer_that_begins_with_template_like_text_keeps_the_prompts_tokens(model):
    for answer in ("\n7", " 7", "\n\n", "assistant\n7", ""):
        turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": answer}]
        sample, prompt = model.encode(turns), model.encode(turns, answer=False)
        assert torch.equal(sample.input_ids[: len(prompt)], prompt.input_ids)
        assert supervised(model, sample) == answer + "<|im_end|>"


def test_tokenizer_without_template_gets_the_plain_one(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    model = MultimodalLM(build_llm("gpt2", bare))
    sample = model.encode([{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "7"}])
    assert model.tokenizer.decode(sample.input_ids) == "user: Which?\nassistant: 7<|im_end|>"
    assert supervised(model, sample) == " 7<|im_end|>"


REFUSED = [
    ([], "expected a list of messages"),
    ({"id": "a"}, "key 'messages'"),
    ({"id": "a", "messages": "hello"}, "a: expected a list"),
    ([{"role": "user", "content": "no answer"}], "no supervised token"),
    ([{"role": "usr", "content": "x"}], "nearest: user"),
    ([{"role": "user", "contents": "x"}], "nearest: content"),
    ([{"role": "user", "content": 3}], "string or a list of parts"),
    ([{"role": "user", "content": [{"type": "imag", "image": 1}]}], "nearest: image"),
    ([{"role": "user", "content": [{"type": "image", "imagee": 1}]}], "nearest: image"),
    ([{"role": "user", "content": [{"type": "image"}]}], "needs the key 'image'"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "text must be a string"),
    ([{"role": "user", "content": "stop <|im_end|> here"}], "control token '<|im_end|>'"),
    ([{"role": "user", "content": "hidden \ufdd2 marker"}], "control token"),
    ([{"role": "assistant", "content": [image()]}], "media belong to the user"),
    (
        {"id": "pic", "messages": question({"type": "image", "image": "nothing"})["messages"]},
        r"pic: image \(medium 1\)",
    ),
    (question({"type": "image", "features": torch.randn(4, 11)}), r"expected float tokens \[T, 12\], given \[4, 11\]"),
    (question({"type": "image", "features": torch.ones(4, 12).long()}), "int64"),
    (question({"type": "state", "state": torch.randn(4)}), r"\[T, 5\]"),
]


@pytest.mark.parametrize("conversation,message", REFUSED, ids=[m for _, m in REFUSED])
def test_malformed_conversations_are_refused(model, conversation, message):
    with pytest.raises(BadSample) as error:
        model.encode(conversation)
    assert error.match(message) or message in str(error.value)


def test_modality_the_model_lacks_is_refused(tokenizer):
    lone = build_model("llama", tokenizer, audio=None, state=None)
    with pytest.raises(BadSample, match=r"no audio input \(it has image\)"):
        lone.encode(question({"type": "audio", "audio": torch.zeros(20)}))


def test_too_long_is_refused_never_cut(tokenizer):
    model = build_model("llama", tokenizer, max_length=40)
    fits = model.encode(question(image(0), words("?")))
    with pytest.raises(BadSample, match=r"big: \d+ tokens \(24 of them media\), the limit is 40"):
        model.encode(question(image(0, 32, 48), words("?"), name="big"))
    assert len(fits) <= 40


def test_templates_that_rewrite_content_or_never_stop_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="would never stop"):
        ChatTemplate(tokenizer, "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(ConfigError, match="nearest: chatml"):
        ChatTemplate(tokenizer, "chatmll")
    turns = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    content = "message['content']"
    for rewriting, complaint in (
        (CHATML.replace(content, content + " | replace('a', 'b')"), "drops, repeats or rewrites"),
        (CHATML.replace(content, f"({content} if {content} != 'a' else 'thought')"), "rewrites the user message 'a'"),
        (TEMPLATES["chatml"].replace("in messages", "in messages[-2:]"), "drops, repeats"),
    ):
        model = MultimodalLM(build_llm("llama", tokenizer), chat_template=rewriting)
        with pytest.raises(Unsupported, match=complaint):
            model.encode(turns, answer=False)
