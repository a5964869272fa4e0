"""HF PEFT folders, both ways, with peft itself as the oracle: same weights, same outputs at 1e-5."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_cases import (
    IDS,
    IMAGES,
    TEXT,
    TOKENS,
    Attention,
    attention,
    from_peft,
    gpt2,
    llama,
    mixed,
    net,
    outputs,
    peft,
    randomise,
    roberta,
    seeded,
    to_peft,
    vit,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from torch import nn

import mmpeft
from mmpeft.adapters.peft.format import export_peft, load_peft, read_peft
from mmpeft.adapters.store import adapter_tensors
from mmpeft.errors import Unsupported

# --- from PEFT -------------------------------------------------------------------------------------------------------

EVERYTHING = ["table", "conv1", "conv2", "conv3", "fused", "gpt", "head"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"conv.*": 2, "conv1": 3}, "alpha_pattern": {"^fused": 5, "gpt": 1.5}},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only", "modules_to_save": ["norm"]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.2},
        {"r": 40},  # above every rank there is
        {"target_modules": "conv[12]|.*se.*", "exclude_modules": ["conv1"]},
        {"target_modules": "all-linear", "lora_bias": True},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_lora_from_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": EVERYTHING} | options)
    from_peft(net, config, IDS, tmp_path, size=0.1)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_base_changing_inits_from_peft(tmp_path: Path, init: str) -> None:
    """PEFT subtracts the starting product from its base; here it is a frozen pair, and the base is the true one."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fused", "head"], init_lora_weights=init)
    model = from_peft(net, config, IDS, tmp_path)
    assert any(key.endswith(".A0") for key in adapter_tensors(model, "imported"))


def test_grouped_convolution_across_groups_is_refused(tmp_path: Path) -> None:
    """PEFT's lora_A sees every channel there, so its update is no weight of a grouped convolution."""
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["grouped"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="grouped: lora_A mixes the channels"):
        load_peft(net(), tmp_path, example=IDS)


@pytest.mark.parametrize("feedforward", [[], ["fused", "conv2"], ".*(ed|v3)"], ids=str)
def test_ia3_from_peft(tmp_path: Path, feedforward: Any) -> None:
    targets = ["conv2", "grouped", "conv3", "fused", "gpt"]
    config = peft.IA3Config(target_modules=targets if isinstance(feedforward, list) else "conv[23]|grouped|fused|gpt",
                            feedforward_modules=feedforward)  # fmt: skip
    from_peft(net, config, IDS, tmp_path)


@pytest.mark.parametrize("save_projection", [True, False])
def test_vera_from_peft(tmp_path: Path, save_projection: bool) -> None:
    config = peft.VeraConfig(
        r=5, target_modules=["fused", "gpt", "head"], save_projection=save_projection, projection_prng_key=3
    )
    model = from_peft(net, config, IDS, tmp_path / "peft")
    assert not any(key.endswith(".A") for key in adapter_tensors(model, "imported"))  # the seed draws the same numbers


def test_foreign_vera_projections_are_carried(tmp_path: Path) -> None:
    """Projections that the seed doesn't draw stay in the adapter, once, and survive mmpeft's own files."""
    base = net()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=5, target_modules=["fused", "gpt"])).eval()
    for shared in (theirs.base_model.vera_A, theirs.base_model.vera_B):
        shared["default"].mul_(1.5)
    randomise((p for n, p in sorted(theirs.named_parameters()) if p.requires_grad), 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    load_peft(base, tmp_path / "theirs", example=IDS)
    torch.testing.assert_close(outputs(base, IDS), outputs(theirs, IDS), atol=1e-5, rtol=1e-5)
    assert sum(key.endswith(".A") for key in adapter_tensors(base, "default")) == 1
    mmpeft.save(base, tmp_path / "ours")
    again = net()
    mmpeft.load(again, tmp_path / "ours", check=False)
    assert torch.equal(outputs(again, IDS), outputs(base, IDS))


def test_ln_tuning_from_peft(tmp_path: Path) -> None:
    config = peft.LNTuningConfig(target_modules=["norm", "fused"], modules_to_save=["head"])
    from_peft(net, config, IDS, tmp_path)


def test_attention_and_experts_from_peft(tmp_path: Path) -> None:
    """Packed in_proj and out_proj under one target, two parameters of one module nested."""
    make = partial(seeded, Attention)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn"])
    from_peft(make, config, TOKENS, tmp_path / "attention")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["head"], target_parameters=parameters,
                             rank_pattern={"experts.down_proj": 3})  # fmt: skip
    from_peft(make, config, TOKENS, tmp_path / "experts")


# --- to PEFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        {"{table,conv1,conv2,conv3,fused,gpt,head}": mmpeft.LoRA(rank=2, alpha=3, dropout=0.0)},
        {"{fused,gpt}": mmpeft.LoRA(rank=3, alpha=4, rslora=True), "conv2": mmpeft.LoRA(rank=1, alpha=4, rslora=True)},
        {"fused": mmpeft.LoRA(rank=3), "gpt": mmpeft.LoRA(rank=3, rslora=True), "head": mmpeft.LoRA(rank=2, alpha=7)},
        {"{conv2,grouped}": mmpeft.LoRA(rank=2)},
        {"{table,conv1,conv2,conv3,fused,gpt}": mmpeft.DoRA(rank=2, alpha=3)},
        {"{fused,head}": mmpeft.LoRA(rank=2, init_from="pissa")},
        {"{fused,gpt,head}": mmpeft.DoRA(rank=2, alpha=5, init_from="olora")},
        {"fused": mmpeft.LoRA(rank=2), "head": "full", "norm": mmpeft.LayerNormTuning()},
        {"fused": mmpeft.LoRA(rank=2), "{fused,head,conv2,norm}.bias": mmpeft.BitFit()},
        {"{conv2,grouped,conv3,gpt}": mmpeft.IA3(), "fused": mmpeft.IA3(side="in"), "head": "full"},
        {"{grouped,conv3}": mmpeft.IA3(side="in")},
        {"{fused,gpt,head}": mmpeft.VeRA(rank=6, seed=4), "conv1.bias": mmpeft.BitFit()},
        {"norm": mmpeft.LayerNormTuning()},
        {"norm": mmpeft.LayerNormTuning(), "head": "full"},
        {"head": "full", "conv2": "full"},
    ],
    ids=lambda plan: "+".join(f"{k}:{getattr(v, 'name', v)}" for k, v in plan.items()),
)
def test_export(tmp_path: Path, plan: dict[str, Any]) -> None:
    to_peft(net, plan, IDS, tmp_path, size=0.1)


@pytest.mark.parametrize(
    "plan",
    [
        {"attn": mmpeft.LoRA(rank=3, alpha=2)},
        {"attn.in_proj_weight[q,v]": mmpeft.LoRA(rank=2, alpha=3), "attn.out_proj": mmpeft.LoRA(rank=3)},
        {"attn.out_proj": mmpeft.LoRA(rank=2), "attn.out_proj.bias": mmpeft.BitFit()},
        {"experts": mmpeft.LoRA(rank=2, alpha=3), "head": mmpeft.LoRA(rank=2, alpha=3)},
        {"experts.gate_up_proj": mmpeft.LoRA(rank=4), "experts.down_proj": mmpeft.LoRA(rank=3), "head": "full"},
        {"attn": "full", "head": mmpeft.LoRA(rank=2)},
    ],
    ids=lambda plan: "+".join(plan),
)
def test_export_of_attention_and_experts(tmp_path: Path, plan: dict[str, Any]) -> None:
    to_peft(attention, plan, TOKENS, tmp_path)


def test_export_of_separate_projections(tmp_path: Path) -> None:
    """kdim != embed_dim: three parameters of one module, PEFT's wrappers nest three deep."""
    plan = {"attn.{q,k,v}_proj_weight": mmpeft.LoRA(rank=2, alpha=3)}
    to_peft(lambda: seeded(Attention, kdim=6, vdim=6), plan, TOKENS, tmp_path)


# --- real architectures, tiny and random -----------------------------------------------------------------------------


FROM = {
    "llama": (llama, TEXT, [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {r"layers\.0\..*": 3}},
        {"target_modules": ["embed_tokens", "down_proj"], "modules_to_save": ["lm_head"]},
    ]),
    "roberta": (roberta, TEXT, [{"target_modules": ["query", "dense"], "task_type": "SEQ_CLS", "bias": "all"}]),
    "gpt2": (gpt2, TEXT, [{"target_modules": ["c_attn", "c_proj"], "use_dora": True}]),
    "vit": (vit, IMAGES, [{"target_modules": ["qkv", "proj"], "modules_to_save": ["head"], "use_rslora": True}]),
}  # fmt: skip


@pytest.mark.parametrize("family, case", [(f, i) for f, (_, _, cases) in FROM.items() for i in range(len(cases))])
def test_lora_of_architectures_from_peft(tmp_path: Path, family: str, case: int) -> None:
    make, x, cases = FROM[family]
    from_peft(make, peft.LoraConfig(**{"r": 2, "lora_alpha": 4} | cases[case]), x, tmp_path, size=0.1)


TO = {
    "llama": (llama, TEXT, [
        {"**.{q,v}_proj": mmpeft.LoRA(rank=2), "model.layers.1.**.gate_proj": mmpeft.LoRA(rank=3, alpha=1)},
        {"**.{k,v}_proj": mmpeft.IA3(), "**.down_proj": mmpeft.IA3(side="in")},
        {"**.{q,v,up,down}_proj": mmpeft.VeRA(rank=4)},
        {"**.*norm": mmpeft.LayerNormTuning(), "lm_head": "full"},
    ]),
    "roberta": (roberta, TEXT, [
        {"**.{query,value}": mmpeft.DoRA(rank=2), "classifier": "full", "roberta.**.bias": mmpeft.BitFit()},
    ]),
    "gpt2": (gpt2, TEXT, [{"h.*.attn.c_attn[q,v]": mmpeft.LoRA(rank=2, alpha=3)}, {"**.c_attn[k,v]": mmpeft.IA3()}]),
    "vit": (vit, IMAGES, [
        {"blocks.*.attn.qkv[q,v]": mmpeft.LoRA(rank=3), "head": "full", "patch_embed.proj": mmpeft.LoRA(rank=2)},
        {"blocks.*.attn.qkv[q,v]": mmpeft.DoRA(rank=3), "norm": mmpeft.LayerNormTuning()},
    ]),
}  # fmt: skip


@pytest.mark.parametrize("family, case", [(f, i) for f, (_, _, cases) in TO.items() for i in range(len(cases))])
def test_export_of_architectures(tmp_path: Path, family: str, case: int) -> None:
    make, x, cases = TO[family]
    to_peft(make, cases[case], x, tmp_path, size=0.1)


def test_prompt_tuning_both_ways(tmp_path: Path) -> None:
    """Soft prompts; PEFT returns logits at the prompts' positions too, which are dropped here."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    base = llama()
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    x = TEXT | {"attention_mask": torch.ones_like(TEXT["input_ids"])}
    load_peft(base, tmp_path / "theirs", example=x)
    torch.testing.assert_close(outputs(base, x), outputs(theirs, x)[:, 3:], atol=1e-5, rtol=1e-5)
    export_peft(base, tmp_path / "ours", example=x)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(again, x), outputs(theirs, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "plan",
    [
        {"{table,inner.proj}": mmpeft.LoRA(rank=2, alpha=3), "head": "full"},
        {"head": mmpeft.LoRA(rank=2), "norm": mmpeft.LayerNormTuning()},
        {"norm": mmpeft.LayerNormTuning()},
    ],
    ids=lambda plan: "+".join(plan),
)
def test_export_of_corners(tmp_path: Path, plan: dict[str, Any]) -> None:
    to_peft(mixed, plan, IDS, tmp_path)


def test_statistics_that_moved_are_refused(tmp_path: Path) -> None:
    """A PEFT copy of a BatchNorm that trained has statistics of its own; here they belong to the base."""
    config = peft.LoraConfig(r=2, target_modules=["head"], modules_to_save=["norm"])
    from_peft(mixed, config, IDS, tmp_path / "still", size=0.2)
    theirs = peft.get_peft_model(mixed(), config).train()
    theirs(IDS)
    theirs.save_pretrained(tmp_path / "moved")
    with pytest.raises(Unsupported, match="norm.running_mean: the adapter moved a buffer"):
        load_peft(mixed(), tmp_path / "moved", example=IDS)


def test_embedding_tables_in_the_file(tmp_path: Path) -> None:
    """`save_embedding_layers` writes the base's own tables, or new ones; the first are passed over, the second carried."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path / "same")
    load_peft(llama(), tmp_path / "same", example=TEXT)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    randomise([theirs.get_input_embeddings().weight])
    theirs.save_pretrained(tmp_path / "new", save_embedding_layers=True)
    ours = load_peft(llama(), tmp_path / "new", example=TEXT)
    torch.testing.assert_close(outputs(ours, TEXT), outputs(theirs, TEXT), atol=1e-5, rtol=1e-5)


def test_second_adapter_half_precision_and_injection(tmp_path: Path) -> None:
    """Onto a model that has an adapter; on a bf16 base; through `inject_adapter_in_model`, whose keys have no prefix."""
    base = llama()
    mmpeft.attach(base, {"**.q_proj": mmpeft.LoRA(rank=2)}, name="first", example=TEXT)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["v_proj", "q_proj"]), llama()).eval()
    randomise(p for n, p in sorted(theirs.named_parameters()) if "lora_" in n)
    (tmp_path / "plain").mkdir()
    tensors = {k: t.contiguous() for k, t in peft.get_peft_model_state_dict(theirs).items()}
    save_file(tensors, tmp_path / "plain" / "adapter_model.safetensors")
    reconfigure_to = {"peft_type": "LORA", "r": 3, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps(reconfigure_to))
    load_peft(base, tmp_path / "plain", "second", example=TEXT)
    torch.testing.assert_close(outputs(base, TEXT), outputs(theirs, TEXT), atol=1e-5, rtol=1e-5)
    export_peft(base, tmp_path / "out", name="second", example=TEXT)
    target = peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(tmp_path / "out"), llama()).eval()
    peft.set_peft_model_state_dict(target, load_file(tmp_path / "out" / "adapter_model.safetensors"))
    torch.testing.assert_close(outputs(target, TEXT), outputs(theirs, TEXT), atol=1e-5, rtol=1e-5)
    half = load_peft(llama().bfloat16(), tmp_path / "out", example=TEXT)
    theirs = peft.PeftModel.from_pretrained(llama().bfloat16(), tmp_path / "out").eval()
    torch.testing.assert_close(outputs(half, TEXT), outputs(theirs, TEXT), atol=3e-2, rtol=3e-2)


def test_keys_with_the_adapters_name(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["fused"], modules_to_save=["head"])).eval()
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    named = {k.replace(".weight", ".default.weight") if "lora" in k else k.replace("head.", "head.modules_to_save.default."): t
             for k, t in load_file(path).items()}  # fmt: skip
    save_file(named, path)
    ours = load_peft(net(), tmp_path, example=IDS)
    torch.testing.assert_close(outputs(ours, IDS), outputs(theirs, IDS), atol=1e-5, rtol=1e-5)


def test_writing_again_replaces_both_files(tmp_path: Path) -> None:
    model = mmpeft.attach(net(), {"fused": mmpeft.LoRA(rank=2)}, example=IDS)
    (tmp_path / "README.md").write_text("kept")
    for rank in (2, 3):
        mmpeft.detach(model)
        mmpeft.attach(model, {"fused": mmpeft.LoRA(rank=rank)}, example=IDS)
        export_peft(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert read_peft(tmp_path).tensors["fused.lora_A.weight"].shape[0] == 3


# --- sampled ---------------------------------------------------------------------------------------------------------

QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@QUICK
@given(data=st.data())
def test_sampled_convolutions_and_linears(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Shapes, ranks, options and dtypes by chance: PEFT -> here -> PEFT -> here, always the same outputs."""
    dims = data.draw(st.integers(0, 3))
    sizes = st.integers(1, 4)
    into, out, bias = data.draw(sizes), data.draw(sizes), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    if dims == 0:
        layer: nn.Module = nn.Linear(into, out, bias)
        x = torch.randn(3, 5, into, dtype=dtype)
    else:
        kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(dims))
        padding = tuple(data.draw(st.integers(0, 1)) for _ in range(dims))
        stride = tuple(data.draw(st.integers(1, 2)) for _ in range(dims))
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](into, out, kernel, stride, padding, bias=bias)
        x = torch.randn(2, into, *(k + 3 for k in kernel), dtype=dtype)
    base = nn.Sequential(nn.Identity(), layer).to(dtype).eval()
    method = data.draw(st.sampled_from(["lora", "dora", *["ia3"] * (dims != 1), *["vera"] * (dims == 0)]))
    if method == "ia3":
        config = peft.IA3Config(target_modules=["1"], feedforward_modules=data.draw(st.sampled_from([[], ["1"]])))
    elif method == "vera":
        config = peft.VeraConfig(
            r=data.draw(st.integers(1, 9)), target_modules=["1"], projection_prng_key=data.draw(sizes)
        )
    else:
        rank, alpha, rslora = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)), data.draw(st.booleans())
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=["1"], use_dora=method == "dora", use_rslora=rslora
        )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(p for n, p in sorted(theirs.named_parameters()) if p.requires_grad)
    folder = tmp_path_factory.mktemp("sampled")
    theirs.save_pretrained(folder / "a")
    ours = load_peft(copy.deepcopy(base), folder / "a", example=x, check=False)
    torch.testing.assert_close(outputs(ours, x), outputs(theirs, x), atol=1e-5, rtol=1e-5)
    export_peft(ours, folder / "b", example=x)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "b").eval()
    torch.testing.assert_close(outputs(again, x), outputs(theirs, x), atol=1e-5, rtol=1e-5)
