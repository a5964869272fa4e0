"""Rows of `table.py` for orthogonal factors on W: rotations in blocks, butterflies, reflections."""

from __future__ import annotations

from functools import reduce

import torch
from row_kit import Row, block, outer
from torch import Tensor

from mmpeft.adapters.methods import orthogonal


def series(Q: Tensor) -> Tensor:
    """The first terms of a rotation."""
    return torch.eye(len(Q)).to(Q) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q


def skew_of(v: Tensor, b: int) -> Tensor:
    Q = torch.zeros(b, b, dtype=v.dtype)
    Q[tuple(torch.triu_indices(b, b, 1))] = v
    return Q - Q.T


def rotation(v: Tensor, b: int) -> Tensor:
    """expm's rational cousin, (I + Q)(I - Q)^-1, by an explicit inverse."""
    Q, eye = skew_of(v, b), torch.eye(b, dtype=v.dtype)
    return (eye + Q) @ torch.linalg.inv(eye - Q)


def reflections(u: Tensor) -> Tensor:
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    return reduce(torch.matmul, [eye - 2 * outer(x, x) / (x @ x) for x in u])


def butterfly_product(Q: Tensor, b: int, n: int) -> Tensor:
    """R_1 ... R_m with permutation matrices: factor j's blocks pair half-block c with half-block c + 2^j of each
    span."""
    total = torch.eye(n, dtype=Q.dtype)
    for j in range(Q.shape[0]):
        order = []
        for start in range(0, n, b * 2**j):
            halves = [list(range(s, s + b // 2)) for s in range(start, start + b * 2**j, b // 2)]
            order += sum((halves[c] + halves[c + 2**j] for c in range(2**j)), [])
        P = torch.eye(n, dtype=Q.dtype)[:, order]  # W P has the columns of W in this order
        total = total @ P @ block([rotation(q, b) for q in Q[j]]) @ P.T
    return total


ORTHOGONAL_ROWS = {
    "oft": Row(
        orthogonal.OFT(block_size=4),
        lambda W, p: W @ block([rotation(q, 4) for q in p["Q"]]),
        lambda o, i: i // 4 * 6,
    ),
    "oft-out": Row(
        orthogonal.OFT(block_size=4, side="out"),
        lambda W, p: block([rotation(q, 4) for q in p["Q"]]) @ W,
        lambda o, i: o // 4 * 6,
    ),
    "oft-neumann": Row(
        orthogonal.OFT(block_size=4, neumann=5),
        lambda W, p: W @ block([series(skew_of(q, 4)) for q in p["Q"]]),
        lambda o, i: i // 4 * 6,
    ),
    "oft-share": Row(
        orthogonal.OFT(block_size=4, share=True),
        lambda W, p: W @ block([rotation(p["Q"][0], 4)] * (W.shape[1] // 4)),
        lambda o, i: 6,
    ),
    "coft": Row(
        orthogonal.OFT(block_size=4, eps=0.5),
        lambda W, p: (
            W @ block([rotation(q * min(1, 0.5 / len(p["Q"]) ** 0.5 / (2**0.5 * float(q.norm()))), 4) for q in p["Q"]])
        ),
        lambda o, i: i // 4 * 6,
    ),
    "boft": Row(
        orthogonal.BOFT(block_size=2, m=3),
        lambda W, p: torch.diag(p["s"]) @ W @ butterfly_product(p["Q"], 2, W.shape[1]),
        lambda o, i: 3 * i // 2 + o,
    ),
    "boft-noscale": Row(
        orthogonal.BOFT(block_size=4, m=2, scale=False),
        lambda W, p: W @ butterfly_product(p["Q"], 4, W.shape[1]),
        lambda o, i: 2 * i // 4 * 6,
    ),
    "hra": Row(
        orthogonal.HRA(rank=4),
        lambda W, p: W @ reflections(p["u"]),
        lambda o, i: 4 * i,
        factored=True,
    ),
}
