"""Every method that HF PEFT and mmpeft both have, both ways: PEFT's outputs on random values are ours, at every kind of
layer PEFT wraps, and an adapter of ours in PEFT gives our outputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import (
    IDS,
    TEXT,
    even,
    from_peft,
    gpt2,
    llama,
    outputs,
    peft,
    randomise,
    roberta,
    seeded,
    to_peft,
)
from safetensors.torch import load_file, save_file
from torch import nn

import mmpeft
from mmpeft.adapters.peft.format import load_peft

LINEAR = ["fused", "head"]
ALL = ["table", "conv1", "conv2", "point", "conv3", "fused", "gpt", "head"]
LYCORIS = ["conv1", "conv2", "point", "grouped", "fused", "head"]

FROM: dict[str, list[Any]] = {
    "loha": [
        peft.LoHaConfig(r=3, alpha=2, target_modules=LYCORIS, rank_pattern={"conv.": 2}, alpha_pattern={"head": 5}),
        peft.LoHaConfig(r=2, target_modules=LYCORIS, use_effective_conv2d=True),
        peft.LoHaConfig(r=9, alpha=3, target_modules=LINEAR),  # above every rank of the head
    ],
    "lokr": [
        peft.LoKrConfig(r=1, alpha=3, target_modules=LYCORIS, rank_pattern={"head": 3}),
        peft.LoKrConfig(r=1, alpha=3, target_modules=LYCORIS, decompose_both=True, decompose_factor=8),
        peft.LoKrConfig(r=1, target_modules=["conv2", "head"], use_effective_conv2d=True, decompose_factor=2),
    ],
    "hira": [
        peft.HiraConfig(r=3, target_modules=ALL, rank_pattern={"conv.*": 2, "fused": 4}),
        peft.HiraConfig(r=20, target_modules=["fused", "gpt"]),
    ],
    "gralora": [
        peft.GraloraConfig(r=4, gralora_k=4, alpha=3, target_modules=["fused", "gpt", "head"]),
        peft.GraloraConfig(r=2, gralora_k=2, alpha=4, hybrid_r=3, target_modules=["fused", "gpt"]),
    ],
    "miss": [
        peft.MissConfig(r=3, target_modules=LINEAR),
        peft.MissConfig(r=4, init_weights="bat", target_modules=LINEAR),
        peft.MissConfig(r=5, init_weights="mini", mini_r=4, target_modules=["fused"]),
    ],
    "oft": [
        peft.OFTConfig(oft_block_size=4, target_modules=["table", "fused", "head", "point"]),
        peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["table", "fused", "head", "point"]),
        peft.OFTConfig(r=2, oft_block_size=0, block_share=True, target_modules=["fused", "point"]),
        peft.OFTConfig(oft_block_size=5, coft=True, eps=0.4, target_modules=["fused", "head"]),  # PEFT makes it 4
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=7, target_modules=["head"]),
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=["head"]),
    ],
    "boft": [
        peft.BOFTConfig(boft_block_size=4, target_modules=["fused", "head", "conv2", "point"]),
        peft.BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=["fused", "conv2"]),
    ],
    "hra": [
        peft.HRAConfig(r=4, target_modules=["fused", "head", "conv2", "point"]),
        peft.HRAConfig(r=4, apply_GS=True, target_modules=["fused", "conv2"]),
    ],
    "c3a": [peft.C3AConfig(block_size=4, target_modules=LINEAR)],
    "fourierft": [peft.FourierFTConfig(n_frequency=20, scaling=30.0, target_modules=["fused", "gpt", "head"])],
    "shira": [peft.ShiraConfig(r=1, target_modules=LINEAR)],
    "delora": [peft.DeloraConfig(r=3, rank_pattern={"head": 2}, lambda_pattern={"fused": 4}, target_modules=LINEAR)],
    "adalora": [
        peft.AdaLoraConfig(init_r=5, lora_alpha=3, total_step=10, target_modules=["conv2", "point", "fused", "gpt", "head"]),
        peft.AdaLoraConfig(init_r=3, lora_alpha=-1, total_step=10, target_modules=["fused"]),
    ],
    "randlora": [
        peft.RandLoraConfig(r=3, randlora_alpha=4, target_modules=["fused", "gpt", "head"]),
        peft.RandLoraConfig(r=3, randlora_alpha=4, sparse=True, target_modules=["fused"]),
    ],
    "beft": [peft.BeftConfig(target_modules=LINEAR)],
}  # fmt: skip
SIZES = {"hira": 0.5, "miss": 0.1, "randlora": 0.2, "loha": 0.4, "lokr": 0.3, "fourierft": 1.0}


@pytest.mark.parametrize("method, case", [(m, i) for m, cases in FROM.items() for i in range(len(cases))])
def test_from_peft(tmp_path: Path, method: str, case: int) -> None:
    from_peft(even, copy.deepcopy(FROM[method][case]), IDS, tmp_path, size=SIZES.get(method, 0.2))


TO: dict[str, list[Any]] = {
    "loha": [{"{conv1,conv2,point,grouped}": mmpeft.LoHa(rank=2, alpha=3), "{fused,head}": mmpeft.LoHa(rank=3)}],
    "lokr": [
        {"{conv1,conv2,grouped,fused}": mmpeft.LoKr(rank=1, alpha=3, factor=2), "head": mmpeft.LoKr(rank=3, factor=2)},
        {"{fused,head}": mmpeft.LoKr(rank=1, factor=8, decompose_both=True)},
    ],
    "krona": [
        {"{conv2,grouped,fused,head}": mmpeft.KronA(a1=2, a2=2, scale=0.5)},
        {"{fused,head}": mmpeft.KronA(scale=3.0)},  # the most square sizes, of two kinds
        {"fused": mmpeft.KronA(a1=8, a2=3), "head": mmpeft.LoKr(rank=1, factor=8, decompose_both=True)},
        {"point": mmpeft.KronA(a1=1, a2=1), "head": mmpeft.KronA(a1=1, a2=1, scale=2.0)},
    ],
    "hira": [{"{table,conv1,conv2,point,conv3,fused,gpt}": mmpeft.HiRA(rank=2), "head": mmpeft.HiRA(rank=3)}],
    "gralora": [{"{fused,gpt,head}": mmpeft.GraLoRA(rank=4, k=2, alpha=5, hybrid_rank=1)}],
    "miss": [{"{fused,head}": mmpeft.MiSS(rank=3)}, {"{fused,head}": mmpeft.MiSS(rank=4, bat=True)}],
    "oft": [
        {"{fused,point,head}": mmpeft.OFT(block_size=4), "table": mmpeft.OFT(block_size=4, side="out")},
        {"{fused,point}": mmpeft.OFT(block_size=2, share=True, neumann=5)},
        {"fused": mmpeft.OFT(block_size=3, eps=0.3)},
    ],
    "boft": [{"{fused,conv2,point}": mmpeft.BOFT(block_size=4, m=1), "head": mmpeft.BOFT(block_size=4, m=1, scale=False)}],
    "hra": [{"{fused,conv2,head}": mmpeft.HRA(rank=4)}],
    "c3a": [{"fused": mmpeft.C3A(block_size=4), "head": mmpeft.C3A(block_size=2)}],
    "fourierft": [{"{fused,gpt}": mmpeft.FourierFT(n=30, scale=9.0), "head": mmpeft.FourierFT(n=12, scale=9.0)}],
    "shira": [{"fused": mmpeft.SHiRA(rank=1), "head": mmpeft.PaFi(count=9)}, {"fused": mmpeft.PaFi(density=0.2), "head": mmpeft.PaFi(count=9)}],
    "delora": [{"fused": mmpeft.DeLoRA(rank=3, lam=4.0), "head": mmpeft.DeLoRA(rank=2)}],
    "adalora": [{"{conv2,point,fused,gpt}": mmpeft.AdaLoRA(rank=3, alpha=5), "head": mmpeft.AdaLoRA(rank=2)}],
    "randlora": [{"{fused,gpt,head}": mmpeft.RandLoRA(rank=3, alpha=4)}],
    "beft": [{"{fused,head}.bias": mmpeft.BitFit()}],
    "with a head": [{"fused": mmpeft.LoHa(rank=2), "head": "full", "norm": mmpeft.LayerNormTuning()}],
    "with biases": [{"fused": mmpeft.HRA(rank=2), "{fused,head,conv1}.bias": mmpeft.BitFit()}],
}  # fmt: skip


@pytest.mark.parametrize("method, case", [(m, i) for m, cases in TO.items() for i in range(len(cases))])
def test_to_peft(tmp_path: Path, method: str, case: int) -> None:
    to_peft(even, TO[method][case], IDS, tmp_path, size=SIZES.get(method, 0.2))


class Fused(nn.Module):
    """A fused qkv: [B, T, 8] -> [B, T, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v))


SLICED = {
    "loha": (mmpeft.LoHa(rank=2, alpha=3), mmpeft.LoHa(rank=3)),
    "hira": (mmpeft.HiRA(rank=2), mmpeft.HiRA(rank=1)),
    "adalora": (mmpeft.AdaLoRA(rank=2, alpha=3), mmpeft.AdaLoRA(rank=3)),
    "miss": (mmpeft.MiSS(rank=3), mmpeft.MiSS(rank=3)),
    "shira": (mmpeft.SHiRA(rank=1), mmpeft.SHiRA(count=7)),
}


@pytest.mark.parametrize("method", SLICED)
def test_slices_of_a_fused_weight(tmp_path: Path, method: str) -> None:
    """PEFT has none; disjoint rows of one update of the summed rank are the same function."""
    q, v = SLICED[method]
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    to_peft(lambda: seeded(Fused), {"qkv[q]": q, "qkv[v]": v}, x, tmp_path, size=0.4)


ARCHITECTURES = [
    (llama, TEXT, {"**.{q,k,down}_proj": mmpeft.LoHa(rank=2)}),
    (llama, TEXT, {"**.{q,k,v,up,down}_proj": mmpeft.RandLoRA(rank=3, alpha=2)}),  # matrices of four sizes
    (llama, TEXT, {"**.{q,k}_proj": mmpeft.OFT(block_size=4), "model.embed_tokens": mmpeft.OFT(block_size=4, side="out")}),
    (llama, TEXT, {"**.{q,k,v}_proj": mmpeft.HRA(rank=2), "lm_head": "full", "**.*norm": mmpeft.LayerNormTuning()}),
    (llama, TEXT, {"**.layers.*.self_attn.{q,k}_proj": mmpeft.C3A(block_size=4), "**.v_proj": mmpeft.C3A(block_size=8)}),
    (gpt2, TEXT, {"h.*.{attn.c_attn,mlp.c_fc}": mmpeft.RandLoRA(rank=3, alpha=2)}),
    (gpt2, TEXT, {"h.*.attn.c_attn[q,v]": mmpeft.AdaLoRA(rank=2), "h.*.mlp.c_proj": mmpeft.AdaLoRA(rank=3)}),
    (gpt2, TEXT, {"h.*.attn.c_attn[k,v]": mmpeft.HiRA(rank=2), "wte": mmpeft.HiRA(rank=2)}),
    (gpt2, TEXT, {"h.0.**.c_proj": mmpeft.GraLoRA(rank=4, k=2), "h.1.**.c_fc": mmpeft.GraLoRA(rank=4, k=2)}),
    (roberta, TEXT, {"**.{query,value}": mmpeft.BOFT(block_size=4, m=1), "roberta.**.bias": mmpeft.BitFit()}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(ARCHITECTURES)))
def test_architectures_to_peft(tmp_path: Path, case: int) -> None:
    make, x, plan = ARCHITECTURES[case]
    to_peft(make, plan, x, tmp_path, size=0.2)


@pytest.mark.parametrize("config", [peft.LoHaConfig(r=2), peft.OFTConfig(oft_block_size=4), peft.RandLoraConfig(r=3)])
def test_bf16_bases(tmp_path: Path, config: Any) -> None:
    config = copy.deepcopy(config)
    config.target_modules = {"q_proj", "v_proj"}
    theirs = peft.get_peft_model(llama().bfloat16(), config).eval()
    randomise((p for n, p in sorted(theirs.named_parameters()) if p.requires_grad), 0.1)
    theirs.save_pretrained(tmp_path)
    ours = load_peft(llama().bfloat16(), tmp_path, example=TEXT)
    torch.testing.assert_close(outputs(ours, TEXT), outputs(theirs, TEXT), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("config", [peft.LoHaConfig(r=2), peft.OFTConfig(oft_block_size=4), peft.GraloraConfig(r=2, hybrid_r=2),
                                    peft.ShiraConfig(r=1), peft.AdaLoraConfig(init_r=2, total_step=9)], ids=lambda c: c.peft_type.value)  # fmt: skip
def test_keys_with_the_adapters_name(tmp_path: Path, config: Any) -> None:
    """As `state_dict` of a model with injected adapters has them; without target_modules, the keys say where."""
    config = copy.deepcopy(config)
    config.target_modules = {"fused", "head"}
    theirs = peft.get_peft_model(even(), config).eval()
    randomise(p for n, p in sorted(theirs.named_parameters()) if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    named = {}
    for key, t in load_file(path).items():
        head, _, last = key.rpartition(".")
        named[f"{head}.default.weight" if last == "weight" else f"{key}.default"] = t
    save_file(named, path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | {"target_modules": None}))
    torch.testing.assert_close(
        outputs(load_peft(even(), tmp_path, example=IDS), IDS), outputs(theirs, IDS), atol=1e-5, rtol=1e-5
    )


def test_bone_is_miss_by_its_older_name(tmp_path: Path) -> None:
    """Earlier PEFT wrote it so, and today's no longer reads that."""
    theirs = peft.get_peft_model(even(), peft.MissConfig(r=3, target_modules=["fused", "head"])).eval()
    randomise(p for n, p in sorted(theirs.named_parameters()) if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("miss_block", "bone_block"): t for k, t in load_file(path).items()}, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "BONE"}))
    ours = load_peft(even(), tmp_path, example=IDS)
    torch.testing.assert_close(outputs(ours, IDS), outputs(theirs, IDS), atol=1e-5, rtol=1e-5)


def test_pruned_triplets_of_adalora(tmp_path: Path) -> None:
    """After pruning, PEFT's file holds what is left, and `rank_pattern` says which; the scale stays that of init_r."""
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=3, total_step=10, target_modules=["fused", "gpt", "head"])
    theirs = peft.get_peft_model(even(), config).eval()
    randomise((p for n, p in sorted(theirs.named_parameters()) if p.requires_grad), 0.3)
    kept = {"fused": [True, False, True, True], "gpt": [False] * 4, "head": [True] * 4}
    for path, which in kept.items():
        theirs.base_model.model.get_submodule(path).lora_E["default"].data[~torch.tensor(which)] = 0
    theirs.peft_config["default"].rank_pattern = {f"{path}.lora_E": which for path, which in kept.items()}
    expected = outputs(theirs, IDS)
    theirs.save_pretrained(tmp_path)
    ours = load_peft(even(), tmp_path, example=IDS)
    torch.testing.assert_close(outputs(ours, IDS), expected, atol=1e-5, rtol=1e-5)
    assert ours.fused.get_submodule("_adapters") is not None and not hasattr(ours.gpt, "_adapters")
