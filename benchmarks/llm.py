"""Training steps of Llama-type models with LoRA r=16 on all linears: bf16 base, fp32 adapters, AdamW included.

    python -m benchmarks.llm --shape 1.5b                        # every arm
    python -m benchmarks.llm --shape 360m --arms mmpeft peft+compile --profile trace.txt

Random weights of public shapes, random tokens, non-zero B (zeros run faster than data does).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its batch."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    batch: int
    length: int

    def flops(self, tokens: int) -> float:
        """4 N a token for a frozen base (forward and dX), and causal attention (2 S a forward, 2.5x that backward)."""
        d = self.hidden // self.heads
        kv = self.kv_heads * d
        linears = self.layers * (self.hidden * (2 * self.hidden + 2 * kv) + 3 * self.hidden * self.ffn)
        attention = 7 * self.length * self.hidden * self.layers
        return tokens * (4 * (linears + self.hidden * self.vocab) + attention)


SHAPES = {
    "1.5b": Shape(1536, 28, 12, 2, 8960, 151936, True, 8, 1024),
    "360m": Shape(960, 32, 15, 5, 2560, 49152, True, 16, 512),
    "7b": Shape(4096, 32, 32, 32, 11008, 32000, False, 4, 1024),
    "tiny": Shape(256, 2, 4, 2, 512, 1000, True, 2, 64),
}
RANK, ALPHA, BATCHES = 16, 32, 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_model(shape: Shape, device: str = "cuda") -> Any:
    """A LlamaForCausalLM of random weights: the same on every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, intermediate_size=shape.ffn, vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied, max_position_embeddings=4096, rms_norm_eps=1e-5, use_cache=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        p.data.fill_(1.0) if "norm" in name else p.data.normal_(0, 0.02, generator=generator)
    return model.requires_grad_(False)


def adapter(path: str, n_in: int, n_out: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """The same A and B for a path in every arm; B is not zero."""
    generator = torch.Generator(device).manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(path)))
    A = torch.randn(RANK, n_in, device=device, generator=generator) / n_in**0.5
    B = torch.randn(n_out, RANK, device=device, generator=generator) * 0.002
    return A, B


def batches(shape: Shape, device: str = "cuda") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`BATCHES` batches of random tokens, all supervised."""
    generator = torch.Generator(device).manual_seed(1)
    ids = [
        torch.randint(0, shape.vocab, (shape.batch, shape.length), device=device, generator=generator)
        for _ in range(BATCHES)
    ]
    return [(i, i) for i in ids]


def build_mmpeft(shape: Shape, args: argparse.Namespace) -> Callable[[int], Any]:
    """The fused step, captured as one CUDA graph."""
    from mmpeft.kernels import fuse
    from mmpeft.kernels.step import TrainStep

    model = make_model(shape)
    found = {}
    for name, m in model.named_modules():
        if name.split(".")[-1] in TARGETS:
            A, B = adapter(name, m.in_features, m.out_features)
            found[name] = fuse.LowRank(torch.nn.Parameter(A), torch.nn.Parameter(B), ALPHA / RANK)
    fused = fuse.from_model(model, found, dropout=args.dropout)
    torch.cuda.empty_cache()
    step = TrainStep(fused, fused.optimizer(lr=1e-4), batch=shape.batch, length=shape.length)
    data = batches(shape)
    return lambda i: step(*data[i % BATCHES])


def build_peft(
    shape: Shape, args: argparse.Namespace, *, compiled: bool = False, liger: bool = False
) -> Callable[[int], Any]:
    """HF PEFT with its default fp32 adapters under bf16 autocast, its fastest setting; fused AdamW."""
    from peft import LoraConfig, get_peft_model

    model = make_model(shape)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=args.dropout,
        target_modules=list(TARGETS),
        use_dora=args.dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    for name, m in model.named_modules():
        if hasattr(m, "lora_A"):
            A, B = adapter(name.removeprefix("base_model.model."), m.in_features, m.out_features)
            m.lora_A["default"].weight.data.copy_(A)
            m.lora_B["default"].weight.data.copy_(B)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True
    )
    forward = torch.compile(model, dynamic=False) if compiled else model
    data = batches(shape)

    def step(i: int) -> torch.Tensor:
        ids, labels = data[i % BATCHES]
        with torch.autocast(
            "cuda", torch.bfloat16
        ):  # without it every LoRA product runs in fp32: 25 % slower, 8 GiB more
            loss = forward(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


ARMS: dict[str, Callable[[Shape, argparse.Namespace], Callable[[int], Any]]] = {
    "mmpeft": build_mmpeft,
    "peft": build_peft,
    "peft+compile": lambda shape, args: build_peft(shape, args, compiled=True),
    "peft+liger": lambda shape, args: build_peft(
        shape, args, liger=True
    ),  # last: it patches transformers' classes for good
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", type=Path, help="write a kernel table of the fused step, uncaptured")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("mmpeft").setLevel(logging.INFO)
    for noisy in ("httpx", "torch", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    shape = SHAPES[args.shape]
    tokens = shape.batch * shape.length
    kind = f"{'DoRA' if args.dora else 'LoRA'} r{RANK} all linears" + (
        f", dropout {args.dropout}" if args.dropout else ""
    )
    row = Row(
        f"{args.shape} {shape.batch}x{shape.length}, {kind}",
        unit="tokens/s",
        items=tokens,
        flops=shape.flops(tokens),
        out=args.out,
    )
    names = [name for name in ARMS if name in args.arms]
    if "mmpeft" in names and len(names) > 1:
        names.insert(-1 if "peft+liger" in names else len(names), "mmpeft")
    for i, name in enumerate(names):
        row.arm(
            name,
            lambda name=name: ARMS[name](shape, args),
            warmup=args.warmup,
            steps=args.steps,
            repeat=name in names[:i],
        )
    row.gate()
    if args.profile:
        profile(shape, args)


def profile(shape: Shape, args: argparse.Namespace) -> None:
    """Kernel times of two uncaptured fused steps, the largest first."""
    from torch.profiler import ProfilerActivity

    step = build_mmpeft(shape, args)
    trainer = next(c.cell_contents for c in step.__closure__ or () if hasattr(c.cell_contents, "_run"))
    trainer._run()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as prof:
        trainer._run()
        torch.cuda.synchronize()
    table = prof.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=110)
    args.profile.parent.mkdir(parents=True, exist_ok=True)
    args.profile.write_text(table)
    print("\n".join(line[:112] + line[-75:] for line in table.splitlines()[:34]))


if __name__ == "__main__":
    main()
