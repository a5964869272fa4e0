"""The models of the benchmarks: public shapes, random weights that are the same in every arm, and adapters likewise.

B is not zero (zeros run faster than data does), norms are 1, everything else N(0, 0.02).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE

RANK, ALPHA, BATCHES = 16, 32, 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model and its batch."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    batch: int
    length: int

    def flops(self, tokens: int, *, length: int | None = None, supervised: int | None = None) -> float:
        """4 N a token for a frozen base (forward and dX), and causal attention (2 S a forward, 2.5x that backward)."""
        d = self.hidden // self.heads
        kv = self.kv_heads * d
        linears = self.layers * (self.hidden * (2 * self.hidden + 2 * kv) + 3 * self.hidden * self.ffn)
        attention = 7 * (length or self.length) * self.hidden * self.layers
        head = (tokens if supervised is None else supervised) * 4 * self.hidden * self.vocab
        return tokens * (4 * linears + attention) + head


SHAPES = {
    "1.5b": Shape(1536, 28, 12, 2, 8960, 151936, True, 8, 1024),
    "360m": Shape(960, 32, 15, 5, 2560, 49152, True, 16, 512),
    "7b": Shape(4096, 32, 32, 32, 11008, 32000, False, 4, 1024),
}
TINY = Shape(64, 2, 4, 2, 96, 128, True, 2, 16)


def llama_config(shape: Shape) -> Any:
    """The configuration of transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.ffn, vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied, max_position_embeddings=4096, rms_norm_eps=1e-5, use_cache=False,
    )  # fmt: skip


def llama(shape: Shape) -> Any:
    """A LlamaForCausalLM of random weights: the same on every call."""
    from transformers import LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM._from_config(llama_config(shape), attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    return fill(model)


def fill(model: Any) -> Any:
    """Random frozen weights in name order, from one seed."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        if p.ndim < 2:
            p.data.fill_(1.0 if "norm" in name and not name.endswith("bias") else 0.0)
        else:
            p.data.normal_(0, 0.02, generator=generator)
    return model.requires_grad_(False)


def pair(path: str, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """The same A [r, in] and B [out, r] for a path in every arm; B is not zero."""
    generator = torch.Generator(DEVICE).manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(path)))
    A = torch.randn(RANK, n_in, device=DEVICE, generator=generator) / n_in**0.5
    B = torch.randn(n_out, RANK, device=DEVICE, generator=generator) * 0.002
    return A, B


@torch.no_grad()
def set_mmpeft(model: nn.Module, name: str = "default", salt: str = "") -> None:
    """Write `pair` into an mmpeft adapter."""
    from mmpeft.adapters.state import slots

    for path, _, slot in slots(model):
        for _, delta in slot.deltas((name,)):
            A, B = pair(salt + path, delta.A.shape[1], delta.B.shape[0])
            delta.A.copy_(A)
            delta.B.copy_(B)


@torch.no_grad()
def set_peft(model: nn.Module, name: str = "default", salt: str = "") -> None:
    """Write `pair` into a PEFT adapter, and DoRA's magnitudes again (the row norms without the update, as at init)."""
    for path, m in model.named_modules():
        if hasattr(m, "lora_A") and name in m.lora_A:
            A, B = pair(salt + path.removeprefix("base_model.model."), m.in_features, m.out_features)
            m.lora_A[name].weight.copy_(A)
            m.lora_B[name].weight.copy_(B)


def peft(model: nn.Module, targets: tuple[str, ...] = TARGETS, **options: Any) -> Any:
    """PEFT's LoRA (default fp32 adapters) on a model, the pairs written in."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), **options)
    wrapped = get_peft_model(model, config)
    set_peft(wrapped)
    return wrapped.train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over what trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=DEVICE == "cuda")


def autocast() -> Any:
    """bf16 autocast on the GPU: without it every LoRA product of PEFT runs in fp32 (25 % slower, 8 GiB more)."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda")


def token_batches(shape: Shape, batch: int | None = None, length: int | None = None) -> list[Tensor]:
    """`BATCHES` batches of random tokens."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    size = (batch or shape.batch, length or shape.length)
    return [torch.randint(0, shape.vocab, size, device=DEVICE, generator=generator) for _ in range(BATCHES)]


def trained(model: nn.Module) -> Iterator[Tensor]:
    """Parameters that train."""
    return (p for p in model.parameters() if p.requires_grad)
