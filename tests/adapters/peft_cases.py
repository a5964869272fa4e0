"""Models and round trips that the tests of HF PEFT's format share; peft itself is the oracle."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters.peft.format import export_peft, is_peft, load_peft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore", module="peft")
boft = pytest.importorskip("peft.tuners.boft.layer")
boft.get_fbd_cuda = lambda: None  # no attempt to compile its CUDA extension: what peft does where that fails
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


def attention() -> nn.Module:
    return seeded(Attention)


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


class Even(nn.Module):
    """One of everything, with sides that blocks of 4 divide: ids [B, T] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 8)
        self.conv1 = nn.Conv1d(8, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 4, (1, 3), padding=(0, 2), groups=2, dilation=(1, 2))
        self.conv3 = nn.Conv3d(1, 3, (1, 2, 3), padding=1)
        self.fused = nn.Linear(12, 24)
        self.norm = nn.LayerNorm(24)
        self.gpt = transformers.pytorch_utils.Conv1D(8, 24)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = 2 * self.conv1(self.table(ids).mT)  # [B, 12, T]
        x = 2 * self.point(2 * self.conv2(x.unflatten(1, (4, 3))))  # [B, 8, 2, T / 2]
        x = 2 * self.conv3(2 * self.grouped(x).unsqueeze(1)).mean((2, 4)).flatten(1)  # [B, 9]
        x = torch.nn.functional.pad(x, (0, 3), value=0.5)
        return self.head(self.gpt(self.norm(self.fused(x))))


def even() -> nn.Module:
    return seeded(Even)
