"""Tiny random models of every library, saved once to folders in the library's own format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "<s>", "</s>", "what", "digit", "is", "this", "seven", "two", "a", "?"]


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A coloured, non-square picture."""
    values = np.random.default_rng(0).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of 14 words with a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="</s>",
        bos_token="<s>",
        model_max_length=24,
    )


def _vision(models: Path, name: str, model, processor) -> str:
    model.save_pretrained(models / name)
    processor.save_pretrained(models / name)
    return str(models / name)


@pytest.fixture(scope="session")
def hf_vision(models: Path) -> dict[str, str]:
    """Folders of tiny CLIP (both towers), SigLIP (both towers), DINOv2, ViT and ResNet models."""
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    image = {**small, "image_size": 32, "patch_size": 8}
    text = {**small, "vocab_size": 20, "max_position_embeddings": 12}
    clip = t.CLIPModel(t.CLIPConfig(text_config={**text, "eos_token_id": 5}, vision_config=image, projection_dim=16))
    siglip = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=image))
    dino = t.Dinov2Model(
        t.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
    )
    vit = t.ViTModel(t.ViTConfig(**image), add_pooling_layer=False)
    resnet = t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    square = {"size": {"height": 32, "width": 32}}
    return {
        "clip": _vision(models, "clip", clip, t.CLIPImageProcessor(**crop)),
        "siglip": _vision(models, "siglip", siglip, t.SiglipImageProcessor(**square)),
        "dinov2": _vision(
            models,
            "dinov2",
            dino,
            t.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
        ),
        "vit": _vision(models, "vit", vit, t.ViTImageProcessor(**square)),
        "resnet": _vision(models, "resnet", resnet, t.ViTImageProcessor(**square)),
    }


@pytest.fixture(scope="session")
def hf_audio(models: Path) -> dict[str, str]:
    """Folders of tiny Whisper, wav2vec 2.0 (GroupNorm and LayerNorm), HuBERT, WavLM and data2vec models."""
    import transformers as t

    torch.manual_seed(0)
    wave = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2),
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 3,
    }  # fmt: skip
    made = {
        "wav2vec2": t.Wav2Vec2Model(t.Wav2Vec2Config(**wave)),
        "wav2vec2-layer": t.Wav2Vec2Model(
            t.Wav2Vec2Config(**wave, feat_extract_norm="layer", do_stable_layer_norm=True)
        ),
        "hubert": t.HubertModel(t.HubertConfig(**wave)),
        "wavlm": t.WavLMModel(t.WavLMConfig(**wave, num_buckets=32)),
        "data2vec": t.Data2VecAudioModel(t.Data2VecAudioConfig(**wave, conv_pos_kernel_size=5)),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = _vision(models, name, model, t.Wav2Vec2FeatureExtractor(do_normalize=True))
    whisper = t.WhisperModel(
        t.WhisperConfig(
            d_model=32, encoder_layers=3, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=20, max_source_positions=100, vocab_size=50,
            max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip
    folders["whisper"] = _vision(models, "whisper", whisper, t.WhisperFeatureExtractor(feature_size=20, chunk_length=2))
    return folders


@pytest.fixture(scope="session")
def hf_text(models: Path, tokenizer) -> dict[str, str]:
    """Folders of tiny BERT, RoBERTa, T5 and GPT-2 models with their tokenizer."""
    import transformers as t

    torch.manual_seed(0)
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 20,
    }
    made = {
        "bert": t.BertModel(t.BertConfig(**small, max_position_embeddings=16, pad_token_id=1)),
        "roberta": t.RobertaForMaskedLM(t.RobertaConfig(**small, max_position_embeddings=18, pad_token_id=1)),
        "t5": t.T5Model(
            t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=20, pad_token_id=1)
        ),
        "gpt2": t.GPT2Model(t.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=16, vocab_size=20)),
    }
    for name, model in made.items():
        _vision(models, name, model, tokenizer)
    return {name: str(models / name) for name in made}


@pytest.fixture(scope="session")
def llama(models: Path, tokenizer) -> str:
    """The folder of a tiny Llama with its tokenizer."""
    import transformers as t

    torch.manual_seed(0)
    model = t.LlamaForCausalLM(
        t.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=20, max_position_embeddings=64, bos_token_id=4, eos_token_id=5,
        )
    )  # fmt: skip
    return _vision(models, "llama", model, tokenizer)


@pytest.fixture(scope="session")
def timm_folder(models: Path) -> str:
    """A tiny ViT saved as timm saves for the hub."""
    import timm

    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args)
    folder = models / "timm"
    timm.models.save_for_hf(model, folder, model_args=args, safe_serialization=True)
    return str(folder)


@pytest.fixture(scope="session")
def open_clip_folders(models: Path) -> dict[str, str]:
    """Tiny CLIPs with a ViT, a ResNet and a timm trunk, and one whose text tower sees all its tokens, as open_clip saves them."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    both_ways = {**text, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    vit = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
    vision = {
        "open_clip": (vit, text, {}),
        "open_clip-resnet": ({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}, text, {}),
        "open_clip-timm": (
            {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": "linear"}, both_ways,
            {"custom_text": True},
        ),
    }  # fmt: skip
    pre = {"mean": [0.48, 0.45, 0.4], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic", "resize_mode": "shortest"}
    for name, (vision_cfg, text_cfg, more) in vision.items():
        config = {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
        model = (open_clip.CustomTextCLIP if more else open_clip.CLIP)(**config)
        folder = models / name
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": {**config, **more}, "preprocess_cfg": pre})
        )
    return {name: str(models / name) for name in vision}


@pytest.fixture(scope="session")
def open_clip_folder(open_clip_folders: dict[str, str]) -> str:
    return open_clip_folders["open_clip"]
