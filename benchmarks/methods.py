"""Time a step and bytes saved for the backward, of every weight method against LoRA, on a stack of linear layers.

    python -m benchmarks.methods                        # CPU, width 256
    python -m benchmarks.methods --device cuda --width 1024 --tokens 4096 --out benchmarks/methods.md

A step is forward, backward and AdamW over all layers, with the methods' default fields (selective ones with 1000 places
a layer). Each method is timed in turn with LoRA(rank=8), so that its ratio is of two neighbours; the median of the
steps is reported. Saved bytes are of distinct tensors that autograd keeps, parameters and buffers of the model left
out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters import catalogue
from mmpeft.adapters.method import Method


def build(method: Method, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """(adapted stack, optimizer, input)."""
    torch.manual_seed(0)
    layers = [m for _ in range(args.layers) for m in (nn.Linear(args.width, args.width), nn.GELU())]
    with torch.device(args.device):
        model = nn.Sequential(*layers).to(args.device)
    x = torch.randn(args.tokens, args.width, device=args.device)
    mmpeft.attach(model, {f"{{0..{2 * args.layers - 2}}}" if args.layers > 1 else "0": method}, example=x[:2])
    return model, torch.optim.AdamW(mmpeft.parameter_groups(model, lr=1e-4)), x


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """One training step."""
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that one forward keeps for its backward, the model's own left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(kept.values())


def timed(run: Callable[[], None], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def configured(cls: type[Method]) -> Method | None:
    """The method with default fields, 1000 places where it has a budget; None where it needs data or is no weight
    method."""
    if cls.kind != "weight" or cls.space == "vector" or cls.name == "layernorm":
        return None
    known = {f.name: f.default for f in fields(cls)}  # type: ignore[arg-type]
    if known.get("criterion", "random") not in ("random", "magnitude", "small_magnitude"):
        return None
    given: dict[str, Any] = {}
    if "count" in known and cls is not mmpeft.SHiRA:
        given["count"] = 16 if "axis" in known else 1000
    return cls(**given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        "# Weight methods against LoRA",
        "",
        f"`python -m benchmarks.methods`: {args.layers} linear layers of {args.width}, {args.tokens} tokens, fp32, "
        f"{device}, torch {torch.__version__}.",
        "A step is forward, backward and AdamW; ratios are against LoRA(rank=8) timed in turn with the method.",
        "",
        "| Method | Trained | ms a step | x LoRA | saved MiB | x LoRA |",
        "|---|---|---|---|---|---|",
    ]
    for cls in catalogue.methods():
        method = configured(cls)
        if method is None:
            continue
        arms = [build(m, args) for m in (mmpeft.LoRA(rank=8), method)]
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(args.steps + 3):
            for arm, kept in zip(arms, times, strict=True):
                ms = timed(lambda arm=arm: step(*arm), args.device)  # type: ignore[misc]
                if i >= 3:
                    kept.append(ms)
        base, own = (saved_bytes(arm[0], arm[2]) for arm in arms)
        count = sum(p.numel() for p in {id(p): p for p in arms[1][0].parameters() if p.requires_grad}.values())
        a, b = median(times[0]), median(times[1])
        lines.append(f"| {method} | {count:,} | {b:.2f} | {b / a:.2f} | {own / 2**20:.2f} | {own / base:.2f} |")
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
