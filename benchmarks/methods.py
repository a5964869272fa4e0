"""Time a step and bytes kept for the backward, of every method against LoRA, on one small language model.

    python -m benchmarks.methods                        # CPU; appends to results/methods.jsonl, rewrites README.md's table
    python -m benchmarks.methods --device cuda --hidden 1024 --layers 8 --tokens 4096
    python -m benchmarks.methods --methods DoRA,OFT --dry
    python -m benchmarks.methods --methods PEQA --add         # into the last run's table, beside its own LoRA

A Llama of random weights, with biases (for methods that need them), fp32. Weight methods adapt all seven linear layers of each block, methods around a call its
feed-forward (or its attention, where they work inside one), prompts the decoder; fields are the defaults, but where
those do not fit this model or need data (`FIELDS`, `OWN`). PEQA gets a base of 8-bit integers, NEFT the weights after a
pretended run. A step is forward, backward and AdamW. Each method is timed in turn
with LoRA(rank=8) on the seven linears, step by step, so that its ratio is of neighbours; medians are reported: on a CPU
of the process's own CPU time (other programs count less), on a GPU of the wall clock. Saved bytes are those of distinct tensors that autograd keeps, beside parameters, buffers and the input.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters import catalogue
from mmpeft.adapters.costs import step_cost
from mmpeft.adapters.inspect import brief
from mmpeft.adapters.method import Method
from mmpeft.adapters.storage.integer import Int
from mmpeft.errors import ConfigError, MmpeftError

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "methods.jsonl", HERE / "README.md"
BEGIN, END = "<!-- methods -->", "<!-- end of methods -->"
LINEARS = "model.layers.*.{self_attn,mlp}.*_proj"
PLACES = {
    "weight": (LINEARS, "**"),  # the second for methods of norms
    "call": ("model.layers.*.mlp", "model.layers.*.self_attn", "model.layers.*", LINEARS),
    "tokens": ("model", "model.layers"),
}
WARMUP = 1

FIELDS: dict[str, Any] = {"criterion": "random"}  # for every method that has such a field: places without data
OWN: dict[str, dict[str, Any]] = {
    "AttnScale": {"share": True},  # its tokens are set to the run's
    "QALoRA": {"group": 16},
    "Compacter": {"reduction": 16},  # 192 / 32 is no multiple of its n
}
TRAINS_NOTHING = "it trains nothing"


def build(method: Method, match: str, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """(adapted model, optimizer, ids [1, tokens])."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 2 * args.hidden, "num_hidden_layers": args.layers}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, vocab_size=512, attention_bias=True, mlp_bias=True, use_cache=False
    )
    model = LlamaForCausalLM(config).to(args.device)
    ids = torch.randint(0, 512, (args.tokens // 64, 64), device=args.device)
    example = None if method.kind == "weight" else {"input_ids": ids[:2]}  # is a call's place the right one?
    if isinstance(method, mmpeft.PEQA):
        mmpeft.quantise(model, match, Int(8, method.group))
    if isinstance(method, mmpeft.NEFT):
        after = {n: t + 0.01 * torch.randn_like(t) for n, t in model.state_dict().items()}
        mmpeft.attach_selected(model, {match: method}, trained=after, check=False)
    else:
        mmpeft.attach(model, {match: method}, example=example, check=example is not None)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(TRAINS_NOTHING)
    return model.train(), torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-4)), ids


def arm(cls: type[Method], args: argparse.Namespace) -> tuple[Method, str, Any] | str:
    """(method, where, what `build` gives), or why the method takes no place of this model."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    given = {k: v for k, v in FIELDS.items() if k in known and cls is not mmpeft.NEFT} | OWN.get(cls.__name__, {})
    if "tokens" in known:
        given["tokens"] = 64
    reason = ""
    for match in PLACES[cls.kind]:
        try:
            method = cls(**given)
            return method, match, build(method, match, args)
        except MmpeftError as error:
            reason = str(error).splitlines()[0][:160] if not reason or str(error) == TRAINS_NOTHING else reason
    return reason


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """One training step on next-token prediction."""
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def timed(arms: list[Any], steps: int, device: str) -> list[float]:
    """Median milliseconds of each arm's steps, the arms in turn."""
    clock = time.perf_counter if device == "cuda" else time.process_time  # a busy machine does not show in the latter
    kept: list[list[float]] = [[] for _ in arms]
    for i in range(WARMUP + steps):
        for one, times in zip(arms, kept, strict=True):
            start = clock()
            step(*one)
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= WARMUP:
                times.append(1000 * (clock() - start))
    return [median(times) for times in kept]


def saved(built: Any) -> int:
    model, _, ids = built
    return step_cost(model, ((), {"input_ids": ids, "labels": ids})).saved_bytes


def line(cls: type[Method], lora: Any, kept: int, args: argparse.Namespace) -> dict[str, Any]:
    """One method's numbers."""
    made = arm(cls, args)
    if isinstance(made, str):
        return {"method": cls.__name__, "refused": made}
    method, match, built = made
    base, own = timed([lora, built], args.steps, args.device)
    count = sum(p.numel() for p in {id(p): p for p in built[0].parameters() if p.requires_grad}.values())
    return {
        "method": brief(method), "match": match, "trained": count, "ms": round(own, 2), "lora_ms": round(base, 2),
        "saved_bytes": saved(built), "lora_saved_bytes": kept,
    }  # fmt: skip


def table(run: dict[str, Any]) -> str:
    """Markdown of one run."""
    lines = [
        f"`python -m benchmarks.methods`, {run['date']}, {run['device']}, torch {run['torch']}: {run['model']}, {run['tokens']} tokens in rows of "
        f"64, median {run['clock']} time of {run['steps']} steps, fp32. Ratios are against LoRA(rank=8) on all linears, timed in turn.",
        "",
        "| method | where | trained | ms a step | x LoRA | saved MiB | x LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    where = {
        LINEARS: "linears",
        "model": "decoder",
        "model.layers": "blocks",
        "model.layers.*": "blocks",
        "**": "norms",
    }
    for x in run["lines"]:
        if "refused" not in x:
            lines.append(
                f"| {x['method']} | {where.get(x['match'], x['match'].rpartition('.')[2])} | {x['trained']:,} | {x['ms']:.1f} "
                f"| {x['ms'] / x['lora_ms']:.2f} | {x['saved_bytes'] / 2**20:.1f} "
                f"| {x['saved_bytes'] / x['lora_saved_bytes']:.2f} |"
            )
    out = [f"{x['method']} ({x['refused']})" for x in run["lines"] if "refused" in x]
    return "\n".join(
        lines
        + later(run["lines"])
        + (["", f"Not timed: {'; '.join(out)}."] if out else [])
    )


def later(lines: list[dict[str, Any]]) -> list[str]:
    """Which rows were measured after the others, and when."""
    by_date: dict[str, list[str]] = {}
    for x in lines:
        if "date" in x and "refused" not in x:
            by_date.setdefault(x["date"], []).append(x["method"].partition("(")[0])
    return ["", *(f"{', '.join(names)}: added {date}, beside LoRA again." for date, names in by_date.items())] if by_date else []


def merged(last: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """A whole run with the lines of a part of it, each dated, in place of what it had of these methods.

    Raises:
        SystemExit: another device, model or torch.
    """
    for key in ("device", "torch", "model", "tokens", "steps", "clock"):
        if last[key] != run[key]:
            raise SystemExit(f"--add: {key} was {last[key]!r} and is {run[key]!r}; rows of one table share it")
    new = [x | {"date": run["date"]} for x in run["lines"]]
    names = [x["method"].partition("(")[0] for x in new]
    kept = [x for x in last["lines"] if x["method"].partition("(")[0] not in names]
    order = {c.__name__: i for i, c in enumerate(catalogue.methods())}
    return last | {"lines": sorted(kept + new, key=lambda x: order.get(x["method"].partition("(")[0], len(order)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", default="", help="class names, comma-separated; default: all")
    parser.add_argument("--add", action="store_true", help="put these methods' lines into the last run's table")
    parser.add_argument("--dry", action="store_true", help="write neither results nor README")
    args = parser.parse_args()
    names = [n for n in args.methods.split(",") if n]
    classes = [c for c in catalogue.methods() if not names or c.__name__ in names]
    lora = build(mmpeft.LoRA(rank=8), LINEARS, args)
    kept, lines = saved(lora), []
    for cls in classes:
        try:
            lines.append(line(cls, lora, kept, args))
        except Exception as error:  # reported, and the others go on
            lines.append({"method": cls.__name__, "refused": f"{type(error).__name__}: {str(error)[:160]}"})
        print(json.dumps(lines[-1]), flush=True)
    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    run = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": where if args.device == "cuda" else f"{where}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "model": f"Llama of width {args.hidden}, {args.layers} blocks",
        "tokens": args.tokens,
        "steps": args.steps,
        "clock": "wall" if args.device == "cuda" else "CPU",
        "lines": lines,
    }
    if args.add:
        run = merged(json.loads(RESULTS.read_text(encoding="utf-8").splitlines()[-1]), run)
    if args.dry:
        print(table(run))
        return
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")
    publish(run)


def publish(run: dict[str, Any]) -> None:
    """Put a run's table between the two marks of README.md."""
    text = README.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{table(run)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
