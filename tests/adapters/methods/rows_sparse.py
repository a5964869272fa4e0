"""Rows of `table.py` for random subspaces, sparse deltas (entries, rows, columns, a learned mask) and output scales."""

from __future__ import annotations

import torch
from row_kit import Row, scattered
from torch import Tensor

import mmpeft
from mmpeft.adapters.methods import activation, diff_pruning, sparse, subspace


def fastfood_dense(p: dict[str, Tensor], size: int) -> Tensor:
    """S H G Pi H B as explicit matrices."""
    n = len(p["gauss"])
    H = torch.ones(1, 1, dtype=p["t"].dtype)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    P = torch.eye(n, dtype=H.dtype)[p["order"]]
    full = H @ torch.diag(p["gauss"]) @ P @ H @ torch.diag(p["signs"].to(H.dtype))
    return (full[:size, : len(p["t"])] @ p["t"]) / (size * p["gauss"].square().sum()).sqrt()


SPARSE_ROWS = {
    "did": Row(
        subspace.DID(dimension=10),
        lambda W, p: W + fastfood_dense(p, W.numel()).view(W.shape),
        lambda o, i: 10,
        lr=0.2,
        size=3.0,
    ),
    "said": Row(
        subspace.SAID(dimension=10),
        lambda W, p: W + p["lam"] * fastfood_dense(p, W.numel()).view(W.shape),
        lambda o, i: 10,
        lr=0.2,
        size=3.0,
    ),
    "sparse": Row(
        sparse.Sparse(count=20),
        scattered,
        lambda o, i: 20,
        size=1.0,
    ),
    "shira": Row(
        sparse.SHiRA(rank=1),
        scattered,
        lambda o, i: o + i,
        size=1.0,
    ),
    "pafi": Row(
        sparse.PaFi(density=0.1),
        scattered,
        lambda o, i: round(0.1 * o * i),
        size=1.0,
    ),
    "spiel": Row(
        mmpeft.SpIEL(density=0.1),
        scattered,
        lambda o, i: round(0.1 * o * i),
        size=1.0,
    ),
    "sparse-rows": Row(
        mmpeft.SparseRows(count=3),
        lambda W, p: torch.stack(
            [w + p["value"][p["index"].tolist().index(r)] if r in p["index"] else w for r, w in enumerate(W)]
        ),
        lambda o, i: 3 * i,
        stacks=False,
    ),
    "sparse-columns": Row(
        mmpeft.SparseRows(count=2, axis="columns", criterion="magnitude"),
        lambda W, p: W + p["value"] @ torch.eye(W.shape[1], dtype=W.dtype)[p["index"]],
        lambda o, i: 2 * o,
        stacks=False,
    ),
    "diff-pruning": Row(
        diff_pruning.DiffPruning(structured=True, alpha=0.5),
        lambda W, p: (
            W
            + (3 * p["alpha"].sigmoid() - 1.5).clamp(0, 1) * (3 * p["alpha_group"].sigmoid() - 1.5).clamp(0, 1) * p["w"]
        ),
        lambda o, i: 2 * o * i + 1,
    ),
    "propulsion": Row(
        activation.Propulsion(degree=3, vectors=2),
        lambda W, p: torch.diag(p["z"][0] ** 3 * p["z"][1] ** 3) @ W,
        lambda o, i: 2 * o,
        factored=True,
        size=0.1,
    ),
    "ssf": Row(
        activation.SSF(),
        lambda W, p: torch.diag(p["gamma"]) @ W,
        lambda o, i: 2 * o,
        factored=True,
        stacks=False,
    ),
}
