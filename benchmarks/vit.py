"""Training steps of ViT-B/16 at 224 px, batch 256: LoRA r=16 on qkv, proj, fc1 and fc2, cross-entropy over 1,000 classes.

    python -m benchmarks.vit

Arms: mmpeft (bf16 base, `mmpeft.compile`: fused blocks), its engine alone and under torch.compile, PEFT (autocast), PEFT + compile (bf16 base,
its fastest), full fine-tuning + compile. The head is frozen everywhere; images are noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DEVICE, Row, compile_options, need, parse, parser
from benchmarks.models import ALPHA, BATCHES, DTYPE, RANK, adamw, fill, peft, set_mmpeft

TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
Step = Callable[[int], Any]


def vit(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """timm's model, random weights, no dropout."""
    need("timm")
    import timm

    small = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10} if args.tiny else {}
    model = timm.create_model("vit_base_patch16_224", pretrained=False, **small)
    return fill(model.to(DEVICE, dtype))


def data(args: argparse.Namespace, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Batches of noise and labels."""
    n, side, classes = (4, 32, 10) if args.tiny else (args.batch, 224, 1000)
    g = torch.Generator(DEVICE).manual_seed(2)
    images = [torch.randn(n, 3, side, side, device=DEVICE, generator=g).to(dtype) for _ in range(BATCHES)]
    return [(x, torch.randint(0, classes, (n,), device=DEVICE, generator=g)) for x in images]


def training(forward: Callable[[Tensor], Tensor], model: Any, batches: list[Any], *, amp: bool) -> Step:
    """Forward, backward, AdamW."""
    optimizer = adamw(model)

    def step(i: int) -> Tensor:
        x, y = batches[i % BATCHES]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=amp and DEVICE == "cuda"):
            logits = forward(x)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def ours(args: argparse.Namespace, *, blocks: bool = False, towers: bool = False) -> Step:
    """mmpeft on a bf16 base: the engine alone, its blocks fused, or the whole under torch.compile."""
    import mmpeft

    if towers:
        need(gpu=True)
    model = vit(args, DTYPE)
    plan = {f"blocks.*.{target}": mmpeft.LoRA(rank=RANK, alpha=ALPHA) for target in TARGETS}
    mmpeft.attach(model, plan, check=False)
    set_mmpeft(model)
    model.train()
    if blocks or towers:
        mmpeft.compile(model, blocks=blocks, towers=towers)
    return training(model, model, data(args, DTYPE), amp=False)


def peer(args: argparse.Namespace, *, compiled: bool, bf16: bool) -> Step:
    """PEFT: fp32 base under autocast, or a bf16 base under autocast, which keeps its fp32 adapters from widening x."""
    need("peft")
    dtype = DTYPE if bf16 else torch.float32
    model = peft(vit(args, dtype), ("qkv", "attn.proj", "fc1", "fc2"))
    forward = torch.compile(model, **compile_options(args)) if compiled else model
    return training(forward, model, data(args, dtype), amp=True)


def full(args: argparse.Namespace) -> Step:
    """Everything trains, compiled, fp32 weights under autocast."""
    model = vit(args, torch.float32).requires_grad_(True).train()
    forward = torch.compile(model, **compile_options(args))
    return training(forward, model, data(args, torch.float32), amp=True)


ARMS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "mmpeft": lambda args: ours(args, blocks=True),
    "mmpeft engine": ours,
    "mmpeft engine+compile": lambda args: ours(args, towers=True),
    "peft": lambda args: peer(args, compiled=False, bf16=False),
    "peft+compile": lambda args: peer(args, compiled=True, bf16=False),
    "peft+compile, bf16 base": lambda args: peer(args, compiled=True, bf16=True),
    "full+compile": full,
}


def main(argv: Sequence[str] | None = None) -> Row:
    made = parser(__doc__)
    made.add_argument("--batch", type=int, default=256)
    args = parse(made, argv, ARMS)
    images = 4 if args.tiny else args.batch
    row = Row(f"ViT-B/16 224 px x{images}, LoRA r{RANK}", unit="images/s", items=images, flops=images * 75.0e9, args=args)
    row.arms({name: lambda build=build: build(args) for name, build in ARMS.items()}, again="mmpeft")
    row.gate(relative=1e-2)
    return row


if __name__ == "__main__":
    main()
