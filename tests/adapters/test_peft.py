"""HF PEFT folders, both ways, with peft itself as the oracle: same weights, same outputs at 1e-5."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters.peft_format import export_peft, is_peft, load_peft, read_peft
from mmpeft.adapters.store import adapter_tensors
from mmpeft.errors import FileFormatError, NameNotFound, Unsupported

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore", module="peft")
warnings.filterwarnings("ignore", module="torch.nn.utils")


class Net(nn.Module):
    """One of everything PEFT can adapt, on inputs larger than the kernels: ids [B, T] -> [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 12, padding_idx=0)
        self.conv1 = nn.Conv1d(12, 10, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 6, 3, stride=(2, 1), padding=(0, 2))
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.conv3 = nn.Conv3d(1, 3, (1, 2, 3), padding=1)
        self.fused = nn.Linear(3, 9)
        self.norm = nn.LayerNorm(9)
        self.gpt = transformers.pytorch_utils.Conv1D(7, 9)
        self.head = nn.Linear(7, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = 3 * self.conv1(self.table(ids).mT)  # [B, 10, 9]
        x = 3 * self.grouped(3 * self.conv2(x.unsqueeze(1)))  # [B, 4, 4, 11]
        x = 3 * self.conv3(x.unsqueeze(1)).flatten(2)[..., ::97].mean(-1)
        return self.head(self.gpt(self.norm(self.fused(x))))


class Attention(nn.Module):
    """nn.MultiheadAttention and a bare parameter: [B, T, 8] -> [B, T, 8]."""

    def __init__(self, dim: int = 8, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True, **options)
        self.kdim = self.attn.kdim
        self.experts = Experts(dim)
        self.head = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        keys = x[..., : self.kdim]
        x = x + self.attn(x, keys, keys, need_weights=False)[0]
        return self.head(x + self.experts(x))


class Experts(nn.Module):
    """Two stacks of expert matrices, [e, out, in], mixed evenly."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * dim, dim) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(3, dim, 2 * dim) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("btd,ehd->beth", x, self.gate_up_proj).tanh()
        return torch.einsum("beth,edh->btd", h, self.down_proj) / 3


IDS = torch.randint(1, 13, (3, 17), generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))


def seeded(make: Any, *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(*args, **kwargs).eval()


def randomise(parameters: Any, size: float = 0.3) -> None:
    """Random adapter values: a zero factor would hide a broken one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator).to(p) * size)


def outputs(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        y = model(**x) if isinstance(x, dict) else model(x)
    y = y if isinstance(y, Tensor) else (y.logits if hasattr(y, "logits") else y.last_hidden_state)
    return y.detach()


def from_peft(make: Any, config: Any, x: Any, folder: Path, *, size: float = 0.3, **options: Any) -> nn.Module:
    """A random PEFT adapter, loaded here: its outputs are PEFT's, and differ from the base's."""
    base = make().requires_grad_(False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise((p for n, p in sorted(theirs.named_parameters()) if p.requires_grad), size)
    theirs.save_pretrained(folder)
    expected, plain = outputs(theirs, x), outputs(base, x)
    ours = mmpeft.load(base, folder, "imported", example=x, **options)
    assert ours == "imported"
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(outputs(base, x), expected, atol=1e-5, rtol=1e-5)
    with mmpeft.use(base, None):
        assert torch.equal(outputs(base, x), plain)
    return base


def to_peft(make: Any, plan: Any, x: Any, folder: Path, *, size: float = 0.3, effect: bool = True) -> dict[str, Any]:
    """A random adapter of ours, exported: PEFT's outputs are ours; read back here, ours again."""
    base = make()
    ours = mmpeft.attach(copy.deepcopy(base), plan, name="mine", example=x)
    randomise((p for g in mmpeft.parameter_groups(ours, lr=1.0) for p in g["params"]), size)
    expected = outputs(ours, x)
    if effect:
        assert (expected - outputs(base, x)).abs().max() > 1e-3
    export_peft(ours, folder, name="mine", example=x)
    assert is_peft(folder)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(outputs(theirs, x), expected, atol=1e-5, rtol=1e-5)
    load_peft(base, folder, example=x)
    torch.testing.assert_close(outputs(base, x), expected, atol=1e-5, rtol=1e-5)
    return json.loads((folder / "adapter_config.json").read_text())


def net() -> nn.Module:
    return seeded(Net)


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
    make = lambda: seeded(Attention)
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


def attention() -> nn.Module:
    return seeded(Attention)


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


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    return seeded(transformers.LlamaForCausalLM, config)


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(vocab_size=31, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
                                        num_attention_heads=4, max_position_embeddings=20, num_labels=3)  # fmt: skip
    return seeded(transformers.RobertaForSequenceClassification, config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_positions=20)
    return seeded(transformers.GPT2Model, config)


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return seeded(timm.create_model, "vit_tiny_patch16_224", img_size=48, depth=2, num_classes=3)


TEXT = {"input_ids": torch.randint(2, 31, (3, 9), generator=torch.Generator().manual_seed(0))}
IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))

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


class Mixed(nn.Module):
    """Corners: an embedding with its own forward, a bare matrix, running statistics: ids [B, T] -> [B, 4]."""

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 3.0

    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Parameter(torch.randn(6, 8) * 0.4)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.proj.mT

    def __init__(self) -> None:
        super().__init__()
        self.table = Mixed.Scaled(13, 8)
        self.inner = Mixed.Projection()
        self.norm = nn.BatchNorm1d(6)
        self.norm.running_mean.fill_(0.3)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(self.table(ids)).mean(1)))


def mixed() -> nn.Module:
    return seeded(Mixed)


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

QUICK = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


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
    options = {"use_dora": data.draw(st.booleans()), "use_rslora": data.draw(st.booleans())}
    config = peft.LoraConfig(
        r=data.draw(st.integers(1, 5)), lora_alpha=data.draw(st.integers(1, 9)), target_modules=["1"], **options
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


# --- where PEFT is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"padding": 1, "padding_mode": "reflect"}, {"dilation": 2}], ids=["reflect", "dilated"]
)
def test_convolutions_peft_gets_wrong(tmp_path: Path, options: dict[str, Any]) -> None:
    """PEFT builds lora_A from kernel, stride and padding alone. With reflect padding its branch pads with zeros, so its
    forward is not that of its own merged weight; with dilation the shapes do not even meet. W + s B A through the layer's
    own geometry is both the definition of LoRA and what PEFT's merge gives, and it is what is loaded here. Writing such
    an adapter would make PEFT compute something else, so it is refused."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 3, 3, **options)).eval()
    x = torch.randn(2, 2, 9, 9)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"])).eval()
    randomise(p for n, p in sorted(theirs.named_parameters()) if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    try:
        unmerged = outputs(theirs, x)
    except RuntimeError:
        unmerged = None
    merged = outputs(theirs.merge_and_unload(), x)
    assert unmerged is None or (unmerged - merged).abs().max() > 1e-2  # PEFT contradicts itself
    load_peft(base, tmp_path / "theirs", example=x)
    torch.testing.assert_close(outputs(base, x), merged, atol=1e-5, rtol=1e-5)
    with pytest.raises(Unsupported, match=r"0\.weight: PEFT (runs|pads)"):
        export_peft(base, tmp_path / "ours", example=x)
    assert not (tmp_path / "ours").exists()


def test_out_proj_of_multihead_attention_counts_twice_in_peft(tmp_path: Path) -> None:
    """PEFT adds this update twice (huggingface/peft#3774), in forward and merge alike, and its adapters are trained that
    way: loading gives PEFT's outputs by doubling alpha there. If this fails, PEFT has changed; see OUT_PROJ_TIMES."""
    theirs = peft.get_peft_model(attention(), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["attn"])).eval()
    layer = theirs.base_model.model.attn.base_layer.out_proj
    randomise([layer.lora_A["default"].weight, layer.lora_B["default"].weight])
    once = attention()
    with torch.no_grad():
        once.attn.out_proj.weight += layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert (outputs(theirs, TOKENS) - outputs(once, TOKENS)).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path)
    ours = load_peft(attention(), tmp_path, example=TOKENS)
    torch.testing.assert_close(outputs(ours, TOKENS), outputs(theirs, TOKENS), atol=1e-5, rtol=1e-5)


def test_weights_that_are_read_are_not_exported(tmp_path: Path) -> None:
    """timm's BEiT reads qkv.weight, so PEFT's wrapper would never run."""
    timm = pytest.importorskip("timm")
    beit = seeded(
        timm.create_model, "beit_base_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3, num_classes=2
    )
    x = torch.randn(2, 3, 32, 32)
    mmpeft.attach(beit, {"blocks.*.attn.qkv": mmpeft.LoRA(rank=2)}, example=x)
    with pytest.raises(Unsupported, match="blocks.0.attn.qkv"):
        export_peft(beit, tmp_path / "out", example=x)
    assert not (tmp_path / "out").exists()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"fused": mmpeft.LoRA(rank=2), "head": mmpeft.IA3()}, r"mixes lora \(at fused.weight\) and ia3"),
        ({"fused": mmpeft.RoCoFT(rank=1)}, "fused.weight: PEFT has no RoCoFT"),
        ({"fused": mmpeft.LoRA(rank=2), "head": mmpeft.RoCoFT(rank=1)}, "head.weight: PEFT has no RoCoFT"),
        ({"head.bias": mmpeft.BitFit()}, "head.bias: PEFT trains only"),
        ({"conv1": mmpeft.IA3()}, "conv1.weight: PEFT has no IA3 for a Conv1d"),
        ({"head.weight": mmpeft.IA3()}, "head.weight: PEFT scales the bias too"),
        ({"conv2": mmpeft.VeRA(rank=2)}, "conv2.weight: PEFT has no VeRA"),
        ({"grouped": mmpeft.DoRA(rank=2)}, "grouped.weight: PEFT has no DoRA for grouped"),
    ],
)
def test_what_peft_cannot_express_is_refused_before_writing(tmp_path: Path, plan: dict[str, Any], message: str) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"earlier")
    model = mmpeft.attach(net(), plan, example=IDS)
    with pytest.raises(Unsupported, match=message):
        export_peft(model, folder, example=IDS)
    assert [p.name for p in folder.iterdir()] == ["adapter_model.safetensors"]
    assert (folder / "adapter_model.safetensors").read_bytes() == b"earlier"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["fused", "head"]))
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def reconfigure(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_bad_tensors_are_named(folder: Path) -> None:
    def change(t: dict[str, Tensor]) -> None:
        t["base_model.model.extra.lora_A.weight"] = torch.zeros(2)
        del t["base_model.model.head.lora_A.weight"]
        t["base_model.model.fused.lora_A.weight"] = torch.zeros(3, 4)

    edit(folder, change)
    model = net()
    with pytest.raises(FileFormatError) as error:
        load_peft(model, folder, example=IDS)
    for words in ("missing base_model.model.head.lora_A.weight", "extra base_model.model.extra.lora_A.weight",
                  "fused.lora_A.weight has shape (3, 4), expected (2, 3)"):  # fmt: skip
        assert words in str(error.value)
    assert not hasattr(model.head, "_adapters")  # nothing was attached


def test_nan_is_refused(folder: Path) -> None:
    edit(folder, lambda t: t["base_model.model.head.lora_A.weight"].fill_(float("nan")))
    with pytest.raises(FileFormatError, match="head.lora_A.weight hold NaN"):
        read_peft(folder)


def test_pickles_and_broken_files_are_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FileFormatError, match="truncated"):
        read_peft(folder)
    path.unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(FileFormatError, match="pickle, which mmpeft never loads"):
        read_peft(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(FileFormatError, match="no JSON"):
        read_peft(folder)
    with pytest.raises(NameNotFound, match="holds no HF PEFT adapter"):
        read_peft(folder / "nowhere")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "LOHA"}, "PEFT type 'LOHA'.*mmpeft reads LORA"),
        ({"init_lora_weights": "corda"}, "'corda' rewrote the base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_modules": ["fused", "head", "norm"]}, "norm: PEFT has no LoRA for a LayerNorm"),
    ],
)
def test_configurations_without_counterpart_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    reconfigure(folder, **fields)
    with pytest.raises(Unsupported, match=message):
        load_peft(net(), folder, example=IDS)


@pytest.mark.parametrize("fields, message", [({"r": 0}, "r is 0"), ({"target_modules": "(fused"}, "no regular expression"),
                                             ({"target_modules": ["fused"]}, "extra base_model.model.head")])  # fmt: skip
def test_configurations_that_do_not_fit_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    reconfigure(folder, **fields)
    with pytest.raises(FileFormatError, match=message):
        load_peft(net(), folder, example=IDS)


def test_tied_weights(tmp_path: Path) -> None:
    """PEFT adapts one of two tied names and leaves the other on the base; here they are one weight."""
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=4, n_positions=20)
    make = lambda: seeded(transformers.GPT2LMHeadModel, config)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["wte"]))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(Unsupported, match="tied to lm_head.weight"):
        load_peft(make(), tmp_path / "theirs", example=TEXT)
    model = mmpeft.attach(make(), {"transformer.wte": mmpeft.LoRA(rank=2)}, example=TEXT)
    with pytest.raises(Unsupported, match="tied to lm_head.weight"):
        export_peft(model, tmp_path / "ours", example=TEXT)


def test_names_that_end_alike(tmp_path: Path) -> None:
    """PEFT's lists match endings: 'fc' would hit 'net.fc' too, in targets, patterns and modules_to_save."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
            self.net = nn.ModuleDict({"fc": nn.Linear(6, 6), "aux_head": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net["aux_head"](self.net["fc"](self.fc(x))))

    x = torch.randn(3, 5)
    config = to_peft(lambda: seeded(Twice), {"fc": mmpeft.LoRA(rank=2)}, x, tmp_path / "a")
    assert config["target_modules"] == "fc"  # an expression, which PEFT matches against the whole path
    to_peft(
        lambda: seeded(Twice),
        {"net.fc": mmpeft.LoRA(rank=2), "fc": mmpeft.LoRA(rank=3), "head": "full"},
        x,
        tmp_path / "b",
    )
