"""Switching adapters: host time of `mmpeft.use` and of what PEFT has for it, in milliseconds a switch.

    python -m benchmarks.switching                  # CPU or GPU, 4 minutes; appends to results/switching.jsonl

A Llama-shaped decoder of 32 blocks, LoRA r=16 on all seven linears: 224 sites. Widths are tiny, since what counts is the
host's walk over the modules, the same for wide ones; only the last row runs the model in what it times. Five rows:

- two adapters in turn: `use(model, name)`, as a call and as a `with` (there and back, so two switches); PEFT's `set_adapter`,
  which also moves `requires_grad`, and the same with `inference_mode=True`. `use` leaves gradients as they are.
- the base and back: `with use(model, None)`; PEFT's `with disable_adapter()`, which looks at the whole model's status first.
- one of 64 adapters in turn; "stacked" is after `mmpeft.stack`, where `use` compares versions and writes an index tensor.
- 64 rows under 64 adapters: `use(rows=)` is said once and stays. PEFT's `adapter_names` is an argument of every forward,
  which hangs a hook on each site and takes it off again; the arm times those hooks alone, as a `with`.
- the same with a forward of one token a row, which compares the two whole: PEFT's forward loops over the adapters, mmpeft's
  unstacked one does too. All eager, so with `mmpeft.compile` mmpeft's forward is another; on a GPU it is waited for.

Arms take turns: a round is a burst of switches of each. Every switch is timed, on a CPU in the thread's own time (other
programs count less), on a GPU by the wall clock, with the garbage collector off; medians and quartiles of all. The gate
compares outputs under two choices, made as in the arm, with PEFT's.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmpeft
from benchmarks.harness import DEVICE, Row, Skipped, free, need, parse, parser
from benchmarks.models import ALPHA, RANK, TARGETS, TINY, Shape, llama, peft, set_mmpeft, set_peft, token_batches

RESULTS = Path(__file__).parent / "results" / "switching.jsonl"
DEEP = Shape(32, 32, 4, 2, 48, 128, True, 2, 5)  # 32 blocks of 7 linears


@dataclass(frozen=True)
class Arm:
    """How an arm makes its `i`-th choice the active one: `at(i)`, or, with `block`, a `with` of it."""

    model: Any
    ids: Tensor  # [B, T]
    at: Callable[[int], AbstractContextManager[Any] | None]
    block: bool = False
    checked: tuple[int, int] = (0, 1)  # choices whose outputs the gate compares

    def switch(self, i: int, *, forward: bool) -> None:
        """What is timed."""
        entered = self.at(i)
        with entered if self.block and entered is not None else nullcontext():
            if forward:
                self.run()

    def run(self) -> Tensor:
        """Logits of the last position, [B, 1, vocab]."""
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return logits

    def values(self) -> list[float]:
        """The mean size of the output under the two choices.

        Raises:
            RuntimeError: it is the same, so nothing was switched.
        """
        found = []
        for i in self.checked:
            with self.at(i) or nullcontext():
                found.append(float(self.run().abs().mean()))
        if abs(found[0] - found[1]) <= 2e-4 * found[0]:
            raise RuntimeError(f"the output is {found[0]} under both choices")
        return found


Builder = Callable[[Shape, int], Arm]  # of (shape, number of adapters)


def names(count: int, first: str = "a0") -> list[str]:
    """The adapters; PEFT's first one is called "default"."""
    return [first, *(f"a{i}" for i in range(1, count))]


@cache
def ours(shape: Shape, count: int, *, stacked: bool = False) -> Any:
    """A decoder under mmpeft, fp32."""
    model = llama(shape).float()
    plan = {f"model.layers.*.*.{{{','.join(TARGETS)}}}": mmpeft.LoRA(rank=RANK, alpha=ALPHA)}
    for name in names(count):
        mmpeft.attach(model, plan, name=name, check=False)
        set_mmpeft(model, name, salt=name)
    if stacked:
        mmpeft.stack(model)
    return model.eval()


@cache
def theirs(shape: Shape, count: int) -> Any:
    """The same under PEFT."""
    need("peft")
    from peft import LoraConfig

    model = peft(llama(shape).float(), task_type="CAUSAL_LM")
    set_peft(model, salt="a0")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    for name in names(count)[1:]:
        model.add_adapter(name, config)
        set_peft(model, name, salt=name)
    return model.eval()


def use(*, block: bool = False, stacked: bool = False) -> Builder:
    """`mmpeft.use` of one adapter after the other."""

    def build(shape: Shape, count: int) -> Arm:
        model, every = ours(shape, count, stacked=stacked), names(count)
        return Arm(model, token_batches(shape)[0], lambda i: mmpeft.use(model, every[i % count]), block)

    return build


def set_adapter(*, inference: bool = False) -> Builder:
    """PEFT's `set_adapter` of one after the other."""

    def build(shape: Shape, count: int) -> Arm:
        model, every = theirs(shape, count), names(count, "default")
        ids = token_batches(shape)[0]
        return Arm(model, ids, lambda i: model.set_adapter(every[i % count], inference_mode=inference))

    return build


def base(shape: Shape, count: int) -> Arm:
    """`with mmpeft.use(model, None)` out of the first adapter. The gate's second choice is the way back."""
    model = ours(shape, count)
    mmpeft.use(model, "a0")
    ids = token_batches(shape)[0]
    return Arm(model, ids, lambda i: mmpeft.use(model, None) if i >= 0 else None, block=True, checked=(0, -1))


def disable(shape: Shape, count: int) -> Arm:
    """PEFT's `disable_adapter`, likewise."""
    model = theirs(shape, count)
    model.set_adapter("default")
    ids = token_batches(shape)[0]
    return Arm(model, ids, lambda i: model.disable_adapter() if i >= 0 else None, block=True, checked=(0, -1))


def turned(every: Sequence[str], i: int) -> list[str]:
    """At each choice another adapter for every row."""
    i %= len(every)
    return [*every[i:], *every[:i]]


def rows(*, stacked: bool = False) -> Builder:
    """`mmpeft.use(rows=)`."""

    def build(shape: Shape, count: int) -> Arm:
        model, every = ours(shape, count, stacked=stacked), names(count)
        ids = token_batches(shape, count, 1)[0]
        return Arm(model, ids, lambda i: mmpeft.use(model, rows=turned(every, i)))

    return build


def adapter_names(shape: Shape, count: int) -> Arm:
    """What PEFT's forward enters when it is given `adapter_names`."""
    model, every = theirs(shape, count), names(count, "default")
    hooks = model._enable_peft_forward_hooks
    ids = token_batches(shape, count, 1)[0]
    return Arm(model, ids, lambda i: hooks(adapter_names=turned(every, i)), block=True)


@dataclass(frozen=True)
class Switch:
    """One row of the table."""

    what: str
    many: bool  # all adapters instead of two
    burst: int  # switches of an arm a round
    arms: dict[str, Builder]
    forward: bool = False


PEFT_SET = {"peft set_adapter": set_adapter(), "peft set_adapter, inference": set_adapter(inference=True)}
PER_ROW = {"mmpeft.use": rows(), "mmpeft.use, stacked": rows(stacked=True), "peft adapter_names": adapter_names}
SWITCHES = [
    Switch("2 adapters in turn", False, 20, {"mmpeft.use": use(), "with mmpeft.use": use(block=True)} | PEFT_SET),
    Switch("to the base and back", False, 20, {"with mmpeft.use": base, "peft disable_adapter": disable}),
    Switch("{n} adapters in turn", True, 4, {"mmpeft.use": use(), "mmpeft.use, stacked": use(stacked=True)} | PEFT_SET),
    Switch("{n} rows of {n} adapters", True, 4, PER_ROW),
    Switch("{n} rows of {n} adapters, and a forward of {n}x1 tokens", True, 2, PER_ROW, forward=True),
]


def measure(switch: Switch, args: argparse.Namespace) -> Row:
    """The arms of one row, in turn."""
    shape, count = TINY if args.tiny else DEEP, args.adapters if switch.many else 2
    sites = shape.layers * len(TARGETS)
    row = Row(f"{switch.what.format(n=count)}, {sites} sites", unit="switches/s", items=1, flops=0.0, args=args)
    clock = time.perf_counter if DEVICE == "cuda" else time.thread_time
    began, arms = time.time(), {}
    for name in [n for n in switch.arms if n in args.arms]:
        try:
            arms[name] = switch.arms[name](shape, count)
        except Skipped as why:
            print(f"{row.workload} | {name} | skipped: {why}", flush=True)
    values = {name: arm.values() for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    free()
    gc.disable()
    for i in range(args.warmup + args.steps):
        for name, arm in arms.items():
            for k in range(i * switch.burst, (i + 1) * switch.burst):
                start = clock()
                arm.switch(k, forward=switch.forward)
                times[name].append((clock() - start) * 1e3)
    gc.enable()
    about = {"sites": sites, "adapters": count, "burst": switch.burst, "clock": clock.__name__, "host": host()}
    for name in arms:
        kept = times[name][args.warmup * switch.burst :]
        row.add(row.line(name, kept, values[name], (0.0, 0.0), began) | about)
    row.gate(relative=2e-4)  # a line rounds to five digits after the point
    return row


def host() -> str:
    """What the times are of."""
    cpu = platform.processor() or platform.machine()
    return f"{cpu} CPU, {torch.get_num_threads()} thread(s), Python {platform.python_version()}"


def table(measured: Sequence[Row]) -> str:
    """Markdown: milliseconds with quartiles, and how often an arm fits into the fastest of PEFT's."""
    lines = ["| switch | arm | ms (quartiles) | x PEFT |", "|---|---|---|---|"]
    for row in measured:
        peers = [x["step_ms"] for x in row.lines if x["arm"].startswith("peft")]
        for x in row.lines:
            low, high = x["step_ms_iqr"]
            ratio = f"{min(peers) / x['step_ms']:.3g}" if peers else ""
            lines.append(f"| {row.workload} | {x['arm']} | {x['step_ms']:.3g} ({low:.3g}, {high:.3g}) | {ratio} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    made = parser(__doc__, results=RESULTS)
    made.add_argument("--adapters", type=int, default=64)
    made.set_defaults(warmup=1, steps=15)
    args = parse(made, argv, {name: None for switch in SWITCHES for name in switch.arms}, cpu=True)
    if args.adapters < 2:
        made.error(f"--adapters {args.adapters}: there is nothing to switch to; 2 or more")
    args.adapters = min(args.adapters, 4) if args.tiny else args.adapters
    args.out = args.out or RESULTS
    measured = [measure(switch, args) for switch in SWITCHES]
    print(table(measured))
    return measured


if __name__ == "__main__":
    main()
