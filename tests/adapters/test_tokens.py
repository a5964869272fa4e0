"""Prompts: what enters leaves again, masks, rotary tables and the cache follow, and prompts learn."""

import pytest
import timm
import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

import mmpeft
from mmpeft.errors import NameNotFound, Unsupported

TOWER = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)  # fmt: skip


def fill(model, std=0.5):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in mmpeft.parameter_groups(model, lr=1.0):
            for p in group["params"]:
                p.copy_(std * torch.randn(p.shape, generator=generator))


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=2).eval()


def test_vpt_deep_is_the_papers_forward():
    model = vit()
    x = torch.randn(2, 3, 32, 32)
    mmpeft.attach(model, {"blocks": mmpeft.VPT(num_tokens=3)})
    fill(model)
    y = model.forward_features(x)
    prompts = [p for _, p in mmpeft.adapters.switch.adapter_parameters(model)]
    with torch.no_grad(), mmpeft.use(model, None):
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for block, P in zip(model.blocks, prompts, strict=True):
            tokens = torch.cat([tokens[:, :1], P.expand(2, -1, -1), tokens[:, 1:]], 1)
            tokens = block(tokens)
            tokens = torch.cat([tokens[:, :1], tokens[:, 4:]], 1)
        expected = model.norm(tokens)
    torch.testing.assert_close(y, expected)
    assert y.shape[1] == 1 + 4


def test_vpt_shallow_flows_through_all_blocks():
    model = vit()
    x = torch.randn(2, 3, 32, 32)
    mmpeft.attach(model, {"blocks": mmpeft.VPT(num_tokens=3, deep=False)})
    fill(model)
    ((_, P),) = mmpeft.adapters.switch.adapter_parameters(model)
    y = model.forward_features(x)
    with torch.no_grad(), mmpeft.use(model, None):
        tokens = model._pos_embed(model.patch_embed(x))
        tokens = torch.cat([tokens[:, :1], P.expand(2, -1, -1), tokens[:, 1:]], 1)
        for block in model.blocks:
            tokens = block(tokens)
        expected = model.norm(torch.cat([tokens[:, :1], tokens[:, 4:]], 1))
    torch.testing.assert_close(y, expected)


def test_published_counts_for_vit_base():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert mmpeft.inspect(model, {"blocks": mmpeft.VPT(num_tokens=50, deep=True)}).trainable == 12 * 50 * 768
    assert mmpeft.inspect(model, {"blocks": mmpeft.VPT(num_tokens=50, deep=False)}).trainable == 50 * 768


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    ("build", "stack"),
    [
        (lambda: timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2), "blocks"),
        (
            lambda: timm.create_model("vit_base_patch16_siglip_224", img_size=32, depth=2, embed_dim=64, num_heads=4),
            "blocks",
        ),
        (lambda: AutoModel.from_config(CLIPVisionConfig(**TOWER)), "**.encoder.layers"),
        (lambda: AutoModel.from_config(SiglipVisionConfig(**TOWER)), "**.encoder.layers"),
        (
            lambda: AutoModel.from_config(
                Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
            ),
            "**.encoder.layer*",
        ),
    ],
    ids=["eva02", "timm-siglip", "hf-clip", "hf-siglip", "hf-dinov2"],
)
def test_vpt_on_other_towers_keeps_shapes_and_lives(build, stack, deep):
    torch.manual_seed(0)
    model = build()
    from mmpeft.adapters.example import example_of
    from mmpeft.adapters.liveness import as_call, tensors_in

    args, kwargs = as_call(example_of(model))
    model.eval()
    before = [t.shape for t in tensors_in(model(*args, **kwargs))]
    mmpeft.attach(model, {stack: mmpeft.VPT(num_tokens=3, deep=deep)})  # proves liveness
    assert [t.shape for t in tensors_in(model(*args, **kwargs))] == before


def test_open_clip_tower():
    import open_clip

    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.model.CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=16, image_size=32),
        text_cfg=open_clip.model.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=4, layers=2),
    )
    x = torch.randn(2, 3, 32, 32)
    mmpeft.attach(model, {"visual.transformer.resblocks": mmpeft.VPT(num_tokens=2)})
    fill(model)
    with mmpeft.use(model, None):
        base = model.encode_image(x)
    y = model.encode_image(x)
    assert y.shape == base.shape and not torch.allclose(y, base)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_tuning_with_cache_padding_and_embeddings(family):
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    mmpeft.attach(model, {".": mmpeft.PromptTuning(num_tokens=5)})
    fill(model)
    ids = torch.randint(1, 60, (2, 6))
    short = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    run = dict(max_new_tokens=6, do_sample=False)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **run)[:, 6:]
    assert torch.equal(cached, model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **run)[:, 6:])
    assert torch.equal(cached, model.generate(short, attention_mask=mask, **run)[:, 9:])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(cached, model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **run))
    logits = model(ids).logits
    assert logits.shape[1] == 6
    with mmpeft.use(model, None):
        assert not torch.allclose(model(ids).logits, logits, atol=1e-3)


def test_prompts_steer_a_frozen_llm():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
        )
    )
    mmpeft.attach(model, {".": mmpeft.PromptTuning(num_tokens=8)})
    ids = torch.randint(1, 30, (16, 5))
    optimizer = torch.optim.AdamW(mmpeft.parameter_groups(model, lr=0.1))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(ids).logits[:, -1], torch.full((16,), 7))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_refusals():
    model = vit()
    with pytest.raises(NameNotFound, match="none that VPT adapts"):
        mmpeft.attach(model, {"blocks.0.attn": mmpeft.VPT()})
    mmpeft.attach(model, {"blocks": mmpeft.VPT()})
    with pytest.raises(Unsupported, match="cannot differ within a batch"), mmpeft.use(model, rows=["default", None]):
        model(torch.randn(2, 3, 32, 32))
