"""Rows of `table.py` for LoRA's kin: another pair of factors, another matrix between them, another scale."""

from __future__ import annotations

import torch
from row_kit import Row, outer
from torch import Tensor

from mmpeft.adapters.methods import lora_kin


def heads_of(p: dict[str, Tensor]) -> Tensor:
    return torch.cat([C @ D for C, D in zip(p["C"], p["D"], strict=True)])


KIN_ROWS = {
    "lora-fa": Row(
        lora_kin.LoRAFA(rank=4, alpha=8),
        lambda W, p: W + 2 * p["B"] @ p["A"],
        lambda o, i: 4 * o,
        factored=True,
    ),
    "lora-xs": Row(
        lora_kin.LoRAXS(rank=4),
        lambda W, p: W + p["B"] @ p["R"] @ p["A"],
        lambda o, i: 16,
        gap=3e-4,
        factored=True,
    ),
    "moslora": Row(
        lora_kin.MoSLoRA(rank=4, alpha=2),
        lambda W, p: W + 0.5 * p["B"] @ p["M"] @ p["A"],
        lambda o, i: 4 * (o + i) + 16,
        factored=True,
    ),
    "kernel-mix": Row(
        lora_kin.KernelMix(rank=2, heads=4, head_rank=1),
        lambda W, p: W + p["B"] @ p["A"] + heads_of(p),
        lambda o, i: 2 * (o + i) + 4 * i + o,
        factored=True,
        stacks=False,
    ),
    "delta-lora": Row(
        lora_kin.DeltaLoRA(rank=4, lam=0.5),
        lambda W, p: W + 1.5 * p["B"] @ p["A"] - 0.5 * p["B0"] @ p["A0"],
        lambda o, i: 4 * (o + i),
        factored=True,
    ),
    "roselora": Row(
        lora_kin.RoseLoRA(rank=4),
        lambda W, p: W + p["B"] @ p["A"],
        lambda o, i: 4 * (o + i),
        factored=True,
    ),
    "delora": Row(
        lora_kin.DeLoRA(rank=4, lam=2.0),
        lambda W, p: (
            W
            + p["lam"]
            / 4
            * sum(outer(b / b.norm(), a / a.norm()) for b, a in zip(p["B"].T, p["A"], strict=True))
            @ torch.diag(W.norm(dim=0))
        ),
        lambda o, i: 4 * (o + i) + 1,
        factored=True,
        stacks=False,
    ),
    "randlora": Row(
        lora_kin.RandLoRA(rank=5),
        lambda W, p: (
            W
            + sum(
                b @ torch.diag(k) @ p["A"] @ torch.diag(g)
                for b, k, g in zip(p["B"], p["lambda_"], p["gamma"], strict=True)
            )
        ),
        lambda o, i: -(-min(o, i) // 5) * (5 + min(o, i)),
        factored=True,
        stacks=False,
        size=0.1,
    ),
}
