"""Real model families, tiny and random: LoRA on all their weights through `**` patterns, proved live by `attach`."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import assert_same_object, close, deltas, fill, snapshot

import mmpeft
from mmpeft.adapters.example import example_of
from mmpeft.adapters.liveness import as_call, tensors_in

LORA = mmpeft.LoRA(rank=2, alpha=4)


def _timm(name, match, **kwargs):
    def make():
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=5, **kwargs)

    return make, match


def _open_clip(siglip: bool, match: str):
    def make():
        open_clip = pytest.importorskip("open_clip")
        text = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=2)
        vision = dict(image_size=32, patch_size=16, width=16, layers=2, head_width=8)
        if not siglip:
            return open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)
        vision = dict(
            image_size=160, timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="map", timm_proj="none"
        )
        text |= dict(no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs={"eps": 1e-6})
        return open_clip.CustomTextCLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, init_logit_bias=-10.0)

    return make, match


SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT = SMALL | dict(vocab_size=60, max_position_embeddings=32)
VISION = SMALL | dict(image_size=16, patch_size=8)


def _hf(model: str, config: str, match: str, **kwargs):
    def make():
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**kwargs))

    return make, match


def _torchaudio():
    torchaudio = pytest.importorskip("torchaudio")
    return torchaudio.models.wav2vec2_model(
        extractor_mode="group_norm", extractor_conv_layer_config=[(8, 10, 5), (8, 3, 2), (8, 3, 2)],
        extractor_conv_bias=False,
        encoder_embed_dim=16, encoder_projection_dropout=0.0, encoder_pos_conv_kernel=7, encoder_pos_conv_groups=2,
        encoder_num_layers=2, encoder_num_heads=2, encoder_attention_dropout=0.0, encoder_ff_interm_features=24,
        encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_norm_first=False, encoder_layer_drop=0.1,
        aux_num_out=None,
    )  # fmt: skip


WHISPER = dict(
    vocab_size=60, num_mel_bins=8, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10, max_target_positions=12,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
WAV2VEC2 = SMALL | dict(
    vocab_size=30, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
    num_conv_pos_embeddings=7, num_conv_pos_embedding_groups=2, layerdrop=0.1,
)  # fmt: skip

# `**` alone is every module that has a matrix.
MODELS = {
    "timm-vit": _timm("vit_tiny_patch16_224", "**", img_size=32, depth=2, embed_dim=32, num_heads=2),
    "timm-vit-qv": _timm(
        "vit_tiny_patch16_224", "blocks.*.attn.qkv[q,v]", img_size=32, depth=2, embed_dim=32, num_heads=2
    ),
    "timm-eva02": _timm("eva02_tiny_patch14_224", "**", img_size=28, depth=2),
    "timm-beit": _timm("beit_base_patch16_224", "**", img_size=32, depth=2, embed_dim=32, num_heads=2),
    "timm-swin": _timm(
        "swin_tiny_patch4_window7_224", "**", img_size=56, depths=(2, 2), embed_dim=16, num_heads=(2, 2), window_size=7
    ),
    "timm-convnext": _timm("test_convnext", "**"),
    "timm-efficientnet": _timm("test_efficientnet", "**"),
    "open-clip": _open_clip(False, "**"),
    "open-clip-out-proj": _open_clip(False, "**.out_proj"),
    "open-clip-qv": _open_clip(False, "**.attn[q,v]"),
    "open-clip-siglip": _open_clip(True, "**"),
    "hf-siglip2": _hf(
        "Siglip2Model",
        "Siglip2Config",
        "**",
        text_config=TEXT,
        vision_config=SMALL | dict(patch_size=4, num_patches=16),
    ),
    "hf-siglip": _hf("SiglipModel", "SiglipConfig", "**", text_config=TEXT, vision_config=VISION),
    "hf-clip": _hf(
        "CLIPModel", "CLIPConfig", "**", text_config=TEXT | dict(eos_token_id=2), vision_config=VISION, projection_dim=8
    ),
    "hf-dinov2": _hf("Dinov2Model", "Dinov2Config", "**", **VISION),
    "hf-llama": _hf("LlamaForCausalLM", "LlamaConfig", "**", **TEXT, num_key_value_heads=1),
    "hf-llama-tied": _hf("LlamaForCausalLM", "LlamaConfig", "**", **TEXT, tie_word_embeddings=True),
    "hf-qwen2": _hf(
        "Qwen2ForCausalLM", "Qwen2Config", "model.layers.**.{q,k,v,o,gate,up,down}_proj", **TEXT, num_key_value_heads=1
    ),
    "hf-gpt2": _hf(
        "GPT2LMHeadModel", "GPT2Config", "**", n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=32
    ),
    "hf-gpt2-qv": _hf(
        "GPT2LMHeadModel", "GPT2Config", "**.c_attn[q,v]", n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=32
    ),
    "hf-roberta": _hf(
        "RobertaForSequenceClassification", "RobertaConfig", "**", **TEXT | dict(max_position_embeddings=34)
    ),
    "hf-whisper": _hf("WhisperForConditionalGeneration", "WhisperConfig", "**", **WHISPER),
    "hf-wav2vec2": _hf("Wav2Vec2Model", "Wav2Vec2Config", "**", **WAV2VEC2),
    "hf-phi3": _hf("Phi3ForCausalLM", "Phi3Config", "**.qkv_proj[q,v]", **TEXT, num_key_value_heads=1, pad_token_id=0),
    "hf-mixtral": _hf(
        "MixtralForCausalLM",
        "MixtralConfig",
        "**",
        **TEXT,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
    "torchaudio-wav2vec2": (_torchaudio, "**"),
}


def _outputs(model, call):
    args, kwargs = call
    return [t.clone() for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()]


def _all_close(a, b, tolerance=1e-5):
    return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_family(name):
    make, match = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
    call = as_call(example_of(model))
    before = snapshot(model)
    keys = list(model.state_dict())
    with torch.no_grad():
        plain = _outputs(model, call)
    mmpeft.attach(model, {match: LORA}, name="a")  # proves every site, or raises
    assert len(deltas(model)) >= 2
    fill(model, size=0.1)
    with torch.no_grad():
        model.eval()
        y = _outputs(model, call)
        assert not _all_close(y, plain, 1e-3)
        with mmpeft.use(model, None):
            assert _all_close(_outputs(model, call), plain, 2e-6)
        mmpeft.merge(model)
        assert _all_close(_outputs(model, call), y)
        mmpeft.unmerge(model)
        assert all(torch.equal(a, b) for a, b in zip(_outputs(model, call), y, strict=True))
    model.train()
    trained = _outputs(model, call)
    assert _all_close([t.detach() for t in trained], y, 1e-4), "train and eval disagree"
    assert [k for k in model.state_dict() if "_adapters" not in k] == keys
    mmpeft.detach(model)
    assert_same_object(before, snapshot(model))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(_outputs(model, call), plain, strict=True))
