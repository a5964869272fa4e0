"""How every method starts and what its fields are by default: the data of `test_inits.py`.

STARTS: of every tensor that a method has at a site, the distribution the paper gives it (or, where the paper leaves it open,
its authors' code or HF PEFT; where neither starts as the identity, 0). DEFAULTS and
CHOICES: every number among the fields, and every word and switch that is on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmpeft

Check = Callable[[Tensor, Tensor, dict[str, Tensor]], bool]  # (tensor, base weight [out, in], all tensors of the site)
OUT, IN = 96, 64  # of the linear site; call methods have IN on both sides


def near(a: Tensor, b: Tensor | float, tolerance: float = 1e-5) -> bool:
    return bool((a.double() - b).abs().max() <= tolerance)


def value(v: float) -> Check:
    return lambda t, W, p: near(t, v, 0 if v in (0, 1) else 1e-7)


def bound(b: float) -> Check:
    """Uniform on +-b: reaches near it (all of n draws stay below with a chance of 1e-4), never past it, and spreads so."""

    def check(t: Tensor, W: Tensor, p: dict[str, Tensor]) -> bool:
        n, most = t.numel(), float(t.abs().max())
        spread = abs(float(t.double().square().mean().sqrt()) / (b / 3**0.5) - 1)
        return 1e-4 ** (1 / n) * b <= most <= b * (1 + 1e-6) and spread <= 2.5 / n**0.5 and bool((t < 0).any())

    return check


def std(s: float) -> Check:
    """Normal with standard deviation s: the spread within 4.5 of its own deviations, some values past 1.8 s."""

    def check(t: Tensor, W: Tensor, p: dict[str, Tensor]) -> bool:
        n = t.numel()
        spread = float(t.double().square().mean().sqrt()) / s
        return abs(spread - 1) <= 4.5 / (2 * n) ** 0.5 and float(t.abs().max()) > 1.8 * s and bool((t < 0).any())

    return check


def equals(make: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Check:
    """The same as an expression of the base weight and the site's other tensors."""
    return lambda t, W, p: t.shape == make(W, p).shape and near(t, make(W, p).double())


def orthogonal(t: Tensor, W: Tensor, p: dict[str, Tensor]) -> bool:
    return near(t @ t.mT, torch.eye(len(t)).double(), 1e-5)


def share(of: float) -> Check:
    """Ones and zeros, `of` ones."""
    return lambda t, W, p: (
        set(t.unique().tolist()) == {0, 1} and abs(float(t.double().mean()) - of) <= 2 / t.numel() ** 0.5
    )


def distinct(t: Tensor, W: Tensor, p: dict[str, Tensor]) -> bool:
    """Different places of the matrix, not simply the first."""
    return len(t.unique()) == len(t) and 0 <= int(t.min()) and int(t.max()) < W.numel() and not same(t, len(t))


def same(t: Tensor, n: int) -> bool:
    return torch.equal(t, torch.arange(n))


def first(t: Tensor, W: Tensor, p: dict[str, Tensor]) -> bool:
    return same(t, len(t))


def permutation(t: Tensor, W: Tensor, p: dict[str, Tensor]) -> bool:
    return same(t.sort().values, len(t)) and not same(t, len(t))


def signs(t: Tensor, W: Tensor, p: dict[str, Tensor]) -> bool:
    return set(t.unique().tolist()) == {-1, 1} and abs(float(t.double().mean())) < 0.1


def top(W: Tensor, r: int) -> Tensor:
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :r] * S[:r] @ V[:r]


def product_is(make: Callable[[Tensor, int], Tensor], scale: float = 1.0) -> Check:
    """A, whose product with B is a part of the weight, in equal shares of the singular values or by QR."""
    return lambda t, W, p: near(scale * (p["B"] @ p["A"]).double(), make(W, len(p["A"])), 1e-4)


def balanced(t: Tensor, W: Tensor, p: dict[str, Tensor]) -> bool:
    """Columns of B and rows of A of the same norm: each has the root of the singular values."""
    return near(p["B"].norm(dim=0), p["A"].norm(dim=1).double(), 1e-4)


def leading_qr(W: Tensor, r: int) -> Tensor:
    Q, R = torch.linalg.qr(W.double())
    return Q[:, :r] @ R[:r]


ZERO, ONE, PENDING = value(0), value(1), value(-1)  # -1: places that data will choose
KAIMING = bound(IN**-0.5)  # nn.Linear's start of an [r, in] matrix: Kaiming-uniform with a = sqrt(5)
PAIR = {"A": KAIMING, "B": ZERO}  # LoRA's start, but for the paper's Gaussian A
COLUMN_NORMS = equals(lambda W, p: W.double().norm(dim=0))
RANDOM_PLACES, PLACES = {"value": ZERO, "index": distinct}, {"value": ZERO, "index": PENDING}
LOW_RANK_GROWS = {"P": std(0.02), "Q": std(0.02)}
PROJECTION = {"A": std(1.0), "B": std(1.0)}


def glorot(a: int, b: int) -> Check:
    return bound((6 / (a + b)) ** 0.5)


@dataclass(frozen=True)
class Start:
    method: Any
    tensors: dict[str, Check]


BOTTLENECK = {"down_weight": KAIMING, "down_bias": ZERO, "up_weight": ZERO, "up_bias": ZERO}
GATE = {"gate_weight": std(0.02), "gate_bias": ZERO}
FASTFOOD = {"t": ZERO, "signs": signs, "order": permutation, "gauss": std(1.0)}
M = mmpeft
STARTS = [
    # scaling: gains 1, offsets 0
    Start(M.Propulsion(vectors=3), {"z": ONE}),
    Start(M.SSF(), {"gamma": ONE, "beta": ZERO}),
    Start(M.IA3(), {"l": ONE}),
    Start(M.RED(), {"l": ONE, "b": ZERO}),
    Start(M.HeadScaling(num_heads=4), {"a": std(1e-3)}),
    Start(M.LoFiT(num_heads=4), {"v": ZERO, "index": first}),
    Start(M.AttnScale(num_heads=4, tokens=9), {"A": ONE}),
    Start(M.AttnScaleLite(num_heads=4), {"s": ONE}),
    Start(M.DRA(), {"delta": ZERO}),
    Start(M.PEDRO(targets=("q_proj", "up_proj")), {"D": KAIMING, "U": ZERO}),
    Start(M.RepE(), {"v": ZERO, "strength": ONE}),
    Start(M.ITI(num_heads=4), {"v": ZERO, "strength": ONE}),
    Start(M.LayerNormTuning(), {"delta": ZERO}),
    # selective: where they are
    Start(M.Full(), {"value": equals(lambda W, p: W)}),
    Start(M.Mixout(p=0.8), {"value": equals(lambda W, p: W), "M": value(0.2)}),
    Start(M.BitFit(), {"delta": ZERO}),
    Start(M.HiWi(of="weight"), {"D": KAIMING, "U": ZERO}),
    Start(M.RoCoFT(rank=3), {"delta": ZERO, "index": first}),
    Start(M.Sparse(count=40), RANDOM_PLACES),
    Start(M.SHiRA(rank=2), RANDOM_PLACES),
    Start(M.PaFi(density=0.01), {"value": ZERO, "index": equals(
        lambda W, p: W.abs().flatten().topk(len(p["index"]), largest=False).indices.sort().values)}),
    Start(M.DnA(count=40), {"value": ZERO, "index": distinct}),
    Start(M.SpIEL(count=40), {**RANDOM_PLACES, "before": ZERO}),
    Start(M.SpIELMA(count=40), {**RANDOM_PLACES, "before": ZERO}),
    *(Start(m(count=5), PLACES) for m in (M.FishMask, M.ChildTuningD, M.LTSFT, M.UBitFit, M.SecondOrderMask, M.SHPEFT,
                                          M.FAR, M.NEFT)),
    Start(M.SparseRows(count=5, criterion="magnitude"), {"value": ZERO, "index": equals(
        lambda W, p: W.abs().sum(1).topk(5).indices.sort().values)}),
    Start(M.DiffPruning(structured=True), {"w": ZERO, "alpha": value(1.5), "alpha_group": value(1.5),
                                           "noise": ZERO, "noise_group": ZERO}),
    Start(M.XPEFT(size=8), {"a": ZERO, "b": ZERO, "down": std(0.02), "up": std(0.02), "down_bias": ZERO,
                            "up_bias": ZERO}),
    # low rank and structured
    Start(M.LoRA(), PAIR),
    Start(M.LoRA(rank=8, init_from="gaussian"), {"A": std(1 / 8), "B": ZERO}),
    Start(M.LoRA(init_from="orthogonal"), {"A": orthogonal, "B": ZERO}),
    Start(M.LoRA(init_from="pissa"), {"A": product_is(top), "B": balanced, "A0": equals(lambda W, p: p["A"]),
                                      "B0": equals(lambda W, p: p["B"])}),
    Start(M.LoRA(init_from="olora", alpha=4), {
        "A": product_is(leading_qr, 4 / 8), "B": lambda t, W, p: orthogonal(t.mT, W, p),
        "A0": equals(lambda W, p: p["A"]), "B0": equals(lambda W, p: p["B"])}),
    Start(M.LoRAPlus(), PAIR),
    Start(M.DoRA(), {**PAIR, "m": equals(lambda W, p: W.double().norm(dim=1))}),
    Start(M.VeRA(), {"d": value(0.1), "b": ZERO, "A": bound((6 / IN) ** 0.5), "B": bound((6 / 256) ** 0.5)}),
    Start(M.LoRAFA(), PAIR),
    Start(M.LoRAXS(), {"R": std(1e-5), "B": lambda t, W, p: near((t @ p["A"]).double(), top(W, 8), 1e-4),
                       "A": orthogonal}),
    Start(M.MoSLoRA(), {**PAIR, "M": orthogonal}),
    Start(M.MoSLoRA(mixer="kaiming"), {**PAIR, "M": bound(8**-0.5)}),
    Start(M.KernelMix(heads=4, head_rank=2), {**PAIR, "C": ZERO, "D": KAIMING}),
    Start(M.DeltaLoRA(), {**PAIR, "A0": equals(lambda W, p: p["A"]), "B0": ZERO, "on": ONE}),
    Start(M.RoseLoRA(), PAIR),
    Start(M.DeLoRA(), {**PAIR, "lam": value(15), "norms": COLUMN_NORMS}),
    Start(M.RandLoRA(), {"lambda_": ZERO, "gamma": value(1 / IN), **PROJECTION}),  # two pairs, smaller side 64
    Start(M.KronA(), {"A": bound(8**-0.5), "B": ZERO}),  # 96 = 8 x 12, 64 = 8 x 8
    Start(M.KronAB(), {"A": bound(8**-0.5), "B": ZERO}),
    Start(M.KronARes(), {"A": bound(8**-0.5), "B": ZERO, "s_res": ZERO}),
    Start(M.LoKr(), {"C": ZERO, "D": bound(8**-0.5)}),
    Start(M.LoKr(rank=2, decompose_both=True), {"C1": ZERO, "C2": bound(8**-0.5), "D1": bound(2**-0.5),
                                                "D2": bound(8**-0.5)}),
    Start(M.KAdaptation(), {"A": std(0.01), "u": glorot(OUT // 4, 1), "v": ZERO}),
    Start(M.LoHa(), {"A1": KAIMING, "B1": bound(8**-0.5), "A2": KAIMING, "B2": ZERO}),
    Start(M.HiRA(), PAIR),
    Start(M.FacTTT(), {"U": ZERO, "V": glorot(16, 32), "S": glorot(16, 16)}),  # 96 and 64 in blocks of 32
    Start(M.FacTTK(), {"U": ZERO, "V": glorot(16, 32), "c": glorot(2, 16), "P": glorot(16, 16)}),
    Start(M.C3A(), {"w": ZERO}),
    Start(M.SURM(), {"c": ZERO}),
    Start(M.SURM(structure="toeplitz"), {"t": ZERO}),
    Start(M.SURM(structure="ldr", rank=4), {"g": ZERO, "h": std(OUT**-0.5)}),
    Start(M.FourierFT(), {"c": ZERO, "places": distinct}),
    Start(M.GraLoRA(hybrid_rank=4), {"A": bound((IN / 2) ** -0.5), "B": ZERO, "A_hybrid": KAIMING, "B_hybrid": ZERO}),
    Start(M.MiSS(rank=8), {"D": ZERO}),
    Start(M.OFT(), {"Q": ZERO}),
    Start(M.BOFT(), {"Q": ZERO, "s": ONE}),
    Start(M.HRA(), {"u": lambda t, W, p: torch.equal(t[::2], t[1::2]) and KAIMING(t[::2], W, p)}),
    Start(M.DID(), FASTFOOD),
    Start(M.SAID(), {**FASTFOOD, "lam": ONE}),
    Start(M.ReLoRA(), {**PAIR, "A_past": ZERO, "B_past": ZERO, "done": ZERO}),
    # bottlenecks and prompts
    Start(M.Bottleneck(), BOTTLENECK),
    Start(M.AdaptFormer(), BOTTLENECK),
    Start(M.ConvAdapter(), {**BOTTLENECK, "conv_weight": bound(1 / 3), "conv_bias": ZERO}),
    Start(M.PHMAdapter(), {"down_A": std(0.01), "down_B": glorot(1, 16), "down_bias": ZERO, "up_A": std(0.01),
                           "up_B": ZERO, "up_bias": ZERO}),
    Start(M.Compacter(size=16), {"down_A": std(0.01), "down_s": glorot(4, 1), "down_t": glorot(1, 16), "down_bias": ZERO,
                                 "up_A": std(0.01), "up_s": glorot(16, 1), "up_t": ZERO, "up_bias": ZERO}),
    Start(M.Prefix(num_heads=4), {"K": std(0.02), "V": std(0.02)}),
    Start(M.PrefixTuning(num_heads=4), {"E": std(1.0), "W": KAIMING, "w": KAIMING, "M": bound(512**-0.5),
                                        "m": bound(512**-0.5)}),
    Start(M.ETT(num_heads=4), {"E": std(0.02), "W": KAIMING, "M": ZERO}),
    Start(M.VPT(after=0), {"prompts": bound((6 / (3 * 16**2 + IN)) ** 0.5)}),
    Start(M.PromptTuning(), {"prompts": lambda t, W, p: all(bool((W == row).all(1).any()) for row in t)}),
    Start(M.PromptTuning(init_from="normal"), {"prompts": std(0.02)}),
    # ranks that change
    Start(M.DyLoRA(), {**PAIR, "size": value(8), "draw": value(8)}),
    Start(M.AdaLoRA(), {**LOW_RANK_GROWS, "lam": ZERO, "mask": ONE}),
    Start(M.SoRA(), {**PAIR, "g": ONE}),
    Start(M.IncreLoRA(), {**LOW_RANK_GROWS, "lam": value(1e-5), "mask": equals(
        lambda W, p: torch.tensor([1.0] + [0.0] * 7))}),
    Start(M.AutoLoRA(), {**PAIR, "logits": ZERO}),
    Start(M.CapaBoost(), {**PAIR, "M": share(0.5), "N": share(0.5)}),
    # LoRA with a regime, pruning, quantised
    Start(M.LoRADropout(), {**PAIR, "m_in": ONE, "m_out": ONE}),
    Start(M.PeriodicLoRA(), {**PAIR, "A_past": ZERO, "B_past": ZERO, "done": ZERO}),
    Start(M.LoRAPrune(), {**PAIR, "mask": ONE}),
    Start(M.StructuredMask(), {"m": ONE}),
    Start(M.APT(rank=8, start=3), {"A": std(1 / 8), "B": ZERO, "m_in": ONE, "m_out": ONE, "mask": equals(
        lambda W, p: torch.tensor([1.0] * 3 + [0.0] * 5))}),
    Start(M.FLOP(), {"P": lambda t, W, p: near((t @ p["Q"]).double(), W.double(), 1e-4),
                     "Q": lambda t, W, p: near(t.norm(dim=1), p["P"].norm(dim=0).double(), 1e-4),
                     "alpha": value(1.5), "noise": ZERO}),
    Start(M.ProPETL(reduction=2), {"down_weight": KAIMING, "up_weight": ZERO, "down_score": KAIMING,
                                   "up_score": bound((IN / 2) ** -0.5)}),
    Start(M.ProPETL(bias=True), {**BOTTLENECK, "down_score": KAIMING, "up_score": bound((IN // 12) ** -0.5)}),
    Start(M.Gated(), {**PAIR, **GATE}),
    Start(M.Gated(M.Bottleneck()), {**BOTTLENECK, **GATE}),
    Start(M.AdaDEFT(), {"w": ONE}),
    Start(M.LayerDrop(), {}),
    Start(M.QALoRA(group=8), {"A": bound((IN / 8) ** -0.5), "B": ZERO}),
    Start(M.PEQA(), {"ds": ZERO, "s": equals(lambda W, p: W.double().abs().amax(1)[:, None] / 7)}),
    Start(M.LRQAT(), {**PAIR, "s": equals(lambda W, p: W.double().abs().amax(1) / 7), "s0": equals(
        lambda W, p: p["s"])}),
]  # fmt: skip

SPARSE = {"density": 0.005, "seed": 0}  # FISH Mask's 0.5 %
LOW = {"rank": 8, "dropout": 0.0}  # LoRA's commonest; a scale of 1 (alpha None)
BOX = {"reduction": 16, "scale": 1.0, "dropout": 0.0}  # Houlsby's and Pfeiffer's 16
DEFAULTS: dict[str, dict[str, float]] = {
    "Propulsion": {"degree": 15, "vectors": 1},
    "HeadScaling": {"std": 1e-3},
    "AttnScale": {"tokens": 197},
    "PEDRO": {"rank": 12},
    "Mixout": {"p": 0.7},
    "HiWi": {"rank": 16},
    "RoCoFT": {"rank": 1, "seed": 0},
    "Sparse": SPARSE,
    "SHiRA": {**SPARSE, "rank": 8},
    "FishMask": SPARSE,
    "PaFi": SPARSE,
    "ChildTuningD": {**SPARSE, "density": 0.2},
    "LTSFT": {**SPARSE, "density": 0.05},
    "UBitFit": {**SPARSE, "density": 0.5},
    "SecondOrderMask": SPARSE,
    "SHPEFT": {**SPARSE, "density": 1e-4},
    "DnA": {**SPARSE, "density": 0.05, "rank": 8, "iterations": 5},
    "SparseRows": {**SPARSE, "density": 0.05},
    "FAR": {**SPARSE, "density": 0.4},
    "NEFT": {**SPARSE, "density": 0.05},
    "SpIEL": {**SPARSE, "density": 0.01},
    "SpIELMA": {**SPARSE, "density": 0.01},
    "DiffPruning": {"alpha": 1.5},
    "XPEFT": {**BOX, "adapters": 100, "std": 0.02, "seed": 0},
    "LoRA": {**LOW, "lr_ratio": 1.0},
    "LoRAPlus": {**LOW, "lr_ratio": 16.0},
    "DoRA": {**LOW, "lr_ratio": 1.0},
    "VeRA": {"rank": 256, "dropout": 0.0, "d_initial": 0.1, "seed": 0},
    "LoRAXS": {**LOW, "std": 1e-5},
    "KernelMix": {**LOW, "heads": 1, "head_rank": 1},
    "DeltaLoRA": {**LOW, "lam": 2.0},
    "RoseLoRA": {**LOW, "sparsity": 0.95},
    "DeLoRA": {**LOW, "lam": 15.0},
    "RandLoRA": {**LOW, "rank": 32, "seed": 0},
    "KronA": {"scale": 1.0},
    "KronAB": {"scale": 1.0},
    "KronARes": {"scale": 1.0},
    "LoKr": {"rank": 8, "factor": -1},
    "KAdaptation": {"rank": 1, "t": 4},
    "HiRA": {"rank": 32},
    "FacTTT": {**LOW, "rank": 16},
    "FacTTK": {**LOW, "rank": 16},
    "C3A": {"block_size": 8},
    "SURM": {"rank": 1, "scale": 1.0},
    "FourierFT": {"n": 1000, "scale": 150.0, "seed": 777},
    "GraLoRA": {**LOW, "rank": 32, "k": 2, "hybrid_rank": 0},
    "MiSS": {"rank": 64, "dropout": 0.0},
    "OFT": {"block_size": 32},
    "BOFT": {"block_size": 8, "m": 2},
    "HRA": {"rank": 8},
    "DID": {"dimension": 1000, "seed": 0},
    "SAID": {"dimension": 1000, "seed": 0},
    "ReLoRA": {**LOW, "stages": 4},
    "Bottleneck": BOX,
    "ProPETL": {**BOX, "reduction": 12, "density": 0.5, "lr_ratio": 30.0},
    "AdaptFormer": {**BOX, "size": 64, "scale": 0.1},
    "ConvAdapter": {**BOX, "reduction": 4, "kernel": 3, "prefix": 0},
    "PHMAdapter": {**BOX, "n": 4},
    "Compacter": {**BOX, "reduction": 32, "n": 4, "rank": 1},
    "Prefix": {"num_tokens": 10, "std": 0.02},
    "PrefixTuning": {"num_tokens": 10, "std": 1.0, "hidden": 512},
    "ETT": {"num_tokens": 10, "std": 0.02, "hidden": 64},
    "VPT": {"num_tokens": 10, "dropout": 0.0},
    "PromptTuning": {"num_tokens": 20},
    "DyLoRA": {**LOW, "min_rank": 1},
    "AdaLoRA": {**LOW, "std": 0.02},
    "IncreLoRA": {**LOW, "start": 1e-5, "std": 0.02},
    "CapaBoost": {**LOW, "d": 2, "density": 0.5, "seed": 0},
    "LoRADropout": {**LOW, "p": 0.1},
    "PeriodicLoRA": {**LOW, "stages": 4},
    "LoRAPrune": {**LOW, "group": 1},
    "StructuredMask": {"group": 1},
    "APT": {**LOW, "start": 8},
    "FLOP": {"rank": 0, "dropout": 0.0, "location": 1.5},
    "AdaDEFT": {"threshold": 0.05},
    "LayerDrop": {"p": 0.2},
    "QALoRA": {**LOW, "group": 32},
    "LRQAT": {**LOW, "bits": 4},
    **{name: LOW for name in ("LoRAFA", "MoSLoRA", "LoHa", "SoRA", "AutoLoRA")},
}

BOXES = {"activation": "relu", "bias": True}
CHANGED = {"criterion": "change", "axis": "rows", "order": "largest"}
CHOICES: dict[str, dict[str, object]] = {
    "IA3": {"side": "out"},  # keys and values
    "LoFiT": {"heads": ()},  # all, until `lofit_plan` chooses
    "PEDRO": {"activation": "gelu", "targets": ("q_proj", "v_proj", "up_proj")},
    "HiWi": {"of": "bias", "activation": "relu"},
    "RoCoFT": {"axis": "rows", "select": "first"},  # the authors' code
    "Sparse": {"criterion": "random"},
    "SHiRA": {"criterion": "random"},
    "FishMask": {"criterion": "fisher"},
    "PaFi": {"criterion": "small_magnitude"},
    "ChildTuningD": {"criterion": "fisher"},
    "LTSFT": {"criterion": "change"},
    "UBitFit": {"criterion": "sensitivity"},
    "SecondOrderMask": {"criterion": "second_order"},
    "SHPEFT": {"criterion": "gradient", "norm": "l1"},
    "DnA": {"criterion": "magnitude"},
    "SparseRows": {**CHANGED, "criterion": "random"},
    "FAR": CHANGED,
    "NEFT": CHANGED,
    "SpIEL": {"criterion": "random"},
    "SpIELMA": {"criterion": "random"},
    "XPEFT": {**BOXES, "activation": "gelu"},
    "SURM": {"structure": "circulant"},
    **{name: {"init_from": "default"} for name in ("LoRA", "LoRAPlus", "DoRA")},
    "LoRAXS": {"save_projection": True},
    "MoSLoRA": {"mixer": "orthogonal"},
    "OFT": {"side": "in"},
    "BOFT": {"scale": True},
    "Bottleneck": BOXES,
    "ProPETL": {"activation": "relu"},
    "Gated": {"inner": mmpeft.LoRA()},
    "AdaptFormer": BOXES,
    "ConvAdapter": BOXES,
    "PHMAdapter": {**BOXES, "activation": "gelu"},
    "Compacter": {**BOXES, "activation": "gelu", "share": True},
    "VPT": {"deep": True},
    "PromptTuning": {"init_from": "vocabulary"},
    "DyLoRA": {"update": "all"},
    "LoRAPrune": {"axis": "rows"},
    "StructuredMask": {"axis": "columns"},
}
