"""Training steps of Llama-type models with LoRA r=16 on all linears: bf16 base, fp32 adapters, AdamW included.

    python -m benchmarks.llm --shape 1.5b                        # every arm
    python -m benchmarks.llm --shape 1.5b --dropout 0.05         # the same with dropout
    python -m benchmarks.llm --shape 1.5b --dora                 # DoRA, to be read beside LoRA's row
    python -m benchmarks.llm --shape 1.5b --base nf4             # frozen linears in 4 bits
    python -m benchmarks.llm --shape 1.5b --packed               # four documents in every row, none seeing another
    python -m benchmarks.llm --shape 360m --arms mmpeft peft+compile --profile trace.txt

Random weights of public shapes, random tokens, every position supervised.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import DEVICE, Row, Skipped, compile_options, need, parse, parser
from benchmarks.models import (
    ALPHA,
    BATCHES,
    RANK,
    SHAPES,
    TARGETS,
    TINY,
    Shape,
    adamw,
    autocast,
    llama,
    peft,
    set_mmpeft,
    token_batches,
)

Step = Callable[[int], Any]


def attached(shape: Shape, args: argparse.Namespace) -> Any:
    """The model with mmpeft's adapter; `--base` quantises first."""
    import mmpeft

    model = llama(shape)
    if args.base != "bf16":
        mmpeft.quantise(model, "model.layers", args.base)
    method = mmpeft.DoRA if args.dora else mmpeft.LoRA
    plan = {f"model.layers.*.*.{{{','.join(TARGETS)}}}": method(rank=RANK, alpha=ALPHA, dropout=args.dropout)}
    mmpeft.attach(model, plan, check=False)
    set_mmpeft(model)
    return model.train()


def fused(shape: Shape, args: argparse.Namespace) -> Step:
    """`mmpeft.compile` and its written-out step, one CUDA graph."""
    import mmpeft

    model = attached(shape, args)
    compiled = mmpeft.compile(model)
    if not compiled.decoders:
        raise Skipped("the decoder is not fused (see the report above)")
    torch.cuda.empty_cache() if DEVICE == "cuda" else None
    data = token_batches(shape)
    if args.packed:
        documents, positions = packing(shape)
        step = compiled.train_step(batch=shape.batch, length=shape.length, documents=len(CUTS) * shape.batch, lr=1e-4)
        labels = [ids.masked_fill(positions == 0, -100) for ids in data]
        return lambda i: step(data[i % BATCHES], labels[i % BATCHES], documents=documents)
    step = compiled.train_step(batch=shape.batch, length=shape.length, lr=1e-4)
    return lambda i: step(data[i % BATCHES], data[i % BATCHES])


CUTS = (1, 7, 3, 5)  # sixteenths of a row: the documents' lengths


def packing(shape: Shape) -> tuple[Tensor, Tensor]:
    """(document ids on the CPU, as a collator gives them, positions on the device), each [B, S]."""
    lengths = torch.tensor([c * shape.length // sum(CUTS) for c in CUTS])
    lengths[-1] += shape.length - lengths.sum()
    ids = torch.repeat_interleave(torch.arange(1, len(CUTS) + 1), lengths)
    positions = torch.cat([torch.arange(int(n)) for n in lengths]).to(DEVICE)
    return ids.expand(shape.batch, -1), positions.expand(shape.batch, -1)


def engine(shape: Shape, args: argparse.Namespace, *, compiled: bool = False) -> Step:
    """The engine's factored plan under autograd, its linears one operator each; the loss without logits."""
    import mmpeft

    model = attached(shape, args)
    if not compiled:  # torch.compile fuses transformers' own loss
        mmpeft.compile(model, decoders=False, towers=False, graphs=False, out=io.StringIO())
    return autograd_step(model, shape, args, compiled=compiled)


def peer(shape: Shape, args: argparse.Namespace, *, compiled: bool = False, liger: bool = False) -> Step:
    """HF PEFT with its default fp32 adapters under bf16 autocast, its fastest setting; fused AdamW."""
    need("peft")
    if args.base != "bf16":
        raise Skipped("PEFT quantises through bitsandbytes, which is not carried")
    model = llama(shape)
    if liger:
        need("liger_kernel", gpu=True)
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    model = peft(model, lora_dropout=args.dropout, use_dora=args.dora, task_type="CAUSAL_LM")
    return autograd_step(model, shape, args, compiled=compiled)


def autograd_step(model: Any, shape: Shape, args: argparse.Namespace, *, compiled: bool) -> Step:
    """Forward and backward by autograd, then AdamW."""
    optimizer = adamw(model)
    forward = torch.compile(model, **compile_options(args)) if compiled else model
    data = token_batches(shape)
    more: dict[str, Any] = {}
    positions = None
    if args.packed:  # transformers makes a block-diagonal mask of positions that begin again at 0
        positions = packing(shape)[1]
        more = {"position_ids": positions, "use_cache": False}

    def step(i: int) -> Any:
        ids = data[i % BATCHES]
        labels = ids if positions is None else ids.masked_fill(positions == 0, -100)
        with autocast():
            loss = forward(input_ids=ids, labels=labels, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


ARMS: dict[str, Callable[[Shape, argparse.Namespace], Step]] = {
    "mmpeft": fused,
    "mmpeft engine": engine,
    "mmpeft engine+compile": lambda shape, args: engine(shape, args, compiled=True),
    "peft": peer,
    "peft+compile": lambda shape, args: peer(shape, args, compiled=True),
    "unsloth": peer,  # in a process of its own, see main
    "peft+liger": lambda shape, args: peer(shape, args, liger=True),  # last: it patches transformers' classes for good
}


def main(argv: Sequence[str] | None = None) -> Row:
    made = parser(__doc__)
    made.add_argument("--shape", choices=SHAPES, default="1.5b")
    made.add_argument("--dropout", type=float, default=0.0)
    made.add_argument("--dora", action="store_true")
    made.add_argument("--base", choices=("bf16", "nf4", "int8", "fp8"), default="bf16", help="storage of the linears")
    made.add_argument("--packed", action="store_true", help="four documents a row")
    made.add_argument("--profile", type=Path, help="write a kernel table of the fused step, uncaptured")
    args = parse(made, argv, ARMS)
    shape = TINY if args.tiny else SHAPES[args.shape]
    kind = f"{'DoRA' if args.dora else 'LoRA'} r{RANK} all linears"
    kind += f", dropout {args.dropout:g}" if args.dropout else ""
    kind += f", {args.base} base" if args.base != "bf16" else ""
    kind += f", {len(CUTS)} documents a row" if args.packed else ""
    tokens = shape.batch * shape.length
    seen = shape.length * sum(c * c for c in CUTS) // sum(CUTS) ** 2 if args.packed else shape.length
    title = f"{args.shape} {shape.batch}x{shape.length}, {kind}"
    row = Row(title, unit="tokens/s", items=tokens, flops=shape.flops(tokens, length=seen), args=args)
    builders = {name: lambda build=build: build(shape, args) for name, build in ARMS.items() if name != "unsloth"}
    last = {k: builders.pop(k) for k in ("peft+liger",)}
    row.arms(builders, again="mmpeft")
    if "unsloth" in args.arms and args.base == "bf16" and not args.dora and not args.packed:
        options = ["--shape", args.shape, "--dropout", str(args.dropout), "--warmup", str(args.warmup)]
        row.subprocess("unsloth", "benchmarks.unsloth_arm", *options, "--steps", str(args.steps), *["--tiny"] * args.tiny)
    row.arms(last)
    row.gate(relative=1e-1 if args.base != "bf16" or args.dropout else 2e-3)
    if args.profile:
        profile(shape, args)
    return row


def profile(shape: Shape, args: argparse.Namespace) -> None:
    """Kernel times of an uncaptured fused step, the largest first."""
    from torch.profiler import ProfilerActivity

    step = fused(shape, args)
    trainer = next(c.cell_contents for c in step.__closure__ or () if hasattr(c.cell_contents, "_run"))
    trainer._run()
    kinds = [ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as prof:
        trainer._run()
        torch.cuda.synchronize() if DEVICE == "cuda" else None
    key = "cuda_time_total" if DEVICE == "cuda" else "cpu_time_total"
    table = prof.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=110)
    args.profile.parent.mkdir(parents=True, exist_ok=True)
    args.profile.write_text(table)
    print("\n".join(line[:112] + line[-75:] for line in table.splitlines()[:34]))


if __name__ == "__main__":
    main()
