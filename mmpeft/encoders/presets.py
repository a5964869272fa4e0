"""Architectures without weights: what `mmpeft inspect --meta NAME` builds on the meta device, offline.

    hf:FacebookAI/roberta-large      a row of PRESETS, which holds what the hub's config.json says of the sizes
    hf:FOLDER, FOLDER                a folder with transformers' config.json
    timm:vit_base_patch16_224        any name timm knows
    open_clip:ViT-B-32               any name open_clip knows

A preset is built by transformers from its configuration, so the module paths of a plan are those of the real model.
Fields that are left out have transformers' defaults for the family, which are the original model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmpeft.errors import ConfigError, FileFormatError, NameNotFound, nearest, require


def _sizes(hidden: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    """The four sizes under the names most families give them."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner,
    } | more  # fmt: skip


def _roberta(*sizes: int) -> tuple[str, str, dict[str, Any]]:
    fields = _sizes(*sizes, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return "RobertaModel", "roberta", fields | {"layer_norm_eps": 1e-5, "pad_token_id": 1}


def _bert(*sizes: int) -> tuple[str, str, dict[str, Any]]:
    return "BertModel", "bert", _sizes(*sizes, vocab_size=30522)


def _llama(vocabulary: int, kv_heads: int, *sizes: int, tied: bool = False) -> tuple[str, str, dict[str, Any]]:
    fields = _sizes(*sizes, vocab_size=vocabulary, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    return "LlamaForCausalLM", "llama", fields


def _qwen2(vocabulary: int, kv_heads: int, *sizes: int, tied: bool) -> tuple[str, str, dict[str, Any]]:
    fields = _sizes(*sizes, vocab_size=vocabulary, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    return "Qwen2ForCausalLM", "qwen2", fields


def _towers(kind: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> tuple[str, str, dict[str, Any]]:
    return f"{kind}Model", kind.lower(), {"text_config": text, "vision_config": vision} | more


def _siglip(patch: int, image: int, vocabulary: int, *sizes: int) -> tuple[str, str, dict[str, Any]]:
    text = _sizes(*sizes, vocab_size=vocabulary, max_position_embeddings=64, projection_size=sizes[0])
    text |= {"bos_token_id": None, "eos_token_id": None}  # the defaults are CLIP's, beyond this vocabulary
    return _towers("Siglip", text, _sizes(*sizes, patch_size=patch, image_size=image))


def _clip(patch: int, image: int, width: int, text: tuple[int, ...], vision: tuple[int, ...]) -> Any:
    vision_fields = _sizes(*vision, patch_size=patch, image_size=image, projection_dim=width)
    return _towers("CLIP", _sizes(*text, projection_dim=width), vision_fields, projection_dim=width)


def _whisper(width: int, layers: int, heads: int, mels: int = 80, vocabulary: int = 51865) -> Any:
    fields: dict[str, Any] = {"d_model": width, "vocab_size": vocabulary, "num_mel_bins": mels}
    for side in ("encoder", "decoder"):
        fields |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": 4 * width}
    return "WhisperModel", "whisper", fields


_SO400M = (1152, 27, 16, 4304)

# name: (class, family, fields)
PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "FacebookAI/roberta-base": _roberta(768, 12, 12, 3072),
    "FacebookAI/roberta-large": _roberta(1024, 24, 16, 4096),
    "google-bert/bert-base-uncased": _bert(768, 12, 12, 3072),
    "google-bert/bert-large-uncased": _bert(1024, 24, 16, 4096),
    "google-t5/t5-base": ("T5Model", "t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "openai-community/gpt2": ("GPT2LMHeadModel", "gpt2", {}),
    "HuggingFaceTB/SmolLM2-135M": _llama(49152, 3, 576, 30, 9, 1536, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _llama(49152, 5, 960, 32, 15, 2560, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(49152, 32, 2048, 24, 32, 8192, tied=True),
    "Qwen/Qwen2.5-0.5B": _qwen2(151936, 2, 896, 24, 14, 4864, tied=True),
    "Qwen/Qwen2.5-1.5B": _qwen2(151936, 2, 1536, 28, 12, 8960, tied=True),
    "Qwen/Qwen2.5-3B": _qwen2(151936, 2, 2048, 36, 16, 11008, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(152064, 4, 3584, 28, 28, 18944, tied=False),
    "meta-llama/Llama-2-7b-hf": _llama(32000, 32, 4096, 32, 32, 11008),
    "meta-llama/Llama-2-13b-hf": _llama(32000, 40, 5120, 40, 40, 13824),
    "meta-llama/Llama-3.1-8B": _llama(128256, 8, 4096, 32, 32, 14336),
    "mistralai/Mistral-7B-v0.1": (
        "MistralForCausalLM", "mistral", _sizes(4096, 32, 32, 14336, vocab_size=32000, num_key_value_heads=8),
    ),
    "EleutherAI/gpt-j-6b": ("GPTJForCausalLM", "gptj", {"vocab_size": 50400}),
    "bigscience/bloom-7b1": (
        "BloomForCausalLM", "bloom", {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
    ),
    "google/vit-base-patch16-224": ("ViTModel", "vit", {}),
    "facebook/dinov2-base": ("Dinov2Model", "dinov2", {"image_size": 518, "patch_size": 14}),
    "google/siglip-so400m-patch14-384": _siglip(14, 384, 32000, *_SO400M),
    "google/siglip-base-patch16-224": _siglip(16, 224, 32000, 768, 12, 12, 3072),
    "google/siglip2-base-patch16-224": _siglip(16, 224, 256000, 768, 12, 12, 3072),
    "google/siglip2-so400m-patch14-384": _siglip(14, 384, 256000, *_SO400M),
    "openai/clip-vit-base-patch32": _clip(32, 224, 512, (512, 12, 8, 2048), (768, 12, 12, 3072)),
    "openai/clip-vit-large-patch14": _clip(14, 224, 768, (768, 12, 12, 3072), (1024, 24, 16, 4096)),
    "openai/whisper-base": _whisper(512, 6, 8),
    "openai/whisper-small": _whisper(768, 12, 12),
    "openai/whisper-large-v3": _whisper(1280, 32, 20, 128, 51866),
    "facebook/wav2vec2-base": ("Wav2Vec2Model", "wav2vec2", {}),
}  # fmt: skip


def meta_model(name: str, *, labels: int | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The architecture of `name` on the meta device: no weights, no memory, no network.

    Args:
        name: "hf:ID" of `PRESETS`, a folder with config.json (with or without "hf:"), "timm:NAME" or "open_clip:NAME".
        labels: with a classification head of this many labels (for transformers, ...ForSequenceClassification).
        dtype: of the weights.

    Raises:
        NameNotFound: no such preset, folder or architecture, with the nearest names.
        ConfigError: a model that takes no head.
        FileFormatError: a folder without a readable config.json.
    """
    source, colon, rest = name.partition(":")
    if not colon or source not in _SOURCES:
        if not Path(name).is_dir():
            raise NameNotFound(
                f"{name!r} is no folder and no name with a source ({', '.join(s + ':' for s in _SOURCES)})"
                + nearest(name, [n for preset in PRESETS for n in (preset, f"hf:{preset}")])
            )
        source, rest = "hf", name
    with torch.device("meta"):
        model: nn.Module = _SOURCES[source](rest, labels)
        return model.to("meta", dtype)  # wav2vec 2.0 makes one tensor by other means


POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # tables of learned positions


def longest(model: nn.Module) -> int | None:
    """Tokens that a model with learned positions takes at most; None for one without."""
    tables = [
        m.num_embeddings - (0 if m.padding_idx is None else m.padding_idx + 1)  # RoBERTa counts from there
        for path, m in model.named_modules()
        if path.rpartition(".")[2] in POSITIONS and isinstance(m, nn.Embedding)
    ]
    return min(tables, default=None)


def _transformers(name: str, labels: int | None) -> Any:
    transformers: Any = require("transformers", "text")
    cls_name, config = _config(transformers, name)
    if labels is not None:
        config.num_labels = labels
        try:
            return transformers.AutoModelForSequenceClassification.from_config(config)
        except ValueError as error:
            raise ConfigError(f"{name}: transformers has no classifier of sequences over a {cls_name}") from error
    cls = getattr(transformers, cls_name, None)
    if cls is None:
        raise NameNotFound(f"{name}: transformers {transformers.__version__} has no class {cls_name!r}")
    return cls(config)


def _config(transformers: Any, name: str) -> tuple[str, Any]:
    """(class, configuration) of a preset or a folder."""
    if name in PRESETS:
        cls_name, family, fields = PRESETS[name]
        return cls_name, transformers.AutoConfig.for_model(family, **fields)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        short = {preset.rpartition("/")[2].lower(): preset for preset in PRESETS}
        same = short.get(name.rpartition("/")[2].lower())
        close = f" (nearest: {same})" if same else nearest(name, [*PRESETS, *short])
        raise NameNotFound(
            f"no preset and no folder {name!r}{close}; presets: {', '.join(PRESETS)}. For another model give a folder "
            "with its config.json"
        )
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise FileFormatError(f"{str(folder)!r} has no config.json that transformers reads: {error}") from error
    named = raw.get("architectures") or []
    if not named:
        raise FileFormatError(f"{str(folder / 'config.json')!r} names no class under 'architectures'")
    return named[0], config


def _timm(name: str, labels: int | None) -> Any:
    timm: Any = require("timm", "vision")
    if not timm.is_model(name):
        raise NameNotFound(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False, **({} if labels is None else {"num_classes": labels}))


def _open_clip(name: str, labels: int | None) -> Any:
    open_clip: Any = require("open_clip", "vision")
    if labels is not None:
        raise ConfigError(f"{name}: an open_clip model takes no head")
    if name not in open_clip.list_models():
        raise NameNotFound(f"open_clip has no model {name!r}{nearest(name, open_clip.list_models())}")
    config = open_clip.get_model_config(name)
    custom = config.pop("custom_text", False) or "hf_model_name" in config.get("text_cfg", {})
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


_SOURCES = {"hf": _transformers, "timm": _timm, "open_clip": _open_clip}
