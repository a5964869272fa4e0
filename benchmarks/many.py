"""64 adapters in one batch: every row of it under an adapter of its own, without gradients.

    python -m benchmarks.many                       # prefill: 64 rows of 128 tokens
    python -m benchmarks.many --length 1            # as a decoding step: 64 rows of one token

Arms: mmpeft with `rows=`, mmpeft with one adapter, both unmerged on the fused decoder and one CUDA graph a step; PEFT's
`adapter_names`, PEFT with one adapter. 360M shape, LoRA r=16 on all linears. The gate compares the mean
size of the last logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Row, need, parse, parser
from benchmarks.models import ALPHA, BATCHES, RANK, SHAPES, TARGETS, TINY, autocast, llama, peft, set_mmpeft, set_peft
from benchmarks.models import token_batches as tokens

Step = Callable[[int], Any]


def names(args: argparse.Namespace) -> list[str]:
    """The adapters."""
    return [f"a{i}" for i in range(4 if args.tiny else args.adapters)]


def ours(args: argparse.Namespace, *, one: bool = False) -> Step:
    """mmpeft; with `one`, all rows under the same adapter."""
    import mmpeft

    shape = TINY if args.tiny else SHAPES[args.shape]
    model = llama(shape)
    plan = {f"model.layers.*.*.{{{','.join(TARGETS)}}}": mmpeft.LoRA(rank=RANK, alpha=ALPHA)}
    every = names(args)
    for name in every[: 1 if one else None]:
        mmpeft.attach(model, plan, name=name, check=False)
        set_mmpeft(model, name, salt=name)
    model.eval()
    if one:
        mmpeft.use(model, every[0])
    else:
        mmpeft.stack(model)
        mmpeft.use(model, rows=every)
    compiled = mmpeft.compile(model.eval(), graphs=False, loss=False, out=StringIO())
    (decoder,), head = compiled.decoders, model.get_output_embeddings()
    graph = compiled.graph(lambda ids: head(model.model(input_ids=ids, use_cache=False)[0][:, -1:]))

    def last(ids: Tensor) -> Tensor:
        logits: Tensor = graph(ids)
        if decoder.calls["own"]:  # no measurement of what the arm's name says
            raise RuntimeError(f"not on the fused decoder: {', '.join(decoder.reasons)}")
        return logits

    return states(args, len(every), last)


def peer(args: argparse.Namespace, *, one: bool = False) -> Step:
    """PEFT; `adapter_names` sends each row through a loop over the adapters."""
    need("peft")
    from peft import LoraConfig

    shape = TINY if args.tiny else SHAPES[args.shape]
    model = peft(llama(shape), task_type="CAUSAL_LM")
    set_peft(model, "default", salt="a0")
    every = names(args)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    for name in [] if one else every[1:]:
        model.add_adapter(name, config)
        set_peft(model, name, salt=name)
    model.eval()
    more = {} if one else {"adapter_names": ["default", *every[1:]]}
    return states(
        args, len(every), lambda ids: model(input_ids=ids, use_cache=False, logits_to_keep=1, **more).logits
    )


def states(args: argparse.Namespace, rows: int, last: Callable[[Tensor], Tensor]) -> Step:
    """Logits of the last position, which `last` gives for ids [rows, length]."""
    data = tokens(TINY if args.tiny else SHAPES[args.shape], rows, 5 if args.tiny else args.length)

    @torch.no_grad()
    def step(i: int) -> Tensor:
        with autocast():
            return last(data[i % BATCHES]).float().abs()

    return step


ARMS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "mmpeft": ours,
    "mmpeft, one adapter": lambda args: ours(args, one=True),
    "peft": peer,
    "peft, one adapter": lambda args: peer(args, one=True),
}


def main(argv: Sequence[str] | None = None) -> Row:
    made = parser(__doc__)
    made.add_argument("--adapters", type=int, default=64)
    made.add_argument("--length", type=int, default=128)
    made.add_argument("--shape", choices=("360m", "1.5b"), default="360m")
    args = parse(made, argv, ARMS)
    shape, count = (TINY, 4) if args.tiny else (SHAPES[args.shape], args.adapters)
    items = count * args.length
    flops = (shape.flops(1, length=args.length, supervised=0)) / 2 * items
    title = f"{args.shape}, {count} adapters in one batch of {count}x{args.length}, LoRA r{RANK}"
    row = Row(title, unit="tokens/s", items=items, flops=flops, args=args)
    row.arms({name: lambda build=build: build(args) for name, build in ARMS.items()}, again="mmpeft")
    row.lines = [x for x in row.lines if "one adapter" not in x["arm"]]
    row.gate(relative=2e-2)
    return row


if __name__ == "__main__":
    main()
