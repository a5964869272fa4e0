"""inspect: the table is what attach does, and looking changes nothing."""

import pytest
import timm
import torch
from torch import nn

import mmpeft
from mmpeft.errors import ConfigError, NameNotFound

PLANS = {
    "lora": {"blocks.*.attn.qkv[q,v]": mmpeft.LoRA(rank=3), "head": "full"},
    "dora": {"blocks.*.mlp.fc1": mmpeft.DoRA(rank=2)},
    "vera": {"blocks.*.attn.proj": mmpeft.VeRA(rank=4)},
    "ia3": {"blocks.*.attn.qkv[k,v]": mmpeft.IA3(), "blocks.*.mlp.fc2": mmpeft.IA3(side="in")},
    "bitfit": {"**": mmpeft.BitFit()},
    "norms": {"**": mmpeft.LayerNormTuning()},
    "rocoft": {"blocks.*.mlp.fc{1,2}": mmpeft.RoCoFT(rank=2, axis="columns")},
    "bottlenecks": {"blocks.*.attn": mmpeft.Bottleneck(), "blocks.*.mlp": mmpeft.AdaptFormer(size=8)},
    "vpt": {"blocks": mmpeft.VPT(num_tokens=4)},
}


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2)


@pytest.mark.parametrize("name", PLANS)
def test_counts_are_those_of_attach(vit, name):
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    flags = [p.requires_grad for p in vit.parameters()]
    seen = mmpeft.inspect(vit, PLANS[name])
    assert flags == [p.requires_grad for p in vit.parameters()]
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items()) and set(before) == set(vit.state_dict())
    mmpeft.attach(vit, PLANS[name], check=False)
    trained = sum(p.numel() for g in mmpeft.parameter_groups(vit, lr=1.0) for p in g["params"])
    mmpeft.detach(vit)
    assert seen.trainable == trained > 0
    assert seen.base_parameters == sum(p.numel() for p in vit.parameters())


def test_known_numbers(vit):
    seen = mmpeft.inspect(vit, PLANS["lora"])
    # per block and role: A [3, 192] and B [192, 3]; the head 192 * 5 + 5
    assert [row.parameters for row in seen.rows] == [2 * 2 * (3 * 192 + 192 * 3), 965]
    assert [len(row.sites) for row in seen.rows] == [4, 2]
    assert seen.rows[0].sites[0] == "blocks.0.attn.qkv.weight[q]"
    text = str(seen)
    assert "blocks.*.attn.qkv[q,v]" in text and "frozen" in text


def test_works_on_the_meta_device_without_memory():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    seen = mmpeft.inspect(model, {"blocks.*.attn.{qkv,proj}": mmpeft.LoRA(rank=16)})
    assert seen.trainable == 12 * 16 * ((768 + 3 * 768) + (768 + 768))
    # 17.5 GFLOP a 224-pixel image in multiply-adds (the paper's count), twice that in FLOPs, for a batch of 2
    assert seen.base_flops == pytest.approx(2 * 35.1e9, rel=0.02)


def test_of_an_adapted_model_and_of_a_plain_one(vit):
    mmpeft.attach(vit, PLANS["lora"], check=False)
    assert mmpeft.inspect(vit).trainable == mmpeft.inspect(vit, PLANS["lora"]).trainable
    mmpeft.detach(vit)
    with pytest.raises(ConfigError, match="needs an adapted model"):
        mmpeft.inspect(vit)


def test_bad_plans_are_refused(vit):
    with pytest.raises(NameNotFound, match=r"nearest: blocks\.\*\.attn\.qkv"):
        mmpeft.inspect(vit, {"blocks.*.attn.qvk": mmpeft.LoRA()})
    with pytest.raises(ConfigError, match="rank 500"):
        mmpeft.inspect(vit, {"blocks.*.attn.qkv": mmpeft.LoRA(rank=500)})
    with pytest.raises(NameNotFound, match="none that LoRA adapts"):
        mmpeft.inspect(nn.Sequential(nn.ReLU()), {"0": mmpeft.LoRA()})
