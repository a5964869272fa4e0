"""Rows of `table.py` for scaling inside attention and for sparse deltas with an importance of their own."""

from __future__ import annotations

import torch
from row_kit import Row, scattered

import mmpeft

NEW_ROWS = {
    "attn-scale-lite": Row(
        mmpeft.AttnScaleLite(num_heads=4),
        lambda W, p: torch.diag(torch.kron(p["s"], torch.ones(len(W) // 4, dtype=W.dtype))) @ W,
        lambda o, i: 4,
        factored=True,
        stacks=False,
        lr=0.1,
        size=0.6,
    ),
    "spiel-ma": Row(mmpeft.SpIELMA(density=0.1), scattered, lambda o, i: round(0.1 * o * i), size=1.0),
    "dna": Row(mmpeft.DnA(density=0.1, rank=2), scattered, lambda o, i: round(0.1 * o * i), size=1.0),
    "mixout": Row(
        mmpeft.Mixout(p=0.5),
        lambda W, p: p["value"],
        lambda o, i: o * i + o,
    ),
    "hiwi": Row(
        mmpeft.HiWi(rank=3, of="weight"),
        lambda W, p: W + (W @ p["D"].T).relu() @ p["U"].T,
        lambda o, i: 2 * 3 * i,
    ),
    "lora-plus": Row(
        mmpeft.LoRAPlus(rank=4, alpha=8),
        lambda W, p: W + 2 * p["B"] @ p["A"],
        lambda o, i: 4 * (o + i),
        factored=True,
    ),
    "relora": Row(
        mmpeft.ReLoRA(rank=4, stages=2),
        lambda W, p: W + p["B"] @ p["A"] + p["B_past"] @ p["A_past"],
        lambda o, i: 4 * (o + i),
        factored=True,
    ),
    "structured-mask": Row(
        mmpeft.StructuredMask(group=4),
        lambda W, p: W @ torch.diag(torch.kron(p["m"], torch.ones(4, dtype=W.dtype))),
        lambda o, i: i // 4,
        factored=True,
        stacks=False,
    ),
    "structured-mask-rows": Row(
        mmpeft.StructuredMask(axis="rows"),
        lambda W, p: torch.diag(p["m"]) @ W,
        lambda o, i: o,
        factored=True,
        stacks=False,
    ),
    "apt": Row(
        mmpeft.APT(rank=6, start=4, alpha=12),
        lambda W, p: torch.diag(p["m_out"]) @ (W + 2 * p["B"] @ torch.diag(p["mask"]) @ p["A"]) @ torch.diag(p["m_in"]),
        lambda o, i: 6 * (o + i),
        factored=True,
        stacks=False,
    ),
    "flop": Row(
        mmpeft.FLOP(),
        lambda W, p: p["P"] @ torch.diag((3 * p["alpha"].sigmoid() - 1.5).clamp(0, 1)) @ p["Q"],
        lambda o, i: min(o, i) * (o + i + 1),
        gap=0.1,
        size=0.1,
    ),
}
