"""The fused pieces of a ViT block's training step beside the unfused ones (CUDA only): microseconds and GB/s of each.

    python benchmarks/vit_parts.py [--part backward|shrink|attention] [--rows 50432] [--width 3072] [--rank 16] [--gelu none]

GB/s counts what the piece has to move at least, once each: the same bytes for both forms, so they compare. Attention:
197 tokens, heads of 64, on views of qkv and into a wide buffer, as the block runs it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch

from mmpeft.kernels import attention, fused_ops, short_attention, vit_sweep


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


def attend(rows: int, width: int, rank: int, kind: str) -> None:
    """Attention of heads that make up width / 4: reads q, k, v, writes o; reads them all and do, writes dq, dk, dv."""
    T, D, h = 197, 64, width // 4
    B, H = rows // T, h // D
    make = functools.partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    q, k, v = make(B, T, 3, H, D).unbind(2)
    do, wide, scale = make(B, T, H, D), make(B * T, 3 * h + 64), D**-0.5
    dq, dk, dv = (wide[:, i * h : (i + 1) * h].view(B, T, H, D) for i in range(3))
    tensor, exact = 2 * B * T * h, None
    for name in ("cudnn", "flash"):
        forward = functools.partial(attention._forward_by, name, q, k, v, scale, False, True)
        o, saved = forward()
        back = functools.partial(attention._backward_by, name, do, q, k, v, o, saved, scale, False, (dq, dk, dv))
        show(f"attention, {name}", forward, 4 * tensor)
        show(f"attention backward with copies, {name}", back, 8 * tensor)
        if exact is None:
            exact = [t.clone() for t in (o, dq, dk, dv)]
    o, lse = short_attention.forward(q, k, v, scale)
    assert lse is not None and exact is not None
    for tile in short_attention.forward_tiles(T, D):
        forward = functools.partial(short_attention.forward, q, k, v, scale, tile=tile)
        o, lse = forward()
        show(f"attention, short {tuple(tile)}", forward, 4 * tensor)
        print(f"    away from cuDNN's: o {away(o, exact[0]):.2e}")
    for tile in short_attention.backward_tiles(T, D):
        back = functools.partial(short_attention.backward, do, q, k, v, o, lse, scale, out=(dq, dk, dv), tile=tile)
        wide.fill_(float("nan"))
        show(f"attention backward, short {tuple(tile)}", back, 8 * tensor)
        print(
            "    away from cuDNN's:",
            *(f"{n} {away(d, e):.2e}" for n, d, e in zip("qkv", (dq, dk, dv), exact[1:], strict=True)),
        )
    print("chosen:", attention.pick(B, T, H, D, H, q.dtype, 0, False, triton=True))


def away(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative distance."""
    return float((got.float() - want.float()).norm() / want.float().norm())


PARTS = {"backward": backward, "shrink": shrink, "attention": attend}


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
