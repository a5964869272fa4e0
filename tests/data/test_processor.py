"""The digits through the loader and a (tiny, random) multimodal model: batches train, prompts generate."""

import pytest
import torch
from torch.utils.data import Subset

from mmpeft.data import ConversationProcessor, DigitsVQA, JsonLines, Loader
from mmpeft.data.processor import prompt_of
from mmpeft.errors import BadSample, ConfigError

pytest.importorskip("transformers")
pytest.importorskip("timm")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from mmpeft.encoders import LLM
    from mmpeft.multimodal import MultimodalLM

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<|mark|>")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["Which digit is this?"],
        trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    llm = LLM(LlamaForCausalLM(config).eval(), tokenizer, "tiny")
    return MultimodalLM(llm, image={"name": "random:timm:test_vit", "image_size": 64})


@pytest.fixture(scope="module")
def digits():
    return Subset(DigitsVQA("test", size=200), range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches(model, digits, workers):
    loader = Loader(digits, ConversationProcessor(model), batch_size=4, train=True, bucket=True, workers=workers)
    batches = list(loader)
    assert sorted(i for b in batches for i in b["ids"]) == sorted(digits[i]["id"] for i in range(12))
    for batch in batches:
        output = model(batch["inputs"])
        assert output.num_supervised >= 8 and torch.isfinite(output.loss_sum)  # an answer and an end of turn each


def test_packed_training_batches_have_the_loss_of_padded_ones(model, digits):
    def losses(row_length):
        processor = ConversationProcessor(model, row_length=row_length)
        batches = list(Loader(digits, processor, batch_size=4, train=True, shuffle=False, bucket=False))
        with torch.no_grad():
            return [model(b["inputs"]).loss_sum for b in batches], batches

    packed, batches = losses(200)
    padded, _ = losses(None)
    assert all(b["inputs"]["layout"] == "packed" and b["inputs"]["input_ids"].shape[0] < 4 for b in batches)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadSample, match="a row holds 20 tokens"):
        losses(20)
    with pytest.raises(ConfigError, match="row_length must be"):
        ConversationProcessor(model, row_length=0)


def test_evaluation_batches_answer_freely(model, digits):
    (batch,) = Loader(digits, ConversationProcessor(model), batch_size=12, train=False)
    assert [s["id"] for s in batch["samples"]] == batch["ids"] and len(batch["prompts"]) == 12
    answers = model.generate(list(batch["prompts"]), max_new_tokens=3)
    assert answers == model.generate([s["messages"] for s in batch["samples"]], max_new_tokens=3)
    assert model(batch["inputs"]).num_supervised > 12


def test_a_prompt_is_the_conversation_up_to_its_last_answer(model, digits):
    several = {
        "id": "turns",
        "messages": [
            *digits[0]["messages"],
            {"role": "user", "content": [{"type": "text", "text": "And 77?"}]},
            {"role": "assistant", "content": "Not 77."},
        ],
    }
    for sample in [*(digits[i] for i in range(12)), several]:
        cut, alone = prompt_of(model.encode(sample)), model.encode(sample, answer=False)
        assert cut.input_ids.tolist() == alone.input_ids.tolist()
        assert cut.modality_ids.tolist() == alone.modality_ids.tolist() and len(cut.media) == len(alone.media)
        assert not cut.num_supervised


def test_samples_without_answer_can_be_predicted_but_not_trained_on(model, files):
    (files / "ask.jsonl").write_text(
        '{"image": "a.png", "question": "What?"}\n{"image": "b.jpg", "question": "Who?"}\n'
    )
    data = JsonLines(files / "ask.jsonl")
    (batch,) = Loader(data, ConversationProcessor(model), batch_size=2, train=False)
    assert len(model.generate(list(batch["prompts"]), max_new_tokens=2)) == 2
    with pytest.raises(BadSample, match="no supervised token"):
        list(Loader(data, ConversationProcessor(model), batch_size=2, train=True))


def test_files_are_decoded_in_the_loader_and_named_when_broken(model, files):
    (files / "own.jsonl").write_text(
        "\n".join(f'{{"image": "{n}", "question": "What?", "answer": "x"}}' for n in ("a.png", "cut.png", "no.png"))
    )
    data, processor = JsonLines(files / "own.jsonl"), ConversationProcessor(model)
    with pytest.raises(BadSample, match=r"line 2.*cut\.png"):
        list(Loader(data, processor, batch_size=3, train=True))
    loader = Loader(data, processor, batch_size=3, train=True, on_bad="skip")
    assert [b["ids"] for b in loader] == [["own.jsonl, line 1"]]
    assert "cut.png" in loader.bad["JsonLines[1]"] and "no.png" in loader.bad["JsonLines[2]"]
    with pytest.raises(BadSample, match="too long, .* tokens, max_length is 10"):
        list(Loader(data, processor, batch_size=3, train=True, max_length=10))
