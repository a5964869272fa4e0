"""Rows of `table.py` for deltas of a fixed structure: Kronecker and Hadamard products, tensor trains, circulant matrices
and blocks."""

from __future__ import annotations

import torch
from row_kit import Row, block
from torch import Tensor

from mmpeft.adapters.methods import blocks, circulant, fact, hadamard, kronecker


def grid_blocks(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    return torch.cat([torch.cat([U @ S[a, b] @ V for b in range(S.shape[1])], 1) for a in range(S.shape[0])])


def rolled(w: Tensor) -> Tensor:
    """A circulant matrix by rolling its first column."""
    return torch.stack([w.roll(j) for j in range(len(w))], 1)


def spectrum(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Inverse DFT by its sum of waves."""
    (o, i), total = W.shape, torch.zeros_like(W)
    rows, columns = torch.arange(o, dtype=W.dtype), torch.arange(i, dtype=W.dtype)
    for place, c in zip(p["places"].tolist(), p["c"], strict=True):
        phase = 2 * torch.pi * (rows[:, None] * (place // i) / o + columns[None, :] * (place % i) / i)
        total = total + c * phase.cos() / (o * i)
    return total


def bat_product(W: Tensor, D: Tensor) -> Tensor:
    """Every 4 x 4 block of W times its row's D."""
    rows = zip(W.split(4, 0), D, strict=True)
    return torch.cat([torch.cat([w @ d for w in row.split(4, 1)], 1) for row, d in rows], 0)


STRUCTURED_ROWS = {
    "krona": Row(
        kronecker.KronA(a1=4, a2=8, scale=0.5),
        lambda W, p: W + 0.5 * torch.kron(p["A"], p["B"]),
        lambda o, i: 4 * 8 + o * i // 32,
    ),
    "lokr": Row(
        kronecker.LoKr(rank=1, alpha=2, factor=4, decompose_both=True),
        lambda W, p: W + 2 * torch.kron(p["C1"] @ p["C2"], p["D1"] @ p["D2"]),
        lambda o, i: 4 + 4 + o // 4 + i // 4,
        size=0.6,
    ),
    "lokr-full": Row(
        kronecker.LoKr(rank=8),
        lambda W, p: W + torch.kron(p["C"], p["D"]),
        lambda o, i: 4 * 4 + 6 * 4,
    ),
    "kadaptation": Row(
        kronecker.KAdaptation(rank=2, t=2),
        lambda W, p: W + sum(torch.kron(A, u @ v) for A, u, v in zip(p["A"], p["u"], p["v"], strict=True)),
        lambda o, i: 2**3 + 2 * (o + i),
        factored=True,
    ),
    "kadaptation-full": Row(
        kronecker.KAdaptation(rank=2, t=4),
        lambda W, p: W + sum(torch.kron(A, u @ v) for A, u, v in zip(p["A"], p["u"], p["v"], strict=True)),
        lambda o, i: 4**3 + 2 * (o + i),
    ),
    "loha": Row(
        hadamard.LoHa(rank=2, alpha=3),
        lambda W, p: W + 1.5 * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"]),
        lambda o, i: 2 * 2 * (o + i),
        factored=True,
        size=0.6,
    ),
    "loha-full": Row(
        hadamard.LoHa(rank=5),
        lambda W, p: W + (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"]),
        lambda o, i: 2 * 5 * (o + i),
    ),
    "hira": Row(
        hadamard.HiRA(rank=4),
        lambda W, p: W * (1 + p["B"] @ p["A"]),
        lambda o, i: 4 * (o + i),
    ),
    "fact-tt": Row(
        fact.FacTTT(rank=4, alpha=8),
        lambda W, p: W + 2 * grid_blocks(p["U"], p["S"], p["V"]),
        lambda o, i: 2 * 8 * 4 + (o // 8) * (i // 8) * 4**2,
        factored=True,
        stacks=False,
    ),
    "fact-tk": Row(
        fact.FacTTK(rank=4),
        lambda W, p: W + grid_blocks(p["U"], torch.tensordot(p["c"], p["P"], 1), p["V"]),
        lambda o, i: 2 * 8 * 4 + (o // 8) * (i // 8) * 4 + 4**3,
        factored=True,
        stacks=False,
    ),
    "c3a": Row(
        circulant.C3A(block_size=4),
        lambda W, p: W + torch.cat([torch.cat([rolled(w).T for w in row], 1) for row in p["w"]]) / W.shape[1],
        lambda o, i: o * i // 4,
        stacks=False,
        lr=0.1,
        size=3.0,
    ),
    "surm-circulant": Row(
        circulant.SURM(scale=0.5),
        lambda W, p: W + 0.5 * rolled(p["c"])[: len(W), : W.shape[1]],
        lambda o, i: max(o, i),
    ),
    "surm-toeplitz": Row(
        circulant.SURM(structure="toeplitz"),
        lambda W, p: W + torch.stack([p["t"][r : r + W.shape[1]].flip(0) for r in range(len(W))]),
        lambda o, i: o + i - 1,
    ),
    "surm-ldr": Row(
        circulant.SURM(structure="ldr", rank=2),
        lambda W, p: (
            W
            + sum(
                rolled(g) @ (rolled(h) * (torch.ones(len(h), len(h)).tril() * 2 - 1))
                for g, h in zip(p["g"], p["h"], strict=True)
            )[: len(W), : W.shape[1]]
        ),
        lambda o, i: 2 * 2 * max(o, i),
    ),
    "fourierft": Row(
        circulant.FourierFT(n=20, scale=50.0),
        lambda W, p: W + 50 * spectrum(W, p),
        lambda o, i: 20,
        stacks=False,
        lr=0.1,
        size=1.0,
    ),
    "gralora": Row(
        blocks.GraLoRA(rank=4, k=2, alpha=2),
        lambda W, p: (
            W
            + 0.5
            * torch.cat(
                [
                    torch.cat([p["B"][j][:, 2 * n : 2 * n + 2] @ p["A"][n][2 * j : 2 * j + 2] for n in range(2)], 1)
                    for j in range(2)
                ]
            )
        ),
        lambda o, i: 4 * (o + i),
        factored=True,
        stacks=False,
    ),
    "gralora-hybrid": Row(
        blocks.GraLoRA(rank=2, k=2, hybrid_rank=2),
        lambda W, p: (
            W
            + torch.cat(
                [torch.cat([p["B"][j][:, n, None] @ p["A"][n][None, j] for n in range(2)], 1) for j in range(2)]
            )
            + p["B_hybrid"] @ p["A_hybrid"]
        ),
        lambda o, i: 4 * (o + i),
        factored=True,
        stacks=False,
    ),
    "miss": Row(
        blocks.MiSS(rank=6),
        lambda W, p: W + torch.cat([p["D"]] * 4, 1)[:, : W.shape[1]],
        lambda o, i: 6 * o,
        factored=True,
    ),
    "miss-bat": Row(
        blocks.MiSS(rank=4, bat=True),
        lambda W, p: (
            W + block(list(p["D"])) @ torch.eye(4).to(W).repeat(len(p["D"]), W.shape[1] // 4) + bat_product(W, p["D"])
        ),
        lambda o, i: 4 * o,
    ),
}
