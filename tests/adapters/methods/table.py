"""One row a method: a configuration that fits the small sites below, what it defines in one line of float64, how many
numbers it trains, and HF PEFT's configuration of the same thing. The tests of this folder run over these rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from cases import Attention, DirectRead, Experts, Host, _hf_conv1d, deltas
from torch import Tensor, nn

import mmpeft
from mmpeft.adapters.method import Method
from mmpeft.adapters.methods import (
    activation,
    blocks,
    circulant,
    diff_pruning,
    fact,
    hadamard,
    kronecker,
    lora_kin,
    orthogonal,
    sparse,
    subspace,
)

OUT, INTO = 24, 16  # of the linear site: both sides divide by 4 and 8, neither is a power of the other


@dataclass(frozen=True)
class Row:
    method: Method
    define: Callable[[Tensor, dict[str, Tensor]], Tensor]  # (W, the site's tensors) -> W', independently of the method
    count: Callable[[int, int], int]  # (out, in) -> trained numbers at one linear site
    gap: float = 2e-6  # how far the start is from the identity
    factored: bool = False
    stacks: bool = True  # adapts expert stacks too
    lr: float = 0.03
    size: float = 0.3  # spread of the random tensors that tests fill in
    tensor: str = ""  # of vector methods: the vector of the linear place that they adapt, by its path in the model


def outer(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("o,i->oi", a, b)


def scattered(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W plus the values at their flat places."""
    return W + torch.sparse_coo_tensor(p["index"][None], p["value"], (W.numel(),)).to_dense().view(W.shape)


def block(parts: list[Tensor]) -> Tensor:
    return torch.block_diag(*parts)


def rolled(w: Tensor) -> Tensor:
    """A circulant matrix by rolling its first column."""
    return torch.stack([w.roll(j) for j in range(len(w))], 1)


def bat_product(W: Tensor, D: Tensor) -> Tensor:
    """Every 4 x 4 block of W times its row's D."""
    rows = zip(W.split(4, 0), D, strict=True)
    return torch.cat([torch.cat([w @ d for w in row.split(4, 1)], 1) for row, d in rows], 0)


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


def spectrum(W: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Inverse DFT by its sum of waves."""
    (o, i), total = W.shape, torch.zeros_like(W)
    rows, columns = torch.arange(o, dtype=W.dtype), torch.arange(i, dtype=W.dtype)
    for place, c in zip(p["places"].tolist(), p["c"], strict=True):
        phase = 2 * torch.pi * (rows[:, None] * (place // i) / o + columns[None, :] * (place % i) / i)
        total = total + c * phase.cos() / (o * i)
    return total


def fastfood_dense(p: dict[str, Tensor], size: int) -> Tensor:
    """S H G Pi H B as explicit matrices."""
    n = len(p["gauss"])
    H = torch.ones(1, 1, dtype=p["t"].dtype)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    P = torch.eye(n, dtype=H.dtype)[p["order"]]
    full = H @ torch.diag(p["gauss"]) @ P @ H @ torch.diag(p["signs"].to(H.dtype))
    return (full[:size, : len(p["t"])] @ p["t"]) / (size * p["gauss"].square().sum()).sqrt()


def grid_blocks(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    return torch.cat([torch.cat([U @ S[a, b] @ V for b in range(S.shape[1])], 1) for a in range(S.shape[0])])


def heads_of(p: dict[str, Tensor]) -> Tensor:
    return torch.cat([C @ D for C, D in zip(p["C"], p["D"], strict=True)])


ROWS: dict[str, Row] = {
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


@dataclass(frozen=True)
class Place:
    """A host with a matrix site whose sides fit every row's block sizes."""

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Tensor]
    match: str = "site"
    factored: bool = False
    refuses: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return self.name


def _conv1d() -> nn.Module:
    site = _hf_conv1d()
    site.__init__(OUT, INTO)
    return Host(site, INTO)


PLACES = [
    Place("linear", lambda: Host(nn.Linear(INTO, OUT), INTO), lambda: torch.randn(3, 5, INTO), factored=True),
    Place("narrow", lambda: Host(nn.Linear(OUT, INTO), OUT), lambda: torch.randn(3, OUT), factored=True),
    Place("hf-conv1d", _conv1d, lambda: torch.randn(3, 5, INTO), factored=True),
    Place("conv2d", lambda: Host(nn.Conv2d(4, 24, 2, stride=2, padding=1)), lambda: torch.randn(3, 4, 7, 5)),
    Place("convt2d", lambda: Host(nn.ConvTranspose2d(4, 24, 2, stride=2)), lambda: torch.randn(3, 4, 5, 3)),
    Place(
        "embedding",
        lambda: Host(nn.Embedding(16, 24)),
        lambda: torch.randint(0, 16, (3, 7)),
        refuses=frozenset({"ssf", "attn-scale-lite"}),
    ),
    Place("mha", lambda: _Wide(), lambda: torch.randn(3, 5, 16), "inner.site[q,v]"),
    Place("read", lambda: _Read(), lambda: torch.randn(3, 5, 16), "inner.qkv[k]"),
    Place("experts", lambda: Host(Experts(True), 6), lambda: torch.randn(5, 6)),
]


class _Wide(nn.Module):
    """Self-attention of width 16, so that [q] and [v] are 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.inner.site = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.inner.site(x, x, x, need_weights=False)[0]


class _Read(nn.Module):
    """A fused projection whose weight is read past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DirectRead()
        self.inner.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def grid() -> list[tuple[str, Place]]:
    """(row, place) pairs that make sense together; experts have sides of 8, 6 and 4, so they get their own test."""
    matrices = [(name, place) for place in PLACES[:-1] for name in ROWS if name not in place.refuses]
    return matrices + [(name, place) for place in PLACES[:3] for name in VECTORS]


def build(name: str, place: Place, adapter: str = "a", **kwargs: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """(adapted model, input, base output)."""
    torch.manual_seed(0)
    model, x = place.make().eval(), place.data()
    with torch.no_grad():
        base = model(x).clone()
    mmpeft.attach(model, {match_of(name, place): ALL[name].method}, name=adapter, example=x, **kwargs)
    return model, x, base


def match_of(name: str, place: Place) -> str:
    """The pattern of a row at a place: its matrix, or the module of the row's vector."""
    path = ALL[name].tensor
    return path.rpartition(".")[0] if path else place.match


def weight_delta(model: nn.Module, adapter: str = "a", tensor: str = "") -> Any:
    """The delta on the first matrix, or on a vector by its path."""
    found = deltas(model, adapter)
    if tensor:
        return next(d for d in found if f"{d.site.path}.{d.site.tensor}" == tensor)
    return next(d for d in found if "bias" not in d.site.tensor)


from rows_core import CORE_ROWS, VECTORS  # noqa: E402  (rows of further families; they use `Row` from here)
from rows_new import NEW_ROWS  # noqa: E402
from rows_rank import RANK_ROWS  # noqa: E402

ROWS.update({**CORE_ROWS, **RANK_ROWS, **NEW_ROWS})
ALL = {**ROWS, **VECTORS}
