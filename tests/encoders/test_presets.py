"""Architecture presets: parameter counts are those of the published checkpoints, names are helped, nothing is loaded."""

import json

import pytest
import torch

from mmpeft.encoders.presets import PRESETS, meta_model
from mmpeft.errors import ConfigError, FileFormatError, NameNotFound

pytest.importorskip("transformers")

PUBLISHED = {
    "FacebookAI/roberta-base": 124_645_632,
    "FacebookAI/roberta-large": 355_359_744,
    "google-bert/bert-base-uncased": 109_482_240,
    "google-bert/bert-large-uncased": 335_141_888,
    "google-t5/t5-base": 222_903_552,
    "openai-community/gpt2": 124_439_808,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "bigscience/bloom-7b1": 7_069_016_064,
    "google/vit-base-patch16-224": 86_389_248,
    "facebook/dinov2-base": 86_580_480,
    "google/siglip-base-patch16-224": 203_155_970,
    "google/siglip2-base-patch16-224": 375_187_970,
    "google/siglip-so400m-patch14-384": 877_960_498,
    "google/siglip2-so400m-patch14-384": 1_136_008_498,
    "openai/clip-vit-base-patch32": 151_277_313,
    "openai/clip-vit-large-patch14": 427_616_513,
    "openai/whisper-base": 72_593_920,
    "openai/whisper-small": 241_734_912,
    "openai/whisper-large-v3": 1_543_490_560,
    "facebook/wav2vec2-base": 94_371_712,
}


def numbers(model):
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in model.parameters())


def test_every_preset_has_the_published_number_of_parameters():
    assert set(PUBLISHED) == set(PRESETS)
    assert {name: numbers(meta_model(f"hf:{name}")) for name in PRESETS} == PUBLISHED


def test_a_head_and_a_dtype():
    model = meta_model("hf:FacebookAI/roberta-base", labels=2, dtype=torch.bfloat16)
    # The classifier (dense 768 x 768, then 2 labels) takes the pooler's place.
    assert numbers(model) == 124_645_632 + 2 * 768 + 2 and next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="no classifier"):
        meta_model("hf:openai/whisper-small", labels=2)


def test_names_of_timm_and_open_clip():
    pytest.importorskip("timm")
    assert numbers(meta_model("timm:vit_base_patch16_224")) == 86_567_656
    assert numbers(meta_model("timm:vit_base_patch16_224", labels=10)) == 86_567_656 - 990 * 769
    pytest.importorskip("open_clip")
    assert numbers(meta_model("open_clip:ViT-B-32")) == 151_277_313
    with pytest.raises(NameNotFound, match="nearest: vit_base_patch16_224"):
        meta_model("timm:vit_bas_patch16_224")
    with pytest.raises(NameNotFound, match="nearest: ViT-B-32"):
        meta_model("open_clip:ViT-B-33")
    with pytest.raises(ConfigError, match="takes no head"):
        meta_model("open_clip:ViT-B-32", labels=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:FacebookAI/roberta-larg", "nearest: FacebookAI/roberta-large"),
        ("hf:Llama-2-7b-hf", "nearest: meta-llama/Llama-2-7b-hf"),
        ("hf:llama-2-7", "nearest: llama-2-7b-hf"),
        ("hf:smollm2-135m", "nearest: HuggingFaceTB/SmolLM2-135M"),
        ("hf:nothing-like-it", r"no folder 'nothing-like-it'; presets: FacebookAI/roberta-base"),
        ("FacebookAI/roberta-large", "nearest: FacebookAI/roberta-large, hf:FacebookAI/roberta-large"),
        ("tim:vit_base_patch16_224", "hf:, timm:, open_clip:"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(name, message):
    with pytest.raises(NameNotFound, match=message):
        meta_model(name)


def test_a_folder_with_a_configuration(tmp_path):
    fields = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    expected = 2 * 50 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 16
    assert numbers(meta_model(str(tmp_path))) == numbers(meta_model(f"hf:{tmp_path}")) == expected
    (tmp_path / "config.json").write_text(json.dumps(fields | {"architectures": None}))
    with pytest.raises(FileFormatError, match="names no class"):
        meta_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FileFormatError, match="no config.json that transformers reads"):
        meta_model(str(tmp_path))
