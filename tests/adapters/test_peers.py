"""What other PEFT libraries get wrong, silently, case by case: here each has an effect in train and eval, and merges.

Measured on HF PEFT 0.21: no effect at all (BEiT and EVA qkv, open_clip's out_proj, SigLIP's pooling head), an effect in
training only (the encoder layer's fast path), another function than the layer's (dilation, padding modes, max_norm),
an error (depthwise and weight-normed convolutions), or a base that moves (BatchNorm statistics).
"""

from __future__ import annotations

import pytest
import torch
from cases import Host, base_output, close, deltas, fill
from torch import nn

import mmpeft
from mmpeft.adapters.example import example_of
from mmpeft.adapters.liveness import as_call, tensors_in

LORA = mmpeft.LoRA(rank=2, alpha=4)


def _timm(name, **kwargs):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=3, **kwargs)


def _siglip():
    transformers = pytest.importorskip("transformers")
    size = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**size))


def _open_clip():
    open_clip = pytest.importorskip("open_clip")
    vision = dict(image_size=32, patch_size=16, width=16, layers=1, head_width=8)
    return open_clip.CLIP(8, vision, dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1))


def _wav2vec2():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2),
        num_feat_extract_layers=2, num_conv_pos_embeddings=7, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def _conv(*args, **kwargs):
    return lambda: Host(nn.Conv2d(*args, **kwargs))


IMAGE = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))
SMALL = dict(depth=1, embed_dim=32, num_heads=2)
CASES = {
    "beit qkv": (_timm("beit_base_patch16_224", img_size=32, **SMALL), "blocks.*.attn.qkv", None),
    "eva qkv": (_timm("eva_giant_patch14_224", img_size=28, **SMALL), "blocks.*.attn.qkv", None),
    "fused qkv, q and v only": (
        _timm("vit_tiny_patch16_224", img_size=32, **SMALL), "blocks.*.attn.qkv[q,v]", None,
    ),
    "open_clip out_proj": (_open_clip, "**.out_proj", None),
    "open_clip in_proj by slice": (_open_clip, "**.attn[q,v]", None),
    "open_clip visual.proj": (_open_clip, "visual.proj", None),
    "siglip pooling head": (_siglip, "**.head.attention.out_proj", None),
    "encoder layer fast path": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        "{linear1,linear2,self_attn,self_attn.out_proj}", torch.randn(2, 3, 8),
    ),
    "depthwise conv": (_conv(4, 4, 3, groups=4), "site", IMAGE),
    "dilated conv": (_conv(4, 6, 3, dilation=2), "site", IMAGE),
    "reflect padding": (_conv(4, 6, 3, padding=2, padding_mode="reflect"), "site", IMAGE),
    "circular padding": (_conv(4, 6, 3, padding=2, padding_mode="circular"), "site", IMAGE),
    "transposed conv": (lambda: Host(nn.ConvTranspose2d(4, 6, 3, stride=2)), "site", IMAGE),
    "max_norm embedding": (lambda: Host(nn.Embedding(11, 6, max_norm=1.0)), "site", torch.randint(0, 11, (2, 5))),
    "wav2vec2 pos_conv_embed": (_wav2vec2, "**.pos_conv_embed.conv", None),
    "lstm": (lambda: nn.LSTM(5, 4, num_layers=2, batch_first=True), ".", torch.randn(2, 3, 5)),
}  # fmt: skip


def _output(model, call):
    """All floating outputs in one vector, at a scale of one."""
    found = [t.flatten() for t in tensors_in(model(*call[0], **call[1])) if t.is_floating_point()]
    return torch.cat([t / t.detach().abs().max() for t in found])


@pytest.mark.parametrize("name", CASES)
def test_peers_failures_work_here(name):
    make, match, x = CASES[name]
    model = make().eval()
    call = as_call(example_of(model) if x is None else x)
    with torch.no_grad():
        base = _output(model, call).clone()
    mmpeft.attach(model, {match: LORA}, name="a", example=x)
    fill(model)
    params = [p for d in deltas(model) for p in d.parameters()]
    outputs = []
    for mode in (True, False):
        model.train(mode)
        y = _output(model, call)
        gradients = torch.autograd.grad((y * torch.randn_like(y)).sum(), params)
        assert all(bool(g.any()) for g in gradients)
        outputs.append(y.detach())
    with torch.no_grad():
        outputs.append(_output(model, call))
        assert all(not close(y, base, 1e-3) and close(y, outputs[0]) for y in outputs)
        mmpeft.merge(model)
        assert close(_output(model, call), outputs[0])


def test_batch_norm_statistics_stay():
    model = _timm("test_efficientnet")().eval()
    x = example_of(model)
    base = base_output(model, x)
    mmpeft.attach(model, {"blocks.**.conv_pw": LORA})
    model.train()
    for _ in range(2):
        model(2 * x + 1)
    model.eval()
    with mmpeft.use(model, None):
        assert torch.equal(model(x), base)
