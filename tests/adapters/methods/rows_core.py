"""Rows of `table.py` for the methods that everything else is compared with: LoRA and its starts, DoRA, VeRA, (IA)3, RoCoFT,
full training, and the vector methods BitFit and LayerNorm tuning."""

from __future__ import annotations

import torch
from row_kit import Row
from torch import Tensor

import mmpeft


def low_rank(scale: float):
    return lambda W, p: W + scale * sum(torch.outer(b, a) for b, a in zip(p["B"].mT, p["A"], strict=True))


def beside_its_start(scale: float):
    """PiSSA and OLoRA: the frozen pair takes the start off again, so W' = (W - s B0 A0) + s B A."""
    return lambda W, p: (W - scale * p["B0"] @ p["A0"]) + scale * p["B"] @ p["A"]


def dora(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    V = W + 2 * p["B"] @ p["A"]
    return torch.stack([m * v / v.dot(v).sqrt() for m, v in zip(p["m"], V, strict=True)])


def pair(o: int, i: int) -> int:
    return 4 * (o + i)


CORE_ROWS = {
    "lora": Row(mmpeft.LoRA(rank=4, alpha=8), low_rank(8 / 4), pair, factored=True),
    "rslora": Row(mmpeft.LoRA(rank=4, alpha=8, rslora=True), low_rank(8 / 4**0.5), pair, factored=True),
    "pissa": Row(mmpeft.LoRA(rank=4, init_from="pissa"), beside_its_start(1.0), pair, factored=True, gap=1e-5),
    "olora": Row(mmpeft.LoRA(rank=4, alpha=2, init_from="olora"), beside_its_start(0.5), pair, factored=True, gap=1e-5),
    "dora": Row(mmpeft.DoRA(rank=4, alpha=8), dora, lambda o, i: 4 * (o + i) + o, factored=True, size=0.5),
    "vera": Row(
        mmpeft.VeRA(rank=6),
        lambda W, p: W + torch.diag(p["b"]) @ p["B"][: len(W)] @ torch.diag(p["d"]) @ p["A"][:, : W.shape[1]],
        lambda o, i: 6 + o,
        factored=True,
        stacks=False,
        size=0.6,
    ),
    "ia3": Row(mmpeft.IA3(), lambda W, p: torch.diag(p["l"]) @ W, lambda o, i: o, factored=True),
    "ia3-in": Row(
        mmpeft.IA3(side="in"), lambda W, p: W @ torch.diag(p["l"]), lambda o, i: i, factored=True
    ),
    "rocoft": Row(
        mmpeft.RoCoFT(rank=3),
        lambda W, p: torch.cat([W[:3] + p["delta"], W[3:]]),
        lambda o, i: 3 * i,
    ),
    "rocoft-columns": Row(
        mmpeft.RoCoFT(rank=2, axis="columns", select="last"),
        lambda W, p: torch.cat([W[:, :-2], W[:, -2:] + p["delta"]], 1),
        lambda o, i: 2 * o,
    ),
    "full": Row(mmpeft.Full(), lambda W, p: p["value"], lambda o, i: o * i + o),
}

VECTORS = {  # with the vector of the linear place; their counts are of a linear layer and of a norm
    "bitfit": Row(mmpeft.BitFit(), lambda b, p: b + p["delta"], lambda o, i: o, tensor="site.bias"),
    "layernorm": Row(
        mmpeft.LayerNormTuning(), lambda g, p: g + p["delta"], lambda o, i: 2 * i, tensor="norm.weight"
    ),
}
