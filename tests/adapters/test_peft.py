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
        self.experts = Experts(dim)
        self.head = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        keys = x[..., : self.attn.kdim]
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
    base = make()
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
    config = peft.VeraConfig(r=5, target_modules=["fused", "gpt", "head"], save_projection=save_projection, projection_prng_key=3)
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
    mmpeft.load(again, tmp_path / "ours", example=IDS)
    assert torch.equal(outputs(again, IDS), outputs(base, IDS))


def test_ln_tuning_from_peft(tmp_path: Path) -> None:
    config = peft.LNTuningConfig(target_modules=["norm", "fused"], modules_to_save=["head"])
    from_peft(net, config, IDS, tmp_path)


def test_attention_and_experts_from_peft(tmp_path: Path) -> None:
    """Packed in_proj and out_proj under one target, two parameters of one module nested."""
    make = lambda: seeded(Attention)  # noqa: E731
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
