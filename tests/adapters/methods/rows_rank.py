"""Rows of `table.py` for the methods whose rank changes."""

from __future__ import annotations

import torch
from row_kit import Row, outer

from mmpeft.adapters.methods import dynamic_rank, lora_noise, lora_prune, quantised

RANK_ROWS = {
    "dylora": Row(
        dynamic_rank.DyLoRA(rank=4, alpha=8),
        lambda W, p: W + 8 / 4 * sum(outer(b, a) for b, a in zip(p["B"].T, p["A"], strict=True)),
        lambda o, i: 4 * (o + i),
        factored=True,
    ),
    "adalora": Row(
        dynamic_rank.AdaLoRA(rank=4, alpha=8, std=0.2),
        lambda W, p: W + 2 * p["P"] @ torch.diag(p["lam"]) @ p["Q"],
        lambda o, i: 4 * (o + i + 1),
        factored=True,
    ),
    "sora": Row(
        dynamic_rank.SoRA(rank=4, alpha=2),
        lambda W, p: W + 0.5 * p["B"] @ torch.diag(p["g"]) @ p["A"],
        lambda o, i: 4 * (o + i + 1),
        factored=True,
    ),
    "increlora": Row(
        dynamic_rank.IncreLoRA(rank=4, std=0.2),
        lambda W, p: W + p["lam"][0] * outer(p["P"][:, 0], p["Q"][0]) + 1e-5 * outer(p["P"][:, 1], p["Q"][1]),
        lambda o, i: 4 * (o + i + 1),
        factored=True,
        size=0.6,
        gap=1e-4,
    ),
    "autolora": Row(
        dynamic_rank.AutoLoRA(rank=4, alpha=16),
        lambda W, p: W + 4 * p["B"] @ torch.diag(p["logits"].exp() / p["logits"].exp().sum()) @ p["A"],
        lambda o, i: 4 * (o + i + 1),
        factored=True,
    ),
    "capaboost": Row(
        dynamic_rank.CapaBoost(rank=4, d=3, alpha=8),
        lambda W, p: W + 2 * sum((p["B"] * N) @ (p["A"] * M) for N, M in zip(p["N"], p["M"], strict=True)),
        lambda o, i: 4 * (o + i),
        factored=True,
    ),
}

RANK_ROWS |= {
    "loraprune": Row(
        lora_prune.LoRAPrune(rank=4, alpha=8),
        lambda W, p: torch.diag(p["mask"]) @ (W + 2 * p["B"] @ p["A"]),
        lambda o, i: 4 * (o + i),
        factored=True,
        stacks=False,
    ),
    "loraprune-columns": Row(
        lora_prune.LoRAPrune(rank=4, axis="columns", group=4),
        lambda W, p: (W + p["B"] @ p["A"]) @ torch.diag(p["mask"]),
        lambda o, i: 4 * (o + i),
        factored=True,
        stacks=False,
    ),
    "lora-dropout": Row(
        lora_noise.LoRADropout(rank=4, alpha=8),
        lambda W, p: W + 2 * p["B"] @ p["A"],
        lambda o, i: 4 * (o + i),
        factored=True,
    ),
    "periodic-lora": Row(
        lora_noise.PeriodicLoRA(rank=4, stages=2),
        lambda W, p: W + p["B"] @ p["A"] + p["B_past"] @ p["A_past"],
        lambda o, i: 4 * (o + i),
        factored=True,
    ),
    "qa-lora": Row(
        quantised.QALoRA(rank=2, group=2, alpha=8),
        lambda W, p: W + 4 / 2 * p["B"] @ torch.kron(p["A"], torch.ones(1, 2, dtype=W.dtype)),
        lambda o, i: 2 * (o + i // 2),
        factored=True,
    ),
}
