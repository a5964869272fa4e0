"""The fused pieces of a ViT block's training step beside the unfused ones (CUDA only): microseconds and GB/s of each.

    python benchmarks/vit_parts.py [--part backward|shrink] [--rows 50432] [--width 3072] [--rank 16] [--gelu none]

GB/s counts what the piece has to move at least, once each: the same bytes for both forms, so they compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from mmpeft.kernels import fused_ops, vit_sweep


def microseconds(fn: Callable[[], object], repeats: int = 30) -> float:
    """Median device time of one call."""
    for _ in range(5):
        fn()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return 1000 * sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def show(name: str, fn: Callable[[], object], moved: int) -> None:
    """One line."""
    us = microseconds(fn)
    print(f"{name:<44}{us:9.1f} us {moved / us / 1000:8.0f} GB/s", flush=True)


def backward(rows: int, width: int, rank: int, kind: str) -> None:
    """GELU's backward with fc1's dS and dB and fc2's dA: reads dg and u, writes du."""
    R = 16 * -(-rank // 16)
    shapes = [(rows, width), (rows, width), (rows, width + R), (rows, R), (width, R), (rows, R)]
    dg, u, wide, S, B, dS_down = (torch.randn(*s, dtype=torch.bfloat16, device="cuda") for s in shapes)
    dB, dA = (torch.empty(width * R, device="cuda") for _ in range(2))
    moved = 3 * rows * width * 2

    def unfused() -> None:
        fused_ops.gelu_backward(dg, u, wide[:, :width], dg, kind)
        torch.mm(wide[:, :width], B, out=wide[:, width:])
        torch.mm(wide[:, :width].mT, S, out_dtype=torch.float32)
        torch.mm(dS_down.mT, dg, out_dtype=torch.float32)

    show("backward, unfused", unfused, moved)
    up, down = vit_sweep.Up(S, B, dB, rank, 1.0), vit_sweep.Down(dS_down, dA, rank)
    for config in vit_sweep.configs(rank, rank):
        show(
            f"backward, sweep {config}", lambda c=config: vit_sweep.mlp_backward(dg, u, wide, kind, up, down, c), moved
        )
    print("chosen:", vit_sweep.plan(rows, width, rank, rank, kind, torch.bfloat16, u.device))


def shrink(rows: int, width: int, rank: int, kind: str) -> None:
    """GELU with fc2's shrink: reads u, writes [g | S]."""
    R = 16 * -(-rank // 16)
    u, A = (torch.randn(n, width, dtype=torch.bfloat16, device="cuda") for n in (rows, R))
    act = u.new_empty(rows, width + R)

    def unfused() -> None:
        fused_ops.gelu(u, act[:, :width], kind)
        act[:, width:].copy_(act[:, :width] @ A.mT)

    moved = 2 * rows * width * 2
    show("shrink, unfused", unfused, moved)
    show("shrink, one pass", lambda: vit_sweep.gelu_shrink(u, act, A, kind), moved)


PARTS = {"backward": backward, "shrink": shrink}


def main() -> None:
    """Every part, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(PARTS))
    parser.add_argument("--rows", type=int, default=50432)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gelu", choices=("none", "tanh", "quick"), default="none")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if not 1 <= args.rank <= vit_sweep.MAX_RANK:
        parser.error(f"--rank {args.rank}; the sweeps take 1 to {vit_sweep.MAX_RANK}")
    for name, part in PARTS.items():
        if args.part in (None, name):
            part(args.rows, args.width, args.rank, args.gelu)


if __name__ == "__main__":
    main()
