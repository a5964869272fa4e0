"""What dropout adds to each kernel of a fused Llama block: microseconds with and without, at 1.5B and 8 x 1024 tokens.

    python -m benchmarks.dropout                 # a minute on a GPU
    python -m benchmarks.dropout --tokens 4096 --rank 32 --p 0.1

Every line is one launch or one group's products, as a captured CUDA graph replays them; `step` counts it for 28 layers.
The last lines are whole layers: forward and backward of one block with and without dropout.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.lowrank import graph_ms
from mmpeft.kernels import dropout, fused_ops, sweep, sweep_plan
from mmpeft.kernels.dropout import Dropped
from mmpeft.kernels.group import Group
from mmpeft.kernels.llama_block import Block, Layout
from mmpeft.kernels.packed import PackedGroup

HIDDEN, MLP, HEADS, KV_HEADS, HEAD, LAYERS, LENGTH = 1536, 8960, 12, 2, 128, 28, 1024
Run = Callable[[], object]


def make(*shape: int) -> Tensor:
    """A random bf16 tensor, scaled like a weight."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)


def group(outs: list[int], n_in: int, rank: int) -> Group:
    """A group with an adapter of this rank on every member."""
    packed = PackedGroup([make(o, n_in) for o in outs], None, [rank] * len(outs), [1.0] * len(outs))
    pairs = [(torch.randn(rank, n_in, device="cuda") * n_in**-0.5, torch.randn(o, rank, device="cuda")) for o in outs]
    packed.refresh([A for A, _ in pairs], [B for _, B in pairs])
    return Group(packed, list(pairs))


def kernels(T: int, rank: int, d: Dropped) -> Iterator[tuple[str, Run, Run]]:
    """(name, without dropout, with it) of every kernel that dropout changes."""
    _, o, gate_up, down = parts = groups(rank)
    names = ("qkv", "o", "gate|up", "down")
    for name, g in zip(names[:3], parts[:3], strict=True):
        x, A, wide = make(T, HIDDEN), g.packed.A, g.wide(T, g.packed.out_features).normal_()
        yield f"{name} shrink", partial(torch.mm, x, A.mT), partial(dropout.shrink, x, A, d)
        yield f"{name} dx", partial(g.backward_x, wide, None), partial(g.backward_x, wide, d)
    y, x, S_o = make(T, HIDDEN), make(T, HIDDEN), make(T, o.packed.rank)
    yield (
        "o dropped input beside its dx",
        lambda: dropout.add_masked(y, S_o, o.packed.A, d),
        lambda: dropout.add_masked(y, S_o, o.packed.A, d, x),
    )
    w, rstd = make(HIDDEN), torch.ones(T, device="cuda")
    g_in, out, n = make(T, HIDDEN), make(T, HIDDEN), make(T, HIDDEN)
    yield (
        "norm backward, its output again",
        lambda: fused_ops.rmsnorm_backward(y, x, rstd, w, g_in, out, n),
        lambda: fused_ops.rmsnorm_backward(y, x, rstd, w, g_in, out, n, d),
    )
    gu, act, A = make(T, 2 * MLP), down.wide(T, MLP), down.packed.A
    yield (
        "SwiGLU and shrink",
        lambda: fused_ops.swiglu_shrink(gu, act, A),
        lambda: fused_ops.swiglu_shrink(gu, act, A, None, d),
    )
    g_down = down.wide(T, HIDDEN).normal_()
    yield "down dx (the base part alone)", lambda: down.backward_x(g_down, None), lambda: down.backward_W(g_down)
    dh, dgu, S, B = make(T, MLP), gate_up.wide(T, 2 * MLP), make(T, gate_up.packed.rank), gate_up.packed.B
    dW = [torch.empty(MLP * rank, device="cuda") for _ in range(3)]
    ranks = (rank, rank, rank)
    plans = [
        sweep_plan.plan(T, MLP, gate_up.packed.rank, ranks, torch.bfloat16, dh.device, dropped=dropped)
        for dropped in (False, True)
    ]
    print("sweep chosen without and with dropout (None: unfused):", plans)
    for config in sweep.configs(ranks):

        def swept(masked: tuple[Dropped, Tensor] | None, config: sweep.Config = config) -> None:
            sweep.mlp_backward(
                dh, gu, dgu, S, g_down[:, HIDDEN:], B, ranks, (1.0, 1.0), dW[0], dW[1], dW[2], config, masked=masked
            )

        yield f"sweep {config}", partial(swept, None), partial(swept, (d, A))


def groups(rank: int) -> tuple[Group, Group, Group, Group]:
    """A block's four groups."""
    wide, kv = HEADS * HEAD, KV_HEADS * HEAD
    return (
        group([wide, kv, kv], HIDDEN, rank), group([HIDDEN], wide, rank), group([MLP, MLP], HIDDEN, rank),
        group([HIDDEN], MLP, rank),
    )  # fmt: skip


def layers(T: int, rank: int, d: Dropped) -> tuple[Run, Run]:
    """Forward and backward of one block, without and with dropout."""
    norm, parts = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16), groups(rank)
    block = Block(norm, parts[0], parts[1], norm, parts[2], parts[3])
    numel = 0
    for g in parts:
        for _, slot in g.slots(numel):
            numel += slot.numel
    angles = torch.rand(LENGTH, HEAD // 2, device="cuda")
    tables, shape = (angles.cos(), angles.sin()), (T // LENGTH, LENGTH)
    layout = Layout(shape, tables, HEADS, KV_HEADS, HEAD**-0.5, 1e-6)
    x, flat = make(T, HIDDEN), torch.empty(numel, device="cuda")
    g_out = block.down.wide(T, HIDDEN).normal_()

    def run(dropped: Dropped | None) -> Tensor:
        sites = tuple(None if dropped is None else dropped.at(i) for i in range(4))
        *_, tape = block.forward(x, None, None, layout, sites)  # type: ignore[arg-type]
        return block.backward(block.down, g_out, tape, flat, False, layout, True, sites)  # type: ignore[arg-type]

    return lambda: run(None), lambda: run(d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8 * LENGTH, help=f"rows, a multiple of {LENGTH}")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--p", type=float, default=0.05)
    args = parser.parse_args()
    d = Dropped(args.p, torch.zeros(1, dtype=torch.int64, device="cuda"), 3)
    print(f"{'us':34} {'without':>9} {'with':>9} {'more':>9} {'step, ms':>9}")
    with torch.no_grad():
        whole = ("one layer", *layers(args.tokens, args.rank, d))
        for name, without, dropped in (*kernels(args.tokens, args.rank, d), whole):
            a, b = 1e3 * graph_ms(without), 1e3 * graph_ms(dropped)
            print(f"{name:34} {a:9.1f} {b:9.1f} {b - a:9.1f} {(b - a) * LAYERS / 1e3:9.2f}", flush=True)


if __name__ == "__main__":
    main()
